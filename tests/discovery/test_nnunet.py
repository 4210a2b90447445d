# SPDX-License-Identifier: Apache-2.0
"""nnU-Net's raw data out of other layouts: the same voxels under its names, and what it could not take is refused."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from monai_cggm.data.splits import write_split
from monai_cggm.discovery import Found, FoundCase, discover, write_datalist
from monai_cggm.discovery.convert import Target, write_volumes
from monai_cggm.discovery.found import Source
from monai_cggm.discovery.nnunet import NnunetDataset, write_nnunet
from monai_cggm.discovery.sources import read_volumes
from monai_cggm.errors import DataError
from tests.discovery.test_convert import assert_nowhere, assert_same_places, itk_image, mask, whole_numbers
from tests.discovery.test_layouts import AFFINE, SHAPE, dataset_json, decathlon, image, label, volume

PERSON = "Planted^Person"
BRATS = (0, 1, 2, 4)


def labelled(path: Path, values: tuple[int, ...] = BRATS, **options: Any) -> np.ndarray:
    """Write a label with a few voxels of each value."""
    voxels = np.zeros(SHAPE, np.int16)
    for number, value in enumerate(values):
        voxels[number, 1:3, 1] = value
    return volume(path, voxels, **options)


def folders(root: Path, *case_ids: str, values: tuple[int, ...] = BRATS) -> dict[str, dict[str, np.ndarray]]:
    """Write a folder a case with flair, t1 and a label; return the voxels."""
    return {
        case_id: {
            "flair": image(root / case_id / "flair.nii.gz", seed=3 * number),
            "t1": volume(root / case_id / "t1.nii.gz", whole_numbers(number), descrip=PERSON),
            "label": labelled(root / case_id / "seg.nii.gz", values, descrip=PERSON),
        }
        for number, case_id in enumerate(case_ids)
    }


def split_file(path: Path, **parts: list[str]) -> Path:
    items = {part: [{"case": case_id} for case_id in parts.get(part, [])] for part in ("train", "validation", "test")}
    write_split(items, path, seed=0)
    return path


def write(found: Found, out: Path, **options: Any) -> NnunetDataset:
    return write_nnunet(found, out, **{"dataset_id": 501, "name": "Demo", "progress": False, **options})


def problem(found: Found, out: Path, **options: Any) -> str:
    """The message of the error that a data set gets, before which nothing is written."""
    before = sorted(out.rglob("*"))
    with pytest.raises(DataError) as error:
        write(found, out, **options)
    assert sorted(out.rglob("*")) == before
    return str(error.value)


def read(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


def content_of(made: NnunetDataset) -> dict[str, Any]:
    return json.loads((made.folder / "dataset.json").read_text())


def paint(labels: dict[str, Any], order: list[int], voxels: np.ndarray) -> np.ndarray:
    """A label map made of perfect masks of regions, as nnU-Net's documentation describes it."""
    regions = [classes for name, classes in labels.items() if name not in ("background", "ignore")]
    assert len(regions) == len(order)
    painted = np.zeros_like(voxels)
    for classes, number in zip(regions, order, strict=True):
        painted[np.isin(voxels, classes)] = number
    return painted


