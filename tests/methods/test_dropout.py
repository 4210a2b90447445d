# SPDX-License-Identifier: Apache-2.0
"""Which modalities the fusion sees: probabilities by brute force, draws by frequency, and the mask on a trainer."""

import ignite.distributed as idist
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from scipy.stats import chisquare

from monai_cggm.batches import prepare_batch
from monai_cggm.methods import CGGM, ModalityDropout, RelativeBalance, UnimodalObserver, mask_probabilities
from monai_cggm.networks import MultimodalSegmenter, UnimodalClassifiers, subset_masks
from tests.methods import toy
from tests.methods.toy import everything, gradients_of_one_step, metric, parts


def by_hand(masks, balance, floor):
    weights = []
    for mask in masks.tolist():
        inside = [max(b, 0.0) for b, there in zip(balance, mask, strict=True) if there]
        weights.append(sum(inside) / len(inside))
    if sum(weights) == 0:
        return [1 / len(masks)] * len(masks)
    return [floor / len(masks) + (1 - floor) * w / sum(weights) for w in weights]


@pytest.mark.parametrize("floor", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "balance",
    [
        [0.5, 1.5],
        [1.0, -2.0],
        [0.2, 0.9, 1.9],
        [0.0, 0.0, 3.0],
        [1.0, 1.0, 1.0, 1.0],
        [-0.3, 0.4, 1.6, 2.0],
        [-1.0, -1.0],
    ],
)
def test_probabilities_by_brute_force(balance, floor):
    masks = subset_masks([str(i) for i in range(len(balance))])
    chances = mask_probabilities(masks, torch.tensor(balance), floor)
    assert chances.dtype == torch.float64
    assert chances.tolist() == pytest.approx(by_hand(masks, balance, floor), rel=1e-6)
    assert chances.sum().item() == pytest.approx(1.0)
    assert chances.min() >= floor / len(masks) - 1e-12


@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_without_a_balance_all_subsets_are_equally_likely(modalities):
    masks = subset_masks([str(i) for i in range(modalities)])
    assert mask_probabilities(masks).tolist() == pytest.approx([1 / (2**modalities - 1)] * (2**modalities - 1))


def counted(drawn, masks):
    """How often each subset was drawn."""
    place = {tuple(mask): i for i, mask in enumerate(masks.tolist())}
    return np.bincount([place[tuple(row)] for row in drawn.tolist()], minlength=len(masks))


@pytest.mark.parametrize("names", [("pet", "ct"), ("flair", "t1", "t2"), toy.MODALITIES], ids=len)
@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_subsets_are_drawn_as_often_as_they_should_be(one_at_a_time, names):
    dropout = ModalityDropout(names, seed=3)
    if one_at_a_time:  # over iterations, as a training of batch size 1
        drawn = torch.cat([dropout.draw(1, iteration) for iteration in range(1, 2001)])
    else:
        drawn = dropout.draw(20000, iteration=1)
    counts = counted(drawn, dropout.masks)
    assert chisquare(counts).pvalue > 1e-3
    assert drawn.any(dim=1).all()


def guided(balance, floor):
    guide = CGGM(*parts(toy.MODALITIES[: len(balance)]), metric())
    guide.balance = torch.tensor(balance)
    return ModalityDropout(guide.modalities, seed=1, guide=guide, floor=floor)


@pytest.mark.parametrize(
    ("balance", "floor"), [([0.2, 1.8], 0.0), ([0.5, 0.1, 2.4], 0.5), ([-0.5, 0.9, 1.2, 2.0], 0.2)]
)
def test_a_guide_s_terms_are_followed(balance, floor):
    dropout = guided(balance, floor)
    counts = counted(dropout.draw(20000, iteration=5), dropout.masks)
    expected = np.array(by_hand(dropout.masks, balance, floor)) * 20000
    assert chisquare(counts, expected * (20000 / expected.sum())).pvalue > 1e-3
    assert chisquare(counts).pvalue < 1e-6  # not the uniform one
    dropout.guide.balance = None  # before the first step
    assert chisquare(counted(dropout.draw(20000, iteration=5), dropout.masks)).pvalue > 1e-3


