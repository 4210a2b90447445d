# SPDX-License-Identifier: Apache-2.0
"""Generated sequences: the published format, and a score that can be learnt from them."""

import pickle

import numpy as np
import pytest

from monai_cggm.data.features import load_features, split_features
from monai_cggm.data.phantom_features import INFORMATIVENESS, LENGTHS, SIZES, write_phantom_features
from monai_cggm.data.pickles import read_pickle

MODALITIES = ("text", "audio", "vision")


@pytest.fixture(scope="module")
def sentiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("phantom") / "sentiment.pkl"
    sizes = write_phantom_features(path, samples=600, seed=1)
    return path, sizes


def test_the_file_has_the_published_format(sentiment):
    path, sizes = sentiment
    with path.open("rb") as file:
        content = pickle.load(file)  # as users of other code read it
    assert list(content) == ["train", "valid", "test"]
    assert sum(sizes.values()) == 600
    assert [abs(sizes[part] / 600 - share) < 0.05 for part, share in zip(content, (0.7, 0.15, 0.15), strict=True)]
    for part, entry in content.items():
        n = sizes[part]
        assert {key: values.shape for key, values in entry.items()} == {
            **{name: (n, LENGTHS[name][1], SIZES[name]) for name in MODALITIES},
            "labels": (n, 1, 1),
            "id": (n, 3),
        }
        assert {entry[name].dtype for name in (*MODALITIES, "labels")} == {np.dtype(np.float32)}
        assert entry["id"].dtype.kind == "S"
        for name in MODALITIES:
            live = (entry[name] != 0).any(axis=2)
            lengths = live.sum(axis=1)
            np.testing.assert_array_equal(live, np.arange(live.shape[1]) >= live.shape[1] - lengths[:, None])
            assert lengths.min() >= LENGTHS[name][0]
        assert np.isfinite(entry["text"]).all()
    infinite = sum(int(np.isneginf(entry["audio"]).sum()) for entry in content.values())
    assert infinite == 12
    scores = np.concatenate([entry["labels"].ravel() for entry in content.values()])
    assert scores.min() == -3
    assert scores.max() == 3
    assert 0.05 < np.mean(scores == 0) < 0.2
    np.testing.assert_allclose(scores * 5, np.round(scores * 5), atol=1e-5)
    videos = [{row[0].split(b"[")[0] for row in entry["id"]} for entry in content.values()]
    assert len(set().union(*videos)) == sum(map(len, videos))


def test_our_readers_take_it(sentiment):
    path, sizes = sentiment
    assert list(read_pickle(path)["train"]) == ["vision", "audio", "text", "labels", "id"]
    samples = load_features(path, task="regression")
    assert samples.description.sizes == SIZES
    assert samples[0]["case"] == "phantom0000[0]"
    assert samples[0]["patient"] == "phantom0000"
    assert {len(s["text"]) for s in samples} == set(range(5, 21))
    assert [len(items) for items in split_features(samples).values()] == list(sizes.values())


def learnt(train, test, names):
    """Correlation of a linear model of mean features with the scores."""

    def table(part):
        return np.stack([np.concatenate([[1.0], *(s[name].mean(axis=0) for name in names)]) for s in part])

    x, y = table(train), np.array([s["label"] for s in train])
    weights = np.linalg.solve(x.T @ x + 1e-3 * np.eye(x.shape[1]), x.T @ y)
    return np.corrcoef(table(test) @ weights, [s["label"] for s in test])[0, 1]


def test_the_score_can_be_learnt_and_text_leads(sentiment):
    split = split_features(load_features(sentiment[0], task="regression"))
    text, audio, vision = (learnt(split["train"], split["test"], [name]) for name in MODALITIES)
    assert text > 0.7
    assert min(audio, vision) > 0.2
    assert max(audio, vision) < text - 0.15


def test_informativeness_says_what_can_be_learnt(tmp_path):
    path = tmp_path / "other.pkl"
    write_phantom_features(path, samples=600, seed=1, informativeness={"text": 0.0, "audio": 1.0})
    split = split_features(load_features(path, task="regression"))
    assert abs(learnt(split["train"], split["test"], ["text"])) < 0.25
    assert learnt(split["train"], split["test"], ["audio"]) > 0.7
    assert INFORMATIVENESS["vision"] == 0.3


def test_a_cue_says_what_the_formula_says(sentiment):
    """The mean over all positions, of which 3 are cues: number 1 is 3 G y / 2, 0 is 3 M, others nothing."""
    samples = load_features(sentiment[0], task="regression")
    sums = np.stack([s["text"].sum(axis=0) for s in samples])
    scores = np.array([s["label"] for s in samples])
    slopes = scores @ sums / (scores @ scores)
    np.testing.assert_allclose(slopes[1:5], [3, -3, 3, -3], atol=0.4)
    np.testing.assert_allclose(slopes[5:], 0, atol=0.5)
    assert sums[:, 0].mean() == pytest.approx(9, abs=0.5)
    vision = scores @ np.stack([s["vision"].sum(axis=0) for s in samples]) / (scores @ scores)
    np.testing.assert_allclose(vision[1:5], [0.9, -0.9, 0.9, -0.9], atol=0.5)


def test_emotions(tmp_path):
    path = tmp_path / "emotion.pkl"
    sizes = write_phantom_features(path, samples=300, seed=4, task="emotion")
    content = read_pickle(path)
    for part, entry in content.items():
        assert entry["labels"].shape == (sizes[part], 4, 2)
        np.testing.assert_array_equal(entry["labels"].sum(axis=2), 1)
        np.testing.assert_array_equal(entry["labels"][:, :, 1].sum(axis=1), 1)
    samples = load_features(path)
    assert samples.description.classes == ("angry", "happy", "neutral", "sad")
    assert samples.skipped == {}
    sums = np.stack([s["text"].sum(axis=0)[1:5] for s in samples])
    numbers = {"neutral": 0, "happy": 1, "sad": 2, "angry": 3}
    own = np.array([sums[i, numbers[samples.description.classes[s["label"]]]] for i, s in enumerate(samples)])
    assert own.mean() == pytest.approx(6, abs=0.8)
    assert (sums.sum(axis=1) - own).mean() == pytest.approx(0, abs=1)


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_phantom_features(tmp_path / f"{name}.pkl", samples=60, seed=seed)
    first, second, third = ((tmp_path / f"{name}.pkl").read_bytes() for name in "abc")
    assert first == second != third
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pkl", "b.pkl", "c.pkl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 59}, "at least 60 samples and a seed of at least 0, got samples=59"),
        ({"seed": -1}, "seed=-1"),
        ({"task": "regression"}, "task must be one of sentiment, emotion, got 'regression'"),
        ({"informativeness": {"video": 1}}, "informativeness names video, expected some of text, audio, vision"),
        ({"informativeness": {"text": 1.5}}, "informativeness must be 0 to 1, got text=1.5"),
        ({"path": "x.npz"}, "expected a file that ends in .pkl"),
    ],
)
def test_arguments_out_of_range(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_phantom_features(tmp_path / arguments.pop("path", "x.pkl"), **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", range(8))
def test_no_part_is_empty(seed, tmp_path):
    assert min(write_phantom_features(tmp_path / "x.pkl", samples=60, seed=seed).values()) > 0
