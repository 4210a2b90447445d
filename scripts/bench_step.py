#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time what balancing adds to a training step, and how a step grows.

    python scripts/bench_step.py                                 # the small size and the paper's
    python scripts/bench_step.py --sizes small --rounds 20 --json step.json
    python scripts/bench_step.py --growth --plot growth.svg      # modalities, image size, 2-D and 3-D
    python scripts/bench_step.py --device cuda --batch 64        # the paper's batch, which no CPU would thank us for

Trainings: `joint`; `observe`, joint training with classifiers that watch; `cggm`, the paper's; `recipe`, the default of
train.yaml, modality dropout and light auxiliary losses. The sizes are those of the bundle brats_cggm, alone and with
hardware/cpu.yaml, on random images. A step is what happens between two batches. With one thread of a CPU times are CPU
time of this process, otherwise wall-clock time; all trainings take turns, a step each, so that whatever else the
machine does meets them alike, and the median counts: of the times, and of the ratios to joint training's step of the
same turn.

Two numbers are arithmetic: floating-point operations of convolutions and matrix products, counted by PyTorch, over
those of joint training. `done` are those that the step executed. `floor` are those that it cannot do without, added up
from parts that run alone: joint training, the classifiers forwards and backwards on features that stand still (for the
recipe: on features that learn, and the fusion once more), for CGGM the derivative of g_F by both of its factors. Passes
through encoders are counted, forwards + backwards; on a GPU, how often the host waits for it, too.

Below a size's table: the parameters of its classifiers, and the time of ε, RegionDice's one count for all modalities
over MONAI's DiceHelper, once a modality, on the same predictions of classes (regions would cost it more).

