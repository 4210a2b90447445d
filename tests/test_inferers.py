# SPDX-License-Identifier: Apache-2.0
"""Whole volumes through a network of slices, each case with its own presence mask."""

import itertools

import pytest
import torch
from monai.data import DataLoader, MetaTensor
from monai.engines import SupervisedEvaluator
from torch import nn

from monai_cggm.inferers import VolumeInferer
from monai_cggm.networks import FusionAndUnimodal, MultimodalSegmenter, UnimodalClassifiers

MODALITIES = ("flair", "t1ce", "t1")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    encoder = {"backbone": "resnet18", "width": 4, "aspp_channels": 8}
    return MultimodalSegmenter(MODALITIES, 4, encoder=encoder, decoder_channels=8).eval()


def volumes(batch, shape=(34, 29, 5), seed=0):
    return torch.randn(batch, len(MODALITIES), *shape, generator=torch.Generator().manual_seed(seed))


def slice_by_slice(network, case, mask=None):
    """The same by hand: ``(M, H, W, D)`` to ``(K, H, W, D)``."""
    present = None if mask is None else mask[None]
    slices = [network(case[None, ..., depth], present=present)[0] for depth in range(case.shape[-1])]
    return torch.stack(slices, dim=-1)


@pytest.mark.parametrize("sw_batch_size", [1, 3, 16])
@pytest.mark.parametrize("shape", [(34, 29, 5), (32, 48, 1)])
@torch.no_grad()
def test_every_slice_goes_through_the_network_whole(network, shape, sw_batch_size):
    x = volumes(2, shape)
    logits = VolumeInferer(sw_batch_size=sw_batch_size)(x, network)
    assert logits.shape == (2, 4, *shape)
    for case, found in zip(x, logits, strict=True):
        torch.testing.assert_close(found, slice_by_slice(network, case), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spatial_dim", [0, 1])
@torch.no_grad()
def test_other_axes(network, spatial_dim):
    x = volumes(1, (33, 34, 35))
    moved = x.movedim(2 + spatial_dim, -1)
    expected = slice_by_slice(network, moved[0]).movedim(-1, 1 + spatial_dim)
    found = VolumeInferer(spatial_dim=spatial_dim)(x, network)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_every_two_subsets_give_different_volumes(network):
    x, inferer = volumes(1), VolumeInferer()
    subsets = [torch.tensor([mask]) for mask in itertools.product([True, False], repeat=3) if any(mask)]
    logits = [inferer(x, network, present=subset) for subset in subsets]
    assert len(logits) == 7
    for first, second in itertools.combinations(logits, 2):
        assert (first - second).abs().max() > 1e-3
    torch.testing.assert_close(logits[0], inferer(x, network))


@pytest.mark.parametrize("sw_batch_size", [1, 2, 4, 32])
@torch.no_grad()
def test_cases_with_different_masks_are_not_mixed(network, sw_batch_size):
    x = volumes(3)
    present = torch.tensor([[True, False, False], [False, True, True], [True, True, True]])
    logits = VolumeInferer(sw_batch_size=sw_batch_size)(x, network, present=present)
    for case, mask, found in zip(x, present, logits, strict=True):
        torch.testing.assert_close(found, slice_by_slice(network, case, mask), rtol=1e-4, atol=1e-5)
    others = VolumeInferer()(x, network, present=present.flip(0))
    assert (logits - others)[[0, 2]].abs().amax(dim=(1, 2, 3, 4)).min() > 1e-3


@torch.no_grad()
def test_what_an_absent_channel_holds_does_not_matter(network):
    x, present = volumes(1), torch.tensor([[True, False, True]])
    changed = x.clone()
    changed[:, 1] = 100.0
    inferer = VolumeInferer()
    assert torch.equal(inferer(x, network, present=present), inferer(changed, network, present=present))
    assert not torch.equal(inferer(x, network), inferer(changed, network))


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_fusion_and_classifiers_keep_the_networks_order(network, masked):
    both = FusionAndUnimodal(network, UnimodalClassifiers.for_network(network)).eval()
    x = volumes(2)
    present = torch.tensor([[True, True, False], [False, True, True]]) if masked else None
    logits = VolumeInferer(sw_batch_size=2)(x, both, present=present)
    # of the first case no classifier sees the last modality, of the second none the first
    assert list(logits) == ["fusion", MODALITIES[1]] if masked else ["fusion", *MODALITIES]
    for index in range(2):
        for depth in range(x.shape[-1]):
            mask = None if present is None else present[index : index + 1]
            expected = both(x[index : index + 1, ..., depth], present=mask)
            for name in logits:
                found = logits[name][index : index + 1, ..., depth]
                torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_half_precision_volumes_are_computed_in_float32(network):
    x = volumes(1).half()
    logits = VolumeInferer()(x, network)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, VolumeInferer()(x.float(), network))


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_the_evaluator_hands_the_mask_and_the_metadata_on(network, masked):
    affine = torch.diag(torch.tensor([-1.0, -1.0, 3.0, 1.0], dtype=torch.float64))
    items = []
    for x, mask in zip(volumes(2), ([True, False, True], [True, True, False]), strict=True):
        items.append(
            {"image": MetaTensor(x, affine=affine, meta={"filename_or_obj": "x"}), "present": torch.tensor(mask)}
        )

    def prepare_batch(batch, device, non_blocking, **kwargs):
        return batch["image"], None, (), ({"present": batch["present"]} if masked else {})

    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(items, batch_size=2),
        network=network,
        prepare_batch=prepare_batch,
        inferer=VolumeInferer(),
        decollate=True,
    )
    evaluator.run()
    for item, output in zip(items, evaluator.state.output, strict=True):
        assert torch.equal(output["pred"].affine, affine)
        assert output["pred"].meta["filename_or_obj"] == "x"
        expected = slice_by_slice(network, item["image"].as_tensor(), item["present"] if masked else None)
        torch.testing.assert_close(output["pred"].as_tensor(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("present", "message"),
    [
        (torch.ones(3, dtype=torch.bool), r"present must be \(batch, modalities\) = \(2, 3\), got shape \(3,\)"),
        (torch.ones(1, 3, dtype=torch.bool), r"got shape \(1, 3\)"),
        (torch.tensor([[True, True, True], [False, False, False]]), "at least one modality"),
    ],
)
def test_masks_that_do_not_fit(network, present, message):
    with pytest.raises(ValueError, match=message):
        VolumeInferer()(volumes(2), network, present=present)


def test_arguments_that_would_be_dropped_are_refused(network):
    with pytest.raises(TypeError, match="mask"):
        VolumeInferer()(volumes(1), network, mask=torch.ones(1, 3))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module that takes `present`"):
        VolumeInferer()(volumes(1), lambda x: x, present=torch.ones(1, 3, dtype=torch.bool))


@torch.no_grad()
def test_windows_within_a_slice():
    """A smaller window gives the same where the network looks at single pixels."""
    pixelwise = nn.Conv2d(3, 4, kernel_size=1)
    x = volumes(2)
    whole = VolumeInferer()(x, pixelwise)
    torch.testing.assert_close(VolumeInferer(roi_size=(16, 20), overlap=0.5)(x, pixelwise), whole)
