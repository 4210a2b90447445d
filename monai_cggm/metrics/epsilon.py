# SPDX-License-Identifier: Apache-2.0
"""Progress measures ε: how well each modality's classifier does on the current batch, higher is better.

Every measure is split in two so that several processes agree: ``sums`` gives additive counts for the local batch,
which may be added over ranks, and ``value`` turns the added counts into one number a modality.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Epsilon(Protocol):
    """What a balancing method needs of a progress measure."""

    def sums(self, predictions: Sequence[Tensor], target: Tensor) -> Tensor:
        """Return additive counts of the local batch, shape ``(M, S)``, float64."""

    def value(self, sums: Tensor) -> Tensor:
        """Return ε of each modality, shape ``(M,)``, from counts added over ranks; NaN where it is undefined."""


class RegionDice:
    """Mean Dice over regions, voxels pooled over the batch, for segmentation.

    A region with no voxel in the batch's truth is left out of the mean: its Dice would be 0 or 1 by chance.
    All modalities are counted in one pass, because the counting is what costs.

    Args:
        regions: classes that make up each region, for example ``{"WT": [1, 2, 3]}``.
        num_classes: number of classes ``K`` of the predictions, background included.

    Raises:
        ValueError: if there is no region, or a region is empty or names a class outside ``0..K-1``.

    Example:
        >>> dice = RegionDice({"lesion": [1]}, num_classes=2)
        >>> truth = torch.tensor([[[[1, 1, 0, 0]]]])                                    # (B, 1, H, W)
        >>> logits = torch.nn.functional.one_hot(truth[:, 0], 2).movedim(-1, 1).float() # a perfect prediction
        >>> dice.value(dice.sums([logits, -logits], truth))
        tensor([1., 0.], dtype=torch.float64)
    """

    def __init__(self, regions: Mapping[str, Sequence[int]], num_classes: int) -> None:
        if not regions:
            raise ValueError("RegionDice needs at least one region")
        for name, classes in regions.items():
            if not classes or not all(0 <= c < num_classes for c in classes):
                raise ValueError(f"region {name!r} must name classes in 0..{num_classes - 1}, got {list(classes)}")
        self.num_classes = num_classes
        self._membership = torch.zeros(len(regions), num_classes, dtype=torch.float64)
        for row, classes in enumerate(regions.values()):
            self._membership[row, list(classes)] = 1.0

    def sums(self, predictions: Sequence[Tensor], target: Tensor) -> Tensor:
        """Count voxels.

        Args:
            predictions: logits of each modality's classifier, each ``(B, K, *spatial)``.
            target: class indices ``(B, 1, *spatial)``.

        Returns:
            ``(M, 3 * regions)``: intersection, predicted and true voxels of each region.
        """
        confusion = self._confusion(predictions, target)
        # moved once: a copy in every step would have the host wait for the GPU
        member = self._membership = self._membership.to(confusion.device)
        intersection = torch.einsum("mtp,rt,rp->mr", confusion, member, member)
        predicted = torch.einsum("mtp,rp->mr", confusion, member)
        true = torch.einsum("mtp,rt->mr", confusion, member)
        return torch.cat([intersection, predicted, true], dim=1)

    def value(self, sums: Tensor) -> Tensor:
        """Return mean Dice ``(M,)``; NaN for a batch in which no region is present."""
        intersection, predicted, true = sums.chunk(3, dim=1)
        present = true > 0
        dice = torch.where(present, 2 * intersection / (predicted + true).clamp(min=1), 0.0)
        return dice.sum(dim=1) / present.sum(dim=1)

    def absent(self, sums: Tensor) -> Tensor:
        """Return how many regions the batch's truth lacks, a scalar."""
        return (sums.chunk(3, dim=1)[2].amax(dim=0) == 0).sum()

    def _confusion(self, predictions: Sequence[Tensor], target: Tensor) -> Tensor:
        k, m = self.num_classes, len(predictions)
        # max rather than argmax: of channels that are not last, argmax on a CPU takes ten times as long
        classes = torch.stack([p.max(dim=1).indices for p in predictions]).flatten(1)
        truth = target.flatten().long()
        offset = torch.arange(m, device=truth.device).unsqueeze(1) * k
        index = ((offset + truth) * k + classes).flatten()
        # scatter_add_ rather than bincount: on a GPU the latter waits for the largest index
        counts = torch.zeros(m * k * k, dtype=torch.float64, device=truth.device)
        counts.scatter_add_(0, index, torch.ones((), dtype=torch.float64, device=truth.device).expand_as(index))
        return counts.view(m, k, k)


class Accuracy:
    """Share of right classes, for classification.

    Example:
        >>> accuracy = Accuracy()
        >>> logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        >>> accuracy.value(accuracy.sums([logits, -logits], torch.tensor([0, 0])))
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    def sums(self, predictions: Sequence[Tensor], target: Tensor) -> Tensor:
        """Count right answers: predictions ``(B, K)`` each, target ``(B,)``; returns ``(M, 2)``."""
        truth = target.flatten()
        right = torch.stack([(p.argmax(dim=1) == truth).sum() for p in predictions]).double()
        return torch.stack([right, torch.full_like(right, truth.numel())], dim=1)

    def value(self, sums: Tensor) -> Tensor:
        """Return accuracies ``(M,)``."""
        return sums[:, 0] / sums[:, 1]


class NegativeMAE:
    """Minus the mean absolute error, for regression: the sign makes higher better, as for every other ε.

    Example:
        >>> mae = NegativeMAE()
        >>> mae.value(mae.sums([torch.tensor([[1.0], [3.0]])], torch.tensor([1.0, 1.0])))
        tensor([-1.], dtype=torch.float64)
    """

    def sums(self, predictions: Sequence[Tensor], target: Tensor) -> Tensor:
        """Add errors: predictions ``(B, 1)`` or ``(B,)`` each, target ``(B,)`` or ``(B, 1)``; returns ``(M, 2)``."""
        truth = target.flatten().double()
        error = torch.stack([(p.flatten().double() - truth).abs().sum() for p in predictions])
        return torch.stack([-error, torch.full_like(error, truth.numel())], dim=1)

    def value(self, sums: Tensor) -> Tensor:
        """Return −MAE ``(M,)``."""
        return sums[:, 0] / sums[:, 1]