With --growth a straight line through the modalities, the pixels and the voxels of a batch, and how far from it the
points lie.
"""

from __future__ import annotations

import contextlib
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.engines import SupervisedTrainer
from monai.metrics import DiceHelper
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from timing import check_device, clock_name, clock_of, machine
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
#: what grows, by the last word of a size's name
FAMILIES = ("modalities", "pixels", "voxels")


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
    sizes: Annotated[str | None, typer.Option(help="Of small and paper, with commas; without it both.")] = None,
    ways: Annotated[
        str | None, typer.Option(help=f"Of {', '.join(WAYS)}, with commas; without it all; joint is always there.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Steps that count.")] = 9,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch: Annotated[int | None, typer.Option(min=1, help="Slices of a step at the paper's size; 2.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a CPU.")] = 1,
    growth: Annotated[bool, typer.Option(help="Time joint and cggm at several sizes instead.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Where to draw the growth (.svg, .png).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers.")] = None,
) -> None:
    """Time what balancing adds to a training step, and how a step grows."""
    check_device(device)
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    check_combination(growth, {"sizes": sizes, "ways": ways, "batch": batch}, plot)
    chosen = ["joint", *(way for way in (ways.split(",") if ways else WAYS) if way != "joint")]
    known = sizes_of_the_bundle(batch or 2)
    of_these = sizes.split(",") if sizes else list(known)
    for given, there in ((chosen, WAYS), (of_these, tuple(known))):
        unknown = [name for name in given if name not in there]
        if unknown:
            raise typer.BadParameter(f"there is no {', '.join(unknown)}, only {', '.join(there)}")
    facts = {"clock": clock_name(device), "machine": machine(device)}
    asked = growing(known["small"]) if growth else {name: known[name] for name in of_these}
    chosen = ["joint", "cggm"] if growth else chosen
    with Progress(console=Console(stderr=True)) as progress:
        results = {
            name: bench(size, chosen, rounds, torch.device(device), progress, name) for name, size in asked.items()
        }
    for name, result in results.items():
        show(name, result, facts["clock"])
    facts["lines"] = lines_of(results)
    show_lines(facts["lines"])
    if plot is not None:
        draw(results, plot)
    if json_file is not None:
        with atomic_path(json_file) as temporary:
            temporary.write_text(json.dumps({**facts, "sizes": results}, indent=2) + "\n", encoding="utf-8")


def check_combination(growth: bool, of_sizes: Mapping[str, object], plot: Path | None) -> None:
    """Refuse options that would have no effect."""
    given = [f"--{name}" for name, value in of_sizes.items() if value is not None]
    if growth and given:
        raise typer.BadParameter(f"--growth has sizes and trainings of its own: leave out {', '.join(given)}")
    if plot is not None and not growth:
        raise typer.BadParameter("--plot draws what --growth measures: give both")


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
    """The small size with more and fewer modalities, larger images, and 3-D patches.

    Patches keep contiguous tensors: channels last, which is faster in 2-D, cost more at 24³ (a tenth).
    """
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
        optim_set_to_none=True,
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
            trainer.optimizer.zero_grad(set_to_none=True)  # leave the memory to the others
            if turn == 1:
                times[way].clear()
    times = {way: list(values) for way, values in times.items()}  # the steps that follow are not timed
    medians = {way: float(np.median(values)) for way, values in times.items()}
    counts = {way: counted(trainer, rounds + 2) for way, trainer in trainers.items()}
    floor = floors(trainers["joint"].network, size, device, counts["joint"]["flops"])
    waits = {w: host_waits(t, rounds + 3) for w, t in trainers.items()} if device.type == "cuda" else None
    return {
        "size": {**vars(size), "encoder": dict(size.encoder)},
        "rounds": rounds,
        "steps": {way: len(values) for way, values in times.items()},
        "ms_per_step": {way: round(value, 2) for way, value in medians.items()},
        "quartiles_ms": {way: np.percentile(values, [25, 75]).round(2).tolist() for way, values in times.items()},
        **over_joint(times),
        "floor": {way: round(floor[way], 3) for way in ways},
        "done": {way: round(count["flops"] / counts["joint"]["flops"], 3) for way, count in counts.items()},
        "encoder_passes": {way: [count["forward"], count["backward"]] for way, count in counts.items()},
        "host_waits": waits,
        "classifiers": parameters_of(size),
        "epsilon_ms": epsilon_times(size, rounds, device),
    }


def over_joint(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Each training's steps over the step that joint training took in the same turn: medians and quartiles.

    What slows the machine down for a while slows both, so these ratios spread less than the times do.
    """
    ratios = {way: np.array(values) / np.array(times["joint"]) for way, values in times.items()}
    return {
        "times_joint": {way: round(float(np.median(values)), 3) for way, values in ratios.items()},
        "times_joint_quartiles": {way: np.percentile(v, [25, 75]).round(3).tolist() for way, v in ratios.items()},
    }


def parameters_of(size: Size) -> dict[str, float]:
    """Parameters of all classifiers together, and their size in float32."""
    modalities = [f"m{i}" for i in range(size.modalities)]
    layers: dict[str, Any] = {"decoder_channels": size.decoder_channels, "low_reduced": size.low_reduced}
    with torch.device("meta"):  # nothing is computed, and the paper's network takes a gigabyte
        network = MultimodalSegmenter(modalities, CLASSES, encoder=dict(size.encoder), **layers)
        classifiers = UnimodalClassifiers.for_network(network, low_reduced=size.low_reduced)
    count = sum(parameter.numel() for parameter in classifiers.parameters())
    return {"parameters": count, "megabytes": round(4 * count / 1e6, 2)}


