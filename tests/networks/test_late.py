# SPDX-License-Identifier: Apache-2.0
"""Late fusion against NumPy, of images, vectors and dictionaries; and what else relies on it."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax

from monai_cggm.networks import LateFusion, MultimodalSegmenter, energy_weight, subset_masks
from tests.methods import toy

FOUR = ["flair", "t1ce", "t1", "t2"]
SMALL = {
    "num_classes": 3,
    "encoder": {"backbone": "resnet18", "width": 4, "aspp_channels": 8},
    "decoder_channels": 12,
    "low_reduced": 8,
}
COMBINATIONS = ("probabilities", "sum", "energy")


def by_hand(logits, combine):
    """One sample: the logits of the networks that are there, ``(K, *S)`` each."""
    if combine == "sum":
        return np.sum(logits, axis=0)
    if combine == "energy":
        return sum(logsumexp(z, axis=0) / 10 * z for z in logits)
    if len(logits[0]) == 1:
        return np.mean(logits, axis=0)
    return np.log(np.mean([softmax(z, axis=0) for z in logits], axis=0))


def masks_of(modalities, batch):
    """No mask, the same one for all samples, and a different one for each."""
    mixed = [
        [i in (case % modalities, (2 * case + 1) % modalities) for i in range(modalities)] for case in range(batch)
    ]
    return [None, torch.tensor(mixed), *(mask.expand(batch, -1) for mask in subset_masks(FOUR[:modalities]))]


def assert_combined(network, x, each, combine):
    for mask in masks_of(len(each), len(x)):
        with torch.no_grad():
            found = network(x) if mask is None else network(x, mask)
        for case in range(len(x)):
            there = [z[case] for i, z in enumerate(each) if mask is None or mask[case, i]]
            np.testing.assert_allclose(found[case].numpy(), by_hand(there, combine), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("size", [(8,), (5, 7), (3, 4, 2)], ids=str)
@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_combinations_of_images_against_numpy(modalities, size, combine):
    conv = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[len(size)]
    torch.manual_seed(modalities)
    network = LateFusion({name: conv(1, 3, 3, padding=1).double() for name in FOUR[:modalities]}, combine)
    x = 4 * torch.randn(3, modalities, *size, dtype=torch.float64)
    with torch.no_grad():
        each = [n(x[:, i : i + 1]).numpy() for i, n in enumerate(network.networks.values())]
    assert_combined(network, x, each, combine)


class Vector(toy.RegressionNetwork):
    """The toy of vectors, with as many outputs as one likes."""

    def __init__(self, modalities, outputs):
        super().__init__(modalities)
        self.head = torch.nn.Linear(6, outputs)


@pytest.mark.parametrize(
    ("combine", "outputs"), [("probabilities", 1), ("sum", 1), ("probabilities", 5), ("sum", 5), ("energy", 5)]
)
@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_combinations_of_vectors_against_numpy(modalities, combine, outputs):
    network = LateFusion.of_modalities(FOUR[:modalities], Vector, combine, outputs=outputs).double()
    assert network.num_outputs == outputs
    x = torch.randn(6, modalities, 4, dtype=torch.float64)
    with torch.no_grad():
        each = [n(x[:, i : i + 1]).numpy() for i, n in enumerate(network.networks.values())]
    assert_combined(network, x, each, combine)


@pytest.mark.parametrize("size", [(), (4, 5)])
def test_the_weight_of_energy(size):
    z = 3 * torch.randn(3, 6, *size, dtype=torch.float64)
    expected = np.log(np.exp(z.numpy()).sum(axis=1, keepdims=True)) / 10
    np.testing.assert_allclose(energy_weight(z).numpy(), expected, rtol=1e-12)
    assert (energy_weight(z - 20) < 0).all()


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("modalities", [2, 4])
def test_encode_and_decode_are_the_forward_pass(modalities, combine):
    network = LateFusion.of_modalities(FOUR[:modalities], MultimodalSegmenter, combine, **SMALL).eval()
    x = torch.randn(2, modalities, 19, 45)
    present = torch.ones(2, modalities, dtype=torch.bool)
    present[0, 1:] = False
    with torch.no_grad():
        features = network.encode(x)
        assert torch.equal(network.decode(features, [19, 45]), network(x))
        assert torch.equal(network.decode(features, [19, 45], present), network(x, present))


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_a_mask_of_several_rows_a_sample_runs_the_networks_once(combine):
    network = LateFusion.of_modalities(FOUR[:3], toy.ToyNetwork, combine).double()
    runs = []
    for member in network.networks.values():
        member.register_forward_hook(lambda _m, _args, _o: runs.append(1))
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 1], [0, 1, 0]]).bool()
    with torch.no_grad():
        both = network(x, mask)
        assert len(runs) == 3
        torch.testing.assert_close(both, torch.cat([network(x), network(x, mask[2:])]))


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("spoilt", [float("nan"), 1e6])
def test_what_stands_in_an_absent_channel_does_not_reach_the_prediction(spoilt, combine):
    network = LateFusion.of_modalities(["flair", "t2"], MultimodalSegmenter, combine, **SMALL).eval()
    x = torch.randn(1, 2, 32, 32)
    other = x.clone()
    other[:, 1] = spoilt
    only = torch.tensor([[True, False]])
    with torch.no_grad():
        assert torch.equal(network(other, only), network(x, only))
        assert not torch.equal(network(other), network(x))


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("rows", [1, 2])
def test_what_stands_in_an_absent_channel_does_not_reach_a_gradient(rows, combine):
    network = LateFusion({m: torch.nn.Conv2d(1, 3, 1) for m in FOUR[:2]}, combine)
    x = torch.randn(2, 2, 4, 4)
    present = torch.tensor([[True, True], [True, False]])
    gradients = []
    for value in (0.0, float("nan")):
        x[1, 1] = value
        loss = network(x, present.repeat(rows, 1)).square().sum()
        gradients.append(torch.autograd.grad(loss, list(network.parameters())))
    for clean, spoilt in zip(*gradients, strict=True):
        assert clean.abs().max() > 1e-4
        torch.testing.assert_close(spoilt, clean)


def test_encoders_are_the_networks_own_and_counted_once():
    network = LateFusion.of_modalities(FOUR[:3], MultimodalSegmenter, **SMALL)
    assert list(network.encoders) == FOUR[:3]
    for name, encoder in network.encoders.items():
        assert encoder is network.networks[name].encoders[name]
    one = MultimodalSegmenter(["t1ce"], **SMALL)
    assert set(network.state_dict()) == {
        f"networks.{m}.{key.replace('t1ce', m)}" for m in FOUR[:3] for key in one.state_dict()
    }
    assert len(list(network.parameters())) == 3 * len(list(one.parameters()))
    assert LateFusion({"a": torch.nn.Conv2d(1, 2, 1)}).encoders == {}
    assert LateFusion({"a": torch.nn.Conv2d(1, 2, 1)}).num_outputs is None


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_half_precision_is_combined_in_float32(combine):
    network = LateFusion({m: torch.nn.Conv2d(1, 3, 1) for m in FOUR[:2]}, combine).bfloat16()
    x = torch.randn(2, 2, 4, 4).bfloat16()
    with torch.no_grad():
        each = [n(x[:, i : i + 1]).float().numpy() for i, n in enumerate(network.networks.values())]
        found = network(x)
    assert found.dtype == torch.float32
    for case in range(2):
        np.testing.assert_allclose(found[case], by_hand([z[case] for z in each], combine), rtol=1e-5, atol=1e-6)


class Table(torch.nn.Module):
    """Mean of a padded sequence and a linear layer, of a dictionary."""

    def __init__(self, modalities, sizes):
        super().__init__()
        (self.modality,) = modalities
        self.head = torch.nn.Linear(sizes[self.modality], 3)

    def forward(self, x):
        assert set(x) <= {self.modality, f"{self.modality}_padding"}
        kept = x[self.modality]
        if f"{self.modality}_padding" in x:
            kept = kept.masked_fill(x[f"{self.modality}_padding"][..., None], 0.0)
        return self.head(kept.mean(dim=1))


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_each_network_of_a_dictionary_is_given_its_own_tensors(combine):
    sizes = {"audio": 4, "text": 7}
    network = LateFusion.of_modalities(list(sizes), Table, combine, sizes=sizes).double()
    x = {m: torch.randn(5, 6, d, dtype=torch.float64) for m, d in sizes.items()}
    x["text_padding"] = torch.arange(6).expand(5, 6) > 3
    present = torch.tensor([[True, True]] * 4 + [[False, True]])
    with torch.no_grad():
        short = x["text"].clone()
        short[:, 4:] = 0
        each = [
            network.networks["audio"].head(x["audio"].mean(1)).numpy(),
            network.networks["text"].head(short.mean(1)).numpy(),
        ]
        members, found = network.members(x), network(x, present)
    for name, z in zip(sizes, each, strict=True):
        np.testing.assert_allclose(members[name].numpy(), z, rtol=1e-9)
    for case in range(5):
        there = [z[case] for i, z in enumerate(each) if present[case, i]]
        np.testing.assert_allclose(found[case].numpy(), by_hand(there, combine), rtol=1e-9)


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("modalities", [2, 3])
def test_torchscript(modalities, combine, tmp_path):
    network = LateFusion.of_modalities(FOUR[:modalities], MultimodalSegmenter, combine, **SMALL)
    network.train()(torch.randn(2, modalities, 32, 32))  # running statistics that differ from their initial values
    network.eval()
    torch.jit.script(network).save(tmp_path / "network.ts")
    scripted = torch.jit.load(tmp_path / "network.ts")
    x = torch.randn(2, modalities, 33, 40)
    mask = torch.ones(2, modalities, dtype=torch.bool)
    mask[0, 1] = False
    with torch.no_grad():
        for arguments in ((x,), (x, mask), (x, mask.repeat(2, 1))):
            torch.testing.assert_close(scripted(*arguments), network(*arguments))


@pytest.mark.parametrize(
    ("networks", "combine", "message"),
    [
        ({}, "sum", "at least one network"),
        ({"a": torch.nn.Conv2d(1, 2, 1)}, "mean", "combine must be one of probabilities, sum, energy, got 'mean'"),
        ({"a": Vector(["a"], 1)}, "energy", r"one output \(regression\)"),
    ],
)
def test_what_cannot_be_combined_is_refused(networks, combine, message):
    with pytest.raises(ValueError, match=message):
        LateFusion(networks, combine)
