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
from collections.abc import Collection, Iterator, Mapping, Sequence
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
#: modalities that may have infinite values: COVAREP's logarithms of silence
AUDIO = ("audio", "acoustic", "covarep")
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
    position. Where all sequences are equally long, as in aligned files, a position is a word, and one is cut off where
    all modalities are zero, so that words stay side by side. Numeric arrays of two or three dimensions are modalities;
    the log names what is not used.

    Infinite values in audio (COVAREP's −∞) become 0, and the log counts them. NaN, and infinite values elsewhere, stay:
    :func:`monai_cggm.data.load_features` refuses them, or takes a row that is NaN throughout for a missing modality.

    Labels are one number a row, or MulT's ``(N, 4, 2)`` for IEMOCAP: yes or no for neutral, happy, sad and angry. There
    the emotion with the yes is the class, and rows with none or several are skipped. (Of the two columns the one that
    has exactly one mark in more rows is the yes.) DialogueRNN's six emotions become the same four: excited counts as
    happy, and frustrated is skipped (:data:`DIALOGUE_EMOTIONS`).

    IDs are the file's own, made unique, and videos or dialogues are groups: what stands in the ID before ``[``, ``$_$``
    or the last ``_``, or the first of several columns. The split is the file's own; the log says how many groups it
    parts.

    Args:
        path: the file.

    Returns:
        Name → table: the modalities, their lengths, ``labels``, ``ids``, ``groups``, ``splits``.

    Raises:
        DataError: for a file of no such kind, a part that is empty or lacks what another one has, rows that do not fit
            together, and as in :func:`monai_cggm.data.pickles.read_pickle`.
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
            pieces=tuple(
                (len(parts[part][0][name]), str(folder / f"data_{name}_{name}_{part}0.csv")) for part in parts
            ),
        )
        for name in MOSI_MODALITIES
    }
    positive = np.concatenate([arrays["text"][:, -1] for arrays, _ in parts.values()])
    # words: as numbers they would pass for scores in a regression
    tables["labels"] = Table(np.where(positive == 1, "positive", "negative"), str(folder))
    sizes = {part: len(found) for part, (_, found) in parts.items()}
    _check_filled(sizes, folder)
    return tables | _beside(ids, [_group(case, own=True) for case in ids], sizes, str(folder))


# ---------------------------------------------------------------------- sequences: {train, valid, test}


def _sequences(parts: dict[str, dict[str, Any]], path: Path) -> dict[str, Table]:
    parts = {part: {_word(key): value for key, value in content.items()} for part, content in parts.items()}
    found = {key: None for content in parts.values() for key, value in content.items() if value is not None}
    label = next((key for key in LABELS if key in found), None)
    names = [name for name in found if any(_is_modality(name, content.get(name)) for content in parts.values())]
    if not names:
        raise DataError([f"{path.stem}: has no numbers (N, T, D) or (N, D), found {sorted(found)} ({path})"])
    others = [key for key in (label, "id") if key in found]
    _check_parts(parts, names, others, path)
    sizes = {part: len(content[names[0]]) for part, content in parts.items()}
    _check_filled(sizes, path)
    used = {*names, *(name + "_lengths" for name in names), *others}
    unused = [key for key in found if key not in used]
    if unused:
        logger.info("%s: not used: %s", path.name, ", ".join(unused))

    spans = {part: _spans(content, names, part, path) for part, content in parts.items()}
    tables: dict[str, Table] = {}
    for name in names:
        tables |= _modality(name, parts, spans, path)
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


def _check_parts(
    parts: Mapping[str, Mapping[str, Any]], names: Sequence[str], others: Sequence[str], path: Path
) -> None:
    """Check the parts' modalities, and whether labels and IDs are there and have as many rows."""
    problems = []
    expected: dict[str, tuple[int, ...]] = {}
    for part, content in parts.items():
        rows: int | None = None
        for name in (*names, *others):
            value = content.get(name)
            if value is None:
                problems.append(f"{name}: is not in the {part} part ({path})")
                continue
            wanted = "an array of numbers" if name in names else "a list or an array with an entry a row"
            if not (_is_modality(name, value) if name in names else _is_listed(value)):
                problems.append(f"{name}: is {_described(value)} in the {part} part, expected {wanted} ({path})")
                continue
            row = value.shape[1:] if name in names else ()
            rows = len(value) if rows is None else rows
            if 0 in row:
                problems.append(f"{name}: a row is {row} in the {part} part, expected some numbers ({path})")
            elif row != expected.setdefault(name, row):
                problems.append(f"{name}: a row is {row} in the {part} part, expected {expected[name]} ({path})")
            elif len(value) != rows:
                problems.append(f"{name}: {len(value)} rows in the {part} part, expected {rows} ({path})")
    if problems:
        raise DataError(problems)


