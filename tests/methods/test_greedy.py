# SPDX-License-Identifier: Apache-2.0
"""Greedy against a loop over the course of a training: who learns when, and what the others' gradients are."""

import math

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents

from monai_cggm.batches import prepare_batch
from monai_cggm.methods.greedy import Greedy, learning_speeds, slowest
from tests.methods import toy
from tests.methods.test_likelihood import TASKS, set_up
from tests.methods.toy import everything, metric, parts

MODALITIES = [("pet", "ct"), ("flair", "t1", "t2"), toy.MODALITIES]
NAN = float("nan")


@pytest.mark.parametrize("modalities", [2, 3, 4, 7])
def test_speeds_against_numpy(modalities):
    random = np.random.default_rng(modalities)
    gradients, weights = random.uniform(0.1, 9, size=(2, 12, modalities))
    sums = sum(g**2 / w**2 for g, w in zip(gradients, weights, strict=True))
    speeds = learning_speeds(torch.tensor(sums), torch.full((modalities,), 12.0, dtype=torch.float64))
    expected = np.log10((gradients**2 / weights**2).mean(axis=0))
    np.testing.assert_allclose(speeds, expected, rtol=1e-12)
    index, ahead = slowest(speeds)
    assert index == expected.argmin()
    assert ahead.item() == pytest.approx(np.ptp(expected))


@pytest.mark.parametrize(
    ("speeds", "index", "ahead"),
    [
        ([-1.0, -3.0], 1, 2.0),
        ([-1.0, NAN, -1.5, -1.2], 2, 0.5),
        ([NAN, -2.0, NAN], 1, 0.0),
        ([0.5, 0.5, 0.5], 0, 0.0),
    ],
)
def test_the_slowest_by_hand(speeds, index, ahead):
    found, difference = slowest(torch.tensor(speeds))
    assert (found.item(), difference.item()) == (index, pytest.approx(ahead))


def test_of_nobody_nothing_is_known():
    assert slowest(torch.tensor([NAN, NAN]))[1].item() == -math.inf


class Watched:
    """A training of which each step's balance, gradients before and after, and encoders' weights are kept."""

    def __init__(self, method, network, classifiers, data, *, epochs=1, **kwargs):
        self.rows, self.before, self.after, self.weights = [], [], [], []
        self.modalities = method.modalities
        engine = toy.trainer(network, everything(network, classifiers), data, epochs=epochs, **kwargs)
        encoders = network.encoders
        gradients = lambda: {m: [p.grad.clone() for p in e.parameters()] for m, e in encoders.items()}  # noqa: E731
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, lambda e: self.before.append(gradients()))
        method.attach(engine)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, lambda e: self.after.append(gradients()))
        engine.add_event_handler(
            Events.ITERATION_STARTED,
            lambda e: self.weights.append(
                {m: [p.detach().clone() for p in c.parameters()] for m, c in encoders.items()}
            ),
        )
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: self.rows.append(e.state.scalars))
        engine.run()
        self.per_epoch = len(data)

    @property
    def balance(self):
        return [[row[f"balance/{m}"] for m in self.modalities] for row in self.rows]

    def simulated(self, threshold, window, start_epoch):
        """B of each step, by a loop over what was seen of gradients and weights."""
        number, shares = len(self.modalities), [[] for _ in self.modalities]
        left, chosen, result = 0, None, []
        for step, (gradients, weights) in enumerate(zip(self.before, self.weights, strict=True)):
            if left:
                result.append([float(i == chosen) for i in range(number)])
                left -= 1
                continue
            result.append([1.0] * number)
            for i, m in enumerate(self.modalities):
                size = sum(float((g**2).sum()) for g in gradients[m])
                if size > 0:
                    shares[i].append(size / sum(float((w**2).sum()) for w in weights[m]))
            speeds = {i: math.log10(np.mean(s)) for i, s in enumerate(shares) if s}
            if step // self.per_epoch + 1 >= start_epoch and max(speeds.values()) - min(speeds.values()) > threshold:
                left, chosen = window, min(speeds, key=speeds.get)
        return result