def test_only_what_is_there_is_drawn():
    dropout = ModalityDropout(3, seed=0)
    present = torch.tensor([[True, True, True], [False, True, True], [False, False, True]]).repeat(6000, 1)
    drawn = dropout.draw(len(present), 1, present)
    assert not (drawn & ~present).any()
    assert drawn.any(dim=1).all()
    assert chisquare(counted(drawn[::3], dropout.masks)).pvalue > 1e-3
    of_two = counted(drawn[1::3], dropout.masks)
    assert chisquare(of_two[of_two > 0]).pvalue > 1e-3
    assert (of_two > 0).sum() == 3
    assert drawn[2::3].sum(dim=0).tolist() == [0, 0, 6000]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_share_of_the_samples_keeps_all_that_it_has(share):
    dropout = ModalityDropout(3, seed=2, full_share=share)
    counts = counted(dropout.draw(20000, iteration=1), dropout.masks)
    expected = np.full(7, 20000 * (1 - share) / 7)
    expected[0] += 20000 * share
    assert dropout.masks[0].all()
    assert chisquare(counts, expected).pvalue > 1e-3
    present = torch.tensor([[True, False, True]]).expand(9000, -1)
    of_two = dropout.draw(9000, 1, present)
    assert not of_two[:, 1].any()
    assert of_two[:, [0, 2]].all(dim=1).double().mean().item() == pytest.approx(share + (1 - share) / 3, abs=0.02)


def test_draws_depend_on_seed_iteration_and_process_alone(monkeypatch):
    first = ModalityDropout(4, seed=5).draw(64, iteration=7)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    other = ModalityDropout(toy.MODALITIES, seed=5)
    other.draw(64, iteration=1)
    assert torch.equal(other.draw(64, iteration=7), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(other.draw(64, iteration=8), first)
    assert not torch.equal(ModalityDropout(4, seed=6).draw(64, iteration=7), first)
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    assert not torch.equal(other.draw(64, iteration=7), first)


def masked_parts(modalities=toy.MODALITIES, **kwargs):
    return parts(modalities, network=toy.MaskedNetwork, **kwargs)


def told(network):
    """The masks that a network is given, call by call."""
    seen = []
    network.register_forward_pre_hook(lambda _m, _args, kwargs: seen.append(kwargs.get("present")), with_kwargs=True)
    return seen


@pytest.mark.parametrize("modalities", [("pet", "ct"), toy.MODALITIES], ids=len)
def test_the_network_is_told_what_was_drawn(modalities):
    network, classifiers = masked_parts(modalities)
    seen = told(network)
    dropout = ModalityDropout(modalities, seed=2)
    method = UnimodalObserver(network, classifiers, metric())
    data = toy.batches(6, modalities=len(modalities), batch=3)
    toy.trainer(
        network,
        everything(network, classifiers),
        data,
        method,
        handlers=[dropout],
        epochs=2,
        prepare_batch=prepare_batch,
    ).run()
    expected = [dropout.draw(3, iteration) for iteration in range(1, 13)]
    assert len(seen) == 12
    for found, mask in zip(seen, expected, strict=True):
        assert found is None if mask.all() else torch.equal(found, mask)
    assert len({tuple(mask.flatten().tolist()) for mask in expected}) > 6


@pytest.mark.parametrize("modalities", [("pet", "ct"), toy.MODALITIES], ids=len)
def test_classifiers_see_every_modality_and_the_fusion_a_subset(modalities):
    (batch,) = toy.batches(1, modalities=len(modalities), batch=5)
    dropout = ModalityDropout(modalities, seed=0)
    mask = dropout.draw(5, iteration=1)
    assert not mask.all()

    def step(handlers):
        network, classifiers = masked_parts(modalities)
        observer = UnimodalObserver(network, classifiers, metric())
        fresh = {key: value.clone() for key, value in batch.items()}
        return gradients_of_one_step(
            network, classifiers, [fresh], observer, handlers=handlers, prepare_batch=prepare_batch
        )

    whole, dropped = step([]), step([dropout])
    for m in modalities:
        assert dropped["scalars"][f"loss/{m}"] == whole["scalars"][f"loss/{m}"]
        assert dropped["scalars"][f"epsilon/{m}"] == whole["scalars"][f"epsilon/{m}"]
    for name in (n for n in whole if n.startswith("classifiers.")):
        assert torch.equal(dropped[name], whole[name]), name
    network, _ = masked_parts(modalities)
    task = toy.cross_entropy(network(batch["image"], mask), batch["label"])
    assert dropped["scalars"]["loss/task"] == pytest.approx(task.item()) != whole["scalars"]["loss/task"]
    for (name, _), gradient in zip(
        network.named_parameters(), torch.autograd.grad(task, list(network.parameters())), strict=True
    ):
        torch.testing.assert_close(dropped[name], gradient, msg=name)


@pytest.mark.parametrize("made", [CGGM, RelativeBalance])
def test_a_guided_draw_follows_the_terms_of_the_step_before(made):
    network, classifiers = masked_parts()
    method = made(network, classifiers, metric())
    dropout = ModalityDropout(toy.MODALITIES, guide=method, floor=0.0)
    engine = toy.trainer(
        network, everything(network, classifiers), toy.batches(5, batch=40), method, handlers=[dropout],
        prepare_batch=prepare_batch,
    )  # fmt: skip
    drawn, terms = [], []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: drawn.append(e.state.batch["fused"]))
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: terms.append(e.state.scalars))
    engine.run()
    twin = ModalityDropout(toy.MODALITIES, guide=made(*masked_parts(), metric()), floor=0.0)
    uniform = ModalityDropout(toy.MODALITIES)
    assert torch.equal(drawn[0], uniform.draw(40, 1))
    for iteration in range(2, 6):
        before = [terms[iteration - 2][f"balance/{m}"] for m in toy.MODALITIES]
        twin.guide.balance = torch.tensor(before, dtype=torch.float64)
        assert torch.equal(drawn[iteration - 1], twin.draw(40, iteration))
    assert any(not torch.equal(mask, uniform.draw(40, i)) for i, mask in enumerate(drawn[1:], 2))