def test_round_trip_with_a_split(tmp_path: Path) -> None:
    voxels = folders(tmp_path / "data", "a", "b", "c", "d")
    split = split_file(tmp_path / "split.json", train=["c", "a"], validation=["d"], test=["b"])
    made = write(discover(tmp_path / "data"), tmp_path / "raw", split=split, workers=2)
    assert made.folder == tmp_path / "raw/Dataset501_Demo"
    files = {path.relative_to(made.folder).as_posix() for path in made.folder.rglob("*") if path.is_file()}
    images = {f"imagesTr/{c}_000{n}.nii.gz" for c in "acd" for n in (0, 1)} | {
        f"imagesTs/b_000{n}.nii.gz" for n in (0, 1)
    }
    labels = {f"labelsTr/{c}.nii.gz" for c in "acd"} | {"labelsTs/b.nii.gz"}
    assert files == images | labels | {"dataset.json", "splits_final.json"}
    assert content_of(made) == {
        "channel_names": {"0": "flair", "1": "t1"},
        "labels": {"background": 0, "label_1": 1, "label_2": 2, "label_4": 3},
        "numTraining": 3,
        "file_ending": ".nii.gz",
        "name": "Demo",
        "original_label_values": {"0": [0], "1": [1], "2": [2], "3": [4]},
    }
    assert json.loads((made.folder / "splits_final.json").read_text()) == [{"train": ["a", "c"], "val": ["d"]}]
    assert made.parts == {"train": ("a", "c"), "validation": ("d",), "test": ("b",)}
    assert (made.splits, made.left_out) == (made.folder / "splits_final.json", ())
    for case_id, part in (("a", "Tr"), ("b", "Ts"), ("c", "Tr"), ("d", "Tr")):
        np.testing.assert_array_equal(
            read(made.folder / f"images{part}/{case_id}_0000.nii.gz"), voxels[case_id]["flair"]
        )
        np.testing.assert_array_equal(read(made.folder / f"images{part}/{case_id}_0001.nii.gz"), voxels[case_id]["t1"])
        classes = nib.load(made.folder / f"labels{part}/{case_id}.nii.gz")
        assert classes.get_data_dtype() == np.uint8
        original = voxels[case_id]["label"]
        np.testing.assert_array_equal(np.asanyarray(classes.dataobj), np.where(original == 4, 3, original))
        np.testing.assert_allclose(classes.affine, AFFINE, atol=1e-5)
    assert_nowhere(made.folder, PERSON)
    again = discover(made.folder)
    assert (again.layout, again.modalities) == ("nnunet", ("flair", "t1"))
    assert again.label_names == {0: "background", 1: "label_1", 2: "label_2", 3: "label_4"}
    sections = {case.case_id: (case.section, case.label is not None) for case in again.cases}
    train, validation, test = (("training", True), ("validation", True), ("test", True))
    assert sections == {"a": train, "c": train, "d": validation, "b": test}
    assert "splits_final.json has one fold: its validation cases (1) are the validation part." in again.notes
    odd = [[{"train": ["a"], "val": value}] for value in (None, 5, "d", ["yy"], [5])]
    for folds in ([{"train": ["a", "d"], "val": ["c"]}] * 2, [{"train": [], "val": ["a", "c", "d"]}], *odd):
        (made.folder / "splits_final.json").write_text(json.dumps(folds))
        other = discover(made.folder)
        assert {case.section for case in other.cases} == {"training", "test"}
        assert not [note for note in other.notes if "splits_final" in note]
    for case in again.cases:
        for key, source in case.images.items():
            np.testing.assert_array_equal(read_volumes(source)[0][..., 0], voxels[case.case_id][key])
    # Written once more from what was written, all but the split is the same, byte by byte in the voxels.
    twice = write(again, tmp_path / "again")
    assert (twice.labels, content_of(twice)["labels"]) == (made.labels, content_of(made)["labels"])
    np.testing.assert_array_equal(read(twice.folder / "labelsTr/a.nii.gz"), read(made.folder / "labelsTr/a.nii.gz"))


def test_label_names_and_channels_of_a_decathlon_folder(tmp_path: Path) -> None:
    decathlon(tmp_path / "set")
    found = discover(tmp_path / "set")
    made = write(found, tmp_path / "raw")
    again = discover(made.folder)
    assert again.modalities == found.modalities == ("flair", "t1", "t1ce", "t2")
    assert again.label_names == found.label_names
    assert [(c.case_id, c.section) for c in again.cases] == [(c.case_id, c.section) for c in found.cases]
    for before, after in zip(found.cases, again.cases, strict=True):
        for key in found.modalities:
            expected = read_volumes(before.images[key])[0][..., before.images[key].channel]
            np.testing.assert_array_equal(read_volumes(after.images[key])[0][..., 0], expected)
    # Without a validation part there is no fold, and tests without labels get no folder of them.
    assert made.splits is None
    assert not (made.folder / "splits_final.json").exists()
    assert not (made.folder / "labelsTs").exists()


