# SPDX-License-Identifier: Apache-2.0
"""Balancing methods: Ignite handlers for MONAI's trainer, one file a method."""

from monai_cggm.methods.balance import Balance, balance, equation_7, mean_factor
from monai_cggm.methods.base import Step, UnimodalObserver
from monai_cggm.methods.cggm import CGGM
from monai_cggm.methods.direction import cosines, direction_loss, head_gradient

__all__ = [
    "CGGM",
    "Balance",
    "Step",
    "UnimodalObserver",
    "balance",
    "cosines",
    "direction_loss",
    "equation_7",
    "head_gradient",
    "mean_factor",
]
