# SPDX-License-Identifier: Apache-2.0
"""BIDS, whose file names say everything, and a datalist."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_cggm.data.layouts import LABEL, datalist_sections
from monai_cggm.discovery.dataset_json import (
    channel_count,
    label_names_of,
    label_regions_of,
    listed_volume,
    read_json,
    regions_in_words,
    regions_of,
    volume_at,
)
from monai_cggm.discovery.found import CasesFiles, Draft, FoundCase, Listing, Source, kind_of, rival_problems, stem_of
from monai_cggm.discovery.names import (
    IGNORED,
    fits,
    key_of,
    modality_of,
    vocabulary_of,
    without_words,
    words_of,
)
from monai_cggm.errors import DataError, some

_BIDS_CASE = re.compile(r"(?P<patient>sub-[A-Za-z0-9]+)(_(?P<session>ses-[A-Za-z0-9]+))?_.+")
#: Folders of time series and of what belongs to these.
_NOT_ANATOMY = {"func", "fmap", "dwi", "perf", "eeg", "meg", "ieeg"}
_BIDS_LABELS = {"dseg", "mask", "label", "seg", "roi"}
#: Keys of a datalist's item that are no modality; `mask` is what monai-cggm align makes.
_NO_MODALITY = {LABEL, "mask", "case", "patient", "labels", "fold"}


def is_bids(listing: Listing, root: Path) -> bool:
    """Whether a folder has files ``sub-*/…/sub-*_*``, named after the folder that they are in."""
    for volume in listing.volumes:
        parts = volume.path.relative_to(root).parts
        if len(parts) > 1 and parts[0].startswith("sub-") and parts[-1].startswith(f"{parts[0]}_"):
            return True
    return False


def read_bids(
    listing: Listing,
    root: Path,
    *,
    patterns: Mapping[str, str] | None = None,
    label_pattern: str | None = None,
    only: bool = False,
) -> Draft:
    """Read a BIDS folder: ``sub-*/[ses-*/]anat/*_FLAIR.nii.gz``, labels as ``…_{dseg,mask,label}.nii.gz`` anywhere.

    Labels are mostly in ``derivatives``. Other files there are left out, unless a pattern says otherwise. A session is
    a case, and a subject with all its sessions one patient.

    Args:
        listing: the volumes below ``root``.
        root: the folder.
        patterns: modality -> pattern, see :func:`monai_cggm.discovery.recognise.recognise`.
        label_pattern: the like for the label.
        only: whether what no pattern fits is no modality.
    """
    chosen = {**(patterns or {}), **({LABEL: label_pattern} if label_pattern else {})}
    groups: dict[tuple[str, str], dict[str, list[Source]]] = defaultdict(lambda: defaultdict(list))
    ignored: list[str] = []
    doubts: list[str] = []
    for volume in listing.volumes:
        match = _BIDS_CASE.fullmatch(stem_of(volume))
        keys = _bids_keys(volume, root, chosen, only=only) if match else []
        if match and len(keys) == 1:
            session = match["session"]
            case_id = f"{match['patient']}_{session}" if session else match["patient"]
            groups[case_id, match["patient"]][keys[0]].append(volume)
        elif keys:
            doubts.append(f"{volume.path} fits the patterns of {' and '.join(keys)}, expected one")
        else:
            ignored.append(volume.path.name)
    images = {place: files for place, files in groups.items() if set(files) - {LABEL}}
    everywhere = CasesFiles(list(images.values()), root, listing.volumes)
    cases = [
        FoundCase(
            case_id,
            patient,
            {key: files[key][0] for key in sorted(files) if key != LABEL},
            files[LABEL][0] if LABEL in files else None,
            place=str(next(files[key][0] for key in files if key != LABEL).path.parent),
            problems=rival_problems(files, root, case_id, everywhere),
        )
        for (case_id, patient), files in sorted(images.items())
    ]
    notes = ["BIDS names (sub-*, ses-*): a session is a case, a subject is a patient; modalities by suffix."]
    if ignored:
        notes.append(f"Ignored: {len(ignored)} volumes of no use here: {some(ignored)}.")
    lone = [volume.path.name for place in sorted(groups.keys() - images.keys()) for volume in groups[place][LABEL]]
    if lone:
        notes.append(f"Ignored: {len(lone)} labels of no image, by subject and session: {some(lone)}.")
    found = {key for case in cases for key in case.images}
    modalities = tuple(patterns or ()) if only else tuple(sorted(found | set(patterns or ())))
    counts = [f"{key} {sum(key in case.sources() for case in cases)}" for key in (*modalities, LABEL)]
    notes.append(f"Files: {', '.join(counts)}.")
    return Draft("bids", cases, modalities, notes=notes, problems=doubts)


def read_datalist(path: Path, modalities: Sequence[str] | None = None) -> Draft:
    """Read a datalist: a JSON file with lists of cases under ``training``, ``validation`` and ``test``.

    Each case has one path a key (``flair``, ``label``), relative to the datalist or absolute; ``case``, ``patient`` and
    ``labels`` are optional. A case may instead have one 4-D file, or a list of files, under ``image``: then
    ``modalities`` names its channels. Beside the lists, ``labels`` names the label values, as in the Decathlon, and
    ``regions`` joins values to regions: ``{"WT": [1, 2, 4]}``. Without ``patient``, IDs tell the patients
    (:func:`monai_cggm.data.patients.patients_in`).

    Args:
        path: the datalist.
        modalities: names of the channels of ``image``.

    Returns:
        The cases; files that are not there are their problems.

    Raises:
        DataError: where it cannot be understood.
    """
    cases: list[FoundCase] = []
    problems: list[str] = []
    notes: list[str] = []
    for section, entries in datalist_sections(path).items():
        for index, entry in enumerate(entries):
            try:
                cases.append(_entry_case(entry, path, section, index, modalities))
            except ValueError as error:
                problems.append(f"{section}[{index}]: {error} ({path})")
    if problems:
        raise DataError([*problems, *(str(error) for case in cases for error in case.errors())])
    order = tuple(dict.fromkeys(key for case in cases for key in case.images))
    notes.append(f"A datalist; modalities in its order: {', '.join(order)}.")
    content = read_json(path)
    label_names = label_names_of(content.get("labels"), path, notes)
    regions = label_regions_of(content.get("labels"), path, notes)
    if content.get("regions"):
        regions = regions_of(content["regions"], path)
        notes.append(f"Regions of label values: {regions_in_words(regions)}.")
    return Draft("datalist", cases, order, label_names, notes, label_regions=regions)


def _bids_keys(volume: Source, root: Path, chosen: Mapping[str, str], *, only: bool) -> list[str]:
    fitting = [key for key, pattern in chosen.items() if fits(volume.path, root, pattern)]
    if fitting:
        return fitting
    *entities, suffix = stem_of(volume).split("_")
    pairs = dict(entity.split("-", 1) for entity in entities if "-" in entity)
    if suffix.lower() in _BIDS_LABELS:
        is_label = LABEL not in chosen and pairs.get("desc", "").lower() != "brain" and pairs.get("label") != "brain"
        return [LABEL] if is_label else []
    parts = volume.path.relative_to(root).parts
    if only or parts[0] == "derivatives" or _NOT_ANATOMY & set(parts):
        return []
    if key_of(suffix, vocabulary_of())[0] in (LABEL, IGNORED):
        return []
    key = modality_of(suffix)
    key = "t1ce" if key == "t1" and "ce" in pairs else key
    return [] if key in chosen else [key]


def _entry_case(entry: Any, datalist: Path, section: str, index: int, modalities: Sequence[str] | None) -> FoundCase:
    if not isinstance(entry, dict):
        raise ValueError(f"is {type(entry).__name__}, expected an object with one path a modality")
    images: dict[str, Source] = {}
    for key, value in entry.items():
        if key == "image":
            images |= _stacked(value, datalist.parent, modalities)
        elif key not in _NO_MODALITY and _is_volume(value, datalist.parent):
            images[modality_of(key)] = volume_at(value, datalist.parent)
    if not images:
        raise ValueError(f"has keys {', '.join(map(str, entry))}, expected one path a modality")
    label = volume_at(entry[LABEL], datalist.parent) if entry.get(LABEL) is not None else None
    files = {**images, **({LABEL: label} if label else {})}
    gone = {key: source.path for key, source in files.items() if not source.path.exists()}
    case_id = _text(entry, "case") or _common_id(images)
    if case_id is None:
        raise ValueError("has no 'case', and its file names give no common ID")
    return FoundCase(
        case_id,
        _text(entry, "patient") or "",
        images,
        label,
        section,
        f"{datalist}, {section}[{index}]",
        _text(entry, "labels"),
        tuple((f"{key}, of {section}[{index}], is not there", str(file)) for key, file in gone.items()),
    )


def _stacked(value: Any, root: Path, modalities: Sequence[str] | None) -> dict[str, Source]:
    """The modalities of one 4-D file, or of a list of files, under ``image``."""
    files = [listed_volume(text, root) for text in (value if isinstance(value, list) else [value])]
    count = len(files) if len(files) > 1 else channel_count(files[0])
    if modalities is None or len(modalities) != count:
        told = f"{len(modalities)} modalities are named" if modalities else "nothing names them"
        raise ValueError(f"'image' has {count} channels and {told}: name its modalities, in the order of the channels")
    keys = [modality_of(name) for name in modalities]
    if len(files) > 1:
        return dict(zip(keys, files, strict=True))
    return {key: Source(files[0].path, channel, files[0].kind) for channel, key in enumerate(keys)}


def _is_volume(value: Any, root: Path) -> bool:
    return isinstance(value, str) and kind_of(root / Path(value).expanduser()) is not None


def _text(entry: Mapping[str, Any], key: str) -> str | None:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"'{key}' is {value!r}, expected a string")
    return value


def _common_id(images: Mapping[str, Source]) -> str | None:
    """What the names of a case's files share in front: ``p01`` of ``p01_flair`` and ``p01_t1``."""
    if len(images) == 1:
        name = stem_of(next(iter(images.values())))
        return without_words(name, key_of(name, vocabulary_of(list(images)))[1]) or name
    if len({source.path for source in images.values()}) == 1:
        return stem_of(next(iter(images.values())))
    names = [stem_of(source) for source in images.values()]
    shared = 0
    while len({tuple(words_of(name)[: shared + 1]) for name in names}) == 1 and shared < min(
        len(words_of(name)) for name in names
    ):
        shared += 1
    if not shared:
        parents = {source.path.parent.name for source in images.values()}
        return parents.pop() if len(parents) == 1 else None
    ends = [match.end() for match in re.finditer(r"[^\W_]+", names[0])]
    return names[0][: ends[shared - 1]]
