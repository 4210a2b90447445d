# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, mean_absolute_error

from monai_cggm.metrics.epsilon import Accuracy, NegativeMAE, RegionDice

BRATS = {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}


def numpy_dice(logits, target, regions):
    prediction, scores = logits.argmax(axis=1), []
    for classes in regions.values():
        p, t = np.isin(prediction, classes), np.isin(target[:, 0], classes)
        if t.any():
            scores.append(2 * (p & t).sum() / (p.sum() + t.sum()))
    return np.mean(scores)


@pytest.mark.parametrize("spatial", [(7, 5), (4, 3, 5), (11,)])
@pytest.mark.parametrize("modalities", [1, 2, 4])
def test_region_dice_against_numpy(spatial, modalities):
    generator = torch.Generator().manual_seed(modalities)
    logits = [torch.randn(3, 4, *spatial, generator=generator) for _ in range(modalities)]
    target = torch.randint(0, 4, (3, 1, *spatial), generator=generator, dtype=torch.uint8)
    metric = RegionDice(BRATS, 4)
    actual = metric.value(metric.sums(logits, target))
    expected = [numpy_dice(p.numpy(), target.numpy(), BRATS) for p in logits]
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12)


def test_a_region_that_the_batch_lacks_is_left_out_and_counted():
    target = torch.tensor([[[[0, 2, 2, 0]]]])
    logits = torch.nn.functional.one_hot(torch.tensor([[[0, 2, 0, 3]]]), 4).movedim(-1, 1).float()
    metric = RegionDice(BRATS, 4)
    sums = metric.sums([logits], target)
    assert metric.absent(sums) == 2  # no TC, no ET
    assert metric.value(sums).item() == pytest.approx(2 * 1 / (2 + 2))  # the false ET voxel counts in WT only


def test_a_batch_without_any_region_has_no_value():
    metric = RegionDice(BRATS, 4)
    sums = metric.sums([torch.randn(1, 4, 3, 3)], torch.zeros(1, 1, 3, 3, dtype=torch.long))
    assert torch.isnan(metric.value(sums)).all()


@pytest.mark.parametrize("metric", [RegionDice(BRATS, 4)])
def test_added_sums_of_two_halves_equal_the_whole(metric):
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(6, 4, 5, 5, generator=generator) for _ in range(3)]
    target = torch.randint(0, 4, (6, 1, 5, 5), generator=generator)
    halves = metric.sums([p[:2] for p in logits], target[:2]) + metric.sums([p[2:] for p in logits], target[2:])
    torch.testing.assert_close(metric.value(halves), metric.value(metric.sums(logits, target)))


def test_accuracy_against_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(50, 6, generator=generator) for _ in range(3)]
    target = torch.randint(0, 6, (50,), generator=generator)
    metric = Accuracy()
    actual = metric.value(metric.sums(logits, target))
    np.testing.assert_allclose(actual, [accuracy_score(target, p.argmax(1)) for p in logits])


@pytest.mark.parametrize("shape", [(20,), (20, 1)])
def test_negative_mae_against_scikit_learn(shape):
    generator = torch.Generator().manual_seed(0)
    predictions = [torch.randn(shape, generator=generator) for _ in range(2)]
    target = torch.randn(20, generator=generator)
    metric = NegativeMAE()
    actual = metric.value(metric.sums(predictions, target))
    np.testing.assert_allclose(actual, [-mean_absolute_error(target, p.flatten()) for p in predictions], rtol=1e-6)


@pytest.mark.parametrize(
    ("regions", "message"),
    [({}, "at least one region"), ({"WT": []}, "'WT' must name classes"), ({"ET": [4]}, r"0\.\.3, got \[4\]")],
)
def test_refusals(regions, message):
    with pytest.raises(ValueError, match=message):
        RegionDice(regions, 4)
