# SPDX-License-Identifier: Apache-2.0
"""Tables 5, 6 and 8 of the paper, and a report of all its figures and tables, from run folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

from monai_cggm.analysis.cells import FUSION
from monai_cggm.analysis.figures import FIGURES, Item, LeftOut, regions_of, regions_text, source
from monai_cggm.analysis.runs import (
    BASELINE_STATES,
    CGGM_STATES,
    Kind,
    Run,
    by_kind,
    differing_settings,
    read_runs,
    runs_of,
)
from monai_cggm.files import atomic_path

PARTS = {"validation": "validation, best epoch", "test": "test"}
#: bytes of a parameter in float32, and of a megabyte as ``resources.json`` counts them
_BYTES, _MEGABYTE = 4, 2**20
_PNG_DPI = 150


@dataclass
class Report:
    """What was made of some runs.

    Attributes:
        folder: where it lies.
        runs: the runs that could be read.
        made: name of the files → figure or table.
        left_out: title → why it was not made.
        notes: what is wrong with runs, one line each.
    """

    folder: Path
    runs: list[Run]
    made: dict[str, Item] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def page(self) -> Path:
        """The page that holds everything in the paper's order."""
        return self.folder / "report.md"

    @property
    def outcomes(self) -> dict[str, str]:
        """Title of each figure and table in the paper's order → its files, or why it was left out."""
        outcomes = {}
        for name, title, _ in (*FIGURES, *TABLES):
            if name in self.made:
                endings = ("png", "svg", "csv") if self.made[name].figure is not None else ("csv",)
                outcomes[title] = f"{self.made[name].title}: {name}.{', .'.join(endings)}"
            else:
                outcomes[title] = f"left out: {self.left_out[title]}"
        return outcomes