def test_oblique_volumes_of_other_formats(tmp_path: Path) -> None:
    volumes = {"ct": whole_numbers(0), "pet": whole_numbers(1), "seg": mask() * 9}
    for key, voxels in volumes.items():
        (tmp_path / "set/p").mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(itk_image(voxels), str(tmp_path / f"set/p/{key}.nrrd"))
    made = write(discover(tmp_path / "set"), tmp_path / "raw")
    assert_same_places(made.folder / "imagesTr/p_0000.nii.gz", itk_image(volumes["ct"]), volumes["ct"])
    assert_same_places(made.folder / "imagesTr/p_0001.nii.gz", itk_image(volumes["pet"]), volumes["pet"])
    assert_same_places(made.folder / "labelsTr/p.nii.gz", itk_image(mask()), mask())
    # The name by which nnU-Net knows that the values are Hounsfield units.
    assert content_of(made)["channel_names"] == {"0": "CT", "1": "pet"}
    assert discover(made.folder).modalities == ("ct", "pet")


def test_sections_of_the_data_set_are_its_split(tmp_path: Path) -> None:
    folders(tmp_path / "data", "a", "b", "c")
    entry = {key: f"data/{{}}/{file}.nii.gz" for key, file in (("flair", "flair"), ("t1", "t1"), ("label", "seg"))}
    sections = {"training": "c", "validation": "a", "test": "b"}
    content = {
        section: [{"case": case_id, **{key: text.format(case_id) for key, text in entry.items()}}]
        for section, case_id in sections.items()
    }
    (tmp_path / "list.json").write_text(json.dumps(content))
    made = write(discover(tmp_path / "list.json"), tmp_path / "raw")
    assert made.parts == {"train": ("c",), "validation": ("a",), "test": ("b",)}
    assert json.loads((made.folder / "splits_final.json").read_text()) == [{"train": ["c"], "val": ["a"]}]
    assert content_of(made)["numTraining"] == 2
    assert (made.folder / "labelsTs/b.nii.gz").is_file()


@pytest.mark.parametrize(
    ("regions", "labels", "order"),
    [
        (
            {"ET": [4], "WT": [1, 2, 4], "TC": [4, 1]},
            {"background": 0, "WT": [1, 2, 3], "TC": [1, 3], "ET": 3},
            [2, 1, 3],
        ),
        # Two classes that no region tells apart become the first of them.
        ({"WT": [1, 2, 4], "ET": [4]}, {"background": 0, "WT": [1, 2, 3], "ET": 3}, [1, 3]),
        # A region that is all painted over; single ones in any order.
        (
            {"all": [1, 2, 4], "x": [4], "y": [1, 2]},
            {"background": 0, "all": [1, 2, 3], "y": [1, 2], "x": 3},
            [1, 1, 3],
        ),
        # Overlapping ones, with one more for the overlap.
        ({"a": [1, 2], "b": [2, 4], "c": [2]}, {"background": 0, "a": [1, 2], "b": [2, 3], "c": 2}, [1, 3, 2]),
    ],
)
def test_regions(tmp_path: Path, regions: dict[str, list[int]], labels: dict[str, Any], order: list[int]) -> None:
    folders(tmp_path / "data", "a")
    made = write(discover(tmp_path / "data"), tmp_path / "raw", regions=regions)
    content = content_of(made)
    assert list(content["labels"].items()) == list(labels.items())
    assert content["regions_class_order"] == order
    assert content["original_label_values"] == {"0": [0], "1": [1], "2": [2], "3": [4]}
    voxels = read(made.folder / "labelsTr/a.nii.gz")
    assert set(np.unique(voxels)) == {0, 1, 2, 3}
    painted = paint(content["labels"], order, voxels)
    for classes in content["labels"].values():
        np.testing.assert_array_equal(np.isin(painted, classes), np.isin(voxels, classes))


@pytest.mark.parametrize(
    ("regions", "text"),
    [
        ({"a": [1, 2], "b": [2, 4]}, "regions a and b overlap and none is in the other"),
        ({"a": [1, 3], "b": [1, 2, 4]}, "region a: found 3, expected values of the labels: 1, 2, 4"),
        ({"a": [0, 1], "b": [1, 2, 4]}, "region a: found 0, expected values of the labels: 1, 2, 4"),
        ({"a": [], "b": [1, 2, 4]}, "region a: found no value, expected"),
        ({"a": [1], "b": [1, 4]}, "values 2 are in no region, expected every value but 0 in one"),
        ({"background": [1, 2, 4]}, "region 'background': expected another name"),
        ({"ignore": [1, 2, 4]}, "region 'ignore': expected another name"),
    ],
)
def test_regions_that_nnunet_cannot_learn(tmp_path: Path, regions: dict[str, list[int]], text: str) -> None:
    folders(tmp_path / "data", "a")
    assert text in problem(discover(tmp_path / "data"), tmp_path / "raw", regions=regions)


