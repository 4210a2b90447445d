# SPDX-License-Identifier: Apache-2.0
"""How probable a classifier holds the truth to be, in a form that serves voxels, vectors and numbers alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def true_class_probability(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean probability of the truth, a scalar in (0, 1]; see :class:`ProbabilityOfTruth`.

    Args:
        prediction: ``(B, K, *spatial)`` or ``(B, K)`` logits; ``(B, 1)`` or ``(B,)`` for regression.
        target: ``(B, 1, *spatial)`` class indices; ``(B,)`` or ``(B, 1)`` class indices or numbers.

    Returns:
        A float64 scalar without graph; NaN for an empty batch.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 30.0]])
        >>> true_class_probability(logits, torch.tensor([0, 1]))
        tensor(0.7500, dtype=torch.float64)
    """
    measure = ProbabilityOfTruth()
    return measure.value(measure.sums([prediction], target))[0]


class ProbabilityOfTruth:
    r"""Mean probability that each modality's classifier gives to the truth; a progress measure like those of metrics.

    * Classification: the softmax probability of the true class, averaged over samples, as OGM-GE has it.
    * Segmentation: the same of voxels, averaged within each class that the truth has, then over those classes. Over all
      voxels it would be the background's, which is about 1 for every modality.
    * Regression (one output): :math:`e^{-|\hat y - y|}` averaged over samples, the likelihood of a Laplace distribution
      of scale 1 up to its factor ½. It depends on the unit of the target: standardise targets that are far from 1.

    ``sums`` are additive, so several processes that add them get what one with the whole batch would.

    Example:
        >>> measure = ProbabilityOfTruth()
        >>> truth = torch.tensor([[[[0, 0, 0, 1]]]])                    # (B, 1, H, W), one voxel of the lesion
        >>> background = torch.zeros(1, 2, 1, 4)
        >>> background[:, 0] = 30.0                                     # says background everywhere
        >>> measure.value(measure.sums([background], truth))
        tensor([0.5000], dtype=torch.float64)
        >>> measure.value(measure.sums([torch.tensor([[1.0], [2.0]])], torch.tensor([1.0, 2.0])))
        tensor([1.], dtype=torch.float64)
    """

    def sums(self, predictions: Sequence[Tensor], target: Tensor) -> Tensor:
        """Add probabilities.

        Args:
            predictions: of each modality's classifier, shaped as for :func:`true_class_probability`.
            target: see there.

        Returns:
            ``(M, 2G)``, float64: for each of G groups the sum of probabilities, then for each the number of samples or
            voxels. Groups are the K classes in segmentation; else there is one.
        """
        return torch.stack([_sums(p.detach(), target) for p in predictions])

    def value(self, sums: Tensor) -> Tensor:
        """Return the mean probability ``(M,)``; NaN where nothing was counted."""
        total, count = sums.chunk(2, dim=1)
        counted = count > 0
        mean = torch.where(counted, total / count.clamp(min=1), 0.0)
        return mean.sum(dim=1) / counted.sum(dim=1)


def _sums(prediction: Tensor, target: Tensor) -> Tensor:
    if prediction.dim() == 1 or prediction.shape[1] == 1:
        error = prediction.flatten().double() - target.flatten().double()
        return _sum_and_count(torch.exp(-error.abs()))
    truth = target.reshape(len(target), 1, *prediction.shape[2:]).long()
    precise = torch.promote_types(prediction.dtype, torch.float32)
    probability = torch.softmax(prediction, dim=1, dtype=precise).gather(1, truth).flatten().double()
    if prediction.dim() == 2:
        return _sum_and_count(probability)
    # one class after the other: adding by index is not deterministic on a GPU
    members = [truth.flatten() == k for k in range(prediction.shape[1])]
    total = [torch.where(member, probability, 0.0).sum() for member in members]
    return torch.stack([*total, *(member.sum().double() for member in members)])


def _sum_and_count(values: Tensor) -> Tensor:
    total = values.sum()
    return torch.stack([total, torch.full_like(total, values.numel())])
