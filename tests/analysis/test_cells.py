# SPDX-License-Identifier: Apache-2.0
"""Reading what cells wrote, and what does not fit."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from monai_cggm.analysis.cells import CellKey, read_cells
from monai_cggm.errors import DataError
from tests.analysis.fake_cells import facts, sample_cell, score_row, scored_cell, write_cell


def test_scores_and_facts_are_read(tmp_path: Path) -> None:
    scored_cell(tmp_path, "joint", "fold-1", 2, lambda case, subset: 0.5 + 0.1 * case, cases=2, classifiers=True)
    cells = read_cells(tmp_path)
    assert cells.done == [CellKey("joint", "fold-1", 2)]
    assert len(cells.scores) == 2 * (7 + 3)
    assert list(cells.scores.columns[:7]) == ["arm", "split", "seed", "case", "part", "predictor", "subset"]
    full = cells.scores[(cells.scores["predictor"] == "fusion") & (cells.scores["subset"] == "flair+t1ce+t2")]
    assert full["dice_mean"].tolist() == pytest.approx([0.5, 0.6])
    assert full["hd95_WT"].tolist() == [10.0, 11.0]
    assert cells.scores["hd95_WT"].isna().sum() == len(cells.scores) - 2
    assert cells.facts["iterations"].tolist() == [600]
    assert cells.facts["modalities"].iloc[0] == ["flair", "t1ce", "t2"]


def test_other_scores_are_read(tmp_path: Path) -> None:
    sample_cell(tmp_path, "joint", "a", 0, lambda case, subset: case < 3 and subset != "t2", classifiers=True)
    cells = read_cells(tmp_path, score="accuracy")
    assert list(cells.scores.columns) == ["arm", "split", "seed", "case", "part", "predictor", "subset", "accuracy"]
    assert len(cells.scores) == 4 * (7 + 3)
    assert cells.scores[cells.scores["subset"] == "t2"]["accuracy"].sum() == 0.0
    assert cells.scores["accuracy"].sum() == 3 * (6 + 2)
    assert cells.facts["convention"].tolist() == [None]
    with pytest.raises(DataError, match="no convention, expected all of arm"):
        read_cells(tmp_path)


def test_a_score_that_cells_lack_is_named(tmp_path: Path) -> None:
    scored_cell(tmp_path, "joint", "a", 0, lambda case, subset: 0.5)
    with pytest.raises(DataError, match="no column accuracy, found case, part, predictor, subset, dice_WT"):
        read_cells(tmp_path, score="accuracy")


def test_an_accuracy_lies_between_0_and_1(tmp_path: Path) -> None:
    path = sample_cell(tmp_path, "joint", "a", 0, lambda case, subset: True) / "scores.csv"
    path.write_text(path.read_text("utf-8").replace("t2,1.0", "t2,1.5", 1), encoding="utf-8")
    with pytest.raises(DataError, match=r"accuracy is '1.5', expected a number from 0 to 1"):
        read_cells(tmp_path, score="accuracy")


@pytest.mark.parametrize("case", ["001", "NA", "1e5"])
def test_cases_are_text(tmp_path: Path, case: str) -> None:
    write_cell(tmp_path, facts("joint", "a", 0), [score_row(case, "fusion", "flair", {"WT": 0.5})])
    assert read_cells(tmp_path).scores["case"].tolist() == [case]


def test_scores_that_were_not_computed_are_nan(tmp_path: Path) -> None:
    row = score_row("x", "fusion", "flair", {"WT": 0.5}) | {"dice_WT": "", "dice_mean": "nan"}
    write_cell(tmp_path, facts("joint", "a", 0), [row])
    scores = read_cells(tmp_path).scores
    assert math.isnan(scores["dice_WT"].iloc[0])
    assert math.isnan(scores["dice_mean"].iloc[0])


def test_failed_and_outstanding_cells_are_named(tmp_path: Path) -> None:
    scored_cell(tmp_path, "joint", "a", 0, lambda case, subset: 0.5)
    write_cell(tmp_path, facts("cggm", "a", 0, status="failed", error="out of memory"), [])
    write_cell(tmp_path, facts("cggm", "a", 1, status="failed", error=None), [])
    (tmp_path / "cells" / "joint" / "a-seed1").mkdir()  # begun, no cell.json yet
    cells = read_cells(tmp_path)
    assert cells.failed == {
        CellKey("cggm", "a", 0): "out of memory",
        CellKey("cggm", "a", 1): "no error was recorded",
    }
    planned = [CellKey(arm, "a", seed) for arm in ("joint", "cggm") for seed in (0, 1)]
    assert cells.outstanding(planned) == [CellKey("joint", "a", 1)]
    assert cells.done == [CellKey("joint", "a", 0)]


def test_facts_of_other_versions_are_read(tmp_path: Path) -> None:
    """Keys that are missing are null, and what reports do not read is left out."""
    path = scored_cell(tmp_path, "joint", "a", 0, lambda case, subset: 0.5) / "cell.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert read_cells(tmp_path).facts[["epochs", "validations"]].iloc[0].tolist() == [120, 12]
    older = {key: value for key, value in content.items() if key not in ("epochs", "validations")} | {"plan": "1f2e"}
    path.write_text(json.dumps(older), encoding="utf-8")
    facts = read_cells(tmp_path).facts
    assert facts[["epochs", "validations"]].iloc[0].tolist() == [None, None]
    assert "plan" not in facts


def test_cells_can_be_narrowed_to_a_plan(tmp_path: Path) -> None:
    for arm in ("joint", "cggm"):
        scored_cell(tmp_path, arm, "a", 0, lambda case, subset: 0.5)
    cells = read_cells(tmp_path)
    assert cells.only([CellKey("cggm", "a", 0)]).done == [CellKey("cggm", "a", 0)]
    assert set(cells.only([CellKey("cggm", "a", 0)]).scores["arm"]) == {"cggm"}
    assert cells.only([]).done == []


def test_a_comparison_without_cells_is_read_and_a_folder_without_is_not(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected the cells of a comparison"):
        read_cells(tmp_path)
    (tmp_path / "cells").mkdir()
    assert read_cells(tmp_path).done == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": "other"}, "it is about other/a-seed0, expected joint/a-seed0"),
        ({"seed": 1}, "it is about joint/a-seed1, expected joint/a-seed0"),
        ({"seed": "0"}, "expected joint/a-seed0"),
        ({"status": "running"}, "status 'running', expected one of done, failed"),
        ({"modalities": None}, "modalities None, expected a list of names"),
        ({"modalities": []}, r"modalities \[\], expected a list of names"),
    ],
)
def test_facts_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = scored_cell(tmp_path, "joint", "a", 0, lambda case, subset: 0.5) / "cell.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(DataError, match=message) as error:
        read_cells(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read as JSON"), ("[]", "found a list, expected an object"), ("{}", "no arm, split, seed")],
)
def test_files_that_are_no_facts_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = scored_cell(tmp_path, "joint", "a", 0, lambda case, subset: 0.5) / "cell.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_cells(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dice_WT": "1.2"}, "line 2: dice_WT is '1.2', expected a number from 0 to 1"),
        ({"dice_WT": "-0.1"}, "line 2: dice_WT is '-0.1'"),
        ({"dice_mean": "good"}, "line 2: dice_mean is 'good'"),
        ({"part": "train"}, "part 'train', expected one of validation, test"),
        ({"predictor": "flair"}, "no row of the predictor 'fusion'"),
        ({"subset": "t1ce+flair"}, r"subset 't1ce\+flair', expected some of flair\+t1ce\+t2 in this order"),
        ({"subset": "adc"}, "subset 'adc'"),
    ],
)
def test_scores_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, str], message: str) -> None:
    row = score_row("x", "fusion", "flair", {"WT": 0.5}) | change
    path = write_cell(tmp_path, facts("joint", "a", 0), [row]) / "scores.csv"
    with pytest.raises(DataError, match=message) as error:
        read_cells(tmp_path)
    assert str(path) in str(error.value)


def test_rows_twice_columns_missing_and_files_missing_are_told_at_once(tmp_path: Path) -> None:
    row = score_row("x", "fusion", "flair", {"WT": 0.5})
    write_cell(tmp_path, facts("one", "a", 0), [row, row])
    write_cell(tmp_path, facts("two", "a", 0), [{"case": "x", "dice_WT": 0.5}])
    write_cell(tmp_path, facts("three", "a", 0), [])
    with pytest.raises(DataError) as error:
        read_cells(tmp_path)
    one, three, two = error.value.problems
    assert "two rows of x, test, fusion, flair" in one
    assert "no column part, predictor, subset, dice_mean, found case, dice_WT" in two
    assert "cannot be read as a table" in three


def test_reading_needs_neither_pytorch_nor_monai() -> None:
    code = (
        "import sys, monai_cggm.analysis.comparison_report; "
        "print(sorted({'torch', 'monai', 'ignite'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
