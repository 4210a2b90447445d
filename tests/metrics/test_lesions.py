# SPDX-License-Identifier: Apache-2.0
"""Lesion by lesion scores: counted by hand, against a slow reference, and against the challenge's own code."""

import itertools
import math

import numpy as np
import pytest
from scipy import ndimage

from monai_cggm.metrics import EMPTY_CONVENTIONS, lesion_wise, region_scores

MM = (1.0, 1.0, 1.0)
SHAPE = (48, 20, 20)


def boxes(*corners, shape=SHAPE, size=(6, 6, 6)):
    """A mask of boxes with these lowest corners."""
    mask = np.zeros(shape, dtype=bool)
    for corner in corners:
        mask[tuple(slice(start, start + length) for start, length in zip(corner, size, strict=True))] = True
    return mask


def voxels(*places, shape=SHAPE):
    return boxes(*places, shape=shape, size=(1, 1, 1))


A, B = (4, 6, 6), (34, 6, 6)
NOTHING = boxes()


# --- counted by hand


def test_perfect():
    assert lesion_wise(boxes(A, B), boxes(A, B), MM) == (1.0, 0.0, 2, 0, 0)


def test_one_missed():
    assert lesion_wise(boxes(A), boxes(A, B), MM) == (0.5, 374 / 2, 2, 1, 0)


def test_one_false():
    assert lesion_wise(boxes(A, B), boxes(A), MM) == (0.5, 374 / 2, 1, 0, 1)


def test_both_empty():
    assert lesion_wise(NOTHING, NOTHING, MM) == (1.0, 0.0, 0, 0, 0)


def test_nothing_predicted():
    assert lesion_wise(NOTHING, boxes(A, B), MM) == (0.0, 374.0, 2, 2, 0)


def test_nothing_there():
    assert lesion_wise(boxes(A, B), NOTHING, MM) == (0.0, 374.0, 0, 0, 2)


@pytest.mark.parametrize(
    ("spacing", "gap", "lesions"),
    [
        (1.0, 6, 1),  # three voxels of reach from either side leave nothing between them
        (1.0, 7, 2),
        (1.0000002, 6, 1),  # as an affine has it
        (0.9999998, 7, 2),
        (0.5, 12, 1),
        (0.5, 13, 2),
        (2.0, 2, 1),  # 3 mm are one voxel of 2 mm
        (2.0, 3, 2),
        (5.0, 1, 2),  # and none of 5 mm
    ],
)
def test_lesions_joined_by_their_reach(spacing, gap, lesions):
    """Of two equal parts one is found: as one lesion Dice is 2·1 / (1 + 2), as two lesions it is (1 + 0) / 2."""
    for axis in range(3):
        size = [8, 8, 8]
        size[axis] = 10  # other axes stay at 1 mm: the reach follows each axis's own spacing
        shape, second = [14, 14, 14], [2, 2, 2]
        shape[axis], second[axis] = 40, 12 + gap
        first, mm = (2, 2, 2), [1.0, 1.0, 1.0]
        mm[axis] = spacing
        pred = boxes(first, shape=shape, size=size)
        truth = pred | boxes(second, shape=shape, size=size)
        scores = lesion_wise(pred, truth, mm)
        assert scores.dice == pytest.approx(2 / 3 if lesions == 1 else 1 / 2)
        assert scores[2:] == (lesions, lesions - 1, 0)


def test_neighbours_across_a_corner_are_one_part():
    assert lesion_wise(voxels((2, 2, 2), (3, 3, 3)), NOTHING, MM).false == 1
    assert lesion_wise(voxels((2, 2, 2), (3, 3, 4)), NOTHING, MM).false == 2


def small_lesion(volume):
    mask = boxes((4, 6, 6), size=(5, 5, 2))  # 50 voxels
    mask[4, 6, 8 : 8 + volume - 50] = True
    return mask


@pytest.mark.parametrize(
    ("volume", "pred", "expected"),
    [
        (50, NOTHING, (1.0, 0.0, 0, 0, 0)),
        (51, NOTHING, (0.0, 374.0, 1, 1, 0)),
        (50, small_lesion(50), (1.0, 0.0, 0, 0, 0)),
        (51, small_lesion(51), (1.0, 0.0, 1, 0, 0)),
        (50, voxels((11, 6, 6)), (1.0, 0.0, 0, 0, 0)),  # touches the reach of the small lesion: not false
        (50, voxels((12, 6, 6)), (0.0, 374.0, 0, 0, 1)),
    ],
)
@pytest.mark.parametrize("spacing", [1.0, 1.0000002, 0.9999998])
def test_a_lesion_counts_above_50_mm3(volume, pred, expected, spacing):
    truth = small_lesion(volume)
    assert truth.sum() == volume
    assert lesion_wise(pred, truth, (spacing, spacing, spacing)) == pytest.approx(expected)


