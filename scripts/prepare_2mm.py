#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make the 2 mm data set of this project's results from a public 1 mm release of BraTS.

    python scripts/prepare_2mm.py MICCAI_BraTS_2018_Data_Training brats_2mm

Each block of 2x2x2 voxels becomes one voxel: images by the mean, rounded to int16 (halves to the even number); labels
by majority, and of labels that are equally frequent in a block the lowest value wins (so a tie with background stays
background). A last slice without a partner is dropped: 240x240x155 becomes 120x120x77. The affine puts the new voxels
at the centres of their blocks. Label values stay those of the data set.

Files are written as OUT/ID/ID_{flair,t1ce,t1,t2,seg}.nii.gz. A case's folder appears when all of it is written, and a
second run makes only what is missing. A bad case is refused by name, the others are made, and the exit code is 1.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated

import nibabel as nib
import numpy as np
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from monai_cggm.data.checks import header_problems, image_problem, read_voxels
from monai_cggm.data.labels import unknown_label_problem
from monai_cggm.data.layouts import Case, find_cases
from monai_cggm.errors import CaseError, DataError

MODALITIES = ("flair", "t1ce", "t1", "t2")
SEG = "seg"
FACTOR = 2
SPACING = 1.0  # of the releases, in mm
MIN_LEVELS = 100  # an image of fractions must span this many whole numbers to survive int16


def block_mean(volume: np.ndarray) -> np.ndarray:
    """Mean of each 2x2x2 block, rounded to the nearest whole number.

    Args:
        volume: (H, W, D), any real type.

    Returns:
        (H // 2, W // 2, D // 2), int16.

    Raises:
        ValueError: where int16 cannot hold the values, or so few of their levels that the image is lost.
    """
    low, high = float(volume.min()), float(volume.max())
    limits = np.iinfo(np.int16)
    if low < limits.min or high > limits.max:
        raise ValueError(f"has values from {low:g} to {high:g}, expected {limits.min} to {limits.max} (int16)")
    if high - low < MIN_LEVELS and np.issubdtype(volume.dtype, np.floating) and np.any(volume != np.rint(volume)):
        raise ValueError(
            f"has fractions from {low:g} to {high:g}, which int16 would round away: expected raw intensities"
        )
    return np.rint(_blocks(volume).mean(axis=(1, 3, 5), dtype=np.float64)).astype(np.int16)


