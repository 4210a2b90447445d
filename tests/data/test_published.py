# SPDX-License-Identifier: Apache-2.0
"""Feature files as others publish them: what comes out of each, and what is refused."""

import csv
import logging
import pickle

import numpy as np
import pytest

from monai_cggm.data.features import FeatureDataset, load_features, modalities_in, split_features
from monai_cggm.data.splits import split_cases, write_split
from monai_cggm.errors import DataError

SIZES = {"train": 6, "valid": 2, "test": 3}
DIMENSIONS = {"text": 4, "audio": 3, "vision": 2}
#: positions with padding, as in files that are not aligned
LONGEST = {"text": 7, "audio": 8, "vision": 9}
PARTS = {"train": "train", "valid": "validation", "test": "test"}


def sequences(rng, sizes=SIZES):
    """True sequences: part → modality → a list of (t, D), t from 1 to 5."""
    return {
        part: {name: [rng.normal(size=(rng.integers(1, 6), d)) for _ in range(n)] for name, d in DIMENSIONS.items()}
        for part, n in sizes.items()
    }


def padded(rows, longest, front):
    out = np.zeros((len(rows), longest, rows[0].shape[1]))
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if front else slice(0, len(row))
        out[i, where] = row
    return out


def mult(rng, truth, sizes=SIZES, longest=LONGEST):
    """As MulT publishes CMU-MOSI: padded in front, float64, labels (N, 1, 1), three columns of bytes that identify."""
    content, number = {}, 0
    for part, n in sizes.items():
        content[part] = {
            name: padded(truth[part][name], longest[name], front=True) for name in ("vision", "audio", "text")
        }
        content[part]["labels"] = rng.normal(size=(n, 1, 1))
        rows = [(f"-a_{part}_{(number + i) // 2}_{i % 2 + 1}", "0.5", "9.25") for i in range(n)]
        content[part]["id"] = np.array(rows, dtype="S")
        number += n
    return content


def aligned(*rows):
    """Rows of one number a position, ``(N, T, 1)``."""
    return np.array(rows, dtype=np.float32)[..., None]


def kept(samples, name):
    return [s[name][:, 0].tolist() for s in samples]


def written(tmp_path, content, name="data.pkl", protocol=4):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def problems(source, **kwargs):
    with pytest.raises(DataError) as caught:
        load_features(source, **kwargs)
    assert all(str(source) in problem for problem in caught.value.problems)
    return caught.value.problems


def same_sequences(samples, truth, sizes=SIZES):
    for name in DIMENSIONS:
        rows = [row for part in sizes for row in truth[part][name]]
        assert [s[name].shape for s in samples] == [row.shape for row in rows], name
        for sample, row in zip(samples, rows, strict=True):
            np.testing.assert_array_equal(sample[name], row.astype(np.float32))


@pytest.fixture
def rng():
    return np.random.default_rng(3)


# ---------------------------------------------------------------------- sequences


def test_sequences_of_mult(rng, tmp_path):
    truth = sequences(rng)
    content = mult(rng, truth)
    path = written(tmp_path, content)
    samples = load_features(path, task="regression")
    assert samples.description.modalities == ("vision", "audio", "text") == tuple(modalities_in(path))
    assert samples.description.sizes == DIMENSIONS
    same_sequences(samples, truth)
    labels = np.concatenate([content[part]["labels"].ravel() for part in SIZES])
    assert [s["label"] for s in samples] == labels.tolist()
    assert [s["case"] for s in samples][:3] == ["-a_train_0_1", "-a_train_0_2", "-a_train_1_1"]
    assert [s["patient"] for s in samples][:3] == ["-a_train_0", "-a_train_0", "-a_train_1"]
    assert samples.skipped == {}
    split = split_features(samples)
    for part, own in PARTS.items():
        assert [s["case"] for s in split[own]] == [row[0].decode() for row in content[part]["id"]]
    drawn = split_features(samples, source="draw", fractions=(0.4, 0.3, 0.3))
    videos = [{s["patient"] for s in items} for items in drawn.values()]
    assert sum(map(len, videos)) == len({s["patient"] for s in samples}) == 6
    item = FeatureDataset(samples, samples.description)[0]
    assert item["image"]["text"].dtype.is_floating_point
    assert load_features(path, ["text"], task="regression").description.sizes == {"text": 4}


