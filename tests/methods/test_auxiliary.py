# SPDX-License-Identifier: Apache-2.0
"""Classifiers' losses in the encoders, against autograd."""

import pytest
import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents

from monai_cggm.methods import CGGM, AuxiliaryLosses, Distillation, RelativeBalance, UnimodalObserver
from tests.methods import toy
from tests.methods.toy import everything, gradients_of_one_step, metric, parts

MODALITIES = [("pet", "ct"), ("flair", "t1", "t2"), toy.MODALITIES]


def by_autograd(network, classifiers, batch):
    """Gradients of the task's loss, and of each classifier's loss through its encoder."""
    label = batch["label"]
    parameters = dict(network.named_parameters())
    task = toy.cross_entropy(network(batch["image"]), label)
    gradients = dict(zip(parameters, torch.autograd.grad(task, list(parameters.values())), strict=True))
    predictions = classifiers(toy.features_of(network, batch["image"]), label.shape[2:])
    auxiliary = {}
    for m, prediction in predictions.items():
        own = {n: p for n, p in parameters.items() if n.startswith(f"encoders.{m}.")}
        loss = toy.cross_entropy(prediction, label)
        auxiliary |= dict(zip(own, torch.autograd.grad(loss, list(own.values()), retain_graph=True), strict=True))
    return gradients, auxiliary


def owner(name, modalities):
    return next((m for m in modalities if name.startswith(f"encoders.{m}.")), None)


def assert_gradients(seen, gradients, auxiliary, weights, task_weight=1.0):
    for name, gradient in gradients.items():
        m = owner(name, weights)
        expected = task_weight * gradient + (weights[m] * auxiliary[name] if m else 0.0)
        torch.testing.assert_close(seen[name], expected, rtol=1e-9, atol=1e-14, msg=name)


@pytest.mark.parametrize("modalities", MODALITIES, ids=len)
@pytest.mark.parametrize("weight", [1.0, 0.25, "each"])
def test_encoders_get_their_share_and_classifiers_what_they_got(weight, modalities):
    if weight == "each":  # in another order than the modalities
        weight = {m: 0.5 * (i + 1) for i, m in enumerate(reversed(modalities))}
    network, classifiers = parts(modalities, dtype=torch.float64)
    (batch,) = toy.batches(1, modalities=len(modalities), size=7, dtype=torch.float64)
    gradients, auxiliary = by_autograd(network, classifiers, batch)
    without = gradients_of_one_step(network, classifiers, [batch], UnimodalObserver(network, classifiers, metric()))
    observer = UnimodalObserver(network, classifiers, metric())
    seen = gradients_of_one_step(network, classifiers, [batch], observer, handlers=[AuxiliaryLosses(observer, weight)])
    weights = weight if isinstance(weight, dict) else dict.fromkeys(modalities, weight)
    assert_gradients(seen, gradients, auxiliary, weights)
    for name in (n for n in seen if n.startswith("classifiers.")):
        assert torch.equal(seen[name], without[name]), name
    assert seen["loss"] == pytest.approx(without["loss"])


def test_a_weight_of_zero_lets_nothing_in():
    (batch,) = toy.batches(1)
    network, classifiers = parts()
    without = gradients_of_one_step(network, classifiers, [batch], UnimodalObserver(network, classifiers, metric()))
    observer = UnimodalObserver(network, classifiers, metric())
    seen = gradients_of_one_step(network, classifiers, [batch], observer, handlers=[AuxiliaryLosses(observer, 0.0)])
    assert all(torch.equal(seen[n], without[n]) for n in without if n not in ("scalars", "loss"))


@pytest.mark.parametrize("modalities", MODALITIES, ids=len)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_weights_follow_the_balance_of_the_step_before(steps, modalities):
    network, classifiers = parts(modalities, dtype=torch.float64)
    data = toy.batches(steps, modalities=len(modalities), dtype=torch.float64)
    method = CGGM(network, classifiers, metric(), rho=1.2, direction="off", magnitude=False)
    part = AuxiliaryLosses(method, 0.5, follow_balance=True)
    rows = []

    class Log:
        def attach(self, engine):
            engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: rows.append(e.state.scalars))

    seen = gradients_of_one_step(network, classifiers, data, method, handlers=[part, Log()])
    terms = dict.fromkeys(modalities, 1.0) if steps == 1 else {m: rows[-2][f"balance/{m}"] for m in modalities}
    assert steps == 1 or len({round(t, 9) for t in terms.values()}) > 1
    # a negative term, which the paper's rule has, would make an encoder climb its classifier's loss
    weights = {m: 0.5 * max(term, 0.0) for m, term in terms.items()}
    gradients, auxiliary = by_autograd(network, classifiers, data[-1])
    for name, gradient in gradients.items():  # w is float32
        m = owner(name, weights)
        expected = gradient + (weights[m] * auxiliary[name] if m else 0.0)
        torch.testing.assert_close(seen[name], expected, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize(
    "made",
    [
        lambda n, c: UnimodalObserver(n, c, metric()),
        lambda n, c: CGGM(n, c, metric(), lam=3.0, magnitude=False),
        lambda n, c: CGGM(n, c, metric(), lam=3.0, magnitude=False, max_share=0.5),
        lambda n, c: CGGM(n, c, metric(), lam=3.0, magnitude=False, direction="weights"),
        lambda n, c: RelativeBalance(n, c, metric(), magnitude=False),
    ],
    ids=["observer", "cggm", "bounded", "weights", "relative"],
)
@pytest.mark.parametrize("distils", [False, True])
def test_in_the_warm_up_only_the_classifiers_losses_act(made, distils):
    network, classifiers = parts(dtype=torch.float64)
    data = toy.batches(2, dtype=torch.float64)
    method = made(network, classifiers)
    handlers = [AuxiliaryLosses(method, 2.0, warmup_epochs=1), *([Distillation(method)] if distils else [])]
    engine = toy.trainer(network, everything(network, classifiers), data, method, handlers=handlers, lr=0.0, epochs=2)
    gradients = []
    engine.add_event_handler(
        IterationEvents.MODEL_COMPLETED,
        lambda e: gradients.append({n: p.grad.clone() for n, p in network.named_parameters()}),
    )
    engine.run()
    for step in (0, 1):
        reference, auxiliary = by_autograd(network, classifiers, data[step])
        assert_gradients(gradients[step], reference, auxiliary, dict.fromkeys(toy.MODALITIES, 2.0), task_weight=0.0)
        for name, gradient in gradients[step].items():
            assert (gradient.abs().max() == 0) == (owner(name, toy.MODALITIES) is None), name
        # the second epoch is past the warm-up
        assert all(gradient.abs().max() > 0 for gradient in gradients[2 + step].values())
    if type(method) in (UnimodalObserver, RelativeBalance) and not distils:
        reference, auxiliary = by_autograd(network, classifiers, data[1])
        assert_gradients(gradients[3], reference, auxiliary, dict.fromkeys(toy.MODALITIES, 2.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -0.1}, "a number of at least 0, .* got -0.1"),
        ({"weight": {"flair": 1.0}}, "one for each of .*'flair', 't1ce', 't1', 't2'"),
        ({"weight": dict.fromkeys(toy.MODALITIES, -1.0)}, "at least 0"),
        ({"warmup_epochs": -1}, "warmup_epochs must be at least 0, got -1"),
        ({"follow_balance": True}, "UnimodalObserver has no balance terms"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AuxiliaryLosses(UnimodalObserver(*parts(), metric()), **arguments)
