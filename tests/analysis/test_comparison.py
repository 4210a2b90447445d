# SPDX-License-Identifier: Apache-2.0
"""Tables of a comparison, against numbers that a reader can compute, and what is said about them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from monai_cggm.analysis.cells import CellKey, read_cells
from monai_cggm.analysis.comparison import Comparison, compare, outcome, subset_groups, subsets_of, verdicts
from monai_cggm.analysis.comparison_report import write_report
from monai_cggm.errors import DataError
from tests.analysis.fake_cells import MODALITIES, facts, sample_cell, score_row, scored_cell, write_cell

# What every subset of three modalities scores in the cells below, before what an arm, a seed or a case adds.
DICE = {
    "flair+t1ce+t2": 0.70,
    "flair+t1ce": 0.60,
    "flair+t2": 0.40,
    "t1ce+t2": 0.50,
    "flair": 0.20,
    "t1ce": 0.45,
    "t2": 0.10,
}


def a_study(**changes: Any) -> dict[str, Any]:
    return {
        "reference": "joint",
        "splits": ["configs/splits/a.json"],
        "seeds": [0, 1],
        "key_modality": "t1ce",
        "convention": "brats_legacy",
        "arms": {
            "joint": {},
            "recipe": {"title": "The recipe", "controls": {"shuffled": "shuffled"}},
            "shuffled": None,
        },
    } | changes


def plus(added: float, by_case: float = 0.01) -> Callable[[int, str], float]:
    return lambda case, subset: DICE[subset] + added + by_case * case


def fill(folder: Path, added: dict[tuple[str, str, int], float], **kwargs: Any) -> None:
    for (arm, split, seed), value in added.items():
        scored_cell(folder, arm, split, seed, plus(value), **kwargs)


def row_of(table: pd.DataFrame, **wanted: str) -> dict[str, Any]:
    found = table
    for column, value in wanted.items():
        found = found[found[column] == value]
    assert len(found) == 1, f"{wanted}: {len(found)} rows"
    return dict(found.iloc[0])


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    added = {("joint", "a", 0): 0.0, ("joint", "a", 1): 0.02, ("recipe", "a", 0): 0.1, ("recipe", "a", 1): 0.14}
    fill(tmp_path, added, classifiers=True)
    return compare(read_cells(tmp_path), a_study())


def test_full_set(comparison: Comparison) -> None:
    joint = row_of(comparison.full_set, arm="joint")
    # Cases add 0, 0.01 and 0.02; the seeds' means are 0.71 and 0.73.
    assert joint["dice_mean"] == joint["dice_WT"] == pytest.approx(0.72)
    assert joint["dice_mean_sd"] == pytest.approx(statistics.stdev([0.71, 0.73]))
    assert joint["hd95_ET"] == pytest.approx(11.0)
    assert joint["hd95_ET_sd"] == pytest.approx(0.0)
    assert (joint["splits"], joint["seeds"], joint["cases"]) == (1, 2, 3)
    assert comparison.full_set["arm"].tolist() == ["joint", "recipe"]


def test_subsets(comparison: Comparison) -> None:
    joint = row_of(comparison.subsets, arm="joint")
    expected = {
        "subsets": list(DICE.values()),
        "missing_1": [0.60, 0.40, 0.50],
        "missing_2": [0.20, 0.45, 0.10],
        "with_key": [0.70, 0.60, 0.50, 0.45],
        "without_key": [0.40, 0.20, 0.10],
        "worst": [0.10],
    }
    for column, values in expected.items():
        assert joint[column] == pytest.approx(statistics.fmean(values) + 0.02), column
        assert joint[f"{column}_sd"] == pytest.approx(statistics.stdev([0.01, 0.03])), column
    assert joint["worst_subset"] == "t2"
    assert joint["flair+t2"] == pytest.approx(0.42)
    assert list(comparison.subsets.columns[-7:]) == list(DICE)


def test_differences(comparison: Comparison) -> None:
    """Seeds differ by 10 and by 12 points in every case: all of the spread is theirs, with one degree of freedom."""
    half = 1.0 * math.sqrt(2) * 12.7062 / 1.959964
    for score in ("full", "subsets", "worst", "without_key"):
        found = row_of(comparison.differences, arm="recipe", score=score)
        assert (found["against"], found["role"]) == ("joint", "reference")
        assert found["difference"] == pytest.approx(11.0)
        assert (found["low"], found["high"]) == (pytest.approx(11 - half, abs=1e-4), pytest.approx(11 + half, abs=1e-4))
        assert (found["most_seeds"], found["seeds_resampled"], found["splits_resampled"]) == (2, True, False)
        assert (found["cases"], found["seeds"], found["cells"], found["cells_left_out"]) == (3, 2, 2, 0)
        assert math.isnan(found["p"])  # three cases
    assert len(comparison.differences) == 4


def test_classifiers(comparison: Comparison) -> None:
    found = row_of(comparison.classifiers, arm="joint", modality="t1ce")
    assert found["dice_TC"] == pytest.approx((0.45 + 0.02) / 2)
    assert found["dice_TC_sd"] == pytest.approx(statistics.stdev([0.23, 0.24]))
    assert comparison.classifiers["modality"].tolist() == ["flair", "t1ce", "t2"] * 2
    assert not [column for column in comparison.classifiers if column.startswith("hd95")]


def test_a_mean_over_samples_is_the_accuracy(tmp_path: Path) -> None:
    """Joint is right in 6 of 10 samples with seed 0 and in 8 with seed 1, recipe in 9; from t2 alone nobody is."""
    for seed, right in ((0, 6), (1, 8)):
        sample_cell(tmp_path, "joint", "a", seed, lambda c, s, r=right: c < r and s != "t2", cases=10)
        sample_cell(tmp_path, "recipe", "a", seed, lambda c, s: c < 9 and s != "t2", cases=10, classifiers=True)
    study = a_study(score="accuracy")
    del study["convention"]
    comparison = compare(read_cells(tmp_path, score="accuracy"), study)
    joint = row_of(comparison.full_set, arm="joint")
    assert (joint["accuracy"], joint["cases"]) == (pytest.approx(0.7), 10)
    assert joint["accuracy_sd"] == pytest.approx(statistics.stdev([0.6, 0.8]))
    subsets = row_of(comparison.subsets, arm="joint")
    assert (subsets["subsets"], subsets["worst"], subsets["worst_subset"]) == (pytest.approx(0.6), 0.0, "t2")
    assert row_of(comparison.differences, arm="recipe", score="full")["difference"] == pytest.approx(20.0)
    assert row_of(comparison.differences, arm="recipe", score="subsets")["difference"] == pytest.approx(120 / 7)
    assert comparison.classifiers["accuracy"].tolist() == pytest.approx([0.9, 0.9, 0.0])
    for table in (comparison.full_set, comparison.classifiers):
        assert not [column for column in table if column.startswith(("dice", "hd95"))]


def test_of_an_error_less_is_better(tmp_path: Path) -> None:
    """Recipe errs by 0.3 less than joint from every subset; joint's worst subset is the one with the largest error."""
    for seed in (0, 1):
        for arm, less in (("joint", 0.0), ("recipe", 0.3)):
            sample_cell(
                tmp_path, arm, "a", seed,
                lambda c, s, e=less, r=seed: 1.5 + 0.1 * c + 0.02 * r + 0.5 * (s == "t2") - e, score="absolute_error",
            )  # fmt: skip
    study = a_study(score="absolute_error", arms={"joint": {}, "recipe": {"controls": {"even": "joint"}}})
    del study["convention"]
    comparison = compare(read_cells(tmp_path, score="absolute_error"), study)
    assert row_of(comparison.full_set, arm="joint")["absolute_error"] == pytest.approx(1.66)
    subsets = row_of(comparison.subsets, arm="joint")
    assert (subsets["worst"], subsets["worst_subset"]) == (pytest.approx(2.16), "t2")
    found = row_of(comparison.differences, arm="recipe", score="full")
    assert [found[name] for name in ("difference", "low", "high")] == pytest.approx([0.3, 0.3, 0.3], abs=1e-6)
    sentence = verdicts(study, comparison.differences)[1]
    assert sentence.startswith("recipe: +0.300 less absolute error [0.300, 0.300] than joint")
    assert "Better than joint" in sentence


