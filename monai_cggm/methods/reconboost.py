# SPDX-License-Identifier: Apache-2.0
"""Late fusion by boosting: the networks learn in turns, each from what the others get wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ignite.distributed as idist
import torch
import torch.nn.functional as F
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from monai_cggm.methods.late import LateFusionMethod, LateStep, classes_of
from monai_cggm.methods.samples import mean_loss
from monai_cggm.metrics.epsilon import Epsilon


class Stage(NamedTuple):
    """Whose turn it is in an epoch.

    Attributes:
        learner: the modality that learns alone, by its number; None: all learn.
        before: the one whose turn was before the learner's; None in the first turn.
    """

    learner: int | None
    before: int | None


def stage_of(epoch: int, modalities: int, boost_epochs: int, rectify_epochs: int) -> Stage:
    """Return whose turn it is.

    Args:
        epoch: from 1.
        modalities: M.
        boost_epochs: how many epochs a modality learns alone.
        rectify_epochs: how many all learn afterwards.

    Example:
        >>> [stage_of(epoch, 2, 1, 1) for epoch in (1, 2, 3)]
        [Stage(learner=0, before=None), Stage(learner=None, before=None), Stage(learner=1, before=0)]
    """
    turn, epoch_of_turn = divmod(epoch - 1, boost_epochs + rectify_epochs)
    if epoch_of_turn >= boost_epochs:
        return Stage(None, None)
    return Stage(turn % modalities, (turn - 1) % modalities if turn else None)


def boosted_cross_entropy(
    logits: Tensor,
    others: Tensor,
    classes: Tensor,
    weights: Sequence[float] = (5.0, 1.0),
    ce_weight: Tensor | None = None,
) -> Tensor:
    r"""Return the learner's cross-entropy, which counts most where the other networks are wrong.

    .. math:: \frac{\sum_n b_{y_n} (w_1 - w_2 q_{n, y_n}) (-\log p_{n, y_n})}{\sum_n b_{y_n}}, \qquad
        p = \mathrm{softmax}(z_u), \quad q = \mathrm{softmax}\Big(\sum_{k \ne u} z_k\Big)

    The sum goes over samples, and voxels if there are any. Under several processes the denominator is the mean of
    theirs, so that the mean of the processes' losses is that of one process with the whole batch.

    Args:
        logits: :math:`z_u`, ``(B, K, *S)``.
        others: :math:`\sum_{k \ne u} z_k`, of the same shape; nothing flows into it.
        classes: y, class indices ``(B, *S)``.
        weights: :math:`w_1` and :math:`w_2`.
        ce_weight: b, one number a class, or None.

    Returns:
        A scalar; 0 for an empty batch.

    Example:
        >>> boosted_cross_entropy(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([1]), weights=(2.0, 2.0))
        tensor(0.6931)
    """
    right = others.detach().softmax(dim=1).gather(1, classes.unsqueeze(1)).squeeze(1)
    balance = torch.ones_like(right) if ce_weight is None else ce_weight.to(right)[classes]
    values = F.cross_entropy(logits, classes, reduction="none") * (weights[0] - weights[1] * right)
    return _mean_over_ranks(values, balance)


def agreement_loss(logits: Tensor, before: Tensor) -> Tensor:
    r"""Return the squared distance of two networks' probabilities, :math:`\lVert p_u - p_{before} \rVert^2`.

    Args:
        logits: the learner's, ``(B, K, *S)``.
        before: those of the network whose turn was before; nothing flows into it.

    Returns:
        A scalar, the sum over classes, the mean over samples and voxels; 0 for an empty batch.

    Example:
        >>> agreement_loss(torch.zeros(1, 2), torch.tensor([[100.0, 0.0]]))
        tensor(0.5000)
    """
    values = (logits.softmax(dim=1) - before.detach().softmax(dim=1)).square().sum(dim=1)
    return _mean_over_ranks(values, torch.ones_like(values))


class ReconBoost(LateFusionMethod):
    r"""Let the networks learn in turns from each other's errors, and then all together.

    Hua et al., "ReconBoost: Boosting Can Achieve Modality Reconcilement", ICML 2024. The prediction is the sum of the
    networks' logits. The modalities take turns, in their order and again from the first. In a turn:

    1. for ``boost_epochs``, network u learns alone, the others are constant:

       .. math:: L = \mathrm{CE}_{w_1 - w_2 q_y}(z_u, y) + \alpha \lVert p_u - p_{before} \rVert^2

       (:func:`boosted_cross_entropy`, :func:`agreement_loss`): it counts most where the others are wrong, and must not
       go too far from the network whose turn was before;
    2. for ``rectify_epochs`` all learn from the task's loss of the sum.

    Here, and not in the paper: segmentation is boosted voxel by voxel, classes weighted by ``ce_weight``, and a loss
    with a Dice term acts in phase 2 only, as Dice has no residual of a voxel; in regression the learner fits the
    residual :math:`y - \sum_{k \ne u} z_k` by the trainer's loss, without agreement, because networks that predict
    residuals should not agree. In the authors' code both sides of the agreement are detached, so that it teaches
    nothing; here it teaches the learner. Their code divides cross-entropy and agreement by K, here neither is divided.
    The first turn is without agreement here, where their code compares with a constant.

    In phase 1 the gradients of the other networks are None: the optimizer leaves them alone, momentum and weight decay
    included. They run in evaluation mode, so dropout and batch statistics do not change what is boosted against, and
    their running statistics stay. Phases follow from the number of the epoch, so a resumed run goes on exactly. A
    sample that lacks the learner's modality does not count; absent networks are left out of the sum.

    Args:
        network: see :class:`LateFusionMethod`; ``combine`` must be ``"sum"``.
        metric: see there.
        boost_epochs: length of phase 1; 4 in the authors' code.
        rectify_epochs: length of phase 2; 4 in the authors' code.
        boost_weights: :math:`w_1` and :math:`w_2`; 5 and 1 in the authors' code.
        agreement: α; 0.5 in the authors' code.
        ce_weight: weight of each class in phase 1; None: all alike.
        parts: ``loss_function`` of :class:`LateFusionMethod`.

    Raises:
        ValueError: see there, for numbers out of their range, and for networks without a ``head``, whose outputs tell
            classes from regression.

    Example:
        >>> from monai_cggm.metrics import RegionDice
        >>> from monai_cggm.networks import LateFusion, MultimodalSegmenter
        >>> one = {"num_classes": 2, "encoder": {"backbone": "resnet18", "width": 8}}
        >>> network = LateFusion.of_modalities(["flair", "t1ce"], MultimodalSegmenter, combine="sum", **one)
        >>> ReconBoost(network, RegionDice({"lesion": [1]}, num_classes=2)).stage(epoch=9)
        Stage(learner=1, before=0)
    """

    combine = "sum"

    def __init__(
        self,
        network: nn.Module,
        metric: Epsilon,
        *,
        boost_epochs: int = 4,
        rectify_epochs: int = 4,
        boost_weights: Sequence[float] = (5.0, 1.0),
        agreement: float = 0.5,
        ce_weight: Sequence[float] | Tensor | None = None,
        **parts: Any,
    ) -> None:
        super().__init__(network, metric, **parts)
        if boost_epochs < 1 or rectify_epochs < 0:
            raise ValueError(
                f"boost_epochs must be at least 1 and rectify_epochs at least 0, got {boost_epochs} and "
                f"{rectify_epochs}"
            )
        if len(boost_weights) != 2 or not boost_weights[0] >= boost_weights[1] >= 0:
            raise ValueError(f"boost_weights must be two numbers, w1 >= w2 >= 0, got {list(boost_weights)}")
        if not agreement >= 0:
            raise ValueError(f"agreement must not be negative, got {agreement}")
        self.boost_epochs = boost_epochs
        self.rectify_epochs = rectify_epochs
        self.boost_weights = (float(boost_weights[0]), float(boost_weights[1]))
        self.agreement = agreement
        self.ce_weight = None if ce_weight is None else torch.as_tensor(ce_weight, dtype=torch.float32)
        outputs = self.network.num_outputs
        if outputs is None:
            kind = type(next(iter(self.members.values()))).__name__
            raise ValueError(f"ReconBoost tells classes from regression by a network's head; {kind} has none")
        if self.ce_weight is not None and len(self.ce_weight) != outputs:
            raise ValueError(f"ce_weight has {len(self.ce_weight)} weights for {outputs} classes")
        self.regression = outputs == 1
        self._epoch = 1
        self._stilled: list[nn.Module] = []
        self._handle: RemovableHandle | None = None

    def __repr__(self) -> str:
        """Say what is attached and how."""
        return (
            f"ReconBoost(modalities={list(self.modalities)}, boost_epochs={self.boost_epochs}, "
            f"rectify_epochs={self.rectify_epochs}, boost_weights={self.boost_weights}, agreement={self.agreement})"
        )

    def stage(self, epoch: int) -> Stage:
        """Return whose turn it is in an epoch, counted from 1."""
        return stage_of(epoch, len(self.modalities), self.boost_epochs, self.rectify_epochs)

    def loss(self, step: LateStep) -> Tensor:
        """Return the loss of the learner, or of all."""
        stage = self.stage(step.epoch)
        zero = step.losses.detach().new_zeros(())
        learns = [stage.learner in (None, i) for i in range(len(self.modalities))]
        self._add_scalars("learns", torch.tensor(learns, device=zero.device))
        boosted = agreement = zero
        if stage.learner is None:
            loss = step.task_loss
        else:
            rows = _rows_with_all(step, [stage.learner])
            loss = boosted = self._boosted(step, stage.learner, rows)
            if stage.before is not None and not self.regression:
                rows = _rows_with_all(step, [stage.learner, stage.before])
                agreement = agreement_loss(*(step.predictions[i][rows] for i in (stage.learner, stage.before)))
                loss = loss + self.agreement * agreement
            loss = loss + _touched(step, stage.learner)
        # terms that do not act are 0, so that every iteration logs the same names
        self._scalars |= {"loss/boosted": boosted.detach(), "loss/agreement": agreement.detach()}
        return loss

    def _boosted(self, step: LateStep, learner: int, rows: Tensor) -> Tensor:
        others = _sum_of_others(step, learner)[rows]
        logits, target = step.predictions[learner][rows], step.target[rows]
        if self.regression:
            return mean_loss(self._loss_function, logits, target - others.reshape(target.shape))
        return boosted_cross_entropy(logits, others, classes_of(target), self.boost_weights, self.ce_weight)

    # ------------------------------------------------------------------ the networks that do not learn

    def attach(self, engine: SupervisedTrainer) -> None:
        """Attach to a trainer, before clipping."""
        super().attach(engine)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._after_backward)

    def _start(self, engine: SupervisedTrainer) -> None:
        super()._start(engine)
        self._loss_function: Callable[..., Tensor] = self.loss_function or engine.loss_function
        self._handle = self.network.register_forward_pre_hook(self._still_the_others)
        cycle = len(self.modalities) * (self.boost_epochs + self.rectify_epochs)
        if engine.state.max_epochs is not None and engine.state.max_epochs < cycle:
            engine.logger.warning(
                f"ReconBoost: {engine.state.max_epochs} epochs are less than one cycle of turns, which has {cycle}: "
                "some modality never learns alone"
            )

    def _listen(self, engine: SupervisedTrainer) -> None:
        super()._listen(engine)
        self._epoch = engine.state.epoch

    def _others(self) -> list[nn.Module]:
        learner = self.stage(self._epoch).learner
        return [] if learner is None else [n for i, n in enumerate(self.members.values()) if i != learner]

    def _still_the_others(self, _network: nn.Module, _args: tuple[Any, ...]) -> None:
        # here and not before the iteration, because the trainer puts the whole network into training mode in it
        if self._captured.active:
            self._stilled = self._others()
            for member in self._stilled:
                member.eval()

    def _wake_the_others(self) -> None:
        for member in self._stilled:
            member.train()
        self._stilled = []

    def _after_loss(self, engine: SupervisedTrainer) -> None:
        super()._after_loss(engine)
        self._wake_the_others()

    def _after_backward(self, engine: SupervisedTrainer) -> None:
        for member in self._others():
            for parameter in member.parameters():
                parameter.grad = None  # zero would let momentum and weight decay act

    def _release(self) -> None:
        self._wake_the_others()  # the forward pass may have failed
        if self._handle is not None:
            self._handle.remove()
        super()._release()


def _mean_over_ranks(values: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean, so that its mean over ranks is that of one process with all values."""
    total, ranks = weights.sum(), idist.get_world_size()
    if ranks > 1:
        total = torch.as_tensor(idist.all_reduce(total))
    # an empty batch: 0 over something
    return ranks * (values * weights).sum() / torch.where(total > 0, total, 1.0)


def _rows_with_all(step: LateStep, modalities: Sequence[int]) -> Tensor:
    """The samples that have all of these modalities."""
    device = step.target.device
    if step.present is None:
        return torch.arange(len(step.target), device=device)
    return step.present[:, list(modalities)].all(dim=1).nonzero().squeeze(1).to(device)


def _sum_of_others(step: LateStep, learner: int) -> Tensor:
    total = torch.zeros_like(step.predictions[learner])
    for i, prediction in enumerate(step.predictions):
        if i != learner:
            term = prediction.detach()
            if step.present is not None:
                there = step.present[:, i].to(term.device).reshape(-1, *[1] * (term.dim() - 1))
                term = term.masked_fill(~there, 0.0)
            total = total + term
    return total


def _touched(step: LateStep, learner: int) -> Tensor | float:
    """A zero through the networks that do not learn: several processes wait until all parameters have a gradient."""
    if idist.get_world_size() == 1:
        return 0.0
    return torch.stack([z.flatten()[:0].sum() for i, z in enumerate(step.predictions) if i != learner]).sum()
