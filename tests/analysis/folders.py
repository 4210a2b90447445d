# SPDX-License-Identifier: Apache-2.0
"""Run folders made by hand, with numbers that a test can compute."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

CGGM = {"_target_": "monai_cggm.methods.CGGM", "network": "@network", "rule": "paper", "direction": "gradient"}
OBSERVE = {"_target_": "monai_cggm.methods.UnimodalObserver", "network": "@network"}
MODALITIES = ("flair", "t1")
REGIONS = ("WT", "TC", "ET", "mean")


def cggm(rho: float = 1.2, lam: float = 0.1, **settings: Any) -> dict[str, Any]:
    """A method as ``config.yaml`` has it."""
    return {**CGGM, "rho": rho, "lam": lam, "magnitude": True, **settings}


def balance(name: str, iteration: int) -> float:
    """Terms that go up by a hundredth an iteration, and one far out."""
    return 80.0 if (name, iteration) == ("flair", 3) else 0.5 + 0.01 * iteration + 0.1 * (name == "t1")


def make(
    folder: Path,
    method: Mapping[str, Any] | None,
    *,
    seed: int = 0,
    dice: float = 0.5,
    modalities: tuple[str, ...] = MODALITIES,
    epochs: int = 4,
    planned: int | None = None,
    length: int = 25,
    terms: Callable[[str, int], float] = balance,
    gradients: int = 0,
    resources: Mapping[str, Any] | None = None,
    test: float | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run whose best validation Dice is ``dice``, at the last epoch but one.

    A classifier's Dice is half of the fusion's for the first modality, a quarter for the second; ε is the epoch's
    number over ten; the losses are one over the iteration.
    """
    folder.mkdir(parents=True)
    content = {"seed": seed, "epochs": planned or epochs, "modalities": list(modalities), "method": method}
    (folder / "config.yaml").write_text(yaml.safe_dump({**content, **(config or {})}))
    watched = method is not None
    balanced = watched and "rho" in method
    iterations = pd.DataFrame({"epoch": np.repeat(np.arange(1, epochs + 1), length)})
    iterations["iteration"] = np.arange(1, epochs * length + 1)
    iterations["loss/task"] = 2 / iterations["iteration"]
    table = pd.DataFrame({"epoch": np.arange(1, epochs + 1), "iteration": length * np.arange(1, epochs + 1)})
    for i, name in enumerate(modalities if watched else ()):
        iterations[f"loss/{name}"] = 1 / iterations["iteration"]
        table[f"epsilon/{name}"] = table["epoch"] / 10
        table[f"gradient_norm/{name}"] = 1.0 + i
        table[f"cosine/{name}"] = 0.3
        if balanced:
            iterations[f"balance/{name}"] = [terms(name, n) for n in iterations["iteration"]]
            table[f"balance/{name}"] = 1.0
            table[f"modulated_norm/{name}"] = 0.5
    curve = np.full(epochs, dice - 0.1)
    curve[max(epochs - 2, 0)] = dice
    shares = {"fusion": 1.0, **({name: 0.5 / (i + 1) for i, name in enumerate(modalities)} if watched else {})}
    table["validation/val_dice"] = curve
    for name, share in shares.items():
        for region in REGIONS:
            table[f"validation/{name}_dice_{region}"] = share * curve
    iterations.to_csv(folder / "iterations.csv", index=False, lineterminator="\n")
    table.to_csv(folder / "epochs.csv", index=False, lineterminator="\n")
    if test is not None:
        rows = [
            {"predictor": name, "score": f"dice_{region}", "mean": share * test, "sd": 0.1, "n": 5}
            for name, share in shares.items()
            for region in REGIONS
        ]
        (folder / "test").mkdir()
        pd.DataFrame(rows).to_csv(folder / "test" / "summary.csv", index=False)
    if gradients:
        write_gradients(folder, gradients, modalities)
    if resources is not None:
        (folder / "resources.json").write_text(json.dumps(resources))
    return folder


def write_gradients(folder: Path, records: int, modalities: tuple[str, ...] = MODALITIES) -> None:
    """Gradients of each modality around a direction of its own, the classifier's and the fusion's alike."""
    random = np.random.default_rng(5)
    directions = 10 * np.eye(len(modalities), 16)
    shape = (records, len(modalities), 16)
    np.savez_compressed(
        folder / "gradients.npz",
        iteration=np.arange(1, records + 1),
        classifier=(directions + random.normal(size=shape)).astype(np.float32),
        fusion=(directions + random.normal(size=shape)).astype(np.float32),
        modalities=np.asarray(modalities),
        dimensions=np.arange(16),
        size=np.asarray(16),
    )
