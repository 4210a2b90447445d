# SPDX-License-Identifier: Apache-2.0
"""Gradient clipping for MONAI's trainers, module by module."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from torch import nn


def unscale_once(engine: SupervisedTrainer) -> None:
    """Divide the gradients by the loss scale of mixed precision, once in an iteration however often it is called.

    ``GradScaler.unscale_`` raises at its second call, so everything that reads or changes gradients after
    ``BACKWARD_COMPLETED`` asks for it here. Without mixed precision it does nothing.

    Args:
        engine: the trainer, within an iteration, after its backward pass.
    """
    scaler = getattr(engine, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return
    if getattr(engine.state, "unscaled_iteration", None) != engine.state.iteration:
        scaler.unscale_(engine.optimizer)
        engine.state.unscaled_iteration = engine.state.iteration


class ClipGradients:
    r"""Limit the norm of each module's gradient before the optimizer's step.

    .. math:: g \leftarrow g \cdot \min(1, \mathrm{max\_norm} / (\lVert g \rVert_2 + 10^{-6}))

    where :math:`g` is the gradient of one module's parameters taken together, as in
    ``torch.nn.utils.clip_grad_norm_``. Modules are clipped apart from each other: a classifier's large gradient does
    not shrink the network's step, so a network beside which classifiers are trained takes the steps it takes alone.

    Handlers of one event run in the order in which they are attached: attach a method that modulates gradients before
    this one. Where the trainer accumulates gradients, they are clipped once, before the step.

    Args:
        modules: modules to clip, each for itself; ``None`` among them (a part that is switched off) is passed over.
        max_norm: largest norm; ``None`` switches clipping off. The paper does not clip.

    Raises:
        ValueError: where ``max_norm`` is not positive, or no module is given.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> ClipGradients([layer], max_norm=1.0).clip()
        >>> round(layer.weight.grad.norm().item(), 3)
        1.0
    """

    def __init__(self, modules: Iterable[nn.Module | None], max_norm: float | None) -> None:
        self.modules = [module for module in modules if module is not None]
        self.max_norm = max_norm
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive, or None for no clipping, got {max_norm}")
        if not self.modules:
            raise ValueError("modules is empty: there is nothing to clip")

    def attach(self, engine: SupervisedTrainer) -> None:
        """Attach to a trainer, after everything that changes gradients; with ``max_norm=None`` attach nothing."""
        if self.max_norm is not None:
            engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: SupervisedTrainer) -> None:
        """Clip if the optimizer's step follows."""
        if _step_follows(engine):
            unscale_once(engine)
            self.clip()

    def clip(self) -> None:
        """Clip the gradients that are there now."""
        if self.max_norm is None:
            return
        for module in self.modules:
            torch.nn.utils.clip_grad_norm_(module.parameters(), self.max_norm)


def _step_follows(engine: SupervisedTrainer) -> bool:
    """Whether the optimizer steps in this iteration: the trainer's own rule for accumulated gradients."""
    length = engine.state.epoch_length
    done = engine.state.iteration if length is None else (engine.state.iteration - 1) % length + 1
    return done % engine.accumulation_steps == 0 or done == length