def _is_listed(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _check_filled(sizes: Mapping[str, int], path: Path) -> None:
    problems = [
        f"the {part} part is empty, expected samples in it ({path})" for part, size in sizes.items() if not size
    ]
    if problems:
        raise DataError(problems)


def _spans(content: Mapping[str, Any], names: Sequence[str], part: str, path: Path) -> dict[str, np.ndarray]:
    """Where the rows of each sequence of a part begin and end, ``(N, 2)``."""
    longest = {name: content[name].shape[1] for name in names if content[name].ndim == 3}
    spans, given = {}, set()
    for name in longest:
        lengths = content.get(name + "_lengths")
        if lengths is None:
            spans[name] = _live(content[name])
        else:
            ends = _whole(lengths, len(content[name]), f"{name}_lengths of the {part} part", path)
            spans[name] = np.stack([np.zeros_like(ends), np.maximum(ends, 1)], axis=1)
            given.add(name)
    if len(set(longest.values())) == 1:  # aligned: what is a word in one modality is one in all
        begins, ends = np.stack(list(spans.values())).T
        of_all = np.stack([begins.min(axis=1), np.minimum(ends.max(axis=1), max(longest.values()))], axis=1)
        spans |= {name: of_all for name in longest if name not in given}
    return {name: np.where(span[:, :1] < span[:, 1:], span, (0, 1)) for name, span in spans.items()}


def _live(values: np.ndarray) -> np.ndarray:
    """Where each row's first and last position lie that are not zero throughout; end before begin where there is none.

    A row that is NaN throughout has none, so that a modality that is missing does not keep others' padding.
    """
    length = values.shape[1]
    spans = [np.empty((0, 2), dtype=int)]
    for block in _blocks(values):
        live = (block != 0).any(axis=2) & ~np.isnan(block).all(axis=(1, 2))[:, None]
        some = live.any(axis=1)
        begins = np.where(some, live.argmax(axis=1), length)
        ends = np.where(some, length - live[:, ::-1].argmax(axis=1), 0)
        spans.append(np.stack([begins, ends], axis=1))
    return np.concatenate(spans)


def _modality(
    name: str, parts: Mapping[str, dict[str, Any]], spans: Mapping[str, Mapping[str, np.ndarray]], path: Path
) -> dict[str, Table]:
    """One modality of all parts, and its lengths; takes its arrays out of the parts, to free them."""
    pieces, lengths = [], []
    replaced = np.zeros(2, dtype=int)
    for part, content in parts.items():
        values = _floats(content.pop(name))
        if name.lower() in AUDIO:
            values, counts = _without_infinity(values)
            replaced += counts
        if name in spans[part]:
            begins, ends = spans[part][name].T
            values = _moved_to_front(values, begins, ends)
            lengths.append(ends - begins)
        pieces.append(values)
    _tell_replaced(name, replaced, path)
    sizes = dict(zip(parts, map(len, pieces), strict=True))
    where = f"{path}, {name}"
    tables = {name: Table(pieces[0], where, following=tuple(pieces[1:]), pieces=_pieces(sizes, where))}
    if lengths:
        where += "_lengths"
        tables[name + "_lengths"] = Table(np.concatenate(lengths), where, pieces=_pieces(sizes, where))
    return tables


def _pieces(sizes: Mapping[str, int], where: str) -> tuple[tuple[int, str], ...]:
    return tuple((size, f"{where} of the {part} part") for part, size in sizes.items())


def _floats(array: np.ndarray) -> np.ndarray:
    if array.dtype in (np.float16, np.float32):
        return array
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _without_infinity(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Zeros in the place of infinite values, and how many numbers and rows that are."""
    counts = np.zeros(2, dtype=int)
    for block in _blocks(values):
        bad = np.isinf(block)
        counts += bad.sum(), bad.reshape(len(bad), -1).any(axis=1).sum()
    if counts.any():
        values = values if values.flags.writeable else values.copy()
        for block in _blocks(values):
            block[np.isinf(block)] = 0
    return values, counts


def _tell_replaced(name: str, counts: np.ndarray, path: Path) -> None:
    if counts.any():
        logger.warning("%s: %s: %d infinite values became 0, in %d rows", path.name, name, *counts)


def _moved_to_front(values: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    for row in np.flatnonzero(begins):
        values = values if values.flags.writeable else values.copy()
        values[row, : ends[row] - begins[row]] = values[row, begins[row] : ends[row]].copy()
    return values


def _blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    step = max(1, BLOCK // max(1, int(np.prod(values.shape[1:]))))
    for start in range(0, len(values), step):
        yield values[start : start + step]


def _whole(given: Any, size: int, what: str, path: Path) -> np.ndarray:
    values = np.asarray(given).ravel()
    if values.dtype.kind not in "iuf" or len(values) != size:
        raise DataError([f"{what}: hold {_described(given)}, expected {size} whole numbers ({path})"])
    wrong = ~np.isfinite(values) | (values != np.round(values)) | (values < 0)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError([f"{what}: {values[row]:g} in row {row + 1}, expected a whole number from 0 ({path})"])
    return values.astype(int)


def _labels(pieces: Sequence[np.ndarray], sizes: Mapping[str, int], path: Path) -> Table:
    where = f"{path}, labels"
    lying = _pieces(sizes, where)
    if all(piece.size == size for piece, size in zip(pieces, sizes.values(), strict=True)):
        return Table(np.concatenate([piece.ravel() for piece in pieces]), where, pieces=lying)
    if not all(piece.ndim == 3 and piece.shape[1:] == (len(EMOTIONS), 2) for piece in pieces):
        shapes = ", ".join(str(piece.shape) for piece in pieces)
        raise DataError([f"labels: are {shapes}, expected one number a row, or yes and no for 4 emotions ({where})"])
    marks = np.concatenate(pieces) > 0.5
    no, yes = marks[..., 0], marks[..., 1]
    wrong = (no == yes).any(axis=1)
    if wrong.any():
        row = int(wrong.argmax())
        number, part = Table(marks, where, pieces=lying).lies(row)
        raise DataError(
            [f"labels: row {number} has yes and no, or neither, for {_names(no[row] == yes[row])} ({part})"]
        )
    if (no.sum(axis=1) == 1).sum() > (yes.sum(axis=1) == 1).sum():
        raise DataError([f"labels: the second of two columns must say yes, and most rows have one no in it ({where})"])
    counts = yes.sum(axis=1)
    words = np.array(EMOTIONS)[yes.argmax(axis=1)]
    skipped = {int(row): f"its emotions are {_names(yes[row])}, expected one" for row in np.flatnonzero(counts != 1)}
    return Table(words, where, skipped=skipped, pieces=lying)


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
    for given, part in zip(raw, sizes, strict=True):
        rows = [[_word(cell) for cell in np.ravel(np.asarray(row, dtype=object))] for row in given]
        if not all(rows):
            problems.append(f"id: row {rows.index([]) + 1} of the {part} part has no ID ({path})")
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
        "groups": Table(np.array(groups), f"{where}, id"),
        "splits": Table(np.array(parts), where, parted=_parted(groups, parts, where)),
    }


def _parted(groups: Sequence[str], parts: Sequence[str], where: str) -> frozenset[str]:
    """Groups that the file's own split parts."""
    parts_of: dict[str, set[str]] = {}
    for group, part in zip(groups, parts, strict=True):
        parts_of.setdefault(group, set()).add(part)
    parted = frozenset(group for group, those in parts_of.items() if len(those) > 1)
    if parted:
        text = "%s: its own split parts %d of %d videos or dialogues, such as %s"
        logger.warning(text, where, len(parted), len(parts_of), min(parted))
    return parted


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
    sizes_of = {part: sum(len(what["IDs"][d]) for d in dialogues) for part, dialogues in parts.items()}
    _check_filled(sizes_of, path)
    values = {
        name: _stacked(what[key], order, name, path)
        for name, key in (("text", "text"), ("audio", "audio"), ("vision", "visual features"))
    }
    values["audio"], counts = _without_infinity(values["audio"])
    _tell_replaced("audio", counts, path)
    counts_of = [(len(what["IDs"][dialogue]), dialogue) for _, dialogue in order]
    tables = {
        name: Table(
            array, f"{path}, {name}", pieces=tuple((n, f"{path}, {name} of dialogue {d}") for n, d in counts_of)
        )
        for name, array in values.items()
    }
    ids = [_word(case) for _, dialogue in order for case in what["IDs"][dialogue]]
    groups = [str(dialogue) for _, dialogue in order for _ in what["IDs"][dialogue]]
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
