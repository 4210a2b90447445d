# SPDX-License-Identifier: Apache-2.0
"""From the files of a data set to samples: layouts, label maps, checks, splits, cached volumes and the demo phantom."""

from __future__ import annotations

from monai_cggm.data.checks import CaseReport, check_case, header_problems, load_cases
from monai_cggm.data.features import (
    Description,
    FeatureDataset,
    PresenceBatches,
    collate_features,
    feature_statistics,
    load_features,
    modalities_in,
    split_features,
)
from monai_cggm.data.labels import (
    CONVENTIONS,
    LabelConvention,
    convention_for,
    label_convention,
    to_classes,
    to_labels,
)
from monai_cggm.data.layouts import Case, find_cases, is_safe_id
from monai_cggm.data.patients import patient_of, patients_in
from monai_cggm.data.phantom import write_phantoms
from monai_cggm.data.slices import EpochSampler, SliceDataset
from monai_cggm.data.splits import check_plan, fold_splits, part_of, split_cases, write_split
from monai_cggm.data.volumes import CaseDataset, cached_volumes

__all__ = [
    "CONVENTIONS",
    "Case",
    "CaseDataset",
    "CaseReport",
    "Description",
    "EpochSampler",
    "FeatureDataset",
    "LabelConvention",
    "PresenceBatches",
    "SliceDataset",
    "cached_volumes",
    "check_case",
    "check_plan",
    "collate_features",
    "convention_for",
    "feature_statistics",
    "find_cases",
    "fold_splits",
    "header_problems",
    "is_safe_id",
    "label_convention",
    "load_cases",
    "load_features",
    "modalities_in",
    "part_of",
    "patient_of",
    "patients_in",
    "split_cases",
    "split_features",
    "to_classes",
    "to_labels",
    "write_phantoms",
    "write_split",
]
