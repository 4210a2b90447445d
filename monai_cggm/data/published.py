# SPDX-License-Identifier: Apache-2.0
r"""The feature files that others publish of CMU-MOSI, CMU-MOSEI and IEMOCAP, read as they lie.

========================  ==============================================================================================
file                      what it holds
========================  ==============================================================================================
sequences, ``.pkl``       ``{train, valid, test}`` of dictionaries with ``text``, ``audio``, ``vision`` ``(N, T, D)``,
                          ``labels`` or ``regression_labels``, ``id``: MulT's ``mosi_data.pkl``,
                          ``mosei_senti_data.pkl``, ``iemocap_data.pkl`` and their ``_noalign`` twins, which MultiBench
                          uses too, and MMSA's ``aligned_50.pkl`` and ``unaligned_50.pkl``
utterances, ``.pkl``      ``IEMOCAP_features_raw.pkl`` of bc-LSTM and DialogueRNN: a tuple of dictionaries, dialogue →
                          a list with one entry an utterance
utterances, folder        CMU-MOSI of bc-LSTM: ``data_text_text_train0.csv``, …, ``data_transcripts.csv``
========================  ==============================================================================================

Formats are described by the code that reads them in the repositories of these projects: Tsai et al., Multimodal
transformer for unaligned multimodal language sequences, ACL 2019; Liang et al., MultiBench, NeurIPS 2021; Mao et al.,
M-SENA, ACL 2022; Poria et al., Context-dependent sentiment analysis in user-generated videos, ACL 2017; Majumder et
al., DialogueRNN, AAAI 2019.
"""

from __future__ import annotations

import csv
import logging
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monai_cggm.data.pickles import read_pickle
from monai_cggm.data.rows import BLOCK, Table
from monai_cggm.data.splits import PART_OF, PARTS
from monai_cggm.errors import DataError

logger = logging.getLogger(__name__)

#: keys of the labels, the first that is there
LABELS = ("labels", "regression_labels", "label")
#: keys of what is numbers and no modality: IDs, and MMSA's tokens of words
NO_MODALITY = ("id", "ids", "text_bert")
#: MulT's columns of IEMOCAP's labels
EMOTIONS = ("neutral", "happy", "sad", "angry")
#: DialogueRNN's numbers of IEMOCAP's emotions: happy, sad, neutral, angry, excited, frustrated → the four classes.
#: Excited counts as happy, the most common set-up of four classes (5,531 utterances of the corpus): the two are close,
#: and happy alone would be by far the rarest class, 595 utterances in place of 1,636.
DIALOGUE_EMOTIONS: dict[int, str | None] = {0: "happy", 1: "sad", 2: "neutral", 3: "angry", 4: "happy", 5: None}
#: bc-LSTM's names in its folder of CMU-MOSI
MOSI_MODALITIES = ("text", "audio", "video")
MOSI_TRANSCRIPTS = "data_transcripts.csv"

_DIALOGUE_PARTS = ("IDs", "speakers", "labels", "text", "audio", "visual features", "sentences")


def read_published(path: str | Path) -> dict[str, Table]:
    """Read a published pickle; the module's table says which.

    Of sequences: positions that are zero throughout at the beginning or the end of a row are padding and cut off (MulT
    pads in front, MMSA behind), unless there are lengths (``audio_lengths``); a row that is zero throughout keeps one
    position. Infinite values (COVAREP's −∞) and NaN become 0, and the log counts them. Numeric arrays of two or three
    dimensions are modalities; the log names what is not used.

    Labels are one number a row, or MulT's ``(N, 4, 2)`` for IEMOCAP: yes or no for neutral, happy, sad and angry. There
    the emotion with the yes is the class, and rows with none or several are skipped. (Of the two columns the one that
    has exactly one mark in more rows is the yes.) DialogueRNN's six emotions become the same four: excited counts as
    happy, and frustrated is skipped (:data:`DIALOGUE_EMOTIONS`).

    IDs are the file's own, made unique, and videos or dialogues are groups: what stands in the ID before ``[``, ``$_$``
    or the last ``_``, or the first of several columns. The split is the file's own; where it parts a group, which the
    log says, the pieces are groups of their own.

    Args:
        path: the file.

    Returns:
        Name → table: the modalities, their lengths, ``labels``, ``ids``, ``groups``, ``splits``.

    Raises:
        DataError: for a file of no such kind, parts or rows that do not fit together, and as in
            :func:`monai_cggm.data.pickles.read_pickle`.
    """
    path = Path(path)
    content = read_pickle(path)
    if isinstance(content, dict):
        parts = {PART_OF[_word(key).lower()]: value for key, value in content.items() if _is_part(key, value)}
        if parts:
            return _sequences({part: parts[part] for part in PARTS if part in parts}, path)
    if isinstance(content, (tuple, list)) and len(content) == 9 and all(isinstance(c, dict) for c in content[:7]):
        return _dialogues(content, path)
    raise DataError(
        [
            f"{path.stem}: holds {_described(content)}, expected a dictionary of train, valid and test with a "
            f"dictionary of arrays each, or IEMOCAP's tuple of nine with dictionaries of dialogues ({path})"
        ]
    )


