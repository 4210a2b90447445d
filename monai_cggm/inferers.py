# SPDX-License-Identifier: Apache-2.0
"""Inference over whole volumes with a network of slices or of patches, missing modalities included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from monai.data import MetaTensor
from monai.inferers import SliceInferer, SlidingWindowInferer
from monai.utils import convert_to_dst_type
from torch import Tensor, nn
from tqdm import tqdm

from monai_cggm.networks import Present

Logits = Tensor | dict[str, Tensor]

#: the name under which logits are stored that came without one
_SINGLE = ""


class VolumeInferer(SliceInferer):
    """Runs a 2-D network over the slices of volumes, whole slices by default.

    MONAI's inferers do not carry a presence mask: ``SliceInferer`` drops extra arguments without a word, and a sliding
    window hands one mask to windows of several cases. Here each case goes alone through
    :class:`monai_cggm.networks.Present` with its own mask. Inputs in half precision are computed in float32, because
    MONAI blends windows in the input's type.

    Whole slices overlap nothing, so nothing is blended: they go through the network in batches and their logits are
    put where they belong. Smaller windows, and buffered ones (``buffer_steps``), are MONAI's.

    A slice without brain, that is one whose every channel is 0 throughout, as the preparation leaves the background,
    need not be computed more than once. Nobody says that the network calls it background: the first such slice goes
    through the network, and what it predicts there, whatever that is and for every member of a dictionary, stands for
    the others, as they are the same image. The segmentation is the one of all slices, to rounding, for any network
    that looks at each slice alone and draws nothing (in training mode, dropout draws and batch norm mixes slices: use
    ``reuse_empty=False``). With a mask the first empty slice of each case is computed under the case's own mask. Absent
    channels count as well: where they hold something other than 0 their slices are computed, which costs time and
    changes nothing.

    Args:
        roi_size: the window within a slice; -1 takes the whole slice, which the network pads to its stride itself.
        sw_batch_size: how many slices (or windows) go through the network at a time.
        spatial_dim: the axis across the slices; the last, axial in BraTS, by default.
        reuse_empty: compute the first of several empty slices for all of them; False: each. Of whole slices only.
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
        *,
        reuse_empty: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(roi_size=roi_size, sw_batch_size=sw_batch_size, spatial_dim=spatial_dim, **kwargs)
        self.reuse_empty = reuse_empty

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
            Predictions that the network makes for some cases of the batch only are left out. In memory the slices
            follow each other, so ``reshape`` works where ``view`` may not.

        Raises:
            TypeError: where there is a mask but the network is no module.
            ValueError: where ``present`` is not ``(B, M)``, or leaves a case without any modality.
        """
        return _predicted(self._volumes, inputs, network, present)

    def _volumes(self, inputs: Tensor, network: Callable[..., Logits]) -> Logits:
        if self._takes_whole_slices(inputs):
            return self._whole_slices(inputs, network)
        return _in_windows(super().__call__, inputs, network)

    def _takes_whole_slices(self, inputs: Tensor) -> bool:
        """Whether the direct way does the same as MONAI's, which also refuses what fits neither."""
        whole = len(self.orig_roi_size) == 2 and all(size is None or size <= 0 for size in self.orig_roi_size)
        fits = inputs.dim() == 5 and self.spatial_dim in (0, 1, 2)
        return whole and fits and not self.buffer_steps and not self.with_coord

    def _whole_slices(self, inputs: Tensor, network: Callable[..., Logits]) -> Logits:
        slices = inputs.movedim(self.spatial_dim + 2, 1)
        batch, depth = slices.shape[:2]
        empty = _empty_slices(inputs, self.spatial_dim).nonzero().flatten()
        reused = empty[1:] if self.reuse_empty else empty[:0]
        computed = torch.ones(batch * depth, dtype=torch.bool).index_fill_(0, reused, False).nonzero().flatten()
        volumes: dict[str, Tensor] = {}
        for some in tqdm(computed.split(self.sw_batch_size), disable=not self.progress):
            logits = network(slices[some // depth, some % depth].to(self.sw_device or inputs.device))
            _put(logits, some, volumes, batch * depth, self._stitching_device(inputs))
        for name, values in volumes.items():
            if len(reused):
                values[reused] = values[empty[:1]]
            volumes[name] = values.unflatten(0, (batch, depth)).movedim(1, self.spatial_dim + 2)
        return volumes.get(_SINGLE, volumes)

    def _stitching_device(self, inputs: Tensor) -> torch.device:
        if self.device is None and self.cpu_thresh is not None and inputs.shape[2:].numel() > self.cpu_thresh:
            return torch.device("cpu")
        return torch.device(self.device or inputs.device)


class PatchInferer(SlidingWindowInferer):
    """Runs a 3-D network over patches of volumes, and blends them where they overlap.

    MONAI's ``SlidingWindowInferer``, with what :class:`VolumeInferer` adds to MONAI's ``SliceInferer``: each case goes
    alone through :class:`monai_cggm.networks.Present` with its own presence mask, dictionaries of logits keep the
    network's order, inputs in half precision are computed in float32, and logits in half precision, as autocast returns
    them, are blended in float32.

    Args:
        roi_size: the patch; -1 takes all of an axis. An axis shorter than it is padded by zeros, as the background is.
        sw_batch_size: how many patches go through the network at a time.
        overlap: share of a patch that it has in common with the next, along each axis.
        mode: ``constant``, where overlapping predictions count alike, or ``gaussian``, less towards a patch's edges.
        kwargs: other arguments of ``SlidingWindowInferer``, such as ``device``, ``progress``. Its ``buffer_steps``
            keeps one prediction of several, so a network that returns a dictionary is refused with it.

    Example:
        >>> volumes = torch.zeros(1, 4, 40, 32, 20)
        >>> PatchInferer([16, 16, 16])(volumes, nn.Conv3d(4, 3, kernel_size=1)).shape
        torch.Size([1, 3, 40, 32, 20])
    """

    def __init__(
        self,
        roi_size: Sequence[int] | int,
        sw_batch_size: int = 1,
        overlap: Sequence[float] | float = 0.25,
        mode: str = "constant",
        **kwargs: Any,
    ) -> None:
        super().__init__(roi_size, sw_batch_size, overlap, mode, **kwargs)

    def __call__(  # type: ignore[override]
        self,
        inputs: Tensor,
        network: Callable[..., Logits],
        present: Tensor | None = None,
    ) -> Logits:
        """Predict volumes.

        Args:
            inputs: volumes ``(B, M, H, W, D)``.
            network: returns logits ``(b, K, h, w, d)`` of patches or a dictionary of them; with ``present`` it must be
                a module that takes ``present``, as :class:`monai_cggm.networks.MultimodalSegmenter` does.
            present: which modalities each case has, boolean ``(B, M)``; None where all are there.

        Returns:
            Logits ``(B, K, H, W, D)``, or a dictionary of them in the network's own order; with the inputs' metadata.
            Predictions that the network makes for some cases of the batch only are left out.

        Raises:
            TypeError: where there is a mask but the network is no module.
            ValueError: where ``present`` is not ``(B, M)``, or leaves a case without any modality; for a patch of
                another number of axes than the volumes have; and for a dictionary under ``buffer_steps``.
        """
        return _predicted(self._volumes, inputs, network, present)

    def _volumes(self, inputs: Tensor, network: Callable[..., Logits]) -> Logits:
        def patches(x: Tensor) -> Logits:
            logits = network(x)
            if self.buffer_steps and isinstance(logits, dict):
                raise ValueError(
                    f"buffer_steps keeps one prediction, and the network returns {', '.join(logits)}: leave it out"
                )
            return logits

        return _in_windows(super().__call__, inputs, patches)


def _predicted(
    volumes: Callable[[Tensor, Callable[..., Logits]], Logits],
    inputs: Tensor,
    network: Callable[..., Logits],
    present: Tensor | None,
) -> Logits:
    """Predict with ``volumes``, which knows no masks: all cases together without one, each alone with its own."""
    plain = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
    if plain.dtype in (torch.float16, torch.bfloat16):
        plain = plain.float()
    if present is None:
        logits = volumes(plain, network)
    else:
        _check_present(present, plain)
        if not isinstance(network, nn.Module):
            raise TypeError(f"a mask needs a torch.nn.Module that takes `present`, got {type(network).__name__}")
        each = [volumes(case[None], Present(network, mask.bool())) for case, mask in zip(plain, present, strict=True)]
        logits = _concatenate(each)
    return _with_metadata(logits, inputs)


def _in_windows(infer: Callable[..., Any], inputs: Tensor, network: Callable[..., Logits]) -> Logits:
    """Call one of MONAI's inferers, and bring a dictionary back into the network's order."""
    order: list[str] = []

    def windows(x: Tensor) -> Logits:
        logits = network(x)
        if not isinstance(logits, dict):
            return _blended_in(logits, inputs.dtype)
        if not order:
            order.extend(logits)
        return {name: _blended_in(values, inputs.dtype) for name, values in logits.items()}

    logits = cast(Logits, infer(inputs, windows))
    # MONAI hands a dictionary back sorted by key, which would put the tables' rows out of the modalities' order.
    return {name: logits[name] for name in order} if isinstance(logits, dict) else logits


def _blended_in(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """MONAI multiplies the logits by the windows' weights in place, in the logits' type."""
    return logits.to(dtype) if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _empty_slices(inputs: Tensor, spatial_dim: int) -> Tensor:
    """Which slices, ``(B * D,)`` on the CPU, are 0 in every channel; NaN is not 0."""
    # one axis at a time: on a CPU several times faster than all in one call
    there = inputs.ne(0).any(dim=1).movedim(spatial_dim + 1, 1)
    return there.any(dim=2).any(dim=2).logical_not().flatten().cpu()


def _put(logits: Logits, where: Tensor, volumes: dict[str, Tensor], slices: int, device: torch.device) -> None:
    """Store the logits of some slices; the first ones tell how much room all of them take."""
    if not isinstance(logits, Tensor | dict):
        raise TypeError(f"the network must return logits or a dictionary of them, got {type(logits).__name__}")
    for name, values in (logits if isinstance(logits, dict) else {_SINGLE: logits}).items():
        if name not in volumes:
            # half precision, as autocast returns it, is stored in the volumes' own, as MONAI does
            dtype = torch.promote_types(values.dtype, torch.float32)
            volumes[name] = torch.empty(slices, *values.shape[1:], dtype=dtype, device=device)
        volumes[name][where] = values.to(device, volumes[name].dtype)


def _check_present(present: Tensor, inputs: Tensor) -> None:
    if tuple(present.shape) != tuple(inputs.shape[:2]):
        raise ValueError(
            f"present must be (batch, modalities) = {tuple(inputs.shape[:2])}, got shape {tuple(present.shape)}"
        )
    if not present.bool().any(dim=1).all():
        raise ValueError(f"every case needs at least one modality, got {present.tolist()}")


def _concatenate(each: Sequence[Logits]) -> Logits:
    if len(each) == 1:
        return each[0]
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
