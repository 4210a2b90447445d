# SPDX-License-Identifier: Apache-2.0
"""Dice and HD95 lesion by lesion, as the BraTS challenge of 2023 scored them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance
from scipy import ndimage
from torch import Tensor

#: What a missed or a false lesion scores as HD95, in mm.
LESION_PENALTY = 374.0

#: True lesions up to this volume are left out, in mm³.
SMALLEST_LESION = 50.0

#: How far a true lesion reaches, in mm: along an axis, and at most twice that over all axes together.
REACH = 3.0

#: Relative slack of the thresholds: sizes that come from an affine are a little off.
SLACK = 1e-3

_TOUCHING = np.ones((3, 3, 3), dtype=bool)  # 26 neighbours


class LesionScores(NamedTuple):
    """What :func:`lesion_wise` found in one region of one case.

    Attributes:
        dice: mean over the true lesions that count and the false ones.
        hd95: the same mean, mm; NaN where it was not asked for.
        lesions: true lesions that count.
        missed: those among them that no predicted part touches.
        false: predicted parts that touch no true lesion.
    """

    dice: float
    hd95: float
    lesions: int
    missed: int
    false: int


def lesion_wise(
    pred_mask: np.ndarray, truth_mask: np.ndarray, spacing: Sequence[float], *, hd95: bool = True
) -> LesionScores:
    """Score a region lesion by lesion.

    1. The truth is dilated; true parts that one connected piece of the dilated mask holds (26 neighbours) are one
       lesion, and the piece is the lesion's reach.
    2. A predicted part (26 neighbours) belongs to each lesion whose reach it touches. A lesion is scored against all of
       its parts together, whole: a part that touches two lesions counts in both.
    3. A lesion without a part is missed, a part without a lesion is false; each scores Dice 0 and HD95
       :data:`LESION_PENALTY`.
    4. Lesions of at most :data:`SMALLEST_LESION`, measured before the dilation, are left out, found or missed. A part
       that touches such a lesion is not false.
    5. The scores are means over the lesions that are left and the false parts; Dice 1 and HD95 0 where there are none.

    The rules, the numbers for gliomas and the penalty are those of the challenge's own code, version of 2023
    (rachitsaluja/BraTS-2023-Metrics). Two things differ. That code dilates by three steps of 18 neighbours, whatever
    the voxel's size; here the same shape is meant in mm (:data:`REACH`), so that 1 mm gives exactly these three steps
    and other voxels never reach farther: one voxel at 2 mm, and along an axis of more than 3 mm none. And HD95 is
    :func:`surface_hd95`, without that code's weights by surface area.

    Args:
        pred_mask: the region in the prediction, bool ``(H, W, D)``.
        truth_mask: the region in the truth, the same shape.
        spacing: size of a voxel in mm along each axis.
        hd95: whether to compute HD95, which costs more than the rest.

    Returns:
        Scores and counts.

    Raises:
        ValueError: for masks that are not three-dimensional or differ in shape, or a spacing that does not fit.

    Example:
        >>> truth = np.zeros((40, 16, 16), dtype=bool)
        >>> truth[2:8, 4:10, 4:10] = truth[30:36, 4:10, 4:10] = True
        >>> pred = truth.copy()
        >>> pred[20:] = False                                               # one of two lesions, without an error
        >>> lesion_wise(pred, truth, (1.0, 1.0, 1.0))
        LesionScores(dice=0.5, hd95=187.0, lesions=2, missed=1, false=0)
    """
    pred, truth = np.asarray(pred_mask, dtype=bool), np.asarray(truth_mask, dtype=bool)
    if pred.ndim != 3 or pred.shape != truth.shape:
        raise ValueError(f"lesions need two masks (H, W, D) of one shape, got {pred.shape} and {truth.shape}")
    size = voxel_size(spacing, 3, "lesions are measured in mm and need")

    reaches, count = ndimage.label(ndimage.binary_dilation(truth, _reach(size)), _TOUCHING)
    parts, part_count = ndimage.label(pred, _TOUCHING)
    volumes = np.bincount(reaches[truth], minlength=count + 1) * math.prod(size)
    counted = [lesion for lesion in range(1, count + 1) if volumes[lesion] > SMALLEST_LESION * (1 + SLACK)]
    owned, touching = _meetings(reaches, parts)
    false = part_count - len(np.unique(touching))
    if not counted and not false:
        return LesionScores(1.0, 0.0 if hd95 else math.nan, 0, 0, 0)

    found = {lesion: touching[owned == lesion] for lesion in counted}
    scores = [(0.0, LESION_PENALTY if hd95 else math.nan)] * false
    reach_boxes, part_boxes = ndimage.find_objects(reaches), ndimage.find_objects(parts)
    for lesion, own in found.items():
        # In the box that holds the lesion and its parts: nothing outside it enters the scores.
        box = _box([reach_boxes[lesion - 1], *(part_boxes[part - 1] for part in own)])
        masks = np.isin(parts[box], own), truth[box] & (reaches[box] == lesion)
        scores.append(_pair_scores(*masks, size if hd95 else ()))
    dice, distance = (math.fsum(values) / len(values) for values in zip(*scores, strict=True))
    missed = sum(len(own) == 0 for own in found.values())
    return LesionScores(dice, distance, len(counted), missed, false)


def surface_hd95(pred: Tensor, truth: Tensor, spacing: Sequence[float]) -> float:
    """HD95 of two masks that both have a voxel, by MONAI's definition, in mm.

    Args:
        pred: bool ``(*spatial)``.
        truth: bool, the same shape.
        spacing: size of a voxel in mm along each axis.

    Example:
        >>> truth = torch.zeros(9, 9, dtype=torch.bool)
        >>> truth[2:6, 2:6] = True
        >>> surface_hd95(truth.roll(2, dims=0), truth, (1.5, 1.0))
        3.0
    """
    # On the CPU MONAI searches a tree of the surface voxels; on a GPU without cuCIM it would fall back to a dense
    # distance transform on the CPU.
    with warnings.catch_warnings():
        # MONAI 1.6 deprecates an argument that it passes to itself here.
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
        distance = compute_hausdorff_distance(
            pred.cpu()[None, None],
            truth.cpu()[None, None],
            include_background=True,
            percentile=95,
            spacing=list(spacing),
        )
    return distance.item()


def voxel_size(spacing: Sequence[float] | None, dims: int, why: str) -> tuple[float, ...]:
    """The spacing as numbers; ``why`` begins the message where there is none.

    Raises:
        ValueError: where it is None or not ``dims`` positive numbers.

    Example:
        >>> voxel_size([1, 1, 5], 3, "HD95 is in mm and needs")
        (1.0, 1.0, 5.0)
    """
    if spacing is None:
        raise ValueError(f"{why} the spacing of the voxels")
    size = tuple(float(value) for value in spacing)
    if len(size) != dims or not all(math.isfinite(value) and value > 0 for value in size):
        raise ValueError(f"the spacing must be {dims} positive numbers (mm), got {size}")
    return size


def _reach(size: Sequence[float]) -> np.ndarray:
    """The voxels that a true voxel's dilation covers: at 1 mm three steps of 18 neighbours, ``(7, 7, 7)``."""
    limit = REACH * (1 + SLACK)
    axes = [np.arange(-int(limit // step), int(limit // step) + 1) * step for step in size]
    offsets = np.abs(np.stack(np.meshgrid(*axes, indexing="ij")))
    return (offsets.max(axis=0) <= limit) & (offsets.sum(axis=0) <= 2 * limit)


def _meetings(reaches: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each pair of a lesion and a predicted part that touches its reach, once: the lesions, and the parts."""
    both = (reaches > 0) & (parts > 0)
    pairs = np.unique(np.stack([reaches[both], parts[both]]), axis=1)
    return pairs[0], pairs[1]


def _box(boxes: Sequence[tuple[slice, ...]]) -> tuple[slice, ...]:
    """The smallest box around all boxes."""
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes, strict=True))


def _pair_scores(pred: np.ndarray, truth: np.ndarray, size: Sequence[float]) -> tuple[float, float]:
    """Dice and HD95 of a lesion and its parts; HD95 is NaN where ``size`` is empty."""
    if not pred.any():
        return 0.0, LESION_PENALTY if size else math.nan
    dice = 2 * np.count_nonzero(pred & truth) / (np.count_nonzero(pred) + np.count_nonzero(truth))
    return dice, surface_hd95(torch.from_numpy(pred), torch.from_numpy(truth), size) if size else math.nan
