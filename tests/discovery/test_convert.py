# SPDX-License-Identifier: Apache-2.0
"""What is written: the same voxels in the same places, and nothing else of the source."""

from __future__ import annotations

import gzip
import json
import locale
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from monai_cggm.data.checks import header_problems
from monai_cggm.data.layouts import find_cases
from monai_cggm.discovery import discover, survey_cases, write_datalist
from monai_cggm.discovery.found import Found, FoundCase, Source
from monai_cggm.discovery.sources import read_grid, read_volumes
from monai_cggm.errors import DataError
from tests.discovery.test_layouts import AFFINE, SHAPE, decathlon, image, label, volume

PERSON = "Planted^Person"
SPACING = (0.8, 1.25, 3.0)
ORIGIN = (12.5, -40.0, 7.0)
#: An oblique stack of slices.
DIRECTION = np.array([[0.8, -0.6, 0.0], [0.48, 0.64, -0.6], [0.36, 0.48, 0.8]])


def itk_image(voxels: np.ndarray, direction: np.ndarray = DIRECTION, *, vector: bool = False) -> sitk.Image:
    """A SimpleITK image of an array X, Y, Z (components last)."""
    array = np.moveaxis(voxels, (0, 2), (2, 0)) if vector else voxels.T
    made = sitk.GetImageFromArray(np.ascontiguousarray(array), isVector=vector)
    made.SetSpacing(SPACING)
    made.SetOrigin(ORIGIN)
    made.SetDirection(direction.ravel().tolist())
    return made


def dicom(
    folder: Path, voxels: np.ndarray, series: str = "1", *, keep: Any = None, moves: Any = None, **tags: str
) -> sitk.Image:
    """Write a DICOM series; ``keep`` chooses slices, ``moves`` shifts the places that slices give for themselves."""
    whole = itk_image(voxels)
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    columns = [f"{value:.6f}" for value in DIRECTION[:, :2].T.ravel()]
    for number in range(voxels.shape[2]) if keep is None else keep:
        place = np.array(whole.TransformIndexToPhysicalPoint((0, 0, number)))
        place = place + (moves(number) if moves else 0)
        one = whole[:, :, number]
        meta = {
            "0008|0060": "MR",
            "0008|0018": f"1.2.3.4.{series}.{number + 1}",
            "0020|000e": f"1.2.3.4.{series}",
            "0020|000d": "1.2.3.4",
            "0020|0013": str(number),
            "0020|0032": "\\".join(f"{value:.6f}" for value in place),
            "0020|0037": "\\".join(columns),
            "0010|0010": PERSON,
            "0010|0020": PERSON,
            "0008|1030": PERSON,
            **{name.replace("_", "|").removeprefix("t"): value for name, value in tags.items()},
        }
        for tag, value in meta.items():
            one.SetMetaData(tag, value)
        file = folder / f"IM{series}{99 - number:04d}.dcm"
        writer.SetFileName(str(file))
        before = locale.setlocale(locale.LC_ALL)
        writer.Execute(one)
        # Writing DICOM leaves the process in the locale C, in which Python opens text files as ASCII.
        locale.setlocale(locale.LC_ALL, before)
        if number == 0:
            assert PERSON.encode() in file.read_bytes()
    return whole


def add_private_tag(file: Path, text: str) -> None:
    """Put a private element (0009,1010) into an implicit little-endian file, before the patient's group."""
    content = file.read_bytes()
    at = content.index(b"\x10\x00\x10\x00" + len(PERSON).to_bytes(4, "little") + PERSON.encode())
    elements = b""
    for element, value in ((b"\x10\x00", "ACME"), (b"\x10\x10", text)):
        elements += b"\x09\x00" + element + len(value).to_bytes(4, "little") + value.encode()
    file.write_bytes(content[:at] + elements + content[at:])


