# SPDX-License-Identifier: Apache-2.0
"""Write a discovered data set's datalist, and NIfTI files of what is not plain 3-D NIfTI."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from tqdm import tqdm

from monai_cggm.data.labels import mapped
from monai_cggm.data.layouts import LABEL, SECTIONS, is_safe_id
from monai_cggm.discovery.dataset_json import DATASET
from monai_cggm.discovery.found import Found, FoundCase, Source
from monai_cggm.discovery.names import modality_of
from monai_cggm.discovery.sources import Grid, files_of, is_plain, read_volumes
from monai_cggm.errors import DataError
from monai_cggm.files import atomic_path

DATALIST = "datalist.json"
VOLUMES = "volumes"

#: Part of every written file's mark: raise it where a change here makes old files wrong.
_FORMAT = 1


@dataclass(frozen=True)
class Target:
    """One NIfTI file to write.

    Attributes:
        case_id: the case, for messages.
        key: modality or ``"label"``.
        source: where the voxels are.
        file: where they go.
        classes: of a label, value -> class that is written for it; None keeps the values.
    """

    case_id: str
    key: str
    source: Source
    file: Path
    classes: Mapping[int, int] | None = None


def write_datalist(
    found: Found, out: str | Path, *, copy: bool = False, workers: int = 0, progress: bool = True
) -> list[dict[str, Any]]:
    """Write ``datalist.json`` into a folder, and below it a NIfTI file of each volume that is not one already.

    Plain 3-D NIfTI files stay where they are. All else (channels of 4-D files, NRRD, MHA, DICOM series) becomes
    ``volumes/<case>/<modality>.nii.gz``: the voxels in their own type where NIfTI has it (float64 becomes float32;
    labels the smallest type for whole numbers), in their own order, and the geometry; no tag, no description and no
    name of the source's files comes along. Files are written whole or not at all, and are the same bytes each time. A
    file that was made from the same source before is kept: each has a mark in its header, a hash over the names, sizes
    and times of what it was made from.

    The datalist is in MONAI's style and what :func:`monai_cggm.data.layouts.find_cases` reads: lists under
    ``training``, ``validation``, ``test`` of items with ``case``, ``patient`` and one path a key, relative for files
    below ``out`` and absolute for others; and ``labels``, the names of the label values, and ``regions`` of them, where
    they are known. It is plain data, which no parser evaluates. The names of plain NIfTI files are in it: ``copy``
    keeps them out too.

    Args:
        found: see :func:`monai_cggm.discovery.discover`.
        out: the folder; it may not lie in the source, where the next search would find its files too.
        copy: write plain NIfTI files anew as well.
        workers: threads (0 and 1 are the same); each holds one source file, uncompressed.
        progress: show a progress bar.

    Returns:
        The items, section by section, with absolute paths, for use at once.

    Raises:
        DataError: names every source that cannot be converted (the others are written, and kept for the next time);
            also where ``out`` lies in the source, or a part of it is a link to elsewhere.
    """
    folder = Path(out).expanduser().absolute()
    refuse_folder(folder, found)
    targets: dict[tuple[str, str], Target] = {}
    problems: list[str] = []
    for case in found.cases:
        for key, source in case.sources().items():
            try:
                if copy or not is_plain(source):
                    file = folder / VOLUMES / case.case_id / f"{key}.nii.gz"
                    targets[case.case_id, key] = Target(case.case_id, key, source, file)
            except Exception as error:  # nibabel's, of a dozen kinds
                problems.append(f"case {case.case_id}: {key} cannot be read: {error} ({source.path})")
    problems += links_out(targets.values(), folder)
    if problems:
        raise DataError(problems)
    write_volumes(list(targets.values()), workers=workers, progress=progress)
    paths = {
        case.case_id: {
            key: targets[case.case_id, key].file if (case.case_id, key) in targets else source.path.absolute()
            for key, source in case.sources().items()
        }
        for case in found.cases
    }
    return list_cases(found, paths, folder)


def list_cases(found: Found, paths: Mapping[str, Mapping[str, Path]], folder: Path) -> list[dict[str, Any]]:
    """Write ``datalist.json``: the cases by section and, where they are known, names of the label values and regions.

    Args:
        found: the cases and the names.
        paths: case -> key -> file.
        folder: where to write it; files below are written relative to it.

    Returns:
        The items, section by section, with the paths as they are given.
    """
    sections: dict[str, list[dict[str, Any]]] = {name: [] for name in SECTIONS}
    items = []
    for case in sorted(found.cases, key=lambda case: SECTIONS.index(case.section)):
        files = paths[case.case_id]
        items.append(_item(case, {key: str(path) for key, path in files.items()}))
        sections[case.section].append(_item(case, {key: _written(path, folder) for key, path in files.items()}))
    content: dict[str, Any] = {}
    if found.label_names:  # as in the Decathlon's dataset.json
        content["labels"] = {str(value): name for value, name in found.label_names.items()}
    if found.label_regions:
        content["regions"] = {name: list(values) for name, values in found.label_regions.items()}
    content |= {name: entries for name, entries in sections.items() if entries}
    with atomic_path(folder / DATALIST) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return items


def refuse_folder(folder: Path, found: Found) -> None:
    """Refuse a folder to write to, before any long work.

    Raises:
        DataError: where it lies in the source, is a file, or holds the datalist that was read; also where a case or a
            modality has a name that is not safe.
    """
    described = found.source.is_file() and found.source.name == DATASET
    source = (found.source.parent if described else found.source).resolve()
    if source.is_dir() and (folder.resolve() == source or source in folder.resolve().parents):
        raise DataError([f"{folder} lies in {found.source}, where its files would be found as cases: choose another"])
    # Found is a plain object that anybody can make: no name of it may lead out of the folder.
    keys = {key for case in found.cases for key in case.images}
    bad = [case.case_id for case in found.cases if not is_safe_id(case.case_id)]
    bad += [key for key in keys if modality_of(key) != key]
    if bad:
        raise DataError([f"{name!r} is no safe name for a file" for name in bad])
    if found.source.is_file() and found.source.resolve() == (folder / DATALIST).resolve():
        raise DataError([f"{folder / DATALIST} is the datalist that was read: choose another folder"])
    if folder.exists() and not folder.is_dir():
        raise DataError([f"{folder} is a file, expected a folder"])


def links_out(targets: Iterable[Target], folder: Path) -> list[str]:
    """Problems of targets that a link would lead out of the folder."""
    root = folder.resolve()
    led = {target.file.parent for target in targets if root not in target.file.parent.resolve().parents}
    return [f"{place} leads out of {folder} by a link, expected a folder in it" for place in sorted(led)]


def _item(case: FoundCase, paths: Mapping[str, str]) -> dict[str, Any]:
    convention = {"labels": case.convention} if case.convention else {}
    return {"case": case.case_id, "patient": case.patient, **convention, **paths}


def _written(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def write_volumes(targets: Sequence[Target], *, workers: int, progress: bool) -> None:
    """Write NIfTI files; those that were made from the same sources before are kept.

    Args:
        targets: the files; those of one source file are written together.
        workers: threads (0 and 1 are the same); each holds one source file, uncompressed.
        progress: show a progress bar.

    Raises:
        DataError: names every source that cannot be converted; the others are written.
    """
    by_file: dict[Path, list[Target]] = defaultdict(list)
    for target in targets:
        by_file[target.source.path].append(target)
    problems: list[str] = []
    with (
        ThreadPoolExecutor(max(workers, 1)) as pool,
        tqdm(total=len(targets), desc="Writing NIfTI", unit="file", disable=not progress or not targets) as bar,
        _cancelled(pool),
    ):
        futures = {pool.submit(_convert_file, group): group for group in by_file.values()}
        for future in as_completed(futures):
            problems += future.result()
            bar.update(len(futures[future]))
    if problems:
        raise DataError(sorted(problems))


@contextmanager
def _cancelled(pool: ThreadPoolExecutor) -> Iterator[None]:
    """Start nothing more after an interruption."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _convert_file(targets: Sequence[Target]) -> list[str]:
    """Write what comes from one source file; return what went wrong."""
    first = targets[0]
    try:
        due = [(target, mark) for target in targets if _mark_in(target.file) != (mark := _mark(target))]
        if not due:
            return []
        array, grid = read_volumes(first.source)
        units = nib.load(first.source.path).header.get_xyzt_units()[0] if first.source.kind == "nifti" else "mm"
    except (ValueError, OSError) as error:
        return [f"case {first.case_id}: {first.key} {error} ({first.source.path})"]
    problems = []
    for target, mark in due:
        try:
            voxels = array[..., target.source.channel or 0]
            data = _label_voxels(voxels, target.classes) if target.key == LABEL else image_voxels(voxels)
            _write(target.file, data, grid, units, mark)
        except (ValueError, OSError) as error:
            problems.append(f"case {target.case_id}: {target.key} {error} ({target.source.path})")
    return problems


