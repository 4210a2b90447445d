# SPDX-License-Identifier: Apache-2.0
"""Arrays out of a user's files: CSV, NumPy and MATLAB, without running code from any of them."""

from __future__ import annotations

import csv
import logging
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from monai_cggm.data.published import is_mosi, read_mosi, read_published
from monai_cggm.data.rows import Table
from monai_cggm.errors import DataError

logger = logging.getLogger(__name__)

SUFFIXES = (".npz", ".npy", ".csv", ".mat")
#: of published feature files
PICKLES = (".pkl", ".pickle")
#: names of what is no modality, in lower case
LABELS = ("label", "labels", "y", "gt", "target", "targets", "class")
GROUPS = ("group", "groups")
SPLITS = ("split", "splits")
IDS = ("id", "ids")
#: ending of the name of an array that says how long each sample's sequence is
LENGTHS = "_lengths"
#: endings of the names of arrays that hold one part of the samples each
PARTS = {"_train": "train", "_validation": "validation", "_valid": "validation", "_val": "validation", "_test": "test"}


#: the parts of a split
ORDER = ("train", "validation", "test")


def read_tables(source: str | Path) -> dict[str, Table]:
    r"""Read every array of a folder with one file each, or of a single ``.npz``, ``.mat`` or published ``.pkl`` file.

    In a folder ``<name>.csv`` and the like give ``<name>``; a file of several arrays gives that of its own name, or the
    only one, and IDs (``ids``) and lengths (``lengths``) beside it. A CSV file may have a header; then a column ``id``
    gives IDs, and ``labels.csv`` may have the columns ``group`` and ``split`` too. MATLAB's multi-view files, a cell
    ``X`` of views and ``Y``, give ``view1`` to ``viewV`` and ``labels``. A ``.npy`` file is mapped into memory, not
    read. Published files of CMU-MOSI, CMU-MOSEI and IEMOCAP are read as they lie:
    :mod:`monai_cggm.data.published`.

    Args:
        source: the folder or file.

    Returns:
        Name → table, in the file's order; in a folder, sorted by name.

    Raises:
        DataError: lists every file that is missing, cannot be read, or holds what is no array of numbers or words.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "audio.csv").write_text("id,a,b\nx,1,2\ny,3,4\n")
        ...     read_tables(folder)["audio"].values.tolist()
        [[1.0, 2.0], [3.0, 4.0]]
    """
    path = Path(source)
    if path.is_dir():
        return read_mosi(path) if is_mosi(path) else _in_folder(path)
    if not path.is_file():
        raise DataError([f"{path} is neither a file nor a folder"])
    if path.suffix.lower() in PICKLES:
        return read_published(path)
    if path.suffix.lower() not in (".npz", ".mat"):
        raise DataError(
            [f"{path}: expected a folder with a file a modality, or a .npz, .mat or published .pkl file that holds all"]
        )
    arrays = _read(path)
    return _views(arrays, path) or arrays


def joined_parts(tables: Mapping[str, Table]) -> tuple[dict[str, Table], tuple[str, ...] | None]:
    """Put the parts of each array together: ``x_train`` and ``x_test`` become ``x``, without copying modalities.

    IDs, groups and lengths may have one array for all parts, in the order training, validation, test. Other arrays
    without a part are left out, and the log names them, unless they have as many rows as the samples or a part.

    Args:
        tables: name → table.

    Returns:
        Tables, and the part (``train``, ``validation`` or ``test``) of each row; None where no name ends in a part.

    Raises:
        DataError: where an array lacks a part that another one has, a part is empty, parts differ in the size of a
            row, in whether they hold numbers, or in their IDs from those of another array, or where an array seems to
            be one of the samples and belongs to no part.

    Example:
        >>> tables = {f"x_{part}": Table(np.zeros((n, 2)), "file") for part, n in (("train", 2), ("test", 1))}
        >>> joined, parts = joined_parts(tables)
        >>> len(joined["x"]), parts
        (3, ('train', 'train', 'test'))
    """
    found: dict[str, dict[str, Table]] = {}
    whole: dict[str, Table] = {}
    for name, table in tables.items():
        base, ending = without_part(name)
        if ending:
            found.setdefault(base, {})[PARTS[ending.lower()]] = table
        else:
            whole[name] = table
    if not found:
        return whole, None
    order = [part for part in ORDER if any(part in parts for parts in found.values())]
    problems = [
        f"{name}: there is no {part} part of it, as there is of others ({next(iter(parts.values())).where})"
        for name, parts in found.items()
        for part in order
        if part not in parts
    ]
    problems += [
        f"{name}: the {part} part is empty, expected samples in it ({table.where})"
        for name, parts in found.items()
        for part, table in parts.items()
        if not table.values.size
    ]
    if problems:
        raise DataError(problems)
    rows = _part_sizes(found)
    joined = {name: _joined(name, parts, rows) for name, parts in found.items()}
    _check_part_ids(joined, list(rows))
    return {**joined, **_of_all_parts(whole, rows)}, tuple(part for part in order for _ in range(rows[part]))


