# SPDX-License-Identifier: Apache-2.0
"""The measures that a comparison knows: what their columns are called, their unit, and how many digits are shown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

#: What a study compares arms by, unless it says otherwise.
DICE = "dice_mean"

#: What HD95 is, in mm, where a region is empty on one side only, by any convention of
#: ``monai_cggm.metrics.EMPTY_CONVENTIONS``: no distance, but a penalty, of which a few rule a mean.
HD95_PENALTIES = (373.0, 374.0)


@dataclass(frozen=True)
class Measure:
    """How a score is told.

    Attributes:
        title: its name within a sentence.
        unit: empty for a number without one.
        digits: after the point.
        bounded: whether it lies between 0 and 1; otherwise it begins at 0.
        more_is_better: False for an error.
    """

    title: str
    unit: str = ""
    digits: int = 3
    bounded: bool = True
    more_is_better: bool = True

    @property
    def label(self) -> str:
        """Its title with its unit, for the head of a column."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def scale(self) -> str:
        """Its title with what its numbers mean, for a caption."""
        if self.unit:
            return f"{self.title} in {self.unit}"
        return f"{self.title} from 0 to 1" if self.bounded else f"{self.title} from 0"

    @property
    def bounds(self) -> str:
        """Its range in brackets, for a caption."""
        return "(0 to 1)" if self.bounded else f"(from 0{'' if self.more_is_better else ', less is better'})"

    @property
    def gain_factor(self) -> float:
        """What a difference is multiplied by, so that more is better: to points, or to how much less error there is."""
        return (100.0 if self.bounded else 1.0) * (1 if self.more_is_better else -1)

    @property
    def gain(self) -> str:
        """What such a difference is called."""
        return "points" if self.bounded else f"less {self.title}"

    @property
    def gain_digits(self) -> int:
        """How many digits of it a sentence shows."""
        return self.digits - 2 if self.bounded else self.digits


_BY_REGION = {"dice": Measure("Dice"), "hd95": Measure("HD95", "mm", 1, bounded=False, more_is_better=False)}
_BY_SAMPLE = {
    "accuracy": Measure("accuracy"),
    "absolute_error": Measure("absolute error", bounded=False, more_is_better=False),
}


def is_dice(score: str) -> bool:
    """Whether a score is of segmentations: a column ``dice_<region>`` or ``dice_mean``.

    Example:
        >>> is_dice("dice_WT"), is_dice("accuracy")
        (True, False)
    """
    return score.startswith("dice_")


def measure_of(column: str) -> Measure:
    """Return how a column of scores is told; one that is not known has its own name, and lies between 0 and 1.

    Example:
        >>> measure_of("hd95_WT").label, measure_of("accuracy").label, measure_of("acc_2").label
        ('HD95 WT (mm)', 'accuracy', 'acc 2')
    """
    kind, _, region = column.partition("_")
    if kind in _BY_REGION and region:
        of = _BY_REGION[kind]
        return replace(of, title=f"{of.title} {region}")
    return _BY_SAMPLE.get(column, Measure(column.replace("_", " ")))


def score_title(score: str) -> str:
    """Return what the score that arms are compared by is called within a sentence.

    Example:
        >>> score_title("dice_mean"), score_title("dice_WT"), score_title("accuracy")
        ('Dice', 'Dice WT', 'accuracy')
    """
    return "Dice" if score == DICE else measure_of(score).title


def difference_scale(score: str) -> str:
    """Say what differences of the score that arms are compared by are in.

    Example:
        >>> difference_scale("dice_mean")
        'Dice in points (Dice × 100)'
        >>> difference_scale("absolute_error")
        'absolute error: how much less of it there is'
    """
    title, measure = score_title(score), measure_of(score)
    return f"{title} in points ({title} × 100)" if measure.bounded else f"{title}: how much less of it there is"


def score_columns(columns: Iterable[str], score: str) -> list[str]:
    """Return which columns of a table of cases are scores, in the table's order.

    Args:
        columns: of the table.
        score: what arms are compared by. With a Dice all Dice and HD95 of the regions belong to it, with another score
            that one and the absolute error.

    Example:
        >>> score_columns(["case", "dice_WT", "dice_mean", "hd95_WT"], "dice_mean")
        ['dice_WT', 'dice_mean', 'hd95_WT']
        >>> score_columns(["case", "truth", "accuracy", "absolute_error"], "accuracy")
        ['accuracy', 'absolute_error']
    """
    if is_dice(score):
        return [column for column in columns if column.startswith(("dice_", "hd95_"))]
    return [column for column in columns if column in (score, "absolute_error")]


def scales(columns: Iterable[str]) -> str:
    """Say in a sentence what the numbers in columns of scores mean.

    Example:
        >>> scales(["dice_WT", "dice_mean", "hd95_WT"])
        'Dice from 0 to 1, HD95 in mm.'
        >>> scales(["accuracy"])
        'Accuracy from 0 to 1.'
    """
    known = [_BY_REGION.get(column.partition("_")[0], measure_of(column)) for column in columns]
    told = ", ".join(dict.fromkeys(measure.scale for measure in known))
    return f"{told[:1].upper()}{told[1:]}."
