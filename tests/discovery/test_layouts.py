# SPDX-License-Identifier: Apache-2.0
"""Folders as people keep them: what is recognised, and what is said where something is wrong."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from monai_cggm.data.layouts import find_cases, is_safe_id
from monai_cggm.discovery import Found, discover
from monai_cggm.discovery import found as found_module
from monai_cggm.discovery.found import Source
from monai_cggm.discovery.names import key_of, modality_of, slug_of, vocabulary_of
from monai_cggm.errors import DataError

SHAPE = (5, 4, 3)
AFFINE = np.array([[-1.5, 0, 0, 20], [0, 2, 0, -30], [0, 0, 3, 7], [0, 0, 0, 1.0]])


def touch(*paths: Path) -> None:
    """Make empty files: where names tell everything, none is opened."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def image(path: Path, *, seed: int = 0, shape: tuple[int, ...] = SHAPE, affine: np.ndarray = AFFINE) -> np.ndarray:
    """Write a NIfTI file of random floats."""
    voxels = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return volume(path, voxels, affine)


def volume(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE, descrip: str = "") -> np.ndarray:
    """Write a NIfTI file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = nib.Nifti1Image(voxels, affine)
    written.header["descrip"] = descrip
    nib.save(written, path)
    return voxels


def label(path: Path, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Write a label of 0, 1 and 2."""
    voxels = np.zeros(shape, np.uint8)
    voxels[1:3, 1, 1] = 1
    voxels[3, 2, 1] = 2
    return volume(path, voxels)


def dataset_json(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "dataset.json"
    path.write_text(json.dumps(content))
    return path


def names(found: Found) -> dict[str, dict[str, str]]:
    """Case -> key -> path below the source."""
    return {
        case.case_id: {key: str(source.path.relative_to(found.source)) for key, source in case.sources().items()}
        for case in found.cases
    }


def problem(*arguments: Any, **options: Any) -> str:
    """The message of the error that a folder gets."""
    with pytest.raises(DataError) as error:
        discover(*arguments, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("FLAIR", "flair"),
        ("p01_T2_FLAIR", "flair"),
        ("t2f", "flair"),
        ("T1ce", "t1ce"),
        ("x-T1Gd", "t1ce"),
        ("T1WKS", "t1ce"),
        ("t1c", "t1ce"),
        ("T1_post", "t1ce"),
        ("post-T1", "t1ce"),
        ("T1w", "t1"),
        ("T2W", "t2"),
        ("adc", "adc"),
        ("scan_DWI_b1000", "dwi"),
        ("PET", "pet"),
        ("CTres", "ctres"),
        ("T1_to_FLAIR", "t1"),
        ("sub_space-T1w_FLAIR", "flair"),
        ("FLAIR_seg", "label"),
        ("consensus_gt", "label"),
        ("GOLD_STANDARD_N4", "label"),
        ("lesion-mask", "label"),
        ("brain_mask", "(ignored)"),
        ("T1_brainmask", "(ignored)"),
        ("T1_T2", None),
        ("masked", None),
        ("patient7", None),
    ],
)
def test_words_that_name_a_key(name: str, key: str | None) -> None:
    assert key_of(name, vocabulary_of())[0] == key


def test_words_that_all_names_have_decide_nothing() -> None:
    assert key_of("PET_07_ct", vocabulary_of())[0] is None
    assert key_of("PET_07_ct", vocabulary_of(), {"pet": 1})[0] == "ct"
    assert key_of("PET_07_pet", vocabulary_of(), {"pet": 1})[0] == "pet"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("$import os", "import_os"),
        ("@x", "x"),
        ("%a::b", "a_b"),
        ("image", "image_1"),
        ("type", "type_1"),
        ("β", "modality"),
    ],
)
def test_names_of_modalities_are_safe_in_a_configuration(name: str, key: str) -> None:
    assert modality_of(name) == key
    assert modality_of(key) == key
    assert slug_of(key) == key


def test_real_ms_lesions(real_data: Path) -> None:
    folder = real_data / "ms_lesions"
    if not folder.is_dir():
        pytest.skip("needs the folder ms_lesions among the real cases")
    found = discover(folder)
    assert (found.layout, found.modalities) == ("folders", ("flair", "t1", "t1ce", "t2"))
    assert list(names(found)) == ["patient07", "patient19", "patient26"]
    ending = "_N4_noneck_reduced_winsor_regtoFLAIR_brain_N4_regtoMNI.nii.gz"
    for case, files in names(found).items():
        assert files == {
            "flair": f"{case}/FLAIR{ending}",
            "t1": f"{case}/T1{ending}",
            "t1ce": f"{case}/T1POST{ending}",
            "t2": f"{case}/T2{ending}",
            "label": f"{case}/GOLD_STANDARD_N4_noneck_reduced_winsor_regtoFLAIR_regtoMNI.nii.gz",
        }
    # One patient's folder alone is that one case.
    alone = discover(folder / "patient07")
    assert (alone.layout, [case.case_id for case in alone.cases]) == ("folders", ["patient07"])
    assert alone.modalities == found.modalities


def test_folders_with_notes(tmp_path: Path) -> None:
    for case in ("a", "b"):
        for name in ("FLAIR_reg", "T1_reg_N4", "brain_mask", "expert_seg"):
            touch(tmp_path / "site" / case / f"{name}.nii.gz")
    found = discover(tmp_path)
    assert found.layout == "folders"
    assert names(found)["b"] == {
        "flair": "site/b/FLAIR_reg.nii.gz",
        "t1": "site/b/T1_reg_N4.nii.gz",
        "label": "site/b/expert_seg.nii.gz",
    }
    notes = " ".join(found.notes)
    assert "flair: 2 files, by *FLAIR*." in notes
    assert "Ignored: 2 volumes" in notes
    assert "brain_mask.nii.gz" in notes
    assert "alphabetical order: flair, t1" in notes


def test_a_template_beside_the_cases(tmp_path: Path) -> None:
    for case in ("a", "b"):
        touch(*(tmp_path / case / f"{name}.nii.gz" for name in ("flair", "t1", "seg")))
    touch(tmp_path / "T1_template.nii.gz")
    found = discover(tmp_path)
    assert list(names(found)) == ["a", "b"]
    assert "Ignored: 1 volumes that are in no case: T1_template.nii.gz." in found.notes
    assert "2 cases of 2 patients." in found.notes


def test_files_side_by_side(tmp_path: Path) -> None:
    for case in ("p01", "p-02"):
        touch(*(tmp_path / f"{case}_{name}.nii.gz" for name in ("T1_reg", "flair", "seg_final")))
    found = discover(tmp_path)
    assert found.layout == "files"
    assert names(found)["p-02"] == {
        "flair": "p-02_flair.nii.gz",
        "t1": "p-02_T1_reg.nii.gz",
        "label": "p-02_seg_final.nii.gz",
    }
    assert list(names(found)) == ["p-02", "p01"]


def test_images_and_labels_in_folders_of_their_own(tmp_path: Path) -> None:
    for case in ("p01", "p02"):
        touch(
            tmp_path / f"images/{case}_ct.nrrd", tmp_path / f"images/{case}_pet.nrrd", tmp_path / f"labels/{case}.nrrd"
        )
    found = discover(tmp_path)
    assert names(found)["p02"] == {
        "ct": "images/p02_ct.nrrd",
        "pet": "images/p02_pet.nrrd",
        "label": "labels/p02.nrrd",
    }
    assert {source.kind for case in found.cases for source in case.sources().values()} == {"image"}


def test_a_folder_a_modality(tmp_path: Path) -> None:
    for case in ("p01", "p02"):
        touch(*(tmp_path / folder / f"{case}.nii.gz" for folder in ("FLAIR", "T1w", "masks")))
    found = discover(tmp_path)
    assert names(found)["p01"] == {"flair": "FLAIR/p01.nii.gz", "t1": "T1w/p01.nii.gz", "label": "masks/p01.nii.gz"}
    assert list(names(found)) == ["p01", "p02"]


