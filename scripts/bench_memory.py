#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure the memory that one epoch of training data from the disk store takes, by the number of cases.

    python scripts/bench_memory.py                      # on small phantoms, made first
    python scripts/bench_memory.py --data DIR --cases 4 --sizes 125,625,1251 --train --limit-gb 8 --json memory.json

A store of the largest size is made of repeated cases: full copies under other names, so that every case is a file of
its own. One epoch of the bundle brats_cggm's training data (its transforms, SliceDataset, EpochSampler, DataLoader) is
then read by a fresh process for each size and number of workers, several times, by turns. A straight line through the
sizes gives the memory of a case with its standard error; BraTS 2021 is an extrapolation where the largest size is below
its 1,251 cases.

The memory is what the system cannot take back without swapping: anonymous pages and shared memory, of the process and
its workers together. Pages of files are left out: the page cache gives them up when memory runs short. Two numbers,
peaks of samples taken every 20 ms and after every batch:

    used         Pss_Anon + Pss_Shmem of /proc/PID/smaps_rollup: a page that processes share counts once
    anonymous    Anonymous: a page counts in every process that maps it, so that forked workers count the parent's again

With --limit-gb every process runs under setrlimit(RLIMIT_DATA) of the limit divided by the number of processes. It
bounds the heap and all private writable mappings, mapped volumes too while they are open, and a process that passes it
fails and is listed. It does not bound shared memory (/dev/shm), in which workers hand their batches over: that a run
ends says something of the heaps, and the column "used" counts both.

