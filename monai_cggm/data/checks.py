# SPDX-License-Identifier: Apache-2.0
"""Checks of a data set: the cheap ones that training makes itself, and the thorough ones of ``monai-cggm check``."""

from __future__ import annotations

import gzip
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from monai_cggm.data.labels import NOT_TOLD, label_convention, unknown_label_problem, unknown_labels
from monai_cggm.data.layouts import LABEL, SUFFIXES, Case, find_cases, is_safe_id
from monai_cggm.errors import DataError, some

logger = logging.getLogger(__name__)

#: How far apart, in mm, two affines may put the same voxel of a case. Files are written with float32 affines.
AFFINE_TOLERANCE = 0.1


@dataclass(frozen=True)
class CaseReport:
    """What a thorough check found in one case.

    Attributes:
        case_id: the case's ID.
        convention: its label convention, a name or a map, None where nothing tells it.
        shape: voxels along each axis, None where no file could be read.
        spacing: voxel size in mm.
        labels_found: value in the label file (of the map or not) -> voxels, for the values that occur.
        tumour_voxels: voxels of any class but the background, None without a readable label.
        problems: one line each, empty where the case is fine.
    """

    case_id: str
    convention: str | None
    shape: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    labels_found: Mapping[int, int] = field(default_factory=dict)
    tumour_voxels: int | None = None
    problems: tuple[str, ...] = ()

    def with_problem(self, problem: str) -> CaseReport:
        """The same report with one problem more, first in the list."""
        return replace(self, problems=(problem, *self.problems))


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    affine: np.ndarray
    spacing: tuple[float, ...]


def geometry_problems(geometries: Mapping[str, tuple[Sequence[int], Any]]) -> dict[str, str]:
    """Compare the grids of a case's files with the first one's.

    Args:
        geometries: key (modality or ``label``) -> shape (without channel) and 4 x 4 affine in mm (array or tensor).

    Returns:
        Key -> problem, for the keys whose grid differs: another shape, or an affine that puts a corner voxel more than
        :data:`AFFINE_TOLERANCE` mm away.

    Example:
        >>> geometry_problems({"t1": ((4, 4, 2), np.eye(4)), "t2": ((4, 4, 3), np.eye(4))})
        {'t2': 'shape 4x4x3, expected 4x4x2 as of t1'}
    """
    problems: dict[str, str] = {}
    items = iter(geometries.items())
    first, (shape, affine) = next(items, ("", ((), None)))
    for key, (other_shape, other_affine) in items:
        if tuple(other_shape) != tuple(shape):
            problems[key] = f"shape {format_shape(other_shape)}, expected {format_shape(shape)} as of {first}"
            continue
        distance = _largest_distance(np.asarray(affine, dtype=float), np.asarray(other_affine, dtype=float), shape)
        if not distance <= AFFINE_TOLERANCE:
            problems[key] = f"an affine that puts voxels up to {distance:.3g} mm from where {first} has them"
    return problems


def image_problem(array: np.ndarray | torch.Tensor) -> str | None:
    """Say what makes an image unusable: NaN or infinite values, or one value everywhere; None where it is fine.

    Example:
        >>> image_problem(np.zeros((2, 2, 2)))
        'is empty: every voxel is 0'
    """
    values = array.detach().as_subclass(torch.Tensor).cpu().numpy() if isinstance(array, torch.Tensor) else array
    if values.size == 0:
        return "is empty: it has no voxel"
    if np.issubdtype(values.dtype, np.inexact):
        bad = int(values.size - np.count_nonzero(np.isfinite(values)))
        if bad:
            return f"has {bad} NaN or infinite voxels, expected finite values"
    elif not np.issubdtype(values.dtype, np.integer):
        return f"holds {values.dtype} voxels, expected numbers"
    low, high = values.min(), values.max()
    return f"is empty: every voxel is {low:g}" if low == high else None


def read_voxels(path: Path) -> tuple[np.ndarray | None, str | None]:
    """Read a NIfTI file's voxels in the file's own type.

    Returns:
        The array and None, or None and what is wrong: a truncated or corrupt file.
    """
    try:
        image = nib.load(path)
        if path.suffix.lower() == ".gz":
            # nibabel stops at the last voxel and never sees the checksum behind it, which tells of corrupt bytes.
            image = type(image).from_bytes(gzip.decompress(path.read_bytes()))
        # Not get_fdata(): that makes eight bytes of every voxel.
        return np.asanyarray(image.dataobj), None
    except Exception as error:  # of a dozen kinds, and each means that the file is no good
        return None, f"cannot be read to its end: {_first_line(error)}"


