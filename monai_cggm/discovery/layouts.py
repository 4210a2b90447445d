# SPDX-License-Identifier: Apache-2.0
"""Look at a folder of paired-modality cases and say what it is: cases, modalities, labels.

==============  =======================================================================================================
layout          what it looks like
==============  =======================================================================================================
``"folders"``   a folder a case, a file a modality: ``p01/FLAIR_reg.nii.gz``, ``p01/T1/IM0001.dcm``
``"files"``     files side by side: ``p01_flair.nii.gz``, or ``images/p01_t1.nii.gz`` and ``labels/p01.nii.gz``
``"nnunet"``    ``dataset.json``, ``imagesTr/p01_0000.nii.gz``, ``labelsTr/p01.nii.gz``
``"msd"``       ``dataset.json``, one 4-D file a case: the Medical Segmentation Decathlon
``"bids"``      ``sub-01/[ses-1/]anat/sub-01_FLAIR.nii.gz``, labels in ``derivatives``
``"datalist"``  a JSON file with one path a modality
==============  =======================================================================================================

Isensee et al., nnU-Net, Nature Methods 2021; Antonelli et al., The medical segmentation decathlon, Nature
Communications 2022; Gorgolewski et al., The brain imaging data structure, Scientific Data 2016. Formats are read as
their documentation describes them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from monai_cggm.data.layouts import is_safe_id
from monai_cggm.data.patients import patients_in, patients_note
from monai_cggm.discovery.dataset_json import DATASET, channel_count, described_dataset, read_dataset_json
from monai_cggm.discovery.described import is_bids, read_bids, read_datalist
from monai_cggm.discovery.found import Draft, Found, FoundCase, Listing, Source, list_volumes
from monai_cggm.discovery.names import modality_of, vocabulary_of
from monai_cggm.discovery.recognise import recognise
from monai_cggm.errors import CaseError, DataError, some


def discover(
    source: str | Path,
    *,
    patterns: Mapping[str, str] | None = None,
    label_pattern: str | None = None,
    modalities: Sequence[str] | None = None,
    patient_pattern: str | None = None,
    need_label: bool = True,
    allow_missing: bool = False,
    keep_bad: bool = False,
) -> Found:
    r"""Find the cases of a folder or datalist and recognise its layout (the module's table has them).

    Names decide; headers are read of 4-D files only, and voxels only where no name tells the label. What the volumes
    hold is for :func:`monai_cggm.discovery.survey_cases`. Volumes are NIfTI, NRRD, MHA, MHD, or a folder with the
    slices of one DICOM series (SimpleITK reads all but NIfTI).

    Case IDs come from the names of folders and files, never from what a DICOM file says of a person. An ID that is no
    safe file name is changed, which the notes say.

    Args:
        source: the folder, or a datalist (``.json``).
        patterns: modality -> pattern of file names, such as ``{"flair": "*_FLAIR*.nii.gz"}``, in any letter case; one
            with a ``/`` is for paths below the folder. One alone chooses the files of that modality, and the others are
            recognised. Of several, only these modalities are used, in this order, unless ``modalities`` names others.
            Not for a datalist, or where a ``dataset.json`` says which files are what.
        label_pattern: the like for the label.
        modalities: the modalities to use, in this order; words of file names that are no known modality may be among
            them. For a datalist with one 4-D ``image``: the names of its channels.
        patient_pattern: a regular expression that finds the patient in a case's ID, such as ``p\d+``: its first group
            that finds something, or all of it, over what a layout or datalist tells. By default names of visits and
            dates tell (:func:`monai_cggm.data.patients.patients_at`).
        need_label: whether training cases must have a label; then one is also looked for that no name tells.
        allow_missing: whether cases may lack modalities (one is enough).
        keep_bad: judge no case: it may have ``problems`` (such as two files for one modality, or another case's ID),
            lack modalities or its label, and one modality is enough. For callers that go on without bad cases; where
            no case has any modality, there is nothing to go on with, and this raises all the same.

    Returns:
        What was found.

    Raises:
        DataError: lists all that is wrong of the first of these kinds, as each needs the ones before it to be right.
            What makes no data set: an empty folder, 2-D images, two layouts, a ``dataset.json`` or datalist that does
            not fit. Then what is not clear in cases: files whose names fit two modalities, two files for one modality,
            several DICOM series in one folder. Then modalities that are asked for and not there, or one only; then
            IDs that two cases share; last, modalities and labels that cases lack.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     for file in ("p01_flair.nii.gz", "p01_T1w.nii.gz", "p01_seg.nii.gz"):
        ...         (Path(name) / file).touch()
        ...     found = discover(name)
        >>> found.layout, found.modalities, found.cases[0].case_id
        ('files', ('flair', 't1'), 'p01')
    """
    path = Path(source).expanduser()
    wanted = {key: pattern for key, pattern in (patterns or {}).items()}
    unsafe = [key for key in wanted if modality_of(key) != key]
    if unsafe:
        raise DataError([f"{some(unsafe)}: expected names of modalities such as {some(map(modality_of, unsafe))}"])
    draft = _draft(path, wanted, label_pattern, modalities, need_label)
    judged = not (keep_bad and draft.modalities)  # without any modality, the cases' problems are the reason
    problems = [*draft.problems, *(_of_cases_alike(draft.cases) if judged else [])]
    if problems:
        raise DataError(problems)
    lenient = allow_missing and not need_label
    order = _order(draft, modalities, path, lenient=keep_bad or lenient)
    cases, visits = _with_patients(draft, patient_pattern)
    cases = [replace(case, images={key: case.images[key] for key in order if key in case.images}) for case in cases]
    lacking = [case for case in cases if not case.images]
    cases, repeated = _with_repeated([case for case in cases if case.images])
    if repeated and not keep_bad:
        raise DataError(repeated)
    cases, renamed = _with_safe_ids(cases)
    problems = _missing(cases, order, path, allow_missing=allow_missing, lenient=lenient, patterns=wanted)
    problems += _without_label(cases, draft, path, label_pattern) if need_label else []
    # A caller that goes on without bad cases needs one to go on with: an empty data set is no result.
    if problems and not (keep_bad and cases):
        raise DataError(problems)
    notes = [*draft.notes, *visits, *renamed]
    if lacking:
        notes.append(f"Left out: {len(lacking)} cases with no modality: {some(case.case_id for case in lacking)}.")
    notes.append(f"{len(cases)} cases of {len({case.patient for case in cases})} patients.")
    if draft.layout in ("folders", "files", "bids") and not (len(wanted) > 1 or modalities):
        notes.append(f"Modalities in alphabetical order: {', '.join(order)}.")
    if any(volume.kind == "dicom" for case in cases for volume in case.images.values()):
        notes.append("Case IDs are names of folders: see that none of them is the name of a person.")
    for key in order:
        if _lacking(cases, key):
            none = len(_lacking(cases, key)) == len(cases)
            notes.append(f"{key} is in no case." if none else f"{key} is missing in {_of_cases(cases, key)}.")
    return Found(path, draft.layout, order, tuple(cases), draft.label_names, tuple(notes), draft.label_regions)


def _draft(
    path: Path,
    patterns: Mapping[str, str],
    label_pattern: str | None,
    modalities: Sequence[str] | None,
    need_label: bool,
) -> Draft:
    if path.is_file() and path.name == DATASET and described_dataset(path.parent):
        path = path.parent
    chosen = [f"--modality {key}={text}" for key, text in patterns.items()]
    chosen += [f"--label {label_pattern}"] if label_pattern else []
    if path.is_file() and path.suffix.lower() == ".json":
        _refuse_patterns(chosen, path)
        return read_datalist(path, modalities)
    if not path.is_dir():
        found = "is neither a folder nor a .json file" if path.exists() else "does not exist"
        raise DataError([f"{path} {found}: expected a folder of cases or a datalist (.json)"])
    listing = list_volumes(path)
    described = described_dataset(path)
    bids = is_bids(listing, path)
    _refuse_two_layouts(path, described is not None, bids, listing)
    if described is not None:
        _refuse_patterns(chosen, path / DATASET)
        return read_dataset_json(described, path)
    if not listing.volumes:
        raise DataError([_empty(path, listing)])
    only = len(patterns) > 1 and not modalities
    if bids:
        draft = read_bids(listing, path, patterns=patterns, label_pattern=label_pattern, only=only)
        return replace(draft, unused=_unused(listing, draft))
    draft = recognise(
        listing.volumes,
        path,
        vocabulary=vocabulary_of(modalities or ()),
        patterns=patterns,
        label_pattern=label_pattern,
        only=only,
        wanted=[modality_of(name) for name in modalities or ()],
        need_label=need_label,
    )
    draft = replace(draft, unused=_unused(listing, draft))
    if not draft.cases and not (modalities and draft.seen):
        names = _names(listing.volumes)
        volumes = f"no modality in {path}: its {len(listing.volumes)} volumes"
        advice = _channels_told(draft) or 'give patterns, such as --modality "flair=*FLAIR*"'
        draft.problems.append(
            f"{volumes} ({names}) fit none of the patterns {some(f'{key}={text}' for key, text in patterns.items())}"
            if only
            else f"{volumes} have names that tell none ({names}); {advice}"
        )
    return draft


def _refuse_patterns(chosen: Sequence[str], where: Path) -> None:
    if chosen:
        raise DataError(
            [
                f"{where} says which files are what, and so does {some(chosen)}: expected one of the two "
                "(--modalities chooses and orders)"
            ]
        )


def _unused(listing: Listing, draft: Draft) -> tuple[Source, ...]:
    used = {source.path for case in draft.cases for source in case.sources().values()}
    return tuple(volume for volume in listing.volumes if volume.path not in used)


def _names(volumes: Iterable[Source]) -> str:
    return some(sorted({volume.path.name for volume in volumes}))


def _channels_told(draft: Draft) -> str:
    """What to do with a 4-D file whose channels nothing names, where one of a few volumes is one."""
    for volume in [*draft.unused[:3], *(image for case in draft.cases[:1] for image in case.images.values())]:
        try:
            count = channel_count(volume)
        except ValueError:
            continue
        if count > 1:
            return (
                f"{volume.path.name} has {count} channels: name them in a {DATASET}, or with --modalities for a "
                "datalist that has one such file a case under image"
            )
    return ""


def _empty(path: Path, listing: Listing) -> str:
    if listing.pictures:
        names = some(picture.name for picture in listing.pictures)
        return f"{path} holds 2-D images only ({names}), expected 3-D volumes"
    return f"{path} holds no volume: expected NIfTI, NRRD, MHA or DICOM files in it or below it"


def _refuse_two_layouts(path: Path, described: bool, bids: bool, listing: Listing) -> None:
    if described and bids:
        raise DataError(
            [f"{path} looks like two layouts: nnU-Net or Decathlon ({DATASET}) and BIDS (sub-*): give one's folder"]
        )
    below = sorted({part for volume in listing.volumes for part in volume.path.relative_to(path).parts[:1]})
    several = [name for name in below if not described and described_dataset(path / name)]
    if several:
        raise DataError(
            [f"{path} holds other data sets, each with a {DATASET}: {some(several)}; give the folder of one"]
        )
    if not described and "imagesTr" in below:
        raise DataError(
            [f"{path} has imagesTr and no {DATASET} with channel_names or modality, which names the channels"]
        )


def _order(draft: Draft, modalities: Sequence[str] | None, path: Path, *, lenient: bool) -> tuple[str, ...]:
    """The modalities, in order; ``lenient``: one is enough, and some may be in no case."""
    if modalities:
        keys = tuple(modality_of(name) for name in modalities)
        unknown = [name for name, key in zip(modalities, keys, strict=True) if key not in draft.modalities]
        if unknown and not (lenient and len(unknown) < len(keys)):
            raise DataError([_unknown(unknown, draft, path)])
    else:
        keys = draft.modalities
    if len(set(keys)) < (1 if lenient else 2):
        asked = f"one modality only ({some(keys)}) is asked for in {path}, expected two or more"
        raise DataError([asked if modalities else _too_few(keys, draft, path)])
    return tuple(dict.fromkeys(keys))


def _unknown(names: Sequence[str], draft: Draft, path: Path) -> str:
    """The sentence on modalities that were asked for and are not there."""
    seen = draft.seen or draft.modalities
    channels = _channels_told(draft) if draft.by_names and len(seen) < 2 else ""
    told = f"its modalities are {some(seen, 20)}" if seen else f"names of volumes tell none ({_names(draft.unused)})"
    pattern = "" if seen else f'give patterns, such as --modality "{modality_of(names[0])}=*{names[0]}*"'
    return "; ".join(part for part in (f"no {some(names)} in {path}: {told}", channels or pattern) if part)


def _too_few(keys: Sequence[str], draft: Draft, path: Path) -> str:
    """The sentence on a data set with one modality or none, and where others may be."""
    told = f"one modality only ({some(keys)})" if keys else "no modality by name"
    told = f"{path} has {told}, expected two or more"
    if not draft.by_names:
        return told
    if channels := _channels_told(draft):
        return f"{told}; {channels}"
    if not draft.unused:
        return f"{told}: there are no other volumes"
    others = [key for key in ("t1", "flair") if key not in keys][: 2 - len(keys)]
    options = " ".join(f'--modality "{key}=*_{key.upper()}*"' for key in others)
    return f"{told}: of the volumes that were ignored ({_names(draft.unused)}) choose some with {options}, for example"


def _with_patients(draft: Draft, pattern: str | None) -> tuple[list[FoundCase], list[str]]:
    """The cases with their patients: of a pattern, or as the layout tells, or else their IDs; and a note on several."""
    case_ids = [case.case_id for case in draft.cases]
    try:
        told = [None if pattern is None else re.search(pattern, case_id) for case_id in case_ids]
    except re.error as error:
        raise DataError([f"patient pattern {pattern!r} is no regular expression: {error}"]) from error
    found = [match and next((group for group in (*match.groups(), match[0]) if group), "") for match in told]
    if pattern is not None and not all(found):
        strangers = [case_id for case_id, patient in zip(case_ids, found, strict=True) if not patient]
        raise DataError([f"{some(strangers)} fit no patient pattern {pattern!r}: expected all {len(case_ids)} IDs to"])
    patients = [
        patient or case.patient or own
        for patient, case, own in zip(found, draft.cases, patients_in(case_ids), strict=True)
    ]
    cases = [replace(case, patient=patient) for case, patient in zip(draft.cases, patients, strict=True)]
    named = {new.case_id: new.patient for old, new in zip(draft.cases, cases, strict=True) if not old.patient}
    if draft.layout != "datalist" or pattern is not None:
        named = {case.case_id: case.patient for case in cases}
    return cases, patients_note(named)


def _of_cases_alike(cases: Sequence[FoundCase]) -> list[str]:
    """One sentence for each kind of problem: the first case's, and which others have it too."""
    kinds: dict[str, list[CaseError]] = {}
    for case in cases:
        for error in case.errors():
            kinds.setdefault(error.problem, []).append(error)
    return [
        f"{errors[0]}"
        + (f"; so in {len(errors) - 1} more cases: {some(e.case for e in errors[1:])}" if len(errors) > 1 else "")
        for errors in kinds.values()
    ]


def _missing(
    cases: Sequence[FoundCase],
    order: Sequence[str],
    path: Path,
    *,
    allow_missing: bool,
    lenient: bool,
    patterns: Mapping[str, str],
) -> list[str]:
    problems = []
    for key in order:
        if len(_lacking(cases, key)) == len(cases):
            told = f": no file fits the pattern {patterns[key]}" if key in patterns else ""
            problems += [f"{key} is in no case of {path}{told}"] if told or not lenient else []
        elif _lacking(cases, key) and not allow_missing:
            problems.append(
                f"{key} is missing in {_of_cases(cases, key)}: mend the files, leave {key} out (--modalities), or "
                "allow cases that lack it (--allow-missing)"
            )
    return problems


def _without_label(cases: Sequence[FoundCase], draft: Draft, path: Path, pattern: str | None) -> list[str]:
    """The sentence on labels that training cases lack."""
    training = [case for case in cases if case.section != "test"]
    without = [case for case in training if case.label is None]
    if cases and not training:
        return [f"{path} has test cases only, expected some with a label to train with"]
    if not without:
        return []
    if len(without) == len(training):
        found = f", found {_names(draft.unused) or 'files of modalities alone'}" if draft.by_names else ""
        none = f"no case in {path} has a label"
        if pattern:
            return [f"{none}: no file of a case fits the label pattern {pattern}{found}"]
        return [
            f"{none}: expected a file with seg, mask, label or lesion in its name{found}; give a pattern, such as "
            '--label "*expert*"; new cases to predict need none (monai-cggm datalist --no-labels)'
        ]
    near = [volume for volume in draft.unused if any(_is_near(volume, case, draft.layout) for case in without[:5])]
    choose = ', or choose it with a pattern that fits all labels, such as --label "*_seg*"' if draft.by_names else ""
    return [
        f"label is missing in {len(without)} of {len(training)} cases: {_named(without)}, expected one a case: add it, "
        f"take the case out{choose}{f' (not used there: {_names(near)})' if near else ''}"
    ]


def _is_near(volume: Source, case: FoundCase, layout: str) -> bool:
    return volume.path.is_relative_to(case.place) if layout == "folders" else case.case_id in volume.path.name


def _lacking(cases: Sequence[FoundCase], key: str) -> list[FoundCase]:
    return [case for case in cases if key not in case.images]


def _of_cases(cases: Sequence[FoundCase], key: str) -> str:
    lacking = _lacking(cases, key)
    return f"{len(lacking)} of {len(cases)} cases: {_named(lacking)}"


def _named(cases: Sequence[FoundCase]) -> str:
    return some([f"{case.case_id} ({case.place})" for case in cases[:10]] + [c.case_id for c in cases[10:]], 10)


def _with_repeated(cases: Sequence[FoundCase]) -> tuple[list[FoundCase], list[str]]:
    """The cases, those that share their ID with that problem; and a line for each such ID."""
    counts = Counter(case.case_id for case in cases)
    problem = {name: f"{count} cases have this ID, expected one" for name, count in counts.items() if count > 1}
    places = {name: some(case.place for case in cases if case.case_id == name) for name in problem}
    marked = [
        replace(case, problems=(*case.problems, (problem[case.case_id], places[case.case_id])))
        if case.case_id in problem
        else case
        for case in cases
    ]
    return marked, [str(CaseError(name, text, places[name])) for name, text in problem.items()]


def _with_safe_ids(cases: Sequence[FoundCase]) -> tuple[list[FoundCase], list[str]]:
    """Cases with IDs that can be file names; the notes say which were changed."""
    ids = _safe_names(case.case_id for case in cases)
    patients = _safe_names(case.patient for case in cases)
    changed = [f"{case_id!r} is {safe}" for case_id, safe in ids.items() if safe != case_id]
    notes = [f"IDs that are no safe file names were changed: {some(changed, 20)}."] if changed else []
    return [replace(case, case_id=ids[case.case_id], patient=patients[case.patient]) for case in cases], notes


def _safe_names(names: Iterable[str]) -> dict[str, str]:
    """Name -> a name that is a safe file name: the same where it is one, and unique in any letter case otherwise."""
    distinct = dict.fromkeys(names)
    safe = {name: name for name in distinct if is_safe_id(name)}
    taken = {name.casefold() for name in safe}
    for name in distinct:
        if name not in safe:
            plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
            plain = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._-]+", "_", plain)).strip("._-") or "case"
            plain = plain if is_safe_id(plain) else f"case_{plain}"  # con
            unique, number = plain, 1
            while unique.casefold() in taken:
                number += 1
                unique = f"{plain}_{number}"
            taken.add(unique.casefold())
            safe[name] = unique
    return {name: safe[name] for name in distinct}
