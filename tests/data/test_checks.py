# SPDX-License-Identifier: Apache-2.0
"""Every bad input is found, by name, and nothing good is refused."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_cggm.data.checks import (
    check_case,
    format_conventions,
    geometry_problems,
    header_problems,
    image_problem,
    load_cases,
)
from monai_cggm.data.layouts import find_cases
from monai_cggm.errors import DataError

MODALITIES = ["flair", "t1ce", "t1", "t2"]
SHAPE = (16, 12, 10)
AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])
BAD, GOOD = "Brats18_2013_2_1", "Brats18_2013_3_1"


def save(array: np.ndarray, path: Path, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, SHAPE).astype(np.int16)


def label(values: tuple[int, ...] = (0, 1, 2, 4)) -> np.ndarray:
    return np.resize(np.array(values, dtype=np.uint8), SHAPE)


def make_case(root: Path, case_id: str, values: tuple[int, ...] = (0, 1, 2, 4)) -> Path:
    folder = root / case_id
    for seed, modality in enumerate(MODALITIES):
        save(image(seed), folder / f"{case_id}_{modality}.nii.gz")
    save(label(values), folder / f"{case_id}_seg.nii.gz")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with two good cases; the tests spoil the first."""
    make_case(tmp_path, BAD)
    make_case(tmp_path, GOOD)
    return tmp_path


def file_of(root: Path, key: str) -> Path:
    return root / BAD / f"{BAD}_{key}.nii.gz"


def remove(key: str) -> Callable[[Path], None]:
    return lambda root: file_of(root, key).unlink()


def replace(key: str, array: np.ndarray, affine: np.ndarray = AFFINE) -> Callable[[Path], None]:
    return lambda root: save(array, file_of(root, key), affine)


def cut(key: str, keep: float) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        content = file_of(root, key).read_bytes()
        file_of(root, key).write_bytes(content[: int(len(content) * keep)])

    return spoil


def flip(key: str) -> Callable[[Path], None]:
    """Corrupt one byte of the compressed voxels."""

    def spoil(root: Path) -> None:
        content = bytearray(file_of(root, key).read_bytes())
        content[-12] ^= 0xFF
        file_of(root, key).write_bytes(content)

    return spoil


def flatten(key: str) -> Callable[[Path], None]:
    """Give the affine no third axis, as nibabel would not."""

    def spoil(root: Path) -> None:
        content = bytearray(gzip.decompress(file_of(root, key).read_bytes()))
        content[312:328] = bytes(16)  # srow_z
        file_of(root, key).write_bytes(gzip.compress(content))

    return spoil


def copy_case(root: Path) -> None:
    shutil.copytree(root / BAD, root / "again" / BAD)


def rename_case(new: str) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        for path in (root / BAD).iterdir():
            path.rename(path.with_name(path.name.replace(BAD, new)))

    return spoil


def with_values(array: np.ndarray, *values: float) -> np.ndarray:
    changed = array.astype(np.float32)
    changed.flat[: len(values)] = values
    return changed


