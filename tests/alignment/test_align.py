# SPDX-License-Identifier: Apache-2.0
"""Modalities on one grid: what is resampled, registered, corrected and masked, and how cases come and go."""

from __future__ import annotations

import base64
import gzip
import json
import locale
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from monai_cggm.alignment import Aligned, AlignSettings, registration, report
from monai_cggm.alignment import align as align_found
from monai_cggm.alignment import case as of_case
from monai_cggm.alignment import cases as of_cases
from monai_cggm.alignment import settings as settings_module
from monai_cggm.data.layouts import find_cases
from monai_cggm.discovery import discover, survey_cases
from monai_cggm.errors import CaseError, DataError

CASE = "Phantom_007"
PAIR = ("flair", "t1")
TO_LPS = np.diag([-1.0, -1.0, 1.0])


def affine_of(spacing: tuple[float, ...], shape: tuple[int, ...], angles: tuple[float, ...] = (0, 0, 0)) -> np.ndarray:
    """RAS affine of a grid whose centre is at (5, -3, 8) mm."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(spacing)
    affine[:3, 3] = np.array([5.0, -3.0, 8.0]) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def world(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """RAS places (3, *shape) of the voxels."""
    index = np.indices(shape).reshape(3, -1)
    return (affine[:3, :3] @ index + affine[:3, 3:]).reshape(3, *shape)


def head(places: np.ndarray) -> np.ndarray:
    """Brightness, 0 to 1, of a head with a few uneven parts at RAS places (3, ...)."""
    x, y, z = places
    inside = 1 / (1 + np.exp(4 * (np.sqrt((x / 33) ** 2 + (y / 40) ** 2 + (z / 30) ** 2) - 1) * 8))
    parts = [
        (12, 8, 4, 9, 0.9),
        (-15, -10, 8, 7, -0.5),
        (6, -18, -12, 6, 0.7),
        (-8, 20, -6, 8, -0.4),
        (0, 0, 16, 5, 0.8),
    ]
    bumps = sum(h * np.exp(-((x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2) / (2 * r * r)) for a, b, c, r, h in parts)
    return np.asarray(inside * (0.5 + 0.4 * bumps))


def write(path: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


def case_path(root: Path, key: str, case: str = CASE) -> Path:
    return root / case / f"{case}_{key}.nii.gz"


def voxels_of(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


SHAPE, SPACING = (20, 22, 16), (2.1, 1.9, 2.6)
OTHER_SHAPE, OTHER_SPACING, OBLIQUE = (18, 20, 7), (2.3, 2.7, 6.1), (9.0, -14.0, 21.0)


def write_case(root: Path, case: str = CASE, dtype: Any = np.int16) -> None:
    """Two modalities and a label of noise, each on its own grid; the second and the label are oblique and thick."""
    generator = np.random.default_rng(3)
    affine, oblique = affine_of(SPACING, SHAPE), affine_of(OTHER_SPACING, OTHER_SHAPE, OBLIQUE)
    write(case_path(root, "flair", case), generator.integers(3, 900, SHAPE).astype(np.int16), affine)
    high = 250 if dtype == np.uint8 else 900
    write(case_path(root, "t1", case), generator.integers(3, high, OTHER_SHAPE).astype(dtype), oblique)
    labels = generator.choice(np.array([1, 2, 4], dtype=np.uint8), OTHER_SHAPE)
    write(case_path(root, "seg", case), labels, oblique)


@pytest.fixture
def pictures() -> None:
    """For tests that look at the overlays; the others do without, which halves their time."""


@pytest.fixture(autouse=True)
def _plain_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(of_case, "write_picture", lambda *given: (given[-1] / "overlay.svg").write_bytes(b"<svg/>"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "cases"
    write_case(folder)
    return folder


def align(source: Path, out: Path, settings: AlignSettings, **options: Any) -> Aligned:
    return align_found(discover(source, modalities=settings.modalities, keep_bad=True), out, settings, **options)


def run(root: Path, **settings: Any) -> Aligned:
    given = {"reference": "flair", "modalities": PAIR, **settings}
    return align(root, root.parent / "out", AlignSettings(**given))


def output(root: Path, key: str) -> Path:
    return case_path(root.parent / "out", key)


def record(root: Path) -> dict[str, Any]:
    return dict(json.loads((root.parent / "out" / CASE / "align.json").read_text()))


def expected(source: Path, target: Path, order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What scipy makes of an image on another one's grid; which voxels are inside; which lie on the edge, in doubt."""
    image, grid = nib.load(source), nib.load(target)
    to_index = np.linalg.inv(image.affine) @ grid.affine
    index = (to_index[:3, :3] @ np.indices(grid.shape).reshape(3, -1) + to_index[:3, 3:]).reshape(3, *grid.shape)
    values = map_coordinates(np.asarray(image.dataobj, dtype=float), index, order=order, mode="nearest")
    far = np.stack([np.maximum(-0.5 - i, i - (n - 0.5)) for i, n in zip(index, image.shape, strict=True)]).max(axis=0)
    ties = (np.abs(index - np.floor(index) - 0.5) < 1e-3).any(axis=0)
    return values, far < 0, (np.abs(far) < 1e-3) | (ties if order == 0 else False)


# ---------------------------------------------------------------------- resampling


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32, np.float64])
def test_images_are_interpolated_as_scipy_does(tmp_path: Path, dtype: Any) -> None:
    root = tmp_path / "cases"
    write_case(root, dtype=dtype)
    assert run(root).made == (CASE,)
    values, inside, doubtful = expected(case_path(root, "t1"), output(root, "flair"), 1)
    found = voxels_of(output(root, "t1"))
    assert found.dtype == dtype
    assert 0.2 < inside.mean() < 0.9
    # Headers hold float32, which ITK and nibabel make a rotation of each in their way: 1e-5 of a voxel, times noise.
    tolerance = 0.51 if np.issubdtype(dtype, np.integer) else 0.02
    sure = inside & ~doubtful
    np.testing.assert_allclose(found[sure].astype(float), values[sure], atol=tolerance)
    if np.issubdtype(dtype, np.integer):  # rounded, not cut off
        assert np.abs(found[sure] - values[sure]).mean() == pytest.approx(0.25, abs=0.02)
        assert (found[sure] - values[sure]).mean() == pytest.approx(0, abs=0.02)
    assert (found[~inside & ~doubtful] == 0).all()
    assert record(root)["modalities"]["t1"]["covers"] == pytest.approx(inside.mean(), abs=2e-3)


def test_labels_take_the_nearest_value(root: Path) -> None:
    run(root)
    values, inside, doubtful = expected(case_path(root, "seg"), output(root, "flair"), 0)
    found = voxels_of(output(root, "seg"))
    assert found.dtype == np.uint8
    assert np.array_equal(found[inside & ~doubtful], values[inside & ~doubtful])
    assert (found[~inside & ~doubtful] == 0).all()
    assert set(np.unique(found)) == {0, 1, 2, 4}


@pytest.mark.parametrize(
    ("stored", "written"), [(np.int16, np.int16), (np.uint16, np.uint16), (np.float32, np.uint8), (np.int32, np.int32)]
)
@pytest.mark.parametrize("how", ["nearest", "gaussian"])
def test_label_values_and_types_are_kept(root: Path, stored: Any, written: Any, how: str) -> None:
    """A ball whose shells have values that no blend of them may make."""
    affine = affine_of(OTHER_SPACING, OTHER_SHAPE, OBLIQUE)
    distance = np.linalg.norm(world(OTHER_SHAPE, affine) - np.array([5.0, -3.0, 8.0])[:, None, None, None], axis=0)
    ball = np.select([distance < 8, distance < 14], [7, 200], 0)
    write(case_path(root, "seg"), ball.astype(stored), affine)
    run(root, label_interpolation=how)
    found = voxels_of(output(root, "seg"))
    assert found.dtype == written
    assert set(np.unique(found)) == {0, 7, 200}
    for value, (before, after) in record(root)["label_volumes_mm3"].items():
        assert before == pytest.approx((ball == int(value)).sum() * np.prod(OTHER_SPACING), rel=1e-4)
        assert after == pytest.approx((found == int(value)).sum() * np.prod(SPACING), rel=1e-4)
        assert after == pytest.approx(before, rel=0.35)


