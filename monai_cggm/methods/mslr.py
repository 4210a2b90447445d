# SPDX-License-Identifier: Apache-2.0
"""Modality-specific learning rates (Yao and Mihalcea, Findings of ACL 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.engines import SupervisedTrainer
from torch import Tensor, nn

from monai_cggm.methods.base import Step
from monai_cggm.methods.steering import Steering
from monai_cggm.metrics.epsilon import Epsilon


def progress_ratio(history: Tensor) -> Tensor:
    r"""Return how each modality does now, in proportion to its last epochs.

    .. math:: r_i = \frac{a_i(t)}{\bar a_i} \quad\text{for a score},\qquad
        r_i = \frac{\bar a_i}{a_i(t)} \quad\text{for the negative of an error}

    Both are above 1 while a modality gets better. Which one it is, the sign of the mean :math:`\bar a_i` tells.

    Args:
        history: a of the last epochs, the newest last, ``(E, M)``.

    Returns:
        r, ``(M,)``, none negative; 1 where it is undefined: a score that was 0 all the time, an error that is 0 now, or
        a measure that changed its sign.

    Example:
        >>> progress_ratio(torch.tensor([[0.2, -3.0], [0.6, -1.0]]))  # a Dice that rises, an error that falls
        tensor([1.5000, 2.0000])
    """
    now, mean = history[-1], history.mean(dim=0)
    ratio = torch.where(mean > 0, now / mean, mean / now)
    return torch.where(ratio.isfinite() & (ratio >= 0), ratio, torch.ones_like(ratio))


class MSLR(Steering):
    r"""Give each encoder a learning rate of its own, which follows how its modality does.

    .. math:: B_i = \text{initial}_i \cdot r_i(t)

    with :math:`r_i` the :func:`progress_ratio` of the epoch before, over the last ``window`` epochs (itself included),
    of a: ε of the modality's classifier, the mean over the training batches of an epoch. B is constant within an epoch,
    and the initial factors in the first. From "Modality-specific Learning Rates for Effective Multimodal Additive
    Late-fusion" (Findings of ACL 2022). Without ``dynamic`` the initial factors stay: the paper's "keep" strategy.

    For SGD a learning rate times a factor equals a gradient times that factor, but for weight decay, which is not
    scaled here, and for the momentum buffer, in which gradients keep the factor of the epoch that they came from. Under
    Adam a constant factor cancels.

    Adapted: the paper is for late fusion that adds the predictions of one network a modality; here the unimodal
    classifiers are followed, whatever the fusion. Regression: ε is then minus the mean absolute error, and the ratio is
    the other way up. The dynamic rule is that of AGM's repository (ICCV 2023), which measures on the *test* set; here
    no data but the training batches are looked at. A batch in which nothing of a modality could be measured counts with
    the value of the batch before. A step costs no further pass.

    Args:
        network: see :class:`UnimodalObserver`, as for the next two and ``parts``.
        classifiers: see there.
        metric: see there; a score of at least 0 (Dice, accuracy) or the negative of an error, not one of both signs.
        initial: factor of each modality; None: 1 each. The paper: ratios of the learning rates that suit networks of
            one modality best. AGM's code: 0.9 for audio, 1.1 for images.
        dynamic: whether B follows the classifiers.
        window: epochs; 5 in AGM's code.
        parts: ``control`` and ``magnitude`` of :class:`Steering`, and the arguments of :class:`UnimodalObserver`.

    Raises:
        ValueError: for fewer than two modalities, initial factors that are not positive or do not name the modalities,
            a window below 1, or nothing to scale by (neither ``initial`` nor ``dynamic``).

    Example:
        >>> from monai_cggm.metrics import RegionDice
        >>> from monai_cggm.networks import MultimodalSegmenter, UnimodalClassifiers
        >>> network = MultimodalSegmenter(["flair", "t1ce"], 2, encoder={"backbone": "resnet18", "width": 8})
        >>> classifiers = UnimodalClassifiers.for_network(network)
        >>> dice = RegionDice({"lesion": [1]}, num_classes=2)
        >>> MSLR(network, classifiers, dice, initial={"flair": 0.9, "t1ce": 1.1}).initial
        tensor([0.9000, 1.1000], dtype=torch.float64)
    """

    def __init__(
        self,
        network: nn.Module,
        classifiers: nn.Module,
        metric: Epsilon,
        *,
        initial: Mapping[str, float] | None = None,
        dynamic: bool = True,
        window: int = 5,
        **parts: Any,
    ) -> None:
        super().__init__(network, classifiers, metric, **parts)
        factors = dict.fromkeys(self.modalities, 1.0) if initial is None else dict(initial)
        if set(factors) != set(self.modalities) or not min(factors.values()) > 0:
            raise ValueError(f"initial must have a positive factor for each of {list(self.modalities)}, got {initial}")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if initial is None and not dynamic:
            raise ValueError("dynamic=False keeps the initial factors, and there are none: name them in `initial`")
        self.initial = torch.tensor([factors[m] for m in self.modalities], dtype=torch.float64)
        self.dynamic = dynamic
        self.window = window
        self._history: list[Tensor] = []
        self._sum: Tensor | None = None
        self._batches = 0
        self._epoch = 0

    def __repr__(self) -> str:
        """Say what is attached and how, for the line that the log starts with."""
        return (
            f"MSLR(modalities={list(self.modalities)}, initial={self.initial.tolist()}, dynamic={self.dynamic}, "
            f"window={self.window}, control={self.control!r}, magnitude={self.magnitude})"
        )

    def _listen(self, engine: SupervisedTrainer) -> None:
        super()._listen(engine)
        # at the next epoch's start rather than at this one's end, where a checkpoint may already have been written
        if engine.state.epoch != self._epoch:
            self._close_epoch()
            self._epoch = engine.state.epoch

    def _close_epoch(self) -> None:
        if self._sum is not None:
            self._history = [*self._history, self._sum / self._batches][-self.window :]
        self._sum, self._batches = None, 0

    def terms(self, step: Step) -> Tensor:
        """Return the B of this epoch, after this batch has been counted for the next."""
        self._sum = step.epsilon if self._sum is None else self._sum.to(step.epsilon) + step.epsilon
        self._batches += 1
        initial = self.initial.to(step.epsilon.device)
        if not self.dynamic or not self._history:
            return initial
        return initial * progress_ratio(torch.stack([a.to(initial) for a in self._history]))

    def state_dict(self) -> dict[str, Any]:
        """Return the observer's state, the means of past epochs, and what was counted of the present one."""
        state = super().state_dict() | {"history": [a.cpu() for a in self._history]}
        state |= {"epoch": self._epoch, "batches": self._batches}
        if self._sum is not None:
            state["sum"] = self._sum.cpu()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self._history = list(state["history"])
        self._epoch = int(state["epoch"])
        self._batches = int(state["batches"])
        self._sum = state.get("sum")
