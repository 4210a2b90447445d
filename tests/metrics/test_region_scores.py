# SPDX-License-Identifier: Apache-2.0
"""Dice and HD95 against an independent computation with SciPy's dense distance transform."""

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.metrics import compute_dice, compute_hausdorff_distance
from scipy import ndimage

from monai_cggm.metrics import BRATS_REGIONS, EMPTY_CONVENTIONS, lesion_wise, region_scores


def surface_distances(pred, truth, spacing):
    """Both directed sets of distances in mm, by the dense transform (MONAI searches a tree)."""
    edges = [mask & ~ndimage.binary_erosion(mask) for mask in (pred, truth)]
    to_pred, to_truth = (ndimage.distance_transform_edt(~edge, sampling=spacing) for edge in edges)
    return to_truth[edges[0]], to_pred[edges[1]]


def reference_hd95(pred, truth, spacing):
    return max(np.percentile(distances, 95) for distances in surface_distances(pred, truth, spacing))


def reference_dice(pred, truth):
    return 2 * (pred & truth).sum() / (pred.sum() + truth.sum())


def blobs(shape, seed):
    """Smooth random classes 0..3, touching the image's border."""
    noise = np.random.default_rng(seed).normal(size=(4, *shape))
    smooth = np.stack([ndimage.gaussian_filter(channel, 2) for channel in noise])
    return smooth.argmax(axis=0).astype(np.uint8)


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((20, 24, 18), (1.0, 1.0, 1.0)),
        ((20, 24, 18), (1.0, 1.0, 5.0)),
        ((13, 9, 30), (0.5, 3.0, 1.7)),
        ((40, 33), (0.7, 2.5)),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_independent_computation(shape, spacing, seed):
    pred, truth = blobs(shape, seed), blobs(shape, seed + 100)
    scores = region_scores(pred, truth, spacing=spacing)
    for name, classes in BRATS_REGIONS.items():
        p, t = np.isin(pred, classes), np.isin(truth, classes)
        assert scores[f"dice_{name}"] == pytest.approx(reference_dice(p, t), rel=1e-6)
        assert scores[f"hd95_{name}"] == pytest.approx(reference_hd95(p, t, spacing), rel=1e-5)
    assert scores["dice_mean"] == pytest.approx(np.mean([scores[f"dice_{name}"] for name in BRATS_REGIONS]))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_hd95_is_in_millimetres_along_each_axis(axis):
    spacing = (1.0, 0.5, 5.0)
    truth = np.zeros((16, 16, 16), np.uint8)
    truth[4:9, 4:9, 4:9] = 3
    pred = np.roll(truth, 2, axis=axis)
    assert region_scores(pred, truth, spacing=spacing)["hd95_ET"] == pytest.approx(2 * spacing[axis])


def test_the_percentile_is_of_each_direction_and_not_of_both_pooled():
    truth = np.zeros((40, 40), np.uint8)
    truth[2:30, 2:38] = 1
    pred = truth.copy()
    truth[35:38, 10:14] = 1  # a small part is missed: about 7 % of the truth's surface, 4 % of both
    spacing = (1.0, 1.0)
    outward, back = surface_distances(pred == 1, truth == 1, spacing)
    pooled = np.percentile(np.concatenate([outward, back]), 95)
    found = region_scores(pred, truth, regions={"core": [1]}, spacing=spacing)["hd95_core"]
    assert found == pytest.approx(max(np.percentile(outward, 95), np.percentile(back, 95)))
    assert found > pooled


@pytest.mark.parametrize("corner", [(0, 0, 0), (50, 60, 11), (98, 105, 30)])
def test_cropping_to_the_union_changes_nothing(corner):
    inner = [slice(start, start + size) for start, size in zip(corner, (22, 15, 10), strict=True)]
    pred, truth = np.zeros((2, 120, 120, 40), np.uint8)
    pred[tuple(inner)], truth[tuple(inner)] = blobs((22, 15, 10), 5), blobs((22, 15, 10), 6)
    spacing = (1.0, 1.5, 4.0)
    scores = region_scores(pred, truth, spacing=spacing)
    for name, classes in BRATS_REGIONS.items():
        masks = [torch.from_numpy(np.isin(array, classes))[None, None] for array in (pred, truth)]
        whole = compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=list(spacing))
        assert scores[f"hd95_{name}"] == whole.item()
        assert scores[f"dice_{name}"] == compute_dice(*masks, ignore_empty=False).item()


NAN = math.nan
EMPTY_CASES = [
    ("brats_legacy", "both", 1.0, 0.0),
    ("brats_legacy", "truth", 0.0, 373.0),
    ("brats_legacy", "prediction", 0.0, 373.0),
    ("brats_legacy_et500", "both", 1.0, 0.0),
    ("brats_legacy_et500", "truth", 0.0, 373.0),
    ("brats_legacy_et500", "prediction", 0.0, 373.0),
    ("brats2023_lesionwise", "both", 1.0, 0.0),
    ("brats2023_lesionwise", "truth", 0.0, 374.0),
    ("brats2023_lesionwise", "prediction", 0.0, 374.0),
    ("monai", "both", NAN, NAN),
    ("monai", "truth", NAN, NAN),
    ("monai", "prediction", 0.0, NAN),
]


