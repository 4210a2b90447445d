# SPDX-License-Identifier: Apache-2.0
"""The errors say what a user needs, also after they have come out of a worker process."""

from __future__ import annotations

import pickle

import pytest
from torch.utils.data import DataLoader, Dataset

from monai_cggm.errors import CaseError, DataError, users_error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (CaseError("a", "no label"), "case a: no label"),
        (CaseError("a", "no label", "x/a_seg.nii"), "case a: no label (x/a_seg.nii)"),
        (DataError(["case a: no label"]), "case a: no label"),
        (DataError(["case a: no label", "case b: no t1"]), "2 problems:\n  case a: no label\n  case b: no t1"),
    ],
)
def test_text_and_pickle(error: ValueError, text: str) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert str(error) == str(copy) == text
    assert vars(copy) == vars(error)
    assert isinstance(copy, ValueError)


class Failing(Dataset):
    """Has one item, which raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise self.error


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "error", [CaseError("p01", "no label", "x/p01_seg.nii"), DataError(["case a: no label", "case b: no t1"])]
)
def test_an_error_of_a_data_worker(error: ValueError, workers: int) -> None:
    """PyTorch raises another one there, with the traceback as its text."""

    def evaluated() -> None:
        try:
            next(iter(DataLoader(Failing(error), num_workers=workers)))
        except Exception as cause:
            raise RuntimeError("Failed to evaluate ConfigExpression") from cause

    with pytest.raises(RuntimeError, match="Failed to evaluate") as wrapped:
        evaluated()
    assert str(users_error(wrapped.value)) == str(error)


def test_other_errors_are_nobody_s_data() -> None:
    with pytest.raises(IndexError) as raised:
        next(iter(DataLoader(Failing(IndexError("7")), num_workers=1)))
    assert users_error(raised.value) is None
    assert users_error(RuntimeError("monai_cggm.errors.CaseError: of no worker")) is None
    with pytest.raises(TypeError, match=r"problems must be a list of them, got one text: 'case a'"):
        DataError("case a")
