# SPDX-License-Identifier: Apache-2.0
"""From a batch to what a network is given: the image, the label, and which modalities are there."""

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


def prepare_batch(
    batch: Mapping[str, Any], device: str | torch.device | None = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[Tensor, Tensor | None, tuple[Any, ...], dict[str, Any]]:
    """Give the network its mask of modalities, for the ``prepare_batch`` of MONAI's engines.

    Args:
        batch: has ``image`` ``(B, M, *S)``, ``label`` if there is one, and a mask if some modality is missing
            (``present``) or dropped (``fused``, which wins, because it leaves out the missing ones too). ``fused`` may
            have several rows a sample, ``(R * B, M)``; the label is then repeated R times.
        device: where to.
        non_blocking: see ``torch.Tensor.to``.
        kwargs: further arguments of ``torch.Tensor.to``.

    Returns:
        Image, label, no further arguments, and ``{"present": mask}`` where some modality is left out.

    Example:
        >>> batch = {"image": torch.zeros(1, 2, 4, 4), "label": torch.zeros(1, 1, 4, 4)}
        >>> prepare_batch(batch)[3]
        {}
        >>> prepare_batch({**batch, "present": torch.tensor([[True, False]])})[3]
        {'present': tensor([[ True, False]])}
    """

    def sent(value: Tensor) -> Tensor:
        return value.to(device=device, non_blocking=non_blocking, **kwargs)

    label = batch.get(CommonKeys.LABEL)
    mask = batch.get(FUSED, batch.get(PRESENT))
    if label is not None:
        label = sent(label)
        if mask is not None and len(mask) != len(label):
            label = label.repeat(len(mask) // len(label), *[1] * (label.dim() - 1))
    # a mask that leaves nothing out costs time and changes nothing
    if mask is None or (len(mask) == len(batch[CommonKeys.IMAGE]) and bool(mask.all())):
        extra = {}
    else:
        extra = {PRESENT: mask.to(device=device, non_blocking=non_blocking)}
    return sent(batch[CommonKeys.IMAGE]), label, (), extra
