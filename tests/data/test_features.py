# SPDX-License-Identifier: Apache-2.0
"""Feature tables and sequences: what is read, and what is refused."""

import json
import logging
import pickle
import tracemalloc
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.io import savemat

from monai_cggm.data.features import (
    Description,
    FeatureDataset,
    PresenceBatches,
    collate_features,
    feature_statistics,
    load_features,
    modalities_in,
    split_features,
)
from monai_cggm.data.phantom_features import write_phantom_features
from monai_cggm.data.rows import Rows
from monai_cggm.data.splits import write_split
from monai_cggm.errors import DataError

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(8, 3)).astype(np.float32), RNG.normal(size=(8, 5)).astype(np.float32)
LABELS = np.array([3, 1, 2, 1, 3, 2, 1, 3])


def write(folder, name, values, kind):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.{kind}"
    if kind == "csv":
        pd.DataFrame(values).to_csv(path, index=False, header=False)
    elif kind == "npy":
        np.save(path, values)
    elif kind == "npz":
        np.savez(path, **{name: values})
    else:
        savemat(path, {name: values})
    return path


def problems(source, *args, **kwargs):
    with pytest.raises(DataError) as caught:
        load_features(source, *args, **kwargs)
    return caught.value.problems


def check(samples, names=("a", "b")):
    assert samples.description.modalities == names
    assert samples.description.sizes == {"a": 3, "b": 5}
    assert samples.description.classes == ("1", "2", "3")
    assert [s["label"] for s in samples] == (LABELS - 1).tolist()
    for key, values in (("a", A), ("b", B)):
        np.testing.assert_allclose(np.stack([s[key] for s in samples]), values, rtol=1e-6)


@pytest.mark.parametrize("kind", ["csv", "npy", "npz", "mat"])
def test_a_folder_with_a_file_each(kind, tmp_path):
    for name, values in (("b", B), ("a", A), ("labels", LABELS)):
        write(tmp_path, name, values, kind)
    samples = load_features(tmp_path)
    check(samples)
    assert [s["case"] for s in samples] == [f"row_{i}" for i in range(1, 9)]
    check(load_features(tmp_path, ["b", "a"]), names=("b", "a"))
    assert modalities_in(tmp_path) == ["a", "b"]


def test_kinds_may_be_mixed(tmp_path):
    write(tmp_path, "a", A, "npy")
    write(tmp_path, "b", B.T, "mat")  # a column a sample
    write(tmp_path, "labels", LABELS, "csv")
    check(load_features(tmp_path))


@pytest.mark.parametrize("label", ["labels", "y", "gt", "Target"])
def test_one_file_with_a_key_each(label, tmp_path):
    np.savez(tmp_path / "all.npz", a=A, b=B, **{label: LABELS})
    check(load_features(tmp_path / "all.npz"))
    savemat(tmp_path / "all.mat", {"a": A, "b": B.T, label: LABELS[:, None]})
    check(load_features(tmp_path / "all.mat"))


@pytest.mark.parametrize("turned", [(False, False), (True, False), (True, True)])
def test_a_cell_of_views_is_turned_by_the_number_of_labels(turned, tmp_path):
    cell = np.empty((1, 2), dtype=object)
    cell[0, 0], cell[0, 1] = (v.T if t else v for v, t in zip((A, B), turned, strict=True))
    savemat(tmp_path / "views.mat", {"X": cell, "Y": LABELS[:, None]})
    samples = load_features(tmp_path / "views.mat")
    assert samples.description.modalities == ("view1", "view2")
    np.testing.assert_allclose(np.stack([s["view2"] for s in samples]), B)
    check(load_features(tmp_path / "views.mat", ["a", "b"]))
    assert load_features(tmp_path / "views.mat", ["view2"]).description.sizes == {"view2": 5}


def test_names_that_end_in_a_part_give_a_split(tmp_path):
    parts = {f"{k}_{p}": v[s] for k, v in (("a", A), ("b", B), ("gt", LABELS[:, None])) for p, s in
             (("test", slice(5, 8)), ("train", slice(0, 5)))}  # fmt: skip
    savemat(tmp_path / "digits.mat", parts)
    samples = load_features(tmp_path / "digits.mat")
    check(samples)
    assert [s["case"] for s in samples] == [f"train_{i}" for i in range(1, 6)] + [f"test_{i}" for i in range(6, 9)]
    split = split_features(samples, seed=1)
    assert [s["case"] for s in split["test"]] == ["test_6", "test_7", "test_8"]
    assert len(split["validation"]) == 1
    assert {s["part"] for s in split["validation"]} == {"train"}
    drawn = split_features(samples, source="draw", seed=1)
    assert {s["part"] for s in drawn["train"]} == {"train", "test"}
    sized = split_features(samples, sizes=(4, 2, 2))
    assert [len(sized[p]) for p in ("train", "validation", "test")] == [4, 2, 2]
    savemat(tmp_path / "less.mat", {k: v for k, v in parts.items() if k != "b_test"})
    (problem,) = problems(tmp_path / "less.mat")
    assert problem.startswith("b: there is no test part")
    savemat(tmp_path / "other.mat", parts | {"b_test": np.zeros((2, 5))})
    (problem,) = problems(tmp_path / "other.mat")
    assert problem.startswith("b: 2 rows in the test part, expected 3")