def without_part(name: str) -> tuple[str, str]:
    """Return a name without the ending that says a part, and that ending, or "".

    Example:
        >>> without_part("x_train"), without_part("x_test_lengths"), without_part("x")
        (('x', '_train'), ('x_lengths', '_test'), ('x', ''))
    """
    tail = LENGTHS if name.endswith(LENGTHS) else ""
    stem = name.removesuffix(tail)
    ending = next((e for e in PARTS if stem.lower().endswith(e) and len(stem) > len(e)), "")
    if not ending:
        return name, ""
    return stem[: -len(ending)] + tail, stem[-len(ending) :]


def turned(table: Table, rows: int | None) -> Table:
    """Turn a MATLAB matrix that has a column a sample; the number of samples decides, and rows where both fit.

    Example:
        >>> turned(Table(np.zeros((5, 3)), "file", turnable=True), rows=3).values.shape
        (3, 5)
    """
    values = table.values
    if table.turnable and values.ndim == 2 and rows not in (None, len(values)) and values.shape[1] == rows:
        return replace(table, values=values.T)
    return table


def is_special(name: str) -> bool:
    """Whether a name is not one of a modality.

    Example:
        >>> is_special("Labels"), is_special("audio_lengths"), is_special("audio")
        (True, True, False)
    """
    return name.lower() in (*LABELS, *GROUPS, *SPLITS, *IDS) or name.endswith(LENGTHS)


def _of_all_parts(whole: Mapping[str, Table], rows: Mapping[str, int]) -> dict[str, Table]:
    """Arrays that belong to no part: those of all samples, beside the modalities, in the order of the parts."""
    total, sizes = sum(rows.values()), ", ".join(f"{part} {size}" for part, size in rows.items())
    kept, problems, unused = {}, [], []
    for name, table in whole.items():
        beside = name.lower() in (*GROUPS, *IDS) or name.endswith(LENGTHS)
        size = table.values.size if beside else len(table)
        if beside and size == total:
            kept[name] = table
        elif beside or size in (total, *rows.values()):
            expected = f"one of them all ({total})" if beside else f"{name}_train and so on, as others have"
            problems.append(f"{name}: {size} rows and no part ({sizes}), expected {expected} ({table.where})")
        else:
            unused.append(name)
    if problems:
        raise DataError(problems)
    if unused:
        logger.info("not used, as they belong to no part: %s", ", ".join(unused))
    return kept


def _check_part_ids(tables: Mapping[str, Table], parts: Sequence[str]) -> None:
    """Refuse an ID that is in another part in one array than in another."""
    named = {name: table for name, table in tables.items() if table.ids is not None}
    first = next(iter(named), "")
    problems = []
    for name, table in named.items():
        for part, mine, theirs in zip(parts, _ids_by_part(table), _ids_by_part(named[first]), strict=True):
            odd = sorted(set(mine) - set(theirs))
            if odd:
                problems.append(
                    f"{name}: {odd[0]!r} is in the {part} part, where {first} does not have it ({table.where})"
                )
    if problems:
        raise DataError(problems)


def _ids_by_part(table: Table) -> list[tuple[str, ...]]:
    ids, starts = table.ids or (), np.cumsum([0, *(size for size, _ in table.pieces)])
    return [ids[start:stop] for start, stop in pairwise(starts)]