def header_problems(
    cases: Sequence[Case], modalities: Sequence[str], *, need_label: bool = True, allow_missing: bool = False
) -> dict[str, list[str]]:
    """Check what file names and headers tell, without reading a voxel.

    Missing sequences, unsafe and repeated IDs, an unknown label convention, unreadable headers, and a shape or affine
    that differs within a case.

    Args:
        cases: what :func:`~monai_cggm.data.layouts.find_cases` found.
        modalities: the sequences that a case must have.
        need_label: whether a case must have a segmentation.
        allow_missing: whether one sequence is enough.

    Returns:
        Case ID -> problems, each of which names the file or folder; only cases with problems are in it.
    """
    problems: dict[str, list[str]] = {}
    for case in cases:
        found = [
            *_id_problems(case),
            *case.problems,
            *_missing_problems(case, modalities, need_label, allow_missing),
            *_read_headers(case)[1],
        ]
        if found:
            problems.setdefault(case.case_id, []).extend(found)
    for case_id, problem in repeated_ids(cases).items():
        problems.setdefault(case_id, []).insert(0, problem)
    return problems


def repeated_ids(cases: Sequence[Case]) -> dict[str, str]:
    """Case ID -> problem, for the IDs that more than one case has.

    Example:
        >>> repeated_ids([Case("a", {}, folder=Path("x")), Case("a", {}, folder=Path("y")), Case("b", {})])
        {'a': '2 cases have this ID, expected one (x, y)'}
    """
    folders: dict[str, list[str]] = {}
    for case in cases:
        folders.setdefault(case.case_id, []).append(str(case.folder))
    return {
        case_id: f"{len(places)} cases have this ID, expected one ({', '.join(places)})"
        for case_id, places in folders.items()
        if len(places) > 1
    }


def check_case(
    case: Case, modalities: Sequence[str], *, need_label: bool = True, allow_missing: bool = False
) -> CaseReport:
    """Read all of a case's files and report on them.

    It makes the checks of :func:`header_problems` except that for repeated IDs, and reads every voxel: truncated or
    corrupt files, NaN or infinite values, empty images and label values outside the case's map.

    Args:
        case: the case.
        modalities: the sequences that it must have.
        need_label: whether it must have a segmentation.
        allow_missing: whether one sequence is enough.
    """
    headers, unreadable = _read_headers(case)
    problems = [
        *_id_problems(case),
        *case.problems,
        *_missing_problems(case, modalities, need_label, allow_missing),
        *unreadable,
    ]
    for key, path in case.images.items():
        if key in headers:
            array, problem = read_voxels(path)
            problem = problem if array is None else image_problem(array)
            if problem:
                problems.append(f"{key} {problem} ({path})")
    counts: dict[int, int] = {}
    tumour = None
    if case.label is not None and LABEL in headers:
        counts, tumour, label_problem = _check_label(case.label, case.convention)
        if label_problem:
            problems.append(f"{LABEL} {label_problem} ({case.label})")
    first = next(iter(headers.values()), None)
    return CaseReport(
        case_id=case.case_id,
        convention=case.convention,
        shape=first.shape if first else None,
        spacing=first.spacing if first else None,
        labels_found=counts,
        tumour_voxels=tumour,
        problems=tuple(problems),
    )


class Cases(list[dict[str, Any]]):
    """Datalist items, and why other cases are not among them.

    Args:
        items: the items.
        skipped: case ID -> reason.

    Attributes:
        skipped: as given.
    """

    def __init__(self, items: Iterable[dict[str, Any]], skipped: Mapping[str, str]) -> None:
        super().__init__(items)
        self.skipped = dict(skipped)


def load_cases(
    source: str | Path,
    modalities: Sequence[str],
    *,
    labels: str | None = None,
    skip_bad: bool = False,
    need_label: bool = True,
    allow_missing: bool = False,
) -> Cases:
    """Find the cases of a data set and check their headers: what training, evaluation and inference start with.

    How many cases follow which label convention is logged.

    Args:
        source: a folder or a datalist (see :func:`~monai_cggm.data.layouts.find_cases`).
        modalities: the sequences to use; their order does not matter here.
        labels: a label convention for every case, a name or a map such as ``0=0,1=1,4=2`` (see
            :func:`~monai_cggm.data.labels.label_convention`).
        skip_bad: leave bad cases out and log them, instead of failing.
        need_label: whether a case must have a segmentation.
        allow_missing: whether a case may lack sequences (one is enough). Where one sequence is asked for, cases without
            it are left out, and logged: a network of that sequence alone has no use for them.

    Returns:
        MONAI datalist items: ``case``, ``patient``, ``labels``, one path a modality, and ``label``; what was left out
        is in their attribute ``skipped``.

    Raises:
        DataError: lists every bad case, unless ``skip_bad``; also where no case is left.

    Example:
        >>> items = load_cases("BraTS2018", ["flair", "t1ce", "t1", "t2"])  # doctest: +SKIP
        >>> items[0]["case"], items[0]["labels"]  # doctest: +SKIP
        ('Brats18_2013_11_1', 'brats2018')
    """
    cases = find_cases(source, modalities, labels=labels)
    lacking: dict[str, str] = {}
    if allow_missing and len(modalities) == 1:
        lacking = {case.case_id: f"has no {modalities[0]}" for case in cases if modalities[0] not in case.images}
        cases = [case for case in cases if case.case_id not in lacking]
    if lacking and cases:
        logger.warning(
            "Left out %d cases of %s without %s: %s", len(lacking), source, modalities[0], some(list(lacking), 10)
        )
    problems = header_problems(cases, modalities, need_label=need_label, allow_missing=allow_missing)
    lines = [f"case {case_id}: {problem}" for case_id, found in problems.items() for problem in found]
    if problems and not skip_bad:
        raise DataError(lines)
    if problems:
        logger.warning("Left out %d bad cases of %s:\n  %s", len(problems), source, "\n  ".join(lines))
    good = [case for case in cases if case.case_id not in problems]
    if not good:
        lines += [f"case {case_id}: {reason}" for case_id, reason in lacking.items()]
        raise DataError([f"{source} has no usable case", *lines])
    logger.info("%d cases in %s; label conventions: %s", len(good), source, format_conventions(good))
    skipped = lacking | {case_id: "; ".join(found) for case_id, found in problems.items()}
    return Cases([case.as_dict() for case in good], skipped)


