# SPDX-License-Identifier: Apache-2.0
"""Whole volumes through a network of slices or of patches, each case with its own presence mask."""

import itertools

import pytest
import torch
from monai.data import DataLoader, MetaTensor
from monai.engines import SupervisedEvaluator
from torch import nn

from monai_cggm.inferers import PatchInferer, VolumeInferer
from monai_cggm.networks import (
    FusionAndUnimodal,
    MultimodalSegmenter,
    Subsets,
    UnimodalClassifiers,
    modality_subsets,
    subset_masks,
    subset_predictor,
)

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
    assert list(logits) == (["fusion", MODALITIES[1]] if masked else ["fusion", *MODALITIES])
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


def heads(batch=1, modalities=3, shape=(26, 21, 9), seed=0):
    """Volumes whose first, last and middle slices are empty, with zeros around what is in the others."""
    x = torch.zeros(batch, modalities, *shape)
    inside = torch.randn(batch, modalities, *(n - 4 for n in shape), generator=torch.Generator().manual_seed(seed))
    x[:, :, 2:-2, 2:-2, 2:-2] = inside
    x[..., shape[-1] // 2] = 0
    return x


class Recorder(nn.Module):
    """Notes how many slices each call holds; what it predicts for an empty slice is no background."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, present=None):
        self.calls.append(len(x))
        lesion = 1.0 + (0.0 if present is None else present.sum(dim=1).view(-1, 1, 1).float())
        # where in the slice it is tells, too: an empty slice is not one number
        place = torch.arange(x.shape[-1], dtype=x.dtype).expand(x.shape[0], *x.shape[2:])
        logits = torch.stack([x.nan_to_num().sum(dim=1), lesion + place], dim=1)
        return {"lesions": logits, "doubled": 2 * logits}


def assert_same_classes(found, expected, *, rtol, atol):
    """Logits within rounding; classes equal but where the two best are as near to each other as rounding."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    best = expected.topk(2, dim=0).values
    tied = best[0] - best[1] <= 2 * (found - expected).abs().max()
    assert tied.float().mean() < 1e-3
    assert torch.equal(found.argmax(dim=0)[~tied], expected.argmax(dim=0)[~tied])
    assert len(expected.argmax(dim=0).unique()) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("modalities", "shape", "sw_batch_size", "mask"),
    [
        (2, (26, 21, 9), 1, None),
        (2, (17, 32, 10), 4, [True, False]),
        (4, (26, 21, 9), 3, None),
        (4, (16, 16, 11), 32, [False, True, True, False]),
    ],
)
@torch.no_grad()
def test_the_segmentation_is_that_of_one_slice_after_the_other(modalities, shape, sw_batch_size, mask, dtype):
    encoder = {"backbone": "resnet18", "width": 4, "aspp_channels": 8, "output_stride": 8, "stem_stride": 1}
    network = MultimodalSegmenter([f"m{i}" for i in range(modalities)], 4, encoder=encoder, decoder_channels=8)
    network = network.eval().to(dtype)
    network.head.bias.zero_()
    x = heads(2, modalities, shape).to(dtype)
    present = None if mask is None else torch.tensor([[True] * modalities, mask])
    logits = VolumeInferer(sw_batch_size=sw_batch_size)(x, network, present=present)
    assert logits.dtype == dtype
    # in double precision nothing is as near as rounding, so that the classes are equal everywhere
    rtol, atol = (1e-4, 1e-6) if dtype == torch.float32 else (1e-12, 1e-14)
    for index in range(2):
        case_mask = None if present is None else present[index]
        assert_same_classes(logits[index], slice_by_slice(network, x[index], case_mask), rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("reuse_empty", "masked", "calls"),
    [
        (True, False, [3, 3, 3]),  # 2 x 4 slices with something in them and one of the 2 x 5 empty ones
        (False, False, [3] * 6),
        (True, True, [3, 2] * 2),
        (False, True, [3] * 6),
    ],
)
def test_what_the_network_predicts_without_brain_is_computed_once(reuse_empty, masked, calls):
    x, network = heads(2), Recorder()
    present = torch.tensor([[True, True, True], [True, False, True]]) if masked else None
    logits = VolumeInferer(sw_batch_size=3, reuse_empty=reuse_empty)(x, network, present=present)
    assert network.calls == calls
    assert list(logits) == ["lesions", "doubled"]
    for index in range(2):
        mask = None if present is None else present[index : index + 1]
        for depth in range(x.shape[-1]):
            expected = network(x[index : index + 1, ..., depth], present=mask)
            for name, values in logits.items():
                assert torch.equal(values[index, ..., depth], expected[name][0])
    # background is what no empty slice was called, and under another mask it was called something else
    assert (logits["lesions"][..., 0].argmax(dim=1) == 1).all()
    assert torch.equal(logits["lesions"][0, ..., 0], logits["lesions"][1, ..., 0]) == (not masked)


