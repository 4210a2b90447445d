# SPDX-License-Identifier: Apache-2.0
"""What methods of late fusion share, and the simplest of them: each network learns for itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch import Tensor, nn

from monai_cggm.batches import PRESENT, samples_in
from monai_cggm.handlers.checkpoint import unwrapped
from monai_cggm.methods.base import refuse_compiled
from monai_cggm.methods.capture import Capture
from monai_cggm.methods.samples import mask_in, mean_loss, rows_with
from monai_cggm.metrics.epsilon import Epsilon
from monai_cggm.networks.late import Combination, LateFusion


@dataclass
class LateStep:
    """What is known of one training step of a :class:`LateFusion` network once the task's loss is there.

    Attributes:
        task_loss: the trainer's loss of the combined prediction, a scalar with its graph.
        losses: each member's loss, ``(M,)``, with its graph.
        epsilon: ε of each member, ``(M,)``, no graph.
        predictions: each member's logits, ``(B, K, *S)``, with their graph.
        target: what they are compared with.
        present: which modalities each sample has, boolean ``(B, M)`` on the CPU; None where all are there.
        batch: the trainer's batch.
        epoch: of the trainer, from 1.
    """

    task_loss: Tensor
    losses: Tensor
    epsilon: Tensor
    predictions: list[Tensor]
    target: Tensor
    present: Tensor | None
    batch: Any
    epoch: int


class LateFusionMethod:
    """Train a :class:`LateFusion` network by a loss of its members' predictions, and measure each member.

    It attaches to MONAI's own ``SupervisedTrainer``. The trainer's loss is that of the combined prediction; after
    ``LOSS_COMPLETED`` the method puts its own in its place. The members' predictions are found by forward hooks, so
    each runs once. A method says by :meth:`loss` what is learnt.

    ``trainer.state.scalars`` has the same names as an observer's: ``loss/task``, and ``loss/<m>`` and ``epsilon/<m>``
    of each member, which stands where an observer has a classifier. A case that lacks a modality (``present`` in the
    batch) does not count for its member.

    Args:
        network: a :class:`LateFusion`, possibly in ``DistributedDataParallel``.
        metric: ε, for example :class:`monai_cggm.metrics.RegionDice`.
        loss_function: loss of a member; default: the trainer's.

    Attributes:
        members: modality → its network.
        modalities: their names.
        epsilon: the last ε, ``(M,)``; None before the first step.

    Raises:
        ValueError: for another network, one that combines its members in another way than the method needs, fewer than
            two modalities, or a compiled network.
    """

    #: what :class:`LateFusion` must be told
    combine: ClassVar[Combination]

    def __init__(
        self,
        network: nn.Module,
        metric: Epsilon,
        *,
        loss_function: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        refuse_compiled(network)
        plain = unwrapped(network)
        name = type(self).__name__
        if not isinstance(plain, LateFusion):
            raise ValueError(f"{name} trains a LateFusion, a network a modality, got {type(plain).__name__}")
        if plain.combine != self.combine:
            raise ValueError(f"{name} needs LateFusion(combine={self.combine!r}), got combine={plain.combine!r}")
        if len(plain.modalities) < 2:
            raise ValueError(f"{name} combines two modalities or more, the network has {list(plain.modalities)}")
        self.network = plain
        self.metric = metric
        self.loss_function = loss_function
        self.members: dict[str, nn.Module] = dict(plain.networks.items())
        self.modalities = plain.modalities
        self.epsilon: Tensor | None = None
        self._captured = Capture(self.members, full_precision=True)
        self._scalars: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        """Say what is attached, for the line that the log starts with."""
        return f"{type(self).__name__}(modalities={list(self.modalities)})"

    # ------------------------------------------------------------------ what a method says

    def loss(self, step: LateStep) -> Tensor:
        """Return what is differentiated in this step, a scalar."""
        raise NotImplementedError

    # ------------------------------------------------------------------ events

    def attach(self, engine: SupervisedTrainer) -> None:
        """Attach to a trainer, before clipping."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_STARTED, self._listen)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._after_loss)
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self._report)
        for ending in (Events.COMPLETED, Events.TERMINATE, Events.INTERRUPT, Events.EXCEPTION_RAISED):
            engine.add_event_handler(ending, self._finish)

    def _start(self, engine: SupervisedTrainer) -> None:
        if engine.accumulation_steps > 1:
            raise ValueError(
                f"accumulation_steps={engine.accumulation_steps}: {type(self).__name__} takes each batch for one step; "
                "use accumulation_steps=1 and a larger batch"
            )
        refuse_compiled(engine.network)
        optimized = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
        for modality, member in self.members.items():
            if not any(id(p) in optimized for p in member.parameters()):
                raise ValueError(f"the optimizer holds no parameter of {modality!r}: it would never be trained")
        self._captured.install()
        engine.logger.info(f"attached: {self!r}")

    def _listen(self, engine: SupervisedTrainer) -> None:
        self._captured.active = True

    def _after_loss(self, engine: SupervisedTrainer) -> None:
        self._captured.active = False
        step = self._observe(engine)
        self._scalars = {"loss/task": step.task_loss.detach()}
        self._add_scalars("loss", step.losses.detach())
        self._add_scalars("epsilon", step.epsilon)
        engine.state.output[CommonKeys.LOSS] = self.loss(step)
        self._captured.clear()

    def _report(self, engine: SupervisedTrainer) -> None:
        # the one transfer of a step: everything that is logged goes over together
        values = torch.stack([v.double() for v in self._scalars.values()]).cpu().tolist()
        engine.state.scalars = dict(zip(self._scalars, values, strict=True))

    def _finish(self, engine: SupervisedTrainer, *error: BaseException) -> None:
        self._captured.remove()
        if error:  # a handler of EXCEPTION_RAISED takes the error over: hand it on
            raise error[0]

    # ------------------------------------------------------------------ one step

    def _observe(self, engine: SupervisedTrainer) -> LateStep:
        output = engine.state.output
        missing = [m for m in self.modalities if m not in self._captured.outputs]
        if missing:
            raise RuntimeError(f"these members did not run in the training step's forward pass: {', '.join(missing)}")
        predictions = [self._captured.outputs[m] for m in self.modalities]
        # where the members were combined several times, the first rows are those of the samples as they are
        samples = samples_in(output[CommonKeys.IMAGE])
        target = output[CommonKeys.LABEL][:samples]
        present = mask_in(engine.state.batch, PRESENT, samples)
        seen = [rows_with(p, target, present, i) for i, p in enumerate(predictions)]
        loss_function = self.loss_function or engine.loss_function
        self.epsilon = self._measure(predictions if present is None else None, seen, target)
        return LateStep(
            task_loss=output[CommonKeys.LOSS],
            losses=torch.stack([mean_loss(loss_function, *pair) for pair in seen]),
            epsilon=self.epsilon,
            predictions=predictions,
            target=target,
            present=present,
            batch=engine.state.batch,
            epoch=engine.state.epoch,
        )

    @torch.no_grad()
    def _measure(
        self, predictions: Sequence[Tensor] | None, seen: Sequence[tuple[Tensor, Tensor]], target: Tensor
    ) -> Tensor:
        if predictions is not None:  # all members in one count
            sums = self.metric.sums([p.detach() for p in predictions], target)
        else:
            sums = torch.cat([self.metric.sums([p.detach()], t) for p, t in seen])
        # ratios of sums over all ranks, as one process with the whole batch would see
        if idist.get_world_size() > 1:
            sums = torch.as_tensor(idist.all_reduce(sums))
        epsilon = self.metric.value(sums)
        before = torch.zeros_like(epsilon) if self.epsilon is None else self.epsilon.to(epsilon)
        # nothing that the metric could measure in this batch
        return torch.where(torch.isfinite(epsilon), epsilon, before)

    def _add_scalars(self, group: str, values: Tensor) -> None:
        self._scalars.update({f"{group}/{m}": v for m, v in zip(self.modalities, values, strict=True)})

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on exactly."""
        state: dict[str, Any] = {"modalities": list(self.modalities)}
        if self.epsilon is not None:
            state["epsilon"] = self.epsilon.cpu()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: if it comes from a run with other modalities or another order of them.
        """
        if tuple(state["modalities"]) != self.modalities:
            raise ValueError(f"checkpoint is of modalities {state['modalities']}, this run has {list(self.modalities)}")
        self.epsilon = state.get("epsilon")


