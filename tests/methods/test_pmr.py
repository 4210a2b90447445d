# SPDX-License-Identifier: Apache-2.0
"""Prototypes, their terms and the weights against independent computations, over several epochs."""

import numpy as np
import pytest
import torch
from ignite.engine import Events
from torch import nn

from monai_cggm.batches import prepare_batch
from monai_cggm.handlers import Checkpoints
from monai_cggm.methods.pmr import (
    PMR,
    class_factors,
    class_shares,
    feature_of,
    prototype_similarity,
    rebalance_weights,
)
from monai_cggm.metrics import Accuracy, NegativeMAE
from tests.methods import toy
from tests.methods.test_agm import NAMES, VectorClassifiers, Vectors, class_loss, vectors
from tests.methods.toy import everything, metric


class Pyramid(nn.Module):
    """An encoder that returns low- and high-level features, the latter at half the resolution."""

    def __init__(self):
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh())
        self.high = nn.Conv2d(3, 4, 2, stride=2)

    def forward(self, x):
        low = self.low(x)
        return low, self.high(low)


class Pyramids(nn.Module):
    """A segmentation network that pads its image to an even size."""

    def __init__(self, modalities):
        super().__init__()
        self.encoders = nn.ModuleDict({m: Pyramid() for m in modalities})
        self.trunk = nn.Conv2d(7 * len(modalities), 5, 1)
        self.head = nn.Conv2d(5, 4, 1)

    def forward(self, x, present=None):
        height, width = x.shape[2:]
        x = nn.functional.pad(x, (0, width % 2, 0, height % 2))
        features = []
        for i, encoder in enumerate(self.encoders.values()):
            low, high = encoder(x[:, i : i + 1])
            both = torch.cat([low, nn.functional.interpolate(high, low.shape[2:])], dim=1)
            features.append(both if present is None else both * present[:, i].view(-1, 1, 1, 1))
        return self.head(self.trunk(torch.cat(features, dim=1)))[:, :, :height, :width]


class PyramidClassifiers(toy.ToyClassifiers):
    def forward(self, features, size):
        logits = super().forward({m: low for m, (low, _) in features.items()}, size)
        return {m: z[:, :, : size[0], : size[1]] for m, z in logits.items()}


def problem(task, modalities, *, lacking=False, seed=0):
    names = NAMES[:modalities]
    torch.manual_seed(seed)
    if task == "segmentation":
        made = Pyramids(names), PyramidClassifiers(names), metric(), toy.cross_entropy
        data = toy.batches(2, modalities=modalities, batch=3, size=5)
    else:
        made = Vectors(names, 3), VectorClassifiers(names, 3), Accuracy(), class_loss
        data = vectors(2, modalities, "classes")
    if lacking:
        for batch in data:
            batch["present"] = torch.ones(len(batch["image"]), modalities, dtype=torch.bool)
            batch["present"][0, 1:] = batch["present"][2, 0] = False
    return made, data


