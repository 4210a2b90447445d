# SPDX-License-Identifier: Apache-2.0
"""Find the cases of a data set as it was released: a BraTS folder or a datalist with one path a sequence."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from monai_cggm.data.labels import convention_for
from monai_cggm.data.patients import patient_of, patients_at, patients_in
from monai_cggm.errors import CaseError, DataError, some

LABEL = "label"
SECTIONS = ("training", "validation", "test")

#: Endings of the file names of each sequence (BraTS 2018-2021 first, then BraTS 2023-2024), in lower case.
SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "flair": ("flair", "t2f"),
    "t1ce": ("t1ce", "t1c", "t1gd"),
    "t1": ("t1", "t1n"),
    "t2": ("t2", "t2w"),
    LABEL: ("seg",),
}

_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)  # no files on Windows
_NIFTI = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Case:
    """The files of one case.

    Attributes:
        case_id: the ID, from the file names or the datalist's ``case`` field.
        images: modality -> file, of the sequences that were found.
        label: the segmentation, where there is one.
        convention: the label convention, a name or a map (see :func:`monai_cggm.data.labels.label_convention`), None
            where nothing tells it.
        patient: the patient, whose cases stay in one part of a split.
        folder: where it was found, for error messages.
        problems: what was odd in finding it, such as two files for one sequence.
        strangers: other NIfTI files of its folder, which a missing sequence may be among.
    """

    case_id: str
    images: Mapping[str, Path]
    label: Path | None = None
    convention: str | None = None
    patient: str = ""
    folder: Path | None = None
    problems: tuple[str, ...] = ()
    strangers: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The case as an item of a MONAI datalist: ``case``, ``patient``, ``labels`` and one path a key.

        Example:
            >>> Case("Phantom_000", {"t1": Path("a_t1.nii.gz")}, convention="brats2018").as_dict()
            {'case': 'Phantom_000', 'patient': 'Phantom_000', 'labels': 'brats2018', 't1': 'a_t1.nii.gz'}
        """
        item: dict[str, Any] = {
            "case": self.case_id,
            "patient": self.patient or patient_of(self.case_id),
            "labels": self.convention,
            **{modality: str(path) for modality, path in self.images.items()},
        }
        if self.label is not None:
            item[LABEL] = str(self.label)
        return item


def find_cases(source: str | Path, modalities: Sequence[str], *, labels: str | None = None) -> list[Case]:
    """Find cases in a folder or a datalist; files are not opened.

    A folder is searched through all its sub-folders (and links to folders) for ``ID_flair.nii.gz`` or
    ``ID-t2f.nii.gz`` and their like (:data:`SUFFIXES`, in any letter case, ``.nii`` too). Files of one ID in one folder
    are one case. A modality that :data:`SUFFIXES` does not know has its own name as the ending.

    A datalist is a JSON file in MONAI's style, with paths relative to it::

        {"training": [{"case": "p01", "labels": "brats2018", "flair": "p01/flair.nii.gz", "label": "p01/mask.nii.gz"}]}

    The sections ``training``, ``validation`` and ``test`` are read one after the other. ``case`` may be left out where
    the file names give the ID (``p01_flair.nii.gz``), ``labels`` where the ID tells the convention; without
    ``patient``, IDs tell the patients (:func:`~monai_cggm.data.patients.patients_in`). ``labels`` may spell a map out,
    ``"0=0,1=1,4=2"`` (:func:`~monai_cggm.data.labels.label_convention`).

    Args:
        source: the folder, or the datalist's path.
        modalities: the sequences to look for.
        labels: a label convention for every case, a name or a map, over what IDs and datalist say.

    Returns:
        The cases, sorted by ID for a folder, in the datalist's order otherwise. A case may lack sequences or share its
        ID with another one: :func:`monai_cggm.data.checks.header_problems` judges.

    Raises:
        DataError: where there is no case at all, or the datalist cannot be understood.
        ValueError: where ``labels`` is no convention or ``modalities`` is empty.
    """
    if not modalities:
        raise ValueError("no modality given: expected names such as flair, t1ce, t1, t2")
    if labels is not None:
        convention_for("", labels)
    path = Path(source).expanduser()
    if path.is_dir():
        cases = _cases_in_folder(path, modalities, labels)
    elif path.is_file() and path.suffix.lower() == ".json":
        cases = _cases_in_datalist(path, modalities, labels)
    else:
        found = "does not exist" if not path.exists() else "is neither a folder nor a .json file"
        raise DataError([f"{path} {found}: expected a folder of cases or a datalist (.json)"])
    if path.is_dir():
        patients = patients_at([_place(case, path) for case in cases])
    else:
        patients = patients_in([case.case_id for case in cases])
    return [replace(case, patient=case.patient or own) for case, own in zip(cases, patients, strict=True)]