def test_it_works_without_a_method():
    network, _ = masked_parts()
    seen = told(network)
    toy.trainer(
        network, network.parameters(), toy.batches(3), handlers=[ModalityDropout(4)], prepare_batch=prepare_batch
    ).run()
    assert any(mask is not None and not mask.all() for mask in seen)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"two modalities or more, got \['flair'\]"):
        ModalityDropout(["flair"])
    with pytest.raises(ValueError, match=r"floor must be between 0 and 1, got 1\.5"):
        ModalityDropout(4, floor=1.5)
    with pytest.raises(ValueError, match="UnimodalObserver has no balance terms"):
        ModalityDropout(4, guide=UnimodalObserver(*parts(), metric()))


def test_a_floor_needs_a_guide():
    with pytest.raises(ValueError, match=r"floor=0\.5 needs a guide"):
        ModalityDropout(3, floor=0.5)
    with pytest.raises(ValueError, match=r"full_share must be between 0 and 1, got 1\.5"):
        ModalityDropout(3, full_share=1.5)
    with pytest.raises(ValueError, match="subsets must be at least 1, got 0"):
        ModalityDropout(3, subsets=0)


def test_several_subsets_of_a_sample_are_drawn_independently():
    drawn = ModalityDropout(3, seed=5, subsets=2).draw(7000, 1).view(2, 7000, 3)
    assert torch.equal(drawn[0], ModalityDropout(3, seed=5).draw(7000, 1))
    code = (drawn * torch.tensor([1, 2, 4])).sum(dim=2)
    pairs = torch.bincount(code[0] * 8 + code[1], minlength=64).view(8, 8)[1:, 1:]
    assert pairs.sum() == 7000
    # 49 pairs, all equally likely: 142.9 expected of each, standard deviation 11.8
    assert pairs.min() > 95
    assert pairs.max() < 195


