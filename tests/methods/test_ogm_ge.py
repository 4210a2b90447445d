# SPDX-License-Identifier: Apache-2.0
"""OGM-GE against NumPy: its ratio, its factor, what it does to gradients, and its noise."""

import numpy as np
import pytest
import torch
from monai.engines.utils import IterationEvents

from monai_cggm.batches import prepare_batch
from monai_cggm.methods.ogm_ge import OGMGE, discrepancy_ratios, ogm_coefficients
from tests.methods import toy
from tests.methods.test_likelihood import TASKS, by_hand, predictions_of, set_up
from tests.methods.toy import everything, gradients_of_one_step, metric, parts, rows_of

MODALITIES = [("pet", "ct"), ("flair", "t1", "t2"), toy.MODALITIES]
NAN = float("nan")


def numpy_terms(scores, alpha):
    """k by loops over those that have a score."""
    terms = []
    for i, s in enumerate(scores):
        others = [o for j, o in enumerate(scores) if j != i and o == o]
        ratio = s / np.mean(others) if s == s and others else 1.0
        terms.append(1 - np.tanh(alpha * ratio) if ratio > 1 else 1.0)
    return np.array(terms)


@pytest.mark.parametrize("alpha", [0.1, 0.8, 2.6])
@pytest.mark.parametrize("modalities", [2, 3, 4, 7])
def test_factors_against_numpy(modalities, alpha):
    random = np.random.default_rng(modalities)
    for scores in random.uniform(0.01, 1, size=(20, modalities)):
        terms = ogm_coefficients(discrepancy_ratios(torch.tensor(scores)), alpha).numpy()
        np.testing.assert_allclose(terms, numpy_terms(scores, alpha), rtol=1e-12, atol=1e-15)
        assert terms[scores.argmax()] == terms.min() < 1.0 == terms[scores.argmin()]


def test_two_modalities_have_the_paper_s_ratio():
    for audio, visual in np.random.default_rng(0).uniform(size=(50, 2)):
        ratios = discrepancy_ratios(torch.tensor([audio, visual], dtype=torch.float64))
        assert ratios.tolist() == [audio / visual, visual / audio]


@pytest.mark.parametrize(
    ("scores", "ratios"),
    [
        ([0.6, 0.6, 0.6], [1.0, 1.0, 1.0]),
        ([0.9, 0.3], [3.0, 1 / 3]),
        ([0.9, 0.2, 0.4], [3.0, 0.2 / 0.65, 0.4 / 0.55]),
        ([0.9, NAN, 0.3], [3.0, 1.0, 1 / 3]),
        ([0.9, NAN], [1.0, 1.0]),
        ([NAN, NAN], [1.0, 1.0]),
    ],
)
def test_ratios_by_hand(scores, ratios):
    assert discrepancy_ratios(torch.tensor(scores, dtype=torch.float64)).tolist() == pytest.approx(ratios)


def test_the_factor_jumps_at_one():
    terms = ogm_coefficients(torch.tensor([1.0, 1.0 + 1e-9], dtype=torch.float64), 0.5)
    assert terms.tolist() == pytest.approx([1.0, 1 - np.tanh(0.5)])


def plain_gradients(network, loss, batch, *mask):
    task = loss(network(batch["image"], *mask), batch["label"])
    names = [name for name, _ in network.named_parameters()]
    return dict(zip(names, torch.autograd.grad(task, list(network.parameters())), strict=True))


def owner_of(name, modalities):
    return next((i for i, m in enumerate(modalities) if name.startswith(f"encoders.{m}.")), None)


@pytest.mark.parametrize("modalities", MODALITIES, ids=len)
@pytest.mark.parametrize("task", TASKS)
def test_encoder_gradients_are_the_task_s_times_the_factor(task, modalities):
    network, classifiers, measure, loss, (batch,) = set_up(task, modalities)
    plain = plain_gradients(network, loss, batch)
    scores = [by_hand(p, batch["label"]) for p in predictions_of(network, classifiers, batch["image"])]
    factors = numpy_terms(scores, 0.8)
    assert np.ptp(factors) > 0.1
    method = OGMGE(network, classifiers, measure, alpha=0.8, noise=False)
    seen = gradients_of_one_step(network, classifiers, [batch], method, loss=loss)
    for name, gradient in plain.items():
        owner = owner_of(name, modalities)
        expected = gradient if owner is None else gradient * factors[owner]
        torch.testing.assert_close(seen[name], expected, rtol=1e-9, atol=1e-14, msg=name)
    assert [seen["scalars"][f"balance/{m}"] for m in modalities] == pytest.approx(factors)