def test_all_that_is_wrong_with_cases_is_said_at_once(tmp_path: Path) -> None:
    folders(tmp_path / "data", "a", "b", "c", "d", "e")
    (tmp_path / "data/b/t1.nii.gz").unlink()
    (tmp_path / "data/c/flair.nii.gz").unlink()
    (tmp_path / "data/d/seg.nii.gz").unlink()
    found = discover(tmp_path / "data", allow_missing=True, need_label=False)
    cases = (*found.cases[:4], replace(found.cases[4], case_id="e_seg"))
    message = problem(replace(found, cases=cases), tmp_path / "raw")
    assert message.startswith("4 problems:")
    assert f"case b: lacks t1 ({tmp_path / 'data/b'}), expected all of flair, t1" in message
    assert f"case c: lacks flair ({tmp_path / 'data/c'}), expected all of flair, t1" in message
    assert f"case d: has no label ({tmp_path / 'data/d'}), expected one in the part train" in message
    assert "case e_seg: ends in _seg, which nnU-Net takes for a label" in message


def test_cases_that_cannot_be_read_together(tmp_path: Path) -> None:
    folders(tmp_path / "data", "a", "b")
    image(tmp_path / "data/b/flair.nii.gz", affine=AFFINE + np.diag([0.5, 0, 0, 0]))
    assert "case b: flair has" in problem(discover(tmp_path / "data"), tmp_path / "raw")
    found = discover(tmp_path / "data")
    tests = replace(found, cases=tuple(replace(case, section="test") for case in found.cases))
    assert "no case is for training" in problem(tests, tmp_path / "raw")


def test_cases_and_split_that_do_not_fit(tmp_path: Path) -> None:
    folders(tmp_path / "data", "a", "b", "c", "d")
    (tmp_path / "data/d/seg.nii.gz").unlink()
    found = discover(tmp_path / "data", need_label=False)
    split = split_file(tmp_path / "split.json", train=["a"], validation=["x"], test=["c"])
    message = problem(found, tmp_path / "raw", split=split)
    assert "case x: is in the split and not among the cases" in message
    assert "case b: is in no part of the split" in message
    assert "case d" not in message
    made = write(found, tmp_path / "raw", split=split_file(split, train=["a", "c"], test=["b"]))
    assert (made.left_out, made.splits) == (("d",), None)
    assert not [path for path in made.folder.rglob("d*.nii.gz")]


def conventions(root: Path, **cases: tuple[str | None, tuple[int, ...]]) -> Found:
    """A datalist whose cases have label conventions and label values."""
    entries = []
    for case_id, (convention, values) in cases.items():
        folders(root / "data", case_id, values=values)
        paths = {key: f"data/{case_id}/{file}.nii.gz" for key, file in (("flair", "flair"), ("t1", "t1"))}
        told = {"labels": convention} if convention else {}
        entries.append({"case": case_id, **told, **paths, "label": f"data/{case_id}/seg.nii.gz"})
    (root / "list.json").write_text(json.dumps({"training": entries}))
    return discover(root / "list.json")


def test_conventions_that_a_datalist_tells(tmp_path: Path) -> None:
    found = conventions(
        tmp_path, old=("brats2018", (0, 1, 2, 4)), new=("brats2023", (0, 1, 2, 3)), cavity=("brats2024", (0, 2, 3, 4))
    )
    made = write(found, tmp_path / "raw")
    for case_id, table in (
        ("old", {0: 0, 1: 1, 2: 2, 4: 3}),
        ("new", {0: 0, 1: 1, 2: 2, 3: 3}),
        ("cavity", {0: 0, 2: 2, 3: 3, 4: 0}),
    ):
        original = read(tmp_path / f"data/{case_id}/seg.nii.gz")
        expected = np.vectorize(table.__getitem__)(original)
        np.testing.assert_array_equal(read(made.folder / f"labelsTr/{case_id}.nii.gz"), expected)
    assert made.original_values == {0: (0, 4), 1: (1,), 2: (2,), 3: (4, 3)}
    assert made.labels == {"background": 0, "label_1": 1, "label_2": 2, "class_3": 3}
    # 4 is the enhancing tumour in one of them and the background in another; 3 is not.
    regions = {"WT": [1, 2, 3], "ET": [4]}
    message = problem(found, tmp_path / "raw2", regions=regions)
    assert "region ET: 4 means different things in cases of different conventions" in message
    made = write(found, tmp_path / "raw2", regions={"WT": [1, 2, 3], "ET": [3]})
    assert made.labels == {"background": 0, "WT": [1, 2, 3], "ET": 3}


