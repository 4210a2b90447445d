#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time what one training slice costs: from the store on disk, and in the ways that it replaces.

    python scripts/bench_data.py                        # on phantoms of BraTS's size, made first (240x240x155, 1 mm)
    python scripts/bench_data.py --data DIR --json bench.json
    python scripts/bench_data.py --ways store,persistent --repeats 5

The transforms are those of the bundle brats_cggm. The ways:

    store        monai_cggm's cached_volumes(cache_dir=)
    memory       the same volumes, held in memory
    persistent   MONAI's PersistentDataset of whole prepared volumes
    hdf5         an HDF5 file a case, image (float32) and label, read whole (needs h5py, as do the next two)
    hdf5-half    the same, with the store's float16: what float32 alone costs is the difference
    hdf5-gzip    as hdf5, compressed by gzip
    nifti        load the case's five files and prepare them
    naive        load the case's five files, prepare nothing

All prepared ways give the same slices, bit for bit. First all stores are written (the cases are prepared without and
with threads: time, and memory at its peak), then every way is measured in Python processes of its own, by turns. Times
are per slice, wall and CPU (user and system) of one thread, medians over all cases, passes and processes: with one
slice taken from a case, and with as many as the bundle takes; for the slice as it is, with the bundle's padding and
cropping, and with all its augmentation. "cold" is with none of the files in the page cache (posix_fadvise, checked by
mincore before every pass), "warm" with all of them in it. What the disk itself or a hypervisor keeps is not known here.
"""

from __future__ import annotations

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import ctypes
import importlib.util
import mmap
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import torch
import typer
from bench_memory import PeakMemory
from monai.bundle import ConfigParser
from monai.data import Dataset, PersistentDataset
from monai.transforms import CastToTyped, Compose, RandSpatialCropd, SpatialPadd
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import machine

from monai_cggm.data.checks import load_cases
from monai_cggm.data.phantom import write_phantoms
from monai_cggm.data.slices import SliceDataset
from monai_cggm.data.volumes import cached_volumes
from monai_cggm.files import atomic_path
from monai_cggm.resources import share_path
from monai_cggm.transforms import RandSlicesd

SHAPE = (240, 240, 155)
WAYS = {
    "store": "store on disk",
    "memory": "held in memory",
    "persistent": "PersistentDataset, whole volumes",
    "hdf5": "HDF5, float32, whole volumes",
    "hdf5-half": "HDF5, float16, whole volumes",
    "hdf5-gzip": "HDF5, float32, gzip, whole volumes",
    "nifti": "load NIfTI and prepare",
    "naive": "load NIfTI only",
}
HDF5: dict[str, dict[str, Any]] = {
    "hdf5": {"dtype": "float32"},
    "hdf5-half": {"dtype": "float16"},
    "hdf5-gzip": {"dtype": "float32", "compression": "gzip"},
}
#: ways that take seconds a case: one process, at most so many passes, and one case before them
SLOW = ("nifti", "naive")
SLOW_PASSES = 3
#: preparations of all cases: how many threads
PREPARE = {"prepare-0": 0, "prepare-2": 2}
STAGES = {"slice": "slice", "cropped": "padded and cropped", "augmented": "cropped and augmented"}
#: more of the files than this in the page cache is not cold
COLD = 0.01


@dataclass(frozen=True)
class Setup:
    """What every way needs: the datalist, the transforms, and where the stores are."""

    items: list[dict[str, Any]]
    modalities: list[str]
    preparation: Compose
    augmentation: Compose
    slices_per_volume: int
    slice_size: list[int]
    stores: Path

    def stage(self, stage: str, slices: int) -> Compose:
        """The bundle's random transforms up to a stage, with ``slices`` slices a volume."""
        chosen = copy.deepcopy(list(self.augmentation.transforms))
        kinds: dict[str, tuple[type, ...]] = {
            "slice": (RandSlicesd,),
            "cropped": (RandSlicesd, SpatialPadd, RandSpatialCropd, CastToTyped),
            "augmented": (object,),
        }
        chosen = [step for step in chosen if isinstance(step, kinds[stage])]
        chosen[0].num_slices = slices
        return Compose(chosen)


