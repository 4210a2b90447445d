# SPDX-License-Identifier: Apache-2.0
"""MSLR against NumPy: its ratio, its course over epochs, and that it is a learning rate of each encoder's own."""

import numpy as np
import pytest
import torch

from monai_cggm.batches import prepare_batch
from monai_cggm.handlers import Checkpoints
from monai_cggm.methods import UnimodalObserver
from monai_cggm.methods.mslr import MSLR, progress_ratio
from tests.methods import toy
from tests.methods.test_likelihood import TASKS, set_up
from tests.methods.toy import everything, gradients_of_one_step, metric, parts, rows_of

MODALITIES = [("pet", "ct"), ("flair", "t1", "t2"), toy.MODALITIES]


def numpy_ratio(history):
    """Loops over modalities; scores where they are positive, else errors."""
    ratios = []
    for values in np.asarray(history, dtype=float).T:
        now, mean = values[-1], values.mean()
        if mean > 0 and now >= 0:
            ratios.append(now / mean)
        elif mean < 0 and now < 0:
            ratios.append(abs(mean) / abs(now))
        else:
            ratios.append(1.0)
    return np.array(ratios)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("modalities", [2, 3, 4, 7])
@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_ratio_against_numpy(epochs, modalities, sign):
    history = sign * np.random.default_rng(epochs).uniform(0.01, 1, size=(epochs, modalities))
    ratio = progress_ratio(torch.tensor(history)).numpy()
    np.testing.assert_allclose(ratio, numpy_ratio(history), rtol=1e-12)
    better = history[-1] > history.mean(axis=0) + 1e-12
    assert np.array_equal(ratio > 1 + 1e-12, better)


@pytest.mark.parametrize(
    ("course", "ratio"),
    [
        ([0.2, 0.6], 1.5),
        ([0.6, 0.2], 0.5),
        ([-3.0, -1.0], 2.0),
        ([-1.0, -3.0], 2 / 3),
        ([0.4], 1.0),
        ([0.5, 0.0], 0.0),  # from something to nothing
        ([0.0, 0.0], 1.0),  # nothing all the time
        ([0.0, 0.5], 2.0),
        ([-1.0, 0.0], 1.0),  # no error is left
        ([-1.0, 3.0], 3.0),
        ([-3.0, 1.0], 1.0),  # a measure that changes its sign
        ([3.0, -1.0], 1.0),
    ],
)
def test_ratio_by_hand(course, ratio):
    assert progress_ratio(torch.tensor(course, dtype=torch.float64)[:, None]).tolist() == pytest.approx([ratio])


def column(rows, group, modalities):
    return np.array([[row[f"{group}/{m}"] for m in modalities] for row in rows])


def expected_course(epsilon, window, initial):
    """B of each of the epochs, from ε ``(epochs, batches, M)``."""
    means = epsilon.mean(axis=1)
    ratios = [np.ones(epsilon.shape[2])]
    ratios += [numpy_ratio(means[max(0, epoch - window) : epoch]) for epoch in range(1, len(means))]
    return np.array(ratios) * initial


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("modalities", MODALITIES, ids=len)
@pytest.mark.parametrize("task", TASKS)
def test_the_course_over_epochs(task, modalities, window):
    network, classifiers, measure, loss, data = set_up(task, modalities, number=3)
    initial = dict(zip(modalities, np.linspace(0.9, 1.1, len(modalities)).tolist(), strict=True))
    method = MSLR(network, classifiers, measure, initial=initial, window=window)
    rows = rows_of(method, network, classifiers, data, epochs=7, loss=loss, lr=0.3)
    epsilon = column(rows, "epsilon", modalities).reshape(7, 3, -1)
    expected = expected_course(epsilon, window, list(initial.values()))
    balance = column(rows, "balance", modalities).reshape(7, 3, -1)
    np.testing.assert_allclose(balance, np.broadcast_to(expected[:, None], balance.shape), rtol=1e-9)
    ratio = column(rows, "modulated_norm", modalities) / column(rows, "gradient_norm", modalities)
    np.testing.assert_allclose(ratio.reshape(balance.shape), balance, rtol=1e-5)
    # in the first two epochs there is nothing to compare with
    assert np.ptp(balance[:2], axis=0) == pytest.approx(0.0)
    assert (np.ptp(balance[2:], axis=0).max() > 1e-3) == (window > 1)


