# SPDX-License-Identifier: Apache-2.0
"""Distillation against SciPy's relative entropy, and on a trainer."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from monai_cggm.methods import AuxiliaryLosses, Distillation, UnimodalObserver, distillation_loss
from monai_cggm.metrics import NegativeMAE
from tests.methods import toy
from tests.methods.toy import everything, gradients_of_one_step, metric, parts


def by_scipy(student, teacher, temperature):
    student, teacher = (softmax(z.detach().double().numpy() / temperature, axis=1) for z in (student, teacher))
    return temperature**2 * entropy(teacher, student, axis=1).mean()


@pytest.mark.parametrize("shape", [(5, 2), (2, 4, 6, 7), (1, 3, 4, 5, 2)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_loss_against_scipy(temperature, shape):
    student, teacher = 3 * torch.randn(shape, dtype=torch.float64), 3 * torch.randn(shape, dtype=torch.float64)
    found = distillation_loss(student, teacher, temperature).item()
    assert found == pytest.approx(by_scipy(student, teacher, temperature), rel=1e-9)
    assert found != pytest.approx(by_scipy(teacher, student, temperature), rel=1e-3)  # which way round
    assert distillation_loss(student, student, temperature).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("temperature", [100.0, 1000.0])
def test_the_square_of_t_keeps_the_size(temperature):
    """At a high temperature the loss tends to half the variance over classes of the logits' difference."""
    student, teacher = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    limit = 0.5 * np.var((student - teacher).numpy(), axis=1).mean()
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(limit, rel=5 / temperature)


def test_nothing_flows_into_the_teacher_and_the_student_s_gradient_is_the_probabilities_difference():
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    distillation_loss(student, teacher, 2.0).backward()
    assert teacher.grad is None
    q, p = (softmax(z.detach().numpy() / 2.0, axis=1) for z in (student, teacher))
    np.testing.assert_allclose(student.grad.numpy(), 2.0 * (q - p) / 3, rtol=1e-9)


def test_an_empty_batch_has_no_loss_and_no_gradient():
    student = torch.randn(0, 4, 3, 3, requires_grad=True)
    loss = distillation_loss(student, torch.randn(0, 4, 3, 3))
    loss.backward()
    assert loss.item() == 0.0


@pytest.mark.parametrize("modalities", [("pet", "ct"), toy.MODALITIES], ids=len)
@pytest.mark.parametrize("teacher", ["fusion", "classifiers"])
@pytest.mark.parametrize("let_in", [False, True])
def test_on_a_trainer(let_in, teacher, modalities):
    network, classifiers = parts(modalities, dtype=torch.float64)
    (batch,) = toy.batches(1, modalities=len(modalities), size=5, dtype=torch.float64)

    def step(*, distilled):
        observer = UnimodalObserver(network, classifiers, metric())
        handlers = [AuxiliaryLosses(observer, 1.0)] if let_in else []
        handlers += [Distillation(observer, 0.7, temperature=3.0, teacher=teacher)] if distilled else []
        return gradients_of_one_step(network, classifiers, [batch], observer, handlers=handlers)

    plain, seen = step(distilled=False), step(distilled=True)
    features = toy.features_of(network, batch["image"])
    students = list(classifiers(features, batch["label"].shape[2:]).values())
    taught_by = network(batch["image"]) if teacher == "fusion" else torch.stack(students).mean(dim=0)
    value = 0.7 * sum(by_scipy(student, taught_by, 3.0) for student in students)
    assert seen["scalars"]["loss/distillation"] == pytest.approx(value, rel=1e-9)
    assert "loss/distillation" not in plain["scalars"]
    assert seen["loss"] == pytest.approx(plain["loss"] + value)
    for key in ("loss/task", *(f"{group}/{m}" for group in ("loss", "epsilon") for m in modalities)):
        assert seen["scalars"][key] == plain["scalars"][key]

    # its gradient by hand: T (q − p) over the positions, through classifiers and, if they are let in, encoders
    positions = students[0].numel() // students[0].shape[1]
    p = (taught_by / 3.0).softmax(dim=1).detach()
    surrogate = sum((0.7 * 3.0 * ((s / 3.0).softmax(dim=1).detach() - p) / positions * s).sum() for s in students)
    named = {**dict(network.named_parameters()), **{f"classifiers.{n}": w for n, w in classifiers.named_parameters()}}
    found = torch.autograd.grad(surrogate, list(named.values()), allow_unused=True)
    for (name, _), gradient in zip(named.items(), found, strict=True):
        reaches = name.startswith("classifiers.") or (let_in and name.startswith("encoders."))
        if reaches:
            torch.testing.assert_close(seen[name], plain[name] + gradient, rtol=1e-9, atol=1e-14, msg=name)
            assert not torch.equal(seen[name], plain[name])
        else:
            assert torch.equal(seen[name], plain[name]), name


@pytest.mark.parametrize("teacher", ["fusion", "classifiers"])
def test_a_missing_modality_neither_learns_nor_teaches(teacher):
    network, classifiers = parts(toy.MODALITIES[:3])
    observer = UnimodalObserver(network, classifiers, metric())
    part = Distillation(observer, 1.0, temperature=2.0, teacher=teacher)
    predictions = [torch.randn(3, 4, 2, 2) for _ in range(3)]
    logits = torch.randn(3, 4, 2, 2)
    present = torch.tensor([[True, True, True], [True, False, True], [False, False, True]])

    class Known:
        pass

    step = Known()
    # of the first case the fusion saw two modalities, of the second one
    fused = torch.tensor([[True, True, False], [True, False, False], [False, False, True]])
    step.predictions, step.logits, step.present, step.fused = predictions, logits, present, fused
    taught = fused if teacher == "fusion" else present
    expected = 0.0
    for i in range(3):
        cases = [case for case in range(3) if taught[case, i]]
        each = []
        for case in cases:
            there = [predictions[j][case] for j in range(3) if present[case, j]]
            target = logits[case] if teacher == "fusion" else sum(there) / len(there)
            each.append(by_scipy(predictions[i][case][None], target[None], 2.0))
        expected += np.mean(each)
    assert part.loss(step).item() == pytest.approx(expected, rel=1e-5)


def test_a_head_of_one_output_is_refused():
    names = ("audio", "text")
    network, classifiers = toy.RegressionNetwork(names), toy.RegressionClassifiers(names)
    observer = UnimodalObserver(network, classifiers, NegativeMAE())
    data = [{"image": torch.randn(4, 2, 4), "label": torch.randn(4)}]
    engine = toy.trainer(
        network, everything(network, classifiers), data, observer, handlers=[Distillation(observer)], loss=toy.l1
    )
    with pytest.raises(ValueError, match="the network's head has one output"):
        engine.run()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1.0}, "weight must be at least 0"),
        ({"temperature": 0.0}, "temperature positive, got .*temperature=0.0"),
        ({"teacher": "student"}, "'fusion' or 'classifiers', got 'student'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Distillation(UnimodalObserver(*parts(), metric()), **arguments)
