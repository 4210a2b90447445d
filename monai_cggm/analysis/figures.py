# SPDX-License-Identifier: Apache-2.0
"""Figures 2 to 7 of the paper (Guo et al., NeurIPS 2024), drawn from run folders."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from monai_cggm.analysis.cells import FUSION
from monai_cggm.analysis.runs import (
    BASELINE_STATES,
    CGGM_STATES,
    VALIDATION_DICE,
    Kind,
    Run,
    by_kind,
    over_runs,
    read_gradients,
    runs_of,
)

#: most panels side by side, and most kinds in one figure
COLUMNS, MOST_KINDS = 3, 6
#: t-SNE's usual perplexity, where there are points enough, and most points of one run
PERPLEXITY, MOST_POINTS = 30, 800

# Okabe and Ito's colours, which the colour-blind can tell apart
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_BLACK, _RED = "#000000", "#C00000"

#: what Figures 2 and 3 show: panel, column of each series, label of the axis
_QUANTITIES = (
    ("validation Dice", "validation/{}_dice_mean", "mean Dice, validation volumes"),
    ("ε on training batches", "epsilon/{}", "ε (Dice on the batch)"),
    ("gradient magnitude", "gradient_norm/{}", "norm of the encoder's gradient"),
    ("gradient magnitude after modulation", "modulated_norm/{}", "norm after modulation"),
    ("gradient direction", "cosine/{}", "cosine with the fusion's gradient"),
)


class LeftOut(Exception):  # noqa: N818
    """Why a figure or table cannot be made from these runs."""


@dataclass(frozen=True)
class Item:
    """A figure or a table with the numbers behind it.

    Attributes:
        title: what it shows.
        caption: how to read it, and which runs it is from.
        data: the numbers, for a CSV file.
        figure: the picture; None for a table.
        shown: a table's cells as text; None for a figure.
    """

    title: str
    caption: str
    data: pd.DataFrame
    figure: Figure | None = None
    shown: pd.DataFrame | None = None


# ---------------------------------------------------------------------- figures 2 and 3


def figure_2(runs: Sequence[Run]) -> Item:
    """Draw performance, gradient magnitude and gradient direction over epochs without modulation (``observe``).

    Raises:
        LeftOut: without a run of that kind.
    """
    kinds = _kinds(runs, ("observe",))
    if not kinds:
        raise LeftOut("needs a run of joint training with classifiers that watch (methods/observe.yaml)")
    return _training_figure("Training without modulation", kinds)


def figure_3(runs: Sequence[Run]) -> Item:
    """Draw the same with CGGM, beside the runs without modulation where there are any, on shared axes.

    Raises:
        LeftOut: without a run that modulates gradients.
    """
    modulated = _modulated(runs)
    if not modulated:
        raise LeftOut("needs a run of CGGM")
    watched = _kinds(runs, ("observe",))
    way = "CGGM" if all(kind.label.startswith("CGGM") for kind in modulated) else "modulation"
    title = f"Training without modulation and with {way}" if watched else f"Training with {way}"
    return _training_figure(title, watched | _most(modulated, MOST_KINDS - len(watched)))


def _training_figure(title: str, kinds: dict[Kind, list[Run]]) -> Item:
    chosen = [run for group in kinds.values() for run in group]
    rows = pd.concat(
        [_curves(kind, group, *quantity[:2]) for kind, group in kinds.items() for quantity in _QUANTITIES],
        ignore_index=True,
    )
    if rows.empty:
        raise LeftOut(f"{_names(chosen)}: epochs.csv has none of the columns")
    shown = [quantity for quantity in _QUANTITIES if quantity[0] in set(rows["panel"])]
    figure, grid = _training_grid(len(shown), len(kinds))
    for i, (panel, _, label) in enumerate(shown):
        these = rows[rows["panel"] == panel]
        for axes, kind in zip(grid[i], kinds, strict=True):
            _draw_curves(axes, these[these["kind"] == kind.label], "epoch")
            if kind.label not in set(these["kind"]):
                absent = "not modulated" if kind.state == "observe" else "not recorded"
                axes.text(0.5, 0.5, absent, transform=axes.transAxes, ha="center", color="#666666")
        grid[i][0].set_ylabel(label)
        if panel.endswith("after modulation"):  # without a rule, a few epochs would flatten all others
            grid[i][0].set_ylim(*_robust_limits(these["mean"], 0, 99)[:2])
    if len(kinds) == 1:
        for (axes,), (panel, _, _) in zip(grid, shown, strict=True):
            axes.set_title(panel, fontsize=9)
            axes.set_xlabel("epoch")
    else:
        for top, bottom, kind in zip(grid[0], grid[-1], kinds, strict=True):
            top.set_title(_wrapped(kind.label, 34), fontsize=9)
            bottom.set_xlabel("epoch")
    _finish(figure, title, chosen, rows["series"], bands=True)
    caption = (
        f"Validation Dice of the fusion and of each modality's classifier (mean over {regions_text(chosen)}), ε of the "
        "classifiers on training batches, Euclidean norm of each encoder's gradient before (and, with its axis cut at "
        "the 99th percentile, after) it is modulated, and cosine of each classifier's gradient with the fusion's; "
        "means over each epoch's iterations."
    )
    return Item(title, _caption(caption, chosen), rows, figure)


def _training_grid(quantities: int, kinds: int) -> tuple[Figure, list[list[Axes]]]:
    """Axes by quantity and kind: a row a quantity and a column a kind, or two columns of quantities for one kind."""
    if kinds == 1:
        figure, panels = _panels(quantities, width=4.8, height=3.2, columns=2)
        return figure, [[axes] for axes in panels]
    figure = Figure(figsize=(2.4 + 3.4 * kinds, 0.8 + 2.4 * quantities), layout="constrained")
    grid = figure.subplots(quantities, kinds, sharex=True, sharey="row", squeeze=False)
    return figure, grid.tolist()


def _curves(kind: Kind, runs: Sequence[Run], panel: str, column: str) -> pd.DataFrame:
    series = _modalities(runs)
    if column.startswith("validation/"):
        series = [FUSION, *series]
    frames = [
        over_runs(runs, "epochs", column.format(name)).assign(kind=kind.label, panel=panel, series=name)
        for name in series
    ]
    order = ["kind", "panel", "series", "epoch", "mean", "sd", "runs"]
    return pd.concat(frames, ignore_index=True)[order] if frames else pd.DataFrame(columns=order)


# ---------------------------------------------------------------------- figure 4


def figure_4(runs: Sequence[Run]) -> Item:
    """Draw t-SNE maps of the classifiers' gradients and of the fusion's gradients given one modality, a panel a run.

    Every gradient is scaled to unit length, since the method uses directions only. The map starts from principal
    components with a fixed seed; its perplexity is 30, or a third of the points where there are fewer than 90.

    Raises:
        LeftOut: where no run has gradients of three iterations or more.
    """
    found, reasons = {}, []
    for run in runs:
        gradients = read_gradients(run)
        if isinstance(gradients, str):
            reasons.append(gradients)
        elif len(gradients["iteration"]) < 3:
            reasons.append(f"{run.name}/gradients.npz has {len(gradients['iteration'])} records, and three are needed")
        else:
            found[run.name] = gradients
    if not found:
        raise LeftOut(f"needs gradients that a GradientRecorder kept: {'; '.join(reasons)}")
    chosen = [run for run in runs if run.name in found]
    maps = {name: _map(gradients) for name, gradients in found.items()}
    figure, panels = _panels(len(chosen), width=4.6, height=4.4)
    for axes, run in zip(panels, chosen, strict=True):
        _draw_map(axes, maps[run.name])
        axes.set_title(_wrapped(f"{run.name} ({run.kind.label})", 50), fontsize=9)
    data = pd.concat([frame.assign(run=name) for name, frame in maps.items()], ignore_index=True)
    title = "Gradients of the classifiers and unimodal gradients of the fusion"
    marks = [_mark("o", "fusion, this modality alone"), _mark("^", "classifier")]
    colours = [_mark("s", name, _colour(i)) for i, name in enumerate(dict.fromkeys(data["modality"]))]
    _finish(figure, title, chosen, (), extra=[*colours, *marks])
    caption = (
        "t-SNE of last-layer gradients, a point a gradient of a training batch: circles, the fusion with only this "
        "modality's features (the others are zero); triangles, the modality's classifier. Unit length, seed 0. The "
        "axes have no unit, and distances between far groups mean nothing. "
        + " ".join(_closeness(name, gradients) for name, gradients in found.items())
    )
    return Item(title, _caption(caption, chosen), data[["run", "modality", "source", "iteration", "x", "y"]], figure)


def _map(gradients: dict[str, np.ndarray]) -> pd.DataFrame:
    from sklearn.manifold import TSNE  # takes a second

    modalities = gradients["modalities"].tolist()
    records = len(gradients["iteration"])
    kept = np.unique(np.linspace(0, records - 1, max(3, MOST_POINTS // (2 * len(modalities))), dtype=int))
    rows = [
        (modality, source, int(gradients["iteration"][r]), gradients[source][r, i])
        for source in ("fusion", "classifier")
        for i, modality in enumerate(modalities)
        for r in kept
    ]
    rows = [row for row in rows if np.isfinite(row[3]).all() and row[3].any()]
    vectors = _unit(np.stack([row[3] for row in rows]))
    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(vectors)
    table = pd.DataFrame([row[:3] for row in rows], columns=["modality", "source", "iteration"])
    return table.assign(x=places[:, 0], y=places[:, 1])


def _draw_map(axes: Axes, points: pd.DataFrame) -> None:
    for i, modality in enumerate(dict.fromkeys(points["modality"])):
        for source, marker in (("fusion", "o"), ("classifier", "^")):
            these = points[(points["modality"] == modality) & (points["source"] == source)]
            label = f"{modality} ({source})"
            axes.scatter(
                these["x"], these["y"], s=16, marker=marker, color=_colour(i), alpha=0.6, linewidths=0, label=label
            )
    axes.set(xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)", xticks=[], yticks=[])


def _closeness(name: str, gradients: dict[str, np.ndarray]) -> str:
    cosines = mean_cosines(gradients["classifier"], gradients["fusion"])
    same = np.nanmean(np.diag(cosines))
    if len(cosines) == 1:
        return f"{name}: mean cosine {same:.2f}."
    others = np.nanmean(cosines[~np.eye(len(cosines), dtype=bool)])
    return f"{name}: mean cosine of a classifier with the fusion of its modality {same:.2f}, of another {others:.2f}."


def mean_cosines(classifier: np.ndarray, fusion: np.ndarray) -> np.ndarray:
    """Return the cosine of classifier i's gradient with the fusion's of modality j, mean over records.

    Args:
        classifier: ``(R, M, d)``.
        fusion: ``(R, M, d)``.

    Returns:
        ``(M, M)``.

    Example:
        >>> g = np.array([[[1.0, 0.0], [0.0, 2.0]]])
        >>> mean_cosines(g, 3 * g).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    return np.einsum("rid,rjd->rij", _unit(classifier), _unit(fusion)).mean(axis=0)


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-300)


