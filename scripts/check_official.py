#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compare this package's scores with those of the official package of the BraTS challenge, on phantoms.

    python -m venv official && official/bin/pip install brats-evaluation==0.0.10
    python scripts/check_official.py --python official/bin/python

The official package stays in an environment of its own and runs as a process of its own: it is under the AGPL, and is
neither a dependency nor imported here. It gets planted cases as NIfTI files with the label values of BraTS 2023
(3 is the enhancing tumour) and is run with its configuration for gliomas. Its Dice and HD95 over the whole region
("global") of WT, TC and ET are set against region_scores by the convention brats_legacy.

The exit code is 1 where a Dice differs by more than 1e-6 without a reason that is known:

- both sides empty: NaN there, 1 here;
- label 4: the resection cavity there. One case keeps the values of BraTS 2018 (4 is the enhancing tumour) to show it.

HD95 is reported and not judged, for its definition differs: there the percentile is of both directions pooled, and it
is counted in voxels, whatever the voxel's size. The column "pooled" is this script's own computation of that.
An infinite HD95 is read as 373, as the official parser of results does.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import nibabel as nib
import numpy as np
import pandas as pd
import typer
from rich.console import Console
from rich.table import Table
from scipy import ndimage

from monai_cggm.data.labels import to_classes, to_labels
from monai_cggm.data.phantom import make_phantom
from monai_cggm.errors import CaseError, DataError
from monai_cggm.files import atomic_path
from monai_cggm.metrics import BRATS_REGIONS, region_scores

TOLERANCE = 1e-6
PENALTY = 373.0
SUMMARY = "summary.json"

Scores = Mapping[str, tuple[float, float]]  # official name of a region -> Dice, HD95


@dataclass(frozen=True)
class Planted:
    """A case whose scores are known to be telling.

    Attributes:
        name: the situation, in a few words.
        pred: predicted classes ``(H, W, D)``, 0 background, 1 necrosis, 2 edema, 3 enhancing tumour.
        truth: true classes, the same shape.
        spacing: size of a voxel in mm.
        labels: the files' label convention.
    """

    name: str
    pred: np.ndarray
    truth: np.ndarray
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    labels: str = "brats2023"


@dataclass(frozen=True)
class Comparison:
    """One region of one case: what is found here, what there, and why they differ where that is known.

    ``pooled`` is the 95th percentile of both directions' surface distances together, in voxels.
    """

    case: str
    region: str
    dice: float
    official_dice: float
    hd95: float
    official_hd95: float
    pooled: float
    reason: str

    @property
    def unexplained(self) -> bool:
        """Whether Dice differs, NaN included, without a known reason."""
        return not self.reason and not abs(self.dice - self.official_dice) <= TOLERANCE


def planted_cases() -> list[Planted]:
    """The situations in which tools of evaluation tend to differ."""
    phantom = make_phantom(0, shape=(64, 64, 48), spacing=1.0, lesions=1)
    tumour = to_classes(phantom.label, "brats2018", "phantom").astype(np.uint8)
    shifted = np.roll(tumour, 2, axis=2)
    nothing = np.zeros_like(tumour)
    without_et = np.where(tumour == 3, 1, tumour).astype(np.uint8)
    false_voxel = without_et.copy()
    false_voxel[tuple(np.argwhere(without_et == 1)[0])] = 3
    two = np.where(tumour > 0, tumour, tumour[::-1])
    return [
        Planted("perfect", tumour, tumour),
        Planted("two voxels off", shifted, tumour),
        Planted("half of it missed", np.where(np.arange(48) < _middle(tumour), tumour, 0).astype(np.uint8), tumour),
        Planted("one false ET voxel", false_voxel, without_et),
        Planted("nothing predicted", nothing, tumour),
        Planted("nothing there", tumour, nothing),
        Planted("both empty", nothing, nothing),
        Planted("one of two lesions", tumour, two),
        Planted("two voxels off, 2.5 mm slices", shifted, tumour, spacing=(1.0, 1.0, 2.5)),
        Planted("two voxels off, ET as label 4", shifted, tumour, labels="brats2018"),
    ]


