# SPDX-License-Identifier: Apache-2.0
"""Gradients of the last layer in closed form, and the direction loss of equation 12 on them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def head_gradient(output_gradient: Tensor, head_input: Tensor, *, channels_last: bool = False) -> Tensor:
    """Return ∂L/∂W of a linear layer or 1×1 convolution, from ∂L/∂output and the layer's input.

    The weight gradients of equations 9, 10, 14 and 15: with δ = ∂L/∂output and z the input,
    ``∂L/∂W = Σ_positions δ ⊗ z``. Written out like this it can be differentiated again without differentiating the
    network twice. It is computed in float32 (or float64) whatever autocast is on.

    Args:
        output_gradient: δ, ``(B, K, *spatial)``, or ``(*positions, K)`` with ``channels_last``.
        head_input: z, ``(B, C, *spatial)``, or ``(*positions, C)`` with ``channels_last``.
        channels_last: True for ``torch.nn.Linear``, False for convolutions.

    Returns:
        The gradient, flattened (appendix A): ``(K * C,)``.

    Example:
        >>> layer, z = torch.nn.Linear(3, 2, bias=False), torch.randn(5, 3)
        >>> out = layer(z); loss = (out ** 2).mean()
        >>> delta, = torch.autograd.grad(loss, out, retain_graph=True); loss.backward()
        >>> torch.allclose(head_gradient(delta, z, channels_last=True), layer.weight.grad.flatten())
        True
    """
    if not channels_last:
        output_gradient, head_input = output_gradient.movedim(1, -1), head_input.movedim(1, -1)
    precision = torch.promote_types(output_gradient.dtype, torch.float32)
    with torch.autocast(output_gradient.device.type, enabled=False):
        delta = output_gradient.reshape(-1, output_gradient.shape[-1]).to(precision)
        z = head_input.reshape(-1, head_input.shape[-1]).to(precision)
        return (delta.T @ z).flatten()


def direction_loss(fusion: Tensor, unimodal: Tensor, balance: Tensor) -> Tensor:
    """Return L_gm of equation 12: ``1/M Σ_i (|B_i| − B_i cos(g_F, g_i))``.

    Args:
        fusion: g_F, ``(n,)``; the gradient flows through it.
        unimodal: g_i of each modality's classifier, ``(M, n)``.
        balance: B, ``(M,)``.

    Returns:
        A scalar, never negative up to rounding.

    Example:
        >>> g = torch.tensor([1.0, 0.0])
        >>> direction_loss(g, torch.stack([g, -g]), torch.tensor([1.0, 0.5]))
        tensor(0.5000)
    """
    return (balance.abs() - balance * cosines(fusion, unimodal)).mean()


def cosines(fusion: Tensor, unimodal: Tensor) -> Tensor:
    """Return cos(g_F, g_i) for every modality: ``(n,)`` and ``(M, n)`` give ``(M,)``; zero where a gradient is zero."""
    return F.cosine_similarity(fusion.unsqueeze(0), unimodal, dim=1)
