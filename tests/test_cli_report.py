# SPDX-License-Identifier: Apache-2.0
"""The command ``monai-cggm report``, run as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from monai_cggm.cli import app
from tests.analysis.folders import OBSERVE, cggm, make


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.mark.slow
def test_prints_what_was_made_and_what_was_left_out(tmp_path: Path) -> None:
    one, two = make(tmp_path / "one", OBSERVE), make(tmp_path / "two", cggm(), planned=9)
    result = run(one, two, tmp_path / "none", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "Figure 3 Training without modulation and with CGGM: figure_3.png, .svg, .csv" in text
    assert "Figure 5 left out: needs several CGGM runs with validation that differ in rho or lam alone" in text
    assert "Table 8 left out: needs resources.json of a run with classifiers" in text
    lines = result.stdout.splitlines()
    assert lines[-3:] == [
        f"{tmp_path / 'none'}: no such folder",
        "two: not finished: 4 of 9 epochs are done",
        f"{tmp_path / 'out/report.md'}: 6 made, 3 left out",
    ]
    assert (tmp_path / "out/figure_3.svg").is_file()


@pytest.mark.slow
def test_the_folder_is_report_where_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "one", OBSERVE)
    monkeypatch.chdir(tmp_path)
    assert run("one").exit_code == 0
    assert (tmp_path / "report/report.md").is_file()


def test_no_run(tmp_path: Path) -> None:
    result = run(tmp_path / "none", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.strip() == f"Error: {tmp_path / 'none'}: no such folder"


def test_runs_that_nothing_can_be_made_of(tmp_path: Path) -> None:
    result = run(make(tmp_path / "joint", None), "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.strip() == "Error: nothing could be made of these runs"
    assert "0 made, 9 left out" in result.stdout
