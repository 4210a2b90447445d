# SPDX-License-Identifier: Apache-2.0
"""The multimodal network: shapes, missing modalities."""

import pytest
import torch

from monai_cggm.networks import FusionAndUnimodal, MultimodalSegmenter, Present, UnimodalClassifiers

FOUR = ["flair", "t1ce", "t1", "t2"]


def small(modalities=FOUR, classes=4, **encoder) -> MultimodalSegmenter:
    return MultimodalSegmenter(
        modalities,
        classes,
        encoder={"backbone": "resnet18", "width": 4, "aspp_channels": 8, **encoder},
        decoder_channels=12,
        low_reduced=8,
    )


@pytest.mark.parametrize("modalities", [["flair"], ["t2", "flair"], FOUR], ids=len)
@pytest.mark.parametrize("size", [(32, 48), (1, 1), (37, 50), (16, 33, 5)])
@pytest.mark.parametrize(("stem_stride", "output_stride"), [(2, 8), (2, 16), (1, 8)])
def test_any_size_and_number_of_modalities(modalities, size, stem_stride, output_stride):
    strides = {"stem_stride": stem_stride, "output_stride": output_stride}
    network = small(modalities, 3, spatial_dims=len(size), **strides).eval()
    with torch.no_grad():
        logits = network(torch.randn(2, len(modalities), *size))
    assert logits.shape == (2, 3, *size)
    assert logits.isfinite().all()


def test_names_its_parts():
    network = small(["t2", "flair"])
    assert list(network.encoders) == ["t2", "flair"]
    assert (network.head.in_channels, network.head.out_channels) == (12, 4)
    assert network.head.kernel_size == (1, 1)


def test_each_encoder_gets_its_own_channel():
    network = small(["a", "b", "c"]).eval()
    seen = {}
    for name, encoder in network.encoders.items():
        encoder.register_forward_hook(lambda _m, args, _o, name=name: seen.update({name: args[0]}))
    x = torch.randn(2, 3, 16, 16)
    network(x)
    for index, name in enumerate("abc"):
        assert torch.equal(seen[name], x[:, index : index + 1])


def test_padding_does_not_move_the_image():
    """An image that is padded by hand to a multiple of the stride gives the same logits where it was."""
    network = small().eval()
    x = torch.randn(1, 4, 30, 41)
    by_hand = torch.zeros(1, 4, 32, 48)
    by_hand[..., :30, :41] = x
    with torch.no_grad():
        assert torch.equal(network(x), network(by_hand)[..., :30, :41])


@pytest.mark.parametrize("anything", [0.0, 100.0, float("nan")])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_what_stands_in_an_absent_channel_changes_nothing(anything, spatial_dims):
    network = small(["a", "b"], spatial_dims=spatial_dims).eval()
    x = torch.randn(2, 2, *[32] * spatial_dims)
    present = torch.tensor([[True, False], [True, True]])
    changed = x.clone()
    changed[0, 1] = anything
    with torch.no_grad():
        expected = network(x, present)
        assert torch.equal(network(changed, present), expected)
        assert not torch.allclose(network(x)[0], expected[0])


def test_features_of_absent_modalities_are_zero():
    network = small(["a", "b", "c"]).eval()
    given = {}
    network.decoder.register_forward_pre_hook(lambda _m, args: given.update(low=args[0], high=args[1]))
    present = torch.tensor([[True, False, True], [False, True, True]])
    network(torch.randn(2, 3, 32, 32), present)
    for features in (given["low"], given["high"]):
        is_zero = torch.stack([f.flatten(1).abs().amax(1) == 0 for f in features], dim=1)
        assert torch.equal(is_zero, ~present)


def test_a_batch_of_mixed_masks_equals_each_alone():
    network = small(["a", "b", "c"]).eval()
    x = torch.randn(4, 3, 33, 40)
    present = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 0, 0]], dtype=torch.bool)
    with torch.no_grad():
        together = network(x, present)
        for i in range(4):
            torch.testing.assert_close(together[i : i + 1], network(x[i : i + 1], present[i : i + 1]))
        assert torch.equal(network(x, torch.ones(4, 3, dtype=torch.bool)), network(x))