def image_voxels(array: np.ndarray) -> np.ndarray:
    """Voxels in a type that NIfTI has and many readers know: float64 becomes float32, 64-bit whole numbers 32-bit ones.

    Raises:
        ValueError: where they are no real numbers.
    """
    if array.dtype.kind not in "biuf":
        raise ValueError(f"holds {array.dtype} voxels, expected numbers")
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    if array.dtype.itemsize < 8:
        return array
    # Many readers know no 64-bit whole numbers.
    low, high = int(array.min()), int(array.max())
    return array.astype(np.int32 if np.iinfo(np.int32).min <= low and high <= np.iinfo(np.int32).max else np.float32)


def _label_voxels(array: np.ndarray, classes: Mapping[int, int] | None = None) -> np.ndarray:
    if array.dtype.kind == "f" and not np.array_equal(array, np.rint(array)):
        raise ValueError("has values that are no whole numbers")
    if classes is not None:
        unknown = [int(value) for value in np.unique(array) if value not in classes]
        if unknown:
            raise ValueError(f"has values {unknown}, expected {', '.join(map(str, classes))}")
        array = mapped(array, classes)
    for dtype in (np.uint8, np.int16, np.int32):
        if np.iinfo(dtype).min <= array.min() and array.max() <= np.iinfo(dtype).max:
            return array.astype(dtype)
    raise ValueError(f"has values up to {array.max():g}, expected labels")


