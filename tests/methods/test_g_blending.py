# SPDX-License-Identifier: Apache-2.0
"""Weights from losses against NumPy, how the losses are measured, and what the weights do to the gradients."""

import numpy as np
import pytest
import torch
from torch import nn

from monai_cggm.batches import prepare_batch
from monai_cggm.errors import DataError
from monai_cggm.handlers import Checkpoints
from monai_cggm.methods import AuxiliaryLosses, UnimodalObserver
from monai_cggm.methods.g_blending import GBlending, blending_weights, measure_losses
from monai_cggm.metrics import Accuracy, NegativeMAE
from tests.methods import toy
from tests.methods.test_agm import NAMES, VectorClassifiers, Vectors, class_loss, vectors
from tests.methods.test_pmr import Rows
from tests.methods.toy import everything, metric


def weights_by_hand(train_before, train_after, validation_before, validation_after, floor=0.05):
    gains = [b - a for b, a in zip(validation_before, validation_after, strict=True)]
    if max(gains) <= 0:
        return np.full(len(gains), 1 / len(gains))
    weights = []
    for k, gain in enumerate(gains):
        over = (validation_after[k] - train_after[k]) - (validation_before[k] - train_before[k])
        weights.append(max(gain, 0) / max(over, floor * max(gains)) ** 2)
    return np.array(weights) / sum(weights)


@pytest.mark.parametrize("networks", [3, 4, 5])
@pytest.mark.parametrize("floor", [0.01, 0.05, 0.5])
def test_weights_against_numpy(networks, floor):
    random = np.random.default_rng(networks)
    for _ in range(30):
        losses = random.uniform(0, 2, size=(4, networks))
        weights = blending_weights(*map(torch.tensor, losses), floor).numpy()
        np.testing.assert_allclose(weights, weights_by_hand(*losses, floor), rtol=1e-10)
        assert weights.sum() == pytest.approx(1.0)
        assert (weights >= 0).all()


@pytest.mark.parametrize(
    ("train_after", "validation_after", "expected"),
    [
        ([0.2, 0.4], [0.6, 0.6], [0.4 / 0.16, 0.4 / 0.04]),  # gained alike, overfitted 0.4 and 0.2
        ([0.2, 0.2], [0.6, 1.1], [1.0, 0.0]),  # the second got worse
        ([0.5, 0.2], [0.5, 0.5], [0.5 / 0.025**2, 0.5 / 0.09]),  # the first did not overfit: the floor
        ([0.9, 0.9], [0.5, 0.8], [0.5, 0.2]),  # neither did: as their gains
        ([1.0, 1.0], [1.2, 1.3], [1.0, 1.0]),  # none got better
    ],
)
def test_weights_by_hand(train_after, validation_after, expected):
    weights = blending_weights(torch.ones(2), torch.tensor(train_after), torch.ones(2), torch.tensor(validation_after))
    np.testing.assert_allclose(weights.numpy(), np.array(expected) / sum(expected), rtol=1e-5)


def test_equal_weights_come_with_a_warning(caplog):
    blending_weights(torch.ones(3), torch.zeros(3), torch.ones(3), torch.ones(3))
    assert "no network got better on validation cases; all losses count alike" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([torch.ones(2)] * 3 + [torch.ones(3)], r"must be \(K,\) alike, got shapes \[\(2,\), \(2,\), \(2,\), \(3,\)\]"),
        ([torch.tensor([1.0, float("nan")])] * 4, "must be numbers, got"),
        ([torch.ones(2)] * 4 + [0.0], "floor must be positive, got 0.0"),
    ],
)
def test_refuses_losses(arguments, message):
    with pytest.raises(ValueError, match=message):
        blending_weights(*arguments)


def test_a_loss_is_the_mean_over_samples_in_evaluation_mode():
    network = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.9))
    x, y = torch.randn(7, 3), torch.randn(7, 1)
    expected = (network[0](x) - y).abs().mean().item()
    for sizes in ([7], [4, 3], [1] * 7, [6, 1]):
        batches = [(a, b, None) for a, b in zip(x.split(sizes), y.split(sizes), strict=True)]
        assert measure_losses(network, batches, nn.functional.l1_loss).item() == pytest.approx(expected, rel=1e-6)
    assert network.training
    with pytest.raises(ValueError, match="no sample"):
        measure_losses(network, [], nn.functional.l1_loss)


# ------------------------------------------------------------------ the method


def parts_of(task, modalities):
    """What makes networks and classifiers of any modalities, the metric and the loss."""
    if task == "segmentation":
        return lambda m: toy.MaskedNetwork(m), lambda m: toy.ToyClassifiers(m), metric(), toy.cross_entropy
    outputs, measure = (3, Accuracy()) if task == "classes" else (1, NegativeMAE())
    loss = class_loss if task == "classes" else toy.l1
    return lambda m: Vectors(m, outputs), lambda m: VectorClassifiers(m, outputs), measure, loss


