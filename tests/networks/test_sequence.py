# SPDX-License-Identifier: Apache-2.0
"""Transformers for sequences and tables."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from monai_cggm.methods import CGGM, AuxiliaryLosses, UnimodalObserver
from monai_cggm.metrics import Accuracy, NegativeMAE
from monai_cggm.networks import FusionAndUnimodal, Subsets
from monai_cggm.networks.sequence import (
    AttentionStack,
    MultimodalTransformer,
    SequenceClassifiers,
    SequenceEncoder,
    masked_mean,
    sinusoids,
)
from tests.methods import toy

SIZES = {"audio": 4, "text": 6, "video": 3}
NAMES = tuple(SIZES)
SMALL = {"width": 10, "heads": 5, "layers": 2, "fusion_layers": 2}


def network_of(names=NAMES, outputs=3, seed=0, **kwargs):
    torch.manual_seed(seed)
    return MultimodalTransformer(names, outputs, SIZES, **{**SMALL, **kwargs}).double()


def sample(lengths, seed=0):
    """One sample: sequences of these lengths, and a vector."""
    generator = torch.Generator().manual_seed(seed)
    x = {m: torch.randn(1, n, SIZES[m], generator=generator, dtype=torch.float64) for m, n in lengths.items()}
    x["video"] = torch.randn(1, SIZES["video"], generator=generator, dtype=torch.float64)
    return x


def padded(samples, filler=float("nan")):
    """Samples of different lengths in one batch, with a filler that must not matter."""
    x = {}
    for name in NAMES:
        values = [s[name][0] for s in samples]
        if values[0].dim() == 1:
            x[name] = torch.stack(values)
            continue
        longest = max(map(len, values))
        x[name] = torch.stack(
            [torch.cat([v, torch.full((longest - len(v), v.shape[1]), filler, dtype=v.dtype)]) for v in values]
        )
        x[f"{name}_padding"] = torch.tensor([[i >= len(v) for i in range(longest)] for v in values])
    return x


THREE = [sample({"audio": a, "text": t}, seed) for seed, (a, t) in enumerate([(5, 2), (1, 7), (3, 3)])]


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("grad", [True, False])
def test_a_padded_batch_gives_what_each_sample_gives_alone(layers, grad):
    network = network_of(layers=layers).eval()
    with torch.set_grad_enabled(grad):
        together = network(padded(THREE))
        alone = torch.cat([network(s) for s in THREE])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


def test_the_encoder_is_standardisation_projection_positions_and_attention():
    mean, std = [1.0, -2.0, 0.5], [2.0, 0.5, 3.0]
    encoder = SequenceEncoder(3, width=6, layers=1, heads=2, dropout=0.0, statistics=(mean, std)).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    z = (x.numpy() - mean) / std
    hidden = z @ encoder.project.weight.detach().numpy().T + encoder.project.bias.detach().numpy()
    for t in range(4):
        for i in range(3):
            hidden[:, t, 2 * i] += math.sin(t / 10000 ** (2 * i / 6))
            hidden[:, t, 2 * i + 1] += math.cos(t / 10000 ** (2 * i / 6))
    h = torch.from_numpy(hidden)
    layer = encoder.attention.layers[0]
    h = h + layer.self_attn(layer.norm1(h), layer.norm1(h), layer.norm1(h))[0]
    h = h + layer.linear2(layer.linear1(layer.norm2(h)).relu())
    expected = encoder.attention.norm(h)
    values, padding = encoder((x, torch.zeros(2, 4, dtype=torch.bool)))
    torch.testing.assert_close(values, expected)
    assert not padding.any()


@pytest.mark.parametrize("width", [1, 5, 8])
def test_positions_have_any_width(width):
    assert sinusoids(3, width, torch.zeros(1)).shape == (3, width)


def test_padded_positions_come_out_as_zeros_and_the_feature_is_the_mean_of_the_rest():
    network = network_of().eval()
    outputs = network.encode(padded(THREE))
    for name in NAMES:
        values, padding = outputs[name]
        assert (values[padding] == 0).all()
        for row in range(3):
            expected = values[row][~padding[row]].mean(dim=0)
            torch.testing.assert_close(network.encoders[name].feature_of(outputs[name])[row], expected)


def test_a_sample_without_any_position_is_no_nan():
    network = network_of().eval()
    x = padded(THREE)
    x["audio_padding"][1] = True
    assert network(x).isfinite().all()
    assert (network.encoders["audio"].feature_of(network.encode(x)["audio"])[1] == 0).all()
    network(x).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    assert masked_mean(torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)).sum() == 0


MASK = torch.tensor([[True, True, False], [False, True, True], [True, False, True]])


@pytest.mark.parametrize("junk", [1e6, float("nan"), float("inf")])
def test_nothing_of_an_absent_modality_matters(junk):
    network = network_of().train(False)

    def result(filler):
        x = padded(THREE)
        for column, name in enumerate(NAMES):
            x[name][~MASK[:, column]] = filler
        network.zero_grad()
        logits = network(x, present=MASK)
        logits.square().sum().backward()
        return logits.detach(), [p.grad.clone() for p in network.parameters()]

    (first, gradients), (second, others) = result(0.0), result(junk)
    torch.testing.assert_close(second, first, rtol=0, atol=1e-12)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12)


def test_an_absent_modality_is_as_if_the_fusion_had_never_seen_it():
    """Control: leaving its tokens out by hand gives the same, and zeros that are attended to do not."""
    network = network_of().eval()
    x = padded(THREE)
    outputs = network.encode(x)
    mask = torch.tensor([[True, False, True]]).expand(3, -1)
    tokens = torch.cat([network.token.expand(3, -1, -1), outputs["audio"][0], outputs["video"][0]], dim=1)
    paddings = torch.cat([torch.zeros(3, 1, dtype=torch.bool), outputs["audio"][1], outputs["video"][1]], dim=1)
    fused = network.fusion(tokens, paddings)[:, 0]
    torch.testing.assert_close(network(x, present=mask), network.head(fused + network.residual(fused)))
    zeros = {**outputs, "text": (torch.zeros_like(outputs["text"][0]), outputs["text"][1])}
    assert not torch.allclose(network.fuse(zeros, []), network(x, present=mask))


def test_features_of_an_absent_modality_may_be_no_numbers():
    network = network_of().eval()
    outputs = network.encode(padded(THREE))
    spoilt = {
        name: (values.masked_fill(~MASK[:, column, None, None], float("nan")), padding)
        for column, (name, (values, padding)) in enumerate(outputs.items())
    }
    assert torch.equal(network.fuse(spoilt, [], MASK), network.fuse(outputs, [], MASK))
    assert network.fuse(spoilt, []).isnan().all()


@pytest.mark.parametrize("repeats", [2, 3])
def test_encoders_run_once_for_several_masks(repeats):
    network = network_of().eval()
    calls = []
    network.encoders["audio"].register_forward_hook(lambda *_: calls.append(1))
    masks = [MASK.roll(r, dims=0) for r in range(repeats)]
    x = padded(THREE)
    together = network(x, present=torch.cat(masks))
    assert len(calls) == 1
    torch.testing.assert_close(together, torch.cat([network(x, present=mask) for mask in masks]))


@pytest.mark.parametrize("names", [("audio",), ("text", "audio"), NAMES])
@pytest.mark.parametrize("batch", [1, 3])
def test_any_number_of_modalities_and_a_batch_of_one(names, batch):
    network = network_of(names).train()
    logits = network(padded(THREE[:batch]))
    assert logits.shape == (batch, 3)
    logits.sum().backward()
    assert list(network.encoders) == list(names)


def test_it_is_scripted():
    network = network_of().eval()
    scripted = torch.jit.script(network)
    for x in (padded(THREE), THREE[0], padded(THREE[:2])):
        assert torch.equal(scripted(x), network(x))
    x = padded(THREE)
    assert torch.equal(scripted(x, torch.cat([MASK, MASK])), network(x, torch.cat([MASK, MASK])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modalities": []}, "at least one name"),
        ({"modalities": ["audio", "audio"]}, "differ"),
        ({"modalities": ["audio", "smell"]}, "smell"),
        ({"num_outputs": 0}, "num_outputs must be at least 1"),
        ({"width": 11}, "multiple of heads"),
        ({"layers": -1}, "layers must be at least 0"),
        ({"dropout": 1.0}, "dropout"),
        ({"statistics": {m: (np.zeros(2), np.ones(2)) for m in NAMES}}, "two vectors of 4 numbers"),
        ({"statistics": {m: (np.zeros(d), np.zeros(d)) for m, d in SIZES.items()}}, "must be positive"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MultimodalTransformer(**{"modalities": NAMES, "num_outputs": 2, "sizes": SIZES, **SMALL, **change})


@pytest.mark.parametrize("shape", [(3, 2), (4, 3), (3,)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="present must have a row"):
        network_of()(padded(THREE), present=torch.ones(shape, dtype=torch.bool))


def test_classifiers_have_the_head_s_shape_and_see_no_padding():
    network = network_of().eval()
    classifiers = SequenceClassifiers.for_network(network).double().eval()
    assert all(head.weight.shape == network.head.weight.shape for head in classifiers.heads.values())
    assert classifiers.attention["audio"].layers[0].self_attn.num_heads == 5
    together = classifiers(network.encode(padded(THREE)))
    alone = [classifiers(network.encode(s)) for s in THREE]
    for name in NAMES:
        torch.testing.assert_close(together[name], torch.cat([a[name] for a in alone]), rtol=0, atol=1e-10)


def test_a_stack_without_layers_normalises():
    x = torch.randn(2, 3, 4)
    stack = AttentionStack(4, 0, 2)
    assert torch.equal(stack(x, torch.zeros(2, 3, dtype=torch.bool)), nn.functional.layer_norm(x, (4,)))


def test_no_number_is_lost_where_pytorch_takes_its_fast_path():
    """Without gradients and with an even number of heads, PyTorch's own layer gives NaN for a sample of padding."""
    stack = AttentionStack(8, 2, 2).eval()
    x, padding = torch.randn(2, 3, 8), torch.tensor([[True] * 3, [False, False, True]])
    with torch.no_grad():
        fast = stack(x, padding)
    assert fast.isfinite().all()
    torch.testing.assert_close(fast[1, :2], stack(x, padding)[1, :2])


