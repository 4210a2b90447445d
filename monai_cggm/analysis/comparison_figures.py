# SPDX-License-Identifier: Apache-2.0
"""Figures of a comparison: arms by subsets of the modalities, and differences between arms."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from monai_cggm.analysis.comparison import SCORES, Comparison, arm_title, outcome, score_labels, subsets_of
from monai_cggm.analysis.pages import DASH, Picture, one_line

# Texts are drawn as shapes, so that they look the same everywhere; the salt makes the same figure the same bytes.
_RC: Any = {"svg.hashsalt": "monai_cggm", "svg.fonttype": "path", "text.parse_math": False, "font.size": 9.0}

# Okabe and Ito's colours, which readers with the common colour deficiencies tell apart.
_COLOURS = {"reference": "#0072B2", "control": "#D55E00"}
_MARKERS = {"reference": "o", "control": "s"}
_LEGEND = {"reference": "minus the reference", "control": "minus a control"}


def subset_heat_map(comparison: Comparison, study: Mapping[str, Any]) -> Picture:
    """Draw the mean Dice of every arm from every subset of the modalities, with its number in each field.

    Args:
        comparison: with at least one row in ``subsets``.
        study: see :func:`monai_cggm.analysis.compare`; arms' titles come from it.
    """
    names = subsets_of(comparison.modalities)
    dice = comparison.subsets[names].to_numpy(dtype=float)
    arms = [arm_title(study, arm) for arm in comparison.subsets["arm"]]
    modalities = comparison.modalities
    part = one_line(study.get("part", "test"))
    heights = (0.42 * len(arms), 0.24 * len(modalities))
    with rc_context(_RC):
        figure = Figure(figsize=(3.2 + 0.52 * len(names), 1.1 + sum(heights)), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=heights)
        mesh = top.pcolormesh(np.ma.masked_invalid(dice), cmap="viridis", vmin=0, vmax=1, edgecolor="white", lw=0.5)
        for (row, column), value in np.ndenumerate(dice):
            text = DASH if math.isnan(value) else f"{value:.2f}"
            colour = "black" if math.isnan(value) or value > 0.6 else "white"
            top.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, fontsize=8)
        top.set_yticks(np.arange(len(arms)) + 0.5, [textwrap.fill(arm, 28) for arm in arms])
        top.invert_yaxis()
        top.tick_params(length=0, labelbottom=False)
        figure.colorbar(mesh, ax=top, label="mean Dice (0 to 1)", pad=0.01, aspect=12)
        for row, modality in enumerate(modalities):
            given = np.array([modality in name.split("+") for name in names])
            x = np.arange(len(names)) + 0.5
            bottom.scatter(x[~given], np.full((~given).sum(), row), s=30, color="#d0d0d0")
            bottom.scatter(x[given], np.full(given.sum(), row), s=30, color="#202020")
        bottom.set_yticks(range(len(modalities)), modalities)
        bottom.set_ylim(len(modalities) - 0.4, -0.6)
        bottom.set_xlabel("subset of the modalities (dark: given, pale: missing), from all to one")
        bottom.set_xticks([])
        bottom.tick_params(length=0)
        bottom.spines[:].set_visible(False)
        top.spines[:].set_visible(False)
        svg = _svg(figure)
    alt = f"Heat map of mean Dice of {len(arms)} arms for {len(names)} subsets of {', '.join(modalities)}."
    caption = (
        f"Mean Dice over regions, cases, seeds and splits for every subset of the modalities, on the {part} "
        "cases. A column is a subset; dark dots below it are the modalities that the network was given. The numbers "
        "are in tables/subsets.csv."
    )
    return Picture(svg, alt, caption, "subsets")


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
            axis.set_xlabel("difference (points)")
            axis.grid(axis="x", color="#e4e4e4", lw=0.6)
            axis.set_axisbelow(True)
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.tick_params(axis="y", length=0)
        axes[0].set_yticks(range(len(pairs)), [f"{arm} − {against}" for arm, against, _ in pairs])
        axes[0].set_ylim(len(pairs) - 0.5, -0.5)
        shown = [kind for kind in _COLOURS if kind in kinds.values()]
        handles = [Line2D([], [], color=_COLOURS[k], marker=_MARKERS[k], label=_LEGEND[k]) for k in shown]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
        svg = _svg(figure)
    alt = f"Forest plot: differences between arms with 95 % intervals, one row for each of {len(pairs)} comparisons."
    caption = (
        "Differences of Dice in points (Dice × 100) with 95 % intervals; to the right of zero the arm that is named "
        "first is better. Hollow: no interval, because there are too few cases."
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