def assert_nowhere(folder: Path, *words: str) -> None:
    """No byte of any file or name below a folder is one of the words', decompressed or not."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        plain = gzip.decompress(content) if path.suffix == ".gz" else content
        for word in words:
            assert word.lower().encode() not in (content + plain + str(path.relative_to(folder)).encode()).lower()


def assert_same_places(written: Path, expected: sitk.Image, voxels: np.ndarray) -> None:
    """A NIfTI file has the voxels, in their places: by nibabel against ITK's own points, and by ITK itself."""
    loaded = nib.load(written)
    np.testing.assert_array_equal(np.asanyarray(loaded.dataobj), voxels)
    again = sitk.ReadImage(str(written))
    for index in [(0, 0, 0), (4, 0, 0), (0, 3, 0), (0, 0, 2), (4, 3, 2), (2, 1, 1)]:
        left_posterior = np.array(expected.TransformIndexToPhysicalPoint(index))
        right_anterior = nib.affines.apply_affine(loaded.affine, index)
        np.testing.assert_allclose(right_anterior, left_posterior * [-1, -1, 1], atol=1e-3)
        np.testing.assert_allclose(again.TransformIndexToPhysicalPoint(index), left_posterior, atol=1e-3)


def whole_numbers(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2000, SHAPE).astype(np.int16)


def mask() -> np.ndarray:
    voxels = np.zeros(SHAPE, np.int16)
    voxels[1:3, 1, 1] = 1
    return voxels


def test_decathlon(tmp_path: Path) -> None:
    decathlon(tmp_path / "set")
    voxels = [image(tmp_path / f"set/imagesTr/BRATS_00{n}.nii.gz", seed=n, shape=(*SHAPE, 4)) for n in (1, 2)]
    volume(tmp_path / "set/imagesTr/BRATS_001.nii.gz", voxels[0], descrip=PERSON)
    found = discover(tmp_path / "set")
    items = write_datalist(found, tmp_path / "out", progress=False, workers=2)
    for number, t1ce in ((0, 2), (1, 2)):
        loaded = nib.load(items[number]["t1ce"])
        np.testing.assert_array_equal(np.asanyarray(loaded.dataobj), voxels[number][..., t1ce])
        np.testing.assert_allclose(loaded.affine, AFFINE, atol=1e-5)
        assert loaded.get_data_dtype() == np.float32
        assert loaded.header.get_xyzt_units()[0] == "mm"
        assert (loaded.header["sform_code"], loaded.header["qform_code"]) == (1, 1)  # both say: the scanner's axes
    content = json.loads((tmp_path / "out/datalist.json").read_text())
    assert content["training"][1] == {
        "case": "BRATS_002",
        "patient": "BRATS_002",
        "flair": "volumes/BRATS_002/flair.nii.gz",
        "t1": "volumes/BRATS_002/t1.nii.gz",
        "t1ce": "volumes/BRATS_002/t1ce.nii.gz",
        "t2": "volumes/BRATS_002/t2.nii.gz",
        "label": str(tmp_path / "set/labelsTr/BRATS_002.nii.gz"),
    }
    assert [len(content[section]) for section in ("training", "test")] == [2, 1]
    assert_nowhere(tmp_path / "out", PERSON)
    # The reader that training uses takes it as it is.
    cases = find_cases(tmp_path / "out/datalist.json", found.modalities, labels="brats2018")
    assert header_problems(cases[:2], found.modalities) == {}
    assert [str(cases[0].images["t2"]), str(cases[0].label)] == [items[0]["t2"], items[0]["label"]]


