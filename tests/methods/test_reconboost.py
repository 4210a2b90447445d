# SPDX-License-Identifier: Apache-2.0
"""ReconBoost against NumPy and autograd: turns, boosting, agreement, and networks that stay as they are."""

import copy
import itertools

import numpy as np
import pytest
import torch
from ignite.engine import Events
from scipy.special import softmax
from torch import nn

from monai_cggm.methods.reconboost import ReconBoost, Stage, agreement_loss, boosted_cross_entropy, stage_of
from monai_cggm.networks import LateFusion
from tests.methods import late_toy, toy
from tests.methods.late_toy import ABSENT, LOSSES, TASKS, batches, metric_of, network_of, trainer


@pytest.mark.parametrize("modalities", [2, 3, 4])
@pytest.mark.parametrize(("boost", "rectify"), [(4, 4), (1, 2), (3, 0)])
def test_turns(boost, rectify, modalities):
    expected = []
    for turn in range(2 * modalities + 1):
        before = None if turn == 0 else (turn - 1) % modalities
        expected += [(turn % modalities, before)] * boost + [(None, None)] * rectify
    found = [stage_of(epoch, modalities, boost, rectify) for epoch in range(1, len(expected) + 1)]
    assert found == expected


@pytest.mark.parametrize("ce_weight", [None, [0.2, 0.3, 0.25, 0.25]])
@pytest.mark.parametrize("weights", [(5.0, 1.0), (4.0, 2.0), (1.0, 0.0)])
@pytest.mark.parametrize("size", [(), (6,), (4, 5), (2, 3, 4)], ids=str)
def test_boosted_cross_entropy_against_numpy(size, weights, ce_weight):
    generator = torch.Generator().manual_seed(len(size))
    logits, others = torch.randn(2, 3, 4, *size, generator=generator, dtype=torch.float64)
    classes = torch.randint(0, 4, (3, *size), generator=generator)
    p, q = softmax(logits.numpy(), axis=1), softmax(others.numpy(), axis=1)
    b = np.ones(4) if ce_weight is None else np.array(ce_weight)
    above = below = 0.0
    for place in np.ndindex(3, *size):
        y = classes[place].item()
        at = (place[0], y, *place[1:])
        above += b[y] * (weights[0] - weights[1] * q[at]) * -np.log(p[at])
        below += b[y]
    ce = None if ce_weight is None else torch.tensor(ce_weight)
    found = boosted_cross_entropy(logits, others, classes, weights, ce)
    assert found.item() == pytest.approx(above / below, rel=1e-7)


@pytest.mark.parametrize("size", [(), (4, 5)])
def test_boosting_teaches_the_learner_alone(size):
    logits, others = torch.randn(2, 3, 4, *size, dtype=torch.float64).unbind()
    inputs = [logits.requires_grad_(), others.requires_grad_()]
    loss = boosted_cross_entropy(*inputs, torch.randint(0, 4, (3, *size)))
    gradient, none = torch.autograd.grad(loss, inputs, allow_unused=True)
    assert gradient.abs().max() > 1e-3
    assert none is None


@pytest.mark.parametrize("size", [(), (4, 5)])
def test_agreement_against_numpy_and_its_gradient(size):
    logits, before = torch.randn(2, 3, 4, *size, dtype=torch.float64).unbind()
    logits.requires_grad_()
    before.requires_grad_()
    found = agreement_loss(logits, before)
    p, q = (softmax(z.detach().numpy(), axis=1) for z in (logits, before))
    assert found.item() == pytest.approx(((p - q) ** 2).sum(axis=1).mean(), rel=1e-12)
    gradient, none = torch.autograd.grad(found, [logits, before], allow_unused=True)
    assert none is None
    # by hand: with g = 2 (p - q) / N, the softmax gives p (g - sum_k p_k g_k)
    g = 2 * (p - q) / (p.size / p.shape[1])
    np.testing.assert_allclose(gradient.numpy(), p * (g - (p * g).sum(axis=1, keepdims=True)), rtol=1e-9, atol=1e-15)
    assert gradient.abs().max() > 1e-4


def test_terms_of_an_empty_batch_are_zero():
    empty = torch.zeros(0, 4, requires_grad=True)
    assert boosted_cross_entropy(empty, empty, torch.zeros(0, dtype=torch.long)).item() == 0.0
    assert agreement_loss(empty, empty).item() == 0.0


