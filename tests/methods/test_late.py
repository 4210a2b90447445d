# SPDX-License-Identifier: Apache-2.0
"""UME trains each network as if it were alone, and what all methods of late fusion share."""

import copy

import pytest
import torch
from ignite.engine import Events
from torch import nn

from monai_cggm.handlers import ClipGradients
from monai_cggm.methods import AuxiliaryLosses, ModalityDropout
from monai_cggm.methods.late import classes_of
from monai_cggm.methods.qmf import QMF
from monai_cggm.methods.reconboost import ReconBoost
from monai_cggm.methods.ume import UME
from tests.methods import late_toy, toy
from tests.methods.late_toy import ABSENT, LOSSES, TASKS, batches, metric_of, network_of, trainer

METHODS = {UME: "probabilities", QMF: "energy", ReconBoost: "sum"}
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.05),
}


def train_apart(network, data, *, task, optimizer, max_norm=None, epochs=2):
    """Each network in a trainer of its own, on its own channel."""
    for i, (name, member) in enumerate(network.networks.items()):
        own = []
        for batch in data:
            rows = late_toy.rows_with(batch, i)
            own.append({"image": batch["image"][rows, i : i + 1], "label": batch["label"][rows]})
        engine = trainer(
            member, own, None, task=task, optimizer=OPTIMIZERS[optimizer](member.parameters()), epochs=epochs,
            handlers=[ClipGradients([member], max_norm)],
        )  # fmt: skip
        engine.run()
        assert len(engine.rows) == epochs * len(data), name
    return network.state_dict()


def train_together(network, data, *, task, optimizer, clipped, max_norm=None, epochs=2, handlers=()):
    engine = trainer(
        network, data, UME(network, metric_of(task)), task=task, epochs=epochs,
        optimizer=OPTIMIZERS[optimizer](network.parameters()),
        handlers=[ClipGradients(clipped(network), max_norm), *handlers],
    )  # fmt: skip
    engine.run()
    return network.state_dict()


def each(network):
    return network.networks.values()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_ume_is_training_apart_bit_for_bit(modalities, task, optimizer):
    data = batches(task, 3, modalities=modalities)
    start = network_of(task, "probabilities", modalities)
    apart = train_apart(copy.deepcopy(start), data, task=task, optimizer=optimizer, max_norm=0.3)
    together = train_together(copy.deepcopy(start), data, task=task, optimizer=optimizer, clipped=each, max_norm=0.3)
    for name, weight in apart.items():
        assert torch.equal(together[name], weight), name
    assert all(not torch.equal(apart[name], weight) for name, weight in start.state_dict().items())
    if optimizer == "sgd":  # clipped as one module, the networks' gradients shrink each other
        other = train_together(
            copy.deepcopy(start), data, task=task, optimizer=optimizer, clipped=lambda n: [n], max_norm=0.3
        )
        assert any(not torch.equal(other[name], weight) for name, weight in apart.items())


def test_batch_statistics_are_those_of_training_apart_too():
    data = batches("segmentation", 3, modalities=3)
    start = network_of("segmentation", "probabilities", 3, member=late_toy.Normalised)
    for module in start.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # each network alone would draw other numbers
    arguments = {"task": "segmentation", "optimizer": "sgd"}
    apart = train_apart(copy.deepcopy(start), data, **arguments)
    together = train_together(copy.deepcopy(start), data, **arguments, clipped=each)
    assert any("running_var" in name for name in apart)
    assert all(torch.equal(together[name], value) for name, value in apart.items())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("modalities", ABSENT)
