# SPDX-License-Identifier: Apache-2.0
"""Shapley's split and the coefficients against independent computations, and what they do to the gradients."""

from itertools import permutations

import numpy as np
import pytest
import torch
from ignite.engine import Events
from torch import nn

from monai_cggm.batches import prepare_batch
from monai_cggm.methods import ModalityDropout, UnimodalObserver
from monai_cggm.methods.agm import (
    AGM,
    lead_ratios,
    loss_sums,
    mean_losses,
    modulation_coefficients,
    shapley_weights,
)
from monai_cggm.metrics import Accuracy, NegativeMAE
from monai_cggm.networks import MultimodalSegmenter, UnimodalClassifiers, subset_masks
from tests.methods import toy
from tests.methods.toy import everything, metric

NAMES = ("flair", "t1ce", "t1", "t2", "swi", "dwi", "pd")


class Fusing(toy.MaskedNetwork):
    """The toy network, whose fusion can be run by itself."""

    def fuse(self, outputs, size, present=None):
        features = torch.stack([outputs[m] for m in self.encoders], dim=1)
        assert tuple(size) == tuple(features.shape[3:])
        if present is not None:
            features = features.masked_fill(~present[:, :, None, None, None], 0.0)
        return self.head(self.trunk(features.flatten(1, 2)))


class Vectors(nn.Module):
    """Vectors in, K numbers out: classes, or a value."""

    def __init__(self, modalities, outputs, width=6):
        super().__init__()
        self.encoders = nn.ModuleDict({m: nn.Sequential(nn.Linear(4, width), nn.Tanh()) for m in modalities})
        self.trunk = nn.Sequential(nn.Linear(width * len(modalities), width), nn.Tanh())
        self.head = nn.Linear(width, outputs)

    def forward(self, x, present=None):
        return self.fuse({m: e(x[:, i]) for i, (m, e) in enumerate(self.encoders.items())}, (), present)

    def fuse(self, outputs, size, present=None):
        assert tuple(size) == ()
        features = torch.stack([outputs[m] for m in self.encoders], dim=1)
        if present is not None:
            features = features.masked_fill(~present[:, :, None], 0.0)
        return self.head(self.trunk(features.flatten(1)))


class VectorClassifiers(nn.Module):
    def __init__(self, modalities, outputs, width=6):
        super().__init__()
        self.heads = nn.ModuleDict({m: nn.Linear(width, outputs) for m in modalities})

    def forward(self, features):
        return {m: self.heads[m](h) for m, h in features.items()}


def class_loss(logits, target):
    return nn.functional.cross_entropy(logits, target.flatten().long())


def vectors(number, modalities, task, *, batch=5, seed=0):
    random = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(number):
        label = torch.randint(0, 3, (batch,), generator=random)
        image = torch.randn(batch, modalities, 4, generator=random) + label[:, None, None]
        made.append({"image": image, "label": label if task == "classes" else label[:, None].float() / 2})
    return made


def problem(task, modalities, *, lacking=False, seed=0):
    """Network, classifiers, metric, loss and two batches of one task."""
    names = NAMES[:modalities]
    torch.manual_seed(seed)
    if task == "segmentation":
        made = Fusing(names), toy.ToyClassifiers(names), metric(), toy.cross_entropy
        data = toy.batches(2, modalities=modalities, batch=3)
    elif task == "classes":
        made = Vectors(names, 3), VectorClassifiers(names, 3), Accuracy(), class_loss
        data = vectors(2, modalities, task)
    else:
        made = Vectors(names, 1), VectorClassifiers(names, 1), NegativeMAE(), toy.l1
        data = vectors(2, modalities, task)
    if lacking:
        for batch in data:
            batch["present"] = torch.ones(len(batch["image"]), modalities, dtype=torch.bool)
            batch["present"][0, 1:] = batch["present"][2, 0] = False
    return made, data


def shares_by_hand(network, outputs, size, rows):
    """Marginal contributions, averaged over all orders in which the modalities may come in."""
    modalities = rows.shape[1]

    def value(chosen):
        mask = rows & torch.tensor([i in chosen for i in range(modalities)])
        logits = network.fuse(outputs, size, present=mask)
        return logits * mask.any(dim=1).view(-1, *[1] * (logits.ndim - 1))

    orders = list(permutations(range(modalities)))
    shares = [0] * modalities
    for order in orders:
        for place, i in enumerate(order):
            shares[i] = shares[i] + (value(order[: place + 1]) - value(order[:place])) / len(orders)
    return shares, value(range(modalities))