def test_a_region_may_be_what_is_compared(tmp_path: Path) -> None:
    for arm, dice in (("joint", 0.5), ("recipe", 0.6)):
        rows = [score_row(case, "fusion", "flair", {"WT": dice, "ET": 1 - dice}) for case in "xy"]
        write_cell(tmp_path, facts(arm, "a", 0, modalities=["flair"]), rows)
    study = a_study(score="dice_ET", key_modality=None, seeds=[0])
    found = row_of(compare(read_cells(tmp_path, score="dice_ET"), study).differences, arm="recipe", score="full")
    assert found["difference"] == pytest.approx(-10.0)


def test_cells_that_were_read_for_another_score_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, {("joint", "a", 0): 0.0})
    with pytest.raises(DataError, match="score 'accuracy', which is no column"):
        compare(read_cells(tmp_path), a_study(score="accuracy"))


def test_outstanding_cells_are_named_and_others_not_counted(tmp_path: Path) -> None:
    fill(tmp_path, {("joint", "a", 0): 0.0, ("joint", "a", 7): 0.2, ("old", "a", 0): 0.2})
    comparison = compare(read_cells(tmp_path), a_study(arms={"joint": {}, "recipe": {}}))
    assert comparison.outstanding == [CellKey("joint", "a", 1), CellKey("recipe", "a", 0), CellKey("recipe", "a", 1)]
    assert comparison.outside == [CellKey("joint", "a", 7), CellKey("old", "a", 0)]
    assert row_of(comparison.full_set, arm="joint")["dice_mean"] == pytest.approx(0.71)
    assert comparison.differences.empty


