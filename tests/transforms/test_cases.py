# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImaged

from monai_cggm.errors import CaseError
from monai_cggm.transforms import FillMissingd, ValidateCased

SEQUENCES = ["flair", "t1"]


def _volume(shape: tuple[int, ...] = (1, 4, 5, 6), spacing: float = 2.0, file: str = "p01_flair.nii.gz") -> MetaTensor:
    affine = torch.diag(torch.tensor([-spacing, -spacing, spacing, 1.0], dtype=torch.float64))
    return MetaTensor(torch.rand(shape), affine=affine, meta={"filename_or_obj": file})


def _item(**changes: Any) -> dict[str, Any]:
    item = {
        "case": "p01",
        "flair": _volume(),
        "t1": _volume(file="p01_t1.nii.gz"),
        "label": _volume(file="p01_seg.nii"),
    }
    return {**item, **changes}


@pytest.mark.parametrize("shape", [(1, 4, 5, 6), (1, 8, 3, 2)])
def test_a_sound_case_passes_unchanged(shape: tuple[int, ...]):
    item = {"case": "p01", "flair": _volume(shape), "t1": _volume(shape), "label": torch.zeros(shape)}
    item["label"] = MetaTensor(item["label"], affine=item["t1"].affine)  # an empty label is legal
    out = ValidateCased(SEQUENCES)(item)
    assert out is not item
    assert all(out[key] is item[key] for key in item)


def test_a_label_is_not_needed():
    item = _item()
    del item["label"]
    assert set(ValidateCased(SEQUENCES)(item)) == {"case", "flair", "t1"}


def _with(value: float) -> MetaTensor:
    volume = _volume(file="bad_t1.nii.gz")
    volume[0, 1, 2, 3] = value
    return volume


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: _with(float("nan")), "t1 has 1 NaN or infinite voxels"),
        (lambda: _with(float("inf")), "t1 has 1 NaN or infinite voxels"),
        (lambda: torch.zeros_like(_volume(file="bad_t1.nii.gz")), "t1 is empty: every voxel is 0"),
        (lambda: _volume((1, 4, 5, 7), file="bad_t1.nii.gz"), "t1 has shape 4x5x7, expected 4x5x6 as of flair"),
        (lambda: _volume(spacing=2.5, file="bad_t1.nii.gz"), "t1 has an affine that puts voxels up to 3.54 mm"),
        (lambda: _volume((4, 4, 5, 6), file="bad_t1.nii.gz"), r"t1 has shape \(4, 4, 5, 6\), expected \(1, H, W, D\)"),
    ],
)
def test_a_bad_sequence_is_named_with_case_and_file(bad: Any, message: str):
    with pytest.raises(CaseError, match=rf"^case p01: {message}.*\(bad_t1.nii.gz\)$"):
        ValidateCased(SEQUENCES)(_item(t1=bad()))


def test_a_label_on_another_grid_is_named():
    with pytest.raises(CaseError, match=r"case p01: label has shape 4x5x5.*\(p01_seg.nii\)"):
        ValidateCased(SEQUENCES)(_item(label=_volume((1, 4, 5, 5), file="p01_seg.nii")))


def test_a_sequence_with_a_floor_has_background():
    """CT of a lung that a viewer wrote with 1024 added: nothing in it is as low as air."""
    ct = torch.linspace(-1000, 400, 24).reshape(1, 2, 3, 4)
    case = {"case": "p01", "ct": ct, "pet": torch.arange(24.0).reshape(1, 2, 3, 4)}
    validate = ValidateCased(keys=["ct", "pet"], floors={"ct": -900})
    assert validate(case)["ct"] is ct
    with pytest.raises(CaseError) as error:
        validate(case | {"ct": ct + 1024})
    assert str(error.value).startswith("case p01: ct has no background: found 24 as its lowest value, expected air or ")
    assert "padding at -900 and below" in str(error.value)
    assert set(validate(case | {"ct": torch.where(ct > -900, ct, -900.0)})) == {"case", "ct", "pet"}
    del case["ct"]
    assert set(ValidateCased(["ct", "pet"], allow_missing_keys=True, floors={"ct": -900})(case)) == {"case", "pet"}


def test_absent_sequences_are_refused_unless_allowed():
    item = _item()
    del item["t1"]
    with pytest.raises(CaseError, match="case p01: lacks t1, expected flair, t1"):
        ValidateCased(SEQUENCES)(item)
    assert "t1" not in ValidateCased(SEQUENCES, allow_missing_keys=True)(item)
    del item["flair"]
    with pytest.raises(CaseError, match="case p01: lacks flair, t1"):
        ValidateCased(SEQUENCES, allow_missing_keys=True)(item)


def test_files_as_loaded_are_named_in_full(tmp_path: Path):
    for name, array in (("flair", np.ones((3, 3, 3))), ("t1", np.random.default_rng(0).random((3, 3, 3)))):
        nib.save(nib.Nifti1Image(array.astype(np.float32), np.eye(4)), tmp_path / f"p01_{name}.nii.gz")
    item = {"case": "p01", **{name: str(tmp_path / f"p01_{name}.nii.gz") for name in SEQUENCES}}
    loaded = LoadImaged(SEQUENCES, ensure_channel_first=True)(item)
    with pytest.raises(CaseError) as caught:
        ValidateCased(SEQUENCES)(loaded)
    assert caught.value.case == "p01"
    assert caught.value.path == str(tmp_path / "p01_flair.nii.gz")


@pytest.mark.parametrize("absent", [[], ["t1"], ["flair"], ["flair", "t2"]])
def test_absent_sequences_become_zeros_and_are_noted(absent: list[str]):
    keys = ["flair", "t1", "t2"]
    item: dict[str, Any] = {"case": "p01", **{key: _volume() for key in keys if key not in absent}}
    out = FillMissingd(keys)(item)
    assert out["present"].dtype == torch.bool
    assert out["present"].tolist() == [key not in absent for key in keys]
    for key in keys:
        assert out[key].shape == (1, 4, 5, 6)
        torch.testing.assert_close(out[key].affine, _volume().affine)
        assert bool(out[key].any()) is (key not in absent)
    assert all(key not in item for key in [*absent, "present"])  # the input is left as it was


def test_a_case_with_no_sequence_at_all_is_refused():
    with pytest.raises(CaseError, match="case p01: has none of flair, t1"):
        FillMissingd(SEQUENCES)({"case": "p01", "label": _volume()})