def views_by_hand(network, batch, task):
    """For each modality: features and shares of every position, in plain loops."""
    views = []
    for i, encoder in enumerate(network.encoders.values()):
        there = batch["present"][:, i] if "present" in batch else torch.ones(len(batch["label"]), dtype=torch.bool)
        features, shares = [], []
        for n in there.nonzero().flatten().tolist():
            if task == "classes":
                features.append(encoder(batch["image"][n : n + 1, i])[0])
                shares.append(np.eye(3)[batch["label"][n]])
                continue
            image = nn.functional.pad(batch["image"][n : n + 1, i : i + 1], (0, 1, 0, 1))  # 5 → 6
            high = encoder(image)[1][0]
            label = batch["label"][n, 0].numpy()
            for y, x in np.ndindex(3, 3):
                features.append(high[:, y, x])
                block = label[2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
                shares.append(np.array([(block == k).sum() / 4 for k in range(4)]))
        views.append((torch.stack(features), np.stack(shares)))
    return views


def prototypes_by_hand(network, data, task):
    sums = {}
    for batch in data:
        for i, (features, shares) in enumerate(views_by_hand(network, batch, task)):
            for h, w in zip(features.detach().double().numpy(), shares, strict=True):
                for k, share in enumerate(w):
                    total = sums.setdefault((i, k), [0.0, 0.0])
                    total[0], total[1] = total[0] + share * h, total[1] + share
    return {key: total / count for key, (total, count) in sums.items() if count > 0}


def mean_by_hand(values, shares, classes, task):
    """Mean of values[n][k], weighted by the shares: within classes and over them, or over all."""
    sums = [sum(w[k] * v[k] for v, w in zip(values, shares, strict=True)) for k in classes]
    counts = [sum(w[k] for w in shares) for k in classes]
    if task == "classes":
        return sum(sums) / sum(counts)
    means = [s / n for s, n in zip(sums, counts, strict=True) if n > 0]
    return sum(means) / len(means)


def terms_by_hand(network, batch, prototypes, task):
    """Score, cross-entropy and entropy of each modality."""
    result = []
    for i, (features, shares) in enumerate(views_by_hand(network, batch, task)):
        classes = [k for k in range(shares.shape[1]) if (i, k) in prototypes]
        logs, entropies = [], []
        for h in features:
            sims = torch.stack([-((h - torch.tensor(prototypes[i, k]).float()) ** 2).sum().sqrt() for k in classes])
            log_p = sims - sims.exp().sum().log()
            logs.append(dict(zip(classes, log_p, strict=True)))
            entropies.append(dict.fromkeys(classes, -(log_p.exp() * log_p).sum()))
        minus = [{k: -v for k, v in row.items()} for row in logs]
        chances = [{k: v.exp().item() for k, v in row.items()} for row in logs]
        result.append([mean_by_hand(v, shares, classes, task) for v in (chances, minus, entropies)])
    return result


def weights_by_hand(scores):
    beta, gamma = [], []
    for i, score in enumerate(scores):
        best = max(s for k, s in enumerate(scores) if k != i)
        beta.append(min(max(best / score - 1, 0), 1))
        gamma.append(min(max(score / best - 1, 0), 1))
    return beta, gamma


@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_weights_against_plain_python(modalities):
    random = np.random.default_rng(modalities)
    for scores in random.uniform(0.05, 1.0, size=(30, modalities)):
        beta, gamma = rebalance_weights(torch.tensor(scores))
        expected = weights_by_hand(scores.tolist())
        np.testing.assert_allclose(beta.numpy(), expected[0], atol=1e-12)
        np.testing.assert_allclose(gamma.numpy(), expected[1], atol=1e-12)
        assert (gamma > 0).sum() <= 1
    if modalities == 2:  # the paper's, with ρ = s_0 / s_1
        beta, gamma = rebalance_weights(torch.tensor([0.5, 0.4]))
        assert beta.tolist() == pytest.approx([0, 0.5 / 0.4 - 1])
        assert gamma.tolist() == pytest.approx([0.5 / 0.4 - 1, 0])


def test_weights_of_modalities_without_a_score():
    beta, gamma = rebalance_weights(torch.tensor([0.6, float("nan"), 0.4]))
    assert beta.tolist() == pytest.approx([0, 0, 0.5])
    assert gamma.tolist() == pytest.approx([0.5, 0, 0])
    for scores in ([float("nan"), 0.4], [float("nan")] * 2, [0.4, 0.4]):
        assert [w.tolist() for w in rebalance_weights(torch.tensor(scores))] == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("shape", "grid", "padded"),
    [
        ((4, 6), (2, 3), None),
        ((5, 3), (3, 2), (6, 4)),
        ((4,), (2,), None),
        ((3, 4, 5), (2, 2, 3), (4, 4, 6)),
    ],
)
def test_shares_against_counting(shape, grid, padded):
    target = torch.randint(0, 3, (2, 1, *shape))
    shares = class_shares(target, 4, grid, padded)
    step = [p // g for p, g in zip(padded or shape, grid, strict=True)]
    for place in np.ndindex(*grid):
        block = target[(slice(None), 0, *(slice(s * p, s * p + s) for s, p in zip(step, place, strict=True)))]
        for k in range(4):
            expected = (block.reshape(2, -1) == k).sum(dim=1) / np.prod(step)
            torch.testing.assert_close(shares[(slice(None), k, *place)], expected.float())
    whole = class_shares(target, 4, ())
    torch.testing.assert_close(whole[0], torch.tensor([(target[0] == k).float().mean() for k in range(4)]))


def test_similarity_and_factors_against_numpy():
    random = np.random.default_rng(0)
    h, c = random.normal(size=(40, 7)), random.normal(size=(3, 7))
    expected = -np.sqrt(((h[:, None] - c[None]) ** 2).sum(axis=2))
    np.testing.assert_allclose(prototype_similarity(torch.tensor(h), torch.tensor(c)).numpy(), expected)
    without = prototype_similarity(torch.tensor(h), torch.tensor(c), torch.tensor([True, False, True]))
    assert (without.softmax(dim=1)[:, 1] == 0).all()
    at_the_prototype = torch.zeros(1, 7, requires_grad=True)
    prototype_similarity(at_the_prototype, torch.zeros(2, 7)).sum().backward()
    assert at_the_prototype.grad.isfinite().all()
    values, counts = random.normal(size=4), np.array([3.0, 0.0, 0.5, 2.0])
    for by_class, mean in ((True, values[[0, 2, 3]].mean()), (False, (values * counts).sum() / counts.sum())):
        factors = class_factors(torch.tensor(counts), by_class=by_class).numpy()
        assert (factors * counts * values).sum() == pytest.approx(mean)


@pytest.mark.parametrize("lacking", [False, True])
@pytest.mark.parametrize("modalities", [2, 3, 4])
@pytest.mark.parametrize("task", ["segmentation", "classes"])
def test_the_second_epoch_against_plain_loops(task, modalities, lacking):
    (network, classifiers, measure, loss), data = problem(task, modalities, lacking=lacking)
    plain = toy.gradients_of_one_step(
        network, classifiers, data, PMR(network, classifiers, measure, mu=0.0, nu=0.0), loss=loss, epochs=2,
        prepare_batch=prepare_batch,
    )  # fmt: skip
    method = PMR(network, classifiers, measure, mu=0.7, nu=0.4)
    rows = []
    seen = toy.gradients_of_one_step(
        network, classifiers, data, method, loss=loss, epochs=2, prepare_batch=prepare_batch, handlers=[Rows(rows)]
    )
    assert [row["loss/prototypes"] for row in rows[:2]] == [0.0, 0.0]
    assert rows[0]["prototype_score/flair"] == 0.0
    prototypes = prototypes_by_hand(network, data, task)
    terms = terms_by_hand(network, data[-1], prototypes, task)
    beta, gamma = weights_by_hand([score for score, _, _ in terms])
    pull = 0.7 * sum(b * ce for b, (_, ce, _) in zip(beta, terms, strict=True))
    hold = 0.4 * sum(g * h for g, (_, _, h) in zip(gamma, terms, strict=True))
    assert pull > 1e-4
    assert hold > 1e-4
    scalars = seen["scalars"]
    for i, m in enumerate(network.encoders):
        assert scalars[f"prototype_score/{m}"] == pytest.approx(terms[i][0], rel=1e-4)
        assert scalars[f"prototype_weight/{m}"] == pytest.approx(beta[i], rel=1e-3, abs=1e-6)
    assert scalars["loss/prototypes"] == pytest.approx(pull.item(), rel=1e-3)
    assert scalars["loss/prototype_entropy"] == pytest.approx(-hold.item(), rel=1e-3)
    assert seen["loss"] == pytest.approx(plain["loss"] + pull.item() - hold.item(), rel=1e-4)
    network.zero_grad()
    (pull - hold).backward()
    for name, parameter in network.named_parameters():
        added = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(seen[name], plain[name] + added, rtol=1e-3, atol=1e-6, msg=name)
        assert name.startswith("encoders") or not added.any()


class Rows:
    """Keep the scalars of every iteration."""

    def __init__(self, rows):
        self.rows = rows

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: self.rows.append(e.state.scalars))


