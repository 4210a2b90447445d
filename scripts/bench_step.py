#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time what balancing adds to a training step, and how a step grows.

    python scripts/bench_step.py                                 # the small size and the paper's
    python scripts/bench_step.py --sizes small --rounds 20 --json step.json
    python scripts/bench_step.py --growth --plot growth.svg      # modalities, image size, 2-D and 3-D
    python scripts/bench_step.py --device cuda --batch 64        # the paper's batch, which no CPU would thank us for

Trainings: `joint`; `observe`, joint training with classifiers that watch; `cggm`, the paper's; `recipe`, the default of
train.yaml, modality dropout and light auxiliary losses. The sizes are those of the bundle brats_cggm, alone and with
hardware/cpu.yaml, on random images. A step is what happens between two batches. On a CPU times are CPU time of this
process; all trainings take turns, a step each, so that whatever else the machine does meets them alike, and the median
counts. The floor is arithmetic: floating-point operations of convolutions and matrix products, counted by PyTorch, over
those of joint training. Encoder passes and transfers to the host are counted, too.
"""

from __future__ import annotations

import contextlib
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.engines import SupervisedTrainer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from timing import check_device, clock_name, clock_of, machine
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from monai_cggm.batches import prepare_batch
from monai_cggm.files import atomic_path
from monai_cggm.handlers import ClipGradients
from monai_cggm.losses import DiceCrossEntropyLoss
from monai_cggm.methods import CGGM, AuxiliaryLosses, ModalityDropout, UnimodalObserver
from monai_cggm.metrics import RegionDice
from monai_cggm.networks import MultimodalSegmenter, UnimodalClassifiers
from monai_cggm.resources import share_path

WAYS = ("joint", "observe", "cggm", "recipe")
REGIONS = {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}
CLASSES = 4


@dataclass(frozen=True)
class Size:
    """What a step's cost depends on."""

    encoder: Mapping[str, Any]
    decoder_channels: int
    low_reduced: int
    image: tuple[int, ...]
    batch: int
    modalities: int = 4
    channels_last: bool = False


def main(
    sizes: Annotated[str, typer.Option(help="Of small and paper, with commas.")] = "small,paper",
    ways: Annotated[str, typer.Option(help="Trainings, with commas; joint is always there.")] = ",".join(WAYS),
    rounds: Annotated[int, typer.Option(min=1, help="Steps that count.")] = 9,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="Slices of a step at the paper's size.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a CPU.")] = 1,
    growth: Annotated[bool, typer.Option(help="Time joint and cggm at several sizes instead.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Where to draw the growth (.svg, .png).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers.")] = None,
) -> None:
    """Time what balancing adds to a training step, and how a step grows."""
    check_device(device)
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    chosen = ["joint", *(way for way in ways.split(",") if way != "joint")]
    known = sizes_of_the_bundle(batch)
    for given, there in ((chosen, WAYS), (sizes.split(","), tuple(known))):
        unknown = [name for name in given if name not in there]
        if unknown:
            raise typer.BadParameter(f"there is no {', '.join(unknown)}, only {', '.join(there)}")
    facts = {"clock": clock_name(device), "machine": machine(device)}
    asked = growing(known["small"]) if growth else {name: known[name] for name in sizes.split(",")}
    chosen = ["joint", "cggm"] if growth else chosen
    with Progress(console=Console(stderr=True)) as progress:
        results = {
            name: bench(size, chosen, rounds, torch.device(device), progress, name) for name, size in asked.items()
        }
    for name, result in results.items():
        show(name, result)
    if plot is not None:
        draw(results, plot)
    if json_file is not None:
        with atomic_path(json_file) as temporary:
            temporary.write_text(json.dumps({**facts, "sizes": results}, indent=2) + "\n", encoding="utf-8")


def sizes_of_the_bundle(paper_batch: int) -> dict[str, Size]:
    """The small size and the paper's, as the bundle brats_cggm has them, the latter with a batch of its own."""
    small, paper = ConfigParser(), ConfigParser()
    train = share_path("bundles/brats_cggm/configs/train.yaml")
    paper.read_config(train)
    small.read_config([train, share_path("configs/hardware/cpu.yaml")])
    batch = small.get("volumes_per_batch") * small.get("slices_per_volume")
    return {"small": _size(small, batch, channels_last=True), "paper": _size(paper, paper_batch, channels_last=False)}