@pytest.mark.parametrize(
    ("cases", "text"),
    [
        ({"a": ("brats2018", (0, 1)), "b": (None, (0, 1))}, "case b: nothing tells its label convention ('labels')"),
        ({"a": ("brats2018", (0, 1, 3))}, "case a: label values [3] are not in the map brats2018"),
        ({"a": ("mine", (0, 1))}, "case a: unknown label convention 'mine'"),
        (
            {"a": ("brats2018", (0, 1)), "b": ("1=1", (0, 1))},
            "different numbers of classes (brats2018 has 4, 0=0,1=1 has 2)",
        ),
        (
            {"Brats18_A_B_1": (None, (0, 4)), "BraTS-GLI-00001-000": (None, (0, 3))},
            "different label conventions by their IDs (Brats18_A_B_1 brats2018, BraTS-GLI-00001-000 brats2023)",
        ),
    ],
)
def test_conventions_that_do_not_fit(tmp_path: Path, cases: dict[str, Any], text: str) -> None:
    assert text in problem(conventions(tmp_path, **cases), tmp_path / "raw")


def test_names_of_labels_that_nnunet_knows(tmp_path: Path) -> None:
    folders(tmp_path / "data", "a")
    found = replace(
        discover(tmp_path / "data"), label_names={0: "air", 1: "background", 2: "x", 3: "unseen", 4: "ignore"}
    )
    made = write(found, tmp_path / "raw")
    assert made.labels == {"background": 0, "background_1": 1, "x": 2, "unseen": 3, "ignore": 4}
    assert made.original_values == {0: (0,), 1: (1,), 2: (2,), 3: (3,), 4: (4,)}
    made = write(found, tmp_path / "regions", regions={"all": [1, 2, 3], "x": [2]})
    assert made.labels == {"background": 0, "all": [1, 2, 3], "x": 2, "ignore": 4}
    odd = replace(found, label_names={**(found.label_names or {}), 2: "ignore", 4: "x"})
    assert "the label 'ignore' is value 2, nnU-Net wants it to be the last" in problem(odd, tmp_path / "odd")


def test_regions_of_the_data_set_itself(tmp_path: Path) -> None:
    """Those of an nnU-Net folder, through a datalist too: nested regions, a value that no case has, ignored voxels."""
    dataset_json(
        tmp_path / "set",
        {
            "channel_names": {"0": "flair", "1": "t1"},
            "labels": {"background": 0, "whole tumour": [1, 2, 4, 5], "core": [4, 5], "ignore": 7},
            "regions_class_order": [1, 4],
        },
    )
    for number in (0, 1):
        image(tmp_path / f"set/imagesTr/a_000{number}.nii.gz", seed=number)
    labelled(tmp_path / "set/labelsTr/a.nii.gz", (0, 1, 2, 4, 7))
    found = discover(tmp_path / "set")
    write_datalist(found, tmp_path / "list", progress=False)
    listed = discover(tmp_path / "list/datalist.json")
    assert listed.label_regions == found.label_regions == {"whole_tumour": (1, 2, 4, 5), "core": (4, 5)}
    assert listed.label_names == found.label_names == {0: "background", 7: "ignore"}
    assert "Regions of label values: whole_tumour=1,2,4,5; core=4,5." in listed.notes
    for number, source in enumerate((found, listed)):
        made = write(source, tmp_path / f"raw{number}")
        assert made.original_values == {0: (0,), 1: (1,), 2: (2,), 3: (4,), 4: (5,), 5: (7,)}
        assert made.labels == {"background": 0, "whole_tumour": [1, 2, 3, 4], "core": [3, 4], "ignore": 5}
        assert content_of(made)["regions_class_order"] == [1, 3]
        assert discover(made.folder).label_regions == {"whole_tumour": (1, 2, 3, 4), "core": (3, 4)}
        made = write(source, tmp_path / f"wished{number}", regions={"all": [1, 2, 4, 5]})
        assert made.labels == {"background": 0, "all": [1, 2, 3, 4], "ignore": 5}