@pytest.mark.parametrize(
    ("places", "cases"),
    [
        (["p01/ses1", "p01/ses2", "p02/ses1"], {"p01_ses1": "p01", "p01_ses2": "p01", "p02_ses1": "p02"}),
        (["p01/anat", "p02/anat"], {"p01": "p01", "p02": "p02"}),
        (
            ["p01/2019-01-02", "p01/20200304", "p02/20180101"],
            {"p01_2019-01-02": "p01", "p01_20200304": "p01", "p02_20180101": "p02"},
        ),
        (["s/p1/ses1", "s/p1/ses2", "t/p1/ses1"], {"s_p1_ses1": "s_p1", "s_p1_ses2": "s_p1", "t_p1_ses1": "t_p1"}),
        (["s/p1/2020-01-01", "t/p1/2020-01-02"], {"s_p1_2020-01-01": "s_p1", "t_p1_2020-01-02": "t_p1"}),
        (["s/p1/2020-01-01", "s/p2/2020-01-02"], {"s_p1_2020-01-01": "p1", "s_p2_2020-01-02": "p2"}),
        (["HGG/a", "HGG/b", "LGG/c"], {"a": "a", "b": "b", "c": "c"}),
        (["A/p1", "A/p2", "A/p3", "B/p1"], {"A_p1": "A_p1", "A_p2": "A_p2", "A_p3": "A_p3", "B_p1": "B_p1"}),
        (["x/x_1", "x/x_2", "y/y_1", "z/z_1"], {"x_1": "x", "x_2": "x", "y_1": "y", "z_1": "z"}),
        (["HGG/HGG_1", "HGG/HGG_2"], {"HGG_1": "HGG_1", "HGG_2": "HGG_2"}),
    ],
)
def test_ids_and_patients_of_nested_folders(tmp_path: Path, places: list[str], cases: dict[str, str]) -> None:
    for place in places:
        touch(*(tmp_path / place / f"{name}.nii.gz" for name in ("flair", "t1", "seg")))
    assert {case.case_id: case.patient for case in discover(tmp_path).cases} == cases


def test_label_and_modalities_that_no_name_tells(tmp_path: Path) -> None:
    for case in ("a", "b"):
        image(tmp_path / case / "weighted.nii.gz")
        image(tmp_path / case / "second.nii.gz", seed=1)
        label(tmp_path / case / f"reader1_{case}.nii.gz")
        touch(tmp_path / case / f"unique_{case * 5}.nii.gz")
    found = discover(tmp_path)
    assert found.modalities == ("second", "weighted")
    assert names(found)["b"]["label"] == "b/reader1_b.nii.gz"
    assert "label: files named *reader1*, because it holds few whole numbers." in found.notes


def test_label_that_no_name_tells_side_by_side(tmp_path: Path) -> None:
    for case in ("p01", "p02"):
        touch(tmp_path / f"{case}_flair.nii.gz", tmp_path / f"{case}_t1.nii.gz")
        label(tmp_path / f"{case}_expert.nii.gz")
    assert names(discover(tmp_path))["p02"]["label"] == "p02_expert.nii.gz"


def test_of_two_labels_by_name_the_one_with_whole_numbers(tmp_path: Path) -> None:
    for case in ("a", "b"):
        touch(tmp_path / case / "flair.nii.gz", tmp_path / case / "t1.nii.gz")
        image(tmp_path / case / "lesion_probability.nii.gz")
        label(tmp_path / case / "lesion_consensus.nii.gz")
    assert names(discover(tmp_path))["a"]["label"] == "a/lesion_consensus.nii.gz"


def test_patterns_choose(tmp_path: Path) -> None:
    for case in ("a", "b"):
        for name in ("T1_raw", "T1_n4", "x_FLAIR", "rater1_mask", "rater2_mask"):
            touch(tmp_path / case / f"{name}.nii.gz")
    text = problem(tmp_path)
    assert (
        "case a: 2 files may be t1, expected one (a/T1_n4.nii.gz, a/T1_raw.nii.gz; choose with --modality "
        '"t1=T1_n4.nii.gz" --label "rater1_mask.nii.gz", for example); so in 1 more cases: b'
    ) in text
    assert "2 files may be label, expected one (a/rater1_mask.nii.gz, a/rater2_mask.nii.gz; choose with --modal" in text
    assert len(text.splitlines()) == 1 + 2  # a sentence for each, and not for each case
    assert discover(tmp_path, patterns={"t1": "T1_n4.nii.gz"}, label_pattern="rater1_mask.nii.gz").modalities
    none = problem(tmp_path, patterns={"t1": "*_N4*"}, label_pattern="*roi*")
    found = "found T1_raw.nii.gz, rater1_mask.nii.gz, rater2_mask.nii.gz"
    assert none.endswith(f"has a label: no file of a case fits the label pattern *roi*, {found}")
    pet = problem(tmp_path, patterns={"t1": "*_N4*", "pet": "*imgZ*"}, label_pattern="*rater1*")
    assert "pet is in no case of" in pet
    assert pet.endswith(": no file fits the pattern *imgZ*")
    # Where all patterns miss, the label is not to blame.
    both = {"t1": "*T9*", "pet": "*imgZ*"}
    assert problem(tmp_path, patterns=both, label_pattern="*rater1*").splitlines()[1:] == [
        f"  t1 is in no case of {tmp_path}: no file fits the pattern *T9*",
        f"  pet is in no case of {tmp_path}: no file fits the pattern *imgZ*",
    ]
    text = problem(tmp_path, patterns=both, label_pattern="*nothing*")
    assert text.endswith("x_FLAIR.nii.gz) fit none of the patterns t1=*T9*, pet=*imgZ*")
    found = discover(tmp_path, patterns={"t1": "*_N4*", "flair": "*/x_*"}, label_pattern="rater2*")
    assert found.modalities == ("t1", "flair")
    assert names(found)["a"] == {
        "t1": "a/T1_n4.nii.gz",
        "flair": "a/x_FLAIR.nii.gz",
        "label": "a/rater2_mask.nii.gz",
    }
    twice = problem(tmp_path, patterns={"t1": "*T1_n4*", "flair": "*n4*"}, label_pattern="rater2*")
    told = "a/T1_n4.nii.gz and 1 more fit the patterns t1=*T1_n4* and flair=*n4*, expected one of them"
    assert twice == f"{tmp_path}/{told}"
    assert "expected names of modalities such as x_y" in problem(tmp_path, patterns={"$x-y": "*"})


def test_patterns_side_by_side(tmp_path: Path) -> None:
    for case in ("p01", "p02"):
        touch(*(tmp_path / f"{case}_{name}.nii.gz" for name in ("0000", "0001", "seg")))
    found = discover(tmp_path, patterns={"t2": "*_0000.nii.gz", "adc": "*_0001.nii.gz"})
    assert names(found)["p02"] == {"t2": "p02_0000.nii.gz", "adc": "p02_0001.nii.gz", "label": "p02_seg.nii.gz"}


def test_chosen_modalities_and_their_order(tmp_path: Path) -> None:
    for case in ("a", "b"):
        touch(*(tmp_path / case / f"{name}.nii.gz" for name in ("flair", "t1", "t2_x", "t2_y", "T1rho", "seg")))
    found = discover(tmp_path, modalities=["T1rho", "FLAIR"])
    assert found.modalities == ("t1rho", "flair")
    assert "Not asked for: t1 (2 files), t2 (4 files)." in found.notes
    assert not any("Ignored" in note for note in found.notes)
    told = f"no pet in {tmp_path}: its modalities are flair, t1, t2"  # and not those alone that were asked for
    assert problem(tmp_path, modalities=["flair", "pet"]) == told
    assert "2 files may be t2" in problem(tmp_path)


def test_nnunet(tmp_path: Path) -> None:
    content = {
        "channel_names": {"1": "T1", "0": "FLAIR", "2": "PET"},
        "labels": {"background": 0, "lesion": 1, "$danger": 2},
        "numTraining": 9,
        "file_ending": ".nii.gz",
    }
    dataset_json(tmp_path, content)
    for case in ("ms_001", "ms_002"):
        touch(*(tmp_path / f"imagesTr/{case}_{number:04d}.nii.gz" for number in range(3)))
        touch(tmp_path / f"labelsTr/{case}.nii.gz")
    touch(*(tmp_path / f"imagesTs/ms_003_{number:04d}.nii.gz" for number in range(3)))
    found = discover(tmp_path)
    assert (found.layout, found.modalities) == ("nnunet", ("flair", "t1", "pet"))
    assert names(found)["ms_002"] == {
        "flair": "imagesTr/ms_002_0000.nii.gz",
        "t1": "imagesTr/ms_002_0001.nii.gz",
        "pet": "imagesTr/ms_002_0002.nii.gz",
        "label": "labelsTr/ms_002.nii.gz",
    }
    assert [case.section for case in found.cases] == ["training", "training", "test"]
    assert found.label_names == {0: "background", 1: "lesion", 2: "danger"}
    assert any("says 9 training cases, 2 are here" in note for note in found.notes)
    assert any("without $, @ and %: danger" in note for note in found.notes)
    assert discover(tmp_path / "dataset.json").cases == found.cases