def data_of(task, modalities, number, seed, *, lacking=False):
    if task == "segmentation":
        data = toy.batches(number, modalities=modalities, batch=3, seed=seed)
    else:
        data = vectors(number, modalities, task, seed=seed)
    if lacking:
        for batch in data:
            batch["present"] = torch.ones(len(batch["image"]), modalities, dtype=torch.bool)
            batch["present"][0, 1:] = batch["present"][2, 0] = False
    return data


def trained_apart(folder, build, names):
    """Run folders with weights that are better than those of a fresh network, if only by chance."""
    for seed, name in enumerate((*names, "joint"), 40):
        torch.manual_seed(seed)
        network = build(list(names) if name == "joint" else [name])
        (folder / name).mkdir(parents=True)
        torch.save({"model": network.state_dict(), "epoch": 1}, folder / name / "model.pt")
    return f"{folder}/{{modality}}"


def losses_by_hand(build, runs, loss, loaders, names, seed):
    """Losses (train before, train after, validation before, validation after), one column a network."""
    columns = []
    for name in (*names, "joint"):
        torch.manual_seed(seed)
        network = build(list(names) if name == "joint" else [name]).eval()
        column = []
        for state in (None, torch.load(runs.replace("{modality}", name) + "/model.pt")["model"]):
            if state is not None:
                network.load_state_dict(state)
            for part in ("train", "validation"):
                total = count = 0
                for batch in loaders[part]:
                    image, label, present = batch["image"], batch["label"], batch.get("present")
                    if name != "joint":
                        i = names.index(name)
                        rows = slice(None) if present is None else present[:, i]
                        image, label = image[rows][:, i : i + 1], label[rows]
                        prediction = network(image)
                    else:
                        prediction = network(image, present=present)
                    total += loss(prediction, label).item() * len(label)
                    count += len(label)
                column.append(total / count)
        columns.append([column[0], column[2], column[1], column[3]])
    return np.array(columns).T


@pytest.mark.parametrize("lacking", [False, True])
@pytest.mark.parametrize("modalities", [2, 3, 4])
@pytest.mark.parametrize("task", ["segmentation", "classes", "value"])
def test_weights_and_gradients(task, modalities, lacking, tmp_path):
    names = NAMES[:modalities]
    build, classifiers_of, measure, loss = parts_of(task, modalities)
    runs = trained_apart(tmp_path, build, names)
    loaders = {
        "train": data_of(task, modalities, 3, 1, lacking=lacking),
        "validation": data_of(task, modalities, 2, 2, lacking=lacking),
    }
    expected = weights_by_hand(*losses_by_hand(build, runs, loss, loaders, names, seed=11))
    torch.manual_seed(0)
    network, classifiers = build(names), classifiers_of(names)
    data = data_of(task, modalities, 1, 3, lacking=lacking)
    given = {"loss": loss, "prepare_batch": prepare_batch}
    method = GBlending(network, classifiers, measure, runs=runs, build=build, loaders=lambda: loaders, seed=11)
    assert method.weights is None
    seen = toy.gradients_of_one_step(network, classifiers, data, method, **given)
    np.testing.assert_allclose(method.weights.numpy(), expected, rtol=1e-4)
    weights = dict(zip((*names, "fusion"), expected, strict=True))
    for name, weight in weights.items():
        assert seen["scalars"][f"blending/{name}"] == pytest.approx(weight, rel=1e-4)
    joint = toy.gradients_of_one_step(
        network, classifiers, data, UnimodalObserver(network, classifiers, measure), **given
    )
    auxiliary = UnimodalObserver(network, classifiers, measure)
    both = toy.gradients_of_one_step(
        network, classifiers, data, auxiliary, handlers=[AuxiliaryLosses(auxiliary, 1.0)], **given
    )
    for name, _ in network.named_parameters():
        modality = name.split(".")[1] if name.startswith("encoders") else None
        own = 0 if modality is None else weights[modality] * (both[name] - joint[name])
        torch.testing.assert_close(seen[name], weights["fusion"] * joint[name] + own, rtol=1e-4, atol=1e-6, msg=name)
    for name, _ in classifiers.named_parameters():
        torch.testing.assert_close(seen[f"classifiers.{name}"], joint[f"classifiers.{name}"])