def test_csv_files_are_matched_by_id(tmp_path):
    ids = [f"s{i}" for i in range(8)]
    table = pd.DataFrame(A, columns=["x", "y", "z"]).assign(id=ids)
    table.to_csv(tmp_path / "a.csv", index=False)
    order = RNG.permutation(8)
    pd.DataFrame(B).assign(ID=ids).iloc[order].to_csv(tmp_path / "b.csv", index=False)
    labels = pd.DataFrame({"id": ids, "label": LABELS, "group": [f"g{i // 2}" for i in range(8)]})
    labels.iloc[order[::-1]].to_csv(tmp_path / "labels.csv", index=False)
    samples = load_features(tmp_path)
    check(samples)
    assert [s["case"] for s in samples] == ids
    assert [s["patient"] for s in samples] == [f"g{i // 2}" for i in range(8)]
    split = split_features(samples, fractions=(0.5, 0.25, 0.25))
    for part, items in split.items():
        others = {s["patient"] for p, rest in split.items() if p != part for s in rest}
        assert not others & {s["patient"] for s in items}

    labels.iloc[1:].assign(id=[*ids[2:], "new"]).to_csv(tmp_path / "labels.csv", index=False)
    found = problems(tmp_path)
    assert any("label: lacks 2 IDs, the first is 's0'" in p and "labels.csv" in p for p in found)
    assert any("label: has unknown 1 IDs, the first is 'new'" in p for p in found)


def test_repeated_ids_are_refused(tmp_path):
    pd.DataFrame(A).assign(id=["s"] * 8).to_csv(tmp_path / "a.csv", index=False)
    write(tmp_path, "labels", LABELS, "csv")
    assert problems(tmp_path) == [f"ID 's' is there more than once ({tmp_path / 'a.csv'})"]


def test_a_split_column_of_the_labels(tmp_path):
    write(tmp_path, "a", A, "csv")
    words = ["train"] * 4 + ["dev"] * 2 + ["Test"] * 2
    pd.DataFrame({"label": LABELS, "split": words}).to_csv(tmp_path / "labels.csv", index=False)
    split = split_features(load_features(tmp_path), source="file")
    assert [len(split[p]) for p in ("train", "validation", "test")] == [4, 2, 2]
    pd.DataFrame({"label": LABELS, "split": ["train"] * 7 + ["exam"]}).to_csv(tmp_path / "labels.csv", index=False)
    assert "split: 'exam' in row 8 (row_8), expected train, validation or test" in problems(tmp_path)[0]
    groups = [f"g{i}" for i in range(7)] + ["g0"]
    pd.DataFrame({"label": LABELS, "split": words, "group": groups}).to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(DataError, match="patient g0 is in both train and test"):
        split_features(load_features(tmp_path))


def test_a_split_that_is_absent(tmp_path):
    np.savez(tmp_path / "all.npz", a=A, y=LABELS)
    samples = load_features(tmp_path / "all.npz")
    with pytest.raises(DataError, match="come with no split"):
        split_features(samples, source="file")
    with pytest.raises(ValueError, match="source must be"):
        split_features(samples, source="elsewhere")
    ids = {part: [s["case"] for s in items] for part, items in split_features(samples, seed=3).items()}
    once_more = split_features(load_features(tmp_path / "all.npz"), seed=3)
    assert {part: [s["case"] for s in items] for part, items in once_more.items()} == ids
    (tmp_path / "split.json").write_text(json.dumps(ids))
    again = split_features(samples, seed=4, split_file=tmp_path / "split.json")
    assert {part: [s["case"] for s in items] for part, items in again.items()} == ids


@pytest.mark.parametrize(
    ("labels", "classes", "targets"),
    [
        (np.array([0, 1, 1, 0]), ("0", "1"), [0, 1, 1, 0]),
        (np.array([2.0, 10.0, 10.0, 2.0]), ("2", "10"), [0, 1, 1, 0]),
        (np.array(["10", "9", "9", "10"]), ("9", "10"), [1, 0, 0, 1]),
        (np.array(["sad", "calm", "calm", "sad"]), ("calm", "sad"), [1, 0, 0, 1]),
        (np.array([True, False, False, True]), ("0", "1"), [1, 0, 0, 1]),
    ],
)
def test_classes_are_numbered_in_their_order_and_told(labels, classes, targets, tmp_path, caplog):
    np.savez(tmp_path / "all.npz", a=A[:4], labels=labels)
    with caplog.at_level(logging.INFO):
        samples = load_features(tmp_path / "all.npz")
    assert samples.description.classes == classes
    assert [s["label"] for s in samples] == targets
    assert f"0 = {classes[0]}, 1 = {classes[1]}" in caplog.text


@pytest.mark.parametrize(
    ("labels", "kwargs", "message"),
    [
        ([1, 2, np.nan, 1], {}, "labels: row 3 (row_3) is 'nan', expected a whole number or a word"),
        ([1, 2, 1.5, 1], {}, "labels: row 3 (row_3) is '1.5', expected a whole number"),
        ([1, 2, 1.5, 1], {}, "other numbers need --task regression"),
        ([1, 1, 1, 1], {}, "one class only, '1'"),
        (["a", "b", "", "a"], {}, "labels: row 3 (row_3) is '', expected a class"),
        ([1, 2, 3, 1], {"classes": ("1", "2")}, "labels: row 3 (row_3) is '3', expected one of the 2 classes 1, 2"),
        ([1, 2, np.inf, 1], {"task": "regression"}, "labels: row 3 (row_3) is 'inf', expected a finite number"),
        (["1", "2", "x", "1"], {"task": "regression"}, "labels: row 3 (row_3) is 'x', expected a number"),
    ],
)
def test_labels_out_of_range(labels, kwargs, message, tmp_path):
    np.savez(tmp_path / "all.npz", a=A[:4], labels=np.array(labels))
    (problem,) = problems(tmp_path / "all.npz", **kwargs)
    assert message in problem
    assert "all.npz" in problem


