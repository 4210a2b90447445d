# SPDX-License-Identifier: Apache-2.0
"""Label maps, both ways, against tables written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_cggm.data.labels import CONVENTIONS, convention_for, to_classes, to_labels, unknown_labels
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
