# SPDX-License-Identifier: Apache-2.0
"""Scores of predictions of classes and of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def classification_scores(
    truth: Sequence[int] | np.ndarray, prediction: Sequence[int] | np.ndarray
) -> dict[str, float]:
    r"""Score predicted classes.

    Accuracy, and F1 weighted by how often each class is true, as scikit-learn's ``f1_score(average="weighted")``:

    .. math:: F_1 = \sum_c \frac{n_c}{n}\,\frac{2\,TP_c}{2\,TP_c + FP_c + FN_c}

    Args:
        truth: class indices ``(N,)``.
        prediction: class indices ``(N,)``.

    Returns:
        ``accuracy`` and ``f1``.

    Raises:
        ValueError: for no sample, or lengths that differ.

    Example:
        >>> classification_scores([0, 0, 1, 2], [0, 1, 1, 2])["accuracy"]
        0.75
    """
    true, predicted = _pair(truth, prediction)
    classes, counts = np.unique(true, return_counts=True)
    f1 = 0.0
    for label, count in zip(classes, counts, strict=True):
        both = int(((true == label) & (predicted == label)).sum())
        f1 += count / len(true) * 2 * both / (count + int((predicted == label).sum()))
    return {"accuracy": float((true == predicted).mean()), "f1": float(f1)}


def regression_scores(
    truth: Sequence[float] | np.ndarray, prediction: Sequence[float] | np.ndarray, *, sentiment: bool = True
) -> dict[str, float]:
    """Score predicted numbers, with the scores that are usual for sentiment from −3 to 3 (CMU-MOSI).

    Args:
        truth: ``(N,)``.
        prediction: ``(N,)``.
        sentiment: whether to give ``acc2``, ``f1`` and ``acc7``, which mean something for such a scale only.

    Returns:
        ``mae``: mean absolute error. ``pearson``: correlation; NaN where one side never changes. ``acc2``: share whose
        sign is right, and ``f1``, weighted, of the two signs; samples whose truth is exactly 0 are left out of both,
        and a prediction of 0 counts as negative (positive is > 0), as in the evaluation of MulT (Tsai et al., ACL
        2019) that the literature on CMU-MOSI follows; NaN where no truth is left. ``acc7``: share that is right
        after both are cut to −3 to 3 and rounded (halves to the even number).

    Raises:
        ValueError: for no sample, or lengths that differ.

    Example:
        >>> scores = regression_scores([-2.0, 0.0, 1.0, 3.0], [-1.0, 0.2, 1.4, -1.0])
        >>> scores["mae"], scores["acc2"], scores["acc7"]
        (1.4, 0.6666666666666666, 0.5)
    """
    true, predicted = (side.astype(np.float64) for side in _pair(truth, prediction))
    changes = true.std() > 0 and predicted.std() > 0
    scores = {
        "mae": float(np.abs(true - predicted).mean()),
        "pearson": float(np.corrcoef(true, predicted)[0, 1]) if changes else float("nan"),
    }
    if not sentiment:
        return scores
    polar = true != 0
    signs = {"accuracy": float("nan"), "f1": float("nan")}
    if polar.any():
        signs = classification_scores((true[polar] > 0).astype(int), (predicted[polar] > 0).astype(int))
    steps = [np.round(np.clip(side, -3, 3)) for side in (true, predicted)]
    acc7 = float((steps[0] == steps[1]).mean())
    return {**scores, "acc2": signs["accuracy"], "f1": signs["f1"], "acc7": acc7}


def prediction_scores(
    task: str, truth: Sequence[float] | np.ndarray, prediction: Sequence[float] | np.ndarray, *, sentiment: bool = True
) -> Mapping[str, float]:
    """Score predictions of either task.

    Example:
        >>> dict(prediction_scores("classification", [0, 1], [0, 1]))
        {'accuracy': 1.0, 'f1': 1.0}
    """
    if task == "classification":
        return classification_scores(np.asarray(truth, dtype=int), np.asarray(prediction, dtype=int))
    return regression_scores(truth, prediction, sentiment=sentiment)


def _pair(
    truth: Sequence[float] | np.ndarray, prediction: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    true, predicted = np.asarray(truth), np.asarray(prediction)
    if true.ndim != 1 or true.shape != predicted.shape or not len(true):
        raise ValueError(f"expected as many predictions as truths, at least one, got {predicted.shape}, {true.shape}")
    return true, predicted
