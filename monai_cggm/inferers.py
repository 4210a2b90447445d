# SPDX-License-Identifier: Apache-2.0
"""Inference over whole volumes with a network of slices, missing modalities included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from monai.data import MetaTensor
from monai.inferers import SliceInferer
from monai.utils import convert_to_dst_type
from torch import Tensor, nn

from monai_cggm.networks import Present

Logits = Tensor | dict[str, Tensor]


class VolumeInferer(SliceInferer):
    """Runs a 2-D network over the slices of volumes, whole slices by default.

    MONAI's inferers do not carry a presence mask: ``SliceInferer`` drops extra arguments without a word, and a sliding
    window hands one mask to windows of several cases. Here each case goes alone through
    :class:`monai_cggm.networks.Present` with its own mask. Inputs in half precision are computed in float32, because
    MONAI blends windows in the input's type.

    Args:
        roi_size: the window within a slice; -1 takes the whole slice, which the network pads to its stride itself.
        sw_batch_size: how many slices (or windows) go through the network at a time.
        spatial_dim: the axis across the slices; the last, axial in BraTS, by default.
        kwargs: other arguments of MONAI's ``SlidingWindowInferer``, such as ``overlap``, ``device``, ``progress``.

    Example:
        >>> volumes = torch.zeros(1, 4, 32, 32, 5)
        >>> VolumeInferer()(volumes, nn.Conv2d(4, 3, kernel_size=1)).shape
        torch.Size([1, 3, 32, 32, 5])
    """

    def __init__(
        self,
        roi_size: Sequence[int] = (-1, -1),
        sw_batch_size: int = 8,
        spatial_dim: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(roi_size=roi_size, sw_batch_size=sw_batch_size, spatial_dim=spatial_dim, **kwargs)

    def __call__(  # type: ignore[override]
        self,
        inputs: Tensor,
        network: Callable[..., Logits],
        present: Tensor | None = None,
    ) -> Logits:
        """Predict volumes.

        Args:
            inputs: volumes ``(B, M, H, W, D)``.
            network: a 2-D network that returns logits ``(b, K, h, w)`` or a dictionary of them; with ``present`` it
                must be a module that takes ``present``, as :class:`monai_cggm.networks.MultimodalSegmenter` does.
            present: which modalities each case has, boolean ``(B, M)``; None where all are there.

        Returns:
            Logits ``(B, K, H, W, D)``, or a dictionary of them in the network's own order; with the inputs' metadata.
            Predictions that the network makes for some cases of the batch only are left out.

        Raises:
            TypeError: where there is a mask but the network is no module.
            ValueError: where ``present`` is not ``(B, M)``, or leaves a case without any modality.
        """
        plain = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        if plain.dtype in (torch.float16, torch.bfloat16):
            plain = plain.float()
        if present is None:
            logits = self._volumes(plain, network)
        else:
            _check_present(present, plain)
            if not isinstance(network, nn.Module):
                raise TypeError(f"a mask needs a torch.nn.Module that takes `present`, got {type(network).__name__}")
            each = [
                self._volumes(case[None], Present(network, mask.bool()))
                for case, mask in zip(plain, present, strict=True)
            ]
            logits = _concatenate(each)
        return _with_metadata(logits, inputs)

    def _volumes(self, inputs: Tensor, network: Callable[..., Logits]) -> Logits:
        order: list[str] = []

        def slices(x: Tensor) -> Logits:
            logits = network(x)
            if isinstance(logits, dict) and not order:
                order.extend(logits)
            return logits

        logits = cast(Logits, super().__call__(inputs, slices))
        # MONAI hands a dictionary back sorted by key, which would put the tables' rows out of the modalities' order.
        return {name: logits[name] for name in order} if isinstance(logits, dict) else logits


def _check_present(present: Tensor, inputs: Tensor) -> None:
    if tuple(present.shape) != tuple(inputs.shape[:2]):
        raise ValueError(
            f"present must be (batch, modalities) = {tuple(inputs.shape[:2])}, got shape {tuple(present.shape)}"
        )
    if not present.bool().any(dim=1).all():
        raise ValueError(f"every case needs at least one modality, got {present.tolist()}")


def _concatenate(each: Sequence[Logits]) -> Logits:
    if isinstance(each[0], dict):
        volumes = cast(Sequence[dict[str, Tensor]], each)
        # what some case of the batch does not have, such as the classifier of an absent modality, is left out
        common = [name for name in volumes[0] if all(name in logits for logits in volumes)]
        return {name: torch.cat([logits[name] for logits in volumes]) for name in common}
    return torch.cat(cast(list[Tensor], each))


def _with_metadata(logits: Logits, inputs: Tensor) -> Logits:
    if not isinstance(inputs, MetaTensor):
        return logits
    if isinstance(logits, dict):
        return {name: cast(Tensor, _with_metadata(value, inputs)) for name, value in logits.items()}
    return convert_to_dst_type(logits, inputs, dtype=logits.dtype, device=logits.device)[0]
