# SPDX-License-Identifier: Apache-2.0
"""Classifier-guided gradient modulation (Guo, Jin, Chen and Zhao, NeurIPS 2024)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from torch import Tensor, nn

from monai_cggm.methods.balance import Rule, balance, mean_factor
from monai_cggm.methods.base import FUSION_HEAD, Step
from monai_cggm.methods.direction import direction_loss
from monai_cggm.methods.steering import Steering
from monai_cggm.metrics.epsilon import Epsilon

logger = logging.getLogger(__name__)

Direction = Literal["gradient", "weights", "lagged", "off"]


class CGGM(Steering):
    r"""Scale each encoder's gradient by its balance term and turn the fusion's gradient towards lagging modalities.

    In every iteration, with ε the classifiers' metric and :math:`\Delta\varepsilon` its change since the last one:

    .. math::
        B_i &= \rho \frac{\sum_k \Delta\varepsilon_k - \Delta\varepsilon_i}{\sum_k \Delta\varepsilon_k}
            & \text{(7)} \\
        \nabla_{\theta^{\phi_i}} &\leftarrow B_i \nabla_{\theta^{\phi_i}} L & \text{(8)} \\
        L_{gm} &= \frac1M \sum_i |B_i| - B_i \cos(g_F, g_i) & \text{(12)} \\
        L &= L_{task} + \lambda L_{gm} & \text{(13)}

    :math:`g_F` and :math:`g_i` are the gradients of the last layer of the network and of classifier i. :math:`g_i` is a
    constant; :math:`g_F` is differentiated, through its closed form, so only the loss and what follows the head are
    differentiated twice. Clip after it (:class:`monai_cggm.handlers.ClipGradients`), never before.

    Under Adam a constant factor on a gradient cancels; only the changes of B act there, unless ``scale="update"``.

    Args:
        network: see :class:`UnimodalObserver`.
        classifiers: see there.
        metric: see there; the paper: Dice for segmentation, accuracy, or mean absolute error.
        rho: ρ, default from Table 7 for BraTS.
        lam: λ, default from Table 7 for BraTS.
        rule: how Δε becomes B, see :func:`monai_cggm.methods.balance.balance`.
        direction: ``"gradient"``: equations 9 to 13 on the current step. ``"lagged"``: algorithm 1 to the letter: the
            loss gets the *previous* step's L_gm, which is a constant and changes no gradient. ``"weights"``: as in the
            authors' released code: cosine of the head *weights* of the previous step, which pulls the fusion's head
            towards the classifiers' heads. ``"off"``: magnitude only.
        max_share: largest norm of the direction term's gradient at the head's input, over that of the task's; λ is
            made smaller in a step where it would be more. The paper has no such bound, and the gradient of a cosine
            grows as 1/‖g_F‖ while the task's shrinks. None: no bound.
        parts: ``magnitude`` (False: the direction-only row of Table 6), ``scale`` and ``control`` of :class:`Steering`,
            and the arguments of :class:`UnimodalObserver`.

    Raises:
        ValueError: for fewer than two modalities, ρ ≤ 0, λ < 0, max_share ≤ 0, an unknown rule or direction, or the
            paper's rule, which has no bound, on the optimizer's step.

    Example:
        >>> from monai_cggm.metrics import RegionDice
        >>> from monai_cggm.networks import MultimodalSegmenter, UnimodalClassifiers
        >>> encoder = {"backbone": "resnet18", "width": 8}
        >>> network = MultimodalSegmenter(["flair", "t1ce"], num_classes=2, encoder=encoder)
        >>> classifiers = UnimodalClassifiers.for_network(network)
        >>> cggm = CGGM(network, classifiers, RegionDice({"lesion": [1]}, num_classes=2), rho=1.2, lam=0.1)
        >>> # cggm.attach(trainer)
    """

    def __init__(
        self,
        network: nn.Module,
        classifiers: nn.Module,
        metric: Epsilon,
        *,
        rho: float = 1.2,
        lam: float = 0.1,
        rule: Rule = "paper",
        direction: Direction = "gradient",
        max_share: float | None = None,
        **parts: Any,
    ) -> None:
        super().__init__(network, classifiers, metric, **parts)
        if not rho > 0:
            raise ValueError(f"rho must be positive, got {rho}")
        if not lam >= 0:
            raise ValueError(f"lam must not be negative, got {lam}")
        if direction not in ("gradient", "weights", "lagged", "off"):
            raise ValueError(f"direction must be 'gradient', 'weights', 'lagged' or 'off', got {direction!r}")
        if max_share is not None and not max_share > 0:
            raise ValueError(f"max_share must be positive or None, got {max_share}")
        balance(torch.ones(len(self.modalities)), rho, rule)  # refuses an unknown rule before the first step
        if self.scale == "update" and rule == "paper":
            raise ValueError(
                "scale='update' multiplies the optimizer's own step, and equation 7 has no bound: give a bounded rule, "
                "such as rule='positive'"
            )
        self.rho = rho
        self.lam = lam
        self.rule: Rule = rule
        self.direction: Direction = direction
        self.max_share = max_share
        self.differentiable_fusion_gradient = direction == "gradient" and lam > 0
        #: what the direction modes that look back keep of the last step
        self._previous: dict[str, Tensor] = {}
        self._counts: Tensor | None = None

    def __repr__(self) -> str:
        """Say what is attached and how, for the line that the log starts with."""
        return (
            f"CGGM(modalities={list(self.modalities)}, rho={self.rho}, lam={self.lam}, rule={self.rule!r}, "
            f"direction={self.direction!r}, max_share={self.max_share}, magnitude={self.magnitude}, "
            f"scale={self.scale!r}, control={self.control!r})"
        )

    def attach(self, engine: SupervisedTrainer) -> None:
        """Attach to a trainer; see :meth:`UnimodalObserver.attach`."""
        super().attach(engine)
        for moment in (Events.EPOCH_COMPLETED(once=1), Events.COMPLETED):
            engine.add_event_handler(moment, self._warn)

    def terms(self, step: Step) -> Tensor:
        """Return equation 7 of this step's Δε under the rule."""
        terms, bounded, undefined = balance(step.delta, self.rho, self.rule)
        acted = torch.stack([bounded, undefined]).long()
        self._counts = acted if self._counts is None else self._counts.to(acted.device) + acted
        self._scalars |= {"balance_bounded": bounded, "balance_undefined": undefined}
        return terms

    def extra_loss(self, step: Step) -> Tensor | None:
        """Settle this step's B, and return λ L_gm of equation 13."""
        super().extra_loss(step)
        assert self.balance is not None
        if self.direction == "off":
            return None
        loss = self._direction_loss(step, self.balance.to(step.fusion_gradient.dtype))
        self._scalars["loss/gm"] = loss.detach()
        return self._lam(step, loss) * loss

    def _lam(self, step: Step, loss: Tensor) -> Tensor | float:
        """λ, or less where the direction term would take more than its share."""
        if self.max_share is None or not self.differentiable_fusion_gradient:
            return self.lam  # without g_F's graph the term does not reach the head's input
        fused = self._heads.inputs[FUSION_HEAD]
        (task,) = torch.autograd.grad(step.task_loss, fused, retain_graph=True)
        (gm,) = torch.autograd.grad(loss, fused, retain_graph=True)
        allowed = self.max_share * _norm_over_ranks(task) / _norm_over_ranks(gm).clamp(min=1e-30)
        lam = allowed.clamp(max=self.lam)
        self._scalars["lam"] = lam
        return lam

    def _direction_loss(self, step: Step, terms: Tensor) -> Tensor:
        if self.direction == "gradient":
            return direction_loss(step.fusion_gradient, step.unimodal_gradients, terms)
        if self.direction == "lagged":
            current = direction_loss(step.fusion_gradient, step.unimodal_gradients, terms).detach()
            loss = self._previous.get("loss", torch.zeros_like(current)).to(current)
            self._previous = {"loss": current}
            return loss
        return self._weight_alignment(terms)

    def _weight_alignment(self, terms: Tensor) -> Tensor:
        """Return the released code's L_gm: cosine of weights, all of the previous step, felt by the fusion's head."""
        weight = self.head.weight.flatten()
        heads = torch.stack([self.classifier_heads[m].weight.detach().flatten() for m in self.modalities])
        previous, self._previous = (
            self._previous,
            {"balance": terms.detach(), "head": weight.detach().clone(), "classifier_heads": heads},
        )
        if not previous:
            return torch.zeros_like(terms[0])
        as_it_was = weight + (previous["head"].to(weight) - weight).detach()
        # ρ is not part of the released L_gm
        released = previous["balance"].to(weight) / self.rho
        return direction_loss(as_it_was, previous["classifier_heads"].to(weight), released)

    def _warn(self, engine: SupervisedTrainer) -> None:
        if self._counts is None:
            return
        bounded, undefined = self._counts.tolist()
        if undefined:
            mean = mean_factor(self.rho, len(self.modalities))
            engine.logger.warning(
                f"CGGM: equation 7 had no finite value in {undefined} of {engine.state.iteration} iterations; "
                f"every encoder got the mean factor {mean:.3f} there"
            )
        if bounded:
            engine.logger.warning(
                f"CGGM: the rule {self.rule!r} changed a term in {bounded} of {engine.state.iteration} iterations"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the observer's state, what the direction term looks back on, and the counts."""
        state = super().state_dict()
        state["previous"] = {key: value.cpu() for key, value in self._previous.items()}
        if self._counts is not None:
            state["counts"] = self._counts.cpu()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self._previous = dict(state["previous"])
        self._counts = state.get("counts")


def _norm_over_ranks(gradient: Tensor) -> Tensor:
    square = gradient.detach().float().square().sum()
    return torch.as_tensor(idist.all_reduce(square) if idist.get_world_size() > 1 else square).sqrt()