def test_a_network_learns_from_the_samples_that_have_its_modality(modalities, task):
    data = late_toy.lacking(batches(task, 2, modalities=modalities), ABSENT[modalities])
    start = network_of(task, "probabilities", modalities)
    apart = train_apart(copy.deepcopy(start), data, task=task, optimizer="sgd")
    together = train_together(copy.deepcopy(start), data, task=task, optimizer="sgd", clipped=each)
    for name, weight in apart.items():
        torch.testing.assert_close(together[name], weight, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("both", [False, True])
def test_modality_dropout_changes_the_fusion_and_not_what_ume_learns(both):
    data = batches("segmentation", 3)
    dropout = ModalityDropout(toy.MODALITIES, seed=2, both=both)
    arguments = {"task": "segmentation", "optimizer": "sgd", "clipped": each}
    plain = train_together(network_of("segmentation", "probabilities"), data, **arguments)
    dropped = train_together(network_of("segmentation", "probabilities"), data, **arguments, handlers=[dropout])
    assert data[0]["fused"].shape == (8 if both else 4, 4)
    assert all(torch.equal(dropped[name], weight) for name, weight in plain.items())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_what_is_measured(modalities, with_mask, task):
    data = batches(task, 1, modalities=modalities)
    if with_mask:
        late_toy.lacking(data, ABSENT[modalities])
    network = network_of(task, "probabilities", modalities)
    method = UME(network, metric_of(task))
    _, row = late_toy.gradients_of_one_step(network, data, method, task=task)
    (batch,) = data
    with torch.no_grad():
        logits = late_toy.logits_of(network, batch["image"])
        fused = network(batch["image"], batch.get("present"))
    assert row["loss/task"] == pytest.approx(LOSSES[task](fused, batch["label"]).item(), rel=1e-5)
    for i, m in enumerate(toy.MODALITIES[:modalities]):
        rows = late_toy.rows_with(batch, i)
        z, y = logits[i][rows], batch["label"][rows]
        assert row[f"loss/{m}"] == pytest.approx(LOSSES[task](z, y).item(), rel=1e-5)
        expected = {
            "segmentation": lambda z, y: toy.numpy_dice(z, y),
            "classification": lambda z, y: (z.argmax(1) == y).double().mean().item(),
            "regression": lambda z, y: -(z.flatten() - y).abs().double().mean().item(),
        }[task](z, y)
        assert row[f"epsilon/{m}"] == pytest.approx(expected, rel=1e-6)
    assert row["loss"] == pytest.approx(sum(row[f"loss/{m}"] for m in network.modalities), rel=1e-6)
    assert method.epsilon.tolist() == [row[f"epsilon/{m}"] for m in network.modalities]


def test_where_nothing_can_be_measured_the_last_measure_stays():
    data = batches("segmentation", 2)
    data[1]["label"][:] = 0
    network = network_of("segmentation", "probabilities")
    engine = trainer(network, data, UME(network, metric_of("segmentation")), task="segmentation")
    engine.run()
    first, second = engine.rows
    assert [second[f"epsilon/{m}"] for m in toy.MODALITIES] == [first[f"epsilon/{m}"] for m in toy.MODALITIES]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_behind_at_the_end_or_after_a_failure(method):
    network = network_of("segmentation", METHODS[method])
    data = batches("segmentation", 2)

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())

    made = method(network, metric_of("segmentation"))
    engine = trainer(network, data, made, task="segmentation")
    seen = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda _e: seen.append(hooks()))
    engine.run()
    assert min(seen) >= 4
    assert hooks() == 0
    data[1]["image"] = data[1]["image"][:, :, :, :0]
    engine = trainer(network, data, made, task="segmentation")
    with pytest.raises(RuntimeError):
        engine.run()
    assert hooks() == 0
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize("method", METHODS)
def test_validation_inside_training_is_not_captured(method):
    network = network_of("segmentation", METHODS[method])
    data = batches("segmentation", 3)

    def rows(validate):
        copied = copy.deepcopy(network)
        engine = trainer(copied, data, method(copied, metric_of("segmentation")), task="segmentation")
        if validate:

            @engine.on(Events.ITERATION_COMPLETED)
            def validation(_engine):
                copied.eval()
                with torch.no_grad():
                    copied(torch.randn(1, 4, 3, 3))

        engine.run()
        return engine.rows

    assert rows(True) == rows(False)


@pytest.mark.parametrize("method", METHODS)
def test_other_networks_are_refused(method):
    metric = metric_of("segmentation")
    with pytest.raises(
        ValueError, match=f"{method.__name__} trains a LateFusion, a network a modality, got ToyNetwork"
    ):
        method(toy.ToyNetwork(), metric)
    other = {"probabilities": "sum", "sum": "energy", "energy": "sum"}[METHODS[method]]
    with pytest.raises(ValueError, match=rf"needs LateFusion\(combine='{METHODS[method]}'\), got combine='{other}'"):
        method(network_of("segmentation", other), metric)
    with pytest.raises(ValueError, match=r"combines two modalities or more, the network has \['flair'\]"):
        method(network_of("segmentation", METHODS[method], 1), metric)
    compiled = network_of("segmentation", METHODS[method])
    compiled.compile(backend="eager")
    with pytest.raises(ValueError, match="the whole network is compiled"):
        method(compiled, metric)


def test_trainers_that_would_do_something_else_are_refused():
    network = network_of("segmentation", "probabilities")
    method = UME(network, metric_of("segmentation"))
    data = batches("segmentation", 2)
    with pytest.raises(ValueError, match="accumulation_steps=2: UME takes each batch for one step"):
        trainer(network, data, method, task="segmentation", accumulation_steps=2).run()
    some = torch.optim.SGD(network.networks["flair"].parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the optimizer holds no parameter of 't1ce'"):
        trainer(network, data, method, task="segmentation", optimizer=some).run()
    with pytest.raises(ValueError, match="AuxiliaryLosses needs a method or a UnimodalObserver"):
        AuxiliaryLosses(method)


@pytest.mark.parametrize("task", TASKS)
def test_a_resumed_run_goes_on_exactly(task, tmp_path):
    def make(seed):
        network = network_of(task, "probabilities", 3, seed=seed)
        return network, UME(network, metric_of(task))

    data = batches(task, 2, modalities=3)
    late_toy.assert_resumes(make, data, 1, 3, task=task, tmp_path=tmp_path)


def test_a_state_of_other_modalities_is_refused():
    methods = [UME(network_of("segmentation", "probabilities", m), metric_of("segmentation")) for m in (2, 3)]
    methods[0].load_state_dict(UME(methods[0].network, methods[0].metric).state_dict())
    assert methods[0].epsilon is None
    with pytest.raises(ValueError, match=r"checkpoint is of modalities .*, this run has"):
        methods[0].load_state_dict(methods[1].state_dict())


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 1, 4), (3, 1, 2, 5)])
def test_classes_of_every_target(shape):
    target = torch.randint(0, 4, shape).float()
    expected = target if len(shape) == 1 else target[:, 0]
    assert torch.equal(classes_of(target), expected.long())