def block_majority(labels: np.ndarray) -> np.ndarray:
    """Most frequent label of each 2x2x2 block; of equally frequent ones the lowest.

    Args:
        labels: (H, W, D), whole numbers from 0 to 255 of any type.

    Returns:
        (H // 2, W // 2, D // 2), uint8.
    """
    blocks = _blocks(labels.astype(np.uint8))
    winner = np.zeros([size // FACTOR for size in labels.shape], dtype=np.uint8)
    most = np.zeros(winner.shape, dtype=np.uint8)
    for value in np.unique(blocks):  # from the lowest on, so that only a larger count replaces it
        count = (blocks == value).sum(axis=(1, 3, 5), dtype=np.uint8)
        better = count > most
        winner[better], most[better] = value, count[better]
    return winner


def block_affine(affine: np.ndarray) -> np.ndarray:
    """Affine of the grid of block centres: new voxel 0 lies between the old voxels 0 and 1."""
    to_old_index = np.diag([FACTOR, FACTOR, FACTOR, 1.0])
    to_old_index[:3, 3] = (FACTOR - 1) / 2
    return affine @ to_old_index


def prepare_case(case: Case, out: Path) -> None:
    """Read a case, reduce it and write its folder.

    Raises:
        CaseError: where a file cannot be used; nothing is written then.
    """
    images = {path: _reduced(case, key) for key, path in _output_files(case, out).items()}
    part = out / f".{case.case_id}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for path, image in images.items():
            nib.save(image, part / path.name)
        _move(part, out / case.case_id)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def is_done(case: Case, out: Path) -> bool:
    """Whether all of the case's files are there already."""
    return all(path.is_file() for path in _output_files(case, out).values())


def prepare(cases: Sequence[Case], out: Path, *, workers: int) -> Iterator[CaseError | None]:
    """Prepare cases, several at a time; yield what went wrong with each as it ends."""
    with ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(prepare_case, case, out): case for case in cases}
        for job in as_completed(jobs):
            error = job.exception()
            if isinstance(error, OSError):
                yield CaseError(jobs[job].case_id, f"cannot be written: {error}", out)
            elif error is None or isinstance(error, CaseError):
                yield error
            else:
                raise error


def main(
    source: Annotated[Path, typer.Argument(help="The release's folder, or a datalist .json.")],
    out: Annotated[Path, typer.Argument(help="Folder to make; outside the source.")],
    labels: Annotated[str | None, typer.Option(help="Label convention of every case, e.g. brats2024.")] = None,
    no_labels: Annotated[bool, typer.Option("--no-labels", help="Cases need no segmentation.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Cases at a time.")] = min(4, os.cpu_count() or 1),
) -> None:
    """Make the 2 mm data set from a 1 mm release of BraTS (2x2x2 block mean, label majority)."""
    try:
        _check_folders(source, out)
        cases = find_cases(source, MODALITIES, labels=labels)
    except ValueError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    problems = _bad_cases(cases, need_label=not no_labels)
    good = [case for case in cases if case.case_id not in problems]
    waiting = [case for case in good if not is_done(case, out)]
    errors = _run(waiting, out, workers)
    lines = [f"case {case_id}: {problem}" for case_id, found in problems.items() for problem in found]
    for line in [*lines, *map(str, errors)]:
        typer.echo(line, err=True)
    refused = len(problems) + len(errors)
    made = len(waiting) - len(errors)
    typer.echo(f"{out}: {made} cases made, {len(good) - len(waiting)} were there already, {refused} refused")
    if refused:
        typer.echo(f"Error: {refused} cases have problems", err=True)
        raise typer.Exit(1)


def _run(cases: Sequence[Case], out: Path, workers: int) -> list[CaseError]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        results = progress.track(prepare(cases, out, workers=workers), total=len(cases), description="Preparing")
        return sorted((error for error in results if error is not None), key=str)


def _check_folders(source: Path, out: Path) -> None:
    root = (source if source.is_dir() else source.parent).resolve()
    if out.resolve().is_relative_to(root):
        # The next run would read this one's results as cases.
        raise DataError([f"{out} is inside {root}: expected a folder outside the source"])


def _bad_cases(cases: Sequence[Case], *, need_label: bool) -> dict[str, list[str]]:
    problems = header_problems(cases, MODALITIES, need_label=need_label)
    for case in cases:
        if case.case_id in problems:
            continue
        path = next(iter(case.images.values()))
        spacing = [float(size) for size in nib.load(path).header.get_zooms()[:3]]
        if not np.allclose(spacing, SPACING, atol=1e-3):
            sizes = " x ".join(f"{size:.4g}" for size in spacing)
            problems[case.case_id] = [f"voxels of {sizes} mm, expected {SPACING:g} mm ({path})"]
    return problems


def _output_files(case: Case, out: Path) -> dict[str, Path]:
    keys = [*case.images, *([SEG] if case.label is not None else [])]
    return {key: out / case.case_id / f"{case.case_id}_{key}.nii.gz" for key in keys}


def _reduced(case: Case, key: str) -> nib.Nifti1Image:
    path = case.label if key == SEG else case.images[key]
    volume, problem = read_voxels(path)
    if volume is None:
        raise CaseError(case.case_id, f"{key} {problem}", path)
    problem = unknown_label_problem(volume, case.convention) if key == SEG else image_problem(volume)
    if problem is not None:
        raise CaseError(case.case_id, f"{key} {problem}", path)
    try:
        reduced = block_majority(volume) if key == SEG else block_mean(volume)
    except ValueError as error:
        raise CaseError(case.case_id, f"{key} {error}", path) from error
    return _image_like(nib.load(path), reduced)


def _image_like(source: nib.Nifti1Image, reduced: np.ndarray) -> nib.Nifti1Image:
    affine = block_affine(source.affine)
    code = int(source.header["sform_code"]) or int(source.header["qform_code"]) or 1
    image = nib.Nifti1Image(reduced, affine)
    image.set_sform(affine, code)
    image.set_qform(affine, code)  # some readers take the one, some the other
    image.header.set_xyzt_units("mm")
    return image


def _blocks(volume: np.ndarray) -> np.ndarray:
    """View of a volume as (H/2, 2, W/2, 2, D/2, 2), without what has no partner."""
    sizes = [size // FACTOR for size in volume.shape]
    cropped = volume[tuple(slice(size * FACTOR) for size in sizes)]
    return cropped.reshape([n for size in sizes for n in (size, FACTOR)])


def _move(part: Path, final: Path) -> None:
    if not final.exists():
        os.replace(part, final)
        return
    for path in part.iterdir():  # a folder from before, with files missing
        os.replace(path, final / path.name)


if __name__ == "__main__":
    typer.run(main)