class Hdf5Cases:
    """A file a case, read whole, as a dataset of slices commonly does."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import h5py

        with h5py.File(self.files[index]) as file:
            return {key: torch.from_numpy(file[key][()]) for key in file}


def main(
    data: Annotated[Path | None, typer.Option(help="Folder of cases; without it phantoms are made.")] = None,
    cases: Annotated[int, typer.Option(min=1, help="Cases to use.")] = 2,
    ways: Annotated[str, typer.Option(help="Which ways, with commas; store is always there.")] = ",".join(WAYS),
    passes: Annotated[int, typer.Option(min=1, help="Times that a process goes over the cases.")] = 5,
    repeats: Annotated[int, typer.Option(min=1, help="Processes a way.")] = 3,
    scratch: Annotated[Path | None, typer.Option(help="Where phantoms and stores are made, and deleted.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers.")] = None,
    measure_way: Annotated[str | None, typer.Option("--measure", hidden=True)] = None,
    stores: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Time what one training slice costs: from the store on disk, and in the ways that it replaces."""
    torch.set_num_threads(1)
    if measure_way is not None:
        assert data is not None
        assert stores is not None
        setup = read_setup(data, cases, stores)
        prepares = measure_way in PREPARE
        print(json.dumps(prepare(measure_way, setup) if prepares else measure(measure_way, setup, passes)))
        return
    chosen = list(dict.fromkeys(["store", *ways.split(",")]))
    unknown = [way for way in chosen if way not in WAYS]
    if unknown:
        raise typer.BadParameter(f"no way {', '.join(unknown)}; there are {', '.join(WAYS)}")
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        phantoms = data is None
        if data is None:
            data = Path(folder) / "phantoms"
            write_phantoms(data, cases=cases, shape=SHAPE, spacing=1.0, progress=True)
        result = bench(data, cases, chosen, passes, repeats, Path(folder) / "stores")
    result["data"] = "phantoms" if phantoms else data.name
    show(result)
    if json_file is not None:
        with atomic_path(json_file) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def read_setup(data: Path, cases: int, stores: Path) -> Setup:
    """Read the bundle's transforms and the datalist."""
    config = ConfigParser()
    config.read_config(share_path("bundles/brats_cggm/configs/train.yaml"))
    modalities = config.get_parsed_content("modalities")
    return Setup(
        items=load_cases(data, modalities)[:cases],
        modalities=modalities,
        preparation=config.get_parsed_content("preprocessing"),
        augmentation=config.get_parsed_content("train#preprocessing"),
        slices_per_volume=config.get_parsed_content("slices_per_volume"),
        slice_size=list(config.get_parsed_content("slice_size")),
        stores=stores,
    )


def bench(data: Path, cases: int, ways: Sequence[str], passes: int, repeats: int, stores: Path) -> dict[str, Any]:
    """Write all stores, measure every way in processes of its own, and return the numbers."""
    facts = machine()
    setup = read_setup(data, cases, stores)
    preparation = [row for way in PREPARE for row in in_a_process(way, data, cases, passes, stores)]
    (stores / "prepare-0").rename(stores / "store")
    shutil.rmtree(stores / "prepare-2")
    prepared = volumes_of("store", setup)
    skipped = {way: "h5py is not installed" for way in ways if way in HDF5 and not has_h5py()}
    ways = [way for way in ways if way not in skipped]
    for way in track(ways, description="writing the stores", console=Console(stderr=True)):
        write_store(way, setup)
    flush(path for way in ways for case in files_of(way, setup) for path in case)
    order = [(repeat, way) for repeat in range(repeats) for way in ways if repeat == 0 or way not in SLOW]
    found: list[dict[str, Any]] = []
    for _, way in track(order, description="measuring", console=Console(stderr=True)):
        found += [{"way": way, **row} for row in in_a_process(way, data, cases, passes, stores)]
    image = prepared[0]["image"]
    return {
        "cases": len(setup.items),
        "shape": list(nib.load(setup.items[0][setup.modalities[0]]).shape),
        "prepared_shape": list(image.shape),
        "slice_size": setup.slice_size,
        "slices_per_volume": setup.slices_per_volume,
        "passes": passes,
        "repeats": repeats,
        "clock": "wall and CPU time",
        "machine": facts,
        "preparation": preparation,
        "ways": {way: WAYS[way] for way in ways},
        "skipped": skipped,
        "megabytes_per_case": {way: megabytes(files_of(way, setup)) for way in ways if way != "memory"},
        "measured": summarise(found),
    }


