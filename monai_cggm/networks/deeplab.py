# SPDX-License-Identifier: Apache-2.0
"""DeepLab v3+ encoder: a dilated ResNet from MONAI's parts, with atrous spatial pyramid pooling."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from monai.networks.blocks.convolutions import Convolution
from monai.networks.nets.resnet import ResNet, resnet_params
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

NormName = Literal["batch", "instance", "group"]
BackboneName = Literal["resnet18", "resnet34", "resnet50", "resnet101"]

BACKBONES: tuple[BackboneName, ...] = ("resnet18", "resnet34", "resnet50", "resnet101")


def norm_spec(norm: NormName, channels: int) -> tuple[str, dict[str, Any]]:
    """Describe a normalisation layer the way MONAI's layer factory takes it.

    Args:
        norm: ``batch``; or, without statistics over the batch, ``instance`` (affine) or ``group`` (at most 32 groups,
            as in the paper on group normalisation, and at least four channels in each).
        channels: number of channels, or a common divisor of those of all layers that share the description.

    Returns:
        Name and keyword arguments.

    Raises:
        ValueError: for any other name.

    Example:
        >>> norm_spec("group", 256)
        ('group', {'num_groups': 32})
    """
    if norm == "batch":
        return "batch", {}
    if norm == "instance":
        return "instance", {"affine": True}
    if norm == "group":
        return "group", {"num_groups": max(1, math.gcd(channels, 128) // 4)}
    raise ValueError(f"norm must be 'batch', 'instance' or 'group', got {norm!r}")


#: in place: what goes into it is read by nobody else, and a copy costs memory and time
RELU = ("relu", {"inplace": True})


def conv_norm_relu(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    *,
    kernel_size: int = 1,
    dilation: int = 1,
    norm: NormName = "batch",
) -> Convolution:
    """Build convolution, normalisation and ReLU; the output has the input's spatial size."""
    return Convolution(
        spatial_dims,
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        dilation=dilation,
        bias=False,
        norm=norm_spec(norm, out_channels),
        act=RELU,
    )


