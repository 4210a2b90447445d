#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time what one training step costs by each method, relative to joint training of the same network.

    python scripts/bench_methods.py                          # on small phantoms, made first
    python scripts/bench_methods.py --arms joint,cggm,recipe --rounds 20 --json bench.json
    python scripts/bench_methods.py --device cuda

Arms are those of a study (methods_brats_2mm), with its network and batch, and one more: `observe`, joint training with
classifiers that only watch. A step is what happens between two batches: forward and backward passes, the method,
clipping, the optimizer, the log. Times are CPU time of this process with one thread, and on a GPU wall-clock time once
it has done its work; all arms take turns, an epoch each, so that whatever else the machine does meets them alike. The
first turn does not count. Ratios are of means, because ReconBoost's steps are of two kinds, of which a median would
show one; medians stand beside them, and where the two differ elsewhere, something disturbed the steps.
"""

from __future__ import annotations

import contextlib
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.engines import SupervisedTrainer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from timing import check_device, clock_name, clock_of, machine

from monai_cggm.analysis.cells import ALONE
from monai_cggm.compare.study import Arm, Study, find_file, read_study
from monai_cggm.data.phantom import write_phantoms
from monai_cggm.files import atomic_path

STUDY = "methods_brats_2mm"
OBSERVE = Arm("observe", "joint training, classifiers watch", ("configs/methods/observe.yaml",))
#: 8 of 12 phantoms are trained on, two batches of 4
CASES, SIZES = 12, [8, 2, 2]


def main(
    arms: Annotated[str | None, typer.Option(help="Only these, with commas; joint is always there.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Epochs that count, two steps each.")] = 16,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers.")] = None,
) -> None:
    """Time what one training step costs by each method, relative to joint training of the same network."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    study = read_study(STUDY)
    ways = {arm.name: arm for arm in (*study.arms.values(), OBSERVE) if not arm.name.startswith(ALONE)}
    chosen = list(ways) if arms is None else ["joint", *(a for a in arms.split(",") if a != "joint")]
    unknown = [name for name in chosen if name not in ways]
    if unknown:
        raise typer.BadParameter(f"no arm {', '.join(unknown)}; there are {', '.join(ways)}")
    check_device(device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_phantoms(folder / "phantoms", cases=CASES, shape=(80, 80, 60), spacing=2.0)
        result = bench([ways[name] for name in chosen], study, folder, rounds, device)
    show(result)
    if json_file is not None:
        with atomic_path(json_file) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def bench(arms: Sequence[Arm], study: Study, folder: Path, rounds: int, device: str) -> dict[str, Any]:
    """Run all arms and return the numbers, times in milliseconds."""
    facts = machine(device)
    # the bundles' own progress bars, one an epoch and arm, would hide this script's
    with (
        Path(os.devnull).open("w") as nothing,
        Progress(console=Console(stderr=True)) as progress,
        contextlib.redirect_stderr(nothing),
    ):
        building = progress.track(arms, description="building")
        trainers = {arm.name: trainer_of(arm, study, folder, rounds, device) for arm in building}
        times = take_turns(trainers, rounds, clock_of(device), progress)
    means = {name: float(np.mean(values)) for name, values in times.items()}
    return {
        "study": STUDY,
        "rounds": rounds,
        "steps": {name: len(values) for name, values in times.items()},
        "clock": clock_name(device),
        "machine": facts,
        "titles": {arm.name: arm.title for arm in arms},
        "ms_per_step": {name: round(value, 1) for name, value in means.items()},
        "median_ms": {name: round(float(np.median(values)), 1) for name, values in times.items()},
        "standard_error_ms": {n: round(float(np.std(v) / len(v) ** 0.5), 2) for n, v in times.items()},
        "times_joint": {name: round(value / means["joint"], 3) for name, value in means.items()},
    }


def trainer_of(arm: Arm, study: Study, folder: Path, rounds: int, device: str) -> SupervisedTrainer:
    """Build an arm's trainer, as its bundle does."""
    run_dir = folder / arm.name
    values = {
        **study.settings,
        **arm.settings,
        "device": f"$torch.device('{device}')",
        "dataset_dir": str(folder / "phantoms"),
        "run_dir": str(run_dir),
        "resume": True,  # every turn goes on from the one before
        "split_sizes": SIZES,
        "epochs": rounds + 2,  # the last one, which validates, is not reached
        "warmup_epochs": 1,
        "gradient_clip": 1.0,  # the paper's CGGM has none; here what a method costs is compared, and nothing else
        "val_interval": rounds + 2,
        "image_interval": rounds + 2,
    }
    files = [str(find_file(name)) for name in (*study.config, *arm.overlays)]
    made = ConfigWorkflow(config_file=files, workflow_type="train", logging_file=False, **values)
    if arm.needs:
        write_teachers(made, study.modalities, run_dir)
    made.initialize()
    return made.parser.get_parsed_content("train#trainer")


def write_teachers(made: ConfigWorkflow, modalities: Sequence[str], run_dir: Path) -> None:
    """Networks that were not trained at all stand in for those that a method needs: they cost as much."""
    network = made.parser.get_parsed_content("network_def")
    kind, arguments = type(network), dict(made.parser.get("network_def"))
    plain = {key: made.parser.get_parsed_content(f"network_def#{key}") for key in arguments if key != "_target_"}
    for name, members in {**{m: [m] for m in modalities}, "joint": list(modalities)}.items():
        teacher = run_dir / "teachers" / name
        teacher.mkdir(parents=True)
        state = kind(**{**plain, "modalities": members}).state_dict()
        torch.save({"model": state, "epoch": 1}, teacher / "model.pt")


def take_turns(
    trainers: dict[str, SupervisedTrainer], rounds: int, clock: Callable[[], float], progress: Progress
) -> dict[str, list[float]]:
    """Milliseconds of every step that counts, by arm."""
    times: dict[str, list[float]] = {name: [] for name in trainers}
    started: dict[str, float] = {}
    for name, trainer in trainers.items():
        trainer.add_event_handler(
            Events.GET_BATCH_COMPLETED, lambda _engine, name=name: started.update({name: clock()})
        )
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED,
            lambda _engine, name=name: times[name].append((clock() - started[name]) * 1e3),
        )
    for turn in progress.track(range(1, rounds + 2), description="training"):
        for name, trainer in trainers.items():
            trainer.state.max_epochs = turn
            trainer.run()
            if turn == 1:
                times[name].clear()
    return times


def show(result: dict[str, Any]) -> None:
    """Print the numbers as a table."""
    table = Table(title=f"One training step, {result['study']}, {result['machine']['processor']}, {result['clock']}")
    for column in ("arm", "", "mean ms", "±", "median ms", "× joint"):
        table.add_column(column, justify="left" if column in ("arm", "") else "right")
    for name in sorted(result["ms_per_step"], key=result["ms_per_step"].get):
        table.add_row(
            name,
            result["titles"][name],
            f"{result['ms_per_step'][name]:.1f}",
            f"{result['standard_error_ms'][name]:.1f}",
            f"{result['median_ms'][name]:.1f}",
            f"{result['times_joint'][name]:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
