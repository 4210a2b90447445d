# SPDX-License-Identifier: Apache-2.0
"""The bounded balance against NumPy, and its course over a training."""

import numpy as np
import pytest
import torch

from monai_cggm.methods import RelativeBalance, relative_terms
from tests.methods import toy
from tests.methods.toy import metric, parts, rows_of


def by_hand(epsilon, strength, bounds=(0.5, 1.5)):
    epsilon = np.asarray(epsilon, dtype=float)
    mean = epsilon.mean()
    if mean == 0:
        return np.ones_like(epsilon)
    raw = np.array([min(max(1 + strength * (mean - e) / mean, bounds[0]), bounds[1]) for e in epsilon])
    return raw / (raw.sum() / len(raw))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 4.0, -0.5, -1.0, -4.0])
@pytest.mark.parametrize("bounds", [(0.5, 1.5), (0.0, 2.0), (0.9, 1.05), (1.0, 1.0)])
@pytest.mark.parametrize("modalities", [2, 3, 4, 7])
def test_terms_against_numpy(modalities, bounds, strength):
    random = np.random.default_rng(modalities)
    for epsilon in random.uniform(size=(20, modalities)) * random.choice([1.0, 0.01], size=(20, 1)):
        terms = relative_terms(torch.tensor(epsilon), strength, bounds).numpy()
        np.testing.assert_allclose(terms, by_hand(epsilon, strength, bounds), rtol=1e-12)
        assert terms.mean() == pytest.approx(1.0)
        # before the mean is set to 1 they lie within the bounds, so afterwards within the bounds over that mean
        assert terms.min() >= bounds[0] / bounds[1] - 1e-12
        if bounds[0]:
            assert terms.max() <= bounds[1] / bounds[0] + 1e-12
        if strength > 0:
            assert terms[epsilon.argmin()] == terms.max()
        if strength < 0:
            assert terms[epsilon.argmax()] == terms.max()


@pytest.mark.parametrize(
    ("epsilon", "strength", "expected"),
    [
        ([0.8, 0.4], 1.0, [2 / 3, 4 / 3]),  # mean 0.6, a third behind and ahead
        ([0.8, 0.4], -1.0, [4 / 3, 2 / 3]),
        ([1.0, 0.0], 1.0, [0.5, 1.5]),  # 0 and 2 before the bounds
        ([0.9, 0.0, 0.0], 1.0, [0.5 / 3.5 * 3, 1.5 / 3.5 * 3, 1.5 / 3.5 * 3]),
        ([0.3, 0.3, 0.3], 5.0, [1.0, 1.0, 1.0]),
        ([0.0, 0.0, 0.0, 0.0], 5.0, [1.0, 1.0, 1.0, 1.0]),
        ([0.7, 0.1], 0.0, [1.0, 1.0]),
        ([-0.4, -0.8], 1.0, [2 / 3, 4 / 3]),  # minus an error of 0.8 lags a third behind
        ([-0.4, -0.8], -1.0, [4 / 3, 2 / 3]),
        ([-3.0, -0.5, -0.5], 1.0, [1.5 / 2.5 * 3, 0.5 / 2.5 * 3, 0.5 / 2.5 * 3]),
    ],
)
def test_terms_by_hand(epsilon, strength, expected):
    assert relative_terms(torch.tensor(epsilon, dtype=torch.float64), strength).tolist() == pytest.approx(expected)


def column(rows, group, modalities):
    return np.array([[row[f"{group}/{m}"] for m in modalities] for row in rows])


@pytest.mark.parametrize("modalities", [("pet", "ct"), toy.MODALITIES], ids=len)
@pytest.mark.parametrize(("momentum", "every"), [(0.3, 3), (1.0, 1), (0.1, 20)])
def test_the_running_mean_the_held_terms_and_their_end(momentum, every, modalities):
    network, classifiers = parts(modalities)
    method = RelativeBalance(
        network, classifiers, metric(), strength=2.0, momentum=momentum, every=every, until_epoch=2
    )
    rows = rows_of(method, network, classifiers, toy.batches(4, modalities=len(modalities)), epochs=3, lr=0.3)
    epsilon = column(rows, "epsilon", modalities)
    means, held, expected = [epsilon[0]], by_hand(epsilon[0], 2.0), []
    for batch in range(12):
        if batch:
            means.append((1 - momentum) * means[-1] + momentum * epsilon[batch])
        if batch % every == 0:
            held = by_hand(means[-1], 2.0)
        expected.append(held if batch < 8 else np.ones(len(modalities)))
    np.testing.assert_allclose(column(rows, "epsilon_mean", modalities), means, rtol=1e-9)
    balance = column(rows, "balance", modalities)
    np.testing.assert_allclose(balance, expected, rtol=1e-9)
    ratio = column(rows, "modulated_norm", modalities) / column(rows, "gradient_norm", modalities)
    np.testing.assert_allclose(ratio, expected, rtol=1e-5)
    assert len(np.unique(balance[:8], axis=0)) == -(-8 // every)
    assert np.ptp(balance[0]) > 1e-3


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_resumed_run_goes_on_exactly(stop, tmp_path):
    data = toy.batches(8)

    def made(seed=0):
        network, classifiers = parts(dropout=0.3, seed=seed)
        return (
            network,
            classifiers,
            RelativeBalance(network, classifiers, metric(), strength=2.0, momentum=0.2, every=4),
        )

    toy.assert_resumes(made, data, stop, tmp_path)


def test_a_state_of_no_step_can_be_loaded():
    method = RelativeBalance(*parts(), metric())
    method.load_state_dict(RelativeBalance(*parts(), metric()).state_dict())
    assert method.balance is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bounds": (1.1, 1.5)}, r"bounds must enclose 1 and not be negative, got \[1.1, 1.5\]"),
        ({"bounds": (-0.1, 1.5)}, "bounds must enclose 1"),
        ({"bounds": (0.2, 0.9)}, "bounds must enclose 1"),
        ({"momentum": 0.0}, "momentum must be above 0 and at most 1, got 0.0"),
        ({"momentum": 1.5}, "momentum must be above 0 and at most 1, got 1.5"),
        ({"every": 0}, "every must be at least 1, got 0"),
    ],
)
def test_wrong_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RelativeBalance(*parts(), metric(), **arguments)


def test_one_modality_is_refused():
    with pytest.raises(ValueError, match="RelativeBalance balances two modalities or more"):
        RelativeBalance(*parts(("flair",)), metric())
