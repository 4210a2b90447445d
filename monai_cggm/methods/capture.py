# SPDX-License-Identifier: Apache-2.0
"""Forward hooks that keep what named modules were given and gave back during one training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Capture:
    """Keep the input and the output of modules while ``active``.

    Args:
        modules: modules to listen to, by name.
        full_precision: turn a half-precision output into float32 on its way. A gradient taken at that output is then
            float32 too: under AMP the derivative of a mean over a million voxels does not fit into float16.

    Attributes:
        active: hooks do nothing while this is False, so validation inside the training loop leaves no trace.
        inputs: first positional input of each module in the current step.
        outputs: output of each module in the current step.
    """

    def __init__(self, modules: Mapping[str, nn.Module], *, full_precision: bool = False) -> None:
        self.modules = dict(modules)
        self.full_precision = full_precision
        self.active = False
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        self._handles: list[RemovableHandle] = []

    def install(self) -> None:
        """Register the hooks."""
        self.remove()
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))

    def remove(self) -> None:
        """Remove the hooks and forget what was kept."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.active = False
        self.clear()

    def clear(self) -> None:
        """Forget the last step's tensors, so that its graph can be freed."""
        self.inputs.clear()
        self.outputs.clear()

    def _hook(self, name: str) -> Any:
        def keep(_module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not self.active:
                return None
            if self.full_precision and isinstance(output, Tensor) and output.dtype in (torch.float16, torch.bfloat16):
                output = output.float()
            self.inputs[name] = args[0]
            self.outputs[name] = output
            return output

        return keep


def let_in(features: Any, weight: Tensor | float) -> Any:
    """Return the same features, through which a gradient goes back multiplied by ``weight``.

    A weight of 0 lets nothing through; :func:`detached` does that without a graph.

    Args:
        features: a tensor, or a tuple, list or dict of tensors.
        weight: a number, or a tensor of one.

    Example:
        >>> h = torch.ones(2, requires_grad=True)
        >>> let_in(h, 0.5).sum().backward()
        >>> h.grad
        tensor([0.5000, 0.5000])
    """
    return _mapped(features, lambda tensor: _ScaledGradient.apply(tensor, weight))


def detached(features: Any) -> Any:
    """Return a tensor, or a tuple, list or dict of tensors, cut off from the graph."""
    return _mapped(features, Tensor.detach)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor | float) -> Tensor:
        ctx.weight = weight
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight = ctx.weight
        return gradient * (weight.to(gradient) if isinstance(weight, Tensor) else weight), None


def _mapped(features: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(features, Tensor):
        return function(features)
    if isinstance(features, Mapping):
        return {key: _mapped(value, function) for key, value in features.items()}
    if isinstance(features, (tuple, list)):
        return type(features)(_mapped(value, function) for value in features)
    raise TypeError(f"an encoder must return tensors, or tuples, lists or dicts of them, got {type(features).__name__}")
