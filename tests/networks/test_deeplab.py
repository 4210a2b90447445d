# SPDX-License-Identifier: Apache-2.0
"""The encoder of one modality."""

import copy

import numpy as np
import pytest
import torch
from monai.networks.nets.resnet import ResNetFeatures
from torch import nn

from monai_cggm.networks import DeepLabV3PlusEncoder, norm_spec
from monai_cggm.networks.deeplab import ASPP, ResNetTrunk, pad_to_multiple, upsample_logits

SMALL = {"width": 4, "aspp_channels": 8}


def kernels_of(stage: nn.Module, size: int = 3) -> list[nn.Module]:
    return [m for m in stage.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)) and m.kernel_size[0] == size]


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50", "resnet101"])
@pytest.mark.parametrize(("size", "output_stride"), [((64, 32), 16), ((32, 48), 8), ((32, 16, 48), 16)])
def test_strides_and_channels(backbone, size, output_stride):
    encoder = DeepLabV3PlusEncoder(backbone, spatial_dims=len(size), output_stride=output_stride, **SMALL).eval()
    with torch.no_grad():
        low, high = encoder(torch.randn(2, 1, *size))
    assert low.shape == (2, encoder.low_channels, *[n // 4 for n in size])
    assert high.shape == (2, 8, *[n // output_stride for n in size])
    assert encoder.low_channels == (4 if backbone in ("resnet18", "resnet34") else 16)


@pytest.mark.parametrize("output_stride", [4, 8])
def test_stem_without_stride_doubles_the_resolution(output_stride):
    """The same weights on an image of twice the size, with the published stem, give features of the same size."""
    fine = DeepLabV3PlusEncoder("resnet18", stem_stride=1, output_stride=output_stride, **SMALL).eval()
    published = DeepLabV3PlusEncoder("resnet18", output_stride=2 * output_stride, **SMALL).eval()
    published.load_state_dict(fine.state_dict())
    x = torch.randn(1, 1, 32, 48)
    with torch.no_grad():
        for features, expected in zip(
            fine(x), published(x.repeat_interleave(2, 2).repeat_interleave(2, 3)), strict=True
        ):
            assert features.shape == expected.shape
    assert fine.low_stride == 2
    assert fine(x)[0].shape == (1, 4, 16, 24)
    dilations = [[m.dilation for m in kernels_of(e.trunk)] for e in (fine, published)]
    assert dilations[0] == dilations[1]


@pytest.mark.parametrize(
    ("backbone", "output_stride", "third", "last"),
    [
        ("resnet18", 16, [1] * 4, [2, 2, 4, 4]),  # two blocks of two 3×3 convolutions
        ("resnet50", 16, [1] * 6, [2, 4, 8]),
        ("resnet50", 8, [2] * 6, [4, 8, 16]),
    ],
)
def test_dilation_replaces_stride(backbone, output_stride, third, last):
    trunk = DeepLabV3PlusEncoder(backbone, output_stride=output_stride, **SMALL).trunk
    assert [conv.dilation[0] for conv in kernels_of(trunk.layer3)] == third
    assert [conv.dilation[0] for conv in kernels_of(trunk.layer4)] == last
    assert [conv.padding[0] for conv in kernels_of(trunk.layer4)] == last
    for conv in [*kernels_of(trunk.layer4), *kernels_of(trunk.layer4, 1)]:
        assert conv.stride == (1, 1)


def test_trunk_is_monai_resnet50():
    """Same parameters and, up to the stages that are dilated, the same function as MONAI's own."""
    reference = ResNetFeatures("resnet50", pretrained=False, spatial_dims=2, in_channels=1).eval()
    trunk = ResNetTrunk(
        "resnet50",
        spatial_dims=2,
        in_channels=1,
        output_stride=16,
        multigrid=(1, 2, 4),
        width=64,
        norm="batch",
        stem_stride=2,
    ).eval()
    trunk.load_state_dict(reference.state_dict())
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        low, high = trunk(x)
        features = reference(x)
        torch.testing.assert_close(low, features[1], rtol=0, atol=0)
        torch.testing.assert_close(high, trunk.layer4(features[3]), rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["instance", "group"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_norms_without_batch_statistics(norm, spatial_dims):
    """A sample's features do not depend on the rest of its batch, in training."""
    encoder = DeepLabV3PlusEncoder("resnet18", spatial_dims=spatial_dims, norm=norm, **SMALL).double().train()
    assert not [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    x = torch.randn(3, 1, *[32] * spatial_dims, dtype=torch.float64)
    with torch.no_grad():
        for whole, alone in zip(encoder(x), encoder(x[1:2]), strict=True):
            torch.testing.assert_close(whole[1:2], alone)


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_trains_on_a_batch_of_one(norm):
    encoder = DeepLabV3PlusEncoder("resnet18", norm=norm, **SMALL).train()
    low, high = encoder(torch.randn(1, 1, 32, 32))
    (low.square().mean() + high.square().mean()).backward()
    gradients = [p.grad for p in encoder.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert encoder.aspp.pooled.conv.weight.grad.abs().max() > 0


def checkpointed_pair(**kwargs):
    """An encoder, and its like that computes activations again."""
    plain = DeepLabV3PlusEncoder("resnet18", **SMALL, **kwargs).train()
    again = copy.deepcopy(plain)
    again.checkpointing = True
    return plain, again


@pytest.mark.parametrize("momentum", [0.1, None], ids=["moving mean", "plain mean"])
def test_checkpointing_changes_no_weight_and_no_statistics(momentum):
    """Two steps of SGD: recomputation counts no batch twice, and gradients are equal to the last bit."""
    pair = checkpointed_pair()
    optimizers = [torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9) for encoder in pair]
    for encoder in pair:
        for layer in encoder.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = momentum
    for x in torch.randn(2, 3, 1, 32, 32):
        for encoder, optimizer in zip(pair, optimizers, strict=True):
            low, high = encoder(x)
            optimizer.zero_grad()
            (low.square().mean() + high.square().mean()).backward()
            optimizer.step()
    plain, again = (encoder.state_dict() for encoder in pair)
    assert list(plain) == list(again)
    assert plain["trunk.bn1.num_batches_tracked"] == 2
    for name, value in plain.items():
        assert torch.equal(again[name], value), name
    assert pair[1].trunk.bn1.momentum == momentum
    for one, other in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_checkpointing_keeps_few_tensors_and_runs_hooks_once():
    kept, calls = [], []
    for encoder in checkpointed_pair():
        inner = encoder.trunk.bn1.register_forward_hook(lambda *_: calls.append("inner"))
        outer = encoder.register_forward_hook(lambda *_: calls.append("outer"))
        bytes_kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=bytes_kept: to.append(t.nbytes) or t, lambda t: t):
            low, high = encoder(torch.randn(2, 1, 32, 32))
        kept.append(sum(bytes_kept))
        (low.sum() + high.sum()).backward()
        inner.remove()
        outer.remove()
    assert calls == ["inner", "outer", "inner", "outer", "inner"]
    assert kept[1] < kept[0] / 20


def test_checkpointing_differentiates_twice_with_the_graph_kept():
    """As methods do: a gradient at the features first, then the whole."""
    plain, again = checkpointed_pair(norm="instance")
    x = torch.randn(2, 1, 32, 32)
    for encoder in (plain, again):
        low, high = encoder(x)
        loss = (low.square().mean() + high.square().mean()).log()
        (at_features,) = torch.autograd.grad(loss, high, create_graph=True)
        (loss + at_features.square().sum()).backward()
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)


def test_checkpointing_is_for_training_only(monkeypatch):
    def refuse(*_args):
        raise AssertionError("computed again")

    _, encoder = checkpointed_pair()
    scripted = torch.jit.script(encoder.eval())
    monkeypatch.setattr("monai_cggm.networks.deeplab._computed_again", refuse)
    x = torch.randn(2, 1, 32, 32)
    expected = encoder(x)
    for found, right in zip(scripted(x), expected, strict=True):
        torch.testing.assert_close(found, right)
    with torch.no_grad():
        encoder.train()(x)
    with pytest.raises(AssertionError, match="computed again"):
        encoder(x)


@pytest.mark.parametrize(
    ("channels", "groups"), [(256, 32), (64, 16), (8, 2), (48, 4), (4, 1), (6, 1)], ids=lambda value: str(value)
)
def test_group_norm_has_groups_of_four_channels_or_more(channels, groups):
    assert norm_spec("group", channels) == ("group", {"num_groups": groups})
    assert channels % groups == 0


def test_image_pooling_sees_the_whole_image():
    """Change one corner: beyond the reach of the dilated kernels, the output moves through the pooled image alone."""
    aspp = ASPP(2, 3, 8, rates=(2, 4), norm="batch").eval()
    x = torch.randn(1, 3, 24, 24)
    changed = x.clone()
    changed[..., 0, 0] += 100
    with torch.no_grad():
        assert not torch.equal(aspp(x)[..., -1, -1], aspp(changed)[..., -1, -1])
        aspp.pooled.conv.weight.zero_()
        assert torch.equal(aspp(x)[..., -1, -1], aspp(changed)[..., -1, -1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet152"}, "backbone must be one of resnet18, .* got 'resnet152'"),
        ({"spatial_dims": 1}, "spatial_dims must be 2 or 3, got 1"),
        ({"output_stride": 32}, "output_stride must be 8 or 16, got 32"),
        ({"output_stride": 16, "stem_stride": 1}, "output_stride must be 4 or 8, got 16"),
        ({"stem_stride": 4}, "stem_stride must be 1 or 2, got 4"),
        ({"multigrid": ()}, "multigrid must hold"),
        ({"norm": "layer"}, "norm must be .* got 'layer'"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeepLabV3PlusEncoder(**{"backbone": "resnet18", **SMALL, **arguments})


@pytest.mark.parametrize(("size", "padded"), [((5, 16), (16, 16)), ((17, 1), (32, 16)), ((3, 16, 20), (16, 16, 32))])
def test_pads_at_the_end(size, padded):
    x = torch.randn(1, 2, *size)
    y = pad_to_multiple(x, 16)
    assert y.shape[2:] == padded
    inside = (..., *[slice(n) for n in size])
    assert torch.equal(y[inside], x)
    assert y.count_nonzero() == x.count_nonzero()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_upsampling_does_not_align_corners(axis):
    """Against NumPy's linear interpolation at half-pixel centres, cropped."""
    ramp = np.array([0.0, 1.0, 4.0, -2.0], dtype=np.float32)
    where = (np.arange(16) + 0.5) / 4 - 0.5
    expected = np.interp(where, np.arange(4), ramp)[:13]
    shape = [1, 1, 2, 2, 2]
    shape[axis + 2] = 4
    logits = torch.from_numpy(ramp).view([4 if i == axis + 2 else 1 for i in range(5)]).expand(shape)
    size = [8, 8, 8]
    size[axis] = 13
    upsampled = upsample_logits(logits, size, 4)
    assert list(upsampled.shape[2:]) == size
    line = upsampled[0, 0].movedim(axis, 0)[:, 3, 5]
    np.testing.assert_allclose(line.numpy(), expected, atol=1e-6)
