# SPDX-License-Identifier: Apache-2.0
"""QMF against NumPy and autograd: energies, histories, ranking, and a training that goes on exactly."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, margin_ranking_loss

from monai_cggm.methods.qmf import QMF, LossHistory, next_of_another, ranking_loss, sample_names
from monai_cggm.networks import LateFusion
from tests.methods import late_toy, toy
from tests.methods.late_toy import ABSENT, LOSSES, batches, metric_of, network_of, trainer

TASKS = ("segmentation", "classification")


def rank_by_hand(confidence, history):
    """The mean over pairs of a sample and the next one, by plain Python."""
    number = len(confidence)
    total = 0.0
    for n in range(number):
        other = (n + 1) % number
        margin = abs(history[n] - history[other])
        if history[n] < history[other]:
            total += max(0.0, margin - (confidence[n] - confidence[other]))
        elif history[n] > history[other]:
            total += max(0.0, margin + (confidence[n] - confidence[other]))
    return total / max(number, 1)


@pytest.mark.parametrize("samples", [0, 1, 2, 3, 8])
def test_ranking_against_python(samples):
    random = np.random.default_rng(samples)
    for _ in range(20):
        confidence, history = random.normal(size=samples), random.integers(0, 4, size=samples) / 3
        found = ranking_loss(torch.tensor(confidence), torch.tensor(history)).item()
        assert found == pytest.approx(rank_by_hand(confidence, history), abs=1e-12)


@pytest.mark.parametrize("samples", [2, 5, 16])
def test_ranking_against_pytorch_s_margin(samples):
    """With one margin for all pairs it is PyTorch's ranking loss; and its gradient goes the right way."""
    torch.manual_seed(samples)
    confidence = torch.randn(samples, dtype=torch.float64, requires_grad=True)
    history = torch.rand(samples, dtype=torch.float64)
    target = (history.roll(-1) - history).sign()
    pairs = confidence, confidence.roll(-1), target
    each = torch.stack([margin_ranking_loss(a, b, t, margin=m.item()) for a, b, t, m in zip(
        *pairs, (history - history.roll(-1)).abs(), strict=True)])  # fmt: skip
    found = ranking_loss(confidence, history)
    torch.testing.assert_close(found, each.mean())
    (gradient,) = torch.autograd.grad(found, confidence)
    (expected,) = torch.autograd.grad(each.mean(), confidence)
    torch.testing.assert_close(gradient, expected)
    if samples == 2:  # the sample that was learnt better gets the larger energy
        ahead = (confidence - confidence.flip(0))[history.argmin()].item()
        if ahead < (history[0] - history[1]).abs().item():
            assert gradient[history.argmin()] < 0 < gradient[history.argmax()]


@pytest.mark.parametrize(
    ("confidence", "history", "expected"),
    [
        ([0.3, 0.1], [0.0, 0.2], 0.0),  # as far apart as the histories
        ([0.3, 0.1], [0.0, 0.5], 0.3),  # not far enough, in both pairs
        ([0.1, 0.3], [0.0, 0.5], 0.7),  # the wrong way round
        ([0.1, 0.9], [0.4, 0.4], 0.0),  # no difference, no order
        ([5.0], [0.3], 0.0),
        ([0.0, 0.0, 0.0], [0.0, 0.5, 1.0], 2 / 3),  # 0.5, 0.5 and, from the last to the first, 1
    ],
)
def test_ranking_by_hand(confidence, history, expected):
    found = ranking_loss(torch.tensor(confidence, dtype=torch.float64), torch.tensor(history, dtype=torch.float64))
    assert found.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("modalities", [2, 3])
def test_the_history_is_the_mean_of_each_sample_so_far(modalities):
    random = np.random.default_rng(0)
    history, seen = LossHistory(modalities), {}
    for _ in range(6):
        names = [f"case {i}" for i in random.integers(0, 9, size=5)]  # some come twice
        losses, there = random.exponential(size=(5, modalities)), random.random((5, modalities)) < 0.7
        losses[~there] = np.nan
        history.update(names, torch.tensor(losses), torch.tensor(there))
        for name, loss, has in zip(names, losses, there, strict=True):
            for i in range(modalities):
                seen.setdefault(name, [[] for _ in range(modalities)])[i].extend([loss[i]] if has[i] else [])
        assert list(history.rows) == list(seen)
        mean = np.array([[np.mean(values) if values else np.nan for values in row] for row in seen.values()])
        np.testing.assert_allclose(history.mean().numpy(), mean, rtol=1e-12)
        scaled = (mean - np.nanmin(mean, axis=0)) / (np.nanmax(mean, axis=0) - np.nanmin(mean, axis=0))
        asked = list(seen)[::-1]
        np.testing.assert_allclose(history.normalised(asked).numpy(), scaled[::-1], rtol=1e-9, atol=1e-12)


