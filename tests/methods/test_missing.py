# SPDX-License-Identifier: Apache-2.0
"""Training on cases that lack modalities: they count for what they have, and nowhere else."""

import pytest
import torch
from ignite.engine import Events

from monai_cggm.batches import prepare_batch
from monai_cggm.losses import DiceCrossEntropyLoss
from monai_cggm.methods import (
    CGGM,
    MSLR,
    OGMGE,
    AuxiliaryLosses,
    Distillation,
    Greedy,
    ModalityDropout,
    RelativeBalance,
    UnimodalObserver,
)
from tests.methods import toy
from tests.methods.toy import everything, gradients_of_one_step, metric, parts

METHODS = {
    "observe": lambda n, c: UnimodalObserver(n, c, metric()),
    "cggm": lambda n, c: CGGM(n, c, metric(), lam=0.5),
    "weights": lambda n, c: CGGM(n, c, metric(), lam=0.5, direction="weights"),
    "lagged": lambda n, c: CGGM(n, c, metric(), lam=0.5, direction="lagged", rule="positive"),
    "bounded": lambda n, c: CGGM(n, c, metric(), lam=0.5, max_share=0.1, rule="clamped"),
    "relative": lambda n, c: RelativeBalance(n, c, metric(), every=1),
    "ogm_ge": lambda n, c: OGMGE(n, c, metric()),
    "mslr": lambda n, c: MSLR(n, c, metric()),
    "greedy": lambda n, c: Greedy(n, c, metric(), start_epoch=1),
}


def masked_parts(modalities, **kwargs):
    return parts(modalities, network=toy.MaskedNetwork, **kwargs)


def lacking(modalities, absent, *, batch=3, seed=0, dtype=torch.float32):
    """A batch in which `absent` names pairs of a case and a modality that it lacks; the channel is zero, as loaded."""
    (made,) = toy.batches(1, modalities=modalities, batch=batch, size=7, seed=seed, dtype=dtype)
    made["present"] = torch.ones(batch, modalities, dtype=torch.bool)
    for case, modality in absent:
        made["present"][case, modality] = False
        made["image"][case, modality] = 0.0
    return made


ABSENT = {
    2: [(0, 1)],
    3: [(0, 2), (1, 0), (1, 2)],
    4: [(2, 0), (0, 1), (1, 1), (0, 3)],
}


@pytest.mark.parametrize("modalities", ABSENT)
def test_a_classifier_is_measured_on_the_cases_that_have_its_modality(modalities):
    names = toy.MODALITIES[:modalities]
    batch = lacking(modalities, ABSENT[modalities], dtype=torch.float64)
    network, classifiers = masked_parts(names, dtype=torch.float64)
    observer = UnimodalObserver(network, classifiers, metric())
    seen = gradients_of_one_step(network, classifiers, [dict(batch)], observer, prepare_batch=prepare_batch)
    for i, m in enumerate(names):
        rows = [case for case in range(3) if (case, i) not in ABSENT[modalities]]
        image, label = batch["image"][rows], batch["label"][rows]
        prediction = classifiers(toy.features_of(network, image), label.shape[2:])[m]
        loss = toy.cross_entropy(prediction, label)
        assert seen["scalars"][f"loss/{m}"] == pytest.approx(loss.item(), rel=1e-12)
        assert seen["scalars"][f"epsilon/{m}"] == pytest.approx(toy.numpy_dice(prediction, label), rel=1e-12)
        own = {f"classifiers.{n}": p for n, p in classifiers.named_parameters() if f".{m}." in n}
        for name, gradient in zip(own, torch.autograd.grad(loss, list(own.values())), strict=True):
            torch.testing.assert_close(seen[name], gradient, rtol=1e-9, atol=1e-14, msg=name)
    task = toy.cross_entropy(network(batch["image"], batch["present"]), batch["label"])
    assert seen["scalars"]["loss/task"] == pytest.approx(task.item())


