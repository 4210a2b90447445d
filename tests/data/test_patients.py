# SPDX-License-Identifier: Apache-2.0
"""Which cases are one patient's, by names as people give them."""

from __future__ import annotations

import pytest

from monai_cggm.data.patients import MOST_VISITS, is_visit, patient_of, patients_at, patients_in, patients_note


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
        ("p01_ses001 p01_session_002 p01_visit-003 p01_week100 p02", "p01 p01 p01 p01 p02"),
        ("p01_pre_op p01_post-op p01_intraop p01_day30 p01_scan1 p02_v1 p02_v2", "p01 p01 p01 p01 p01 p02 p02"),
        ("p01_20200131T1200 p01_20200131_120000 p01_31-01-2020 p01_31.01.2020 p02_20200131_2", "p01 p01 p01 p01 p02"),
        ("20200131_p01 ses1_p01 baseline_p01 p02", "p01 p01 p01 p02"),
        ("P01_ses1 p01_ses2 p02_ses1", "P01 P01 p02"),
        (
            "UPENN-GBM-00001_11 UPENN-GBM-00001_21 RHUH-0001_0 RHUH-0001_2",
            "UPENN-GBM-00001 UPENN-GBM-00001 RHUH-0001 RHUH-0001",
        ),
        ("OAS1_0001_MR1 OAS1_0001_MR2 OAS30001_MR_d0129 OAS30001_MR_d0757", "OAS1_0001 OAS1_0001 OAS30001 OAS30001"),
        ("10000_1000000 10005_1000005 10005_1000006", "10000 10005 10005"),
        ("training01_01 training01_02 training02_01", "training01 training01 training02"),
        (
            "brats_tcia_pat101_1 brats_tcia_pat101_2 BraTS2018_CBICA_APZ_1",
            "brats_tcia_pat101 brats_tcia_pat101 BraTS2018_CBICA_APZ",
        ),
        ("UCSF-PDGM-0012 UCSF-PDGM-0012_FU001d UCSF-PDGM-0013", "UCSF-PDGM-0012 UCSF-PDGM-0012 UCSF-PDGM-0013"),
        ("002_S_0295_m06 002_S_0295_bl 003_S_0001_bl", "002_S_0295 002_S_0295 003_S_0001"),
        ("ReMIND-001-intraop ReMIND-001-preop ReMIND-002-preop", "ReMIND-001 ReMIND-001 ReMIND-002"),
        ("CHUM-001 CHUM-002 CHUS-001", "CHUM-001 CHUM-002 CHUS-001"),
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


def test_the_note_names_patients_with_several_cases() -> None:
    case_ids = [f"p{number}_ses{visit}" for number in range(5) for visit in (1, 2)]
    note = patients_note(dict(zip(case_ids, patients_in(case_ids), strict=True)))
    assert note == [
        "One patient by name: p0 (p0_ses1, p0_ses2), p1 (p1_ses1, p1_ses2), p2 (p2_ses1, p2_ses2) and 2 more."
    ]
    assert patients_note({"p1_ses1": "p1", "p2_ses1": "p2", "p3": "p3"}) == []
    weeks = {f"p_week{week}": "p" for week in range(5)}
    assert patients_note(weeks) == ["One patient by name: p (p_week0, p_week1, p_week2 and 2 more)."]


