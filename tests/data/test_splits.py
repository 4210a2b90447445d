# SPDX-License-Identifier: Apache-2.0
"""Splits by patient."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from monai_cggm.data.checks import Cases
from monai_cggm.data.layouts import patient_of
from monai_cggm.data.splits import PARTS, check_patients, fold_splits, part_of, split_cases, write_split
from monai_cggm.errors import DataError

Items = list[dict[str, Any]]


def items_of(*ids: str) -> Items:
    return [{"case": case, "patient": patient_of(case)} for case in ids]


def singles(count: int) -> Items:
    return items_of(*(f"Phantom_{i:03d}" for i in range(count)))


def follow_ups(*counts: int) -> Items:
    """Patient i has counts[i] cases."""
    return items_of(*(f"BraTS-GLI-{p:05d}-{t:03d}" for p, count in enumerate(counts) for t in range(count)))


def ids_of(split: dict[str, Items]) -> dict[str, list[str]]:
    return {part: [item["case"] for item in items] for part, items in split.items()}


def counts_of(split: dict[str, Items]) -> list[int]:
    return [len(split[part]) for part in PARTS]


@pytest.mark.parametrize("sizes", [(23, 5, 5), (31, 1, 1), (33, 0, 0), (0, 3, 30)])
def test_sizes(sizes: tuple[int, int, int]) -> None:
    cases = singles(33)
    split = split_cases(cases, sizes=sizes)
    assert counts_of(split) == list(sizes)
    assert sorted(itertools.chain(*ids_of(split).values())) == [item["case"] for item in cases]


def test_seed_and_set_of_ids_decide_alone() -> None:
    cases = singles(20)
    first = ids_of(split_cases(cases, seed=3))
    again = ids_of(split_cases(cases[::-1], seed=3))
    assert {part: sorted(ids) for part, ids in again.items()} == first
    assert ids_of(split_cases(cases, seed=4)) != first


def test_draw_is_the_same_for_ever() -> None:
    """Written down, because published numbers depend on it."""
    split = ids_of(split_cases(singles(8), sizes=(4, 2, 2), seed=0))
    assert split == {
        "train": ["Phantom_001", "Phantom_002", "Phantom_006", "Phantom_007"],
        "validation": ["Phantom_000", "Phantom_003"],
        "test": ["Phantom_004", "Phantom_005"],
    }


@pytest.mark.parametrize(
    ("count", "fractions", "sizes"),
    [
        (33, (0.7, 0.15, 0.15), [23, 5, 5]),
        (12, (0.7, 0.15, 0.15), [8, 2, 2]),
        (10, (0.8, 0.2, 0.0), [8, 2, 0]),
        (3, (0.7, 0.15, 0.15), [1, 1, 1]),
        (1251, (0.7, 0.15, 0.15), [876, 188, 187]),
    ],
)
def test_fractions(count: int, fractions: tuple[float, ...], sizes: list[int]) -> None:
    assert counts_of(split_cases(singles(count), fractions=fractions)) == sizes


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("how", [{"sizes": (10, 4, 4)}, {"fractions": (0.5, 0.25, 0.25)}])
def test_patients_stay_together(seed: int, how: dict[str, Any]) -> None:
    split = split_cases(follow_ups(4, 3, 2, 2, 2, 1, 1, 1, 1, 1), seed=seed, **how)
    patients = [{item["patient"] for item in split[part]} for part in PARTS]
    assert all(not one & other for one, other in itertools.combinations(patients, 2))
    assert sum(counts_of(split)) == 18
    assert all(counts_of(split))
    if "sizes" in how:
        assert counts_of(split) == [10, 4, 4]


@pytest.mark.parametrize("how", [{"fractions": (0.8, 0.2, 0.0)}, {"sizes": (1300, 347, 0)}])
def test_patients_of_many_sizes_are_drawn_by_the_seed(how: dict[str, Any]) -> None:
    """Videos have 10 to 70 utterances: putting the longest ones first would leave nothing to the seed."""
    cases = follow_ups(*range(10, 71, 1))[:1647]
    validated = [set(ids_of(split_cases(cases, seed=seed, **how))["validation"]) for seed in range(8)]
    shared = [len(one & other) / len(one) for one, other in itertools.combinations(validated, 2)]
    assert max(shared) < 0.7
    target = 347 if "sizes" in how else 329
    assert all(abs(len(ids) - target) <= (0 if "sizes" in how else 35) for ids in validated)


def test_patient_field_wins_over_the_id() -> None:
    cases = [{"case": f"scan{i}", "patient": f"p{i // 2}"} for i in range(6)]
    split = split_cases(cases, sizes=(2, 2, 2), seed=1)
    assert sorted(ids_of(split).values()) == [["scan0", "scan1"], ["scan2", "scan3"], ["scan4", "scan5"]]


def test_no_such_split() -> None:
    with pytest.raises(DataError, match=r"sizes 3, 2, 1 .* keeps the cases of BraTS-GLI-0000\d together"):
        split_cases(follow_ups(2, 2, 2), sizes=(3, 2, 1))
    with pytest.raises(DataError, match="one would be empty"):
        split_cases(follow_ups(5, 5))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sizes": (5, 5)}, ValueError, "expected three whole numbers"),
        ({"sizes": (5, 6, -1)}, ValueError, "5, 6, -1"),
        ({"sizes": (5, 5, 5)}, DataError, "add up to 15, and there are 10 cases"),
        ({"fractions": (0.7, 0.2, 0.2)}, ValueError, "add up to 1"),
        ({"fractions": (1.2, -0.1, -0.1)}, ValueError, "add up to 1"),
    ],
)
def test_senseless_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        split_cases(singles(10), **arguments)


def test_too_few_cases() -> None:
    with pytest.raises(DataError, match="2 cases cannot fill 3 parts"):
        split_cases(singles(2))


def test_file_round_trip(tmp_path: Path) -> None:
    cases = singles(12)
    split = split_cases(cases, seed=5)
    path = tmp_path / "new" / "split.json"
    write_split(split, path, seed=5)
    assert json.loads(path.read_text()) == {"seed": 5, **ids_of(split)}
    assert [entry.name for entry in path.parent.iterdir()] == ["split.json"]
    # The file wins over everything that would draw.
    assert split_cases(cases[::-1], sizes=(1, 1, 1), seed=9, split_file=path) == {
        part: items[::-1] for part, items in split.items()
    }


def test_cases_that_were_left_out_for_a_reason_may_stand_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    write_split(split_cases(singles(9), seed=1), path, seed=1)
    for gone in (0, 4, 8):
        kept = Cases((c for i, c in enumerate(singles(9)) if i != gone), {f"Phantom_{gone:03d}": "has no t2"})
        split = split_cases(kept, split_file=path)
        assert sum(map(len, split.values())) == 8
        with pytest.raises(DataError, match=f"Phantom_{gone:03d}: is in the split and not among the cases"):
            split_cases(list(kept), split_file=path)


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    path.write_text("old")
    with pytest.raises(KeyError):
        write_split({"train": [], "validation": [], "test": [{}]}, path, seed=0)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_file_with_other_cases(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "s.json", {"train": ["Phantom_000", "Phantom_009"], "validation": ["Phantom_001"]})
    with pytest.raises(DataError) as error:
        split_cases(singles(3), split_file=path)
    assert error.value.problems == [
        f"case Phantom_009: is in the split and not among the cases ({path})",
        f"case Phantom_002: is in no part of the split ({path})",
    ]
    with pytest.raises(DataError, match="Phantom_009"):
        split_cases(singles(3), split_file=path, ignore_unlisted=True)
    with pytest.raises(DataError, match="Phantom_002"):
        split_cases(singles(3), split_file=path, ignore_missing=True)
    with caplog.at_level(logging.WARNING):
        split = split_cases(singles(3), split_file=path, ignore_unlisted=True, ignore_missing=True)
    assert ids_of(split) == {"train": ["Phantom_000"], "validation": ["Phantom_001"], "test": []}
    assert "Phantom_009" in caplog.text
    assert "Phantom_002" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected an object"),
        ({"training": ["Phantom_000"]}, "expected an object"),
        ({"train": "Phantom_000"}, "expected an object"),
        ({"train": [0]}, "expected an object"),
        ({"train": ["Phantom_000"], "test": ["Phantom_000"]}, "case Phantom_000: is listed more than once"),
    ],
)
def test_bad_file(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_cases(singles(1), split_file=write(tmp_path / "s.json", content))


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        split_cases(singles(1), split_file=tmp_path / "none.json")
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(DataError, match="no JSON file"):
        split_cases(singles(1), split_file=tmp_path / "s.json")


def test_file_that_tears_a_patient_apart(tmp_path: Path) -> None:
    cases = follow_ups(2)
    path = write(tmp_path / "s.json", {"train": [cases[0]["case"]], "validation": [cases[1]["case"]]})
    with pytest.raises(DataError, match="patient BraTS-GLI-00000 is in both train and validation"):
        split_cases(cases, split_file=path)


@pytest.mark.parametrize(("cases", "folds"), [(33, 5), (10, 2), (9, 4)])
def test_folds_test_every_case_once_and_keep_patients_together(cases, folds):
    # every third patient has two cases
    items = [{"case": f"c{i:02d}", "patient": f"p{i - (i % 3 == 1)}"} for i in range(cases)]
    splits = fold_splits(items, folds=folds, seed=3)
    tested = [item["case"] for split in splits for item in split["test"]]
    assert sorted(tested) == sorted(item["case"] for item in items)
    sizes = [len(split["test"]) for split in splits]
    assert max(sizes) - min(sizes) <= 2
    for split in splits:
        parts = {part: {item["patient"] for item in chosen} for part, chosen in split.items()}
        assert not parts["train"] & parts["test"]
        assert not parts["validation"] & (parts["test"] | parts["train"])
        assert parts["train"]
        assert parts["validation"]
        assert sum(len(chosen) for chosen in split.values()) == cases
    assert splits == fold_splits(items, folds=folds, seed=3)
    assert splits != fold_splits(items, folds=folds, seed=4)


@pytest.mark.parametrize("counts", [[1, 1, 1, 3], [10] + [1] * 6, [12] + [1] * 10, [20] + [1] * 20, [6] + [1] * 7])
def test_folds_where_one_patient_has_most_of_the_cases(counts):
    items = [{"case": f"p{n}_{i}", "patient": f"p{n}"} for n, count in enumerate(counts) for i in range(count)]
    splits = fold_splits(items, folds=2)
    assert sorted(item["case"] for split in splits for item in split["test"]) == sorted(item["case"] for item in items)
    for split in splits:
        check_patients(split)
        assert all(split[part] for part in PARTS)
        assert sum(map(len, split.values())) == len(items)


def test_folds_that_cannot_be():
    items = [{"case": f"c{i}"} for i in range(3)]
    with pytest.raises(ValueError, match="folds must be at least 2, got 1"):
        fold_splits(items, folds=1)
    with pytest.raises(DataError, match="3 patients are too few for 4 folds"):
        fold_splits(items, folds=4)
    with pytest.raises(DataError, match="none would be left for training"):
        fold_splits(items, folds=2, validation=0.9)


def test_a_part_is_taken_by_name():
    split = {"train": [{"case": "a"}], "validation": [{"case": "b"}], "test": []}
    assert [part_of(split, part) for part in PARTS[:2]] == [[{"case": "a"}], [{"case": "b"}]]
    with pytest.raises(DataError, match="part=tests: a split has the parts train, validation, test"):
        part_of(split, "tests")
    with pytest.raises(DataError, match="the split has no case for test"):
        part_of(split, "test")


def own(case: str, part: str) -> dict[str, Any]:
    """A case of one patient, whom the data's own split parts."""
    return {"case": case, "patient": "p", "part": part, "parted": True}


