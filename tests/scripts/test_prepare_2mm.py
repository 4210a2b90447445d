# SPDX-License-Identifier: Apache-2.0
"""The 2 mm data set: the numbers against slow references, and what happens to bad cases and broken runs."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from tests.scripts.loading import script_module

KEYS = ("flair", "t1ce", "t1", "t2", "seg")
IDS = ("Brats18_2013_2_1", "BraTS-GLI-00000-000")
SHAPE = (16, 12, 11)
AFFINE = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])

OBLIQUE = [[0, 0.9, 0.1, 5], [1, 0, 0, -7], [0, 0.2, -1.2, 3], [0, 0, 0, 1]]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_module("prepare_2mm")


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """Two cases at 1 mm, of 2018 and of 2023."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "release"
    for case_id in IDS:
        for key in KEYS:
            high, dtype = (3, np.uint8) if key == "seg" else (1000, np.int16)
            path = folder / case_id / f"{case_id}_{key}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(rng.integers(0, high, SHAPE).astype(dtype), AFFINE), path)
    return folder


def run(script: ModuleType, *arguments: str | Path) -> Result:
    app = typer.Typer()
    app.command()(script.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def blocks(volume: np.ndarray) -> dict[tuple[int, ...], list[float]]:
    """Index of each whole 2x2x2 block -> its eight values, one by one."""
    found: dict[tuple[int, ...], list[float]] = {}
    for index in itertools.product(*(range(size // 2 * 2) for size in volume.shape)):
        found.setdefault(tuple(i // 2 for i in index), []).append(float(volume[index]))
    return found


@pytest.mark.parametrize("shape", [(4, 4, 4), (6, 8, 5), (5, 4, 7)])
@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.uint16])
def test_block_mean(script: ModuleType, shape: tuple[int, ...], dtype: type) -> None:
    volume = np.random.default_rng(1).integers(0, 30000, shape).astype(dtype)
    reduced = script.block_mean(volume)
    assert reduced.dtype == np.int16
    assert reduced.shape == tuple(size // 2 for size in shape)
    for index, values in blocks(volume).items():
        assert reduced[index] == round(sum(values) / 8)  # Python, too, rounds halves to the even number


def test_block_mean_of_large_values_does_not_overflow(script: ModuleType) -> None:
    volume = np.full((2, 2, 2), 32767, dtype=np.int16)
    assert script.block_mean(volume).item() == 32767


def test_halves_go_to_the_even_number(script: ModuleType) -> None:
    volume = np.zeros((2, 2, 4), dtype=np.int16)
    volume[..., :2].flat[:4] = 1  # mean 0.5
    volume[..., 2:] = 1
    volume[0, 0, 2] = 5  # mean 1.5
    assert script.block_mean(volume).tolist() == [[[0, 2]]]


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [(0, 40000, "int16"), (-40000, 0, "int16"), (0, 1, "would round away"), (-3.2, 9.7, "would round away")],
)
def test_values_that_int16_loses_are_refused(script: ModuleType, low: float, high: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        script.block_mean(np.linspace(low, high, 64).reshape(4, 4, 4))


@pytest.mark.parametrize("shape", [(4, 4, 4), (6, 8, 5), (5, 4, 7)])
@pytest.mark.parametrize("values", [(0, 1, 2, 4), (0, 1, 2, 3), (0, 4)])
def test_block_majority(script: ModuleType, shape: tuple[int, ...], values: tuple[int, ...]) -> None:
    labels = np.random.default_rng(2).choice(values, shape).astype(np.float32)
    reduced = script.block_majority(labels)
    assert reduced.dtype == np.uint8
    ties = 0
    for index, block in blocks(labels).items():
        counts = Counter(block)
        winners = [value for value, count in counts.items() if count == max(counts.values())]
        assert reduced[index] == min(winners)
        ties += len(winners) > 1
    assert ties


@pytest.mark.parametrize(
    "affine", [AFFINE, np.eye(4), [[0, 0.9, 0.1, 5], [1, 0, 0, -7], [0, 0.2, -1.2, 3], [0, 0, 0, 1]]]
)
def test_new_voxels_lie_in_the_middle_of_their_blocks(script: ModuleType, affine: np.ndarray) -> None:
    affine = np.asarray(affine, dtype=float)
    new = script.block_affine(affine)
    for index in ([0, 0, 0], [3, 1, 2]):
        old = [affine @ [*(2 * np.array(index) + offset), 1] for offset in itertools.product((0, 1), repeat=3)]
        np.testing.assert_allclose(new @ [*index, 1], np.mean(old, axis=0), atol=1e-12)


def test_files(script: ModuleType, release: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(script, release, out)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"{out}: 2 cases made, 0 were there already, 0 refused"
    assert sorted(folder.name for folder in out.iterdir()) == sorted(IDS)
    for case_id, key in itertools.product(IDS, KEYS):
        source = nib.load(release / case_id / f"{case_id}_{key}.nii.gz")
        image = nib.load(out / case_id / f"{case_id}_{key}.nii.gz")
        reduce = script.block_majority if key == "seg" else script.block_mean
        np.testing.assert_array_equal(image.dataobj, reduce(np.asarray(source.dataobj)))
        assert image.shape == (8, 6, 5)
        assert image.get_data_dtype() == (np.uint8 if key == "seg" else np.int16)
        assert image.header.get_zooms() == (2.0, 2.0, 2.0)
        assert image.header.get_xyzt_units()[0] == "mm"
        for affine in (image.affine, image.get_qform(coded=True)[0], image.get_sform(coded=True)[0]):
            np.testing.assert_allclose(affine, [[-2, 0, 0, -0.5], [0, -2, 0, 238.5], [0, 0, 2, 0.5], [0, 0, 0, 1]])


def test_second_run_makes_only_what_is_missing(script: ModuleType, release: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(script, release, out)
    lost = out / IDS[0] / f"{IDS[0]}_t1.nii.gz"
    content = lost.read_bytes()
    lost.unlink()
    (out / f".{IDS[0]}.part").mkdir()  # as a killed run leaves it
    (out / f".{IDS[0]}.part" / "half.nii.gz").touch()
    stamps = {path: path.stat().st_mtime_ns for path in (out / IDS[1]).iterdir()}
    result = run(script, release, out)
    assert result.exit_code == 0
    assert "1 cases made, 1 were there already, 0 refused" in result.stdout
    assert lost.read_bytes() == content
    assert {path: path.stat().st_mtime_ns for path in (out / IDS[1]).iterdir()} == stamps
    assert sorted(folder.name for folder in out.iterdir()) == sorted(IDS)


def spoil_label(path: Path) -> None:
    nib.save(nib.Nifti1Image(np.full(SHAPE, 7, np.uint8), AFFINE), path / f"{IDS[0]}_seg.nii.gz")


def spoil_spacing(path: Path) -> None:
    for key in KEYS:
        image = nib.load(path / f"{IDS[0]}_{key}.nii.gz")
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), np.diag([1, 1, 2, 1])), path / f"{IDS[0]}_{key}.nii.gz")


def spoil_end(path: Path) -> None:
    file = path / f"{IDS[0]}_t2.nii.gz"
    file.write_bytes(file.read_bytes()[:-9])


def spoil_values(path: Path) -> None:
    image = np.linspace(0, 1, int(np.prod(SHAPE)), dtype=np.float32).reshape(SHAPE)
    nib.save(nib.Nifti1Image(image, AFFINE), path / f"{IDS[0]}_t1ce.nii.gz")


def lose_sequence(path: Path) -> None:
    (path / f"{IDS[0]}_flair.nii.gz").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_label, r"seg label values [7] are not in the brats2018 map"),
        (spoil_spacing, "voxels of 1 x 1 x 2 mm, expected 1 mm"),
        (spoil_end, "t2 cannot be read to its end"),
        (spoil_values, "t1ce has fractions from 0 to 1, which int16 would round away"),
        (lose_sequence, "no flair file"),
    ],
)
def test_bad_case_is_refused_by_name(
    script: ModuleType, release: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(release / IDS[0])
    out = tmp_path / "out"
    result = run(script, release, out)
    assert result.exit_code == 1
    assert f"case {IDS[0]}: {message}" in result.stderr
    assert result.stderr.splitlines()[-1] == "Error: 1 cases have problems"
    assert [folder.name for folder in out.iterdir()] == [IDS[1]]


def test_cases_without_labels(script: ModuleType, release: Path, tmp_path: Path) -> None:
    (release / IDS[0] / f"{IDS[0]}_seg.nii.gz").unlink()
    assert run(script, release, tmp_path / "out").exit_code == 1
    result = run(script, release, tmp_path / "out", "--no-labels")
    assert result.exit_code == 0
    assert len(list((tmp_path / "out" / IDS[0]).iterdir())) == 4


def test_output_inside_the_source_is_refused(script: ModuleType, release: Path) -> None:
    result = run(script, release, release / "2mm")
    assert result.exit_code == 1
    assert "expected a folder outside the source" in result.stderr
    assert not (release / "2mm").exists()


@pytest.mark.real_data
@pytest.mark.slow
def test_reproduces_the_2mm_cases_exactly(script: ModuleType, real_data: Path, tmp_path: Path) -> None:
    """All voxels and affines of the four cases that are there at both resolutions are equal: no tolerance."""
    result = run(script, real_data / "brats_1mm", tmp_path)
    assert result.exit_code == 0, result.output
    made = sorted(tmp_path.glob("*/*.nii.gz"))
    assert len(made) == 4 * len(KEYS)
    for path in made:
        image, wanted = nib.load(path), nib.load(real_data / "brats_2mm" / path.relative_to(tmp_path))
        assert image.shape == (120, 120, 77)
        assert image.get_data_dtype() == wanted.get_data_dtype()
        np.testing.assert_array_equal(image.dataobj, wanted.dataobj)
        np.testing.assert_array_equal(image.affine, wanted.affine)