def score_by_hand(share, label, rows, task):
    share, label = share.detach()[rows], label[rows]
    if task == "value":
        return toy.l1(share, label).item()
    truth = label.reshape(len(label), -1)
    logits = share.reshape(*share.shape[:2], -1).double().numpy()
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    losses = [(int(truth[n, p]), -np.log(probability[n, int(truth[n, p]), p])) for n, p in np.ndindex(*truth.shape)]
    if task == "classes":
        return np.mean([loss for _, loss in losses])
    return np.mean([np.mean([v for k, v in losses if k == c]) for c in {k for k, _ in losses}])


def coefficients_by_hand(scores, means, alpha, cap=10.0):
    c = []
    for i in range(len(scores)):
        others = [k for k in range(len(scores)) if k != i]
        r = np.exp(np.mean([scores[k] for k in others]) - scores[i])
        reference = np.exp(np.mean([means[k] for k in others]) - means[i])
        c.append(np.exp(alpha * min(reference - r, cap)))
    return np.array(c)


def by_hand(network, data, loss, task, alpha, control="none", rows_of=lambda batch: batch.get("present")):
    """Gradients of the last of two batches, after the first has been counted."""
    scores = []
    for batch in data:
        image, rows = batch["image"], rows_of(batch)
        label = batch["label"]
        outputs = {m: e(image[:, i : i + 1] if image.ndim > 3 else image[:, i])
                   for i, (m, e) in enumerate(network.encoders.items())}  # fmt: skip
        rows = torch.ones(len(image), len(outputs), dtype=torch.bool) if rows is None else rows
        label = label.repeat(len(rows) // len(label), *[1] * (label.ndim - 1))
        shares, whole = shares_by_hand(network, outputs, tuple(image.shape[2:]) if image.ndim > 3 else (), rows)
        scores.append([score_by_hand(share, label, rows[:, i], task) for i, share in enumerate(shares)])
    c = coefficients_by_hand(scores[1], scores[0], alpha)
    c = {"none": c, "constant": np.full_like(c, c.mean()), "shuffled": np.roll(c, 1)}[control]
    parameters = dict(network.named_parameters())
    (delta,) = torch.autograd.grad(loss(whole, label), whole, retain_graph=True)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for factor, share in zip(c, shares, strict=True):
        parts = torch.autograd.grad(
            share, list(parameters.values()), grad_outputs=delta, retain_graph=True, allow_unused=True
        )
        for name, part in zip(parameters, parts, strict=True):
            total[name] += 0 if part is None else factor * part
    return c, scores[1], total


@pytest.mark.parametrize("modalities", [2, 3, 4, 5])
def test_the_split_against_all_orders_of_entry(modalities):
    masks = subset_masks(NAMES[:modalities])
    random = np.random.default_rng(modalities)
    game = {tuple(mask): random.normal() for mask in masks.tolist()} | {(False,) * modalities: 0.0}
    expected = np.zeros(modalities)
    orders = list(permutations(range(modalities)))
    for order in orders:
        mask = [False] * modalities
        for i in order:
            before = game[tuple(mask)]
            mask[i] = True
            expected[i] += (game[tuple(mask)] - before) / len(orders)
    values = torch.tensor([game[tuple(mask)] for mask in masks.tolist()], dtype=torch.float64)
    shares = (shapley_weights(masks) @ values).numpy()
    np.testing.assert_allclose(shares, expected, rtol=1e-12)
    assert shares.sum() == pytest.approx(game[(True,) * modalities])


@pytest.mark.parametrize("modalities", [2, 3, 4, 6])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 2.0])
def test_coefficients_against_numpy(modalities, alpha):
    random = np.random.default_rng(modalities)
    for _ in range(20):
        scores, means = random.uniform(0, 4, size=(2, modalities))
        c = modulation_coefficients(torch.tensor(scores), torch.tensor(means), alpha, cap=1.5).numpy()
        np.testing.assert_allclose(c, coefficients_by_hand(scores, means, alpha, 1.5), rtol=1e-10)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_score_that_is_no_number_does_not_stay_in_the_means(bad):
    (network, classifiers, measure, _), _ = problem("classes", 2)
    method = AGM(network, classifiers, measure, alpha=1.0)
    for scores in ([0.5, 0.1], [0.2, bad], [0.4, 0.3]):
        method._scores = torch.tensor(scores, dtype=torch.float64)
        c = method.terms(None)
    # after two scores of the first, of mean 0.35, and one of the second
    np.testing.assert_allclose(c, coefficients_by_hand([0.4, 0.3], [0.35, 0.1], 1.0), rtol=1e-10)
    np.testing.assert_allclose(method.state_dict()["totals"], [[1.1, 0.4], [3, 2]])


