# SPDX-License-Identifier: Apache-2.0
"""The learning rate over the epochs: a linear warm-up, then half a cosine."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass
class WarmupCosine:
    r"""The factor on the base learning rate after :math:`t` epochs.

    .. math::
        \lambda(t) = \begin{cases}
            s + (1 - s)\, t / W & t < W \\
            e + (1 - e)\, \tfrac{1}{2} \left(1 + \cos \pi \frac{t - W}{T - W}\right) & W \le t < T \\
            e & t \ge T
        \end{cases}

    Its attributes are plain numbers: ``LambdaLR.state_dict`` keeps them, so a checkpoint carries the plan of the run
    that wrote it, and a run that is extended past its planned end goes on at the final rate.

    Attributes:
        epochs: :math:`T`, the planned end.
        warmup_epochs: :math:`W`.
        start: :math:`s`, the factor at the beginning.
        final: :math:`e`, the factor at the end.

    Example:
        >>> factor = WarmupCosine(epochs=150, warmup_epochs=10, start=0.04, final=0.1)
        >>> [round(factor(epoch), 3) for epoch in (0, 5, 10, 80, 150, 200)]
        [0.04, 0.52, 1.0, 0.55, 0.1, 0.1]
    """

    epochs: int
    warmup_epochs: int
    start: float
    final: float

    def __call__(self, epoch: int) -> float:
        """Return the factor after ``epoch`` finished epochs."""
        if epoch < self.warmup_epochs:
            return self.start + (1 - self.start) * epoch / self.warmup_epochs
        if epoch >= self.epochs:
            return self.final
        progress = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_cosine(
    optimizer: Optimizer,
    *,
    epochs: int,
    warmup_epochs: int = 10,
    start_lr: float = 4e-4,
    final_lr: float = 1e-3,
) -> LambdaLR:
    """Warm up linearly from ``start_lr`` to the optimizer's learning rate, then follow a cosine down to ``final_lr``.

    The two rates are those of the first parameter group, the network's; every other group keeps its ratio to it. Step
    it once an epoch (``monai.handlers.LrScheduleHandler`` does).

    Args:
        optimizer: its groups' learning rates are the ones reached after the warm-up.
        epochs: epochs of the whole run, warm-up included. Table 7 of the paper: 150.
        warmup_epochs: epochs of the warm-up. Table 7: 10. A run that is not longer than that never gets past it.
        start_lr: learning rate of the first epoch. Table 7: 4e-4, for a base of 1e-2.
        final_lr: learning rate at the end. Table 7: 1e-3.

    Returns:
        A ``LambdaLR`` whose state can be saved and loaded with ``weights_only=True``.

    Raises:
        ValueError: where a number of epochs or a rate is out of range.

    Example:
        >>> import torch
        >>> network, classifiers = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> groups = [{"params": network.parameters(), "lr": 1e-2}, {"params": classifiers.parameters(), "lr": 6e-3}]
        >>> schedule = warmup_cosine(torch.optim.SGD(groups), epochs=150)
        >>> [round(rate, 6) for rate in schedule.get_last_lr()]
        [0.0004, 0.00024]
    """
    if epochs < 1 or warmup_epochs < 0:
        raise ValueError(f"epochs must be at least 1 and warmup_epochs at least 0, got {epochs} and {warmup_epochs}")
    base = optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"])
    for name, rate in (("start_lr", start_lr), ("final_lr", final_lr)):
        if not 0 <= rate <= base:
            raise ValueError(f"{name} must be between 0 and the first group's learning rate {base}, got {rate}")
    if warmup_epochs >= epochs:
        warnings.warn(
            f"a run of {epochs} epochs ends within its warm-up of {warmup_epochs} epochs", UserWarning, stacklevel=2
        )
    return LambdaLR(optimizer, WarmupCosine(epochs, warmup_epochs, start=start_lr / base, final=final_lr / base))