def added(seen, plain, modalities, factors):
    """What is left of an encoder's gradient after the task's times the factor."""
    return {
        name: seen[name] - gradient * factors[owner_of(name, modalities)]
        for name, gradient in plain.items()
        if owner_of(name, modalities) is not None
    }


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("modalities", MODALITIES[::2], ids=len)
def test_noise_is_added_to_what_has_two_dimensions(modalities, task):
    noises = {}
    for control, seed in (("none", 0), ("constant", 0), ("shuffled", 0), ("none", 1)):
        network, classifiers, measure, loss, (batch,) = set_up(task, modalities)
        plain = plain_gradients(network, loss, batch)
        method = OGMGE(network, classifiers, measure, alpha=0.8, control=control, seed=seed)
        seen = gradients_of_one_step(network, classifiers, [batch], method, loss=loss)
        factors = [seen["scalars"][f"balance/{m}"] for m in modalities]
        noises[control, seed] = added(seen, plain, modalities, factors)
        for name, gradient in plain.items():
            if owner_of(name, modalities) is None:
                torch.testing.assert_close(seen[name], gradient, rtol=1e-9, atol=1e-14, msg=name)
        for m in modalities:  # what is logged is the norm of what the optimiser gets
            norm = sum(g.square().sum() for n, g in seen.items() if n.startswith(f"encoders.{m}.")).sqrt().item()
            assert seen["scalars"][f"modulated_norm/{m}"] == pytest.approx(norm)
    first = noises["none", 0]
    for name, noise in first.items():
        # controls change k only, another seed changes the noise
        for control in ("constant", "shuffled"):
            torch.testing.assert_close(noises[control, 0][name], noise, rtol=1e-9, atol=1e-14)
        if plain[name].dim() == 1:
            torch.testing.assert_close(noise, torch.zeros_like(noise), rtol=0, atol=1e-14)
        else:
            assert noise.std() > 0
            assert (noises["none", 1][name] - noise).abs().max() > 0.1 * noise.std()


@pytest.mark.parametrize("task", ["segmentation", "regression"])
def test_noise_has_mean_zero_and_the_deviation_of_the_gradient(task):
    """A still network sees one batch many times."""
    network, classifiers, measure, loss, (batch,) = set_up(task, ("pet", "ct"))
    plain = plain_gradients(network, loss, batch)
    method = OGMGE(network, classifiers, measure, alpha=2.6)
    engine = toy.trainer(network, everything(network, classifiers), [batch] * 400, method, lr=0.0, loss=loss)
    gathered = {name: [] for name, g in plain.items() if name.startswith("encoders.") and g.dim() > 1}

    @engine.on(IterationEvents.MODEL_COMPLETED)
    def gather(engine):
        for name in gathered:
            factor = engine.state.scalars[f"balance/{name.split('.')[1]}"]
            gathered[name].append(network.get_parameter(name).grad - factor * plain[name])

    engine.run()
    assert engine.state.scalars["balance/pet"] != engine.state.scalars["balance/ct"]
    for name, noises in gathered.items():
        noise = torch.stack(noises)
        deviation = plain[name].numpy().std()  # of the gradient before k
        assert noise.std().item() == pytest.approx(deviation, rel=0.1)
        assert abs(noise.mean().item()) < 4 * deviation / noise.numel() ** 0.5
        assert not torch.equal(noise[0], noise[1])
    one, other = (torch.stack(n).flatten() for n in list(gathered.values())[:1] + list(gathered.values())[-1:])
    size = min(len(one), len(other))
    assert abs(torch.corrcoef(torch.stack([one[:size], other[:size]]))[0, 1]) < 4 / size**0.5


def test_without_magnitude_neither_factor_nor_noise():
    network, classifiers, measure, loss, (batch,) = set_up("segmentation", toy.MODALITIES)
    plain = plain_gradients(network, loss, batch)
    method = OGMGE(network, classifiers, measure, alpha=0.8, magnitude=False)
    seen = gradients_of_one_step(network, classifiers, [batch], method, loss=loss)
    assert all(torch.allclose(seen[name], gradient, rtol=1e-12, atol=1e-16) for name, gradient in plain.items())
    assert len({seen["scalars"][f"balance/{m}"] for m in toy.MODALITIES}) > 1