Network, optimizer and validation are not part of it, but with --train: then the bundle itself trains one epoch on each
size too, with hardware/cpu.yaml, in a process that the same limit holds, from its start to the validation of one case
and the checkpoint. That needs three cases to repeat: one is validated on, and one is left over.
"""

from __future__ import annotations

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import logging
import multiprocessing
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data import DataLoader
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import machine

from monai_cggm.data.checks import load_cases
from monai_cggm.data.phantom import write_phantoms
from monai_cggm.data.slices import EpochSampler, SliceDataset
from monai_cggm.data.volumes import CachedVolumes, cached_volumes
from monai_cggm.files import atomic_path
from monai_cggm.resources import share_path

#: BraTS 2021, training cases
FULL = 1251
#: of the phantoms, 2 mm
SHAPE = (120, 120, 77)
#: share of the free disk that the store may take
DISK_SHARE = 0.5
FIELDS = {"used": ("Pss_Anon", "Pss_Shmem"), "anonymous": ("Anonymous",)}


def main(
    data: Annotated[Path | None, typer.Option(help="Folder of cases to repeat; without it phantoms are made.")] = None,
    cases: Annotated[int, typer.Option(min=1, help="Cases to repeat.")] = 2,
    sizes: Annotated[str, typer.Option(help="Numbers of cases in the store, two or more, with commas.")] = "32,64,128",
    workers: Annotated[str, typer.Option(help="Numbers of worker processes, with commas.")] = "0,2",
    shape: Annotated[tuple[int, int, int], typer.Option(help="Voxels of the phantoms.")] = SHAPE,
    repeats: Annotated[int, typer.Option(min=1, help="Processes of each size and number of workers.")] = 3,
    batch: Annotated[int | None, typer.Option(min=1, help="Volumes a batch; without it the bundle's.")] = None,
    limit_gb: Annotated[float | None, typer.Option(help="Hard limit for all processes together.")] = None,
    train: Annotated[bool, typer.Option("--train", help="Train the bundle for an epoch on each size, too.")] = False,
    scratch: Annotated[Path | None, typer.Option(help="Where the store is made, and deleted.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers.")] = None,
    measure_store: Annotated[Path | None, typer.Option("--measure", hidden=True)] = None,
) -> None:
    """Measure the memory that one epoch of training data from the disk store takes, by the number of cases."""
    counts, processes = numbers(sizes), numbers(workers)
    if measure_store is not None:
        kind = functools.partial(measure_training, data) if train else measure
        print(json.dumps(kind(measure_store, counts[0], processes[0], batch, limit_gb)))
        return
    if len(counts) < 2:
        raise typer.BadParameter(f"a slope needs two sizes or more, got {sizes}")
    if train and cases < 3:
        raise typer.BadParameter(f"training needs three cases to repeat, got {cases}")
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        phantoms = data is None
        if data is None:
            data = Path(folder) / "phantoms"
            write_phantoms(data, cases=cases, shape=shape, spacing=240 / shape[0], progress=True)
        result = bench(data, cases, counts, processes, repeats, batch, limit_gb, Path(folder), train=train)
    result["data"] = "phantoms" if phantoms else data.name
    show(result)
    if json_file is not None:
        with atomic_path(json_file) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def bench(
    data: Path,
    cases: int,
    sizes: Sequence[int],
    workers: Sequence[int],
    repeats: int,
    batch: int | None,
    limit_gb: float | None,
    folder: Path,
    *,
    train: bool = False,
) -> dict[str, Any]:
    """Make the store, measure every size and number of workers, and return the numbers, memory in megabytes."""
    facts = machine()
    config = bundle()
    items = load_cases(data, config.get_parsed_content("modalities"))[:cases]
    prepared = cached_volumes(
        items, config.get_parsed_content("preprocessing"), cache_dir=folder / "prepared", progress=False
    )
    originals = [Path(item) for item in prepared.items if isinstance(item, Path)]
    store = folder / "store"
    repeat(originals, sizes[-1], store)
    turns = [(number, size) for _ in range(repeats) for number in workers for size in sizes]
    runs = [
        in_a_process(store, size, number, batch, limit_gb)
        for number, size in track(turns, description="measuring", console=Console(stderr=True))
    ]
    trainings = [
        in_a_process(store, size, number, batch, limit_gb, data)
        for number, size in track(turns if train else [], description="training", console=Console(stderr=True))
    ]
    per_case = sum(file.stat().st_size for file in originals) / len(originals)
    return {
        "clock": "wall time",
        "machine": facts,
        "cases_repeated": len(originals),
        "sizes": list(sizes),
        "repeats": repeats,
        "volumes_per_batch": batch or config.get_parsed_content("volumes_per_batch"),
        "slices_per_volume": config.get_parsed_content("slices_per_volume"),
        "limit": None if limit_gb is None else f"RLIMIT_DATA, {limit_gb} GB divided by the processes",
        "store_bytes_per_case": per_case,
        "store_gigabytes_full": per_case * FULL / 1e9,
        "full_cases": FULL,
        "runs": runs,
        "fits": fits(runs),
        "trainings": trainings,
        "training_fits": fits(trainings),
    }


def bundle() -> ConfigParser:
    config = ConfigParser()
    config.read_config(share_path("bundles/brats_cggm/configs/train.yaml"))
    return config


def repeat(originals: Sequence[Path], count: int, store: Path) -> None:
    """Fill ``store`` with ``count`` files, copies of ``originals`` in turn."""
    store.mkdir(parents=True)
    needed = sum(originals[index % len(originals)].stat().st_size for index in range(count))
    free = shutil.disk_usage(store).free
    if needed > DISK_SHARE * free:
        raise typer.BadParameter(
            f"{count} cases take {needed / 1e9:.1f} GB, more than {DISK_SHARE:.0%} of the {free / 1e9:.1f} GB that are "
            f"free in {store.parent}: fewer cases, or another --scratch"
        )
    for index in track(range(count), description="copying", console=Console(stderr=True)):
        # Through memory: copies by the file system might share their blocks, and so the page cache's pages.
        content = originals[index % len(originals)].read_bytes()
        (store / f"{index:05d}.safetensors").write_bytes(content)


def in_a_process(
    store: Path, size: int, workers: int, batch: int | None, limit_gb: float | None, train_on: Path | None = None
) -> dict[str, Any]:
    """Run this script for one size; a run that fails, as at the limit, says why."""
    options: dict[str, Any] = {
        "measure": store,
        "sizes": size,
        "workers": workers,
        "batch": batch,
        "limit-gb": limit_gb,
        "data": train_on,
    }
    words = [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]
    words += ["--train"] if train_on is not None else []
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        reason = " ".join(line.strip() for line in said[-2:])  # MONAI's last line is how to debug
        return {"cases": size, "workers": workers, "failed": reason}
    run: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return run


def measure(store: Path, size: int, workers: int, batch: int | None, limit_gb: float | None) -> dict[str, Any]:
    """Read one epoch of a store's first ``size`` cases, and return the peaks."""
    hold_to(limit_gb, workers)
    config = bundle()
    volumes = CachedVolumes(sorted(store.iterdir())[:size])
    dataset = SliceDataset(volumes, config.get_parsed_content("train#preprocessing"))
    loader = DataLoader(
        dataset,
        sampler=EpochSampler(dataset),
        batch_size=batch or config.get_parsed_content("volumes_per_batch"),
        num_workers=workers,
        drop_last=False,
        persistent_workers=workers > 0,
    )
    slices = 0
    start = time.perf_counter()
    with PeakMemory() as peak:
        base = dict(peak.megabytes)
        for samples in loader:
            slices += len(samples["image"])
            peak.sample()
    return {
        "cases": size,
        "workers": workers,
        "slices": slices,
        "seconds": time.perf_counter() - start,
        "start_megabytes": base,
        "peak_megabytes": peak.megabytes,
    }


