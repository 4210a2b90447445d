# SPDX-License-Identifier: Apache-2.0
"""The errors say what a user needs, also after they have come out of a worker process."""

from __future__ import annotations

import pickle

import pytest

from monai_cggm.errors import CaseError, DataError


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