class ResNetTrunk(ResNet):
    """MONAI's ResNet without its classifier, dilated to an output stride of 8 or 16.

    MONAI's ``ResNetFeatures`` fixes the width and the normalisation, so this extends ``ResNet`` itself. Strides are
    replaced by dilation as in segmentation_models' ``replace_strides_with_dilation``; the blocks of the last stage
    have their dilation multiplied by ``multigrid``, block by block (a stage of two blocks uses its first two numbers).
    Shortcuts are of type B (1×1 convolution) at every depth, because type A cannot be scripted.
    """

    def __init__(
        self,
        backbone: BackboneName,
        *,
        spatial_dims: int,
        in_channels: int,
        output_stride: int,
        multigrid: Sequence[int],
        width: int,
        norm: NormName,
        stem_stride: int,
    ) -> None:
        block, layers, *_ = resnet_params[backbone]
        # ResNet.__init__ calls _make_layer without the norm, which then falls back on batch norm.
        self._stage_norm = norm_spec(norm, width)
        super().__init__(
            block,
            layers,
            [width, 2 * width, 4 * width, 8 * width],
            spatial_dims=spatial_dims,
            n_input_channels=in_channels,
            conv1_t_stride=stem_stride,
            shortcut_type="B",
            feed_forward=False,
            bias_downsample=False,
            norm=self._stage_norm,
        )
        if 8 * stem_stride > output_stride:
            _replace_stride_with_dilation(self.layer3, [2])
        base = 2 if 8 * stem_stride == output_stride else 4
        _replace_stride_with_dilation(self.layer4, [base * factor for factor in multigrid])

    def _make_layer(self, *args: Any, **kwargs: Any) -> nn.Sequential:
        return super()._make_layer(*args, **{**kwargs, "norm": self._stage_norm})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the output of the first stage (twice the stem's stride) and that of the last (the output stride)."""
        x = self.maxpool(self.act(self.bn1(self.conv1(x))))
        low = self.layer1(x)
        return low, self.layer4(self.layer3(self.layer2(low)))


def _replace_stride_with_dilation(stage: nn.Sequential, rates: Sequence[int]) -> None:
    for index, block in enumerate(stage):
        for conv in block.modules():
            if not isinstance(conv, (nn.Conv2d, nn.Conv3d)):
                continue
            dims = len(conv.kernel_size)
            conv.stride = (1,) * dims
            if conv.kernel_size[0] == 3:
                conv.dilation = conv.padding = (rates[index % len(rates)],) * dims


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a 1×1 and several dilated 3×3 convolutions, and the pooled image.

    The pooled image is one vector a sample, so nothing normalises it: batch statistics are undefined for a batch of
    one, and instance or group statistics over a single position would erase it. It gets a biased 1×1 convolution and
    a ReLU, and the network trains with any batch size.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of each branch and of the output.
        rates: dilation of each 3×3 convolution.
        norm: see :func:`norm_spec`.
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, *, rates: Sequence[int], norm: NormName
    ) -> None:
        super().__init__()
        self.spatial_axes: list[int] = list(range(2, 2 + spatial_dims))
        self.branches = nn.ModuleList([conv_norm_relu(spatial_dims, in_channels, out_channels, norm=norm)])
        for rate in rates:
            self.branches.append(
                conv_norm_relu(spatial_dims, in_channels, out_channels, kernel_size=3, dilation=rate, norm=norm)
            )
        self.pooled = Convolution(spatial_dims, in_channels, out_channels, kernel_size=1, norm=None, act=RELU)
        self.project = conv_norm_relu(spatial_dims, out_channels * (len(rates) + 2), out_channels, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, *S)`` to ``(B, out_channels, *S)``."""
        features = [branch(x) for branch in self.branches]
        features.append(self.pooled(x.mean(self.spatial_axes, keepdim=True)).expand_as(features[0]))
        return self.project(torch.cat(features, dim=1))


class DeepLabV3PlusEncoder(nn.Module):
    """Encoder of one modality: dilated ResNet and ASPP, with the low-level features that DeepLab v3+ decodes from.

    `Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation
    <https://arxiv.org/abs/1802.02611>`__.

    Args:
        backbone: ``resnet18``, ``resnet34``, ``resnet50`` or ``resnet101``.
        spatial_dims: 2 or 3.
        in_channels: channels of the input; one MRI sequence has one.
        output_stride: 8 or 16 (4 or 8 with ``stem_stride`` 1), the input's size over that of the high-level features.
        multigrid: factors of the dilation in the last stage's blocks.
        aspp_channels: channels of the high-level features.
        aspp_rates: dilation of the ASPP's 3×3 convolutions, at the output stride. The default is that of the released
            code of CGGM. DeepLab's own (6, 12, 18) are for images of 513 pixels: at 160 pixels and stride 16 the
            features are 10×10, and most of such a kernel would lie outside.
        width: channels of the first stage of the ResNet; 64 is the published size.
        norm: ``batch``, ``instance`` or ``group``; see :func:`norm_spec`.
        stem_stride: stride of the first convolution; 2 is the published one. 1 doubles the resolution of everything
            after it, for images of coarse voxels; ``output_stride`` must then be 8 or 4.
        checkpointing: keep only the encoder's outputs in training, and compute what lies between once more in the
            backward pass (`Chen et al. 2016 <https://arxiv.org/abs/1604.06174>`__): less memory for one more forward
            pass. Weights, gradients and running statistics are the same; so are the names of the state.

    Attributes:
        spatial_dims: as given.
        output_stride: as given.
        low_stride: the input's size over that of the low-level features, twice ``stem_stride``.
        norm: as given.
        low_channels: channels of the low-level features.
        high_channels: channels of the high-level features.
        checkpointing: as given; may be changed.

    Raises:
        ValueError: for a backbone, number of dimensions, output stride or norm other than those above.

    Example:
        >>> import torch
        >>> encoder = DeepLabV3PlusEncoder("resnet18", width=8, aspp_channels=16)
        >>> low, high = encoder(torch.zeros(2, 1, 64, 96))
        >>> tuple(low.shape), tuple(high.shape)
        ((2, 8, 16, 24), (2, 16, 4, 6))
    """

    def __init__(
        self,
        backbone: BackboneName = "resnet50",
        *,
        spatial_dims: int = 2,
        in_channels: int = 1,
        output_stride: int = 16,
        multigrid: Sequence[int] = (1, 2, 4),
        aspp_channels: int = 256,
        aspp_rates: Sequence[int] = (2, 4, 6),
        width: int = 64,
        norm: NormName = "batch",
        stem_stride: int = 2,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}")
        if stem_stride not in (1, 2):
            raise ValueError(f"stem_stride must be 1 or 2, got {stem_stride}")
        if output_stride not in (4 * stem_stride, 8 * stem_stride):
            raise ValueError(f"output_stride must be {4 * stem_stride} or {8 * stem_stride}, got {output_stride}")
        if not multigrid:
            raise ValueError("multigrid must hold at least one factor, got none")
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.output_stride = output_stride
        self.low_stride = 2 * stem_stride
        self.norm = norm
        self.checkpointing = checkpointing
        self.trunk = ResNetTrunk(
            backbone,
            spatial_dims=spatial_dims,
            in_channels=in_channels,
            output_stride=output_stride,
            multigrid=multigrid,
            width=width,
            norm=norm,
            stem_stride=stem_stride,
        )
        expansion = 4 if resnet_params[backbone][0] == "bottleneck" else 1
        self.low_channels = expansion * width
        self.high_channels = aspp_channels
        self.aspp = ASPP(spatial_dims, 8 * expansion * width, aspp_channels, rates=aspp_rates, norm=norm)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a modality.

        Args:
            x: ``(B, in_channels, *S)``; S may be any size, but only multiples of the output stride let the decoder
                return to it exactly (:class:`MultimodalSegmenter` pads).

        Returns:
            Low-level features ``(B, low_channels, *S/low_stride)`` and high-level features
            ``(B, high_channels, *S/output_stride)``.
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._encode(x)
        elif self.checkpointing and self.training and torch.is_grad_enabled():
            return _computed_again(self, x)
        else:
            return self._encode(x)

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.trunk(x)
        return low, self.aspp(high)


def _computed_again(encoder: DeepLabV3PlusEncoder, x: Tensor) -> tuple[Tensor, Tensor]:
    return checkpoint(
        encoder._encode,
        x,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _statistics_held(encoder)),
        preserve_rng_state=False,  # nothing in an encoder is random
    )


@contextlib.contextmanager
def _statistics_held(module: nn.Module) -> Iterator[None]:
    """Let a second pass over a batch leave the running statistics of batch norm as the first one left them.

    Momentum 0 and not ``track_running_stats=False``: without running statistics the layer keeps fewer tensors for the
    backward pass, and the second pass has to keep the same ones as the first.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    kept = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    for layer in layers:
        layer.momentum, layer.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for layer, (momentum, batches) in zip(layers, kept, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, batches


def upsample(x: Tensor, size: list[int]) -> Tensor:
    """Resize bi- or trilinearly to ``size`` (one number a spatial axis), corners not aligned."""
    return F.interpolate(x, size=size, mode="bilinear" if x.dim() == 4 else "trilinear", align_corners=False)


def upsample_logits(logits: Tensor, size: list[int], stride: int) -> Tensor:
    """Bring logits from the decoder's resolution to that of the padded image, and crop to ``size``."""
    logits = upsample(logits, [stride * n for n in logits.shape[2:]])
    for axis, n in enumerate(size):
        logits = logits.narrow(axis + 2, 0, n)
    return logits


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Append zeros to the end of each spatial axis, up to the next multiple."""
    padding: list[int] = []
    for axis in range(x.dim() - 1, 1, -1):
        padding += [0, (multiple - x.shape[axis] % multiple) % multiple]
    return F.pad(x, padding)