def measure_training(
    data: Path, store: Path, size: int, workers: int, batch: int | None, limit_gb: float | None
) -> dict[str, Any]:
    """Train the bundle for one epoch on a store's first ``size`` cases, and return the peaks."""
    hold_to(limit_gb, workers)
    logging.disable(logging.WARNING)
    files = [share_path("bundles/brats_cggm/configs/train.yaml"), share_path("configs/hardware/cpu.yaml")]
    there = len(load_cases(data, bundle().get_parsed_content("modalities")))
    stored = [str(file) for file in sorted(store.iterdir())[:size]]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=store.parent) as folder, PeakMemory() as peak:
        base = dict(peak.megabytes)
        settings = {
            "dataset_dir": str(data),
            "run_dir": f"{folder}/run",
            "cache_dir": f"{folder}/validation",
            "device": "$torch.device('cpu')",
            "split_sizes": [there - 2, 1, 1],
            "epochs": 1,
            "warmup_epochs": 0,
            "val_interval": 1,
            "image_interval": 1,
            "num_workers": workers,
            "train#volumes": {"_target_": "monai_cggm.data.volumes.CachedVolumes", "items": list(map(Path, stored))},
            "initialize": [],  # whose checks would count the cases that are split, not the store's
            **({} if batch is None else {"volumes_per_batch": batch}),
        }
        made = ConfigWorkflow(list(map(str, files)), workflow_type="train", logging_file=False, **settings)
        made.initialize()
        made.run()
        trainer = made.parser.get_parsed_content("train#trainer")
        slices = trainer.state.iteration * made.parser.get_parsed_content("volumes_per_batch")
    return {
        "cases": size,
        "workers": workers,
        "slices": slices * made.parser.get_parsed_content("slices_per_volume"),
        "seconds": time.perf_counter() - start,
        "start_megabytes": base,
        "peak_megabytes": peak.megabytes,
    }


def hold_to(limit_gb: float | None, workers: int) -> None:
    """Set this process's share of the limit, which its workers inherit."""
    torch.set_num_threads(1)
    if limit_gb is not None:
        limit = int(limit_gb * 1e9 / (workers + 1))
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


