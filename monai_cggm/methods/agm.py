# SPDX-License-Identifier: Apache-2.0
"""Adaptive gradient modulation (Li, Li, Hu, Lei, Li and Zhang, ICCV 2023)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ignite.distributed as idist
import torch
import torch.nn.functional as F
from monai.engines import SupervisedTrainer
from monai.utils import CommonKeys
from torch import Tensor, nn

from monai_cggm.batches import FUSED, PRESENT
from monai_cggm.handlers.checkpoint import unwrapped
from monai_cggm.methods.base import Step
from monai_cggm.methods.samples import rows_with
from monai_cggm.methods.steering import Steering
from monai_cggm.metrics.epsilon import Epsilon
from monai_cggm.networks.subsets import subset_masks

#: with more modalities than this the 2^M − 2 further passes of the fusion would be the training
MOST_MODALITIES = 6

#: probabilities below this count as this, as in the authors' code
SMALLEST_PROBABILITY = 1e-8

#: exp of more than this would not be a number that anything is compared with
LARGEST_EXPONENT = 50.0


def shapley_weights(masks: Tensor) -> Tensor:
    r"""Return by how much the prediction of each subset counts in each modality's share of the whole.

    .. math:: m_i = \sum_{S \not\ni i} \frac{|S|!\,(M - |S| - 1)!}{M!}\big(\Phi(S \cup i) - \Phi(S)\big)
        = \sum_S w_{iS}\,\Phi(S), \qquad \Phi(\emptyset) = 0

    Args:
        masks: the subsets other than the empty one, boolean ``(S, M)``.

    Returns:
        w, ``(M, S)``, float64.

    Example:
        >>> shapley_weights(torch.tensor([[True, True], [True, False], [False, True]]))
        tensor([[ 0.5000,  0.5000, -0.5000],
                [ 0.5000, -0.5000,  0.5000]], dtype=torch.float64)
    """
    modalities = masks.shape[1]
    weights = torch.zeros(modalities, len(masks), dtype=torch.float64)
    for column, mask in enumerate(masks.tolist()):
        size = sum(mask)
        for row, inside in enumerate(mask):
            if inside:
                weights[row, column] = math.factorial(size - 1) * math.factorial(modalities - size)
            else:
                weights[row, column] = -math.factorial(size) * math.factorial(modalities - size - 1)
    return weights / math.factorial(modalities)


def lead_ratios(scores: Tensor, counted: Tensor | None = None) -> Tensor:
    r"""Return how far each modality is ahead of the mean of the others: above 1 where its loss is lower.

    .. math:: r_i = \exp\Big(\frac1{M-1} \sum_{k \ne i} s_k - s_i\Big)

    Args:
        scores: s, each modality's loss, ``(M,)``.
        counted: which of them are known, boolean ``(M,)``; None: all.

    Returns:
        r, ``(M,)``; without meaning for modalities that are not counted.

    Example:
        >>> lead_ratios(torch.tensor([0.0, 0.6931])).round(decimals=2)
        tensor([2.0000, 0.5000])
    """
    there = torch.ones_like(scores) if counted is None else counted.to(scores)
    known = torch.where(there > 0, scores, torch.zeros_like(scores))
    others = (known.sum() - known) / (there.sum() - there).clamp(min=1.0)
    return (others - known).clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).exp()


def modulation_coefficients(scores: Tensor, means: Tensor, alpha: float = 1.0, cap: float = 10.0) -> Tensor:
    r"""Return c, by which the gradient that goes back through each modality's share is multiplied.

    .. math:: c_i = \exp\big(\alpha \min(r^*_i - r_i,\, \text{cap})\big)

    r is the ratio of this batch and r* that of the running means: a modality that is further ahead than it used to be
    is slowed down, one that has fallen back is speeded up.

    Args:
        scores: each modality's loss on this batch, ``(M,)``; NaN for one that no sample has.
        means: the mean of those of the batches before, ``(M,)``; NaN where there are none.
        alpha: α.
        cap: largest difference that counts.

    Returns:
        c, ``(M,)``; 1 for a modality of which nothing is known, and where fewer than two are known.

    Example:
        >>> modulation_coefficients(torch.tensor([0.1, 0.9]), torch.tensor([0.5, 0.5])).round(decimals=2)
        tensor([0.2900, 1.7300])
    """
    counted = scores.isfinite() & means.isfinite()
    gap = lead_ratios(means, counted) - lead_ratios(scores, counted)
    coefficients = (alpha * gap.clamp(max=cap)).exp()
    return torch.where(counted & (counted.sum() > 1), coefficients, torch.ones_like(coefficients))


def loss_sums(logits: Tensor, target: Tensor, there: Tensor | None = None) -> Tensor:
    """Add up the cross-entropy of each modality's logits, class by class, so that ranks can be added.

    Args:
        logits: ``(M, B, K, *S)``.
        target: class indices ``(B, 1, *S)``, ``(B, 1)`` or ``(B,)``.
        there: which samples count for which modality, boolean ``(B, M)``; None: all.

    Returns:
        Sums and counts of the positions of each true class, ``(2, M, K)``, float64.

    Example:
        >>> loss_sums(torch.zeros(1, 3, 2), torch.tensor([0, 0, 1]))
        tensor([[[1.3863, 0.6931]],
        <BLANKLINE>
                [[2.0000, 1.0000]]], dtype=torch.float64)
    """
    modalities, samples, classes = logits.shape[:3]
    truth = target.reshape(samples, 1, -1).long().to(logits.device)
    logs = F.log_softmax(logits.float(), dim=2).clamp(min=math.log(SMALLEST_PROBABILITY))
    logs = logs.reshape(modalities, samples, classes, -1)
    losses = -logs.gather(2, truth.expand(modalities, samples, 1, truth.shape[2])).squeeze(2).double()
    weights = torch.ones_like(losses)
    if there is not None:
        weights = weights * there.to(losses.device).T[:, :, None]
        losses = torch.where(weights > 0, losses, torch.zeros_like(losses))
    # one class after the other: adding by index is not deterministic on a GPU
    members = [truth.flatten() == k for k in range(classes)]
    by_class = [[torch.where(m, values.flatten(1), 0.0).sum(dim=1) for m in members] for values in (losses, weights)]
    return torch.stack([torch.stack(sums, dim=1) for sums in by_class])


def mean_losses(sums: Tensor, *, by_class: bool) -> Tensor:
    """Turn sums and counts into one loss a modality.

    Args:
        sums: of :func:`loss_sums`, ``(2, M, K)``.
        by_class: the mean over the classes that are there of the mean within each. A tumour is a few percent of an
            image, and the plain mean of its voxels would be a score of the background.

    Returns:
        ``(M,)``; NaN where nothing was counted.

    Example:
        >>> sums = torch.tensor([[[9.0, 2.0]], [[90.0, 1.0]]])
        >>> mean_losses(sums, by_class=True), mean_losses(sums, by_class=False).round(decimals=3)
        (tensor([1.0500]), tensor([0.1210]))
    """
    totals, counts = sums
    if not by_class:
        return totals.sum(dim=1) / counts.sum(dim=1)
    there = counts > 0
    return (totals / counts.clamp(min=1.0)).sum(dim=1) / there.sum(dim=1)


class AGM(Steering):
    r"""Split the prediction into the modalities' shares, and scale the gradient that goes back through each.

    Li, Li, Hu, Lei, Li and Zhang, *Boosting Multi-modal Model Performance with Adaptive Gradient Modulation*, ICCV
    2023. In every step the network's logits Φ are split by Shapley's value over the subsets of modalities
    (:func:`shapley_weights`), so that :math:`\sum_i m_i = \Phi`; each share's loss :math:`s_i` says how well its
    modality does, and with it how far it is ahead of the others, :math:`r_i`, compared with how far it has been on
    average, :math:`r^*_i`:

    .. math::
        s_i = L(m_i, y), \qquad r_i = e^{\overline{s_{k \ne i}} - s_i}, \qquad
        c_i = e^{\alpha \min(r^*_i - r_i, 10)}, \qquad
        \nabla_\theta L \leftarrow \sum_i c_i \Big\langle \frac{\partial L}{\partial \Phi},
        \frac{\partial m_i}{\partial \theta} \Big\rangle

    The weighted sum is written as a term of the loss whose value is 0, so that one backward pass does it. It scales
    what flows into the encoders *and* into the fusion, as the authors' code does (toolkits that scale the encoders'
    gradients by c under the same name do something else).

    The network must have ``fuse(outputs, size, present=mask)``, which predicts from what its encoders returned: the
    encoders run once, the fusion :math:`2^M - 1` times. The further passes run in evaluation mode (batch norm by its
    running statistics and leaving them alone, no dropout), with gradient, as the authors' do.

    What goes beyond the paper: any number of modalities up to six; a sample that lacks modalities, or whose fusion did
    not see some under :class:`ModalityDropout`, is split among those that it was predicted from; for segmentation
    :math:`s_i` is the mean over the classes of the batch of the mean cross-entropy within each, because the background
    would drown the rest; for regression it is the task's own loss of the share, so its scale is that of the target.
    The first batch has nothing to be compared with, and c is 1 there; the released code compares it with losses of 0.

    Args:
        network: see :class:`UnimodalObserver`, as for the next two and ``parts``; it must have ``fuse``.
        classifiers: see there; AGM does not use them, they are watched.
        metric: see there.
        alpha: α, at least 0. 1 is ours: the paper tunes it for each data set, and users of the released code report 1.5
            for CREMA-D.
        cap: largest difference of ratios that counts; 10 in the authors' code.
        parts: ``control`` and ``magnitude`` of :class:`Steering` (here of c), and the arguments of
            :class:`UnimodalObserver`.

    Raises:
        ValueError: for fewer than two modalities or more than six, a network without ``fuse``, α < 0 or cap < 0.

    Example:
        >>> from monai_cggm.metrics import RegionDice
        >>> from monai_cggm.networks import MultimodalSegmenter, UnimodalClassifiers
        >>> network = MultimodalSegmenter(["flair", "t1ce"], 2, encoder={"backbone": "resnet18", "width": 8})
        >>> classifiers = UnimodalClassifiers.for_network(network)
        >>> AGM(network, classifiers, RegionDice({"lesion": [1]}, num_classes=2))
        AGM(modalities=['flair', 't1ce'], alpha=1.0, cap=10.0, control='none', magnitude=True)
    """

    def __init__(
        self,
        network: nn.Module,
        classifiers: nn.Module,
        metric: Epsilon,
        *,
        alpha: float = 1.0,
        cap: float = 10.0,
        **parts: Any,
    ) -> None:
        super().__init__(network, classifiers, metric, **parts)
        if self.scale != "gradient":
            raise ValueError(f"AGM changes what flows into the encoders, not their update: no scale={self.scale!r}")
        modalities = len(self.modalities)
        if modalities > MOST_MODALITIES:
            raise ValueError(
                f"AGM runs the fusion once for each of the {2**modalities - 1} subsets of {modalities} modalities in "
                f"every step: at most {MOST_MODALITIES} modalities are accepted"
            )
        plain = unwrapped(network)
        if not callable(getattr(plain, "fuse", None)):
            raise ValueError(
                f"{type(plain).__name__} has no fuse(outputs, size, present=mask), by which AGM predicts from subsets "
                "of the modalities: it needs a network that can leave modalities out after its encoders"
            )
        if not alpha >= 0 or not cap >= 0:
            raise ValueError(f"alpha and cap must be at least 0, got alpha={alpha} and cap={cap}")
        self.alpha = alpha
        self.cap = cap
        self._is_regression = self.head.weight.shape[0] == 1
        self._masks = subset_masks(self.modalities)
        self._weights = shapley_weights(self._masks)
        self._totals = torch.zeros(2, modalities, dtype=torch.float64)
        self._scores = torch.full((modalities,), math.nan, dtype=torch.float64)
        #: prediction, target and mask of all rows of the step, and its loss: dropout may fuse a sample more than once
        self._rows: tuple[Tensor, Tensor, Tensor | None, Callable[..., Tensor]] | None = None

    def __repr__(self) -> str:
        """Say what is attached and how, for the line that the log starts with."""
        return (
            f"AGM(modalities={list(self.modalities)}, alpha={self.alpha}, cap={self.cap}, control={self.control!r}, "
            f"magnitude={self.magnitude})"
        )

    # ------------------------------------------------------------------ one step

    def _after_loss(self, engine: SupervisedTrainer) -> None:
        output, batch = engine.state.output, engine.state.batch
        mask = batch.get(FUSED, batch.get(PRESENT)) if isinstance(batch, Mapping) else None
        mask = None if mask is None or bool(mask.all()) else mask.bool().cpu()
        loss_function = self.loss_function or engine.loss_function
        self._rows = (output[CommonKeys.PRED], output[CommonKeys.LABEL], mask, loss_function)
        super()._after_loss(engine)
        self._rows = None

    def extra_loss(self, step: Step) -> Tensor | None:
        """Settle this step's c, and return the term of value 0 that puts it into the gradient."""
        assert self._rows is not None
        prediction, target, mask, loss_function = self._rows
        shares = self._split(step, prediction, mask)
        self._scores = self._losses(shares.detach(), target, mask, loss_function)
        super().extra_loss(step)
        assert self.balance is not None
        self._add_scalars("share_loss", self._scores.nan_to_num())
        if not self.magnitude:
            return None
        (delta,) = torch.autograd.grad(step.task_loss, prediction, retain_graph=True)
        flows = (delta.detach().float() * shares).flatten(1).sum(dim=1)
        term = ((self.balance.to(flows) - 1.0) * flows).sum()
        return term - term.detach()

    def terms(self, step: Step) -> Tensor:
        """Return c against the means of the batches before, and count this batch."""
        totals, counts = self._totals.to(self._scores.device)
        coefficients = modulation_coefficients(self._scores, totals / counts, self.alpha, self.cap)
        known = self._scores.isfinite()
        # an infinite score would stay in the mean for ever
        self._totals = torch.stack([totals + torch.where(known, self._scores, 0.0), counts + known])
        return coefficients

    def modulate(self, step: Step) -> None:
        """Leave the gradients alone: c is in them already."""

    def _split(self, step: Step, prediction: Tensor, mask: Tensor | None) -> Tensor:
        """Each modality's share of the prediction, ``(M, rows, K, *S)``, in float32 with its graph."""
        size = tuple(step.target.shape[2:])
        seen = torch.ones(len(prediction), len(self.modalities), dtype=torch.bool) if mask is None else mask
        network = unwrapped(self.network)
        values = []
        with _evaluating(network):
            for subset in self._masks:
                if bool(subset.all()):
                    values.append(prediction.float())
                    continue
                present = (subset & seen).to(prediction.device)
                logits = network.fuse(step.features, size, present=present).float()
                # of nothing the prediction is 0, and of all that a row has it is the network's own
                whole = (present == seen.to(present.device)).all(dim=1)
                logits = torch.where(_along(whole, logits), prediction.float(), logits)
                values.append(logits.masked_fill(_along(~present.any(dim=1), logits), 0.0))
        weights = self._weights.to(values[0])
        return torch.stack([sum(w * v for w, v in zip(row, values, strict=True)) for row in weights])

    def _losses(
        self, shares: Tensor, target: Tensor, mask: Tensor | None, loss_function: Callable[..., Tensor]
    ) -> Tensor:
        """Loss of each share over all ranks, ``(M,)``, float64; NaN where no sample has the modality."""
        if self._is_regression:
            seen = [rows_with(share, target, mask, i) for i, share in enumerate(shares)]
            sums = torch.stack([_loss_and_count(loss_function, *pair) for pair in seen], dim=1)
            sums = sums[:, :, None]
        else:
            sums = loss_sums(shares, target, mask)
        if idist.get_world_size() > 1:
            sums = torch.as_tensor(idist.all_reduce(sums))
        return mean_losses(sums, by_class=target.ndim > 2)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the observer's state, and sums and counts of the losses so far."""
        return super().state_dict() | {"totals": self._totals.cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self._totals = state["totals"].clone()


def _along(rows: Tensor, values: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (values.ndim - 1))


def _loss_and_count(loss_function: Callable[..., Tensor], prediction: Tensor, target: Tensor) -> Tensor:
    if not len(target):
        return torch.zeros(2, dtype=torch.float64, device=target.device)
    with torch.no_grad():
        loss = loss_function(prediction, target).mean().double()
    return torch.stack([loss * len(target), torch.full_like(loss, len(target))])


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back to what each part was in."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