def expected_loss(network, batch, task, stage, *, alpha=0.5, ce_weight=None):
    """The formulas, sample by sample and voxel by voxel where classes are boosted."""
    image, label = batch["image"], batch["label"]
    logits = late_toy.logits_of(network, image)
    there = batch.get("present", torch.ones(image.shape[:2], dtype=torch.bool))
    if stage.learner is None:
        fused = [sum(logits[i][s] for i in range(len(logits)) if there[s, i]) for s in range(len(image))]
        return LOSSES[task](torch.stack(fused), label)
    rows = [s for s in range(len(image)) if there[s, stage.learner]]
    nothing = torch.zeros_like(logits[0][0])
    others = [
        sum((logits[i][s].detach() for i in range(len(logits)) if i != stage.learner and there[s, i]), nothing)
        for s in rows
    ]
    own = logits[stage.learner]
    if task == "regression":
        return torch.stack(
            [(own[s] - (label[s] - o)).abs().squeeze() for s, o in zip(rows, others, strict=True)]
        ).mean()
    above = below = 0.0
    for s, o in zip(rows, others, strict=True):
        classes = label[s].flatten()
        log_p, q = own[s].reshape(4, -1).log_softmax(0), o.reshape(4, -1).softmax(0)
        for voxel, y in enumerate(classes.tolist()):
            b = 1.0 if ce_weight is None else ce_weight[y]
            above = above - b * (5 - q[y, voxel]) * log_p[y, voxel]
            below += b
    loss = above / below
    if stage.before is not None:
        pairs = [s for s in rows if there[s, stage.before]]
        p, p_before = own[pairs].softmax(1), logits[stage.before][pairs].softmax(1).detach()
        loss = loss + alpha * (p - p_before).square().sum(dim=1).mean()
    return loss


EPOCHS = [1, 2, 3, 4, 5, 7]


@pytest.mark.parametrize("epoch", EPOCHS)
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_loss_and_gradients_are_the_formulas(modalities, task, with_mask, epoch):
    data = batches(task, 1, modalities=modalities, dtype=torch.float64)
    if with_mask:
        late_toy.lacking(data, ABSENT[modalities])
    network = network_of(task, "sum", modalities, dtype=torch.float64)
    method = ReconBoost(network, metric_of(task), boost_epochs=1, rectify_epochs=1)
    found, row = late_toy.gradients_of_one_step(network, data, method, task=task, epoch=epoch)
    turn = (epoch - 1) // 2
    stage = Stage(turn % modalities, (turn - 1) % modalities if turn else None) if epoch % 2 else Stage(None, None)
    loss = expected_loss(network, data[0], task, stage)
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-9)
    late_toy.assert_gradients(found, late_toy.by_autograd(network, loss))
    moved = {name.split(".")[1] for name, gradient in found.items() if gradient is not None}
    learners = set(network.modalities) if stage.learner is None else {network.modalities[stage.learner]}
    assert moved == learners
    assert {m for m in network.modalities if row[f"learns/{m}"] == 1.0} == learners
    assert (row["loss/agreement"] > 0) == (stage.before is not None and task != "regression")
    assert (row["loss/boosted"] == 0) == (stage.learner is None)