@pytest.mark.parametrize(
    ("method", "missing", "subsets"),
    [
        (None, False, 1),
        (None, True, 3),
        (UnimodalObserver, False, 2),
        (UnimodalObserver, True, 1),
        (CGGM, False, 1),
        (CGGM, True, 2),
    ],
)
def test_both_is_the_mean_of_the_complete_sample_and_the_drawn_subsets(method, missing, subsets):
    torch.manual_seed(0)
    names = ["a", "b", "c"]
    size = {"encoder": {"backbone": "resnet18", "width": 4, "norm": "group"}, "decoder_channels": 8}
    network = MultimodalSegmenter(names, 4, **size)
    (batch,) = toy.batches(1, modalities=3, size=32, batch=3)
    present = torch.ones(3, 3, dtype=torch.bool)
    if missing:
        present[1, 0] = False
        batch["present"] = present
    dropout = ModalityDropout(names, seed=4, both=True, subsets=subsets)
    drawn = dropout.draw(3, 1, present if missing else None).split(3)
    assert len(drawn) == subsets
    assert not torch.equal(drawn[0], present)
    logits = [network(batch["image"], mask) for mask in (present, *drawn)]
    loss = sum(toy.cross_entropy(z, batch["label"]) for z in logits) / (1 + subsets)
    expected = torch.autograd.grad(loss, list(network.parameters()))
    classifiers = UnimodalClassifiers.for_network(network)
    observer = None if method is None else method(network, classifiers, metric())
    if method is CGGM:
        observer.magnitude, observer.direction = False, "off"
    seen = {}
    engine = toy.trainer(
        network,
        everything(network, classifiers),
        [dict(batch)],
        observer,
        handlers=[dropout],
        lr=0.0,
        prepare_batch=prepare_batch,
    )

    @engine.on(IterationEvents.MODEL_COMPLETED)
    def keep(engine):
        seen["gradients"] = [p.grad.clone() for p in network.parameters()]
        seen["rows"] = len(engine.state.output["pred"]), len(engine.state.output["label"])
        seen["scalars"] = getattr(engine.state, "scalars", None)

    engine.run()
    assert seen["rows"] == (3 + 3 * subsets, 3 + 3 * subsets)
    for gradient, right in zip(seen["gradients"], expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-6)
    if observer is not None:
        assert seen["scalars"]["loss/task"] == pytest.approx(loss.item(), rel=1e-5)
        plain = type(observer)(network, classifiers, metric())
        plain.magnitude = False
        plain.direction = "off"
        one = toy.trainer(
            network, everything(network, classifiers), [dict(batch)], plain, lr=0.0, prepare_batch=prepare_batch
        )
        one.run()
        for name in ("a", "b", "c"):  # the classifiers see each sample once, as it is
            assert seen["scalars"][f"loss/{name}"] == pytest.approx(one.state.scalars[f"loss/{name}"], rel=1e-5)
            assert seen["scalars"][f"epsilon/{name}"] == pytest.approx(one.state.scalars[f"epsilon/{name}"])


@pytest.mark.parametrize(("modalities", "missing", "full_share"), [(2, False, 0.0), (3, True, 0.0), (4, False, 0.5)])
def test_alone_each_sample_goes_through_the_fusion_once_with_what_was_drawn(modalities, missing, full_share):
    """MRD: the loss is that of one random subset a sample, and of nothing else."""
    torch.manual_seed(0)
    names = list(toy.MODALITIES[:modalities])
    network = toy.MaskedNetwork(names)
    (batch,) = toy.batches(1, modalities=modalities, size=8, batch=6)
    present = torch.ones(6, modalities, dtype=torch.bool)
    if missing:
        present[1, 0] = False
        batch["present"] = present
    dropout = ModalityDropout(names, seed=4, full_share=full_share)
    drawn = dropout.draw(6, 1, present if missing else None)
    assert not torch.equal(drawn, present)
    loss = sum(
        toy.cross_entropy(network(batch["image"][i : i + 1], drawn[i : i + 1]), batch["label"][i : i + 1])
        for i in range(6)
    ) / 6  # fmt: skip
    expected = torch.autograd.grad(loss, list(network.parameters()))
    engine = toy.trainer(
        network, list(network.parameters()), [dict(batch)], handlers=[dropout], lr=0.0, prepare_batch=prepare_batch
    )
    engine.run()
    assert engine.state.output["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for parameter, right in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, right, rtol=1e-4, atol=1e-6)
