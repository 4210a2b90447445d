# SPDX-License-Identifier: Apache-2.0
"""Balancing methods, and parts that combine with them: Ignite handlers for MONAI's trainer, one file each."""

from monai_cggm.methods.auxiliary import AuxiliaryLosses
from monai_cggm.methods.balance import Balance, balance, equation_7, mean_factor
from monai_cggm.methods.base import Step, UnimodalObserver
from monai_cggm.methods.cggm import CGGM
from monai_cggm.methods.direction import cosines, direction_loss, head_gradient
from monai_cggm.methods.distillation import Distillation, distillation_loss
from monai_cggm.methods.dropout import ModalityDropout, mask_probabilities
from monai_cggm.methods.relative import RelativeBalance, relative_terms
from monai_cggm.methods.steering import Steering, controlled

__all__ = [
    "CGGM",
    "AuxiliaryLosses",
    "Balance",
    "Distillation",
    "ModalityDropout",
    "RelativeBalance",
    "Steering",
    "Step",
    "UnimodalObserver",
    "balance",
    "controlled",
    "cosines",
    "direction_loss",
    "distillation_loss",
    "equation_7",
    "head_gradient",
    "mask_probabilities",
    "mean_factor",
    "relative_terms",
]