# ---------------------------------------------------------------------- figure 5


def figure_5(runs: Sequence[Run]) -> Item:
    """Draw the best epoch's validation Dice of CGGM runs against ρ and against λ.

    A line joins runs that differ in that number alone; seeds are averaged, with their standard deviation as error bar.

    Raises:
        LeftOut: where no two CGGM runs differ in ρ or λ alone.
    """
    scored = [run for run in runs if run.kind.state in CGGM_STATES and run.best is not None]
    sweeps = [
        (symbol, _sweep(scored, name, other)) for symbol, name, other in (("ρ", "rho", "lam"), ("λ", "lam", "rho"))
    ]
    sweeps = [(symbol, rows) for symbol, rows in sweeps if not rows.empty]
    if not sweeps:
        raise LeftOut("needs several CGGM runs with validation that differ in rho or lam alone")
    used = set().union(*(rows["run"] for _, rows in sweeps))
    chosen = [run for run in scored if run.name in used]
    baseline = [run for run in runs if run.kind.state in BASELINE_STATES and run.best is not None]
    figure, panels = _panels(len(sweeps), width=4.8, height=3.8, sharey=True)
    for axes, (symbol, rows) in zip(panels, sweeps, strict=True):
        for i, (family, line) in enumerate(rows.groupby("family", sort=False)):
            _draw_sweep(axes, line, family, _colour(i))
        if baseline:
            level = float(np.mean([_best_dice(run) for run in baseline]))
            axes.axhline(level, color=_BLACK, linestyle="--", linewidth=1, label="joint training")
        axes.set_xlabel(f"{symbol} (no unit)")
        axes.legend(fontsize=7, frameon=False)
    panels[0].set_ylabel("mean Dice, validation, best epoch")
    title = "Validation Dice against " + " and ".join(symbol for symbol, _ in sweeps)
    _finish(figure, title, [*chosen, *baseline], ())
    points = [rows.assign(panel=symbol) for symbol, rows in sweeps]
    level_rows = [{"panel": "baseline", "run": run.name, "seed": run.seed, "dice": _best_dice(run)} for run in baseline]
    data = pd.concat([*points, pd.DataFrame(level_rows)], ignore_index=True)
    missing = {"ρ", "λ"} - {symbol for symbol, _ in sweeps}
    caption = (
        f"Mean Dice over {regions_text([*chosen, *baseline])} of the best epoch on validation, faint: a point a run; "
        "solid: mean over seeds with the sample standard deviation. The best epoch was chosen by this very number, so "
        "it is optimistic."
        + ("" if not missing else f" No two runs differ in {' or '.join(missing)} alone.")
        + ("" if baseline else " No run of joint training to compare with.")
    )
    columns = ["panel", "family", "value", "run", "seed", "dice", "mean", "sd", "runs"]
    return Item(title, _caption(caption, [*chosen, *baseline]), data.reindex(columns=columns), figure)