@pytest.mark.parametrize("modalities", ABSENT)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("more", [False, True], ids=["alone", "all parts"])
def test_an_encoder_learns_nothing_from_a_case_that_lacks_its_modality(more, method, modalities):
    """Whatever stands in the absent channels, every gradient is the same."""
    names = toy.MODALITIES[:modalities]

    def step(filled):
        batch = lacking(modalities, ABSENT[modalities])
        if filled:
            batch["image"][~batch["present"]] = 5 * torch.randn(7, 7)
        network, classifiers = masked_parts(names)
        steering = METHODS[method](network, classifiers)
        handlers = [AuxiliaryLosses(steering), Distillation(steering, teacher="classifiers")] if more else []
        handlers += [ModalityDropout(modalities)] if more else []
        return gradients_of_one_step(
            network, classifiers, [batch], steering, handlers=handlers, prepare_batch=prepare_batch
        )

    zeros, filled = step(False), step(True)
    for name, gradient in zeros.items():
        if isinstance(gradient, torch.Tensor):
            torch.testing.assert_close(filled[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    assert filled["scalars"] == pytest.approx(zeros["scalars"], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("loss", [toy.cross_entropy, DiceCrossEntropyLoss()], ids=["cross-entropy", "dice"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("more", [False, True], ids=["alone", "all parts"])
@pytest.mark.parametrize("first", [True, False], ids=["in the first batch", "later"])
def test_nothing_is_nan_where_no_case_has_the_modality(first, more, method, loss):
    names = toy.MODALITIES[:3]
    without = lacking(3, [(0, 1), (1, 1), (2, 1)])
    data = [without, lacking(3, [], seed=1)] if first else [lacking(3, [], seed=1), without]
    network, classifiers = masked_parts(names)
    steering = METHODS[method](network, classifiers)
    handlers = [ModalityDropout(3), AuxiliaryLosses(steering), Distillation(steering)] if more else []
    engine = toy.trainer(
        network, everything(network, classifiers), data, steering, handlers=handlers, loss=loss,
        prepare_batch=prepare_batch,
    )  # fmt: skip
    rows = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: rows.append(e.state.scalars))
    frozen = {}

    @engine.on(Events.ITERATION_COMPLETED(once=1 if first else 2))
    def gradients(engine):
        frozen["encoder"] = max(p.grad.abs().max().item() for p in network.encoders["t1ce"].parameters())
        frozen["head"] = classifiers.heads["t1ce"].weight.grad.abs().max().item()
        frozen["other"] = classifiers.heads["flair"].weight.grad.abs().max().item()

    engine.run()
    for row in rows:
        assert all(value == value and abs(value) < float("inf") for value in row.values()), row
    assert all(p.isfinite().all() for p in everything(network, classifiers))
    assert frozen["encoder"] == frozen["head"] == 0.0 < frozen["other"]
    lacks, has = (rows[0], rows[1]) if first else (rows[1], rows[0])
    assert lacks["loss/t1ce"] == 0.0 < has["loss/t1ce"]
    assert lacks["epsilon/t1ce"] == (0.0 if first else has["epsilon/t1ce"])
    assert lacks["cosine/t1ce"] == 0.0


def test_a_mask_that_leaves_nothing_out_changes_nothing():
    def trained(mask):
        network, classifiers = masked_parts(toy.MODALITIES)
        data = toy.batches(3)
        for batch in data:
            batch |= {"present": torch.ones(2, 4, dtype=torch.bool)} if mask else {}
        method = CGGM(network, classifiers, metric(), lam=0.5)
        toy.trainer(network, everything(network, classifiers), data, method, prepare_batch=prepare_batch).run()
        return {**network.state_dict(), **classifiers.state_dict()}

    plain, masked = trained(False), trained(True)
    assert all(torch.equal(plain[name], weight) for name, weight in masked.items())