def example(tmp_path, *, seed=0, loaders=None, runs=None):
    build, classifiers_of, measure, loss = parts_of("classes", 3)
    names = NAMES[:3]
    if runs is None:
        runs = trained_apart(tmp_path / "runs", build, names)
    torch.manual_seed(seed)
    network, classifiers = build(names), classifiers_of(names)
    if loaders is None:
        loaders = {"train": data_of("classes", 3, 2, 1), "validation": data_of("classes", 3, 2, 2)}
    method = GBlending(network, classifiers, measure, runs=runs, build=build, loaders=loaders)
    return network, classifiers, method, loss, runs


def test_a_resumed_run_keeps_its_weights_and_goes_on_exactly(tmp_path):
    runs = trained_apart(tmp_path / "runs", parts_of("classes", 3)[0], NAMES[:3])

    def part(epochs, folder, *, resume=False, seed=0, loaders=None):
        network, classifiers, method, loss, _ = example(tmp_path, seed=seed, runs=runs, loaders=loaders)
        rows = []
        checkpoints = Checkpoints(folder, {"n": network, "c": classifiers, "m": method}, resume=resume)
        toy.trainer(
            network, everything(network, classifiers), data_of("classes", 3, 3, 5),
            handlers=[checkpoints, method, Rows(rows)], loss=loss, epochs=epochs,
        ).run()  # fmt: skip
        return rows, network.state_dict()

    def never():
        raise AssertionError("a resumed run measures again")

    whole, weights = part(3, tmp_path / "whole")
    before, _ = part(1, tmp_path / "parts")
    after, resumed = part(3, tmp_path / "parts", resume=True, seed=8, loaders=never)
    assert before + after == whole
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())


def test_measuring_draws_none_of_the_run_s_random_numbers(tmp_path):
    network, classifiers, method, loss, _ = example(tmp_path)
    engine = toy.trainer(network, everything(network, classifiers), data_of("classes", 3, 1, 5), loss=loss)
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    method._start(engine)
    assert torch.equal(torch.rand(3), expected)
    method._finish(engine)


def test_an_untrained_network_s_batch_norm_is_settled_first(tmp_path):
    """Its loss before training is that of the statistics of the training cases, not of mean 0 and variance 1."""

    def build(modalities):
        network = Vectors(modalities, 3)
        network.trunk.append(nn.BatchNorm1d(6, momentum=0.3))
        return network

    runs = trained_apart(tmp_path, build, NAMES[:2])
    torch.manual_seed(0)
    network, classifiers = build(NAMES[:2]), VectorClassifiers(NAMES[:2], 3)
    data = data_of("classes", 2, 3, 1)
    method = GBlending(
        network, classifiers, Accuracy(), runs=runs, build=build, loaders={"train": data, "validation": data}, seed=5
    )
    engine = toy.trainer(network, everything(network, classifiers), data, loss=class_loss)
    torch.manual_seed(5)
    fresh = build(["t1ce"])
    loss, _ = method._losses(engine, method.loaders, "t1ce", fresh, fresh=True)
    norm = fresh.trunk[-1]
    inputs = [fresh.trunk[:-1](fresh.encoders["t1ce"](batch["image"][:, 1])) for batch in data]
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(dim=0) for x in inputs]).mean(dim=0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var(dim=0) for x in inputs]).mean(dim=0))
    assert norm.momentum == 0.3
    fresh.eval()
    expected = np.mean([class_loss(fresh(batch["image"][:, 1:2]), batch["label"]).item() for batch in data])
    assert loss == pytest.approx(expected, rel=1e-5)


def test_refuses(tmp_path):
    network, classifiers, method, loss, runs = example(tmp_path)
    data = data_of("classes", 3, 1, 5)
    given = {"runs": runs, "build": method.build, "loaders": method.loaders}
    for arguments, message in [
        ({"runs": "runs"}, r"a path with \{modality\} in it"),
        ({"floor": 0.0}, "floor must be positive, got 0.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            GBlending(network, classifiers, Accuracy(), **{**given, **arguments})
    with pytest.raises(ValueError, match="GBlending weighs two modalities or more"):
        GBlending(Vectors(NAMES[:1], 3), VectorClassifiers(NAMES[:1], 3), Accuracy(), **given)
    wrong = GBlending(network, classifiers, Accuracy(), **{**given, "loaders": {"train": []}})
    with pytest.raises(ValueError, match=r"loaders must have 'train' and 'validation', got \['train'\]"):
        toy.gradients_of_one_step(network, classifiers, data, wrong, loss=loss)
    nowhere = GBlending(network, classifiers, Accuracy(), **{**given, "runs": str(tmp_path / "no_{modality}")})
    with pytest.raises(DataError, match=r"4 problems:\n  modality flair: there is no model.pt"):
        toy.gradients_of_one_step(network, classifiers, data, nowhere, loss=loss)
    with pytest.raises(ValueError, match="GBlending and AuxiliaryLosses both set"):
        AuxiliaryLosses(method, 0.5)
