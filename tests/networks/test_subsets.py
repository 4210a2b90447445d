# SPDX-License-Identifier: Apache-2.0
"""Predictions from every subset of the modalities."""

import pytest
import torch

from monai_cggm.inferers import VolumeInferer
from monai_cggm.networks import (
    FusionAndUnimodal,
    LateFusion,
    MultimodalSegmenter,
    Subsets,
    UnimodalClassifiers,
    modality_subsets,
    subset_masks,
    subset_predictor,
)
from tests.methods import toy

FOUR = ["flair", "t1ce", "t1", "t2"]
SMALL = {
    "encoder": {"backbone": "resnet18", "width": 4, "aspp_channels": 8},
    "decoder_channels": 12,
    "low_reduced": 8,
}


def small(modalities, classes=3):
    return MultimodalSegmenter(modalities, classes, **SMALL).eval()


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
def test_every_subset_once_and_the_largest_first(modalities):
    names = FOUR[:modalities]
    subsets = modality_subsets(names)
    assert len({frozenset(s) for s in subsets}) == len(subsets) == 2**modalities - 1
    assert [len(s) for s in subsets] == sorted((len(s) for s in subsets), reverse=True)
    masks = subset_masks(names)
    assert masks.dtype == torch.bool
    for subset, mask in zip(subsets, masks.tolist(), strict=True):
        assert subset == tuple(name for name, there in zip(names, mask, strict=True) if there)


def test_names_of_predictors():
    assert subset_predictor(FOUR, FOUR) == "fusion"
    assert subset_predictor(("flair", "t2"), FOUR) == "fusion[flair+t2]"
    names = [subset_predictor(s, FOUR[:3]) for s in modality_subsets(FOUR[:3])]
    assert names == [
        "fusion",
        "fusion[flair+t1ce]",
        "fusion[flair+t1]",
        "fusion[t1ce+t1]",
        "fusion[flair]",
        "fusion[t1ce]",
        "fusion[t1]",
    ]


@pytest.mark.parametrize("size", [(32, 48), (37, 50)])
@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_each_subset_is_the_network_under_its_mask(modalities, size):
    names = FOUR[:modalities]
    network = small(names)
    runs = []
    for encoder in network.encoders.values():
        encoder.register_forward_hook(lambda _m, _args, _o: runs.append(1))
    x = torch.randn(2, modalities, *size)
    with torch.no_grad():
        predictions = Subsets(network)(x)
        assert len(runs) == modalities  # once each for all subsets
        for subset, mask in zip(modality_subsets(names), subset_masks(names), strict=True):
            expected = network(x, present=mask.expand(2, -1))
            torch.testing.assert_close(predictions[subset_predictor(subset, names)], expected)
        assert torch.equal(predictions["fusion"], network(x))
    assert len(predictions) == 2**modalities - 1
    distinct = {round(logits.double().sum().item(), 4) for logits in predictions.values()}
    assert len(distinct) == len(predictions)


@pytest.mark.parametrize("modalities", [("pet", "ct"), toy.MODALITIES], ids=len)
def test_a_network_of_one_s_own_that_takes_present(modalities):
    network, classifiers = toy.parts(modalities, network=toy.MaskedNetwork)
    x = torch.randn(3, len(modalities), 5, 7)
    with torch.no_grad():
        predictions = Subsets(network, classifiers, modalities)(x)
        expected = {
            subset_predictor(subset, modalities): network(x, mask.expand(3, -1))
            for subset, mask in zip(modality_subsets(modalities), subset_masks(modalities), strict=True)
        }
        expected |= classifiers(toy.features_of(network, x), (5, 7))
    assert list(predictions) == list(expected)
    assert all(torch.equal(predictions[name], logits) for name, logits in expected.items())


@pytest.mark.parametrize("modalities", [2, 4])
def test_classifiers_have_their_rows(modalities):
    names = FOUR[:modalities]
    network = small(names)
    classifiers = UnimodalClassifiers.for_network(network).eval()
    x = torch.randn(1, modalities, 33, 40)
    with torch.no_grad():
        predictions = Subsets(network, classifiers)(x)
        both = FusionAndUnimodal(network, classifiers)(x)
    assert list(predictions)[-modalities:] == names
    for name in ("fusion", *names):
        torch.testing.assert_close(predictions[name], both[name])
    assert not Subsets(network, classifiers).state_dict().keys() ^ {
        *(f"network.{k}" for k in network.state_dict()),
        *(f"classifiers.{k}" for k in classifiers.state_dict()),
    }


def test_volumes_keep_the_order_of_the_subsets():
    network = small(FOUR[:3])
    volume = torch.randn(1, 3, 24, 33, 4)
    with torch.no_grad():
        volumes = VolumeInferer(sw_batch_size=3)(volume, Subsets(network))
        assert list(volumes) == [subset_predictor(s, FOUR[:3]) for s in modality_subsets(FOUR[:3])]
        one = network(volume[..., 2], present=torch.tensor([[True, False, True]]))
    torch.testing.assert_close(volumes["fusion[flair+t1]"][..., 2], one)


