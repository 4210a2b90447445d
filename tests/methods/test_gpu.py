# SPDX-License-Identifier: Apache-2.0
"""What a GPU computes is what the CPU does, and the host waits for it once in a step."""

import copy
import warnings

import pytest
import torch
from ignite.engine import Events

from monai_cggm.batches import prepare_batch
from monai_cggm.handlers import ClipGradients
from monai_cggm.methods import CGGM, AuxiliaryLosses, Distillation, ModalityDropout, RelativeBalance, UnimodalObserver
from tests.methods import late_toy, toy
from tests.methods.test_half_precision import LATE, OBSERVERS
from tests.methods.toy import everything, metric

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and PyTorch sees none"),
]

STEPS = 3


def observed(name, device):
    """Three steps of a method in double precision; what was logged, and the weights and what the method keeps."""
    network, classifiers = toy.parts(network=toy.MaskedNetwork, dtype=torch.float64)
    network.to(device), classifiers.to(device)
    data = toy.batches(STEPS, batch=4, size=16, dtype=torch.float64)
    if name == "recipe":
        method = UnimodalObserver(network, classifiers, metric())
        handlers = [ModalityDropout(toy.MODALITIES, seed=0), AuxiliaryLosses(method, 0.25)]
        handlers.append(Distillation(method))
    else:
        method, handlers = OBSERVERS[name](network, classifiers), []
        if name == "umt":
            for teacher in method.teachers.values():
                teacher.double()
    handlers.append(ClipGradients([network, classifiers], 1.0))
    rows = toy.rows_of(
        method, network, classifiers, data, handlers=handlers, device=device, prepare_batch=prepare_batch
    )
    return rows, {**network.state_dict(), **classifiers.state_dict()}, method.state_dict()


def late(name, device):
    torch.manual_seed(0)
    make, combine = LATE[name]
    network = late_toy.network_of("segmentation", combine, dtype=torch.float64).to(device)
    method = make(network, late_toy.metric_of("segmentation"))
    data = late_toy.batches("segmentation", STEPS, dtype=torch.float64)
    engine = late_toy.trainer(network, data, method, task="segmentation", device=device, epochs=2)
    engine.run()
    return engine.rows, network.state_dict(), method.state_dict()


def same(found, expected, where=""):
    """Compare what is nested, numbers by value."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            same(found[key], value, f"{where}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            same(found[index], value, f"{where}/{index}")
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(
            found.cpu(), expected.cpu(), rtol=1e-6, atol=1e-9, equal_nan=True, msg=lambda m: f"{where}: {m}"
        )
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("name", [*OBSERVERS, "recipe", *LATE])
def test_a_gpu_trains_as_the_cpu_does(name):
    train = late if name in LATE else observed
    found, expected = train(name, "cuda"), train(name, "cpu")
    same(found[0], expected[0], "logged")
    same(found[1], expected[1], "weights")
    same(found[2], expected[2], "kept")


@pytest.mark.parametrize("name", ["cggm", "relative", "pmr", "greedy"])
def test_what_a_gpu_saved_goes_on_on_a_cpu(name, tmp_path):
    """A checkpoint of a GPU's run, loaded as the bundles load it."""

    def made(device):
        network, classifiers = (part.to(device) for part in toy.parts(network=toy.MaskedNetwork, dtype=torch.float64))
        return network, classifiers, OBSERVERS[name](network, classifiers)

    data = toy.batches(STEPS + 1, batch=4, size=16, dtype=torch.float64)
    before = made("cuda")
    toy.rows_of(before[2], *before[:2], data[:STEPS], device="cuda")
    torch.save([part.state_dict() for part in before], tmp_path / "state.pt")
    ends = []
    for device in ("cuda", "cpu"):
        parts = made(device)
        states = torch.load(tmp_path / "state.pt", map_location=device, weights_only=True)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(copy.deepcopy(state))
        ends.append((toy.rows_of(parts[2], *parts[:2], data[STEPS:], device=device), parts[0].state_dict()))
    same(ends[0], ends[1])


def waits(way):
    """How often the host waited for the GPU in the third step of a training, where, and its warnings."""
    network, classifiers = (part.to("cuda") for part in toy.parts(network=toy.MaskedNetwork))
    data = [{k: v.to("cuda") for k, v in batch.items()} for batch in toy.batches(STEPS)]
    if way == "joint":
        engine = toy.trainer(network, list(network.parameters()), data, device="cuda", prepare_batch=prepare_batch)
    else:
        kind = {"cggm": CGGM, "balance": RelativeBalance}.get(way, UnimodalObserver)
        method = kind(network, classifiers, metric())
        clip = ClipGradients([network, classifiers], 1.0)
        # the default of train.yaml but for dropout, whose masks are drawn on the host and sent, a wait each
        handlers = [AuxiliaryLosses(method, 0.25), clip] if way == "recipe" else [clip]
        engine = toy.trainer(
            network, everything(network, classifiers), data, method,
            handlers=handlers, device="cuda", prepare_batch=prepare_batch,
        )  # fmt: skip
    found = []
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")

        def begin(engine):
            if engine.state.iteration == STEPS:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("warn")

        def end(engine):
            if engine.state.iteration == STEPS:
                torch.cuda.set_sync_debug_mode("default")
                found.extend(f"{w.filename}:{w.lineno}" for w in heard if "synchronizing" in str(w.message))

        engine.add_event_handler(Events.ITERATION_STARTED, begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, end)
        try:
            engine.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


@pytest.mark.parametrize("way", ["observe", "cggm", "balance", "recipe"])
def test_the_host_waits_once_more_in_a_step_than_in_joint_training(way):
    assert len(waits(way)) - len(waits("joint")) == 1, waits(way)