def is_mosi(folder: Path) -> bool:
    """Whether a folder is bc-LSTM's CMU-MOSI, by the names of its files.

    Example:
        >>> is_mosi(Path("nowhere"))
        False
    """
    return (folder / MOSI_TRANSCRIPTS).is_file() or (folder / "data_text_text_train0.csv").is_file()


def read_mosi(folder: str | Path) -> dict[str, Table]:
    """Read bc-LSTM's folder of CMU-MOSI: utterance-level text, audio and video, and whether a sentiment is positive.

    The last column of ``data_text_text_train0.csv`` and its like is the label. ``data_text_train.csv`` has in its first
    column the row of ``data_transcripts.csv``, which gives the utterance's ID, ``<video>_<utterance>``, and its label
    again; all labels, and the text features, which are there twice, must agree.

    Args:
        folder: the folder.

    Returns:
        ``text`` (100 numbers), ``audio`` (73), ``video`` (100), ``labels`` (negative or positive), ``ids``, ``groups``
        (the videos) and ``splits`` (train and test).

    Raises:
        DataError: for files that are missing or are no tables of numbers, and names the rows that do not agree.
    """
    folder = Path(folder)
    wanted = [f"data_{name}_{name}_{part}0.csv" for part in ("train", "test") for name in MOSI_MODALITIES]
    wanted += [f"data_text_{part}.csv" for part in ("train", "test")] + [MOSI_TRANSCRIPTS]
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise DataError([f"CMU-MOSI's {name} is missing ({folder / name})" for name in missing])
    transcripts = _transcripts(folder / MOSI_TRANSCRIPTS)
    parts = {part: _mosi_part(folder, part, transcripts) for part in ("train", "test")}
    ids = [case for part in parts.values() for case in part[1]]
    repeated = [case for case, times in Counter(ids).items() if times > 1]
    if repeated:
        raise DataError([f"utterance {case}: is in two rows of data_text_*.csv ({folder})" for case in repeated[:5]])
    tables = {
        name: Table(
            parts["train"][0][name][:, :-1],
            str(folder / f"data_{name}_{name}_*0.csv"),
            following=(parts["test"][0][name][:, :-1],),
        )
        for name in MOSI_MODALITIES
    }
    positive = np.concatenate([arrays["text"][:, -1] for arrays, _ in parts.values()])
    # words: as numbers they would pass for scores in a regression
    tables["labels"] = Table(np.where(positive == 1, "positive", "negative"), str(folder))
    sizes = {part: len(found) for part, (_, found) in parts.items()}
    return tables | _beside(ids, [_group(case, own=True) for case in ids], sizes, str(folder))


# ---------------------------------------------------------------------- sequences: {train, valid, test}


