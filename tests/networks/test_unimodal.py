# SPDX-License-Identifier: Apache-2.0
"""The classifiers that watch each modality, and validation of network and classifiers together."""

import pytest
import torch
from monai.inferers import SliceInferer

from monai_cggm.networks import FusionAndUnimodal, LateFusion, MultimodalSegmenter, Present, UnimodalClassifiers

TWO = ["flair", "t2"]


def small(**encoder) -> MultimodalSegmenter:
    return MultimodalSegmenter(
        TWO,
        3,
        encoder={"backbone": "resnet18", "width": 4, "aspp_channels": 8, **encoder},
        decoder_channels=12,
        low_reduced=8,
    )


def features_of(network, x):
    return {name: encoder(x[:, i : i + 1]) for i, (name, encoder) in enumerate(network.encoders.items())}


def megabytes(module: torch.nn.Module) -> float:
    return sum(p.numel() * 4 for p in module.parameters()) / 1e6


def test_size_at_the_paper_s_configuration():
    """Four classifiers stay within 8 MB; the authors' have 5.2 million parameters, 20.9 MB."""
    with torch.device("meta"):
        network = MultimodalSegmenter(["flair", "t1ce", "t1", "t2"], 4, encoder={"backbone": "resnet101"})
        classifiers = UnimodalClassifiers.for_network(network)
    assert megabytes(classifiers) == pytest.approx(2.605376)
    assert megabytes(network) == pytest.approx(934.87656)
    for head in classifiers.heads.values():
        assert head.weight.shape == network.head.weight.shape == (4, 256, 1, 1)