@pytest.mark.parametrize(("convention", "empty", "dice", "hd95"), EMPTY_CASES)
def test_empty_regions(convention, empty, dice, hd95):
    full, nothing = np.zeros((12, 13, 14), np.uint8), np.zeros((12, 13, 14), np.uint8)
    full[1:10, 2:11, 3:12] = 3  # 729 mm³: too large for every threshold
    pred = full if empty == "truth" else nothing
    truth = full if empty == "prediction" else nothing
    scores = region_scores(pred, truth, regions={"ET": [3]}, spacing=(1, 1, 1), convention=convention)
    assert scores == pytest.approx({"dice_ET": dice, "hd95_ET": hd95, "dice_mean": dice}, nan_ok=True)


@pytest.mark.filterwarnings("ignore:the (ground truth|prediction) of class")
@pytest.mark.parametrize("empty", ["both", "truth", "prediction", "neither"])
def test_the_monai_convention_is_what_monai_computes(empty):
    pred, truth = torch.zeros(2, 1, 1, 8, 8, 8, dtype=torch.bool)
    pred[..., 2:5] = empty not in ("both", "prediction")
    truth[..., 3:7] = empty not in ("both", "truth")
    scores = region_scores(
        pred[0, 0].byte(), truth[0, 0].byte(), regions={"r": [1]}, spacing=(1, 1, 2), convention="monai"
    )
    expected_hd95 = compute_hausdorff_distance(
        pred, truth, include_background=True, percentile=95, spacing=[1.0, 1.0, 2.0]
    )
    assert scores["dice_r"] == pytest.approx(compute_dice(pred, truth).item(), nan_ok=True)
    assert scores["hd95_r"] == pytest.approx(expected_hd95.item(), nan_ok=True)


def with_et(voxels, place=2):
    """A tumour of 1800 voxels at ``place``, the first ones of its core enhancing."""
    classes = np.zeros((20, 14, 14), np.uint8)
    classes[place : place + 15, 2:12, 1:13] = 2
    core = np.zeros_like(classes, dtype=bool)
    core[place : place + 10, 3:11, 2:11] = True
    classes[core] = 1
    classes[tuple(np.argwhere(core)[:voxels].T)] = 3
    return classes


@pytest.mark.parametrize(
    ("spacing", "voxels", "kept"),
    [
        ((1.0, 1.0, 1.0), 499, False),
        ((1.0, 1.0, 1.0), 500, True),
        ((0.9999998, 0.9999998, 0.9999998), 500, True),  # as an affine has it
        ((2.0, 2.0, 2.0), 62, False),  # 496 mm³
        ((2.0, 2.0, 2.0), 63, True),  # 504 mm³
        ((1.0, 1.0, 5.0), 99, False),
        ((1.0, 1.0, 5.0), 100, True),
    ],
)
def test_a_small_predicted_et_counts_as_none(spacing, voxels, kept):
    """Whole tumour and core stay; without an ET in the truth the rule turns a 0 into a 1, with one a Dice into a 0."""
    pred = with_et(voxels)
    for truth, dropped in ((with_et(0), (1.0, 0.0)), (with_et(700, place=3), (0.0, 373.0))):
        legacy = region_scores(pred, truth, spacing=spacing)
        scores = region_scores(pred, truth, spacing=spacing, convention="brats_legacy_et500")
        expected = legacy if kept else legacy | dict(zip(("dice_ET", "hd95_ET"), dropped, strict=True))
        mean = np.mean([expected[f"dice_{name}"] for name in BRATS_REGIONS])
        assert scores == pytest.approx(expected | {"dice_mean": mean})
        assert scores["dice_TC"] == legacy["dice_TC"] > 0
        without = region_scores(pred, truth, spacing=spacing, convention="brats_legacy_et500", hd95=False)
        assert without == {name: value for name, value in scores.items() if name.startswith("dice")}


def test_a_small_et_becomes_core_in_effect():
    """Relabelling the voxels as necrotic core, as others do it, scores the same."""
    pred, truth = with_et(300), with_et(700, place=3)
    relabelled = np.where(pred == 3, 1, pred).astype(np.uint8)
    scores = region_scores(pred, truth, spacing=(1, 1, 1), convention="brats_legacy_et500")
    assert scores == region_scores(relabelled, truth, spacing=(1, 1, 1), convention="brats_legacy")


def test_a_small_true_et_stays():
    truth, pred = with_et(300), with_et(600)
    scores = region_scores(pred, truth, spacing=(1, 1, 1), convention="brats_legacy_et500")
    assert scores["dice_ET"] == pytest.approx(2 * 300 / 900)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 2.0, 4.0)])
