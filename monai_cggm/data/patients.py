# SPDX-License-Identifier: Apache-2.0
"""Which cases are one patient's, by the names of cases and folders: they belong in one part of a split.

In doubt, cases are put together: that costs a split some freedom, while one patient's cases in training and test spoil
its scores.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median

from monai_cggm.errors import some

#: Releases whose IDs end in a time point, a study or a session.
_RELEASES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?P<patient>brats(20)?1[5-9]_.+)_\d+",  # Brats18_CBICA_APZ_1
        r"(?P<patient>brats_tcia_pat\d+)_\d+",  # BraTS 2016
        r"(?P<patient>brats-[a-z]+(-rt)?-\d+)-\d+",  # BraTS-GLI-00000-000
        r"(?P<patient>(upenn-gbm|rhuh)-\d+)_\d+",  # UPENN-GBM-00001_11, RHUH-0001_0
        r"(?P<patient>ucsf-pdgm-\d+)_fu\w+",  # UCSF-PDGM-0012_FU001d
        r"(?P<patient>oas\d+(_\d+)?)_mr_?d?\d+",  # OAS1_0001_MR1, OAS30001_MR_d0129
        r"(?P<patient>\d{5})_\d{7}",  # PI-CAI: 10005_1000006
        r"(?P<patient>(training|test)\d\d)_\d\d",  # ISBI 2015: training01_02
    )
)

_VISITS = r"(ses(s|sion)?|visit|tp|time(point)?|day|week|month|year)"
_STATES = r"(baseline|bl|fu|follow[-_ ]?up|(pre|post|intra)([-_ ]?op)?)"
_TIME = r"([T_ -]?\d\d[-_:.]?\d\d([-_:.]?\d\d(\.\d+)?)?)?"
_DATE = rf"((19|20)\d\d[-_.]?[01]\d[-_.]?[0-3]\d|[0-3]\d[-.][0-3]\d[-.](19|20)\d\d){_TIME}"
_BIDS = r"ses-\w+"
#: What may also be patients, numbered: studies, volunteers, or any number after a state of treatment.
_SCANS = r"(scan|exam|study)"

#: Whole names of folders. What follows a date is mostly what was scanned.
_FOLDER = re.compile(
    rf"({_VISITS}[-_ ]?\d{{0,8}}([-_.]\d+)?|{_STATES}|{_BIDS}|{_DATE}([-_ ].*)?|"
    rf"(?P<weak>{_SCANS}[-_ ]?\d{{0,8}}([-_.]\d+)?|{_STATES}[-_ ]?\d{{1,8}}|v\d{{1,3}}))",
    re.IGNORECASE | re.DOTALL,
)
_END = re.compile(
    rf"(?P<patient>.+?)[-_ .]+({_VISITS}[-_ ]?\d{{0,4}}|{_SCANS}|{_STATES}|{_BIDS}|{_DATE}([-_]\d{{1,2}})?|"
    rf"(?P<weak>({_VISITS}|{_SCANS})[-_ ]?\d{{1,4}}([-_.]\d{{1,2}})?|{_STATES}[-_ ]?\d{{1,2}}|[vm]\d{{1,3}}))",
    re.IGNORECASE,
)
_FRONT = re.compile(
    rf"(({_VISITS}|{_SCANS})[-_ ]?\d{{1,4}}|{_STATES}\d{{0,2}}|{_BIDS}|{_DATE})[-_ .]+(?P<patient>.+)", re.IGNORECASE
)

#: More cases than this under one name that may be a site's, or a disease's, are not one patient's.
MOST_VISITS = 12


def patient_of(case_id: str) -> str:
    """The patient's part of an ID: the ID without its time point, where its release has one.

    Example:
        >>> [patient_of(i) for i in ("Brats18_CBICA_APZ_1", "BraTS-GLI-00000-000", "BraTS2021_00000")]
        ['Brats18_CBICA_APZ', 'BraTS-GLI-00000', 'BraTS2021_00000']
    """
    for pattern in _RELEASES:
        match = pattern.fullmatch(case_id)
        if match:
            return match["patient"]
    return case_id


def patients_in(case_ids: Sequence[str], folders: Sequence[Sequence[str]] = ()) -> list[str]:
    """The patient's part of each ID of a data set: without visits and dates, where names tell patients.

    Visits and dates are taken from an ID's end, again and again, and from its front where a letter and a digit are
    left. What is left is a patient's name where it has a digit. Where it has none (``alpha_fu1``, but also
    ``scan_post``), it is one where more than two such names are left and none has more than :data:`MOST_VISITS` cases.
    Names under which more cases than that have what may be running numbers (``site1_post_07``, ``site1_scan07``; not
    dates, weeks and numbered visits) are no patients'. If all cases, more than two, would be one patient's, nothing is
    taken away. Letter case tells no patients apart.

    Args:
        case_ids: of all cases.
        folders: above each case: names in different folders are different ones; default: none.

    Returns:
        One patient an ID, in the same order, without its folders.

    Example:
        >>> patients_in(["p01_ses1", "p02_20200131", "p03_visit1_week2", "sub-01_ses-1", "BraTS-GLI-00000-000"])
        ['p01', 'p02', 'p03', 'sub-01', 'BraTS-GLI-00000']
        >>> patients_in(["alpha_fu1", "alpha_fu2", "beta_fu1", "gamma_fu1"])
        ['alpha', 'alpha', 'beta', 'gamma']
        >>> patients_in(["site1_post_01", "site1_post_02", "site1_post_03"])
        ['site1_post_01', 'site1_post_02', 'site1_post_03']
    """
    fronts, weak = zip(*map(_without_visits, case_ids), strict=True) if case_ids else ((), ())
    above = ["".join(f"{folder}/" for folder in own) for own in folders] or [""] * len(case_ids)
    named = [folder + front for folder, front in zip(above, fronts, strict=True)]
    refused = _refused(named, [front != own for front, own in zip(fronts, case_ids, strict=True)], weak)
    patients = [
        patient_of(case_id if name.casefold() in refused else front)
        for case_id, front, name in zip(case_ids, fronts, named, strict=True)
    ]
    different = {(folder + patient).casefold() for folder, patient in zip(above, patients, strict=True)}
    if len(case_ids) > 2 > len(different):
        patients = [patient_of(case_id) for case_id in case_ids]
    spelling: dict[str, str] = {}
    return [spelling.setdefault(patient.casefold(), patient) for patient in patients]


def patients_at(places: Sequence[Sequence[str]]) -> list[str]:
    """The patient of each case, by its folders and its own name.

    Folders of visits or dates say nothing, wherever they stand: ``p01/ses1``, ``baseline/p01`` and ``p01/2020-01-31``
    are ``p01``'s, within the limits of :func:`patients_in`. Without such words, cases in a folder are one patient's
    where their names recur in as many folders as there are names (``p01/native``, ``p01/registered``; not
    ``north/p01``), or begin with the folder's (``p01/p01_a``), a dozen in the middle folder at most. Names themselves
    are read as in :func:`patients_in`.

    Args:
        places: the folders below the data set's, and last the case's name, which may be its folder's.

    Returns:
        One patient a case, in the same order.

    Example:
        >>> patients_at([("p01", "ses1"), ("p01", "ses2"), ("p02", "ses1")])
        ['p01', 'p01', 'p02']
        >>> patients_at([("baseline", "p01"), ("followup", "p01"), ("HGG", "p02")])
        ['p01', 'p01', 'p02']
    """
    with_visits = {tuple(place[:-1]) for place in places if len(place) > 1 and is_visit(place[-1])}
    left = [_without_visit_folders(place, tuple(place[:-1]) in with_visits) for place in places]
    fronts = ["/".join(kept) for kept in left]
    changed = [len(kept) < len(place) for kept, place in zip(left, places, strict=True)]
    weak = [own and _is_weak(place[-1]) for own, place in zip(changed, places, strict=True)]
    refused = _refused(fronts, weak, weak)
    if len(places) > 2 > len(set(map(str.casefold, fronts))):
        refused.update(map(str.casefold, fronts))  # the folder of all of them
    left = [
        tuple(place) if front.casefold() in refused else kept
        for place, front, kept in zip(places, fronts, left, strict=True)
    ]
    others = [place for place, kept in zip(places, left, strict=True) if len(kept) == len(place)]
    leaves, parents = Counter(place[-1] for place in others), Counter(tuple(place[:-1]) for place in others)
    recurring = len(leaves) < len(others) and len(parents) >= len(leaves)
    few = len(parents) > 2 and median(parents.values()) <= MOST_VISITS  # HGG/HGG_001 is no patient's folder
    for index, (place, kept) in enumerate(zip(places, left, strict=True)):
        if len(kept) == len(place) > 1 and not is_visit(place[-2]):
            own, folder = place[-1], place[-2]
            versions = recurring and (_number(folder) or not _number(own))
            if own == folder or versions or (few and own.startswith(folder)):
                left[index] = kept[:-1]
    ends = patients_in([kept[-1] for kept in left], [kept[:-1] for kept in left])
    return _short_names([(*kept[:-1], name) for kept, name in zip(left, ends, strict=True)])


def patients_note(patients: Mapping[str, str]) -> list[str]:
    """A sentence for the reader, where several cases are one patient's; an empty list otherwise.

    Args:
        patients: case ID -> patient.

    Example:
        >>> patients_note({"p01_ses1": "p01", "p01_ses2": "p01", "p02": "p02"})
        ['One patient by name: p01 (p01_ses1, p01_ses2).']
    """
    cases: dict[str, list[str]] = {}
    for case_id, patient in patients.items():
        cases.setdefault(patient, []).append(case_id)
    several = [f"{patient} ({some(ids, 3)})" for patient, ids in cases.items() if len(ids) > 1]
    return [f"One patient by name: {some(several, 3)}."] if several else []


def is_visit(folder: str) -> bool:
    """Whether a folder's name is a visit's or a date, as those in a patient's folder are.

    Example:
        >>> [is_visit(name) for name in ("ses-1", "baseline", "2020-01-31", "07-08-2011-NA-MR prostate", "p01")]
        [True, True, True, True, False]
    """
    return _FOLDER.fullmatch(folder) is not None


def _refused(fronts: Sequence[str], changed: Sequence[bool], weak: Sequence[bool]) -> set[str]:
    """Names, without what was taken away, that are no patients': words that may be anything, and too many cases."""
    names = [front.casefold() for front in fronts]
    words = Counter(name for name, other in zip(names, changed, strict=True) if other and not _number(name))
    running = Counter(name for name, may_be in zip(names, weak, strict=True) if may_be)
    refused = {name for name, count in running.items() if count > MOST_VISITS}
    return refused | (set(words) if len(words) < 3 or max(words.values()) > MOST_VISITS else set())


