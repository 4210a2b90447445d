# SPDX-License-Identifier: Apache-2.0
import io
import re
import sys

import pytest

from tests.handlers import training


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stderr(request, monkeypatch):
    stream = Terminal() if request.param == "terminal" else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


@pytest.mark.parametrize("stderr", ["file"], indirect=True)
def test_without_a_terminal_a_line_an_epoch(tmp_path, stderr):
    training.build(tmp_path, epochs=2).run()
    lines = [line for line in stderr.getvalue().splitlines() if line.startswith("epoch")]
    assert len(lines) == 2
    assert "\r" not in stderr.getvalue()
    assert re.match(r"epoch 1/2: +50%\|.*\| 3/6 \[.*loss \d\.\d{3}, fusion_dice_mean 0\.\d{3}", lines[0])
    assert re.match(r"epoch 2/2: 100%\|.*\| 6/6 \[", lines[1])


@pytest.mark.parametrize("stderr", ["file"], indirect=True)
def test_a_resumed_run_goes_on_where_it_stopped(tmp_path, stderr):
    training.build(tmp_path, epochs=1).run()
    stderr.truncate(0)
    training.build(tmp_path, epochs=3, resume=True).run()
    lines = [line for line in stderr.getvalue().splitlines() if "epoch" in line and "it/s" in line or "s/it" in line]
    assert [re.search(r"(\d+)/9", line).group(1) for line in lines] == ["6", "9"]


@pytest.mark.parametrize("stderr", ["terminal"], indirect=True)
def test_on_a_terminal_one_bar_over_the_whole_run(tmp_path, stderr):
    training.build(tmp_path, epochs=2).run()
    text = stderr.getvalue()
    assert "0/6" in text
    assert "6/6" in text
    assert "validating" in text
    assert text.count("\n") == 1
