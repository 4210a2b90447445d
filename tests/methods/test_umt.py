# SPDX-License-Identifier: Apache-2.0
"""The distance to frozen teachers against NumPy, and what it does to the encoders."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from monai_cggm.batches import prepare_batch
from monai_cggm.handlers import Checkpoints
from monai_cggm.methods import UnimodalObserver
from monai_cggm.methods.umt import UMT, feature_distance
from tests.methods import test_agm, test_pmr, toy
from tests.methods.test_agm import NAMES
from tests.methods.test_pmr import Rows
from tests.methods.toy import everything, metric


def problem(task, modalities, **options):
    """The networks of the other tests; for segmentation with encoders that return two tensors."""
    made = test_pmr if task == "segmentation" else test_agm
    return made.problem(task, modalities, **options)


def teachers_of(network, seed=5):
    """Encoders like the network's own, of other weights."""
    torch.manual_seed(seed)
    teachers = copy.deepcopy(dict(network.encoders.items()))
    for parameter in (p for teacher in teachers.values() for p in teacher.parameters()):
        parameter.data = torch.randn_like(parameter)
    return teachers


@pytest.mark.parametrize("shapes", [[(4, 3)], [(4, 2, 5, 5), (4, 7, 2, 2)], [(4, 3, 2, 2, 2), (4, 1), (4, 6)]])
def test_distance_against_numpy(shapes):
    random = np.random.default_rng(0)
    ours, theirs = ([random.normal(size=shape) for shape in shapes] for _ in range(2))
    rows = [0, 3]

    def expected(chosen):
        return np.mean([np.mean((a[chosen] - b[chosen]) ** 2) for a, b in zip(ours, theirs, strict=True)])

    # numbers that are no features are passed over
    student, teacher = ([*map(torch.tensor, v), torch.ones(4, 9, dtype=torch.bool)] for v in (ours, theirs))
    assert feature_distance(tuple(student), teacher).item() == pytest.approx(expected(slice(None)))
    chosen = feature_distance({"x": student}, {"x": teacher}, torch.tensor(rows))
    assert chosen.item() == pytest.approx(expected(rows))
    assert feature_distance(student, teacher, torch.tensor([], dtype=torch.long)).item() == 0.0


def test_distance_of_half_precision_is_taken_in_full():
    assert feature_distance(torch.full((1, 4), 300.0).half(), torch.zeros(1, 4).half()).item() == 90000.0


@pytest.mark.parametrize("lacking", [False, True])
@pytest.mark.parametrize("modalities", [2, 3, 4])
@pytest.mark.parametrize("task", ["segmentation", "classes", "value"])
def test_the_gradient_of_each_encoder(task, modalities, lacking):
    (network, classifiers, measure, loss), data = problem(task, modalities, lacking=lacking)
    teachers = teachers_of(network)
    given = {"loss": loss, "prepare_batch": prepare_batch}
    observer = UnimodalObserver(network, classifiers, measure)
    plain = toy.gradients_of_one_step(network, classifiers, data, observer, **given)
    method = UMT(network, classifiers, measure, teachers=teachers, weight=0.3)
    seen = toy.gradients_of_one_step(network, classifiers, data, method, **given)
    batch, total = data[-1], 0.0
    for i, (name, encoder) in enumerate(network.encoders.items()):
        image = batch["image"][:, i] if task != "segmentation" else batch["image"][:, i : i + 1]
        image = image if task != "segmentation" else nn.functional.pad(image, (0, 1, 0, 1))
        image = image if "present" not in batch else image[batch["present"][:, i]]
        ours, theirs = encoder(image), teachers[name](image)
        pairs = zip(*((v if isinstance(v, tuple) else (v,)) for v in (ours, theirs)), strict=True)
        distance = torch.stack([((a - b) ** 2).mean() for a, b in pairs]).mean()
        assert seen["scalars"][f"teacher_distance/{name}"] == pytest.approx(distance.item(), rel=1e-5)
        total = total + 0.3 * distance
    assert seen["scalars"]["loss/teachers"] == pytest.approx(total.item(), rel=1e-5)
    assert seen["loss"] == pytest.approx(plain["loss"] + total.item(), rel=1e-5)
    network.zero_grad()
    total.backward()
    for name, parameter in network.named_parameters():
        added = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(seen[name], plain[name] + added, rtol=1e-4, atol=1e-6, msg=name)
        assert name.startswith("encoders") == bool(added.any())