def test_a_history_without_differences_is_zero():
    history = LossHistory(2)
    losses = torch.tensor([[1.0, 3.0], [1.0, 3.0]])
    history.update(["a", "b"], losses, torch.tensor([[True, False], [True, False]]))
    assert history.normalised(["a", "b"])[:, 0].tolist() == [0.0, 0.0]
    assert history.normalised(["a", "b"])[:, 1].tolist() == [0.0, 0.0]  # never seen


def total_by_hand(network, data, task, weight, *, weights_detached=False):
    """The loss of the last batch, from the formulas; the histories come from all batches."""
    histories = [{} for _ in network.networks]
    for batch in data:
        image, label = batch["image"], batch["label"]
        logits = late_toy.logits_of(network, image)
        confidences = [z.exp().sum(1, keepdim=True).log() / 10 for z in logits]
        there = batch.get("present", torch.ones(image.shape[:2], dtype=torch.bool))
        fused = 0
        for z, w, has in zip(logits, confidences, there.T, strict=True):
            term = (w.detach() if weights_detached else w) * z
            fused = fused + torch.where(has.view(-1, *[1] * (z.dim() - 1)), term, torch.zeros_like(term))
        total = LOSSES[task](fused, label)
        ranks = 0
        for i, z in enumerate(logits):
            rows = late_toy.rows_with(batch, i)
            total = total + LOSSES[task](z[rows], label[rows])
            classes = label[:, 0] if label.dim() > 1 else label
            for sample in rows:
                loss = cross_entropy(z[sample : sample + 1], classes[sample : sample + 1]).item()
                histories[i].setdefault(batch["case"][sample], []).append(loss)
            means = {name: np.mean(losses) for name, losses in histories[i].items()}
            low, high = min(means.values()), max(means.values())
            scaled = [(means[batch["case"][s]] - low) / (high - low) for s in rows]
            own = [confidences[i][s].mean() for s in rows]
            for n in range(len(rows)):
                after = [m % len(rows) for m in range(n + 1, n + len(rows))]
                others = [m for m in after if batch["case"][rows[m]] != batch["case"][rows[n]]]
                other = others[0] if others else n
                margin, sign = abs(scaled[n] - scaled[other]), np.sign(scaled[other] - scaled[n])
                ranks = ranks + torch.relu(margin - sign * (own[n] - own[other])) / len(rows)
        total = total + weight * ranks
    return total, ranks.item()


