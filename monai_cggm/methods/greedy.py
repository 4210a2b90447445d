# SPDX-License-Identifier: Apache-2.0
"""Against greedy learning: the slowest encoder learns alone for a while (Wu et al., ICML 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.engines import SupervisedTrainer
from torch import Tensor, nn

from monai_cggm.methods.base import Step
from monai_cggm.methods.steering import Steering
from monai_cggm.metrics.epsilon import Epsilon


def learning_speeds(updates: Tensor, steps: Tensor) -> Tensor:
    r"""Return how fast each encoder has learnt so far.

    .. math:: \mu_i = \log_{10} \frac{1}{T_i} \sum_{t=1}^{T_i} \frac{\lVert g_i \rVert^2}{\lVert \theta_i \rVert^2}

    Args:
        updates: the sum, ``(M,)``.
        steps: T, ``(M,)``.

    Returns:
        μ, ``(M,)``; NaN where T is 0.

    Example:
        >>> learning_speeds(torch.tensor([2.0, 0.02, 0.0]), torch.tensor([2.0, 2.0, 0.0]))
        tensor([ 0., -2., nan])
    """
    return torch.log10(updates / steps)


def slowest(speeds: Tensor) -> tuple[Tensor, Tensor]:
    """Return which modality learns most slowly, and how far the fastest is ahead of it.

    Args:
        speeds: μ, ``(M,)``; NaN for one of which nothing is known, which is then neither.

    Returns:
        The index, and the difference, which is not above 0 where fewer than two are known. Both are scalar tensors.

    Example:
        >>> slowest(torch.tensor([-1.0, float("nan"), -3.0]))
        (tensor(2), tensor(2.))
    """
    unknown = speeds.isnan()
    low = speeds.masked_fill(unknown, torch.inf)
    return low.argmin(), speeds.masked_fill(unknown, -torch.inf).amax() - low.amin()


class Greedy(Steering):
    r"""Let the slowest encoder learn alone for some steps, whenever the encoders' speeds are apart.

    After each regular step, in which all learn, the speeds μ are compared (:func:`learning_speeds`, with the gradient
    and the weights of the encoder's parameters). Where the fastest and the slowest differ by more than ``threshold``,
    the next ``window`` steps re-balance:

    .. math:: B_i = 1 \text{ for the slowest}, \qquad B_i = 0 \text{ for all others}

    After them comes a regular step, and a new comparison. Only regular steps count for μ, from the first epoch on. From
    "Characterizing and Overcoming the Greedy Nature of Learning in Multi-modal Deep Neural Networks" (Wu, Jastrzębski,
    Cho and Geras, ICML 2022), where μ is the conditional learning speed; the loop is that of the released code.

    Adapted: the paper needs two modalities and layers that pass information between their networks (MMTM). There μ
    relates the speed of those layers to that of the network that they belong to, and re-balancing replaces what one
    network gets from the other by its running mean. Here μ is of the encoder itself, re-balancing holds the other
    encoders, and any number of modalities and any task will do; HGA has the like for four modalities. Fusion and
    classifiers go on learning. μ is a mean where the authors have a sum, which makes no difference unless an encoder
    had no gradient in some step because no sample of the batch had its modality: such a step does not count for it. A
    modality that a *part* of the samples lack has a smaller gradient, and is slower.

    Weights of different encoders may have sizes and depths that make their speeds differ for ever, by far more than the
    authors' threshold: then only one step in ``window`` + 1 is regular, and the same encoder is chosen again and again.
    Watch ``balance`` in the log. Where B is 0 only the gradient is: SGD's momentum and weight decay still move the
    weights. A step costs no further pass.

    Args:
        network: see :class:`UnimodalObserver`, as for the next two and ``parts``.
        classifiers: see there.
        metric: see there; it is reported, and steers nothing here.
        threshold: of the difference of μ, in powers of ten; 0.01 in the authors' code (ε).
        window: re-balancing steps in a row; 5 in the authors' code (Q).
        start_epoch: first epoch of comparisons; 2 in the authors' code. Before it all steps are regular.
        parts: ``control`` and ``magnitude`` of :class:`Steering`, and the arguments of :class:`UnimodalObserver`.

    Raises:
        ValueError: for fewer than two modalities, or numbers out of their range.

    Example:
        >>> from monai_cggm.metrics import RegionDice
        >>> from monai_cggm.networks import MultimodalSegmenter, UnimodalClassifiers
        >>> network = MultimodalSegmenter(["flair", "t1ce"], 2, encoder={"backbone": "resnet18", "width": 8})
        >>> classifiers = UnimodalClassifiers.for_network(network)
        >>> method = Greedy(network, classifiers, RegionDice({"lesion": [1]}, num_classes=2), window=5)
        >>> # method.attach(trainer)
    """

    def __init__(
        self,
        network: nn.Module,
        classifiers: nn.Module,
        metric: Epsilon,
        *,
        threshold: float = 0.01,
        window: int = 5,
        start_epoch: int = 2,
        **parts: Any,
    ) -> None:
        super().__init__(network, classifiers, metric, **parts)
        if not threshold >= 0:
            raise ValueError(f"threshold must not be negative, got {threshold}")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if start_epoch < 1:
            raise ValueError(f"start_epoch must be at least 1, got {start_epoch}")
        self.threshold = threshold
        self.window = window
        self.start_epoch = start_epoch
        number = len(self.modalities)
        self._updates = torch.zeros(number, dtype=torch.float64)
        self._steps = torch.zeros(number, dtype=torch.float64)
        #: re-balancing steps that are still to come, and whose they are
        self._left = torch.zeros((), dtype=torch.int64)
        self._chosen = torch.zeros((), dtype=torch.int64)
        self._epoch = 0

    def __repr__(self) -> str:
        """Say what is attached and how, for the line that the log starts with."""
        return (
            f"Greedy(modalities={list(self.modalities)}, threshold={self.threshold}, window={self.window}, "
            f"start_epoch={self.start_epoch}, control={self.control!r}, magnitude={self.magnitude})"
        )

    def _listen(self, engine: SupervisedTrainer) -> None:
        super()._listen(engine)
        self._epoch = engine.state.epoch

    def terms(self, step: Step) -> Tensor:
        """Return ones in a regular step, and 1 for the chosen modality alone in a re-balancing one."""
        self._move_to(step.epsilon.device)
        order = torch.arange(len(self.modalities), device=step.epsilon.device)
        return ((self._left == 0) | (order == self._chosen)).double()

    def modulate(self, step: Step) -> None:
        """Scale the gradients; after a regular step count it, and decide what the next steps are."""
        gradients = torch.stack([self._scalars[f"gradient_norm/{m}"] for m in self.modalities]).double()
        super().modulate(step)
        regular = self._left == 0
        # under AMP an overflow makes the optimiser leave the step out, and would stay in the sums for ever
        counts = regular & (gradients > 0) & gradients.isfinite().all()
        updates = gradients.square() / self._weight_norms().square()
        self._updates = self._updates + torch.where(counts, updates, 0.0)
        self._steps = self._steps + counts.double()
        self._add_scalars("update", self._updates / self._steps.clamp(min=1))
        chosen, ahead = slowest(learning_speeds(self._updates, self._steps))
        begins = regular & (ahead > self.threshold) & (self._epoch >= self.start_epoch)
        # tensors throughout: a question to the device would wait for the step
        self._chosen = torch.where(begins, chosen, self._chosen)
        self._left = torch.where(begins, self.window, (self._left - 1).clamp(min=0))

    def _weight_norms(self) -> Tensor:
        trained = [[p.detach() for p in ps if p.requires_grad] for ps in self._encoder_parameters.values()]
        return torch.stack([torch.nn.utils.get_total_norm(weights) for weights in trained]).double()

    def _move_to(self, device: torch.device) -> None:
        self._updates, self._steps = self._updates.to(device), self._steps.to(device)
        self._left, self._chosen = self._left.to(device), self._chosen.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Return the observer's state, what was counted, and how far a re-balancing window has come."""
        return super().state_dict() | {
            "updates": self._updates.cpu(),
            "steps": self._steps.cpu(),
            "left": self._left.cpu(),
            "chosen": self._chosen.cpu(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self._updates, self._steps = state["updates"], state["steps"]
        self._left, self._chosen = state["left"], state["chosen"]
