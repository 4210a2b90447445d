# SPDX-License-Identifier: Apache-2.0
"""Which cases are one patient's, by their IDs: such cases belong in one part of a split."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_RELEASES = (
    re.compile(r"(?P<patient>brats1[789]_.+)_\d+", re.IGNORECASE),  # Brats18_CBICA_APZ_1
    re.compile(r"(?P<patient>brats-[a-z]+-\d+)-\d+", re.IGNORECASE),  # BraTS-GLI-00000-000
)

_VISITS = r"(ses(s|sion)?|visit|tp|time(point)?|week|month|year|baseline|bl|fu|follow[-_ ]?up|pre|post|preop|postop)"
_DATE = r"(19|20)\d\d[-_.]?[01]\d[-_.]?[0-3]\d"
_FOLDER = re.compile(rf"({_VISITS}[-_ ]?\d{{0,8}}|ses-\w+|{_DATE})", re.IGNORECASE)
#: At the end of an ID, more than two digits after such a word are a running number.
_END = re.compile(rf"(?P<patient>.+?)[-_ .]+({_VISITS}[-_ ]?\d{{0,2}}|ses-\w+|{_DATE})", re.IGNORECASE)

#: Names without a digit that have more cases than this are a site's or a disease's; nobody is scanned that often.
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


def patients_in(case_ids: Sequence[str]) -> list[str]:
    """The patient's part of each ID of a data set: without visits and dates at its end, where names tell patients.

    What is left is a patient's name where it has a digit. Where it has none (``alpha_fu1``, but also ``scan_post``), it
    is one where more than two such names are left and none has more than :data:`MOST_VISITS` cases. If all cases, more
    than two, would be one patient's, nothing is taken away. In doubt cases are put together: that costs a split some
    freedom, while one patient's cases in training and test spoil its scores.

    Args:
        case_ids: of all cases.

    Returns:
        One patient an ID, in the same order.

    Example:
        >>> patients_in(["p01_ses1", "p02_20200131", "p03_visit1_week2", "sub-01_ses-1", "BraTS-GLI-00000-000"])
        ['p01', 'p02', 'p03', 'sub-01', 'BraTS-GLI-00000']
        >>> patients_in(["alpha_fu1", "alpha_fu2", "beta_fu1", "gamma_fu1"])
        ['alpha', 'alpha', 'beta', 'gamma']
        >>> patients_in(["site1_post_01", "site1_post_02", "site1_post_03"])
        ['site1_post_01', 'site1_post_02', 'site1_post_03']
    """
    patients = [_without_visits(case_id) for case_id in case_ids]
    parted = [(case_id, patient) for case_id, patient in zip(case_ids, patients, strict=True) if patient != case_id]
    words = Counter(patient for _, patient in parted if not re.search(r"\d", patient))
    refused = set(words) if len(words) < 3 or max(words.values()) > MOST_VISITS else set()
    patients = [
        patient_of(case_id) if patient in refused else patient_of(patient)
        for case_id, patient in zip(case_ids, patients, strict=True)
    ]
    return [patient_of(case_id) for case_id in case_ids] if len(case_ids) > 2 > len(set(patients)) else patients


def patients_note(case_ids: Sequence[str], patients: Sequence[str]) -> list[str]:
    """A sentence for the reader, where IDs told that several cases are one patient's; an empty list otherwise.

    Example:
        >>> patients_note(["p01_ses1", "p01_ses2", "p02"], ["p01", "p01", "p02"])
        ["Time points at the end of a name are one patient's (p01)."]
    """
    pairs = zip(case_ids, patients, strict=True)
    visits = Counter(patient for case_id, patient in pairs if patient not in (case_id, patient_of(case_id)))
    several = sorted(patient for patient, count in visits.items() if count > 1)
    more = f" and {len(several) - 3} more" if len(several) > 3 else ""
    return [f"Time points at the end of a name are one patient's ({', '.join(several[:3])}{more})."] if several else []


def is_visit(folder: str) -> bool:
    """Whether a folder's name is a visit's or a date, as those in a patient's folder are.

    Example:
        >>> [is_visit(name) for name in ("ses-1", "baseline", "2020-01-31", "p01")]
        [True, True, True, False]
    """
    return _FOLDER.fullmatch(folder) is not None


def _without_visits(case_id: str) -> str:
    """The ID without what ends it, again and again: ``p01`` of ``p01_visit1_week2``."""
    while match := _END.fullmatch(case_id):
        case_id = match["patient"]
    return case_id
