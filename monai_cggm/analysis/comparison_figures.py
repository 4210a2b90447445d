# SPDX-License-Identifier: Apache-2.0
"""Figures of a comparison: arms by subsets of the modalities, and differences between arms."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from monai_cggm.analysis.comparison import (
    SCORES,
    Comparison,
    arm_title,
    outcome,
    score_labels,
    score_of,
    subset_groups,
    subsets_of,
)
from monai_cggm.analysis.measures import DICE, Measure, difference_scale, measure_of, score_title
from monai_cggm.analysis.pages import DASH, Picture, one_line

#: More subsets than these, those of four modalities, are not shown one by one.
MOST_SUBSETS = 15

# Texts are drawn as shapes, so that they look the same everywhere; the salt makes the same figure the same bytes.
_RC: Any = {"svg.hashsalt": "monai_cggm", "svg.fonttype": "path", "text.parse_math": False, "font.size": 9.0}

# Okabe and Ito's colours, which readers with the common colour deficiencies tell apart.
_COLOURS = {"reference": "#0072B2", "control": "#D55E00"}
_MARKERS = {"reference": "o", "control": "s"}
_LEGEND = {"reference": "against the reference", "control": "against a control"}


def subset_heat_map(comparison: Comparison, study: Mapping[str, Any]) -> Picture:
    """Draw the mean score of every arm from every subset of the modalities, with its number in each field.

    More than 15 subsets are summed up: by how many modalities are missing, the worst one, and those of one modality.

    Args:
        comparison: with at least one row in ``subsets``.
        study: see :func:`monai_cggm.analysis.compare`; arms' titles come from it.
    """
    names = subsets_of(comparison.modalities)
    each = len(names) <= MOST_SUBSETS
    columns = names if each else _summaries(comparison.modalities)
    values = comparison.subsets[columns].to_numpy(dtype=float)
    arms = [arm_title(study, arm) for arm in comparison.subsets["arm"]]
    modalities = comparison.modalities
    measure, kind = score_title(score_of(study)), measure_of(score_of(study))
    heights = (0.42 * len(arms), 0.24 * len(modalities))
    with rc_context(_RC):
        figure = Figure(figsize=(3.2 + 0.52 * len(columns), 1.1 + sum(heights)), layout="constrained")
        if each:
            top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=heights)
            _draw_dots(bottom, modalities, names)
        else:
            top = figure.subplots()
        mesh = _draw_fields(top, values, arms, kind)
        if not each:
            top.set_xticks(np.arange(len(columns)) + 0.5, [_column_title(c, modalities) for c in columns], rotation=90)
            top.tick_params(labelbottom=True)
        figure.colorbar(mesh, ax=top, label=f"mean {measure} {kind.bounds}", pad=0.01, aspect=12)
        svg = _svg(figure)
    what = f"{len(names)} subsets" if each else f"groups of the {len(names)} subsets"
    alt = f"Heat map of mean {measure} of {len(arms)} arms for {what} of {', '.join(modalities)}."
    return Picture(svg, alt, _heat_map_caption(study, each=each), "subsets")


def _heat_map_caption(study: Mapping[str, Any], *, each: bool) -> str:
    over = "regions, cases, seeds and splits" if score_of(study) == DICE else "cases, seeds and splits"
    mean = f"Mean {score_title(score_of(study))} over {over}"
    on = f"on the {one_line(study.get('part', 'test'))} cases"
    if each:
        return (
            f"{mean} for every subset of the modalities, {on}. A column is a subset; dark dots below it are the "
            "modalities that the network was given. The numbers are in tables/subsets.csv."
        )
    return (
        f"{mean}, {on}: from all modalities, over all subsets, over those that lack one, two and so on, of the worst "
        "one, and from each modality alone. Every subset is in tables/subsets.csv."
    )


def _summaries(modalities: Sequence[str]) -> list[str]:
    """Columns that stand for all subsets: the full set, groups by what is missing, the worst, single modalities."""
    groups = [group for group in subset_groups(modalities) if group.startswith("missing_")]
    return ["+".join(modalities), "subsets", *groups, "worst", *modalities]


def _column_title(column: str, modalities: Sequence[str]) -> str:
    if column == "+".join(modalities):
        return "full set"
    return {"subsets": "all subsets", "worst": "worst subset"}.get(column) or (
        f"{column.removeprefix('missing_')} missing" if column.startswith("missing_") else f"{column} alone"
    )


def _draw_fields(axis: Axes, values: NDArray[np.float64], arms: Sequence[str], kind: Measure) -> QuadMesh:
    """Draw a row an arm, with the number in each field; the better, the brighter."""
    shown = np.ma.masked_invalid(values)
    most = 1.0 if kind.bounded else float(shown.max()) or 1.0
    colours = "viridis" if kind.more_is_better else "viridis_r"
    mesh = axis.pcolormesh(shown, cmap=colours, vmin=0, vmax=most, edgecolor="white", lw=0.5)
    for (row, column), value in np.ndenumerate(values):
        text = DASH if math.isnan(value) else f"{value:.2f}"
        bright = value / most > 0.6 if kind.more_is_better else value / most < 0.4
        colour = "black" if math.isnan(value) or bright else "white"
        axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, fontsize=8)
    axis.set_yticks(np.arange(len(arms)) + 0.5, [textwrap.fill(arm, 28) for arm in arms])
    axis.invert_yaxis()
    axis.tick_params(length=0, labelbottom=False)
    axis.spines[:].set_visible(False)
    return mesh


def _draw_dots(axis: Axes, modalities: Sequence[str], names: Sequence[str]) -> None:
    """Draw which modalities each subset holds, a row a modality."""
    for row, modality in enumerate(modalities):
        given = np.array([modality in name.split("+") for name in names])
        x = np.arange(len(names)) + 0.5
        axis.scatter(x[~given], np.full((~given).sum(), row), s=30, color="#d0d0d0")
        axis.scatter(x[given], np.full(given.sum(), row), s=30, color="#202020")
    axis.set_yticks(range(len(modalities)), modalities)
    axis.set_ylim(len(modalities) - 0.4, -0.6)
    axis.set_xlabel("subset of the modalities (dark: given, pale: missing), from all to one")
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def difference_plot(comparison: Comparison, study: Mapping[str, Any]) -> Picture:
    """Draw every difference between two arms with its interval, a panel for each score (a forest plot).

    Args:
        comparison: with at least one row in ``differences``.
        study: see :func:`monai_cggm.analysis.compare`.
    """
    differences = comparison.differences
    labels = score_labels(study)
    scores = [score for score in SCORES if (differences["score"] == score).any()]
    pairs = list(differences[["arm", "against", "role"]].drop_duplicates().itertuples(index=False, name=None))
    measure = measure_of(score_of(study))
    kinds = {pair: "reference" if pair[1] == study["reference"] else "control" for pair in pairs}
    with rc_context(_RC):
        figure = Figure(figsize=(3.0 + 2.1 * len(scores), 1.3 + 0.36 * len(pairs)), layout="constrained")
        axes = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
        for axis, score in zip(axes, scores, strict=True):
            rows = differences[differences["score"] == score].set_index(["arm", "against", "role"])
            axis.axvline(0, color="#606060", lw=0.8, zorder=0)
            for y, pair in enumerate(pairs):
                if pair in rows.index:
                    _draw_interval(axis, y, rows.loc[pair], kinds[pair])
            axis.set_title(labels[score], fontsize=9)
            axis.set_xlabel("difference (points)" if measure.bounded else measure.gain)
            axis.grid(axis="x", color="#e4e4e4", lw=0.6)
            axis.set_axisbelow(True)
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.tick_params(axis="y", length=0)
        axes[0].set_yticks(range(len(pairs)), [f"{arm} vs {against}" for arm, against, _ in pairs])
        axes[0].set_ylim(len(pairs) - 0.5, -0.5)
        shown = [kind for kind in _COLOURS if kind in kinds.values()]
        handles = [Line2D([], [], color=_COLOURS[k], marker=_MARKERS[k], label=_LEGEND[k]) for k in shown]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
        svg = _svg(figure)
    alt = f"Forest plot: differences between arms with 95 % intervals, one row for each of {len(pairs)} comparisons."
    caption = (
        f"Differences of {difference_scale(score_of(study))}, with 95 % intervals; to the right of zero the arm that "
        "is named first is better. Hollow: no interval, because there are too few cases."
    )
    return Picture(svg, alt, caption, "differences")


def _draw_interval(axis: Any, y: int, row: pd.Series, kind: str) -> None:
    known = outcome(row["low"], row["high"]) != "unknown"
    if known:
        axis.plot([row["low"], row["high"]], [y, y], color=_COLOURS[kind], lw=1.8, solid_capstyle="butt")
    face = _COLOURS[kind] if known else "white"
    axis.plot(row["difference"], y, _MARKERS[kind], color=_COLOURS[kind], markerfacecolor=face, markersize=5)


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=metadata)
    return buffer.getvalue()