def test_nnunet_that_does_not_fit(tmp_path: Path) -> None:
    dataset_json(tmp_path, {"channel_names": {"0": "FLAIR", "1": "T1"}, "labels": {"background": 0}})
    assert "does not fit the files: there is no volume in" in problem(tmp_path)
    touch(*(tmp_path / f"imagesTr/{name}.nii.gz" for name in ("a_0000", "a_0001", "b_0000", "b_0007", "c")))
    touch(*(tmp_path / f"labelsTr/{name}.nii.gz" for name in ("a", "b", "z")))
    text = problem(tmp_path)
    assert re.search(r"b_0007.nii.gz fits no channel of dataset.json: expected names that end in _0000, _0001", text)
    assert re.search(r"c.nii.gz fits no channel", text)
    assert "1 labels have no image in" in text
    (tmp_path / "imagesTr/b_0007.nii.gz").unlink()
    (tmp_path / "imagesTr/c.nii.gz").unlink()
    (tmp_path / "labelsTr/z.nii.gz").unlink()
    assert "t1 is missing in 1 of 2 cases: b" in problem(tmp_path)
    found = discover(tmp_path, allow_missing=True)
    assert list(names(found)["b"]) == ["flair", "label"]
    assert any(note.startswith("t1 is missing in 1 of 2 cases: b") for note in found.notes)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"channel_names": {"a": "FLAIR"}}, "expected numbers with names"),
        ({"channel_names": {}}, "expected numbers with names"),
        ({"channel_names": {"0": "CT", "1": "PET"}, "labels": [1]}, "expected values with names"),
        ({"channel_names": {"0": "CT", "1": "PET"}, "labels": {"x": "y"}}, "expected a whole number and a name"),
    ],
)
def test_dataset_json_that_says_nothing(tmp_path: Path, content: dict[str, Any], text: str) -> None:
    dataset_json(tmp_path, content)
    assert text in problem(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    assert "is no JSON file" in problem(tmp_path)


def test_nnunet_with_regions_and_equal_channels(tmp_path: Path) -> None:
    content = {
        "channel_names": {"0": "zscore", "1": "zscore"},
        "labels": {"background": 0, "whole": [1, 2], "core": [2]},
    }
    dataset_json(tmp_path, content)
    touch(tmp_path / "imagesTr/a_0000.mha", tmp_path / "imagesTr/a_0001.mha", tmp_path / "labelsTr/a.mha")
    found = discover(tmp_path)
    assert found.modalities == ("zscore_0", "zscore_1")
    assert found.label_names == {0: "background", 2: "core"}
    assert "dataset.json joins label values to regions: whole=1,2; core=2." in found.notes
    assert found.label_regions == {"whole": (1, 2), "core": (2,)}
    dataset_json(tmp_path, content | {"labels": {"a b": [1, 2], "a_b": 1, "a-b": 2, "mean": 3, "3x": 3, "Ignore": 4}})
    found = discover(tmp_path)
    assert found.label_regions == {"a_b": (1, 2), "a_b_2": (1,), "a_b_3": (2,), "region_mean": (3,), "region_3x": (3,)}
    assert found.label_names == {1: "a_b", 2: "a-b", 3: "3x", 4: "Ignore"}
    dataset_json(tmp_path, content | {"labels": {"background": 0, "whole": 1, "core": [2]}})
    assert (found := discover(tmp_path)).label_regions == {}
    assert found.label_names == {0: "background", 1: "whole", 2: "core"}
    dataset_json(tmp_path, content | {"labels": {"background": 0, "whole": [1, "2"]}})
    assert "region 'whole': [1, '2'], expected whole numbers above 0" in problem(tmp_path)
    for values in ([0, 1], []):
        dataset_json(tmp_path, content | {"labels": {"background": 0, "x": values, "y": [1, 2]}})
        text = f"region 'x': {values}, expected whole numbers above 0, the background"
        assert problem(tmp_path).endswith(text)


def test_nnunet_with_files_elsewhere(tmp_path: Path) -> None:
    touch(*(tmp_path / "other" / name for name in ("a.nii.gz", "b.nii.gz", "c.nii.gz")))
    entry = {"images": ["../other/a.nii.gz", "../other/b.nii.gz"], "label": "../other/c.nii.gz"}
    content = {"channel_names": {"0": "CT", "1": "PET"}, "dataset": {"x": entry}}
    dataset_json(tmp_path / "set", content)
    (case,) = discover(tmp_path / "set").cases
    assert {key: source.path.name for key, source in case.sources().items()} == {
        "ct": "a.nii.gz",
        "pet": "b.nii.gz",
        "label": "c.nii.gz",
    }
    content["dataset"] = {"x": {"images": ["../other/a.nii.gz"]}, "y": {}}
    dataset_json(tmp_path / "set", content)
    text = problem(tmp_path / "set")
    assert "case x: has 1 images, expected 2" in text
    assert "case y: expected 'images'" in text


def decathlon(folder: Path, channels: int = 4) -> None:
    content = {
        "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
        "labels": {"0": "background", "1": "edema", "2": "tumor"},
        "training": [
            {"image": f"./imagesTr/BRATS_00{n}.nii.gz", "label": f"./labelsTr/BRATS_00{n}.nii.gz"} for n in (1, 2)
        ],
        "test": ["./imagesTs/BRATS_003.nii.gz"],
        "numTraining": 2,
    }
    dataset_json(folder, content)
    for number, part in ((1, "Tr"), (2, "Tr"), (3, "Ts")):
        image(folder / f"images{part}/BRATS_00{number}.nii.gz", seed=number, shape=(*SHAPE, channels))
        label(folder / f"labels{part}/BRATS_00{number}.nii.gz")


@pytest.mark.parametrize("listed", [True, False])
def test_decathlon(tmp_path: Path, listed: bool) -> None:
    decathlon(tmp_path)
    if not listed:
        content = json.loads((tmp_path / "dataset.json").read_text())
        dataset_json(tmp_path, {key: content[key] for key in ("modality", "labels")})
    found = discover(tmp_path)
    assert (found.layout, found.modalities) == ("msd", ("flair", "t1", "t1ce", "t2"))
    first = found.cases[0]
    assert [(source.path.name, source.channel) for source in first.images.values()] == [
        ("BRATS_001.nii.gz", channel) for channel in range(4)
    ]
    assert first.label is not None
    assert first.label.path.relative_to(tmp_path).parts[-2:] == ("labelsTr", "BRATS_001.nii.gz")
    assert [(case.case_id, case.section) for case in found.cases] == [
        ("BRATS_001", "training"),
        ("BRATS_002", "training"),
        ("BRATS_003", "test"),
    ]
    assert found.label_names == {0: "background", 1: "edema", 2: "tumor"}
    assert discover(tmp_path, modalities=["t1gd", "flair"]).cases[0].images["t1ce"].channel == 2


def test_decathlon_that_does_not_fit(tmp_path: Path) -> None:
    decathlon(tmp_path, channels=3)
    (tmp_path / "labelsTr/BRATS_002.nii.gz").unlink()
    text = problem(tmp_path)
    assert "case BRATS_001: ./imagesTr/BRATS_001.nii.gz has 3 channels, expected 4 (" in text
    (tmp_path / "imagesTr/BRATS_002.nii.gz").unlink()
    assert "./imagesTr/BRATS_002.nii.gz is not there" in problem(tmp_path)


def test_bids(tmp_path: Path) -> None:
    for case in ("sub-01/ses-a", "sub-01/ses-b", "sub-02"):
        name = case.replace("/", "_")
        for suffix in ("FLAIR", "T1w", "ce-gadolinium_T1w"):
            touch(tmp_path / case / "anat" / f"{name}_{suffix}.nii.gz")
        touch(tmp_path / "derivatives/lesions" / case / "anat" / f"{name}_space-T1w_label-lesion_mask.nii.gz")
        touch(tmp_path / case / "func" / f"{name}_task-rest_bold.nii.gz")
        touch(tmp_path / "derivatives/bet" / case / "anat" / f"{name}_desc-brain_mask.nii.gz")
        touch(tmp_path / "derivatives/bet" / case / "anat" / f"{name}_desc-preproc_T1w.nii.gz")
    found = discover(tmp_path)
    assert (found.layout, found.modalities) == ("bids", ("flair", "t1", "t1ce"))
    assert {case.case_id: case.patient for case in found.cases} == {
        "sub-01_ses-a": "sub-01",
        "sub-01_ses-b": "sub-01",
        "sub-02": "sub-02",
    }
    assert names(found)["sub-01_ses-b"] == {
        "flair": "sub-01/ses-b/anat/sub-01_ses-b_FLAIR.nii.gz",
        "t1": "sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz",
        "t1ce": "sub-01/ses-b/anat/sub-01_ses-b_ce-gadolinium_T1w.nii.gz",
        "label": "derivatives/lesions/sub-01/ses-b/anat/sub-01_ses-b_space-T1w_label-lesion_mask.nii.gz",
    }
    touch(tmp_path / "sub-02/anat/sub-02_run-2_FLAIR.nii.gz")
    text = problem(tmp_path)
    assert (
        "case sub-02: 2 files may be flair, expected one (sub-02/anat/sub-02_FLAIR.nii.gz, "
        'sub-02/anat/sub-02_run-2_FLAIR.nii.gz; choose with --modality "flair=*[!n]??_FLAIR.nii.gz", for example)'
    ) in text
    assert names(discover(tmp_path, **advised(text)))["sub-02"]["flair"] == "sub-02/anat/sub-02_FLAIR.nii.gz"
    patterns = {"t1": "derivatives/bet/*_desc-preproc_T1w*", "flair": "*sub-0[12]*_FLAIR*"}
    assert "2 files may be flair" in problem(tmp_path, patterns=patterns)
    patterns["flair"] = "*[!2]_FLAIR*"
    with pytest.raises(DataError, match="flair is missing in 1 of 3 cases: sub-02"):
        discover(tmp_path, patterns=patterns)


def test_datalist(tmp_path: Path) -> None:
    touch(*(tmp_path / "d" / name for name in ("p1_a.nii.gz", "p1_b.nrrd", "m.nii.gz")))
    entry = {"t2": "d/p1_a.nii.gz", "adc": "d/p1_b.nrrd", "label": "d/m.nii.gz", "site": "A/B", "labels": "brats2018"}
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"training": [entry], "test": [{**entry, "case": "x", "patient": "y"}]}))
    found = discover(path)
    assert (found.layout, found.modalities) == ("datalist", ("t2", "adc"))
    one, other = found.cases
    assert (one.case_id, one.patient, one.section, one.convention) == ("p1", "p1", "training", "brats2018")
    assert (other.case_id, other.patient, other.section) == ("x", "y", "test")
    assert one.images["adc"].kind == "image"
    path.write_text(json.dumps({"training": [{"t2": "d/none.nii.gz"}, 3, {"case": 1, "t2": "d/m.nii.gz"}, {"a": "b"}]}))
    text = problem(path)
    assert f"case none: t2, of training[0], is not there ({tmp_path / 'd/none.nii.gz'})" in text
    assert "training[1]: is int, expected an object" in text
    assert "training[2]: 'case' is 1, expected a string" in text
    assert "training[3]: has keys a, expected one path a modality" in text
    path.write_text("[]")
    assert "is no datalist" in problem(path)