def test_only_cells_that_both_arms_have_are_compared(tmp_path: Path) -> None:
    fill(tmp_path, {("joint", "a", 0): 0.0, ("joint", "a", 1): 0.2, ("recipe", "a", 0): 0.05, ("recipe", "a", 2): 0.0})
    study = a_study(seeds=[0, 1, 2], arms={"joint": {}, "recipe": {}})
    found = row_of(compare(read_cells(tmp_path), study).differences, score="full")
    assert found["difference"] == pytest.approx(5.0)
    assert (found["cells"], found["cells_left_out"], found["seeds"]) == (1, 2, 1)
    assert not found["seeds_resampled"]


def test_folds_with_one_seed_each(tmp_path: Path) -> None:
    """Differences of 4, 5 and 6 points in the folds, whatever the case: the folds are the observations."""
    for number, split in enumerate("abc"):
        fill(tmp_path, {("joint", split, number): 0.0, ("recipe", split, number): 0.04 + 0.01 * number})
    study = a_study(splits=["a.json", "b.json", "c.json"], seeds=[0, 1, 2], arms={"joint": {}, "recipe": {}})
    found = row_of(compare(read_cells(tmp_path), study).differences, score="full")
    half = math.sqrt(3 / 2) * 4.3027 / 1.959964
    assert (found["low"], found["high"]) == (pytest.approx(5 - half, abs=1e-4), pytest.approx(5 + half, abs=1e-4))
    assert (found["cases"], found["seeds"], found["most_seeds"], found["splits_resampled"]) == (9, 3, 1, True)


def test_roles_of_what_an_arm_is_compared_with(tmp_path: Path) -> None:
    """One comparison for each pair of arms, whatever the number of roles."""
    for arm in ("joint", "recipe", "even", "mixed"):
        fill(tmp_path, {(arm, "a", 0): 0.0})
    controls = {"constant": "even", "shuffled": "mixed", "uniform": "even", "teacher": "joint"}
    arms = {"joint": {}, "recipe": {"controls": controls}, "even": {}, "mixed": {}}
    differences = compare(read_cells(tmp_path), a_study(arms=arms, seeds=[0])).differences
    full = differences[(differences["score"] == "full") & (differences["arm"] == "recipe")]
    assert dict(zip(full["against"], full["role"], strict=True)) == {
        "joint": "reference+teacher",
        "even": "constant+uniform",
        "mixed": "shuffled",
    }


def test_arms_without_a_common_cell_are_not_compared(tmp_path: Path) -> None:
    fill(tmp_path, {("joint", "a", 0): 0.0, ("recipe", "a", 1): 0.0})
    assert compare(read_cells(tmp_path), a_study()).differences.empty


def test_several_splits_count_alike(tmp_path: Path) -> None:
    scored_cell(tmp_path, "joint", "a", 0, plus(0.0), cases=2)
    scored_cell(tmp_path, "joint", "b", 0, plus(0.2, by_case=0.0), cases=4)
    comparison = compare(read_cells(tmp_path), a_study(splits=["a.json", "b.json"], seeds=[0], arms={"joint": {}}))
    joint = row_of(comparison.full_set, arm="joint")
    assert joint["dice_mean"] == pytest.approx((0.705 + 0.9) / 2)
    assert math.isnan(joint["dice_mean_sd"])
    assert (joint["splits"], joint["seeds"], joint["cases"]) == (2, 1, 6)


