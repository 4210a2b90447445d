# SPDX-License-Identifier: Apache-2.0
"""Controls of a balance, and the scaling of the encoders' gradients."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from ignite.engine import Events

from monai_cggm.methods import AGM, CGGM, RelativeBalance, controlled
from monai_cggm.methods.steering import CONTROLS
from tests.methods import toy
from tests.methods.toy import gradients_of_one_step, metric, parts

MODALITIES = [("pet", "ct"), ("flair", "t1", "t2"), toy.MODALITIES]


@pytest.mark.parametrize(
    ("terms", "constant", "shuffled"),
    [
        ([0.4, 1.6], [1.0, 1.0], [1.6, 0.4]),
        ([0.5, 1.0, 3.0], [1.5, 1.5, 1.5], [3.0, 0.5, 1.0]),
        ([-1.0, 0.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0], [3.0, -1.0, 0.0, 2.0]),
    ],
)
def test_controls_by_hand(terms, constant, shuffled):
    terms = torch.tensor(terms, dtype=torch.float64)
    assert controlled(terms, "none").tolist() == terms.tolist()
    assert controlled(terms, "constant").tolist() == constant
    assert controlled(terms, "shuffled").tolist() == shuffled


def test_an_unknown_control_is_refused():
    with pytest.raises(ValueError, match="one of none, constant, shuffled, got 'random'"):
        controlled(torch.ones(3), "random")
    with pytest.raises(ValueError, match="got 'random'"):
        RelativeBalance(*parts(), metric(), control="random")


def uncontrolled_terms(method, epsilon):
    """B of the first step by NumPy: equation 7 with ε = 0 before it, and the relative rule."""
    if method is CGGM:
        return 1.2 * (epsilon.sum() - epsilon) / epsilon.sum()
    raw = np.clip(1 + 1.0 * (epsilon.mean() - epsilon) / epsilon.mean(), 0.5, 1.5)
    return raw / raw.mean()


def make(method, network, classifiers, **kwargs):
    extra = (
        {"rho": 1.2, "direction": "off", "rule": "positive"}
        if method is CGGM
        else {"strength": 1.0, "bounds": (0.5, 1.5)}
    )
    return method(network, classifiers, metric(), **extra, **kwargs)


@pytest.mark.parametrize("modalities", MODALITIES, ids=len)
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("method", [CGGM, RelativeBalance])
def test_encoder_gradients_are_the_task_s_times_the_controlled_terms(method, control, modalities):
    network, classifiers = parts(modalities, dtype=torch.float64)
    (batch,) = toy.batches(1, modalities=len(modalities), size=8, dtype=torch.float64)
    task = toy.cross_entropy(network(batch["image"]), batch["label"])
    names = [name for name, _ in network.named_parameters()]
    plain = dict(zip(names, torch.autograd.grad(task, list(network.parameters())), strict=True))
    predictions = classifiers(toy.features_of(network, batch["image"]), batch["label"].shape[2:])
    terms = uncontrolled_terms(method, np.array([toy.numpy_dice(p, batch["label"]) for p in predictions.values()]))
    assert np.ptp(terms) > 1e-3
    factors = {
        "none": terms,
        "constant": np.full_like(terms, terms.mean()),
        "shuffled": np.concatenate([terms[-1:], terms[:-1]]),
    }[control]

    seen = gradients_of_one_step(network, classifiers, [batch], make(method, network, classifiers, control=control))
    for name, gradient in plain.items():
        owner = next((i for i, m in enumerate(modalities) if name.startswith(f"encoders.{m}.")), None)
        expected = gradient if owner is None else gradient * factors[owner]
        torch.testing.assert_close(seen[name], expected, rtol=1e-9, atol=1e-14, msg=name)
    reported = [seen["scalars"][f"balance/{m}"] for m in modalities]
    assert reported == pytest.approx(factors)
    assert sum(reported) == pytest.approx(terms.sum())


@pytest.mark.parametrize("method", [CGGM, RelativeBalance])
def test_without_magnitude_the_terms_are_known_and_change_no_gradient(method):
    network, classifiers = parts()
    (batch,) = toy.batches(1)
    toy.cross_entropy(network(batch["image"]), batch["label"]).backward()
    plain = {name: p.grad.clone() for name, p in network.named_parameters()}
    network.zero_grad()
    seen = gradients_of_one_step(network, classifiers, [batch], make(method, network, classifiers, magnitude=False))
    assert all(torch.equal(seen[name], gradient) for name, gradient in plain.items())
    scalars = seen["scalars"]
    assert len({scalars[f"balance/{m}"] for m in toy.MODALITIES}) > 1
    for m in toy.MODALITIES:
        assert scalars[f"modulated_norm/{m}"] == scalars[f"gradient_norm/{m}"] > 0


@pytest.mark.parametrize("method", [CGGM, RelativeBalance])
def test_the_last_terms_survive_a_checkpoint(method):
    """Guided dropout and balanced auxiliary losses read them in the first step of a resumed run."""
    network, classifiers = parts()
    steering = make(method, network, classifiers)
    assert "balance" not in steering.state_dict()
    gradients_of_one_step(network, classifiers, toy.batches(2), steering)
    other = make(method, *parts())
    other.load_state_dict(steering.state_dict())
    assert torch.equal(other.balance, steering.balance)
    assert other.balance.unique().numel() > 1


def updates(scale, optimizer, method, modalities, steps=3):
    """What each step adds to each weight, and each step's B."""
    network, classifiers = parts(modalities, dtype=torch.float64)
    data = toy.batches(steps, modalities=len(modalities), dtype=torch.float64)
    engine = toy.trainer(
        network,
        toy.everything(network),
        data,
        None if method is None else make(method, network, classifiers, scale=scale),
    )
    engine.optimizer = optimizer(toy.everything(network, classifiers))
    weights, terms = [{n: p.detach().clone() for n, p in network.named_parameters()}], []

    @engine.on(Events.ITERATION_COMPLETED)
    def keep(engine):
        weights.append({n: p.detach().clone() for n, p in network.named_parameters()})
        if method is not None:
            terms.append([engine.state.scalars[f"balance/{m}"] for m in modalities])

    engine.run()
    return [{n: after[n] - before[n] for n in after} for before, after in itertools.pairwise(weights)], terms


