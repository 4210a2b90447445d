# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from torch import nn

from monai_cggm.methods.direction import cosines, direction_loss, head_gradient


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 2, 1), (2, 3, 7)),
        (nn.Conv2d(5, 4, 1), (2, 5, 6, 3)),
        (nn.Conv3d(2, 3, 1), (1, 2, 4, 3, 5)),
        (nn.Linear(6, 4), (5, 6)),
        (nn.Linear(6, 1), (2, 9, 6)),
    ],
)
def test_closed_form_against_autograd(layer, shape):
    layer = layer.double()
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    output = layer(z)
    loss = (output.sigmoid() ** 2).mean()
    (delta,) = torch.autograd.grad(loss, output, retain_graph=True)
    (expected,) = torch.autograd.grad(loss, layer.weight)
    actual = head_gradient(delta, z, channels_last=isinstance(layer, nn.Linear))
    torch.testing.assert_close(actual, expected.flatten(), rtol=1e-12, atol=1e-14)


def numpy_equation_12(fusion, unimodal, terms):
    total = 0.0
    for g, b in zip(unimodal, terms, strict=True):
        cosine = fusion @ g / (np.linalg.norm(fusion) * np.linalg.norm(g))
        total += abs(b) - b * cosine
    return total / len(terms)


@pytest.mark.parametrize(("modalities", "size"), [(2, 3), (3, 40), (4, 1024)])
def test_equation_12_against_numpy(modalities, size):
    rng = np.random.default_rng(modalities)
    fusion, unimodal, terms = rng.normal(size=size), rng.normal(size=(modalities, size)), rng.normal(size=modalities)
    actual = direction_loss(torch.tensor(fusion), torch.tensor(unimodal), torch.tensor(terms))
    assert actual.item() == pytest.approx(numpy_equation_12(fusion, unimodal, terms), rel=1e-12)
    assert actual.item() >= 0


def test_a_gradient_of_zero_has_cosine_zero_and_no_nan():
    fusion = torch.zeros(4, requires_grad=True)
    loss = direction_loss(fusion, torch.eye(4)[:2], torch.ones(2))
    loss.backward()
    assert loss.item() == 1.0
    assert torch.isfinite(fusion.grad).all()
    assert cosines(torch.ones(4), torch.zeros(2, 4)).tolist() == [0.0, 0.0]


def test_half_precision_is_computed_in_float32():
    delta = torch.full((1, 1, 64, 64), 2e-4, dtype=torch.float16)
    z = torch.full((1, 1, 64, 64), 2e-4, dtype=torch.float16)  # every product underflows in float16
    result = head_gradient(delta, z)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(4096 * 4e-8, rel=1e-3)
