#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time what one training slice costs: from cached volumes, and by loading the case for each slice.

    python scripts/bench_data.py                        # on phantoms of BraTS's size, made first (240x240x155, 1 mm)
    python scripts/bench_data.py --data DIR --json bench.json

The transforms are those of the bundle brats_cggm, with and without its augmentation. The naive way reads the case's
five files and takes one slice of each, without any of the preparation. Times are CPU time of this process with one
thread; all ways take turns, so that whatever else the machine does meets them alike, and the median of the rounds
counts.
"""

from __future__ import annotations

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import torch
import typer
from monai.bundle import ConfigParser
from monai.transforms import CastToTyped, Compose, RandSpatialCropd, SpatialPadd
from rich.console import Console
from rich.table import Table

from monai_cggm.data.checks import load_cases
from monai_cggm.data.phantom import write_phantoms
from monai_cggm.data.slices import SliceDataset
from monai_cggm.data.volumes import CachedVolumes, cached_volumes
from monai_cggm.files import atomic_path
from monai_cggm.resources import share_path
from monai_cggm.transforms import RandSlicesd

SHAPE = (240, 240, 155)
NAIVE = "load the case, take a slice"


def main(
    data: Annotated[Path | None, typer.Option(help="Folder of cases; without it phantoms are made.")] = None,
    cases: Annotated[int, typer.Option(min=1, help="Cases to use.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every way takes its turn.")] = 10,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers.")] = None,
) -> None:
    """Time what one training slice costs: from cached volumes, and by loading the case for each slice."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if data is None:
            data = Path(scratch) / "phantoms"
            write_phantoms(data, cases=cases, shape=SHAPE, spacing=1.0, progress=True)
        result = bench(data, cases, rounds, Path(scratch) / "cache")
    show(result)
    if json_file is not None:
        with atomic_path(json_file) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def bench(data: Path, count: int, rounds: int, cache_dir: Path) -> dict[str, Any]:
    """Run all ways and return the numbers, times in milliseconds."""
    config = ConfigParser()
    config.read_config(share_path("bundles/brats_cggm/configs/train.yaml"))
    modalities = config.get_parsed_content("modalities")
    preparation = config.get_parsed_content("preprocessing")
    augmented = config.get_parsed_content("train#preprocessing")
    cropped = Compose(
        [t for t in augmented.transforms if isinstance(t, (RandSlicesd, SpatialPadd, RandSpatialCropd, CastToTyped))]
    )
    items = load_cases(data, modalities)[:count]
    start = time.process_time()
    memory = cached_volumes(items, preparation, progress=False)
    prepared = (time.process_time() - start) * 1e3 / len(items)
    disk = cached_volumes(items, preparation, cache_dir=cache_dir, progress=False)
    files = [[item[key] for key in (*modalities, "label")] for item in items]
    ways: dict[str, Callable[[int], int]] = {
        NAIVE: lambda turn: take_naively(files[turn % len(files)], turn),
        "cached in memory, cropped": slicer(memory, cropped),
        "cached in memory, cropped and augmented": slicer(memory, augmented),
        "cached on disk, cropped": slicer(disk, cropped),
        "cached on disk, cropped and augmented": slicer(disk, augmented),
    }
    times = take_turns(ways, rounds)
    medians = {way: float(np.median(values)) for way, values in times.items()}
    return {
        "data": "phantoms" if data.parent == cache_dir.parent else data.name,
        "cases": len(items),
        "shape": list(nib.load(files[0][0]).shape),
        "prepared_shape": list(memory[0]["image"].shape),
        "prepared_megabytes": round(megabytes(memory), 1),
        "slice_size": list(config.get_parsed_content("slice_size")),
        "slices_per_volume": config.get_parsed_content("slices_per_volume"),
        "rounds": rounds,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        "preparation_ms_per_case": round(prepared, 1),
        "ms_per_slice": {way: round(value, 3) for way, value in medians.items()},
        "times_faster": {way: round(medians[NAIVE] / value, 1) for way, value in medians.items()},
    }


def take_naively(files: Sequence[str], turn: int) -> int:
    """Read all files of a case, whole as gzip demands, and copy one slice of each. One slice."""
    for file in files:
        volume = np.asarray(nib.load(file).dataobj)
        np.array(volume[..., volume.shape[2] // 2 + turn % 8], dtype=np.float32)
    return 1


def slicer(volumes: CachedVolumes, transform: Compose) -> Callable[[int], int]:
    """Take the slices of one case as training does; how many that were."""
    dataset = SliceDataset(volumes, transform)
    return lambda turn: len(dataset[(turn, turn % len(dataset))])


def take_turns(ways: dict[str, Callable[[int], int]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of CPU time a slice, for each way and round; a first round does not count."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, take in ways.items():
            start = time.process_time()
            # The naive way has one slice a turn and is slow; the others are repeated to be measurable.
            slices = sum(take(turn * 8 + repeat) for repeat in range(1 if way == NAIVE else 8))
            if turn:
                times[way].append((time.process_time() - start) * 1e3 / slices)
    return times


def megabytes(volumes: CachedVolumes) -> float:
    """Memory of one prepared case's tensors."""
    tensors = [value for value in volumes[0].values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def show(result: dict[str, Any]) -> None:
    """Print the numbers as a table."""
    size = "x".join(map(str, result["slice_size"]))
    table = Table(title=f"One {size} training slice, {result['data']} of {'x'.join(map(str, result['shape']))}")
    table.add_column("way")
    table.add_column("ms of one core", justify="right")
    table.add_column("times faster", justify="right")
    for way, milliseconds in result["ms_per_slice"].items():
        table.add_row(way, f"{milliseconds:.2f}", f"{result['times_faster'][way]:.1f}")
    console = Console()
    console.print(table)
    console.print(
        f"Preparing a case once takes {result['preparation_ms_per_case'] / 1e3:.1f} s of one core; it is then "
        f"{'x'.join(map(str, result['prepared_shape']))} and takes {result['prepared_megabytes']} MB."
    )


if __name__ == "__main__":
    typer.run(main)