def case_id(index: int) -> str:
    """The name of the case with this index in :func:`planted_cases`, as BraTS names gliomas."""
    return f"BraTS-GLI-{index + 1:05d}-000"


def write_cases(cases: Sequence[Planted], out: Path) -> None:
    """Write ``OUT/truth/ID.nii.gz`` and ``OUT/pred/ID.nii.gz``."""
    for index, case in enumerate(cases):
        for folder, classes in (("truth", case.truth), ("pred", case.pred)):
            values = to_labels(classes, case.labels, case_id(index)).astype(np.uint8)
            image = nib.Nifti1Image(values, np.diag([*case.spacing, 1.0]))
            with atomic_path(out / folder / f"{case_id(index)}.nii.gz") as path:
                nib.save(image, path)


def official_version(python: Path) -> str:
    """Version of the official package that this interpreter has.

    Raises:
        DataError: where the interpreter or the package is missing.
    """
    return _run(python, "from importlib.metadata import version; print(version('brats-evaluation'))").strip()


def official_scores(python: Path, out: Path) -> dict[str, Scores]:
    """Run the official package on what :func:`write_cases` wrote, and read its summary.

    Raises:
        DataError: where it does not run.
    """
    folders = ["--ref_path", str(out / "truth"), "--pred_path", str(out / "pred"), "--summary_json", str(out / SUMMARY)]
    _run(python, "from brats_evaluation.evaluation import main; main()", "--config", "gli", *folders)
    if not (out / SUMMARY).is_file():
        raise DataError([f"the official package wrote no {out / SUMMARY}"])
    return read_summary(out / SUMMARY)


def read_summary(path: Path) -> dict[str, Scores]:
    """Global Dice and HD95 by case and region from the official summary.

    Raises:
        CaseError: for a case that the official package could not score.
    """
    cases = {}
    for found in json.loads(path.read_text(encoding="utf-8"))["metrics"]:
        case = found["subject_name"].removesuffix(".nii.gz")
        if "error" in found:
            raise CaseError(case, f"the official package failed: {found['error']}", path)
        regions = {name.lower(): found[name.lower()] for name in BRATS_REGIONS}
        cases[case] = {name: (r["global_bin_dsc"], _penalised(r["global_bin_hd95"])) for name, r in regions.items()}
    return cases


def compare(cases: Sequence[Planted], official: Mapping[str, Scores]) -> list[Comparison]:
    """Set our scores against the official ones.

    Raises:
        DataError: where the official ones lack a case.
    """
    missing = [case_id(index) for index in range(len(cases)) if case_id(index) not in official]
    if missing:
        raise DataError([f"case {one}: no official scores" for one in missing])
    rows = []
    for index, case in enumerate(cases):
        scores = region_scores(case.pred, case.truth, spacing=case.spacing, convention="brats_legacy")
        for name, classes in BRATS_REGIONS.items():
            pred, truth = np.isin(case.pred, classes), np.isin(case.truth, classes)
            dice, hd95 = official[case_id(index)][name.lower()]
            rows.append(
                Comparison(
                    case=case.name,
                    region=name,
                    dice=scores[f"dice_{name}"],
                    official_dice=dice,
                    hd95=scores[f"hd95_{name}"],
                    official_hd95=hd95,
                    pooled=pooled_hd95(pred, truth),
                    reason=_reason(case, bool(pred.any() or truth.any()), dice),
                )
            )
    return rows