def _sweep(runs: Sequence[Run], name: str, other: str) -> pd.DataFrame:
    """A row a run of each family that holds two values or more."""
    symbol = {"rho": "ρ", "lam": "λ"}[other]
    rows = [
        {
            "family": ", ".join([f"{symbol}={getattr(run.kind, other):g}", *_family(run.kind)]),
            "value": getattr(run.kind, name),
            "run": run.name,
            "seed": run.seed,
            "dice": _best_dice(run),
        }
        for run in runs
        if getattr(run.kind, name) is not None
    ]
    columns = ["family", "value", "run", "seed", "dice", "mean", "sd", "runs"]
    if not rows:
        return pd.DataFrame(columns=columns)
    table = pd.DataFrame(rows).sort_values(["family", "value"], kind="stable")
    table = table[table.groupby("family")["value"].transform("nunique") > 1]
    dice = table.groupby(["family", "value"])["dice"]
    return table.assign(mean=dice.transform("mean"), sd=dice.transform("std"), runs=dice.transform("count"))[columns]


def _family(kind: Kind) -> list[str]:
    """What a sweep's legend says besides ρ and λ."""
    settings = dict(kind.family)
    words = [settings.pop("rule", "")]
    words += ["direction only"] if settings.pop("magnitude", "True") == "False" else []
    words += [way] if (way := settings.pop("direction", "gradient")) != "gradient" else []
    return [*words, *(f"{name}={value}" for name, value in settings.items())]