def test_gaussian_labels_have_smoother_outlines(root: Path) -> None:
    affine = affine_of((4.0, 4.0, 6.0), (14, 14, 10), OBLIQUE)
    distance = np.linalg.norm(world((14, 14, 10), affine) - np.array([5.0, -3.0, 8.0])[:, None, None, None], axis=0)
    write(case_path(root, "seg"), (distance < 13).astype(np.uint8), affine)

    def surface(how: str) -> int:
        run(root, label_interpolation=how)
        found = voxels_of(output(root, "seg")).astype(int)
        assert found.sum() * np.prod(SPACING) == pytest.approx(4 / 3 * np.pi * 13**3, rel=0.25)
        return sum(int(np.abs(np.diff(found, axis=axis)).sum()) for axis in range(3))

    assert surface("gaussian") < surface("nearest")


def test_a_lost_label_is_noted(root: Path) -> None:
    affine = affine_of(SPACING, SHAPE)
    labels = np.zeros(SHAPE, np.uint8)
    labels[4:12, 4:12, 4:12], labels[2, 2, 2] = 1, 4
    write(case_path(root, "seg"), labels, affine)
    run(root, spacing=(6.0, 6.0, 6.0))
    assert record(root)["notes"] == ["label value 4 is lost on the new grid"]
    assert f"{CASE}: label value 4 is lost on the new grid." in (root.parent / "out/report.html").read_text()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_label_of_a_healthy_control_is_taken_and_noted(root: Path, dtype: Any) -> None:
    affine = affine_of(OTHER_SPACING, OTHER_SHAPE, OBLIQUE)
    write(case_path(root, "seg"), np.zeros(OTHER_SHAPE, dtype), affine)
    done = run(root)
    assert (done.made, done.problems, done.incomplete) == ((CASE,), (), {})
    made = voxels_of(output(root, "seg"))
    assert (made.dtype, made.shape, made.max()) == (np.uint8, SHAPE, 0)
    assert record(root)["label_volumes_mm3"] == {}
    assert record(root)["notes"] == ["label has no value but 0, as that of a healthy control"]
    page = (root.parent / "out/report.html").read_text()
    assert f"{CASE}: label has no value but 0, as that of a healthy control." in page
    (entry,) = json.loads((root.parent / "out/datalist.json").read_text())["training"]
    assert entry["label"] == f"{CASE}/{CASE}_seg.nii.gz"


def test_a_label_that_is_lost_as_a_whole_is_none_of_a_healthy_control(root: Path) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[2, 2, 2] = 4
    write(case_path(root, "seg"), labels, affine_of(SPACING, SHAPE))
    run(root, spacing=(6.0, 6.0, 6.0))
    assert voxels_of(output(root, "seg")).max() == 0
    assert record(root)["notes"] == ["label value 4 is lost on the new grid"]


def test_the_reference_stays_as_it_is(root: Path) -> None:
    run(root)
    before, after = nib.load(case_path(root, "flair")), nib.load(output(root, "flair"))
    assert np.array_equal(np.asanyarray(before.dataobj), np.asanyarray(after.dataobj))
    for key in ("flair", "t1", "seg"):
        np.testing.assert_allclose(nib.load(output(root, key)).affine, before.affine, atol=1e-5)
        assert nib.load(output(root, key)).header["qform_code"] == 1


@pytest.mark.parametrize("angles", [(0.0, 0.0, 0.0), OBLIQUE])
def test_another_spacing_keeps_the_field_of_view(root: Path, angles: tuple[float, ...]) -> None:
    """A ramp in world coordinates has its own values at the new voxels' places too."""
    affine = affine_of(SPACING, SHAPE, angles)
    slope = np.array([3.0, -2.0, 5.0])
    write(case_path(root, "flair"), np.tensordot(slope, world(SHAPE, affine), 1).astype(np.float32), affine)
    run(root, spacing=(1.0, 2.0, 4.0))
    made = nib.load(output(root, "flair"))
    assert made.header.get_zooms() == (1.0, 2.0, 4.0)
    assert made.shape == (42, 21, 10)  # 42, 41.8 and 41.6 mm
    outer = (np.linalg.inv(affine) @ made.affine @ [-0.5, -0.5, -0.5, 1])[:3]
    np.testing.assert_allclose(outer, -0.5, atol=1e-5)
    ramp = np.tensordot(slope, world(made.shape, made.affine), 1)
    inner = (slice(2, -2),) * 3
    np.testing.assert_allclose(made.get_fdata()[inner], ramp[inner], atol=1e-3)


@pytest.mark.parametrize(("lowest", "fill"), [(3.0, 0.0), (-80.0, 0.0), (-200.0, -200.0)])
def test_outside_of_a_field_of_view_is_what_training_takes_for_background(
    root: Path, lowest: float, fill: float
) -> None:
    """A little below 0 is an interpolation's ringing, far below is a background of the image's own."""
    path = case_path(root, "t1")
    image = nib.load(path)
    values = np.clip(image.get_fdata(), 10, 1000).astype(np.float32)
    values[5, 5, 5], values[6, 6, 6] = lowest, 1000
    nib.save(nib.Nifti1Image(values, image.affine), path)
    run(root)
    _, inside, doubtful = expected(path, output(root, "flair"), 1)
    assert (voxels_of(output(root, "t1"))[~inside & ~doubtful] == fill).all()


def test_a_fill_value_of_ones_own(root: Path) -> None:
    run(root, fill={"t1": -77.0})
    _, inside, doubtful = expected(case_path(root, "t1"), output(root, "flair"), 1)
    found = voxels_of(output(root, "t1"))
    assert (found[~inside & ~doubtful] == -77).all()
    assert (found[inside & ~doubtful] >= 3).all()


def test_pet_next_to_ct(tmp_path: Path) -> None:
    """Units stay: Hounsfield units below zero, and fractions of SUV."""
    root = tmp_path / "cases"
    ct, pet = affine_of(SPACING, SHAPE), affine_of((4.0, 4.0, 4.0), (14, 14, 14))
    ball = np.linalg.norm(world(SHAPE, ct), axis=0) < 15
    write(case_path(root, "ct"), np.where(ball, 40, -1024).astype(np.int16), ct)
    uptake = 0.25 + np.exp(-((world((14, 14, 14), pet) / 9) ** 2).sum(axis=0))
    write(case_path(root, "pet"), uptake.astype(np.float32), pet)
    settings = AlignSettings("pet", ("ct", "pet"))
    assert align(root, tmp_path / "out", settings).problems == ()
    found = voxels_of(case_path(tmp_path / "out", "ct"))
    assert (found.dtype, found.min(), found.max()) == (np.int16, -1024, 40)
    _, inside, doubtful = expected(case_path(root, "ct"), case_path(root, "pet"), 1)
    assert (~inside).any()
    assert (found[~inside & ~doubtful] == -1024).all()
    assert np.array_equal(voxels_of(case_path(tmp_path / "out", "pet")), uptake.astype(np.float32))


# ---------------------------------------------------------------------- registration

ANGLES, SHIFT = (4.0, -3.0, 6.0), (5.0, -4.0, 3.0)  # degrees about x, y, z, mm; LPS
CENTRE = np.array([-5.0, 3.0, 8.0])  # of all grids here, LPS


def true_move(points: np.ndarray) -> np.ndarray:
    """From the reference to the modality, LPS (3, N)."""
    matrix = Rotation.from_euler("ZXY", [ANGLES[2], ANGLES[0], ANGLES[1]], degrees=True).as_matrix()
    return np.asarray(matrix @ (points - CENTRE[:, None]) + CENTRE[:, None] + np.array(SHIFT)[:, None])