def test_regression_keeps_numbers(tmp_path):
    np.savez(tmp_path / "all.npz", a=A, labels=LABELS - 1.5)
    samples = load_features(tmp_path / "all.npz", task="regression")
    assert [s["label"] for s in samples] == (LABELS - 1.5).tolist()
    assert samples.description.outputs == 1
    item = FeatureDataset(samples, samples.description)[0]
    assert item["label"].tolist() == [1.5]
    with pytest.raises(ValueError, match="task must be one of"):
        load_features(tmp_path / "all.npz", task="ranking")


def test_what_is_missing_or_too_short_is_named(tmp_path):
    (problem,) = problems(tmp_path / "nowhere")
    assert "neither a file nor a folder" in problem
    (tmp_path / "empty").mkdir()
    assert "has no file that ends in" in problems(tmp_path / "empty")[0]
    np.savez(tmp_path / "all.npz", a=A, b=B[:7], labels=LABELS)
    (problem,) = problems(tmp_path / "all.npz")
    assert problem == f"modality b: 7 rows, expected 8 ({tmp_path / 'all.npz'}, b)"
    assert "modality c: not found" in problems(tmp_path / "all.npz", ["a", "c"])[0]
    assert "which has a, b" in problems(tmp_path / "all.npz", ["a", "c"])[0]
    np.savez(tmp_path / "none.npz", a=A)
    assert "has no labels" in problems(tmp_path / "none.npz")[0]
    assert "label" not in load_features(tmp_path / "none.npz", need_label=False)[0]
    np.savez(tmp_path / "case.npz", case=A, labels=LABELS)
    assert "means something else" in problems(tmp_path / "case.npz")[0]
    (tmp_path / "words.txt").write_text("")
    assert "expected a folder with a file a modality" in problems(tmp_path / "words.txt")[0]


def test_every_bad_file_of_a_folder_is_named_at_once(tmp_path):
    write(tmp_path, "labels", LABELS, "csv")
    (tmp_path / "a.csv").write_text("1,2\n3,x\n")
    (tmp_path / "b.csv").write_text("1,2\n3\n")
    (tmp_path / "c.npy").write_bytes(b"nothing")
    (tmp_path / "d.csv").write_text("")
    found = problems(tmp_path)
    assert len(found) == 4
    for name in ("a", "b", "c", "d"):
        assert any(p.startswith(f"{name}:") and str(tmp_path / name) in p for p in found), (name, found)
    assert any("'x' in row 2, column 1, is no number" in p or "'x' in row 1" in p for p in found)


def test_no_file_runs_code(tmp_path):
    ran = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (ran.write_text, ("",))

    with (tmp_path / "a.npy").open("wb") as file:
        np.save(file, np.array([Payload()], dtype=object), allow_pickle=True)
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Payload()))
    np.savez(tmp_path / "c.npz", c=np.array([Payload()], dtype=object))
    assert len(problems(tmp_path)) == 3
    assert not ran.exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_counted(value, tmp_path):
    bad = B.copy()
    bad[2, 1] = bad[5, 0] = value
    np.savez(tmp_path / "all.npz", a=A, b=bad, labels=LABELS)
    for allow_missing in (False, True):
        (problem,) = problems(tmp_path / "all.npz", allow_missing=allow_missing)
        assert "modality b: 2 rows with NaN, infinite or no values, the first is row 3 (row_3)" in problem


def test_a_row_of_nan_is_a_missing_modality_where_that_is_allowed(tmp_path):
    less = B.copy()
    less[2] = less[5] = np.nan
    np.savez(tmp_path / "all.npz", a=A, b=less, labels=LABELS)
    assert "allow_missing" in problems(tmp_path / "all.npz")[0]
    samples = load_features(tmp_path / "all.npz", allow_missing=True)
    dataset = FeatureDataset(samples, samples.description)
    assert [p[1] for p in dataset.present()] == [i not in (2, 5) for i in range(8)]
    assert dataset[2]["image"]["b"].tolist() == [0.0] * 5
    assert dataset[(7, 2)]["present"].tolist() == [True, False]
    mean, std = feature_statistics(samples, ["b"])["b"]
    kept = np.delete(B, [2, 5], axis=0).astype(np.float64)
    np.testing.assert_allclose(mean, kept.mean(axis=0))
    np.testing.assert_allclose(std, kept.std(axis=0))
    none = A.copy()
    none[2] = np.nan
    np.savez(tmp_path / "none.npz", a=none, b=less, labels=LABELS)
    assert problems(tmp_path / "none.npz", allow_missing=True) == [
        f"row 3 (row_3) has none of the modalities a, b ({tmp_path / 'none.npz'}, a)"
    ]