@pytest.mark.parametrize(("count", "lesions"), [(6, 0), (7, 1)])
def test_the_volume_is_in_mm3_and_before_the_dilation(count, lesions):
    """Six voxels of 8 mm³ are 48 mm³, seven are 56 mm³."""
    truth = boxes((4, 4, 4), size=(count, 1, 1))
    assert lesion_wise(truth, truth, (2.0, 2.0, 2.0)) == (1.0, 0.0, lesions, 0, 0)
    assert lesion_wise(NOTHING, truth, (2.0, 2.0, 2.0)).missed == lesions


def test_a_single_voxel():
    one = voxels((4, 4, 4))
    assert lesion_wise(NOTHING, one, MM) == (1.0, 0.0, 0, 0, 0)
    assert lesion_wise(one, one, (4.0, 4.0, 4.0)) == (1.0, 0.0, 1, 0, 0)  # 64 mm³
    assert lesion_wise(voxels((4, 4, 5)), one, (4.0, 4.0, 4.0)) == (0.0, 374.0, 1, 1, 1)


def test_a_lesion_found_in_two_pieces_is_found_once():
    truth = boxes(A)
    pred = truth.copy()
    pred[6:8] = False
    dice = 2 * 4 * 36 / (4 * 36 + 6 * 36)
    assert lesion_wise(pred, truth, MM) == pytest.approx((dice, 1.0, 1, 0, 0))


def test_a_part_that_touches_two_lesions_counts_whole_in_both():
    truth = boxes(A, B)
    pred = boxes((4, 6, 6), size=(36, 6, 6))  # from A to B and what lies between
    scores = lesion_wise(pred, truth, MM)
    assert scores.dice == pytest.approx(2 * 6 / (6 + 36))
    assert scores[2:] == (2, 0, 0)


@pytest.mark.parametrize(
    ("offset", "found"),
    [((3, 0, 0), True), ((4, 0, 0), False), ((3, 3, 0), True), ((3, 2, 1), True), ((3, 3, 1), False)],
)
def test_the_reach_is_three_steps_of_18_neighbours(offset, found):
    """A part in the reach is no false lesion, though it overlaps with nothing."""
    part = voxels(tuple(9 + step for step in offset))
    scores = lesion_wise(part, boxes((4, 4, 4), size=(6, 6, 6)), MM)
    assert scores[2:] == ((1, 0, 0) if found else (1, 1, 1))
    assert scores.dice == 0.0
    assert (scores.hd95 < 20) == found


def test_hd95_is_in_mm_along_each_axis():
    truth = boxes((20, 6, 6), size=(6, 6, 6))
    for axis, spacing in itertools.product(range(3), [(1.0, 1.0, 5.0), (2.0, 0.7, 1.0)]):
        scores = lesion_wise(np.roll(truth, 1, axis=axis), truth, spacing)
        assert scores.hd95 == pytest.approx(spacing[axis])


def test_without_hd95():
    pred, truth = boxes(A, (20, 6, 6)), boxes(A, B)
    scores = lesion_wise(pred, truth, MM, hd95=False)
    assert math.isnan(scores.hd95)
    assert scores._replace(hd95=0.0) == lesion_wise(pred, truth, MM)._replace(hd95=0.0)


# --- against a slow reference


def dilated(mask, spacing):
    """Everything within 3 mm along each axis and 6 mm over all axes of a voxel of the mask; its margin stays empty."""
    found = np.zeros_like(mask)
    for offset in itertools.product(range(-6, 7), repeat=3):
        away = [abs(step) * size for step, size in zip(offset, spacing, strict=True)]
        if max(away) < 3.0001 and sum(away) < 6.0001:
            found |= np.roll(mask, offset, axis=(0, 1, 2))
    return found


def reference_hd95(pred, truth, spacing):
    edges = [mask & ~ndimage.binary_erosion(mask) for mask in (pred, truth)]
    to_pred, to_truth = (ndimage.distance_transform_edt(~edge, sampling=spacing) for edge in edges)
    return max(np.percentile(to_truth[edges[0]], 95), np.percentile(to_pred[edges[1]], 95))


