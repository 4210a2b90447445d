#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fit a logistic regression on feature tables: what a network has to reach on the same split.

    python scripts/linear_baseline.py mosi --split comparison/split.json
    python scripts/linear_baseline.py handwritten_6views.mat --modalities x1,x2,x3,x4,x5,x6 --json linear.json

Each modality alone and all of them side by side, standardised on the training part. The strength of the penalty is
chosen on the validation part by the rule of one standard error (Breiman et al., 1984): the strongest penalty whose
accuracy is within one standard error of the best. The test part chooses nothing.
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


def fitted(parts: Mapping[str, Part], modalities: Sequence[str]) -> dict[str, float]:
    """Choose the penalty on validation; return it, and the accuracy on validation and test."""
    tables = {part: matrix(chosen, modalities) for part, chosen in parts.items()}
    models: list[Pipeline] = [
        make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000)).fit(*tables["train"]) for c in STRENGTHS
    ]
    accuracies = [float(model.score(*tables["validation"])) for model in models]
    chosen = strongest_within_one_error(accuracies, len(parts["validation"]))
    test = float(models[chosen].score(*tables["test"]))
    return {"C": STRENGTHS[chosen], "validation": accuracies[chosen], "test": test}


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


def show(rows: Mapping[str, Mapping[str, float]], sizes: Mapping[str, int]) -> None:
    """Print the table."""
    counts = ", ".join(f"{size} {part}" for part, size in sizes.items())
    table = Table(title=f"Logistic regression, accuracy ({counts})")
    table.add_column("")
    for column in ("C", "validation", "test"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, f"{row['C']:g}", f"{row['validation']:.3f}", f"{row['test']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