def write_moved_case(root: Path) -> None:
    """A head seen by two contrasts, the second of which has moved; its slices are thick. The label is drawn on it."""
    generator = np.random.default_rng(1)
    shape, spacing = (52, 60, 40), (1.8, 1.8, 2.2)
    affine = affine_of(spacing, shape)
    first = head(world(shape, affine))
    write(case_path(root, "flair"), (1000 * first + generator.normal(0, 8, shape)).astype(np.int16), affine)
    shape, spacing = (60, 64, 26), (1.6, 1.7, 3.6)
    affine = affine_of(spacing, shape, (3.0, 0.0, -5.0))
    places = (TO_LPS @ world(shape, affine).reshape(3, -1)) - CENTRE[:, None] - np.array(SHIFT)[:, None]
    matrix = Rotation.from_euler("ZXY", [ANGLES[2], ANGLES[0], ANGLES[1]], degrees=True).as_matrix()
    anatomy = (TO_LPS @ (matrix.T @ places + CENTRE[:, None])).reshape(3, *shape)
    second = head(anatomy)
    contrast = 900 * second * np.exp(-second) + generator.normal(0, 3, shape)
    write(case_path(root, "t1"), contrast.astype(np.float32), affine)
    lesion = np.linalg.norm(anatomy - np.array([12.0, 8.0, 4.0])[:, None, None, None], axis=0) < 9
    write(case_path(root, "seg"), (4 * lesion).astype(np.uint8), affine)


def lesion_at(path: Path) -> np.ndarray:
    image = nib.load(path)
    return np.asarray(image.affine @ [*np.argwhere(np.asarray(image.dataobj) == 4).mean(axis=0), 1])[:3]


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
def test_a_known_move_is_found_again(tmp_path: Path) -> None:
    root = tmp_path / "cases"
    write_moved_case(root)
    assert run(root, register=True, label_on="t1").unregistered == {}
    facts = record(root)["modalities"]["t1"]
    np.testing.assert_allclose(facts["angles_degrees"], ANGLES, atol=0.4)
    np.testing.assert_allclose(facts["shift_mm"], SHIFT, atol=0.3)
    np.testing.assert_allclose(facts["centre_mm"], CENTRE, atol=1e-3)
    before, after = facts["mutual_information"]
    assert after > 1.3 * before > 0
    assert "shift_mm" not in record(root)["modalities"]["flair"]
    np.testing.assert_allclose(lesion_at(output(root, "seg")), [12, 8, 4], atol=0.8)  # it moved with t1
    report = (root.parent / "out/report.html").read_text()
    assert f"{before:.4f}" in report
    assert f"{after:.4f}" in report
    assert "taken" in report

    first = {path.name: path.read_bytes() for path in (tmp_path / "out" / CASE).iterdir()}
    align(root, tmp_path / "again", AlignSettings("flair", PAIR, register=True, label_on="t1"))
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "again" / CASE).iterdir()}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A head in two contrasts that fit already, small enough for a metric to take no time."""
    root = tmp_path / "cases"
    shape, spacing = (24, 28, 20), (3.6, 3.6, 3.6)
    affine = affine_of(spacing, shape)
    bright = head(world(shape, affine))
    noise = np.random.default_rng(0).normal(0, 4, shape)
    write(case_path(root, "flair"), (900 * bright + np.abs(noise)).astype(np.int16), affine)
    write(case_path(root, "t1"), (900 * bright * np.exp(-2 * bright)).astype(np.int16), affine)
    write(case_path(root, "seg"), np.where(bright > 0.7, 4, 0).astype(np.uint8), affine)
    return root


def moved_by(x: float) -> Callable[..., sitk.Euler3DTransform]:
    def found(fixed: sitk.Image, moving: sitk.Image, start: sitk.Euler3DTransform) -> sitk.Euler3DTransform:
        transform = sitk.Euler3DTransform(start)
        transform.SetTranslation((x, 0.0, 0.0))
        return transform

    return found


@pytest.mark.parametrize(
    ("search", "reason"),
    [
        (moved_by(15.0), "it made the mutual information worse"),
        (moved_by(900.0), "it made the mutual information worse"),
        (None, "it failed: All samples map outside"),
    ],
)
def test_a_registration_for_the_worse_is_refused(
    small: Path, monkeypatch: pytest.MonkeyPatch, search: Any, reason: str
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("Exception thrown in SimpleITK\nITK ERROR: All samples map outside")

    monkeypatch.setattr(registration, "_search", search or fails)
    done = run(small, register=True, label_on="t1")
    assert done.made == (CASE,)
    assert done.unregistered == {CASE: ["t1"]}
    facts = record(small)["modalities"]["t1"]
    assert facts["refused"] == reason
    assert facts["angles_degrees"] == [0, 0, 0]
    assert facts["shift_mm"] == [0, 0, 0]
    assert reason in (small.parent / "out/report.html").read_text()
    for key in ("t1", "seg"):
        assert np.array_equal(voxels_of(output(small, key)), voxels_of(case_path(small, key)))


def test_a_registration_that_loses_the_overlap_is_refused(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_search", moved_by(60.0))
    better = iter([0.1, 0.1, 0.9])
    monkeypatch.setattr(registration, "_information", lambda *_: next(better))
    run(small, register=True)
    assert record(small)["modalities"]["t1"]["refused"] == "it moved half of the overlap out of view"


def test_a_better_registration_is_taken(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transform leads from the reference to the modality: what it finds at x - 7.2 comes to x."""
    affine = nib.load(case_path(small, "t1")).affine.copy()
    affine[0, 3] += 7.2  # two voxels in RAS: 7.2 mm to the patient's right in LPS, -x
    write(case_path(small, "t1"), voxels_of(case_path(small, "t1")), affine)
    monkeypatch.setattr(registration, "_search", moved_by(-7.2))
    monkeypatch.setattr(registration, "_start", lambda fixed, *_: registration._identity(fixed))
    assert run(small, register=True).unregistered == {}
    facts = record(small)["modalities"]["t1"]
    np.testing.assert_allclose(facts["shift_mm"], [-7.2, 0, 0], atol=1e-4)
    assert facts["mutual_information"][1] > facts["mutual_information"][0]
    difference = np.abs(voxels_of(output(small, "t1")).astype(int) - voxels_of(case_path(small, "t1")))
    assert difference.max() <= 1


