# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from monai_cggm.data.checks import check_case
from monai_cggm.data.layouts import find_cases
from monai_cggm.data.phantom import SEQUENCES, make_phantom, write_phantoms

SMALL = {"shape": (48, 56, 40), "spacing": 3.5}
NOISE = 0.04


@pytest.mark.parametrize(("shape", "spacing"), [((48, 48, 32), 4.0), ((64, 56, 40), 3.0)])
def test_files_have_the_layout_and_geometry_of_brats(tmp_path: Path, shape: tuple[int, int, int], spacing: float):
    assert write_phantoms(tmp_path, cases=2, shape=shape, spacing=spacing) == ["Phantom_000", "Phantom_001"]
    for name in (*SEQUENCES, "seg"):
        image = nib.load(tmp_path / "Phantom_001" / f"Phantom_001_{name}.nii.gz")
        assert image.shape == shape
        assert image.get_data_dtype() == np.int16
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        np.testing.assert_allclose(image.header.get_zooms(), [spacing] * 3)
        np.testing.assert_allclose(image.affine @ [0, shape[1] - 1, 0, 1], [0, 0, 0, 1])
        np.testing.assert_allclose(image.get_sform(), image.get_qform(), atol=1e-5)
        assert image.header["sform_code"] == 1
        assert image.header["qform_code"] == 1
        assert image.header.get_xyzt_units()[0] == "mm"
    assert len(list(tmp_path.rglob("*"))) == 2 * 6  # nothing but five files and a folder a case


def test_the_project_finds_nothing_wrong_with_them(tmp_path: Path):
    write_phantoms(tmp_path, cases=2, **SMALL)
    cases = find_cases(tmp_path, SEQUENCES)
    reports = [check_case(case, SEQUENCES) for case in cases]
    assert [report.problems for report in reports] == [(), ()]
    assert [set(report.labels_found) for report in reports] == [{0, 1, 2, 4}] * 2


def test_head_is_stripped_and_whole():
    phantom = make_phantom(3, **SMALL)
    brain = phantom.images["t1"] > 0
    for sequence in SEQUENCES:
        np.testing.assert_array_equal(phantom.images[sequence] > 0, brain)
        assert phantom.images[sequence].min() == 0
    assert 0.10 < brain.mean() < 0.50
    assert not (phantom.label[~brain] > 0).any()
    edges = brain.copy()
    edges[1:-1, 1:-1, 1:-1] = False
    assert not edges.any()


@pytest.mark.parametrize("seed", range(4))
def test_every_tissue_is_there_at_the_demo_size(seed: int):
    label = make_phantom((0, seed), shape=(96, 96, 64), spacing=2.0).label
    values, counts = np.unique(label, return_counts=True)
    assert list(values) == [0, 1, 2, 4]
    assert counts.min() >= 20
    # The rim lies between core and edema: few core voxels touch edema.
    touching = ndimage.binary_dilation(label == 1) & (label == 2)
    assert touching.sum() < 0.1 * (label == 1).sum()


@pytest.mark.parametrize(
    ("sequence", "value", "sign"),
    [
        ("flair", 2, 1),
        ("t2", 2, 1),
        ("t1", 2, -1),
        ("t1ce", 4, 1),
        ("t1", 4, -1),
        ("t1ce", 1, -1),
        ("t2", 1, 1),
    ],
)
def test_contrasts_follow_the_physics(sequence: str, value: int, sign: int):
    for seed in range(2):
        assert sign * _contrast_to_noise(seed, sequence, value, informativeness=1.0) > 1.5


def test_csf_is_dark_in_flair_and_t1_and_bright_in_t2():
    phantom = make_phantom(5, lesions=0, **SMALL)
    brain = phantom.images["t2"] > 0
    csf = phantom.images["t2"] > np.percentile(phantom.images["t2"][brain], 98)
    for sequence in ("flair", "t1", "t1ce"):
        values = phantom.images[sequence]
        assert np.median(values[csf]) < 0.6 * np.median(values[brain])


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_contrast_to_noise_grows_with_informativeness(sequence: str):
    value = 4 if sequence == "t1ce" else 2
    ratios = [abs(_contrast_to_noise(1, sequence, value, informativeness=i)) for i in (0.0, 0.5, 1.0)]
    assert ratios[0] < 0.05
    assert ratios[1] == pytest.approx(ratios[2] / 2, rel=0.05)
    assert ratios[2] > 2.0