@pytest.mark.parametrize("size", [(32, 32), (19, 45)])
@pytest.mark.parametrize("modalities", [1, 2, 4])
def test_encode_and_decode_are_the_forward_pass(modalities, size):
    network = small(FOUR[:modalities])
    x = torch.randn(2, modalities, *size)
    present = torch.ones(2, modalities, dtype=torch.bool)
    present[0, 1:] = False
    with torch.no_grad():
        features = network.encode(x)
        assert torch.equal(network.decode(features, list(size)), network(x))
        assert torch.equal(network.decode(features, list(size), present), network(x, present))


@pytest.mark.parametrize("combine", ["probabilities", "sum", "energy"])
@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_late_fusion_has_its_subsets_and_its_networks(modalities, combine):
    names = FOUR[:modalities]
    network = LateFusion({name: small([name]) for name in names}, combine)
    runs = []
    for member in network.networks.values():
        member.register_forward_hook(lambda _m, _args, _o: runs.append(1))
    x = torch.randn(2, modalities, 21, 32)
    with torch.no_grad():
        predictions = Subsets(network)(x)
        assert len(runs) == modalities  # once each for all subsets and its own row
        expected = {
            subset_predictor(subset, names): network(x, mask.expand(2, -1))
            for subset, mask in zip(modality_subsets(names), subset_masks(names), strict=True)
        }
        expected |= {name: network.networks[name](x[:, i : i + 1]) for i, name in enumerate(names)}
    assert list(predictions) == list(expected)
    for name, logits in expected.items():
        torch.testing.assert_close(predictions[name], logits, msg=name)


def test_late_fusion_of_a_case_that_lacks_a_modality():
    network = LateFusion({name: small([name]) for name in FOUR[:3]})
    x, present = torch.randn(2, 3, 32, 32), torch.tensor([[True, False, True], [True, False, True]])
    with torch.no_grad():
        predictions = Subsets(network)(x, present)
        assert torch.equal(predictions["fusion"], network(x, present))
    assert list(predictions) == ["fusion", "fusion[flair+t1]", "fusion[flair]", "fusion[t1]", "flair", "t1"]


def test_late_fusion_takes_no_classifiers():
    network = LateFusion({name: small([name]) for name in FOUR[:2]})
    with pytest.raises(ValueError, match="takes no classifiers"):
        Subsets(network, torch.nn.Identity())


class Tables(torch.nn.Module):
    """Linear layers on a dictionary of vectors; absent ones are zero."""

    def __init__(self, modalities):
        super().__init__()
        self.modalities = modalities
        self.encoders = torch.nn.ModuleDict({m: torch.nn.Linear(4, 3) for m in modalities})

    def forward(self, x, present=None):
        features = torch.stack([self.encoders[m](x[m]) for m in self.modalities], dim=1)
        if present is not None:
            features = features.masked_fill(~present[:, :, None], 0.0)
        return features.sum(dim=1)


@pytest.mark.parametrize("modalities", [2, 3])
def test_a_dictionary_of_tables(modalities):
    names = FOUR[:modalities]
    network = Tables(names)
    x = {name: torch.randn(5, 4) for name in names}

    def classifiers(features, size):
        assert size == ()
        return {name: 2 * h for name, h in features.items()}

    module = torch.nn.Module()
    module.forward = classifiers
    with torch.no_grad():
        predictions = Subsets(network, module)(x)
        for subset in modality_subsets(names):
            expected = sum(network.encoders[m](x[m]) for m in subset)
            torch.testing.assert_close(predictions[subset_predictor(subset, names)], expected)
        for name in names:
            torch.testing.assert_close(predictions[name], 2 * network.encoders[name](x[name]))
        present = torch.ones(5, modalities, dtype=torch.bool)
        present[2, 1] = False
        lacking = Subsets(network)(x, present)
        torch.testing.assert_close(
            lacking["fusion"][2], sum(network.encoders[m](x[m][2]) for m in names if m != "t1ce")
        )
    assert not any("t1ce" in name for name in lacking)
    assert len(lacking) == 1 + 2 ** (modalities - 1) - 1


def test_of_a_case_that_lacks_a_modality_only_what_is_there_is_combined():
    torch.manual_seed(0)
    network = MultimodalSegmenter(["a", "b", "c"], 2, encoder={"backbone": "resnet18", "width": 4}).eval()
    x, present = torch.randn(2, 3, 32, 32), torch.tensor([[True, False, True]] * 2)
    predictions = Subsets(network)(x, present)
    assert list(predictions) == ["fusion", "fusion[a+c]", "fusion[a]", "fusion[c]"]
    torch.testing.assert_close(predictions["fusion"], network(x, present))
    torch.testing.assert_close(predictions["fusion[c]"], network(x, torch.tensor([[False, False, True]] * 2)))
