# SPDX-License-Identifier: Apache-2.0
"""What a step may cost, in things that can be counted: passes, reads by the host, operations. Never in time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from monai_cggm.batches import prepare_batch
from monai_cggm.handlers import ClipGradients
from monai_cggm.methods import CGGM, AuxiliaryLosses, ModalityDropout, RelativeBalance, UnimodalObserver
from tests.methods import toy
from tests.methods.toy import everything, metric

#: what makes the host wait for a GPU
READS = {
    torch.Tensor.cpu,
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.__bool__,
    torch.Tensor.__float__,
    torch.Tensor.__int__,
    torch.Tensor.nonzero,
    torch.nonzero,
}


class Reads(TorchFunctionMode):
    """Count reads of tensors by the host, except of masks, which never leave it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS and args[0].dtype != torch.bool:
            self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def steps(way: str, modalities: tuple[str, ...]):
    """A trainer of three steps, and its network."""
    torch.manual_seed(0)
    network = toy.MaskedNetwork(modalities)
    data = toy.batches(3, modalities=len(modalities))
    if way == "joint":
        return toy.trainer(network, list(network.parameters()), data), network
    classifiers = toy.ToyClassifiers(modalities)
    kind = {"cggm": CGGM, "balance": RelativeBalance}.get(way, UnimodalObserver)
    method = kind(network, classifiers, metric())
    parts: list[Any] = [ClipGradients([network, classifiers], 1.0)]
    if way == "recipe":
        parts = [AuxiliaryLosses(method, 0.25), ModalityDropout(modalities, seed=0), *parts]
    engine = toy.trainer(
        network, everything(network, classifiers), data, method, handlers=parts, prepare_batch=prepare_batch
    )
    return engine, network


def within_the_third_step(engine, mode):
    """Run, with the mode on in the last step only: the first one checks and sets up."""
    engine.add_event_handler(Events.ITERATION_STARTED, lambda e: mode.__enter__() if e.state.iteration == 3 else None)
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: mode.__exit__(None, None, None) if e.state.iteration == 3 else None
    )
    engine.run()
    return mode


WAYS = ["observe", "cggm", "balance", "recipe"]


@pytest.mark.parametrize("way", WAYS)
def test_all_that_the_host_reads_of_a_step_goes_over_at_once(way):
    engine, _ = steps(way, toy.MODALITIES)
    assert within_the_third_step(engine, Reads()).seen == {"cpu": 1, "tolist": 1}


@pytest.mark.parametrize("way", WAYS)
def test_no_encoder_runs_twice_in_a_step_forwards_or_backwards(way):
    engine, network = steps(way, toy.MODALITIES)
    forward, backward = Counter(), Counter()
    for name, encoder in network.encoders.items():
        encoder.register_forward_hook(lambda *_, name=name: forward.update([name]))
        encoder[-1].register_full_backward_hook(lambda *_, name=name: backward.update([name]))
    engine.run()
    assert forward == backward == dict.fromkeys(toy.MODALITIES, 3)


@pytest.mark.parametrize("way", WAYS)
def test_operations_grow_linearly_with_modalities_and_stay_few(way):
    names = [f"m{i}" for i in range(6)]
    counts = {}
    for number in (2, 4, 6):
        of = [within_the_third_step(steps(w, tuple(names[:number]))[0], Operations()).count for w in (way, "joint")]
        counts[number] = of[0] - of[1]
    # not to the digit: what dropout draws decides whether there is a mask at all
    assert counts[6] - counts[4] == pytest.approx(counts[4] - counts[2], rel=0.1)
    # 93 to 120 when this was written
    assert counts[4] / 4 < 150
