# SPDX-License-Identifier: Apache-2.0
"""Transforms that look at a case as a whole: is it sound, and which of its sequences are there."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from monai_cggm.data.checks import geometry_problems, image_problem
from monai_cggm.errors import CaseError

__all__ = ["FillMissingd", "ValidateCased"]


class ValidateCased(MapTransform):
    """Stop at a case that cannot be used; goes right after ``LoadImaged(..., ensure_channel_first=True)``.

    It refuses sequences that are absent (unless ``allow_missing_keys``), that hold more than one channel, NaN, infinite
    or nothing but equal values, and sequences or a label on another grid than the first sequence; where a sequence has
    a floor, also one that has no background, as CT has none that is not in Hounsfield units. The volumes pass through
    untouched.

    Args:
        keys: the sequences, each ``(1, H, W, D)``.
        label_key: the label, ``(1, H, W, D)``; may be absent, as it is at inference.
        case_key: the case's ID.
        allow_missing_keys: accept a case that lacks some of its sequences, though not all.
        floors: sequence -> value at which its background ends, of those whose background is not 0.

    Raises:
        CaseError: names the case, the file, what was found and what was expected.

    Example:
        >>> validate = ValidateCased(keys=["flair", "t1"])
        >>> volume = torch.arange(8.0).reshape(1, 2, 2, 2)
        >>> validate({"case": "p01", "flair": volume, "t1": torch.zeros(1, 2, 2, 2)})
        Traceback (most recent call last):
        monai_cggm.errors.CaseError: case p01: t1 is empty: every voxel is 0
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_key: str = "label",
        case_key: str = "case",
        allow_missing_keys: bool = False,
        floors: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.label_key = label_key
        self.case_key = case_key
        self.floors = dict(floors or {})

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a shallow copy of ``data``."""
        case = _case_of(data, self.case_key)
        images = {str(key): data[key] for key in self.keys if key in data}
        absent = [str(key) for key in self.keys if key not in data]
        if not images or (absent and not self.allow_missing_keys):
            raise CaseError(case, f"lacks {', '.join(absent)}, expected {', '.join(map(str, self.keys))}")
        volumes = images | ({self.label_key: data[self.label_key]} if self.label_key in data else {})
        for key, volume in volumes.items():
            if volume.ndim != 4 or len(volume) != 1:
                raise CaseError(case, f"{key} has shape {tuple(volume.shape)}, expected (1, H, W, D)", _file_of(volume))
        for key, problem in geometry_problems({k: (v.shape[1:], _affine_of(v)) for k, v in volumes.items()}).items():
            raise CaseError(case, f"{key} has {problem}", _file_of(volumes[key]))
        for key, volume in images.items():
            if found := image_problem(volume):
                raise CaseError(case, f"{key} {found}", _file_of(volume))
            if key in self.floors and (lowest := float(volume.min())) > self.floors[key]:
                raise CaseError(
                    case,
                    f"{key} has no background: found {lowest:g} as its lowest value, expected air or padding at "
                    f"{self.floors[key]:g} and below; is it in the units of the training cases (Hounsfield, for CT)?",
                    _file_of(volume),
                )
        return dict(data)


class FillMissingd(MapTransform):
    """Give the sequences that a case lacks a volume of zeros, and note which were there.

    Goes after ``LoadImaged(..., allow_missing_keys=True)``, so that the channels of every case mean the same.
    Networks read the note as their ``present`` mask and set the features of absent sequences to zero.

    Args:
        keys: all sequences, in the order of the channels.
        present_key: where the mask goes: a bool tensor ``(M,)``.
        case_key: the case's ID.

    Raises:
        CaseError: where a case has none of the sequences.

    Example:
        >>> item = FillMissingd(keys=["flair", "t1"])({"case": "p01", "t1": torch.ones(1, 2, 2, 2)})
        >>> item["present"], item["flair"].sum()
        (tensor([False,  True]), tensor(0.))
    """

    def __init__(self, keys: KeysCollection, present_key: str = "present", case_key: str = "case") -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.present_key = present_key
        self.case_key = case_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return ``data`` with every key filled and the mask added."""
        filled = dict(data)
        there = [key for key in self.keys if key in filled]
        if not there:
            raise CaseError(_case_of(data, self.case_key), f"has none of {', '.join(map(str, self.keys))}")
        filled[self.present_key] = torch.tensor([key in filled for key in self.keys])
        for key in self.keys:
            if key not in filled:
                # `new_zeros` would lose the affine of a MetaTensor.
                filled[key] = torch.zeros_like(filled[there[0]])
        return filled


def _case_of(data: Mapping[Hashable, Any], case_key: str) -> str:
    return str(data.get(case_key, "without an ID"))


def _file_of(volume: Any) -> str | None:
    file = getattr(volume, "meta", {}).get("filename_or_obj")
    return None if file is None else str(file)


def _affine_of(volume: Any) -> Any:
    return volume.affine.cpu().numpy() if hasattr(volume, "affine") else np.eye(4)