def test_sequences_of_mmsa(rng, tmp_path, caplog):
    truth = sequences(rng)
    content = mult(rng, truth)
    for part, entry in content.items():
        n = SIZES[part]
        for name in DIMENSIONS:
            entry[name] = padded(truth[part][name], LONGEST[name], front=False).astype(np.float32)
        entry |= {
            "regression_labels": entry.pop("labels").ravel().astype(np.float32),
            "classification_labels": np.zeros(n),
            "regression_labels_T": np.zeros((n, 1)),
            "annotations": ["Positive"] * n,
            "raw_text": np.array(["some words"] * n),
            "text_bert": np.zeros((n, 3, 7), dtype=np.float32),
            "id": [f"{part}_v{i // 2}$_${i}" for i in range(n)],
            "audio_lengths": [len(row) for row in truth[part]["audio"]],
        }
    content["train"]["audio"][0, :2] = 0  # zeros at the beginning, which the lengths count as values
    content["train"]["audio_lengths"][0] = 4
    content["train"]["audio_lengths"][1] = 0  # some files have that; the position stays
    path = written(tmp_path, content)
    with caplog.at_level(logging.INFO):
        samples = load_features(path, task="regression")
    assert samples.description.sizes == DIMENSIONS
    unused = "classification_labels, regression_labels_T, annotations, raw_text, text_bert"
    assert caplog.text.count("data.pkl: not used: ") == 1
    (line,) = [record.getMessage() for record in caplog.records if "not used" in record.getMessage()]
    assert set(line.removeprefix("data.pkl: not used: ").split(", ")) == set(unused.split(", "))
    np.testing.assert_array_equal(samples[0]["audio"], content["train"]["audio"][0, :4])
    np.testing.assert_array_equal(samples[1]["audio"], content["train"]["audio"][1, :1])
    truth["train"]["audio"][:2] = [samples[0]["audio"], samples[1]["audio"]]
    same_sequences(samples, truth)
    assert [s["label"] for s in samples][:6] == content["train"]["regression_labels"].tolist()
    assert [(s["case"], s["patient"]) for s in samples][:2] == [
        ("train_v0$_$0", "train_v0"),
        ("train_v0$_$1", "train_v0"),
    ]
    assert {s["part"] for s in samples[6:8]} == {"validation"}


@pytest.mark.parametrize("writable", [True, False])
def test_infinite_values_of_audio_become_zero_and_are_counted(writable, rng, tmp_path, caplog):
    truth = sequences(rng)
    for row, value in ((1, -np.inf), (4, np.inf)):
        truth["train"]["audio"][row][0, 1:] = value
    truth["test"]["audio"][0][0, 0] = -np.inf
    content = mult(rng, truth)
    content["valid"]["audio"][1, -1, 0] = 1e300  # infinite in float32
    for entry in content.values():
        if not writable:
            with np.errstate(over="ignore"):
                entry["audio"] = entry["audio"].astype(np.float32)  # comes out of the pickle as it lies
    path = written(tmp_path, content)
    with caplog.at_level(logging.WARNING):
        samples = load_features(path, task="regression")
    assert "data.pkl: audio: 6 infinite values became 0, in 4 rows" in caplog.text
    for row in (1, 4):
        truth["train"]["audio"][row][0, 1:] = 0
    truth["test"]["audio"][0][0, 0] = truth["valid"]["audio"][1][-1, 0] = 0
    same_sequences(samples, truth)
    np.savez(tmp_path / "own.npz", audio=content["train"]["audio"], labels=np.arange(6))
    (problem,) = problems(tmp_path / "own.npz")
    assert "2 rows with NaN, infinite or no values" in problem


@pytest.mark.parametrize(
    ("name", "value"),
    [("audio", np.nan), ("text", np.nan), ("text", -np.inf), ("vision", np.inf), ("text", 1e300)],
)
def test_other_values_that_are_no_numbers_are_refused(name, value, rng, tmp_path, caplog):
    content = mult(rng, sequences(rng))
    content["test"]["audio"][0, -1, 0] = -np.inf
    content["test"][name][1, -1, 0] = value
    path = written(tmp_path, content)
    for allow_missing in (False, True):
        (problem,) = problems(path, task="regression", allow_missing=allow_missing)
        assert "data.pkl: audio: 1 infinite values became 0, in 1 rows" in caplog.text
        where = f"row 2 (-a_test_4_2) ({path}, {name} of the test part)"
        assert problem == f"modality {name}: 1 rows with NaN, infinite or no values, the first is {where}"


def test_a_row_of_nan_is_a_missing_modality_where_that_is_allowed(rng, tmp_path):
    content = mult(rng, sequences(rng))
    complete = load_features(written(tmp_path, content), task="regression")
    content["valid"]["audio"][1] = np.nan
    path = written(tmp_path, content)
    (problem,) = problems(path, task="regression")
    assert "the first is row 2 (-a_valid_3_2); a row that is NaN throughout counts" in problem
    assert problem.endswith("audio of the validation part)")
    samples = load_features(path, task="regression", allow_missing=True)
    assert ["audio" in s for s in samples] == [i != 7 for i in range(11)]
    for name in ("text", "vision"):
        np.testing.assert_array_equal(samples[7][name], complete[7][name])


def test_a_modality_that_is_missing_keeps_no_padding_of_others(tmp_path):
    content = {"text": aligned([0, 0, 1, 0], [0, 1, 0, 0]), "audio": aligned([np.nan] * 4, [0, 0, 2, 3])}
    path = written(tmp_path, {"train": {**content, "labels": np.arange(2.0)}})
    samples = load_features(path, task="regression", allow_missing=True)
    assert ["audio" in s for s in samples] == [False, True]
    assert kept(samples, "text") == [[1], [1, 0, 0]]