def _draw_sweep(axes: Axes, line: pd.DataFrame, label: str, colour: str) -> None:
    axes.scatter(line["value"], line["dice"], s=26, color=colour, alpha=0.4, linewidths=0)
    means = line.drop_duplicates("value")
    axes.errorbar(
        means["value"], means["mean"], means["sd"], color=colour, marker="o", markersize=4, capsize=3,
        linewidth=1.4, label=_wrapped(label, 36),
    )  # fmt: skip


def _best_dice(run: Run) -> float:
    return float("nan") if run.best is None else float(run.best[VALIDATION_DICE])


# ---------------------------------------------------------------------- figure 6


def figure_6(runs: Sequence[Run]) -> Item:
    """Draw the losses over iterations: without CGGM, with magnitude, direction, or both; smoothed, raw ones faint.

    Raises:
        LeftOut: where no run with classifiers has ``iterations.csv``.
    """
    kinds = _most(_kinds(runs, ("observe",)) | _modulated(runs), MOST_KINDS)
    series = {"task": _BLACK} | {name: _colour(i) for i, name in enumerate(_modalities(runs_of(kinds)))}
    rows = _over_iterations(kinds, {name: f"loss/{name}" for name in series}, "mean")
    if rows.empty:
        raise LeftOut("needs a run with classifiers (observe or CGGM) and its iterations.csv")
    kinds = {kind: group for kind, group in kinds.items() if kind.label in set(rows["kind"])}
    figure, panels = _panels(len(kinds), sharey=True)
    for axes, kind in zip(panels, kinds, strict=True):
        _draw_iterations(axes, rows[rows["kind"] == kind.label], series)
        axes.set_title(_wrapped(kind.label, 40), fontsize=9)
    low, high, outside = _robust_limits(rows["mean"], 0.1, 99.9)
    for axes in panels:
        axes.set_ylim(min(low, 0), high)
    _label(panels, "iteration", "loss")
    title = "Losses over iterations"
    _finish(figure, title, runs_of(kinds), (), extra=[_line(colour, name) for name, colour in series.items()])
    caption = (
        "Loss of the task (fusion) and of each modality's classifier on training batches; solid: rolling mean over "
        f"{_window(rows)} iterations, faint: every iteration (mean over runs of a kind)."
        + (f" {outside} points lie outside of the axis." if outside else "")
    )
    return Item(title, _caption(caption, runs_of(kinds)), rows, figure)