def test_plain_nifti_stays_where_it_is(tmp_path: Path) -> None:
    for case in ("a", "b"):
        image(tmp_path / "set" / case / "flair.nii.gz")
        volume(tmp_path / "set" / case / "planted_person_t1.nii.gz", whole_numbers(), descrip=PERSON)
        label(tmp_path / "set" / case / "seg.nii.gz")
    found = discover(tmp_path / "set")
    items = write_datalist(found, tmp_path / "out", progress=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["datalist.json"]
    assert items[0]["flair"] == str(tmp_path / "set/a/flair.nii.gz")
    items = write_datalist(found, tmp_path / "copy", copy=True, progress=False)
    assert items[1]["t1"] == str(tmp_path / "copy/volumes/b/t1.nii.gz")
    loaded = nib.load(items[1]["t1"])
    np.testing.assert_array_equal(np.asanyarray(loaded.dataobj), whole_numbers())
    np.testing.assert_allclose(loaded.affine, AFFINE, atol=1e-5)
    assert_nowhere(tmp_path / "copy", PERSON, "planted_person")


@pytest.mark.parametrize("ending", ["nrrd", "nhdr", "mha", "mhd"])
def test_files_that_itk_reads(tmp_path: Path, ending: str) -> None:
    volumes = {key: whole_numbers(seed) for seed, key in enumerate(("ct", "pet"))} | {"seg": mask()}
    for key, voxels in volumes.items():
        made = itk_image(voxels)
        made.SetMetaData("Patient", PERSON)
        (tmp_path / "set" / "Planted_Person").mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(made, str(tmp_path / f"set/Planted_Person/Planted_Person_{key}.{ending}"))
    if ending == "nrrd":
        assert PERSON.encode() in (tmp_path / f"set/Planted_Person/Planted_Person_ct.{ending}").read_bytes()
    found = discover(tmp_path / "set", label_pattern="*seg*")
    # The ID is the folder's name; another one shows that nothing else carries the name.
    found = replace(found, cases=tuple(replace(case, case_id="c", patient="c") for case in found.cases))
    (item,) = write_datalist(found, tmp_path / "out", progress=False)
    assert_same_places(Path(item["ct"]), itk_image(volumes["ct"]), volumes["ct"])
    assert_same_places(Path(item["label"]), itk_image(volumes["seg"]), mask())
    assert nib.load(item["label"]).get_data_dtype() == np.uint8
    assert_nowhere(tmp_path / "out", PERSON, "Planted_Person", "Patient^")
    survey = survey_cases(found, progress=False)
    assert survey.spacings == {SPACING: 1}
    assert survey.label_values == {0: 58, 1: 2}


def test_dicom_series(tmp_path: Path) -> None:
    volumes = {"FLAIR": whole_numbers(0), "T1": whole_numbers(1)}
    for case in ("case1", "case2"):
        for number, (key, voxels) in enumerate(volumes.items()):
            dicom(tmp_path / "set" / case / key, voxels, series=f"{number + 1}")
        dicom(tmp_path / "set" / case / "seg", mask(), series="3")
    private = next((tmp_path / "set/case1/T1").iterdir())
    add_private_tag(private, PERSON)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(private))
    reader.LoadPrivateTagsOn()
    reader.ReadImageInformation()
    assert reader.HasMetaDataKey("0009|1010")
    found = discover(tmp_path / "set")
    assert found.layout == "folders"
    assert found.modalities == ("flair", "t1")
    assert [case.case_id for case in found.cases] == ["case1", "case2"]
    assert any("none of them is the name of a person" in note for note in found.notes)
    assert PERSON not in repr(found)
    assert survey_cases(found, progress=False).spacings == {SPACING: 2}
    items = write_datalist(found, tmp_path / "out", progress=False, workers=3)
    for item in items:
        for key, name in (("flair", "FLAIR"), ("t1", "T1")):
            assert_same_places(Path(item[key]), itk_image(volumes[name]), volumes[name])
        assert_same_places(Path(item["label"]), itk_image(mask()), mask())
    assert_nowhere(tmp_path / "out", PERSON, "IM1", "1.2.3.4")
    # Our grid from headers is what ITK's own reader of series makes of them.
    series = sitk.ImageSeriesReader()
    series.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "set/case1/FLAIR")))
    assert_same_places(Path(items[0]["flair"]), series.Execute(), volumes["FLAIR"])


@pytest.mark.parametrize("ending", ["dcm", "nrrd", "mha"])
def test_reading_through_itk_leaves_the_locale_as_it_was(tmp_path: Path, ending: str) -> None:
    for number in range(4):
        if ending == "dcm":
            dicom(tmp_path / f"{number}", whole_numbers(number), series="1")
        else:
            sitk.WriteImage(itk_image(whole_numbers(number)), str(tmp_path / f"{number}.{ending}"))
    kind = "dicom" if ending == "dcm" else "image"
    sources = [Source(path, kind=kind) for path in sorted(tmp_path.iterdir())]
    before = locale.setlocale(locale.LC_ALL)
    with ThreadPoolExecutor(4) as pool:
        arrays = list(pool.map(lambda source: read_volumes(source)[0], sources * 8))
    assert locale.setlocale(locale.LC_ALL) == before
    assert all(np.array_equal(arrays[i], arrays[i + 4]) for i in range(4))


