# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from monai.networks.nets import SegResNet
from torch import nn

from monai_cggm.networks import EarlyFusion, Subsets, subset_masks


def names(number):
    return [f"m{i}" for i in range(number)]


@pytest.mark.parametrize(("dims", "size", "modalities"), [(2, (16, 24), 2), (2, (13, 30), 3), (3, (8, 9, 16), 2)])
def test_absent_modalities_are_channels_of_zeros(dims, size, modalities):
    torch.manual_seed(0)
    plain = SegResNet(spatial_dims=dims, in_channels=modalities, out_channels=3, init_filters=8).eval()
    network = EarlyFusion(plain, names(modalities))
    x = torch.randn(2, modalities, *size)
    padded = torch.zeros(2, modalities, *(-(-n // 8) * 8 for n in size))
    padded[(..., *(slice(0, n) for n in size))] = x
    expected = plain(padded)[(..., *(slice(0, n) for n in size))]
    torch.testing.assert_close(network(x), expected)
    present = torch.ones(2, modalities, dtype=torch.bool)
    present[1, 0] = False
    padded[1, 0] = 0.0
    x[1, 0] = torch.nan  # whatever stands there
    torch.testing.assert_close(network(x, present)[1], plain(padded)[1][(..., *(slice(0, n) for n in size))])


def test_every_subset_of_a_network_that_fuses_early():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 2, 1, bias=False)
    x = torch.randn(1, 3, 4, 4)
    predictions = Subsets(EarlyFusion(conv, ["a", "b", "c"], multiple=1))(x)
    for name, mask in zip(predictions, subset_masks(["a", "b", "c"]), strict=True):
        expected = torch.einsum("km,bmhw->bkhw", conv.weight[:, :, 0, 0] * mask, x)
        torch.testing.assert_close(predictions[name], expected, msg=name)


def test_several_masks_a_sample_and_refusals():
    with pytest.raises(ValueError, match="multiple must be at least 1"):
        EarlyFusion(nn.Identity(), ["a", "b"], multiple=0)
    both = EarlyFusion(nn.Conv2d(2, 1, 1), ["a", "b"])
    x, masks = torch.randn(2, 2, 8, 8), torch.tensor([[True, True], [True, True], [False, True], [True, False]])
    each = torch.cat([both(x, masks[:2]), both(x, masks[2:])])
    torch.testing.assert_close(both(x, masks), each)
    with pytest.raises(ValueError, match=r"present must have shape \(1, 2\), got \(1, 3\)"):
        EarlyFusion(nn.Identity(), ["a", "b"])(torch.zeros(1, 2, 8, 8), torch.ones(1, 3, dtype=torch.bool))
