#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time what the segmentation of one volume costs: slice by slice as it was loaded, and as the bundle does it.

    python scripts/bench_inference.py                           # a phantom of BraTS's size, the network of cpu.yaml
    python scripts/bench_inference.py --size paper --device cuda --json bench.json
    python scripts/bench_inference.py --model runs/brats_cggm/model.pt --rounds 1

The network and the preparation are those of the bundle brats_cggm. From loaded and normalised voxels to classes:
reading, normalising and writing are the same for all ways and not counted. Each way adds to the one before it; slices
without brain come before the brain's box, as there is none in the box. A network that is not trained costs what a
trained one does.

Two columns compare the classes of the brain's voxels. Against the naive way on the same volume, whole or the box, only
the arithmetic differs. Against the naive way on the whole volume the box differs: borders of zeros lie nearer, and the
mean over the image that the network uses is over less background. A network that is not trained tells little of how
many voxels that changes: for that, give a trained one.

On a CPU times are CPU time of this process with one thread, and wall time with several; on a GPU wall time until it is
done, in float32 proper: TensorFloat-32 is off. All ways take turns, so that whatever else the machine does meets them
alike, and the median of the rounds counts; its least and its most are given beside it.
"""

from __future__ import annotations

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import copy
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from monai.bundle import ConfigParser
from monai.inferers import SliceInferer
from monai.transforms import NormalizeIntensityd
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from timing import check_device, clock_name, clock_of, machine
from torch import Tensor, nn

from monai_cggm.data.phantom import make_phantom
from monai_cggm.files import atomic_path
from monai_cggm.inferers import VolumeInferer
from monai_cggm.resources import share_path

SHAPE = (240, 240, 155)
BUNDLE = share_path("bundles/brats_cggm/configs/inference.yaml")
OVERLAYS = {"cpu": [share_path("configs/hardware/cpu.yaml")], "paper": []}
NAIVE = "slice by slice"
MONAI = "in batches, MONAI's SliceInferer"
BATCHES = "in batches"
EMPTY = "+ empty slices once"
BOX = "+ brain's box"
CHANNELS_LAST = "+ channels-last"
BF16 = "+ bf16 autocast"
NAIVE_BOX = "slice by slice, brain's box"
FLOOR = "the network alone, same slices"

Box = tuple[slice, slice, slice]
Ways = Mapping[str, Callable[[], Tensor | None]]


def main(
    size: Annotated[
        Literal["cpu", "paper"], typer.Option(help="Network of hardware/cpu.yaml, or the paper's.")
    ] = "cpu",
    shape: Annotated[tuple[int, int, int], typer.Option(help="Voxels of the phantom.")] = SHAPE,
    batch: Annotated[int, typer.Option(min=1, help="Slices that go through the network together.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every way takes its turn.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Of a CPU.")] = 1,
    device: Annotated[str, typer.Option(help="Where the network runs: cpu, cuda.")] = "cpu",
    model: Annotated[Path | None, typer.Option(help="A trained network, model.pt.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers.")] = None,
) -> None:
    """Time what the segmentation of one volume costs, slice by slice and as the bundle does it."""
    check_device(device)
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    result = bench(size, shape, batch, rounds, torch.device(device), model)
    show(result)
    if json_file is not None:
        with atomic_path(json_file) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


@torch.inference_mode()
def bench(
    size: str, shape: tuple[int, int, int], batch: int, rounds: int, device: torch.device, model: Path | None
) -> dict[str, Any]:
    """Run all ways and return the numbers, times in seconds a volume."""
    facts = machine(device.type)
    config = ConfigParser()
    config.read_config([str(file) for file in (BUNDLE, *OVERLAYS[size])])
    volume = normalised_phantom(config, shape).to(device)
    brain = (volume != 0).any(dim=1)
    box = bounding_box(brain[0])
    network = build_network(config, volume, brain, model).to(device)
    ways = make_ways(network, volume, box, batch, bf16=has_bf16(device))
    times, segmentations = take_turns(ways, rounds, device)
    medians = {way: statistics.median(values) for way, values in times.items()}
    boxed = (NAIVE_BOX, BOX, CHANNELS_LAST, BF16)
    classes = {way: placed(found, brain, box if way in boxed else None) for way, found in segmentations.items()}
    same = {way: classes[NAIVE_BOX if way in boxed else NAIVE] for way in classes}
    return {
        "size": size,
        "trained": model is not None,
        "shape": list(shape),
        "box": list(volume[0, 0][box].shape),
        "empty_slices": int((~brain.any(dim=(0, 1, 2))).sum()),
        "slices_at_once": batch,
        "rounds": rounds,
        "bf16": BF16 in ways,
        "tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
        "clock": clock_name(device.type),
        "machine": facts,
        "classes_in_brain": torch.bincount(classes[NAIVE][brain].long(), minlength=2).tolist(),
        "seconds_per_volume": {way: round(value, 4) for way, value in medians.items()},
        "least_and_most_seconds": {way: [round(f(values), 4) for f in (min, max)] for way, values in times.items()},
        "volumes_per_minute": {way: round(60 / value, 2) for way, value in medians.items()},
        "times_faster": {way: round(medians[NAIVE] / value, 2) for way, value in medians.items()},
        "differ_same_volume": {way: differing(found, same[way], brain) for way, found in classes.items()},
        "differ_whole_volume": {way: differing(found, classes[NAIVE], brain) for way, found in classes.items()},
    }


def normalised_phantom(config: ConfigParser, shape: tuple[int, int, int]) -> Tensor:
    """One case ``(1, M, H, W, D)``, normalised as the bundle does it but not cropped."""
    phantom = make_phantom(0, shape=shape, spacing=SHAPE[0] / shape[0])
    modalities = config.get_parsed_content("modalities")
    image = torch.from_numpy(np.stack([phantom.images[m] for m in modalities]).astype(np.float32))
    preparation = config.get_parsed_content("preprocessing").transforms
    (normalise,) = [t for t in preparation if isinstance(t, NormalizeIntensityd)]
    return torch.as_tensor(normalise({"image": image})["image"])[None]


def bounding_box(brain: Tensor) -> Box:
    """Where the brain ``(H, W, D)`` lies, along each axis."""
    places = brain.nonzero()
    first, last = places.amin(dim=0).tolist(), places.amax(dim=0).tolist()
    h, w, d = (slice(a, b + 1) for a, b in zip(first, last, strict=True))
    return h, w, d


def build_network(config: ConfigParser, volume: Tensor, brain: Tensor, model: Path | None) -> nn.Module:
    """The bundle's network, trained, or drawn so that it sees all classes."""
    torch.manual_seed(0)
    network: nn.Module = config.get_parsed_content("network_def")
    if model is not None:
        network.load_state_dict(torch.load(model, map_location="cpu", weights_only=True)["model"])
        return network.eval()
    # Without its statistics a deep network is blind, and without the shift of its head it knows one class only.
    middle = volume.shape[-1] // 2
    x, inside = volume[..., middle : middle + 1].movedim(-1, 0)[:, 0].cpu(), brain[..., middle].cpu()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    network.train()(torch.cat([x, x]))
    logits = network.eval()(x).movedim(1, -1)[inside]
    head: Any = network.head
    head.bias.sub_(logits.median(dim=0).values)
    return network


