#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write the tables of docs/performance.md from the numbers that the benchmarks left in docs/evidence/costs.

python scripts/make_performance.py            # between <!-- NAME --> and <!-- end -->, and nothing else
python scripts/make_performance.py --check    # write nothing; exit code 1 where a table is not what it would be
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from monai_cggm.files import atomic_path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
COSTS = ROOT / "docs" / "evidence" / "costs"

Numbers = Mapping[str, Any]


def read(name: str) -> dict[str, Any]:
    """What a benchmark wrote with ``--json``."""
    numbers: dict[str, Any] = json.loads((COSTS / f"{name}.json").read_text(encoding="utf-8"))
    return numbers


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, its first column of words and the others of numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


#: runs of bench_step.py, the one that the page goes by first; of older ones the ratios are of medians
STEPS = {"small": ("step_small", "step_small_again", "step_again"), "paper": ("step_paper", "step_again")}


def steps() -> str:
    """Training steps over joint training's, at both sizes, and the ratios of other runs."""
    rows = []
    for name, (first, *others) in STEPS.items():
        numbers = read(first)["sizes"][name]
        for way, ms in numbers["ms_per_step"].items():
            rows.append(
                [
                    f"{name}: `{way}`",
                    f"{ms:.0f}",
                    ratio(numbers, way),
                    ", ".join(f"{read(other)['sizes'][name]['times_joint'][way]:.2f}" for other in others),
                    f"{numbers['floor'][way]:.2f}",
                    f"{numbers['done'][way]:.2f}",
                    "{} + {}".format(*numbers["encoder_passes"][way]),
                ]
            )
    return table(["training", "ms a step", "× joint", "in other runs", "floor", "done", "encoder passes"], rows)


def ratio(numbers: Numbers, way: str) -> str:
    """A training's step over the joint step of the same turn, with its quartiles."""
    low, high = numbers["times_joint_quartiles"][way]
    return f"{numbers['times_joint'][way]:.2f}" + ("" if way == "joint" else f" ({low:.2f} to {high:.2f})")


def epsilon() -> str:
    """ε by one count and by MONAI's helper, and the classifiers' size."""
    rows = []
    for name in ("small", "paper"):
        numbers = read(f"step_{name}")["sizes"][name]
        own, times = numbers["classifiers"], numbers["epsilon_ms"]
        rows.append(
            [
                name,
                f"{times['region_dice']:.1f}",
                f"{times['dice_helper']:.1f}",
                f"{times['dice_helper'] / times['region_dice']:.1f}",
                f"{own['parameters']:,}",
                f"{own['megabytes']:.1f}",
            ]
        )
    head = ["size", "ε, ms a step", "`DiceHelper`, ms", "times", "classifiers' parameters", "MB"]
    return table(head, rows)


def growth() -> str:
    """Straight lines through the sizes, in two runs."""
    rows = []
    again = read("growth_again")["lines"]
    for family, ways in read("growth")["lines"].items():
        unit, factor = ("a modality", 1) if family == "modalities" else (f"1,000 {family}", 1000)
        for way, line in ways.items():
            other = again[family][way]
            rows.append(
                [
                    f"`{way}`, by {family}",
                    f"{factor * line['ms_per_unit']:.3g} for {unit}",
                    f"{line['ms_at_none']:.0f}",
                    f"{100 * line['worst_residual']:.0f}%",
                    f"{factor * other['ms_per_unit']:.3g}, {100 * other['worst_residual']:.0f}%",
                ]
            )
    return table(["training", "ms", "ms at none", "farthest from the line", "in another run"], rows)


def memory() -> str:
    """A step's memory at both sizes."""
    rows = []
    for name in ("small", "paper"):
        numbers = read("training" if name == "small" else "memory_paper")
        least = numbers["memory_mb"]["joint: no classifiers"]["both"]
        for way, row in numbers["memory_mb"].items():
            more = row["both"] - least
            rows.append([f"{name}: {way}", *(f"{row[key]:,.0f}" for key in ("held", "step", "both")), f"{more:+,.0f}"])
    return table(["configuration", "held, MB", "a step beyond it", "both", "over joint"], rows)


def data(stage: str) -> str:
    """Milliseconds a slice by each way, and how many times those of the store."""
    numbers = read("data")
    found = {(r["way"], r["slices"], r["state"]): r for r in numbers["measured"] if r["stage"] == stage}
    slices = sorted({number for _, number, _ in found})
    columns = [(number, state) for number in slices for state in ("cold", "warm")]
    rows = []
    for way, title in numbers["ways"].items():
        cells = []
        for number, state in columns:
            row = found.get((way, number, state)) or (found.get((way, number, "memory")) if state == "warm" else None)
            faster = "" if row is None or way == "store" else f" ({row['store_faster_wall']:.{digits(row)}f}×)"
            cells.append("" if row is None else f"{row['wall_ms']:.{2 if row['wall_ms'] < 10 else 1}f}{faster}")
        if any(cells):
            rows.append([title, *cells])
    head = [f"{number} a case, {state}" for number, state in columns]
    return table(["ms a slice (times the store's)", *head], rows)


