# SPDX-License-Identifier: Apache-2.0
"""Dice and binary cross-entropy of regions: against NumPy, plain sigmoids, finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from monai_cggm.losses import RegionDiceCrossEntropyLoss

NESTED = {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}
OVERLAPPING = {"a": [1, 2], "b": [2, 3], "background": [0]}


def batch(size=(5, 7), classes=4, samples=3):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(samples, classes, *size, generator=generator, dtype=torch.float64)
    label = torch.randint(classes, (samples, 1, *size), generator=generator, dtype=torch.uint8)
    label[0][label[0] == 3] = 0  # a region that the first sample lacks
    return logits, label


def reference(logits, label, regions, lambda_ce, smooth):
    """Region by region and sample by sample, from probabilities, in NumPy."""
    e = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = e / e.sum(1, keepdims=True)
    dice, ce = [], []
    for classes in regions.values():
        for p, y in zip(probabilities, label[:, 0], strict=True):
            inside, truth = p[classes].sum(0), np.isin(y, classes)
            dice.append(1 - (2 * inside[truth].sum() + smooth) / (inside.sum() + truth.sum() + smooth))
            ce.append(-np.where(truth, np.log(inside), np.log(1 - inside)).mean())
    return np.mean(dice) + lambda_ce * np.mean(ce)


@pytest.mark.parametrize("size", [(5, 7), (4, 3, 6)])
@pytest.mark.parametrize("regions", [NESTED, OVERLAPPING])
@pytest.mark.parametrize(("lambda_ce", "smooth"), [(1.0, 1.0), (0.0, 1e-5), (0.3, 2.0)])
def test_sums_of_probabilities(size, regions, lambda_ce, smooth):
    logits, label = batch(size)
    loss = RegionDiceCrossEntropyLoss(regions, 4, lambda_ce=lambda_ce, smooth=smooth)(logits, label)
    assert loss.item() == pytest.approx(reference(logits.numpy(), label.numpy(), regions, lambda_ce, smooth), abs=1e-9)


def test_of_two_classes_it_is_the_plain_sigmoid():
    logits, label = batch(classes=2)
    loss = RegionDiceCrossEntropyLoss({"lesion": [1]}, 2)
    z = logits[:, 1:] - logits[:, :1]
    torch.testing.assert_close(loss.region_logits(logits), z)
    without = RegionDiceCrossEntropyLoss({"lesion": [1]}, 2, lambda_ce=0)(logits, label)
    expected = binary_cross_entropy_with_logits(z, label.double())
    torch.testing.assert_close(loss(logits, label) - without, expected)


def test_what_is_nested_in_the_labels_is_nested_in_the_prediction():
    logits, _ = batch((9, 9))
    wt, tc, et = RegionDiceCrossEntropyLoss(NESTED, 4).region_logits(logits).unbind(1)
    assert (wt > tc).all()
    assert (tc > et).all()


def test_logits_that_float32_cannot_exponentiate():
    label = torch.tensor([3, 0]).view(1, 1, 1, 2)
    logits = torch.zeros(1, 4, 1, 2)
    logits[0, :, 0, 0] = torch.tensor([-500.0, -500, -500, 500])
    logits[0, :, 0, 1] = torch.tensor([500.0, -500, -500, -500])
    loss = RegionDiceCrossEntropyLoss(NESTED, 4)
    assert loss(logits, label).item() == pytest.approx(0, abs=1e-6)
    wrong = logits.flip(-1).requires_grad_()
    assert loss(wrong, label).item() > 900
    assert torch.isfinite(torch.autograd.grad(loss(wrong, label), wrong)[0]).all()


def test_is_twice_differentiable():
    logits, label = batch((3, 2), samples=2)
    loss = RegionDiceCrossEntropyLoss(OVERLAPPING, 4)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, label), logits)
    assert torch.autograd.gradgradcheck(lambda z: loss(z, label), logits)


def test_halves_average_to_the_whole():
    logits, label = batch(samples=4)
    loss = RegionDiceCrossEntropyLoss(NESTED, 4)
    halves = (loss(logits[:2], label[:2]) + loss(logits[2:], label[2:])) / 2
    torch.testing.assert_close(halves, loss(logits, label))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    logits, label = batch()
    loss = RegionDiceCrossEntropyLoss(NESTED, 4)
    half = logits.to(dtype)
    assert loss(half, label).dtype == torch.float32
    assert torch.equal(loss(half, label), loss(half.float(), label))
    assert not loss.state_dict()


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ({}, "no region given"),
        ({"WT": []}, r"region WT has the classes \[\], expected some of 0 to 3, not all"),
        ({"WT": [4]}, r"region WT has the classes \[4\]"),
        ({"all": [0, 1, 2, 3]}, r"region all has the classes \[0, 1, 2, 3\]"),
    ],
)
def test_refuses_regions(regions, message):
    with pytest.raises(ValueError, match=message):
        RegionDiceCrossEntropyLoss(regions, 4)


def test_refuses():
    logits, label = batch()
    loss = RegionDiceCrossEntropyLoss(NESTED, 4)
    with pytest.raises(ValueError, match=r"label must have shape \(3, 1, 5, 7\), got \(3, 5, 7\)"):
        loss(logits, label[:, 0])
    with pytest.raises(ValueError, match="logits have 3 classes, expected 4"):
        loss(logits[:, :3], label)
    with pytest.raises(ValueError, match="lambda_ce must not be negative, got -1"):
        RegionDiceCrossEntropyLoss(NESTED, 4, lambda_ce=-1)
    with pytest.raises(ValueError, match="smooth must be positive, got 0"):
        RegionDiceCrossEntropyLoss(NESTED, 4, smooth=0)
