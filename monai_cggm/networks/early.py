# SPDX-License-Identifier: Apache-2.0
"""Networks that see all modalities as channels of one image, told which of them are missing."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from monai_cggm.networks.deeplab import pad_to_multiple


class EarlyFusion(nn.Module):
    """A plain network of several input channels, whose absent modalities are channels of zeros.

    For baselines without an encoder a modality, such as MONAI's ``SegResNet``: with modality dropout they are what
    DeMoSeg trains. Balancing methods have nothing to balance in them.

    Args:
        network: takes ``(B, M, *S)`` and returns logits ``(B, K, *S)``; its image size must suit its strides, so
            slices are padded by zeros to a multiple of ``multiple`` and the logits cropped.
        modalities: names of the channels, in their order.
        multiple: what the network divides the image's size by; 8 for SegResNet's four levels.

    Example:
        >>> import torch
        >>> from monai.networks.nets import SegResNet
        >>> plain = SegResNet(spatial_dims=2, in_channels=2, out_channels=4, init_filters=8)
        >>> network = EarlyFusion(plain, ["t1", "t2"]).eval()
        >>> image = torch.randn(1, 2, 50, 33)
        >>> tuple(network(image).shape)
        (1, 4, 50, 33)
        >>> without = network(image, present=torch.tensor([[True, False]]))
    """

    def __init__(self, network: nn.Module, modalities: Sequence[str], multiple: int = 8) -> None:
        super().__init__()
        if multiple < 1:
            raise ValueError(f"multiple must be at least 1, got {multiple}")
        self.network = network
        self.modalities = tuple(modalities)
        self.multiple = multiple

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """Segment ``x`` ``(B, M, *S)``; ``present`` as in :class:`MultimodalSegmenter`.

        Raises:
            ValueError: for a mask of another shape.
        """
        if present is not None:
            if present.dim() != 2 or present.shape[1] != x.shape[1] or present.shape[0] % x.shape[0]:
                raise ValueError(f"present must have shape {tuple(x.shape[:2])}, got {tuple(present.shape)}")
            x = x.repeat(len(present) // len(x), *[1] * (x.dim() - 1))
            # filled, not multiplied: an absent channel may hold NaN
            x = x.masked_fill(~present.to(x.device).view(*present.shape, *[1] * (x.dim() - 2)), 0.0)
        size = x.shape[2:]
        logits = self.network(pad_to_multiple(x, self.multiple))
        return logits[(slice(None), slice(None), *(slice(0, n) for n in size))]
