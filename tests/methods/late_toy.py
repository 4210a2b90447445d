# SPDX-License-Identifier: Apache-2.0
"""Late-fusion networks for every task, as a user might bring them, their data, and a trainer."""

from __future__ import annotations

import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from torch import nn

from monai_cggm.batches import prepare_batch
from monai_cggm.metrics import Accuracy, NegativeMAE, RegionDice
from monai_cggm.networks import LateFusion
from tests.methods import toy

TASKS = ("segmentation", "classification", "regression")


class Normalised(toy.ToyNetwork):
    """The toy of images with batch norm and dropout after its trunk."""

    def __init__(self, modalities) -> None:
        super().__init__(modalities)
        self.trunk = nn.Sequential(self.trunk, nn.BatchNorm2d(5), nn.Dropout(0.2))


class Vectors(toy.RegressionNetwork):
    """The toy of vectors, for classes."""

    def __init__(self, modalities, outputs: int = 4) -> None:
        super().__init__(modalities)
        self.head = nn.Linear(6, outputs)


MEMBERS = {"segmentation": toy.ToyNetwork, "classification": Vectors, "regression": toy.RegressionNetwork}


def classes_loss(logits, target):
    return nn.functional.cross_entropy(logits, target.flatten().long())


LOSSES = {"segmentation": toy.cross_entropy, "classification": classes_loss, "regression": toy.l1}


def network_of(task, combine, modalities=4, *, seed=0, member=None, dtype=torch.float32):
    """The same network for the same seed."""
    torch.manual_seed(seed)
    return LateFusion.of_modalities(toy.MODALITIES[:modalities], member or MEMBERS[task], combine).to(dtype)


def metric_of(task):
    return {
        "segmentation": RegionDice(toy.REGIONS, 4), "classification": Accuracy(), "regression": NegativeMAE(),
    }[task]  # fmt: skip


def batches(task, number, *, modalities=4, batch=4, seed=0, dtype=torch.float32):
    """Batches with names of samples; the same few samples come again."""
    if task == "segmentation":
        made = toy.batches(number, modalities=modalities, batch=batch, size=5, seed=seed, dtype=dtype)
    else:
        generator = torch.Generator().manual_seed(seed)
        made = []
        for _ in range(number):
            image = torch.randn(batch, modalities, 4, generator=generator, dtype=dtype)
            label = torch.randint(0, 4, (batch,), generator=generator)
            made.append(
                {"image": image + label[:, None, None], "label": label if task == "classification" else label / 2}
            )
    for step, item in enumerate(made):
        item["case"] = [f"case {(3 * step + sample) % (2 * batch)}" for sample in range(batch)]
    return made


def lacking(data, absent):
    """Take modalities away: pairs of a sample's place in every batch and a modality."""
    for batch in data:
        batch["present"] = torch.ones(batch["image"].shape[:2], dtype=torch.bool)
        for sample, modality in absent:
            batch["present"][sample, modality] = False
            batch["image"][sample, modality] = 0.0
    return data


def trainer(network, data, method, *, task, optimizer=None, handlers=(), epochs=1, device="cpu", **kwargs):
    engine = SupervisedTrainer(
        device=torch.device(device),
        max_epochs=epochs,
        train_data_loader=data,
        network=network,
        optimizer=optimizer or torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=LOSSES[task],
        train_handlers=[*([] if method is None else [method]), *handlers],
        prepare_batch=prepare_batch,
        decollate=False,
        **kwargs,
    )
    engine.rows = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda e: engine.rows.append({**getattr(e.state, "scalars", {}), "loss": e.state.output["loss"].item()}),
    )
    return engine


def gradients_of_one_step(network, data, method, *, task, epoch=1, **kwargs):
    """What the optimizer saw in the last iteration of an epoch that moves no weight, and what was logged."""
    engine = trainer(
        network,
        data,
        method,
        task=task,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.0),
        epochs=epoch,
        **kwargs,
    )
    engine.run()
    return {name: None if p.grad is None else p.grad.clone() for name, p in network.named_parameters()}, engine.rows[-1]


def by_autograd(network, loss):
    """Gradients of a loss that was computed without the method."""
    named = dict(network.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


def assert_gradients(found, expected):
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    assert any(g is not None and g.abs().max() > 1e-4 for g in expected.values())


def logits_of(network, image):
    return [member(image[:, i : i + 1]) for i, member in enumerate(network.networks.values())]


def rows_with(batch, modality):
    """Places of the samples that have a modality."""
    number = len(batch["image"])
    return [s for s in range(number) if "present" not in batch or batch["present"][s, modality]]


#: which samples of a batch of four lack what, by the number of modalities
ABSENT = {2: [(0, 1), (2, 0)], 3: [(0, 2), (1, 0), (1, 2)], 4: [(2, 0), (0, 1), (1, 1), (3, 3)]}


def assert_resumes(make, data, stop, epochs=1, *, tmp_path, **kwargs):
    """Train `epochs` in one go and with a break after `stop` of them: weights, buffers and rows are equal."""

    def part(state, upto):
        network, method = make(0 if state is None else 9)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        objects = {"network": network, "method": method, "optimizer": optimizer}
        engine = trainer(network, data, method, optimizer=optimizer, epochs=upto, **kwargs)
        if state is not None:
            for name, item in objects.items():
                item.load_state_dict(state[name])
            engine.state.epoch, engine.state.iteration = stop, stop * len(data)
        engine.run()
        torch.save({name: item.state_dict() for name, item in objects.items()}, tmp_path / "state.pt")
        return engine.rows, torch.load(tmp_path / "state.pt", weights_only=True)

    whole, end = part(None, epochs)
    before, state = part(None, stop)
    after, resumed = part(state, epochs)
    assert before + after == whole
    assert len(whole) == epochs * len(data)
    for name, value in end["network"].items():
        assert torch.equal(resumed["network"][name], value), name
    return end