def _size(config: ConfigParser, batch: int, *, channels_last: bool) -> Size:
    return Size(
        encoder=dict(config.get("encoder")),
        decoder_channels=config.get("decoder_channels"),
        low_reduced=config.get("low_reduced"),
        image=tuple(config.get("slice_size")),
        batch=batch,
        channels_last=channels_last,
    )


def growing(size: Size) -> dict[str, Size]:
    """The small size with more and fewer modalities, larger images, and 3-D patches."""
    modalities = {f"{m} modalities": replace(size, modalities=m) for m in range(2, 9)}
    images = {f"{n}×{n} pixels": replace(size, image=(n, n)) for n in (32, 64, 96, 128)}
    solid = {**size.encoder, "spatial_dims": 3}
    patches = {
        f"{n}×{n}×{n} voxels": replace(size, encoder=solid, image=(n, n, n), batch=1, channels_last=False)
        for n in (16, 24, 32, 40)
    }
    return {**modalities, **images, **patches}


def trainer_of(way: str, size: Size, device: torch.device) -> SupervisedTrainer:
    """Build a trainer whose every epoch is one step on the same random batch."""
    torch.manual_seed(0)
    modalities = [f"m{i}" for i in range(size.modalities)]
    layers: dict[str, Any] = {"decoder_channels": size.decoder_channels, "low_reduced": size.low_reduced}
    network = MultimodalSegmenter(modalities, CLASSES, encoder=dict(size.encoder), **layers).to(device)
    if size.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = {
        "image": torch.randn(size.batch, size.modalities, *size.image),
        "label": torch.randint(0, CLASSES, (size.batch, 1, *size.image)),
    }
    trained: list[torch.nn.Module] = [network]
    handlers: list[Any] = []
    if way != "joint":
        classifiers = UnimodalClassifiers.for_network(network, low_reduced=size.low_reduced).to(device)
        trained.append(classifiers)
        metric = RegionDice(REGIONS, CLASSES)
        method = (CGGM if way == "cggm" else UnimodalObserver)(network, classifiers, metric)
        parts = [ModalityDropout(modalities, seed=0, both=True), method, AuxiliaryLosses(method, 0.25)]
        handlers = parts if way == "recipe" else [method]
    parameters = [p for module in trained for p in module.parameters()]
    return SupervisedTrainer(
        device=device,
        max_epochs=1,
        train_data_loader=[batch],
        network=network,
        optimizer=torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=3e-4),
        loss_function=DiceCrossEntropyLoss(),
        prepare_batch=prepare_batch,
        train_handlers=[*handlers, ClipGradients(trained, 1.0)],
        decollate=False,
    )


def bench(
    size: Size, ways: Sequence[str], rounds: int, device: torch.device, progress: Progress, title: str
) -> dict[str, Any]:
    """Run the trainings in turns and return their numbers, times in milliseconds."""
    trainers = {way: trainer_of(way, size, device) for way in ways}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for way, trainer in trainers.items():
        time_steps(trainer, times[way], device)
    for turn in progress.track(range(1, rounds + 2), description=title):
        for way, trainer in trainers.items():
            step(trainer, turn)
            if turn == 1:
                times[way].clear()
    counts = {way: counted(trainer, rounds + 2) for way, trainer in trainers.items()}
    medians = {way: float(np.median(values)) for way, values in times.items()}
    return {
        "size": {**vars(size), "encoder": dict(size.encoder)},
        "rounds": rounds,
        "ms_per_step": {way: round(value, 2) for way, value in medians.items()},
        "quartiles_ms": {way: np.percentile(values, [25, 75]).round(2).tolist() for way, values in times.items()},
        "times_joint": {way: round(value / medians["joint"], 3) for way, value in medians.items()},
        "floor": {way: round(count["flops"] / counts["joint"]["flops"], 3) for way, count in counts.items()},
        "encoder_passes": {way: count["encoder_passes"] for way, count in counts.items()},
        "transfers": {way: count["transfers"] for way, count in counts.items()},
    }