def test_validation_runs_network_and_classifiers_on_a_dict():
    network = network_of().eval()
    classifiers = SequenceClassifiers.for_network(network).double().eval()
    x = padded(THREE)
    both = FusionAndUnimodal(network, classifiers)(x)
    assert list(both) == ["fusion", *NAMES]
    assert torch.equal(both["fusion"], network(x))
    subsets = Subsets(network, classifiers)(x)
    assert len(subsets) == 7 + 3
    mask = torch.tensor([[True, False, True]]).expand(3, -1)
    torch.testing.assert_close(subsets["fusion[audio+video]"], network(x, present=mask))


# ---------------------------------------------------------------------- methods work on it unchanged


def data(number, task, missing=False):
    batches = []
    for i in range(number):
        torch.manual_seed(i)
        x = {m: v.float() for m, v in padded(THREE, filler=0.0).items() if not m.endswith("_padding")}
        x |= {m: v for m, v in padded(THREE).items() if m.endswith("_padding")}
        x = {m: v + torch.randn_like(v) if v.is_floating_point() else v for m, v in x.items()}
        label = torch.randint(0, 3, (3,)) if task == "classification" else torch.randn(3, 1)
        batches.append({"image": x, "label": label, **({"present": MASK} if missing else {})})
    return batches


def setup(task):
    network = network_of(outputs=3 if task == "classification" else 1, dropout=0.0).float()
    metric = Accuracy() if task == "classification" else NegativeMAE()
    loss = nn.CrossEntropyLoss() if task == "classification" else nn.L1Loss()
    return network, SequenceClassifiers.for_network(network), metric, loss


