# SPDX-License-Identifier: Apache-2.0
"""nnU-Net's folders and the Decathlon's, which a ``dataset.json`` describes."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_cggm.data.layouts import LABEL
from monai_cggm.discovery.found import Draft, FoundCase, Listing, Source, kind_of, list_volumes, stem_of
from monai_cggm.discovery.names import modality_of
from monai_cggm.discovery.sources import read_grid
from monai_cggm.errors import DataError, some

DATASET, SPLITS = "dataset.json", "splits_final.json"
#: nnU-Net's names for the label 0, and for that whose voxels train nothing.
BACKGROUND, IGNORE = "background", "ignore"
_CHANNEL = re.compile(r"(?P<id>.+)_(?P<channel>\d{4})", re.DOTALL)
#: What an evaluation of the parser could begin with: names from a file come into configurations.
_EVALUATED = re.compile(r"[$@%\x00-\x1f]")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: where it is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError([f"{path} is no JSON file: {error}"]) from error


def described_dataset(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's ``dataset.json`` that names channels, None where there is none."""
    path = folder / DATASET
    content = read_json(path) if path.is_file() else None
    return content if isinstance(content, dict) and {"channel_names", "modality"} & set(content) else None


def read_dataset_json(content: Mapping[str, Any], root: Path) -> Draft:
    """Read an nnU-Net or a Decathlon folder.

    nnU-Net has a file a channel, ``imagesTr/ID_0000.nii.gz``; the Decathlon (and MONAI's ``DecathlonDataset``) one 4-D
    file a case, ``imagesTr/ID.nii.gz``. Which of the two it is, the files' names tell: version 1 of nnU-Net has the
    Decathlon's ``dataset.json``.

    Args:
        content: of ``dataset.json``: ``channel_names`` (nnU-Net 2) or ``modality``, and ``labels``.
        root: its folder.

    Raises:
        DataError: where the files do not fit it, or it cannot be understood.
    """
    where = root / DATASET
    channels = _channels(content.get("channel_names", content.get("modality")), where)
    notes: list[str] = []
    label_names = label_names_of(content.get("labels"), where, notes)
    regions = label_regions_of(content.get("labels"), where, notes)
    folders = {name: list_volumes(root / name) for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs")}
    training = folders["imagesTr"].volumes
    if not training and not folders["imagesTr"].pictures and not isinstance(content.get("dataset"), dict):
        raise DataError([f"{where} does not fit the files: there is no volume in {root / 'imagesTr'}"])
    if folders["imagesTr"].pictures and not training:
        raise DataError(
            [f"{root / 'imagesTr'} holds 2-D images ({some(p.name for p in folders['imagesTr'].pictures)})"]
        )
    if training and not any(_CHANNEL.fullmatch(stem_of(volume)) for volume in training):
        draft = _decathlon(content, root, channels, folders)
    else:
        draft = _nnunet(content, root, channels, folders)
    count = sum(case.section != "test" for case in draft.cases)
    stated = content.get("numTraining")
    if isinstance(stated, int) and stated != count:
        notes.append(f"{DATASET} says {stated} training cases, {count} are here.")
    named = ", ".join(f"{name} (channel {channel}, {text!r})" for channel, (name, text) in channels.items())
    kind = "an nnU-Net folder" if draft.layout == "nnunet" else "a Decathlon folder, one 4-D file a case"
    draft.notes = [f"{DATASET} describes {kind}: {named}, in this order.", *notes, *draft.notes]
    if regions:  # which have no place for the names of what they join
        label_names = {**(label_names or {}), **(label_names_of(content.get("label_names"), where, notes) or {})}
    draft.label_names = label_names
    draft.label_regions = regions
    return draft


def listed_volume(text: Any, root: Path) -> Source:
    """The volume that a JSON file names.

    Raises:
        ValueError: where it is not there, or is no volume.
    """
    if not isinstance(text, str):
        raise ValueError(f"is {text!r}, expected a path")
    if not (root / Path(text).expanduser()).exists():
        raise ValueError(f"{text} is not there")
    return volume_at(text, root)


def volume_at(text: Any, root: Path) -> Source:
    """The volume that a JSON file names, which may not be there.

    Raises:
        ValueError: where it is no volume by its name.
    """
    if not isinstance(text, str):
        raise ValueError(f"is {text!r}, expected a path")
    path = root / Path(text).expanduser()
    kind = kind_of(path)
    if kind is None:
        missing = "" if path.exists() else "not there, or "
        raise ValueError(f"{text} is {missing}no volume: expected NIfTI, NRRD, MHA or the folder of a DICOM series")
    return Source(path, kind=kind)


def channel_count(volume: Source) -> int:
    """How many volumes a file holds.

    Raises:
        ValueError: as :func:`monai_cggm.discovery.sources.read_grid`.
    """
    # Of a named channel: read_grid refuses a file of several that nothing names.
    return read_grid(Source(volume.path, 0, volume.kind)).channels


def _channels(named: Any, where: Path) -> dict[int, tuple[str, str]]:
    """Channel number -> our key and the name as it is written, in the order of the numbers."""
    items = enumerate(named) if isinstance(named, list) else named.items() if isinstance(named, dict) else ()
    try:
        texts = {int(number): str(name) for number, name in items}
    except ValueError as error:
        raise DataError([f"{where}: channels are {named!r}, expected numbers with names"]) from error
    if not texts:
        raise DataError([f"{where}: channels are {named!r}, expected numbers with names"])
    keys = {number: modality_of(text) for number, text in sorted(texts.items())}
    repeated = len(set(keys.values())) < len(keys)
    return {n: (f"{key}_{n}" if repeated else key, texts[n]) for n, key in keys.items()}


def label_names_of(labels: Any, where: Path, notes: list[str]) -> dict[int, str] | None:
    """Value -> name, from name -> value (nnU-Net 2) or value -> name (the Decathlon).

    Args:
        labels: what a JSON file says; None where it says nothing.
        where: the file, for messages.
        notes: gets what the reader should know.

    Raises:
        DataError: where it cannot be understood.
    """
    if labels is None:
        return None
    if not isinstance(labels, dict):
        raise DataError([f"{where}: labels are {labels!r}, expected values with names"])
    names: dict[int, str] = {}
    for key, value in labels.items():
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(value, list):
            continue  # a region, see label_regions_of
        name, number = (key, value) if isinstance(value, int) else (value, key)
        try:
            names[int(number)] = str(name)
        except (TypeError, ValueError) as error:
            raise DataError([f"{where}: label {key!r}: {value!r}, expected a whole number and a name"]) from error
    negative = [f"{name} ({value})" for value, name in names.items() if value < 0]
    if negative:
        raise DataError([f"{where}: labels {some(negative)} are negative, expected values of 0 or more"])
    if not names:
        return None
    safe = {value: _EVALUATED.sub("", name).strip() or f"label_{value}" for value, name in names.items()}
    if safe != names:
        notes.append(f"Names of labels without $, @ and %: {some(safe[v] for v in safe if safe[v] != names[v])}.")
    return dict(sorted(safe.items()))


def label_regions_of(labels: Any, where: Path, notes: list[str]) -> dict[str, tuple[int, ...]]:
    """Regions of several label values that nnU-Net's labels name, and with them those of one; none without the former.

    Args:
        labels: what a JSON file says, understood by :func:`label_names_of`.
        where: the file, for messages.
        notes: gets what the reader should know.

    Raises:
        DataError: as :func:`regions_of`.

    Example:
        >>> labels = {"background": 0, "whole tumour": [1, 2], "core": 2, "ignore": 3}
        >>> label_regions_of(labels, Path("dataset.json"), [])
        {'whole_tumour': (1, 2), 'core': (2,)}
    """
    if not isinstance(labels, dict) or not any(isinstance(v, list) and len(v) != 1 for v in labels.values()):
        return {}
    named = {key: value for key, value in labels.items() if value not in (0, [0]) and str(key).lower() != IGNORE}
    regions = regions_of(named, where)
    notes.append(f"{where.name} joins label values to regions: {regions_in_words(regions)}.")
    return regions


def regions_of(named: Any, where: Path) -> dict[str, tuple[int, ...]]:
    """Regions under names that configurations and tables can have: letters, digits and ``_``, each once, none ``mean``.

    Args:
        named: region -> value or list of values, of a JSON file.
        where: the file, for messages.

    Raises:
        DataError: where a region is not made of whole numbers above 0, or has a name that labels have.

    Example:
        >>> regions_of({"whole tumour": [1, 2], "whole_tumour": 2, "2nd": 1, "mean": 1}, Path("dataset.json"))
        {'whole_tumour': (1, 2), 'whole_tumour_2': (2,), 'region_2nd': (1,), 'region_mean': (1,)}
    """
    if not isinstance(named, dict):
        raise DataError([f"{where}: regions are {named!r}, expected names with label values"])
    regions: dict[str, tuple[int, ...]] = {}
    problems = []
    for key, value in named.items():
        values = tuple(value if isinstance(value, list) else [value])
        if not values or not all(type(one) is int and one > 0 for one in values):
            problems.append(f"{where}: region {key!r}: {value!r}, expected whole numbers above 0, the background")
        if str(key).lower() in (BACKGROUND, IGNORE):
            problems.append(f"{where}: region {key!r}: expected another name, this one is nnU-Net's for a label")
        name = re.sub(r"[^A-Za-z0-9]+", "_", str(key)).strip("_")
        # Scores have a column of the regions' mean.
        name = name if name[:1].isalpha() and name != "mean" else f"region_{name}"
        unique, number = name, 1
        while unique in regions:
            number += 1
            unique = f"{name}_{number}"
        regions[unique] = tuple(dict.fromkeys(values))
    if problems:
        raise DataError(problems)
    return regions


def regions_in_words(regions: Mapping[str, Sequence[int]]) -> str:
    """Regions as ``--region`` takes them.

    Example:
        >>> regions_in_words({"WT": (1, 2, 4), "ET": (4,)})
        'WT=1,2,4; ET=4'
    """
    return "; ".join(f"{name}={','.join(map(str, values))}" for name, values in regions.items())


def _nnunet(
    content: Mapping[str, Any], root: Path, channels: Mapping[int, tuple[str, str]], folders: Mapping[str, Listing]
) -> Draft:
    problems: list[str] = []
    cases: list[FoundCase] = []
    labels = {name: _labels_in(folders[name], problems) for name in ("labelsTr", "labelsTs")}
    validated = _one_fold(root)
    for folder, section in (("imagesTr", "training"), ("imagesTs", "test")):
        groups: dict[str, dict[int, Source]] = defaultdict(dict)
        for volume in folders[folder].volumes:
            match = _CHANNEL.fullmatch(stem_of(volume))
            number = int(match["channel"]) if match else -1
            if match is None or number not in channels:
                expected = f"names that end in {some(f'_{n:04d}' for n in channels)}"
                problems.append(f"{volume.path} fits no channel of {DATASET}: expected {expected}")
            elif number in groups[match["id"]]:
                rival = groups[match["id"]][number].path
                problems.append(f"{volume.path} and {rival} are one channel of one case, expected one file")
            else:
                groups[match["id"]][number] = volume
        for case_id, files in sorted(groups.items()):
            images = {channels[number][0]: files[number] for number in channels if number in files}
            label = labels[folder.replace("images", "labels")].get(case_id)
            part = "validation" if section == "training" and case_id in validated else section
            cases.append(FoundCase(case_id, "", images, label, part, str(root / folder)))
    cases += _listed_elsewhere(content, root, channels, problems)
    strays = sorted(set(labels["labelsTr"]) - {case.case_id for case in cases})
    if strays:
        problems.append(f"{len(strays)} labels have no image in {root / 'imagesTr'}: {some(strays)}")
    count = sum(case.section == "validation" for case in cases)
    notes = [f"{SPLITS} has one fold: its validation cases ({count}) are the validation part."] if count else []
    return Draft("nnunet", cases, tuple(name for name, _ in channels.values()), notes=notes, problems=problems)


def _labels_in(listing: Listing, problems: list[str]) -> dict[str, Source]:
    """Case -> its label."""
    labels: dict[str, Source] = {}
    for volume in listing.volumes:
        case_id = stem_of(volume)
        rival = labels.setdefault(case_id, volume)
        if rival is not volume:
            problems.append(f"case {case_id}: {volume.path} and {rival.path} are both its label, expected one file")
    return labels


def _one_fold(root: Path) -> set[str]:
    """Cases that validate, where a split lies beside the data and has one fold, as :mod:`.nnunet` writes it."""
    folds = read_json(root / SPLITS) if (root / SPLITS).is_file() else None
    if not isinstance(folds, list) or len(folds) != 1 or not isinstance(folds[0], dict):
        return set()
    train, validation = folds[0].get("train"), folds[0].get("val")
    if not isinstance(train, list) or not isinstance(validation, list):
        return set()
    return {case_id for case_id in validation if isinstance(case_id, str)} if train else set()


def _listed_elsewhere(
    content: Mapping[str, Any], root: Path, channels: Mapping[int, tuple[str, str]], problems: list[str]
) -> list[FoundCase]:
    """Cases of nnU-Net 2 whose files ``dataset`` lists, wherever they are."""
    listed = content.get("dataset")
    cases = []
    for case_id, entry in listed.items() if isinstance(listed, dict) else ():
        try:
            if not isinstance(entry, dict) or not isinstance(entry.get("images"), list):
                raise ValueError("expected 'images', one path a channel, and 'label'")
            if len(entry["images"]) != len(channels):
                raise ValueError(f"has {len(entry['images'])} images, expected {len(channels)}, one a channel")
            names = [name for name, _ in channels.values()]
            images = {name: listed_volume(text, root) for name, text in zip(names, entry["images"], strict=True)}
            label = listed_volume(entry["label"], root) if entry.get("label") else None
            cases.append(FoundCase(case_id, "", images, label, place=str(root / DATASET)))
        except ValueError as error:
            problems.append(f"case {case_id}: {error} ({root / DATASET})")
    return cases


def _decathlon(
    content: Mapping[str, Any], root: Path, channels: Mapping[int, tuple[str, str]], folders: Mapping[str, Listing]
) -> Draft:
    problems: list[str] = []
    cases: list[FoundCase] = []
    for section, entries in _decathlon_entries(content, folders, problems).items():
        for image, label in entries:
            try:
                volume = listed_volume(image, root)
                found = channel_count(volume)
                if found != len(channels):
                    raise ValueError(f"{image} has {found} channel{'s' * (found > 1)}, expected {len(channels)}")
                target = listed_volume(label, root) if label and section == "training" else None
            except ValueError as error:
                name = re.sub(r"\.nii(\.gz)?$", "", Path(str(image)).name, flags=re.IGNORECASE)
                problems.append(f"case {name}: {error} ({root / DATASET})")
                continue
            images = {
                name: Source(volume.path, position if found > 1 else None, volume.kind)
                for position, (name, _) in enumerate(channels.values())
            }
            case_id = stem_of(volume)
            cases.append(FoundCase(case_id, "", images, target, section, str(volume.path)))
    return Draft("msd", cases, tuple(name for name, _ in channels.values()), problems=problems)


def _decathlon_entries(
    content: Mapping[str, Any], folders: Mapping[str, Listing], problems: list[str]
) -> dict[str, list[tuple[Any, Any]]]:
    """Section -> image and label paths, as ``dataset.json`` lists them, or as the folders hold them."""
    entries: dict[str, list[tuple[Any, Any]]] = {}
    for section, folder in (("training", "imagesTr"), ("test", "imagesTs")):
        listed = content.get(section)
        if isinstance(listed, list):
            pairs = [(e.get("image"), e.get(LABEL)) if isinstance(e, dict) else (e, None) for e in listed]
        else:
            labels = _labels_in(folders["labelsTr"], problems) if section == "training" else {}
            own = {case_id: str(volume.path.absolute()) for case_id, volume in labels.items()}
            volumes = folders[folder].volumes
            pairs = [(str(volume.path.absolute()), own.get(stem_of(volume))) for volume in volumes]
        entries[section] = pairs
    return entries