class PeakMemory:
    """The most memory that this process and its children took together while the block ran."""

    def __init__(self, interval: float = 0.02) -> None:
        self.megabytes = dict.fromkeys(FIELDS, 0.0)
        self._interval = interval
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self.sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def sample(self) -> None:
        """Look now."""
        children = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
        rollups = [rollup(process) for process in (os.getpid(), *children)]
        with self._lock:
            for name, fields in FIELDS.items():
                now = sum(values.get(field, 0) for values in rollups for field in fields) * 1024 / 1e6
                self.megabytes[name] = max(self.megabytes[name], now)

    def _watch(self) -> None:
        while not self._end.wait(self._interval):
            self.sample()


def rollup(process: int) -> dict[str, int]:
    """Kilobytes by kind of page; nothing for a process that has just ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {}
    return {name: int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in lines)}


def fits(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each number of workers with which runs of two sizes or more ended."""
    ended = [run for run in runs if "failed" not in run]
    groups = {run["workers"]: [one for one in ended if one["workers"] == run["workers"]] for run in ended}
    return [fit(group) for group in groups.values() if len({run["cases"] for run in group}) > 1]


def fit(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Least squares of the peaks over the number of cases; memory of the full data set.

    The slope's standard error is None where there are not more runs than the two numbers of a line.
    """
    cases = [run["cases"] for run in runs]
    found: dict[str, Any] = {"workers": runs[0]["workers"]}
    for name in FIELDS:
        peaks = [run["peak_megabytes"][name] for run in runs]
        slope, intercept = np.polyfit(cases, peaks, 1)
        error = None if len(runs) < 3 else float(np.sqrt(np.polyfit(cases, peaks, 1, cov=True)[1][0, 0])) * 1e3
        found[name] = {
            "kilobytes_per_case": float(slope) * 1e3,
            "standard_error": error,
            "megabytes_without_cases": float(intercept),
            "megabytes_full": float(intercept + slope * FULL),
            "extrapolated": max(cases) < FULL,
        }
    return found


def show(result: dict[str, Any]) -> None:
    """Print the numbers as tables."""
    console = Console()
    batch = f"batches of {result['volumes_per_batch']} volumes × {result['slices_per_volume']} slices"
    show_runs(
        console,
        f"Peak memory of one epoch of training data from disk, MB, {result['data']}, {batch}",
        result["runs"],
        result["fits"],
    )
    if result["trainings"]:
        title = f"Peak memory of one epoch of training from disk (hardware/cpu.yaml), MB, {result['data']}"
        show_runs(console, title, result["trainings"], result["training_fits"])
    console.print(
        f"A case takes {result['store_bytes_per_case'] / 1e6:.2f} MB on disk, {FULL} cases "
        f"{result['store_gigabytes_full']:.1f} GB. Limit: {result['limit'] or 'none'}."
    )


def show_runs(console: Console, title: str, runs: Sequence[dict[str, Any]], lines: Sequence[dict[str, Any]]) -> None:
    """Print what the runs took, and a line through them."""
    table = Table(title=title)
    for column in ("workers", "cases", "slices", "used", "anonymous", "seconds"):
        table.add_column(column, justify="right")
    for run in (run for run in runs if "failed" not in run):
        peaks = [f"{run['peak_megabytes'][name]:.1f}" for name in FIELDS]
        table.add_row(*(str(run[key]) for key in ("workers", "cases", "slices")), *peaks, f"{run['seconds']:.1f}")
    console.print(table)
    for run in (run for run in runs if "failed" in run):
        console.print(f"{run['workers']} workers, {run['cases']} cases: failed, {run['failed']}")
    for line in lines:
        used = line["used"]
        how = "extrapolated" if used["extrapolated"] else "within the sizes measured"
        error = "" if used["standard_error"] is None else f" (standard error {used['standard_error']:.2f})"
        console.print(
            f"{line['workers']} workers: {used['kilobytes_per_case']:.2f} kB a case{error}; {FULL} cases ({how}): "
            f"{used['megabytes_full']:.0f} MB used, {line['anonymous']['megabytes_full']:.0f} MB anonymous."
        )


if __name__ == "__main__":
    typer.run(main)
