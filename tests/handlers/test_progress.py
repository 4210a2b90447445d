# SPDX-License-Identifier: Apache-2.0
import io
import re
import sys

from tests.handlers import training


def lines_of(text):
    return [line for line in text.splitlines() if line.startswith("epoch")]


def test_without_a_terminal_a_line_an_epoch(tmp_path, capsys):
    training.build(tmp_path, epochs=2).run()
    text = capsys.readouterr().err
    first, second = lines_of(text)
    assert "\r" not in text
    assert re.match(r"epoch 1/2: +50%\|.*\| 3/6 \[.*loss \d\.\d{3}, fusion_dice_mean 0\.\d{3}", first)
    assert re.match(r"epoch 2/2: 100%\|.*\| 6/6 \[", second)


def test_a_resumed_run_goes_on_where_it_stopped(tmp_path, capsys):
    training.build(tmp_path, epochs=1).run()
    capsys.readouterr()
    training.build(tmp_path, epochs=3, resume=True).run()
    lines = lines_of(capsys.readouterr().err)
    assert [re.search(r"(\d+)/9", line).group(1) for line in lines] == ["6", "9"]


def test_on_a_terminal_one_bar_over_the_whole_run(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    engine = training.build(tmp_path, epochs=2)
    monkeypatch.setattr(sys, "stderr", terminal)
    engine.run()
    text = terminal.getvalue()
    assert "0/6" in text
    assert "validating" in text
    last = text.rstrip("\n").split("\r")[-1]
    assert re.match(r"epoch 2/2.*: 100%\|.*\| 6/6 \[", last)
    assert text.count("\n") == 1