def pooled_hd95(pred: np.ndarray, truth: np.ndarray) -> float:
    """95th percentile of the surface distances of both directions together, in voxels; NaN or 373 for empty masks."""
    if not (pred.any() and truth.any()):
        return PENALTY if pred.any() or truth.any() else math.nan
    edges = [mask & ~ndimage.binary_erosion(mask) for mask in (pred, truth)]
    distances = [ndimage.distance_transform_edt(~edge)[other] for edge, other in zip(edges, edges[::-1], strict=True)]
    return float(np.percentile(np.concatenate(distances), 95))


def show(rows: Sequence[Comparison], version: str, console: Console) -> None:
    """Print the table, and how far HD95 differs."""
    table = Table(title=f"Here (brats_legacy), and brats-evaluation {version} (global)")
    for name in ("case", "region"):
        table.add_column(name)
    for name in ("Dice", "official", "HD95 (mm)", "official", "pooled"):
        table.add_column(name, justify="right")
    table.add_column("Dice differs because")
    for row in rows:
        numbers = [f"{row.dice:.6f}", f"{row.official_dice:.6f}"]
        numbers += [f"{value:.3f}" for value in (row.hd95, row.official_hd95, row.pooled)]
        table.add_row(row.case, row.region, *numbers, "UNEXPLAINED" if row.unexplained else row.reason)
    console.print(table)
    plain = [row for row in rows if not row.reason]
    console.print(f"{len(plain)} of {len(rows)} comparable")
    if plain:
        hd95 = [row.hd95 - row.official_hd95 for row in plain]
        console.print(
            f"Dice differs by at most {max(abs(row.dice - row.official_dice) for row in plain):.2g}; "
            f"HD95 here minus official: {min(hd95):.3f} to {max(hd95):.3f}; "
            f"pooled differs from official by at most {max(abs(row.pooled - row.official_hd95) for row in plain):.2g}"
        )


def main(
    python: Annotated[Path, typer.Option(help="Interpreter of an environment with brats-evaluation.")],
    out: Annotated[Path | None, typer.Option(help="New folder to keep cases, summary and differences.csv in.")] = None,
) -> None:
    """Compare this package's scores with those of the official package of the BraTS challenge, on phantoms."""
    try:
        if out is not None and out.exists() and any(out.iterdir()):
            raise DataError([f"{out} holds files already: expected a new folder"])
        with tempfile.TemporaryDirectory() as scratch:
            version, rows = _check(python, Path(scratch) if out is None else out)
    except ValueError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    show(rows, version, Console(width=132))
    if out is not None:
        with atomic_path(out / "differences.csv") as path:
            pd.DataFrame([asdict(row) for row in rows]).to_csv(path, index=False)
    unexplained = sum(row.unexplained for row in rows)
    if unexplained:
        typer.echo(f"Error: {unexplained} Dice scores differ by more than {TOLERANCE:g}", err=True)
        raise typer.Exit(1)


def _check(python: Path, out: Path) -> tuple[str, list[Comparison]]:
    version = official_version(python)
    cases = planted_cases()
    write_cases(cases, out)
    return version, compare(cases, official_scores(python, out))


def _run(python: Path, program: str, *arguments: str) -> str:
    # -I: neither this checkout nor this environment's variables reach the other interpreter.
    try:
        done = subprocess.run([python, "-I", "-c", program, *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise DataError([f"{python} does not run: {error}; expected a Python interpreter"]) from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise DataError([f"{python}: {last[0]}; expected an environment with brats-evaluation"])
    return done.stdout


def _reason(case: Planted, present: bool, official_dice: float) -> str:
    if case.labels != "brats2023":
        return "label 4 is another class"
    return "both empty are NaN there" if not present and math.isnan(official_dice) else ""


def _penalised(hd95: float) -> float:
    return PENALTY if math.isinf(hd95) else hd95


def _middle(tumour: np.ndarray) -> int:
    """Slice that halves the tumour's extent along the last axis."""
    slices = np.flatnonzero(tumour.any(axis=(0, 1)))
    return int(slices[0] + slices[-1] + 1) // 2


if __name__ == "__main__":
    typer.run(main)
