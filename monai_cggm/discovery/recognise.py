# SPDX-License-Identifier: Apache-2.0
"""Recognise cases and modalities by the names of files and folders."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from monai_cggm.data.layouts import LABEL
from monai_cggm.data.patients import is_visit, patients_at
from monai_cggm.discovery.found import CasesFiles, Draft, FoundCase, Source, rival_problems, stem_of
from monai_cggm.discovery.names import (
    IGNORED,
    Vocabulary,
    fits,
    key_of,
    key_of_description,
    matches_in,
    slug_of,
    without_words,
    words_of,
    written_words,
)
from monai_cggm.discovery.sources import SeveralSeriesError, has_few_integers, series_description
from monai_cggm.errors import DataError, some

#: Folders that say nothing about the case.
_CONTAINERS = {"image", "images", "img", "imgs", "data", "scan", "scans", "volume", "volumes"}
_CONTAINERS |= {"nifti", "niftis", "nii", "dicom", "dicoms", "dcm", "raw"}


@dataclass(frozen=True)
class _Named:
    """A volume and what its name says."""

    source: Source
    key: str | None
    name: str  # of the file without endings, or of the series' folder
    used: frozenset[int]  # the words of the name that name the key
    words: str  # these, as they are written; where the key is from a folder or a header, that
    folders: tuple[str, ...]
    doubts: tuple[str, ...] = ()
    series: int = 1  # DICOM series in the folder, where it was looked at

    @property
    def rest(self) -> list[str]:
        """The other words of the name, in lower case."""
        return [word for index, word in enumerate(words_of(self.name)) if index not in self.used]


def recognise(
    volumes: Sequence[Source],
    root: Path,
    *,
    vocabulary: Vocabulary,
    patterns: Mapping[str, str] | None = None,
    label_pattern: str | None = None,
    only: bool = False,
    wanted: Collection[str] = (),
    need_label: bool = True,
) -> Draft:
    """Make cases of volumes by the names of their files and folders: a folder a case, or ``ID_modality`` side by side.

    A volume's key comes from its own name, else from the nearest folder that names one, else, for DICOM, from what the
    series says of its sequence. Patterns go before all that. Where no name tells the label, a file that recurs and
    holds few whole numbers is it; where names tell less than two modalities, files that recur are the modalities.

    Args:
        volumes: what lies below ``root``.
        root: the folder.
        vocabulary: words that name keys.
        patterns: modality -> pattern of file names (of paths below ``root``, where it holds a ``/``), in any letter
            case; then nothing else is that modality.
        label_pattern: the like for the label; then nothing else is the label.
        only: whether what no pattern fits is no modality.
        wanted: the modalities of interest, where these are not all.
        need_label: whether to look for a label that no name tells.

    Returns:
        The cases, without any judgement but on names that fit two keys, keys that two files fit, and folders with
        several DICOM series.

    Raises:
        DataError: where some cases are folders and others are files side by side.
    """
    names = [words_of(stem_of(volume)) for volume in volumes]
    constant = Counter(names[0])
    for words in names[1:]:
        constant &= Counter(words)
    chosen = {**(patterns or {}), **({LABEL: label_pattern} if label_pattern else {})}
    named = [_name(volume, root, vocabulary, constant, chosen, only=only) for volume in volumes]
    notes: list[str] = []
    named = _settle_strangers(named, notes, need_label=need_label, modalities=not only)
    labels_told = sum(item.key == LABEL for item in named)
    if labels_told and not label_pattern:
        named = _settle_labels(named, notes)
    doubtful: dict[tuple[str, ...], list[_Named]] = defaultdict(list)
    for item in named:
        if item.doubts and (not wanted or {*wanted, LABEL} & set(item.doubts)):
            doubtful[tuple(item.doubts)].append(item)
    problems = [_doubt(doubts, items, chosen) for doubts, items in doubtful.items()]
    seen = tuple(sorted({item.key for item in named if item.key not in (None, IGNORED, LABEL)}))
    if wanted:
        others = Counter(item.key for item in named if item.key not in {*wanted, LABEL, IGNORED, None})
        named = [item for item in named if item.key not in others]
        if others:
            notes.append("Not asked for: " + some([f"{key} ({n} files)" for key, n in sorted(others.items())]) + ".")
    kept = [item for item in named if item.key not in (None, IGNORED)]
    notes += _notes_on(named, chosen, only=only)
    groups, layout = _cases(kept, root, notes)
    ids = _ids(list(groups), layout)
    files = {place: _by_key(items) for place, items in groups.items()}
    everywhere = CasesFiles(list(files.values()), root, volumes)
    cases = [_case(*ids[place], by_key, root, everywhere) for place, by_key in files.items()]
    found = {key for case in cases for key in case.images}
    mixed = [item for item in named if item.series > 1]
    complete = wanted or (patterns if only else found if len(found) > 1 else ())
    cases = _with_mixed_series(cases, mixed, root, complete or ())
    modalities = tuple(patterns or ()) if only else tuple(sorted(found | set(patterns or ())))
    return Draft(layout, cases, modalities, notes=notes, problems=problems, seen=seen)


def _name(
    source: Source,
    root: Path,
    vocabulary: Vocabulary,
    constant: Mapping[str, int],
    patterns: Mapping[str, str],
    *,
    only: bool,
) -> _Named:
    name = stem_of(source) if source.path != root else root.name
    parts = source.path.relative_to(root).parts[:-1]
    fitting = [key for key, pattern in patterns.items() if fits(source.path, root, pattern)]
    if fitting:
        # the letters in [brackets] are no words
        literal = set(words_of(" ".join(re.sub(r"\[.*?\]", " ", patterns[key]) for key in fitting)))
        used = frozenset(index for index, word in enumerate(words_of(name)) if word in literal)
        named, own, _ = key_of(name, vocabulary, constant)
        used |= own if named == fitting[0] else frozenset()  # p01_T2_reg, for t2=*_reg.nii.gz
        key, doubts = (fitting[0], ()) if len(fitting) == 1 else (None, tuple(fitting))
        return _Named(source, key, name, used, patterns[fitting[0]], _folders(parts, vocabulary), doubts)
    key, used, doubts = key_of(name, vocabulary, constant)
    words = " ".join(match[0] for index, match in enumerate(written_words(name)) if index in used)
    if key is None and not doubts:
        for part in reversed(parts):
            key, _, _ = key_of(part, vocabulary)
            if key is not None:
                words = f"folder {part}"
                break
    series = 1
    if key is None and source.kind == "dicom":
        try:
            description = series_description(source.path)
        except SeveralSeriesError as error:
            description, doubts, series = "", (), error.count
        if not doubts:
            key = key_of_description(description, vocabulary)
            words = "the series' description"
    if key in patterns or set(doubts) & set(patterns) or (only and key != LABEL):
        key, doubts = None, ()
    return _Named(source, key, name, used, words, _folders(parts, vocabulary), doubts, series)


def _doubt(keys: Sequence[str], items: Sequence[_Named], patterns: Mapping[str, str]) -> str:
    """The sentence on files that may be several keys: by patterns, where there are some, else by name."""
    more = f" and {len(items) - 1} more" if len(items) > 1 else ""
    if set(keys) <= patterns.keys():
        fitting = " and ".join(f"{key}={patterns[key]}" for key in keys)
        return f"{items[0].source.path}{more} fit{'' if more else 's'} the patterns {fitting}, expected one of them"
    return (
        f"{items[0].source.path}{more} may be {' or '.join(keys)} by name: give patterns, such as "
        f'--modality "{keys[0]}=*{keys[0].upper()}*"'
    )


def _folders(parts: Sequence[str], vocabulary: Vocabulary) -> tuple[str, ...]:
    """The folders above a file without what they say of its key: ``p01/FLAIR`` and ``images/p01`` are ``p01``."""
    left = []
    for part in parts:
        used = {index for _, indices in matches_in(words_of(part), vocabulary) for index in indices}
        used |= {index for index, word in enumerate(words_of(part)) if word in _CONTAINERS}
        if len(used) < len(words_of(part)) or not used:
            left.append((without_words(part, used) or part) if used else part)
    return tuple(left)


def _settle_strangers(named: list[_Named], notes: list[str], *, need_label: bool, modalities: bool) -> list[_Named]:
    """Give keys to files that recur under a name that nobody knows, where the known ones leave a gap."""
    told = {item.key for item in named} - {None, IGNORED}
    lacks_label = need_label and LABEL not in told
    lacks_modality = modalities and len(told - {LABEL}) < 2
    if not (lacks_label or lacks_modality):
        return named
    known = {word for item in named if item.key for word in item.rest}
    groups: dict[str, list[_Named]] = defaultdict(list)
    for item in named:
        if item.key is None and not item.doubts and item.series == 1:
            own = known | {word for part in item.folders for word in words_of(part)}
            words = [word for word in item.rest if word not in own]
            if not item.folders:
                words = words[-1:]  # side by side, the ID stands in front
            if words:
                groups["_".join(words)].append(item)
    groups = {name: items for name, items in groups.items() if len(items) > 1 or _is_one_case(named)}
    few = [name for name, items in groups.items() if has_few_integers(items[0].source)] if lacks_label else []
    if len(few) > 1:
        raise DataError(
            [
                f"no file name tells the label, and {some(few)} all hold few whole numbers (such as "
                f"{groups[few[0]][0].source.path}): give a label pattern, such as *{few[0]}*"
            ]
        )
    keys = {name: LABEL for name in few}
    if lacks_modality:
        keys |= {name: slug_of(name) for name in groups if name not in few}
    for name, key in keys.items():
        why = "it holds few whole numbers" if key == LABEL else "it recurs, and no known modality is named"
        notes.append(f"{key}: files named *{name}*, because {why}.")
    renamed = {id(item): _settled(item, keys[name]) for name, items in groups.items() if name in keys for item in items}
    return [renamed.get(id(item), item) for item in named]


def _is_one_case(named: Sequence[_Named]) -> bool:
    places = {item.folders for item in named if item.folders}
    keys = Counter(item.key for item in named if item.key)
    return len(places) == 1 if places else max(keys.values(), default=len(named)) == 1


def _settled(item: _Named, key: str) -> _Named:
    words = words_of(item.name)
    used = {len(words) - 1} if not item.folders else set(range(len(words)))
    return replace(item, key=key, used=frozenset(used), words=item.name)


def _settle_labels(named: list[_Named], notes: list[str]) -> list[_Named]:
    """Where several kinds of files are labels by name, keep the one that holds few whole numbers."""
    # Words of the modalities' names are an ID's, or say nothing.
    known = {word for item in named if item.key not in (None, LABEL) for word in item.rest}
    kinds: dict[tuple[str, ...], list[_Named]] = defaultdict(list)
    for item in named:
        if item.key == LABEL:
            own = known | {word for part in item.folders for word in words_of(part)}
            kinds[tuple(w for w in [item.words.lower(), *item.rest] if w not in own and not w.isdigit())].append(item)
    rivals = Counter(item.folders for item in named if item.key == LABEL)
    if len(kinds) < 2 or max(rivals.values()) < 2 or min(map(len, kinds.values())) < 2:
        return named
    good = [kind for kind, items in kinds.items() if has_few_integers(items[0].source)]
    if len(good) != 1:
        return named
    dropped = {id(item) for kind, items in kinds.items() if kind != good[0] for item in items}
    notes.append(
        f"label: files such as {kinds[good[0]][0].source.path.name}; {len(dropped)} others that are labels by name do "
        "not hold few whole numbers."
    )
    return [replace(item, key=IGNORED) if id(item) in dropped else item for item in named]


def _notes_on(named: Sequence[_Named], patterns: Mapping[str, str], *, only: bool) -> list[str]:
    by_key: dict[str, Counter[str]] = defaultdict(Counter)
    for item in named:
        if item.key not in (None, IGNORED):
            by_key[str(item.key)][patterns.get(str(item.key), item.words)] += 1
    order = sorted(by_key, key=lambda key: (key == LABEL, key))
    notes = [
        f"{key}: {sum(by_key[key].values())} files, by "
        + some([words if " " in words or words in patterns.values() else f"*{words}*" for words in by_key[key]])
        + "."
        for key in order
    ]
    strangers = [item.source.path.name for item in named if item.key in (None, IGNORED) and not item.doubts]
    if strangers:
        by = "pattern" if only else "name"
        notes.append(f"Ignored: {len(strangers)} volumes that are no modality by {by}: {some(strangers)}.")
    return notes


def _cases(items: Sequence[_Named], root: Path, notes: list[str]) -> tuple[dict[tuple[str, ...], list[_Named]], str]:
    """Group volumes into cases: by folder, or by what their names share."""
    flat_ids = _flat_ids(items)
    buckets: dict[tuple[str, ...], list[_Named]] = defaultdict(list)
    for item in items:
        buckets[item.folders].append(item)
    folders: dict[tuple[str, ...], list[_Named]] = {}
    flat: dict[tuple[str, ...], list[_Named]] = {}
    strays: list[_Named] = []
    for place, members in buckets.items():
        groups: dict[str, list[_Named]] = defaultdict(list)
        for item in members:
            groups[flat_ids[id(item)]].append(item)
        groups = _with_versions(groups, place)
        paired = sum(len({item.key for item in group}) > 1 for name, group in groups.items() if name)
        distinct = len({item.key for item in members}) == len(members)
        side_by_side = len(groups) > 1 and paired * 2 >= len(groups) and not distinct
        if place and not side_by_side:
            folders[place] = members
        elif len(buckets) == 1 and distinct and paired != len(groups):
            folders[(root.resolve().name,)] = members  # the folder of one case
        elif place or side_by_side or len(buckets) == 1:
            flat |= {(*place, name or root.resolve().name): group for name, group in groups.items()}
        else:  # beside folders of cases: a whole case, or a template and the like
            flat |= {(name,): group for name, group in groups.items() if name and len({i.key for i in group}) > 1}
            strays += [item for name, group in groups.items() if (name,) not in flat for item in group]
    if folders and flat:
        named = {place: {flat_ids[id(item)] for item in members} for place, members in folders.items()}
        if all(len(ids) == 1 and "" not in ids for ids in named.values()):  # p01/p01_a_T1 beside p02/p02_a_T1, p02_b_T1
            flat |= {(*place, *named[place]): members for place, members in folders.items()}
            folders = {}
    if folders and flat:
        one, other = next(iter(folders.values()))[0].source.path, next(iter(flat.values()))[0].source.path
        raise DataError(
            [
                f"{root} looks like two layouts: a folder a case ({one.parent}), and files side by side ({other}); "
                "give the folder of one of them"
            ]
        )
    if strays:
        notes.append(f"Ignored: {len(strays)} volumes that are in no case: {some(i.source.path.name for i in strays)}.")
    return (folders, "folders") if folders else (flat, "files")


def _with_versions(groups: Mapping[str, list[_Named]], place: Sequence[str]) -> dict[str, list[_Named]]:
    """Groups of files by ID, where other versions of a case's files (``p01_T2_reg`` beside ``p01_T2``) are that case's.

    They are told from another case (``p01_2_T2``, or ``p01_T1_2``, ``p01_T2_2`` and ``p01_seg_2``) by what they lack,
    and by the ID standing alone in front of the modality's name or, for one file, being the folder's name. Where names
    of several modalities have no ID (``T1`` and ``FLAIR`` beside ``T1_reg`` and ``FLAIR_reg``), all are one case's.
    """
    if len({item.key for item in groups.get("", ())}) > 1:
        return {"": [item for items in groups.values() for item in items]}
    keys = {name: {item.key for item in items} for name, items in groups.items()}
    spelt: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in filter(None, groups):
        spelt[tuple(words_of(name))].append(name)
    bases: dict[str, str] = {}
    for name, items in groups.items():
        in_front = {tuple(words_of(item.name)[: min(item.used, default=0)]) for item in items}
        for other in spelt[in_front.pop()] if len(in_front) == 1 else ():
            lacks = len(keys[name]) < len(keys[other]) or LABEL in keys[other] - keys[name]
            if other != name and lacks:
                bases[name] = other
        if len(keys[name]) == 1 and place and place[-1] in groups and place[-1] not in ("", name):
            bases[name] = place[-1]
    joined: dict[str, list[_Named]] = defaultdict(list)
    for name, items in groups.items():
        joined[bases.get(name, name)] += items
    return joined


def _flat_ids(items: Sequence[_Named]) -> dict[int, str]:
    """What is left of a name without what names the modality: ``p01`` of ``p01_T1_reg``, where all T1 are ``_reg``."""
    rests: dict[str | None, list[set[str]]] = defaultdict(list)
    for item in items:
        rests[item.key].append(set(item.rest))
    shared = set.intersection(*(rest for of_key in rests.values() for rest in of_key)) if rests else set()
    ending = {k: set.intersection(*of_key) - shared if len(of_key) > 1 else set() for k, of_key in rests.items()}
    ids = {}
    for item in items:
        words = words_of(item.name)
        drop = item.used | {i for i, word in enumerate(words) if word in ending[item.key]}
        ids[id(item)] = without_words(item.name, drop)
    return ids


def _ids(places: Sequence[tuple[str, ...]], layout: str) -> dict[tuple[str, ...], tuple[str, str]]:
    """Place -> ID and patient: the last name alone where it is enough, and no visit's."""
    names = list(places)
    if layout == "folders":
        while len(names) > 1 and min(map(len, names)) > 1 and len({name[-1] for name in names}) == 1:
            names = [name[:-1] for name in names]  # p01/anat, p02/anat
    leaves, patients = [name[-1] for name in names], patients_at(names)
    visits = [is_visit(leaf) and leaf != patient for leaf, patient in zip(leaves, patients, strict=True)]
    enough = len(set(leaves)) == len(leaves) and not any(visits)
    ids = [name[-1] if enough else "_".join(name) for name in names]
    return dict(zip(places, zip(ids, patients, strict=True), strict=True))


