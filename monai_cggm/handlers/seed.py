# SPDX-License-Identifier: Apache-2.0
"""Random numbers that are a function of the seed and the epoch, so that a run can be resumed without their state."""

from __future__ import annotations

from collections.abc import Sized

import ignite.distributed as idist
import numpy as np
from ignite.engine import Events
from ignite.utils import manual_seed
from monai.engines import Trainer
from torch.utils.data.distributed import DistributedSampler


class EpochSeed:
    """Seed every epoch anew: the sampler's order, and the generators of Python, NumPy and PyTorch.

    A run that stops after epoch *n* and goes on from there then draws what an uninterrupted run would have drawn, and
    a checkpoint needs no generator's state. It holds for what is random in the main process (dropout, say) and for
    data sets whose draws depend on the sampler's keys alone, as :class:`monai_cggm.data.SliceDataset`'s do.

    Ignite fires ``EPOCH_STARTED`` before it makes that epoch's iterator over the data, which is the moment when a
    sampler fixes its order; the iterator draws from PyTorch's generator itself, but not always (persistent workers are
    reused), so the generators are seeded again once the first batch is there. That needs one epoch to be one pass over
    the loader.

    Args:
        sampler: the training loader's sampler, told the epoch; None where the loader has none to tell.
        seed: any whole number, at least 0.

    Raises:
        ValueError: when training starts, where ``epoch_length`` is not the loader's length, or the loader uses another
            sampler.

    Example:
        >>> EpochSeed(None, seed=1).number(epoch=3) == EpochSeed(None, seed=1).number(epoch=3)
        True
    """

    def __init__(self, sampler: DistributedSampler | None, seed: int = 0) -> None:
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.sampler = sampler
        self.seed = seed

    def attach(self, engine: Trainer) -> None:
        """Attach to a trainer, before every handler that draws random numbers when an epoch or iteration starts."""
        engine.add_event_handler(Events.STARTED, self._check)
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(Events.ITERATION_STARTED(event_filter=_first_of_epoch), self._start_batches)

    def number(self, epoch: int, use: int = 0) -> int:
        """Return the seed of an epoch on this rank, below 2³²; ``use`` tells several within an epoch apart."""
        return int(np.random.SeedSequence([self.seed, epoch, idist.get_rank(), use]).generate_state(1)[0])

    def _start_epoch(self, engine: Trainer) -> None:
        if self.sampler is not None:
            self.sampler.set_epoch(engine.state.epoch)
        manual_seed(self.number(engine.state.epoch))

    def _start_batches(self, engine: Trainer) -> None:
        manual_seed(self.number(engine.state.epoch, use=1))

    def _check(self, engine: Trainer) -> None:
        loader = engine.data_loader
        batches = len(loader) if isinstance(loader, Sized) else None
        if engine.state.epoch_length != batches:
            raise ValueError(
                f"epoch_length is {engine.state.epoch_length}, and the training data loader has "
                f"{'no length' if batches is None else f'{batches} batches'}: an epoch must be one pass over the "
                "loader, or a resumed run would not see the data in the order of an uninterrupted one"
            )
        used = (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
        if self.sampler is not None and not any(self.sampler is sampler for sampler in used):
            raise ValueError(
                f"the training data loader does not use the {type(self.sampler).__name__} that is told the epoch: "
                f"its own is a {type(used[0]).__name__}"
            )


def _first_of_epoch(engine: Trainer, iteration: int) -> bool:
    return bool((iteration - 1) % engine.state.epoch_length == 0)