def test_coefficients_of_modalities_that_are_not_known():
    nan = float("nan")
    c = modulation_coefficients(torch.tensor([0.3, nan, 0.9]), torch.tensor([0.5, 0.1, 0.6]), 1.0)
    np.testing.assert_allclose(c[[0, 2]], coefficients_by_hand([0.3, 0.9], [0.5, 0.6], 1.0), rtol=1e-6)
    assert c[1] == 1
    assert modulation_coefficients(torch.tensor([0.3, nan]), torch.tensor([0.5, 0.1])).tolist() == [1, 1]
    assert modulation_coefficients(torch.tensor([0.3, 0.2]), torch.tensor([nan, nan])).tolist() == [1, 1]
    huge = modulation_coefficients(torch.tensor([0.0, 1e6]), torch.tensor([1e6, 0.0]), 1.0)
    assert huge.isfinite().all()
    assert lead_ratios(torch.tensor([1.0, 2.0, 4.0])).tolist() == pytest.approx(np.exp([2.0, 0.5, -2.5]))


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (2, 3, 2)])
@pytest.mark.parametrize("classes", [2, 5])
def test_losses_by_class_against_numpy(shape, classes):
    random = torch.Generator().manual_seed(classes)
    logits = 3 * torch.randn(3, 4, classes, *shape, generator=random)
    target = torch.randint(0, classes - 1, (4, *([1, *shape] if shape else [])), generator=random)
    there = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=torch.bool)
    task = "segmentation" if shape else "classes"
    for mask in (None, there):
        losses = mean_losses(loss_sums(logits, target, mask), by_class=bool(shape))
        for i in range(3):
            rows = torch.ones(4, dtype=torch.bool) if mask is None else mask[:, i]
            if rows.any():
                assert losses[i].item() == pytest.approx(score_by_hand(logits[i], target, rows, task), rel=1e-5)
            else:
                assert losses[i].isnan()


def test_no_probability_counts_as_less_than_the_smallest():
    sums = loss_sums(torch.tensor([[[0.0, 100.0]]]), torch.tensor([0]))
    assert mean_losses(sums, by_class=False).item() == pytest.approx(-np.log(1e-8), rel=1e-6)


@pytest.mark.parametrize("lacking", [False, True])
@pytest.mark.parametrize("modalities", [2, 3, 4])
@pytest.mark.parametrize("task", ["segmentation", "classes", "value"])
def test_the_gradient_is_the_weighted_sum_over_the_shares(task, modalities, lacking):
    (network, classifiers, measure, loss), data = problem(task, modalities, lacking=lacking)
    method = AGM(network, classifiers, measure, alpha=2.0)
    seen = toy.gradients_of_one_step(network, classifiers, data, method, loss=loss, prepare_batch=prepare_batch)
    c, scores, gradients = by_hand(network, data, loss, task, 2.0)
    assert np.ptp(c) > 1e-3
    for i, modality in enumerate(network.encoders):
        assert seen["scalars"][f"balance/{modality}"] == pytest.approx(c[i], rel=1e-4)
        assert seen["scalars"][f"share_loss/{modality}"] == pytest.approx(scores[i], rel=1e-4)
    for name, expected in gradients.items():
        torch.testing.assert_close(seen[name], expected, rtol=1e-4, atol=1e-6, msg=name)
    classifiers_losses = sum(seen["scalars"][f"loss/{m}"] for m in network.encoders)
    assert seen["loss"] == pytest.approx(seen["scalars"]["loss/task"] + classifiers_losses, rel=1e-6)


