# SPDX-License-Identifier: Apache-2.0
"""Features on their way to the classifiers: the same values, and as much gradient as is let in."""

import pytest
import torch
from torch import nn

from monai_cggm.methods.capture import Capture, detached, let_in


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, -2.0, torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 4, 5)])
def test_let_in_keeps_the_value_and_scales_the_gradient(weight, shape):
    h = torch.randn(shape, requires_grad=True)
    (plain,) = torch.autograd.grad(h.sin().sum(), h)
    entered = let_in(h, weight)
    assert torch.equal(entered, h)
    (gradient,) = torch.autograd.grad(entered.sin().sum(), h)
    torch.testing.assert_close(gradient, float(weight) * plain)
    assert gradient.dtype == h.dtype


def test_two_ways_add_up():
    h = torch.randn(4, requires_grad=True)
    (h.square().sum() + let_in(h, 0.25).exp().sum()).backward()
    torch.testing.assert_close(h.grad, 2 * h.detach() + 0.25 * h.detach().exp())


def test_let_in_can_be_differentiated_twice():
    h = torch.randn(3, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(let_in(h, 0.5).pow(3).sum(), h, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), h)
    # 0.5 once for each way through: the first derivative is 0.5 · 3 h², of which h is let in again
    torch.testing.assert_close(second, 0.5 * 0.5 * 6 * h.detach())


@pytest.mark.parametrize("through", [detached, lambda features: let_in(features, 0.5)])
def test_features_keep_their_structure(through):
    a, b, c = (torch.randn(2, requires_grad=True) for _ in range(3))
    passed = through({"low": (a, b), "high": [c]})
    assert isinstance(passed["low"], tuple)
    assert isinstance(passed["high"], list)
    for found, expected in zip((*passed["low"], *passed["high"]), (a, b, c), strict=True):
        assert torch.equal(found, expected)
        assert found.requires_grad == (through is not detached)


@pytest.mark.parametrize("through", [detached, lambda features: let_in(features, 0.5)])
def test_what_is_no_tensor_is_refused(through):
    with pytest.raises(TypeError, match="must return tensors, or tuples, lists or dicts of them, got str"):
        through((torch.ones(1), "flair"))


def test_capture_listens_only_while_it_is_active():
    layer = nn.Linear(2, 3)
    capture = Capture({"layer": layer})
    capture.install()
    layer(torch.ones(1, 2))
    assert not capture.outputs
    capture.active = True
    x = torch.randn(4, 2)
    output = layer(x)
    assert capture.inputs["layer"] is x
    assert capture.outputs["layer"] is output
    capture.remove()
    assert not capture.outputs
    assert not layer._forward_hooks


@pytest.mark.parametrize("full_precision", [True, False])
def test_capture_turns_half_precision_into_full(full_precision):
    layer = nn.Linear(2, 3).bfloat16()
    capture = Capture({"layer": layer}, full_precision=full_precision)
    capture.install()
    capture.active = True
    output = layer(torch.ones(1, 2, dtype=torch.bfloat16))
    assert output.dtype == capture.outputs["layer"].dtype == (torch.float32 if full_precision else torch.bfloat16)