def _sequences(parts: dict[str, dict[str, Any]], path: Path) -> dict[str, Table]:
    parts = {part: {_word(key): value for key, value in content.items()} for part, content in parts.items()}
    first = next(iter(parts.values()))
    label = next((key for key in LABELS if key in first), None)
    names = [name for name, value in first.items() if _is_modality(name, value)]
    if not names:
        raise DataError([f"{path.stem}: has no numbers (N, T, D) or (N, D), found {sorted(first)} ({path})"])
    _check_parts(parts, [*names, *([label] if label else [])], path)
    sizes = {part: len(content[names[0]]) for part, content in parts.items()}
    used = {*names, *(name + "_lengths" for name in names), label, "id"}
    unused = [key for key in first if key not in used]
    if unused:
        logger.info("%s: not used: %s", path.name, ", ".join(unused))

    tables: dict[str, Table] = {}
    for name in names:
        tables |= _modality(name, parts, path)
    if label is not None:
        tables["labels"] = _labels([np.asarray(content[label]) for content in parts.values()], sizes, path)
    ids, groups = _ids([content.get("id") for content in parts.values()], sizes, path)
    return tables | _beside(ids, groups, sizes, str(path))


def _is_part(key: Any, value: Any) -> bool:
    return isinstance(value, dict) and isinstance(key, (str, bytes)) and _word(key).lower() in PART_OF


def _is_modality(name: str, value: Any) -> bool:
    if "label" in name.lower() or name.lower() in NO_MODALITY or name.endswith("_lengths"):
        return False
    return isinstance(value, np.ndarray) and value.ndim in (2, 3) and value.dtype.kind in "fiub"


def _check_parts(parts: Mapping[str, Mapping[str, Any]], names: Sequence[str], path: Path) -> None:
    problems = []
    first = next(iter(parts.values()))
    for part, content in parts.items():
        rows = np.shape(content[names[0]])[:1] if names[0] in content else ()
        for name in names:
            if name not in content:
                problems.append(f"{name}: is not in the {part} part ({path})")
                continue
            shape = np.shape(content[name])
            if "label" not in name and not _is_modality(name, content[name]):
                found = _described(content[name])
                problems.append(f"{name}: is {found} in the {part} part, expected an array of numbers ({path})")
            elif "label" not in name and shape[1:] != first[name].shape[1:]:
                expected = first[name].shape[1:]
                problems.append(f"{name}: a row is {shape[1:]} in the {part} part, expected {expected} ({path})")
            elif rows and shape[:1] != rows:
                found = str(shape[0]) if shape else "no"
                problems.append(f"{name}: {found} rows in the {part} part, expected {rows[0]} ({path})")
    if problems:
        raise DataError(problems)


def _modality(name: str, parts: Mapping[str, dict[str, Any]], path: Path) -> dict[str, Table]:
    """One modality of all parts, and its lengths; takes its arrays out of the parts, to free them."""
    pieces, lengths = [], []
    replaced = np.zeros(2, dtype=int)
    for part, content in parts.items():
        values, found, counts = _cleaned(content.pop(name), trim=name + "_lengths" not in content)
        given = content.get(name + "_lengths")
        if given is not None and values.ndim == 3:
            found = np.maximum(_whole(given, f"{name}_lengths of the {part} part", path), 1)
        pieces.append(values)
        lengths.append(found)
        replaced += counts
    if replaced.any():
        text = "%s: %s: %d values that are infinite or NaN became 0, in %d rows"
        logger.warning(text, path.name, name, *replaced)
    tables = {name: Table(pieces[0], f"{path}, {name}", following=tuple(pieces[1:]))}
    if pieces[0].ndim == 3:
        tables[name + "_lengths"] = Table(np.concatenate(lengths), f"{path}, {name}_lengths")
    return tables