@pytest.mark.parametrize("control", ["constant", "shuffled"])
def test_controls_act_on_c(control):
    (network, classifiers, measure, loss), data = problem("segmentation", 3)
    method = AGM(network, classifiers, measure, alpha=2.0, control=control)
    seen = toy.gradients_of_one_step(network, classifiers, data, method)
    _, _, gradients = by_hand(network, data, loss, "segmentation", 2.0, control)
    for name, expected in gradients.items():
        torch.testing.assert_close(seen[name], expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("arguments", [{"alpha": 0.0}, {"magnitude": False}])
def test_without_modulation_it_is_joint_training(arguments):
    (network, classifiers, measure, _), data = problem("segmentation", 3)
    plain = toy.gradients_of_one_step(network, classifiers, data, UnimodalObserver(network, classifiers, measure))
    seen = toy.gradients_of_one_step(network, classifiers, data, AGM(network, classifiers, measure, **arguments))
    for name, _ in network.named_parameters():
        torch.testing.assert_close(seen[name], plain[name], rtol=1e-6, atol=1e-9)


def test_rows_of_dropout_are_split_among_what_each_was_predicted_from():
    """The real network, each sample fused twice: with all its modalities and with a random subset of them."""
    names = NAMES[:3]
    torch.manual_seed(0)
    encoder = {"backbone": "resnet18", "width": 4, "aspp_channels": 8, "norm": "group"}
    network = MultimodalSegmenter(names, 4, encoder=encoder, decoder_channels=8, low_reduced=4)
    classifiers = UnimodalClassifiers.for_network(network, low_reduced=4)
    data = toy.batches(2, modalities=3, batch=2, size=16)
    dropout = ModalityDropout(names, seed=1, both=True)
    masks = []
    for iteration, batch in enumerate(data, 1):
        masks.append(torch.cat([torch.ones(2, 3, dtype=torch.bool), dropout.draw(2, iteration)]))
        assert not masks[-1].all()
        batch["rows"] = masks[-1]
    method = AGM(network, classifiers, metric(), alpha=2.0)
    seen = toy.gradients_of_one_step(
        network, classifiers, [{k: v for k, v in batch.items() if k != "rows"} for batch in data], method,
        handlers=[dropout], prepare_batch=prepare_batch,
    )  # fmt: skip
    c, _, gradients = by_hand(
        network, data, toy.cross_entropy, "segmentation", 2.0, rows_of=lambda batch: batch["rows"]
    )
    assert [seen["scalars"][f"balance/{m}"] for m in names] == pytest.approx(c.tolist(), rel=1e-3)
    for name, expected in gradients.items():
        torch.testing.assert_close(seen[name], expected, rtol=1e-3, atol=1e-5, msg=name)


def test_batch_norm_and_dropout_are_left_alone():
    """The further passes change neither running statistics nor modes, and draw no random number."""
    ends = []
    for method_class in (UnimodalObserver, AGM):
        torch.manual_seed(0)
        network, classifiers = Fusing(NAMES[:3]), toy.ToyClassifiers(NAMES[:3])
        network.trunk = nn.Sequential(nn.Conv2d(9, 5, 1), nn.BatchNorm2d(5), nn.Dropout(0.3), nn.Tanh())
        network.trunk[2].eval()  # a part that a user has frozen stays so
        options = {"alpha": 0.0} if method_class is AGM else {}
        method = method_class(network, classifiers, metric(), **options)
        engine = toy.trainer(network, everything(network, classifiers), toy.batches(3, modalities=3), method, lr=0.0)
        modes = []
        engine.add_event_handler(
            Events.ITERATION_COMPLETED, lambda e, m=modes: m.append([p.training for p in e.network.modules()])
        )
        engine.run()
        ends.append((network.state_dict(), modes))
    assert ends[0][1] == ends[1][1]
    assert ends[0][0]["trunk.1.num_batches_tracked"] == 3
    for name, value in ends[0][0].items():
        assert torch.equal(ends[1][0][name], value), name


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_goes_on_exactly(stop, tmp_path):
    def made(seed=0):
        torch.manual_seed(seed)
        network, classifiers = Fusing(NAMES[:3]), toy.ToyClassifiers(NAMES[:3])
        return network, classifiers, AGM(network, classifiers, metric(), alpha=2.0)

    toy.assert_resumes(made, toy.batches(6, modalities=3), stop, tmp_path)


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        (Fusing(NAMES[:1]), {}, "AGM balances two modalities or more"),
        (Fusing(NAMES), {}, "once for each of the 127 subsets of 7 modalities"),
        (toy.ToyNetwork(NAMES[:2]), {}, r"ToyNetwork has no fuse\(outputs, size, present=mask\)"),
        (Fusing(NAMES[:2]), {"alpha": -1.0}, "alpha and cap must be at least 0, got alpha=-1.0 and cap=10.0"),
        (Fusing(NAMES[:2]), {"cap": float("nan")}, "got alpha=1.0 and cap=nan"),
        (Fusing(NAMES[:2]), {"control": "random"}, "control must be one of"),
    ],
)
def test_refuses(network, arguments, message):
    with pytest.raises(ValueError, match=message):
        AGM(network, toy.ToyClassifiers(list(network.encoders)), metric(), **arguments)
