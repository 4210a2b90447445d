# SPDX-License-Identifier: Apache-2.0
"""Balancing methods, and parts that combine with them: Ignite handlers for MONAI's trainer, one file each."""

from monai_cggm.methods.agm import AGM, lead_ratios, modulation_coefficients, shapley_weights
from monai_cggm.methods.auxiliary import AuxiliaryLosses
from monai_cggm.methods.balance import Balance, balance, equation_7, mean_factor
from monai_cggm.methods.base import Step, UnimodalObserver
from monai_cggm.methods.cggm import CGGM
from monai_cggm.methods.direction import cosines, direction_loss, head_gradient
from monai_cggm.methods.distillation import Distillation, distillation_loss
from monai_cggm.methods.dropout import ModalityDropout, mask_probabilities
from monai_cggm.methods.g_blending import GBlending, blending_weights, measure_losses
from monai_cggm.methods.greedy import Greedy, learning_speeds, slowest
from monai_cggm.methods.late import LateFusionMethod, LateStep
from monai_cggm.methods.likelihood import ProbabilityOfTruth, true_class_probability
from monai_cggm.methods.mslr import MSLR, progress_ratio
from monai_cggm.methods.ogm_ge import OGMGE, discrepancy_ratios, ogm_coefficients
from monai_cggm.methods.pmr import PMR, prototype_similarity, rebalance_weights
from monai_cggm.methods.qmf import QMF, LossHistory, ranking_loss
from monai_cggm.methods.reconboost import ReconBoost, agreement_loss, boosted_cross_entropy, stage_of
from monai_cggm.methods.relative import RelativeBalance, relative_terms
from monai_cggm.methods.steering import Steering, controlled
from monai_cggm.methods.teachers import ensure_teachers, later, load_teachers, network_builder
from monai_cggm.methods.ume import UME
from monai_cggm.methods.umt import UMT, feature_distance

__all__ = [
    "AGM",
    "CGGM",
    "MSLR",
    "OGMGE",
    "PMR",
    "QMF",
    "UME",
    "UMT",
    "AuxiliaryLosses",
    "Balance",
    "Distillation",
    "GBlending",
    "Greedy",
    "LateFusionMethod",
    "LateStep",
    "LossHistory",
    "ModalityDropout",
    "ProbabilityOfTruth",
    "ReconBoost",
    "RelativeBalance",
    "Steering",
    "Step",
    "UnimodalObserver",
    "agreement_loss",
    "balance",
    "blending_weights",
    "boosted_cross_entropy",
    "controlled",
    "cosines",
    "direction_loss",
    "discrepancy_ratios",
    "distillation_loss",
    "ensure_teachers",
    "equation_7",
    "feature_distance",
    "head_gradient",
    "later",
    "lead_ratios",
    "learning_speeds",
    "load_teachers",
    "mask_probabilities",
    "mean_factor",
    "measure_losses",
    "modulation_coefficients",
    "network_builder",
    "ogm_coefficients",
    "progress_ratio",
    "prototype_similarity",
    "ranking_loss",
    "rebalance_weights",
    "relative_terms",
    "shapley_weights",
    "slowest",
    "stage_of",
    "true_class_probability",
]