def test_dicom_series_by_their_descriptions(tmp_path: Path) -> None:
    """Folders are numbers; what the series says tells the sequence, and comes nowhere."""
    for number, text in enumerate((f"t2_tirm {PERSON}", f"t1_se {PERSON}", f"seg {PERSON}")):
        # Without an ending, as many archives have them: the bytes tell that they are DICOM.
        folder = tmp_path / "set/p1" / f"SE{number}"
        dicom(folder, mask(), series=str(number + 1), t0008_103e=text, t0008_1030="study")
        for file in list(folder.iterdir()):
            file.rename(file.with_suffix(""))
    found = discover(tmp_path / "set")
    (case,) = found.cases
    assert {key: source.path.name for key, source in case.sources().items()} == {
        "flair": "SE0",
        "t1": "SE1",
        "label": "SE2",
    }
    assert PERSON not in repr(found)


def test_dicom_series_by_their_machines(tmp_path: Path) -> None:
    """PET and CT of the neck, whose descriptions say nothing: PT is DICOM's code."""
    for number, (machine, text) in enumerate((("CT", "WB 3.0"), ("PT ", "WB 3D AC"), ("MR", "seg"))):
        dicom(tmp_path / f"set/p1/{number}", mask(), series=str(number + 1), t0008_0060=machine, t0008_103e=text)
    (case,) = discover(tmp_path / "set").cases
    assert {key: source.path.name for key, source in case.sources().items()} == {"ct": "0", "pet": "1", "label": "2"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"keep": [0, 1, 3, 4]}, "has slices 3 to 6 mm apart: is a slice missing?"),
        ({"keep": [2]}, "is 2-D"),
        ({"moves": lambda number: -(number // 3) * 3 * 3.0 * DIRECTION[:, 2]}, "has several slices in one place"),
        ({"moves": lambda number: number * 0.7 * DIRECTION[:, 0]}, "shifted against each other (a tilted gantry)"),
        ({"t0008_0060": "SEG"}, "is a DICOM SEG object, expected an image series"),
    ],
)
def test_dicom_that_is_no_volume(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    dicom(tmp_path / "x", np.zeros((6, 5, 6), np.int16), **options)
    with pytest.raises(ValueError, match=text.replace("(", r"\(").replace(")", r"\)").replace("?", r"\?")):
        read_grid(Source(tmp_path / "x", kind="dicom"))


@pytest.mark.parametrize("number", [0, 2, 5])
@pytest.mark.parametrize("keep", [0, 300, -10, None])
@pytest.mark.parametrize("bare", [True, False])
def test_a_slice_that_cannot_be_read_is_named(tmp_path: Path, number: int, keep: int | None, bare: bool) -> None:
    """Also at an end of the stack, where nothing else tells that it is not there."""
    dicom(tmp_path / "x", np.zeros((6, 5, 6), np.int16))
    for file in sorted((tmp_path / "x").iterdir()) if bare else []:
        file.rename(file.with_suffix(""))
    bad = sorted((tmp_path / "x").iterdir())[number]
    bad.write_bytes(b"no DICOM" if keep is None else bad.read_bytes()[:keep])
    (tmp_path / "x" / "README").write_text("no slice")
    (tmp_path / "x" / "._IM19999.dcm").write_text("what a file server leaves behind")
    told = rf"^has 1 slices that cannot be read \({bad.name}\), expected whole DICOM files$"
    with pytest.raises(ValueError, match=told):
        read_grid(Source(tmp_path / "x", kind="dicom"))


def test_a_report_beside_slices_is_no_bad_slice(tmp_path: Path) -> None:
    dicom(tmp_path / "x", mask())
    whole = (tmp_path / "x" / "IM10099.dcm").read_bytes()
    images, report = b"1.2.840.10008.5.1.4.1.1.4", b"1.2.840.10008.5.1.4.1.1.88.1"
    assert images in whole
    (tmp_path / "x" / "SR.dcm").write_bytes(whole[:300].replace(images, report))
    assert read_grid(Source(tmp_path / "x", kind="dicom")).shape == SHAPE


def test_dicom_folders_with_another_number_of_series(tmp_path: Path) -> None:
    for series in ("1", "2"):
        dicom(tmp_path / "x", mask(), series=series)
    with pytest.raises(ValueError, match="holds 2 DICOM series, expected one folder a series"):
        read_grid(Source(tmp_path / "x", kind="dicom"))
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "a.dcm").write_bytes(b"no DICOM")
    with pytest.raises(ValueError, match="holds 0 DICOM series, expected an image series"):
        read_grid(Source(tmp_path / "y", kind="dicom"))


MIXED = "several DICOM series lie in one folder, expected one folder a series"


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        discover(folder, **options)
    return str(error.value)


@pytest.mark.parametrize("masks", [True, False])
def test_several_series_in_a_patients_folder(tmp_path: Path, masks: bool) -> None:
    """One sentence for all cases, also for callers that go on without bad ones: nothing is left then."""
    for number, case in enumerate(("p01", "p02", "p03")):
        for series in range(2 + number % 2):
            dicom(tmp_path / case, mask(), series=str(series + 1), t0008_103e=f"ct {PERSON}")
        if masks:
            label(tmp_path / case / "mask.nii.gz")
    told = f"case p01: {MIXED} (2 in {tmp_path / 'p01'}); so in 2 more cases: p02, p03"
    for options in ({}, {"need_label": False}, {"keep_bad": True}, {"patterns": {"ct": "*CT*", "pet": "*PT*"}}):
        assert refused(tmp_path, **options) == told
    alone = f"case p02: {MIXED} (3 in {tmp_path / 'p02'})"
    assert refused(tmp_path / "p02") == alone


def test_several_series_in_the_folder_of_one_case(tmp_path: Path) -> None:
    """The case lacks what they are; where it does not, they are other scans, and are left out."""
    for case in ("p01", "p02"):
        for key in ("ct", "pet", "seg"):
            image(tmp_path / case / f"{key}.nii.gz")
    for series in ("1", "2"):
        dicom(tmp_path / "p01" / "more", mask(), series=series)
        dicom(tmp_path / "p03_pet_ct", mask(), series=series)
    told = f"case p03_pet_ct: {MIXED} (2 in {tmp_path / 'p03_pet_ct'})"
    assert refused(tmp_path) == told
    kept = discover(tmp_path, keep_bad=True)
    assert [case.case_id for case in kept.cases] == ["p01", "p02"]
    assert "Left out: 1 cases with no modality: p03_pet_ct." in kept.notes
    (tmp_path / "p03_pet_ct").rename(tmp_path / "p02" / "more")
    found = discover(tmp_path)
    assert "Ignored: 2 volumes that are no modality by name: more, more." in found.notes
    (tmp_path / "p02" / "pet.nii.gz").unlink()
    assert refused(tmp_path, allow_missing=True) == f"case p02: {MIXED} (2 in {tmp_path / 'p02/more'})"
    assert [len(case.problems) for case in discover(tmp_path, keep_bad=True).cases] == [0, 1]
    assert len(discover(tmp_path, modalities=["ct"], keep_bad=True).cases[1].problems) == 0


def test_components_are_channels(tmp_path: Path) -> None:
    voxels = np.stack([whole_numbers(0), whole_numbers(1)], axis=-1)
    sitk.WriteImage(itk_image(voxels, vector=True), str(tmp_path / "a.nrrd"))
    sitk.WriteImage(itk_image(mask()), str(tmp_path / "m.nrrd"))
    sitk.WriteImage(itk_image(voxels, vector=True), str(tmp_path / "b.nii.gz"))  # five axes, as ITK writes vectors
    entries = [{"case": name, "image": name, "label": "m.nrrd"} for name in ("a.nrrd", "b.nii.gz")]
    (tmp_path / "list.json").write_text(json.dumps({"training": entries}))
    assert nib.load(tmp_path / "b.nii.gz").ndim == 5
    for item in write_datalist(
        discover(tmp_path / "list.json", modalities=["ct", "pet"]), tmp_path / "out", progress=False
    ):
        assert_same_places(Path(item["pet"]), itk_image(voxels[..., 1]), voxels[..., 1])


@pytest.mark.parametrize(
    ("stored", "kept"),
    [(np.float64, np.float32), (np.int64, np.int32), (np.uint16, np.uint16), (np.int8, np.int8)],
)
def test_types(tmp_path: Path, stored: type, kept: type) -> None:
    voxels = (np.arange(60).reshape(SHAPE) - (0 if stored is np.uint16 else 30)).astype(stored)
    for key, array in (("ct", voxels), ("pet", voxels), ("seg", np.abs(voxels) // 16)):
        (tmp_path / "set/p").mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(itk_image(array), str(tmp_path / f"set/p/{key}.nrrd"))
    (item,) = write_datalist(discover(tmp_path / "set"), tmp_path / "out", progress=False)
    loaded = nib.load(item["ct"])
    assert loaded.get_data_dtype() == kept
    np.testing.assert_array_equal(np.asanyarray(loaded.dataobj), voxels)
    assert nib.load(item["label"]).get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asanyarray(nib.load(item["label"]).dataobj), np.abs(voxels) // 16)


def test_scaled_and_trailing_axis(tmp_path: Path) -> None:
    (tmp_path / "set/p").mkdir(parents=True)
    scaled = nib.Nifti1Image(whole_numbers().astype(np.float32)[..., None] / 7, AFFINE)
    scaled.header.set_data_dtype(np.int16)
    scaled.header.set_xyzt_units("mm")
    nib.save(scaled, tmp_path / "set/p/ct.nii.gz")
    expected = nib.load(tmp_path / "set/p/ct.nii.gz").get_fdata()[..., 0]
    image(tmp_path / "set/p/pet.nii.gz")
    label(tmp_path / "set/p/seg.nii.gz")
    (item,) = write_datalist(discover(tmp_path / "set"), tmp_path / "out", progress=False)
    assert "volumes" in item["ct"]
    assert "volumes" not in item["pet"]
    np.testing.assert_allclose(nib.load(item["ct"]).get_fdata(), expected, rtol=1e-6)


def test_a_second_run_keeps_what_is_there(tmp_path: Path) -> None:
    decathlon(tmp_path / "set")
    found = discover(tmp_path / "set")
    write_datalist(found, tmp_path / "out", progress=False)
    files = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "out/volumes").rglob("*.gz")}
    assert len(files) == 12
    cut = tmp_path / "out/volumes/BRATS_001/t2.nii.gz"
    cut.write_bytes(b"half")
    gone = tmp_path / "out/volumes/BRATS_001/t1.nii.gz"
    gone.unlink()
    changed = image(tmp_path / "set/imagesTr/BRATS_002.nii.gz", seed=77, shape=(*SHAPE, 4))
    write_datalist(found, tmp_path / "out", progress=False)
    for path, (time, content) in files.items():
        if path.parent.name == "BRATS_002":
            channel = found.modalities.index(path.name.removesuffix(".nii.gz"))
            np.testing.assert_array_equal(np.asanyarray(nib.load(path).dataobj), changed[..., channel])
        else:
            assert path.read_bytes() == content  # made again, the bytes are the same
            assert (path.stat().st_mtime_ns == time) == (path not in (cut, gone))
    assert not [path for path in (tmp_path / "out").rglob(".tmp*")]


def test_a_bad_file_is_named_and_the_others_are_written(tmp_path: Path) -> None:
    decathlon(tmp_path / "set")
    path = tmp_path / "set/imagesTr/BRATS_001.nii.gz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"case BRATS_001: flair cannot be read to its end: .*BRATS_001.nii.gz"):
        write_datalist(discover(tmp_path / "set"), tmp_path / "out", progress=False)
    assert sorted(path.name for path in (tmp_path / "out/volumes").iterdir()) == ["BRATS_002", "BRATS_003"]
    assert not (tmp_path / "out/datalist.json").exists()


def test_a_file_that_went_away(tmp_path: Path) -> None:
    decathlon(tmp_path / "set")
    found = discover(tmp_path / "set")
    (tmp_path / "set/imagesTr/BRATS_002.nii.gz").unlink()
    with pytest.raises(DataError, match=r"case BRATS_002: flair .*No such file"):
        write_datalist(found, tmp_path / "out", progress=False)
    (tmp_path / "set/labelsTr/BRATS_001.nii.gz").unlink()
    with pytest.raises(DataError, match="case BRATS_001: label cannot be read: No such file"):
        write_datalist(found, tmp_path / "out", progress=False)


def test_labels_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "set/p").mkdir(parents=True)
    for key in ("ct", "pet", "seg"):
        sitk.WriteImage(itk_image(np.full(SHAPE, 0.5, np.float32)), str(tmp_path / f"set/p/{key}.nrrd"))
    with pytest.raises(DataError, match="case p: label has values that are no whole numbers"):
        write_datalist(discover(tmp_path / "set"), tmp_path / "out", progress=False)