def test_of_one_modality_alone_the_samples_without_it_are_left_out(tmp_path):
    """A network of that modality has no use for them; a split of all samples still holds."""
    less = B.copy()
    less[2] = less[5] = np.nan
    labels = LABELS.copy()
    labels[2] = 7  # a class that no other sample has stays a class: the network has its output
    np.savez(tmp_path / "all.npz", a=A, b=less, labels=labels)
    every = load_features(tmp_path / "all.npz", allow_missing=True)
    samples = load_features(tmp_path / "all.npz", ["b"], allow_missing=True)
    assert [s["case"] for s in samples] == [s["case"] for i, s in enumerate(every) if i not in (2, 5)]
    assert samples.skipped == {"row_3": "has no b", "row_6": "has no b"}
    assert samples.description.classes == every.description.classes
    assert "7" in samples.description.classes
    split = split_features(every, sizes=(4, 2, 2), seed=3)
    write_split(split, tmp_path / "split.json", 3)
    kept = split_features(samples, split_file=tmp_path / "split.json")
    for part, items in split.items():
        expected = [item["case"] for item in items if item["case"] not in samples.skipped]
        assert [item["case"] for item in kept[part]] == expected
    with pytest.raises(DataError, match=r"row 3 .* counts as missing with allow_missing"):
        load_features(tmp_path / "all.npz", ["b"])
    np.savez(tmp_path / "none.npz", a=A, b=np.full_like(B, np.nan), labels=LABELS)
    with pytest.raises(DataError, match=r"row 1 \(row_1\) has none of the modalities b"):
        load_features(tmp_path / "none.npz", ["b"], allow_missing=True)


def test_sequences_and_their_lengths(tmp_path):
    text = RNG.normal(size=(8, 6, 2)).astype(np.float32)
    lengths = np.array([6, 1, 3, 2, 6, 4, 5, 2])
    text[1, 1:] = np.nan  # beyond its length
    np.savez(tmp_path / "all.npz", a=A, text=text, text_lengths=lengths, labels=LABELS)
    samples = load_features(tmp_path / "all.npz")
    assert samples.description.modalities == ("a", "text")
    assert [len(s["text"]) for s in samples] == lengths.tolist()
    dataset = FeatureDataset(samples, samples.description)
    batch = collate_features([dataset[i] for i in (1, 2, 3)])
    assert batch["image"]["text"].shape == (3, 3, 2)
    assert batch["image"]["text_padding"].tolist() == [[False, True, True], [False] * 3, [False, False, True]]
    assert "a_padding" not in batch["image"]
    np.testing.assert_array_equal(batch["image"]["text"][1], text[2, :3])
    assert batch["index"].tolist() == [1, 2, 3]
    assert batch["label"].tolist() == (LABELS[1:4] - 1).tolist()
    folder = tmp_path / "folder"
    folder.mkdir()
    np.savez(folder / "text.npz", text=text, lengths=lengths, ids=[f"s{i}" for i in range(8)])
    pd.DataFrame({"id": [f"s{i}" for i in range(8)][::-1], "label": LABELS[::-1]}).to_csv(folder / "labels.csv")
    (folder / "labels.csv").write_text((folder / "labels.csv").read_text().replace(",id", "row,id"))
    assert "expected one column of values" in problems(folder)[0]
    pd.DataFrame({"id": [f"s{i}" for i in range(8)][::-1], "label": LABELS[::-1]}).to_csv(
        folder / "labels.csv", index=False
    )
    again = load_features(folder)
    assert [len(s["text"]) for s in again] == lengths.tolist()
    assert [s["label"] for s in again] == [s["label"] for s in samples]
    np.savez(tmp_path / "none.npz", a=A, text=text, text_lengths=lengths * (np.arange(8) != 4), labels=LABELS)
    assert "1 rows with NaN, infinite or no values, the first is row 5" in problems(tmp_path / "none.npz")[0]
    without = load_features(tmp_path / "none.npz", allow_missing=True)
    assert ["text" in s for s in without] == [i != 4 for i in range(8)]
    np.savez(tmp_path / "long.npz", text=text, text_lengths=lengths + 1, labels=LABELS)
    assert "length 7 in row 1 (row_1), expected 0 to 6" in problems(tmp_path / "long.npz")[0]


@pytest.mark.parametrize("values", [np.array(["x"] * 8), np.zeros((8, 2, 2, 2))])
def test_what_is_no_table_is_refused(values, tmp_path):
    np.savez(tmp_path / "all.npz", a=A, b=values, labels=LABELS)
    assert "modality b: holds" in problems(tmp_path / "all.npz")[0]


def test_a_number_that_never_changes_is_not_divided_by_nothing():
    samples = [{"a": np.array([0.1, i], dtype=np.float32)} for i in range(5)]
    mean, std = feature_statistics(samples, ["a"])["a"]
    np.testing.assert_allclose(std, [1.0, np.sqrt(2)])
    np.testing.assert_allclose(mean, [np.float32(0.1), 2.0])
    with pytest.raises(DataError, match="modality b: no training sample has it"):
        feature_statistics(samples, ["b"])


def parts_of_statistics(samples):
    values = np.concatenate([np.atleast_2d(s["a"]) for s in samples]).astype(np.float64)
    return values.mean(axis=0), values.std(axis=0)