@pytest.mark.parametrize("modalities", MODALITIES, ids=len)
@pytest.mark.parametrize("method", [CGGM, RelativeBalance])
def test_of_a_factor_on_the_gradient_adam_leaves_nothing_in_its_first_step_and_one_on_the_update_stays(
    method, modalities
):
    adam = functools.partial(torch.optim.Adam, lr=0.01, eps=0.0)
    plain, _ = updates("gradient", adam, None, modalities, steps=1)
    on_gradient, _ = updates("gradient", adam, method, modalities, steps=1)
    on_update, terms = updates("update", adam, method, modalities, steps=1)
    assert np.ptp(terms[0]) > 1e-3
    for name, update in plain[0].items():
        owner = next((i for i, m in enumerate(modalities) if name.startswith(f"encoders.{m}.")), None)
        torch.testing.assert_close(on_gradient[0][name], update, rtol=1e-9, atol=1e-14)
        expected = update if owner is None else update * terms[0][owner]
        torch.testing.assert_close(on_update[0][name], expected, rtol=1e-9, atol=1e-14, msg=name)


@pytest.mark.parametrize("method", [CGGM, RelativeBalance])
def test_under_plain_sgd_gradient_and_update_are_the_same(method):
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    on_gradient, _ = updates("gradient", sgd, method, toy.MODALITIES)
    on_update, terms = updates("update", sgd, method, toy.MODALITIES)
    assert np.ptp(terms) > 1e-3
    for one, other in zip(on_gradient, on_update, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-8, atol=1e-13, msg=name)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA is not available")
@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.GradScaler:FutureWarning")
@pytest.mark.parametrize("method", [CGGM, RelativeBalance])
def test_updates_are_scaled_alike_under_a_loss_scale_and_a_step_that_it_skips_stays_skipped(method):
    def run(overflow, **kwargs):
        network, classifiers = parts()
        data, weights = toy.batches(3), []
        parameters = toy.everything(network, classifiers)
        chosen = make(method, network, classifiers, scale="update")
        engine = toy.trainer(network, parameters, data, chosen, **kwargs)
        engine.optimizer = torch.optim.Adam(parameters, lr=0.01)

        network.trunk[0].weight.register_hook(lambda g: g * math.inf if overflow and engine.state.iteration == 2 else g)

        @engine.on(Events.ITERATION_COMPLETED)
        def keep(engine):
            weights.append([p.detach().clone() for p in network.parameters()])

        engine.run()
        return weights

    plain, scaled = run(False), run(False, handlers=[toy.ScaleOnCpu()], amp=True)
    for found, right in zip(scaled, plain, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-7)
    one, two, three = run(True, handlers=[toy.ScaleOnCpu()], amp=True)
    assert all(map(torch.equal, one, two))
    assert not any(map(torch.equal, two, three))
    assert all(w.isfinite().all() for w in three)


def test_a_run_that_scales_updates_resumes_exactly(tmp_path):
    def made(seed):
        network, classifiers = parts(seed=seed)
        return network, classifiers, make(RelativeBalance, network, classifiers, scale="update", every=2)

    toy.assert_resumes(made, toy.batches(5), 3, tmp_path)


def test_a_scale_that_does_not_exist_or_means_nothing_is_refused():
    with pytest.raises(ValueError, match="one of gradient, update, got 'step'"):
        RelativeBalance(*parts(), metric(), scale="step")
    with pytest.raises(ValueError, match="no scale='update'"):
        AGM(*parts(network=toy.MaskedNetwork), metric(), scale="update")