def format_conventions(cases: Sequence[Case] | Sequence[CaseReport]) -> str:
    """How many cases follow each label convention, in words.

    Example:
        >>> format_conventions([Case("Phantom_000", {}, convention="brats2018")])
        'brats2018 1 (BraTS 2018-2021: 4 is the enhancing tumour)'
        >>> format_conventions([Case("p01", {}, convention="0=0,1=1"), Case("p02", {}, convention="0=0,1=1")])
        '0=0,1=1 2 (spelt out, 2 classes with the background)'
    """
    counts = Counter(case.convention for case in cases)
    return "; ".join(
        f"{name} {count} ({label_convention(name).note})" if name else f"unknown {count}"
        for name, count in sorted(counts.items(), key=lambda item: str(item[0]))
    )


def format_shape(shape: Sequence[int]) -> str:
    """A shape in the field's notation.

    Example:
        >>> format_shape((240, 240, 155))
        '240x240x155'
    """
    return "x".join(str(size) for size in shape)


def _id_problems(case: Case) -> list[str]:
    problems = []
    if not is_safe_id(case.case_id):
        problems.append(
            f"its ID is no safe file name: expected letters, digits, '.', '_' and '-', and no '..' ({case.folder})"
        )
    if case.convention is None:
        problems.append(f"{NOT_TOLD} ({case.folder})")
    return problems


def _missing_problems(case: Case, modalities: Sequence[str], need_label: bool, allow_missing: bool) -> list[str]:
    missing = [modality for modality in modalities if modality not in case.images]
    if allow_missing and len(missing) < len(modalities):
        missing = []
    if need_label and case.label is None:
        missing.append(LABEL)
    hint = f"; its other files: {', '.join(case.strangers[:3])}" if case.strangers else ""
    return [
        f"no {key} file, expected a name that ends in {' or '.join(SUFFIXES.get(key, (key,)))}{hint} ({case.folder})"
        for key in missing
    ]


def _read_headers(case: Case) -> tuple[dict[str, _Header], list[str]]:
    """Headers of the files that could be read, and the problems of the others and between them."""
    files = dict(case.images)
    if case.label is not None:
        files[LABEL] = case.label
    headers: dict[str, _Header] = {}
    problems: list[str] = []
    for key, path in files.items():
        try:
            image = nib.load(path)
            header = _Header(
                tuple(int(n) for n in image.shape),
                np.asarray(image.affine, dtype=float),
                tuple(float(z) for z in image.header.get_zooms()[:3]),
            )
        except Exception as error:  # of a dozen kinds, and each means that the file is no good
            problems.append(f"{key} cannot be read: {_first_line(error)} ({path})")
            continue
        if len(header.shape) != 3:
            problems.append(f"{key} has shape {format_shape(header.shape)}, expected one 3-D volume a file ({path})")
        elif not np.isfinite(header.affine).all() or abs(np.linalg.det(header.affine[:3, :3])) < 1e-9:
            problems.append(f"{key} has an affine that maps no volume: {header.affine.tolist()} ({path})")
        else:
            headers[key] = header
    differing = geometry_problems({key: (header.shape, header.affine) for key, header in headers.items()})
    problems += [f"{key} has {problem} ({files[key]})" for key, problem in differing.items()]
    return headers, problems


def _check_label(path: Path, convention: str | None) -> tuple[dict[int, int], int | None, str | None]:
    array, problem = read_voxels(path)
    if array is None:
        return {}, None, problem
    if convention is None:
        return {}, None, None  # the missing convention is a problem of the case already
    table = label_convention(convention).to_class
    values = [*table, *(int(value) for value in unknown_labels(array, convention) if value.is_integer())]
    counts = {value: int(np.count_nonzero(array == value)) for value in sorted(values)}
    tumour = sum(count for value, count in counts.items() if table.get(value, 0) > 0)
    return {v: n for v, n in counts.items() if n}, tumour, unknown_label_problem(array, convention)


def _largest_distance(one: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    """Largest distance in mm between the places that two affines give to a corner voxel of the grid."""
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in shape], indexing="ij")).reshape(len(shape), -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    return float(np.linalg.norm(((one - other) @ corners)[:3], axis=0).max())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