def prepare(way: str, setup: Setup) -> list[dict[str, Any]]:
    """Prepare all cases, read from the page cache, into a store on disk, by as many threads as the way has."""
    read_through([Path(item[key]) for item in setup.items for key in (*setup.modalities, "label")])
    with PeakMemory() as peak:
        before = peak.megabytes["used"]
        start, start_cpu = time.perf_counter(), time.process_time()
        cached_volumes(
            setup.items, setup.preparation, cache_dir=setup.stores / way, workers=PREPARE[way], progress=False
        )
        wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    return [
        {
            "workers": PREPARE[way],
            "seconds_per_case": wall / len(setup.items),
            "cpu_seconds_per_case": cpu / len(setup.items),
            "peak_megabytes": peak.megabytes["used"] - before,
        }
    ]


def has_h5py() -> bool:
    return importlib.util.find_spec("h5py") is not None


def write_store(way: str, setup: Setup) -> None:
    """Write a way's files, where it has any of its own."""
    if way == "persistent":
        dataset = volumes_of(way, setup)
        for index in range(len(dataset)):
            dataset[index]
    if way in HDF5:
        import h5py

        options = dict(HDF5[way])
        dtype = options.pop("dtype")
        (setup.stores / way).mkdir(parents=True, exist_ok=True)
        for item, file in zip(volumes_of("store", setup), hdf5_files(way, setup), strict=True):
            with h5py.File(file, "w") as stream:
                stream.create_dataset("image", data=np.ascontiguousarray(item["image"], dtype=dtype), **options)
                stream.create_dataset("label", data=np.ascontiguousarray(item["label"]), **options)
                for key in ("tumour_voxels", "brain_voxels"):
                    stream.create_dataset(key, data=np.asarray(item[key]))


def hdf5_files(way: str, setup: Setup) -> list[Path]:
    return [setup.stores / way / f"{item['case']}.h5" for item in setup.items]


def volumes_of(way: str, setup: Setup) -> Any:
    """A way's prepared volumes, whatever it costs to get one."""
    if way in HDF5:
        return Hdf5Cases(hdf5_files(way, setup))
    preparation = copy.deepcopy(setup.preparation)  # MONAI's readers remember what they last read
    if way == "nifti":
        return Dataset(setup.items, preparation)
    if way == "persistent":
        return PersistentDataset(setup.items, preparation, cache_dir=setup.stores / way)
    store = cached_volumes(setup.items, setup.preparation, cache_dir=setup.stores / "store", progress=False)
    return [copy.deepcopy(item) for item in store] if way == "memory" else store


def files_of(way: str, setup: Setup) -> list[list[Path]]:
    """The files that a way reads, for each case where they are one's own, else all together."""
    if way == "memory":
        return []
    if way in SLOW:
        return [[Path(item[key]) for key in (*setup.modalities, "label")] for item in setup.items]
    if way in HDF5:
        return [[file] for file in hdf5_files(way, setup)]
    return [[file] for file in sorted((setup.stores / way).iterdir())]


