# SPDX-License-Identifier: Apache-2.0
"""What the methods that scale encoder gradients share: their controls, and the scaling itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from monai.engines import SupervisedTrainer
from torch import Tensor, nn

from monai_cggm.methods.base import Step, UnimodalObserver
from monai_cggm.metrics.epsilon import Epsilon

Control = Literal["none", "constant", "shuffled"]
CONTROLS: tuple[Control, ...] = ("none", "constant", "shuffled")
Scale = Literal["gradient", "update"]
SCALES: tuple[Scale, ...] = ("gradient", "update")


def controlled(terms: Tensor, control: Control) -> Tensor:
    """Take away what makes balance terms a balance, and leave the rest: their size and their course over time.

    Args:
        terms: B, ``(M,)``.
        control: ``"none"``: as they are. ``"constant"``: every modality gets the mean of B. ``"shuffled"``: every
            modality gets the term of the one before it, the first that of the last.

    Returns:
        Terms ``(M,)`` with the same sum.

    Raises:
        ValueError: for a control that does not exist.

    Example:
        >>> terms = torch.tensor([0.6, 0.9, 1.5])
        >>> controlled(terms, "constant"), controlled(terms, "shuffled")
        (tensor([1., 1., 1.]), tensor([1.5000, 0.6000, 0.9000]))
    """
    if control == "none":
        return terms
    if control == "constant":
        return terms.mean().expand_as(terms)
    if control == "shuffled":
        return terms.roll(1)
    raise ValueError(f"control must be one of {', '.join(CONTROLS)}, got {control!r}")


class Steering(UnimodalObserver):
    """An observer that multiplies each encoder's gradient by a balance term B (equation 8).

    A method says by :meth:`terms` what B is. Its controls come with it: a method that is better than joint training but
    not than its own ``constant`` and ``shuffled`` runs has not shown that balancing helps.

    Args:
        network: see :class:`UnimodalObserver`, as for the next two and ``parts``.
        classifiers: see there.
        metric: see there.
        control: see :func:`controlled`.
        magnitude: False leaves the encoders' gradients alone; B then acts only where a part of the method or another
            handler reads it.
        scale: what B is multiplied with. ``"gradient"``: the gradient, equation 8. ``"update"``: the step that the
            optimizer then takes, weight decay and momentum in it. Adam divides a gradient by its own running size, so
            that of a factor on it only the changes are left; a factor on its step stays. For SGD without momentum
            and weight decay, and without clipping, the two are the same. The paper has no ``"update"``.
        parts: keyword arguments of :class:`UnimodalObserver`.

    Raises:
        ValueError: for fewer than two modalities, or a control or a scale that does not exist.
    """

    def __init__(
        self,
        network: nn.Module,
        classifiers: nn.Module,
        metric: Epsilon,
        *,
        control: Control = "none",
        magnitude: bool = True,
        scale: Scale = "gradient",
        **parts: Any,
    ) -> None:
        super().__init__(network, classifiers, metric, **parts)
        if len(self.modalities) < 2:
            raise ValueError(
                f"{type(self).__name__} balances two modalities or more, the network has {list(self.modalities)}"
            )
        controlled(torch.ones(1), control)  # refuses an unknown control now rather than in the first step
        if scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
        self.control: Control = control
        self.magnitude = magnitude
        self.scale: Scale = scale
        #: the encoders' weights before the optimizer's step, where its update is scaled
        self._before: dict[str, list[Tensor]] = {}

    def terms(self, step: Step) -> Tensor:
        """Return this step's B before any control, ``(M,)``."""
        raise NotImplementedError

    def extra_loss(self, step: Step) -> Tensor | None:
        """Settle this step's B."""
        self.balance = controlled(self.terms(step), self.control)
        self._add_scalars("balance", self.balance)
        return None

    def modulate(self, step: Step) -> None:
        """Multiply encoder i's gradients by B_i, equation 8, or get ready to do so with its update."""
        assert self.balance is not None
        before = torch.stack([self._scalars[f"gradient_norm/{m}"] for m in self.modalities])
        factors = torch.ones_like(before)
        if self.magnitude and self.scale == "update":
            self._before = {m: [p.detach().clone() for p in self._encoder_parameters[m]] for m in self.modalities}
        elif self.magnitude:
            factors = self.balance.to(before)
            for modality, factor in zip(self.modalities, factors, strict=True):
                gradients = [p.grad for p in self._encoder_parameters[modality] if p.grad is not None]
                torch._foreach_mul_(gradients, factor)
        self._add_scalars("modulated_norm", before * factors.abs())

    def _report(self, engine: SupervisedTrainer) -> None:
        # MODEL_COMPLETED: the optimizer has taken its step
        self._scale_updates()
        super()._report(engine)

    def _release(self) -> None:
        super()._release()
        self._before = {}

    @torch.no_grad()
    def _scale_updates(self) -> None:
        for index, (modality, before) in enumerate(self._before.items()):
            parameters: list[Tensor] = list(self._encoder_parameters[modality])
            updates = list(torch._foreach_sub(parameters, before))
            assert self.balance is not None
            torch._foreach_mul_(updates, self.balance[index].to(before[0]) - 1)
            torch._foreach_add_(parameters, updates)
        self._before = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the observer's state and the last B, which other parts read in the step after it."""
        state = super().state_dict()
        if self.balance is not None:
            state["balance"] = self.balance.cpu()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self.balance = state.get("balance")
