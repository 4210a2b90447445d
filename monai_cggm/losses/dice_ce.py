# SPDX-License-Identifier: Apache-2.0
"""Soft Dice plus weighted cross-entropy that adds up over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import ignite.distributed as idist
import torch
import torch.nn.functional as F
from monai.losses.dice import DiceLoss
from torch import Tensor, nn


class DiceCrossEntropyLoss(nn.Module):
    r"""The task's loss of CGGM on BraTS: :math:`L = L_{Dice} + \lambda_{CE} L_{CE}`.

    :math:`L_{Dice}` is one minus soft Dice of each sample and class, averaged over both. :math:`L_{CE}` is
    cross-entropy weighted by class, divided by the sum of the weights of *all* voxels of the batch. MONAI's
    ``DiceCELoss(weight=...)`` weights its Dice term too, hence this composition.

    In distributed training the sum of weights is all-reduced, so that the mean over ranks (of equal batches) of the
    loss, and of its gradient, equals that of one process with the whole batch. Outside of training, that is where
    autograd is off, it is the rank's own: ranks may then have different numbers of batches, and must not wait for
    each other.

    The loss is twice differentiable. Half-precision logits are computed with in float32.

    Args:
        ce_weight: weight of each class in the cross-entropy, background first; the default is the paper's. None: all 1.
        lambda_ce: :math:`\lambda_{CE}`; 1 in the paper.
        include_background: whether the background has a Dice term.
        smooth: added to the numerator and the denominator of each Dice, in voxels. Where a class is absent from a
            slice, the second derivative by its predicted volume reaches 2 / smooth²: 2e10 with MONAI's default of
            1e-5, which CGGM would differentiate through, and 2 with 1. A class absent from both costs nothing.

    Raises:
        ValueError: for a negative ``lambda_ce`` or a ``smooth`` that is not positive.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 4, 8, 8)
        >>> label = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
        >>> loss = DiceCrossEntropyLoss()(logits, label)
        >>> round(loss.item(), 4)
        2.3275
    """

    def __init__(
        self,
        ce_weight: Sequence[float] | None = (0.2, 0.3, 0.25, 0.25),
        *,
        lambda_ce: float = 1.0,
        include_background: bool = False,
        smooth: float = 1.0,
    ) -> None:
        super().__init__()
        if lambda_ce < 0:
            raise ValueError(f"lambda_ce must not be negative, got {lambda_ce}")
        if smooth <= 0:
            raise ValueError(f"smooth must be positive, got {smooth}")
        weight = None if ce_weight is None else torch.as_tensor(ce_weight, dtype=torch.float32)
        self.ce_weight: Tensor | None
        self.register_buffer("ce_weight", weight, persistent=False)
        self.lambda_ce = lambda_ce
        self.dice = DiceLoss(
            include_background=include_background, to_onehot_y=True, softmax=True, smooth_nr=smooth, smooth_dr=smooth
        )

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            logits: ``(B, K, *S)``.
            label: class indices ``(B, 1, *S)``, of any integer type.

        Returns:
            A scalar.

        Raises:
            ValueError: for a label of another shape, or weights that are not one a class.
        """
        if label.shape != (logits.shape[0], 1, *logits.shape[2:]):
            expected = (logits.shape[0], 1, *logits.shape[2:])
            raise ValueError(f"label must have shape {expected}, got {tuple(label.shape)}")
        if self.ce_weight is not None and len(self.ce_weight) != logits.shape[1]:
            raise ValueError(f"ce_weight has {len(self.ce_weight)} weights for {logits.shape[1]} classes")
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        label = label.long()
        return self.dice(logits, label) + self.lambda_ce * self._cross_entropy(logits, label.squeeze(1))

    def _cross_entropy(self, logits: Tensor, label: Tensor) -> Tensor:
        weight = logits.new_ones(logits.shape[1]) if self.ce_weight is None else self.ce_weight.to(logits)
        total = weight[label].sum()
        ranks = idist.get_world_size() if torch.is_grad_enabled() else 1
        if ranks > 1:
            total = cast(Tensor, idist.all_reduce(total))
        return ranks * F.cross_entropy(logits, label, weight=weight, reduction="sum") / total