def test_prototypes_are_averaged_over_epochs_and_absent_classes_keep_theirs():
    (network, classifiers, measure, _), _ = problem("classes", 2)
    method = PMR(network, classifiers, measure, momentum=0.25)
    first, second = torch.randn(4, 6), torch.randn(2, 6)
    method._collect("flair", first[:3], torch.eye(3)[[0, 0, 1]])
    method._collect("flair", first[3:], torch.eye(3)[[1]])
    method._renew(None)
    assert method.known["flair"].tolist() == [True, True, False]
    means = torch.stack([first[:2].mean(dim=0), first[2:].mean(dim=0), torch.zeros(6)])
    torch.testing.assert_close(method.prototypes["flair"], means)
    method._collect("flair", second, torch.eye(3)[[1, 2]])
    method._renew(None)
    assert method.known["flair"].tolist() == [True, True, True]
    expected = torch.stack([means[0], 0.25 * means[1] + 0.75 * second[0], second[1]])
    torch.testing.assert_close(method.prototypes["flair"], expected)


def test_a_class_without_a_prototype_counts_nothing():
    """Samples of it change neither the loss nor the scores of the others."""
    (network, classifiers, measure, loss), data = problem("classes", 3)
    few = [{k: v[batch["label"] < 2] for k, v in batch.items()} for batch in data]
    results = []
    for last in (data[-1], few[-1]):
        method = PMR(network, classifiers, measure)
        toy.gradients_of_one_step(network, classifiers, few, method, loss=loss)
        assert method.known["flair"].tolist() == [True, True, False]
        second = PMR(network, classifiers, measure)
        second.load_state_dict(method.state_dict())
        results.append(toy.gradients_of_one_step(network, classifiers, [last], second, loss=loss)["scalars"])
    assert (data[-1]["label"] == 2).any()
    for key in (f"{group}/{m}" for group in ("prototype_score", "prototype_weight") for m in NAMES[:3]):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-5)
    assert results[0]["loss/prototypes"] == pytest.approx(results[1]["loss/prototypes"], rel=1e-5)