def test_both_end_after_the_last_epoch():
    network, classifiers = parts()
    method = OGMGE(network, classifiers, metric(), alpha=0.8, until_epoch=2)
    rows = rows_of(method, network, classifiers, toy.batches(3), epochs=3)
    for number, row in enumerate(rows):
        acts = [row[f"balance/{m}"] != 1.0 for m in toy.MODALITIES]
        ratios = [row[f"modulated_norm/{m}"] / row[f"gradient_norm/{m}"] for m in toy.MODALITIES]
        if number < 6:
            assert any(acts)
            assert all(ratio != 1.0 for ratio in ratios)
        else:
            assert not any(acts)
            assert ratios == [1.0] * 4
        assert any(row[f"discrepancy/{m}"] > 1 for m in toy.MODALITIES)


@pytest.mark.parametrize("modalities", [("pet", "ct"), toy.MODALITIES], ids=len)
def test_a_sample_counts_for_the_modalities_that_it_has(modalities):
    number = len(modalities)
    network, classifiers, measure, loss, (batch,) = set_up("segmentation", modalities)
    batch["present"] = torch.ones(4, number, dtype=torch.bool)
    batch["present"][0, 0] = batch["present"][1, 0] = batch["present"][1:, -1] = batch["present"][3, 0] = False
    batch["present"][3, -1] = True  # somebody must have something
    scores = []
    for i, p in enumerate(predictions_of(network, classifiers, batch["image"])):
        rows = batch["present"][:, i]
        scores.append(by_hand(p[rows], batch["label"][rows]))
    factors = numpy_terms(scores, 0.8)
    plain = plain_gradients(network, loss, batch, batch["present"])
    method = OGMGE(network, classifiers, measure, alpha=0.8, noise=False)
    seen = gradients_of_one_step(network, classifiers, [batch], method, prepare_batch=prepare_batch)
    assert [seen["scalars"][f"balance/{m}"] for m in modalities] == pytest.approx(factors)
    for name, gradient in plain.items():
        owner = owner_of(name, modalities)
        expected = gradient if owner is None else gradient * factors[owner]
        torch.testing.assert_close(seen[name], expected, rtol=1e-9, atol=1e-14, msg=name)


def test_a_modality_that_no_sample_has_is_left_out():
    network, classifiers, measure, _, (batch,) = set_up("segmentation", toy.MODALITIES)
    batch["present"] = torch.ones(4, 4, dtype=torch.bool)
    batch["present"][:, 1] = False
    predictions = predictions_of(network, classifiers, batch["image"])
    scores = [NAN if i == 1 else by_hand(p, batch["label"]) for i, p in enumerate(predictions)]
    method = OGMGE(network, classifiers, measure, alpha=0.8)
    seen = gradients_of_one_step(network, classifiers, [batch], method, prepare_batch=prepare_batch)
    factors = [seen["scalars"][f"balance/{m}"] for m in toy.MODALITIES]
    assert factors == pytest.approx(numpy_terms(scores, 0.8))
    assert factors[1] == seen["scalars"]["discrepancy/t1ce"] == 1.0
    absent = [gradient for name, gradient in seen.items() if name.startswith("encoders.t1ce.")]
    assert len(absent) == 4
    assert all(not gradient.any() for gradient in absent)  # noise of a gradient of 0 is 0


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_resumed_run_goes_on_exactly(stop, tmp_path):
    data = toy.batches(8)

    def made(seed=0):
        network, classifiers = parts(dropout=0.3, seed=seed)
        return network, classifiers, OGMGE(network, classifiers, metric(), alpha=0.8)

    toy.assert_resumes(made, data, stop, tmp_path)


def test_watching_the_noise_draws_no_other_random_number():
    network, classifiers = parts()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    toy.trainer(network, everything(network, classifiers), toy.batches(2), OGMGE(network, classifiers, metric())).run()
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.0}, "alpha must be positive, got 0.0"),
        ({"alpha": NAN}, "alpha must be positive, got nan"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"until_epoch": -1}, "until_epoch must be at least 0 or None, got -1"),
        ({"control": "random"}, "one of none, constant, shuffled, got 'random'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        OGMGE(*parts(), metric(), **arguments)


def test_one_modality_is_refused():
    with pytest.raises(ValueError, match="OGMGE balances two modalities or more"):
        OGMGE(*parts(("flair",)), metric())


def test_the_log_says_what_is_attached():
    assert repr(OGMGE(*parts(("pet", "ct")), metric(), until_epoch=50)) == (
        "OGMGE(modalities=['pet', 'ct'], alpha=0.1, noise=True, seed=0, until_epoch=50, control='none', magnitude=True)"
    )