def test_the_label_moves_with_the_modality_it_was_drawn_on(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_search", moved_by(7.2))
    monkeypatch.setattr(registration, "_start", lambda fixed, *_: registration._identity(fixed))
    steps = iter([0.1, 0.2, 0.1, 0.2])
    monkeypatch.setattr(registration, "_information", lambda *_: next(steps))
    before = voxels_of(case_path(small, "seg"))
    run(small, register=True)
    assert np.array_equal(voxels_of(output(small, "seg")), before)
    run(small, register=True, label_on="t1")
    # LPS +x is RAS -x: voxel i takes what was at i - 2.
    assert np.array_equal(voxels_of(output(small, "seg"))[2:], before[:-2])


def test_the_better_start_is_taken(small: Path) -> None:
    """Heads 80 mm apart: only the centres of mass bring them together. As they are, they need nothing."""
    fixed = registration._from_zero(sitk.ReadImage(str(case_path(small, "flair"))))
    moving = registration._from_zero(sitk.ReadImage(str(case_path(small, "t1"))))
    near = registration._start(fixed, moving, registration._information(fixed, moving, registration._identity(fixed)))
    assert near.GetTranslation() == (0, 0, 0)
    moving.SetOrigin(np.add(moving.GetOrigin(), (80.0, 0, 0)))
    far = registration._start(fixed, moving, registration._information(fixed, moving, registration._identity(fixed)))
    np.testing.assert_allclose(far.GetTranslation(), [80, 0, 0], atol=3)


# ---------------------------------------------------------------------- bias and masks


def test_n4_evens_out_a_bias_field(tmp_path: Path) -> None:
    root = tmp_path / "cases"
    shape = (40, 40, 40)
    affine = affine_of((2.0, 2.0, 2.0), shape)
    places = world(shape, affine)
    inside = ((places - np.array([5.0, -3.0, 8.0])[:, None, None, None]) ** 2).sum(axis=0) < 28**2
    field = np.exp(0.012 * places[0] - 0.008 * places[1])
    tissue = inside * np.where(places[2] > 8, 400.0, 600.0)
    for name in PAIR:
        write(case_path(root, name), np.rint(tissue * field).astype(np.int16), affine)
    run(root, n4=("t1",))
    core = ((places - np.array([5.0, -3.0, 8.0])[:, None, None, None]) ** 2).sum(axis=0) < 24**2

    def unevenness(key: str) -> float:
        voxels = voxels_of(output(root, key)).astype(float)
        return max(
            float(np.std(voxels[part]) / voxels[part].mean())
            for part in (core & (tissue == 400), core & (tissue == 600))
        )

    assert unevenness("flair") > 0.12
    assert unevenness("t1") < 0.03
    assert voxels_of(output(root, "t1")).dtype == np.float32
    assert np.array_equal(voxels_of(output(root, "flair")), voxels_of(case_path(root, "flair")))
    assert [record(root)["modalities"][name]["n4"] for name in PAIR] == [False, True]
    report = (root.parent / "out/report.html").read_text()
    assert "N4 bias correction inside Otsu&#x27;s mask: t1; these are float32." in report


def test_brain_mask_of_a_stripped_image(root: Path) -> None:
    affine = affine_of(SPACING, SHAPE)
    flair = np.zeros(SHAPE, np.int16)
    flair[4:16, 5:17, 3:13] = 100
    flair[9:11, 9:11, 7:9] = 0  # a hole
    flair[1, 1, 1] = 500  # a speck
    write(case_path(root, "flair"), flair, affine)
    run(root, mask="brain", apply_mask=True)
    mask = voxels_of(output(root, "mask"))
    solid = np.zeros(SHAPE, np.uint8)
    solid[4:16, 5:17, 3:13] = 1
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, solid)
    made = voxels_of(output(root, "flair"))
    assert made[1, 1, 1] == 0
    assert np.array_equal(made[solid > 0], flair[solid > 0])
    assert (voxels_of(output(root, "t1"))[solid == 0] == 0).all()
    entries = json.loads((root.parent / "out/datalist.json").read_text())["training"]
    assert entries[0]["mask"] == f"{CASE}/{CASE}_mask.nii.gz"


def test_a_mask_is_not_applied_unasked(root: Path) -> None:
    run(root)
    before = voxels_of(output(root, "t1"))
    assert not output(root, "mask").exists()
    run(root, mask="brain")
    assert output(root, "mask").exists()
    assert np.array_equal(voxels_of(output(root, "t1")), before)


def test_brain_mask_of_a_noisy_background(root: Path) -> None:
    affine = affine_of(SPACING, SHAPE)
    generator = np.random.default_rng(0)
    flair = generator.integers(1, 30, SHAPE).astype(np.int16)
    flair[4:16, 5:17, 3:13] += 300
    write(case_path(root, "flair"), flair, affine)
    run(root, mask="brain")
    assert np.array_equal(voxels_of(output(root, "mask")) > 0, flair > 200)


@pytest.mark.parametrize("flipped", [False, True])
def test_body_mask_of_ct(tmp_path: Path, flipped: bool) -> None:
    """Lungs that are open at both ends of the field of view are filled, the table is left out."""
    root = tmp_path / "cases"
    shape = (40, 40, 12)
    affine = affine_of((5.0, 5.0, 5.0), shape)
    x, y, _ = np.indices(shape)
    radius = np.hypot(x - 20, y - 22)
    ct = np.where(radius < 13, 30, -1000).astype(np.int16)
    ct[np.hypot(x - 20, y - 22) < 5] = -850
    ct[:, 2] = 200
    if flipped:  # the slices are stored along the first axis
        ct = np.transpose(ct, (2, 0, 1))
        affine = affine[:, [2, 0, 1, 3]]
    write(case_path(root, "ct"), ct, affine)
    assert align(root, tmp_path / "out", AlignSettings("ct", ("ct",), mask="body")).problems == ()
    mask = voxels_of(case_path(tmp_path / "out", "mask")).astype(bool)
    body = radius < 13
    if flipped:
        mask = np.transpose(mask, (1, 2, 0))
    # Opening rounds the ends of the stack; what counts is the middle.
    assert np.mean(mask[..., 3:-3] == body[..., 3:-3]) > 0.97
    assert mask[20, 22].all()
    assert not mask[:, 2].any()


def thin() -> np.ndarray:
    """Bright and nowhere as thick as the opening of the body's mask; the rest is dark."""
    voxels = np.full((12, 36, 12), 10, np.int16)
    voxels[4:8, 3:33, 4:7] = 400
    return voxels


def all_air() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, -600, (12, 36, 12)).astype(np.int16)


@pytest.mark.parametrize("apply_mask", [False, True])
@pytest.mark.parametrize("voxels", [thin, all_air], ids=lambda voxels: voxels.__name__)
def test_an_empty_mask_erases_no_case(tmp_path: Path, voxels: Callable[[], np.ndarray], apply_mask: bool) -> None:
    """The case is refused as other bad ones are, and what an earlier run made of it stays."""
    root, out = tmp_path / "cases", tmp_path / "out"
    path = write(case_path(root, "ct"), voxels(), affine_of(SPACING, (12, 36, 12)))
    thick = np.full((12, 36, 12), -1000, np.int16)
    thick[2:10, 3:33, 2:10] = 40
    write(case_path(root, "ct", "Phantom_008"), thick, affine_of(SPACING, (12, 36, 12)))
    settings = AlignSettings("ct", ("ct",), mask="body", apply_mask=apply_mask)
    done = align(root, out, settings)
    assert (done.made, done.refused) == (("Phantom_008",), (CASE,))
    message = f"the body mask of ct has no voxel, expected at least one: choose another mask or none ({path})"
    assert done.problems == (f"case {CASE}: {message}",)
    assert sorted(file.name for file in out.iterdir()) == ["Phantom_008", "datalist.json", "report.html"]
    assert [case.case_id for case in find_cases(out / "datalist.json", ["ct"])] == ["Phantom_008"]
    assert voxels_of(case_path(out, "mask", "Phantom_008")).sum() > 1000
    assert align(root, out, AlignSettings("ct", ("ct",))).problems == ()
    assert align(root, out, settings).refused == (CASE,)
    assert np.array_equal(voxels_of(case_path(out, "ct")), voxels())


def test_an_empty_brain_mask_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_case, "mask_of", lambda image, kind: sitk.Cast(image * 0, sitk.sitkUInt8))
    (problem,) = run(root, mask="brain").problems
    assert problem.startswith(f"case {CASE}: the brain mask of flair has no voxel, expected at least one")
    assert not (root.parent / "out" / CASE).exists()


# ---------------------------------------------------------------------- the data set


def test_the_datalist_is_read_back(root: Path) -> None:
    """With the patient and the label convention of a datalist, and without what it does not know."""
    write_case(root, "x-2")
    entries = [
        {"case": "a1", "patient": "a", "labels": "brats2023", "flair": f"{CASE}/{CASE}_flair.nii.gz"},
        {"case": "b2", "flair": "x-2/x-2_flair.nii.gz", "t1": "x-2/x-2_t1.nii.gz", "label": "x-2/x-2_seg.nii.gz"},
    ]
    (root / "list.json").write_text(json.dumps({"training": entries[:1], "test": entries[1:]}))
    out = root.parent / "out"
    done = align(root / "list.json", out, AlignSettings("flair", PAIR))
    assert done.made == ("a1", "b2")
    assert done.incomplete == {"a1": ["t1", "label"]}  # a label, because the other one has it
    first, second = find_cases(out / "datalist.json", PAIR)
    assert (first.case_id, first.patient, first.convention, first.label) == ("a1", "a", "brats2023", None)
    assert (second.case_id, second.patient, second.convention) == ("b2", "b2", None)
    assert second.images == {name: out / "b2" / f"b2_{name}.nii.gz" for name in PAIR}
    assert second.label == out / "b2/b2_seg.nii.gz"
    assert all(path.is_file() for path in [*first.images.values(), *second.images.values(), second.label])
    assert [case.case_id for case in find_cases(out, PAIR)] == ["a1", "b2"]
    align(root / "list.json", out, AlignSettings("flair", PAIR), labels="msd")
    assert {case.convention for case in find_cases(out / "datalist.json", PAIR)} == {"msd"}


