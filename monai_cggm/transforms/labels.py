# SPDX-License-Identifier: Apache-2.0
"""Label maps as transforms: a data set's values to classes on the way in, and back on the way out."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform

from monai_cggm.data.labels import convention_for, to_classes, to_labels
from monai_cggm.errors import CaseError

__all__ = ["ClassesToLabelsd", "LabelsToClassesd"]


class LabelsToClassesd(MapTransform):
    """Map label volumes from their data set's values to classes, such as 0..3 for background, NCR, ED and ET.

    Each case follows its own convention: the item's ``labels`` entry, or else what its ID tells. Volumes of any shape
    come out as uint8; a ``MetaTensor`` keeps its affine.

    Args:
        keys: the labels.
        convention_key: the entry with the convention, a name or a map such as ``0=0,1=1,4=2`` (see
            :func:`monai_cggm.data.labels.label_convention`).
        case_key: the case's ID.
        allow_missing_keys: accept items without a label.

    Raises:
        CaseError: where a value is not in the convention's map, or nothing tells the convention.

    Example:
        >>> import torch
        >>> item = {"case": "p01", "labels": "brats2018", "label": torch.tensor([0, 1, 2, 4])}
        >>> LabelsToClassesd(keys="label")(item)["label"]
        tensor([0, 1, 2, 3], dtype=torch.uint8)
        >>> item = {"case": "p01", "labels": "1=1, 2=1", "label": torch.tensor([0, 1, 2])}
        >>> LabelsToClassesd(keys="label")(item)["label"]
        tensor([0, 1, 1], dtype=torch.uint8)
    """

    def __init__(
        self,
        keys: KeysCollection,
        convention_key: str = "labels",
        case_key: str = "case",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.convention_key = convention_key
        self.case_key = case_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return ``data`` with its labels mapped."""
        mapped = dict(data)
        case, convention = _case_and_convention(data, self.case_key, self.convention_key)
        for key in self.key_iterator(mapped):
            file = getattr(mapped[key], "meta", {}).get("filename_or_obj")
            mapped[key] = to_classes(mapped[key], convention, case, file)
        return mapped


class ClassesToLabelsd(MapTransform):
    """Map class indices back to the values of the case's own data set: what a written segmentation holds.

    Args:
        keys: volumes of class indices, any shape; they come out as uint8, or as int16 where the convention has a value
            above 255.
        convention_key: the entry with the convention, a name or a map such as ``0=0,1=1,4=2`` (see
            :func:`monai_cggm.data.labels.label_convention`).
        case_key: the case's ID.
        allow_missing_keys: accept items without these keys.

    Raises:
        CaseError: where a value is no class, or nothing tells the convention.

    Example:
        >>> import torch
        >>> ClassesToLabelsd(keys="pred")({"case": "Phantom_000", "pred": torch.tensor([0, 1, 2, 3])})["pred"]
        tensor([0, 1, 2, 4], dtype=torch.uint8)
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        convention_key: str = "labels",
        case_key: str = "case",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.convention_key = convention_key
        self.case_key = case_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return ``data`` with its predictions mapped."""
        mapped = dict(data)
        case, convention = _case_and_convention(data, self.case_key, self.convention_key)
        for key in self.key_iterator(mapped):
            mapped[key] = to_labels(mapped[key], convention, case)
        return mapped


def _case_and_convention(data: Mapping[Hashable, Any], case_key: str, convention_key: str) -> tuple[str, str]:
    case = str(data.get(case_key, "without an ID"))
    try:
        return case, convention_for(case, data.get(convention_key))
    except CaseError:
        raise
    except ValueError as error:
        raise CaseError(case, str(error)) from error
