# SPDX-License-Identifier: Apache-2.0
"""Numbers that follow from what the data are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from monai_cggm.discovery import CaseSurvey, Found, FoundCase, Source, Survey
from monai_cggm.errors import DataError
from monai_cggm.new_bundle import BundlePlan, Wishes, plan_bundle
from monai_cggm.new_bundle.plan import check_wishes

VOXELS = {0: 90_000, 1: 9_000, 4: 1_000}


def plan(
    tmp_path: Path,
    *,
    shape: tuple[int, int, int] = (40, 50, 20),
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    orientation: str = "LPS",
    empty: int = 0,
    labels: dict[int, int] | None = None,
    names: dict[int, str] | None = None,
    training: int = 20,
    wishes: Wishes | None = None,
) -> BundlePlan:
    """The plan for one case whose image is 0 in the first ``empty`` voxels of each axis."""
    image = np.ones(shape, np.float32)
    image[:empty] = image[:, :empty] = image[:, :, :empty] = 0
    file = tmp_path / "image.nii.gz"
    nib.save(nib.Nifti1Image(image, np.eye(4)), file)
    case = FoundCase("p01", "p01", {"ct": Source(file), "pet": Source(file)}, Source(file))
    found = Found(tmp_path, "folders", ("ct", "pet"), (case,), names)
    survey = Survey((CaseSurvey("p01", shape, spacing, orientation, VOXELS if labels is None else labels),))
    return plan_bundle(found, survey, [{f"p{number + 1:02d}" for number in range(training)}], wishes)


@pytest.mark.parametrize(
    ("orientation", "spacing", "dims", "slices"),
    [
        ("LPS", (1, 1, 1), 3, "LPS"),
        ("LPS", (1, 1, 2.9), 3, "LPS"),
        ("LPS", (1, 1, 3), 2, "LPS"),
        ("RAS", (0.5, 0.5, 5), 2, "LPS"),  # axial
        ("ASL", (1, 1, 4), 2, "PSL"),  # sagittal: the file's third axis is left-right
        ("LIA", (1, 1, 4), 2, "LSP"),  # coronal
        ("SLP", (4, 1, 1), 2, "LPS"),  # axial, the slices along the file's first axis
    ],
)
def test_slices_along_the_coarse_axis_and_patches_otherwise(tmp_path, orientation, spacing, dims, slices):
    made = plan(tmp_path, orientation=orientation, spacing=spacing)
    assert (made.spatial_dims, made.orientation) == (dims, slices)
    # the last axis of a volume of that orientation is the coarse one
    if dims == 2:
        last = nib.orientations.axcodes2ornt(slices)[2][0]
        axes = nib.orientations.axcodes2ornt(orientation)[:, 0]
        assert spacing[list(axes).index(last)] == max(spacing)


def test_what_is_asked_for_wins(tmp_path):
    assert plan(tmp_path, wishes=Wishes(spatial_dims=2)).orientation == "LPS"
    assert plan(tmp_path, spacing=(1, 1, 2), orientation="ASL", wishes=Wishes(spatial_dims=2)).orientation == "PSL"
    assert plan(tmp_path, spacing=(1, 1, 9), wishes=Wishes(spatial_dims=3)).spatial_dims == 3
    assert "asked for" in plan(tmp_path, wishes=Wishes(spatial_dims=2)).reasons["slices or patches"]
    with pytest.raises(ValueError, match="spatial_dims must be 2 or 3, got 1"):
        plan(tmp_path, wishes=Wishes(spatial_dims=1))
    with pytest.raises(ValueError, match="network must be one of paper, small, got 'huge'"):
        plan(tmp_path, wishes=Wishes(network="huge"))


def test_sizes_cover_what_is_not_empty(tmp_path):
    two = Wishes(spatial_dims=2)
    # 50 - 2 = 48 and 50 - 1 = 49 voxels, up to the next multiple of 16; square, for rotations by 90°
    assert plan(tmp_path, empty=2, wishes=two).size == (48, 48)
    assert plan(tmp_path, empty=1, wishes=two).size == (64, 64)
    # axes follow the orientation: the file's first axis is head-feet here
    assert plan(tmp_path, shape=(140, 60, 33), orientation="SLP", wishes=two).size == (64, 64)
    assert plan(tmp_path, shape=(140, 60, 33), orientation="SLP").size == (64, 48, 96)
    assert plan(tmp_path, shape=(200, 90, 5), wishes=two).size == (160, 160)
    small = Wishes(spatial_dims=2, network="small")
    assert plan(tmp_path, shape=(200, 90, 5), wishes=small).size == (96, 96)
    assert plan(tmp_path, shape=(200, 90, 20)).size == (96, 96, 32)
    assert plan(tmp_path, shape=(200, 90, 20), wishes=Wishes(network="small")).size == (48, 48, 32)


def test_classes_weigh_one_over_the_root_of_their_share(tmp_path):
    made = plan(tmp_path)
    # roots of 90, 9, 1: 1 and 3.16 times the commonest, and the rarest would be 9.5 times, 4 at most
    raw = np.array([1, np.sqrt(10), 4])
    np.testing.assert_allclose(made.class_weights, raw / raw.sum(), atol=5e-4)
    assert plan(tmp_path, labels={0: 100, 1: 100}).class_weights == (0.5, 0.5)


def test_labels_and_regions(tmp_path):
    made = plan(tmp_path)
    assert made.label_map == "0=0,1=1,4=2"
    assert made.classes == {0: "background", 1: "label_1", 4: "label_4"}
    assert made.regions == {"label_1": (1,), "label_4": (2,)}
    names = {0: "Background", 1: "necrotic core", 2: "edema", 4: "necrotic core"}
    named = plan(tmp_path, names=names, wishes=Wishes(regions={"WT": [1, 2, 4], "ET": (4,)}))
    # a class that the data set names has its place even where no case shows it
    assert named.classes == {0: "background", 1: "necrotic_core", 2: "edema", 4: "necrotic_core_4"}
    assert named.label_map == "0=0,1=1,2=2,4=3"
    assert named.regions == {"WT": (1, 2, 3), "ET": (3,)}


def test_wishes_that_do_not_fit_are_all_named(tmp_path):
    with pytest.raises(DataError) as error:
        plan(tmp_path, wishes=Wishes(regions={"a b": [1], "mean": [1], "x": [0], "y": [7, 8], "z": [], "ok": [4]}))
    assert error.value.problems == [
        "region 'a b': expected a name of letters, digits and _, other than mean, background, ignore",
        "region 'mean': expected a name of letters, digits and _, other than mean, background, ignore",
        "region x: found 0, expected values of the labels: 1, 4",
        "region y: found 7, 8, expected values of the labels: 1, 4",
        "region z: found no value, expected values of the labels: 1, 4",
    ]
    with pytest.raises(DataError, match="hold 0 only"):
        plan(tmp_path, labels={0: 9})
    with pytest.raises(DataError, match=r"no label of .* has the value 0, the background: found 1, 2"):
        plan(tmp_path, labels={1: 9, 2: 9})
    with pytest.raises(DataError, match="label value 70000, expected values up to 32767"):
        plan(tmp_path, labels={0: 9, 70000: 9})
    for title in ("$print(1)", "@network", "two\nlines", ""):
        with pytest.raises(ValueError, match="title must be one line"):
            plan(tmp_path, wishes=Wishes(title=title))


@pytest.mark.parametrize(
    ("training", "wishes", "batch", "samples", "iterations"),
    [
        (875, Wishes(spatial_dims=2), 16, 4, 54),  # the paper's batch of 64 slices
        (5, Wishes(spatial_dims=2), 5, 12, 1),
        (1, Wishes(spatial_dims=2), 1, 64, 1),
        (23, Wishes(spatial_dims=2, network="small"), 4, 4, 5),
        (23, Wishes(spatial_dims=3), 2, 2, 11),
        (1, Wishes(spatial_dims=3, network="small"), 1, 2, 1),
    ],
)
def test_a_batch_and_a_budget_that_few_cases_can_fill(tmp_path, training, wishes, batch, samples, iterations):
    made = plan(tmp_path, training=training, wishes=wishes)
    assert (made.volumes_per_batch, made.samples_per_volume) == (batch, samples)
    assert made.volumes_per_batch <= training
    assert made.epochs * iterations >= 600
    assert made.epochs >= (150 if wishes.network == "paper" else 1)
    assert made.epochs % made.val_interval == 0
    assert 9 <= made.epochs / made.val_interval <= 12


def test_cases_that_only_test_weigh_no_class(tmp_path):
    """A label that is common in the test part alone does not make its class light."""
    file = tmp_path / "image.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4)), file)
    voxels = {"p01": {0: 900, 1: 100}, "p02": {0: 800, 1: 200}, "p03": {1: 10**6, 0: 10}}
    found = Found(tmp_path, "folders", ("ct", "pet"), tuple(FoundCase(p, p, {"ct": Source(file)}) for p in voxels))
    survey = Survey(tuple(CaseSurvey(p, (4, 4, 4), (1, 1, 1), "LPS", counts) for p, counts in voxels.items()))
    for trained, counts in (
        ([{"p01"}], (900, 100)),
        ([{"p01", "p02"}], (1700, 300)),
        ([{"p01"}, {"p02"}], (1700, 300)),  # two folds
        ([{"p01", "p02", "p03"}], (1710, 300 + 10**6)),
    ):
        raw = np.asarray(counts) ** -0.5
        raw = np.minimum(raw / raw.min(), 4)
        made = plan_bundle(found, survey, trained)
        np.testing.assert_allclose(made.class_weights, raw / raw.sum(), atol=5e-4)
        assert made.volumes_per_batch == min(2, min(map(len, trained)))


def test_what_training_will_not_see_is_said(tmp_path):
    """A class of the test part alone, one that is only named, a modality of one case, a class in no region."""
    file = tmp_path / "image.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4)), file)
    voxels = {"p01": {0: 900, 1: 100}, "p02": {0: 800, 1: 200}, "p03": {0: 10, 1: 10, 2: 5}}
    cases = tuple(FoundCase(p, p, {"ct": Source(file)}, Source(file)) for p in voxels)
    found = Found(tmp_path, "folders", ("ct", "pet"), cases, {0: "air", 1: "a", 2: "b", 3: "c"})
    survey = Survey(
        tuple(
            CaseSurvey(p, (4, 4, 4), (1, 1, 1), "LPS", counts, missing=() if p == "p03" else ("pet",))
            for p, counts in voxels.items()
        )
    )
    nowhere = "No label has the value 3 (c): this class has nothing to learn from."
    unseen = "No case that trains has value 2 (b), pet."
    assert plan_bundle(found, survey, [{"p01", "p02"}]).warnings == (nowhere, unseen)
    assert plan_bundle(found, survey, [{"p01", "p03"}]).warnings == (nowhere,)
    folds = plan_bundle(found, survey, [{"p01", "p03"}, {"p01", "p02"}], Wishes(regions={"ab": [1, 2]}))
    left = "No region has value 3: trained on, not scored."
    assert folds.warnings == (nowhere, unseen.replace("trains", "trains of fold 1"), left)


def test_maps_in_which_values_share_a_class_are_refused(tmp_path):
    case = FoundCase("p01", "p01", {}, Source(tmp_path / "x.nii"), convention="0=0,1=1,2=1")
    found = Found(tmp_path, "datalist", ("ct", "pet"), (case,))
    with pytest.raises(
        DataError, match="'labels' '0=0,1=1,2=1' make one class of values 1, 2, and a bundle gives each"
    ):
        check_wishes(found, Wishes())
    check_wishes(replace(found, cases=(replace(case, convention="brats2018"),)), Wishes())


def test_large_data_are_kept_on_disk(tmp_path):
    assert not plan(tmp_path).on_disk
    case = CaseSurvey("p01", (512, 512, 600), (1, 1, 1), "LPS", VOXELS)
    file = tmp_path / "image.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4)), file)
    found = Found(tmp_path, "folders", ("ct", "pet"), (FoundCase("p01", "p01", {"ct": Source(file)}),))
    made: Any = plan_bundle(found, Survey((case,) * 10), [{"p01"}])
    # two float16 channels and a uint8 label
    assert made.reasons["prepared volumes"] == f"about {10 * 512 * 512 * 600 * 5 / 1e9:.1f} GB, kept on disk"
    assert made.on_disk