def test_words_of_an_aligned_file_stay_side_by_side(tmp_path):
    """Of a word one modality may be zero, at either end; it goes where all of them are."""
    content = {
        "text": aligned([0, 0, 1, 2, 3, 4], [1, 2, 3, 0, 0, 0], [0] * 6, [0, 1, 0, 0, 0, 0]),
        "audio": aligned([0, 0, 0, 2, 3, 0], [0, 2, 0, 0, 0, 0], [0] * 6, [0] * 6),
        "vision": aligned([0, 9, 1, 0, 0, 0], [0, 2, 3, 4, 0, 0], [0] * 6, [0] * 6),
        "labels": np.arange(4.0),
    }
    samples = load_features(written(tmp_path, {"train": content}), task="regression")
    assert kept(samples, "text") == [[0, 1, 2, 3, 4], [1, 2, 3, 0], [0], [1]]
    assert kept(samples, "audio") == [[0, 0, 2, 3, 0], [0, 2, 0, 0], [0], [0]]
    assert kept(samples, "vision") == [[9, 1, 0, 0, 0], [0, 2, 3, 4], [0], [0]]
    # with another number of positions, a position is no word, and each modality has its own
    content["vision"] = content["vision"][:, :5]
    samples = load_features(written(tmp_path, {"train": content}), task="regression")
    assert kept(samples, "text")[0] == [1, 2, 3, 4]
    assert kept(samples, "audio")[0] == [2, 3]
    assert kept(samples, "vision")[0] == [9, 1]


def test_lengths_that_are_given_keep_words_side_by_side(tmp_path):
    content = {
        "text": aligned([0, 1, 2, 0], [0, 1, 0, 0]),
        "audio": aligned([5, 6, 0, 0], [5, 6, 7, 8]),
        "audio_lengths": [2, 3],
        "labels": np.arange(2.0),
    }
    samples = load_features(written(tmp_path, {"train": content}), task="regression")
    assert kept(samples, "text") == [[0, 1, 2], [0, 1, 0]]
    assert kept(samples, "audio") == [[5, 6], [5, 6, 7]]
    content["audio_lengths"] = [2, 5]
    (problem,) = problems(written(tmp_path, {"train": content}), task="regression")
    assert problem.startswith("modality audio: length 5 in row 2 (train_2), expected 0 to 4")


def test_a_position_that_is_infinite_throughout_is_no_padding(tmp_path):
    content = {"audio": aligned([0, -np.inf, 1, 0], [0, 1, -np.inf, 0]), "labels": np.arange(2.0)}
    samples = load_features(written(tmp_path, {"train": content}), task="regression")
    assert kept(samples, "audio") == [[0, 1], [1, 0]]


def test_padding_ends_at_the_first_and_last_value(tmp_path):
    text = np.zeros((4, 5, 2), dtype=np.float32)
    text[0, 1, 0] = text[0, 3, 1] = 1  # zeros inside, and on both sides
    text[1] = 1
    text[3, 4, 1] = -2
    content = {"train": {"text": text, "labels": np.arange(4.0)}}
    samples = load_features(written(tmp_path, content), task="regression")
    np.testing.assert_array_equal(samples[0]["text"], text[0, 1:4])
    np.testing.assert_array_equal(samples[1]["text"], text[1])
    np.testing.assert_array_equal(samples[2]["text"], np.zeros((1, 2)))
    np.testing.assert_array_equal(samples[3]["text"], [[0, -2]])
    assert all("text" in s for s in samples)


def test_blocks_do_not_change_what_is_read(rng, tmp_path, monkeypatch):
    truth = sequences(rng)
    truth["train"]["audio"][5][0, 0] = -np.inf
    path = written(tmp_path, mult(rng, truth))
    whole = load_features(path, task="regression")
    monkeypatch.setattr("monai_cggm.data.published.BLOCK", 50)
    for sample, again in zip(whole, load_features(path, task="regression"), strict=True):
        for name in DIMENSIONS:
            np.testing.assert_array_equal(sample[name], again[name])


def test_other_names_and_types(rng, tmp_path):
    """As in files of low-rank fusion: modalities by their tools' names, Python 2's keys, one part only."""
    content = {
        b"test": {b"covarep": np.ones((3, 5), dtype=np.float16), b"glove": np.ones((3, 2, 4)), b"label": [1, 2, 1]}
    }
    samples = load_features(written(tmp_path, content))
    assert samples.description.sizes == {"covarep": 5, "glove": 4}
    assert samples[0]["covarep"].dtype == np.float16
    assert samples[0]["covarep"].shape == (5,)
    assert samples.description.classes == ("1", "2")
    assert [s["case"] for s in samples] == ["test_1", "test_2", "test_3"]
    assert {s["part"] for s in samples} == {"test"}


def emotions(marks):
    marks = np.array(marks)
    return np.stack([1 - marks, marks], axis=-1).astype(np.float64)


