# SPDX-License-Identifier: Apache-2.0
"""Segmentation network with one encoder a modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monai.networks.layers.factories import Conv
from torch import Tensor, nn

from monai_cggm.networks.deeplab import DeepLabV3PlusEncoder, pad_to_multiple, upsample_logits
from monai_cggm.networks.fusion import FusionDecoder


class MultimodalSegmenter(nn.Module):
    """DeepLab v3+ with one encoder a modality, fused before the decoder.

    ``forward`` takes the modalities as channels and returns logits, in training too, so the network works with any
    MONAI inferer, engine and exporter (``torch.jit.script`` and ONNX). Of one modality alone it is a DeepLab v3+.

    Args:
        modalities: names of the modalities in channel order; one or more.
        num_classes: number of classes, background included.
        encoder: keyword arguments of :class:`DeepLabV3PlusEncoder`, the same for every modality.
        decoder_channels: inputs of the head; 256 in DeepLab v3+.
        low_reduced: see :class:`FusionDecoder`.

    Attributes:
        encoders: ``nn.ModuleDict``, modality → :class:`DeepLabV3PlusEncoder`, in channel order.
        decoder: :class:`FusionDecoder`.
        head: the last layer, a 1×1 convolution at the resolution of the low-level features.
        modalities: as given, a tuple.

    Raises:
        ValueError: for no modality, a repeated one, fewer than two classes, or an encoder of several input channels.

    Example:
        >>> import torch
        >>> network = MultimodalSegmenter(
        ...     ["flair", "t1ce"], num_classes=4, decoder_channels=16,
        ...     encoder={"backbone": "resnet18", "width": 8, "aspp_channels": 16},
        ... ).eval()
        >>> image = torch.randn(1, 2, 50, 70)
        >>> tuple(network(image).shape)
        (1, 4, 50, 70)
        >>> without_t1ce = network(image, present=torch.tensor([[True, False]]))
    """

    def __init__(
        self,
        modalities: Sequence[str],
        num_classes: int,
        *,
        encoder: Mapping[str, Any] | None = None,
        decoder_channels: int = 256,
        low_reduced: int = 48,
    ) -> None:
        super().__init__()
        _check_modalities(modalities)
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2 (background included), got {num_classes}")
        self.modalities = tuple(modalities)
        self.num_classes = num_classes
        encoders = [DeepLabV3PlusEncoder(**(encoder or {})) for _ in self.modalities]
        first = encoders[0]
        if first.in_channels != 1:
            raise ValueError(f"each modality is one channel of the image, got encoder in_channels={first.in_channels}")
        self.spatial_dims = first.spatial_dims
        self.output_stride = first.output_stride
        self.low_stride = first.low_stride
        self.encoders = nn.ModuleDict(dict(zip(self.modalities, encoders, strict=True)))
        self.decoder = FusionDecoder(
            first.low_channels,
            first.high_channels,
            len(self.modalities),
            spatial_dims=first.spatial_dims,
            channels=decoder_channels,
            low_reduced=low_reduced,
            norm=first.norm,
        )
        self.head = Conv[Conv.CONV, first.spatial_dims](decoder_channels, num_classes, kernel_size=1)

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """Segment a batch.

        Args:
            x: ``(B, M, *S)``, the modalities in the declared order; S is any size (padded inside, and cropped back).
            present: boolean ``(B, M)``; the features of a modality that is absent are exactly zero, whatever stands
                in its channel. In training with batch norm its encoder's statistics still see that channel. None:
                all are present. With ``(R * B, M)`` the encoders run once and the fusion R times: row ``r * B + b`` is
                sample b's.

        Returns:
            Logits ``(B, num_classes, *S)``, or ``(R * B, num_classes, *S)``.

        Raises:
            ValueError: for another number of channels or of spatial axes, or a mask of another shape.
        """
        _check_present(present, len(self.encoders))
        if present is not None and present.shape[0] % x.shape[0] != 0:
            raise ValueError(
                f"present must have a row, or several, for each of {x.shape[0]} samples, got {present.shape}"
            )
        return self.decode(self.encode(x), list(x.shape[2:]), present)

    def encode(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Run the encoders: ``x`` ``(B, M, *S)`` gives each modality's low- and high-level features."""
        if x.dim() != 2 + self.spatial_dims:
            raise ValueError(f"encoders of spatial_dims={self.spatial_dims} got an image of {x.dim() - 2} spatial axes")
        if x.shape[1] != len(self.encoders):
            raise ValueError(f"expected {len(self.encoders)} channels, one a modality, got {x.shape[1]}")
        x = pad_to_multiple(x, self.output_stride)
        low: list[Tensor] = []
        high: list[Tensor] = []
        for index, encoder in enumerate(self.encoders.values()):
            features = encoder(x[:, index : index + 1])
            low.append(features[0])
            high.append(features[1])
        return low, high

    def decode(
        self, features: tuple[list[Tensor], list[Tensor]], size: list[int], present: Tensor | None = None
    ) -> Tensor:
        """Fuse and decode what :meth:`encode` returned.

        One call of ``encode`` may be decoded under several masks: encoders are most of the time.

        Args:
            features: low-level features of each modality, and high-level features of each.
            size: spatial size of the image.
            present: as in :meth:`forward`.

        Returns:
            Logits ``(B, num_classes, *size)``.
        """
        low, high = features
        _check_present(present, len(low))
        if present is not None:
            low = [_zero_absent(h, present[:, index]) for index, h in enumerate(low)]
            high = [_zero_absent(h, present[:, index]) for index, h in enumerate(high)]
        return upsample_logits(self.head(self.decoder(low, high)), size, self.low_stride)

    def fuse(
        self, outputs: Mapping[str, tuple[Tensor, Tensor]], size: Sequence[int], present: Tensor | None = None
    ) -> Tensor:
        """Predict from what each encoder returned, by modality: :meth:`decode` for who has captured the outputs.

        A method that predicts from subsets of the modalities calls this; a network of another build that has it serves
        as well. It is not part of an exported network.

        Args:
            outputs: modality → low- and high-level features, as its encoder returned them.
            size: spatial size of the image.
            present: as in :meth:`forward`.

        Returns:
            Logits ``(B, num_classes, *size)``.
        """
        low = [outputs[modality][0] for modality in self.modalities]
        high = [outputs[modality][1] for modality in self.modalities]
        return self.decode((low, high), list(size), present)