def _cleaned(array: np.ndarray, trim: bool) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Finite numbers with no padding in front, the rows' lengths, and how many numbers and rows were replaced."""
    values = array
    if array.dtype not in (np.float16, np.float32):
        with np.errstate(over="ignore"):
            values = array.astype(np.float32)
    lengths = np.ones(len(values), dtype=int) if trim or values.ndim == 2 else np.zeros(len(values), dtype=int)
    numbers = rows = 0
    step = max(1, BLOCK // max(1, int(np.prod(values.shape[1:]))))
    for start in range(0, len(values), step):
        block = values[start : start + step]
        bad = ~np.isfinite(block)
        if bad.any():
            values = values if values.flags.writeable else values.copy()
            block = values[start : start + step]
            numbers, rows = numbers + int(bad.sum()), rows + int(bad.reshape(len(bad), -1).any(axis=1).sum())
            block[bad] = 0
        if not trim or values.ndim == 2:
            continue
        live = (block != 0).any(axis=2)
        begins = live.argmax(axis=1)
        ends = np.where(live.any(axis=1), live.shape[1] - live[:, ::-1].argmax(axis=1), 1)
        lengths[start : start + step] = ends - begins
        for row in np.flatnonzero(begins) + start:
            values = values if values.flags.writeable else values.copy()
            begin, length = begins[row - start], lengths[row]
            values[row, :length] = values[row, begin : begin + length].copy()
    return values, lengths, (numbers, rows)


def _whole(given: Any, what: str, path: Path) -> np.ndarray:
    values = np.asarray(given).ravel()
    if values.dtype.kind not in "iuf" or (values != np.round(values)).any():
        raise DataError([f"{what}: hold {_described(given)}, expected whole numbers ({path})"])
    return values.astype(int)


def _labels(pieces: Sequence[np.ndarray], sizes: Mapping[str, int], path: Path) -> Table:
    where = f"{path}, labels"
    if all(piece.size == size for piece, size in zip(pieces, sizes.values(), strict=True)):
        return Table(np.concatenate([piece.ravel() for piece in pieces]), where)
    if not all(piece.ndim == 3 and piece.shape[1:] == (len(EMOTIONS), 2) for piece in pieces):
        shapes = ", ".join(str(piece.shape) for piece in pieces)
        raise DataError([f"labels: are {shapes}, expected one number a row, or yes and no for 4 emotions ({where})"])
    marks = np.concatenate(pieces) > 0.5
    no, yes = marks[..., 0], marks[..., 1]
    wrong = (no == yes).any(axis=1)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            [f"labels: row {row + 1} has yes and no, or neither, for {_names(no[row] == yes[row])} ({where})"]
        )
    if (no.sum(axis=1) == 1).sum() > (yes.sum(axis=1) == 1).sum():
        raise DataError([f"labels: the second of two columns must say yes, and most rows have one no in it ({where})"])
    counts = yes.sum(axis=1)
    words = np.array(EMOTIONS)[yes.argmax(axis=1)]
    skipped = {int(row): f"its emotions are {_names(yes[row])}, expected one" for row in np.flatnonzero(counts != 1)}
    return Table(words, where, skipped=skipped)


def _names(marked: np.ndarray) -> str:
    return " and ".join(name for name, mark in zip(EMOTIONS, marked, strict=True) if mark) or "none"


# ---------------------------------------------------------------------- IDs and groups


def _ids(raw: Sequence[Any], sizes: Mapping[str, int], path: Path) -> tuple[list[str], list[str]]:
    """A unique ID and the group of each row."""
    if any(given is None for given in raw):
        total = sum(sizes.values())
        kinds = [part for part, size in sizes.items() for _ in range(size)]
        ids = [f"{part}_{i:0{len(str(total))}d}" for i, part in enumerate(kinds, 1)]
        return ids, ids
    columns: list[list[str]] = []
    problems = []
    for given, (part, size) in zip(raw, sizes.items(), strict=True):
        rows = [[_word(cell) for cell in np.ravel(np.asarray(row, dtype=object))] for row in given]
        if len(rows) != size or not all(rows):
            problems.append(f"id: {len(rows)} rows in the {part} part, expected {size} with an ID each ({path})")
        columns += rows
    if problems:
        raise DataError(problems)
    names = [row[0] for row in columns]
    own = len(set(names)) == len(names)
    # the first column names an utterance, or, with times beside it, a video
    ids = names if own else [row[0] + (f"[{'-'.join(row[1:])}]" if len(row) > 1 else "") for row in columns]
    return _unique(ids), [_group(name, own) for name in names]


def _group(name: str, own: bool) -> str:
    """The video or dialogue of an utterance; IDs of videos have underscores of their own."""
    for mark in ("$_$", "["):
        if mark in name:
            return name.split(mark)[0]
    ended = re.fullmatch(r"(.+)_[A-Za-z]?\d+", name) if own else None
    return ended[1] if ended else name