def test_emotions_of_iemocap(rng, tmp_path, caplog):
    marks = [[1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 0]]
    text = rng.normal(size=(7, 3, 2))
    content = {
        "train": {"text": text[:5], "labels": emotions(marks[:5])},
        "test": {"text": text[5:], "labels": emotions(marks[5:])},
    }
    path = written(tmp_path, content)
    with caplog.at_level(logging.INFO):
        samples = load_features(path)
    assert samples.description.classes == ("angry", "happy", "neutral", "sad")
    words = [samples.description.classes[s["label"]] for s in samples]
    assert words == ["neutral", "angry", "happy", "sad", "neutral"]
    assert [s["case"] for s in samples] == ["train_1", "train_2", "train_3", "train_5", "test_7"]
    assert [s["patient"] for s in samples] == [s["case"] for s in samples]
    assert samples.skipped == {
        "train_4": "its emotions are none, expected one",
        "test_6": "its emotions are happy and angry, expected one",
    }
    assert "2 samples left out" in caplog.text
    assert "its emotions are happy and angry, expected one: 1" in caplog.text
    np.testing.assert_array_equal(samples[3]["text"], text[4].astype(np.float32))
    np.testing.assert_array_equal(samples[4]["text"], text[6].astype(np.float32))
    assert [s["part"] for s in samples] == ["train"] * 4 + ["test"]
    everything = load_features(path, need_label=False)
    assert [len(everything), everything.skipped] == [7, {}]


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda labels: labels[..., ::-1], "the second of two columns must say yes"),
        (lambda labels: np.where(np.arange(4)[:, None, None] == 2, 1.0, labels), "row 3 has yes and no, or neither"),
    ],
)
def test_emotions_whose_yes_and_no_do_not_fit_are_refused(spoil, expected, rng, tmp_path):
    labels = emotions([[1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]])
    path = written(tmp_path, {"train": {"text": rng.normal(size=(4, 3, 2)), "labels": spoil(labels)}})
    (problem,) = problems(path)
    assert expected in problem


def test_sentiment_is_no_class(rng, tmp_path):
    path = written(tmp_path, mult(rng, sequences(rng)))
    (problem,) = problems(path)
    assert "labels: row 1 (-a_train_0_1) is '" in problem
    assert problem.endswith("labels of the train part)")
    assert "other numbers need --task regression" in problem


def test_a_video_and_its_times(rng, tmp_path):
    """As MulT publishes CMU-MOSEI: the video, the begin and the end of an utterance; the video alone is not unique."""
    content = mult(rng, sequences(rng))
    for part, entry in content.items():
        entry["id"] = np.array([(f"{part}x_7", str(float(i)), f"{i + 0.5}") for i in range(SIZES[part])], dtype="S")
    samples = load_features(written(tmp_path, content), task="regression")
    assert [s["case"] for s in samples][:2] == ["trainx_7[0.0-0.5]", "trainx_7[1.0-1.5]"]
    assert [s["patient"] for s in samples] == ["trainx_7"] * 6 + ["validx_7"] * 2 + ["testx_7"] * 3


@pytest.mark.parametrize(
    ("given", "cases", "groups"),
    [
        (["Ses01F_impro01_F000", "Ses01F_impro01_M001", "x"], None, ["Ses01F_impro01", "Ses01F_impro01", "x"]),
        (["_dI--eQ6qVU[0]", "_dI--eQ6qVU[1]", "a[0]"], None, ["_dI--eQ6qVU", "_dI--eQ6qVU", "a"]),
        (np.array([["a_b[0]"], ["a_b[1]"], ["c"]], dtype="S"), ["a_b[0]", "a_b[1]", "c"], ["a_b", "a_b", "c"]),
        (np.array([[5], [6], [5]]), ["5", "6", "5#2"], ["5", "6", "5"]),
        (["v_1", "v_1", "v_2"], ["v_1", "v_1#2", "v_2"], ["v_1", "v_1", "v_2"]),
        (np.array([b"a_1", "a_2", 3], dtype=object), ["a_1", "a_2", "3"], ["a", "a", "3"]),
    ],
)
def test_ids_in_their_forms(given, cases, groups, tmp_path):
    content = {"train": {"text": np.ones((3, 2)), "labels": np.array([0.5, 1, 2]), "id": given}}
    samples = load_features(written(tmp_path, content), task="regression")
    assert [s["case"] for s in samples] == (list(given) if cases is None else cases)
    assert [s["patient"] for s in samples] == groups


def with_videos(content, videos):
    """IDs ``video[number]`` in the place of the file's own."""
    for part, entry in content.items():
        entry["id"] = [f"{video}[{part}{i}]" for i, video in enumerate(videos[part])]
    return content


def videos_of(split):
    return {part: {s["patient"] for s in items} for part, items in split.items()}