def _part_sizes(found: Mapping[str, Mapping[str, Table]]) -> dict[str, int]:
    """Samples in each part: as many as there are labels, or rows of the first array."""
    labels = next((parts for name, parts in found.items() if is_special(name)), None)
    if labels is not None:
        return {part: labels[part].values.size for part in ORDER if part in labels}
    first = next(iter(found.values()))
    return {part: len(first[part].values) for part in ORDER if part in first}


def _joined(name: str, parts: Mapping[str, Table], rows: Mapping[str, int]) -> Table:
    pieces, problems = [], []
    for part, size in rows.items():
        piece = turned(parts[part], size)
        values = piece.values.ravel() if is_special(name) else piece.values
        if len(values) != size:
            problems.append(f"{name}: {len(values)} rows in the {part} part, expected {size} ({piece.where})")
        pieces.append(replace(piece, values=values))
    first = pieces[0]
    numeric = [piece.values.dtype.kind in "fiub" for piece in pieces]
    problems += [
        f"{name}: holds {piece.values.dtype} in the {part} part, expected numbers ({piece.where})"
        for part, piece, is_numeric in zip(rows, pieces, numeric, strict=True)
        if any(numeric) and not is_numeric and not is_special(name)
    ]
    problems += [
        f"{name}: parts differ, a row is {first.values.shape[1:]} and {piece.values.shape[1:]} ({piece.where})"
        for piece in pieces
        if piece.values.shape[1:] != first.values.shape[1:]
    ]
    if problems:
        raise DataError(problems)
    ids = None if any(piece.ids is None for piece in pieces) else tuple(i for p in pieces for i in p.ids or ())
    arrays = tuple(piece.values for piece in pieces)
    joined = replace(first, ids=ids, turnable=False, pieces=tuple((len(p.values), p.where) for p in pieces))
    if is_special(name):
        return replace(joined, values=np.concatenate(arrays))
    return replace(joined, values=arrays[0], following=arrays[1:])


def _in_folder(folder: Path) -> dict[str, Table]:
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not paths:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in PICKLES)
        hint = f"; name the file that is meant itself: {', '.join(pickles[:5])}" if pickles else ""
        raise DataError([f"{folder} has no file that ends in {', '.join(SUFFIXES)}{hint}"])
    tables: dict[str, Table] = {}
    problems: list[str] = []
    for path in paths:
        if path.stem in tables:
            problems.append(f"{path.stem}: two files have this name, expected one ({path})")
        try:
            tables |= _of_one_name(_read(path), path)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return tables


def _of_one_name(arrays: dict[str, Table], path: Path) -> dict[str, Table]:
    """The array that a file is named after, and what belongs to it."""
    kinds = (*IDS, *GROUPS, *SPLITS, "lengths")
    beside = {
        key.lower(): table
        for key, table in arrays.items()
        if key != path.stem and without_part(key.lower())[0] in kinds
    }
    own = {key: table for key, table in arrays.items() if key.lower() not in beside or key == path.stem}
    main = own.get(path.stem) or (next(iter(own.values())) if len(own) == 1 else None)
    if main is None:
        raise DataError([f"{path.stem}: expected one array, or one of that name, found {sorted(own)} ({path})"])
    ids = next((table for key, table in beside.items() if key in IDS), None)
    if ids is not None:
        main = replace(main, ids=_words(ids.values))
    others = {
        key: replace(table, ids=main.ids) for key, table in beside.items() if without_part(key)[0] in (*GROUPS, *SPLITS)
    }
    if "lengths" in beside:
        others[path.stem + LENGTHS] = replace(beside["lengths"], ids=main.ids)
    return {path.stem: main, **others}


def _read(path: Path) -> dict[str, Table]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".csv":
            return _read_csv(path)
        arrays = _read_mat(path) if suffix == ".mat" else _read_numpy(path)
    except DataError:
        raise
    except NotImplementedError as error:  # scipy's word for HDF5
        raise DataError(
            [f"{path.stem}: MATLAB files of version 7.3 are not read, save it with -v7 ({path})"]
        ) from error
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError([f"{path.stem}: cannot be read: {_first_line(error)} ({path})"]) from error
    several = len(arrays) > 1
    tables = {}
    for key, values in arrays.items():
        where = f"{path}, {key}" if several else str(path)
        tables[key] = Table(np.atleast_1d(values), where, turnable=suffix == ".mat")
    return tables


