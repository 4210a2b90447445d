# SPDX-License-Identifier: Apache-2.0
"""The parts of the comparison that need no official package; what that one found is recorded here."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from monai_cggm.errors import CaseError, DataError
from monai_cggm.metrics import BRATS_REGIONS, region_scores
from tests.scripts.loading import script_module

INF, NAN = math.inf, math.nan
REGIONS = ("wt", "tc", "et")

#: Global Dice and HD95 that brats-evaluation 0.0.10 wrote for `small_cases`, in the order of REGIONS.
RECORDED = [
    [(5 / 6, 2.0), (0.75, 2.0), (1 / 3, 2.0)],
    [(54 / 55, 0.0), (1.0, 0.0), (1.0, 0.0)],
    [(NAN, NAN), (NAN, NAN), (NAN, NAN)],
    [(0.0, INF), (0.0, INF), (0.0, INF)],
    [(0.0, INF), (0.0, INF), (0.0, INF)],
    [(5 / 6, 2.0), (0.75, 2.0), (1 / 3, 2.0)],
    [(35 / 48, 2.0), (0.6, 2.0), (NAN, NAN)],
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_module("check_official")


def small_cases(script: ModuleType) -> list:
    truth = np.zeros((24, 20, 18), np.uint8)
    truth[3:15, 3:15, 3:15] = 2
    truth[5:13, 5:13, 5:13] = 1
    truth[5:13, 5:13, 5:8] = 3
    stray = truth.copy()
    stray[18:22, 3:7, 3:7] = 2  # 7 % of the prediction's surface, 4 % of both
    nothing = np.zeros_like(truth)
    shifted = np.roll(truth, 2, axis=2)
    return [
        script.Planted("shifted", shifted, truth),
        script.Planted("stray part", stray, truth),
        script.Planted("both empty", nothing, nothing),
        script.Planted("nothing predicted", nothing, truth),
        script.Planted("nothing there", truth, nothing),
        script.Planted("thick slices", shifted, truth, spacing=(1.0, 1.0, 2.5)),
        script.Planted("label 4", shifted, truth, labels="brats2018"),
    ]


def write_summary(path: Path) -> None:
    """A summary as the official package writes it, with what the comparison reads of it."""
    metrics = []
    for index, regions in enumerate(RECORDED):
        found = {
            name: {"global_bin_dsc": dice, "global_bin_hd95": hd95}
            for name, (dice, hd95) in zip(REGIONS, regions, strict=True)
        }
        metrics.append({**found, "subject_name": f"BraTS-GLI-{index + 1:05d}-000.nii.gz"})
    path.write_text(json.dumps({"metrics": metrics, "missings": []}))


@pytest.fixture
def official(script: ModuleType, tmp_path: Path) -> dict:
    write_summary(tmp_path / "summary.json")
    return script.read_summary(tmp_path / "summary.json")


# --- cases


def test_every_situation_is_planted(script: ModuleType):
    cases = {case.name: case for case in script.planted_cases()}

    def dice(name: str) -> dict:
        return region_scores(cases[name].pred, cases[name].truth, hd95=False)

    assert len(cases) == 10
    assert dice("perfect") == {"dice_WT": 1.0, "dice_TC": 1.0, "dice_ET": 1.0, "dice_mean": 1.0}
    assert all(0 < value < 1 for value in dice("two voxels off").values())
    assert all(0 < value < 1 for value in dice("half of it missed").values())
    assert (cases["one false ET voxel"].pred == 3).sum() == 1
    assert (cases["one false ET voxel"].truth == 3).sum() == 0
    assert dice("one false ET voxel") == pytest.approx({"dice_WT": 1, "dice_TC": 1, "dice_ET": 0, "dice_mean": 2 / 3})
    assert [bool(cases["nothing predicted"].pred.any()), bool(cases["nothing predicted"].truth.any())] == [False, True]
    assert [bool(cases["nothing there"].pred.any()), bool(cases["nothing there"].truth.any())] == [True, False]
    assert not cases["both empty"].pred.any()
    assert not cases["both empty"].truth.any()
    assert dice("one of two lesions")["dice_WT"] == pytest.approx(2 / 3)  # the second mirrors the first
    assert [case.spacing for case in cases.values()].count((1.0, 1.0, 2.5)) == 1
    assert [case.labels for case in cases.values()].count("brats2018") == 1


def test_files_have_the_labels_and_the_spacing_of_their_case(script: ModuleType, tmp_path: Path):
    cases = small_cases(script)
    script.write_cases(cases, tmp_path)
    for index, case in enumerate(cases):
        for folder, classes in (("pred", case.pred), ("truth", case.truth)):
            image = nib.load(tmp_path / folder / f"BraTS-GLI-{index + 1:05d}-000.nii.gz")
            expected = np.where(classes == 3, 4, classes) if case.name == "label 4" else classes
            np.testing.assert_array_equal(np.asarray(image.dataobj), expected)
            assert image.header.get_zooms() == pytest.approx(case.spacing)
    assert len(list(tmp_path.rglob("*.*"))) == 2 * len(cases)


# --- comparison


def test_pooled_distances_are_those_of_the_official_package(script: ModuleType):
    for case, regions in zip(small_cases(script), RECORDED, strict=True):
        if case.name == "label 4":
            continue  # other regions there
        for classes, (_, hd95) in zip(BRATS_REGIONS.values(), regions, strict=True):
            pooled = script.pooled_hd95(np.isin(case.pred, classes), np.isin(case.truth, classes))
            assert pooled == pytest.approx(373.0 if math.isinf(hd95) else hd95, nan_ok=True)


def test_comparison_with_what_was_recorded(script: ModuleType, official: dict):
    rows = {(row.case, row.region): row for row in script.compare(small_cases(script), official)}
    assert len(rows) == 7 * 3
    assert not any(row.unexplained for row in rows.values())
    reasons = {case: {row.reason for (name, _), row in rows.items() if name == case} for case, _ in rows}
    assert reasons["label 4"] == {"label 4 is another class"}
    assert reasons["both empty"] == {"both empty are NaN there"}
    assert all(reasons[case] == {""} for case in reasons if case not in ("label 4", "both empty"))
    assert rows["nothing there", "ET"].official_hd95 == rows["nothing there", "ET"].hd95 == 373.0
    assert (rows["thick slices", "TC"].hd95, rows["thick slices", "TC"].official_hd95) == (5.0, 2.0)
    stray = rows["stray part", "WT"]
    assert stray.hd95 > stray.official_hd95 == stray.pooled == 0.0  # the percentile of each direction, and of both


@pytest.mark.parametrize(
    ("case", "region", "value", "unexplained"),
    [
        (0, "wt", 5 / 6 + 2e-6, True),
        (0, "wt", 5 / 6 - 2e-6, True),
        (0, "wt", 5 / 6 + 5e-7, False),
        (0, "et", NAN, True),
        (2, "tc", 0.0, True),  # both empty, but no longer NaN there
        (3, "tc", NAN, True),  # only one is empty
        (6, "et", 0.0, False),
    ],
)
def test_what_needs_an_explanation(script: ModuleType, official: dict, case, region, value, unexplained):
    scores = official[script.case_id(case)]
    scores[region] = (value, scores[region][1])
    rows = script.compare(small_cases(script), official)
    assert [row.unexplained for row in rows].count(True) == int(unexplained)


def test_a_case_without_official_scores(script: ModuleType, official: dict):
    del official["BraTS-GLI-00002-000"]
    with pytest.raises(DataError, match="case BraTS-GLI-00002-000: no official scores"):
        script.compare(small_cases(script), official)


def test_a_case_that_the_official_package_could_not_score(script: ModuleType, tmp_path: Path):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({"metrics": [{"subject_name": "BraTS-GLI-00001-000.nii.gz", "error": "no such file"}]}))
    with pytest.raises(CaseError, match="case BraTS-GLI-00001-000: the official package failed: no such file"):
        script.read_summary(path)


# --- the command, with a stand-in for the other interpreter


def stand_in(folder: Path, summary: Path | None, *, fails: str = "") -> Path:
    """An executable that is called as Python is, says its version and leaves the recorded summary."""
    path = folder / "python"
    path.write_text(
        f"#!{sys.executable}\n"
        "import shutil, sys\n"
        "assert sys.argv[1:3] == ['-I', '-c'], sys.argv\n"
        "if 'version' in sys.argv[3]:\n"
        "    print('0.0.10')\n"
        "    sys.exit()\n"
        f"if {fails!r}:\n"
        f"    sys.exit({fails!r})\n"
        "options = dict(zip(sys.argv[4::2], sys.argv[5::2], strict=True))\n"
        "assert options['--config'] == 'gli', options\n"
        f"if {str(summary)!r} != 'None':\n"
        f"    shutil.copy({str(summary)!r}, options['--summary_json'])\n"
    )
    path.chmod(0o755)
    return path


def run(script: ModuleType, *arguments: object):
    app = typer.Typer()
    app.command()(script.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_prints_and_keeps_the_differences(script: ModuleType, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(script, "planted_cases", lambda: small_cases(script))
    write_summary(tmp_path / "recorded.json")
    out = tmp_path / "out"
    python = stand_in(tmp_path, tmp_path / "recorded.json")
    result = run(script, "--python", python, "--out", out)
    assert result.exit_code == 0, result.output
    for text in ("brats-evaluation 0.0.10", "0.833333", "label 4 is another class", "15 of 21 comparable"):
        assert text in result.stdout
    assert "UNEXPLAINED" not in result.stdout
    assert {path.name for path in out.iterdir()} == {"pred", "truth", "summary.json", "differences.csv"}
    assert len((out / "differences.csv").read_text().splitlines()) == 1 + 21

    again = run(script, "--python", python, "--out", out)
    assert again.exit_code == 1
    assert "holds files already" in again.stderr


def test_the_command_ends_with_1_where_a_dice_differs(script: ModuleType, tmp_path: Path, monkeypatch):
    cases = small_cases(script)
    off = cases[0].pred.copy()
    off[3, 3, 6] = 0
    monkeypatch.setattr(script, "planted_cases", lambda: [replace(cases[0], pred=off), *cases[1:]])
    write_summary(tmp_path / "recorded.json")
    result = run(script, "--python", stand_in(tmp_path, tmp_path / "recorded.json"))
    assert result.exit_code == 1
    assert "UNEXPLAINED" in result.stdout
    assert "Error: 1 Dice scores differ by more than 1e-06" in result.stderr


@pytest.mark.parametrize(
    ("fails", "message"),
    [("no config gli", "no config gli; expected an environment with brats-evaluation"), ("", "wrote no")],
)
def test_an_official_package_that_does_not_work(script: ModuleType, tmp_path: Path, monkeypatch, fails, message):
    monkeypatch.setattr(script, "planted_cases", lambda: small_cases(script)[:1])
    result = run(script, "--python", stand_in(tmp_path, None, fails=fails))
    assert result.exit_code == 1
    assert message in result.stderr


def test_an_interpreter_that_is_not_there(script: ModuleType, tmp_path: Path):
    result = run(script, "--python", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "nowhere does not run" in result.stderr


def test_nothing_comparable_is_shown_too(script: ModuleType, official: dict, capsys):
    cases = small_cases(script)[2:3]
    rows = script.compare(cases, {script.case_id(0): official[script.case_id(2)]})
    script.show(rows, "0.0.10", Console(width=132))
    assert "0 of 3 comparable" in capsys.readouterr().out
