# SPDX-License-Identifier: Apache-2.0
"""What methods share that watch a stock trainer's steps: its events, ε, the scalars of the log, a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from torch import Tensor, nn

from monai_cggm.metrics.epsilon import Epsilon, RegionDice


class Watch:
    """Follow MONAI's ``SupervisedTrainer`` from the start of each step to its log.

    Children say what they do after ``LOSS_COMPLETED`` (``_after_loss``), what they begin to capture with an iteration
    (``_listen``), and what they let go at the end (``_release``).

    Args:
        modalities: their names.
        metric: ε, for example :class:`monai_cggm.metrics.RegionDice`.
        loss_function: loss of one modality's prediction; None: the trainer's.

    Attributes:
        epsilon: the last ε, ``(M,)``; None before the first step.
    """

    def __init__(
        self, modalities: Sequence[str], metric: Epsilon, loss_function: Callable[[Tensor, Tensor], Tensor] | None
    ) -> None:
        self.modalities = tuple(modalities)
        self.metric = metric
        self.loss_function = loss_function
        self.epsilon: Tensor | None = None
        self._scalars: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        """Say what is attached, for the line that the log starts with."""
        return f"{type(self).__name__}(modalities={list(self.modalities)})"

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
        raise NotImplementedError

    def _listen(self, engine: SupervisedTrainer) -> None:
        raise NotImplementedError

    def _after_loss(self, engine: SupervisedTrainer) -> None:
        raise NotImplementedError

    def _release(self) -> None:
        raise NotImplementedError

    def _report(self, engine: SupervisedTrainer) -> None:
        # the one transfer of a step: everything that is logged goes over together
        values = torch.stack([v.double() for v in self._scalars.values()]).cpu().tolist()
        engine.state.scalars = dict(zip(self._scalars, values, strict=True))

    def _finish(self, engine: SupervisedTrainer, *error: BaseException) -> None:
        self._release()
        if error:  # a handler of EXCEPTION_RAISED takes the error over: hand it on
            raise error[0]

    # ------------------------------------------------------------------ one step

    def _add_scalars(self, group: str, values: Tensor) -> None:
        self._scalars.update({f"{group}/{m}": v for m, v in zip(self.modalities, values, strict=True)})

    @torch.no_grad()
    def _measure(
        self, predictions: Sequence[Tensor] | None, seen: Sequence[tuple[Tensor, Tensor]], target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return ε of each modality on this batch, and what it was before: 0 in the first step.

        Args:
            predictions: of each modality, where all samples have all of them; else None.
            seen: prediction and target of the samples that have the modality, for each.
            target: of all samples.
        """
        if predictions is not None:  # all modalities in one count
            sums = self.metric.sums([p.detach() for p in predictions], target)
        else:
            sums = torch.cat([self.metric.sums([p.detach()], t) for p, t in seen])
        # ratios of sums over all ranks, as one process with the whole batch would see
        if idist.get_world_size() > 1:
            sums = torch.as_tensor(idist.all_reduce(sums))
        if isinstance(self.metric, RegionDice):
            self._scalars["epsilon_absent_regions"] = self.metric.absent(sums)
        epsilon = self.metric.value(sums)
        before = torch.zeros_like(epsilon) if self.epsilon is None else self.epsilon.to(epsilon)
        # no region of the metric in this batch: nothing was measured, nothing has changed
        return torch.where(torch.isfinite(epsilon), epsilon, before), before

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on exactly: the last ε."""
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


def check_trainer(engine: SupervisedTrainer, trained: Mapping[str, nn.Module], why: str) -> None:
    """Refuse a trainer that accumulates gradients, a compiled network, and modules that no optimizer trains.

    Args:
        engine: the trainer.
        trained: what the optimizer must hold, by the name that an error gives it.
        why: what accumulation would spoil.

    Raises:
        ValueError: in these cases.
    """
    if engine.accumulation_steps > 1:
        raise ValueError(
            f"accumulation_steps={engine.accumulation_steps}: {why}; use accumulation_steps=1 and a larger batch"
        )
    refuse_compiled(engine.network)
    optimized = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
    for name, module in trained.items():
        if not any(id(p) in optimized for p in module.parameters()):
            raise ValueError(f"the optimizer holds no parameter of {name!r}: it would never be trained")


def refuse_compiled(network: nn.Module) -> None:
    """Refuse a network that is compiled as a whole.

    Raises:
        ValueError: if it, or the network inside of ``DistributedDataParallel``, is.
    """
    inner = getattr(network, "module", network)  # of DistributedDataParallel
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in (network, inner)):
        raise ValueError(
            "the whole network is compiled: what hooks see inside it is not on the loss's path, and compiled code "
            "cannot be differentiated twice. Compile parts in place instead, as configs/hardware/compile.yaml does: "
            "`for encoder in network.encoders.values(): encoder.compile()`, and leave the head eager"
        )