def test_regions_of_the_data_set_that_do_not_suit_nnunet(tmp_path: Path) -> None:
    """Then there is a way to labels, which the sentence names."""
    folders(tmp_path / "data", "a")
    found = replace(discover(tmp_path / "data"), label_regions={"a": (1, 2)})
    text = problem(found, tmp_path / "raw")
    assert "values 4 are in no region" in text
    assert (
        f"{tmp_path / 'data'} has regions of its own: give others (--region), or train on labels (--no-regions)" in text
    )
    assert "--no-regions" not in problem(found, tmp_path / "raw", regions={"b": [1]})  # these were asked for
    made = write(found, tmp_path / "raw", regions={})
    assert made.labels == {"background": 0, "label_1": 1, "label_2": 2, "label_4": 3}


def test_names_of_labels_beside_regions_come_back(tmp_path: Path) -> None:
    folders(tmp_path / "data", "a")
    names = {0: "background", 1: "NCR", 2: "ED", 4: "ET"}
    found = replace(
        discover(tmp_path / "data"), label_names=names, label_regions={"WT": (1, 2, 4), "TC": (1, 4), "E": (4,)}
    )
    made = write(found, tmp_path / "raw")
    assert made.labels == {"background": 0, "WT": [1, 2, 3], "TC": [1, 3], "E": 3}
    again = discover(made.folder)
    assert again.label_names == {0: "background", 1: "NCR", 2: "ED", 3: "ET"}
    assert again.label_regions == {"WT": (1, 2, 3), "TC": (1, 3), "E": (3,)}


def test_a_label_to_ignore_in_any_letter_case(tmp_path: Path) -> None:
    folders(tmp_path / "data", "a")
    found = replace(discover(tmp_path / "data"), label_names={0: "background", 1: "a", 2: "b", 4: "Ignore"})
    assert write(found, tmp_path / "raw").labels == {"background": 0, "a": 1, "b": 2, "ignore": 3}
    made = write(found, tmp_path / "regions", regions={"ab": [1, 2]})
    assert made.labels == {"background": 0, "ab": [1, 2], "ignore": 3}


def test_regions_that_part_a_class(tmp_path: Path) -> None:
    """Where a map makes one class of two values, a region has both or none."""
    found = conventions(tmp_path, a=("0=0,1=1,2=1,4=2", BRATS))
    assert "region X: 1 and a value of it are one class, expected both or none" in problem(
        found, tmp_path / "raw", regions={"WT": [1, 2, 4], "X": [2]}
    )
    made = write(found, tmp_path / "raw", regions={"WT": [1, 2, 4], "ET": [4]})
    assert made.labels == {"background": 0, "WT": [1, 2], "ET": 2}


def test_places_where_nothing_is_written(tmp_path: Path) -> None:
    folders(tmp_path / "data", "a", "b")
    found = discover(tmp_path / "data")
    raw = tmp_path / "raw"
    assert "where its files would be found as cases" in problem(found, tmp_path / "data")
    (raw / "Dataset501_Other").mkdir(parents=True)
    assert "has Dataset501_Other: nnU-Net wants one data set an ID" in problem(found, raw)
    made = write(found, raw, dataset_id=7)
    assert made.folder.name == "Dataset007_Demo"
    own = discover(made.folder / "dataset.json")
    assert "where its files would be found as cases" in problem(own, raw, dataset_id=7)
    files = {"flair": "imagesTr/a_0000.nii.gz", "t1": "imagesTr/a_0001.nii.gz", "label": "labelsTr/a.nii.gz"}
    listed = {"case": "a", **{key: str(made.folder / file) for key, file in files.items()}}
    (tmp_path / "list.json").write_text(json.dumps({"training": [listed]}))
    assert "holds volumes of" in problem(discover(tmp_path / "list.json"), raw, dataset_id=7)
    # A case that went away, and a split that is no longer one.
    (made.folder / "splits_final.json").write_text("[]")
    message = problem(found.without(["b"]), raw, dataset_id=7)
    listed = "imagesTr/b_0000.nii.gz, imagesTr/b_0001.nii.gz, labelsTr/b.nii.gz, splits_final.json"
    assert f"has 4 files of no case of this data set or split ({listed}): remove them" in message
    (tmp_path / "elsewhere").mkdir()
    (raw / "Dataset008_Demo").mkdir()
    (raw / "Dataset008_Demo/imagesTr").symlink_to(tmp_path / "elsewhere")
    assert "imagesTr leads out of" in problem(found, raw, dataset_id=8)
    (raw / "Dataset009_Demo").touch()
    assert "is a file, expected a folder" in problem(found, raw, dataset_id=9)
    odd = Found(tmp_path / "s", "folders", ("ct",), (FoundCase("../x", "x", {}),))
    assert "is no safe name for a file" in problem(odd, raw, dataset_id=10)


