# SPDX-License-Identifier: Apache-2.0
"""Decoder that fuses the features of all modalities."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from monai_cggm.networks.deeplab import NormName, conv_norm_relu, upsample


class FusionDecoder(nn.Module):
    """Fuse high- and low-level features of all modalities by a few convolutions, as DeepLab v3+ decodes one.

    High-level features are concatenated, reduced by a 1×1 convolution and upsampled to the low-level resolution;
    low-level features are concatenated and reduced by another; two 3×3 convolutions follow.

    Args:
        low_channels: channels of one modality's low-level features.
        high_channels: channels of one modality's high-level features.
        modalities: number of modalities.
        spatial_dims: 2 or 3.
        channels: channels of the output; 256 in DeepLab v3+.
        low_reduced: channels that all low-level features together are reduced to; 48 in DeepLab v3+.
        norm: see :func:`monai_cggm.networks.norm_spec`.

    Example:
        >>> import torch
        >>> decoder = FusionDecoder(low_channels=8, high_channels=16, modalities=2, channels=32)
        >>> low, high = torch.zeros(1, 8, 24, 24), torch.zeros(1, 16, 6, 6)
        >>> tuple(decoder([low, low], [high, high]).shape)
        (1, 32, 24, 24)
    """

    def __init__(
        self,
        low_channels: int,
        high_channels: int,
        modalities: int,
        *,
        spatial_dims: int = 2,
        channels: int = 256,
        low_reduced: int = 48,
        norm: NormName = "batch",
    ) -> None:
        super().__init__()
        self.channels = channels
        self.reduce_low = conv_norm_relu(spatial_dims, modalities * low_channels, low_reduced, norm=norm)
        self.reduce_high = conv_norm_relu(spatial_dims, modalities * high_channels, channels, norm=norm)
        self.fuse = nn.Sequential(
            conv_norm_relu(spatial_dims, channels + low_reduced, channels, kernel_size=3, norm=norm),
            conv_norm_relu(spatial_dims, channels, channels, kernel_size=3, norm=norm),
        )

    def forward(self, low: list[Tensor], high: list[Tensor]) -> Tensor:
        """Decode.

        Args:
            low: low-level features, one ``(B, low_channels, *S/low_stride)`` a modality.
            high: high-level features, one ``(B, high_channels, *S/stride)`` a modality.

        Returns:
            Features ``(B, channels, *S/low_stride)`` for a 1×1 head.
        """
        fused_low = self.reduce_low(torch.cat(low, dim=1))
        fused_high = upsample(self.reduce_high(torch.cat(high, dim=1)), list(fused_low.shape[2:]))
        return self.fuse(torch.cat([fused_high, fused_low], dim=1))