def step(trainer: SupervisedTrainer, turn: int) -> None:
    """Let a trainer take its next step."""
    trainer.state.max_epochs = turn
    trainer.run()


def time_steps(trainer: SupervisedTrainer, times: list[float], device: torch.device) -> None:
    """Add the milliseconds of each step to ``times``: CPU time, or on a GPU time with everything finished."""
    now = clock_of(device.type)
    started: list[float] = []
    trainer.add_event_handler(Events.GET_BATCH_COMPLETED, lambda _engine: started.append(now()))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda _engine: times.append((now() - started.pop()) * 1e3))


def backward_operations(grad_out: Any, x: Any, weight: Any, *settings: Any, out_shape: Any = None, **_: Any) -> int:
    """Operations of a convolution's backward pass, by shapes: each gradient costs what the forward pass does.

    PyTorch's own count takes no notice of groups, and has a depthwise convolution cost as much as a whole one.
    """
    transposed, output_mask = settings[4], settings[7]
    return sum(output_mask[:2]) * conv_flop_count(x, weight, grad_out, transposed)


class Transfers(TorchDispatchMode):
    """Count what makes the host wait for the device, or would on a GPU: reading a number, copying to a CPU tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].is_cuda and not result.is_cuda:
            self.count += 1
        return result


def counted(trainer: SupervisedTrainer, turn: int) -> dict[str, int]:
    """Floating-point operations, passes through encoders and transfers to the host, of one step."""
    passes: list[str] = []
    own = {torch.ops.aten.convolution_backward: backward_operations}
    flops, transfers = FlopCounterMode(display=False, custom_mapping=own), Transfers()
    with contextlib.ExitStack() as hooks, contextlib.ExitStack() as modes:
        for encoder in cast(torch.nn.ModuleDict, trainer.network.encoders).values():
            hooks.callback(encoder.register_forward_hook(lambda *_: passes.append("one")).remove)
        trainer.add_event_handler(
            Events.ITERATION_STARTED, lambda _engine: [modes.enter_context(mode) for mode in (flops, transfers)]
        )
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda _engine: modes.close())
        step(trainer, turn)
    return {"flops": flops.get_total_flops(), "encoder_passes": len(passes), "transfers": transfers.count}


def show(name: str, result: Mapping[str, Any]) -> None:
    """Print one size's numbers as a table."""
    size = result["size"]
    table = Table(
        title=f"{name}: {size['modalities']} × {size['encoder']['backbone']}, batch {size['batch']}, "
        f"{'×'.join(map(str, size['image']))}"
    )
    for column in ("training", "ms", "quartiles", "× joint", "floor", "encoders", "transfers"):
        table.add_column(column, justify="left" if column == "training" else "right", no_wrap=True)
    for way, milliseconds in result["ms_per_step"].items():
        low, high = result["quartiles_ms"][way]
        table.add_row(
            way,
            f"{milliseconds:.0f}",
            f"{low:.0f}–{high:.0f}",
            f"{result['times_joint'][way]:.2f}",
            f"{result['floor'][way]:.2f}",
            str(result["encoder_passes"][way]),
            str(result["transfers"][way]),
        )
    Console().print(table)


def draw(results: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Draw a step's time over the number of modalities, the pixels and the voxels."""
    import matplotlib.pyplot as plt

    families: dict[str, list[tuple[float, Mapping[str, Any]]]] = {"modalities": [], "pixels": [], "voxels": []}
    for name, result in results.items():
        family = name.split()[-1]
        size = result["size"]
        at = size["modalities"] if family == "modalities" else float(np.prod(size["image"]))
        if family in families:
            families[family].append((at, result))
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for ax, (family, points) in zip(axes, families.items(), strict=True):
        for way, colour in (("joint", "#000000"), ("cggm", "#0072B2")):
            ax.plot([p for p, _ in points], [r["ms_per_step"][way] for _, r in points], "o-", color=colour, label=way)
        ax.set(xlabel=family, ylabel="ms a step", ylim=(0, None), xlim=(0, None))
    axes[0].legend()
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format=file.suffix.lstrip(".") or "svg")
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