def has_bf16(device: torch.device) -> bool:
    """Whether the machine computes in bf16 itself; what only emulates it is slower than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    with contextlib.suppress(OSError):
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
        return not words.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})
    return False


def make_ways(network: nn.Module, whole: Tensor, box: Box, batch: int, *, bf16: bool) -> Ways:
    """Name each way to segment; what it returns are classes ``(1, H, W, D)`` of the volume or of its box."""
    cropped = whole[(..., *box)].contiguous()
    fast = copy.deepcopy(network).to(memory_format=torch.channels_last)
    each = VolumeInferer(sw_batch_size=batch, reuse_empty=False)
    inferer = VolumeInferer(sw_batch_size=batch)
    slices = [some.contiguous() for some in cropped[0].movedim(-1, 0).split(batch)]
    monai = SliceInferer(roi_size=(-1, -1), sw_batch_size=batch, spatial_dim=2)

    def halved() -> Tensor:
        with torch.autocast(whole.device.type, dtype=torch.bfloat16):
            return segment(inferer, cropped, fast)

    def alone() -> None:
        for some in slices:
            fast(some)

    ways: dict[str, Callable[[], Tensor | None]] = {
        NAIVE: lambda: one_by_one(whole, network),
        MONAI: lambda: segment(monai, whole, network),
        BATCHES: lambda: segment(each, whole, network),
        EMPTY: lambda: segment(inferer, whole, network),
        BOX: lambda: segment(inferer, cropped, network),
        CHANNELS_LAST: lambda: segment(inferer, cropped, fast),
        BF16: halved,
        NAIVE_BOX: lambda: one_by_one(cropped, network),
        FLOOR: alone,
    }
    return {name: way for name, way in ways.items() if bf16 or name != BF16}


def one_by_one(volume: Tensor, network: nn.Module) -> Tensor:
    """Segment ``(1, M, H, W, D)`` as a loop over slices does."""
    return torch.stack([network(volume[..., d]).argmax(dim=1) for d in range(volume.shape[-1])], dim=-1)


def segment(inferer: Callable[..., Any], volume: Tensor, network: nn.Module) -> Tensor:
    """Segment ``(1, M, H, W, D)`` with an inferer."""
    classes: Tensor = inferer(volume, network).argmax(dim=1)
    return classes


def take_turns(ways: Ways, rounds: int, device: torch.device) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Seconds of each way and round, and what each found; the time of the first round does not count."""
    clock = clock_of(device.type)
    times: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, Tensor] = {}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("segmenting", total=(rounds + 1) * len(ways))
        for turn in range(rounds + 1):
            for name, way in ways.items():
                wait_for(device)
                start = clock()
                classes = way()
                wait_for(device)
                if turn:
                    times[name].append(clock() - start)
                elif classes is not None:
                    found[name] = classes
                progress.advance(task)
    return times, found


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def placed(classes: Tensor, brain: Tensor, box: Box | None) -> Tensor:
    """Put the classes of the box back into the volume, whose rest is background; None: they are the volume's."""
    if box is None:
        return classes
    whole = torch.zeros_like(brain, dtype=classes.dtype)
    whole[(..., *box)] = classes
    return whole


