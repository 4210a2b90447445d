# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from torch import nn

from monai_cggm.handlers import GradientRecorder
from monai_cggm.methods import CGGM, UnimodalObserver
from monai_cggm.metrics import RegionDice
from tests.handlers import training
from tests.methods import toy

REGIONS = RegionDice({"WT": [1, 2, 3], "ET": [3]}, 4)


def parts(modalities, *, norm=False, width=5, method=CGGM):
    torch.manual_seed(3)
    network = toy.ToyNetwork(modalities, width=width)
    if norm:
        network.trunk.extend([nn.BatchNorm2d(width), nn.Dropout(0.3)])
    classifiers = toy.ToyClassifiers(modalities, width=width)
    return network, classifiers, method(network, classifiers, REGIONS)


def run(tmp_path, modalities, *, every=1, steps=3, norm=False, width=5, handlers=(), method=CGGM, **options):
    network, classifiers, observer = parts(modalities, norm=norm, width=width, method=method)
    recorder = GradientRecorder(observer, tmp_path, every=every, **options)
    data = toy.batches(steps, modalities=len(modalities))
    parameters = [*network.parameters(), *classifiers.parameters()]
    trainer = toy.trainer(network, parameters, data, observer, handlers=[recorder, *(h(observer) for h in handlers)])
    trainer.run()
    return network


def by_hand(network, batch, modality):
    """Encode, put zeros in the place of all but one modality, fuse, differentiate."""
    features = [e(batch["image"][:, i : i + 1]) for i, e in enumerate(network.encoders.values())]
    alone = [h if m == modality else 0 * h for m, h in zip(network.encoders, features, strict=True)]
    loss = toy.cross_entropy(network.head(network.trunk(torch.cat(alone, dim=1))), batch["label"])
    return torch.autograd.grad(loss, network.head.weight)[0].flatten().detach().numpy()


@pytest.mark.parametrize(("modalities", "width"), [(("flair", "t1"), 5), (toy.MODALITIES, 3)])
def test_gradients_are_those_of_one_modality_alone(tmp_path, modalities, width):
    expected, unimodal = [], []

    class Look:
        def __init__(self, method):
            self.method = method

        def attach(self, engine):
            engine.add_event_handler(Events.ITERATION_STARTED, self)
            engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self.note)

        def __call__(self, engine):
            network = self.method.network
            expected.append([by_hand(network, engine.state.batch, m) for m in modalities])

        def note(self, engine):
            unimodal.append(self.method.step.unimodal_gradients.clone().numpy())

    run(tmp_path, modalities, width=width, handlers=[Look])
    with np.load(tmp_path / "gradients.npz") as stored:
        assert stored["iteration"].tolist() == [1, 2, 3]
        assert stored["modalities"].tolist() == list(modalities)
        assert int(stored["size"]) == 4 * width
        np.testing.assert_allclose(stored["fusion"], expected, rtol=1e-4, atol=1e-7)
        np.testing.assert_array_equal(stored["classifier"], unimodal)


def test_training_does_not_notice(tmp_path):
    watched = run(tmp_path, ("flair", "t1"), norm=True, method=UnimodalObserver)
    alone = run(tmp_path, ("flair", "t1"), norm=True, every=None, method=UnimodalObserver)
    assert (tmp_path / "gradients.npz").is_file()
    for name, value in alone.state_dict().items():
        assert torch.equal(watched.state_dict()[name], value), name


def test_every_other_iteration_and_fewer_dimensions(tmp_path):
    run(tmp_path / "all", toy.MODALITIES, steps=5)
    run(tmp_path / "some", toy.MODALITIES, steps=5, every=2, max_dimensions=7)
    with np.load(tmp_path / "all/gradients.npz") as whole, np.load(tmp_path / "some/gradients.npz") as thin:
        assert thin["iteration"].tolist() == [2, 4]
        kept = thin["dimensions"]
        assert len(set(kept.tolist())) == 7
        assert int(thin["size"]) == whole["fusion"].shape[-1] == 20
        for source in ("classifier", "fusion"):
            np.testing.assert_array_equal(thin[source], whole[source][[1, 3]][..., kept])


def test_samples_without_the_modality_do_not_count(tmp_path):
    """With a mask, the gradient is that of the batch's rows that have the modality."""
    modalities = ("flair", "t1")
    network, classifiers, observer = parts(modalities)
    (batch,) = toy.batches(1, modalities=2, batch=4)
    batch["present"] = torch.tensor([[True, True], [True, False], [True, True], [False, True]])
    rows = {"flair": [0, 1, 2], "t1": [0, 2, 3]}
    expected = [by_hand(network, {k: v[rows[m]] for k, v in batch.items()}, m) for m in modalities]
    recorder = GradientRecorder(observer, tmp_path, every=1)
    toy.trainer(
        network, [*network.parameters(), *classifiers.parameters()], [batch], observer, handlers=[recorder]
    ).run()
    with np.load(tmp_path / "gradients.npz") as stored:
        np.testing.assert_allclose(stored["fusion"][0], expected, rtol=1e-4, atol=1e-7)


def train(run_dir, *, epochs, resume=False):
    """The miniature of a whole run, with dropout and batch norm; three iterations an epoch."""
    trainer = training.build(run_dir, epochs=epochs, resume=resume)
    bound = (handler[0] for handlers in trainer._event_handlers.values() for handler in handlers)
    (method,) = {b.__self__ for b in bound if isinstance(getattr(b, "__self__", None), CGGM)}
    GradientRecorder(method, run_dir, every=2).attach(trainer)
    trainer.run()


@pytest.mark.slow
def test_a_resumed_run_has_the_records_of_an_uninterrupted_one(tmp_path):
    train(tmp_path / "whole", epochs=3)
    train(tmp_path / "resumed", epochs=2)
    train(tmp_path / "resumed", epochs=3, resume=True)
    with np.load(tmp_path / "whole/gradients.npz") as whole, np.load(tmp_path / "resumed/gradients.npz") as resumed:
        assert whole["iteration"].tolist() == [2, 4, 6, 8]
        for name in whole.files:
            np.testing.assert_array_equal(resumed[name], whole[name])


def test_a_new_run_drops_what_another_left(tmp_path):
    run(tmp_path, ("flair", "t1"), steps=4)
    run(tmp_path, toy.MODALITIES, steps=2)
    with np.load(tmp_path / "gradients.npz") as stored:
        assert stored["iteration"].tolist() == [1, 2]
        assert stored["fusion"].shape[1] == 4


def test_refuses_records_of_other_modalities(tmp_path):
    run(tmp_path, ("flair", "t1"))
    _, _, observer = parts(toy.MODALITIES)
    recorder = GradientRecorder(observer, tmp_path)

    class Resumed:
        class state:  # noqa: N801
            iteration = 3

    with pytest.raises(ValueError, match=r"gradients\.npz has 20 numbers a gradient of flair, t1; .* t1ce"):
        recorder._start(Resumed(), observer)


def test_needs_the_method_before_it(tmp_path):
    network, classifiers, observer = parts(("flair", "t1"))
    recorder = GradientRecorder(observer, tmp_path, every=1)
    parameters = [*network.parameters(), *classifiers.parameters()]
    trainer = toy.trainer(network, parameters, toy.batches(1, modalities=2), handlers=[recorder, observer])
    with pytest.raises(RuntimeError, match="attach it after the method"):
        trainer.run()


@pytest.mark.parametrize(("option", "value"), [("every", 0), ("max_dimensions", 0)])
def test_refuses_numbers_below_one(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"{option} must be at least 1"):
        GradientRecorder(None, tmp_path, **{option: value})
