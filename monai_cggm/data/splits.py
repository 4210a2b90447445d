# SPDX-License-Identifier: Apache-2.0
"""Splits into training, validation and test cases: by patient, seeded, and kept in a file for fair comparisons."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np

from monai_cggm.data.patients import patient_of
from monai_cggm.errors import DataError
from monai_cggm.files import atomic_path

logger = logging.getLogger(__name__)

PARTS = ("train", "validation", "test")
#: other words for them, as files have them
PART_OF = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev"), "validation"
)

#: orders of the patients that are tried where the first one does not give the sizes that were asked for
ORDERS = 100

Item = Mapping[str, Any]
Split = dict[str, list[dict[str, Any]]]


def split_cases(
    cases: Sequence[dict[str, Any]],
    *,
    sizes: Sequence[int] | None = None,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    split_file: str | Path | None = None,
    ignore_unlisted: bool = False,
    ignore_missing: bool = False,
) -> Split:
    """Split cases into training, validation and test parts; a patient's cases stay together.

    The draw depends on the set of IDs and the seed alone, not on the order of ``cases``, the machine or a version of
    NumPy.

    Args:
        cases: datalist items with ``case`` and, if it is known, ``patient``; see :func:`check_patients` for ``parted``.
            IDs in their ``skipped``, if they have that (:class:`monai_cggm.data.checks.Cases`), may stand in the file:
            they were left out for a reason that is known.
        sizes: cases in each part, which must add up to all cases.
        fractions: share of each part where ``sizes`` is None; they must add up to 1. Every part with a share above 0
            gets at least one patient.
        seed: seed of the draw.
        split_file: a file by :func:`write_split`, which wins over the draw.
        ignore_unlisted: leave cases out that the file does not list (they are logged), instead of failing.
        ignore_missing: leave IDs of the file out that are not among the cases (they are logged), instead of failing;
            for a run that skips bad cases.

    Returns:
        ``{"train": [...], "validation": [...], "test": [...]}`` with items in the order of ``cases``.

    Raises:
        DataError: where IDs and split do not fit together, or no split of these sizes keeps patients together.
        ValueError: where ``sizes`` or ``fractions`` make no sense.

    Example:
        >>> items = [{"case": f"Phantom_{i:03d}"} for i in range(6)]
        >>> {part: len(chosen) for part, chosen in split_cases(items, sizes=(4, 1, 1)).items()}
        {'train': 4, 'validation': 1, 'test': 1}
    """
    ids = [str(item["case"]) for item in cases]
    if split_file is not None:
        parts = read_split(Path(split_file))
        _check_listed(
            parts,
            ids,
            Path(split_file),
            left_out=getattr(cases, "skipped", {}),
            ignore_unlisted=ignore_unlisted,
            ignore_missing=ignore_missing,
        )
    else:
        patients = _patients(cases)
        targets = _checked_sizes(sizes, len(ids)) if sizes is not None else _sizes_of(fractions, len(ids))
        parts = _draw(patients, targets, seed, exact=sizes is not None)
    split = {part: [item for item in cases if item["case"] in chosen] for part, chosen in parts.items()}
    check_patients(split)
    return split


def fold_splits(cases: Sequence[dict[str, Any]], *, folds: int, seed: int = 0, validation: float = 0.15) -> list[Split]:
    """Split cases for cross-validation: every case is a test case once; a patient's cases stay together.

    Patients are shuffled and dealt out over the folds, the larger ones first. Of what is not tested in a fold, the
    given share of all patients, drawn anew each time, validates.

    Args:
        cases: see :func:`split_cases`.
        folds: how many, at least 2.
        seed: seed of the draw.
        validation: share of all patients.

    Returns:
        ``folds`` splits.

    Raises:
        DataError: where there are too few patients for a training, a validation and a test part in every fold.
        ValueError: for fewer than two folds.

    Example:
        >>> items = [{"case": f"Phantom_{i:03d}"} for i in range(7)]
        >>> [len(split["test"]) for split in fold_splits(items, folds=3)]
        [3, 2, 2]
    """
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")
    patients = _patients(cases)
    if len(patients) < max(folds, 3):
        raise DataError([f"{len(patients)} patients are too few for {folds} folds with a validation part each"])
    random = np.random.RandomState(seed)
    order = [list(patients)[i] for i in random.permutation(len(patients))]
    tested: list[list[str]] = [[] for _ in range(folds)]
    size = max(round(validation * len(patients)), 1)
    most = len(patients) - size - 1  # one is left to train, whoever has most of the cases
    if folds * most < len(patients):
        raise DataError([f"{len(patients)} patients are too few for {folds} folds: none would be left for training"])
    for patient in sorted(order, key=lambda patient: -len(patients[patient])):
        room = [fold for fold in tested if len(fold) < most]
        min(room, key=lambda fold: sum(len(patients[p]) for p in fold)).append(patient)
    splits = []
    for fold in tested:
        rest = [patient for patient in order if patient not in fold]
        validated = [rest[i] for i in random.permutation(len(rest))[:size]]
        chosen = {"test": fold, "validation": validated, "train": [p for p in rest if p not in validated]}
        ids = {part: {case for p in chosen[part] for case in patients[p]} for part in PARTS}
        splits.append({part: [item for item in cases if item["case"] in ids[part]] for part in PARTS})
    return splits


def write_split(split: Mapping[str, Sequence[Item]], path: str | Path, seed: int) -> None:
    """Write the IDs of a split as JSON: ``{"seed": 0, "train": [...], "validation": [...], "test": [...]}``.

    The file appears whole or not at all.
    """
    content = {"seed": seed, **{part: [str(item["case"]) for item in split[part]] for part in PARTS}}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def part_of(split: Mapping[str, Sequence[Item]], part: str) -> Sequence[Item]:
    """Return one part of a split, by name.

    Raises:
        DataError: for a part that does not exist, or in which there is nothing.

    Example:
        >>> part_of({"train": [{"case": "a"}], "validation": [], "test": [{"case": "b"}]}, "test")
        [{'case': 'b'}]
    """
    if part not in PARTS:
        raise DataError([f"part={part}: a split has the parts {', '.join(PARTS)}"])
    if not split[part]:
        raise DataError([f"the split has no case for {part}"])
    return split[part]


def check_plan(
    split: Mapping[str, Sequence[Item]],
    *,
    volumes_per_batch: int,
    epochs: int,
    val_interval: int,
    name: str = "volumes_per_batch",
) -> None:
    """Refuse a training that could not take a step, or would end without a model, before any long work.

    Args:
        split: the parts of :func:`split_cases`.
        volumes_per_batch: volumes in a batch, over all processes.
        epochs: epochs of the run.
        val_interval: epochs between validations.
        name: what the configuration calls ``volumes_per_batch``, for messages.

    Raises:
        DataError: for fewer training cases than a batch takes, no validation case, a batch that the processes do not
            divide, or a run that ends before its first validation.

    Example:
        >>> parts = {"train": [{"case": "a"}], "validation": [{"case": "b"}]}
        >>> check_plan(parts, volumes_per_batch=1, epochs=10, val_interval=5)
    """
    problems = []
    if len(split["train"]) < volumes_per_batch:
        problems.append(
            f"{len(split['train'])} training cases are fewer than {name}={volumes_per_batch}: no step could "
            f"be taken; make batches smaller (--{name}) or add cases"
        )
    if not split["validation"]:
        problems.append("the split has no validation case: no model could be chosen")
    if volumes_per_batch % idist.get_world_size():
        problems.append(f"{name}={volumes_per_batch} is no multiple of {idist.get_world_size()} processes")
    if val_interval > epochs:
        problems.append(f"val_interval={val_interval} is beyond the last of {epochs} epochs: no model would be written")
    if problems:
        raise DataError(problems)


def _patients(cases: Iterable[Item]) -> dict[str, list[str]]:
    """Patient -> case IDs, both sorted, so that a draw does not depend on the order of the files."""
    patients: dict[str, list[str]] = {}
    for item in sorted(cases, key=lambda item: str(item["case"])):
        patients.setdefault(_patient(item), []).append(str(item["case"]))
    return dict(sorted(patients.items()))


def _patient(item: Item) -> str:
    return str(item.get("patient") or patient_of(str(item["case"])))


def _checked_sizes(sizes: Sequence[int], cases: int) -> list[int]:
    text = ", ".join(map(str, sizes))
    if len(sizes) != len(PARTS) or any(int(size) != size or size < 0 for size in sizes):
        raise ValueError(f"split sizes are {text}: expected three whole numbers, for {', '.join(PARTS)}")
    if sum(sizes) != cases:
        raise DataError([f"split sizes {text} add up to {sum(sizes)}, and there are {cases} cases"])
    return [int(size) for size in sizes]


def _sizes_of(fractions: Sequence[float], cases: int) -> list[int]:
    """Whole numbers of cases nearest to the fractions (largest remainder), none of a wanted part empty."""
    text = ", ".join(map(str, fractions))
    if len(fractions) != len(PARTS) or any(f < 0 for f in fractions) or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"split fractions are {text}: expected three numbers that add up to 1")
    wanted = sum(f > 0 for f in fractions)
    if cases < wanted:
        raise DataError([f"{cases} cases cannot fill {wanted} parts (fractions {text})"])
    exact = [f * cases for f in fractions]
    sizes = [int(e + 1e-9) for e in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: sizes[i] - exact[i])
    for index in by_remainder[: cases - sum(sizes)]:
        sizes[index] += 1
    for index, fraction in enumerate(fractions):
        if fraction > 0 and sizes[index] == 0:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[index] = 1
    return sizes


def _draw(patients: Mapping[str, list[str]], targets: Sequence[int], seed: int, *, exact: bool) -> dict[str, set[str]]:
    # RandomState's stream is frozen for good (NEP 19); default_rng's may change with NumPy.
    random, names = np.random.RandomState(seed), list(patients)
    order = [names[i] for i in random.permutation(len(names))]
    parts, left = _fill(patients, order, targets)
    # Patients with several cases may leave gaps that are too small: where sizes are asked for, other orders are tried,
    # and at last the larger patients go first, which leaves little to chance.
    for again in range(ORDERS if left and exact else 0):
        order = [order[i] for i in random.permutation(len(order))]
        if again == ORDERS - 1:
            order.sort(key=lambda patient: -len(patients[patient]))
        parts, left = _fill(patients, order, targets)
        if not left:
            break
    if left and exact:
        text = ", ".join(map(str, targets))
        raise DataError([f"no split of sizes {text} was found that keeps the cases of {left[0]} together"])
    for patient in left:
        rooms = [target - len(part) for target, part in zip(targets, parts, strict=True)]
        parts[rooms.index(max(rooms))].update(patients[patient])
    for part in (part for target, part in zip(targets, parts, strict=True) if target > 0 and not part):
        # few patients with several cases each: the part with most patients gives its smallest
        inside = [[name for name in order if set(patients[name]) <= other] for other in parts]
        most = max(inside, key=len)
        if len(most) < 2:
            raise DataError([f"{len(patients)} patients cannot fill the parts of the split: one would be empty"])
        given = set(patients[min(most, key=lambda name: len(patients[name]))])
        parts[inside.index(most)] -= given
        part |= given
    return dict(zip(PARTS, parts, strict=True))


def _fill(
    patients: Mapping[str, list[str]], order: Sequence[str], targets: Sequence[int]
) -> tuple[list[set[str]], list[str]]:
    """Put each patient into the first part that has room; return the parts and the patients that fitted nowhere."""
    parts: list[set[str]] = [set() for _ in targets]
    left = []
    for patient in order:
        ids = patients[patient]
        room = next((i for i, part in enumerate(parts) if len(part) + len(ids) <= targets[i]), None)
        if room is None:
            left.append(patient)
        else:
            parts[room].update(ids)
    return parts, left


def read_split(path: Path) -> dict[str, set[str]]:
    """Read the IDs of each part from a file by :func:`write_split`.

    Raises:
        DataError: for a file that cannot be read, is no such file, or lists a case more than once.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError([f"split file {path} cannot be read: {error.strerror}"]) from error
    except ValueError as error:
        raise DataError([f"split file {path} is no JSON file: {error}"]) from error
    lists = {part: content.get(part, []) for part in PARTS} if isinstance(content, dict) else {}
    if not lists.get("train") or not all(
        isinstance(ids, list) and all(isinstance(i, str) for i in ids) for ids in lists.values()
    ):
        raise DataError([f"split file {path}: expected an object with lists of case IDs under {', '.join(PARTS)}"])
    listed = Counter(case for ids in lists.values() for case in ids)
    repeated = sorted(case for case, times in listed.items() if times > 1)
    if repeated:
        raise DataError([f"case {case}: is listed more than once ({path})" for case in repeated])
    return {part: set(ids) for part, ids in lists.items()}


