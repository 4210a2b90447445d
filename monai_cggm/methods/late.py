# SPDX-License-Identifier: Apache-2.0
"""What methods of late fusion share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from monai.engines import SupervisedTrainer
from monai.utils import CommonKeys
from torch import Tensor, nn

from monai_cggm.batches import PRESENT, samples_in
from monai_cggm.handlers.checkpoint import unwrapped
from monai_cggm.methods.capture import Capture
from monai_cggm.methods.samples import mask_in, mean_loss, rows_with
from monai_cggm.methods.watch import Watch, check_trainer, refuse_compiled
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


class LateFusionMethod(Watch):
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
        super().__init__(plain.modalities, metric, loss_function)
        self.network = plain
        self.members: dict[str, nn.Module] = dict(plain.networks.items())
        self._captured = Capture(self.members, full_precision=True)

    # ------------------------------------------------------------------ what a method says

    def loss(self, step: LateStep) -> Tensor:
        """Return what is differentiated in this step, a scalar."""
        raise NotImplementedError

    # ------------------------------------------------------------------ events

    def _start(self, engine: SupervisedTrainer) -> None:
        check_trainer(engine, self.members, f"{type(self).__name__} takes each batch for one step")
        self._captured.install()
        engine.logger.info(f"attached: {self!r}")

    def _listen(self, engine: SupervisedTrainer) -> None:
        self._captured.active = True

    def _after_loss(self, engine: SupervisedTrainer) -> None:
        self._captured.active = False
        self._scalars = {"loss/task": engine.state.output[CommonKeys.LOSS].detach()}
        step = self._observe(engine)
        self._add_scalars("loss", step.losses.detach())
        self._add_scalars("epsilon", step.epsilon)
        engine.state.output[CommonKeys.LOSS] = self.loss(step)
        self._captured.clear()

    def _release(self) -> None:
        self._captured.remove()

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
        self.epsilon, _ = self._measure(predictions if present is None else None, seen, target)
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


def classes_of(target: Tensor) -> Tensor:
    """Return class indices ``(B, *S)`` of a target ``(B,)``, ``(B, 1)`` or ``(B, 1, *S)``."""
    return target.reshape(len(target), *target.shape[2:]).long()