def test_a_study_without_splits_takes_those_of_the_cells(tmp_path: Path) -> None:
    fill(tmp_path, {("joint", "drawn", 0): 0.0})
    comparison = compare(read_cells(tmp_path), a_study(splits=[], seeds=[0], arms={"joint": {}, "recipe": {}}))
    assert comparison.splits == ("drawn",)
    assert comparison.outstanding == [CellKey("recipe", "drawn", 0)]


@pytest.mark.parametrize("listed", [False, True])
def test_networks_alone_and_their_ensemble(tmp_path: Path, listed: bool) -> None:
    """Whether or not the study lists the arms that ``alone`` adds."""
    fill(tmp_path, {("joint", "a", 0): 0.0, ("ensemble", "a", 0): -0.05})
    for modality in ("flair", "t1ce", "t2"):
        scored_cell(tmp_path, f"alone_{modality}", "a", 0, plus(0.05), modalities=(modality,))
    arms = {"joint": {}} | ({f"alone_{m}": {} for m in ("flair", "t1ce", "t2")} if listed else {})
    comparison = compare(read_cells(tmp_path), a_study(seeds=[0], arms=arms, alone=True))
    assert comparison.alone["arm"].tolist() == ["alone_flair", "alone_t1ce", "alone_t2", "ensemble"]
    assert row_of(comparison.alone, arm="alone_t1ce")["dice_mean"] == pytest.approx(0.51)
    assert row_of(comparison.alone, arm="ensemble")["dice_mean"] == pytest.approx(0.66)
    assert comparison.full_set["arm"].tolist() == ["joint"]
    assert comparison.subsets["arm"].tolist() == ["joint", "ensemble"]
    assert row_of(comparison.differences, arm="ensemble", score="subsets")["difference"] == pytest.approx(-5.0)
    assert set(comparison.differences["arm"]) == {"ensemble"}
    assert comparison.outstanding == []


def test_an_arm_against_the_ensemble(tmp_path: Path) -> None:
    fill(tmp_path, {("joint", "a", 0): 0.0, ("recipe", "a", 0): 0.02, ("ensemble", "a", 0): -0.05})
    arms = {"joint": {}, "recipe": {"controls": {"ensemble": "ensemble"}}}
    comparison = compare(read_cells(tmp_path), study := a_study(seeds=[0], arms=arms, alone=True))
    against = row_of(comparison.differences, arm="recipe", against="ensemble", score="full")
    assert against["role"] == "ensemble"
    assert against["difference"] == pytest.approx(7.0)
    assert "over ensemble" in verdicts(study, comparison.differences)[0]


def test_costs_are_means_over_cells(tmp_path: Path) -> None:
    scored_cell(tmp_path, "joint", "a", 0, plus(0), training_seconds=100.0, peak_memory_mb=None)
    scored_cell(tmp_path, "joint", "a", 1, plus(0), training_seconds=300.0, peak_memory_mb=None)
    costs = row_of(compare(read_cells(tmp_path), a_study()).costs, arm="joint")
    assert (costs["cells"], costs["training_seconds"], costs["parameters"]) == (2, 200.0, 991172)
    assert math.isnan(costs["peak_memory_mb"])


def test_penalties_are_counted_apart_from_distances(tmp_path: Path) -> None:
    values = [(0.0, 373.0), (0.0, 374.0), (0.3, 373.0), (0.0, 12.0), (1.0, 0.0), (0.8, None)]  # the third is a distance
    rows = [
        score_row(f"c{i}", "fusion", "+".join(MODALITIES), {"WT": 0.9, "ET": dice}, hd95_WT=5.0, hd95_ET=distance)
        for i, (dice, distance) in enumerate(values)
    ]
    write_cell(tmp_path, facts("joint", "a", 0), rows)
    joint = row_of(compare(read_cells(tmp_path), a_study()).full_set, arm="joint")
    assert (joint["penalties"], joint["distances"]) == (2, 11)


def test_without_distances_there_are_no_penalties(tmp_path: Path) -> None:
    scored_cell(tmp_path, "joint", "a", 0, plus(0), hd95=None)
    assert "penalties" not in compare(read_cells(tmp_path), a_study()).full_set