def _write(file: Path, voxels: np.ndarray, grid: Grid, units: str, mark: bytes) -> None:
    image = nib.Nifti1Image(voxels, grid.affine)
    image.set_sform(grid.affine, code="scanner")
    # A quaternion cannot hold shears: then it is left out, and the matrix above stands alone.
    image.set_qform(grid.affine, code="scanner")
    if not np.allclose(image.get_qform(), grid.affine, atol=1e-3):
        image.header["qform_code"] = 0
    image.header.set_xyzt_units(units if units != "unknown" else "mm")
    image.header["descrip"] = mark
    with atomic_path(file) as temporary:
        # Not nibabel's own gzip stream, which may name the file and tell the time: equal sources make equal bytes.
        temporary.write_bytes(gzip.compress(image.to_bytes(), compresslevel=3, mtime=0))


def _mark(target: Target) -> bytes:
    """What tells a file that was made from this source; it fits a NIfTI header's 80 bytes of description."""
    files = files_of(target.source)
    stats = [(str(file.absolute()), (stat := os.stat(file)).st_size, stat.st_mtime_ns) for file in files]
    made: tuple[Any, ...] = (_FORMAT, target.source.kind, target.source.channel, target.key == LABEL, stats)
    # Only where there are classes: files that were made without keep their mark.
    text = repr(made if target.classes is None else (*made, sorted(target.classes.items())))
    return b"monai_cggm " + hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32].encode()


def _mark_in(file: Path) -> bytes | None:
    if file.is_symlink():
        return None
    try:
        return bytes(nib.load(file).header["descrip"].item())
    except Exception:  # not there, or no whole file: it is written anew
        return None
