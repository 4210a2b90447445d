# SPDX-License-Identifier: Apache-2.0
"""Two processes over gloo must take the step that one process with the whole batch takes."""

import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from monai_cggm.batches import prepare_batch
from monai_cggm.losses import DiceCrossEntropyLoss
from monai_cggm.methods import (
    AGM,
    CGGM,
    MSLR,
    OGMGE,
    PMR,
    UMT,
    AuxiliaryLosses,
    Distillation,
    GBlending,
    Greedy,
    ModalityDropout,
    RelativeBalance,
    UnimodalObserver,
)
from tests.methods import toy

STEPS = 3


def data(rank=None, *, lacking=False):
    """Batches of four; the first half (rank 0) holds hardly any tumour, the second is full of it.

    With ``lacking`` no case of the first half has t1ce, and one of the second lacks t2.
    """
    whole = toy.batches(STEPS, batch=4, size=8)
    for batch in whole:
        batch["label"][:2, :, 1:] = 0
        if lacking:
            batch["present"] = torch.ones(4, 4, dtype=torch.bool)
            batch["present"][:2, 1] = batch["present"][3, 3] = False
    if rank is None:
        return whole
    return [{k: v[2 * rank : 2 * rank + 2] for k, v in batch.items()} for batch in whole]


def relative(network, classifiers):
    return RelativeBalance(network, classifiers, toy.metric(), strength=2.0, every=2)


def update(network, classifiers):
    return RelativeBalance(network, classifiers, toy.metric(), strength=2.0, scale="update")


def bounded(network, classifiers):
    return CGGM(network, classifiers, toy.metric(), lam=5.0, max_share=0.3)


def ogm_ge(network, classifiers):
    return OGMGE(network, classifiers, toy.metric(), alpha=0.8)


def mslr(network, classifiers):
    return MSLR(
        network, classifiers, toy.metric(), initial=dict(zip(toy.MODALITIES, (0.5, 1.0, 1.5, 2.0), strict=True))
    )


def greedy(network, classifiers):
    return Greedy(network, classifiers, toy.metric(), window=1, start_epoch=1)


def agm(network, classifiers):
    return AGM(network, classifiers, toy.metric(), alpha=2.0)


def pmr(network, classifiers):
    return PMR(network, classifiers, toy.metric())


def umt(network, classifiers):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        teachers = dict(toy.MaskedNetwork().encoders.items())
    return UMT(network, classifiers, toy.metric(), teachers=teachers, weight=1.0)


def g_blending(network, classifiers):
    folder = tempfile.TemporaryDirectory()
    with torch.random.fork_rng():
        for seed, names in enumerate([[m] for m in toy.MODALITIES] + [list(toy.MODALITIES)]):
            torch.manual_seed(seed)
            run = Path(folder.name, names[0] if len(names) == 1 else "joint")
            run.mkdir()
            torch.save({"model": toy.MaskedNetwork(names).state_dict(), "epoch": 1}, run / "model.pt")
    loaders = {"train": data(), "validation": toy.batches(2, batch=4, size=8, seed=3)}
    runs = f"{folder.name}/{{modality}}"
    method = GBlending(network, classifiers, toy.metric(), runs=runs, build=toy.MaskedNetwork, loaders=loaders)
    method.folder = folder  # as long as the method
    return method