def test_statistics_are_those_of_all_values_at_once(monkeypatch):
    rng = np.random.default_rng(1)
    sequences = [{"a": rng.normal(size=(rng.integers(1, 9), 3)).astype(np.float32) * [1, 1e3, 1e-3]} for _ in range(50)]
    far = [{"a": 1e6 + rng.normal(size=4)} for _ in range(200)]
    halves = [{"a": rng.normal(size=5).astype(np.float16)} for _ in range(30)]
    for samples in (sequences, far, halves):
        mean, std = feature_statistics(samples, ["a"])["a"]
        expected = parts_of_statistics(samples)
        np.testing.assert_array_equal(mean, expected[0])  # to the last bit: trainings of before stay what they were
        np.testing.assert_array_equal(std, expected[1])
        with monkeypatch.context() as patch:
            patch.setattr("monai_cggm.data.features.BLOCK", 7)
            mean, std = feature_statistics(samples, ["a"])["a"]
        np.testing.assert_allclose(mean, expected[0], rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(std, expected[1], rtol=1e-9)


def mapped(array):
    """Whether an array's memory is that of a mapped file."""
    while array is not None and not isinstance(array, np.memmap):
        array = array.base
    return array is not None


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int8])
def test_npy_files_are_mapped_and_keep_their_type(kind, tmp_path):
    values = (A * 3).astype(kind)
    np.save(tmp_path / "a.npy", values)
    np.save(tmp_path / "seq.npy", np.arange(48.0).reshape(8, 3, 2).astype(kind))
    np.save(tmp_path / "seq_lengths.npy", [1, 2, 3] * 2 + [1, 1])
    np.save(tmp_path / "labels.npy", LABELS)
    samples = load_features(tmp_path)
    assert all(mapped(s["a"]) and mapped(s["seq"]) and not s["a"].flags.writeable for s in samples)
    assert {s["a"].dtype for s in samples} == {np.dtype(kind)}
    assert [len(s["seq"]) for s in samples] == [1, 2, 3] * 2 + [1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of PyTorch, about memory that must not be written
        item = FeatureDataset(samples, samples.description)[2]
    assert item["image"]["a"].dtype == item["image"]["seq"].dtype == torch.float32
    np.testing.assert_array_equal(item["image"]["a"], values[2].astype(np.float32))
    np.testing.assert_array_equal(item["image"]["seq"], np.arange(12, 18).reshape(3, 2))


def test_parts_in_npy_files_are_mapped(tmp_path):
    for part, rows in (("train", slice(0, 5)), ("test", slice(5, 8))):
        np.save(tmp_path / f"a_{part}.npy", A[rows])
        np.save(tmp_path / f"b_{part}.npy", B[rows])
        np.save(tmp_path / f"labels_{part}.npy", LABELS[rows])
    samples = load_features(tmp_path)
    check(samples)
    assert all(mapped(s["a"]) and mapped(s["b"]) for s in samples)
    assert [s["part"] for s in samples] == ["train"] * 5 + ["test"] * 3
    spoiled = B.copy()
    spoiled[6, 1] = np.inf
    np.save(tmp_path / "b_test.npy", spoiled[5:])
    (problem,) = problems(tmp_path)
    assert "modality b: 1 rows with NaN, infinite or no values, the first is row 2 (test_7)" in problem
    assert problem.endswith(f"({tmp_path / 'b_test.npy'})")
    np.save(tmp_path / "b_test.npy", B[5:])
    np.save(tmp_path / "labels_test.npy", np.array([1.0, 2.0, np.nan]))
    (problem,) = problems(tmp_path)
    assert problem.startswith("labels: row 3 (test_8) is 'nan', expected")
    assert problem.endswith(f"({tmp_path / 'labels_test.npy'})")


def test_a_bad_row_is_the_one_of_its_own_file(tmp_path):
    """The files' orders differ: what is first in one is last in the other."""
    names = [f"s{i}" for i in range(8)]
    spoiled = B.copy()
    spoiled[1, 2] = np.nan
    labels = LABELS.astype(float)
    labels[3] = 1.5
    pd.DataFrame(A, index=pd.Index(names, name="id")).to_csv(tmp_path / "a.csv")
    pd.DataFrame(spoiled[::-1], index=pd.Index(names[::-1], name="id")).to_csv(tmp_path / "b.csv")
    written = pd.DataFrame({"id": names[::-1], "label": labels[::-1]})
    written.to_csv(tmp_path / "labels.csv", index=False)
    (problem,) = problems(tmp_path)
    assert "the first is row 7 (s1)" in problem
    assert str(tmp_path / "b.csv") in problem
    pd.DataFrame(B[::-1], index=pd.Index(names[::-1], name="id")).to_csv(tmp_path / "b.csv")
    (problem,) = problems(tmp_path)
    assert problem.startswith("labels: row 5 (s3) is '1.5', expected a whole number")
    assert written["id"][4] == "s3"


TRAIN, TEST = slice(0, 5), slice(5, 8)


def parts_of(**arrays):
    return {f"{name}_{part}": value[rows] for name, value in arrays.items() for part, rows in
            (("train", TRAIN), ("test", TEST))}  # fmt: skip


def test_what_belongs_to_all_parts_goes_with_them(tmp_path):
    """Groups, IDs and lengths of all samples beside arrays with parts, and lengths with a part in either order."""
    text = RNG.normal(size=(8, 6, 2)).astype(np.float32)
    lengths = np.array([6, 1, 3, 2, 6, 4, 5, 2])
    groups, ids = np.array(list("ppqqrsst")), np.array([f"s{i}" for i in range(8)])
    beside = {"groups": groups, "ids": ids}
    ways = {
        "whole": {"text_lengths": lengths},
        "ending": parts_of(text_lengths=lengths),
        "inside": {f"text_{part}_lengths": lengths[rows] for part, rows in (("train", TRAIN), ("test", TEST))},
    }
    for name, given in ways.items():
        np.savez(tmp_path / f"{name}.npz", **parts_of(a=A, text=text, y=LABELS), **beside, **given)
        samples = load_features(tmp_path / f"{name}.npz")
        assert [len(s["text"]) for s in samples] == lengths.tolist(), name
        assert "".join(s["patient"] for s in samples) == "ppqqrsst", name
        assert [s["case"] for s in samples] == ids.tolist(), name
    folder = tmp_path / "folder"
    folder.mkdir()
    for part, rows in (("train", TRAIN), ("test", TEST)):
        np.savez(folder / f"text_{part}.npz", text=text[rows], lengths=lengths[rows])
        table = pd.DataFrame({"label": np.array(["no", "yes"])[LABELS[rows] % 2], "group": groups[rows]})
        table.to_csv(folder / f"labels_{part}.csv", index=False)
    samples = load_features(folder)
    assert [len(s["text"]) for s in samples] == lengths.tolist()
    assert "".join(s["patient"] for s in samples) == "ppqqrsst"
    assert samples.description.classes == ("no", "yes")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"groups": np.arange(7)}, "groups: 7 rows and no part (train 5, test 3), expected one of them all (8)"),
        ({"b": B}, "b: 8 rows and no part (train 5, test 3), expected b_train and so on"),
        ({"b": B[:3]}, "b: 3 rows and no part"),
        ({"text_lengths": np.ones(8)}, "text_lengths: lengths of no modality, expected one of a"),
    ],
)
def test_an_array_that_seems_to_belong_to_the_samples_is_not_left_out(more, message, tmp_path):
    np.savez(tmp_path / "all.npz", **parts_of(a=A, y=LABELS), **more)
    (problem,) = problems(tmp_path / "all.npz")
    assert problem.startswith(message)