def test_a_split_of_its_own_that_parts_a_video(rng, tmp_path, caplog):
    names = {"train": ["v0", "v0", "v1", "v1", "v2", "v2"], "valid": ["v3", "v3"], "test": ["v0", "v4", "v4"]}
    path = written(tmp_path, with_videos(mult(rng, sequences(rng)), names))
    with caplog.at_level(logging.WARNING):
        samples = load_features(path, task="regression")
    assert "its own split parts 1 of 5 videos or dialogues, such as v0" in caplog.text
    assert [s["patient"] for s in samples] == [video for part in names.values() for video in part]
    assert [s["case"] for s in samples if "parted" in s] == ["v0[train0]", "v0[train1]", "v0[test0]"]
    split = split_features(samples)
    assert videos_of(split) == {"train": {"v0", "v1", "v2"}, "validation": {"v3"}, "test": {"v0", "v4"}}
    assert [len(split[part]) for part in PARTS.values()] == [6, 2, 3]

    # the same split out of a file, of samples as they come and of a plain list of them
    write_split(split, tmp_path / "own.json", seed=0)
    for again in (
        split_features(samples, split_file=tmp_path / "own.json"),
        split_cases(list(samples), split_file=tmp_path / "own.json"),
    ):
        assert again == split

    # one that parts the video in another way is none of the file's
    moved = {**split, "train": split["train"][1:], "validation": [split["train"][0], *split["validation"]]}
    write_split(moved, tmp_path / "moved.json", seed=0)
    with pytest.raises(DataError, match="patient v0 is in both"):
        split_features(samples, split_file=tmp_path / "moved.json")

    for seed in range(20):
        drawn = videos_of(split_features(samples, source="draw", fractions=(0.4, 0.3, 0.3), seed=seed))
        assert sum(map(len, drawn.values())) == 5


def test_a_validation_part_that_is_drawn_shares_no_video(rng, tmp_path):
    sizes = {"train": 12, "test": 4}
    names = {"train": [f"v{i // 2}" for i in range(12)], "test": ["v0", "v1", "v2", "v9"]}
    path = written(tmp_path, with_videos(mult(rng, sequences(rng, sizes), sizes), names))
    samples = load_features(path, task="regression")
    seen = set()
    for seed in range(20):
        split = split_features(samples, seed=seed, fractions=(0.5, 0.25, 0.25))
        videos = videos_of(split)
        assert not videos["validation"] & (videos["train"] | videos["test"])
        assert videos["train"] & videos["test"] == {"v0", "v1", "v2"}  # as the file has it
        assert [s["case"] for s in split["test"]] == [f"{v}[test{i}]" for i, v in enumerate(names["test"])]
        assert sum(map(len, split.values())) == 16
        seen |= videos["validation"]
    assert seen == {"v3", "v4", "v5"}