def prepared():
    from monai_cggm.batches import prepare_batch

    return {"prepare_batch": prepare_batch}


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("missing", [False, True])
def test_a_method_scales_each_encoder_s_real_gradient(task, missing):
    network, classifiers, metric, loss = setup(task)
    batches = data(1, task, missing)
    seen = []
    for method in (UnimodalObserver, CGGM):
        net, cls = copy.deepcopy(network), copy.deepcopy(classifiers)
        kwargs = {} if method is UnimodalObserver else {"rho": 1.3, "direction": "off"}
        seen.append(
            toy.gradients_of_one_step(net, cls, batches, method(net, cls, metric, **kwargs), loss=loss, **prepared())
        )
    plain, scaled = seen
    for name, value in plain.items():
        if name.startswith("encoders."):
            factor = scaled["scalars"][f"balance/{name.split('.')[1]}"]
            torch.testing.assert_close(scaled[name], factor * value, rtol=1e-5, atol=1e-8)
        elif name not in ("scalars", "loss"):
            torch.testing.assert_close(scaled[name], value)
    assert any(
        name.endswith("project.weight") and value.abs().max() > 0 for name, value in plain.items() if "enc" in name
    )


def test_epsilon_counts_the_samples_that_have_a_modality():
    network, classifiers, metric, loss = setup("classification")
    batches = data(1, "classification", missing=True)
    method = UnimodalObserver(network, classifiers, metric)
    seen = toy.gradients_of_one_step(network, classifiers, batches, method, loss=loss, **prepared())
    with torch.no_grad():
        predictions = classifiers(network.encode(batches[0]["image"]))
    for column, name in enumerate(NAMES):
        rows = MASK[:, column]
        right = (predictions[name].argmax(dim=1) == batches[0]["label"])[rows].double().mean()
        assert seen["scalars"][f"epsilon/{name}"] == pytest.approx(right.item())


def test_auxiliary_losses_reach_the_encoders_through_features_with_a_mask_beside_them():
    network, classifiers, metric, loss = setup("classification")
    batches = data(1, "classification")
    observer = UnimodalObserver(network, classifiers, metric)
    part = AuxiliaryLosses(observer, 0.5)
    seen = toy.gradients_of_one_step(network, classifiers, batches, observer, handlers=[part], loss=loss, **prepared())
    x, label = batches[0]["image"], batches[0]["label"]
    network.zero_grad()
    outputs = network.encode(x)
    total = loss(network.fuse(outputs, []), label)
    total = total + 0.5 * sum(loss(p, label) for p in classifiers(outputs).values())
    total.backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-4, atol=1e-6)