@pytest.mark.parametrize("modalities", MODALITIES, ids=len)
@pytest.mark.parametrize("task", TASKS)
def test_encoder_gradients_are_the_task_s_times_the_factor(task, modalities):
    network, classifiers, measure, loss, (batch,) = set_up(task, modalities)
    names = [name for name, _ in network.named_parameters()]
    value = loss(network(batch["image"]), batch["label"])
    plain = dict(zip(names, torch.autograd.grad(value, list(network.parameters())), strict=True))
    method = MSLR(network, classifiers, measure, window=3)
    # two epochs are past: 0.5 and 0.2 to 0.9, so 0.2/0.35 to 0.9/0.7
    last = torch.linspace(0.2, 0.9, len(modalities), dtype=torch.float64)
    state = method.state_dict() | {"history": [torch.full_like(last, 0.5), last]}
    method.load_state_dict(state)
    factors = (2 * last / (0.5 + last)).tolist()
    seen = gradients_of_one_step(network, classifiers, [batch], method, loss=loss)
    assert [seen["scalars"][f"balance/{m}"] for m in modalities] == pytest.approx(factors)
    for name, gradient in plain.items():
        owner = next((i for i, m in enumerate(modalities) if name.startswith(f"encoders.{m}.")), None)
        expected = gradient if owner is None else gradient * factors[owner]
        torch.testing.assert_close(seen[name], expected, rtol=1e-9, atol=1e-14, msg=name)