def reference(pred, truth, spacing):
    """The published rules in their order, on whole volumes with a margin, without a shortcut."""
    pred, truth = np.pad(pred, 8), np.pad(truth, 8)
    near = np.ones((3, 3, 3))
    truth_parts, _ = ndimage.label(truth, near)
    dilated_parts, number = ndimage.label(dilated(truth, spacing), near)
    pred_parts, pred_number = ndimage.label(pred, near)
    dices, distances, true_positive = [], [], set()
    for joined in range(1, number + 1):
        lesion = np.isin(truth_parts, np.unique(truth_parts[(dilated_parts == joined) & truth]))
        own = set(np.unique(pred_parts[dilated(lesion, spacing)])) - {0}
        true_positive |= own
        if lesion.sum() * math.prod(spacing) <= 50:
            continue
        parts = np.isin(pred_parts, list(own))
        dices.append(2 * (parts & lesion).sum() / (parts.sum() + lesion.sum()))
        distances.append(reference_hd95(parts, lesion, spacing) if own else 374.0)
    missed, lesions = distances.count(374.0), len(dices)
    false = len(set(range(1, pred_number + 1)) - true_positive)
    if lesions + false == 0:
        return 1.0, 0.0, 0, 0, 0
    return sum(dices) / (lesions + false), (sum(distances) + 374 * false) / (lesions + false), lesions, missed, false


def blobs(shape, seed, threshold):
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
    return field > threshold * field.std()


def scene(shape, seed, threshold):
    """A prediction that finds the lesions of one half a voxel off, and has others of its own."""
    truth, other = blobs(shape, seed, threshold), blobs(shape, seed + 10, threshold + 0.6)
    pred = other | np.roll(truth, 1, axis=1)
    half = shape[0] // 2
    pred[:half] = other[:half]
    return pred, truth


@pytest.mark.parametrize(
    ("shape", "spacing", "threshold"),
    [
        ((64, 40, 36), (1.0, 1.0, 1.0), 2.4),
        ((30, 61, 50), (1.0, 1.0, 1.0), 2.4),
        ((44, 32, 36), (2.0, 2.0, 2.0), 2.4),
        ((52, 56, 20), (1.2, 0.8, 3.5), 2.4),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_slow_reference(shape, spacing, threshold, seed):
    pred, truth = scene(shape, seed, threshold)
    expected = reference(pred, truth, spacing)
    assert lesion_wise(pred, truth, spacing) == pytest.approx(expected, rel=1e-5)
    lesions, missed, false = expected[2:]
    assert lesions > missed > 0 < false  # the scene has all there is


def test_the_crop_of_region_scores_changes_nothing():
    """It cuts to the tumour's box, and the dilation reaches beyond that."""
    pred, truth = (np.pad(mask, 6) for mask in scene((40, 30, 24), 3, 2.0))
    scores = region_scores(pred * 3, truth * 3, regions={"ET": [3]}, spacing=MM, convention="brats2023_lesionwise")
    assert (scores["dice_ET"], scores["hd95_ET"]) == pytest.approx(lesion_wise(pred, truth, MM)[:2])


# --- against the challenge's code


def ball(centre, radius, shape=(64, 48, 40)):
    grids = np.ogrid[tuple(map(slice, shape))]
    return sum((grid - middle) ** 2 for grid, middle in zip(grids, centre, strict=True)) <= radius**2


def test_recorded_scores_of_the_challenges_code():
    """Two lesions found, one missed, one too small, two false parts: what BraTS-2023-Metrics printed for this scene."""
    lesions = [((14, 14, 14), 8), ((30, 14, 14), 4), ((50, 34, 24), 7), ((14, 38, 30), 2), ((56, 8, 8), 3)]
    found = [((15, 16, 14), 7), ((47, 34, 26), 6), ((52, 44, 36), 2), ((14, 38, 33), 1), ((36, 38, 8), 3)]
    truth, pred = (np.logical_or.reduce([ball(*one) for one in balls]) for balls in (lesions, found))
    scores = lesion_wise(pred, truth, MM)
    assert scores.dice == pytest.approx(0.25171888314299756, abs=1e-12)
    assert scores.hd95 == pytest.approx(227.20997512422417, abs=0.5)  # there HD95 is weighted by surface area
    assert scores[2:] == (3, 1, 2)


def test_the_conventions_table_says_what_the_function_does():
    """For regions without small lesions."""
    rule = EMPTY_CONVENTIONS["brats2023_lesionwise"]
    assert rule.both_empty == lesion_wise(NOTHING, NOTHING, MM)[:2]
    assert rule.truth_empty == lesion_wise(boxes(A), NOTHING, MM)[:2]
    assert rule.prediction_empty == lesion_wise(NOTHING, boxes(A), MM)[:2]


@pytest.mark.parametrize(
    ("pred", "truth", "spacing", "message"),
    [
        (NOTHING[1:], NOTHING, MM, r"\(47, 20, 20\) and \(48, 20, 20\)"),
        (NOTHING[0], NOTHING[0], MM, "two masks"),
        (NOTHING, NOTHING, (1.0, 1.0), "3 positive numbers"),
        (NOTHING, NOTHING, (1.0, math.nan, 1.0), "3 positive numbers"),
        (NOTHING, NOTHING, None, "needs? the spacing"),
    ],
)
def test_refuses_what_does_not_fit(pred, truth, spacing, message):
    with pytest.raises(ValueError, match=message):
        lesion_wise(pred, truth, spacing)
