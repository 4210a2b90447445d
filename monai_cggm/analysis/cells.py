# SPDX-License-Identifier: Apache-2.0
"""What the cells of a comparison wrote: one cell is one arm, trained on one split with one seed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pandas as pd

from monai_cggm.analysis.measures import DICE, is_dice, measure_of, score_columns
from monai_cggm.errors import DataError

#: Name of the network's own prediction among the predictors; the others are the modalities' classifiers.
FUSION = "fusion"

#: Arms that a study with ``alone: true`` adds: a network for each modality, and the mean of their probabilities.
ALONE = "alone_"
ENSEMBLE = "ensemble"

#: Keys of cell.json that reports read; null, or no key, stands for what is not known. ``epochs`` are those planned,
#: ``validations`` how many times the run validated.
FACTS = (
    "arm",
    "split",
    "seed",
    "status",
    "error",
    "overlays",
    "settings",
    "modalities",
    "part",
    "convention",
    "epochs",
    "iterations",
    "validations",
    "best_epoch",
    "training_seconds",
    "peak_memory_mb",
    "parameters",
    "classifier_parameters",
    "threads",
    "device",
    "versions",
)

_NEEDED = ("arm", "split", "seed", "status", "error", "modalities")

#: Columns that name a cell.
CELL = ("arm", "split", "seed")

#: Columns of scores.csv that name a row; scores follow: ``dice_<region>``, ``dice_mean`` and ``hd95_<region>``, or
#: those of another task (:mod:`monai_cggm.analysis.measures`).
ROW = ("case", "part", "predictor", "subset")

_STATES = ("done", "failed")
_PARTS = ("validation", "test")


class CellKey(NamedTuple):
    """Names one cell.

    Example:
        >>> print(CellKey("joint", "brats_2mm", 0))
        joint, brats_2mm, seed 0
    """

    arm: str
    split: str
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}, {self.split}, seed {self.seed}"


@dataclass(frozen=True)
class Cells:
    """The results of a comparison so far.

    Attributes:
        scores: the rows of the finished cells' scores.csv with the columns ``arm``, ``split``, ``seed`` before them;
            Dice and accuracy from 0 to 1, HD95 in mm, NaN where there is none.
        facts: a row for each cell that finished or failed, with the keys of cell.json (:data:`FACTS`).
    """

    scores: pd.DataFrame
    facts: pd.DataFrame

    @property
    def done(self) -> list[CellKey]:
        """The finished cells."""
        return self._with_status("done")

    @property
    def failed(self) -> dict[CellKey, str]:
        """The failed cells, each with its error."""
        rows = self.facts[self.facts["status"] == "failed"]
        return dict(zip(_keys(rows), (str(error or "no error was recorded") for error in rows["error"]), strict=True))

    def outstanding(self, planned: Iterable[CellKey]) -> list[CellKey]:
        """Return those of the planned cells that have neither finished nor failed."""
        there = set(_keys(self.facts))
        return [key for key in planned if key not in there]

    def only(self, planned: Iterable[CellKey]) -> Cells:
        """Return what belongs to the planned cells."""
        wanted = set(planned)
        return Cells(self.scores[_among(self.scores, wanted)], self.facts[_among(self.facts, wanted)])

    def _with_status(self, status: str) -> list[CellKey]:
        return _keys(self.facts[self.facts["status"] == status])


def split_name(split: str) -> str:
    """Return the name by which cells call a split file.

    Example:
        >>> split_name("configs/splits/brats_2mm.json")
        'brats_2mm'
    """
    return PurePosixPath(split.replace("\\", "/")).stem


def read_cells(folder: str | Path, *, score: str = DICE) -> Cells:
    """Read ``cells/<arm>/<split>-seed<seed>/`` of a comparison.

    A cell's folder counts once it has its cell.json, and is outstanding until then.

    Args:
        folder: the comparison's folder.
        score: what arms are compared by, a column that every scores.csv must have.

    Raises:
        DataError: where the folder has no ``cells``, or a file does not fit; all such files are named at once.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cell = Path(folder, "cells", "joint", "brats_2mm-seed0")
        ...     cell.mkdir(parents=True)
        ...     facts = dict.fromkeys(FACTS) | {"arm": "joint", "split": "brats_2mm", "seed": 0, "status": "failed"}
        ...     _ = (cell / "cell.json").write_text(json.dumps(facts | {"error": "out of memory"}))
        ...     read_cells(folder).failed
        {CellKey(arm='joint', split='brats_2mm', seed=0): 'out of memory'}
    """
    root = Path(folder) / "cells"
    if not root.is_dir():
        raise DataError([f"{root}: no such folder, expected the cells of a comparison"])
    facts: list[dict[str, Any]] = []
    scores: list[pd.DataFrame] = []
    problems: list[str] = []
    for path in sorted(root.glob("*/*/cell.json")):
        try:
            cell = _read_facts(path, score)
            if cell["status"] == "done":
                scores.append(_read_scores(path.with_name("scores.csv"), cell, score))
            facts.append(cell)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    columns = [*CELL, *ROW, score]
    return Cells(
        scores=pd.concat(scores, ignore_index=True) if scores else pd.DataFrame(columns=columns),
        # As objects: otherwise pandas makes NaN, or a text of it, out of null.
        facts=pd.DataFrame({key: pd.Series([cell[key] for cell in facts], dtype=object) for key in FACTS}),
    )


def _keys(frame: pd.DataFrame) -> list[CellKey]:
    return [CellKey(str(arm), str(split), int(seed)) for arm, split, seed in frame[list(CELL)].itertuples(index=False)]


def _among(frame: pd.DataFrame, wanted: Set[CellKey]) -> pd.Series:
    # cell by cell, not row by row: a table of scores may have a million rows of a hundred cells
    of_row = frame.groupby(list(CELL), sort=False).ngroup()
    there = _keys(frame[list(CELL)].drop_duplicates())
    return of_row.isin([number for number, key in enumerate(there) if key in wanted])


def _read_facts(path: Path, score: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError([f"{path}: cannot be read as JSON: {error}"]) from error
    if not isinstance(content, dict):
        raise DataError([f"{path}: found a {type(content).__name__}, expected an object with {', '.join(_NEEDED)}"])
    needed = [*_NEEDED, "convention"] if is_dice(score) else _NEEDED
    missing = [key for key in needed if key not in content]
    if missing:
        raise DataError([f"{path}: no {', '.join(missing)}, expected all of {', '.join(needed)}"])
    expected = f"{path.parents[1].name}/{path.parent.name}"
    found = f"{content['arm']}/{content['split']}-seed{content['seed']}"
    if found != expected or not isinstance(content["seed"], int):
        raise DataError([f"{path}: it is about {found}, expected {expected} as its folder says"])
    if content["status"] not in _STATES:
        raise DataError([f"{path}: status {content['status']!r}, expected one of {', '.join(_STATES)}"])
    if content["status"] == "done" and not _names(content["modalities"]):
        raise DataError([f"{path}: modalities {content['modalities']!r}, expected a list of names"])
    return {key: content.get(key) for key in FACTS}


def _names(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _read_scores(path: Path, cell: Mapping[str, Any], score: str) -> pd.DataFrame:
    try:
        # As text first: a case may be called 001 or NA.
        rows = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError([f"{path}: cannot be read as a table: {error}"]) from error
    missing = [column for column in (*ROW, score) if column not in rows]
    if missing:
        raise DataError([f"{path}: no column {', '.join(missing)}, found {', '.join(rows.columns)}"])
    numbers = score_columns(rows, score)
    for column in numbers:
        rows[column] = _numbers(rows[column], path, most=1.0 if measure_of(column).bounded else None)
    _check_rows(rows, path, cell)
    identity = pd.DataFrame({key: cell[key] for key in CELL}, index=rows.index)
    return pd.concat([identity, rows[[*ROW, *numbers]]], axis="columns")


def _numbers(texts: pd.Series, path: Path, *, most: float | None) -> pd.Series:
    numbers = pd.to_numeric(texts, errors="coerce")
    wrong = (numbers.isna() & ~texts.str.strip().str.lower().isin(["", "nan"])) | (numbers < 0)
    if most is not None:
        wrong |= numbers > most
    if wrong.any():
        line = int(wrong.to_numpy().argmax()) + 2
        expected = "a number from 0" + ("" if most is None else f" to {most:g}")
        raise DataError([f"{path}, line {line}: {texts.name} is {texts[wrong].iloc[0]!r}, expected {expected}"])
    return numbers.astype(float)


def _check_rows(rows: pd.DataFrame, path: Path, cell: Mapping[str, Any]) -> None:
    if FUSION not in set(rows["predictor"]):
        raise DataError([f"{path}: no row of the predictor {FUSION!r}, expected the network's scores"])
    parts = sorted(set(rows["part"]) - set(_PARTS))
    if parts:
        raise DataError([f"{path}: part {parts[0]!r}, expected one of {', '.join(_PARTS)}"])
    known = list(cell["modalities"])
    for subset in rows["subset"].unique():
        named = subset.split("+")
        if named != [modality for modality in known if modality in named]:
            raise DataError([f"{path}: subset {subset!r}, expected some of {'+'.join(known)} in this order"])
    twice = rows[rows.duplicated(list(ROW))]
    if len(twice):
        row = twice.iloc[0]
        what = ", ".join(str(row[column]) for column in ROW)
        raise DataError([f"{path}: two rows of {what}, expected one"])