def test_an_absent_encoder_gets_no_gradient():
    network = small(["a", "b"])
    present = torch.tensor([[True, False]]).expand(3, 2)
    network(torch.randn(3, 2, 32, 32), present).square().mean().backward()
    assert all(p.grad.abs().max() == 0 for p in network.encoders["b"].parameters())
    assert any(p.grad.abs().max() > 0 for p in network.encoders["a"].parameters())


def test_present_tells_the_network_its_mask():
    network = small(["a", "b"]).eval()
    x = torch.randn(3, 2, 32, 32)
    with torch.no_grad():
        only_a = Present(network, torch.tensor([True, False]))(x)
        only_b = Present(network, torch.tensor([False, True]))(x)
        assert torch.equal(only_a, network(x, torch.tensor([[True, False]]).expand(3, 2)))
    assert not torch.allclose(only_a, only_b)
    assert list(Present(network, torch.tensor([True, False])).state_dict()) == [
        f"network.{k}" for k in network.state_dict()
    ]


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_trains(norm):
    """Every parameter gets a gradient, and a few steps on one batch bring the loss down."""
    network = small(["a", "b"], 2, norm=norm)
    label = torch.zeros(2, 32, 32, dtype=torch.long)
    label[0, 4:20, 8:28] = label[1, 12:, :16] = 1
    x = torch.randn(2, 2, 32, 32) + 2 * label[:, None]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(network(x), label)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in network.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_channels_last_gives_the_same():
    network = small().eval()
    x = torch.randn(2, 4, 32, 48)
    with torch.no_grad():
        expected = network(x)
        torch.testing.assert_close(network.to(memory_format=torch.channels_last)(x), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modalities": []}, "at least one name"),
        ({"modalities": "flair"}, "at least one name, got 'flair'"),
        ({"modalities": ["t1", "t1"]}, r"differ from each other, got \['t1', 't1'\]"),
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"encoder": {"backbone": "resnet18", "width": 4, "in_channels": 2}}, "in_channels=2"),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultimodalSegmenter(**{"modalities": ["a"], "num_classes": 2, "encoder": {"backbone": "resnet18"}, **arguments})


def test_refuses_inputs():
    network = small(["a", "b"])
    with pytest.raises(ValueError, match="expected 2 channels, one a modality, got 3"):
        network(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"present must have shape \(batch, 2\)"):
        network(torch.zeros(1, 2, 16, 16), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"present must have shape \(modalities,\)"):
        Present(network, torch.ones(1, 2, dtype=torch.bool))


@pytest.mark.parametrize("size", [(32, 40), (33, 45)])
def test_a_fine_stem_gives_logits_and_classifiers_of_the_image_s_size(size):
    encoder = {"backbone": "resnet18", "width": 4, "aspp_channels": 8, "stem_stride": 1, "output_stride": 8}
    network = MultimodalSegmenter(["a", "b"], 3, encoder=encoder, decoder_channels=8, low_reduced=4).eval()
    assert tuple(network(torch.randn(1, 2, *size)).shape) == (1, 3, *size)
    both = FusionAndUnimodal(network, UnimodalClassifiers.for_network(network)).eval()
    assert {tuple(logits.shape) for logits in both(torch.randn(1, 2, *size)).values()} == {(1, 3, *size)}


def test_fuses_what_its_encoders_returned():
    network = small(["a", "b", "c"]).eval()
    outputs = {}
    for name, encoder in network.encoders.items():
        encoder.register_forward_hook(lambda _m, _args, out, name=name: outputs.update({name: out}))
    x = torch.randn(2, 3, 33, 40)
    present = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 1]], dtype=torch.bool)
    with torch.no_grad():
        whole, masked = network(x), network(x, present)
        reordered = dict(reversed(outputs.items()))
        assert torch.equal(network.fuse(reordered, x.shape[2:]), whole)
        assert torch.equal(network.fuse(reordered, x.shape[2:], present), masked)
