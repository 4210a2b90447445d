# SPDX-License-Identifier: Apache-2.0
"""Write a discovered data set as nnU-Net's raw data, so that it can be trained on the same cases and the same split.

The format is that of nnU-Net 2 (Isensee et al., Nature Methods 2021), as its documentation describes it: ``imagesTr``,
``labelsTr``, ``imagesTs`` and ``dataset.json``. Labels are numbered 0, 1, 2, ... without gaps; nothing else of the
voxels and their places changes. MONAI's ``nnUNetV2Runner`` converts too; it needs nnU-Net installed and one file of all
channels a case, gives cases other names, keeps label values, and takes no split.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai_cggm.data.labels import LabelConvention, label_convention
from monai_cggm.data.layouts import LABEL
from monai_cggm.data.splits import PART_OF, PARTS, split_cases
from monai_cggm.discovery.convert import Target, links_out, refuse_folder, write_volumes
from monai_cggm.discovery.dataset_json import BACKGROUND, DATASET, IGNORE, SPLITS
from monai_cggm.discovery.found import Found, FoundCase
from monai_cggm.discovery.survey import Survey, survey_cases
from monai_cggm.errors import DataError, some
from monai_cggm.files import atomic_path

ENDING = ".nii.gz"

#: Part of a split -> folders of images and labels. nnU-Net knows no labelsTs; who scores its predictions does.
FOLDERS = {
    "train": ("imagesTr", "labelsTr"),
    "validation": ("imagesTr", "labelsTr"),
    "test": ("imagesTs", "labelsTs"),
}

#: Keys of ours -> names of channels by which nnU-Net normalises in another way than z-scores.
_CHANNEL_NAMES = {"ct": "CT"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
#: nnU-Net takes a preprocessed case ID_seg for the label of a case ID.
_LABEL_END = "_seg"

Parts = Mapping[str, Sequence[FoundCase]]
Tables = Mapping[str, Mapping[int, int]]


@dataclass(frozen=True)
class NnunetDataset:
    """An nnU-Net data set that was written.

    Attributes:
        folder: ``DatasetXXX_Name``.
        labels: name -> class, or the classes of a region; as in ``dataset.json``.
        original_values: class -> values in the label files that it stands for, the one to write back first.
        parts: part -> IDs of its cases; ``train`` and ``validation`` are both in ``imagesTr``.
        splits: ``splits_final.json``, None where there is no validation part.
        left_out: cases without a label, of which the split file knows nothing.
    """

    folder: Path
    labels: Mapping[str, int | list[int]]
    original_values: Mapping[int, tuple[int, ...]]
    parts: Mapping[str, tuple[str, ...]]
    splits: Path | None
    left_out: tuple[str, ...]


def write_nnunet(
    found: Found,
    out: str | Path,
    *,
    dataset_id: int,
    name: str,
    split: str | Path | None = None,
    regions: Mapping[str, Sequence[int]] | None = None,
    workers: int = 0,
    progress: bool = True,
) -> NnunetDataset:
    """Write ``OUT/DatasetXXX_Name`` with all volumes as NIfTI, channels in the order of the modalities.

    Images keep their values and grids, and nothing else of a header comes along; as in
    :func:`monai_cggm.discovery.write_datalist`, files are written whole or not at all, are the same bytes each time,
    and are kept where they were made from the same sources before. ``dataset.json`` comes last: a folder that has it
    is complete.

    The values of the labels, in order, become the classes 0, 1, 2, ...; where a datalist tells the cases' label
    conventions, the classes are those of the convention. ``original_label_values`` in ``dataset.json``, which nnU-Net
    does not read, has the way back. Value 0 is the background.

    Cases of the test part go to ``imagesTs``, and their labels to ``labelsTs``. Of a validation part, one fold is
    written, ``splits_final.json``, which nnU-Net looks for in ``nnUNet_preprocessed/DatasetXXX_Name``.

    Args:
        found: see :func:`monai_cggm.discovery.discover`.
        out: the folder of raw data sets (``nnUNet_raw``), outside of the data.
        dataset_id: 1 to 999; nnU-Net's own examples have the first hundreds.
        name: letters, digits, ``_`` and ``-``.
        split: a file by :func:`monai_cggm.data.splits.write_split`; the data set's own sections otherwise. Cases
            without a label are not among those that it has to list.
        regions: name -> values in the label files, for training on regions, which may be nested. Every value but 0
            has to be in one. Default: the data set's own, where it has any; an empty mapping trains on labels.
        workers: threads that read and write.
        progress: show progress bars.

    Returns:
        What was written.

    Raises:
        DataError: lists everything that is wrong with cases, split, regions or folder, before anything is written: a
            case that lacks a modality or, for training, its label; volumes of a case on different grids; a folder that
            has files of other cases.
        ValueError: where ``dataset_id`` or ``name`` makes no sense for any data.

    Example:
        >>> import tempfile
        >>> import nibabel as nib
        >>> import numpy as np
        >>> from monai_cggm.discovery import discover
        >>> with tempfile.TemporaryDirectory() as name:
        ...     (Path(name) / "data").mkdir()
        ...     for key, value in (("flair", 7), ("t1", 9), ("seg", 4)):
        ...         voxels = np.zeros((4, 4, 4), np.uint8)
        ...         voxels[1, 1, 1] = value
        ...         nib.save(nib.Nifti1Image(voxels, np.eye(4)), Path(name) / f"data/p01_{key}.nii.gz")
        ...     found = discover(Path(name) / "data")
        ...     made = write_nnunet(found, Path(name) / "raw", dataset_id=501, name="Demo", progress=False)
        ...     files = sorted(path.name for path in made.folder.rglob("*.nii.gz"))
        >>> made.folder.name, files
        ('Dataset501_Demo', ['p01.nii.gz', 'p01_0000.nii.gz', 'p01_0001.nii.gz'])
        >>> made.labels, made.original_values
        ({'background': 0, 'label_4': 1}, {0: (0,), 1: (4,)})
    """
    folder = Path(out).expanduser().absolute() / _folder_name(dataset_id, name)
    refuse_folder(folder, found)
    parts, left_out = _parts(found, split)
    used = found.without(left_out)
    problems = [*_place_problems(folder, found, dataset_id), *_case_problems(parts, found)]
    if problems:
        raise DataError(problems)
    survey = survey_cases(used, workers=workers, progress=progress, images=False)
    tables = _tables(used, survey)
    values = _values(tables)
    try:
        wanted = found.label_regions if regions is None else regions
        labels, order = _labels(values, tables, found.label_names or {}, wanted)
    except DataError as error:
        if regions is not None or not found.label_regions:
            raise
        own = f"{found.source} has regions of its own: give others (--region), or train on labels (--no-regions)"
        raise DataError([*error.problems, own]) from error
    targets = list(_targets(parts, tables, found.modalities, folder))
    splits = folder / SPLITS if parts["validation"] else None
    problems = [*links_out(targets, folder), *_strays(folder, targets, splits)]
    if problems:
        raise DataError(problems)
    write_volumes(targets, workers=workers, progress=progress)
    ids = {part: tuple(case.case_id for case in cases) for part, cases in parts.items()}
    if splits is not None:
        _write_json(splits, [{"train": ids["train"], "val": ids["validation"]}])
    content = {
        "channel_names": {str(n): _CHANNEL_NAMES.get(key, key) for n, key in enumerate(found.modalities)},
        "labels": labels,
        **({"regions_class_order": order} if order else {}),
        "numTraining": len(ids["train"]) + len(ids["validation"]),
        "file_ending": ENDING,
        "name": name,
        "original_label_values": {str(number): originals for number, originals in values.items()},
    }
    if order:  # regions take the place of labels, whose names would be lost
        names = _class_names(values, found.label_names or {})
        content["label_names"] = {str(number): name for name, number in names.items()}
    _write_json(folder / DATASET, content)
    return NnunetDataset(folder, labels, values, ids, splits, left_out)


def _folder_name(dataset_id: int, name: str) -> str:
    if not 1 <= dataset_id <= 999:
        raise ValueError(f"dataset_id must be a whole number from 1 to 999, got {dataset_id}")
    if not _NAME.fullmatch(name):
        raise ValueError(f"name must be letters, digits, _ and -, got {name!r}")
    return f"Dataset{dataset_id:03d}_{name}"


def _parts(found: Found, split: str | Path | None) -> tuple[Parts, tuple[str, ...]]:
    """Cases by part, and those that are in none."""
    if split is None:
        return {part: [case for case in found.cases if PART_OF[case.section] == part] for part in PARTS}, ()
    labelled = {case.case_id: case for case in found.cases if case.label is not None}
    items = [{"case": case.case_id, "patient": case.patient} for case in labelled.values()]
    try:
        chosen = split_cases(items, split_file=split)
    except DataError as error:
        advice = found.patients_advice
        raise DataError([text + advice * ("patient" in text) for text in error.problems]) from error
    left_out = tuple(case.case_id for case in found.cases if case.label is None)
    return {part: [labelled[item["case"]] for item in chosen[part]] for part in PARTS}, left_out


def _place_problems(folder: Path, found: Found, dataset_id: int) -> list[str]:
    problems = []
    others = [path.name for path in folder.parent.glob(f"Dataset{dataset_id:03d}*") if path.name != folder.name]
    if others:
        problems.append(f"{folder.parent} has {some(sorted(others))}: nnU-Net wants one data set an ID, choose another")
    sources = [source for case in found.cases for source in case.sources().values()]
    if any(folder.resolve() in source.path.resolve().parents for source in sources):
        problems.append(f"{folder} holds volumes of {found.source}, which would be written over: choose another ID")
    return problems


def _case_problems(parts: Parts, found: Found) -> Iterator[str]:
    if not parts["train"]:
        yield f"{found.source}: no case is for training"
    for part, cases in parts.items():
        for case in cases:
            missing = [key for key in found.modalities if key not in case.images]
            if missing:
                yield (
                    f"case {case.case_id}: lacks {', '.join(missing)} ({case.place}), expected all of "
                    f"{', '.join(found.modalities)}: nnU-Net has no place for a missing one"
                )
            if case.label is None and part != "test":
                yield f"case {case.case_id}: has no label ({case.place}), expected one in the part {part}"
            if case.case_id.endswith(_LABEL_END):
                yield f"case {case.case_id}: ends in {_LABEL_END}, which nnU-Net takes for a label: give it another ID"


def _tables(found: Found, survey: Survey) -> Tables:
    """Case -> value in its label -> class."""
    labelled = [case for case in found.cases if case.label is not None]
    if any(case.convention for case in labelled):
        return _told_tables(labelled, survey)
    _refuse_mixture(labelled)
    values = sorted({0, *survey.label_values} | found.named_values)
    table = {value: number for number, value in enumerate(values)}
    return {case.case_id: table for case in labelled}


def _told_tables(cases: Sequence[FoundCase], survey: Survey) -> Tables:
    """The tables of the conventions that a datalist tells."""
    surveys = {one.case_id: one for one in survey.cases}
    conventions: dict[str, LabelConvention] = {}
    problems = []
    for case in cases:
        try:
            if case.convention is None:
                raise ValueError("nothing tells its label convention ('labels'), and of others the datalist does")
            convention = label_convention(case.convention)
            unknown = sorted(set(surveys[case.case_id].label_values) - set(convention.to_class))
            if unknown:
                raise ValueError(f"label values {unknown} are not in the map {convention.name}")
            conventions[case.case_id] = convention
        except ValueError as error:
            problems.append(f"case {case.case_id}: {error} ({case.place})")
    counts = {convention.name: convention.num_classes for convention in conventions.values()}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} has {count}" for name, count in counts.items())
        problems.append(f"label conventions have different numbers of classes ({shown}), expected one number")
    if problems:
        raise DataError(problems)
    return {case_id: convention.to_class for case_id, convention in conventions.items()}


def _refuse_mixture(cases: Sequence[FoundCase]) -> None:
    """Refuse cases whose IDs tell that the same value means different things in them."""
    example = {name: case.case_id for case in cases if (name := case.told_convention()) is not None}
    if len(example) > 1:
        shown = ", ".join(f"{case_id} {name}" for name, case_id in example.items())
        raise DataError(
            [f"the cases have different label conventions by their IDs ({shown}): give a datalist with 'labels'"]
        )


def _values(tables: Tables) -> dict[int, tuple[int, ...]]:
    """Class -> the values that become it in any case, in the order of the tables."""
    values: dict[int, dict[int, None]] = {}
    for table in tables.values():
        for value, number in table.items():
            values.setdefault(number, {})[value] = None
    return {number: tuple(values[number]) for number in sorted(values)}


def _labels(
    values: Mapping[int, tuple[int, ...]],
    tables: Tables,
    label_names: Mapping[int, str],
    regions: Mapping[str, Sequence[int]],
) -> tuple[dict[str, int | list[int]], list[int]]:
    """``labels`` of ``dataset.json``, and ``regions_class_order``, which is empty without regions."""
    names = _class_names(values, label_names)
    if names.get(IGNORE, max(values)) != max(values):
        raise DataError([f"the label {IGNORE!r} is value {values[names[IGNORE]][0]}, nnU-Net wants it to be the last"])
    if not regions:
        return {**names}, []
    ignored = {IGNORE: names[IGNORE]} if IGNORE in names else {}
    wanted = _regions(regions, values, tables, set(values) - {0, *ignored.values()})
    # An integer where there is one class: older versions leave out a list of one.
    joined: dict[str, int | list[int]] = {
        region: sorted(classes) if len(classes) > 1 else min(classes) for region, classes in wanted.items()
    }
    return {BACKGROUND: 0, **joined, **ignored}, _order(wanted)


def _class_names(values: Mapping[int, tuple[int, ...]], label_names: Mapping[int, str]) -> dict[str, int]:
    names = {BACKGROUND: 0}
    for number, originals in values.items():
        if number > 0:
            plain = f"label_{originals[0]}" if len(originals) == 1 else f"class_{number}"
            name = label_names.get(originals[0], plain)
            name = IGNORE if name.lower() == IGNORE else name
            names[name if name not in names else f"{name}_{originals[0]}"] = number
    return names


def _regions(
    regions: Mapping[str, Sequence[int]],
    values: Mapping[int, tuple[int, ...]],
    tables: Tables,
    classes: set[int],
) -> dict[str, set[int]]:
    """Region -> classes, the largest first, as nnU-Net paints them over each other."""
    of_value: dict[int, set[int]] = {}
    for table in tables.values():
        for value, number in table.items():
            of_value.setdefault(value, set()).add(number)
    problems = []
    made: dict[str, set[int]] = {}
    for name, originals in regions.items():
        if not name or name in (BACKGROUND, IGNORE):
            problems.append(f"region {name!r}: expected another name")
        strangers = [value for value in originals if not of_value.get(value, set()) <= classes or value not in of_value]
        if strangers or not originals:
            known = ", ".join(str(value) for value in sorted(of_value) if of_value[value] <= classes)
            found = ", ".join(map(str, strangers)) or "no value"
            problems.append(f"region {name}: found {found}, expected values of the labels: {known}")
        chosen = [{v for v in t if t[v] in {t.get(own) for own in originals}} for t in tables.values()]
        merged = sorted(set().union(*chosen) - set(originals)) if not strangers else []
        if merged:
            problems.append(f"region {name}: {some(merged)} and a value of it are one class, expected both or none")
        torn = [value for value in originals if len(of_value.get(value, ())) > 1]
        if torn:
            problems.append(f"region {name}: {some(torn)} means different things in cases of different conventions")
        made[name] = {number for value in originals for number in of_value.get(value, ())}
    uncovered = sorted(classes - set().union(*made.values()))
    if uncovered and not problems:
        shown = ", ".join(str(values[number][0]) for number in uncovered)
        problems.append(f"values {shown} are in no region, expected every value but 0 in one: nnU-Net knows no others")
    if problems:
        raise DataError(problems)
    return dict(sorted(made.items(), key=lambda item: -len(item[1])))


def _order(regions: Mapping[str, set[int]]) -> list[int]:
    """The class that nnU-Net paints for each region, one after the other, to make a label map of regions.

    Painting all regions that a class is in, the last one must leave a class that is in the same regions.

    Example:
        >>> _order({"WT": {1, 2, 3}, "TC": {1, 3}, "ET": {3}})
        [2, 1, 3]
    """
    classes = sorted(set().union(*regions.values()))
    within = {number: tuple(name for name in regions if number in regions[name]) for number in classes}
    painted: dict[str, int] = {}
    for number, names in within.items():
        rival = painted.setdefault(names[-1], number)
        if within[rival] != names:
            shown = " and ".join(dict.fromkeys([*within[rival], *names]))
            raise DataError(
                [
                    f"regions {shown} overlap and none is in the other: nnU-Net cannot tell classes from them, "
                    "expected nested regions, or one more for the overlap"
                ]
            )
    return [painted.get(name, min(members)) for name, members in regions.items()]


def _targets(parts: Parts, tables: Tables, modalities: Sequence[str], folder: Path) -> Iterator[Target]:
    for part, cases in parts.items():
        images, labels = (folder / name for name in FOLDERS[part])
        for case in cases:
            for channel, key in enumerate(modalities):
                file = images / f"{case.case_id}_{channel:04d}{ENDING}"
                yield Target(case.case_id, key, case.images[key], file)
            if case.label is not None:
                file = labels / f"{case.case_id}{ENDING}"
                yield Target(case.case_id, LABEL, case.label, file, tables[case.case_id])


def _strays(folder: Path, targets: Sequence[Target], splits: Path | None) -> list[str]:
    """Problems of files that nnU-Net would take for cases of this data set, or for its split."""
    expected = {target.file for target in targets}
    places = dict.fromkeys(name for names in FOLDERS.values() for name in names)
    there = [path for name in places if (folder / name).is_dir() for path in sorted((folder / name).iterdir())]
    strays = [path for path in there if path.name.endswith(ENDING) and path not in expected]
    if splits is None and (folder / SPLITS).exists():
        strays.append(folder / SPLITS)
    if not strays:
        return []
    shown = some(path.relative_to(folder).as_posix() for path in strays)
    return [f"{folder} has {len(strays)} files of no case of this data set or split ({shown}): remove them"]


def _write_json(path: Path, content: Any) -> None:
    with atomic_path(path) as temporary:
        # In the order of writing: nnU-Net paints regions in the order of their names here.
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