def test_a_validation_part_cannot_be_drawn_where_every_video_is_tested(rng, tmp_path):
    sizes = {"train": 6, "test": 3}
    names = {"train": ["v0", "v1", "v2"] * 2, "test": ["v0", "v1", "v2"]}
    path = written(tmp_path, with_videos(mult(rng, sequences(rng, sizes), sizes), names))
    with pytest.raises(DataError, match="every group of the training part is in the test part, too"):
        split_features(load_features(path, task="regression"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c["test"].pop("audio"), "audio: is not in the test part"),
        (lambda c: c["test"].pop("labels"), "labels: is not in the test part"),
        (
            lambda c: c["test"].update(audio=[1, 2, 3]),
            "audio: is list of 3 in the test part, expected an array of numbers",
        ),
        (lambda c: c["train"].pop("audio"), "audio: is not in the train part"),
        (lambda c: c["train"].pop("labels"), "labels: is not in the train part"),
        (lambda c: c["train"].pop("id"), "id: is not in the train part"),
        (lambda c: c["valid"].pop("id"), "id: is not in the validation part"),
        (lambda c: c["valid"].update(id=None), "id: is not in the validation part"),
        (lambda c: c["valid"].update(id=5), "id: is int in the validation part, expected a list or an array with"),
        (lambda c: c["valid"].update(id=np.array(5)), "id: is int64 () in the validation part, expected a list or an"),
        (lambda c: c["valid"].update(id="ab"), "id: is str in the validation part, expected a list or an array with"),
        (lambda c: c["valid"].update(id=[["a"], []]), "id: row 2 of the validation part has no ID"),
        (lambda c: c["test"].update(labels=1.0), "labels: is float in the test part, expected a list or an array"),
        (
            lambda c: [e.update(text=e["text"][:, :0]) for e in c.values()],
            "text: a row is (0, 4) in the train part, expected some numbers",
        ),
        (
            lambda c: c["valid"].update({key: value[:0] for key, value in c["valid"].items()}),
            "the validation part is empty, expected samples in it",
        ),
        (
            lambda c: c["train"].update(audio_lengths=[1] * 7),
            "audio_lengths of the train part: hold list of 7, expected 6 whole numbers",
        ),
        (lambda c: c["test"].update(audio=c["test"]["audio"][1:]), "audio: 2 rows in the test part, expected 3"),
        (
            lambda c: c["test"].update(text=c["test"]["text"][..., 1:]),
            "text: a row is (7, 3) in the test part, expected (7",
        ),
        (lambda c: c["test"].update(labels=np.zeros((2, 1, 1))), "labels: 2 rows in the test part, expected 3"),
        (
            lambda c: [e.update(labels=np.zeros((len(e["id"]), 7))) for e in c.values()],
            "labels: are (6, 7), (2, 7), (3, 7), expected one number a row, or yes and no for 4 emotions",
        ),
        (
            lambda c: c["valid"].update(id=c["valid"]["id"][:1]),
            "id: 1 rows in the validation part, expected 2",
        ),
        (
            lambda c: c["train"].update(audio_lengths=["a"] * 6),
            "audio_lengths of the train part: hold list of 6, expected",
        ),
        (
            lambda c: c["train"].update(audio_lengths=[1.5] * 6),
            "audio_lengths of the train part: 1.5 in row 1, expected a whole number from 0",
        ),
        (
            lambda c: c["train"].update(audio_lengths=[9] + [1] * 5),
            "modality audio: length 9 in row 1 (-a_train_0_1), expected 0 to 8",
        ),
        (
            lambda c: c["test"].update(audio_lengths=[1, -2, 1]),
            "audio_lengths of the test part: -2 in row 2, expected a whole number from 0",
        ),
        (
            lambda c: c["train"].update(audio_lengths=[5, 3, np.inf, 3, 3, 3]),
            "audio_lengths of the train part: inf in row 3, expected a whole number from 0",
        ),
        (
            lambda c: c["train"].update(audio_lengths=[5, 3, np.nan, 3, 3, 3]),
            "audio_lengths of the train part: nan in row 3, expected a whole number from 0",
        ),
        (
            lambda c: [e.pop(n) for e in c.values() for n in DIMENSIONS],
            "data: has no numbers (N, T, D) or (N, D), found",
        ),
    ],
)
def test_parts_that_do_not_fit_together(change, expected, rng, tmp_path):
    content = mult(rng, sequences(rng))
    change(content)
    problem = problems(written(tmp_path, content), task="regression")[0]
    assert problem.startswith(expected)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"happy": {"train": {}}}, "a dictionary with happy"),
        ([1, 2], "list of 2"),
        (np.zeros((2, 3)), "float64 (2, 3)"),
        (None, "NoneType"),
    ],
)
def test_other_pickles(content, found, tmp_path):
    (problem,) = problems(written(tmp_path, content))
    assert problem.startswith(f"data: holds {found}, expected a dictionary of train, valid and test")


def test_a_folder_of_pickles_says_what_to_do(rng, tmp_path):
    written(tmp_path, mult(rng, sequences(rng)), "mosi_data.pkl")
    (problem,) = problems(tmp_path)
    assert "name the file that is meant itself: mosi_data.pkl" in problem


def test_a_published_file_that_runs_code(rng, tmp_path):
    class Payload:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").write_text, ("",))

    content = mult(rng, sequences(rng))
    content["train"]["raw_text"] = [Payload()]
    (problem,) = problems(written(tmp_path, content))
    assert "it is not read, since it could run code" in problem
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------- IEMOCAP's dialogues


def dialogues(rng, **more):
    """``more``: further dialogues of the training part, and their utterances' emotions."""
    labels = {"b": [0, 1, 5, 4], "a": [2, 3], "t": [5, 2], "c": [1, 0], **more}
    text, audio, visual = ({d: [rng.normal(size=n) for _ in own] for d, own in labels.items()} for n in (4, 3, 2))
    ids = {d: [f"{d}_F{i:03d}" for i in range(len(own))] for d, own in labels.items()}
    speakers = {d: ["M"] * len(own) for d, own in labels.items()}
    sentences = {d: ["words"] * len(own) for d, own in labels.items()}
    return [ids, speakers, labels, text, audio, visual, sentences, {"b", "a", "c", *more}, ["t"]]