def in_a_process(way: str, data: Path, cases: int, passes: int, stores: Path) -> list[dict[str, Any]]:
    """Run this script for one way."""
    command = [sys.executable, __file__, "--measure", way, "--data", data, "--cases", cases, "--passes", passes]
    done = subprocess.run([*map(str, command), "--stores", str(stores)], stdout=subprocess.PIPE, text=True, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def measure(way: str, setup: Setup, passes: int) -> list[dict[str, Any]]:
    """All measurements of one way: milliseconds a slice, one number for every case and pass."""
    volumes = None if way == "naive" else volumes_of(way, setup)
    files = [file for case in files_of(way, setup) for file in case]
    numbers = sorted({1, setup.slices_per_volume})
    passes = min(passes, SLOW_PASSES) if way in SLOW else passes
    wanted = [(stage, slices) for stage in STAGES for slices in numbers if way not in SLOW or stage == "slice"]
    rows: list[dict[str, Any]] = []
    for stage, slices in wanted:
        take = taker(way, volumes, setup, stage, slices)
        for turn in range(1 if way in SLOW else len(setup.items)):
            take(turn)  # imports and first calls do not count
        for state in ("cold", "warm") if files else ("memory",):
            row = time_passes(take, len(setup.items), slices, files, state, passes)
            rows.append({"stage": stage, "slices": slices, "state": state, **row})
    return rows


def time_passes(
    take: Callable[[int], int], cases: int, slices: int, files: Sequence[Path], state: str, passes: int
) -> dict[str, Any]:
    """Time ``passes`` passes over the cases, with the page cache in the state asked for before each."""
    wall: list[float] = []
    cpu: list[float] = []
    resident: list[float] = []
    for one in range(passes):
        if files:
            (evict if state == "cold" else read_through)(files)
            share = resident_share(files)
            resident.append(float("nan") if share is None else share)
        for case in range(cases):
            start, start_cpu = time.perf_counter(), time.process_time()
            taken = take(one * cases + case)
            cpu.append((time.process_time() - start_cpu) * 1e3 / taken)
            wall.append((time.perf_counter() - start) * 1e3 / taken)
            assert taken == slices
    return {"wall_ms": wall, "cpu_ms": cpu, "resident": resident}


def taker(way: str, volumes: Any, setup: Setup, stage: str, slices: int) -> Callable[[int], int]:
    """What takes slices of a case, as training does, and returns how many."""
    if way == "naive":
        files = [[item[key] for key in (*setup.modalities, "label")] for item in setup.items]
        return lambda turn: take_naively(files[turn % len(files)], turn, slices)
    dataset = SliceDataset(volumes, setup.stage(stage, slices))
    return lambda turn: len(dataset[(turn, turn % len(dataset))])


def take_naively(files: Sequence[str], turn: int, slices: int = 1) -> int:
    """Read all files of a case, whole as gzip demands, and copy some slices of each. Returns how many."""
    for file in files:
        volume = np.asarray(nib.load(file).dataobj)
        for number in range(slices):
            np.array(volume[..., (volume.shape[2] // 2 + turn + number) % volume.shape[2]], dtype=np.float32)
    return slices


def flush(files: Any) -> None:
    """Have the system write what it still holds: pages that are not on disk cannot leave the cache."""
    for file in files:
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())


def evict(files: Sequence[Path]) -> None:
    """Ask the system to drop files from its page cache; it keeps what a process has mapped."""
    for file in files:
        with file.open("rb") as stream:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(files: Sequence[Path]) -> None:
    """Bring files into the page cache."""
    for file in files:
        with file.open("rb") as stream:
            while stream.read(1 << 22):
                pass


def resident_share(files: Sequence[Path]) -> float | None:
    """Share of the files' pages that are in the page cache; None where the system does not tell."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mincore"):
        return None
    pages = here = 0
    for file in files:
        with file.open("rb") as stream:
            mapped = np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
        states = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        if libc.mincore(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(len(mapped)), states) != 0:
            return None
        pages += len(states)
        here += sum(state & 1 for state in states)
    return here / pages


def summarise(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians of all processes, and how many times faster than each way the store is in the same state.

    A cold measurement that was not cold (or could not be shown to be) is left out.
    """
    groups: dict[tuple[str, str, int, str], list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["way"], row["stage"], row["slices"], row["state"]), []).append(row)
    rows: dict[tuple[str, str, int, str], dict[str, Any]] = {}
    for key, members in groups.items():
        resident = [share for member in members for share in member["resident"]]
        if key[3] == "cold" and not all(share <= COLD for share in resident):
            continue
        wall, cpu = (
            float(np.median([v for member in members for v in member[name]])) for name in ("wall_ms", "cpu_ms")
        )
        rows[key] = {
            **dict(zip(("way", "stage", "slices", "state"), key, strict=True)),
            "wall_ms": wall,
            "cpu_ms": cpu,
            "slices_per_second": 1e3 / wall,
            "resident": float(np.median(resident)) if resident else None,
            "timed": sum(len(member["wall_ms"]) for member in members),
        }
    for (_, stage, slices, state), row in rows.items():
        store = rows.get(("store", stage, slices, "warm" if state == "memory" else state))
        for name in ("wall", "cpu"):
            row[f"store_faster_{name}"] = None if store is None else row[f"{name}_ms"] / store[f"{name}_ms"]
    return list(rows.values())


def megabytes(files: Sequence[Sequence[Path]]) -> float:
    """Mean size of a case's files."""
    return round(sum(file.stat().st_size for case in files for file in case) / len(files) / 1e6, 1)


def show(result: dict[str, Any]) -> None:
    """Print the numbers as tables, one for each state, stage and number of slices a case."""
    console = Console()
    shape, size = ("x".join(map(str, result[key])) for key in ("shape", "slice_size"))
    for state in ("cold", "warm"):
        if not any(row["state"] == state for row in result["measured"]):
            console.print(f"No {state} times: the page cache could not be brought into that state.")
        for stage, title in STAGES.items():
            for slices in sorted({1, result["slices_per_volume"]}):
                rows = [r for r in result["measured"] if (r["stage"], r["slices"]) == (stage, slices)]
                rows = [r for r in rows if r["state"] in (state, "memory")]
                if not any(row["state"] == state for row in rows):
                    continue
                # A slice that is not cropped is as large as the prepared volume.
                what = title if stage == "slice" else f"{size} {title}"
                table = Table(title=f"{what}, {slices} a case; {result['data']} of {shape}; {state} page cache")
                if state == "cold" and any(row["state"] == "memory" for row in rows):
                    table.caption = "held in memory: over the store with a warm page cache"
                table.add_column("way")
                for column in ("ms", "CPU ms", "slices/s", "store faster", "in CPU"):
                    table.add_column(column, justify="right")
                for row in rows:
                    table.add_row(result["ways"][row["way"]], *cells(row))
                console.print(table)
    for way, reason in result["skipped"].items():
        console.print(f"{WAYS[way]}: left out, {reason}.")
    sizes = ", ".join(f"{WAYS[way]} {size}" for way, size in result["megabytes_per_case"].items())
    console.print(f"MB a case: {sizes}.")
    for row in result["preparation"]:
        console.print(
            f"Preparing cases once, num_workers {row['workers']}: {row['seconds_per_case']:.2f} s a case, "
            f"{row['cpu_seconds_per_case']:.2f} s of a core, {row['peak_megabytes']:.0f} MB at most."
        )


def cells(row: dict[str, Any]) -> list[str]:
    times = [f"{row['wall_ms']:.2f}", f"{row['cpu_ms']:.2f}", f"{row['slices_per_second']:.1f}"]
    faster = [row["store_faster_wall"], row["store_faster_cpu"]]
    return [*times, *("-" if value is None else f"{value:.1f}x" for value in faster)]


if __name__ == "__main__":
    typer.run(main)
