# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from monai_cggm.errors import CaseError
from monai_cggm.transforms import ClassesToLabelsd, LabelsToClassesd

CONVENTIONS = [
    ("brats2018", [0, 1, 2, 4], [0, 1, 2, 3]),
    ("brats2023", [0, 1, 2, 3], [0, 1, 2, 3]),
    ("msd", [0, 1, 2, 3], [0, 2, 1, 3]),
    ("1=1, 2=2, 7=3", [0, 1, 2, 7], [0, 1, 2, 3]),
    ("2=1,2035=3,5=2", [0, 2, 5, 2035], [0, 1, 2, 3]),
]


@pytest.mark.parametrize(("convention", "labels", "classes"), CONVENTIONS)
def test_both_ways(convention: str, labels: list[int], classes: list[int]):
    item = {"case": "p01", "labels": convention, "label": torch.tensor(labels, dtype=torch.float32).reshape(1, 2, 2, 1)}
    there = LabelsToClassesd("label")(item)
    assert there["label"].dtype == torch.uint8
    assert there["label"].flatten().tolist() == classes
    back = ClassesToLabelsd("label")(there)
    assert back["label"].flatten().tolist() == labels
    assert item["label"].flatten().tolist() == labels  # the input is left as it was


def test_the_resection_cavity_becomes_background_and_stays_it():
    item = {"case": "BraTS-GLI-00000-100", "labels": "brats2024", "label": torch.arange(5)}
    there = LabelsToClassesd("label")(item)
    assert there["label"].tolist() == [0, 1, 2, 3, 0]
    assert ClassesToLabelsd("label")(there)["label"].tolist() == [0, 1, 2, 3, 0]


def test_affine_and_metadata_are_kept():
    affine = torch.diag(torch.tensor([-1.0, -1.0, 3.0, 1.0], dtype=torch.float64))
    label = MetaTensor(torch.tensor([0.0, 4.0]).reshape(1, 2, 1, 1), affine=affine, meta={"filename_or_obj": "s.nii"})
    out = LabelsToClassesd("label")({"case": "Phantom_000", "label": label})["label"]
    assert isinstance(out, MetaTensor)
    torch.testing.assert_close(out.affine, affine)
    assert out.meta["filename_or_obj"] == "s.nii"


@pytest.mark.parametrize(
    ("case", "classes"), [("Brats18_2013_2_1", [0, 1, 3]), ("Phantom_003", [0, 1, 3]), ("BraTS2021_00000", [0, 1, 3])]
)
def test_without_an_entry_the_case_decides(case: str, classes: list[int]):
    assert LabelsToClassesd("label")({"case": case, "label": torch.tensor([0, 1, 4])})["label"].tolist() == classes


def test_value_4_under_2023_names_the_way_out():
    label = MetaTensor(torch.tensor([0.0, 4.0]), affine=torch.eye(4), meta={"filename_or_obj": "x-seg.nii.gz"})
    item = {"case": "BraTS-GLI-00001-000", "labels": "brats2023", "label": label}
    with pytest.raises(CaseError, match=r"case BraTS-GLI-00001-000: .*\[4\].*--labels brats2024.*\(x-seg.nii.gz\)"):
        LabelsToClassesd("label")(item)


@pytest.mark.parametrize("value", [3.0, 0.5, -1.0, float("nan")])
def test_unknown_values_are_refused(value: float):
    item = {"case": "p01", "labels": "brats2018", "label": torch.tensor([0.0, value])}
    with pytest.raises(CaseError, match="case p01: label values"):
        LabelsToClassesd("label")(item)


@pytest.mark.parametrize("labels", [None, "brats1999", "0=0,1=2", ["brats2018"]])
def test_an_unknown_convention_is_refused(labels: str | None):
    for transform in (LabelsToClassesd("label"), ClassesToLabelsd("label")):
        with pytest.raises(CaseError, match=r"case p01: .*(--labels|brats2018|without gaps)"):
            transform({"case": "p01", "labels": labels, "label": torch.tensor([0])})


def test_classes_that_do_not_exist_are_refused():
    with pytest.raises(CaseError, match=r"values \[4\] are no classes"):
        ClassesToLabelsd("pred")({"case": "Phantom_000", "pred": torch.tensor([0, 4])})


def test_several_values_of_one_class_are_written_as_the_first():
    item = {"case": "p01", "labels": "3=1, 1=1, 4=2", "label": torch.tensor([0, 1, 3, 4])}
    there = LabelsToClassesd("label")(item)
    assert there["label"].tolist() == [0, 1, 1, 2]
    assert ClassesToLabelsd("label")(there)["label"].tolist() == [0, 3, 3, 4]
    with pytest.raises(CaseError, match=r"case p01: values \[3\] are no classes \(0 to 2\)"):
        ClassesToLabelsd("label")({**there, "label": torch.tensor([0, 3])})


def test_missing_keys_only_where_allowed():
    with pytest.raises(KeyError):
        LabelsToClassesd("label")({"case": "Phantom_000"})
    assert LabelsToClassesd("label", allow_missing_keys=True)({"case": "Phantom_000"}) == {"case": "Phantom_000"}