def digits(row: Numbers) -> int:
    """Of a ratio: one after the point below ten."""
    return 1 if row["store_faster_wall"] < 10 else 0


def store() -> str:
    """Sizes of a case on disk, and what preparing one costs."""
    numbers = read("data")
    sizes = [
        [title, f"{numbers['megabytes_per_case'][way]:.1f}"]
        for way, title in numbers["ways"].items()
        if way in numbers["megabytes_per_case"]
    ]
    prepared = [
        [
            f"preparing, {row['workers'] or 1} thread{'s' if row['workers'] > 1 else ''}",
            f"{row['seconds_per_case']:.1f} s a case, {row['peak_megabytes']:.0f} MB at most",
        ]
        for row in numbers["preparation"]
    ]
    return table(["on disk", "MB a case"], sizes) + "\n\n" + table(["once", "costs"], prepared)


def limits() -> str:
    """Memory of an epoch by the number of cases, read and trained."""
    rows = []
    for what, runs in (("reading", read("memory")["runs"]), ("training", read("memory_training")["trainings"])):
        for run in runs:
            peak = run["peak_megabytes"]
            rows.append(
                [
                    f"{what}, {run['workers']} workers",
                    *(f"{number:,}" for number in (run["cases"], run["slices"])),
                    *(f"{peak[name]:,.0f}" for name in ("used", "anonymous")),
                    f"{run['seconds']:.0f}",
                ]
            )
    return table(["one epoch", "cases", "slices", "MB used", "MB anonymous", "s"], rows)


def inference() -> str:
    """Seconds a volume by each way."""
    numbers = read("inference")
    rows = []
    for way, seconds in numbers["seconds_per_volume"].items():
        low, high = numbers["least_and_most_seconds"][way]
        shares = (numbers[f"differ_{volume}_volume"].get(way) for volume in ("same", "whole"))
        rows.append(
            [
                way,
                f"{seconds:.2f} ({low:.2f} to {high:.2f})",
                f"{numbers['volumes_per_minute'][way]:.1f}",
                f"{numbers['times_faster'][way]:.2f}",
                *("" if share is None else "none" if share == 0 else f"{100 * share:.1f}%" for share in shares),
            ]
        )
    head = ["way", "s a volume", "volumes a minute", "times faster", "voxels that differ", "from the whole volume's"]
    return table(head, rows)


def overlays() -> str:
    """A step with each overlay over one without, in two runs."""
    numbers, again = read("training"), read("training_again")["times_plain"]
    rows = []
    for way, ms in numbers["ms_per_step"].items():
        low, high = numbers["quartiles_ms"][way]
        ratios = [f"{found[way]:.2f}" for found in (numbers["times_plain"], again)]
        rows.append([f"`{way}`", f"{ms:.0f} ({low:.0f} to {high:.0f})", *ratios])
    rows += [[f"`{way}`", reason, "–", "–"] for way, reason in numbers["left_out"].items()]
    return table(["overlay", "ms a step", "× without", "in another run"], rows)


def processes() -> str:
    """Waits, steps and starts of processes of their own, and the steps of two further runs."""
    numbers, *others = (read(name)["starts"] for name in ("training", "training_again", "starts"))
    rows = [
        [
            kind,
            f"{row['first_step_s']:.1f}",
            f"{row['first_validation_s']:.1f}",
            f"{row['validation_s']:.1f}",
            f"{row['wait_ms']:.0f}",
            *(
                f"{run[kind]['step_ms']:.0f} ({run['one process']['step_ms'] / run[kind]['step_ms']:.2f}×)"
                for run in (numbers, *others)
            ),
        ]
        for kind, row in numbers.items()
    ]
    head = ["", "s to the first step", "to the first validation's end", "s a validation", "ms waiting for a batch"]
    return table([*head, "ms a step", "in another run", "in a third"], rows)


def slowest() -> str:
    """The operations that a step spends most time in, at both sizes."""
    rows = [
        [
            f"{size}: `{row['operation'].removeprefix('aten::')}`",
            str(row["calls"]),
            f"{row['ms']:,.0f}",
            f"{row['share']:.0%}",
        ]
        for size, name in (("small", "training"), ("paper", "memory_paper"))
        for row in read(name)["slowest"]
    ]
    return table(["operation", "calls", "ms", "share"], rows)


