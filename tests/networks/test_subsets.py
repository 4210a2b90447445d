# SPDX-License-Identifier: Apache-2.0
"""Predictions from every subset of the modalities, and the ensemble of networks of one modality each."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from monai_cggm.inferers import VolumeInferer
from monai_cggm.networks import (
    FusionAndUnimodal,
    MultimodalSegmenter,
    Subsets,
    UnimodalClassifiers,
    UnimodalEnsemble,
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
    for network in (
        small(FOUR[:modalities]),
        UnimodalEnsemble.of_modalities(FOUR[:modalities], num_classes=3, **SMALL),
    ):
        network.eval()
        x = torch.randn(2, modalities, *size)
        present = torch.ones(2, modalities, dtype=torch.bool)
        present[0, 1:] = False
        with torch.no_grad():
            features = network.encode(x)
            assert torch.equal(network.decode(features, list(size)), network(x))
            assert torch.equal(network.decode(features, list(size), present), network(x, present))


@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_the_ensemble_is_the_mean_of_probabilities(modalities):
    names = FOUR[:modalities]
    ensemble = UnimodalEnsemble({name: small([name]) for name in names}).eval()
    x = torch.randn(3, modalities, 21, 32)
    masks = [None, torch.tensor([[i == case % modalities or i == 0 for i in range(modalities)] for case in range(3)])]
    masks += [mask.expand(3, -1) for mask in subset_masks(names)]
    with torch.no_grad():
        each = [softmax(n(x[:, i : i + 1]).numpy(), axis=1) for i, n in enumerate(ensemble.networks.values())]
        for mask in masks:
            found = ensemble(x) if mask is None else ensemble(x, mask)
            for case in range(3):
                there = [p[case] for i, p in enumerate(each) if mask is None or mask[case, i]]
                np.testing.assert_allclose(found[case].exp().numpy(), np.mean(there, axis=0), rtol=1e-5, atol=1e-7)


def test_what_stands_in_an_absent_channel_does_not_reach_the_ensemble():
    ensemble = UnimodalEnsemble.of_modalities(["flair", "t2"], num_classes=2, **SMALL).eval()
    x = torch.randn(1, 2, 32, 32)
    spoilt = x.clone()
    spoilt[:, 1] = float("nan")
    only = torch.tensor([[True, False]])
    with torch.no_grad():
        assert torch.equal(ensemble(spoilt, only), ensemble(x, only))


def test_the_subsets_of_an_ensemble():
    ensemble = UnimodalEnsemble.of_modalities(FOUR[:3], num_classes=2, **SMALL).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        predictions = Subsets(ensemble)(x)
        for subset, mask in zip(modality_subsets(FOUR[:3]), subset_masks(FOUR[:3]), strict=True):
            torch.testing.assert_close(predictions[subset_predictor(subset, FOUR[:3])], ensemble(x, mask.expand(2, -1)))
        alone = ensemble.networks["t1ce"](x[:, 1:2]).log_softmax(dim=1)
    torch.testing.assert_close(predictions["fusion[t1ce]"], alone)


def test_of_a_case_that_lacks_a_modality_only_what_is_there_is_combined():
    torch.manual_seed(0)
    network = MultimodalSegmenter(["a", "b", "c"], 2, encoder={"backbone": "resnet18", "width": 4}).eval()
    x, present = torch.randn(2, 3, 32, 32), torch.tensor([[True, False, True]] * 2)
    predictions = Subsets(network)(x, present)
    assert list(predictions) == ["fusion", "fusion[a+c]", "fusion[a]", "fusion[c]"]
    torch.testing.assert_close(predictions["fusion"], network(x, present))
    torch.testing.assert_close(predictions["fusion[c]"], network(x, torch.tensor([[False, False, True]] * 2)))