def test_a_patient_may_be_where_the_data_have_it() -> None:
    train, other, test = own("a", "train"), own("b", "train"), own("c", "test")
    check_patients({"train": [train, other], "validation": [], "test": [test]})
    check_patients({"train": [train, other, test], "validation": [], "test": []})  # all together is fine, too
    for split in (
        {"train": [train], "validation": [other], "test": [test]},
        {"train": [train], "validation": [other], "test": []},
        {"train": [], "validation": [train, other], "test": [test]},
        {"train": [test], "validation": [], "test": [train, other]},
        {"train": [train], "validation": [], "test": [other, test]},
        {"train": [{**train, "parted": False}], "validation": [], "test": [test]},
        {"train": [{k: v for k, v in train.items() if k != "parted"}], "validation": [], "test": [test]},
    ):
        with pytest.raises(DataError, match="patient p is in both"):
            check_patients(split)


@pytest.mark.parametrize("seed", range(10))
def test_a_draw_keeps_a_patient_together_whom_the_data_part(seed: int) -> None:
    cases = [*(own(str(i), "train" if i < 3 else "test") for i in range(5)), *singles(30)]
    split = split_cases(cases, seed=seed)
    assert sum(any(item.get("patient") == "p" for item in items) for items in split.values()) == 1


@pytest.mark.parametrize(("patients", "visits"), [(3, 2), (4, 2), (5, 2), (4, 4), (5, 3), (3, 7)])
def test_few_patients_with_several_cases_fill_all_parts(patients: int, visits: int):
    items = [{"case": f"p{p}_v{v}", "patient": f"p{p}"} for p in range(patients) for v in range(visits)]
    for seed in range(5):
        split = split_cases(items, seed=seed)
        inside = {part: {item["patient"] for item in chosen} for part, chosen in split.items()}
        assert all(inside.values()), (seed, inside)
        assert sum(map(len, inside.values())) == patients
        assert sum(map(len, split.values())) == len(items)
        assert len(inside["train"]) >= max(map(len, inside.values()))
    with pytest.raises(DataError, match="2 patients cannot fill the parts"):
        split_cases(items[: 2 * visits])