# ---------------------------------------------------------------------- figure 7


def figure_7(runs: Sequence[Run]) -> Item:
    """Draw the balance terms over iterations, with a line at the mean that they have by construction.

    CGGM's is ρ(M−1)/M; another method's is that which its configuration has TensorBoard draw (``log#balance_line``).

    Under the paper's rule terms have no bound, so the axis ends at the 1st and the 99th percentile.

    Raises:
        LeftOut: where no run has balance terms.
    """
    kinds = _most(_modulated(runs), MOST_KINDS)
    series = {name: _colour(i) for i, name in enumerate(_modalities(runs_of(kinds)))}
    rows = _over_iterations(kinds, {name: f"balance/{name}" for name in series}, "median")
    if rows.empty:
        raise LeftOut("needs a run with balance terms (CGGM) and its iterations.csv")
    kinds = {kind: group for kind, group in kinds.items() if kind.label in set(rows["kind"])}
    figure, panels = _panels(len(kinds))
    notes, drawn = [], []
    for axes, kind in zip(panels, kinds, strict=True):
        these = rows[rows["kind"] == kind.label]
        _draw_iterations(axes, these, series)
        line, words = _balance_line(kind, kinds[kind])
        if line is not None:
            drawn.append(words)
            axes.axhline(line, color=_RED, linewidth=1.2, label=words, zorder=3)
            axes.annotate(f"{line:.3g}", (1, line), xycoords=("axes fraction", "data"), color=_RED, fontsize=7)
        low, high, outside = _robust_limits(these["mean"], 1, 99, keep=line)
        axes.set_ylim(low, high)
        axes.set_title(_wrapped(kind.label, 40), fontsize=9)
        extremes = f"from {these['mean'].min():.3g} to {these['mean'].max():.3g}"
        notes.append(f"{kind.label}: {outside} of {len(these)} points lie outside of the axis; terms go {extremes}.")
    _label(panels, "iteration", "balance term B (no unit)")
    title = "Balance terms over iterations"
    red = " or ".join(dict.fromkeys(drawn))
    legend = [*(_line(colour, name) for name, colour in series.items()), *([_line(_RED, red)] if red else [])]
    _finish(figure, title, runs_of(kinds), (), extra=legend)
    caption = (
        "B of each modality after the rule"
        + (f"; above the red line, {red}, a modality is promoted, below it is held back. " if red else ". ")
        + f"Solid: rolling median over {_window(rows)} iterations; faint: every iteration (mean over runs of a kind). "
        "Axes end at the 1st and 99th percentile. " + " ".join(notes)
    )
    return Item(title, _caption(caption, runs_of(kinds)), rows, figure)


def _balance_line(kind: Kind, runs: Sequence[Run]) -> tuple[float | None, str]:
    """The mean that balance terms have by construction, and what it is called."""
    modalities = len(_modalities(runs))
    if kind.rho is not None:
        return (kind.rho * (modalities - 1) / modalities if modalities > 1 else None), "ρ(M−1)/M"
    told = [log.get("balance_line") for run in runs if isinstance(log := run.config.get("log"), Mapping)]
    return next((float(line) for line in told if isinstance(line, int | float)), None), "the mean of B"