@pytest.mark.parametrize("ce_weight", [[0.2, 0.3, 0.25, 0.25], torch.tensor([0.1, 1.0, 2.0, 3.0])])
def test_classes_are_weighted_as_the_bundle_says(ce_weight):
    data = batches("segmentation", 1, modalities=2, dtype=torch.float64)
    network = network_of("segmentation", "sum", 2, dtype=torch.float64)
    method = ReconBoost(network, metric_of("segmentation"), boost_epochs=1, ce_weight=ce_weight)
    found, _ = late_toy.gradients_of_one_step(network, data, method, task="segmentation")
    weights = torch.as_tensor(ce_weight, dtype=torch.float32).double().tolist()
    loss = expected_loss(network, data[0], "segmentation", Stage(0, None), ce_weight=weights)
    late_toy.assert_gradients(found, late_toy.by_autograd(network, loss))


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_networks_whose_turn_it_is_not_do_not_move_at_all(optimizer, set_to_none):
    """With momentum, weight decay, dropout and batch norm; phase 2 comes first, so that momenta are there."""
    network = network_of("segmentation", "sum", 3, member=late_toy.Normalised)
    method = ReconBoost(network, metric_of("segmentation"), boost_epochs=1, rectify_epochs=1)
    made = {
        "sgd": lambda: torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
        "adamw": lambda: torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1),
    }[optimizer]()
    engine = trainer(
        network, batches("segmentation", 2, modalities=3), method, task="segmentation", optimizer=made, epochs=7,
        optim_set_to_none=set_to_none,
    )  # fmt: skip
    states = []
    engine.add_event_handler(Events.EPOCH_STARTED, lambda _e: states.append(copy.deepcopy(network.state_dict())))
    engine.run()
    states.append(copy.deepcopy(network.state_dict()))
    for epoch, (before, after) in enumerate(itertools.pairwise(states), start=1):
        moved = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
        assert moved == ({network.modalities[(epoch - 1) // 2 % 3]} if epoch % 2 else set(network.modalities)), epoch
        if epoch % 2:  # of the learner's own everything moves, running statistics too
            (m,) = moved
            still = [n for n in before if n.startswith(f"networks.{m}.") and torch.equal(before[n], after[n])]
            assert still == []


def test_the_others_predict_as_in_evaluation_while_one_learns():
    """So what is boosted against neither drops features nor depends on the batch's statistics."""
    network = network_of("segmentation", "sum", 2, member=late_toy.Normalised)
    modes = []
    for name, member in network.networks.items():
        member.register_forward_hook(lambda m, _args, _out, name=name: modes.append((name, m.training)))
    method = ReconBoost(network, metric_of("segmentation"), boost_epochs=1, rectify_epochs=1)
    trainer(network, batches("segmentation", 1, modalities=2), method, task="segmentation", epochs=4).run()
    assert modes == [
        ("flair", True), ("t1ce", False), ("flair", True), ("t1ce", True),
        ("flair", False), ("t1ce", True), ("flair", True), ("t1ce", True),
    ]  # fmt: skip
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("modalities", [2, 4])
def test_the_second_phase_is_joint_training_of_the_sum(modalities, task):
    data = batches(task, 3, modalities=modalities)
    start = network_of(task, "sum", modalities)
    joint, boosted = copy.deepcopy(start), copy.deepcopy(start)
    trainer(joint, data, None, task=task).run()
    method = ReconBoost(boosted, metric_of(task), boost_epochs=1, rectify_epochs=1)
    engine = trainer(boosted, data, method, task=task, epochs=2)
    engine.state.epoch, engine.state.iteration = 1, 3  # as if resumed
    engine.run()
    for name, weight in joint.state_dict().items():
        assert torch.equal(boosted.state_dict()[name], weight), name


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_agreement_brings_the_learner_towards_the_one_before(task):
    """Alone, in the second turn; in the released code this term teaches nothing."""
    data = batches(task, 1, modalities=2)
    network = network_of(task, "sum", 2)
    arguments = {"boost_epochs": 20, "rectify_epochs": 0, "boost_weights": (0.0, 0.0), "agreement": 5.0}
    engine = trainer(network, data, ReconBoost(network, metric_of(task), **arguments), task=task, epochs=40)
    engine.run()
    distances = [row["loss/agreement"] for row in engine.rows]
    assert distances[:20] == [0.0] * 20
    assert distances[20] > 1e-3
    assert distances[39] < 0.5 * distances[20]
    assert sorted(distances[20:], reverse=True) == distances[20:]


@pytest.mark.parametrize("stop", [1, 3, 5])
@pytest.mark.parametrize("task", TASKS)
def test_a_resumed_run_goes_on_exactly(task, stop, tmp_path):
    def make(seed):
        network = network_of(task, "sum", 3, seed=seed)
        return network, ReconBoost(network, metric_of(task), boost_epochs=2, rectify_epochs=1)

    data = batches(task, 2, modalities=3)
    late_toy.assert_resumes(make, data, stop, 7, task=task, tmp_path=tmp_path)


def test_a_batch_in_which_nobody_has_the_learner_s_modality():
    data = late_toy.lacking(batches("classification", 1, modalities=3), [(s, 0) for s in range(4)])
    network = network_of("classification", "sum", 3)
    before = copy.deepcopy(network.state_dict())
    method = ReconBoost(network, metric_of("classification"))
    engine = trainer(network, data, method, task="classification")
    engine.run()
    assert engine.rows[0]["loss"] == 0.0
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"boost_epochs": 0}, "boost_epochs must be at least 1 and rectify_epochs at least 0, got 0 and 4"),
        ({"rectify_epochs": -1}, "got 4 and -1"),
        ({"boost_weights": (1.0, 2.0)}, r"boost_weights must be two numbers, w1 >= w2 >= 0, got \[1.0, 2.0\]"),
        ({"boost_weights": (1.0,)}, "boost_weights must be two numbers"),
        ({"agreement": -1.0}, "agreement must not be negative, got -1.0"),
        ({"ce_weight": [1.0, 2.0]}, "ce_weight has 2 weights for 4 classes"),
    ],
)
def test_wrong_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReconBoost(network_of("segmentation", "sum"), metric_of("segmentation"), **arguments)


def test_networks_that_do_not_tell_how_many_outputs_they_have_are_refused():
    nameless = LateFusion({m: nn.Conv1d(1, 4, 1) for m in ("a", "b")}, "sum")
    with pytest.raises(ValueError, match="tells classes from regression by a network's head; Conv1d has none"):
        ReconBoost(nameless, metric_of("classification"))


def test_what_is_attached_is_said():
    method = ReconBoost(network_of("segmentation", "sum", 2), metric_of("segmentation"))
    assert repr(method) == (
        "ReconBoost(modalities=['flair', 't1ce'], boost_epochs=4, rectify_epochs=4, boost_weights=(5.0, 1.0), "
        "agreement=0.5)"
    )
    assert isinstance(method.network, nn.Module)
    assert method.modalities == toy.MODALITIES[:2]
