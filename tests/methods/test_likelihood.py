# SPDX-License-Identifier: Apache-2.0
"""The probability of the truth against loops over voxels and samples, for every task."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from monai_cggm.methods.likelihood import ProbabilityOfTruth, true_class_probability
from monai_cggm.metrics import Accuracy, NegativeMAE
from tests.methods import toy

TASKS = ("segmentation", "classification", "regression")


def set_up(task, modalities, *, number=1, batch=4, dtype=torch.float64, seed=0):
    """Network, classifiers, metric, loss and batches of a task, for the tests of methods that serve all three."""
    if task == "segmentation":
        network, classifiers = toy.parts(modalities, dtype=dtype, network=toy.MaskedNetwork, seed=seed)
        data = toy.batches(number, modalities=len(modalities), size=7, batch=batch, dtype=dtype)
        return network, classifiers, toy.metric(), toy.cross_entropy, data
    torch.manual_seed(seed)
    network, classifiers = toy.RegressionNetwork(modalities), toy.RegressionClassifiers(modalities)
    if task == "classification":
        network.head = nn.Linear(6, 3)
        classifiers.heads = nn.ModuleDict({m: nn.Linear(6, 3) for m in modalities})
    random = torch.Generator().manual_seed(5)
    strength = torch.linspace(1.0, 0.2, len(modalities), dtype=dtype).view(1, -1, 1)
    data = []
    for _ in range(number):
        label = torch.randint(0, 3, (batch,), generator=random)
        image = label.view(-1, 1, 1) * strength + torch.randn(batch, len(modalities), 4, generator=random, dtype=dtype)
        data.append({"image": image, "label": label if task == "classification" else label.to(dtype)})
    metric, loss = (Accuracy(), nn.functional.cross_entropy) if task == "classification" else (NegativeMAE(), toy.l1)
    return network.to(dtype), classifiers.to(dtype), metric, loss, data


def predictions_of(network, classifiers, image):
    """What the classifiers say, without the method."""
    if image.dim() > 3:
        return list(classifiers(toy.features_of(network, image), image.shape[2:]).values())
    return list(classifiers({m: e(image[:, i]) for i, (m, e) in enumerate(network.encoders.items())}).values())


def by_hand(prediction, target):
    """Loops over samples and voxels."""
    prediction, target = prediction.detach().double().numpy(), target.double().numpy()
    if prediction.ndim == 1 or prediction.shape[1] == 1:
        return np.mean([math.exp(-abs(p - t)) for p, t in zip(prediction.ravel(), target.ravel(), strict=True)])
    logits = np.moveaxis(prediction, 1, -1).reshape(-1, prediction.shape[1])
    groups = {}
    for z, t in zip(logits, target.ravel().astype(int), strict=True):
        group = t if prediction.ndim > 2 else "all samples"
        groups.setdefault(group, []).append(math.exp(z[t]) / sum(math.exp(v) for v in z))
    return np.mean([np.mean(values) for values in groups.values()])


@pytest.mark.parametrize("modalities", [2, 3, 4])
@pytest.mark.parametrize(
    ("prediction", "target"),
    [
        ((2, 4, 5, 6), (2, 1, 5, 6)),
        ((1, 2, 3, 4, 5), (1, 1, 3, 4, 5)),
        ((3, 3, 9), (3, 1, 9)),
        ((7, 5), (7,)),
        ((7, 5), (7, 1)),
        ((6, 1), (6,)),
        ((6, 1), (6, 1)),
        ((6,), (6,)),
    ],
)
def test_against_loops(prediction, target, modalities):
    classes = prediction[1] if len(prediction) > 1 else 1
    predictions = [2 * torch.randn(prediction) for _ in range(modalities)]
    truth = torch.randn(target) if classes == 1 else torch.randint(0, classes, target)
    measure = ProbabilityOfTruth()
    sums = measure.sums(predictions, truth)
    assert sums.shape == (modalities, 2 * (classes if len(prediction) > 2 else 1))
    assert sums.dtype == torch.float64
    expected = [by_hand(p, truth) for p in predictions]
    np.testing.assert_allclose(measure.value(sums), expected, rtol=1e-5)
    assert true_class_probability(predictions[0], truth).item() == pytest.approx(expected[0], rel=1e-5)
    # two ranks that add their sums get what one with the whole batch would
    parts = [measure.sums([p[rows] for p in predictions], truth[rows]) for rows in (slice(1), slice(1, None))]
    torch.testing.assert_close(parts[0] + parts[1], sums, rtol=1e-6, atol=1e-6)


def test_background_does_not_drown_the_rest_and_absent_classes_do_not_count():
    truth = torch.zeros(1, 1, 10, 10, dtype=torch.long)
    truth[0, 0, 0, :2] = 2
    everything_background = torch.zeros(1, 4, 10, 10)
    everything_background[:, 0] = 30.0
    assert true_class_probability(everything_background, truth).item() == pytest.approx(0.5)
    right = 30.0 * nn.functional.one_hot(truth[:, 0], 4).movedim(-1, 1).float()
    assert true_class_probability(right, truth).item() == pytest.approx(1.0)
    # a mean over samples for vectors: two of class 0 at ½ and one of class 1 at 1
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 40.0]])
    assert true_class_probability(logits, torch.tensor([0, 0, 1])).item() == pytest.approx(2 / 3)


@pytest.mark.parametrize(("shape", "target"), [((0, 3, 4, 4), (0, 1, 4, 4)), ((0, 3), (0,)), ((0, 1), (0,))])
def test_of_no_sample_nothing_is_known(shape, target):
    assert true_class_probability(torch.zeros(shape), torch.zeros(target)).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_added_up_in_full(dtype):
    logits = torch.randn(4, 3, 40, 40).to(dtype).requires_grad_()
    truth = torch.randint(0, 3, (4, 1, 40, 40))
    value = true_class_probability(logits, truth)
    assert value.item() == pytest.approx(by_hand(logits.double(), truth), rel=1e-6)
    assert not value.requires_grad