def test_teachers_stay_as_they_are_and_outside_of_every_state():
    """They are in evaluation mode even where a network holds batch norm, and no checkpoint knows them."""
    torch.manual_seed(0)
    network, classifiers = toy.ToyNetwork(NAMES[:2]), toy.ToyClassifiers(NAMES[:2])
    for name in network.encoders:
        network.encoders[name].append(nn.BatchNorm2d(3))
    teachers = {m: e.train() for m, e in teachers_of(network).items()}
    before = copy.deepcopy({m: e.state_dict() for m, e in teachers.items()})
    method = UMT(network, classifiers, metric(), teachers=teachers)
    engine = toy.trainer(network, everything(network, classifiers), toy.batches(3, modalities=2), method)
    engine.run()
    for name, teacher in teachers.items():
        assert not teacher.training
        assert not any(p.requires_grad for p in teacher.parameters())
        assert all(torch.equal(value, before[name][key]) for key, value in teacher.state_dict().items())
    assert set(method.state_dict()) == {"modalities", "epsilon"}
    assert not {id(p) for t in teachers.values() for p in t.parameters()} & {id(p) for p in network.parameters()}


def test_a_student_comes_close_to_its_teachers():
    (network, classifiers, measure, loss), data = problem("classes", 3)
    rows = []
    method = UMT(network, classifiers, measure, teachers=teachers_of(network), weight=1.0)
    engine = toy.trainer(
        network, everything(network, classifiers), data, method, handlers=[Rows(rows)], loss=loss, epochs=150, lr=0.5
    )
    engine.run()
    for name in NAMES[:3]:
        assert rows[-1][f"teacher_distance/{name}"] < 0.4 * rows[0][f"teacher_distance/{name}"]


def test_teachers_may_be_loaded_when_the_run_starts():
    (network, classifiers, measure, loss), data = problem("classes", 2)
    calls = []

    def load():
        calls.append(1)
        return teachers_of(network)

    method = UMT(network, classifiers, measure, teachers=load)
    assert not calls
    seen = [toy.gradients_of_one_step(network, classifiers, data, method, loss=loss) for _ in range(2)]
    assert len(calls) == 1
    direct = UMT(network, classifiers, measure, teachers=teachers_of(network))
    expected = toy.gradients_of_one_step(network, classifiers, data, direct, loss=loss)
    assert seen[0]["loss"] == seen[1]["loss"] == expected["loss"]


def test_a_resumed_run_goes_on_exactly(tmp_path):
    def part(epochs, folder, *, resume=False, seed=0):
        (network, classifiers, measure, loss), data = problem("classes", 3, seed=seed)
        teachers = teachers_of(network)
        method = UMT(network, classifiers, measure, teachers=lambda: teachers)
        rows = []
        checkpoints = Checkpoints(folder, {"n": network, "c": classifiers, "m": method}, resume=resume)
        toy.trainer(
            network, everything(network, classifiers), data, handlers=[checkpoints, method, Rows(rows)], loss=loss,
            epochs=epochs,
        ).run()  # fmt: skip
        return rows, network.state_dict()

    whole, weights = part(3, tmp_path / "whole")
    before, _ = part(1, tmp_path / "parts")
    after, resumed = part(3, tmp_path / "parts", resume=True, seed=8)
    assert before + after == whole
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())


def test_refuses():
    (network, classifiers, measure, loss), data = problem("classes", 2)
    teachers = teachers_of(network)
    for arguments, message in [
        ({"teachers": teachers, "weight": -1.0}, "weight must be at least 0, got -1.0"),
        ({"teachers": None}, "teachers must be one encoder a modality, or what returns them, got None"),
        ({"teachers": {"flair": teachers["flair"]}}, r"teachers are of \['flair'\], the network has"),
        ({"teachers": dict(network.encoders.items())}, "teacher of 'flair' shares a parameter with the network"),
    ]:
        with pytest.raises(ValueError, match=message):
            UMT(network, classifiers, measure, **arguments)
    method = UMT(network, classifiers, measure, teachers=lambda: {"flair": teachers["flair"]})
    with pytest.raises(ValueError, match=r"teachers are of \['flair'\]"):
        toy.gradients_of_one_step(network, classifiers, data, method, loss=loss)
    method = UMT(network, classifiers, measure, teachers=teachers | {"t1ce": nn.Linear(4, 3)})
    with pytest.raises(ValueError, match=r"teacher of 't1ce' is another network .*\[\(5, 6\)\], .* \[\(5, 3\)\]"):
        toy.gradients_of_one_step(network, classifiers, data, method, loss=loss)