@pytest.mark.parametrize("protocol", [2, 4])
def test_dialogues_of_iemocap(protocol, rng, tmp_path, caplog):
    content = dialogues(rng)
    content[4]["a"][0][1] = -np.inf
    path = written(tmp_path, tuple(content), protocol=protocol)
    with caplog.at_level(logging.INFO):
        samples = load_features(path)
    assert samples.description.sizes == {"text": 4, "audio": 3, "vision": 2}
    assert [s["case"] for s in samples] == [
        "a_F000",
        "a_F001",
        "b_F000",
        "b_F001",
        "b_F003",
        "c_F000",
        "c_F001",
        "t_F001",
    ]
    words = [samples.description.classes[s["label"]] for s in samples]
    assert words == ["neutral", "angry", "happy", "sad", "happy", "sad", "happy", "neutral"]
    assert samples.skipped == dict.fromkeys(("b_F002", "t_F000"), "frustrated is none of the four classes")
    assert "excited counts as happy, frustrated is left out" in caplog.text
    assert "2 samples left out (frustrated is none of the four classes: 2)" in caplog.text
    assert "audio: 1 infinite values became 0, in 1 rows" in caplog.text
    np.testing.assert_array_equal(samples[4]["vision"], content[5]["b"][3].astype(np.float32))
    np.testing.assert_array_equal(samples[7]["text"], content[3]["t"][1].astype(np.float32))
    assert samples[0]["audio"][1] == 0
    assert "".join(s["patient"] for s in samples) == "aabbbcct"
    split = split_features(samples, fractions=(0.6, 0.4, 0.0))
    assert {s["patient"] for s in split["test"]} == {"t"}
    apart = [{s["patient"] for s in split[part]} for part in ("train", "validation")]
    assert sum(map(len, apart)) == 3
    assert len(load_features(path, need_label=False)) == 10


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c[3]["b"].pop(), "dialogue b: has 4 IDs, 4 labels, 3 text, 4 audio, 4 visual features"),
        (lambda c: c[5].pop("t"), "dialogue t: has 2 IDs, 2 labels, 2 text, 2 audio, no visual features"),
        (lambda c: c[8].append("a"), "dialogue a: is in both train and test"),
        (lambda c: c.__setitem__(8, []), "the test part is empty, expected samples in it"),
        (lambda c: (c[7].clear(), c[8].clear()), "the train part is empty, expected samples in it"),
        (lambda c: c[2]["a"].__setitem__(1, 6), "utterance a_F001: its label is 6, expected 0 to 5"),
        (lambda c: c[2]["a"].__setitem__(1, [0.5, 1]), "utterance a_F001: its label is [0.5, 1], expected 0 to 5"),
        (
            lambda c: c[4]["b"].__setitem__(2, np.zeros(5)),
            "dialogue b: audio of utterance 3 is float64 (5,), expected (3,)",
        ),
        (lambda c: c[4]["b"].__setitem__(2, ["x"]), "dialogue b: audio of utterance 3 is <U1 (1,), expected (3,)"),
        (lambda c: c.__setitem__(7, {"b": 1}), "data: its parts are a dictionary with b, expected names of dialogues"),
    ],
)
def test_dialogues_that_do_not_fit_together(change, expected, rng, tmp_path):
    content = dialogues(rng)
    change(content)
    problem = problems(written(tmp_path, tuple(content)))[0]
    assert problem.startswith(expected)


@pytest.mark.parametrize(
    ("place", "name", "value"), [(3, "text", -np.inf), (4, "audio", np.nan), (5, "vision", np.inf)]
)
def test_dialogues_with_values_that_are_no_numbers(place, name, value, rng, tmp_path):
    content = dialogues(rng)
    content[place]["b"][3][0] = value
    path = written(tmp_path, tuple(content))
    (problem,) = problems(path)
    # as it lies in its dialogue, with those that are skipped
    where = f"row 4 (b_F003) ({path}, {name} of dialogue b)"
    assert problem == f"modality {name}: 1 rows with NaN, infinite or no values, the first is {where}"


def test_dialogues_of_which_none_can_be_used(rng, tmp_path):
    content = dialogues(rng)
    content[2] = {dialogue: [5] * len(labels) for dialogue, labels in content[2].items()}
    (problem,) = problems(written(tmp_path, tuple(content)))
    assert "has no sample that can be used" in problem


# ---------------------------------------------------------------------- CMU-MOSI's folder of utterances


def mosi(folder, rng, change=lambda files: None):
    """4 videos of 3 utterances; the last video is the test part; rows in another order than the transcripts."""
    utterances = [f"v_{video}_{number}" for video in range(4) for number in (1, 10, 2)]
    labels = [0, 1, 0, 1, 1, 0, 1, 1, 0, 1, 0, 0]
    files = {"data_transcripts": [[u, "SOME, WORDS", 93, y] for u, y in zip(utterances, labels, strict=True)]}
    for part, rows in (("train", [2, 0, 1, 8, 6, 7, 5, 3, 4]), ("test", [9, 11, 10])):
        text = rng.normal(size=(len(rows), 4)).round(4)
        files[f"data_text_{part}"] = [[row, *values] for row, values in zip(rows, text, strict=True)]
        files[f"data_text_text_{part}0"] = [[*values, labels[row]] for row, values in zip(rows, text, strict=True)]
        for name, size in (("audio", 3), ("video", 2)):
            features = rng.normal(size=(len(rows), size)).round(4)
            files[f"data_{name}_{name}_{part}0"] = [[*v, labels[r]] for r, v in zip(rows, features, strict=True)]
    change(files)
    folder.mkdir()
    for name, rows in files.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
    return files