def test_datalist_with_one_image(tmp_path: Path) -> None:
    image(tmp_path / "p1.nii.gz", shape=(*SHAPE, 2))
    touch(tmp_path / "m.nii.gz", tmp_path / "q.nii.gz")
    path = tmp_path / "list.json"
    path.write_text(
        json.dumps(
            {
                "training": [
                    {"image": "p1.nii.gz", "label": "m.nii.gz"},
                    {"case": "l", "image": ["q.nii.gz", "m.nii.gz"], "label": "m.nii.gz"},
                ]
            }
        )
    )
    assert "'image' has 2 channels and nothing names them" in problem(path)
    assert "'image' has 2 channels and 3 modalities are named" in problem(path, modalities=["a", "b", "c"])
    first, second = discover(path, modalities=["CT", "PET"]).cases
    assert first.case_id == "p1"
    assert [source.channel for source in first.images.values()] == [0, 1]
    assert {key: source.path.name for key, source in second.images.items()} == {"ct": "q.nii.gz", "pet": "m.nii.gz"}


def test_folders_that_are_no_data_set(tmp_path: Path) -> None:
    assert "does not exist" in problem(tmp_path / "none")
    assert "holds no volume" in problem(tmp_path)
    touch(tmp_path / "readme.txt")
    assert "is neither a folder nor a .json file" in problem(tmp_path / "readme.txt")
    touch(tmp_path / "a.png", tmp_path / "b.JPG")
    assert "holds 2-D images only (a.png, b.JPG), expected 3-D volumes" in problem(tmp_path)
    touch(tmp_path / "volume7.nii.gz", tmp_path / "volume8.nii.gz")
    assert "no modality in" in problem(tmp_path, need_label=False)
    assert "volume7.nii.gz" in problem(tmp_path)


def test_two_layouts(tmp_path: Path) -> None:
    dataset_json(tmp_path, {"channel_names": {"0": "CT", "1": "PET"}})
    touch(tmp_path / "sub-01/anat/sub-01_T1w.nii.gz")
    assert "looks like two layouts: nnU-Net or Decathlon (dataset.json) and BIDS (sub-*)" in problem(tmp_path)
    other = tmp_path / "other"
    touch(*(other / f"case1/{name}.nii.gz" for name in ("flair", "t1", "seg")))
    touch(*(other / f"p{n}_{name}.nii.gz" for n in (1, 2) for name in ("flair", "t1", "seg")))
    assert "looks like two layouts: a folder a case" in problem(other)
    third = tmp_path / "third"
    for name in ("Dataset001_A", "Dataset002_B"):
        dataset_json(third / name, {"channel_names": {"0": "CT"}})
        touch(third / name / "imagesTr/a_0000.nii.gz")
    assert "holds other data sets, each with a dataset.json: Dataset001_A, Dataset002_B" in problem(third)
    (third / "Dataset001_A/dataset.json").unlink()
    assert "has imagesTr and no dataset.json" in problem(third / "Dataset001_A")


def test_one_modality_and_labels(tmp_path: Path) -> None:
    for case in ("a", "b", "c"):
        touch(tmp_path / case / "flair.nii.gz", tmp_path / case / "seg.nii.gz")
    one = f"{tmp_path} has one modality only (flair), expected two or more"
    assert problem(tmp_path) == f"{one}: there are no other volumes"
    touch(tmp_path / "a" / "anat1.nii.gz", tmp_path / "b" / "first.nii.gz")
    assert problem(tmp_path) == (
        f"{one}: of the volumes that were ignored (anat1.nii.gz, first.nii.gz) choose some with --modality "
        '"t1=*_T1*", for example'
    )
    assert problem(tmp_path, modalities=["flair"]) == (
        f"one modality only (flair) is asked for in {tmp_path}, expected two or more"
    )
    touch(*(tmp_path / case / "t1.nii.gz" for case in ("a", "b")))
    (tmp_path / "b" / "seg.nii.gz").unlink()
    text = problem(tmp_path)
    assert f"t1 is missing in 1 of 3 cases: c ({tmp_path / 'c'})" in text
    assert text.splitlines()[-1] == (
        f"  label is missing in 1 of 3 cases: b ({tmp_path / 'b'}), expected one a case: add it, take the case out, or "
        'choose it with a pattern that fits all labels, such as --label "*_seg*" (not used there: first.nii.gz)'
    )
    assert [case.label is None for case in discover(tmp_path, need_label=False, allow_missing=True).cases] == [
        False,
        True,
        False,
    ]
    for case in ("a", "c"):
        (tmp_path / case / "seg.nii.gz").unlink()
    text = problem(tmp_path, allow_missing=True)
    assert text.startswith(
        f"no case in {tmp_path} has a label: expected a file with seg, mask, label or lesion in its name, found "
        'anat1.nii.gz, first.nii.gz; give a pattern, such as --label "*expert*"; '
    )
    (tmp_path / "a" / "anat1.nii.gz").unlink()
    (tmp_path / "b" / "first.nii.gz").unlink()
    assert "in its name, found files of modalities alone; give" in problem(tmp_path, allow_missing=True)
    assert discover(tmp_path, need_label=False, allow_missing=True).modalities == ("flair", "t1")