def moved(distance: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[0, 3] += distance
    return affine


def turned() -> np.ndarray:
    return np.diag([1.0, -1.0, 2.0, 1.0])


# what spoils the case, the words that its problem has, the file's ending, whether the header tells
CASES = {
    "missing sequence": (remove("t1ce"), "no t1ce file, expected a name that ends in t1ce or t1c or t1gd", "", True),
    "missing label": (remove("seg"), "no label file, expected a name that ends in seg", "", True),
    "other shape": (
        replace("t1", image()[:, :, :3]),
        "t1 has shape 16x12x3, expected 16x12x10",
        "t1",
        True,
    ),
    "label's shape": (
        replace("seg", label()[1:]),
        "label has shape 15x12x10, expected 16x12x10",
        "seg",
        True,
    ),
    "other origin": (replace("t2", image(), moved(1.0)), "t2 has an affine that puts voxels up to 1 mm", "t2", True),
    "other axes": (replace("t2", image(), turned()), "t2 has an affine that puts voxels up to 30 mm", "t2", True),
    "label's affine": (
        replace("seg", label(), moved(5)),
        "label has an affine that puts voxels up to 5",
        "seg",
        True,
    ),
    "four dimensions": (
        replace("t1", image()[..., None]),
        "t1 has shape 16x12x10x1, expected one 3-D",
        "t1",
        True,
    ),
    "flat affine": (flatten("t1"), "t1 has an affine that maps no volume", "t1", True),
    "empty file": (cut("t1", 0), "t1 cannot be read", "t1", True),
    "no NIfTI": (lambda root: file_of(root, "t1").write_bytes(b"x" * 999), "t1 cannot be read", "t1", True),
    "unsafe ID": (rename_case("Brats18_a..b"), "its ID is no safe file name", "", True),
    "space in ID": (rename_case("Brats18_a b"), "its ID is no safe file name", "", True),
    "unknown ID": (
        rename_case("patient07"),
        "tells no label convention: give --labels (one of brats2018, brats2023, brats2024, msd or pairs of value=class "
        "such as 0=0,1=1) or a 'labels' field in the datalist",
        "",
        True,
    ),
    "two files": (lambda root: save(image(), file_of(root, "t1").with_suffix("")), "t1: 2 files", "", True),
    "NaN": (replace("t1", with_values(image(), np.nan)), "t1 has 1 NaN or infinite voxels", "t1", False),
    "infinite": (replace("t2", with_values(image(), np.inf, -np.inf)), "t2 has 2 NaN or infinite voxels", "t2", False),
    "empty image": (replace("flair", 0 * image()), "flair is empty: every voxel is 0", "flair", False),
    "constant image": (replace("flair", 0 * image() + 7), "flair is empty: every voxel is 7", "flair", False),
    "unknown label": (replace("seg", label((0, 1, 3))), "label values [3] are not in the brats2018 map", "seg", False),
    "half label": (replace("seg", with_values(label(), 0.5)), "label values [0.5] are not in", "seg", False),
    "NaN label": (replace("seg", with_values(label(), np.nan)), "label values [nan] are not in", "seg", False),
    "truncated gzip": (cut("t1", 0.8), "t1 cannot be read to its end: Compressed file ended", "t1", False),
    "lost last byte": (cut("t1", 0.999), "t1 cannot be read to its end: Compressed file ended", "t1", False),
    "truncated label": (cut("seg", 0.9), "label cannot be read to its end: Compressed file ended", "seg", False),
    "corrupt gzip": (flip("t1"), "t1 cannot be read to its end", "t1", False),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_case_is_found_by_name(root: Path, name: str) -> None:
    spoil, words, ending, in_header = CASES[name]
    spoil(root)
    cases = find_cases(root, MODALITIES)
    good, bad = (
        [case for case in cases if case.case_id == GOOD],
        [case for case in cases if case.case_id != GOOD],
    )
    report = check_case(bad[0], MODALITIES)
    (problem,) = report.problems
    assert words in problem
    assert (f"{ending}.nii.gz)" if ending else f"({root / BAD})") in problem
    assert check_case(good[0], MODALITIES).problems == ()
    # Training makes the cheap ones of these checks itself.
    assert header_problems(cases, MODALITIES) == ({bad[0].case_id: [problem]} if in_header else {})


def test_good_case(root: Path) -> None:
    (report,) = (check_case(case, MODALITIES) for case in find_cases(root, MODALITIES) if case.case_id == GOOD)
    voxels = np.prod(SHAPE)
    assert report.shape == SHAPE
    assert report.spacing == (1.0, 1.0, 2.0)
    assert report.convention == "brats2018"
    assert report.labels_found == {value: voxels / 4 for value in (0, 1, 2, 4)}
    assert report.tumour_voxels == voxels * 3 / 4
    assert report.problems == ()


def test_unknown_labels_are_shown_and_are_no_tumour(tmp_path: Path) -> None:
    make_case(tmp_path, "BraTS-GLI-00000-000", (0, 1, 4))
    (case,) = find_cases(tmp_path, MODALITIES)
    report = check_case(case, MODALITIES)
    assert list(report.labels_found) == [0, 1, 4]
    assert report.tumour_voxels == np.prod(SHAPE) / 3
    assert "--labels brats2024, where 4 is the resection cavity" in report.problems[0]
    (case,) = find_cases(tmp_path, MODALITIES, labels="brats2024")
    report = check_case(case, MODALITIES)
    assert report.tumour_voxels == np.prod(SHAPE) / 3  # the cavity is background
    assert report.problems == ()


def test_a_map_that_is_spelt_out(tmp_path: Path) -> None:
    make_case(tmp_path, "patient07", (0, 2, 3, 5))
    (case,) = find_cases(tmp_path, MODALITIES, labels="2=1, 3=0, 5=1")
    report = check_case(case, MODALITIES)
    assert report.convention == "0=0,3=0,2=1,5=1"
    assert report.labels_found == {value: np.prod(SHAPE) / 4 for value in (0, 2, 3, 5)}
    assert report.tumour_voxels == np.prod(SHAPE) / 2
    assert report.problems == ()
    assert format_conventions([report, report]) == "0=0,3=0,2=1,5=1 2 (spelt out, 2 classes with the background)"
    (item,) = load_cases(tmp_path, MODALITIES, labels="2=1, 3=0, 5=1")
    assert item["labels"] == report.convention

    (case,) = find_cases(tmp_path, MODALITIES, labels="2=1,3=2")
    report = check_case(case, MODALITIES)
    assert list(report.labels_found) == [0, 2, 3, 5]
    assert report.tumour_voxels == np.prod(SHAPE) / 2  # 5 is nothing that the map knows
    file = tmp_path / "patient07" / "patient07_seg.nii.gz"
    assert report.problems == (f"label label values [5] are not in the map 0=0,2=1,3=2 ({file})",)


def test_a_case_without_tumour_is_legal(tmp_path: Path) -> None:
    make_case(tmp_path, BAD, (0,))
    (case,) = find_cases(tmp_path, MODALITIES)
    report = check_case(case, MODALITIES)
    assert (report.tumour_voxels, report.problems) == (0, ())


def test_repeated_id(root: Path) -> None:
    copy_case(root)
    problems = header_problems(find_cases(root, MODALITIES), MODALITIES)
    assert problems == {BAD: [f"2 cases have this ID, expected one ({root / BAD}, {root / 'again' / BAD})"]}


@pytest.mark.parametrize("case_id", ["../../etc/x", "a/b", "..", ""])
def test_unsafe_id_in_a_datalist(root: Path, case_id: str) -> None:
    entry = {"case": case_id, "labels": "brats2018", "t1": f"{GOOD}/{GOOD}_t1.nii.gz"}
    (root / "list.json").write_text(json.dumps({"training": [entry]}))
    with pytest.raises(DataError, match="no safe file name"):
        load_cases(root / "list.json", ["t1"], need_label=False)


def test_file_of_a_datalist_that_is_not_there(root: Path) -> None:
    (root / "list.json").write_text(json.dumps({"training": [{"case": "Phantom_1", "t1": "none.nii.gz"}]}))
    with pytest.raises(DataError, match=r"case Phantom_1: t1 cannot be read: .*none\.nii\.gz"):
        load_cases(root / "list.json", ["t1"], need_label=False)


def test_small_differences_of_affines_pass(root: Path) -> None:
    """Files of one case are often written by different programs, in float32."""
    save(image(), file_of(root, "t1"), moved(0.05))
    assert header_problems(find_cases(root, MODALITIES), MODALITIES) == {}


def test_label_and_sequences_may_be_missing_where_the_user_says_so(root: Path) -> None:
    for key in ("seg", "t1", "t2"):
        file_of(root, key).unlink()
    cases = find_cases(root, MODALITIES)
    assert len(header_problems(cases, MODALITIES)[BAD]) == 3
    assert len(header_problems(cases, MODALITIES, need_label=False)[BAD]) == 2
    assert header_problems(cases, MODALITIES, need_label=False, allow_missing=True) == {}
    assert check_case(cases[0], MODALITIES, need_label=False, allow_missing=True).problems == ()
    items = load_cases(root, MODALITIES, need_label=False, allow_missing=True)
    assert [set(MODALITIES) - set(item) for item in items] == [{"t1", "t2"}, set()]


def test_one_sequence_must_be_there(root: Path) -> None:
    for key in MODALITIES:
        file_of(root, key).unlink()
    problems = header_problems(find_cases(root, MODALITIES), MODALITIES, allow_missing=True)
    assert len(problems[BAD]) == len(MODALITIES)


def test_of_one_sequence_alone_the_cases_without_it_are_left_out(root: Path, caplog) -> None:
    file_of(root, "t2").unlink()
    everyone = [case.case_id for case in find_cases(root, MODALITIES)]
    with pytest.raises(DataError, match="no t2 file"):
        load_cases(root, ["t2"])
    with caplog.at_level(logging.WARNING):
        cases = load_cases(root, ["t2"], allow_missing=True)
    assert [item["case"] for item in cases] == [case for case in everyone if case != BAD]
    assert cases.skipped == {BAD: "has no t2"}
    assert f"Left out 1 cases of {root} without t2: {BAD}" in caplog.text
    for path in root.rglob("*t2*"):
        path.unlink()
    with pytest.raises(DataError, match="has no usable case") as error:
        load_cases(root, ["t2"], allow_missing=True)
    assert error.value.problems[1:] == [f"case {case}: has no t2" for case in everyone]


def test_other_files_are_a_hint(root: Path) -> None:
    file_of(root, "seg").rename(root / BAD / "W39_Segm.nii.gz")
    (problem,) = header_problems(find_cases(root, MODALITIES), MODALITIES)[BAD]
    assert "no label file" in problem
    assert "W39_Segm.nii.gz" in problem


def test_load_cases_stops_with_all_problems(root: Path) -> None:
    file_of(root, "t1").unlink()
    file_of(root, "seg").unlink()
    with pytest.raises(DataError) as error:
        load_cases(root, MODALITIES)
    assert len(error.value.problems) == 2
    assert all(line.startswith(f"case {BAD}: no ") and str(root / BAD) in line for line in error.value.problems)


def test_skip_bad_lists_what_it_leaves_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    file_of(root, "t1").unlink()
    with caplog.at_level(logging.INFO):
        items = load_cases(root, MODALITIES, skip_bad=True)
    assert [item["case"] for item in items] == [GOOD]
    assert f"Left out 1 bad cases of {root}:\n  case {BAD}: no t1 file" in caplog.text
    assert "label conventions: brats2018 1 (BraTS 2018-2021: 4 is the enhancing tumour)" in caplog.text


def test_no_case_left(root: Path) -> None:
    shutil.rmtree(root / GOOD)
    file_of(root, "t1").unlink()
    with pytest.raises(DataError, match="no usable case"):
        load_cases(root, MODALITIES, skip_bad=True)


def test_load_cases_reads_no_voxel(root: Path) -> None:
    cut("t1", 0.8)(root)
    assert len(load_cases(root, MODALITIES)) == 2


@pytest.mark.parametrize("shape", [(4, 4, 4), (8, 3, 2)])
def test_geometry_problems_measure_the_farthest_voxel(shape: tuple[int, ...]) -> None:
    other = np.eye(4)
    other[0, 0] = 1.5  # the far end of the first axis is displaced by half its length
    problems = geometry_problems({"a": (shape, np.eye(4)), "b": (shape, other), "c": (shape, torch.eye(4))})
    assert list(problems) == ["b"]
    assert f"{0.5 * (shape[0] - 1):.3g} mm" in problems["b"]


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_image_problem(kind: type) -> None:
    assert image_problem(kind([[1.0, 2.0]])) is None
    assert image_problem(kind([[0, 1]])) is None
    assert image_problem(kind([[3, 3]])) == "is empty: every voxel is 3"
    assert image_problem(kind([[1.0, float("nan")]])) == "has 1 NaN or infinite voxels, expected finite values"
    assert image_problem(kind(np.zeros((0, 2)))) == "is empty: it has no voxel"


@pytest.mark.real_data
@pytest.mark.parametrize("folder", ["brats_2mm", "brats_1mm"])
def test_real_headers(real_data: Path, folder: str) -> None:
    items = load_cases(real_data / folder, MODALITIES)
    assert {item["labels"] for item in items} == {"brats2018", "brats2023"}
