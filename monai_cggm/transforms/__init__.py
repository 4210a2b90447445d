# SPDX-License-Identifier: Apache-2.0
"""MONAI dictionary transforms of our own: checks of a case, label maps, slices, and writing segmentations."""

from __future__ import annotations

from monai_cggm.transforms.cases import FillMissingd, ValidateCased
from monai_cggm.transforms.labels import ClassesToLabelsd, LabelsToClassesd
from monai_cggm.transforms.save import SaveSegmentationd
from monai_cggm.transforms.slices import RandSlicesd, TumourSlicesd

__all__ = [
    "ClassesToLabelsd",
    "FillMissingd",
    "LabelsToClassesd",
    "RandSlicesd",
    "SaveSegmentationd",
    "TumourSlicesd",
    "ValidateCased",
]