def test_a_modality_that_no_new_case_has(tmp_path: Path) -> None:
    """New cases may lack it; that a pattern fits nothing is a slip all the same."""
    for case in ("a", "b"):
        touch(*(tmp_path / case / f"{name}.nii.gz" for name in ("flair", "t2")))
    new: dict[str, Any] = {"need_label": False, "allow_missing": True}
    found = discover(tmp_path, modalities=["flair", "t1"], **new)
    assert found.modalities == ("flair", "t1")
    assert [note for note in found.notes if note.startswith("t1 ")] == ["t1 is in no case."]
    assert [list(case.images) for case in found.cases] == [["flair"]] * 2
    told = f"no t1 in {tmp_path}: its modalities are flair, t2"
    assert problem(tmp_path, modalities=["flair", "t1"], need_label=False) == told
    assert problem(tmp_path, modalities=["t1", "adc"], **new) == told.replace("t1", "t1, adc", 1)
    told = f"t1 is in no case of {tmp_path}: no file fits the pattern *T1*"
    assert problem(tmp_path, patterns={"t1": "*T1*"}, **new) == told


@pytest.mark.parametrize("name", ["p{}", "p{}_img"])
@pytest.mark.parametrize("masks", [True, False])
def test_files_with_channels_that_nothing_names(tmp_path: Path, name: str, masks: bool) -> None:
    for number in (1, 2):
        image(tmp_path / f"{name.format(number)}.nii.gz", shape=(*SHAPE, 2))
        if masks:
            label(tmp_path / f"p{number}_seg.nii.gz")
    first = f"{name.format(1)}.nii.gz"
    told = (
        f"; {first} has 2 channels: name them in a dataset.json, or with --modalities for a datalist that has one such "
        "file a case under image"
    )
    assert problem(tmp_path).endswith(told)
    text = problem(tmp_path, modalities=["t2", "adc"])
    assert text.endswith(told)
    if masks and "img" not in name:
        files = "names of volumes tell none (p1.nii.gz, p2.nii.gz)"
        assert text == f"no t2, adc in {tmp_path}: {files}{told}"
        assert problem(tmp_path) == f"{tmp_path} has no modality by name, expected two or more{told}"


def test_unclear_names(tmp_path: Path) -> None:
    for case in ("a", "b"):
        touch(*(tmp_path / case / f"{name}.nii.gz" for name in ("flair", "t1_t2", "t1", "seg")))
    told = 'a/t1_t2.nii.gz and 1 more may be t1 or t2 by name: give patterns, such as --modality "t1=*T1*"'
    assert told in problem(tmp_path)
    assert told in problem(tmp_path, modalities=["flair", "t1"])
    assert "one modality only" in problem(tmp_path, modalities=["flair"])  # and no word of what is not asked for
    other = tmp_path / "other"
    for case in ("a", "b"):
        touch(other / case / "flair.nii.gz", other / case / "t1.nii.gz")
        label(other / case / "reader1.nii.gz")
        label(other / case / "reader2.nii.gz")
    assert "no file name tells the label, and reader1, reader2 all hold few whole numbers" in problem(other)


def test_names_that_a_configuration_would_evaluate(tmp_path: Path) -> None:
    folder = tmp_path / "%data"
    odd = ["$import", "@ref", "100%", "Müller, J", "a b", "a_b", "..", "A_B", "NUL", "con.1"]
    for name in odd:
        place = folder / (name if name != ".." else "x..y")
        touch(*(place / f"{key}.nii.gz" for key in ("$flair", "@t1", "seg%")))
    found = discover(folder)
    ids = [case.case_id for case in found.cases]
    assert len(set(map(str.casefold, ids))) == len(ids) - 1  # only a_b and A_B, which were safe as they were
    assert all(is_safe_id(case.case_id) and is_safe_id(case.patient) for case in found.cases)
    assert {"import", "ref", "100", "Muller_J", "a_b", "A_B", "a_b_2", "x.y", "case_NUL", "case_con.1"} == set(ids)
    (note,) = [note for note in found.notes if "were changed" in note]
    assert "'$import' is import" in note
    assert found.modalities == ("flair", "t1")


def test_ids_that_two_cases_share(tmp_path: Path) -> None:
    touch(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz")
    entry = {"case": "p", "ct": "a.nii.gz", "pet": "b.nii.gz", "label": "a.nii.gz"}
    (tmp_path / "list.json").write_text(json.dumps({"training": [entry, entry]}))
    assert "case p: 2 cases have this ID, expected one" in problem(tmp_path / "list.json")


def test_links_in_the_source(tmp_path: Path) -> None:
    for case in ("a", "b"):
        touch(*(tmp_path / "store" / case / f"{name}.nii.gz" for name in ("ct", "pet", "seg")))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "part").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "a" / "up").symlink_to(tmp_path / "store")
    assert list(names(discover(tmp_path / "data"))) == ["a", "b"]


def test_brats_is_found_as_by_the_reader_of_brats(real_data: Path) -> None:
    folder = real_data / "brats_2mm"
    if not folder.is_dir():
        pytest.skip("needs the folder brats_2mm among the real cases")
    found = discover(folder)
    known = find_cases(folder, found.modalities)
    assert [(c.case_id, c.patient) for c in found.cases] == [(c.case_id, c.patient) for c in known]
    for one, other in zip(found.cases, known, strict=True):
        assert {key: source.path for key, source in one.sources().items()} == {**other.images, "label": other.label}


# ---------------------------------------------------------------------- two files for one name

REG, SEG2 = "_T2_reg.nii.gz", "_seg_v2.nii.gz"
WHOLE = ("_T1.nii.gz", "_T2.nii.gz", "_seg.nii.gz")


def rivals(first: str, second: str, advice: str, key: str = "t2") -> str:
    """The sentence, without the folder that files may be in."""
    return f"case p01: 2 files may be {key}, expected one ({first}, {second}; choose with {advice}, for example)"


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ([f"p01{REG}"], rivals("p01_T2.nii.gz", f"p01{REG}", '--modality "t2=*_T2.nii.gz"')),
        ([f"p01{SEG2}"], rivals("p01_seg.nii.gz", f"p01{SEG2}", '--label "*_seg.nii.gz"', "label")),
    ],
)
def test_two_files_whose_names_hold_the_id(tmp_path: Path, flat: bool, more: list[str], sentence: str) -> None:
    """One sentence, neither two layouts nor a case p01_reg."""
    for name in [f"{case}{end}" for case in ("p01", "p02") for end in WHOLE] + more:
        touch(tmp_path / ("" if flat else name[:3]) / name)
    assert problem(tmp_path).replace("p01/", "") == sentence


def test_two_files_of_one_case_alone(tmp_path: Path) -> None:
    """Also in a folder that has another name, with two versions and no plain file, and with the ID behind a letter."""
    touch(*(tmp_path / "one" / f"p01{end}" for end in (*WHOLE, REG)))
    assert problem(tmp_path / "one") == rivals("p01_T2.nii.gz", f"p01{REG}", '--modality "t2=*_T2.nii.gz"')
    for folder, case in (("x", "p01"), ("y", "p02")):
        touch(*(tmp_path / "two" / folder / f"{case}{end}" for end in ("_T1.nii.gz", "_T2_n4.nii.gz", "_seg.nii.gz")))
    touch(tmp_path / "two" / "x" / f"p01{REG}")
    expected = f'case x: 2 files may be t2, expected one (x/p01_T2_n4.nii.gz, x/p01{REG}; choose with --modality "t2=*_'
    assert problem(tmp_path / "two").startswith(expected)
    touch(*(tmp_path / "three" / case / f"{case}{end}" for case in ("p01", "p02") for end in WHOLE))
    touch(tmp_path / "three/p01/rp01_T2.nii.gz")
    assert '(p01/p01_T2.nii.gz, p01/rp01_T2.nii.gz; choose with --modality "t2=???_T2.nii.gz"' in problem(
        tmp_path / "three"
    )


def advised(text: str) -> dict[str, Any]:
    """The arguments of discover that a message advises as options of the command line."""
    (advice,) = set(re.findall("choose with (.*?), for example", text))
    words = shlex.split(advice)
    given = list(zip(words[::2], words[1::2], strict=True))
    told: dict[str, Any] = {"patterns": dict(value.split("=", 1) for key, value in given if key == "--modality")}
    told["label_pattern"] = dict(given).get("--label")
    told["modalities"] = dict(given).get("--modalities", "").split(",") if "--modalities" in dict(given) else None
    return told


FOUR = ("p01", "p02", "p03", "p04")
TEN = tuple(f"p{number}" for number in (1, 2, 14, 110))


