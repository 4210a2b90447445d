# SPDX-License-Identifier: Apache-2.0
"""What scores are called."""

from __future__ import annotations

import pytest

from monai_cggm.analysis.measures import difference_scale, measure_of, scales, score_columns, score_title


@pytest.mark.parametrize(
    ("column", "label", "digits", "bounded"),
    [
        ("dice_WT", "Dice WT", 3, True),
        ("dice_mean", "Dice mean", 3, True),
        ("hd95_lesion_core", "HD95 lesion_core (mm)", 1, False),
        ("accuracy", "accuracy", 3, True),
        ("absolute_error", "absolute error", 3, False),
        ("acc_2", "acc 2", 3, True),
    ],
)
def test_columns(column: str, label: str, digits: int, bounded: bool) -> None:
    measure = measure_of(column)
    assert (measure.label, measure.digits, measure.bounded) == (label, digits, bounded)


def test_a_score_within_a_sentence() -> None:
    assert [score_title(score) for score in ("dice_mean", "dice_ET", "accuracy")] == ["Dice", "Dice ET", "accuracy"]


def test_scales_are_told_once() -> None:
    assert scales(["dice_WT", "dice_mean", "hd95_WT", "hd95_TC"]) == "Dice from 0 to 1, HD95 in mm."
    assert scales(["accuracy", "absolute_error"]) == "Accuracy from 0 to 1, absolute error from 0."


def test_differences_are_gains() -> None:
    """From 0.50 to 0.53 Dice are 3 points, from an error of 1.25 to 1.00 there is 0.25 less of it."""
    dice, error = measure_of("dice_mean"), measure_of("absolute_error")
    assert dice.gain_factor * (0.53 - 0.50) == pytest.approx(3.0)
    assert error.gain_factor * (1.00 - 1.25) == 0.25
    assert (dice.gain, dice.gain_digits, dice.bounds) == ("points", 1, "(0 to 1)")
    assert (error.gain, error.gain_digits) == ("less absolute error", 3)
    assert error.bounds == "(from 0, less is better)"
    assert difference_scale("accuracy") == "accuracy in points (accuracy × 100)"


def test_what_is_no_score_is_left_out() -> None:
    columns = ["case", "predictor", "truth", "prediction", "accuracy", "dice_WT", "hd95_WT", "absolute_error"]
    assert score_columns(columns, "accuracy") == ["accuracy", "absolute_error"]
    assert score_columns(columns, "dice_mean") == ["dice_WT", "hd95_WT"]
