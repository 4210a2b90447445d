# SPDX-License-Identifier: Apache-2.0
"""All parts in one trainer: the loss is their sum, and the order in which they are listed changes nothing."""

import pytest
import torch
from ignite.engine import Events

from monai_cggm.batches import prepare_batch
from monai_cggm.handlers import Checkpoints, ClipGradients, InOrder
from monai_cggm.methods import CGGM, AuxiliaryLosses, Distillation, ModalityDropout, RelativeBalance
from tests.methods import toy
from tests.methods.toy import everything, metric, parts

NAMES = ("dropout", "method", "auxiliary", "distillation")
ORDERS = [
    NAMES,
    NAMES[::-1],
    ("auxiliary", "distillation", "method", "dropout"),
    ("distillation", "dropout", "auxiliary", "method"),
]


def made(modalities=toy.MODALITIES, *, relative=False, seed=0):
    network, classifiers = parts(modalities, network=toy.MaskedNetwork, dropout=0.2, seed=seed)
    method = (
        RelativeBalance(network, classifiers, metric(), every=2, strength=2.0)
        if relative
        else CGGM(network, classifiers, metric(), lam=0.3, rule="positive", max_share=0.5)
    )
    handlers = {
        "dropout": ModalityDropout(modalities, seed=4, guide=method),
        "method": method,
        "auxiliary": AuxiliaryLosses(method, 0.5, follow_balance=True),
        "distillation": Distillation(method),
        "clipping": ClipGradients([network, classifiers], 1.0),
    }
    return network, classifiers, handlers


def run(network, classifiers, handlers, *, modalities=4, **kwargs):
    rows = []
    engine = toy.trainer(
        network, everything(network, classifiers), toy.batches(3, modalities=modalities, batch=3),
        handlers=handlers, prepare_batch=prepare_batch, **kwargs,
    )  # fmt: skip
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: rows.append({**e.state.scalars, "all": e.state.output["loss"].item()})
    )
    engine.run()
    return rows


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("modalities", [("pet", "ct"), toy.MODALITIES], ids=len)
def test_the_loss_is_the_sum(modalities, relative):
    network, classifiers, handlers = made(modalities, relative=relative)
    rows = run(network, classifiers, [InOrder(handlers.values())], modalities=len(modalities))
    for row in rows:
        expected = row["loss/task"] + row["loss/distillation"] + sum(row[f"loss/{m}"] for m in modalities)
        expected += 0.0 if relative else row["lam"] * row["loss/gm"]
        assert row["all"] == pytest.approx(expected, rel=1e-6)
        assert row["loss/distillation"] > 0


def test_the_order_of_the_parts_changes_nothing():
    ends = []
    for order in ORDERS:
        network, classifiers, handlers = made()
        run(network, classifiers, [*(handlers[name] for name in order), handlers["clipping"]])
        ends.append({**network.state_dict(), **classifiers.state_dict()})
    for end in ends[1:]:
        assert all(torch.equal(weight, end[name]) for name, weight in ends[0].items())


@pytest.mark.parametrize("left_out", [*NAMES[:1], *NAMES[2:]])
def test_each_part_acts(left_out):
    ends = []
    for names in (set(NAMES), set(NAMES) - {left_out}):
        network, classifiers, handlers = made()
        run(network, classifiers, [handler for name, handler in handlers.items() if name in names])
        ends.append({**network.state_dict(), **classifiers.state_dict()})
    assert not all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())


def test_the_log_says_what_is_attached_in_which_order(caplog):
    network, classifiers, handlers = made()
    dropout, *others = handlers.values()
    with caplog.at_level("INFO"):
        run(network, classifiers, [InOrder([dropout, None, *others])])
    assert "attached in this order: ModalityDropout, CGGM, AuxiliaryLosses, Distillation, ClipGradients" in caplog.text
    assert repr(handlers["auxiliary"]) == "AuxiliaryLosses(weights=[0.5, 0.5, 0.5, 0.5], times B, warmup_epochs=0)"
    assert repr(handlers["dropout"]).startswith("ModalityDropout(15 subsets, guided, floor=0.5, ")


@pytest.mark.parametrize("relative", [False, True])
def test_a_resumed_run_goes_on_exactly(relative, tmp_path):
    """Guided draws and balanced weights of the first step after a checkpoint come from the last step before it."""

    def part(epochs, folder, *, resume=False, seed=0):
        network, classifiers, handlers = made(relative=relative, seed=seed)
        objects = {"model": network, "classifiers": classifiers, "method": handlers["method"]}
        checkpoints = Checkpoints(folder, objects, resume=resume)
        rows = run(network, classifiers, [checkpoints, *handlers.values()], epochs=epochs)
        return rows, {**network.state_dict(), **classifiers.state_dict()}

    whole, weights = part(3, tmp_path / "whole")
    before, _ = part(1, tmp_path / "parts")
    after, resumed = part(3, tmp_path / "parts", resume=True, seed=8)
    assert before + after == whole
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())
