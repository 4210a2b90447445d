# SPDX-License-Identifier: Apache-2.0
"""Light decoders that segment from one modality's features alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from monai.networks.blocks.convolutions import Convolution
from monai.networks.layers.factories import Conv
from torch import Tensor, nn

from monai_cggm.batches import Inputs, spatial_size
from monai_cggm.networks.deeplab import (
    RELU,
    DeepLabV3PlusEncoder,
    NormName,
    conv_norm_relu,
    norm_spec,
    upsample,
    upsample_logits,
)
from monai_cggm.networks.late import LateFusion
from monai_cggm.networks.segmenter import MultimodalSegmenter

Features = tuple[Tensor, Tensor]


class LightDecoder(nn.Module):
    """Decoder of one modality: DeepLab v3+'s with depthwise-separable convolutions.

    Args:
        low_channels: channels of the low-level features.
        high_channels: channels of the high-level features.
        channels: channels of the output.
        spatial_dims: 2 or 3.
        low_reduced: channels that the low-level features are reduced to.
        norm: see :func:`monai_cggm.networks.norm_spec`.
    """

    def __init__(
        self,
        low_channels: int,
        high_channels: int,
        channels: int,
        *,
        spatial_dims: int,
        low_reduced: int,
        norm: NormName,
    ) -> None:
        super().__init__()
        self.reduce_low = conv_norm_relu(spatial_dims, low_channels, low_reduced, norm=norm)
        self.decode = nn.Sequential(
            *_separable(spatial_dims, high_channels + low_reduced, channels, norm),
            *_separable(spatial_dims, channels, channels, norm),
        )

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """Decode low- and high-level features, as an encoder returns them, to ``(B, channels, *S/low_stride)``."""
        low = self.reduce_low(low)
        return self.decode(torch.cat([upsample(high, list(low.shape[2:])), low], dim=1))


def _separable(spatial_dims: int, in_channels: int, out_channels: int, norm: NormName) -> list[Convolution]:
    depthwise = Convolution(
        spatial_dims, in_channels, in_channels, kernel_size=3, groups=in_channels, bias=False, conv_only=True
    )
    pointwise = Convolution(
        spatial_dims,
        in_channels,
        out_channels,
        kernel_size=1,
        bias=False,
        norm=norm_spec(norm, out_channels),
        act=RELU,
    )
    return [depthwise, pointwise]


class UnimodalClassifiers(nn.Module):
    """One light decoder a modality: the classifiers :math:`f_i` by which CGGM watches each encoder.

    A module of its own, never a part of the network. Nothing in it is random (no dropout).

    Args:
        modalities: names of the modalities.
        num_classes: number of classes, as the network's.
        low_channels: channels of one modality's low-level features.
        high_channels: channels of one modality's high-level features.
        channels: inputs of each head; must equal those of the network's head, or gradients cannot be compared.
        spatial_dims: 2 or 3.
        low_reduced: channels that the low-level features are reduced to; 48 in DeepLab v3+.
        norm: see :func:`monai_cggm.networks.norm_spec`.
        low_stride: the image's size over that of the low-level features.

    Attributes:
        decoders: ``nn.ModuleDict``, modality → :class:`LightDecoder`.
        heads: ``nn.ModuleDict``, modality → 1×1 convolution at the resolution of the low-level features.

    Example:
        >>> import torch
        >>> network = MultimodalSegmenter(["flair", "t2"], 4, encoder={"backbone": "resnet18", "width": 8})
        >>> classifiers = UnimodalClassifiers.for_network(network)
        >>> image = torch.randn(2, 2, 64, 64)
        >>> features = {name: encoder(image[:, :1]) for name, encoder in network.encoders.items()}
        >>> {name: tuple(logits.shape) for name, logits in classifiers(features, (64, 64)).items()}
        {'flair': (2, 4, 64, 64), 't2': (2, 4, 64, 64)}
    """

    def __init__(
        self,
        modalities: Sequence[str],
        num_classes: int,
        low_channels: int,
        high_channels: int,
        *,
        channels: int = 256,
        spatial_dims: int = 2,
        low_reduced: int = 48,
        norm: NormName = "batch",
        low_stride: int = 4,
    ) -> None:
        super().__init__()
        self.low_stride = low_stride
        self.decoders = nn.ModuleDict(
            {
                name: LightDecoder(
                    low_channels, high_channels, channels, spatial_dims=spatial_dims, low_reduced=low_reduced, norm=norm
                )
                for name in modalities
            }
        )
        conv = Conv[Conv.CONV, spatial_dims]
        self.heads = nn.ModuleDict({name: conv(channels, num_classes, kernel_size=1) for name in modalities})

    @classmethod
    def for_network(cls, network: MultimodalSegmenter, **kwargs: Any) -> UnimodalClassifiers:
        """Build classifiers that fit a network; keyword arguments override what is taken from it."""
        encoder = cast(DeepLabV3PlusEncoder, network.encoders[network.modalities[0]])
        fitting: dict[str, Any] = {
            "channels": network.head.in_channels,
            "spatial_dims": encoder.spatial_dims,
            "norm": encoder.norm,
            "low_stride": encoder.low_stride,
        }
        return cls(
            network.modalities,
            network.num_classes,
            encoder.low_channels,
            encoder.high_channels,
            **{**fitting, **kwargs},
        )

    def forward(self, features: Mapping[str, Features], size: Sequence[int]) -> dict[str, Tensor]:
        """Segment from each modality alone.

        Args:
            features: modality → low- and high-level features, as its encoder returns them; detach them unless the
                encoders are meant to learn from it.
            size: spatial size of the image before the network padded it.

        Returns:
            Modality → logits ``(B, num_classes, *size)``.
        """
        return {
            name: upsample_logits(self.heads[name](self.decoders[name](*features[name])), list(size), self.low_stride)
            for name in self.decoders
        }


class FusionAndUnimodal(nn.Module):
    """Network and classifiers in one pass, each encoder run once: for validation.

    A :class:`LateFusion` needs no classifiers: the networks in it predict from one modality each.

    Args:
        network: has ``encoders``, an ``nn.ModuleDict``; or a :class:`LateFusion`.
        classifiers: take the encoders' outputs and the image's size, and return a dict of logits; None for a
            :class:`LateFusion`.

    Raises:
        ValueError: for a network without classifiers that is no :class:`LateFusion`, or one with classifiers that is.

    Example:
        >>> import torch
        >>> network = MultimodalSegmenter(["flair", "t2"], 4, encoder={"backbone": "resnet18", "width": 8})
        >>> both = FusionAndUnimodal(network, UnimodalClassifiers.for_network(network)).eval()
        >>> list(both(torch.zeros(1, 2, 32, 32)))
        ['fusion', 'flair', 't2']
    """

    network: nn.Module
    classifiers: nn.Module | None

    def __init__(self, network: nn.Module, classifiers: nn.Module | None = None) -> None:
        super().__init__()
        refuse_classifiers(network, classifiers)
        if classifiers is None and not isinstance(network, LateFusion):
            raise ValueError(
                f"{type(network).__name__} needs classifiers for its modalities: only a LateFusion is without"
            )
        self.network = network
        self.classifiers = classifiers

    def forward(self, x: Inputs, present: Tensor | None = None) -> dict[str, Tensor]:
        """Predict from all modalities and from each.

        Args:
            x: an image ``(B, M, *S)``, or a dictionary of tensors by modality.
            present: boolean ``(B, M)``; see :class:`MultimodalSegmenter`.

        Returns:
            ``fusion`` and each modality that some sample has → logits ``(B, K, *S)``.
        """
        if isinstance(self.network, LateFusion):
            unimodal = self.network.members(x)
            terms = self.network.terms(list(unimodal.values()))
            fusion = self.network.decode(terms, spatial_size(x), present)
        else:
            fusion, unimodal = self._with_classifiers(x, present)
        return {"fusion": fusion, **of_present(unimodal, present)}

    def _with_classifiers(self, x: Inputs, present: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        features: dict[str, Any] = {}
        handles = [
            encoder.register_forward_hook(lambda _module, _args, output, name=name: features.update({name: output}))
            for name, encoder in cast(nn.ModuleDict, self.network.encoders).items()
        ]
        try:
            fusion = self.network(x) if present is None else self.network(x, present=present)
        finally:
            for handle in handles:
                handle.remove()
        assert self.classifiers is not None
        return fusion, self.classifiers(features, spatial_size(x))


def of_present(unimodal: Mapping[str, Tensor], present: Tensor | None) -> dict[str, Tensor]:
    """Leave out the predictions of modalities that no sample has; ``present`` is ``(B, M)`` in their order."""
    if present is None:
        return dict(unimodal)
    there = dict(zip(unimodal, present.any(dim=0).tolist(), strict=True))
    return {name: logits for name, logits in unimodal.items() if there[name]}


def refuse_classifiers(network: nn.Module, classifiers: nn.Module | None) -> None:
    """Refuse classifiers beside a :class:`LateFusion`, whose networks already predict from one modality each."""
    if classifiers is not None and isinstance(network, LateFusion):
        raise ValueError("a LateFusion has a network for each modality and takes no classifiers: give None")