def _read_numpy(path: Path) -> dict[str, np.ndarray]:
    # without pickles: an object array would run code of whoever wrote it, and is refused
    loaded = np.load(path, mmap_mode="r", allow_pickle=False)  # .npz files cannot be mapped, and are read
    if isinstance(loaded, np.ndarray):
        return {path.stem: loaded}
    with loaded:
        return {key: loaded[key] for key in loaded.files}


def _read_mat(path: Path) -> dict[str, np.ndarray]:
    from scipy.io import loadmat

    return {key: value for key, value in loadmat(path).items() if not key.startswith("__")}


def _views(arrays: dict[str, Table], path: Path) -> dict[str, Table] | None:
    """The views of a MATLAB cell ``X``, each a table; None where there is no such cell."""
    cell = next((table for key, table in arrays.items() if key.lower() == "x" and table.values.dtype == object), None)
    if cell is None:
        return None
    labels = {key: table for key, table in arrays.items() if key.lower() != "x"}
    views = [np.asarray(view) for view in cell.values.ravel()]
    return {
        **{f"view{i}": Table(view, f"{path}, X{{{i}}}", turnable=True) for i, view in enumerate(views, 1)},
        **labels,
    }


def _read_csv(path: Path) -> dict[str, Table]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = [line for line in csv.reader(file) if line]
    if not lines:
        raise DataError([f"{path.stem}: the file is empty ({path})"])
    stem, ending = without_part(path.stem.lower())
    kind = next((names for names in (LABELS, GROUPS, SPLITS, IDS) if stem in names), ())
    words = bool(kind)
    header = _header(lines[0], words)
    names = [name.strip() for name in lines[0]] if header else [str(i) for i in range(len(lines[0]))]
    rows = lines[1:] if header else lines
    ragged = next((i for i, row in enumerate(rows, 1) if len(row) != len(names)), None)
    if ragged is not None:
        found = len(rows[ragged - 1])
        raise DataError([f"{path.stem}: row {ragged} has {found} cells, expected {len(names)} ({path})"])
    columns = {name: [row[i].strip() for row in rows] for i, name in enumerate(names)}
    given = [name for name in names if header and name.lower() in IDS and kind != IDS]
    ids = tuple(columns.pop(given[0])) if given else None
    if not words:
        return {path.stem: Table(_numbers(columns, path), str(path), ids)}
    special = {name for name in columns if header and name.lower() in (*GROUPS, *SPLITS) and name.lower() not in kind}
    own = [name for name in columns if name not in special]
    if len(own) != 1:
        raise DataError([f"{path.stem}: expected one column of values, found {own} ({path})"])
    tables = {name.lower() + ending: Table(np.array(columns[name]), f"{path}, {name}", ids) for name in special}
    return {**tables, path.stem: Table(np.array(columns[own[0]]), str(path), ids)}


def _header(cells: Sequence[str], words: bool) -> bool:
    """Whether a first line names columns. A file of words has a header only where it is one of the known names."""
    if words:
        return any(cell.strip().lower() in (*LABELS, *GROUPS, *SPLITS, *IDS) for cell in cells)
    return any(cell.strip() and not _is_number(cell) for cell in cells)


def _numbers(columns: Mapping[str, Sequence[str]], path: Path) -> np.ndarray:
    values = np.empty((len(next(iter(columns.values()), ())), len(columns)))
    for index, (name, cells) in enumerate(columns.items()):
        try:
            values[:, index] = [float(cell) if cell else np.nan for cell in cells]
        except ValueError as error:
            row = next(i for i, cell in enumerate(cells, 1) if cell and not _is_number(cell))
            raise DataError(
                [f"{path.stem}: {cells[row - 1]!r} in row {row}, column {name}, is no number ({path})"]
            ) from error
    return values


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _words(values: np.ndarray) -> tuple[str, ...]:
    return tuple(str(value).strip() for value in values.ravel().tolist())


def _first_line(error: BaseException) -> Any:
    return (str(error).splitlines() or [type(error).__name__])[0]