def _unique(ids: Sequence[str]) -> list[str]:
    seen: Counter[str] = Counter()
    unique = []
    for case in ids:
        seen[case] += 1
        unique.append(case if seen[case] == 1 else f"{case}#{seen[case]}")
    return unique


def _beside(ids: Sequence[str], groups: Sequence[str], sizes: Mapping[str, int], where: str) -> dict[str, Table]:
    """IDs, groups and the file's own split."""
    parts = [part for part, size in sizes.items() for _ in range(size)]
    return {
        "ids": Table(np.array(ids), f"{where}, id"),
        "groups": Table(np.array(_kept_apart(groups, parts, where)), f"{where}, id"),
        "splits": Table(np.array(parts), where),
    }


def _kept_apart(groups: Sequence[str], parts: Sequence[str], where: str) -> list[str]:
    """Groups, where those that the file's own split parts have become one for each part."""
    parts_of: dict[str, set[str]] = {}
    for group, part in zip(groups, parts, strict=True):
        parts_of.setdefault(group, set()).add(part)
    parted = {group for group, those in parts_of.items() if len(those) > 1}
    if parted:
        text = "%s: its own split parts %d of %d videos or dialogues, such as %s; their pieces count as different ones"
        logger.warning(text, where, len(parted), len(parts_of), min(parted))
    pairs = zip(groups, parts, strict=True)
    return [f"{group} ({part})" if group in parted else group for group, part in pairs]


# ---------------------------------------------------------------------- utterances: IEMOCAP's dialogues


def _dialogues(content: Sequence[Any], path: Path) -> dict[str, Table]:
    what = dict(zip(_DIALOGUE_PARTS, content[:7], strict=True))
    parts = {"train": _listed(content[7], path), "test": _listed(content[8], path)}
    order = [(part, dialogue) for part, dialogues in parts.items() for dialogue in dialogues]
    problems = [
        f"dialogue {d}: is in both train and test ({path})" for d in sorted(set(parts["train"]) & {*parts["test"]})
    ]
    needed = ("IDs", "labels", "text", "audio", "visual features")
    for _, dialogue in order:
        sizes = {name: len(what[name][dialogue]) if dialogue in what[name] else None for name in needed}
        if len(set(sizes.values())) != 1 or None in sizes.values():
            found = ", ".join(f"{size or 'no'} {name}" for name, size in sizes.items())
            problems.append(f"dialogue {dialogue}: has {found}, expected one of each an utterance ({path})")
    if problems:
        raise DataError(problems)
    tables = {}
    for name, key in (("text", "text"), ("audio", "audio"), ("vision", "visual features")):
        values, _, counts = _cleaned(_stacked(what[key], order, name, path), trim=False)
        if any(counts):
            text = "%s: %s: %d values that are infinite or NaN became 0, in %d rows"
            logger.warning(text, path.name, name, *counts)
        tables[name] = Table(values, f"{path}, {name}")
    ids = [_word(case) for _, dialogue in order for case in what["IDs"][dialogue]]
    groups = [str(dialogue) for _, dialogue in order for _ in what["IDs"][dialogue]]
    sizes_of = {part: sum(len(what["IDs"][d]) for d in dialogues) for part, dialogues in parts.items()}
    numbers = [label for _, dialogue in order for label in what["labels"][dialogue]]
    tables["labels"] = _dialogue_labels(numbers, ids, path)
    return tables | _beside(_unique(ids), groups, sizes_of, str(path))


def _dialogue_labels(numbers: Sequence[Any], ids: Sequence[str], path: Path) -> Table:
    problems = [
        f"utterance {case}: its label is {number!r}, expected 0 to 5: happy, sad, neutral, angry, excited, frustrated "
        f"({path})"
        for case, number in zip(ids, numbers, strict=True)
        if not np.isscalar(number) or number not in DIALOGUE_EMOTIONS
    ]
    if problems:
        raise DataError(problems[:5])
    words = [DIALOGUE_EMOTIONS[number] for number in numbers]
    logger.info("%s: excited counts as happy, frustrated is left out", path.name)
    skipped = {row: "frustrated is none of the four classes" for row, word in enumerate(words) if word is None}
    return Table(np.array([word or "" for word in words]), f"{path}, labels", skipped=skipped)