def test_utterances_of_mosi(rng, tmp_path):
    files = mosi(tmp_path / "mosi", rng)
    samples = load_features(tmp_path / "mosi")
    assert samples.description.sizes == {"text": 4, "audio": 3, "video": 2}
    assert [s["case"] for s in samples][:3] == ["v_0_2", "v_0_1", "v_0_10"]
    assert [s["patient"] for s in samples] == ["v_0"] * 3 + ["v_2"] * 3 + ["v_1"] * 3 + ["v_3"] * 3
    assert samples.description.classes == ("negative", "positive")
    assert [s["label"] for s in samples] == [0, 0, 1, 0, 1, 1, 0, 1, 1, 1, 0, 0]
    for part, items in (("train", samples[:9]), ("test", samples[9:])):
        for name in ("text", "audio", "video"):
            expected = np.array([row[:-1] for row in files[f"data_{name}_{name}_{part}0"]], dtype=np.float32)
            np.testing.assert_array_equal(np.stack([s[name] for s in items]), expected)
    split = split_features(samples)
    assert [s["case"] for s in split["test"]] == ["v_3_1", "v_3_2", "v_3_10"]
    assert len({s["patient"] for s in split["validation"]}) == 1
    assert not {s["patient"] for s in split["validation"]} & {s["patient"] for s in split["train"]}


def set_cell(name, row, column, value):
    return lambda files: files[name][row].__setitem__(column, value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            set_cell("data_audio_audio_train0", 3, -1, 1),
            "row 4 of the train part (v_2_2): its labels are text 0, audio 1, video 0, transcript 0, expected",
        ),
        (
            set_cell("data_transcripts", 11, -1, 1),
            "row 2 of the test part (v_3_2): its labels are text 0, audio 0, video 0, transcript 1, expected",
        ),
        (
            set_cell("data_text_train", 0, 2, 9),
            "row 1 of the train part (v_0_2): its text features differ from those in data_text_train.csv",
        ),
        (set_cell("data_text_train", 0, 0, 12), "row 1 points to transcript 12, expected 0 to 11"),
        (set_cell("data_text_train", 0, 0, 0.5), "row 1 points to transcript 0.5, expected 0 to 11"),
        (set_cell("data_text_test", 2, 0, 11), "utterance v_3_2: is in two rows"),
        (set_cell("data_video_video_test0", 1, 0, "x"), "data_video_video_test0: cannot be read: could not convert"),
        (
            lambda f: [f[name].clear() for name in f if name.endswith(("test", "test0"))],
            "the test part is empty, expected samples in it",
        ),
        (set_cell("data_transcripts", 4, 0, "video"), "row 5 has no ID VIDEO_UTTERANCE"),
        (
            lambda f: f["data_video_video_test0"].pop(),
            "the files of the test part have different numbers of rows: text 3, audio 3, video 2, data_text_test.csv 3",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_files_of_mosi_that_disagree(change, expected, rng, tmp_path):
    mosi(tmp_path / "mosi", rng, change)
    (problem,) = problems(tmp_path / "mosi")
    assert problem.startswith(expected)


def test_files_of_mosi_that_are_missing(rng, tmp_path):
    mosi(tmp_path / "mosi", rng)
    (tmp_path / "mosi" / "data_audio_audio_test0.csv").unlink()
    (tmp_path / "mosi" / "data_transcripts.csv").unlink()
    found = problems(tmp_path / "mosi")
    assert [p.split(" is missing")[0] for p in found] == [
        "CMU-MOSI's data_audio_audio_test0.csv",
        "CMU-MOSI's data_transcripts.csv",
    ]


def test_many_rows_that_disagree_are_counted(rng, tmp_path):
    mosi(tmp_path / "mosi", rng, lambda files: [row.__setitem__(-1, 2) for row in files["data_text_text_train0"]])
    found = problems(tmp_path / "mosi")
    assert len(found) == 6
    assert found[-1].startswith("and 4 rows more")


@pytest.mark.real_data
def test_mosi(real_data):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    samples = load_features(real_data / "mosi")
    assert len(samples) == 2199
    assert samples.description.sizes == {"text": 100, "audio": 73, "video": 100}
    assert len({s["patient"] for s in samples}) == 93
    assert samples[0]["case"].startswith(samples[0]["patient"] + "_")
    split = split_features(samples, seed=2)
    assert len(split["test"]) == 752
    assert len(split["train"]) + len(split["validation"]) == 1447
    videos = {part: {s["patient"] for s in items} for part, items in split.items()}
    assert sum(map(len, videos.values())) == 93
    assert len(split_cases(samples, split_file=None, sizes=None)["train"]) > 1000  # a draw by video is possible, too
    train, test = ([s for s in samples if s["part"] == part] for part in ("train", "test"))
    accuracy = {}
    for names in (("text", "audio", "video"), ("text",)):
        x, z = (np.stack([np.concatenate([s[n] for n in names]) for s in part]) for part in (train, test))
        scaler = StandardScaler().fit(x)
        model = LogisticRegression(C=0.01, max_iter=5000).fit(scaler.transform(x), [s["label"] for s in train])
        accuracy[names] = model.score(scaler.transform(z), [s["label"] for s in test])
    assert accuracy["text", "audio", "video"] == pytest.approx(0.767, abs=0.004)  # 3 utterances of 752
    assert accuracy[("text",)] == pytest.approx(0.757, abs=0.004)
