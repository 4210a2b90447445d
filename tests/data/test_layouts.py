# SPDX-License-Identifier: Apache-2.0
"""Layouts as data sets are released."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from monai_cggm.data.layouts import find_cases, is_safe_id
from monai_cggm.errors import DataError

MODALITIES = ["flair", "t1ce", "t1", "t2"]
NAMES_2018 = ["_flair.nii.gz", "_t1ce.nii.gz", "_t1.nii.gz", "_t2.nii.gz", "_seg.nii.gz"]
NAMES_2023 = ["-t2f.nii.gz", "-t1c.nii.gz", "-t1n.nii.gz", "-t2w.nii.gz", "-seg.nii.gz"]


def touch(folder: Path, *names: str) -> None:
    """Make empty files: finding cases does not open them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def touch_case(folder: Path, case_id: str, endings: list[str]) -> None:
    touch(folder / case_id, *(case_id + ending for ending in endings))


def datalist(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_nested_folders_of_2018(tmp_path: Path) -> None:
    touch_case(tmp_path / "HGG", "Brats18_2013_2_1", NAMES_2018)
    touch_case(tmp_path / "LGG", "Brats18_2013_0_1", NAMES_2018)
    low, high = find_cases(tmp_path, MODALITIES)
    assert (low.case_id, high.case_id) == ("Brats18_2013_0_1", "Brats18_2013_2_1")
    folder = tmp_path / "LGG" / "Brats18_2013_0_1"
    assert low.images == {m: folder / f"Brats18_2013_0_1_{m}.nii.gz" for m in MODALITIES}
    assert low.label == folder / "Brats18_2013_0_1_seg.nii.gz"
    assert low.as_dict() == {
        "case": "Brats18_2013_0_1",
        "patient": "Brats18_2013_0",
        "labels": "brats2018",
        **{m: str(path) for m, path in low.images.items()},
        "label": str(low.label),
    }


@pytest.mark.parametrize(
    ("case_id", "endings", "convention"),
    [
        ("BraTS2021_00000", NAMES_2018, "brats2018"),
        ("BraTS20_Training_001", [name.removesuffix(".gz") for name in NAMES_2018], "brats2018"),
        ("BraTS-GLI-00000-000", NAMES_2023, "brats2023"),
        ("BraTS-GLI-00000-000", NAMES_2018, "brats2023"),
        ("BraTS-GLI-00000-000", [name.replace("t2w", "t2W") for name in NAMES_2023], "brats2023"),
        ("Brats18_2013_2_1", [name.upper() for name in NAMES_2018], "brats2018"),
        ("site-A.patient_t1_07", NAMES_2018, None),
    ],
)
@pytest.mark.parametrize("flat", [False, True])
def test_names(tmp_path: Path, case_id: str, endings: list[str], convention: str | None, flat: bool) -> None:
    folder = tmp_path if flat else tmp_path / case_id
    touch(folder, *(case_id + ending for ending in endings))
    (case,) = find_cases(tmp_path, MODALITIES)
    assert case.case_id == case_id
    assert {m: path.name for m, path in case.images.items()} == {
        m: case_id + ending for m, ending in zip(MODALITIES, endings[:4], strict=True)
    }
    assert case.label == folder / (case_id + endings[4])
    assert case.convention == convention
    assert case.problems == ()


def test_conventions_may_mix_and_be_overruled(tmp_path: Path) -> None:
    touch_case(tmp_path, "Brats18_2013_2_1", NAMES_2018)
    touch_case(tmp_path, "BraTS-GLI-00000-000", NAMES_2018)
    assert [case.convention for case in find_cases(tmp_path, MODALITIES)] == ["brats2023", "brats2018"]
    assert {case.convention for case in find_cases(tmp_path, MODALITIES, labels="brats2024")} == {"brats2024"}
    with pytest.raises(ValueError, match="brats2022"):
        find_cases(tmp_path, MODALITIES, labels="brats2022")


@pytest.mark.parametrize("modalities", [["t2"], ["t1", "flair"], ["adc", "t1"]])
def test_only_the_asked_modalities(tmp_path: Path, modalities: list[str]) -> None:
    touch_case(tmp_path, "Brats18_2013_2_1", [*NAMES_2018, "_ADC.nii.gz"])
    (case,) = find_cases(tmp_path, modalities)
    assert list(case.images) == modalities


def test_a_missing_sequence_is_left_to_the_checks(tmp_path: Path) -> None:
    touch_case(tmp_path, "BraTS20_Training_355", ["_flair.nii", "_t1.nii"])
    touch(tmp_path / "BraTS20_Training_355", "W39_1998.09.19_Segm.nii")
    (case,) = find_cases(tmp_path, MODALITIES)
    assert list(case.images) == ["flair", "t1"]
    assert case.label is None
    assert case.strangers == ("W39_1998.09.19_Segm.nii",)
    assert "label" not in case.as_dict()


def test_two_files_for_one_sequence(tmp_path: Path) -> None:
    touch_case(tmp_path, "Brats18_2013_2_1", [*NAMES_2018, "_flair.nii", "-t1c.nii.gz"])
    (case,) = find_cases(tmp_path, MODALITIES)
    assert len(case.problems) == 2
    assert (
        "flair: 2 files (Brats18_2013_2_1_flair.nii, Brats18_2013_2_1_flair.nii.gz), expected one" in case.problems[0]
    )


def test_one_id_in_two_folders_stays_two_cases(tmp_path: Path) -> None:
    touch_case(tmp_path / "HGG", "Brats18_2013_2_1", NAMES_2018)
    touch_case(tmp_path / "LGG", "Brats18_2013_2_1", NAMES_2018)
    assert [case.case_id for case in find_cases(tmp_path, MODALITIES)] == ["Brats18_2013_2_1"] * 2


def test_links_hidden_folders_and_resource_forks(tmp_path: Path) -> None:
    touch_case(tmp_path / "store", "Brats18_2013_2_1", [*NAMES_2018])
    touch(tmp_path / "store" / "Brats18_2013_2_1", "._Brats18_2013_2_1_flair.nii.gz")
    touch_case(tmp_path / "data" / ".Brats18_2013_3_1.part", "Brats18_2013_3_1", NAMES_2018)
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "above").symlink_to(tmp_path / "data")
    (case,) = find_cases(tmp_path / "data", MODALITIES)
    assert case.case_id == "Brats18_2013_2_1"
    assert case.problems == ()