def _listed(names: Any, path: Path) -> list[Any]:
    """The dialogues of a part, in an order that does not depend on the file's (it has sets)."""
    if (
        not isinstance(names, Collection)
        or isinstance(names, (str, dict))
        or not all(isinstance(n, str) for n in names)
    ):
        raise DataError([f"{path.stem}: its parts are {_described(names)}, expected names of dialogues ({path})"])
    return sorted(names)


def _stacked(values: Mapping[str, Any], order: Sequence[tuple[str, str]], name: str, path: Path) -> np.ndarray:
    rows, problems = [], []
    width = None
    for _, dialogue in order:
        for number, row in enumerate(values[dialogue], 1):
            array = np.asarray(row)
            width = array.shape if width is None else width
            if array.shape != width or array.ndim != 1 or array.dtype.kind not in "fiub":
                found = f"{array.dtype} {array.shape}"
                problems.append(
                    f"dialogue {dialogue}: {name} of utterance {number} is {found}, expected {width} ({path})"
                )
            rows.append(array)
    if problems:
        raise DataError(problems[:5])
    return np.stack(rows).astype(np.float32)


# ---------------------------------------------------------------------- utterances: CMU-MOSI's folder


def _transcripts(path: Path) -> list[tuple[str, str]]:
    """ID and label of each utterance."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    short = next((i for i, row in enumerate(rows, 1) if len(row) < 3 or "_" not in row[0]), None)
    if short is not None or not rows:
        raise DataError([f"row {short or 1} has no ID VIDEO_UTTERANCE, text and label ({path})"])
    return [(row[0].strip(), row[-1].strip()) for row in rows]


def _mosi_part(
    folder: Path, part: str, transcripts: Sequence[tuple[str, str]]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Features and labels, ``(N, D + 1)`` a modality, and the IDs of a part."""
    arrays = {name: _csv_numbers(folder / f"data_{name}_{name}_{part}0.csv") for name in MOSI_MODALITIES}
    index = folder / f"data_text_{part}.csv"
    again = _csv_numbers(index)
    sizes = {name: len(values) for name, values in {**arrays, index.name: again}.items()}
    if len(set(sizes.values())) != 1:
        found = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise DataError([f"the files of the {part} part have different numbers of rows: {found} ({folder})"])
    rows = again[:, 0]
    wrong = np.flatnonzero((rows != np.round(rows)) | (rows < 0) | (rows >= len(transcripts)))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            [f"row {row + 1} points to transcript {rows[row]:g}, expected 0 to {len(transcripts) - 1} ({index})"]
        )
    utterances = [transcripts[int(row)] for row in rows]
    problems = []
    for row, (case, label) in enumerate(utterances):
        here = f"row {row + 1} of the {part} part ({case})"
        labels = {name: f"{values[row, -1]:g}" for name, values in arrays.items()} | {"transcript": label}
        if len(set(labels.values())) != 1 or label not in ("0", "1"):
            found = ", ".join(f"{name} {value}" for name, value in labels.items())
            problems.append(f"{here}: its labels are {found}, expected the same four times, 0 or 1 ({folder})")
        elif not np.allclose(again[row, 1:], arrays["text"][row, :-1]):
            problems.append(f"{here}: its text features differ from those in {index.name} ({folder})")
    if problems:
        raise DataError(problems[:5] + ([f"and {len(problems) - 5} rows more ({folder})"] if len(problems) > 5 else []))
    return arrays, [case for case, _ in utterances]


def _csv_numbers(path: Path) -> np.ndarray:
    try:
        return np.loadtxt(path, delimiter=",", quotechar='"', ndmin=2)
    except (ValueError, OSError) as error:
        raise DataError([f"{path.stem}: cannot be read: {error} ({path})"]) from error


def _word(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value).strip()


def _described(value: Any) -> str:
    if isinstance(value, dict):
        return f"a dictionary with {', '.join(sorted(map(_word, value))[:8]) or 'nothing'}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return f"{type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (list, tuple, set)) else "")
