# SPDX-License-Identifier: Apache-2.0
r"""A generator of sentiment-like and emotion-like sequences, for demonstrations and tests without anybody's data.

An utterance has text, audio and vision: sequences of their own lengths, all of them noise, with a few *cues*. Where a
cue stands in the sequence is drawn; what it says depends on the score. With :math:`n_{td} \sim N(0, 1)`, position t,
number d and cues at the positions C of a modality m:

.. math:: x_{td} = n_{td} + [t \in C] \, (M e_{0d} + a_m G \, s_d)

========================  ==============================================================================================
:math:`C`                 3 positions, drawn without replacement
:math:`M = 3`             the cue's mark, in number 0
:math:`a_m`               ``informativeness`` of the modality, 0 (nothing to learn) to 1
:math:`G = 2`             the contrast
:math:`s`                 numbers 1 to 4. Sentiment: y (1, −1, 1, −1) / 2 for the score y. Emotion k of 0 to 3: 1 in
                          number 1 + k
========================  ==============================================================================================

Scores are :math:`\mathrm{clip}(N(0.2, 1.5^2), -3, 3)` in steps of 0.2, and a further 8 % exactly 0. Emotions are
neutral (35 %), happy (15 %), sad (25 %) and angry (25 %).

The file is as MulT (Tsai et al., ACL 2019) publishes CMU-MOSI and IEMOCAP: padded with zeros in front, one audio number
in some utterances −∞, IDs ``video[utterance]`` with times beside them, parts by video.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from monai_cggm.data.published import EMOTIONS
from monai_cggm.files import atomic_path

#: numbers at a position
SIZES = MappingProxyType({"text": 30, "audio": 12, "vision": 18})
#: shortest and longest sequence
LENGTHS = MappingProxyType({"text": (5, 20), "audio": (12, 40), "vision": (8, 30)})
INFORMATIVENESS: Mapping[str, float] = MappingProxyType({"text": 1.0, "audio": 0.4, "vision": 0.3})
TASKS = ("sentiment", "emotion")

_CUES, _MARK, _CONTRAST = 3, 3.0, 2.0
_SENTIMENT = np.array([1.0, -1.0, 1.0, -1.0]) / 2.0
_FREQUENCIES = (0.35, 0.15, 0.25, 0.25)
_ZERO_SHARE = 0.08  # of the scores
_INFINITE_SHARE = 0.02  # of the utterances
_VIDEO = (4, 13)  # utterances of a video, from and below
_PART_NAMES = ("train", "valid", "test")
_SHARES = (0.7, 0.15)  # of the videos, for the first two


def write_phantom_features(
    path: str | Path,
    *,
    samples: int = 400,
    seed: int = 0,
    informativeness: Mapping[str, float] | None = None,
    task: str = "sentiment",
) -> dict[str, int]:
    """Write a feature file in MulT's format: a pickle of dictionaries of NumPy arrays.

    The file is written whole or not at all, and equal to the last byte for equal arguments and versions of Python and
    NumPy; an existing one is replaced.

    Args:
        path: the file, ``.pkl``; missing folders are made.
        samples: how many utterances, at least 60, in videos of 4 to 12.
        seed: at least 0.
        informativeness: modality → 0 to 1; those that are not named as in :data:`INFORMATIVENESS`, where text leads.
        task: ``sentiment``, a score from −3 to 3 (train with ``task=regression``), or ``emotion``, one of four.

    Returns:
        Samples in each part: ``train``, ``valid``, ``test``.

    Raises:
        ValueError: where an argument is out of its range.

    Example:
        >>> import tempfile
        >>> from monai_cggm.data import load_features
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sizes = write_phantom_features(f"{folder}/phantom.pkl", samples=60)
        ...     loaded = load_features(f"{folder}/phantom.pkl", task="regression")
        >>> sum(sizes.values()), loaded.description.sizes
        (60, {'vision': 18, 'audio': 12, 'text': 30})
    """
    path = Path(path)
    shares = _checked(path, samples, seed, informativeness, task)
    video_rng, label_rng, feature_rng = np.random.default_rng(seed).spawn(3)
    videos = _videos(samples, video_rng)
    if task == "sentiment":
        labels, signals = _scores(samples, label_rng)
    else:
        labels, signals = _emotions(samples, label_rng)
    content: dict[str, Any] = {
        name: _sequences(name, signals * shares[name], feature_rng) for name in ("vision", "audio", "text")
    }
    infinite = feature_rng.choice(samples, size=max(1, round(_INFINITE_SHARE * samples)), replace=False)
    content["audio"][infinite, -1, -1] = -np.inf
    content |= {"labels": labels, "id": _ids(videos)}
    part_of = _parts(videos)
    parts = {part: {key: values[part_of == i] for key, values in content.items()} for i, part in enumerate(_PART_NAMES)}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        pickle.dump(parts, file, protocol=4)
    return {part: len(values["labels"]) for part, values in parts.items()}


def _checked(
    path: Path, samples: int, seed: int, informativeness: Mapping[str, float] | None, task: str
) -> dict[str, float]:
    if path.suffix.lower() not in (".pkl", ".pickle"):
        raise ValueError(f"expected a file that ends in .pkl, got {path}")
    if samples < 60 or seed < 0:
        raise ValueError(f"expected at least 60 samples and a seed of at least 0, got samples={samples}, seed={seed}")
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    given = dict(informativeness or {})
    unknown = sorted(set(given) - set(SIZES))
    if unknown:
        raise ValueError(f"informativeness names {', '.join(unknown)}, expected some of {', '.join(SIZES)}")
    wrong = {name: share for name, share in given.items() if not 0 <= share <= 1}
    if wrong:
        raise ValueError(f"informativeness must be 0 to 1, got {', '.join(f'{n}={s}' for n, s in wrong.items())}")
    return {**INFORMATIVENESS, **given}


def _videos(samples: int, random: np.random.Generator) -> np.ndarray:
    """The video of each utterance, ``(N,)``."""
    sizes = random.integers(*_VIDEO, size=samples)
    return np.repeat(np.arange(samples), sizes)[:samples]


def _parts(videos: np.ndarray) -> np.ndarray:
    """The part of each utterance, 0 to 2; videos are drawn already, so that their order is one at random."""
    count = int(videos[-1]) + 1
    validation = max(1, round(_SHARES[1] * count))
    training = min(round(_SHARES[0] * count), count - validation - 1)
    return np.searchsorted([training, training + validation], videos, side="right")


def _ids(videos: np.ndarray) -> np.ndarray:
    """MulT's three columns, in bytes: the utterance, and when it begins and ends, in seconds."""
    numbers = np.arange(len(videos)) - np.searchsorted(videos, videos)
    rows = [
        (f"phantom{video:04d}[{number}]", f"{5.0 * number}", f"{5.0 * number + 4.5}")
        for video, number in zip(videos, numbers, strict=True)
    ]
    return np.array(rows, dtype="S")


def _scores(samples: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    scores = np.round(np.clip(random.normal(0.2, 1.5, size=samples), -3, 3) * 5) / 5
    scores[random.random(samples) < _ZERO_SHARE] = 0.0
    return scores.reshape(-1, 1, 1).astype(np.float32), scores[:, None] * _SENTIMENT


def _emotions(samples: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    classes = random.choice(len(EMOTIONS), p=_FREQUENCIES, size=samples)
    yes = np.eye(len(EMOTIONS))[classes]
    return np.stack([1 - yes, yes], axis=-1).astype(np.float32), yes


def _sequences(name: str, signals: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Sequences ``(N, T, D)``, padded in front, that carry signals ``(N, 4)``."""
    shortest, longest = LENGTHS[name]
    values = np.zeros((len(signals), longest, SIZES[name]), dtype=np.float32)
    lengths = random.integers(shortest, longest + 1, size=len(signals))
    for row, (length, signal) in enumerate(zip(lengths, signals, strict=True)):
        sequence = random.standard_normal((length, SIZES[name]))
        cues = random.choice(length, size=_CUES, replace=False)
        sequence[cues, 0] += _MARK
        sequence[cues, 1:5] += _CONTRAST * signal
        values[row, longest - length :] = sequence
    return values
