# SPDX-License-Identifier: Apache-2.0
"""Scores of segmentations by region, and the progress measures that balancing methods use."""

from __future__ import annotations

from monai_cggm.metrics.epsilon import Accuracy, Epsilon, NegativeMAE, RegionDice
from monai_cggm.metrics.lesions import LesionScores, lesion_wise
from monai_cggm.metrics.prediction_scores import classification_scores, prediction_scores, regression_scores
from monai_cggm.metrics.region_scores import BRATS_REGIONS, EMPTY_CONVENTIONS, EmptyConvention, region_scores

__all__ = [
    "BRATS_REGIONS",
    "EMPTY_CONVENTIONS",
    "Accuracy",
    "EmptyConvention",
    "Epsilon",
    "LesionScores",
    "NegativeMAE",
    "RegionDice",
    "classification_scores",
    "lesion_wise",
    "prediction_scores",
    "region_scores",
    "regression_scores",
]