def test_without_informativeness_the_lesion_leaves_no_trace():
    with_lesion = make_phantom(2, informativeness={"t1": 0.0}, **SMALL)
    without = make_phantom(2, lesions=0, **SMALL)
    assert with_lesion.label.any()
    assert not without.label.any()
    np.testing.assert_array_equal(with_lesion.images["t1"], without.images["t1"])
    assert (with_lesion.images["flair"] != without.images["flair"]).any()


def test_bias_field_is_smooth_and_there():
    # Without noise and lesions, white matter differs between octants by the bias field (and a little texture).
    phantom = make_phantom(7, lesions=0, noise=0.0, shape=(96, 96, 64), spacing=2.0)
    image = phantom.images["t1"].astype(float)
    white = image > 0.8 * np.percentile(image[image > 0], 90)
    blocks = [image[i : i + 24, j : j + 24, 20:44] for i in (24, 48) for j in (24, 48)]
    masks = [white[i : i + 24, j : j + 24, 20:44] for i in (24, 48) for j in (24, 48)]
    means = [block[mask].mean() for block, mask in zip(blocks, masks, strict=True)]
    assert max(means) / min(means) > 1.02


def test_seed_decides_everything(tmp_path: Path):
    write_phantoms(tmp_path / "a", cases=1, seed=4, **SMALL)
    write_phantoms(tmp_path / "b", cases=2, seed=4, **SMALL)
    write_phantoms(tmp_path / "c", cases=1, seed=5, **SMALL)
    for name in (*SEQUENCES, "seg"):
        file = f"Phantom_000/Phantom_000_{name}.nii.gz"
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()
    first, second = (make_phantom((4, index), **SMALL).label for index in (0, 1))
    assert (first != second).any()


def test_anatomy_does_not_depend_on_the_resolution():
    coarse = make_phantom(6, shape=(60, 60, 40), spacing=3.5)
    fine = make_phantom(6, shape=(120, 120, 80), spacing=1.75)
    for part in (lambda p: p.label > 0, lambda p: p.label == 4, lambda p: p.images["t1"] > 0):
        assert part(coarse).sum() * 3.5**3 == pytest.approx(part(fine).sum() * 1.75**3, rel=0.1)


def test_some_cases_have_several_lesions():
    counts = [ndimage.label(make_phantom((0, seed), **SMALL).label > 0)[1] for seed in range(12)]
    assert min(counts) == 1
    assert max(counts) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (8, 48, 48)}, "at least 16 voxels"),
        ({"shape": (48, 48)}, "three sizes"),
        ({"spacing": 0.0}, "spacing must be above 0"),
        ({"informativeness": {"t1": 1.5}}, r"informativeness of t1 must lie in \[0, 1\], got 1.5"),
        ({"informativeness": {"pd": 0.5}}, "names pd"),
        ({"lesions": -1}, "lesions must be at least 0"),
        ({"noise": -0.1}, "noise must be at least 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_phantom(0, **arguments)


@pytest.mark.parametrize("arguments", [{"cases": 0}, {"seed": -1}])
def test_bad_case_count_or_seed_writes_nothing(tmp_path: Path, arguments: dict):
    with pytest.raises(ValueError, match="at least one case and a seed of at least 0"):
        write_phantoms(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = Path.write_bytes

    def fail_in_the_middle(self: Path, data: bytes) -> int:
        real(self, data[: len(data) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail_in_the_middle)
    with pytest.raises(OSError, match="no space left"):
        write_phantoms(tmp_path, cases=1, **SMALL)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def _contrast_to_noise(seed: int, sequence: str, value: int, *, informativeness: float) -> float:
    """Mean difference between the lesion's tissue and the healthy tissue in its place, over the noise."""
    lesion = make_phantom(seed, informativeness={sequence: informativeness}, noise=NOISE, **SMALL)
    healthy = make_phantom(seed, lesions=0, noise=NOISE, **SMALL)
    silent = make_phantom(seed, lesions=0, noise=0.0, **SMALL)
    noise = (healthy.images[sequence].astype(float) - silent.images[sequence])[healthy.images[sequence] > 0].std()
    there = lesion.label == value
    return float((lesion.images[sequence][there].astype(float) - healthy.images[sequence][there]).mean() / noise)
