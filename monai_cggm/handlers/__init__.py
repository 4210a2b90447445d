# SPDX-License-Identifier: Apache-2.0
"""Handlers of a run: seeds, clipping, checkpoints, logs, gradients, pictures, scores."""

from monai_cggm.handlers.checkpoint import BestModel, Checkpoints
from monai_cggm.handlers.clip import ClipGradients, unscale_once
from monai_cggm.handlers.gradients import GradientRecorder
from monai_cggm.handlers.images import ValidationImages
from monai_cggm.handlers.in_order import InOrder
from monai_cggm.handlers.load_model import ModelLoader
from monai_cggm.handlers.predictions import PredictionScores, PredictionScoresWriter, PredictionsWriter
from monai_cggm.handlers.progress import Progress
from monai_cggm.handlers.resources import Resources
from monai_cggm.handlers.run_info import RunInfo, write_run_info
from monai_cggm.handlers.run_log import RunLog
from monai_cggm.handlers.scores import RegionScores, ScoresWriter
from monai_cggm.handlers.seed import EpochSeed

__all__ = [
    "BestModel",
    "Checkpoints",
    "ClipGradients",
    "EpochSeed",
    "GradientRecorder",
    "InOrder",
    "ModelLoader",
    "PredictionScores",
    "PredictionScoresWriter",
    "PredictionsWriter",
    "Progress",
    "RegionScores",
    "Resources",
    "RunInfo",
    "RunLog",
    "ScoresWriter",
    "ValidationImages",
    "unscale_once",
    "write_run_info",
]