def test_nothing_is_written_elsewhere(tmp_path: Path) -> None:
    decathlon(tmp_path / "set")
    found = discover(tmp_path / "set")
    with pytest.raises(DataError, match=r"lies in .*set, where its files would be found as cases"):
        write_datalist(found, tmp_path / "set/out", progress=False)
    (tmp_path / "out/volumes").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out/volumes/BRATS_001").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"BRATS_001 leads out of .*out by a link"):
        write_datalist(found, tmp_path / "out", progress=False)
    (tmp_path / "out/volumes/BRATS_001").unlink()
    # A link in the place of a file is replaced, and what it leads to is let alone.
    (tmp_path / "out/volumes/BRATS_001").mkdir()
    (tmp_path / "elsewhere/x.nii.gz").write_bytes(b"mine")
    (tmp_path / "out/volumes/BRATS_001/t1.nii.gz").symlink_to(tmp_path / "elsewhere/x.nii.gz")
    (tmp_path / "out/datalist.json").symlink_to(tmp_path / "elsewhere/y.json")
    write_datalist(found, tmp_path / "out", progress=False)
    assert os.listdir(tmp_path / "elsewhere") == ["x.nii.gz"]
    assert (tmp_path / "elsewhere/x.nii.gz").read_bytes() == b"mine"
    written = tmp_path / "out/volumes/BRATS_001/t1.nii.gz"
    written.rename(tmp_path / "elsewhere/t1.nii.gz")
    written.symlink_to(tmp_path / "elsewhere/t1.nii.gz")
    write_datalist(found, tmp_path / "out", progress=False)
    assert not written.is_symlink()
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file is a file, expected a folder"):
        write_datalist(found, tmp_path / "file", progress=False)