def _place(case: Case, root: Path) -> tuple[str, ...]:
    """The folders below the data set's, and the ID, where it is not the folder's name."""
    folders = case.folder.relative_to(root).parts if case.folder is not None else ()
    return folders if folders[-1:] == (case.case_id,) else (*folders, case.case_id)


def is_safe_id(case_id: str) -> bool:
    """Whether an ID can be a file's name anywhere: letters, digits, ``.``, ``_``, ``-``, never ``..`` or ``con``.

    Example:
        >>> [is_safe_id(name) for name in ("Brats18_2013_2_1", "../x", "a..b", "", "con")]
        [True, False, False, False, False]
    """
    return _SAFE_ID.fullmatch(case_id) is not None and ".." not in case_id and not _DEVICE.match(case_id)


def _cases_in_folder(folder: Path, modalities: Sequence[str], labels: str | None) -> list[Case]:
    keys = [*modalities, LABEL]
    ending = _ending_pattern(keys)
    key_of = {suffix: key for key, suffixes in _suffixes_of(keys).items() for suffix in suffixes}
    groups: dict[tuple[Path, str], dict[str, list[Path]]] = {}
    others: dict[Path, list[str]] = {}
    for path in (place / name for place, names in folders_below(folder) for name in names if _NIFTI.search(name)):
        match = ending.fullmatch(path.name)
        if match is None:
            others.setdefault(path.parent, []).append(path.name)
            continue
        files = groups.setdefault((path.parent, match["id"]), {})
        files.setdefault(key_of[match["suffix"].lower()], []).append(path)
    cases = [
        _case_of_files(case_id, parent, files, modalities, labels, others.get(parent, []))
        for (parent, case_id), files in groups.items()
        # A folder read for some of its sequences holds files of the others, which alone are no case.
        if any(key in files for key in keys)
    ]
    if not cases:
        strays = sorted(name for names in others.values() for name in names)
        seen = f"; its NIfTI files are {some(strays)}" if strays else "; it holds no NIfTI file"
        raise DataError(
            [
                f"no case in {folder}: expected files such as ID_{modalities[0]}.nii.gz{seen}. Data with one "
                "multi-channel file a case (MSD Task01) has to be split into one file a sequence first"
            ]
        )
    return sorted(cases, key=lambda case: (case.case_id, str(case.folder)))


def _case_of_files(
    case_id: str,
    folder: Path,
    files: Mapping[str, list[Path]],
    modalities: Sequence[str],
    labels: str | None,
    strangers: Sequence[str],
) -> Case:
    problems = [
        f"{key}: {len(files[key])} files ({', '.join(path.name for path in files[key])}), expected one ({folder})"
        for key in (*modalities, LABEL)
        if len(files.get(key, [])) > 1
    ]
    return Case(
        case_id=case_id,
        images={modality: files[modality][0] for modality in modalities if modality in files},
        label=files[LABEL][0] if LABEL in files else None,
        convention=_convention_or_none(case_id, labels),
        folder=folder,
        problems=tuple(problems),
        strangers=tuple(sorted(strangers)),
    )


