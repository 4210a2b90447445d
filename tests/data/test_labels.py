# SPDX-License-Identifier: Apache-2.0
"""Label maps, both ways, against tables written out by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_cggm.data.labels import (
    CONVENTIONS,
    convention_for,
    label_convention,
    to_classes,
    to_labels,
    unknown_label_problem,
    unknown_labels,
)
from monai_cggm.errors import CaseError

# value in the file -> class (0 background, 1 NCR, 2 ED, 3 ET)
TABLES = {
    "brats2018": {0: 0, 1: 1, 2: 2, 4: 3},
    "brats2023": {0: 0, 1: 1, 2: 2, 3: 3},
    "brats2024": {0: 0, 1: 1, 2: 2, 3: 3, 4: 0},
    "msd": {0: 0, 1: 2, 2: 1, 3: 3},
}


def volume(convention: str, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    values = list(TABLES[convention])
    return np.resize(np.array(values), shape).astype(dtype)


def expected(convention: str, labels: np.ndarray) -> np.ndarray:
    return np.vectorize(TABLES[convention].get)(labels)


def test_no_convention_is_untested() -> None:
    assert set(TABLES) == set(CONVENTIONS)


@pytest.mark.parametrize("shape", [(10,), (3, 5, 7), (1, 4, 4, 2)])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64"])
@pytest.mark.parametrize("convention", TABLES)
def test_to_classes(convention: str, dtype: str, shape: tuple[int, ...]) -> None:
    labels = volume(convention, shape, dtype)
    untouched = labels.copy()
    classes = to_classes(labels, convention, "a")
    assert classes.dtype == np.uint8
    np.testing.assert_array_equal(classes, expected(convention, labels))
    np.testing.assert_array_equal(labels, untouched)
    as_tensor = to_classes(torch.from_numpy(labels), convention, "a")
    assert as_tensor.dtype == torch.uint8
    np.testing.assert_array_equal(as_tensor.numpy(), classes)


@pytest.mark.parametrize("convention", TABLES)
def test_round_trip(convention: str) -> None:
    labels = volume(convention, (4, 5, 6))
    back = to_labels(to_classes(labels, convention, "a"), convention)
    # The resection cavity is background in training, and stays so on the way out.
    wanted = np.where(labels == 4, 0, labels) if convention == "brats2024" else labels
    np.testing.assert_array_equal(back, wanted)
    classes = np.resize(np.arange(4), (4, 5, 6))
    np.testing.assert_array_equal(to_classes(to_labels(classes, convention), convention, "a"), classes)


def test_conventions_disagree_where_they_should() -> None:
    """One number, different tissue: the reason why a convention is never guessed from the values."""
    assert to_classes(np.array([1, 2]), "msd", "a").tolist() == [2, 1]
    assert to_classes(np.array([1, 2]), "brats2018", "a").tolist() == [1, 2]
    assert to_classes(np.array([4]), "brats2018", "a").tolist() == [3]
    assert to_classes(np.array([4]), "brats2024", "a").tolist() == [0]


def test_meta_tensor_keeps_its_geometry() -> None:
    affine = torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    labels = MetaTensor(torch.tensor([[[0.0, 1.0, 2.0, 4.0]]]), affine=affine, meta={"filename_or_obj": "a_seg.nii.gz"})
    classes = to_classes(labels, "brats2018", "a")
    back = to_labels(classes, "brats2018")
    for mapped, values in ((classes, [0, 1, 2, 3]), (back, [0, 1, 2, 4])):
        assert isinstance(mapped, MetaTensor)
        assert mapped.flatten().tolist() == values
        assert torch.equal(mapped.affine, affine)
        assert mapped.meta["filename_or_obj"] == "a_seg.nii.gz"


@pytest.mark.parametrize("wrong", [7.0, 1.5, -1.0, float("nan"), 3.0])
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_unknown_value_is_an_error_with_case_and_file(kind: type, wrong: float) -> None:
    labels = kind([0.0, 1.0, wrong])
    with pytest.raises(CaseError, match=rf"case a: label values \[{wrong:g}\].*brats2018.*\(a_seg\.nii\.gz\)"):
        to_classes(labels, "brats2018", "a", "a_seg.nii.gz")


def test_unknown_values_are_counted_in_order_without_the_known() -> None:
    assert unknown_labels(np.array([4, 0, 9, 7, 9, 1]), "brats2023") == [4.0, 7.0, 9.0]


def test_4_under_2023_names_the_option_for_2024() -> None:
    with pytest.raises(CaseError, match=r"--labels brats2024, where 4 is the resection cavity"):
        to_classes(np.array([0, 4]), "brats2023", "BraTS-GLI-00000-100")
    with pytest.raises(CaseError) as other:
        to_classes(np.array([0, 5]), "brats2023", "BraTS-GLI-00000-100")
    assert "brats2024" not in str(other.value)


@pytest.mark.parametrize("wrong", [4, -1])
def test_no_class_is_an_error(wrong: int) -> None:
    with pytest.raises(CaseError, match=rf"case a: values \[{wrong}\] are no classes"):
        to_labels(np.array([0, wrong]), "brats2018", "a")


@pytest.mark.parametrize(
    ("case_id", "convention"),
    [
        ("Brats17_2013_2_1", "brats2018"),
        ("Brats18_CBICA_APZ_1", "brats2018"),
        ("BraTS19_TCIA10_628_1", "brats2018"),
        ("BraTS20_Training_001", "brats2018"),
        ("BraTS2021_00000", "brats2018"),
        ("Phantom_000", "brats2018"),
        ("BraTS-GLI-00000-000", "brats2023"),
        ("BraTS-SSA-00002-000", "brats2023"),
        ("BRATS_001", "msd"),
    ],
)
def test_convention_by_id(case_id: str, convention: str) -> None:
    assert convention_for(case_id) == convention
    assert convention_for(case_id, "brats2024") == "brats2024"


@pytest.mark.parametrize("case_id", ["patient07", "", "BRATS_x", "MyBraTS2021_1"])
def test_convention_is_not_guessed(case_id: str) -> None:
    with pytest.raises(CaseError, match="--labels"):
        convention_for(case_id)


def test_unknown_convention() -> None:
    with pytest.raises(ValueError, match=r"'brats2019'.*brats2018, brats2023, brats2024, msd"):
        convention_for("Brats18_2013_2_1", "brats2019")


# text -> its fixed form, value -> class, class -> value that is written back
SPELT_OUT = {
    "0=0,1=1,4=2": ("0=0,1=1,4=2", {0: 0, 1: 1, 4: 2}, {0: 0, 1: 1, 2: 4}),
    " 4 = 2 ,0=0, 1=1 ": ("0=0,1=1,4=2", {0: 0, 1: 1, 4: 2}, {0: 0, 1: 1, 2: 4}),
    "1=1": ("0=0,1=1", {0: 0, 1: 1}, {0: 0, 1: 1}),
    "007=01": ("0=0,7=1", {0: 0, 7: 1}, {0: 0, 1: 7}),
    "5=1,3=1,0=0,4=1": ("0=0,5=1,3=1,4=1", {0: 0, 5: 1, 3: 1, 4: 1}, {0: 0, 1: 5}),
    "255=0,1=1": ("0=0,255=0,1=1", {0: 0, 255: 0, 1: 1}, {0: 0, 1: 1}),
    "255=0,0=0,1=1": ("255=0,0=0,1=1", {0: 0, 255: 0, 1: 1}, {0: 255, 1: 1}),
    "0=1,9=0": ("9=0,0=1", {9: 0, 0: 1}, {0: 9, 1: 0}),
    "300=1,2035=2": ("0=0,300=1,2035=2", {0: 0, 300: 1, 2035: 2}, {0: 0, 1: 300, 2: 2035}),
    "32767=1": ("0=0,32767=1", {0: 0, 32767: 1}, {0: 0, 1: 32767}),
}


@pytest.mark.parametrize("text", SPELT_OUT)
def test_a_map_that_is_spelt_out(text: str) -> None:
    name, there, back = SPELT_OUT[text]
    convention = label_convention(text)
    assert (convention.name, dict(convention.to_class), dict(convention.from_class)) == (name, there, back)
    assert convention.num_classes == len(back)
    assert convention_for("patient07", text) == convention_for("Brats18_2013_2_1", text) == name
    assert label_convention(name) == convention


@pytest.mark.parametrize("text", SPELT_OUT)
@pytest.mark.parametrize("dtype", ["int16", "int64", "uint16", "float32"])
def test_volumes_of_a_map_that_is_spelt_out(text: str, dtype: str) -> None:
    _, there, back = SPELT_OUT[text]
    labels = np.resize(list(there), (3, 4, 5)).astype(dtype)
    classes = to_classes(labels, text, "a")
    assert classes.dtype == np.uint8
    np.testing.assert_array_equal(classes, np.vectorize(there.get)(labels))
    written = to_labels(classes, text)
    assert written.dtype == (np.int16 if max(back.values()) > 255 else np.uint8)
    np.testing.assert_array_equal(written, np.vectorize(back.get)(classes))
    if dtype == "uint16":  # of which PyTorch can do little
        return
    as_tensor = to_classes(torch.from_numpy(labels), text, "a")
    assert as_tensor.dtype == torch.uint8
    np.testing.assert_array_equal(as_tensor.numpy(), classes)
    back_again = to_labels(as_tensor, text)
    assert back_again.numpy().dtype == written.dtype
    np.testing.assert_array_equal(back_again.numpy(), written)


def test_a_large_value_is_no_small_one_with_the_same_bits() -> None:
    """PyTorch compares a tensor of bytes with 300 as with 44."""
    convention = "44=1,300=2"
    for labels in (torch.tensor([0, 44], dtype=torch.uint8), np.array([0, 44], dtype=np.uint8)):
        assert to_classes(labels, convention, "a").tolist() == [0, 1]
    assert to_classes(torch.tensor([0, 44, 300]), convention, "a").tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1", "unknown label convention '1': expected one of brats2018, brats2023, brats2024, msd or pairs of"),
        ("", "unknown label convention '': expected one of"),
        (["0=0"], "unknown label convention"),
        ("0=0,1", "found '1', expected pairs of whole numbers from 0 on such as 0=0,1=1"),
        ("0=0,1=1,", "found '', expected pairs"),
        ("0=0;1=1", "found '0=0;1=1', expected pairs"),
        ("0=0,-1=1", "found '-1=1', expected pairs"),
        ("0=0,1=-1", "found '1=-1', expected pairs"),
        ("0=0,1.5=1", "found '1.5=1', expected pairs"),
        ("0=0,1=1=2", "found '1=1=2', expected pairs"),
        ("0=0,x=1", "found 'x=1', expected pairs"),
        ("brats2018=1", "found 'brats2018=1', expected pairs"),
        ("0=0,1=1,01=2", "the value 1 is there twice, expected once"),
        ("0=0,1=2", "no value is class 1, expected classes from 0 on without gaps"),
        ("0=0,1=1,2=3,3=5", "no value is class 2, expected"),
        ("0=1,1=2", "no value is class 0, expected"),
        ("0=0", "every value is background, expected a class 1"),
        ("7=0", "every value is background, expected a class 1"),
        ("0=0,32768=1", "found 32768=1, expected values up to 32767 and classes up to 255"),
        (",".join(f"{i}={i}" for i in range(257)), "found 256=256, expected values up to 32767 and classes up to 255"),
    ],
)
def test_a_text_that_is_no_convention(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        label_convention(text)
    assert repr(text) in str(error.value)
    with pytest.raises(ValueError, match=re.escape(message)):
        convention_for("Brats18_2013_2_1", text)


def test_as_many_classes_as_bytes_have() -> None:
    text = ",".join(f"{i}={i}" for i in range(256))
    np.testing.assert_array_equal(to_classes(np.arange(256), text, "a"), np.arange(256))


def test_a_value_outside_a_map_that_is_spelt_out() -> None:
    problem = "label values [2, 5] are not in the map 0=0,1=1,4=2"
    assert unknown_label_problem(np.array([0, 5, 2, 4]), "1=1, 4=2") == problem
    assert unknown_labels(np.array([0, 5, 2, 4]), "1=1, 4=2") == [2.0, 5.0]
    with pytest.raises(CaseError, match=re.escape(f"case p01: {problem} (m.nii)")):
        to_classes(np.array([0, 5, 2, 4]), "1=1, 4=2", "p01", "m.nii")


@pytest.mark.parametrize(("text", "last"), [("1=1", 1), ("1=1,2=1,3=2", 2), ("brats2018", 3)])
def test_the_error_names_the_convention_s_own_classes(text: str, last: int) -> None:
    message = f"values [{last + 1}] are no classes (0 to {last})"
    with pytest.raises(CaseError, match=re.escape(message)):
        to_labels(np.array([0, last + 1]), text, "p01")