def test_a_second_run_does_only_what_is_needed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_case(root, "Phantom_008")
    made: list[str] = []
    build = of_case._build

    def counting(case: Any, *rest: Any) -> None:
        made.append(case.case_id)
        build(case, *rest)

    monkeypatch.setattr(of_case, "_build", counting)
    assert run(root).made == (CASE, "Phantom_008")
    times = {path: path.stat().st_mtime_ns for path in (root.parent / "out").glob("*/*")}
    made.clear()
    done = run(root)
    assert (done.made, done.kept, made) == ((), (CASE, "Phantom_008"), [])
    assert times == {path: path.stat().st_mtime_ns for path in (root.parent / "out").glob("*/*")}
    assert len(find_cases(root.parent / "out/datalist.json", PAIR)) == 2

    os.utime(case_path(root, "t1"), ns=(1, 1))  # another input
    assert run(root).made == (CASE,)
    output(root, "seg").unlink()  # an output that is gone
    assert run(root).made == (CASE,)
    assert run(root, spacing=(3.0, 3.0, 3.0)).made == (CASE, "Phantom_008")  # other settings
    assert nib.load(output(root, "t1")).header.get_zooms() == (3.0, 3.0, 3.0)
    (root.parent / "out" / CASE / "align.json").write_text("{}")
    assert run(root, spacing=(3.0, 3.0, 3.0)).made == (CASE,)


def test_folders_of_cases_that_went_away_are_told(root: Path) -> None:
    """Of a case that is not in the source any more, and of one that is refused now; a folder of one's own is not."""
    out = root.parent / "out"
    for case in ("Phantom_008", "Phantom_009"):
        write_case(root, case)
    assert run(root).unlisted == ()
    (root / "Phantom_008").rename(root.parent / "elsewhere")
    case_path(root, "flair", "Phantom_009").unlink()
    write(out / "mine" / "mine_flair.nii.gz", np.ones(SHAPE, np.int16), np.eye(4))
    (out / "Phantom_008").rename(out / ".Phantom_008.old")  # of a run that was killed
    assert run(root).unlisted == ("Phantom_009",)
    (out / ".Phantom_008.old").rename(out / "Phantom_008")
    assert run(root).unlisted == ("Phantom_008", "Phantom_009")
    assert case_path(out, "t1", "Phantom_008").is_file()
    assert [case.case_id for case in find_cases(out / "datalist.json", PAIR)] == [CASE]
    sentence = (
        "Folders of earlier runs that are not in datalist.json: Phantom_008, Phantom_009; "
        "remove them, or give datalist.json, since a command that is given the whole folder takes them in."
    )
    assert sentence in (out / "report.html").read_text()
    (root.parent / "elsewhere").rename(root / "Phantom_008")
    done = run(root)
    assert (done.kept, done.unlisted) == ((CASE, "Phantom_008"), ("Phantom_009",))
    listed = (out / "datalist.json").read_bytes()
    for case in (CASE, "Phantom_008"):
        case_path(root, "flair", case).write_bytes(b"no NIfTI")
    done = run(root)
    assert (len(done.refused), done.unlisted) == (3, ())  # which the list still names
    assert (out / "datalist.json").read_bytes() == listed  # better than an empty one


def test_files_of_others_are_carried_over(root: Path) -> None:
    run(root, mask="brain")
    mine = output(root, "pred")
    mine.write_bytes(b"mine")
    (mine.parent / "notes").mkdir()
    run(root)
    assert mine.read_bytes() == b"mine"
    assert (mine.parent / "notes").is_dir()
    assert not output(root, "mask").exists()  # of the earlier settings
    assert sorted(path.name for path in (root.parent / "out").iterdir()) == [CASE, "datalist.json", "report.html"]


def test_a_run_that_was_killed_between_two_renames_loses_nothing(root: Path) -> None:
    run(root)
    mine = output(root, "pred")
    mine.write_bytes(b"mine")
    (root.parent / "out" / CASE).rename(root.parent / "out" / f".{CASE}.old")
    assert run(root).made == (CASE,)
    assert mine.read_bytes() == b"mine"
    assert sorted(path.name for path in (root.parent / "out").iterdir()) == [CASE, "datalist.json", "report.html"]


def test_a_folder_of_others_is_left_alone(root: Path) -> None:
    folder = root.parent / "out" / CASE
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    done = run(root)
    assert done.refused == (CASE,)
    expected = f"case {CASE}: its folder in the output exists and holds no align.json: expected none, or one of"
    assert done.problems[0].startswith(expected)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


# ---------------------------------------------------------------------- what goes wrong


def no_reference(root: Path) -> str:
    case_path(root, "flair").unlink()
    return f"has no flair, which is the reference: found t1 ({root / CASE})"


def cut_short(root: Path) -> str:
    path = case_path(root, "t1")
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-500]))
    return "t1 cannot be read to its end: "


def cut_short_gzip(root: Path) -> str:
    path = case_path(root, "t1")
    path.write_bytes(path.read_bytes()[:-200])
    return "t1 cannot be read to its end: "


def no_image(root: Path) -> str:
    path = case_path(root, "t1")
    path.write_bytes(b"hello")
    return f"t1 cannot be read: Unable to determine ImageIO reader for this file ({path})"


def sheared(root: Path) -> str:
    affine = np.eye(4)
    affine[0, 1] = 0.4
    write(case_path(root, "t1"), np.ones((4, 4, 4), np.int16), affine)
    return "t1 cannot be read: ITK only supports orthonormal direction cosines"


def flat(root: Path) -> str:
    path = write(case_path(root, "t1"), np.ones((9, 8), np.int16), np.eye(4))
    return f"t1 is 2-D (shape 9x8), expected a 3-D volume ({path})"


def one_slice(root: Path) -> str:
    write(case_path(root, "t1"), np.ones((9, 8, 1), np.int16), np.eye(4))
    return "t1 is 2-D (shape 9x8x1), expected a 3-D volume"


def series(root: Path) -> str:
    write(case_path(root, "t1"), np.ones((9, 8, 7, 2), np.int16), np.eye(4))
    return "t1 has shape 9x8x7x2, expected one 3-D volume: nothing names its 2 channels"


def complex_numbers(root: Path) -> str:
    write(case_path(root, "t1"), np.ones((9, 8, 7), np.complex64), np.eye(4))
    return "t1 holds complex of 32-bit float voxels"


def elsewhere(root: Path) -> str:
    affine = affine_of(SPACING, SHAPE)
    affine[0, 3] += 500
    path = write(case_path(root, "t1"), np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE), affine)
    return (
        "t1 and flair lie apart in space: t1 spans x -526 to -484, y -18 to 24, z -13 to 29 mm, "
        f"expected an overlap with x -26 to 16, y -18 to 24, z -13 to 29 mm ({path})"
    )


def label_elsewhere(root: Path) -> str:
    affine = affine_of(SPACING, SHAPE)
    affine[2, 3] += 500
    write(case_path(root, "seg"), np.ones(SHAPE, np.uint8), affine)
    return "label and flair lie apart in space: label spans"


def soft_label(root: Path) -> str:
    write(case_path(root, "seg"), np.full(SHAPE, 0.5, np.float32), affine_of(SPACING, SHAPE))
    return "label holds fractions, expected whole numbers"


def empty_image(root: Path) -> str:
    path = write(case_path(root, "t1"), np.full(SHAPE, 3, np.int16), affine_of(SPACING, SHAPE))
    return f"t1 is empty: every voxel is 3 ({path})"


def not_a_number(root: Path) -> str:
    voxels = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    voxels[0, 0, 0] = np.nan
    write(case_path(root, "t1"), voxels, affine_of(SPACING, SHAPE))
    return "t1 has 1 NaN or infinite voxels"


