# SPDX-License-Identifier: Apache-2.0
"""Scores of classes and numbers, against scikit-learn's and NumPy's."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error

from monai_cggm.metrics.prediction_scores import classification_scores, prediction_scores, regression_scores


@pytest.mark.parametrize(("samples", "classes"), [(1, 2), (7, 3), (200, 10)])
def test_classification_is_scikit_learn_s(samples, classes):
    rng = np.random.default_rng(samples)
    truth, prediction = rng.integers(0, classes, (2, samples))
    scores = classification_scores(truth, prediction)
    assert scores["accuracy"] == pytest.approx(accuracy_score(truth, prediction))
    assert scores["f1"] == pytest.approx(f1_score(truth, prediction, average="weighted", zero_division=0))


@pytest.mark.parametrize("samples", [5, 100])
def test_regression_is_scikit_learn_s_and_leaves_truths_of_zero_out_of_the_signs(samples):
    rng = np.random.default_rng(samples)
    truth = np.round(rng.uniform(-3, 3, samples), 1)
    truth[::3] = 0.0
    prediction = truth + rng.normal(size=samples) * 2
    scores = regression_scores(truth, prediction)
    polar = truth != 0
    signs = (truth[polar] > 0), (prediction[polar] > 0)
    assert scores["mae"] == pytest.approx(mean_absolute_error(truth, prediction))
    assert scores["pearson"] == pytest.approx(np.corrcoef(truth, prediction)[0, 1])
    assert scores["acc2"] == pytest.approx(accuracy_score(*signs))
    assert scores["f1"] == pytest.approx(f1_score(*signs, average="weighted"))
    steps = [np.round(np.clip(side, -3, 3)) for side in (truth, prediction)]
    assert scores["acc7"] == pytest.approx(np.mean(steps[0] == steps[1]))
    assert set(regression_scores(truth, prediction, sentiment=False)) == {"mae", "pearson"}


@pytest.mark.parametrize(
    ("truth", "prediction", "acc2", "acc7"),
    [
        # a prediction of exactly 0 is negative, and the smallest number above it positive
        ([1.0, -1.0, 1.0], [0.0, 0.0, 1e-9], 2 / 3, 0.0),
        # truths of exactly 0 have no sign; their step counts
        ([0.0, 0.0, -2.0], [0.4, -0.4, -2.0], 1.0, 1.0),
        # halves go to the even step: 0.5 to 0, 1.5 and 2.5 to 2
        ([0.5, -0.5, 1.5, 2.5, -2.5], [0.0, 0.0, 2.0, 2.0, -2.0], 4 / 5, 1.0),
        ([0.0, 1.0, 3.0], [0.5, 0.51, 2.5], 1.0, 2 / 3),
        # beyond the scale is at its end
        ([3.0, -3.0, 3.0], [3.6, -3.6, 2.51], 1.0, 1.0),
    ],
)
def test_signs_and_steps_by_hand(truth, prediction, acc2, acc7):
    scores = regression_scores(truth, prediction)
    assert (scores["acc2"], scores["acc7"]) == (pytest.approx(acc2), pytest.approx(acc7))


def test_what_is_undefined_is_nan():
    scores = regression_scores([0.0, 0.0], [1.0, -1.0])
    assert np.isnan(scores["pearson"])
    assert np.isnan(scores["acc2"])
    assert np.isnan(scores["f1"])
    assert scores["acc7"] == 0.0


@pytest.mark.parametrize("sides", [([], []), ([1], [1, 2]), ([[1]], [[1]])])
def test_sides_that_do_not_fit_are_refused(sides):
    with pytest.raises(ValueError, match="as many predictions as truths"):
        classification_scores(*sides)


def test_either_task():
    assert prediction_scores("classification", [0, 1], [0, 0])["accuracy"] == 0.5
    assert prediction_scores("regression", [0.0, 1.0], [0.0, 0.0], sentiment=False)["mae"] == 0.5