def test_means_over_some_of_the_cells_are_left_out(tmp_path: Path) -> None:
    for seed, hd95 in ((0, 10.0), (1, None)):
        scored_cell(tmp_path, "joint", "a", seed, plus(0), hd95=hd95)
        scored_cell(tmp_path, "recipe", "a", seed, plus(0.1))
    table = compare(read_cells(tmp_path), a_study()).full_set
    joint, recipe = (row_of(table, arm=arm) for arm in ("joint", "recipe"))
    assert math.isnan(joint["hd95_WT"])
    assert math.isnan(joint["hd95_WT_sd"])
    assert recipe["hd95_WT"] == pytest.approx(11.0)
    assert joint["dice_WT"] == pytest.approx(recipe["dice_WT"] - 0.1)


def test_other_regions(tmp_path: Path) -> None:
    scored_cell(tmp_path, "joint", "a", 0, plus(0), regions=("liver", "lesion"))
    columns = list(compare(read_cells(tmp_path), a_study()).full_set.columns)
    assert [c for c in columns if c.startswith(("dice", "hd95")) and not c.endswith("_sd")] == [
        "dice_liver",
        "dice_lesion",
        "dice_mean",
        "hd95_liver",
        "hd95_lesion",
    ]


def test_the_part_that_the_study_names_is_scored(tmp_path: Path) -> None:
    rows = [score_row("x", "fusion", "flair", {"WT": 0.25}), score_row("y", "fusion", "flair", {"WT": 0.75})]
    rows[1]["part"] = "validation"
    write_cell(tmp_path, facts("joint", "a", 0, modalities=["flair"]), rows)
    for part, dice in (("test", 0.25), ("validation", 0.75)):
        study = a_study(part=part, key_modality=None, seeds=[0], arms={"joint": {}})
        assert row_of(compare(read_cells(tmp_path), study).full_set, arm="joint")["dice_mean"] == dice


def test_full_set_alone_gives_no_subsets(tmp_path: Path) -> None:
    for arm, dice in (("joint", 0.5), ("recipe", 0.75)):
        rows = [score_row(case, "fusion", "flair+t1ce+t2", {"WT": dice}) for case in "xy"]
        write_cell(tmp_path, facts(arm, "a", 0), rows)
    comparison = compare(read_cells(tmp_path), a_study())
    assert comparison.subsets.empty
    assert comparison.differences["score"].tolist() == ["full"]
    assert comparison.differences["difference"].tolist() == [25.0]


def test_scores_left_out_by_a_convention(tmp_path: Path) -> None:
    """A case without a score counts in no mean and in no difference."""
    for arm, dice in (("joint", 0.5), ("recipe", 0.6)):
        rows = [
            score_row(case, "fusion", subset, {"WT": dice})
            for case in ("x", "y")
            for subset in ("flair+t1ce", "flair", "t1ce")
        ]
        for row in rows[3:]:
            row |= {"dice_WT": "", "dice_mean": ""}
        write_cell(tmp_path, facts(arm, "a", 0, modalities=["flair", "t1ce"], convention="monai"), rows)
    study = a_study(convention="monai")
    comparison = compare(read_cells(tmp_path), study)
    assert row_of(comparison.full_set, arm="recipe")["dice_mean"] == pytest.approx(0.6)
    assert row_of(comparison.differences, score="subsets")["cases"] == 1
    write_report(tmp_path, study)
    assert "with every modality count" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_subsets_are_those_of_complete_cases(tmp_path: Path) -> None:
    """Case 2 lacks t2 and is far better: it counts in the full set alone, where it is scored from what it has."""
    for arm, added in (("joint", 0.0), ("recipe", 0.1)):
        rows = []
        for case in range(3):
            has = ("flair", "t1ce") if case == 2 else MODALITIES
            for subset in ("+".join(MODALITIES), *(s for s in subsets_of(has) if s.count("+") < 2)):
                dice = 0.9 if case == 2 else DICE[subset] + added + 0.01 * case
                rows.append(score_row(f"c{case}", "fusion", subset, {"WT": dice}))
        write_cell(tmp_path, facts(arm, "a", 0), rows)
    comparison = compare(read_cells(tmp_path), a_study(seeds=[0]))
    joint = row_of(comparison.subsets, arm="joint")
    assert joint["cases"] == 2
    assert joint["subsets"] == pytest.approx(statistics.fmean(DICE.values()) + 0.005)
    assert (joint["worst"], joint["worst_subset"]) == (pytest.approx(0.105), "t2")
    for subset, dice in DICE.items():
        assert joint[subset] == pytest.approx(dice + 0.005), subset
    full = row_of(comparison.full_set, arm="joint")
    assert (full["cases"], full["dice_mean"]) == (3, pytest.approx((0.70 + 0.71 + 0.9) / 3))
    for score, cases, difference in (("full", 3, 20 / 3), ("subsets", 2, 10), ("worst", 2, 10), ("without_key", 2, 10)):
        found = row_of(comparison.differences, arm="recipe", score=score)
        assert (found["cases"], found["difference"]) == (cases, pytest.approx(difference)), score