def test_names_that_lead_out_of_the_folder(tmp_path: Path) -> None:
    image(tmp_path / "a.nii.gz")
    source = Source(tmp_path / "a.nii.gz")
    for case_id, key in (("../x", "ct"), ("x", "../ct"), ("x", "$ct")):
        found = Found(tmp_path / "s", "folders", (key,), (FoundCase(case_id, "x", {key: source}),))
        with pytest.raises(DataError, match="is no safe name for a file"):
            write_datalist(found, tmp_path / "out", copy=True, progress=False)
    assert not (tmp_path / "out").exists()


def test_the_datalist_that_was_read_is_not_written_over(tmp_path: Path) -> None:
    image(tmp_path / "a.nii.gz")
    entry = {"case": "p", "ct": "a.nii.gz", "pet": "a.nii.gz", "label": "a.nii.gz", "labels": "brats2023"}
    (tmp_path / "datalist.json").write_text(json.dumps({"validation": [entry]}))
    found = discover(tmp_path / "datalist.json")
    with pytest.raises(DataError, match="is the datalist that was read: choose another folder"):
        write_datalist(found, tmp_path, progress=False)
    write_datalist(found, tmp_path / "out", progress=False)
    (item,) = json.loads((tmp_path / "out/datalist.json").read_text())["validation"]
    assert item["labels"] == "brats2023"
    assert item["ct"] == str(tmp_path / "a.nii.gz")


def test_odd_names_stay_plain_data(tmp_path: Path) -> None:
    folder = tmp_path / "%a" / "@b"
    for key in ("$flair", "@t1", "%seg"):
        image(folder / "$import os" / f"{key}.nii.gz") if key != "%seg" else label(folder / f"$import os/{key}.nii.gz")
    items = write_datalist(discover(folder), tmp_path / "out", progress=False)
    (item,) = json.loads((tmp_path / "out/datalist.json").read_text())["training"]
    assert item == items[0]
    assert not any(value.startswith(("$", "@", "%")) for value in item.values())
    assert not any(set(key) & set("$@%") for key in item)
    (case,) = find_cases(tmp_path / "out/datalist.json", ["flair", "t1"], labels="brats2018")
    assert case.images["flair"].is_file()
