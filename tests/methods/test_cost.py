# SPDX-License-Identifier: Apache-2.0
"""What a step may cost, in things that can be counted: passes, reads by the host, operations. Never in time."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import monai_cggm
from monai_cggm.batches import prepare_batch
from monai_cggm.handlers import ClipGradients
from monai_cggm.methods import CGGM, AuxiliaryLosses, ModalityDropout, RelativeBalance, UnimodalObserver
from tests.methods import toy
from tests.methods.toy import everything, metric

#: reads by the host that a CPU's tensors do without an operation of their own
READS = {torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}
#: operations whose result, or its size, the host waits for
WAITS = {
    torch.ops.aten._local_scalar_dense.default,  # item, bool, int, float
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten._unique2.default,
}
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}
#: files of the package in which masks are drawn, sent and looked at, before they leave the host
PACKAGE = Path(monai_cggm.__file__).parent
MASKS = {"batches.py", "dropout.py", "samples.py"}
#: attribute of a tensor that was sent to the device, or was made of one that was
SENT = "_sent_to_the_device"


def of_a_mask(tensor: Any) -> bool:
    """Whether this is a mask in the hands of who draws masks, and still on the host."""
    if tensor.dtype != torch.bool or hasattr(tensor, SENT):
        return False
    frame = sys._getframe()
    while frame is not None and PACKAGE not in Path(frame.f_code.co_filename).parents:
        frame = frame.f_back
    return frame is not None and Path(frame.f_code.co_filename).name in MASKS


def sends(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether this is ``.to(device)``."""
    return func is torch.Tensor.to and ("device" in (kwargs or {}) or any(isinstance(a, torch.device) for a in args))


def with_mark(result: Any) -> Any:
    """Mark tensors as ones that lie on the device."""
    for tensor in result if isinstance(result, tuple | list) else (result,):
        if isinstance(tensor, torch.Tensor):
            setattr(tensor, SENT, True)
    return result


def to_the_host(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether this is ``.to("cpu")``. What goes by a ``torch.device`` looks here like what stays; test_gpu tells."""
    return func is torch.Tensor.to and "cpu" in [t for t in (*args[1:], *(kwargs or {}).values()) if isinstance(t, str)]


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        by_mask = func in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        if (func in WAITS or by_mask) and not of_a_mask(args[0]):
            self.waits[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Count what the host reads or waits for, or would on a GPU; masks that never left it are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.operations = Operations()

    def __enter__(self) -> Reads:
        self.operations.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.operations.__exit__(*error)
        self.seen += self.operations.waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (func in READS or to_the_host(func, args, kwargs)) and not of_a_mask(args[0]):
            self.seen[func.__name__] += 1
        result = func(*args, **(kwargs or {}))
        if sends(func, args, kwargs):
            return with_mark(result.clone())  # a CPU's stays the same object, which the host goes on using
        return with_mark(result) if any(hasattr(a, SENT) for a in args) else result


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
        parts = [AuxiliaryLosses(method, 0.25), ModalityDropout(modalities, seed=0, both=True), *parts]
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


@pytest.mark.parametrize(
    "read",
    [
        lambda balance, step: bool(torch.isfinite(balance).all()),
        lambda balance, step: balance.max().item(),
        lambda balance, step: step.losses[balance > 0],
        lambda balance, step: torch.masked_select(step.losses, balance > 0),
        lambda balance, step: balance.nonzero(),
        lambda balance, step: balance.to("cpu"),
        lambda balance, step: balance.to(device="cpu", dtype=torch.float64),
        lambda balance, step: (balance > 0).any().item(),
        lambda balance, step: (balance > 0).cpu(),
    ],
)
def test_a_read_more_is_seen(read, monkeypatch):
    modulate = CGGM.modulate
    monkeypatch.setattr(CGGM, "modulate", lambda self, step: (read(self.balance, step), modulate(self, step)))
    engine, _ = steps("cggm", toy.MODALITIES)
    assert within_the_third_step(engine, Reads()).seen.total() == 3


@pytest.mark.parametrize("file", sorted(MASKS))
@pytest.mark.parametrize(
    ("read", "seen"),
    [
        ("mask.any().item()", 0),
        ("mask.nonzero()", 0),
        ("mask.to(device=device).any().item()", 1),
        ("mask.to(device)[:, 0].nonzero()", 1),
        ("(~mask.to(device=device)).tolist()", 1),
        ("mask.to(device=device) and 0 or mask.tolist()", 1),  # the one that is still here is free
    ],
)
def test_a_mask_that_was_sent_is_no_mask_of_the_hosts(file, read, seen):
    """As if the code were in one of the files that handle masks."""
    code = compile(f"def look(mask, device): return {read}", str(next(PACKAGE.rglob(file))), "exec")
    names: dict[str, Any] = {}
    exec(code, names)
    with Reads() as reads:
        names["look"](torch.tensor([[True]]), torch.device("cpu"))
    assert reads.seen.total() == seen


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
