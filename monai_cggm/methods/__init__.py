# SPDX-License-Identifier: Apache-2.0
"""Balancing methods, and parts that combine with them: Ignite handlers for MONAI's trainer, one file each."""

from monai_cggm.methods.auxiliary import AuxiliaryLosses
from monai_cggm.methods.balance import Balance, balance, equation_7, mean_factor
from monai_cggm.methods.base import Step, UnimodalObserver
from monai_cggm.methods.cggm import CGGM
from monai_cggm.methods.direction import cosines, direction_loss, head_gradient
from monai_cggm.methods.distillation import Distillation, distillation_loss
from monai_cggm.methods.dropout import ModalityDropout, mask_probabilities
from monai_cggm.methods.greedy import Greedy, learning_speeds, slowest
from monai_cggm.methods.likelihood import ProbabilityOfTruth, true_class_probability
from monai_cggm.methods.mslr import MSLR, progress_ratio
from monai_cggm.methods.ogm_ge import OGMGE, discrepancy_ratios, ogm_coefficients
from monai_cggm.methods.relative import RelativeBalance, relative_terms
from monai_cggm.methods.steering import Steering, controlled

__all__ = [
    "CGGM",
    "MSLR",
    "OGMGE",
    "AuxiliaryLosses",
    "Balance",
    "Distillation",
    "Greedy",
    "ModalityDropout",
    "ProbabilityOfTruth",
    "RelativeBalance",
    "Steering",
    "Step",
    "UnimodalObserver",
    "balance",
    "controlled",
    "cosines",
    "direction_loss",
    "discrepancy_ratios",
    "distillation_loss",
    "equation_7",
    "head_gradient",
    "learning_speeds",
    "mask_probabilities",
    "mean_factor",
    "ogm_coefficients",
    "progress_ratio",
    "relative_terms",
    "slowest",
    "true_class_probability",
]
