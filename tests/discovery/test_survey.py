# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from monai_cggm.discovery import discover, survey_cases
from monai_cggm.discovery import survey as survey_module
from monai_cggm.discovery.survey import label_counts
from monai_cggm.errors import DataError
from tests.discovery.test_layouts import AFFINE, SHAPE, dataset_json, image, label, volume


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two whole cases."""
    for case in ("a", "b"):
        image(tmp_path / case / "flair.nii.gz")
        image(tmp_path / case / "t1.nii.gz", seed=1)
        label(tmp_path / case / "seg.nii.gz")
    return tmp_path


def survey_problem(folder: Path, **options: bool) -> str:
    with pytest.raises(DataError) as error:
        survey_cases(discover(folder, **options), progress=False)  # type: ignore[arg-type]
    return str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_data_set_holds(folder: Path, workers: int) -> None:
    big = np.diag([1.0, 2.0, 2.5, 1.0])
    image(folder / "c" / "t1.nii.gz", shape=(6, 6, 4), affine=big)
    voxels = np.zeros((6, 6, 4), np.float32)
    voxels[0, 0, :3] = 4
    volume(folder / "c" / "seg.nii.gz", voxels, big)
    survey = survey_cases(discover(folder, allow_missing=True), workers=workers, progress=False)
    assert [case.case_id for case in survey.cases] == ["a", "b", "c"]
    assert survey.shapes == {SHAPE: 2, (6, 6, 4): 1}
    assert survey.spacings == {(1.5, 2.0, 3.0): 2, (1.0, 2.0, 2.5): 1}
    assert survey.orientations == {"LAS": 2, "RAS": 1}
    # 60 voxels a case of the first two, two of value 1 and one of value 2; 144 in the third, three of value 4.
    assert survey.label_values == {0: 57 + 57 + 141, 1: 4, 2: 2, 4: 3}
    assert survey.label_cases == {0: 3, 1: 2, 2: 2, 4: 1}
    assert survey.missing == {"flair": ("c",)}
    assert survey.problems == ()


def test_real_ms_lesions(real_data: Path) -> None:
    folder = real_data / "ms_lesions"
    if not folder.is_dir():
        pytest.skip("needs the folder ms_lesions among the real cases")
    survey = survey_cases(discover(folder), progress=False)
    assert survey.shapes == {(182, 218, 182): 3}
    assert survey.orientations == {"LAS": 3}
    masks = [np.asanyarray(nib.load(path).dataobj) for path in folder.glob("*/GOLD*")]
    assert survey.label_values == {0: sum(int((m == 0).sum()) for m in masks), 1: sum(int(m.sum()) for m in masks)}


def test_bad_cases_can_be_left_out(folder: Path) -> None:
    image(folder / "b" / "t1.nii.gz", shape=(4, 4, 4))
    found = discover(folder)
    survey = survey_cases(found, progress=False, skip_bad=True)
    assert survey.bad_cases == ("b",)
    assert [case.case_id for case in found.without(survey.bad_cases).cases] == ["a"]
    assert "case b: t1 has shape 4x4x4, expected 5x4x3 as of flair" in survey.problems[0]


def test_grids_within_a_case(folder: Path) -> None:
    shifted = AFFINE.copy()
    shifted[0, 3] += 2
    image(folder / "a" / "t1.nii.gz", affine=shifted)
    turned = AFFINE.copy()
    turned[0] = -turned[0]
    image(folder / "b" / "t1.nii.gz", affine=turned)
    text = survey_problem(folder)
    assert "case a: t1 has an affine that puts voxels up to 2 mm from where flair has them" in text
    assert "(it lies RAS, flair LAS)" in text
    assert text.count("it lies") == 1
    assert text.count("monai-cggm align --reference flair") == 2
    assert str(folder / "b" / "t1.nii.gz") in text


def test_the_fewer_volumes_of_a_case_are_blamed_and_the_like_are_one_sentence(tmp_path: Path) -> None:
    """In four of six cases, whose first modality is the one that lies otherwise."""
    turned = AFFINE.copy()
    turned[0] = -turned[0]
    for number in range(6):
        place = tmp_path / f"p{number}"
        image(place / "flair.nii.gz", affine=turned if number > 1 else AFFINE)
        image(place / "t1.nii.gz", seed=1)
        label(place / "seg.nii.gz")
    assert survey_problem(tmp_path) == (
        "4 of 6 cases: case p2: flair has an affine that puts voxels up to 40 mm from where t1 has them (it lies RAS, "
        f"t1 LAS) ({tmp_path}/p2/flair.nii.gz); case p3: flair ({tmp_path}/p3/flair.nii.gz); case p4: flair "
        f"({tmp_path}/p4/flair.nii.gz); and 1 more volume; bring all volumes of a case to one grid first: monai-cggm "
        "align --reference t1"
    )
    survey = survey_cases(discover(tmp_path), progress=False, skip_bad=True)
    assert len(survey.problems) == 4
    assert survey.bad_cases == ("p2", "p3", "p4", "p5")


def test_cases_that_all_differ_are_one_sentence(folder: Path) -> None:
    for number, case in enumerate("ab"):
        image(folder / case / "flair.nii.gz", shape=(5, 4 + number))
        image(folder / case / "t1.nii.gz", shape=(5, 4 + number))
    assert survey_problem(folder) == (
        f"2 of 2 cases: case a: flair is 2-D (shape 5x4), expected a 3-D volume ({folder}/a/flair.nii.gz); case a: t1 "
        f"({folder}/a/t1.nii.gz); case b: flair is 2-D (shape 5x5) ({folder}/b/flair.nii.gz); and 1 more volume"
    )


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((5, 4), "flair is 2-D (shape 5x4), expected a 3-D volume"),
        ((5, 4, 1), "flair is 2-D (shape 5x4x1)"),
        ((5, 4, 3, 2), "flair has shape 5x4x3x2, expected one 3-D volume: nothing names its 2 channels"),
        ((5, 4, 3, 2, 2), "flair has shape 5x4x3x2x2, expected three axes"),
    ],
)
def test_axes(folder: Path, shape: tuple[int, ...], text: str) -> None:
    image(folder / "a" / "flair.nii.gz", shape=shape)
    assert text in survey_problem(folder)


def test_files_that_are_no_good(folder: Path) -> None:
    (folder / "a" / "flair.nii.gz").write_bytes(b"nothing")
    colours = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    nib.save(nib.Nifti1Image(colours, AFFINE), folder / "b" / "flair.nii.gz")
    whole = (folder / "b" / "seg.nii.gz").read_bytes()
    (folder / "b" / "seg.nii.gz").write_bytes(gzip.compress(gzip.decompress(whole)[:380]))
    text = survey_problem(folder)
    assert "case a: flair cannot be read:" in text
    assert "case b: flair holds colours, expected one number a voxel" in text
    assert "case b: label cannot be read to its end:" not in text  # its header is good
    skipped = survey_cases(discover(folder), progress=False, skip_bad=True)
    assert any(problem.startswith("case b: label cannot be read to its end:") for problem in skipped.problems)
    singular = AFFINE.copy()
    singular[1, 1] = 0
    header = nib.load(folder / "a" / "seg.nii.gz").header.copy()
    header.set_sform(singular, code=1)
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), None, header), folder / "a" / "seg.nii.gz")
    assert "case a: label has an affine that maps no volume" in survey_problem(folder)


def test_images_with_values_that_are_no_numbers(folder: Path) -> None:
    voxels = image(folder / "a" / "t1.nii.gz")
    voxels[0, :2, 0] = np.nan, np.inf
    volume(folder / "a" / "t1.nii.gz", voxels)
    voxels[0, 2, 0] = -np.inf
    volume(folder / "b" / "t1.nii.gz", voxels)
    volume(folder / "b" / "flair.nii.gz", np.full(SHAPE, 7, np.int16))
    assert survey_problem(folder).splitlines() == [
        "2 problems:",
        "  2 of 2 cases: case a: t1 has 2 NaN or infinite voxels, expected finite values "
        f"({folder}/a/t1.nii.gz); case b: t1 has 3 NaN or infinite voxels ({folder}/b/t1.nii.gz)",
        f"  case b: flair is empty: every voxel is 7 ({folder}/b/flair.nii.gz)",
    ]
    assert survey_cases(discover(folder), progress=False, images=False).problems == ()


def test_one_bad_volume_of_a_file_of_several(tmp_path: Path) -> None:
    dataset_json(tmp_path, {"modality": {"0": "CT", "1": "PET"}, "labels": {"0": "background", "1": "one", "2": "two"},
                            "training": [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}]})  # fmt: skip
    voxels = np.random.default_rng(0).normal(size=(*SHAPE, 2)).astype(np.float32)
    voxels[0, 0, :, 1] = np.nan
    volume(tmp_path / "imagesTr/a.nii.gz", voxels)
    label(tmp_path / "labelsTr/a.nii.gz")
    assert survey_problem(tmp_path).startswith("case a: pet has 3 NaN or infinite voxels, expected finite values (")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0, 0.5, 1], "label has values that are no whole numbers (0.5): is it a probability map, or interpolated?"),
        ([0, -1], "label has negative values (-1)"),
        ([0, np.nan], "label has NaN or infinite voxels"),
        (list(range(300)), "label has 300 different values, expected at most 256: is it an image?"),
    ],
)
def test_labels(folder: Path, values: list[float], text: str) -> None:
    voxels = np.resize(np.array(values, np.float32), (10, 10, 4))
    for key in ("flair", "t1"):
        image(folder / "a" / f"{key}.nii.gz", shape=voxels.shape)
    volume(folder / "a" / "seg.nii.gz", voxels)
    problem = survey_problem(folder)
    assert text in problem
    assert str(folder / "a" / "seg.nii.gz") in problem


def test_labels_of_nothing(folder: Path) -> None:
    for case in ("a", "b"):
        volume(folder / case / "seg.nii.gz", np.zeros(SHAPE, np.uint8))
    assert "hold 0 only: is the right file the label?" in survey_problem(folder)


def test_labels_that_dataset_json_does_not_name(tmp_path: Path) -> None:
    dataset_json(tmp_path, {"channel_names": {"0": "CT", "1": "PET"}, "labels": {"background": 0, "one": 1}})
    for number in (0, 1):
        image(tmp_path / f"imagesTr/a_000{number}.nii.gz")
    label(tmp_path / "labelsTr/a.nii.gz")
    assert "case a: label has values [2] that the list of labels does not name" in survey_problem(tmp_path)


def test_headers_are_judged_before_voxels_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in ("a", "b", "c"):
        for number in (1, 2):
            image(tmp_path / case / f"t{number}.nii.gz", seed=number)
        label(tmp_path / case / "seg.nii.gz")
    image(tmp_path / "c/t2.nii.gz", shape=(4, 5, 6))
    read: list[Path] = []
    read_volumes = survey_module.read_volumes
    monkeypatch.setattr(survey_module, "read_volumes", lambda source: read.append(source.path) or read_volumes(source))
    assert "case c: t2 has shape 4x5x6" in survey_problem(tmp_path)
    assert read == []
    survey = survey_cases(discover(tmp_path), progress=False, skip_bad=True)
    assert survey.bad_cases == ("c",)
    assert {path.parent.name for path in read if path.name != "seg.nii.gz"} == {"a", "b"}


def test_the_background_needs_no_name(tmp_path: Path) -> None:
    for number in (0, 1):
        image(tmp_path / f"a/t{number + 1}.nii.gz", seed=number)
    voxels = label(tmp_path / "a/seg.nii.gz")
    files = {"t1": "a/t1.nii.gz", "t2": "a/t2.nii.gz", "label": "a/seg.nii.gz"}
    names = {str(value): f"n{value}" for value in np.unique(voxels) if value > 0}
    (tmp_path / "list.json").write_text(json.dumps({"labels": names, "training": [{"case": "a", **files}]}))
    survey = survey_cases(discover(tmp_path / "list.json"), progress=False)
    assert survey.problems == ()
    assert 0 in survey.label_values


def test_a_label_in_a_channel(tmp_path: Path) -> None:
    voxels = np.zeros((*SHAPE, 2), np.uint8)
    voxels[0, 0, 0, 1] = 3
    volume(tmp_path / "x.nii.gz", voxels)
    from monai_cggm.discovery.found import Source

    assert label_counts(Source(tmp_path / "x.nii.gz", channel=1)) == {0: 59, 3: 1}
    with pytest.raises(ValueError, match="has 2 channels, expected one with number 2"):
        label_counts(Source(tmp_path / "x.nii.gz", channel=2))


def test_survey_of_a_datalist_whose_file_went_away(tmp_path: Path) -> None:
    for key in ("ct", "pet"):
        image(tmp_path / f"{key}.nii.gz")
    label(tmp_path / "m.nii.gz")
    entry = {"case": "p", "ct": "ct.nii.gz", "pet": "pet.nii.gz", "label": "m.nii.gz"}
    (tmp_path / "list.json").write_text(json.dumps({"training": [entry]}))
    found = discover(tmp_path / "list.json")
    (tmp_path / "pet.nii.gz").unlink()
    with pytest.raises(DataError, match="case p: pet cannot be read: No such file"):
        survey_cases(found, progress=False)
