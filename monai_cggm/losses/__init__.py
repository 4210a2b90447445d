# SPDX-License-Identifier: Apache-2.0
"""Losses."""

from monai_cggm.losses.dice_ce import DiceCrossEntropyLoss

__all__ = ["DiceCrossEntropyLoss"]