def _without_visits(case_id: str) -> tuple[str, bool]:
    """``p01`` of ``p01_visit1_week2``, and whether what was taken away may be a patient's running number."""
    left, weak = case_id, False
    while match := _END.fullmatch(left):
        left, weak = match["patient"], weak or bool(match["weak"])
    match = _FRONT.fullmatch(left)
    if match and _number(match["patient"]) and re.search("[a-z]", match["patient"], re.IGNORECASE):
        left = match["patient"]
    return left, weak


def _without_visit_folders(place: Sequence[str], in_visits: bool) -> tuple[str, ...]:
    """The parts that are no visits; ``in_visits``: beside visits, whatever the last one is called."""
    above = place[:-1] if in_visits else place
    return tuple(part for part in above if not is_visit(part)) or tuple(place)


def _is_weak(folder: str) -> bool:
    match = _FOLDER.fullmatch(folder)
    return match is not None and match["weak"] is not None


def _short_names(places: Sequence[tuple[str, ...]]) -> list[str]:
    """The last part of each, or all parts where the last one is not enough."""
    ends = Counter(
        place[-1].casefold() for place in {tuple(map(str.casefold, place)): place for place in places}.values()
    )
    alone = max(ends.values(), default=1) == 1
    return [place[-1] if alone else "_".join(place) for place in places]


def _number(name: str) -> bool:
    return re.search(r"\d", name) is not None
