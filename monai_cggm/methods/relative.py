# SPDX-License-Identifier: Apache-2.0
"""A bounded balance that follows the modalities' standing rather than the difference of two noisy batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.engines import SupervisedTrainer
from torch import Tensor, nn

from monai_cggm.methods.base import Step
from monai_cggm.methods.steering import Steering
from monai_cggm.metrics.epsilon import Epsilon


def relative_terms(epsilon: Tensor, strength: float, bounds: Sequence[float] = (0.5, 1.5)) -> Tensor:
    r"""Return a bounded B with mean 1 from how far each modality stands behind the mean of all.

    .. math:: B_i = c \cdot \mathrm{clip}\Big(1 + s\,\frac{\bar\varepsilon - \varepsilon_i}{|\bar\varepsilon|},\,
        \text{bounds}\Big), \qquad \tfrac1M \textstyle\sum_i B_i = 1

    Args:
        epsilon: ε of each modality, higher is better, all of one sign (Dice, accuracy; minus an error), ``(M,)``.
        strength: s. Above 0 it is the laggards that get more (PASSION, MWAM), below 0 the leaders (HGA, ARL).
        bounds: before the mean is set to 1. MWAM stays in about [0.5, 1.5].

    Returns:
        B, ``(M,)``; ones where every ε is 0.

    Example:
        >>> relative_terms(torch.tensor([0.8, 0.4]), strength=1.0)
        tensor([0.6667, 1.3333])
        >>> relative_terms(torch.tensor([0.8, 0.4]), strength=-1.0)
        tensor([1.3333, 0.6667])
    """
    mean = epsilon.mean()
    behind = torch.where(mean != 0, (mean - epsilon) / mean.abs(), torch.zeros_like(epsilon))
    terms = (1 + strength * behind).clamp(*bounds)
    return terms / terms.mean()


class RelativeBalance(Steering):
    """Scale each encoder's gradient by :func:`relative_terms` of its classifier's running metric.

    Equation 7 takes the difference of ε between two batches, which is mostly noise. Here ε is averaged exponentially
    (the weight of the newest batch is ``momentum``), B is computed anew every ``every`` iterations and held in between,
    and after ``until_epoch`` it is 1, because the first epochs decide which modality the fusion comes to lean on.

    Args:
        network: see :class:`UnimodalObserver`, as for the next two and ``parts``.
        classifiers: see there.
        metric: see there.
        strength: see :func:`relative_terms`.
        bounds: see there.
        momentum: weight of the newest batch, 0 to 1.
        every: iterations between two values of B; 20 after PGGB.
        until_epoch: last epoch of balancing; None: it never ends.
        parts: ``control``, ``magnitude`` and ``scale`` of :class:`Steering`, and the arguments of
            :class:`UnimodalObserver`.

    Raises:
        ValueError: for numbers out of their range.

    Example:
        >>> from monai_cggm.metrics import RegionDice
        >>> from monai_cggm.networks import MultimodalSegmenter, UnimodalClassifiers
        >>> network = MultimodalSegmenter(["flair", "t1ce"], 2, encoder={"backbone": "resnet18", "width": 8})
        >>> classifiers = UnimodalClassifiers.for_network(network)
        >>> method = RelativeBalance(network, classifiers, RegionDice({"lesion": [1]}, num_classes=2))
        >>> # method.attach(trainer)
    """

    def __init__(
        self,
        network: nn.Module,
        classifiers: nn.Module,
        metric: Epsilon,
        *,
        strength: float = 1.0,
        bounds: Sequence[float] = (0.5, 1.5),
        momentum: float = 0.1,
        every: int = 20,
        until_epoch: int | None = None,
        **parts: Any,
    ) -> None:
        super().__init__(network, classifiers, metric, **parts)
        low, high = bounds
        if not 0 <= low <= 1 <= high:
            raise ValueError(f"bounds must enclose 1 and not be negative, got {list(bounds)}")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be above 0 and at most 1, got {momentum}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.strength = strength
        self.bounds = (float(low), float(high))
        self.momentum = momentum
        self.every = every
        self.until_epoch = until_epoch
        self._mean: Tensor | None = None
        self._held: Tensor | None = None
        self._batches = 0
        self._epoch = 0

    def __repr__(self) -> str:
        """Say what is attached and how, for the line that the log starts with."""
        return (
            f"RelativeBalance(modalities={list(self.modalities)}, strength={self.strength}, bounds={self.bounds}, "
            f"momentum={self.momentum}, every={self.every}, until_epoch={self.until_epoch}, control={self.control!r}, "
            f"magnitude={self.magnitude}, scale={self.scale!r})"
        )

    def _listen(self, engine: SupervisedTrainer) -> None:
        super()._listen(engine)
        self._epoch = engine.state.epoch

    def terms(self, step: Step) -> Tensor:
        """Return the B that is held now, after this batch has been counted."""
        share = self.momentum if self._mean is not None else 1.0
        mean = torch.zeros_like(step.epsilon) if self._mean is None else self._mean.to(step.epsilon)
        self._mean = mean + share * (step.epsilon - mean)
        self._add_scalars("epsilon_mean", self._mean)
        if self._held is None or self._batches % self.every == 0:
            self._held = relative_terms(self._mean, self.strength, self.bounds)
        self._batches += 1
        if self.until_epoch is not None and self._epoch > self.until_epoch:
            return torch.ones_like(self._held)
        return self._held.to(step.epsilon)

    def state_dict(self) -> dict[str, Any]:
        """Return the observer's state, the running ε, the B that is held and the count of batches."""
        state = super().state_dict()
        state["batches"] = self._batches
        if self._mean is not None and self._held is not None:
            state |= {"mean": self._mean.cpu(), "held": self._held.cpu()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self._batches = int(state["batches"])
        self._mean = state.get("mean")
        self._held = state.get("held")
