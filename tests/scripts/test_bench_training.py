# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc
import json
import logging
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
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
    result = invoke("--size", "tiny", "--rounds", "1", "--ways", ways, "--repeats", "1", "--json", str(out))
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
    starts = numbers["starts"]
    if script.cores() < 2:
        assert "two cores" in numbers["starts_left_out"].pop("two processes")
    else:
        assert set(starts) == set(script.STARTS)
    assert not numbers["starts_left_out"]
    for row in starts.values():
        assert min(row.values()) > 0
        assert row["first_validation_s"] > row["first_step_s"]
    for said in ("quartiles", "checkpointing", "amp_bf16: left out", "+24 MB"):
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


def test_kinds_of_processes_take_turns_and_those_that_fail_are_named(script, monkeypatch, tmp_path: Path):
    started: list[tuple[int, int]] = []

    def in_processes(plan, order: Path, processes: int, workers: int) -> dict[str, float]:
        started.append((processes, workers))
        if workers:
            raise ChildProcessError("RuntimeError: out of memory")
        return {"step_ms": float(len(started))}

    monkeypatch.setattr(script, "in_processes", in_processes)
    monkeypatch.setattr(script, "workflow_of", lambda *_, **__: None)
    plan = script.Plan("tiny", "cpu", "joint", 2, 1, str(tmp_path))
    with script.Progress() as progress:
        for cores in (2, 1):
            monkeypatch.setattr(script, "cores", lambda cores=cores: cores)
            found = script.start_all(plan, 2, progress)
            if cores == 2:
                assert started == [(1, 0), (1, 2), (2, 0), (1, 0), (2, 0)]
                assert found["starts"] == {"one process": {"step_ms": 2.5}, "two processes": {"step_ms": 4.0}}
                assert found["step_ms_of_each_start"] == {"one process": [1, 4], "two processes": [3, 5]}
                assert found["starts_left_out"] == {"one process, 2 workers": "RuntimeError: out of memory"}
    assert found["starts_left_out"]["two processes"] == "two processes need two cores, found 1"
    assert script.start_all(plan, 0, progress)["starts"] == {}


@pytest.mark.parametrize(
    ("says", "message"), [("print('no GPU', file=sys.stderr)", "^no GPU$"), ("", "^exit status 3$")]
)
def test_a_process_that_fails_says_why(script, monkeypatch, tmp_path: Path, says: str, message: str):
    failing = tmp_path / "failing.py"
    failing.write_text(f"import sys\n{says}\nsys.exit(3)\n")
    monkeypatch.setattr(script, "__file__", str(failing))
    plan = script.Plan("tiny", "cpu", "joint", 2, 1, str(tmp_path))
    with pytest.raises(ChildProcessError, match=message):
        script.in_processes(plan, tmp_path / "order.json", 1, 0)


def test_a_process_that_hangs_is_ended(script, monkeypatch, tmp_path: Path):
    (tmp_path / "hanging.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(script, "__file__", str(tmp_path / "hanging.py"))
    monkeypatch.setattr(script, "LIMIT_S", 0.5)
    plan = script.Plan("tiny", "cpu", "joint", 2, 1, str(tmp_path))
    with pytest.raises(subprocess.TimeoutExpired):
        script.in_processes(plan, tmp_path / "order.json", 1, 0)


def test_waits_and_steps_are_those_of_the_second_epoch(script):
    """Epochs of three steps: waits 1, 2 and 3 ms in the second, steps of 10 ms."""
    asked = np.array([5.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    waits = np.array([500, 500, 500, 1, 2, 3]) / 1e3
    marks = {"asked": asked, "got": asked + waits, "done": asked + waits + 0.01}
    found = script.spans({**marks, "validating": [7.6, 10.2], "validated": [7.9, 10.4]})
    expected = {"first_step_s": 5.5, "first_validation_s": 7.9, "first_wait_ms": 1, "wait_ms": 2.5, "step_ms": 10}
    assert found == pytest.approx({**expected, "validation_s": 0.2})


def test_every_overlay_is_timed(script):
    folder = script.share_path("configs/hardware")
    assert set(script.WAYS) == {path.stem for path in folder.glob("*.yaml")} - {"cpu"}
