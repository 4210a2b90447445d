# SPDX-License-Identifier: Apache-2.0
"""Which samples of a batch count for a modality, and their loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ignite.distributed as idist
from torch import Tensor


def mask_in(batch: Any, key: str, samples: int) -> Tensor | None:
    """Return a batch's mask of modalities, boolean ``(samples, M)`` on the CPU; None where nothing is left out.

    Args:
        batch: the trainer's batch.
        key: ``present`` or ``fused``, see :mod:`monai_cggm.batches`.
        samples: B; of a mask with several rows a sample, these are the rows of the samples as they are.

    Example:
        >>> import torch
        >>> mask_in({"present": torch.tensor([[True, False], [True, True]])}, "present", 2).tolist()
        [[True, False], [True, True]]
        >>> mask_in({"present": torch.ones(2, 2, dtype=torch.bool)}, "present", 2) is None
        True
    """
    mask = batch.get(key) if isinstance(batch, Mapping) else None
    return None if mask is None or bool(mask[:samples].all()) else mask[:samples].bool().cpu()


def rows_with(prediction: Tensor, target: Tensor, present: Tensor | None, modality: int) -> tuple[Tensor, Tensor]:
    """Return prediction and target of the samples that have this modality.

    Args:
        prediction: ``(B, ...)``.
        target: ``(B, ...)``.
        present: boolean ``(B, M)``; None: all samples have it.
        modality: its number.

    Example:
        >>> import torch
        >>> present = torch.tensor([[True, False], [True, True]])
        >>> rows_with(torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), present, 1)
        (tensor([0.2000]), tensor([1]))
    """
    if present is None:
        return prediction, target
    rows = present[:, modality].nonzero().squeeze(1).to(target.device)
    return prediction[rows], target[rows]


def mean_loss(loss_function: Callable[..., Tensor], prediction: Tensor, target: Tensor) -> Tensor:
    """Return the loss of some samples, which may be none: then 0, with a graph.

    Example:
        >>> import torch
        >>> mean_loss(torch.nn.functional.l1_loss, torch.zeros(0), torch.zeros(0))
        tensor(0.)
    """
    if len(target):
        return loss_function(prediction, target).mean()
    if idist.get_world_size() > 1:  # take part in what the loss adds over the ranks, which it does where autograd is on
        loss_function(prediction.detach(), target)
    return prediction.sum()  # the mean over no sample is not a number