def test_folders_named_like_files(tmp_path: Path) -> None:
    """As some copies of BraTS 2020 unpack: a folder X_flair.nii is no image."""
    touch_case(tmp_path, "BraTS20_Training_001", NAMES_2018)
    (tmp_path / "BraTS20_Training_001" / "BraTS20_Training_001_flair.nii").mkdir()
    (case,) = find_cases(tmp_path, MODALITIES)
    assert case.problems == ()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no NIfTI file"),
        (["BRATS_001.nii.gz"], r"BRATS_001\.nii\.gz\. Data with one multi-channel file a case \(MSD Task01\)"),
        (["a_dwi.nii.gz"], r"expected files such as ID_flair\.nii\.gz"),
    ],
)
def test_nothing_found(tmp_path: Path, names: list[str], message: str) -> None:
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        find_cases(tmp_path, MODALITIES)


def test_no_such_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        find_cases(tmp_path / "none", MODALITIES)
    touch(tmp_path, "cases.csv")
    with pytest.raises(DataError, match=r"neither a folder nor a \.json file"):
        find_cases(tmp_path / "cases.csv", MODALITIES)
    with pytest.raises(ValueError, match="no modality"):
        find_cases(tmp_path, [])


def test_datalist(tmp_path: Path) -> None:
    path = datalist(
        tmp_path / "list.json",
        {
            "description": "what other tools wrote",
            "training": [
                {
                    "case": "p1",
                    "labels": "msd",
                    "patient": "P",
                    "t1": "a/1.nii",
                    "flair": "/b/2.nii",
                    "label": "l.nii",
                },
                {"t1": "Brats18_2013_2_1_t1.nii.gz", "flair": "Brats18_2013_2_1_flair.nii.gz", "fold": 3},
            ],
            "test": [{"case": "p2", "flair": "f.nii", "label": None}],
        },
    )
    first, second, third = find_cases(path, ["flair", "t1"])
    assert first.images == {"flair": Path("/b/2.nii"), "t1": tmp_path / "a/1.nii"}
    assert (first.label, first.convention, first.patient) == (tmp_path / "l.nii", "msd", "P")
    assert (second.case_id, second.convention, second.patient) == ("Brats18_2013_2_1", "brats2018", "Brats18_2013_2")
    assert (second.label, third.label) == (None, None)
    assert (third.case_id, third.convention, list(third.images)) == ("p2", None, ["flair"])
    assert [case.convention for case in find_cases(path, ["flair"], labels="brats2023")] == ["brats2023"] * 3


