# SPDX-License-Identifier: Apache-2.0
"""Losses."""

from monai_cggm.losses.dice_ce import DiceCrossEntropyLoss
from monai_cggm.losses.regions import RegionDiceCrossEntropyLoss

__all__ = ["DiceCrossEntropyLoss", "RegionDiceCrossEntropyLoss"]