@pytest.mark.parametrize(
    ("places", "patients"),
    [
        # visits above, below and on both sides of the patient's folder
        ("p01/ses1 p01/ses2 p02/ses1", "p01 p01 p02"),
        ("baseline/p0 baseline/p1 followup/p0 followup/p1", "p0 p1 p0 p1"),
        ("week0/p00 week0/p01 week4/p00 week8/p01", "p00 p01 p00 p01"),
        ("v1/p00 v1/p01 v2/p00 v2/p01", "p00 p01 p00 p01"),
        ("A/baseline/p00 A/followup/p00 B/baseline/p00 B/followup/p01", "A_p00 A_p00 B_p00 B_p01"),
        ("p0/visit1/week2 p0/visit2/week4 p1/visit1/week2", "p0 p0 p1"),
        ("p0/2020-01-11/pre p0/2020-01-11/post p1/2020-01-11/pre", "p0 p0 p1"),
        ("p0/ses-1/scan1 p0/ses-1/scan2 p1/ses-1/scan1", "p0 p0 p1"),
        ("2020-01-31/p00 2021-01-31/p00 2021-01-31/p01", "p00 p00 p01"),
        # dates as scanners and archives write them
        ("002_S_0295/2006-04-18_08_20_30.0 002_S_0295/2007-05-02_10_01_00.0 002_S_0413/2006-05-02_12_31_52.0",
         "002_S_0295 002_S_0295 002_S_0413"),
        ("ProstateX-0/07-01-2011-NA-MR ProstateX-0/08-09-2012-NA-MR p1/07-07-2011-NA-MR", "ProstateX-0 ProstateX-0 p1"),
        ("p0/20200101_120100 p0/01-02-2020 p0/31.01.2020 p1/20200131T1200", "p0 p0 p0 p1"),
        # LUMIERE
        ("P-001/week-000-1 P-001/week-000-2 P-001/week-012 P-002/week-000", "P-001 P-001 P-001 P-002"),
        # beside a visit, all are visits
        ("p1/baseline p1/odd p2/baseline", "p1 p1 p2"),
        # no such words: names that recur, or begin with the folder's
        ("p1/native p1/mni p2/native p2/mni", "p1 p1 p2 p2"),
        ("10000/10000_1000000 10005/10005_1000005 10005/10005_1000006 10011/10011_1000011", "10000 10005 10005 10011"),
        ("p01/p01 p01/p01_reg p02/p02 p02/p02_reg p03/p03", "p01 p01 p02 p02 p03"),
        # sites, grades and parts are no patients
        ("north/p01 north/p02 south/p01 south/p02", "north_p01 north_p02 south_p01 south_p02"),
        ("Utrecht/001 Utrecht/002 Singapore/001 Singapore/002 Amsterdam/001",
         "Utrecht_001 Utrecht_002 Singapore_001 Singapore_002 Amsterdam_001"),
        ("train/p00 train/p01 val/p02 test/p03", "p00 p01 p02 p03"),
        ("HGG/Brats18_X_1 HGG/Brats18_X_2 LGG/Brats18_Y_1", "Brats18_X Brats18_X Brats18_Y"),
        ("site/v01 site/v02 site/v03", "v01 v02 v03"),  # volunteers
        ("v01 v02 v03", "v01 v02 v03"),
        # names without a digit, where folders are visits for certain
        ("p01/ses1 p02/ses1 pilot/ses1 pilot/ses2", "p01 p02 pilot pilot"),
        ("baseline/anna baseline/ben followup/anna followup/ben", "anna ben anna ben"),
        ("sub-alice/ses-01 sub-alice/ses-02 sub-bob/ses-01", "sub-alice sub-alice sub-bob"),
        # the same ends in different folders
        ("A/001_fu1 A/001_fu2 B/001_fu1 B/001_fu2 B/002_fu1", "A_001 A_001 B_001 B_001 B_002"),
        ("p01/head_ses1 p01/head_ses2 p02/head_ses1 p03/head_ses1", "p01 p01 p02 p03"),
        # a folder of all of them
        ("brain/study_00 brain/study_01 brain/study_02", "study_00 study_01 study_02"),
        ("w/b1/2020-01-03 w/b1/2020-01-04 w/b1/2020-01-05", "2020-01-03 2020-01-04 2020-01-05"),
        ("BraTS-MEN-RT-0000-1 BraTS-MEN-RT-0000-2", "BraTS-MEN-RT-0000 BraTS-MEN-RT-0000"),
    ],
)  # fmt: skip
def test_patients_at(places: str, patients: str) -> None:
    assert patients_at([place.split("/") for place in places.split()]) == patients.split()


@pytest.mark.parametrize("scans", [12, 14])
def test_one_patient_with_many_scans_does_not_part_the_others(scans: int) -> None:
    places = [("p0", f"p0_s{scan:02d}") for scan in range(scans)]
    places += [(f"p{number}", f"p{number}_s{scan:02d}") for number in range(1, 5) for scan in range(3)]
    assert patients_at(places) == ["p0"] * scans + [f"p{number}" for number in range(1, 5) for _ in range(3)]
    sites = [(f"s{site}", f"s{site}_{number:03d}") for site in range(4) for number in range(20)]
    assert patients_at(sites) == [name for _, name in sites]


@pytest.mark.parametrize("count", [12, 20])
def test_folders_of_many_numbered_scans_are_no_patients(count: int) -> None:
    for folders, case in ((("HGG", "LGG", "MGG"), "exam_{:03d}"), (("s1", "s2", "s3"), "v{:02d}")):
        places = [(folder, case.format(number)) for folder in folders for number in range(count)]
        expected = [place[0] if count == 12 else "_".join(place) for place in places]
        assert patients_at(places) == expected
    for visits in ([f"fu{number}" for number in range(count)], [f"scan{number}" for number in range(count)]):
        assert patients_at([(visit, p) for visit in visits for p in ("p01", "p02")]) == ["p01", "p02"] * count
    for visit in ("session{:02d}", "week{}", "2020-01-{:02d}"):  # without a limit
        places = [(name, visit.format(number)) for name in ("alice", "bob", "carol") for number in range(1, count + 1)]
        assert patients_at(places) == [name for name, _ in places]
    sites = [
        (f"site{letter}", f"00{number}_fu{visit}") for letter in "ABCDEFG" for number in (1, 2) for visit in (1, 2)
    ]
    assert patients_at(sites) == [f"{site}_{name[:3]}" for site, name in sites]
    mice = [(f"group{group}", f"m{number:02d}") for group in range(3) for number in range(10)]
    assert patients_at(mice) == ["_".join(place) for place in mice]
    scans = [f"site{site}_scan{number:02d}" for site in range(3) for number in range(count)]
    assert patients_in(scans) == [name[:5] if count == 12 else name for name in scans]


@pytest.mark.parametrize("count", [12, 30])
def test_running_numbers_after_a_state_of_treatment(count: int) -> None:
    """A dozen may be one patient's, thirty are a site's; thirty weeks are one patient's all the same."""
    case_ids = [f"site{site}_post_{number:02d}" for site in range(3) for number in range(count)]
    expected = [f"site{site}" for site in range(3) for _ in range(count)]
    assert patients_in(case_ids) == (expected if count == 12 else case_ids)
    weeks = [case_id.replace("post_", "week") for case_id in case_ids]
    assert patients_in(weeks) == expected
    second = [case_id.replace("post", "visit1") for case_id in case_ids]
    assert patients_in(second) == (expected if count == 12 else second)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("ses-1", True), ("Visit_2", True), ("20200131", True), ("week12", True), ("p01", False), ("anat", False)],
)
def test_folders_of_visits(name: str, expected: bool) -> None:
    assert is_visit(name) is expected