def test_a_map_may_be_spelt_out(tmp_path: Path) -> None:
    entries = [{"case": "a", "labels": "4 = 2, 1=1", "flair": "a.nii"}, {"case": "b", "flair": "b.nii"}]
    path = datalist(tmp_path / "list.json", {"training": entries})
    first, second = find_cases(path, ["flair"])
    assert (first.convention, second.convention) == ("0=0,1=1,4=2", None)
    assert json.loads(json.dumps(first.as_dict()))["labels"] == "0=0,1=1,4=2"
    assert [case.convention for case in find_cases(path, ["flair"], labels="1=1")] == ["0=0,1=1"] * 2
    with pytest.raises(ValueError, match="label map '1=2': no value is class 1"):
        find_cases(path, ["flair"], labels="1=2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "no datalist"),
        ({"train": []}, "no datalist"),
        ({"training": {"a": 1}}, "no datalist"),
        ({"training": []}, "lists no case"),
        ({"training": ["a.nii"]}, r"training\[0\]: is str"),
        ({"training": [{"case": "a", "image": "a.nii"}]}, r"training\[0\].*one multi-channel 'image' has to be split"),
        ({"training": [{"case": "a", "flair": ["a.nii", "b.nii"]}]}, "flair is list, expected one path"),
        ({"training": [{"case": 7, "flair": "a.nii"}]}, "'case' is 7, expected a string"),
        (
            {"training": [{"case": "a", "labels": "x", "flair": "a.nii"}]},
            r"training\[0\]: unknown label convention 'x': expected one of brats2018",
        ),
        (
            {"training": [{"case": "a", "labels": "0=0,1=2", "flair": "a.nii"}]},
            r"training\[0\]: label map '0=0,1=2': no value is class 1",
        ),
        ({"training": [{"flair": "a.nii"}]}, "has no 'case'"),
        ({"training": [{"flair": "a_flair.nii", "t1": "b_t1.nii"}]}, "no common ID"),
    ],
)
def test_bad_datalist(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        find_cases(datalist(tmp_path / "list.json", content), MODALITIES)
    assert "list.json" in str(error.value)


def test_datalist_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('{"training": [')
    with pytest.raises(DataError, match=r"list\.json is no JSON file"):
        find_cases(tmp_path / "list.json", MODALITIES)


def test_all_bad_entries_are_listed(tmp_path: Path) -> None:
    entries = [{"case": "a", "flair": 1}, {"case": "b", "flair": "b.nii"}, {"case": "c"}]
    with pytest.raises(DataError) as error:
        find_cases(datalist(tmp_path / "list.json", {"training": entries}), MODALITIES)
    assert [problem.split(":")[0] for problem in error.value.problems] == ["training[0]", "training[2]"]


@pytest.mark.parametrize("case_id", ["Brats18_2013_2_1", "BraTS-GLI-00000-000", "p.1", "0"])
def test_safe_ids(case_id: str) -> None:
    assert is_safe_id(case_id)


@pytest.mark.parametrize(
    "case_id", ["", ".", "..", "../a", "a/b", "a\\b", "a..b", ".a", "-a", "a b", "a\n", "a\0", "é", "/etc/passwd"]
)
def test_unsafe_ids(case_id: str) -> None:
    assert not is_safe_id(case_id)


@pytest.mark.real_data
@pytest.mark.parametrize(("folder", "count"), [("brats_2mm", 33), ("brats_1mm", 4)])
def test_real_folders(real_data: Path, folder: str, count: int) -> None:
    cases = find_cases(real_data / folder, MODALITIES)
    assert len(cases) == count
    assert all(list(case.images) == MODALITIES and case.label is not None for case in cases)
    assert [case.case_id for case in cases if case.convention == "brats2023"] == ["BraTS-GLI-00000-000"]
    assert not any(case.problems or case.strangers for case in cases)