def _by_key(items: Sequence[_Named]) -> dict[str, list[Source]]:
    by_key: dict[str, list[Source]] = {}
    for item in items:
        by_key.setdefault(str(item.key), []).append(item.source)
    return by_key


def _case(
    case_id: str, patient: str, by_key: Mapping[str, Sequence[Source]], root: Path, everywhere: CasesFiles
) -> FoundCase:
    images = {key: by_key[key][0] for key in sorted(by_key) if key != LABEL}
    label = by_key[LABEL][0] if LABEL in by_key else None
    problems = rival_problems(by_key, root, case_id, everywhere)
    place = str(next(iter(by_key.values()))[0].path.parent)
    return FoundCase(case_id, patient, images, label, place=place, problems=problems)


def _with_mixed_series(
    cases: Sequence[FoundCase], mixed: Sequence[_Named], root: Path, complete: Collection[str]
) -> list[FoundCase]:
    """The cases, and a problem with each that has a folder of several DICOM series and is not complete without.

    A case that has all modalities may have such a folder, of localizers for example.
    """
    told = list(cases)
    for item in mixed:
        folder = item.source.path
        index = _case_of(folder, told, root)
        if index is None:  # nothing else of it was found
            name = "_".join(folder.relative_to(root).parts) or root.resolve().name
            told.append(FoundCase(name, "", {}, place=str(folder)))
            index = len(told) - 1
        if not complete or not set(complete) <= told[index].images.keys():
            problem = (
                "several DICOM series lie in one folder, expected one folder a series",
                f"{item.series} in {folder}",
            )
            told[index] = replace(told[index], problems=(*told[index].problems, problem))
    return told


def _case_of(folder: Path, cases: Sequence[FoundCase], root: Path) -> int | None:
    """Which case a folder belongs to: one of its name, else the only one with files in it or beside it."""
    named = [index for index, case in enumerate(cases) if case.case_id == folder.name]
    places = {str(folder), *([str(folder.parent)] if folder.parent != root else [])}
    near = named or [index for index, case in enumerate(cases) if case.place in places]
    return near[0] if len(near) == 1 else None
