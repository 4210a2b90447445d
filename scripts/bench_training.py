#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time and weigh one training step of the BraTS bundle with each overlay of configs/hardware, over one without.

    python scripts/bench_training.py                                    # small network (hardware/cpu.yaml), one thread
    python scripts/bench_training.py --device cuda --size paper         # the paper's
    python scripts/bench_training.py --ways checkpointing --method joint --rounds 20 --json bench.json

Four parts, each on phantoms that are made first:

- Time of a step, by overlay. A step is what happens between two batches: forward and backward passes, the method,
  clipping, the optimizer, the log. All ways take turns, an epoch of two steps each, so that whatever else the machine
  does meets them alike; the first turn does not count (it compiles, and chooses algorithms). Medians. On a CPU it is
  CPU time of this process, on a GPU it is wall-clock time after a synchronisation.
- Memory: what is held between steps (parameters, buffers, the optimizer's state), and what a step needs beyond it at
  its peak. On a GPU the peak is PyTorch's count of allocated memory; on a CPU it is added up from the profiler's record
  of allocations, which knows PyTorch's tensors and not the working memory inside of a library's convolutions.
- Where a step's time goes: the five operations with the most time of their own.
- Processes of their own, wall-clock time, by turns: one, one whose loader has two workers, and two (torchrun, half of
  the batch each). Prepared volumes are on disk already (``cache_dir``). How long a process takes to its first step and
  through its first validation; and, in its second epoch, how long a step waits for its batch, beyond what the loader
  does while the step before trains, how long the step takes, and the validation, of one volume.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import ignite.distributed as idist
import numpy as np
import torch
import typer
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.engines import SupervisedTrainer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from timing import check_device, clock_name, clock_of, cores, machine
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from monai_cggm.data.phantom import write_phantoms
from monai_cggm.files import atomic_path
from monai_cggm.resources import share_path

PLAIN = "plain"
WAYS = ("channels_last", "fused_optimizer", "checkpointing", "compile", "amp_bf16", "amp_fp16")
#: memory that CGGM's classifiers take on BraTS, in MB: Table 8 of the paper
TABLE_8_MB = 24
SLOWEST = 5
#: processes of their own: how many of them, and workers of their loaders
STARTS = {"one process": (1, 0), "one process, 2 workers": (1, 2), "two processes": (2, 0)}
#: times that their epoch, of two steps otherwise, goes over its cases: what a loader has in store at its start must end
REPEATED = 4
#: a process that has not ended after this many seconds hangs
LIMIT_S = 1800


@dataclass(frozen=True)
class Size:
    """A network, its batch and its phantoms.

    Attributes:
        overlays: merged over train.yaml.
        shape: of a phantom, in voxels.
        spacing: in mm.
        volumes: in a batch.
        settings: what differs from these files.
    """

    overlays: tuple[str, ...]
    shape: tuple[int, int, int]
    spacing: float
    volumes: int
    settings: Mapping[str, Any] = field(default_factory=dict)


SIZES = {
    "tiny": Size(  # to try this script out
        ("hardware/cpu.yaml",),
        (40, 44, 20),
        4.0,
        2,
        {
            "encoder": {"backbone": "resnet18", "width": 8, "aspp_channels": 8, "norm": "batch"},
            "decoder_channels": 8,
            "low_reduced": 4,
            "slice_size": [64, 64],
            "slices_per_volume": 2,
        },
    ),
    "small": Size(("hardware/cpu.yaml",), (80, 80, 60), 2.0, 4),
    "paper": Size((), (176, 176, 60), 1.3, 16),
}


@dataclass(frozen=True)
class Plan:
    """What is measured, and where.

    Attributes:
        size: a name in ``SIZES``.
        device: ``cpu`` or ``cuda``.
        method: ``recipe``, or the name of a file in configs/methods.
        volumes: in a batch.
        rounds: epochs of two steps that count.
        folder: for phantoms and runs; deleted afterwards.
    """

    size: str
    device: str
    method: str
    volumes: int
    rounds: int
    folder: str


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    size: Annotated[
        str, typer.Option(help="small (hardware/cpu.yaml) or paper; tiny to try the script out.")
    ] = "small",
    method: Annotated[str, typer.Option(help="recipe, or the name of a file in configs/methods.")] = "recipe",
    ways: Annotated[str | None, typer.Option(help="Only these overlays, with commas; 'none' for no times.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Epochs that count, two steps each.")] = 8,
    volumes: Annotated[int | None, typer.Option(min=2, help="Volumes in a batch, an even number.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of this process.")] = 1,
    repeats: Annotated[int, typer.Option(min=0, help="Times that processes of their own are started.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers.")] = None,
    worker: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Time and weigh one training step with each overlay of configs/hardware, over one without."""
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    if worker is not None:
        measure_process(worker)
        return
    chosen = check_choice(device, size, method, ways, volumes)
    with tempfile.TemporaryDirectory() as scratch:
        plan = Plan(size, device, method, volumes or SIZES[size].volumes, rounds, scratch)
        result = bench(plan, chosen, repeats)
    show(result)
    if json_file is not None:
        with atomic_path(json_file) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def check_choice(device: str, size: str, method: str, ways: str | None, volumes: int | None) -> list[str]:
    """Return the overlays that were asked for; refuse what does not exist."""
    check_device(device)
    if size not in SIZES:
        raise typer.BadParameter(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    if volumes is not None and volumes % 2:
        raise typer.BadParameter(f"volumes must be even, because two processes share them, got {volumes}")
    methods = ["recipe", *sorted(path.stem for path in share_path("configs/methods").glob("*.yaml"))]
    if method not in methods:
        raise typer.BadParameter(f"no method {method}; there are {', '.join(methods)}")
    chosen = list(WAYS) if ways is None else [] if ways == "none" else ways.split(",")
    unknown = [way for way in chosen if way not in WAYS]
    if unknown:
        raise typer.BadParameter(f"no overlay {', '.join(unknown)} in configs/hardware; there are {', '.join(WAYS)}")
    return chosen


def bench(plan: Plan, ways: Sequence[str], repeats: int) -> dict[str, Any]:
    """Measure all, and return the numbers: milliseconds, and MB of 2**20 bytes."""
    facts = machine(plan.device)
    size = SIZES[plan.size]
    write_phantoms(Path(plan.folder) / "phantoms", cases=2 * plan.volumes + 2, shape=size.shape, spacing=size.spacing)
    left_out = {way: reason for way in ways if (reason := why_not(way, plan.device)) is not None}
    # the bundle's own progress bars, one an epoch and way, would hide this script's
    with (
        Path(os.devnull).open("w") as nothing,
        Progress(console=Console(stderr=True)) as progress,
        contextlib.redirect_stderr(nothing),
    ):
        timed = time_ways(plan, [way for way in ways if way not in left_out], progress)
        memory, slowest = weigh(plan, progress)
        started = start_all(plan, repeats, progress)
    return {
        **{key: value for key, value in asdict(plan).items() if key != "folder"},
        "clock": clock_name(plan.device),
        "machine": facts,
        **timed,
        "left_out": left_out,
        "memory_mb": memory,
        "table_8_mb": TABLE_8_MB,
        "slowest": slowest,
        **started,
    }


def why_not(way: str, device: str) -> str | None:
    """Say why an overlay has no effect here; None where it has."""
    if way.startswith("amp") and device == "cpu":
        return "MONAI's trainer has mixed precision on GPUs only"
    if way == "amp_bf16" and not torch.cuda.is_bf16_supported():
        return "this GPU has no bfloat16"
    if way == "compile" and device == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        return "no C++ compiler"
    return None


# ---------------------------------------------------------------------------------------------------- a trainer


def workflow_of(
    plan: Plan, name: str, overlays: Sequence[str] = (), method: str | None = None, **settings: Any
) -> ConfigWorkflow:
    """Build the bundle's training as a run of it does, up to the training itself; ``settings`` go over the plan's."""
    size, method = SIZES[plan.size], method or plan.method
    folder = Path(plan.folder)
    plain = folder / "size.json"
    # hardware/cpu.yaml has channels last, which is one of the ways here
    contiguous = {"memory_format": "$torch.contiguous_format"}
    with atomic_path(plain) as temporary:  # two processes write it at once
        temporary.write_text(json.dumps({**size.settings, **contiguous}))
    bundle, configs = share_path("bundles/brats_cggm/configs"), share_path("configs")
    files = [bundle / "train.yaml", *(configs / name for name in size.overlays), plain]
    if method != "recipe":
        files.append(configs / "methods" / f"{method}.yaml")
    files += [bundle / name if (bundle / name).exists() else configs / name for name in overlays]
    values = {
        "device": f"$torch.device('{plan.device}')",
        "dataset_dir": str(folder / "phantoms"),
        "run_dir": str(folder / name),
        "split_sizes": [2 * plan.volumes, 1, 1],
        "volumes_per_batch": plan.volumes,
        "num_workers": 0,
        "epochs": plan.rounds + 2,  # the last one, which validates, is not reached
        "warmup_epochs": 1,
        "val_interval": plan.rounds + 2,
        "image_interval": plan.rounds + 2,
        **settings,
    }
    if "multi_gpu_train.yaml" in overlays:
        del values["device"]  # the overlay gives each process its own
    made = ConfigWorkflow(list(map(str, files)), workflow_type="train", logging_file=False, **values)
    made.initialize()
    for index in range(len(made.parser["run"]) - 1):  # what an overlay does before it trains
        made.parser.get_parsed_content(f"run#{index}")
    keep_no_checkpoints(made)
    return made


def keep_no_checkpoints(made: ConfigWorkflow) -> None:
    """A trainer that goes on in this process needs none, and the paper's network would write gigabytes."""
    checkpoints = made.parser.get_parsed_content("train#handlers#0")
    trainer_of(made).remove_event_handler(checkpoints._come_last, Events.EPOCH_STARTED)


def trainer_of(made: ConfigWorkflow) -> SupervisedTrainer:
    """Return a workflow's trainer."""
    trainer: SupervisedTrainer = made.parser.get_parsed_content("train#trainer")
    return trainer


def train_until(trainer: SupervisedTrainer, epoch: int) -> None:
    """Train on to the end of an epoch."""
    trainer.state.max_epochs = epoch
    trainer.run()


# ---------------------------------------------------------------------------------------------------- time


def time_ways(plan: Plan, ways: Sequence[str], progress: Progress) -> dict[str, Any]:
    """Time a step without overlay and with each."""
    if not ways:
        return {"steps": {}, "ms_per_step": {}, "quartiles_ms": {}, "times_plain": {}}
    overlays = {PLAIN: [], **{way: [f"hardware/{way}.yaml"] for way in ways}}
    building = progress.track(overlays.items(), description="building")
    trainers = {way: trainer_of(workflow_of(plan, way, files)) for way, files in building}
    times = take_turns(trainers, plan.rounds, clock_of(plan.device), progress)
    medians = {way: float(np.median(values)) for way, values in times.items()}
    return {
        "steps": {way: len(values) for way, values in times.items()},
        "ms_per_step": {way: round(value, 2) for way, value in medians.items()},
        "quartiles_ms": {way: [round(float(q), 2) for q in np.quantile(v, [0.25, 0.75])] for way, v in times.items()},
        "times_plain": {way: round(value / medians[PLAIN], 3) for way, value in medians.items()},
    }


def take_turns(
    trainers: Mapping[str, SupervisedTrainer], rounds: int, clock: Callable[[], float], progress: Progress
) -> dict[str, list[float]]:
    """Milliseconds of every step that counts, by way."""
    times = {way: step_times(trainer, clock) for way, trainer in trainers.items()}
    for turn in progress.track(range(1, rounds + 2), description="training"):
        for way, trainer in trainers.items():
            train_until(trainer, turn)
            trainer.optimizer.zero_grad(set_to_none=True)  # leave the memory to the others
            if turn == 1:
                times[way].clear()
    return times


def step_times(trainer: SupervisedTrainer, clock: Callable[[], float]) -> list[float]:
    """Return a list to which each step that the trainer takes from now on adds its milliseconds."""
    times: list[float] = []
    started = [0.0]
    trainer.add_event_handler(Events.GET_BATCH_COMPLETED, lambda _engine: started.__setitem__(0, clock()))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda _engine: times.append((clock() - started[0]) * 1e3))
    return times


