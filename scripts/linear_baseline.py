#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fit a logistic regression on feature tables: what a network has to reach on the same split.

    python scripts/linear_baseline.py mosi --split comparison/split.json
    python scripts/linear_baseline.py handwritten_6views.mat --modalities x1,x2,x3,x4,x5,x6 --json linear.json

Each modality alone and all of them side by side, standardised on the training part. The strength of the penalty is
chosen on the validation part by the rule of one standard error (Breiman et al., 1984): the strongest penalty whose
accuracy is within one standard error of the best. The test part chooses nothing. "Refitted" is the same penalty on the
training and the validation part together, more than a network learns from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from monai_cggm.data.features import load_features, split_features
from monai_cggm.files import atomic_path

#: inverse strengths of the penalty, the strongest first
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)

Part = Sequence[Mapping[str, Any]]


def main(
    data: Annotated[Path, typer.Argument(help="What the bundle features_cggm reads, vectors and classes.")],
    split: Annotated[Path | None, typer.Option(help="JSON of IDs; default: the data's own, or a draw.")] = None,
    modalities: Annotated[str | None, typer.Option(help="With commas; default: all.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers.")] = None,
) -> None:
    """Fit a logistic regression on feature tables: what a network has to reach on the same split."""
    samples = load_features(data, None if modalities is None else modalities.split(","))
    parts = split_features(samples, split_file=split, seed=seed)
    names = samples.description.modalities
    rows = {name: fitted(parts, [name]) for name in names}
    rows["all"] = fitted(parts, names)
    show(rows, {part: len(chosen) for part, chosen in parts.items()})
    if json_file is not None:
        with atomic_path(json_file) as temporary:
            temporary.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def fitted(parts: Mapping[str, Part], modalities: Sequence[str]) -> dict[str, Any]:
    """Choose the penalty on validation; return it and its accuracies, and under ``every`` those of all penalties."""
    tables = {part: matrix(chosen, modalities) for part, chosen in parts.items()}
    more = [np.concatenate(pieces) for pieces in zip(tables["train"], tables["validation"], strict=True)]
    every = []
    for strength in STRENGTHS:
        model, refitted = regression(strength).fit(*tables["train"]), regression(strength).fit(*more)
        scores = {part: float(model.score(*tables[part])) for part in ("validation", "test")}
        every.append({"C": strength, **scores, "test_refitted": float(refitted.score(*tables["test"]))})
    chosen = strongest_within_one_error([row["validation"] for row in every], len(parts["validation"]))
    return {**every[chosen], "every": every}


def regression(strength: float) -> Pipeline:
    """A logistic regression on standardised features."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000))


def matrix(samples: Part, modalities: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Features ``(N, D)`` of some modalities side by side, and labels ``(N,)``."""
    rows = [
        np.concatenate([np.asarray(sample[name], dtype=float).ravel() for name in modalities]) for sample in samples
    ]
    return np.stack(rows), np.array([sample["label"] for sample in samples])


def strongest_within_one_error(accuracies: Sequence[float], samples: int) -> int:
    """Return the first accuracy that is no more than one standard error of a share below the best.

    The error is that of Laplace's estimate of the share: of 1.000 it would be 0 otherwise.
    """
    best = max(accuracies)
    share = (best * samples + 1) / (samples + 2)
    error = (share * (1 - share) / samples) ** 0.5
    return next(i for i, accuracy in enumerate(accuracies) if accuracy >= best - error)


def show(rows: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, int]) -> None:
    """Print the table."""
    counts = ", ".join(f"{size} {part}" for part, size in sizes.items())
    table = Table(title=f"Logistic regression, accuracy ({counts})")
    table.add_column("")
    for column in ("C", "validation", "test", "refitted"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        accuracies = (row[key] for key in ("validation", "test", "test_refitted"))
        table.add_row(name, f"{row['C']:g}", *(f"{accuracy:.3f}" for accuracy in accuracies))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
