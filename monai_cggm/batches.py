# SPDX-License-Identifier: Apache-2.0
"""From a batch to what a network is given: an image or a dict of modalities, the label, which modalities are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.utils import CommonKeys
from torch import Tensor

#: the batch's key for the modalities that each case has, boolean ``(B, M)``, made by
#: :class:`monai_cggm.transforms.FillMissingd`
PRESENT = "present"
#: the batch's key for those that the network may use in this step: :class:`monai_cggm.methods.ModalityDropout`
FUSED = "fused"

#: ending of the key under which a dict of modalities has the mask of one's padding, boolean ``(B, T)``
PADDING = "_padding"

#: what a network is given: an image ``(B, M, *S)``, or one tensor a modality by its name (and padding masks, say)
Inputs = Tensor | Mapping[str, Tensor]


def samples_in(x: Inputs) -> int:
    """Return B, the number of samples of what a network is given.

    Example:
        >>> samples_in(torch.zeros(3, 2, 8, 8)), samples_in({"audio": torch.zeros(5, 7, 4)})
        (3, 5)
    """
    return len(x) if isinstance(x, Tensor) else len(next(iter(x.values())))


def spatial_size(x: Inputs) -> tuple[int, ...]:
    """Return the size of what a network predicts for: an image's spatial axes, none for a dict of modalities.

    Example:
        >>> spatial_size(torch.zeros(3, 2, 8, 6)), spatial_size({"audio": torch.zeros(5, 7, 4)})
        ((8, 6), ())
    """
    return tuple(x.shape[2:]) if isinstance(x, Tensor) else ()


def rows_of(x: Inputs, rows: Tensor) -> Inputs:
    """Return some samples of what a network is given, by their indices.

    Example:
        >>> rows_of({"audio": torch.arange(6).view(3, 2)}, torch.tensor([2]))
        {'audio': tensor([[4, 5]])}
    """
    if isinstance(x, Tensor):
        return x[rows]
    return {name: value[rows] for name, value in x.items()}


def prepare_batch(
    batch: Mapping[str, Any], device: str | torch.device | None = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[Inputs, Tensor | None, tuple[Any, ...], dict[str, Any]]:
    """Give the network its mask of modalities, for the ``prepare_batch`` of MONAI's engines.

    Args:
        batch: has ``image``, a tensor ``(B, M, *S)`` or a dict of tensors, one a modality; ``label`` if there is one;
            and a mask if some modality is missing (``present``) or dropped (``fused``, which wins, because it leaves
            out the missing ones too). ``fused`` may have several rows a sample, ``(R * B, M)``; the label is then
            repeated R times.
        device: where to.
        non_blocking: see ``torch.Tensor.to``.
        kwargs: further arguments of ``torch.Tensor.to``; of a dict they are for the floating-point tensors, because
            masks of padding stay boolean.

    Returns:
        Image or dict, label, no further arguments, and ``{"present": mask}`` where some modality is left out.

    Example:
        >>> batch = {"image": torch.zeros(1, 2, 4, 4), "label": torch.zeros(1, 1, 4, 4)}
        >>> prepare_batch(batch)[3]
        {}
        >>> prepare_batch({**batch, "present": torch.tensor([[True, False]])})[3]
        {'present': tensor([[ True, False]])}
    """

    def sent(value: Tensor) -> Tensor:
        return value.to(device=device, non_blocking=non_blocking, **kwargs)

    given = batch[CommonKeys.IMAGE]
    label = batch.get(CommonKeys.LABEL)
    mask = batch.get(FUSED, batch.get(PRESENT))
    if label is not None:
        label = sent(label)
        if mask is not None and len(mask) != len(label):
            label = label.repeat(len(mask) // len(label), *[1] * (label.dim() - 1))
    # a mask that leaves nothing out costs time and changes nothing
    if mask is None or (len(mask) == samples_in(given) and bool(mask.all())):
        extra = {}
    else:
        extra = {PRESENT: mask.to(device=device, non_blocking=non_blocking)}
    if isinstance(given, Tensor):
        return sent(given), label, (), extra
    inputs = {
        name: sent(value) if value.is_floating_point() else value.to(device=device, non_blocking=non_blocking)
        for name, value in given.items()
    }
    return inputs, label, (), extra