def _check_present(present: Tensor | None, modalities: int) -> None:
    if present is not None and (present.dim() != 2 or present.shape[1] != modalities):
        raise ValueError(f"present must have shape (batch, {modalities}), got {present.shape}")


def _zero_absent(features: Tensor, present: Tensor) -> Tensor:
    if present.shape[0] != features.shape[0]:
        features = features.repeat([present.shape[0] // features.shape[0]] + [1] * (features.dim() - 1))
    # Filled, not multiplied: an absent channel may hold anything, and NaN × 0 is NaN.
    absent = present.to(features.device).logical_not()
    return features.masked_fill(absent.view([-1] + [1] * (features.dim() - 1)), 0.0)


def _check_modalities(modalities: Sequence[str]) -> None:
    if isinstance(modalities, str) or not modalities:
        raise ValueError(f"modalities must be a sequence of at least one name, got {modalities!r}")
    if len(set(modalities)) != len(modalities):
        raise ValueError(f"modalities must differ from each other, got {list(modalities)}")


class Present(nn.Module):
    """A network that is told which modalities are there, for an inferer that would not pass the mask on.

    Args:
        network: takes ``forward(x, present=...)``.
        present: boolean ``(M,)``, the same for every sample of the batch.

    Example:
        >>> import torch
        >>> network = MultimodalSegmenter(["a", "b"], 2, encoder={"backbone": "resnet18", "width": 8}).eval()
        >>> x = torch.randn(3, 2, 32, 32)
        >>> mask = torch.tensor([True, False])
        >>> torch.equal(Present(network, mask)(x), network(x, present=mask.expand(3, 2)))
        True
    """

    network: nn.Module
    present: Tensor

    def __init__(self, network: nn.Module, present: Tensor) -> None:
        super().__init__()
        if present.dim() != 1:
            raise ValueError(f"present must have shape (modalities,), got {tuple(present.shape)}")
        self.network = network
        self.register_buffer("present", present, persistent=False)

    def forward(self, x: Tensor) -> Any:
        """Return what the network returns for ``x`` of shape ``(B, M, *S)`` under the mask."""
        return self.network(x, present=self.present.to(x.device).expand(x.shape[0], -1))