def test_other_arrays_beside_parts_are_named_in_the_log(tmp_path, caplog):
    np.savez(tmp_path / "all.npz", **parts_of(a=A, y=LABELS), names=np.array(["width", "height"]))
    with caplog.at_level(logging.INFO):
        assert load_features(tmp_path / "all.npz").description.modalities == ("a",)
    assert "not used, as they belong to no part: names" in caplog.text


def test_ids_that_change_parts_between_modalities_are_named(tmp_path):
    ids = [f"s{i}" for i in range(8)]
    mixed = [*ids[:4], "s7", "s5", "s6", "s4"]
    for name, values, of in (("a", A, ids), ("b", B, mixed)):
        for part, rows in (("train", TRAIN), ("test", TEST)):
            pd.DataFrame(values[rows], index=pd.Index(of[rows], name="id")).to_csv(tmp_path / f"{name}_{part}.csv")
    for part, rows in (("train", TRAIN), ("test", TEST)):
        pd.DataFrame({"id": ids[rows], "y": LABELS[rows]}).to_csv(tmp_path / f"y_{part}.csv", index=False)
    first, second = problems(tmp_path)
    assert first.startswith("b: 's7' is in the train part, where a does not have it")
    assert second.startswith("b: 's4' is in the test part, where a does not have it")


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("ending", ["csv", "npy"])
def test_groups_ids_and_splits_in_files_of_their_own(header, ending, tmp_path):
    words = {"groups": list("ppqqrsst"), "ids": [f"s{i}" for i in range(8)], "split": ["train"] * 6 + ["test"] * 2}
    write(tmp_path, "a", A, "csv")
    np.save(tmp_path / "labels.npy", LABELS)
    for name, values in words.items():
        if ending == "npy":
            np.save(tmp_path / f"{name}.npy", np.array(values))
        else:
            lines = [name.removesuffix("s")] * header + values
            (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    samples = load_features(tmp_path)
    assert "".join(s["patient"] for s in samples) == "ppqqrsst"
    assert [s["case"] for s in samples] == words["ids"]
    assert [s["part"] for s in samples] == words["split"]


def test_a_split_without_a_training_part_is_named(tmp_path):
    write(tmp_path, "a", A, "csv")
    pd.DataFrame({"label": LABELS, "split": ["validation"] * 4 + ["test"] * 4}).to_csv(
        tmp_path / "labels.csv", index=False
    )
    with pytest.raises(DataError, match="has no training part"):
        split_features(load_features(tmp_path))


def test_labels_beyond_the_scale_are_refused(tmp_path):
    values = np.array([-3.0, 3.0, 0.0, 1.0, 2.0, 3.001, 0.0, 0.0])
    np.savez(tmp_path / "all.npz", a=A, labels=values)
    told = {"task": "regression", "limits": (-3.0, 3.0)}
    (problem,) = problems(tmp_path / "all.npz", **told)
    assert problem.startswith("labels: row 6 (row_6) is '3.001', expected -3 to 3; another scale needs --sentiment fal")
    np.savez(tmp_path / "all.npz", a=A, labels=np.minimum(values, 3.0))
    assert [s["label"] for s in load_features(tmp_path / "all.npz", **told)] == np.minimum(values, 3.0).tolist()


def owner(array):
    """The mapped file that an array's memory is of."""
    while array is not None and not (isinstance(array, np.memmap) and not isinstance(array.base, np.ndarray)):
        array = array.base
    return array


def test_a_worker_process_gets_no_numbers_of_mapped_files(tmp_path):
    large = np.broadcast_to(np.arange(40, dtype=np.float16)[:, None, None], (40, 500, 20)) * np.arange(1, 21)
    for part, rows in (("train", slice(0, 30)), ("test", slice(30, 40))):
        np.save(tmp_path / f"a_{part}.npy", large[rows].astype(np.float16))
        np.save(tmp_path / f"a_lengths_{part}.npy", np.arange(1, 41)[rows])
        np.save(tmp_path / f"b_{part}.npy", np.asfortranarray(large[rows, 0]))  # a row's numbers are far apart
        np.save(tmp_path / f"c_{part}.npy", np.arange(40)[rows])
        np.save(tmp_path / f"labels_{part}.npy", np.arange(40)[rows] % 2)
    samples = load_features(tmp_path)
    dataset = FeatureDataset(samples, samples.description)
    content = pickle.dumps(dataset)
    assert len(content) < 10_000  # the numbers are 800 kB
    again = pickle.loads(content)
    assert all(mapped(s[name]) and not s[name].flags.writeable for s in again.samples for name in "abc")
    assert len({id(owner(s[name])) for s in again.samples for name in "abc"}) == 6  # each file is mapped once
    assert len(again) == len(dataset) == 40
    for one, other in zip(dataset, again, strict=True):
        assert (one["case"], one["index"], one["label"]) == (other["case"], other["index"], other["label"])
        for name in "abc":
            torch.testing.assert_close(one["image"][name], other["image"][name], rtol=0, atol=0)
    assert again[7]["image"]["a"].shape == (8, 20)
    assert again[7]["image"]["a"][0].tolist() == [7.0 * i for i in range(1, 21)]
    assert again.description == dataset.description


def test_a_worker_process_gets_numbers_that_are_in_memory(tmp_path):
    np.save(tmp_path / "a.npy", A)
    copied = np.load(tmp_path / "a.npy", mmap_mode="c")
    copied[1] = 5  # in memory, and not in the file
    samples = [{"case": "x", "a": copied[1], "b": B[2]}, {"case": "y", "a": copied[2], "b": B[3]}]
    dataset = FeatureDataset(samples, Description("classification", ("a", "b"), {"a": 3, "b": 5}, ("0", "1")))
    again = pickle.loads(pickle.dumps(dataset))
    for one, other in zip(samples, again.samples, strict=True):
        for name in "ab":
            np.testing.assert_array_equal(one[name], other[name])
    assert samples[0]["a"] is dataset.samples[0]["a"]  # the data set itself stays what it is


@pytest.mark.parametrize("words", ["train", "test"])
def test_words_in_one_part_are_named_with_their_file(words, tmp_path):
    for part, rows in (("train", slice(0, 5)), ("test", slice(5, 8))):
        np.save(tmp_path / f"a_{part}.npy", A[rows])
        np.save(tmp_path / f"b_{part}.npy", B[rows].astype(str) if part == words else B[rows])
        np.save(tmp_path / f"labels_{part}.npy", LABELS[rows])
    (problem,) = problems(tmp_path)
    assert problem == f"b: holds <U32 in the {words} part, expected numbers ({tmp_path / f'b_{words}.npy'})"


def test_the_type_of_rows_holds_all_arrays():
    assert Rows([A.astype(np.float16), B[:, :3]]).dtype == np.float32
    assert Rows([B[:, :3], np.array([["x"] * 3])]).dtype.kind == "U"


def test_parts_that_are_empty(tmp_path):
    for part, rows in (("train", slice(0, 8)), ("test", slice(8, None))):
        np.save(tmp_path / f"a_{part}.npy", A[rows])
        np.save(tmp_path / f"labels_{part}.npy", LABELS[rows])
    assert problems(tmp_path) == [
        f"{name}: the test part is empty, expected samples in it ({tmp_path / f'{name}_test.npy'})"
        for name in ("a", "labels")
    ]


def test_what_has_no_samples_or_no_positions(tmp_path):
    np.savez(tmp_path / "none.npz", a=A[:0], labels=LABELS[:0])
    assert problems(tmp_path / "none.npz") == [f"{tmp_path / 'none.npz'} has no sample that can be used"]
    assert problems(tmp_path / "none.npz", need_label=False)
    for shape in ((8, 0, 2), (8, 2, 0), (8, 0)):
        np.savez(tmp_path / "all.npz", a=A, b=np.zeros(shape, dtype=np.float32), labels=LABELS)
        (problem,) = problems(tmp_path / "all.npz")
        assert problem.startswith(f"modality b: holds float32 {shape}, expected numbers (N, D) or sequences (N, T, D)")


def test_a_large_file_is_not_copied(tmp_path):
    large = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.float16, (400, 64, 1000))
    large[:] = 1
    large[7, 3, 5] = 3
    large.flush()
    size = large.nbytes  # 51 MB
    del large
    np.save(tmp_path / "labels.npy", np.arange(400) % 2)
    tracemalloc.start()
    try:
        samples = load_features(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert mapped(samples[0]["a"])
    assert samples[7]["a"][3, 5] == 3
    assert peak < size / 2
    assert kept < size / 20


def test_a_number_too_large_for_a_network_is_found_in_a_mapped_file(tmp_path):
    values = A.astype(np.float64)
    values[4, 1] = 1e300
    np.save(tmp_path / "a.npy", values)
    np.save(tmp_path / "labels.npy", LABELS)
    assert "1 rows with NaN, infinite or no values, the first is row 5 (row_5)" in problems(tmp_path)[0]


def test_rows_of_several_arrays_in_another_order(tmp_path):
    np.save(tmp_path / "a.npy", A)
    first = np.load(tmp_path / "a.npy", mmap_mode="r")
    order = [9, 0, 7, 8, 3]
    expected = np.concatenate([A, A[:3] + 1])[order]
    rows = Rows([first, A[:3] + 1], order)
    assert [rows.shape, len(rows), rows.dtype] == [(5, 3), 5, np.dtype(np.float32)]
    np.testing.assert_array_equal([rows[i] for i in range(5)], expected)
    assert [mapped(rows[i]) for i in range(5)] == [False, True, True, False, True]
    for numbers in (1, 6, 100):
        blocks = list(rows.blocks(numbers))
        assert [start for start, _ in blocks] == list(range(0, 5, max(1, numbers // 3)))
        np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), expected)
    np.testing.assert_array_equal(rows.taken([4, 1])[0], expected[4])
    one = Rows([first], [3, 1])
    assert mapped(one[0])
    np.testing.assert_array_equal(next(one.blocks())[1], A[[3, 1]])


def test_ids_of_labels_name_rows_that_have_none(tmp_path):
    write(tmp_path, "a", A, "npy")
    write(tmp_path, "b", B, "csv")
    ids = [f"s{i}" for i in range(8)]
    pd.DataFrame({"id": ids, "label": LABELS}).to_csv(tmp_path / "labels.csv", index=False)
    samples = load_features(tmp_path)
    check(samples)
    assert [s["case"] for s in samples] == ids
    unlabelled = load_features(tmp_path, need_label=False)
    assert [s["case"] for s in unlabelled] == ids
    assert not any("label" in s for s in unlabelled)


def test_as_many_samples_as_a_published_set_has(tmp_path):
    count = 30_000  # what takes the square of it would take minutes
    np.save(tmp_path / "a.npy", np.ones((count, 2), dtype=np.float16))
    words = pd.DataFrame({"id": [f"s{i}" for i in range(count)], "label": np.arange(count) % 101})
    words.assign(group=[f"g{i // 2}" for i in range(count)]).to_csv(tmp_path / "labels.csv", index=False)
    samples = load_features(tmp_path)
    split = split_features(samples)
    write_split(split, tmp_path / "split.json", seed=0)
    again = split_features(samples, split_file=tmp_path / "split.json")
    assert again == split
    assert sum(len(chosen) for chosen in split.values()) == count


def test_a_generated_file_gives_its_own_split(tmp_path):
    sizes = write_phantom_features(tmp_path / "phantom.pkl", samples=80, seed=2)
    samples = load_features(tmp_path / "phantom.pkl", task="regression")
    split = split_features(samples)
    assert {part: len(items) for part, items in split.items()} == {
        "train": sizes["train"],
        "validation": sizes["valid"],
        "test": sizes["test"],
    }
    assert all(sample["part"] == part for part, items in split.items() for sample in items)
    assert samples.description.outputs == 1


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_batches_of_one_kind_cover_every_sample_once(processes):
    description = Description("classification", ("a", "b"), {"a": 1, "b": 1}, ("0", "1"))
    kinds = [("a", "b"), ("a",), ("b",), ("a", "b"), ("a",), ("a", "b"), ("a", "b")]
    dataset = FeatureDataset([{m: np.zeros(1) for m in kind} for kind in kinds], description)
    ranks = [PresenceBatches(dataset, 2, num_replicas=processes, rank=r) for r in range(processes)]
    batches = [batch for rank in ranks for batch in rank]
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len({kinds[i] for i in batch}) == 1 and len(batch) <= 2 for batch in batches)
    assert sum(map(len, ranks)) == len(batches)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        PresenceBatches(dataset, 0)


def test_a_description_is_written_and_read(tmp_path):
    one = Description("classification", ("a", "b"), {"a": 3, "b": 5}, ("no", "ä"))
    one.write(tmp_path)
    assert Description.read(tmp_path / "model.pt") == one == Description.read(tmp_path / "data.json")
    with pytest.raises(DataError, match="expected what a training run wrote there"):
        Description.read(tmp_path / "elsewhere" / "model.pt")
    with pytest.raises(DataError, match="has no sample"):
        FeatureDataset([], one)


@pytest.mark.real_data
def test_the_digits(real_data):
    samples = load_features(real_data / "multiview/handwritten_6views.mat")
    assert samples.description.sizes == {"x1": 240, "x2": 76, "x3": 216, "x4": 47, "x5": 64, "x6": 6}
    assert samples.description.classes == tuple(map(str, range(1, 11)))
    assert torch.tensor([s["label"] for s in samples]).bincount().tolist() == [200] * 10
    assert [len(v) for v in split_features(samples).values()] == [1318, 282, 400]


def test_one_number_a_row_may_come_in_parts(tmp_path):
    values = np.arange(14.0)
    parts = {"train": slice(0, 10), "test": slice(10, 14)}
    arrays = {f"a_{part}": values[rows] for part, rows in parts.items()}
    labels = {f"labels_{part}": np.arange(14)[rows] % 2 for part, rows in parts.items()}
    np.savez(tmp_path / "parts.npz", **arrays, **labels)
    samples = load_features(tmp_path / "parts.npz")
    assert [s["a"].tolist() for s in samples] == [[v] for v in values]
    assert [s["part"] for s in samples] == ["train"] * 10 + ["test"] * 4