def _over_iterations(kinds: dict[Kind, list[Run]], columns: dict[str, str], smoothing: str) -> pd.DataFrame:
    frames = [
        over_runs(group, "iterations", column).assign(kind=kind.label, series=name)
        for kind, group in kinds.items()
        for name, column in columns.items()
    ]
    frames = [frame for frame in frames if len(frame)]
    order = ["kind", "series", "iteration", "mean", "smoothed", "runs"]
    if not frames:
        return pd.DataFrame(columns=order)
    window = _window(pd.concat(frames))
    for frame in frames:
        rolling = frame["mean"].rolling(window, center=True, min_periods=1)
        frame["smoothed"] = rolling.mean() if smoothing == "mean" else rolling.median()
    return pd.concat(frames, ignore_index=True)[order]


def _window(rows: pd.DataFrame) -> int:
    """A fortieth of the iterations, an odd number, so that it has a middle."""
    return int(rows["iteration"].nunique() // 40) // 2 * 2 + 1


def _draw_iterations(axes: Axes, rows: pd.DataFrame, colours: dict[str, str]) -> None:
    for name, colour in colours.items():
        these = rows[rows["series"] == name]
        # thousands of points a line: as pixels, even in an SVG
        axes.plot(these["iteration"], these["mean"], color=colour, alpha=0.18, linewidth=0.6, rasterized=True)
        axes.plot(these["iteration"], these["smoothed"], color=colour, linewidth=1.4, label=name)


def _robust_limits(
    values: pd.Series, lowest: float, highest: float, keep: float | None = None
) -> tuple[float, float, int]:
    """Axis limits at two percentiles, with a margin and room for ``keep``; and how many values lie outside."""
    low, high = np.nanpercentile(values, [lowest, highest])
    if keep is not None:
        low, high = min(low, keep), max(high, keep)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    low, high = float(low - margin), float(high + margin)
    return low, high, int(((values < low) | (values > high)).sum())


# ---------------------------------------------------------------------- choosing runs


def _kinds(runs: Iterable[Run], states: Iterable[str]) -> dict[Kind, list[Run]]:
    wanted = set(states)
    return by_kind([run for run in runs if run.kind.state in wanted])


def _modulated(runs: Sequence[Run]) -> dict[Kind, list[Run]]:
    """CGGM, and other methods that leave balance terms."""
    others = [r for r in runs if r.kind.state == "other" and any(c.startswith("balance/") for c in r.epochs.columns)]
    return _kinds(runs, CGGM_STATES) | by_kind(others)


def _most(kinds: dict[Kind, list[Run]], number: int) -> dict[Kind, list[Run]]:
    """At most so many kinds, those with most runs; their order stays."""
    chosen = sorted(kinds, key=lambda kind: -len(kinds[kind]))[:number]
    return {kind: group for kind, group in kinds.items() if kind in chosen}


def _modalities(runs: Iterable[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.modalities))


# ---------------------------------------------------------------------- regions


def regions_of(run: Run) -> tuple[str, ...]:
    """Return the regions that a run scored, in its own order, as the Dice columns of its tables name them.

    Args:
        run: the run; where it has no validation, its tests tell.
    """
    before = f"validation/{FUSION}_dice_"
    columns = [column.removeprefix(before) for column in run.epochs.columns if column.startswith(before)]
    tested = [score.removeprefix("dice_") for who, score in run.tests if who == FUSION and score.startswith("dice_")]
    return tuple(name for name in dict.fromkeys([*columns, *tested]) if name != "mean")


def regions_text(runs: Sequence[Run]) -> str:
    """Name the regions that a mean Dice is over, for a caption: ``WT, TC and ET``.

    Args:
        runs: the runs of a figure or table; where their regions differ, those of each run are named.
    """
    alike: dict[frozenset[str], list[Run]] = {}
    for run in runs:
        if regions := frozenset(regions_of(run)):
            alike.setdefault(regions, []).append(run)
    texts = {_listed(regions_of(group[0])): _names(group) for group in alike.values()}
    if len(texts) < 2:
        return next(iter(texts), "regions")
    return f"regions ({'; '.join(f'{text} in {names}' for text, names in texts.items())})"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


# ---------------------------------------------------------------------- captions and looks


def _caption(text: str, runs: Sequence[Run]) -> str:
    return f"{text} {source(runs)}"


def source(runs: Sequence[Run]) -> str:
    """Say which runs a figure or table is from, and which of them were not finished.

    Args:
        runs: the runs.
    """
    parts = []
    for kind, group in by_kind(runs).items():
        seeds = [f"{run.seed}" for run in group if run.seed is not None]
        seed = f"; seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}" if seeds else ""
        unfinished = [
            f"{run.name} stopped after {run.epochs_done} of {run.epochs_planned} epochs"
            for run in group
            if run.epochs_planned is not None and run.epochs_done < run.epochs_planned
        ]
        parts.append(f"{_names(group)} ({'; '.join([kind.label + seed, *unfinished])})")
    return f"From run{'s' if len(runs) > 1 else ''} {'; '.join(parts)}."


def _names(runs: Sequence[Run]) -> str:
    return ", ".join(run.name for run in runs)


def _panels(
    number: int, *, width: float = 4.2, height: float = 3.4, sharey: bool = False, columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    columns = min(number, columns or _columns(number))
    rows = -(-number // columns)
    figure = Figure(figsize=(width * columns + 1.4, height * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey).ravel().tolist()
    for axes in grid[number:]:
        axes.remove()
    return figure, grid[:number]


def _columns(panels: int) -> int:
    return 2 if panels == 4 else COLUMNS


def _draw_curves(axes: Axes, rows: pd.DataFrame, axis: str) -> None:
    for i, name in enumerate(name for name in dict.fromkeys(rows["series"]) if name != FUSION):
        _draw_band(axes, rows[rows["series"] == name], axis, name, _colour(i))
    _draw_band(axes, rows[rows["series"] == FUSION], axis, FUSION, _BLACK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.grid(alpha=0.25, linewidth=0.5)


def _draw_band(axes: Axes, rows: pd.DataFrame, axis: str, name: str, colour: str) -> None:
    if rows.empty:
        return
    marker = "o" if len(rows) <= 20 else ""
    axes.plot(rows[axis], rows["mean"], color=colour, linewidth=1.4, marker=marker, markersize=3, label=name)
    if (rows["runs"] > 1).any():
        sd = rows["sd"].fillna(0)
        axes.fill_between(rows[axis], rows["mean"] - sd, rows["mean"] + sd, color=colour, alpha=0.2, linewidth=0)


def _finish(
    figure: Figure,
    title: str,
    runs: Sequence[Run],
    series: Iterable[str],
    *,
    extra: Sequence[Line2D] = (),
    bands: bool = False,
) -> None:
    """Add the title, one legend for all panels, and the line that says which runs this is."""
    names = [name for name in dict.fromkeys(series) if name != FUSION]
    handles = [_line(_colour(i), name) for i, name in enumerate(names)]
    handles += [_line(_BLACK, FUSION)] if FUSION in set(series) else []
    handles += extra
    width = figure.get_size_inches()[0]
    if handles:
        figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    repeated = bands and any(len(group) > 1 for group in by_kind(runs).values())
    text = source(runs) + (" Bands: standard deviation over runs." if repeated else "")
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(_wrapped(text, int(16 * width)), fontsize=6.5, color="#444444")


def _label(panels: Sequence[Axes], x: str, y: str) -> None:
    for i, axes in enumerate(panels):
        axes.set_xlabel(x)
        if i % _columns(len(panels)) == 0:
            axes.set_ylabel(y)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.grid(alpha=0.25, linewidth=0.5)


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _line(colour: str, label: str) -> Line2D:
    return Line2D([], [], color=colour, linewidth=1.6, label=label)


def _mark(marker: str, label: str, colour: str = "#555555") -> Line2D:
    return Line2D([], [], color=colour, marker=marker, linestyle="", markersize=5, label=label)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


#: name of the files, what it is, and who makes it
FIGURES: tuple[tuple[str, str, Callable[[Sequence[Run]], Item]], ...] = (
    ("figure_2", "Figure 2", figure_2),
    ("figure_3", "Figure 3", figure_3),
    ("figure_4", "Figure 4", figure_4),
    ("figure_5", "Figure 5", figure_5),
    ("figure_6", "Figure 6", figure_6),
    ("figure_7", "Figure 7", figure_7),
)