@pytest.mark.parametrize("spatial_dim", [0, 1, 2])
def test_empty_slices_along_each_axis(spatial_dim):
    x, network = heads(2, shape=(9, 9, 9)).movedim(-1, 2 + spatial_dim), Recorder()
    logits = VolumeInferer(sw_batch_size=32, spatial_dim=spatial_dim)(x, network)
    assert network.calls == [9]
    each = VolumeInferer(spatial_dim=spatial_dim, reuse_empty=False)(x, network)
    for name, values in logits.items():
        assert torch.equal(values, each[name])


@pytest.mark.parametrize("value", [1e-30, -1.0, float("nan")])
def test_a_slice_is_empty_only_where_nothing_is_in_any_channel(value):
    x, network = heads(), Recorder()
    x[0, 1, 3, 3, 0] = value
    logits = VolumeInferer(sw_batch_size=32)(x, network, present=torch.tensor([[True, False, True]]))
    assert network.calls == [4 + 1 + 1]
    expected = network(x[..., 0], present=torch.tensor([[True, False, True]]))["lesions"]
    assert torch.equal(logits["lesions"][..., 0], expected)


def test_volumes_without_any_brain():
    x, network = torch.zeros(2, 3, 8, 7, 5), Recorder()
    logits = VolumeInferer()(x, network)["lesions"]
    assert network.calls == [1]
    assert torch.equal(logits, network(x[..., 0])["lesions"][..., None].expand_as(logits))


@pytest.mark.parametrize("windows", [{"roi_size": (26, 21)}, {"buffer_steps": 2}])
@torch.no_grad()
def test_whole_slices_are_what_monai_makes_of_them(network, windows):
    x = heads(2)
    found = VolumeInferer(sw_batch_size=4)(x, network)
    torch.testing.assert_close(VolumeInferer(sw_batch_size=4, **windows)(x, network), found, rtol=1e-4, atol=1e-6)


def test_logits_of_another_resolution():
    """As MONAI has it: the slices are as many, their pixels fewer."""
    x = torch.randn(2, 3, 8, 6, 5)
    halved = nn.AvgPool2d(2)
    found = VolumeInferer(sw_batch_size=4)(x, halved)
    assert found.shape == (2, 3, 4, 3, 5)
    assert torch.equal(found, VolumeInferer(roi_size=(8, 6), sw_batch_size=4)(x, halved))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_stored_in_float32(dtype):
    x = volumes(1)
    logits = VolumeInferer()(x, lambda slices: slices.to(dtype))
    assert logits.dtype == torch.float32
    assert torch.equal(logits, x.to(dtype).float())