def differing(found: Tensor, reference: Tensor, brain: Tensor) -> float:
    """Share of the brain's voxels whose class differs."""
    return float((found != reference)[brain].double().mean())


def show(result: dict[str, Any]) -> None:
    """Print the numbers as a table."""
    size = "x".join(map(str, result["shape"]))
    table = Table(title=f"One volume of {size}, {result['size']} network, {result['clock']}")
    table.add_column("way")
    for column in (
        "s a volume",
        "least to most",
        "volumes a minute",
        "times faster",
        "differ: same volume",
        "differ: whole volume",
    ):
        table.add_column(column, justify="right")
    for way, seconds in result["seconds_per_volume"].items():
        shares = [result[f"differ_{which}_volume"].get(way) for which in ("same", "whole")]
        table.add_row(
            way,
            f"{seconds:.2f}",
            "{:.2f} to {:.2f}".format(*result["least_and_most_seconds"][way]),
            f"{result['volumes_per_minute'][way]:.2f}",
            f"{result['times_faster'][way]:.2f}",
            *("" if share is None else f"{share:.4%}" for share in shares),
        )
    console = Console()
    console.print(table)
    box = "x".join(map(str, result["box"]))
    console.print(
        f"The brain's box is {box}; {result['empty_slices']} slices of the volume have no brain. "
        f"{result['slices_at_once']} slices at once. Shares are of the brain's voxels, by a network that is "
        f"{'trained' if result['trained'] else 'not trained'}."
    )
    if not result["bf16"]:
        console.print("No bf16: this machine does not compute in it.")


if __name__ == "__main__":
    typer.run(main)
