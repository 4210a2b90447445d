# SPDX-License-Identifier: Apache-2.0
"""Prototypical modal rebalance (Fan, Xu, Wang, Wang and Guo, CVPR 2023)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
import torch.nn.functional as F
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from torch import Tensor, nn

from monai_cggm.methods.base import Step, UnimodalObserver
from monai_cggm.methods.steering import Control, controlled
from monai_cggm.metrics.epsilon import Epsilon

_POOLS: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


def prototype_similarity(features: Tensor, prototypes: Tensor, known: Tensor | None = None) -> Tensor:
    r"""Return minus the Euclidean distance of each feature to each class's prototype.

    .. math:: \mathrm{sim}_{nk} = -\lVert h_n - c_k \rVert_2

    Args:
        features: h, ``(N, C)``.
        prototypes: c, ``(K, C)``.
        known: which classes have a prototype, boolean ``(K,)``; the others get the lowest number that there is, so that
            a softmax gives them nothing. None: all have.

    Returns:
        ``(N, K)``.

    Example:
        >>> prototype_similarity(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        tensor([[-5., -0.]])
    """
    # exact for features close to a prototype, where the fast formula loses all digits
    distances = torch.cdist(features, prototypes, compute_mode="donot_use_mm_for_euclid_dist")
    return -distances if known is None else (-distances).masked_fill(~known, torch.finfo(distances.dtype).min)


def class_shares(target: Tensor, classes: int, size: Sequence[int], padded: Sequence[int] | None = None) -> Tensor:
    """Return which share of each position of a feature grid belongs to each class.

    Args:
        target: class indices ``(B, 1, *S)``, ``(B, 1)`` or ``(B,)``.
        classes: K.
        size: the grid, one number a spatial axis; empty: one feature vector a sample.
        padded: the size that the image was padded to at its ends before it was encoded; what is padding belongs to no
            class. None: S.

    Returns:
        ``(B, K, *size)``, float32; sums to 1 over the classes where there is no padding.

    Example:
        >>> class_shares(torch.tensor([[[[0, 0], [0, 1]]]]), classes=2, size=(1, 1)).flatten()
        tensor([0.7500, 0.2500])
    """
    spatial = tuple(target.shape[2:])
    truth = target.reshape(len(target), *spatial).long()
    shares = F.one_hot(truth, classes).movedim(-1, 1).float()
    if not spatial:
        return shares
    if padded is not None:
        ends = [end for n, whole in zip(spatial[::-1], tuple(padded)[::-1], strict=True) for end in (0, whole - n)]
        shares = F.pad(shares, ends)
    if not size:
        return shares.flatten(2).mean(dim=2)
    return _POOLS[len(spatial)](shares, tuple(size))


def class_factors(counts: Tensor, *, by_class: bool) -> Tensor:
    """Return by what a position of each class is multiplied so that a sum over positions is the mean.

    Args:
        counts: how much of each class there is, ``(..., K)``.
        by_class: the mean over the classes that are there of the mean within each; otherwise the plain mean.

    Returns:
        ``(..., K)``; 0 where there is nothing.

    Example:
        >>> class_factors(torch.tensor([4.0, 1.0, 0.0]), by_class=True)
        tensor([0.1250, 0.5000, 0.0000])
        >>> class_factors(torch.tensor([4.0, 1.0, 0.0]), by_class=False)
        tensor([0.2000, 0.2000, 0.0000])
    """
    there = counts > 0
    if by_class:
        total = counts * there.sum(dim=-1, keepdim=True)
    else:
        total = counts.sum(dim=-1, keepdim=True).expand_as(counts)
    return torch.where(there, 1 / total, torch.zeros_like(total))


def rebalance_weights(scores: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return how much each modality is pulled to its prototypes, and how much the best one is held back.

    .. math::
        \beta_i = \mathrm{clip}\Big(\frac{\max_{k \ne i} s_k}{s_i} - 1,\, 0,\, 1\Big), \qquad
        \gamma_i = \mathrm{clip}\Big(\frac{s_i}{\max_{k \ne i} s_k} - 1,\, 0,\, 1\Big)

    For two modalities these are the paper's, with its ratio ρ = s_0 / s_1.

    Args:
        scores: s, mean probability of the true class, ``(M,)``; NaN for a modality that no sample has.

    Returns:
        β and γ, each ``(M,)``; γ is above 0 for the best alone. 0 for a modality without a score.

    Example:
        >>> rebalance_weights(torch.tensor([0.6, 0.4, 0.3]))
        (tensor([0.0000, 0.5000, 1.0000]), tensor([0.5000, 0.0000, 0.0000]))
    """
    known = scores.nan_to_num(nan=0.0)
    best, runner_up = known.topk(2).values
    is_best = torch.zeros_like(known, dtype=torch.bool).scatter(0, known.argmax(dim=0, keepdim=True), True)
    others = torch.where(is_best, runner_up, best)
    usable = (known > 0) & (others > 0)
    # a modality without a score leaves nothing to compare with
    beta = torch.where(usable, (others / known - 1).clamp(0.0, 1.0), torch.zeros_like(known))
    gamma = torch.where(usable, (known / others - 1).clamp(0.0, 1.0), torch.zeros_like(known))
    return beta, gamma


class PMR(UnimodalObserver):
    r"""Pull the features of lagging modalities to their class's prototype, and hold the leader back at first.

    Fan, Xu, Wang, Wang and Guo, *PMR: Prototypical Modal Rebalance for Multimodal Learning*, CVPR 2023. The prototype
    :math:`c^i_k` is the mean of encoder i's features of class k, and :math:`p^i` the softmax over the classes of
    :func:`prototype_similarity`. With :math:`s_i` the mean probability of the true class and β, γ of
    :func:`rebalance_weights`:

    .. math::
        L = L_{task} + \mu \sum_i \beta_i\, \mathrm{CE}(p^i, y) - \nu \sum_i \gamma_i\, H(p^i)

    The last term, prototypical entropy regularisation, acts in the first ``entropy_epochs`` only; it is in the paper
    and not in the released code. Both reach the encoders alone, and no gradient goes into prototypes, s, β and γ.

    The features of an encoder are what its ``feature_of(output)`` returns where it has that, otherwise its output, or
    the last of several: ``(B, C)`` or ``(B, C, *grid)``. For segmentation every position of the grid is a feature, with
    the *shares* that the classes have in it (:func:`class_shares`): prototypes are means weighted by them,
    cross-entropy has them as its target, and every mean is the mean over the classes that are there of the mean within
    each, because nearly all positions are background. A class that has no prototype yet is left out of the softmax, and
    what belongs to it counts nothing. A sample counts for the modalities that it has.

    Prototypes are means of the features that training met in the epoch, renewed at its end,
    :math:`c \leftarrow a c + (1 - a) \bar h`; in the first epoch there are none, and nothing is added. The released
    code runs over a part of the training set for them: that costs another pass, and has the features of one moment.
    For more than two modalities each is compared with the best of the others, and every one but the best is pulled.

    Args:
        network: see :class:`UnimodalObserver`, as for the next two and ``parts``.
        classifiers: see there; PMR does not use them, they are watched.
        metric: see there.
        mu: μ, at least 0. The released code takes 0.6 to 2 for different data sets; 1 is between.
        nu: ν, at least 0. 0.1 is ours: the code has no such term.
        entropy_epochs: last epoch of the entropy term, of which the first has none yet; 10 is ours.
        momentum: a, 0 to below 1; 0.2 or 0.5 in the released code.
        control: see :func:`monai_cggm.methods.steering.controlled`, of β and of γ.
        parts: the arguments of :class:`UnimodalObserver`.

    Raises:
        ValueError: for fewer than two modalities, a network of one output (a number has no class whose prototype it
            could be near), or numbers out of their range.

    Example:
        >>> from monai_cggm.metrics import RegionDice
        >>> from monai_cggm.networks import MultimodalSegmenter, UnimodalClassifiers
        >>> network = MultimodalSegmenter(["flair", "t1ce"], 2, encoder={"backbone": "resnet18", "width": 8})
        >>> classifiers = UnimodalClassifiers.for_network(network)
        >>> PMR(network, classifiers, RegionDice({"lesion": [1]}, num_classes=2))
        PMR(modalities=['flair', 't1ce'], mu=1.0, nu=0.1, entropy_epochs=10, momentum=0.5, control='none')
    """

    def __init__(
        self,
        network: nn.Module,
        classifiers: nn.Module,
        metric: Epsilon,
        *,
        mu: float = 1.0,
        nu: float = 0.1,
        entropy_epochs: int = 10,
        momentum: float = 0.5,
        control: Control = "none",
        **parts: Any,
    ) -> None:
        super().__init__(network, classifiers, metric, **parts)
        if len(self.modalities) < 2:
            raise ValueError(f"PMR balances two modalities or more, the network has {list(self.modalities)}")
        self.classes = self.head.weight.shape[0]
        if self.classes == 1:
            raise ValueError("PMR compares features with a prototype of each class, and the network has one output")
        if not mu >= 0 or not nu >= 0:
            raise ValueError(f"mu and nu must be at least 0, got mu={mu} and nu={nu}")
        if entropy_epochs < 0:
            raise ValueError(f"entropy_epochs must be at least 0, got {entropy_epochs}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}")
        controlled(torch.ones(1), control)
        self.mu = mu
        self.nu = nu
        self.entropy_epochs = entropy_epochs
        self.momentum = momentum
        self.control: Control = control
        self.prototypes: dict[str, Tensor] = {}
        self.known: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._epoch = 0

    def __repr__(self) -> str:
        """Say what is attached and how, for the line that the log starts with."""
        return (
            f"PMR(modalities={list(self.modalities)}, mu={self.mu}, nu={self.nu}, "
            f"entropy_epochs={self.entropy_epochs}, momentum={self.momentum}, control={self.control!r})"
        )

    def attach(self, engine: SupervisedTrainer) -> None:
        """Attach to a trainer; see :meth:`UnimodalObserver.attach`."""
        super().attach(engine)
        engine.add_event_handler(Events.EPOCH_STARTED, lambda: self._sums.clear())
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._renew)

    def _listen(self, engine: SupervisedTrainer) -> None:
        super()._listen(engine)
        self._epoch = engine.state.epoch

    # ------------------------------------------------------------------ one step

    def extra_loss(self, step: Step) -> Tensor | None:
        """Count this batch for the next prototypes, and return the two terms."""
        views = {m: self._view(step, i, m) for i, m in enumerate(self.modalities)}
        for modality, (features, shares) in views.items():
            self._collect(modality, features.detach(), shares)
        zeros = torch.zeros(len(self.modalities), device=step.task_loss.device)
        if not self.prototypes:
            self._report_terms(zeros, zeros, zeros, zeros)
            return None
        similar = [self._against_prototypes(m, *views[m]) for m in self.modalities]
        dense = step.target.ndim > 2
        factors = class_factors(_sum_over_ranks(torch.stack([w.sum(dim=0) for _, w in similar])), by_class=dense)
        weights = [w * f for (_, w), f in zip(similar, factors, strict=True)]
        logs = [log_p for log_p, _ in similar]
        probability = torch.stack([(w * p.exp().detach()).sum() for w, p in zip(weights, logs, strict=True)])
        scores = torch.where(factors.sum(dim=1) > 0, _sum_over_ranks(probability), float("nan"))
        beta, gamma = (controlled(values, self.control) for values in rebalance_weights(scores))
        cross_entropy = torch.stack([-(w * p).sum() for w, p in zip(weights, logs, strict=True)])
        entropy = torch.stack([(w.sum(dim=1) * _entropy(p)).sum() for w, p in zip(weights, logs, strict=True)])
        # the mean that DDP takes of the ranks' gradients is then the gradient of the whole batch's mean
        pull = self.mu * idist.get_world_size() * beta * cross_entropy
        hold = self.nu * idist.get_world_size() * gamma * entropy * float(self._epoch <= self.entropy_epochs)
        self._report_terms(pull, hold, scores.nan_to_num(), beta)
        return pull.sum() - hold.sum()

    def _report_terms(self, pull: Tensor, hold: Tensor, scores: Tensor, beta: Tensor) -> None:
        self._scalars["loss/prototypes"] = pull.detach().sum()
        self._scalars["loss/prototype_entropy"] = -hold.detach().sum()
        self._add_scalars("prototype_score", scores)
        self._add_scalars("prototype_weight", beta)

    def _view(self, step: Step, index: int, modality: str) -> tuple[Tensor, Tensor]:
        """Features ``(N, C)`` and shares ``(N, K)`` of every position of the samples that have the modality."""
        features = feature_of(self.encoders[modality], step.features[modality])
        padded = _padded_size(step.inputs[modality], step.target)
        shares = class_shares(step.target, self.classes, tuple(features.shape[2:]), padded)
        if step.present is not None:
            rows = step.present[:, index].nonzero().squeeze(1).to(features.device)
            features, shares = features[rows], shares[rows]
        return _positions(features).float(), _positions(shares)

    def _against_prototypes(self, modality: str, features: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``(N, K)``, 0 for classes without a prototype, and the shares of the others."""
        known = self.known[modality].to(features.device)
        similarity = prototype_similarity(features, self.prototypes[modality].to(features), known)
        return F.log_softmax(similarity, dim=1).masked_fill(~known, 0.0), shares * known

    # ------------------------------------------------------------------ prototypes

    def _collect(self, modality: str, features: Tensor, shares: Tensor) -> None:
        # the last column counts
        features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
        # in float64 before the product: under autocast it would be one of half precision
        sums = shares.T.double() @ features.double()
        self._sums[modality] = self._sums[modality] + sums if modality in self._sums else sums

    def _renew(self, engine: SupervisedTrainer) -> None:
        for modality, local in self._sums.items():
            sums = _sum_over_ranks(local)
            counts = sums[:, -1:]
            means = (sums[:, :-1] / counts.clamp(min=torch.finfo(counts.dtype).tiny)).float()
            met = counts[:, 0] > 0
            before = self.prototypes.get(modality, torch.zeros_like(means)).to(means)
            known = self.known.get(modality, torch.zeros_like(met)).to(met.device)
            mixed = torch.where(known[:, None], self.momentum * before + (1 - self.momentum) * means, means)
            self.prototypes[modality] = torch.where(met[:, None], mixed, before)
            self.known[modality] = known | met
        self._sums.clear()

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the observer's state and the prototypes, as they are at the end of an epoch."""
        prototypes = {m: {"means": c.cpu(), "known": self.known[m].cpu()} for m, c in self.prototypes.items()}
        return super().state_dict() | {"prototypes": prototypes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self.prototypes = {m: found["means"] for m, found in state["prototypes"].items()}
        self.known = {m: found["known"] for m, found in state["prototypes"].items()}


def feature_of(encoder: nn.Module, output: Any) -> Tensor:
    """Return the one tensor that stands for what an encoder returned, ``(B, C)`` or ``(B, C, *grid)``.

    Args:
        encoder: may say so itself by a method ``feature_of(output)``.
        output: a tensor, or several, of which the last is taken: that of the highest level.

    Raises:
        TypeError: for anything else.

    Example:
        >>> low, high = torch.zeros(2, 8, 16, 16), torch.zeros(2, 32, 4, 4)
        >>> tuple(feature_of(nn.Identity(), (low, high)).shape)
        (2, 32, 4, 4)
    """
    own = getattr(encoder, "feature_of", None)
    found = own(output) if callable(own) else output[-1] if isinstance(output, (tuple, list)) else output
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise TypeError(
            f"{type(encoder).__name__} returns {type(output).__name__}, of which no tensor of features is known: give "
            "it a method feature_of(output) that returns (B, C) or (B, C, *grid)"
        )
    return found


def _padded_size(given: Any, target: Tensor) -> tuple[int, ...] | None:
    """The size of the image that an encoder was given, where it is the target's with something at its ends."""
    if not isinstance(given, Tensor) or given.ndim != target.ndim or given.ndim < 3:
        return None
    size = tuple(given.shape[2:])
    return size if all(n >= own for n, own in zip(size, target.shape[2:], strict=True)) else None


def _positions(values: Tensor) -> Tensor:
    return values.flatten(2).movedim(1, -1).flatten(0, 1) if values.ndim > 2 else values


def _entropy(log_probabilities: Tensor) -> Tensor:
    # classes without a prototype have the logarithm 0, and so count nothing
    return -(log_probabilities.exp() * log_probabilities).sum(dim=1)


def _sum_over_ranks(values: Tensor) -> Tensor:
    return torch.as_tensor(idist.all_reduce(values)) if idist.get_world_size() > 1 else values
