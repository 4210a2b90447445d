# SPDX-License-Identifier: Apache-2.0
"""Which cases are one patient's, by names as people give them."""

from __future__ import annotations

import pytest

from monai_cggm.data.patients import MOST_VISITS, is_visit, patient_of, patients_in, patients_note


@pytest.mark.parametrize(
    ("case_id", "patient"),
    [
        ("Brats17_2013_2_1", "Brats17_2013_2"),
        ("Brats18_CBICA_APZ_1", "Brats18_CBICA_APZ"),
        ("Brats18_X_2", "Brats18_X"),
        ("BraTS19_TCIA10_628_1", "BraTS19_TCIA10_628"),
        ("BraTS20_Training_001", "BraTS20_Training_001"),
        ("BraTS2021_00000", "BraTS2021_00000"),
        ("BraTS-GLI-00000-000", "BraTS-GLI-00000"),
        ("BraTS-GLI-02405-101", "BraTS-GLI-02405"),
        ("Phantom_000", "Phantom_000"),
        ("BRATS_001", "BRATS_001"),
    ],
)
def test_patient_of(case_id: str, patient: str) -> None:
    assert patient_of(case_id) == patient


@pytest.mark.parametrize(
    ("case_ids", "patients"),
    [
        ("p01_ses1 p01_ses2 p02_ses1", "p01 p01 p02"),
        ("p01_20200131 p01_2021-02-28 p02_20200131", "p01 p01 p02"),
        ("p01_visit1_week2 p01_visit2 p02_visit1_week2", "p01 p01 p02"),
        ("p1_visit1-2020.01.31 p1_baseline_post p2_pre", "p1 p1 p2"),
        (
            "TCGA-02-0003_1997.06.08 TCGA-02-0003_1999.01.12 TCGA-02-0006_1996.08.23",
            "TCGA-02-0003 TCGA-02-0003 TCGA-02-0006",
        ),
        ("alpha_fu1 alpha_fu2 beta_fu1 gamma_fu1", "alpha alpha beta gamma"),
        ("Brats18_CBICA_APZ_1 Brats18_CBICA_APZ_2 x", "Brats18_CBICA_APZ Brats18_CBICA_APZ x"),
        (
            "BraTS-GLI-00001-000_pre BraTS-GLI-00001-001_pre BraTS-GLI-00002-000_pre",
            "BraTS-GLI-00001 BraTS-GLI-00001 BraTS-GLI-00002",
        ),
        # These are left as they are: two words, all of one, running numbers, no dates, nothing in front.
        ("scan_pre scan_post other_pre", "scan_pre scan_post other_pre"),
        ("site1_post_01 site1_post_02 site1_post_03", "site1_post_01 site1_post_02 site1_post_03"),
        ("site1_post_001 site2_post_002 site3_post_001", "site1_post_001 site2_post_002 site3_post_001"),
        ("p1_20201399 p1_20209901 p2_18991231", "p1_20201399 p1_20209901 p2_18991231"),
        ("20200131 20200201 20200202", "20200131 20200201 20200202"),
        ("BraTS2021_00000 BraTS2021_00002 BRATS_001", "BraTS2021_00000 BraTS2021_00002 BRATS_001"),
    ],
)
def test_patients_in(case_ids: str, patients: str) -> None:
    assert patients_in(case_ids.split()) == patients.split()


def test_words_with_many_cases_are_no_patients() -> None:
    fronts = ["stroke", "tumour", "healthy"]
    few = [f"{front}_pre_{number:02d}" for front in fronts for number in range(MOST_VISITS)]
    assert patients_in(few) == [front for front in fronts for _ in range(MOST_VISITS)]
    many = [*few, "stroke_pre_99"]
    assert patients_in(many) == many


def test_one_patient_alone_and_none() -> None:
    assert patients_in(["p1_ses1", "p1_ses2"]) == ["p1", "p1"]
    assert patients_in(["p1_ses1", "p1_ses2", "p1_ses3"]) == ["p1_ses1", "p1_ses2", "p1_ses3"]
    assert patients_in([]) == []


def test_the_note_names_patients_with_several_visits() -> None:
    case_ids = [f"p{number}_ses{visit}" for number in range(5) for visit in (1, 2)]
    note = "Time points at the end of a name are one patient's (p0, p1, p2 and 2 more)."
    assert patients_note(case_ids, patients_in(case_ids)) == [note]
    # One visit each, or the time points of a release, say nothing new.
    assert patients_note(["p1_ses1", "p2_ses1", "p3"], ["p1", "p2", "p3"]) == []
    assert patients_note(["Brats18_X_1", "Brats18_X_2"], ["Brats18_X", "Brats18_X"]) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [("ses-1", True), ("Visit_2", True), ("20200131", True), ("week12", True), ("p01", False), ("anat", False)],
)
def test_folders_of_visits(name: str, expected: bool) -> None:
    assert is_visit(name) is expected