def folders_below(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and those below it, each with its files' names, sorted, through links to folders but never twice.

    What begins with a dot is nobody's data: hidden folders, in which a case may be under construction, and the resource
    forks ``._name`` that macOS leaves in archives.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     Path(name, "p01").mkdir()
        ...     Path(name, "p01", "t1.nii").touch()
        ...     [(place.name, files) for place, files in folders_below(Path(name))][1:]
        [('p01', ['t1.nii'])]
    """
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder above itself would go on for ever
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(parent), sorted(name for name in names if not name.startswith("."))


def datalist_sections(path: Path) -> dict[str, list[Any]]:
    """Read the lists of a datalist, by section.

    Raises:
        DataError: where it is no JSON file, or has none of the sections.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError([f"{path} is no JSON file: {error}"]) from error
    sections = {name: content[name] for name in SECTIONS if name in content} if isinstance(content, dict) else {}
    if not sections or not all(isinstance(entries, list) for entries in sections.values()):
        raise DataError([f"{path} is no datalist: expected an object with lists under {', '.join(SECTIONS)}"])
    return sections


def _suffixes_of(keys: Sequence[str]) -> dict[str, tuple[str, ...]]:
    return {**SUFFIXES, **{key: (key.lower(),) for key in keys if key not in SUFFIXES}}


def _ending_pattern(keys: Sequence[str]) -> re.Pattern[str]:
    suffixes = [re.escape(suffix) for names in _suffixes_of(keys).values() for suffix in names]
    return re.compile(rf"(?P<id>.+)[_-](?P<suffix>{'|'.join(suffixes)})\.nii(\.gz)?", re.IGNORECASE)


def _cases_in_datalist(path: Path, modalities: Sequence[str], labels: str | None) -> list[Case]:
    cases: list[Case] = []
    problems: list[str] = []
    for section, entries in datalist_sections(path).items():
        for index, entry in enumerate(entries):
            try:
                cases.append(_case_of_entry(entry, path.parent, modalities, labels))
            except ValueError as error:
                problems.append(f"{section}[{index}]: {error} ({path})")
    if problems:
        raise DataError(problems)
    if not cases:
        raise DataError([f"{path} lists no case"])
    return cases


def _case_of_entry(entry: Any, root: Path, modalities: Sequence[str], labels: str | None) -> Case:
    if not isinstance(entry, dict):
        raise ValueError(f"is {type(entry).__name__}, expected an object with one path a sequence")
    paths = {key: _path_of(entry, key, root) for key in (*modalities, LABEL) if entry.get(key) is not None}
    if not any(modality in paths for modality in modalities):
        hint = "; one multi-channel 'image' has to be split into one file a sequence first" if "image" in entry else ""
        raise ValueError(f"has keys {', '.join(map(str, entry))}, expected one of {', '.join(modalities)}{hint}")
    case_id = entry["case"] if "case" in entry else _id_of_files(paths, modalities)
    if not isinstance(case_id, str):
        raise ValueError(f"'case' is {case_id!r}, expected a string")
    convention = _convention_or_none(case_id, labels or _text_of(entry, "labels"))
    return Case(
        case_id=case_id,
        images={modality: paths[modality] for modality in modalities if modality in paths},
        label=paths.get(LABEL),
        convention=convention,
        patient=_text_of(entry, "patient") or "",
        folder=next(iter(paths.values())).parent,
    )


def _path_of(entry: Mapping[str, Any], key: str, root: Path) -> Path:
    value = entry[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} is {type(value).__name__}, expected one path")
    return root / Path(value).expanduser()


def _text_of(entry: Mapping[str, Any], key: str) -> str | None:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"'{key}' is {value!r}, expected a string")
    return value


def _id_of_files(paths: Mapping[str, Path], modalities: Sequence[str]) -> str:
    ending = _ending_pattern([*modalities, LABEL])
    matches = [ending.fullmatch(path.name) for path in paths.values()]
    ids = {match["id"] for match in matches if match}
    if len(ids) != 1 or not all(matches):
        raise ValueError("has no 'case', and its file names give no common ID")
    return ids.pop()


def _convention_or_none(case_id: str, override: str | None) -> str | None:
    try:
        return convention_for(case_id, override)
    except CaseError:
        return None