class UME(LateFusionMethod):
    r"""Unimodal ensemble: every network learns from its own loss alone, and their probabilities are averaged.

    .. math:: L = \sum_i L(z_i, y), \qquad p = \frac1M \sum_i \mathrm{softmax}(z_i)

    Du et al., "On Uni-Modal Feature Learning in Supervised Multi-Modal Learning", ICML 2023, who released no code. No
    gradient goes from one network to another, so with an optimizer that treats each parameter for itself (SGD, Adam)
    the weights are those that the networks would have if each were trained alone on the same batches. Clip each network
    for itself: ``ClipGradients(network.networks.values(), ...)``.

    For segmentation the mean is taken voxel by voxel; for regression it is the mean of the predictions.

    Args:
        network: see :class:`LateFusionMethod`; ``combine`` must be ``"probabilities"``.
        metric: see there, as for ``loss_function``.

    Raises:
        ValueError: see there.

    Example:
        >>> from monai_cggm.metrics import RegionDice
        >>> from monai_cggm.networks import MultimodalSegmenter
        >>> one = {"num_classes": 2, "encoder": {"backbone": "resnet18", "width": 8}}
        >>> network = LateFusion.of_modalities(["flair", "t1ce"], MultimodalSegmenter, **one)
        >>> UME(network, RegionDice({"lesion": [1]}, num_classes=2))
        UME(modalities=['flair', 't1ce'])
    """

    combine = "probabilities"

    def loss(self, step: LateStep) -> Tensor:
        """Return the sum of the members' losses."""
        return step.losses.sum()


def classes_of(target: Tensor) -> Tensor:
    """Return class indices ``(B, *S)`` of a target ``(B,)``, ``(B, 1)`` or ``(B, 1, *S)``."""
    return target.reshape(len(target), *target.shape[2:]).long()
