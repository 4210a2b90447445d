# SPDX-License-Identifier: Apache-2.0
"""Dice plus weighted cross-entropy: values, second derivatives, ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from monai_cggm.losses import DiceCrossEntropyLoss

PAPER = (0.2, 0.3, 0.25, 0.25)


def batch(size=(5, 7), classes=4, samples=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, *size, generator=generator)
    label = torch.randint(classes, (samples, 1, *size), generator=generator, dtype=torch.uint8)
    label[0][label[0] == 1] = 0  # a class that the first sample lacks
    return logits, label


def reference_dice_loss(logits, label, include_background, smooth):
    """Mean over samples and classes of 1 − Dice, in NumPy, one sample and class at a time."""
    e = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = e / e.sum(1, keepdims=True)
    terms = []
    for p, y in zip(probabilities, label[:, 0], strict=True):
        for k in range(0 if include_background else 1, len(p)):
            truth = y == k
            terms.append(1 - (2 * p[k][truth].sum() + smooth) / (p[k].sum() + truth.sum() + smooth))
    return np.mean(terms)


@pytest.mark.parametrize("size", [(5, 7), (4, 3, 6)])
@pytest.mark.parametrize("include_background", [False, True])
@pytest.mark.parametrize("smooth", [1.0, 1e-5])
def test_dice_is_of_each_sample_and_class(size, include_background, smooth):
    logits, label = batch(size)
    loss = DiceCrossEntropyLoss(lambda_ce=0, include_background=include_background, smooth=smooth)
    expected = reference_dice_loss(logits.double().numpy(), label.numpy(), include_background, smooth)
    assert loss(logits.double(), label).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("size", [(5, 7), (4, 3, 6)])
@pytest.mark.parametrize("weight", [PAPER, None, (1.0, 5.0, 0.0, 2.0)])
def test_cross_entropy_is_pytorch_s(size, weight):
    logits, label = batch(size)
    dice = DiceCrossEntropyLoss(weight, lambda_ce=0)(logits, label)
    loss = DiceCrossEntropyLoss(weight, lambda_ce=0.5)(logits, label)
    expected = torch.nn.CrossEntropyLoss(None if weight is None else torch.tensor(weight))(logits, label[:, 0].long())
    torch.testing.assert_close(loss - dice, 0.5 * expected)


def test_defaults_are_the_paper_s():
    logits, label = batch()
    spelled_out = DiceCrossEntropyLoss(PAPER, lambda_ce=1.0, include_background=False, smooth=1.0)
    assert torch.equal(DiceCrossEntropyLoss()(logits, label), spelled_out(logits, label))


def test_perfect_prediction_costs_nothing():
    _, label = batch()
    logits = 100.0 * torch.nn.functional.one_hot(label[:, 0].long(), 4).movedim(-1, 1)
    assert DiceCrossEntropyLoss()(logits, label).item() == pytest.approx(0, abs=1e-6)


def test_is_twice_differentiable():
    logits, label = batch((3, 2), samples=2)
    loss = DiceCrossEntropyLoss()
    logits = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, label), logits)
    assert torch.autograd.gradgradcheck(lambda z: loss(z, label), logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    logits, label = batch()
    half = logits.to(dtype)
    loss = DiceCrossEntropyLoss()(half, label)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, DiceCrossEntropyLoss()(half.float(), label))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_takes_any_integer_label(dtype):
    logits, label = batch()
    assert torch.equal(DiceCrossEntropyLoss()(logits, label.to(dtype)), DiceCrossEntropyLoss()(logits, label))


def test_has_nothing_to_save():
    assert not DiceCrossEntropyLoss().state_dict()


def test_refuses():
    logits, label = batch()
    with pytest.raises(ValueError, match=r"label must have shape \(3, 1, 5, 7\), got \(3, 5, 7\)"):
        DiceCrossEntropyLoss()(logits, label[:, 0])
    with pytest.raises(ValueError, match="ce_weight has 2 weights for 4 classes"):
        DiceCrossEntropyLoss((1.0, 2.0))(logits, label)
    with pytest.raises(ValueError, match="lambda_ce must not be negative, got -1"):
        DiceCrossEntropyLoss(lambda_ce=-1)
    with pytest.raises(ValueError, match="smooth must be positive, got 0"):
        DiceCrossEntropyLoss(smooth=0)


# --------------------------------------------------------------------------- two ranks


def unequal_shares():
    """Four samples; the first two are nearly all background, the others nearly all tumour."""
    x, label = batch((6, 6), samples=4)
    label[:2, :, 1:] = 0
    label[2:][label[2:] == 0] = 3
    return x, label


def loss_and_gradient(x, label):
    torch.manual_seed(1)
    layer = torch.nn.Conv2d(4, 4, 1)
    loss = DiceCrossEntropyLoss()(layer(x), label)
    return loss.detach(), *torch.autograd.grad(loss, list(layer.parameters()))


def on_a_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    x, label = unequal_shares()
    half = slice(2 * rank, 2 * rank + 2)
    torch.save(loss_and_gradient(x[half], label[half]), f"{folder}/rank{rank}.pt")
    if rank == 0:  # validation on one rank alone waits for nobody
        with torch.no_grad():
            torch.save(DiceCrossEntropyLoss()(x[half], label[half]), f"{folder}/alone.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow  # two processes that import PyTorch
def test_mean_over_two_ranks_equals_the_whole_batch(tmp_path: Path, request, monkeypatch):
    monkeypatch.syspath_prepend(str(request.config.rootpath))  # the ranks import this file
    mp.spawn(on_a_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]

    x, label = unequal_shares()
    for first, second, whole in zip(*ranks, loss_and_gradient(x, label), strict=True):
        torch.testing.assert_close((first + second) / 2, whole, rtol=1e-6, atol=1e-7)

    halves = [loss_and_gradient(x[half], label[half]) for half in (slice(2), slice(2, 4))]
    on_their_own = (halves[0][0] + halves[1][0]) / 2
    assert abs(on_their_own - loss_and_gradient(x, label)[0]) > 1e-3, "the shares are too alike to tell"

    alone = torch.load(tmp_path / "alone.pt", weights_only=True)
    torch.testing.assert_close(alone, DiceCrossEntropyLoss()(x[:2], label[:2]))
