# SPDX-License-Identifier: Apache-2.0
import random

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset

from monai_cggm.data import EpochSampler
from monai_cggm.handlers import EpochSeed


class Keys(Dataset):
    """Gives back what the sampler asked for, and what a worker draws."""

    def __len__(self):
        return 6

    def __getitem__(self, key):
        return {"image": torch.tensor([float(key[1])]), "label": torch.zeros(1), "epoch": key[0]}


class Loader(DataLoader):
    """Notes when an iterator is made."""

    log: list

    def __iter__(self):
        self.log.append("iterator")
        return super().__iter__()


def trainer(handlers, loader, epochs=3, **kwargs):
    network = nn.Linear(1, 1)
    return SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=loader,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=nn.MSELoss(),
        train_handlers=handlers,
        decollate=False,
        **kwargs,
    )


def loader_of(workers=0, persistent=False, kind=DataLoader):
    data = Keys()
    sampler = EpochSampler(data, seed=3)
    return kind(data, batch_size=2, sampler=sampler, num_workers=workers, persistent_workers=persistent), sampler


def draws(*, start=0, epochs=4, seed=5, **options):
    """Order of the data and numbers of three generators in each iteration, by (epoch, iteration)."""
    loader, sampler = loader_of(**options)
    seen = {}

    class Resume:
        def attach(self, engine):
            engine.add_event_handler(Events.STARTED, self)

        def __call__(self, engine):
            engine.state.epoch, engine.state.iteration = start, start * len(loader)

    def note(engine):
        batch = engine.state.batch
        assert set(batch["epoch"].tolist()) == {engine.state.epoch}
        numbers = (torch.rand(()).item(), np.random.rand(), random.random())
        seen[engine.state.epoch, engine.state.iteration] = (batch["image"].flatten().tolist(), numbers)

    engine = trainer([Resume(), EpochSeed(sampler, seed)], loader, epochs)
    engine.add_event_handler(Events.ITERATION_STARTED, note)
    engine.run()
    loader._iterator = None  # ends persistent workers now; the garbage collector would wait five seconds for each
    return seen


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_a_resumed_run_draws_what_an_uninterrupted_one_does(workers, persistent):
    whole = draws()
    assert len(whole) == 12
    assert draws(workers=workers, persistent=persistent) == whole
    resumed = draws(start=2, workers=workers, persistent=persistent)
    assert resumed == {key: value for key, value in whole.items() if key[0] > 2}


def test_epochs_and_seeds_differ():
    whole, other = draws(epochs=2), draws(epochs=2, seed=6)
    orders = [[whole[epoch, 3 * epoch - 2 + i][0] for i in range(3)] for epoch in (1, 2)]
    assert all(sorted(index for batch in order for index in batch) == [0, 1, 2, 3, 4, 5] for order in orders)
    assert orders[0] != orders[1]
    numbers = {value[1] for seen in (whole, other) for value in seen.values()}
    assert len(numbers) == 12
    # the order is the sampler's own seed's affair
    assert [value[0] for value in whole.values()] == [value[0] for value in other.values()]


def test_epoch_started_comes_before_the_epochs_iterator():
    """What all this stands on in Ignite: for the first epoch, and for those that begin when the loader has run out."""
    loader, sampler = loader_of(kind=Loader)
    loader.log = log = []
    engine = trainer([EpochSeed(sampler, 1)], loader)
    engine.add_event_handler(Events.EPOCH_STARTED, lambda: log.append("epoch"))
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: log.append("step"))
    engine.run()
    assert log == ["epoch", "iterator", "step", "step", "step"] * 3


def test_a_sampler_behind_a_batch_sampler_is_told_the_epoch():
    """MONAI tells a loader's own sampler, and only that one."""
    data, told = Keys(), []
    sampler = EpochSampler(data, seed=3)
    loader = DataLoader(data, batch_sampler=BatchSampler(sampler, 2, drop_last=False))
    engine = trainer([EpochSeed(sampler, 1)], loader)
    engine.add_event_handler(Events.ITERATION_STARTED, lambda: told.append(engine.state.batch["epoch"].tolist()))
    engine.run()
    assert told == [[epoch, epoch] for epoch in (1, 1, 1, 2, 2, 2, 3, 3, 3)]


def test_ranks_draw_different_numbers(monkeypatch):
    seeds = []
    for rank in (0, 1):
        monkeypatch.setattr("monai_cggm.handlers.seed.idist.get_rank", lambda rank=rank: rank)
        seeds += [EpochSeed(None, 1).number(epoch, use) for epoch in (1, 2) for use in (0, 1)]
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("epoch_length", [2, 4])
def test_refuses_an_epoch_that_is_not_one_pass(epoch_length):
    loader, sampler = loader_of()
    engine = trainer([EpochSeed(sampler, 1)], loader, epoch_length=epoch_length)
    with pytest.raises(ValueError, match=rf"epoch_length is {epoch_length}, and the .* loader has 3 batches"):
        engine.run()


def test_refuses_a_sampler_that_the_loader_does_not_use():
    loader, _ = loader_of()
    engine = trainer([EpochSeed(EpochSampler(Keys()), 1)], loader)
    with pytest.raises(ValueError, match="does not use the EpochSampler that is told the epoch"):
        engine.run()


def test_refuses_a_negative_seed():
    with pytest.raises(ValueError, match="at least 0, got -1"):
        EpochSeed(None, -1)
