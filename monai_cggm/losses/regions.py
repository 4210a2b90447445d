# SPDX-License-Identifier: Apache-2.0
"""Dice and binary cross-entropy of regions, nested or overlapping, instead of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from monai.losses.dice import DiceLoss
from torch import Tensor, nn


class RegionDiceCrossEntropyLoss(nn.Module):
    r"""Each region's sigmoid, learnt as nnU-Net's region-based training does, from logits of classes.

    A region's logit is the log-odds of its classes under the softmax,
    :math:`z_R = \operatorname{logsumexp}_{c \in R} y_c - \operatorname{logsumexp}_{c \notin R} y_c`, so that its
    sigmoid is the sum of its classes' probabilities. The loss is soft Dice plus binary cross-entropy of these sigmoids,
    averaged over samples and regions (and voxels). With a sigmoid of its own for each region, as in nnU-Net (Isensee et
    al., MICCAI BrainLes 2020), an enhancing core may lie outside of its tumour; here what is nested in the labels is
    nested in the prediction, which stays one class a voxel, and every method works as it does with a softmax. For two
    classes it is the plain sigmoid.

    Twice differentiable; half-precision logits are computed with in float32. Equal batches on all ranks average to the
    loss of one process with the whole batch.

    Args:
        regions: name -> classes; none may hold all classes.
        num_classes: the background included.
        lambda_ce: weight of the cross-entropy.
        smooth: added to the numerator and the denominator of each Dice, in voxels; see
            :class:`monai_cggm.losses.DiceCrossEntropyLoss`.

    Raises:
        ValueError: for regions that are empty, hold every class or one that does not exist, for a negative
            ``lambda_ce`` or a ``smooth`` that is not positive.

    Example:
        >>> loss = RegionDiceCrossEntropyLoss({"WT": [1, 2, 3], "ET": [3]}, num_classes=4)
        >>> label = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
        >>> round(loss(torch.zeros(2, 4, 8, 8), label).item(), 4)
        1.7974
    """

    def __init__(
        self,
        regions: Mapping[str, Sequence[int]],
        num_classes: int,
        *,
        lambda_ce: float = 1.0,
        smooth: float = 1.0,
    ) -> None:
        super().__init__()
        if not regions:
            raise ValueError("no region given: expected names and classes, such as {'WT': [1, 2, 3]}")
        members = torch.zeros(len(regions), num_classes, dtype=torch.bool)
        for row, (name, classes) in enumerate(regions.items()):
            if not classes or not set(classes) <= set(range(num_classes)) or len(set(classes)) == num_classes:
                raise ValueError(
                    f"region {name} has the classes {list(classes)}, expected some of 0 to {num_classes - 1}, not all"
                )
            members[row, list(classes)] = True
        if lambda_ce < 0:
            raise ValueError(f"lambda_ce must not be negative, got {lambda_ce}")
        if smooth <= 0:
            raise ValueError(f"smooth must be positive, got {smooth}")
        self.members: Tensor
        self.register_buffer("members", members, persistent=False)
        self.lambda_ce = lambda_ce
        self.dice = DiceLoss(sigmoid=True, smooth_nr=smooth, smooth_dr=smooth)

    def region_logits(self, logits: Tensor) -> Tensor:
        """Return each region's log-odds, ``(B, R, *S)``, from logits of classes ``(B, K, *S)``."""
        rows = []
        for member in self.members:
            inside, outside = logits[:, member], logits[:, ~member]
            rows.append(torch.logsumexp(inside, dim=1) - torch.logsumexp(outside, dim=1))
        return torch.stack(rows, dim=1)

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            logits: of classes, ``(B, K, *S)``.
            label: class indices ``(B, 1, *S)``, of any integer type.

        Returns:
            A scalar.

        Raises:
            ValueError: for another number of classes, or a label of another shape.
        """
        if logits.shape[1] != self.members.shape[1]:
            raise ValueError(f"logits have {logits.shape[1]} classes, expected {self.members.shape[1]}")
        if label.shape != (logits.shape[0], 1, *logits.shape[2:]):
            expected = (logits.shape[0], 1, *logits.shape[2:])
            raise ValueError(f"label must have shape {expected}, got {tuple(label.shape)}")
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        z = self.region_logits(logits)
        truth = self.members.T[label.squeeze(1).long()].movedim(-1, 1).to(z)
        loss: Tensor = self.dice(z, truth) + self.lambda_ce * F.binary_cross_entropy_with_logits(z, truth)
        return loss
