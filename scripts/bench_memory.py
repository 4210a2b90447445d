#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure the memory that one epoch of training data from the disk store takes, by the number of cases.

    python scripts/bench_memory.py                      # on small phantoms, made first
    python scripts/bench_memory.py --data DIR --sizes 250,500,1000 --limit-gb 8 --json memory.json

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
ends says something of the heaps, and the column "used" counts both. Network, optimizer and validation are not part of
it: nothing trains here.
"""

from __future__ import annotations

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

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
from monai.bundle import ConfigParser
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
    scratch: Annotated[Path | None, typer.Option(help="Where the store is made, and deleted.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers.")] = None,
    measure_store: Annotated[Path | None, typer.Option("--measure", hidden=True)] = None,
) -> None:
    """Measure the memory that one epoch of training data from the disk store takes, by the number of cases."""
    counts, processes = numbers(sizes), numbers(workers)
    if measure_store is not None:
        print(json.dumps(measure(measure_store, counts[0], processes[0], batch, limit_gb)))
        return
    if len(counts) < 2:
        raise typer.BadParameter(f"a slope needs two sizes or more, got {sizes}")
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        phantoms = data is None
        if data is None:
            data = Path(folder) / "phantoms"
            write_phantoms(data, cases=cases, shape=shape, spacing=240 / shape[0], progress=True)
        result = bench(data, cases, counts, processes, repeats, batch, limit_gb, Path(folder))
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
    ended = [run for run in runs if "failed" not in run]
    several = [number for number in workers if len({run["cases"] for run in ended if run["workers"] == number}) > 1]
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
        "fits": [fit([run for run in ended if run["workers"] == number]) for number in several],
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


def in_a_process(store: Path, size: int, workers: int, batch: int | None, limit_gb: float | None) -> dict[str, Any]:
    """Run this script for one size; a run that fails, as at the limit, says why."""
    options: dict[str, Any] = {
        "measure": store,
        "sizes": size,
        "workers": workers,
        "batch": batch,
        "limit-gb": limit_gb,
    }
    words = [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"cases": size, "workers": workers, "failed": reason}
    run: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return run


def measure(store: Path, size: int, workers: int, batch: int | None, limit_gb: float | None) -> dict[str, Any]:
    """Read one epoch of a store's first ``size`` cases, and return the peaks."""
    torch.set_num_threads(1)
    if limit_gb is not None:
        limit = int(limit_gb * 1e9 / (workers + 1))
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
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
    table = Table(title=f"Peak memory of one epoch of training data from disk, MB, {result['data']}, {batch}")
    for column in ("workers", "cases", "slices", "used", "anonymous", "seconds"):
        table.add_column(column, justify="right")
    for run in (run for run in result["runs"] if "failed" not in run):
        peaks = [f"{run['peak_megabytes'][name]:.1f}" for name in FIELDS]
        table.add_row(*(str(run[key]) for key in ("workers", "cases", "slices")), *peaks, f"{run['seconds']:.1f}")
    console.print(table)
    for run in (run for run in result["runs"] if "failed" in run):
        console.print(f"{run['workers']} workers, {run['cases']} cases: failed, {run['failed']}")
    for line in result["fits"]:
        used = line["used"]
        how = "extrapolated" if used["extrapolated"] else "within the sizes measured"
        error = "" if used["standard_error"] is None else f" (standard error {used['standard_error']:.2f})"
        console.print(
            f"{line['workers']} workers: {used['kilobytes_per_case']:.2f} kB a case{error}; {FULL} cases ({how}): "
            f"{used['megabytes_full']:.0f} MB used, {line['anonymous']['megabytes_full']:.0f} MB anonymous."
        )
    console.print(
        f"A case takes {result['store_bytes_per_case'] / 1e6:.2f} MB on disk, {FULL} cases "
        f"{result['store_gigabytes_full']:.1f} GB. Limit: {result['limit'] or 'none'}."
    )


if __name__ == "__main__":
    typer.run(main)