#: what one process with the whole batch would do too: a method, and the parts that go with it
METHODS = {
    "observe": (lambda n, c: UnimodalObserver(n, c, toy.metric()), lambda method: []),
    "cggm": (lambda n, c: CGGM(n, c, toy.metric(), rho=1.2, lam=0.5), lambda method: []),
    "positive": (lambda n, c: CGGM(n, c, toy.metric(), rho=1.2, lam=0.5, rule="positive"), lambda method: []),
    "weights": (lambda n, c: CGGM(n, c, toy.metric(), rho=1.2, lam=0.5, direction="weights"), lambda method: []),
    "bounded": (bounded, lambda method: []),
    "relative": (relative, lambda method: [AuxiliaryLosses(method, 0.5, follow_balance=True), Distillation(method)]),
    "update": (update, lambda method: []),
    "ogm_ge": (ogm_ge, lambda method: []),
    "mslr": (mslr, lambda method: []),
    "greedy": (greedy, lambda method: []),
    "agm": (agm, lambda method: []),
    "pmr": (pmr, lambda method: []),
    "umt": (umt, lambda method: []),
    "g_blending": (g_blending, lambda method: []),
}
#: what depends on the process
OWN = {
    "dropout": (relative, lambda method: [ModalityDropout(4, guide=method), AuxiliaryLosses(method, 0.5)]),
    "lacking": (relative, lambda method: [AuxiliaryLosses(method, 0.5), Distillation(method)]),
    "lacking cggm": (bounded, lambda method: [AuxiliaryLosses(method, 0.5, follow_balance=True)]),
    "lacking ogm_ge": (ogm_ge, lambda method: []),
    "lacking mslr": (mslr, lambda method: []),
    "lacking greedy": (greedy, lambda method: []),
    "lacking agm": (agm, lambda method: []),
    "lacking pmr": (pmr, lambda method: []),
    "lacking umt": (umt, lambda method: []),
    "lacking g_blending": (g_blending, lambda method: []),
}
#: MSLR's factors follow the progress of epochs from the third on, and PMR has prototypes from the second on
EPOCHS = {"mslr": 3, "lacking mslr": 3, "pmr": 2, "lacking pmr": 2}


def train(name, batches, wrap):
    torch.manual_seed(0)
    network, classifiers = wrap(toy.MaskedNetwork()), wrap(toy.ToyClassifiers())
    make, parts = (METHODS | OWN)[name]
    method = make(network, classifiers)
    engine = toy.trainer(
        network,
        toy.everything(network, classifiers),
        batches,
        method,
        handlers=parts(method),
        loss=DiceCrossEntropyLoss(ce_weight=(0.2, 0.3, 0.25, 0.25)),
        prepare_batch=prepare_batch,
        epochs=EPOCHS.get(name, 1),
    )
    engine.run()
    plain = {
        n.replace("module.", ""): p.detach().clone() for m in (network, classifiers) for n, p in m.named_parameters()
    }
    return plain, engine.state.scalars, engine.state.batch.get("fused")


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    for name in METHODS | OWN:
        batches = data(rank, lacking=name.startswith("lacking"))
        weights, scalars, fused = train(name, batches, DistributedDataParallel)
        torch.save({"weights": weights, "scalars": scalars, "fused": fused}, f"{folder}/{name}{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_take_the_step_of_one_process(name, two_ranks):
    first, second = (torch.load(two_ranks / f"{name}{r}.pt", weights_only=True) for r in (0, 1))
    single, scalars, _ = train(name, data(), lambda module: module)
    for parameter, weight in single.items():
        assert torch.equal(first["weights"][parameter], second["weights"][parameter]), parameter
        torch.testing.assert_close(first["weights"][parameter], weight, rtol=0, atol=1e-5, msg=parameter)
    for key, value in scalars.items():
        if key.split("/")[0] in (
            "epsilon",
            "epsilon_mean",
            "balance",
            "cosine",
            "gradient_norm",
            "modulated_norm",
            "lam",
            "discrepancy",
            "update",
            "share_loss",
            "prototype_score",
            "prototype_weight",
            "blending",
        ):
            assert first["scalars"][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
            assert second["scalars"][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    torch.manual_seed(0)
    untrained = toy.MaskedNetwork().state_dict()
    assert max((single[n] - w).abs().max().item() for n, w in untrained.items()) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_two_ranks_stay_together_whatever_each_draws_or_lacks(name, two_ranks):
    first, second = (torch.load(two_ranks / f"{name}{r}.pt", weights_only=True) for r in (0, 1))
    for parameter, weight in first["weights"].items():
        assert weight.isfinite().all(), parameter
        assert torch.equal(second["weights"][parameter], weight), parameter
    for key, value in first["scalars"].items():
        if key.split("/")[0] in ("epsilon", "epsilon_mean", "balance"):
            assert second["scalars"][key] == value, key
    if name == "dropout":
        assert not torch.equal(first["fused"], second["fused"])
    else:
        assert first["scalars"]["loss/t1ce"] == 0.0 < second["scalars"]["loss/t1ce"]
        assert first["scalars"]["epsilon/t1ce"] > 0  # of the second's cases
    torch.manual_seed(0)
    untrained = toy.MaskedNetwork().state_dict()
    changed = [not torch.equal(first["weights"][n], w) for n, w in untrained.items()]
    # a modality whose network, here a random one, got no better has the weight 0
    assert any(changed) if name == "lacking g_blending" else all(changed)