def _check_listed(
    parts: dict[str, set[str]],
    ids: Sequence[str],
    path: Path,
    *,
    left_out: Container[str],
    ignore_unlisted: bool,
    ignore_missing: bool,
) -> None:
    listed = set().union(*parts.values())
    absent = sorted(case for case in listed - set(ids) if case not in left_out)  # the log has those, with the reason
    missing = [f"case {case}: is in the split and not among the cases ({path})" for case in absent]
    unlisted = [f"case {case}: is in no part of the split ({path})" for case in sorted(set(ids) - listed)]
    problems = [*([] if ignore_missing else missing), *([] if ignore_unlisted else unlisted)]
    if problems:
        raise DataError(problems)
    if missing or unlisted:
        logger.warning("Left out of the split:\n  %s", "\n  ".join([*missing, *unlisted]))


def check_patients(split: Mapping[str, Sequence[Item]]) -> None:
    """Refuse a split that has cases of one patient in two parts.

    A published split may do that: an item with ``parted`` is let pass in the ``part`` that its data give it, as long as
    all items of its patient are where the data have them.

    Raises:
        DataError: names the case, its patient and both parts.

    Example:
        >>> one = {"case": "v_1", "patient": "v", "part": "train", "parted": True}
        >>> other = {"case": "v_2", "patient": "v", "part": "test", "parted": True}
        >>> check_patients({"train": [one], "test": [other]})
        >>> check_patients({"train": [one], "validation": [other]})
        Traceback (most recent call last):
        monai_cggm.errors.DataError: case v_2: patient v is in both train and validation
    """
    placed = [(item, part) for part, items in split.items() for item in items]
    drawn = {_patient(item) for item, part in placed if not (item.get("parted") and item.get("part") == part)}
    first: dict[str, str] = {}
    for item, part in placed:
        patient = _patient(item)
        if patient in drawn and first.setdefault(patient, part) != part:
            raise DataError([f"case {item['case']}: patient {patient} is in both {first[patient]} and {part}"])