@pytest.mark.parametrize(
    ("cases", "more", "advice", "flat"),
    [
        (FOUR, ["p01_t2_reg"], '--modality "t2=*_t2.nii.gz"', True),
        (FOUR, ["p01_t2_reg"], '--modality "t2=*_t2.nii.gz"', False),
        (FOUR, ["p02_mask"], '--label "*_seg.nii.gz"', True),
        (FOUR, ["p02_mask"], '--label "*_seg.nii.gz"', False),
        (FOUR, ["p02_seg_old", "p04_label"], '--label "*_seg.nii.gz"', True),
        (FOUR, ["p02_seg_old", "p04_label"], '--label "*_seg.nii.gz"', False),
        (FOUR, ["p02_n4_t1"], '--modality "t1=???_t1.nii.gz"', False),
        (FOUR, ["p03_a_t1", "p03_z_t1"], '--modality "t1=???_t1.nii.gz"', False),
        (
            FOUR,
            ["p02_n4_t1", "p02_t2_reg"],
            '--modality "t1=???_t1.nii.gz" --modality "t2=*_t2.nii.gz" --modalities t1,t2,',
            False,
        ),
        (TEN, ["p14_n4_t1"], '--modality "t1=*[!n]?_t1.nii.gz"', False),
        (TEN, ["p14_n4_t1", "p14_mask"], '--label "*_seg.nii.gz" --modality "t1=*[!n]?_t1.nii.gz"', False),
        (("q1", "q2", "q34"), ["q34_zz_t1"], '--modality "t1=*[!z]_t1.nii.gz"', False),  # no *[!4]_t1, the odd one
        (("n_1", "n_2", "n_3"), ["n_2_raw_t2"], '--modality "t2=???_t2.nii.gz"', False),
    ],
)
def test_the_pattern_that_was_advised_chooses(
    tmp_path: Path, cases: tuple[str, ...], more: list[str], advice: str, flat: bool
) -> None:
    """In the other cases too, which lack the file that is one too many."""
    plain = [f"{case}_{key}" for case in cases for key in ("t1", "t2", "seg")]
    for name in plain + more:
        case = next(case for case in reversed(cases) if name.startswith(case))
        touch(tmp_path / ("" if flat else case) / f"{name}.nii.gz")
    text = problem(tmp_path)
    assert f"choose with {advice}" in text
    found = discover(tmp_path, **advised(text))
    assert found.modalities == ("t1", "t2")
    assert sorted(case.case_id for case in found.cases) == sorted(cases)
    assert sorted(Path(file).name for files in names(found).values() for file in files.values()) == sorted(
        f"{name}.nii.gz" for name in plain
    )


def test_advice_that_cannot_suit_all_cases_says_so(tmp_path: Path) -> None:
    for number in range(1, 6):
        runs = ("run-1_T2w", "run-2_T2w") if number > 3 else ("T2w",)
        for name in ("FLAIR", *runs, "dseg"):
            touch(tmp_path / f"sub-{number}/anat/sub-{number}_{name}.nii.gz")
    text = problem(tmp_path)
    assert (
        'choose with --modality "t2=*_run-1_T2w.nii.gz", for example; 3 cases have no such t2, or two: rename th'
        in text
    )
    assert "t2 is missing in 3 of 5 cases" in problem(tmp_path, patterns={"t2": "*_run-1_T2w.nii.gz"})