@pytest.mark.parametrize(("dataset_id", "name"), [(0, "A"), (1000, "A"), (1, "a b"), (1, "../x"), (1, "")])
def test_names_that_nnunet_cannot_have(tmp_path: Path, dataset_id: int, name: str) -> None:
    found = Found(tmp_path, "folders", ("ct",), ())
    with pytest.raises(ValueError, match=r"dataset_id must be|name must be"):
        write_nnunet(found, tmp_path / "raw", dataset_id=dataset_id, name=name)


def test_a_second_run_keeps_what_fits(tmp_path: Path) -> None:
    folders(tmp_path / "data", "a", "b")
    found = discover(tmp_path / "data")
    made = write(found, tmp_path / "raw")
    files = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in made.folder.rglob("*.nii.gz")}
    assert len(files) == 6
    write(found, tmp_path / "raw")
    assert {path: path.stat().st_mtime_ns for path in files} == {path: time for path, (time, _) in files.items()}
    other = write(found, tmp_path / "other")
    for path, (_, content) in files.items():
        assert (other.folder / path.relative_to(made.folder)).read_bytes() == content
    # The same label is another file where its values become other classes.
    labelled(tmp_path / "data/b/seg.nii.gz", (0, 1, 2, 3, 4))
    write(found, tmp_path / "raw")
    original = read(tmp_path / "data/a/seg.nii.gz")
    np.testing.assert_array_equal(read(made.folder / "labelsTr/a.nii.gz"), original)
    assert read(made.folder / "labelsTr/a.nii.gz").max() == 4
    kept = made.folder / "imagesTr/a_0000.nii.gz"
    assert kept.stat().st_mtime_ns == files[kept][0]


def test_a_bad_file_leaves_no_dataset_json(tmp_path: Path) -> None:
    folders(tmp_path / "data", "a", "b")
    path = tmp_path / "data/b/t1.nii.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-40]))
    with pytest.raises(DataError, match=r"case b: t1 cannot be read.*b/t1.nii.gz"):
        write(discover(tmp_path / "data"), tmp_path / "raw")
    assert not (tmp_path / "raw/Dataset501_Demo/dataset.json").exists()
    assert (tmp_path / "raw/Dataset501_Demo/imagesTr/a_0001.nii.gz").is_file()


def test_a_label_that_has_changed_since_it_was_looked_at(tmp_path: Path) -> None:
    label(tmp_path / "seg.nii.gz")
    target = Target("p", "label", Source(tmp_path / "seg.nii.gz"), tmp_path / "out/p.nii.gz", {0: 0, 1: 1})
    with pytest.raises(DataError, match=r"case p: label has values \[2\], expected 0, 1"):
        write_volumes([target], workers=0, progress=False)
    assert not target.file.exists()


def test_regions_of_one_class_are_labels(tmp_path: Path) -> None:
    folders(tmp_path / "set", "a")
    made = write(discover(tmp_path / "set"), tmp_path / "raw", regions={"x": [1], "y": [2], "z": [4]})
    assert made.labels == {"background": 0, "x": 1, "y": 2, "z": 3}
    assert discover(made.folder).label_names == {0: "background", 1: "x", 2: "y", 3: "z"}
    dataset_json(made.folder, {**content_of(made), "labels": {"background": 0, "x": [1], "y": [2], "z": [3]}})
    assert discover(made.folder).label_names == {0: "background", 1: "x", 2: "y", 3: "z"}
