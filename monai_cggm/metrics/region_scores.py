# SPDX-License-Identifier: Apache-2.0
"""Dice and 95th percentile Hausdorff distance of one case, for regions that are unions of classes."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from monai.metrics import compute_dice
from monai.transforms.utils import generate_spatial_bounding_box
from monai.utils import convert_to_tensor
from torch import Tensor

from monai_cggm.metrics.lesions import LESION_PENALTY, SLACK, lesion_wise, surface_hd95, voxel_size

#: The name of the enhancing tumour among the regions, to which a convention's ``smallest_et`` applies.
ET = "ET"

#: The regions of BraTS over the classes 0 background, 1 NCR, 2 ED, 3 ET: whole tumour, tumour core, enhancing tumour.
BRATS_REGIONS: Mapping[str, tuple[int, ...]] = MappingProxyType({"WT": (1, 2, 3), "TC": (1, 3), ET: (3,)})


@dataclass(frozen=True)
class EmptyConvention:
    """What a region scores, as ``(Dice, HD95 in mm)``, where the truth or the prediction has no voxel of it.

    Attributes:
        both_empty: neither has a voxel.
        truth_empty: only the prediction has one, a false positive.
        prediction_empty: only the truth has one, a miss.
        note: the convention in a few words, for tables.
        smallest_et: a predicted region "ET" of less volume than this counts as empty, in mm³.
        lesion_wise: whether regions are scored by :func:`monai_cggm.metrics.lesion_wise`; what is above then says what
            that gives where the truth has no small lesions.
    """

    both_empty: tuple[float, float]
    truth_empty: tuple[float, float]
    prediction_empty: tuple[float, float]
    note: str
    smallest_et: float = 0.0
    lesion_wise: bool = False

    @property
    def needs_spacing(self) -> bool:
        """Whether Dice too depends on the size of a voxel."""
        return self.lesion_wise or self.smallest_et > 0


#: ``brats_legacy`` is the rule of the BraTS evaluation up to 2022 and of most papers; its penalty of 373 mm is the
#: diagonal of a 240 x 240 x 155 volume at 1 mm (373.13), rounded down as the later official tools do.
#: ``brats_legacy_et500`` is the same after the post-processing of the papers on missing sequences (RFNet and those that
#: compare with it): predicted enhancing tumour of fewer than 500 voxels at 1 mm counts as none, whole tumour and core
#: stay as they are. ``brats2023_lesionwise`` is :func:`monai_cggm.metrics.lesion_wise`, whose penalty is 374 mm.
#: ``monai`` is what MONAI's metrics do by default: a region that the truth lacks is left out, so that false positives
#: there cost nothing.
EMPTY_CONVENTIONS: Mapping[str, EmptyConvention] = MappingProxyType(
    {
        "brats_legacy": EmptyConvention(
            both_empty=(1.0, 0.0),
            truth_empty=(0.0, 373.0),
            prediction_empty=(0.0, 373.0),
            note="both empty: Dice 1, HD95 0 mm; one empty: Dice 0, HD95 373 mm",
        ),
        "brats_legacy_et500": EmptyConvention(
            both_empty=(1.0, 0.0),
            truth_empty=(0.0, 373.0),
            prediction_empty=(0.0, 373.0),
            note="predicted ET below 500 mm³ counts as none; both empty: Dice 1, HD95 0 mm; one empty: 0, 373 mm",
            smallest_et=500.0,
        ),
        "brats2023_lesionwise": EmptyConvention(
            both_empty=(1.0, 0.0),
            truth_empty=(0.0, LESION_PENALTY),
            prediction_empty=(0.0, LESION_PENALTY),
            note="mean over lesions above 50 mm³; none: Dice 1, HD95 0 mm; missed or false: Dice 0, HD95 374 mm",
            lesion_wise=True,
        ),
        "monai": EmptyConvention(
            both_empty=(math.nan, math.nan),
            truth_empty=(math.nan, math.nan),
            prediction_empty=(0.0, math.nan),
            note="a region that the truth lacks is left out, false positives with it",
        ),
    }
)


def region_scores(
    pred: Tensor | np.ndarray,
    truth: Tensor | np.ndarray,
    *,
    regions: Mapping[str, Sequence[int]] = BRATS_REGIONS,
    spacing: Sequence[float] | None = None,
    convention: str = "brats_legacy",
    hd95: bool = True,
) -> dict[str, float]:
    r"""Score one predicted class map.

    With :math:`P` and :math:`T` the voxels of a region in the prediction and in the truth, and :math:`\partial` their
    surfaces (voxels that have a background neighbour across a face; the image's border counts as background):

    .. math::
        \mathrm{Dice} = \frac{2 |P \cap T|}{|P| + |T|} \qquad
        \mathrm{HD95} = \max\Big(\underset{p \in \partial P}{\mathrm{q}_{.95}}\, d(p, \partial T),\;
        \underset{t \in \partial T}{\mathrm{q}_{.95}}\, d(t, \partial P)\Big)

    so HD95 is MONAI's definition: the larger of the two directed 95th percentiles (linear interpolation), Euclidean.
    Other tools take the percentile of both directions pooled, which is never larger.

    Args:
        pred: predicted class indices, ``(*spatial)``, any number of spatial dimensions.
        truth: true class indices, the same shape.
        regions: the classes that make up each region.
        spacing: size of a voxel in mm along each axis; needed for HD95, and for the conventions with thresholds in
            mm³, ``brats_legacy_et500`` and ``brats2023_lesionwise``, which are for three dimensions only.
        convention: a name in :data:`EMPTY_CONVENTIONS`, which says what an empty region scores, and whether small
            parts or lesions are treated apart.
        hd95: whether to compute HD95, which costs far more than Dice.

    Returns:
        ``dice_<region>`` and, if asked for, ``hd95_<region>`` (mm) of every region, and ``dice_mean``, the mean over
        the regions that have a Dice.

    Raises:
        ValueError: for shapes that differ, values that are no class indices, a spacing that does not fit, an unknown
            convention or one that does not fit the regions or the dimensions, or no regions.

    Example:
        >>> truth = torch.zeros(8, 8, 8, dtype=torch.uint8)
        >>> truth[2:6, 2:6, 2:6] = 2
        >>> pred = truth.roll(1, dims=2)                                    # one voxel off along the last axis
        >>> scores = region_scores(pred, truth, regions={"WT": (1, 2, 3)}, spacing=(1.0, 1.0, 3.0))
        >>> scores["dice_WT"], scores["hd95_WT"]
        (0.75, 3.0)
    """
    rule = _rule(convention)
    if not regions or not all(len(classes) for classes in regions.values()):
        raise ValueError(f"every region needs at least one class, got {dict(regions)}")
    pred, truth = _class_map(pred, "prediction"), _class_map(truth, "truth")
    if pred.shape != truth.shape:
        raise ValueError(f"the prediction has shape {tuple(pred.shape)}, the truth {tuple(truth.shape)}")
    size = _size(spacing, pred.ndim, convention, hd95)
    if rule.smallest_et and ET not in regions:
        raise ValueError(f"the convention {convention!r} needs a region {ET!r}, got {list(regions)}")

    pred, truth = _cropped(pred, truth, sorted({member for classes in regions.values() for member in classes}))
    scores: dict[str, float] = {}
    for name, classes in regions.items():
        masks = _member(pred, classes), _member(truth, classes)
        if name == ET and rule.smallest_et:
            masks = _without_small(masks[0], size, rule.smallest_et), masks[1]
        dice, distance = _score(*masks, size, rule, hd95)
        scores[f"dice_{name}"] = dice
        if hd95:
            scores[f"hd95_{name}"] = distance
    scores["dice_mean"] = nan_mean([scores[f"dice_{name}"] for name in regions])
    return scores


def nan_mean(values: Sequence[float]) -> float:
    """Mean of the values that are not NaN; NaN, without a warning, where there is none.

    Example:
        >>> nan_mean([1.0, float("nan"), 0.5])
        0.75
    """
    numbers = [value for value in values if not math.isnan(value)]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def _score(
    pred: Tensor, truth: Tensor, size: Sequence[float], rule: EmptyConvention, hd95: bool
) -> tuple[float, float]:
    """Dice and HD95 of one region's masks; without ``hd95`` the latter means nothing."""
    if rule.lesion_wise:
        lesions = lesion_wise(pred.cpu().numpy(), truth.cpu().numpy(), size, hd95=hd95)
        return lesions.dice, lesions.hd95
    pred_any, truth_any = bool(pred.any()), bool(truth.any())
    if not (pred_any or truth_any):
        return rule.both_empty
    if not truth_any:
        return rule.truth_empty
    if not pred_any:
        return rule.prediction_empty
    dice = compute_dice(pred[None, None], truth[None, None], ignore_empty=False).item()
    return dice, surface_hd95(pred, truth, size) if hd95 else math.nan


def _without_small(mask: Tensor, size: Sequence[float], smallest: float) -> Tensor:
    """The mask, or an empty one where its volume is below ``smallest`` mm³."""
    volume = int(mask.sum()) * math.prod(size)
    return torch.zeros_like(mask) if volume < smallest * (1 - SLACK) else mask


def _cropped(pred: Tensor, truth: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Both maps inside the smallest box that holds every voxel of these classes.

    What lies outside is background in both and changes no score, but would cost most of the time. That holds for
    lesions too: where two dilated lesions meet outside the box, they also meet on its face.
    """
    either = _member(pred, classes) | _member(truth, classes)
    start, end = generate_spatial_bounding_box(either[None])
    box = tuple(slice(first, last) for first, last in zip(start, end, strict=True))
    return pred[box], truth[box]


def _member(classes: Tensor, region: Sequence[int]) -> Tensor:
    # Comparisons of small integers are many times faster than torch.isin.
    return functools.reduce(torch.logical_or, [classes == member for member in region])


def _class_map(values: Tensor | np.ndarray, what: str) -> Tensor:
    tensor = convert_to_tensor(values, track_meta=False).detach()
    if tensor.is_floating_point():
        if not torch.equal(tensor, tensor.round()):
            raise ValueError(f"the {what} holds values that are no class indices: expected whole numbers")
        tensor = tensor.to(torch.int16)
    return tensor


def _size(spacing: Sequence[float] | None, dims: int, convention: str, hd95: bool) -> tuple[float, ...]:
    """The voxels' size where something needs it, else nothing."""
    if EMPTY_CONVENTIONS[convention].needs_spacing:
        if dims != 3:
            raise ValueError(f"the convention {convention!r} needs volumes (H, W, D), got {dims} dimensions")
        return voxel_size(spacing, dims, f"the convention {convention!r} has thresholds in mm³ and needs")
    return voxel_size(spacing, dims, "HD95 is in mm and needs") if hd95 else ()


def _rule(convention: str) -> EmptyConvention:
    if convention not in EMPTY_CONVENTIONS:
        raise ValueError(
            f"unknown convention {convention!r} for empty regions: expected one of {', '.join(EMPTY_CONVENTIONS)}"
        )
    return EMPTY_CONVENTIONS[convention]