def test_lesion_wise_scores_are_those_of_each_region(spacing):
    shape = (40, 36, 30)
    pred, truth = blobs(shape, 3), blobs(shape, 4)
    pred[ndimage.gaussian_filter(np.random.default_rng(5).normal(size=shape), 3) < 0.02] = 0
    truth[ndimage.gaussian_filter(np.random.default_rng(6).normal(size=shape), 3) < 0.04] = 0
    scores = region_scores(pred, truth, spacing=spacing, convention="brats2023_lesionwise")
    for name, classes in BRATS_REGIONS.items():
        found = lesion_wise(np.isin(pred, classes), np.isin(truth, classes), spacing)
        assert (scores[f"dice_{name}"], scores[f"hd95_{name}"]) == pytest.approx(found[:2])
    assert scores["dice_mean"] == pytest.approx(np.mean([scores[f"dice_{name}"] for name in BRATS_REGIONS]))
    assert scores["dice_WT"] != pytest.approx(region_scores(pred, truth, spacing=spacing)["dice_WT"])
    without = region_scores(pred, truth, spacing=spacing, convention="brats2023_lesionwise", hd95=False)
    assert without == {name: value for name, value in scores.items() if name.startswith("dice")}


def test_a_lesion_too_small_to_count_leaves_nothing_to_score():
    truth = np.zeros((20, 20, 20), np.uint8)
    truth[4:7, 4:7, 4:7] = 3  # 27 mm³
    scores = region_scores(np.zeros_like(truth), truth, spacing=(1, 1, 1), convention="brats2023_lesionwise")
    assert (scores["dice_ET"], scores["hd95_ET"]) == (1.0, 0.0)


def test_the_default_does_not_hide_false_positives():
    truth, pred = np.zeros((2, 5, 5, 5), np.uint8)
    pred[2, 2, 2] = 3
    assert region_scores(pred, truth, hd95=False)["dice_mean"] == 0.0


def test_mean_leaves_out_regions_without_a_dice():
    truth = np.zeros((4, 4, 4), np.uint8)
    truth[1:3] = 2  # edema only: no core, no enhancing tumour
    scores = region_scores(truth, truth, convention="monai", hd95=False)
    assert scores["dice_mean"] == 1.0
    assert math.isnan(scores["dice_TC"])


def test_arrays_tensors_and_meta_tensors_score_the_same():
    pred, truth = blobs((12, 11, 10), 0), blobs((12, 11, 10), 1)
    expected = region_scores(pred, truth, spacing=(1, 1, 2))
    tensors = torch.from_numpy(pred), torch.from_numpy(truth)
    assert region_scores(*tensors, spacing=(1, 1, 2)) == expected
    assert region_scores(*[MetaTensor(t.float()) for t in tensors], spacing=torch.tensor([1.0, 1.0, 2.0])) == expected


MAP = np.zeros((4, 4, 4), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pred": MAP[:3]}, r"shape \(3, 4, 4\), the truth \(4, 4, 4\)"),
        ({"pred": MAP + 0.5}, "prediction holds values that are no class indices"),
        ({"truth": np.full((4, 4, 4), np.nan)}, "truth holds values that are no class indices"),
        ({"spacing": None}, "needs the spacing"),
        ({"spacing": (1, 1)}, "3 positive numbers"),
        ({"spacing": (1, 0, 1)}, "3 positive numbers"),
        ({"convention": "lenient"}, "'lenient'.*brats_legacy, brats_legacy_et500, brats2023_lesionwise, monai"),
        (
            {"convention": "brats_legacy_et500", "spacing": None, "hd95": False},
            "thresholds in mm³ and needs the spacing",
        ),
        ({"convention": "brats_legacy_et500", "spacing": (1, 1)}, "3 positive numbers"),
        ({"convention": "brats_legacy_et500", "regions": {"lesion": [1]}}, r"needs a region 'ET', got \['lesion'\]"),
        ({"convention": "brats_legacy_et500", "pred": MAP[0], "truth": MAP[0]}, "volumes.*got 2 dimensions"),
        ({"convention": "brats2023_lesionwise", "spacing": None, "hd95": False}, "mm³ and needs the spacing"),
        ({"convention": "brats2023_lesionwise", "pred": MAP[0], "truth": MAP[0]}, "volumes.*got 2 dimensions"),
        ({"regions": {}}, "at least one class"),
        ({"regions": {"WT": []}}, "at least one class"),
    ],
)
def test_refuses_what_does_not_fit(arguments, message):
    given = {"pred": MAP, "truth": MAP, "spacing": (1, 1, 1)} | arguments
    with pytest.raises(ValueError, match=message):
        region_scores(given.pop("pred"), given.pop("truth"), **given)


def test_every_convention_has_a_note_for_the_tables():
    assert all(convention.note for convention in EMPTY_CONVENTIONS.values())