def trained(network, classifiers, method, data, groups, **sgd):
    """Train with learning rates of the groups, and return the network's weights."""
    engine = toy.trainer(network, everything(network, classifiers), data, method, epochs=2)
    engine.optimizer = torch.optim.SGD(groups, lr=0.1, **sgd)
    engine.run()
    return {name: weight.clone() for name, weight in network.state_dict().items()}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_constant_factors_are_learning_rates_of_the_encoders(momentum):
    initial = {"flair": 0.5, "t1ce": 1.0, "t1": 2.0, "t2": 3.0}
    data = toy.batches(3, dtype=torch.float64)
    network, classifiers = parts(dtype=torch.float64)
    method = MSLR(network, classifiers, metric(), initial=initial, dynamic=False)
    scaled = trained(network, classifiers, method, data, everything(network, classifiers), momentum=momentum)

    network, classifiers = parts(dtype=torch.float64)
    groups = [{"params": list(network.encoders[m].parameters()), "lr": 0.1 * rate} for m, rate in initial.items()]
    groups.append({"params": everything(network.trunk, network.head, classifiers)})
    observer = UnimodalObserver(network, classifiers, metric())
    rates = trained(network, classifiers, observer, data, groups, momentum=momentum)
    for name, weight in rates.items():
        torch.testing.assert_close(scaled[name], weight, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(("control", "factors"), [("constant", [1.5, 1.5]), ("shuffled", [2.0, 1.0])])
def test_controls(control, factors):
    network, classifiers = parts(("pet", "ct"))
    method = MSLR(network, classifiers, metric(), initial={"pet": 1.0, "ct": 2.0}, control=control)
    rows = rows_of(method, network, classifiers, toy.batches(2, modalities=2))
    assert column(rows, "balance", ("pet", "ct")).tolist() == [factors] * 2


@pytest.mark.parametrize("modalities", [("pet", "ct"), toy.MODALITIES], ids=len)
def test_a_sample_counts_for_the_modalities_that_it_has(modalities):
    network, classifiers, measure, loss, data = set_up("segmentation", modalities, number=3)
    for number, batch in enumerate(data):
        batch["present"] = torch.ones(4, len(modalities), dtype=torch.bool)
        batch["present"][number, 0] = batch["present"][3, -1] = False
        batch["present"][3, 0] = True
    data[1]["present"][:, -1] = False  # nothing to measure: ε stays as it was in the batch before
    data[1]["present"][:, 0] = True
    method = MSLR(network, classifiers, measure)
    rows = rows_of(method, network, classifiers, data, epochs=4, loss=loss, prepare_batch=prepare_batch)
    epsilon = column(rows, "epsilon", modalities).reshape(4, 3, -1)
    assert (epsilon[:, 1, -1] == epsilon[:, 0, -1]).all()
    balance = column(rows, "balance", modalities).reshape(4, 3, -1)
    np.testing.assert_allclose(balance[:, 0], expected_course(epsilon, 5, 1.0), rtol=1e-9)
    # the first batch's ε, counted by hand over the rows that have the modality
    fresh, heads, *_ = set_up("segmentation", modalities)
    predictions = heads(toy.features_of(fresh, data[0]["image"]), (7, 7))
    for i, (m, prediction) in enumerate(predictions.items()):
        there = data[0]["present"][:, i]
        assert rows[0][f"epsilon/{m}"] == pytest.approx(toy.numpy_dice(prediction[there], data[0]["label"][there]))


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_resumed_run_goes_on_exactly(stop, tmp_path):
    def part(epochs, folder, *, resume=False, seed=0):
        network, classifiers = parts(dropout=0.3, seed=seed)
        method = MSLR(network, classifiers, metric(), window=3)
        objects = {"model": network, "classifiers": classifiers, "method": method}
        handlers = [Checkpoints(folder, objects, resume=resume)]
        rows = rows_of(method, network, classifiers, toy.batches(3), epochs=epochs, handlers=handlers, lr=0.3)
        return rows, {**network.state_dict(), **classifiers.state_dict()}

    whole, weights = part(6, tmp_path / "whole")
    before, _ = part(stop, tmp_path / "parts")
    after, resumed = part(6, tmp_path / "parts", resume=True, seed=8)
    assert before + after == whole
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("batches", [0, 2])
def test_a_state_within_an_epoch_loads_as_it_was(batches, tmp_path):
    network, classifiers = parts()
    method = MSLR(network, classifiers, metric())
    if batches:
        rows_of(method, network, classifiers, toy.batches(batches), epochs=2)
    torch.save(method.state_dict(), tmp_path / "state.pt")
    other = MSLR(*parts(), metric())
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert str(other.state_dict()) == str(method.state_dict())
    assert len(other.state_dict()["history"]) == (1 if batches else 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"initial": {"flair": 1.0}}, r"initial must have a positive factor for each of \['flair', 't1ce', 't1', 't2'"),
        ({"initial": {"flair": 1.0, "t1ce": 1.0, "t1": 1.0, "t2": 0.0}}, "initial must have a positive factor"),
        ({"initial": dict.fromkeys((*toy.MODALITIES, "pet"), 1.0)}, "initial must have a positive factor"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"dynamic": False}, "keeps the initial factors, and there are none"),
        ({"control": "random"}, "one of none, constant, shuffled, got 'random'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MSLR(*parts(), metric(), **arguments)


def test_one_modality_is_refused():
    with pytest.raises(ValueError, match="MSLR balances two modalities or more"):
        MSLR(*parts(("flair",)), metric())


def test_the_log_says_what_is_attached():
    assert repr(MSLR(*parts(("pet", "ct")), metric(), initial={"ct": 1.1, "pet": 0.9})) == (
        "MSLR(modalities=['pet', 'ct'], initial=[0.9, 1.1], dynamic=True, window=5, control='none', magnitude=True)"
    )