def epsilon_times(size: Size, rounds: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of every modality's ε, medians of turns: one count for all, and MONAI's Dice once a modality."""
    torch.manual_seed(0)
    shape = (size.batch, CLASSES, *size.image)
    predictions = [torch.randn(shape, device=device) for _ in range(size.modalities)]
    label = torch.randint(0, CLASSES, (size.batch, 1, *size.image), device=device)
    counting, helper = RegionDice(REGIONS, CLASSES), DiceHelper(include_background=False, num_classes=CLASSES)
    ways: dict[str, Callable[[], object]] = {
        "region_dice": lambda: counting.value(counting.sums(predictions, label)),
        "dice_helper": lambda: [helper(prediction, label) for prediction in predictions],
    }
    now = clock_of(device.type)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 1):  # the first of each is not counted
        for way, run in ways.items():
            started = now()
            run()
            times[way].append((now() - started) * 1e3)
    return {way: round(float(np.median(values[1:])), 2) for way, values in times.items()}


def step(trainer: SupervisedTrainer, turn: int) -> None:
    """Let a trainer take its next step."""
    trainer.state.max_epochs = turn
    trainer.run()


def time_steps(trainer: SupervisedTrainer, times: list[float], device: torch.device) -> None:
    """Add the milliseconds of each step to ``times``, by the clock of this device."""
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


def counter() -> FlopCounterMode:
    """Count floating-point operations."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: backward_operations})


def counted(trainer: SupervisedTrainer, turn: int) -> dict[str, int]:
    """Floating-point operations of one step, and passes through encoders, forwards and backwards."""
    passes: Counter[str] = Counter()

    def ran(_module: object, _inputs: object, features: Sequence[torch.Tensor]) -> None:
        passes["forward"] += 1
        features[-1].register_hook(lambda _gradient: passes.update(["backward"]))

    flops = counter()
    with contextlib.ExitStack() as hooks, contextlib.ExitStack() as modes:
        for encoder in cast(torch.nn.ModuleDict, trainer.network.encoders).values():
            hooks.callback(encoder.register_forward_hook(ran).remove)
        begins = trainer.add_event_handler(Events.ITERATION_STARTED, lambda _engine: modes.enter_context(flops))
        ends = trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda _engine: modes.close())
        hooks.callback(begins.remove)
        hooks.callback(ends.remove)
        step(trainer, turn)
    return {"flops": flops.get_total_flops(), **{kind: passes[kind] for kind in ("forward", "backward")}}


def floors(network: torch.nn.Module, size: Size, device: torch.device, joint: int) -> dict[str, float]:
    """Operations that each training cannot do without, over those of joint training: its parts, each run alone."""
    network = cast(MultimodalSegmenter, network)
    classifiers = UnimodalClassifiers.for_network(network, low_reduced=size.low_reduced).to(device)
    with torch.no_grad():
        image = torch.zeros(size.batch, size.modalities, *size.image, device=device)
        features = {m: network.encoders[m](image[:, i : i + 1]) for i, m in enumerate(network.modalities)}
    low = next(iter(features.values()))[0]
    positions = low.shape[0] * int(np.prod(low.shape[2:]))
    # g_F = sum over positions of δ ⊗ z: its derivative by δ, and by z
    by_factors = 2 * 2 * positions * network.head.in_channels * CLASSES
    watching = alone(lambda leaves: list(classifiers(leaves, size.image).values()), features, learn=False)
    teaching = alone(lambda leaves: list(classifiers(leaves, size.image).values()), features, learn=True)
    fusing = alone(lambda leaves: [network.fuse(leaves, size.image)], features, learn=True)
    extra = {"joint": 0, "observe": watching, "cggm": watching + by_factors, "recipe": teaching + fusing}
    return {way: 1 + operations / joint for way, operations in extra.items()}


def alone(
    run: Callable[[dict[str, tuple[torch.Tensor, ...]]], list[torch.Tensor]],
    features: Mapping[str, Sequence[torch.Tensor]],
    *,
    learn: bool,
) -> int:
    """Operations of a part on encoders' features, forwards and backwards; with ``learn`` to the features, too."""
    leaves = {m: tuple(h.detach().clone().requires_grad_(learn) for h in pair) for m, pair in features.items()}
    with counter() as flops:
        torch.stack([logits.sum() for logits in run(leaves)]).sum().backward()
    return int(flops.get_total_flops())


def host_waits(trainer: SupervisedTrainer, turn: int) -> int:
    """How often the host waits for the GPU in one step."""
    with warnings.catch_warnings(record=True) as heard, contextlib.ExitStack() as after:
        warnings.simplefilter("always")
        after.callback(torch.cuda.set_sync_debug_mode, "default")
        begins = trainer.add_event_handler(
            Events.GET_BATCH_COMPLETED, lambda _engine: torch.cuda.set_sync_debug_mode("warn")
        )
        ends = trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda _engine: torch.cuda.set_sync_debug_mode("default")
        )
        after.callback(begins.remove)
        after.callback(ends.remove)
        step(trainer, turn)
    return sum("synchronizing" in str(warning.message) for warning in heard)