@torch.no_grad()
def test_autocast_reaches_the_network(network):
    x, types = heads(), []
    hook = network.head.register_forward_hook(lambda _module, _args, output: types.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = VolumeInferer(sw_batch_size=32)(x, network)
    hook.remove()
    assert types == [torch.bfloat16]
    exact = VolumeInferer()(x, network)
    assert 0 < (logits - exact).abs().max() < 0.1 * exact.abs().max()


def test_devices_of_slices_and_of_volumes(capsys):
    x, devices = volumes(1), []

    def network(slices):
        devices.append(slices.device.type)
        return torch.ones(len(slices), 2, *slices.shape[2:])

    logits = VolumeInferer(sw_device="meta", device="cpu")(x, network)
    assert devices == ["meta"]
    assert torch.equal(logits, torch.ones(1, 2, *x.shape[2:]))
    assert VolumeInferer(device="meta")(x, network).device.type == "meta"
    assert "1/1" not in capsys.readouterr().err
    big = torch.empty(x.shape, device="meta")
    assert VolumeInferer(cpu_thresh=x[0, 0].numel())._stitching_device(big).type == "meta"
    assert VolumeInferer(cpu_thresh=x[0, 0].numel() - 1)._stitching_device(big).type == "cpu"
    VolumeInferer(progress=True)(x, network)
    assert "1/1" in capsys.readouterr().err


@torch.no_grad()
def test_what_the_inferer_cannot_use_is_refused(network):
    with pytest.raises(TypeError, match="the network must return logits or a dictionary of them, got tuple"):
        VolumeInferer()(volumes(1), lambda x: (x, x))
    with pytest.raises(RuntimeError, match="only 2D `roi_size`"):
        VolumeInferer()(volumes(1)[..., 0], network)
    with pytest.raises(ValueError, match="spatial_dim"):
        VolumeInferer(spatial_dim=3)(volumes(1), network)


@pytest.fixture(scope="module")
def network_3d():
    torch.manual_seed(1)
    encoder = {"backbone": "resnet18", "width": 4, "aspp_channels": 8, "spatial_dims": 3}
    return MultimodalSegmenter(MODALITIES, 4, encoder=encoder, decoder_channels=8).eval()


def gaussian(size):
    """MONAI's weights of a patch: a Gaussian whose σ is an eighth of it, at least a thousandth of its largest value."""
    axes = [torch.exp(-((torch.arange(n) - (n - 1) / 2) ** 2) / (2 * (n / 8) ** 2)) for n in size]
    weights = axes[0][:, None, None] * axes[1][:, None] * axes[2]
    return weights.clamp(min=float(weights[weights > 0].min().clamp(min=1e-3)))


def patch_by_patch(network, case, starts, size, weights=None, mask=None):
    """The same by hand: ``(M, H, W, D)`` to ``(K, H, W, D)``, from where the patches start along each axis."""
    present = None if mask is None else mask[None]
    weights = torch.ones(size) if weights is None else weights
    total = count = 0.0
    for start in itertools.product(*starts):
        at = (slice(None), *(slice(a, a + n) for a, n in zip(start, size, strict=True)))
        logits = torch.zeros(network.num_classes, *case.shape[1:])
        share = torch.zeros(1, *case.shape[1:])
        logits[at] = network(case[at][None], present=present)[0] * weights
        share[at] = weights
        total, count = total + logits, count + share
    return total / count


@pytest.mark.parametrize("mode", ["constant", "gaussian"])
@torch.no_grad()
def test_patches_are_blended_where_they_overlap(network_3d, mode):
    x, size = volumes(1, (28, 16, 20)), (16, 16, 16)
    logits = PatchInferer(size, sw_batch_size=3, mode=mode)(x, network_3d)
    # a quarter of 16 overlaps, and the last patch ends where the volume does
    starts = ([0, 12], [0], [0, 4])
    weights = gaussian(size) if mode == "gaussian" else None
    expected = patch_by_patch(network_3d, x[0], starts, size, weights)
    assert logits.shape == (1, 4, 28, 16, 20)
    torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-5)
    half = PatchInferer(size, overlap=0.5, mode=mode)(x, network_3d)[0]
    expected = patch_by_patch(network_3d, x[0], ([0, 8, 12], [0], [0, 4]), size, weights)
    torch.testing.assert_close(half, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(half, logits[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_patch_of_the_whole_volume_and_one_that_is_larger(network_3d):
    x = volumes(2, (17, 12, 9))
    expected = network_3d(x)
    torch.testing.assert_close(PatchInferer([-1, -1, -1])(x, network_3d), expected)
    padded = nn.functional.pad(x, (3, 4, 2, 2, 0, 0))
    found = PatchInferer([17, 16, 16], sw_batch_size=4)(x, network_3d)
    torch.testing.assert_close(found, network_3d(padded)[..., 2:-2, 3:-4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sw_batch_size", [1, 3, 16])
@torch.no_grad()
def test_patches_of_cases_with_different_masks_are_not_mixed(network_3d, sw_batch_size):
    x = volumes(2, (20, 16, 16))
    present = torch.tensor([[True, False, False], [False, True, True]])
    logits = PatchInferer([16, 16, 16], sw_batch_size=sw_batch_size)(x, network_3d, present=present)
    for case, mask, found in zip(x, present, logits, strict=True):
        expected = patch_by_patch(network_3d, case, ([0, 4], [0], [0]), (16, 16, 16), mask=mask)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_a_dictionary_of_patches_keeps_the_networks_order(network_3d, masked):
    both = FusionAndUnimodal(network_3d, UnimodalClassifiers.for_network(network_3d)).eval()
    x = volumes(2, (16, 16, 16))
    present = torch.tensor([[True, True, False], [False, True, True]]) if masked else None
    logits = PatchInferer([16, 16, 16], sw_batch_size=2)(x, both, present=present)
    assert list(logits) == (["fusion", MODALITIES[1]] if masked else ["fusion", *MODALITIES])
    for index in range(2):
        mask = None if present is None else present[index : index + 1]
        expected = both(x[index : index + 1], present=mask)
        for name in logits:
            torch.testing.assert_close(logits[name][index : index + 1], expected[name], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_every_subset_is_predicted_in_patches(network_3d):
    x, inferer = volumes(1, (20, 16, 16)), PatchInferer([16, 16, 16])
    logits = inferer(x, Subsets(network_3d))
    assert list(logits) == [subset_predictor(s, MODALITIES) for s in modality_subsets(MODALITIES)]
    for (name, found), mask in zip(logits.items(), subset_masks(MODALITIES), strict=True):
        alone = inferer(x, network_3d, present=mask[None])
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
def test_patches_of_half_precision_are_computed_in_float32(network_3d):
    x = volumes(1, (20, 16, 16)).half()
    logits = PatchInferer([16, 16, 16])(x, network_3d)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, PatchInferer([16, 16, 16])(x.float(), network_3d))


@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_blended_in_float32(dtype, dictionary):
    x = volumes(1, (20, 9, 9))

    def network(patches):
        return {"a": patches.to(dtype)} if dictionary else patches.to(dtype)

    logits = PatchInferer([8, 8, 8], mode="gaussian", overlap=0.5)(x, network)
    logits = logits["a"] if dictionary else logits
    assert logits.dtype == torch.float32
    # what every patch says of a voxel is the same here, and so is its mean
    torch.testing.assert_close(logits, x.to(dtype).float(), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_predictions_of_patches_have_the_volumes_metadata(network_3d):
    affine = torch.diag(torch.tensor([-1.0, -1.0, 3.0, 1.0], dtype=torch.float64))
    x = MetaTensor(volumes(1, (16, 16, 16)), affine=affine, meta={"filename_or_obj": "x"})
    logits = PatchInferer([16, 16, 16])(x, network_3d, present=torch.tensor([[True, False, True]]))
    assert torch.equal(logits.affine, affine)
    assert logits.meta["filename_or_obj"] == "x"


def test_patches_that_do_not_fit(network_3d, network):
    x = volumes(1, (16, 16, 16))
    with pytest.raises(ValueError, match="4 dimensions for 2D roi_size"):
        PatchInferer([16, 16])(x, network_3d)
    with pytest.raises(ValueError, match=r"present must be \(batch, modalities\) = \(1, 3\), got shape \(3,\)"):
        PatchInferer([16, 16, 16])(x, network_3d, present=torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module that takes `present`"):
        PatchInferer([16, 16, 16])(x, lambda patches: patches, present=torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="spatial_dims=2 got an image of 3 spatial axes"):
        PatchInferer([16, 16, 16])(x, network)
    with pytest.raises(ValueError, match="buffer_steps keeps one prediction, and the network returns a, b"):
        PatchInferer([16, 16, 16], buffer_steps=1)(x, lambda patches: {"a": patches, "b": patches})


@torch.no_grad()
def test_buffered_patches_are_monai_s(network_3d):
    x = volumes(1, (20, 16, 16))
    plain, buffered = (PatchInferer([16, 16, 16], sw_batch_size=2, buffer_steps=n)(x, network_3d) for n in (None, 1))
    torch.testing.assert_close(buffered, plain)