def gappy(folder: Path, splits: dict[str, list[str]]) -> dict[str, Any]:
    """Cells of a split's cases, one for each modality in it that this case lacks; "" lacks none."""
    for split, lacking in splits.items():
        rows = []
        for number, lost in enumerate(lacking):
            of_case = [s for s in subsets_of(MODALITIES)[1:] if lost not in s.split("+")]
            rows += [
                score_row(f"{split}{number}", "fusion", subset, {"WT": DICE[subset]})
                for subset in ("+".join(MODALITIES), *of_case)
            ]
        write_cell(folder, facts("joint", split, 0), rows)
    return a_study(seeds=[0], splits=[f"{split}.json" for split in splits])


def test_without_a_complete_case_no_subset_is_compared(tmp_path: Path) -> None:
    study = gappy(tmp_path, {"a": ["flair", "t1ce", "t2"]})
    comparison = compare(read_cells(tmp_path), study)
    assert comparison.subsets.empty
    assert row_of(comparison.full_set, arm="joint")["dice_mean"] == pytest.approx(0.7)
    write_report(tmp_path, study)
    assert "No case has every modality: subsets are not compared" in (tmp_path / "report.md").read_text("utf-8")


def test_a_split_without_a_modality_leaves_no_mean_over_other_cases(tmp_path: Path) -> None:
    """All columns are of the same cases, or none is."""
    study = gappy(tmp_path, {"a": ["", "", ""], "b": ["t2", "t2"]})
    comparison = compare(read_cells(tmp_path), study)
    joint = row_of(comparison.subsets, arm="joint")
    assert joint["cases"] == 3
    assert math.isnan(joint["subsets"])
    assert math.isnan(joint["without_key"])
    for subset, dice in DICE.items():
        assert joint[subset] == pytest.approx(dice), subset


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"convention": "monai"}, "cell joint, a, seed 0: convention 'brats_legacy', expected 'monai'"),
        ({"part": "validation"}, "cell joint, a, seed 0: no score of the part 'validation'"),
        ({"key_modality": "adc"}, "key_modality 'adc', expected one of flair, t1ce, t2"),
        ({"reference": "other"}, "reference 'other', expected one of the arms joint, recipe, shuffled"),
        ({"seeds": None}, "no seeds, expected all of reference, seeds, arms"),
        (
            {"arms": {"joint": {"controls": ["recipe"]}, "recipe": {}}},
            r"arm joint has the controls \['recipe'\], expected roles and arms",
        ),
        ({"modalities": ["flair", "t1"]}, r"study: flair\+t1; joint: flair\+t1ce\+t2"),
    ],
)
def test_cells_that_do_not_fit_the_study_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    fill(tmp_path, {("joint", "a", 0): 0.0})
    with pytest.raises(DataError, match=message):
        compare(read_cells(tmp_path), a_study(**changes))


def test_cells_with_other_cases_or_modalities_are_refused(tmp_path: Path) -> None:
    scored_cell(tmp_path, "joint", "a", 0, plus(0))
    scored_cell(tmp_path, "recipe", "a", 0, plus(0), cases=4)
    with pytest.raises(DataError, match=r"scores of different cases \(a-003\)"):
        compare(read_cells(tmp_path), a_study())
    scored_cell(tmp_path, "shuffled", "a", 0, plus(0), modalities=("flair", "t1ce"))
    with pytest.raises(DataError, match="different modalities"):
        compare(read_cells(tmp_path), a_study())


def test_a_network_of_one_modality_may_have_fewer_cases(tmp_path: Path) -> None:
    """Cases that lack its modality have no score; more cases than the others is an error as before."""
    for cases, folder in ((2, tmp_path / "fewer"), (4, tmp_path / "more")):
        fill(folder, {("joint", "a", 0): 0.0, ("recipe", "a", 0): 0.0})
        scored_cell(folder, "alone_flair", "a", 0, plus(0.1), modalities=("flair",), cases=cases)
    comparison = compare(read_cells(tmp_path / "fewer"), a_study(seeds=[0], alone=True))
    expected = statistics.fmean(plus(0.1)(case, "flair") for case in range(2))
    assert row_of(comparison.alone, arm="alone_flair")["dice_mean"] == pytest.approx(expected)
    scored_cell(tmp_path / "fewer", "alone_t2", "b", 0, plus(0.1), modalities=("t2",), cases=2)
    scored_cell(tmp_path / "fewer", "alone_flair", "b", 0, plus(0.1), modalities=("flair",), cases=3)
    compare(read_cells(tmp_path / "fewer"), a_study(seeds=[0], alone=True))  # of a split with nothing else
    with pytest.raises(DataError, match=r"alone_flair, a, seed 0: scores of different cases \(a-003\)"):
        compare(read_cells(tmp_path / "more"), a_study(seeds=[0], alone=True))