@pytest.mark.parametrize("weight", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("data_are", ["complete", "lacking", "slices"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_loss_and_gradients_are_the_formulas(modalities, task, data_are, weight):
    data = batches(task, 3, modalities=modalities, dtype=torch.float64)
    if data_are == "lacking":
        late_toy.lacking(data, ABSENT[modalities])
    if data_are == "slices":  # three in a row of one case
        for batch in data:
            batch["case"] = [batch["case"][0]] * 3 + batch["case"][3:]
            assert len(set(batch["case"])) > 1
    network = network_of(task, "energy", modalities, dtype=torch.float64)
    method = QMF(network, metric_of(task), rank_weight=weight)
    found, row = late_toy.gradients_of_one_step(network, data, method, task=task)
    total, ranks = total_by_hand(network, data, task, weight)
    assert row["loss"] == pytest.approx(total.item(), rel=1e-9)
    assert row["loss/rank"] == pytest.approx(ranks, rel=1e-9)
    assert ranks > 0
    late_toy.assert_gradients(found, late_toy.by_autograd(network, total))
    parts = row["loss/task"] + sum(row[f"loss/{m}"] for m in network.modalities) + weight * row["loss/rank"]
    assert row["loss"] == pytest.approx(parts, rel=1e-9)
    # the weights are differentiated: another gradient comes out where they are constants
    constant, _ = total_by_hand(network, data, task, weight, weights_detached=True)
    other = late_toy.by_autograd(network, constant)
    assert any((other[name] - gradient).abs().max() > 1e-4 for name, gradient in found.items())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("", []),
        ("a", [0]),
        ("aaa", [0, 1, 2]),
        ("abc", [1, 2, 0]),
        ("aaabbb", [3, 3, 3, 0, 0, 0]),
        ("aabca", [2, 2, 3, 4, 2]),
    ],
)
def test_partners_are_of_another_case(names, expected):
    assert next_of_another(list(names)) == expected


@pytest.mark.parametrize("task", TASKS)
def test_the_first_step_and_a_batch_of_one_are_numbers(task):
    for size in (1, 4):
        data = batches(task, 2, modalities=2, batch=size)
        network = network_of(task, "energy", 2)
        engine = trainer(network, data, QMF(network, metric_of(task)), task=task)
        engine.run()
        assert all(np.isfinite(list(row.values())).all() for row in engine.rows)
        assert all((row["loss/rank"] == 0) == (size == 1) for row in engine.rows)


def test_confidence_is_logged_over_the_samples_that_are_there():
    data = late_toy.lacking(batches("classification", 1, modalities=2), [(0, 1), (2, 1)])
    network = network_of("classification", "energy", 2)
    _, row = late_toy.gradients_of_one_step(
        network, data, QMF(network, metric_of("classification")), task="classification"
    )
    for i, m in enumerate(network.modalities):
        (z,) = (late_toy.logits_of(network, data[0]["image"])[i],)
        rows = late_toy.rows_with(data[0], i)
        assert row[f"confidence/{m}"] == pytest.approx((z[rows].exp().sum(1).log() / 10).mean().item(), rel=1e-5)


def test_ranking_brings_confidences_into_the_order_of_the_losses():
    """With a heavy weight the samples that were learnt worse end less confident than without it."""

    def order(weight):
        data = batches("classification", 1, modalities=2, batch=8, seed=3) * 200
        network = network_of("classification", "energy", 2)
        method = QMF(network, metric_of("classification"), rank_weight=weight)
        trainer(network, data, method, task="classification").run()
        with torch.no_grad():
            energies = [z.logsumexp(1) for z in late_toy.logits_of(network, data[0]["image"])]
        losses = method.history.mean()
        return [torch.corrcoef(torch.stack([e.double(), losses[:, i]]))[0, 1].item() for i, e in enumerate(energies)]

    without, ranked = order(0.0), order(5.0)
    assert max(ranked) < -0.9
    assert max(without) > -0.7


@pytest.mark.parametrize("task", TASKS)
def test_a_resumed_run_goes_on_exactly(task, tmp_path):
    def make(seed):
        network = network_of(task, "energy", 3, seed=seed)
        return network, QMF(network, metric_of(task), rank_weight=1.0)

    data = late_toy.lacking(batches(task, 3, modalities=3), ABSENT[3])
    end = late_toy.assert_resumes(make, data, 1, 3, task=task, tmp_path=tmp_path)
    history = end["method"]["history"]
    assert history["samples"] == list(dict.fromkeys(name for batch in data for name in batch["case"]))
    assert history["counts"].sum() == 3 * sum(batch["present"].sum() for batch in data)


@pytest.mark.parametrize(
    ("batch", "names"),
    [
        ({"case": ["p1", "p2"], "index": torch.tensor([5, 6])}, ["p1", "p2"]),
        ({"index": torch.tensor([5, 6])}, ["5", "6"]),
        ({"index": [7, 7]}, ["7", "7"]),
    ],
)
def test_names_of_samples(batch, names):
    assert sample_names(batch, 2) == names


def test_an_index_does_what_names_do():
    named = batches("classification", 3, modalities=2)
    places = {name: place for place, name in enumerate(sorted({n for b in named for n in b["case"]}))}
    numbered = [{k: v for k, v in b.items() if k != "case"} for b in named]
    for batch, other in zip(numbered, named, strict=True):
        batch["index"] = torch.tensor([places[name] for name in other["case"]])
    start = network_of("classification", "energy", 2)
    rows = []
    for data in (named, numbered):
        network = copy.deepcopy(start)
        engine = trainer(network, data, QMF(network, metric_of("classification")), task="classification")
        engine.run()
        rows.append(engine.rows)
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("case"), r"under 'case' \(names\) or 'index' \(integers\), found \['image', 'label'\]"),
        (lambda b: b.update(case=["a"]), "the batch names 1 samples under 'case', and has 4"),
    ],
)
def test_a_batch_that_does_not_name_its_samples_is_refused(change, message):
    data = batches("classification", 1, modalities=2)
    change(data[0])
    network = network_of("classification", "energy", 2)
    with pytest.raises(ValueError, match=message):
        trainer(network, data, QMF(network, metric_of("classification")), task="classification").run()


def test_regression_and_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match=r"one output \(regression\)"):
        network_of("regression", "energy")
    with pytest.raises(ValueError, match=r"rank_weight must not be negative, got -0\.1"):
        QMF(network_of("classification", "energy"), metric_of("classification"), rank_weight=-0.1)
    nameless = LateFusion({m: nn.Conv1d(1, 4, 1) for m in ("a", "b")}, "energy")
    with pytest.raises(ValueError, match="tells them by a network's head; Conv1d has none"):
        QMF(nameless, metric_of("classification"))
    assert toy.MODALITIES[0] in repr(QMF(network_of("classification", "energy"), metric_of("classification")))
