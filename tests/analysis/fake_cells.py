# SPDX-License-Identifier: Apache-2.0
"""Hand-made cells of a comparison."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

MODALITIES = ("flair", "t1ce", "t2")
REGIONS = ("WT", "TC", "ET")


def subsets(modalities: Sequence[str]) -> list[str]:
    return ["+".join(s) for n in range(len(modalities), 0, -1) for s in combinations(modalities, n)]


def facts(arm: str, split: str, seed: int, **changes: Any) -> dict[str, Any]:
    return {
        "arm": arm,
        "split": split,
        "seed": seed,
        "status": "done",
        "error": None,
        "overlays": [f"configs/methods/{arm}.yaml"],
        "settings": {"epochs": 2},
        "modalities": list(MODALITIES),
        "part": "test",
        "convention": "brats_legacy",
        "epochs": 120,
        "iterations": 600,
        "validations": 12,
        "best_epoch": 120,
        "training_seconds": 400.0,
        "peak_memory_mb": 1800.0,
        "parameters": 991172,
        "classifier_parameters": 0,
        "threads": 1,
        "device": "cpu",
        "versions": {"monai_cggm": "0.1.0", "torch": "2.13.0"},
    } | changes


def score_row(case: str, predictor: str, subset: str, dice: Mapping[str, float], **extra: Any) -> dict[str, Any]:
    row = {"case": case, "part": "test", "predictor": predictor, "subset": subset}
    row |= {f"dice_{region}": value for region, value in dice.items()}
    return row | {"dice_mean": sum(dice.values()) / len(dice)} | extra


def write_cell(folder: Path, cell: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write cell.json and, where there are rows, scores.csv; return the cell's folder."""
    target = folder / "cells" / cell["arm"] / f"{cell['split']}-seed{cell['seed']}"
    target.mkdir(parents=True)
    (target / "cell.json").write_text(json.dumps(dict(cell)), encoding="utf-8")
    if rows:
        with (target / "scores.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return target


def scored_cell(
    folder: Path,
    arm: str,
    split: str,
    seed: int,
    dice: Callable[[int, str], float],
    *,
    cases: int = 3,
    modalities: Sequence[str] = MODALITIES,
    regions: Sequence[str] = REGIONS,
    classifiers: bool = False,
    hd95: float | None = 10.0,
    **changes: Any,
) -> Path:
    """Write a finished cell, in which every region of a case has the Dice ``dice(case number, subset)``."""
    rows = []
    for case in range(cases):
        for subset in subsets(modalities):
            full = subset == "+".join(modalities)
            distances = {f"hd95_{r}": f"{hd95 + case}" if full and hd95 is not None else "" for r in regions}
            rows.append(
                score_row(
                    f"{split}-{case:03d}", "fusion", subset, dict.fromkeys(regions, dice(case, subset)), **distances
                )
            )
        if classifiers:
            empty = {f"hd95_{r}": "" for r in regions}
            for m in modalities:
                rows.append(score_row(f"{split}-{case:03d}", m, m, dict.fromkeys(regions, dice(case, m) / 2), **empty))
    return write_cell(folder, facts(arm, split, seed, modalities=list(modalities), **changes), rows)


def sample_cell(
    folder: Path,
    arm: str,
    split: str,
    seed: int,
    value: Callable[[int, str], float],
    *,
    cases: int = 4,
    modalities: Sequence[str] = MODALITIES,
    classifiers: bool = False,
    score: str = "accuracy",
) -> Path:
    """Write a finished cell of samples with one score each, which has no convention; ``value(case number, subset)``."""
    rows = []
    for case in range(cases):
        names = [("fusion", subset) for subset in subsets(modalities)]
        names += [(m, m) for m in modalities] if classifiers else []
        for predictor, subset in names:
            row = {"case": f"{case:03d}", "part": "test", "predictor": predictor, "subset": subset}
            rows.append(row | {score: float(value(case, subset))})
    cell = facts(arm, split, seed, modalities=list(modalities), score=score)
    del cell["convention"]
    return write_cell(folder, cell, rows)