def test_subsets_of_four() -> None:
    names = subsets_of(["flair", "t1ce", "t1", "t2"])
    assert len(names) == 15
    assert [name.count("+") + 1 for name in names] == [4] + [3] * 4 + [2] * 6 + [1] * 4
    sizes = {group: len(of_group) for group, of_group in subset_groups(["flair", "t1ce", "t1", "t2"], "t1ce").items()}
    assert sizes == {"subsets": 15, "missing_1": 4, "missing_2": 6, "missing_3": 4, "with_key": 8, "without_key": 7}
    assert list(subset_groups(["flair"], "flair")) == ["subsets"]


# ---- verdicts ----


def difference(
    against: str, low: float, high: float, score: str = "subsets", seeds: int = 3, **changes: Any
) -> dict[str, Any]:
    return {
        "arm": "recipe",
        "against": against,
        "score": score,
        "difference": (low + high) / 2,
        "low": low,
        "high": high,
        "cases": 5,
        "seeds": seeds,
        "most_seeds": seeds,
        "seeds_resampled": seeds > 1,
        "splits_resampled": False,
    } | changes


def with_controls(**controls: str) -> dict[str, Any]:
    return a_study(arms={"joint": {}, "recipe": {"controls": controls}})


@pytest.mark.parametrize(
    ("joint", "shuffled", "constant", "conclusion"),
    [
        ((19.8, 22.9), (0.5, 1.0), (1.0, 2.0), "Better than joint and than every control: balancing helps here."),
        (
            (19.8, 22.9),
            (-0.4, 0.8),
            (1.0, 2.0),
            "Better than joint, but no gain over shuffled is shown: it has not shown that balancing helps.",
        ),
        (
            (19.8, 22.9),
            (-2.0, -1.0),
            (-1.0, 2.0),
            "Better than joint, but worse than shuffled and no gain over constant is shown: "
            "it has not shown that balancing helps.",
        ),
        (
            (-1.0, 1.0),
            (1.0, 2.0),
            (1.0, 2.0),
            "No difference from joint is shown: it has not shown that balancing helps.",
        ),
        (
            (-1.0, 1.0),
            (-3.0, -1.0),
            (-3.0, -2.0),
            "No difference from joint is shown, and it is worse than shuffled and constant: "
            "it has not shown that balancing helps.",
        ),
        ((-3.0, -1.0), (1.0, 2.0), (1.0, 2.0), "Worse than joint: it has not shown that balancing helps."),
        (
            (0.0, 0.0),
            (0.0, 0.0),
            (0.0, 0.0),
            "No difference from joint is shown: it has not shown that balancing helps.",
        ),
    ],
)
def test_verdicts(
    joint: tuple[float, float], shuffled: tuple[float, float], constant: tuple[float, float], conclusion: str
) -> None:
    study = with_controls(shuffled="shuffled", constant="constant", uniform="uniform")
    rows = [difference("joint", *joint), difference("shuffled", *shuffled), difference("constant", *constant)]
    rows.append(difference("uniform", 5.0, 6.0))
    (text,) = verdicts(study, pd.DataFrame(rows))
    assert text.endswith(conclusion)
    mean = sum(joint) / 2
    assert text.startswith(
        f"recipe: {mean:+.1f} points [{joint[0]:.1f}, {joint[1]:.1f}] over joint on the mean over subsets; "
    )
    assert "; 5 cases, 3 seeds. " in text