def two_files(root: Path) -> str:
    write(root / CASE / f"{CASE}_T1.nii", np.ones(SHAPE, np.int16), np.eye(4))
    return f"2 files may be t1, expected one ({CASE}/{CASE}_T1.nii, {CASE}/{CASE}_t1.nii.gz; choose with --modality "


BEFORE = [
    no_reference, no_image, sheared, flat, one_slice, series, complex_numbers, elsewhere, label_elsewhere, soft_label,
    two_files,
]  # fmt: skip
DURING = [cut_short, cut_short_gzip, empty_image, not_a_number]


@pytest.mark.parametrize("spoil", [*BEFORE, *DURING], ids=lambda spoil: spoil.__name__)
def test_a_bad_case_is_named_and_the_others_go_on(
    root: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], str]
) -> None:
    write_case(root, "Phantom_008")
    problem = spoil(root)
    tried: list[str] = []
    build = of_case._build

    def noting(case: Any, *rest: Any) -> None:
        tried.append(case.case_id)
        build(case, *rest)

    monkeypatch.setattr(of_case, "_build", noting)
    done = run(root)
    assert (done.made, done.refused) == (("Phantom_008",), (CASE,))
    (line,) = done.problems
    assert line.startswith(f"case {CASE}: {problem}")
    assert (CASE in tried) == (spoil in DURING)  # found before any long work
    out = root.parent / "out"
    assert sorted(path.name for path in out.iterdir()) == ["Phantom_008", "datalist.json", "report.html"]
    assert [case.case_id for case in find_cases(out / "datalist.json", PAIR)] == ["Phantom_008"]
    report = (out / "report.html").read_text()
    assert "Refused cases" in report
    assert str(root) not in report


def test_a_label_whose_modality_is_missing(root: Path) -> None:
    case_path(root, "t1").unlink()
    assert run(root, label_on="t1").problems == (
        f"case {CASE}: has no t1, on which its label was drawn: found flair ({root / CASE})",
    )
    assert run(root).made == (CASE,)


def test_boxes_that_touch_but_no_voxel_in_common(root: Path) -> None:
    """The box of an oblique plate reaches where the plate does not."""
    shape = (40, 40, 2)
    affine = affine_of((1.0, 1.0, 1.0), shape, (0.0, 45.0, 0.0))
    affine[:3, 3] += [25.0, 0.0, 25.0]
    write(case_path(root, "t1"), np.arange(np.prod(shape), dtype=np.int16).reshape(shape), affine)
    write(case_path(root, "flair"), np.arange(64, dtype=np.int16).reshape(4, 4, 4), affine_of((1, 1, 1), (4, 4, 4)))
    affine[:3, 3] += [-10.0, 0.0, -10.0]
    write(case_path(root, "t1"), np.arange(np.prod(shape), dtype=np.int16).reshape(shape), affine)
    case_path(root, "seg").unlink()
    (line,) = run(root).problems
    assert line.startswith(f"case {CASE}: t1 covers no voxel of flair's grid")


def test_values_that_n4_cannot_take(root: Path) -> None:
    voxels = np.arange(-50, np.prod(SHAPE) - 50, dtype=np.int16).reshape(SHAPE)
    write(case_path(root, "t1"), voxels, affine_of(SPACING, SHAPE))
    (line,) = run(root, n4=("t1",)).problems
    assert "t1 has values down to -50, expected 0 or more: N4 takes their logarithm" in line


def test_a_fill_value_that_the_type_cannot_hold(tmp_path: Path) -> None:
    write_case(tmp_path / "cases", dtype=np.uint8)
    (line,) = run(tmp_path / "cases", fill={"t1": -1000.0}).problems
    assert "t1 holds uint8 voxels, which cannot be the fill value -1000" in line


def test_repeated_and_unsafe_ids(root: Path) -> None:
    write_case(root / "more")
    assert run(root).made == (CASE, f"more_{CASE}")
    entries = [
        {"case": name, "flair": f"{CASE}/{CASE}_flair.nii.gz", "t1": f"{CASE}/{CASE}_t1.nii.gz"}
        for name in ("../x", "y", "y")
    ]
    (root / "list.json").write_text(json.dumps({"training": entries}))
    out = root.parent / "out2"
    done = align(root / "list.json", out, AlignSettings("flair", PAIR))
    assert (done.made, done.refused) == (("x",), ("y",))
    assert done.problems[0].startswith("case y: 2 cases have this ID, expected one (")
    assert sorted(path.name for path in out.iterdir()) == ["datalist.json", "report.html", "x"]


def test_folders_that_would_mix(root: Path) -> None:
    settings = AlignSettings("flair", PAIR)
    with pytest.raises(DataError, match=f"{root / 'out'} lies in {root}, where its files would be found as cases"):
        align(root, root / "out", settings)
    (root.parent / "list.json").write_text(json.dumps({"training": [{"flair": f"cases/{CASE}/{CASE}_flair.nii.gz"}]}))
    with pytest.raises(DataError, match=r"flair.nii.gz is inside .*: expected an output folder without data"):
        align(root.parent / "list.json", root, settings)
    assert align(root.parent / "list.json", root.parent / "out", settings).made == (CASE,)  # beside the list is fine
    (root.parent / "file").touch()
    with pytest.raises(DataError, match="is a file, expected a folder"):
        align(root, root.parent / "file", settings)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"reference": "ct"}, "the reference is 'ct', expected one of the modalities flair, t1"),
        ({"label_on": "ct"}, "the label is drawn on 'ct', expected one of the modalities flair, t1"),
        ({"n4": ("ct",)}, "N4 is for 'ct', expected one of the modalities flair, t1"),
        ({"fill": {"ct": 0.0}}, "a fill value is for 'ct', expected one of the modalities flair, t1"),
        ({"fill": {"t1": float("nan")}}, "the fill value of t1 is nan, expected a number"),
        ({"mask": "liver"}, "the mask is 'liver', expected one of none, brain, body"),
        ({"apply_mask": True}, "the mask is to be applied, but none is to be made: expected mask brain or body"),
        (
            {"label_interpolation": "cubic"},
            "the label interpolation is 'cubic', expected one of nearest, gaussian",
        ),
        ({"spacing": (1.0, 0.0, 1.0)}, "the spacing is 1, 0, 1, expected three sizes above 0 mm"),
        ({"spacing": (1.0, 2.0)}, "the spacing is 1, 2, expected three sizes above 0 mm"),
        ({"modalities": ("flair", "flair")}, "the modalities are flair, flair, expected different names"),
        (
            {"modalities": ("flair", "seg")},
            f"a modality is called 'seg', expected a name for files, and none of {', '.join(settings_module._TAKEN)}",
        ),
        (
            {"modalities": ("flair", "../t1")},
            f"a modality is called '../t1', expected a name for files, and none of {', '.join(settings_module._TAKEN)}",
        ),
    ],
)
def test_settings_that_do_not_fit(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError) as caught:
        AlignSettings(**{"reference": "flair", "modalities": PAIR, **given})
    assert caught.value.problems == [problem]