# ---------------------------------------------------------------------------------------------------- memory, profile


def weigh(plan: Plan, progress: Progress) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Return memory by configuration, and the slowest operations of the chosen method's step."""
    rows: dict[str, tuple[Sequence[str], str]] = {
        plan.method: ((), plan.method),
        f"{plan.method}, checkpointing": (["hardware/checkpointing.yaml"], plan.method),
        "joint: no classifiers": ((), "joint"),
        "observe: classifiers that watch": ((), "observe"),
        "cggm": ((), "cggm"),
    }
    memory, slowest = {}, []
    for index, (name, (overlays, method)) in enumerate(progress.track(rows.items(), description="weighing")):
        memory[name], operations = step_profile(workflow_of(plan, f"weigh_{index}", overlays, method), plan.device)
        slowest = slowest or operations
    return memory, slowest


def step_profile(made: ConfigWorkflow, device: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Memory of the second step, when momentum is there, and its slowest operations."""
    trainer, modules = trainer_of(made), made.parser.get_parsed_content("trained").values()
    seen: dict[str, Any] = {}
    steps = profiled(trainer, device, seen)
    trainer.add_event_handler(Events.GET_BATCH_COMPLETED, lambda _engine: next(steps))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda _engine: next(steps))
    train_until(trainer, 1)
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    tensors += [t for state in trainer.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    held = sum(t.nbytes for t in tensors) / 2**20
    peak = seen["peak"] / 2**20
    return {"held": round(held, 2), "step": round(peak, 2), "both": round(held + peak, 2)}, seen["slowest"]


def profiled(trainer: SupervisedTrainer, device: str, seen: dict[str, Any]) -> Iterator[None]:
    """Go on at the start and at the end of each step, and keep what the second one took."""
    yield  # the first step starts,
    yield  # and ends
    trainer.optimizer.zero_grad(set_to_none=True)  # the step before leaves nothing that would be freed in this one
    trainer.state.output = None
    # a trainer is full of reference cycles: those that are left of others must neither count nor be freed in this step
    gc.collect()
    gc.disable()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    before = 0
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with profile(activities=activities, profile_memory=device == "cpu") as record:
        yield  # the second step starts,
        if device == "cuda":
            torch.cuda.synchronize()
    gc.enable()
    seen["peak"] = torch.cuda.max_memory_allocated() - before if device == "cuda" else allocated_at_most(record)
    seen["slowest"] = slowest_operations(record, device)
    while True:
        yield


def allocated_at_most(record: profile) -> int:
    """Bytes that were allocated at once, at most, beyond those at the start, from the record of a CPU's memory."""
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(max(0, np.cumsum([0, *changes]).max()))


def slowest_operations(record: profile, device: str) -> list[dict[str, Any]]:
    """The operations with the most time of their own: without that of the operations they call."""
    own = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    averages = list(record.key_averages())
    if device == "cuda":  # a kernel's time is that of the operation that started it: it counts once
        averages = [e for e in averages if e.device_type == DeviceType.CPU and not e.is_user_annotation]
    averages.sort(key=lambda entry: getattr(entry, own), reverse=True)
    total = sum(getattr(entry, own) for entry in averages)
    return [
        {
            "operation": entry.key,
            "calls": entry.count,
            "ms": round(getattr(entry, own) / 1e3, 2),
            "share": round(getattr(entry, own) / total, 3),
        }
        for entry in averages[:SLOWEST]
    ]


# ---------------------------------------------------------------------------------------- processes of their own


def start_all(plan: Plan, repeats: int, progress: Progress) -> dict[str, Any]:
    """Start processes of each kind by turns; medians over ``repeats``, or why a kind cannot be measured."""
    there = cores() if plan.device == "cpu" else torch.cuda.device_count()
    needed = "cores" if plan.device == "cpu" else "GPUs"
    left_out: dict[str, str] = {}
    found: dict[str, list[dict[str, float]]] = {}
    if repeats:
        workflow_of(plan, "store", cache_dir=f"{plan.folder}/store")  # prepares the volumes
        gc.collect()
    turns = [(repeat, kind) for repeat in range(repeats) for kind in STARTS]
    for repeat, kind in progress.track(turns, description="starting"):
        processes, workers = STARTS[kind]
        if there < processes:
            left_out[kind] = f"two processes need two {needed}, found {there}"
        if kind in left_out:
            continue
        order = Path(plan.folder) / f"start_{len(found)}_{repeat}_{processes}_{workers}.json"
        try:
            found.setdefault(kind, []).append(in_processes(plan, order, processes, workers))
        except (ChildProcessError, subprocess.TimeoutExpired) as error:
            left_out[kind] = str(error)
            found.pop(kind, None)
    rows = {
        kind: {key: round(float(np.median([one[key] for one in several])), 4) for key in several[0]}
        for kind, several in found.items()
    }
    steps = {kind: [round(one["step_ms"], 2) for one in several] for kind, several in found.items()}
    return {"starts": rows, "step_ms_of_each_start": steps, "starts_left_out": left_out}


def in_processes(plan: Plan, order: Path, processes: int, workers: int) -> dict[str, float]:
    """Run this script's worker as one process, or as several by torchrun; what they measured."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(Path(__file__).resolve())]
    command += ["--worker", str(order), "--threads", str(torch.get_num_threads())]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if plan.device == "cpu" else {}
    order.write_text(json.dumps({"plan": asdict(plan), "workers": workers, "started": time.time()}))
    child = subprocess.Popen(
        command, env={**os.environ, **hidden}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, errors = child.communicate(timeout=LIMIT_S)
    except BaseException:
        child.terminate()  # torchrun ends its processes, too
        child.wait()
        raise
    if child.returncode:
        raise ChildProcessError((errors.strip().splitlines() or [f"exit status {child.returncode}"])[-1])
    measured: dict[str, float] = json.loads(order.with_suffix(".times").read_text())
    return measured


def measure_process(order: Path) -> None:
    """Train two epochs, alone or as one of torchrun's processes; the first one writes its times beside ``order``."""
    asked = json.loads(order.read_text())
    plan = Plan(**asked["plan"])
    made = workflow_of(
        plan,
        order.stem,
        ["multi_gpu_train.yaml"] if "WORLD_SIZE" in os.environ else [],
        cache_dir=f"{plan.folder}/store",
        num_workers=asked["workers"],
        epochs=2,
        val_interval=1,
        image_interval=2,
        **{"train#dataset#volumes": f"$type(@train#volumes)(@train#volumes.items * {REPEATED})"},
    )
    trainer, validator = trainer_of(made), made.parser.get_parsed_content("validate#evaluator")
    marks: dict[str, list[float]] = {}

    def mark(_engine: Any, name: str) -> None:
        if plan.device == "cuda":
            torch.cuda.synchronize()
        marks.setdefault(name, []).append(time.time() - asked["started"])

    trainer.add_event_handler(Events.GET_BATCH_STARTED, mark, "asked")
    trainer.add_event_handler(Events.GET_BATCH_COMPLETED, mark, "got")
    trainer.add_event_handler(Events.ITERATION_COMPLETED, mark, "done")
    validator.add_event_handler(Events.STARTED, mark, "validating")
    validator.add_event_handler(Events.COMPLETED, mark, "validated")
    train_until(trainer, 2)
    if idist.get_rank() == 0:
        order.with_suffix(".times").write_text(json.dumps(spans(marks)))
    made.finalize()


def spans(marks: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """From the moments at which two epochs' steps asked for a batch, got it and were done, and those of validations."""
    asked, got, done = (np.array(marks[name]).reshape(2, -1) for name in ("asked", "got", "done"))
    waits, steps = (got - asked)[1], (done - got)[1]
    return {
        "first_step_s": float(got[0, 0]),
        "first_validation_s": marks["validated"][0],
        "first_wait_ms": float(waits[0]) * 1e3,
        "wait_ms": float(np.median(waits[1:])) * 1e3,
        "step_ms": float(np.median(steps)) * 1e3,
        "validation_s": marks["validated"][1] - marks["validating"][1],
    }


# ---------------------------------------------------------------------------------------------------- the tables


def show(result: dict[str, Any]) -> None:
    """Print the numbers as tables."""
    console = Console()
    facts = result["machine"]
    console.print(
        f"{result['method']}, {result['size']}, {facts['processor']}, {facts['threads']} thread(s), "
        f"torch {facts['torch']}; load {facts['load']} on {facts['cores']} core(s)"
    )
    if result["ms_per_step"]:
        rows = [
            (
                way,
                f"{ms:.1f}",
                "{:.1f} to {:.1f}".format(*result["quartiles_ms"][way]),
                f"{result['times_plain'][way]:.2f}",
            )
            for way, ms in result["ms_per_step"].items()
        ]
        console.print(
            table_of(f"One training step, {result['clock']}, medians", ["way", "ms", "quartiles", "× plain"], rows)
        )
    for way, reason in result["left_out"].items():
        console.print(f"{way}: left out, {reason}")
    rows = [(name, *(f"{mb[key]:.1f}" for key in ("held", "step", "both"))) for name, mb in result["memory_mb"].items()]
    title = f"Memory in MB (the paper's Table 8: classifiers +{result['table_8_mb']} MB on BraTS)"
    console.print(table_of(title, ["configuration", "held", "a step beyond it", "both"], rows))
    rows = [(o["operation"], str(o["calls"]), f"{o['ms']:.1f}", f"{o['share']:.0%}") for o in result["slowest"]]
    console.print(table_of("Slowest operations of a step", ["operation", "calls", "ms", "share"], rows))
    columns = ("first_step_s", "first_validation_s", "validation_s", "first_wait_ms", "wait_ms", "step_ms")
    rows = [(kind, *(f"{row[key]:.1f}" for key in columns)) for kind, row in result["starts"].items()]
    heads = ["", "s to the first step", "to the first validation's end", "s a validation"]
    heads += ["ms waiting, first batch", "other batches", "ms a step"]
    if rows:
        console.print(table_of("Processes of their own, wall-clock time, medians", heads, rows))
    for kind, reason in result["starts_left_out"].items():
        console.print(f"{kind}: left out, {reason}")


def table_of(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table whose first column is text and whose others are numbers."""
    table = Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    typer.run(main)