def test_patterns_are_tried_on_all_files_a_few_times_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that differ in each case would else take time with the square of the cases."""
    tried: Counter[str] = Counter()
    fits = found_module.fits
    monkeypatch.setattr(found_module, "fits", lambda path, root, p: tried.update([p]) or fits(path, root, p))
    cases = 60
    for number in range(cases):
        for name in (f"{7919 * number}_T1_se", f"{7919 * number + 1}_T1_tse", "FLAIR", "seg"):
            touch(tmp_path / f"p{number}/{name}.nii.gz")
    assert f"so in {cases - 1} more cases" in problem(tmp_path)
    assert sum(count > cases for count in tried.values()) <= 40


def test_one_odd_modality_does_not_spoil_the_advice_for_another(tmp_path: Path) -> None:
    """The tries are counted by modality, and what was not tried is not counted as lost."""
    cases = []
    for number in range(60):
        odd = [Source(tmp_path / f"p{number}_t1_{7919 * number + more}.nii") for more in range(1 + (number < 50))]
        t2 = [Source(tmp_path / f"p{number}_t2{more}.nii") for more in ("", "_reg")]
        cases.append({"t1": odd, "t2": t2})
    files = found_module.CasesFiles(cases, tmp_path)
    tried = [files.best("t1", [f"*_{7919 * number}.nii"]) for number in range(50)]
    assert tried[:40] == [(f"*_{7919 * number}.nii", 59) for number in range(40)]
    assert tried[40:] == [(f"*_{7919 * number}.nii", 0) for number in range(40, 50)]
    assert files.best("t2", ["*_t2.nii"]) == ("*_t2.nii", 0)


def test_the_advised_pattern_leaves_files_of_no_case_alone(tmp_path: Path) -> None:
    """It would be as good by the file of a template, which is in no case as long as no pattern fits it."""
    for case in ("a1", "b2"):
        touch(*(tmp_path / case / f"{name}.nii.gz" for name in ("T1_mni", "T1_own", "flair", "seg")))
    touch(tmp_path / "T1_mni.nii.gz")
    text = problem(tmp_path)
    assert '--modality "t1=T1_own.nii.gz"' in text
    assert "Ignored: 1 volumes that are no modality by name: T1_mni.nii.gz." not in text
    assert {files["t1"] for files in names(discover(tmp_path, **advised(text))).values()} == {
        "a1/T1_own.nii.gz",
        "b2/T1_own.nii.gz",
    }


@pytest.mark.parametrize("flat", [True, False])
def test_a_pattern_for_one_modality_leaves_the_others_to_their_names(tmp_path: Path, flat: bool) -> None:
    for name in [f"{case}{end}" for case in ("p01", "p02") for end in (*WHOLE, "_FLAIR.nii.gz")] + [f"p01{REG}"]:
        touch(tmp_path / ("" if flat else name[:3]) / name)
    found = discover(tmp_path, patterns={"t2": "*_T2.nii.gz"})
    assert found.modalities == ("flair", "t1", "t2")  # the others by their names
    assert [case.case_id for case in found.cases] == ["p01", "p02"]
    assert names(found)["p01"]["t2"].endswith("p01_T2.nii.gz")
    assert any("Ignored: 1 volumes" in note and REG in note for note in found.notes)
    several = {"t2": "*_T2.nii.gz", "t1": "*_T1.nii.gz"}
    assert discover(tmp_path, patterns=several).modalities == ("t2", "t1")  # only these
    assert discover(tmp_path, patterns=several, modalities=["flair", "t2"]).modalities == ("flair", "t2")
    assert "t2 is missing in 1 of 2 cases: p02" in problem(tmp_path, patterns={"t2": "*_reg.nii.gz"})
    assert "t2 is in no case of" in problem(tmp_path, patterns={"t2": "*_none.nii.gz"})


def test_several_modalities_with_two_files(tmp_path: Path) -> None:
    """Patterns for some modalities need the names of all, or the others would be left out."""
    for case in ("p01", "p02"):
        touch(*(tmp_path / f"{case}_{name}.nii.gz" for name in ("T1", "T1_n4", "T2", "T2_n4", "FLAIR", "seg")))
    advice = '--modality "t1=*_T1.nii.gz" --modality "t2=*_T2.nii.gz" --modalities flair,t1,t2, for example'
    assert problem(tmp_path).count(advice) == 2
    patterns = {"t1": "*_T1.nii.gz", "t2": "*_T2.nii.gz"}
    assert discover(tmp_path, patterns=patterns, modalities=["flair", "t1", "t2"]).modalities == ("flair", "t1", "t2")


@pytest.mark.parametrize("case", ["p{}", "."])
@pytest.mark.parametrize(
    "versions", [("T1", "T1_n4", "FLAIR", "FLAIR_n4", "seg"), ("T1", "T1_reg", "seg", "seg_reg", "T2")]
)
def test_versions_of_files_without_an_id_are_no_cases(tmp_path: Path, versions: tuple[str, ...], case: str) -> None:
    """Two versions of each file are not two patients, of whom one trains and the other tests."""
    for number in (1, 2, 3):
        touch(*(tmp_path / case.format(number) / f"{name}.nii.gz" for name in versions))
    first = "p1" if case == "p{}" else tmp_path.name
    for need_label in (True, False):
        text = problem(tmp_path, need_label=need_label)
        assert f"case {first}: 2 files may be t1, expected one (" in text
        assert "is missing" not in text
    patterns = {key: f"{key.upper()}.nii.gz" for key in ("t1", "flair" if "FLAIR" in versions else "t2")}
    found = discover(tmp_path, patterns=patterns, label_pattern="seg.nii.gz")
    assert [case.case_id for case in found.cases] == (["p1", "p2", "p3"] if case == "p{}" else [first])


@pytest.mark.parametrize(
    ("visits", "patients"),
    [
        (("p01_ses1", "p01_ses2", "p02_ses1"), ("p01", "p01", "p02")),
        (("patient1_baseline", "patient1_followup", "patient2_baseline"), ("patient1", "patient1", "patient2")),
        (("sub-01_ses-1", "sub-01_ses-2", "sub-02_ses-1"), ("sub-01", "sub-01", "sub-02")),
        (("p1-month06", "p1-month12", "p2-month06"), ("p1", "p1", "p2")),
        (("p01_20200131", "p01_20210228", "p02_20200131"), ("p01", "p01", "p02")),
        (("p01_visit1_week2", "p01_visit2_week1", "p02_visit1_week2"), ("p01", "p01", "p02")),
        (("stroke_w_fu1", "stroke_w_fu2", "other_fu1"), ("stroke_w_fu1", "stroke_w_fu2", "other_fu1")),
    ],
)
@pytest.mark.parametrize("flat", [True, False])
def test_time_points_in_names_are_one_patients(
    tmp_path: Path, visits: tuple[str, ...], patients: tuple[str, ...], flat: bool
) -> None:
    for visit in visits:
        place = tmp_path if flat else tmp_path / visit
        touch(*(place / (f"{visit}_{name}.nii.gz" if flat else f"{name}.nii.gz") for name in ("FLAIR", "T1", "seg")))
    found = discover(tmp_path)
    assert {case.case_id: case.patient for case in found.cases} == dict(zip(visits, patients, strict=True))
    told = f"One patient by name: {patients[0]} ({visits[0]}, {visits[1]})."
    assert (sorted(visits) == list(visits) and told in found.notes) == (len(set(patients)) < 3)


@pytest.mark.parametrize(
    "names_of",
    [
        lambda case: [f"{name}_{version}" for version in ("native", "mni") for name in ("T1", "FLAIR", "seg")],
        lambda case: [f"{case}_{name}{version}" for version in ("", "_reg") for name in ("T1", "FLAIR", "seg")],
    ],
)
def test_what_lies_in_a_patients_folder_is_that_patients(tmp_path: Path, names_of: Callable[[str], list[str]]) -> None:
    for case in ("p01", "p02", "p03"):
        touch(*(tmp_path / case / f"{name}.nii.gz" for name in names_of(case)))
    found = discover(tmp_path)
    assert len(found.cases) == 6
    assert Counter(case.patient for case in found.cases) == {"p01": 2, "p02": 2, "p03": 2}


def test_folders_of_sites_are_no_patients(tmp_path: Path) -> None:
    for site in ("north", "south"):
        for case in ("p01", "p02", "p03"):
            touch(*(tmp_path / site / f"{case}_{name}.nii.gz" for name in ("T1", "FLAIR", "seg")))
    assert len({case.patient for case in discover(tmp_path).cases}) == 6


def test_running_numbers_are_no_time_points(tmp_path: Path) -> None:
    for case in ("site1_post_001", "site1_post_002", "site2_pre_001"):
        touch(*(tmp_path / case / f"{name}.nii.gz" for name in ("T1", "FLAIR", "seg")))
    assert {case.patient for case in discover(tmp_path).cases} == {"site1_post_001", "site1_post_002", "site2_pre_001"}


def test_a_pattern_finds_patients_that_names_do_not_tell(tmp_path: Path) -> None:
    for case in ("A7x", "A7y", "B7x", "C12z"):
        touch(*(tmp_path / case / f"{name}.nii.gz" for name in ("T1", "FLAIR", "seg")))
    patients = {"A7x": "A7", "A7y": "A7", "B7x": "B7", "C12z": "C12"}
    for pattern in (r"[A-Z]\d+", r"^([A-Z]\d+)[a-z]$"):
        found = discover(tmp_path, patient_pattern=pattern)
        assert {case.case_id: case.patient for case in found.cases} == patients
        assert "One patient by name: A7 (A7x, A7y)." in found.notes
    assert [case.patient for case in discover(tmp_path).cases] == list(patients)
    text = problem(tmp_path, patient_pattern=r"\d\d")
    assert text == r"A7x, A7y, B7x fit no patient pattern '\\d\\d': expected all 4 IDs to"
    assert "is no regular expression: " in problem(tmp_path, patient_pattern="(")
    assert "A7x, A7y, B7x, C12z fit no patient pattern 'x*'" in problem(tmp_path, patient_pattern="x*")
    either = discover(tmp_path, patient_pattern=r"(A\d+)|([BC]\d+)")
    assert {case.case_id: case.patient for case in either.cases} == patients
    # Over what a datalist says.
    files = {key: "A7x/T1.nii.gz" for key in ("t1", "flair", "label")}
    cases = [{"case": case, "patient": case, **files} for case in patients]
    (tmp_path / "list.json").write_text(json.dumps({"training": cases}))
    listed = discover(tmp_path / "list.json", patient_pattern=".(.)")
    assert [case.patient for case in listed.cases] == ["7", "7", "7", "1"]


def test_studies_in_patients_folders_some_of_which_have_one(tmp_path: Path) -> None:
    """As PI-CAI's: a patient's folder, whose files begin with the study."""
    studies = ("10000_1000000", "10005_1000005", "10005_1000006", "10011_1000011")
    for study in studies:
        touch(*(tmp_path / study[:5] / f"{study}_{name}.mha" for name in ("t2w", "adc", "seg")))
    found = discover(tmp_path)
    assert {case.case_id: case.patient for case in found.cases} == {study: study[:5] for study in studies}
    assert names(found)["10005_1000006"]["adc"] == "10005/10005_1000006_adc.mha"
    touch(*(tmp_path / "other" / f"{name}.mha" for name in ("t2w", "adc", "seg")))
    assert "looks like two layouts: a folder a case" in problem(tmp_path)


def test_two_labels_of_one_case_that_dataset_json_describes(tmp_path: Path) -> None:
    dataset_json(tmp_path / "nnunet", {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "x": 1}})
    touch(*(tmp_path / "nnunet" / f"imagesTr/a_000{channel}.nii.gz" for channel in (0, 1)))
    rivals = [tmp_path / f"nnunet/labelsTr/a.{ending}" for ending in ("nii.gz", "nrrd")]
    touch(*rivals)
    text = f"case a: {rivals[1]} and {rivals[0]} are both its label, expected one file"
    assert text in problem(tmp_path / "nnunet")
    decathlon(tmp_path / "msd")
    dataset_json(tmp_path / "msd", {"modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}})
    label(tmp_path / "msd/labelsTr/BRATS_001.nii")
    assert "case BRATS_001: " in problem(tmp_path / "msd")
    assert "are both its label, expected one file" in problem(tmp_path / "msd")


def test_patterns_have_no_say_where_a_file_describes_the_data(tmp_path: Path) -> None:
    dataset_json(tmp_path, {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "x": 1}})
    touch(*(tmp_path / f"imagesTr/a_000{channel}.nii.gz" for channel in (0, 1)), tmp_path / "labelsTr/a.nii.gz")
    files = {"t1": "imagesTr/a_0000.nii.gz", "t2": "imagesTr/a_0001.nii.gz", "label": "labelsTr/a.nii.gz"}
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"case": "a", **files}]}))
    for source, file in ((tmp_path, "dataset.json"), (tmp_path / "list.json", "list.json")):
        for options, shown in (
            ({"label_pattern": "*roi*"}, "--label *roi*"),
            ({"patterns": {"t1": "*0*"}, "label_pattern": "*roi*"}, "--modality t1=*0*, --label *roi*"),
        ):
            text = f"{tmp_path / file} says which files are what, and so does {shown}: expected one of the two"
            assert text in problem(source, **options)
        assert discover(source, modalities=["t2", "t1"]).modalities == ("t2", "t1")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            {"labels": {"-1": "unknown", "0": "background", "1": "a"}},
            "labels unknown (-1) are negative, expected values of",
        ),
        ({"regions": {"a": [-1, 1]}}, "region 'a': [-1, 1], expected whole numbers above 0"),
        ({"regions": {"Ignore": [1], "b": [2]}}, "region 'Ignore': expected another name"),
        ({"regions": {"background": [1, 2]}}, "region 'background': expected another name"),
        ({"regions": [1]}, "regions are [1], expected names with label values"),
    ],
)
def test_labels_and_regions_of_a_datalist_that_cannot_be(tmp_path: Path, content: dict[str, Any], text: str) -> None:
    touch(*(tmp_path / f"{name}.nii.gz" for name in ("t1", "t2", "label")))
    entry = {"case": "a", **{key: f"{key}.nii.gz" for key in ("t1", "t2", "label")}}
    (tmp_path / "list.json").write_text(json.dumps({"training": [entry], **content}))
    assert text in problem(tmp_path / "list.json")
    for nothing in ({}, None):
        (tmp_path / "list.json").write_text(json.dumps({"training": [entry], "regions": nothing, "labels": nothing}))
        found = discover(tmp_path / "list.json")
        assert found.label_regions == {}
        assert not [note for note in found.notes if "egions" in note]


def test_test_cases_alone_do_not_train(tmp_path: Path) -> None:
    touch(*(tmp_path / f"{name}.nii.gz" for name in ("t1", "t2", "label")))
    entry = {"case": "a", **{key: f"{key}.nii.gz" for key in ("t1", "t2", "label")}}
    (tmp_path / "list.json").write_text(json.dumps({"test": [entry]}))
    assert problem(tmp_path / "list.json").endswith("has test cases only, expected some with a label to train with")
    assert len(discover(tmp_path / "list.json", need_label=False).cases) == 1


def test_time_points_in_nnunet(tmp_path: Path) -> None:
    dataset_json(tmp_path, {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "x": 1}})
    for case in ("p01_ses1", "p01_ses2", "p02_ses1"):
        touch(*(tmp_path / f"imagesTr/{case}_000{channel}.nii.gz" for channel in (0, 1)))
        touch(tmp_path / f"labelsTr/{case}.nii.gz")
    found = discover(tmp_path)
    assert [case.patient for case in found.cases] == ["p01", "p01", "p02"]
    assert "One patient by name: p01 (p01_ses1, p01_ses2)." in found.notes


def test_time_points_in_a_datalist(tmp_path: Path) -> None:
    """What it says of patients counts; of the others, their IDs tell."""
    touch(*(tmp_path / f"{name}.nii.gz" for name in ("t1", "t2", "label")))
    entry = {key: f"{key}.nii.gz" for key in ("t1", "t2", "label")}
    told = [("p01_ses1", None), ("p01_20200131", None), ("p02_ses1", None), ("p02_ses2", "other")]
    cases = [{"case": case, **({"patient": patient} if patient else {}), **entry} for case, patient in told]
    (tmp_path / "list.json").write_text(json.dumps({"training": cases}))
    found = discover(tmp_path / "list.json")
    assert [case.patient for case in found.cases] == ["p01", "p01", "p02", "other"]
    assert "One patient by name: p01 (p01_ses1, p01_20200131)." in found.notes
    assert [case.patient for case in find_cases(tmp_path / "list.json", ["t1", "t2"])] == ["p01", "p01", "p02", "other"]


def test_time_points_are_no_versions(tmp_path: Path) -> None:
    for name in ("p1_T1", "p1_T2", "p1_seg", "p1_2_T1", "p1_2_seg", "q_T1", "q_T2", "q_seg", "q_T1_2", "q_T2_2"):
        touch(tmp_path / f"{name}.nii.gz")
    touch(tmp_path / "q_seg_2.nii.gz")
    assert sorted(names(discover(tmp_path, allow_missing=True))) == ["p1", "p1_2", "q", "q_2"]


def test_a_pattern_in_bids(tmp_path: Path) -> None:
    for case in ("sub-01", "sub-02"):
        touch(*(tmp_path / case / "anat" / f"{case}_{name}.nii.gz" for name in ("FLAIR", "run-2_FLAIR", "T1w", "dseg")))
    found = discover(tmp_path, patterns={"flair": "*_run-2_FLAIR.nii.gz"})
    assert found.modalities == ("flair", "t1")
    assert names(found)["sub-02"]["flair"] == "sub-02/anat/sub-02_run-2_FLAIR.nii.gz"
    assert "Files: flair 2, t1 2, label 2." in found.notes


def test_a_bids_label_of_no_image_is_told(tmp_path: Path) -> None:
    """Its name lacks the session of the images."""
    for suffix in ("FLAIR", "T1w"):
        touch(tmp_path / f"sub-01/ses-a/anat/sub-01_ses-a_{suffix}.nii.gz")
    touch(tmp_path / "derivatives/manual/sub-01/anat/sub-01_dseg.nii.gz")
    notes = discover(tmp_path, need_label=False).notes
    assert "Ignored: 1 labels of no image, by subject and session: sub-01_dseg.nii.gz." in notes


# ---------------------------------------------------------------------- cases that the caller judges


def test_bad_cases_are_kept_for_callers_that_go_on_without_them(tmp_path: Path) -> None:
    touch(*(tmp_path / case / f"{name}.nii.gz" for case in ("a", "b") for name in ("ct", "pet", "seg")))
    touch(tmp_path / "a/pet_n4.nii.gz", tmp_path / "c/ct.nii.gz")
    found = discover(tmp_path, keep_bad=True)
    assert [len(case.problems) for case in found.cases] == [1, 0, 0]
    assert str(found.cases[0].errors()[0]).startswith("case a: 2 files may be pet, expected one (a/pet.nii.gz, ")
    assert [sorted(case.sources()) for case in found.cases[1:]] == [["ct", "label", "pet"], ["ct"]]
    assert discover(tmp_path, modalities=["ct"], keep_bad=True).modalities == ("ct",)
    assert discover(tmp_path, modalities=["ct", "mr"], keep_bad=True).modalities == ("ct", "mr")
    assert "no mr in" in problem(tmp_path, modalities=["mr"], keep_bad=True)
    entry = {"case": "p", "ct": "a/ct.nii.gz", "pet": "a/none.nii.gz"}
    (tmp_path / "list.json").write_text(json.dumps({"training": [entry, entry]}))
    for case in discover(tmp_path / "list.json", keep_bad=True).cases:
        assert [text for text, _ in case.problems][1] == "2 cases have this ID, expected one"


def test_no_case_at_all_is_an_error_also_where_bad_cases_are_kept(tmp_path: Path) -> None:
    """The same sentences as where they are not: files of labels alone make no case."""
    touch(*(tmp_path / case / f"{name}.nii.gz" for case in ("a", "b") for name in ("ct", "pet", "seg")))
    patterns = {"ct": "*XX*", "pet": "*YY*"}
    text = problem(tmp_path, patterns=patterns, keep_bad=True)
    assert text.splitlines()[1:] == [
        f"  ct is in no case of {tmp_path}: no file fits the pattern *XX*",
        f"  pet is in no case of {tmp_path}: no file fits the pattern *YY*",
    ]
    assert text == problem(tmp_path, patterns=patterns)
    kept = discover(tmp_path, patterns={**patterns, "pet": "pet*"}, keep_bad=True)
    assert [sorted(case.images) for case in kept.cases] == [["pet"], ["pet"]]


def test_cases_to_predict(tmp_path: Path) -> None:
    touch(*(tmp_path / case / f"{name}.nii.gz" for case in ("a", "b") for name in ("flair", "seg")))
    text = problem(tmp_path, need_label=False)
    assert "has one modality only (flair)" in text
    found = discover(tmp_path, need_label=False, allow_missing=True).to_predict()
    assert [(case.label, case.section) for case in found.cases] == [(None, "test")] * 2


def test_a_datalist_names_its_label_values_and_has_no_modality_mask(tmp_path: Path) -> None:
    touch(*(tmp_path / f"{name}.nii.gz" for name in ("ct", "pet", "mask", "seg", "p7_ct")))
    files = {key: f"{name}.nii.gz" for key, name in (("ct", "ct"), ("pet", "pet"), ("mask", "mask"), ("label", "seg"))}
    content = {"labels": {"0": "background", "1": "$node"}, "training": [{"case": "p", **files}]}
    (tmp_path / "list.json").write_text(json.dumps(content))
    found = discover(tmp_path / "list.json")
    assert (found.modalities, found.label_names) == (("ct", "pet"), {0: "background", 1: "node"})
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"ct": "p7_ct.nii.gz"}]}))
    assert discover(tmp_path / "list.json", keep_bad=True).cases[0].case_id == "p7"