@pytest.mark.parametrize(("threshold", "window", "start_epoch"), [(0.01, 5, 2), (0.3, 2, 1), (0.0, 1, 3)])
@pytest.mark.parametrize("modalities", MODALITIES, ids=len)
@pytest.mark.parametrize("task", TASKS)
def test_who_learns_when(task, modalities, threshold, window, start_epoch):
    network, classifiers, measure, loss, data = set_up(task, modalities, number=4)
    method = Greedy(network, classifiers, measure, threshold=threshold, window=window, start_epoch=start_epoch)
    run = Watched(method, network, classifiers, data, epochs=5, loss=loss)
    assert run.balance == run.simulated(threshold, window, start_epoch)
    first = 4 * (start_epoch - 1)
    assert run.balance[: first + 1] == [[1.0] * len(modalities)] * (first + 1)
    if threshold < 0.1:  # a window begins right after the first comparison, and a regular step comes after it
        alone = run.balance[first + 1 : first + 1 + window]
        assert alone == [alone[0]] * window
        assert sum(alone[0]) == 1.0
        assert run.balance[first + 1 + window] == [1.0] * len(modalities)
    for balance, before, after in zip(run.balance, run.before, run.after, strict=True):
        for factor, m in zip(balance, modalities, strict=True):
            for g, scaled in zip(before[m], after[m], strict=True):
                assert torch.equal(scaled, g * factor)
                assert g.any()


def test_the_chosen_one_changes_with_the_speeds():
    """An encoder whose weights are made large is slow from then on."""
    network, classifiers, measure, loss, data = set_up("segmentation", ("pet", "ct"), number=4)
    method = Greedy(network, classifiers, measure, window=1, start_epoch=1)
    run = Watched(method, network, classifiers, data, loss=loss)
    assert run.balance == [[1.0, 1.0], run.balance[1]] * 2
    slow = run.balance[1].index(1.0)
    other = "ct" if slow == 0 else "pet"
    network, classifiers, measure, loss, data = set_up("segmentation", ("pet", "ct"), number=4)
    with torch.no_grad():
        network.encoders[other][0].weight.mul_(100)
    method = Greedy(network, classifiers, measure, window=1, start_epoch=1)
    run = Watched(method, network, classifiers, data, loss=loss)
    assert run.balance[1].index(1.0) == 1 - slow


def test_below_the_threshold_all_learn():
    network, classifiers, measure, loss, data = set_up("segmentation", toy.MODALITIES, number=6)
    run = Watched(
        Greedy(network, classifiers, measure, threshold=50.0, start_epoch=1), network, classifiers, data, loss=loss
    )
    assert run.balance == [[1.0] * 4] * 6


@pytest.mark.parametrize("modalities", MODALITIES, ids=len)
def test_controls_in_a_window(modalities):
    number, courses = len(modalities), {}
    for control in ("none", "constant", "shuffled"):
        network, classifiers, measure, loss, data = set_up("segmentation", modalities, number=2)
        method = Greedy(network, classifiers, measure, window=1, start_epoch=1, control=control)
        courses[control] = Watched(method, network, classifiers, data, loss=loss).balance
    assert courses["constant"] == [[1.0] * number, pytest.approx([1 / number] * number)]
    assert courses["shuffled"][1] == courses["none"][1][-1:] + courses["none"][1][:-1]