def lines_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """A straight line through each family of sizes, by training: milliseconds a unit, at none, and the worst residual.

    Residuals are shares of the time measured. A family needs three points: two always lie on a line.
    """
    lines: dict[str, dict[str, dict[str, float]]] = {}
    for family in FAMILIES:
        members = [result for name, result in results.items() if name.split()[-1] == family]
        if len(members) < 3:
            continue
        at = np.array([position(family, result) for result in members])
        lines[family] = {}
        for way in members[0]["ms_per_step"]:
            measured = np.array([result["ms_per_step"][way] for result in members])
            slope, start = np.polyfit(at, measured, 1)
            off = float(np.max(np.abs(slope * at + start - measured) / measured))
            lines[family][way] = {
                "ms_per_unit": float(f"{slope:.4g}"),
                "ms_at_none": round(float(start), 2),
                "worst_residual": round(off, 3),
            }
    return lines


def position(family: str, result: Mapping[str, Any]) -> float:
    """Modalities, or the pixels or voxels of a whole batch."""
    size = result["size"]
    return float(size["modalities"] if family == "modalities" else size["batch"] * np.prod(size["image"]))


def show(name: str, result: Mapping[str, Any], clock: str) -> None:
    """Print one size's numbers as a table."""
    size = result["size"]
    table = Table(
        title=f"{name}: {size['modalities']} × {size['encoder']['backbone']}, batch {size['batch']}, "
        f"{'×'.join(map(str, size['image']))}, {clock}"
    )
    waits = result["host_waits"]
    columns = ["training", "ms", "quartiles", "× joint", "quartiles", "floor", "done", "encoders"]
    columns += ["waits"] if waits else []
    for column in columns:
        table.add_column(column, justify="left" if column == "training" else "right", no_wrap=True)
    for way, milliseconds in result["ms_per_step"].items():
        low, high = result["quartiles_ms"][way]
        least, most = result["times_joint_quartiles"][way]
        table.add_row(
            way,
            f"{milliseconds:.0f}",
            f"{low:.0f}–{high:.0f}",
            f"{result['times_joint'][way]:.2f}",
            f"{least:.2f}–{most:.2f}",
            f"{result['floor'][way]:.2f}",
            f"{result['done'][way]:.2f}",
            "{} + {}".format(*result["encoder_passes"][way]),
            *([str(waits[way])] if waits else []),
        )
    Console().print(table)
    own, epsilon = result["classifiers"], result["epsilon_ms"]
    Console().print(
        f"classifiers: {own['parameters']:,} parameters, {own['megabytes']:.1f} MB; "
        f"ε: {epsilon['region_dice']:.1f} ms, by DiceHelper {epsilon['dice_helper']:.1f} ms"
    )


def show_lines(lines: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Print how steps grow, where that was measured."""
    for family, ways in lines.items():
        for way, line in ways.items():
            Console().print(
                f"{way} over {family}: {line['ms_per_unit']:.3g} ms each, {line['ms_at_none']:.1f} ms at none, "
                f"at most {100 * line['worst_residual']:.0f}% off the line"
            )


def draw(results: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Draw a step's time over the number of modalities, and the pixels and the voxels of a batch."""
    import matplotlib.pyplot as plt

    families: dict[str, list[tuple[float, Mapping[str, Any]]]] = {family: [] for family in FAMILIES}
    for name, result in results.items():
        family = name.split()[-1]
        if family in families:
            families[family].append((position(family, result), result))
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for ax, (family, points) in zip(axes, families.items(), strict=True):
        for way, colour in (("joint", "#000000"), ("cggm", "#0072B2")):
            ax.plot([p for p, _ in points], [r["ms_per_step"][way] for _, r in points], "o-", color=colour, label=way)
        ax.set(
            xlabel=family if family == "modalities" else f"{family} of a batch",
            ylabel="ms a step",
            ylim=(0, None),
            xlim=(0, None),
        )
    axes[0].legend()
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format=file.suffix.lstrip(".") or "svg")
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
