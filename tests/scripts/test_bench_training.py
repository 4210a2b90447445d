# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc
import json
import logging
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import typer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

from tests.scripts.loading import script_module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_module("bench_training")


@pytest.fixture
def invoke(script):
    app = typer.Typer()
    app.command()(script.main)
    threads = torch.get_num_threads()
    yield lambda *arguments: CliRunner().invoke(app, arguments)
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_numbers_agree_with_each_other(invoke, script, tmp_path: Path):
    out = tmp_path / "bench.json"
    ways = "checkpointing,amp_bf16"
    result = invoke("--size", "tiny", "--rounds", "1", "--ways", ways, "--json", str(out))
    assert result.exit_code == 0, result.output
    numbers = json.loads(out.read_text())
    assert numbers["steps"] == {"plain": 2, "checkpointing": 2}
    assert numbers["times_plain"]["plain"] == 1.0
    for way, milliseconds in numbers["ms_per_step"].items():
        assert numbers["times_plain"][way] == pytest.approx(milliseconds / numbers["ms_per_step"]["plain"], abs=0.01)
        low, high = numbers["quartiles_ms"][way]
        assert 0 < low <= milliseconds <= high
    assert numbers["left_out"] == {"amp_bf16": "MONAI's trainer has mixed precision on GPUs only"}

    memory = numbers["memory_mb"]
    for row in memory.values():
        assert row["both"] == pytest.approx(row["held"] + row["step"], abs=0.02)
    assert memory["recipe, checkpointing"]["step"] < memory["recipe"]["step"]
    assert memory["recipe, checkpointing"]["held"] == memory["recipe"]["held"]
    joint, observe = memory["joint: no classifiers"], memory["observe: classifiers that watch"]
    assert joint["held"] < observe["held"] == memory["cggm"]["held"]
    assert joint["step"] < observe["step"]

    assert len(numbers["slowest"]) == script.SLOWEST
    shares = [row["share"] for row in numbers["slowest"]]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1
    scaling = numbers["scaling"]
    if script.cores() < 2:
        assert "two cores" in scaling["left_out"]
    else:
        times = scaling["ms_per_step"]
        assert scaling["times_faster"] == pytest.approx(times["1"] / times["2"], abs=0.01)
    for said in ("quartiles", "checkpointing", "amp_bf16: left out", "+24 MB", "two proc"):
        assert said in result.output


def test_memory_is_the_most_that_was_allocated_at_once(script):
    """Two blocks of 1 MB together, then a third of half of it after both are gone."""
    held = torch.ones(2**18)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        one = torch.empty(2**18)
        two = torch.empty(2**18)
        del one, two, held
        three = torch.empty(2**17)
        del three
    assert script.allocated_at_most(record) == 2 * 2**20


def test_memory_of_a_step_is_not_lowered_by_another_trainer_s_garbage(script):
    """A cycle that the step before left is gone when the step starts, and its own does not go before it ends."""

    class Cycle:
        def __init__(self, size: int) -> None:
            self.tensor, self.itself = torch.empty(size), self

    trainer = SimpleNamespace(
        optimizer=torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), state=SimpleNamespace(output=None)
    )
    seen: dict = {}
    steps = script.profiled(trainer, "cpu", seen)
    next(steps)
    next(steps)
    Cycle(2**20)
    next(steps)
    for _ in range(3000):  # more objects than make Python collect
        Cycle(2**8)
    next(steps)
    assert 2**20 * 3000 / 2**10 <= seen["peak"] < 2**20 * 3000 / 2**10 + 2**20
    assert gc.isenabled()


def test_a_kernel_s_time_counts_once_on_a_gpu(script):
    """The record names the operation, the kernel that it started and the annotation around both."""

    def entry(key: str, milliseconds: float, device_type: DeviceType, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            key=key,
            count=1,
            device_type=device_type,
            is_user_annotation=annotation,
            self_device_time_total=1e3 * milliseconds,
            self_cpu_time_total=0.0,
        )

    entries = [
        entry("Optimizer.step#SGD.step", 4.0, DeviceType.CUDA, annotation=True),
        entry("Optimizer.step#SGD.step", 0.0, DeviceType.CPU, annotation=True),
        entry("implicit_convolve_sgemm", 3.0, DeviceType.CUDA),
        entry("aten::add_", 1.0, DeviceType.CPU),
        entry("aten::convolution", 3.0, DeviceType.CPU),
    ]
    rows = script.slowest_operations(SimpleNamespace(key_averages=lambda: entries), "cuda")
    assert [(row["operation"], row["ms"], row["share"]) for row in rows] == [
        ("aten::convolution", 3.0, 0.75),
        ("aten::add_", 1.0, 0.25),
    ]


def test_turns_alternate_and_the_first_does_not_count(script, monkeypatch):
    turns: list[tuple[str, int]] = []

    class Trainer:
        def __init__(self, name: str) -> None:
            self.name = name
            self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)

    lists: list[list[float]] = []

    def train_until(trainer: Trainer, epoch: int) -> None:
        turns.append((trainer.name, epoch))
        lists["ab".index(trainer.name)].append(epoch)

    monkeypatch.setattr(script, "train_until", train_until)
    monkeypatch.setattr(script, "step_times", lambda *_: lists.append([]) or lists[-1])
    with script.Progress() as progress:
        times = script.take_turns({"a": Trainer("a"), "b": Trainer("b")}, 2, lambda: 0.0, progress)
    assert turns == [("a", 1), ("b", 1), ("a", 2), ("b", 2), ("a", 3), ("b", 3)]
    assert times == {"a": [2, 3], "b": [2, 3]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ways", "compile,amp"), "no overlay amp in configs/hardware"),
        (("--size", "huge"), "size must be one of tiny, small, paper"),
        (("--method", "cgm"), "no method cgm"),
        (("--device", "tpu"), "device must be cpu or cuda"),
        (("--volumes", "3"), "volumes must be even"),
    ],
)
def test_what_does_not_exist_is_named(invoke, arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ").replace("│", "").replace("  ", " ")


def test_two_processes_need_two_cores(script, monkeypatch):
    monkeypatch.setattr(script, "cores", lambda: 1)
    plan = script.Plan("tiny", "cpu", "joint", 2, 1, "nowhere")
    assert script.scale(plan) == {"left_out": "two processes need two cores, found 1"}


def test_every_overlay_is_timed(script):
    folder = script.share_path("configs/hardware")
    assert set(script.WAYS) == {path.stem for path in folder.glob("*.yaml")} - {"cpu"}