def test_the_entropy_term_ends():
    (network, classifiers, measure, loss), data = problem("classes", 2)
    rows = []
    method = PMR(network, classifiers, measure, entropy_epochs=2)
    toy.gradients_of_one_step(network, classifiers, data, method, loss=loss, epochs=4, handlers=[Rows(rows)])
    assert [row["loss/prototype_entropy"] != 0 for row in rows] == [False] * 2 + [True] * 2 + [False] * 4
    assert all(row["loss/prototypes"] > 0 for row in rows[2:])


def test_controls_act_on_the_weights():
    weights = {}
    for control in ("none", "constant", "shuffled"):
        (network, classifiers, measure, loss), data = problem("classes", 3)
        method = PMR(network, classifiers, measure, control=control)
        seen = toy.gradients_of_one_step(network, classifiers, data, method, loss=loss, epochs=2)
        weights[control] = [seen["scalars"][f"prototype_weight/{m}"] for m in NAMES[:3]]
    assert max(weights["none"]) > 1e-3
    assert weights["constant"] == pytest.approx([np.mean(weights["none"])] * 3)
    assert weights["shuffled"] == pytest.approx(np.roll(weights["none"], 1).tolist())


@pytest.mark.parametrize("task", ["segmentation", "classes"])
def test_a_resumed_run_goes_on_exactly(task, tmp_path):
    def part(epochs, folder, *, resume=False, seed=0):
        (network, classifiers, measure, loss), data = problem(task, 3, seed=seed)
        method = PMR(network, classifiers, measure)
        rows = []
        checkpoints = Checkpoints(folder, {"n": network, "c": classifiers, "m": method}, resume=resume)
        engine = toy.trainer(
            network, everything(network, classifiers), data, handlers=[checkpoints, method, Rows(rows)], loss=loss,
            epochs=epochs,
        )  # fmt: skip
        engine.run()
        return rows, network.state_dict()

    whole, weights = part(4, tmp_path / "whole")
    before, _ = part(2, tmp_path / "parts")
    after, resumed = part(4, tmp_path / "parts", resume=True, seed=8)
    assert before + after == whole
    assert whole[-1]["loss/prototypes"] > 0
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())


def test_an_encoder_may_say_what_stands_for_its_output():
    class Sequence(nn.Module):
        def feature_of(self, output):
            sequence, padding = output
            return (sequence * ~padding[..., None]).sum(dim=1) / (~padding).sum(dim=1, keepdim=True)

    sequence, padding = torch.tensor([[[1.0], [3.0], [50.0]]]), torch.tensor([[False, False, True]])
    assert feature_of(Sequence(), (sequence, padding)).tolist() == [[2.0]]
    assert feature_of(nn.Identity(), sequence) is sequence
    with pytest.raises(TypeError, match=r"Identity returns tuple, .* feature_of\(output\)"):
        feature_of(nn.Identity(), (sequence, padding))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mu": -1.0}, "mu and nu must be at least 0, got mu=-1.0 and nu=0.1"),
        ({"nu": float("nan")}, "got mu=1.0 and nu=nan"),
        ({"entropy_epochs": -1}, "entropy_epochs must be at least 0, got -1"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"control": "random"}, "control must be one of"),
    ],
)
def test_wrong_numbers_are_refused(arguments, message):
    (network, classifiers, measure, _), _ = problem("classes", 2)
    with pytest.raises(ValueError, match=message):
        PMR(network, classifiers, measure, **arguments)


def test_refuses_regression_and_one_modality():
    with pytest.raises(ValueError, match="prototype of each class, and the network has one output"):
        PMR(Vectors(NAMES[:2], 1), VectorClassifiers(NAMES[:2], 1), NegativeMAE())
    with pytest.raises(ValueError, match="PMR balances two modalities or more"):
        PMR(Vectors(NAMES[:1], 3), VectorClassifiers(NAMES[:1], 3), Accuracy())