@pytest.mark.parametrize(
    ("controls", "ending"),
    [
        (
            {"uniform": "even"},
            "Better than joint and better than its controls (even); constant and shuffled were not run: "
            "nothing is said of balancing.",
        ),
        (
            {"uniform": "even", "constant": "even"},
            "Better than joint and better than its controls (even); shuffled was not run: "
            "nothing is said of balancing.",
        ),
        (
            {"teacher": "mixed"},  # no control of a balance: the arm claims none
            "Better than joint and better than its controls (mixed).",
        ),
        (
            {"uniform": "equal"},
            "Better than joint, but no gain over equal is shown; constant and shuffled were not run: "
            "nothing is said of balancing.",
        ),
        (
            {"uniform": "even", "constant": "even", "shuffled": "mixed"},
            "Better than joint and than every control: balancing helps here.",
        ),
        (
            {"uniform": "even", "constant": "even", "shuffled": "mixed", "teacher": "equal"},
            "Better than joint, but no gain over equal is shown: it has not shown that balancing helps.",
        ),
        (
            {"uniform": "joint", "constant": "even", "shuffled": "mixed"},
            "Better than joint and than every control: balancing helps here.",
        ),
    ],
)
def test_balancing_needs_all_three_controls(controls: dict[str, str], ending: str) -> None:
    rows = [difference(rival, 1.0, 2.0) for rival in ("joint", "even", "mixed")] + [difference("equal", -1.0, 2.0)]
    (text,) = verdicts(with_controls(**controls), pd.DataFrame(rows))
    assert text.endswith(f"3 seeds. {ending}")
    assert ("balancing helps here" in text) == ("every control" in ending)


def test_an_arm_with_two_roles_is_named_once() -> None:
    rows = [difference(rival, 1.0, 2.0) for rival in ("joint", "even", "shuffled")]
    (text,) = verdicts(with_controls(constant="even", shuffled="shuffled", uniform="even"), pd.DataFrame(rows))
    assert text.startswith(
        "recipe: +1.5 points [1.0, 2.0] over joint on the mean over subsets; "
        "+1.5 [1.0, 2.0] over even (constant and uniform), +1.5 [1.0, 2.0] over shuffled; 5 cases"
    )


def test_each_score_has_its_own_verdict() -> None:
    """Balancing helps on the mean over subsets, and not on the full set."""
    controls = {role: role for role in ("constant", "shuffled", "uniform")}
    rows = [difference(rival, 1.0, 2.0) for rival in ("joint", *controls)]
    rows += [difference(rival, -0.1 if rival == "uniform" else 1.0, 2.0, "full") for rival in ("joint", *controls)]
    subsets, full = verdicts(with_controls(**controls), pd.DataFrame(rows))
    assert "on the mean over subsets" in subsets
    assert subsets.endswith("balancing helps here.")
    assert "on the full set" in full
    assert full.endswith("no gain over uniform is shown: it has not shown that balancing helps.")


FEW = " Few seeds: the interval may be too narrow."


@pytest.mark.parametrize(
    ("changes", "notes"),
    [
        ({"seeds": 3}, ""),
        ({"seeds": 2}, FEW),
        ({"seeds": 1}, " With one seed, the intervals leave the chance of training out." + FEW),
        (
            {"seeds": 1, "splits_resampled": True},
            " With one seed in a split, whole splits are resampled: the chance of training is in their "
            "differences." + FEW,
        ),
    ],
)
def test_few_seeds_are_told(changes: dict[str, Any], notes: str) -> None:
    rows = [difference(rival, 1.0, 2.0, **changes) for rival in ("joint", "shuffled")]
    (text,) = verdicts(a_study(), pd.DataFrame(rows))
    assert text.partition("nothing is said of balancing.")[2] == notes


def test_no_verdict_without_controls_cells_or_intervals() -> None:
    nothing = pd.DataFrame([difference("joint", 1.0, 2.0)]).head(0)
    assert verdicts(a_study(arms={"joint": {}, "recipe": {}}), nothing) == [
        "No arm names controls: this study cannot show whether balancing helps."
    ]
    assert verdicts(a_study(), nothing) == ["recipe: nothing can be said yet, it shares no scored cell with joint."]
    (text,) = verdicts(a_study(), pd.DataFrame([difference("joint", math.nan, math.nan)]))
    assert "nothing can be said yet; no interval against joint and shuffled" in text


def test_verdicts_of_cells(comparison: Comparison) -> None:
    """The control has no cell yet."""
    texts = verdicts(a_study(), comparison.differences)
    assert len(texts) == 2
    assert all("no interval against shuffled" in text for text in texts)


def test_outcomes() -> None:
    assert [outcome(*i) for i in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (0.0, 0.1), (math.nan, 1.0))] == [
        "better",
        "worse",
        "no difference shown",
        "no difference shown",
        "unknown",
    ]