def test_a_case_that_stops_in_the_middle_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image, count = of_case.write_image, [0]

    def interrupted(*arguments: Any) -> str:
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        return write_image(*arguments)

    monkeypatch.setattr(of_case, "write_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(root)
    assert list((root.parent / "out").iterdir()) == []


def test_a_full_disk_is_that_case_s_problem(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device", "x.nii.gz")

    monkeypatch.setattr(of_case, "write_image", full)
    assert run(root).problems == (f"case {CASE}: cannot be read or written: No space left on device (x.nii.gz)",)
    monkeypatch.setattr(of_case, "write_image", lambda *_: (_ for _ in ()).throw(RuntimeError("ITK ERROR: odd")))
    assert run(root).problems == (f"case {CASE}: SimpleITK failed: odd ({root / CASE})",)
    monkeypatch.setattr(of_case, "write_image", lambda *_: (_ for _ in ()).throw(MemoryError))
    assert run(root).problems == (f"case {CASE}: does not fit into memory: try fewer workers or a coarser spacing",)


KILLED = """
import os, sys
from pathlib import Path
from monai_cggm import alignment
from monai_cggm.alignment import case
from monai_cggm.discovery import discover
write, count = case.write_image, [0]
def dying(*arguments):
    count[0] += 1
    if count[0] == 2:
        os.kill(os.getpid(), 9)
    return write(*arguments)
case.write_image = dying
found = discover(sys.argv[1])
alignment.align(found, Path(sys.argv[2]), alignment.AlignSettings("flair", ("flair", "t1")))
"""


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_under_a_final_name(root: Path, repository: Path) -> None:
    out = root.parent / "out"
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    killed = subprocess.run([sys.executable, "-c", KILLED, root, out], env=environment, check=False)
    assert killed.returncode == -9
    assert [path.name for path in out.iterdir()] == [f".{CASE}.part"]
    with pytest.raises(DataError):
        find_cases(out, PAIR)
    assert run(root).made == (CASE,)
    assert sorted(path.name for path in out.iterdir()) == [CASE, "datalist.json", "report.html"]


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
def test_workers_do_the_same(root: Path) -> None:
    write_case(root, "Phantom_008")
    empty_image(root)
    settings = AlignSettings("flair", PAIR, mask="brain")
    (alone, together) = (align(root, root.parent / f"out{n}", settings, workers=n) for n in (0, 2))
    assert (alone.made, alone.refused) == (("Phantom_008",), (CASE,))
    assert (together.made, together.problems) == (alone.made, alone.problems)
    for path in (root.parent / "out0").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (root.parent / "out2" / path.relative_to(root.parent / "out0")).read_bytes()


def test_a_dead_worker_is_reported(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the system kills one for lack of memory. What the others had begun does not stay."""
    out = root.parent / "out"

    class Pool:
        def __init__(self, workers: int, **_: Any) -> None:
            assert workers == 1  # no more than cases

        def submit(self, *_: Any) -> Future[None]:
            (out / f".{CASE}.part").mkdir(parents=True)
            future: Future[None] = Future()
            future.set_exception(BrokenProcessPool("gone"))
            return future

        def shutdown(self, **_: Any) -> None:
            pass

    monkeypatch.setattr(of_cases, "ProcessPoolExecutor", Pool)
    with pytest.raises(DataError, match="a worker process died, perhaps for lack of memory: try fewer workers"):
        align(root, out, AlignSettings("flair", PAIR), workers=3)
    assert list(out.iterdir()) == []


def test_case_errors_come_back_from_workers(root: Path) -> None:
    case = discover(root).cases[0]
    empty_image(root)
    error = of_cases._attempt(case, root.parent / "out", AlignSettings("flair", PAIR))
    assert isinstance(error, CaseError)
    assert error.problem == "t1 is empty: every voxel is 3"


def test_threads_are_given_back(root: Path) -> None:
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(3)
    try:
        run(root)
        assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == 3
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


# ---------------------------------------------------------------------- the report and privacy


@pytest.mark.usefixtures("pictures")
def test_the_report_stands_alone(small: Path) -> None:
    write_case(small, "Phantom_008")
    flat(small)
    out = small.parent / "out"
    run(small, mask="brain", fill={"t1": 1.0})
    report = (out / "report.html").read_text()
    images = re.findall(r'src="([^"]*)"', report)
    assert len(images) == 1
    svg = base64.b64decode(images[0].removeprefix("data:image/svg+xml;base64,")).decode()
    assert images[0].startswith("data:image/svg+xml;base64,")
    assert svg == (out / "Phantom_008/overlay.svg").read_text()
    assert all(link.startswith(("data:", "#")) for link in re.findall(r'href="([^"]*)"', svg))
    for text in (report, svg):
        assert not re.search(r"<script|<link|@import|url\((?!#)", text)
        assert str(small.parent) not in text
        assert str(Path.home()) not in text
    assert f"{CASE}: t1 is 2-D (shape 9x8)" in report
    assert (
        "Outside an image&#x27;s field of view stands 0, or its minimum where that is far below 0, as in CT" in report
    )
    assert "as in CT, 1 for t1." in report
    assert "20x22x16" in report
    assert len(report) < 300_000


def test_the_report_shows_no_more_than_some_pictures(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (8, 9):
        write_case(root, f"Phantom_00{number}")
    monkeypatch.setattr(report, "_MOST_PICTURES", 2)
    run(root)
    text = (root.parent / "out/report.html").read_text()
    assert text.count("<img") == 2
    assert "Shown are 2 of 3 cases" in text


def test_text_in_the_report_is_escaped() -> None:
    error = CaseError("a<b", "has <script>")
    page = report.page("Aligned cases", [report._refused_section([error])])
    assert "a&lt;b: has &lt;script&gt;" in page


def test_an_overlay_shows_reference_red_and_modality_cyan() -> None:
    """Grey levels of both at the same places: a bright spot at the patient's left, front and top."""
    voxels = np.zeros((10, 12, 14), np.float32)  # z, y, x in LPS: left is +x, back +y
    voxels[5, 1, 12] = voxels[9, 6, 12] = voxels[8, 1, 7] = 100
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((1.0, 2.0, 3.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "percentile", lambda *_: np.array([0.0, 100.0]))
        (axial, axial_aspect), (coronal, coronal_aspect), (sagittal, sagittal_aspect) = report._tiles(image)
    assert np.argwhere(axial == 255).tolist() == [[1, 12]]
    assert np.argwhere(coronal == 255).tolist() == [[0, 12]]
    assert np.argwhere(sagittal == 255).tolist() == [[1, 1]]
    assert (axial_aspect, coronal_aspect, sagittal_aspect) == (2, 3, 1.5)


NAME = "MUSTERMANN"


@pytest.mark.usefixtures("pictures")
def test_no_metadata_reaches_the_outputs(root: Path) -> None:
    """Neither from NIfTI's texts, nor from tags of an NRRD file, nor from names of files."""
    for key in ("flair", "seg"):  # the reference goes on as it is
        image = nib.load(case_path(root, key))
        image.header["descrip"] = image.header["aux_file"] = image.header["db_name"] = image.header["intent_name"] = (
            NAME
        )
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", NAME.encode()))
        nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine, image.header), case_path(root, key))
        assert NAME.encode() in gzip.decompress(case_path(root, key).read_bytes())
    tagged = sitk.ReadImage(str(case_path(root, "t1")))
    tagged.SetMetaData("0010|0010", NAME)
    sitk.WriteImage(tagged, str(root / f"{NAME}_t1.nrrd"))
    assert NAME.encode() in (root / f"{NAME}_t1.nrrd").read_bytes()
    entry = {
        "case": "p1",
        "flair": f"{CASE}/{CASE}_flair.nii.gz",
        "t1": f"{NAME}_t1.nrrd",
        "label": f"{CASE}/{CASE}_seg.nii.gz",
    }
    (root / f"{NAME}.nii.gz").write_bytes(b"hello")
    (root / f"{NAME}_cut.nii.gz").write_bytes(case_path(root, "t1").read_bytes()[:-100])
    broken = [
        {"case": f"q{n}", "flair": f"{NAME}{end}"} for n, end in enumerate(("_none.nrrd", ".nii.gz", "_cut.nii.gz"))
    ]
    (root / "list.json").write_text(json.dumps({"training": [entry, *broken]}))
    out = root.parent / "out"
    done = align(root / "list.json", out, AlignSettings("flair", PAIR, mask="brain"))
    assert (done.made, done.refused) == (("p1",), ("q0", "q1", "q2"))
    assert f"case q0: flair, of training[1], is not there ({root / NAME}_none.nrrd)" in done.problems
    files = [file for file in out.rglob("*") if file.is_file()]
    assert len(files) == 8
    for file in files:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        assert NAME.encode() not in content, file
        assert NAME not in file.name


@pytest.mark.real_data
@pytest.mark.slow
def test_a_real_case_that_was_moved_comes_back(real_data: Path, tmp_path: Path) -> None:
    """T1 of a BraTS case whose header says that it lies 6 mm and 5 degrees elsewhere."""
    source = real_data / "brats_2mm"
    case = find_cases(source, ["flair", "t1"])[0]
    root = tmp_path / "cases"
    for name in PAIR:
        image = nib.load(case.images[name])
        affine = image.affine.copy()
        if name == "t1":
            turn = np.eye(4)
            turn[:3, :3] = Rotation.from_euler("z", 5, degrees=True).as_matrix()
            turn[:3, 3] = [6.0, 0.0, 0.0]
            affine = turn @ affine
        write(case_path(root, name), np.asanyarray(image.dataobj), affine)
    assert run(root, register=True).unregistered == {}
    before, after = voxels_of(case_path(root, "t1")).astype(float), voxels_of(output(root, "t1")).astype(float)
    assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.97


# ---------------------------------------------------------------------- layouts and formats

SIZES = {"ct": (16, 15, 10), "pet": (10, 10, 7)}  # x, y, z
SPACINGS = {"ct": (2.0, 2.0, 3.0), "pet": (3.5, 3.5, 5.0)}


def volume(key: str, case: int) -> sitk.Image:
    """CT and a label on one grid, PET oblique on its own; whole numbers, as DICOM holds them."""
    grid = "ct" if key == "label" else key
    voxels = np.random.default_rng([case, len(key)]).integers(0, 3 if key == "label" else 900, SIZES[grid][::-1])
    image = sitk.GetImageFromArray(voxels.astype(np.uint8 if key == "label" else np.int16))
    image.SetSpacing(SPACINGS[grid])
    image.SetOrigin((-15.0, -14.0, 6.0))
    if key == "pet":
        image.SetDirection(Rotation.from_euler("z", 8, degrees=True).as_matrix().ravel().tolist())
    return image


def save(image: sitk.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


def series_of(image: sitk.Image, folder: Path, uid: str) -> None:
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    rows = np.array(image.GetDirection()).reshape(3, 3)[:, :2].T
    before = locale.setlocale(locale.LC_ALL)
    for z in range(image.GetDepth()):
        plane = image[:, :, z]
        place = image.TransformIndexToPhysicalPoint((0, 0, z))
        for tag, values in (("0020|0032", place), ("0020|0037", rows.ravel())):
            plane.SetMetaData(tag, "\\".join(f"{value:.8f}" for value in values))
        for tag, text in {"0008|0060": "CT", "0020|000d": "1.2", "0020|000e": uid, "0010|0010": NAME}.items():
            plane.SetMetaData(tag, text)
        plane.SetMetaData("0008|0018", f"{uid}.{z + 1}")
        writer.SetFileName(str(folder / f"IM{z:03d}.dcm"))
        writer.Execute(plane)
    locale.setlocale(locale.LC_ALL, before)  # GDCM leaves the process in another one


def bids(root: Path, case: int) -> None:
    for key in ("ct", "pet"):
        save(volume(key, case), root / f"sub-{case}/{key}/sub-{case}_{key}.nii.gz")
    save(volume("label", case), root / f"derivatives/manual/sub-{case}/ct/sub-{case}_space-ct_dseg.nii.gz")


def nnunet(root: Path, case: int) -> None:
    for channel, key in enumerate(("ct", "pet")):
        save(volume(key, case), root / f"imagesTr/p{case}_{channel:04d}.nii.gz")
    save(volume("label", case), root / f"labelsTr/p{case}.nii.gz")
    described = {"channel_names": {"0": "CT", "1": "PET"}, "labels": {"background": 0, "node": 1, "tumour": 2}}
    (root / "dataset.json").write_text(json.dumps(described))


def dicom(root: Path, case: int) -> None:
    for number, key in enumerate(("ct", "pet")):
        series_of(volume(key, case), root / f"p{case}/{key.upper()}", f"1.2.{case}.{number}")
    save(volume("label", case), root / f"p{case}/seg.nrrd")


def four_d(root: Path, case: int) -> None:
    """Two channels in one file, which lie on one grid; the label is on another."""
    joined = sitk.JoinSeries([volume("pet", case), volume("pet", case + 10)])
    save(joined, root / f"imagesTr/p{case}.nii.gz")
    save(volume("label", case), root / f"labelsTr/p{case}.nii.gz")
    (root / "dataset.json").write_text(json.dumps({"modality": {"0": "PET", "1": "CT"}}))


@pytest.mark.parametrize("layout", [bids, nnunet, dicom, four_d], ids=lambda layout: layout.__name__)
def test_every_layout_comes_out_as_by_sitk_itself(tmp_path: Path, layout: Callable[[Path, int], None]) -> None:
    """Of all kinds of folders, on the reference's grid, labels too; and new-bundle's survey accepts what was made."""
    root, out = tmp_path / "set", tmp_path / "out"
    for case in (1, 2):
        layout(root, case)
    reference = "pet" if layout is four_d else "ct"
    found = discover(root, keep_bad=True)
    done = align_found(found, out, AlignSettings(reference, found.modalities))
    assert (len(done.made), done.problems, done.incomplete) == (2, (), {})
    listed = discover(out / "datalist.json")
    assert survey_cases(listed, progress=False).label_values.keys() == {0, 1, 2}
    assert listed.label_names == found.label_names
    for number, case in enumerate(listed.cases, start=1):
        grid = volume(reference, number)
        for key, source in case.sources().items():
            original = volume("pet", number + 10) if layout is four_d and key == "ct" else volume(key, number)
            low = float(sitk.GetArrayViewFromImage(original).min())
            fill = low if key == "ct" and low < -100 else 0
            how = sitk.sitkNearestNeighbor if key == "label" else sitk.sitkLinear
            expected = sitk.Resample(sitk.Cast(original, sitk.sitkFloat64), grid, sitk.Transform(), how, fill)
            made = sitk.ReadImage(str(source.path))
            assert made.GetPixelID() == original.GetPixelID()
            np.testing.assert_allclose(made.GetOrigin(), grid.GetOrigin(), atol=1e-3)
            off = np.abs(sitk.GetArrayFromImage(made) - sitk.GetArrayFromImage(expected))
            # Headers hold float32: a voxel on an edge may fall on the other side of it.
            assert (off > 0.52).mean() < 2e-3, key
    for file in out.rglob("*.*"):
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        assert NAME.encode() not in content
    assert align_found(found, out, AlignSettings(reference, found.modalities)).made == ()


def test_what_tells_that_an_input_is_another_one(tmp_path: Path) -> None:
    """A slice of a DICOM series, the channel of a 4-D file; not a modality that other cases got."""
    root, out = tmp_path / "set", tmp_path / "out"
    dicom(root, 1)

    def made(folder: Path, target: Path, reference: str = "ct") -> tuple[str, ...]:
        found = discover(folder, keep_bad=True)
        return align_found(found, target, AlignSettings(reference, found.modalities)).made

    assert made(root, out) == ("p1",)
    dicom(root, 2)
    save(volume("ct", 2), root / "p2/flair.nrrd")
    assert made(root, out) == ("p2",)
    os.utime(root / "p1/PET/IM003.dcm")
    assert made(root, out) == ("p1",)
    four = tmp_path / "four"
    four_d(four, 1)
    assert made(four, tmp_path / "out4", "pet") == ("p1",)
    (four / "dataset.json").write_text(json.dumps({"modality": {"0": "CT", "1": "PET"}}))
    assert made(four, tmp_path / "out4", "pet") == ("p1",)


def test_sections_stay_and_a_missing_label_is_told(tmp_path: Path) -> None:
    nnunet(tmp_path / "set", 1)
    for channel, key in enumerate(("ct", "pet")):
        save(volume(key, 2), tmp_path / f"set/imagesTs/t2_{channel:04d}.nii.gz")
    found = discover(tmp_path / "set", keep_bad=True)
    done = align_found(found, tmp_path / "out", AlignSettings("ct", ("ct", "pet")))
    assert done.incomplete == {"t2": ["label"]}
    content = json.loads((tmp_path / "out/datalist.json").read_text())
    assert content["labels"] == {"0": "background", "1": "node", "2": "tumour"}
    assert [[item["case"] for item in content[section]] for section in ("training", "test")] == [["p1"], ["t2"]]