def test_without_magnitude_no_gradient_changes():
    network, classifiers, measure, loss, data = set_up("segmentation", toy.MODALITIES, number=4)
    method = Greedy(network, classifiers, measure, start_epoch=1, magnitude=False)
    run = Watched(method, network, classifiers, data, loss=loss)
    assert sum(run.balance[1]) == 1.0
    for before, after in zip(run.before, run.after, strict=True):
        assert all(torch.equal(g, s) for m in toy.MODALITIES for g, s in zip(before[m], after[m], strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_momentum_moves_an_encoder_whose_factor_is_0(momentum):
    network, classifiers, measure, loss, data = set_up("segmentation", ("pet", "ct"), number=3)
    method = Greedy(network, classifiers, measure, window=5, start_epoch=1)
    engine = toy.trainer(network, everything(network, classifiers), data, method, loss=loss)
    engine.optimizer = torch.optim.SGD(everything(network, classifiers), lr=0.1, momentum=momentum)
    courses = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda e: courses.append({m: network.encoders[m][0].weight.clone() for m in ("pet", "ct")}),
    )
    engine.run()
    held = "ct" if engine.state.scalars["balance/pet"] else "pet"
    other = "pet" if held == "ct" else "ct"
    assert torch.equal(courses[2][held], courses[1][held]) == (momentum == 0.0)
    assert not torch.equal(courses[2][other], courses[1][other])


@pytest.mark.parametrize("modalities", [("pet", "ct"), toy.MODALITIES], ids=len)
@pytest.mark.parametrize("first", [True, False])
def test_a_step_without_a_modality_does_not_count_for_it(first, modalities):
    network, classifiers, measure, loss, data = set_up("segmentation", modalities, number=8)
    for number, batch in enumerate(data):
        batch["present"] = torch.ones(4, len(modalities), dtype=torch.bool)
        batch["present"][number % 4, 0] = False
        if number in ((0, 3) if first else (3, 6)):
            batch["present"][:, 0] = True
            batch["present"][:, -1] = False
    method = Greedy(network, classifiers, measure, window=2, start_epoch=1)
    run = Watched(method, network, classifiers, data, loss=loss, prepare_batch=prepare_batch)
    assert run.balance == run.simulated(0.01, 2, 1)
    last = modalities[-1]
    assert not any(g.any() for g in run.before[3][last])
    assert (run.rows[0][f"update/{last}"] == 0.0) == first
    assert all(math.isfinite(value) for row in run.rows for value in row.values())


@pytest.mark.parametrize("bad", [math.inf, NAN])
def test_an_overflow_under_amp_does_not_stay_in_the_sums(bad):
    network, classifiers = parts(("pet", "ct"))
    method = Greedy(network, classifiers, metric(), start_epoch=1, magnitude=False)
    method.balance = torch.ones(2)
    method._scalars = {"gradient_norm/pet": torch.tensor(bad), "gradient_norm/ct": torch.tensor(1.0)}
    method.modulate(None)
    assert method.state_dict()["updates"].tolist() == method.state_dict()["steps"].tolist() == [0.0, 0.0]
    assert method.state_dict()["left"] == 0


def made(seed=0):
    network, classifiers = parts(dropout=0.3, seed=seed)
    return network, classifiers, Greedy(network, classifiers, metric(), window=3, start_epoch=1)


@pytest.mark.parametrize("stop", [1, 2, 4, 5, 6])
def test_a_resumed_run_goes_on_exactly(stop, tmp_path):
    """Before, within and after a window."""
    data = toy.batches(9)
    toy.assert_resumes(made, data, stop, tmp_path)


def test_a_state_of_no_step_can_be_loaded():
    _, _, method = made(seed=1)
    method.load_state_dict(made()[2].state_dict())
    assert method.balance is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": -0.1}, "threshold must not be negative, got -0.1"),
        ({"threshold": NAN}, "threshold must not be negative, got nan"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"start_epoch": 0}, "start_epoch must be at least 1, got 0"),
        ({"control": "random"}, "one of none, constant, shuffled, got 'random'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Greedy(*parts(), metric(), **arguments)


def test_one_modality_is_refused():
    with pytest.raises(ValueError, match="Greedy balances two modalities or more"):
        Greedy(*parts(("flair",)), metric())


def test_the_log_says_what_is_attached():
    assert repr(Greedy(*parts(("pet", "ct")), metric())) == (
        "Greedy(modalities=['pet', 'ct'], threshold=0.01, window=5, start_epoch=2, control='none', magnitude=True)"
    )