def machine() -> str:
    """What the numbers were measured on."""
    runs = {path.stem: read(path.stem)["machine"] for path in sorted(COSTS.glob("*.json"))}
    same = {
        tuple(facts[key] for key in ("cpu", "cores", "memory_gib", "system", "python", "torch"))
        for facts in runs.values()
    }
    if len(same) != 1 or {(facts["threads"], facts["device"]) for facts in runs.values()} != {(1, "cpu")}:
        raise ValueError(f"the numbers are of several machines: {sorted(same)}")
    ((cpu, cores, memory, system, python, pytorch),) = same
    loads = [facts["load"] for facts in runs.values()]
    return (
        f"{cpu}, {cores} cores that are shared with others, {memory} GiB; {system.split('-')[0]}, Python {python}, "
        f"PyTorch {pytorch}, one thread; no GPU. When the scripts began, the load was {min(loads)} to {max(loads)}."
    )


def goals() -> str:
    """What was wanted beside what was measured."""
    rows = []
    for name, words, most in (("paper", "the paper's size", 1.10), ("small", "the small size", 1.15)):
        numbers = read(STEPS[name][0])["sizes"][name]
        others = [read(other)["sizes"][name]["times_joint"]["cggm"] for other in STEPS[name][1:]]
        also = " and ".join(f"{value:.2f}" for value in others)
        rows.append(
            [
                f"CGGM's step over joint training's, {words}",
                f"≤ {most:.2f}",
                f"{ratio(numbers, 'cggm')}; {also} in other runs",
            ]
        )
    own = read("step_paper")["sizes"]["paper"]["classifiers"]
    rows.append(["the classifiers' parameters, the paper's size", "≤ 8 MB", f"{own['megabytes']:.1f} MB"])
    measured = read("data")["measured"]
    for way, words, least in (("persistent", "`PersistentDataset`", 10), ("hdf5", "HDF5, whole volumes", 20)):
        found = {
            state: next(
                row["store_faster_wall"]
                for row in measured
                if (row["way"], row["stage"], row["slices"], row["state"]) == (way, "slice", 1, state)
            )
            for state in ("cold", "warm")
        }
        rows.append(
            [f"a slice from disk, over {words}", f"≥ {least}×", f"{found['cold']:.0f}× cold, {found['warm']:.0f}× warm"]
        )
    trained = read("memory_training")["trainings"]
    most_cases = max(run["cases"] for run in trained)
    used = max(run["peak_megabytes"]["used"] for run in trained if run["cases"] == most_cases)
    rows.append(
        [f"training from disk, {most_cases:,} cases of BraTS's size", "≤ 8 GB", f"{used / 1e3:.2f} GB at its peak"]
    )
    volumes = read("inference")
    seconds, fastest, naive = volumes["seconds_per_volume"], "+ channels-last", "slice by slice, brain's box"
    differ = volumes["differ_same_volume"][fastest]
    rows.append(
        [
            "inference in float32, over slice by slice in the brain's box",
            "the same voxels",
            ("the same voxels" if differ == 0 else f"{differ:.2%} differ")
            + f", {seconds[naive] / seconds[fastest]:.1f}× faster",
        ]
    )
    return table(["what", "wanted", "measured"], rows)


MAKERS: dict[str, Callable[[], str]] = {
    "machine": machine,
    "goals": goals,
    "steps": steps,
    "epsilon": epsilon,
    "growth": growth,
    "memory": memory,
    "data: slice": lambda: data("slice"),
    "data: augmented": lambda: data("augmented"),
    "store": store,
    "limits": limits,
    "inference": inference,
    "overlays": overlays,
    "processes": processes,
    "slowest": slowest,
}


def filled(page: str) -> str:
    """Put every table in its place.

    Raises:
        ValueError: where the page has not one place for each.
    """
    for name, make in MAKERS.items():
        pattern = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
        text = make()
        page, places = re.subn(
            pattern, lambda found, text=text: f"{found[1]}\n{text}\n\n{found[2]}", page, flags=re.DOTALL
        )  # type: ignore[misc]
        if places != 1:
            raise ValueError(f"expected one place for {name} on the page, found {places}")
    return page


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail where a table would change.")] = False,
) -> None:
    """Write the tables of docs/performance.md."""
    found = PAGE.read_text(encoding="utf-8")
    wanted = filled(found)
    if check and found != wanted:
        typer.echo(f"{PAGE.name} would change: run python scripts/make_performance.py")
        raise typer.Exit(1)
    if found != wanted:
        with atomic_path(PAGE) as temporary:
            temporary.write_text(wanted, encoding="utf-8", newline="\n")
    typer.echo(f"{PAGE.name} is up to date")


if __name__ == "__main__":
    typer.run(main)