def write_report(folders: Sequence[str | Path], out: str | Path) -> Report:
    """Make the paper's figures and tables of some runs, as far as the runs have what they need.

    Writes for each figure ``figure_2.png``, ``.svg`` and ``.csv``, for each table ``table_5.csv``, and ``report.md``
    with all of them in order. Runs that differ in their seed alone are repetitions: they are averaged, with their
    sample standard deviation. Figures and tables that an earlier report left in ``out`` and that cannot be made now are
    removed, so the folder shows one set of runs.

    Args:
        folders: run folders (see "What a run writes"), finished or not.
        out: folder to write to, made if need be.

    Returns:
        What was made, what was left out and why.

    Raises:
        DataError: if no folder holds a run.
    """
    runs, unreadable = read_runs(folders)
    problems = [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    report = Report(Path(out), runs, notes=[*unreadable, *problems, *_unequal_repetitions(runs)])
    for name, title, make in (*FIGURES, *TABLES):
        try:
            item = make(runs)
        except LeftOut as reason:
            report.left_out[title] = str(reason)
            for ending in (".png", ".svg", ".csv"):
                (report.folder / f"{name}{ending}").unlink(missing_ok=True)
            continue
        _write_item(item, report.folder / name)
        report.made[name] = item
    with atomic_path(report.page) as temporary:
        temporary.write_text(_page(report), encoding="utf-8")
    return report


# ---------------------------------------------------------------------- tables


def table_5(runs: Sequence[Run]) -> Item:
    """Compare the classifiers' Dice after unimodal, joint and CGGM training.

    Unimodal training is a network of its own for each modality; its row gathers those networks.

    Raises:
        LeftOut: where no run has scores of classifiers.
    """
    kinds = by_kind([r for r in runs if any(np.isfinite(r.score(part, m)) for part in PARTS for m in r.modalities)])
    alone = [run for run in runs if run.kind.state == "unimodal"]
    if not kinds:
        raise LeftOut("needs validation scores of a run with classifiers (observe or CGGM)")
    modalities = list(dict.fromkeys(m for run in [*alone, *runs_of(kinds)] for m in run.modalities))
    rows = []
    for part in PARTS:
        by_modality = {m: [run for run in alone if run.modalities == (m,)] for m in modalities}
        columns = {m: [run.score(part, FUSION) for run in group] for m, group in by_modality.items()}
        rows += _row("unimodal training", part, columns)
        for kind, group in kinds.items():
            columns = {m: [run.score(part, m) for run in group] for m in [*modalities, FUSION]}
            rows += _row(_training(kind), part, columns)
    chosen = [*alone, *runs_of(kinds)]
    caption = (
        f"Mean Dice over {regions_text(chosen)} of each modality's classifier, and of the fusion; mean ± sd over runs."
    ) + (" Unimodal training: a network of one encoder." if alone else " No run of unimodal training was given.")
    return _table_item("Dice of the classifiers", caption, rows, [*modalities, FUSION], chosen)


def table_6(runs: Sequence[Run]) -> Item:
    """Compare magnitude, direction and both with joint training.

    Raises:
        LeftOut: where no CGGM run has validation scores.
    """
    states = (*BASELINE_STATES, *CGGM_STATES)
    kinds = _scored({kind: group for kind, group in by_kind(runs).items() if kind.state in states})
    if not any(kind.state in CGGM_STATES for kind in kinds):
        raise LeftOut("needs validation scores of a CGGM run (magnitude, direction or both)")
    regions = [*dict.fromkeys(name for run in runs_of(kinds) for name in regions_of(run)), "mean"]
    rows = []
    for part in PARTS:
        for kind, group in kinds.items():
            columns = {name: [run.score(part, FUSION, f"dice_{name}") for run in group] for name in regions}
            rows += _row(_training(kind), part, columns)
    found = {kind.state for kind in kinds}
    missing = [s for s in CGGM_STATES if s not in found] + ([] if found & set(BASELINE_STATES) else ["joint training"])
    caption = "Dice of the fusion with the magnitude, the direction, or both modulated; mean ± sd over runs." + (
        f" No run with scores of: {', '.join(missing)}." if missing else ""
    )
    return _table_item("Magnitude and direction", caption, rows, regions, runs_of(kinds))


def table_8(runs: Sequence[Run]) -> Item:
    """Say what the classifiers cost: parameters, and peak memory and time against joint training without them.

    Raises:
        LeftOut: where no run with classifiers has ``resources.json``.
    """
    costed = [run for run in runs if run.resources.get("classifier_parameters")]
    if not costed:
        raise LeftOut("needs resources.json of a run with classifiers")
    plain = [run for run in runs if run.kind.state == "joint" and run.resources]
    rows, used = [], []
    for kind, group in by_kind(costed).items():
        first = group[0].resources
        # memory and time compare on one device with one number of threads only
        alike = [
            run
            for run in plain
            if all(run.resources.get(name) == first.get(name) for name in ("device", "threads", "parameters"))
        ]
        used += alike
        with_them, without = _mean_of(group, "peak_memory_mb"), _mean_of(alike, "peak_memory_mb")
        rows.append(
            {
                "training": _training(kind),
                "device": first.get("device"),
                "classifier parameters": int(first["classifier_parameters"]),
                "their size in float32 (MB)": int(first["classifier_parameters"]) * _BYTES / _MEGABYTE,
                "peak memory with (MB)": with_them,
                "peak memory without (MB)": without,
                "additional memory (MB)": with_them - without,
                "training with (s)": _mean_of(group, "training_seconds"),
                "training without (s)": _mean_of(alike, "training_seconds"),
                "runs": len(group),
            }
        )
    data = pd.DataFrame(rows)
    caption = (
        "What the classifiers need while training; at inference they are gone. With: this training; without: joint "
        "training on the same device with as many threads. Memory of a process depends on more than the classifiers, "
        "on a CPU above all. MB: 2^20 bytes."
        + ("" if used else " No joint training with resources.json on the same device to compare with.")
    )
    shown = data.map(lambda value: _cell(value) if isinstance(value, float) else str(value))
    chosen = [*dict.fromkeys([*used, *costed])]
    return Item("Resources of the classifiers", f"{caption} {source(chosen)}", data, shown=shown)


#: name of the files, what it is, and who makes it
TABLES: tuple[tuple[str, str, Callable[[Sequence[Run]], Item]], ...] = (
    ("table_5", "Table 5", table_5),
    ("table_6", "Table 6", table_6),
    ("table_8", "Table 8", table_8),
)


def _scored(kinds: dict[Kind, list[Run]]) -> dict[Kind, list[Run]]:
    with_scores = {kind: [run for run in group if run.best is not None or run.tests] for kind, group in kinds.items()}
    return {kind: group for kind, group in with_scores.items() if group}


def _training(kind: Kind) -> str:
    return {"joint": "joint training", "observe": "joint training, watched"}.get(kind.state, kind.label)


def _row(training: str, part: str, columns: dict[str, list[float]]) -> list[dict[str, object]]:
    """One row with mean and sd of each column; none where no column has a value."""
    finite = {name: np.asarray(values)[np.isfinite(values)] for name, values in columns.items()}
    most = max((len(values) for values in finite.values()), default=0)
    if most == 0:
        return []
    row: dict[str, object] = {"training": training, "scores": PARTS[part], "runs": most}
    for name, values in finite.items():
        row[name] = values.mean() if len(values) else np.nan
        row[f"{name}_sd"] = values.std(ddof=1) if len(values) > 1 else np.nan
    return [row]


def _table_item(
    title: str, caption: str, rows: list[dict[str, object]], columns: Sequence[str], runs: Sequence[Run]
) -> Item:
    data = pd.DataFrame(rows)
    if any(row["scores"] == PARTS["validation"] for row in rows):
        caption += " The best epoch was chosen on validation, which makes scores there optimistic."
    shown = data[["training", "scores", "runs"]].astype(str)
    for name in columns:
        if name in data:
            cells = zip(data[name], data[f"{name}_sd"], strict=True)
            shown[name] = [_cell(mean) + ("" if pd.isna(sd) else f" ± {sd:.3f}") for mean, sd in cells]
    return Item(title, f"{caption} {source(runs)}", data, shown=shown)


def _mean_of(runs: Sequence[Run], name: str) -> float:
    values = [float(run.resources[name]) for run in runs if run.resources.get(name) is not None]
    return float(np.mean(values)) if values else float("nan")


def _cell(value: float) -> str:
    if pd.isna(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


# ---------------------------------------------------------------------- files


def _write_item(item: Item, stem: Path) -> None:
    with atomic_path(stem.with_suffix(".csv")) as temporary:
        item.data.to_csv(temporary, index=False)
    if item.figure is None:
        return
    # no date and no random names in it: the same runs give the same file
    with (
        matplotlib.rc_context({"svg.hashsalt": stem.name, "svg.fonttype": "none"}),
        atomic_path(stem.with_suffix(".svg")) as temporary,
    ):
        item.figure.savefig(temporary, metadata={"Date": None, "Title": item.title, "Description": item.caption})
    with atomic_path(stem.with_suffix(".png")) as temporary:
        item.figure.savefig(temporary, dpi=_PNG_DPI, metadata={"Title": item.title, "Description": item.caption})


def _page(report: Report) -> str:
    titles = {name: title for name, title, _ in (*FIGURES, *TABLES)}
    parts = ["# Figures and tables of the CGGM paper, from these runs", "## Runs", markdown(_overview(report.runs))]
    differences = differing_settings(report.runs)
    if len(differences):
        parts += ["Settings in which the runs differ, but for seeds and paths:", markdown(differences)]
    for name, item in report.made.items():
        parts.append(f"## {titles[name]}: {item.title}")
        links = [f"[CSV]({name}.csv)"]
        if item.figure is not None:
            parts.append(f"![{titles[name]}: {item.title}]({name}.png)")
            links.insert(0, f"[SVG]({name}.svg)")
        if item.shown is not None:
            parts.append(markdown(item.shown))
        parts.append(f"{item.caption} {' '.join(links)}")
    if report.left_out:
        parts += ["## Left out", "\n".join(f"- {title}: {reason}" for title, reason in report.left_out.items())]
    if report.notes:
        parts += ["## About the run folders", "\n".join(f"- {note}" for note in report.notes)]
    return "\n\n".join(parts) + "\n"


def _unequal_repetitions(runs: Sequence[Run]) -> list[str]:
    notes = []
    for kind, group in by_kind(runs).items():
        settings = differing_settings(group)["setting"].tolist()
        if settings:
            names = ", ".join(run.name for run in group)
            notes.append(f"{names} are averaged as {kind.label}, and differ in {', '.join(settings)}")
    return notes


def _overview(runs: Sequence[Run]) -> pd.DataFrame:
    rows = []
    for run in runs_of(by_kind(runs)):
        best = run.best
        rows.append(
            {
                "run": run.name,
                "training": run.kind.label,
                "seed": "–" if run.seed is None else str(run.seed),
                "epochs": f"{run.epochs_done} of {run.epochs_planned or '?'}",
                "best epoch": "–" if best is None else f"{best['epoch']:.0f}",
                "validation Dice": _cell(run.score("validation", FUSION)),
                "test Dice": _cell(run.score("test", FUSION)),
            }
        )
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    r"""Write a table of texts in Markdown.

    Example:
        >>> print(markdown(pd.DataFrame({"run": ["a|b"], "Dice": ["0.7"]})))
        | run | Dice |
        |---|---|
        | a\|b | 0.7 |
    """

    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    rows = [line(table.columns), "|" + "---|" * len(table.columns)]
    return "\n".join([*rows, *(line(row) for row in table.itertuples(index=False))])