@pytest.mark.parametrize("size", [(32, 48), (37, 50), (16, 20, 33)])
@pytest.mark.parametrize("encoder", [{}, {"norm": "group"}, {"stem_stride": 1, "output_stride": 8}], ids=str)
def test_logits_have_the_image_s_size(size, encoder):
    network = small(spatial_dims=len(size), **encoder).eval()
    classifiers = UnimodalClassifiers.for_network(network).eval()
    padded = torch.randn(2, 2, *[-(-n // 16) * 16 for n in size])
    logits = classifiers(features_of(network, padded), size)
    assert list(logits) == TWO
    assert all(z.shape == (2, 3, *size) for z in logits.values())
    assert classifiers.heads["t2"].weight.shape == network.head.weight.shape


def test_each_reads_its_own_features():
    network = small().eval()
    classifiers = UnimodalClassifiers.for_network(network).eval()
    features = features_of(network, torch.randn(1, 2, 32, 32))
    before = classifiers(features, (32, 32))
    after = classifiers({**features, "t2": features["flair"]}, (32, 32))
    assert torch.equal(before["flair"], after["flair"])
    assert not torch.equal(before["t2"], after["t2"])


def test_detached_features_leave_the_encoders_alone():
    network = small()
    classifiers = UnimodalClassifiers.for_network(network)
    features = features_of(network, torch.randn(2, 2, 32, 32))
    detached = {name: (low.detach(), high.detach()) for name, (low, high) in features.items()}
    sum(z.square().mean() for z in classifiers(detached, (32, 32)).values()).backward()
    assert all(p.grad is None for p in network.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in classifiers.parameters())


def test_for_network_takes_overrides():
    network = small(norm="group")
    classifiers = UnimodalClassifiers.for_network(network, low_reduced=4, norm="instance")
    assert classifiers.decoders["t2"].reduce_low.conv.out_channels == 4
    assert any(isinstance(m, torch.nn.InstanceNorm2d) for m in classifiers.modules())
    assert not any(isinstance(m, torch.nn.GroupNorm) for m in classifiers.modules())


@pytest.fixture
def both() -> FusionAndUnimodal:
    network = small()
    return FusionAndUnimodal(network, UnimodalClassifiers.for_network(network)).eval()


def hooks_on(network) -> int:
    return sum(len(encoder._forward_hooks) for encoder in network.encoders.values())


def test_runs_each_encoder_once(both):
    runs = {name: [] for name in TWO}
    for name, encoder in both.network.encoders.items():
        encoder.register_forward_hook(lambda _m, args, _o, name=name: runs[name].append(args[0].shape))
    x = torch.randn(2, 2, 33, 40)
    present = torch.tensor([[True, False], [True, True]])
    with torch.no_grad():
        plain, masked = both(x), both(x, present)
        assert {name: len(shapes) for name, shapes in runs.items()} == {"flair": 2, "t2": 2}
        assert torch.equal(plain["fusion"], both.network(x))
        assert torch.equal(masked["fusion"], both.network(x, present))
    padded = torch.zeros(2, 2, 48, 48)
    padded[..., :33, :40] = x
    with torch.no_grad():
        expected = both.classifiers(features_of(both.network, padded), (33, 40))
    for name in TWO:
        torch.testing.assert_close(plain[name], expected[name])
    assert hooks_on(both.network) == 2


@pytest.mark.parametrize(
    ("present", "rows"),
    [
        ([[True, True], [True, True]], TWO),
        ([[True, False], [False, True]], TWO),
        ([[False, True], [False, True]], ["t2"]),
        ([[True, False], [True, False]], ["flair"]),
    ],
)
def test_classifiers_of_modalities_that_no_sample_has_are_left_out(present, rows, both):
    x = torch.randn(2, 2, 32, 32)
    with torch.no_grad():
        everyone, found = both(x), both(x, torch.tensor(present))
        assert torch.equal(found["fusion"], both.network(x, torch.tensor(present)))
    assert list(found) == ["fusion", *rows]
    assert all(torch.equal(found[name], everyone[name]) for name in rows)


def test_leaves_no_hook_behind_when_the_network_fails(both):
    with pytest.raises(ValueError, match="expected 2 channels"):
        both(torch.zeros(1, 3, 32, 32))
    assert hooks_on(both.network) == 0


def test_encoders_may_be_compiled_in_place(both):
    x = torch.randn(1, 2, 32, 32)
    with torch.no_grad():
        expected = [both(x), both(x + 1)]
        for encoder in both.network.encoders.values():
            encoder.compile(backend="eager")
        found = [both(x), both(x + 1)]
    torch.testing.assert_close(found, expected)


def test_slice_inferer_returns_a_dict_of_volumes(both):
    volume = torch.randn(1, 2, 24, 33, 5)
    inferer = SliceInferer(roi_size=(24, 33), sw_batch_size=2, spatial_dim=2)
    with torch.no_grad():
        volumes = inferer(volume, Present(both, torch.tensor([True, True])))
        assert set(volumes) == {"fusion", *TWO}  # the inferer sorts them
        assert set(inferer(volume, Present(both, torch.tensor([True, False])))) == {"fusion", "flair"}
        for depth in range(5):
            expected = both(volume[..., depth], torch.tensor([[True, True]]))
            for name, logits in volumes.items():
                torch.testing.assert_close(logits[..., depth], expected[name])


@pytest.mark.parametrize("combine", ["probabilities", "sum", "energy"])
@pytest.mark.parametrize("modalities", [2, 3])
def test_late_fusion_runs_its_networks_once(modalities, combine):
    names = ["flair", "t2", "t1"][:modalities]
    network = LateFusion.of_modalities(
        names, MultimodalSegmenter, combine, num_classes=3, encoder={"backbone": "resnet18", "width": 4}
    ).eval()
    runs = []
    for member in network.networks.values():
        member.register_forward_hook(lambda _m, _args, _o: runs.append(1))
    x = torch.randn(2, modalities, 32, 40)
    present = torch.zeros(2, modalities, dtype=torch.bool)
    present[:, 0] = True
    with torch.no_grad():
        found, lacking = FusionAndUnimodal(network)(x), FusionAndUnimodal(network)(x, present)
        assert len(runs) == 2 * modalities
        assert torch.equal(found["fusion"], network(x))
        assert torch.equal(lacking["fusion"], network(x, present))
        for i, name in enumerate(names):
            assert torch.equal(found[name], network.networks[name](x[:, i : i + 1]))
    assert list(found) == ["fusion", *names]
    assert list(lacking) == ["fusion", "flair"]


def test_classifiers_are_needed_or_refused():
    with pytest.raises(ValueError, match="MultimodalSegmenter needs classifiers"):
        FusionAndUnimodal(small())
    late = LateFusion({name: small() for name in TWO})
    with pytest.raises(ValueError, match="takes no classifiers"):
        FusionAndUnimodal(late, UnimodalClassifiers.for_network(small()))


@pytest.mark.parametrize("dims", [2, 3])
def test_no_activation_is_copied_by_a_relu(dims):
    """In place it gives the same gradients, to the last bit."""
    encoder = {"backbone": "resnet18", "width": 8, "spatial_dims": dims}
    gradients = []
    for copied in (False, True):
        torch.manual_seed(0)
        network = MultimodalSegmenter(["flair", "t2"], 4, encoder=encoder)
        both = FusionAndUnimodal(network, UnimodalClassifiers.for_network(network))
        relus = [module for module in both.modules() if isinstance(module, torch.nn.ReLU)]
        assert len(relus) > 20
        assert all(relu.inplace for relu in relus)
        for relu in relus:
            relu.inplace = not copied
        out = both(torch.randn(2, 2, *[32] * dims, generator=torch.Generator().manual_seed(1)))
        torch.stack([logits.square().mean() for logits in out.values()]).sum().backward()
        gradients.append([parameter.grad for parameter in both.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
