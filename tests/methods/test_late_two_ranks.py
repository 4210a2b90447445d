# SPDX-License-Identifier: Apache-2.0
"""Late fusion in two processes over gloo: the step of one process with the whole batch, and one history for all."""

from datetime import timedelta
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ignite.engine import Events
from torch.nn.parallel import DistributedDataParallel

from monai_cggm.losses import DiceCrossEntropyLoss
from monai_cggm.methods.qmf import QMF
from monai_cggm.methods.reconboost import ReconBoost
from monai_cggm.methods.ume import UME
from tests.methods import late_toy, toy

STEPS, EPOCHS = 2, 5
CE_WEIGHT = (0.2, 0.3, 0.25, 0.25)


def boosting(network, metric):
    return ReconBoost(network, metric, boost_epochs=1, rectify_epochs=1, ce_weight=CE_WEIGHT)


#: a method, and how its network combines its members
METHODS = {
    "ume": (UME, "probabilities"),
    "qmf without ranking": (lambda n, m: QMF(n, m, rank_weight=0.0), "energy"),
    "reconboost": (boosting, "sum"),
}
#: what depends on the process: pairs of samples, or the number of cases that have a modality
OWN = {
    "qmf": (lambda n, m: QMF(n, m, rank_weight=1.0), "energy"),
    "qmf lacking": (lambda n, m: QMF(n, m, rank_weight=1.0), "energy"),
    "ume lacking": (UME, "probabilities"),
    "reconboost lacking": (boosting, "sum"),
}


def data(name, rank=None):
    """Batches of four; the first half (rank 0) holds hardly any tumour, and where cases lack something, has no t1ce."""
    whole = late_toy.batches("segmentation", STEPS)
    for batch in whole:
        batch["label"][:2, :, 1:] = 0
    if name.endswith("lacking"):
        late_toy.lacking(whole, [(0, 1), (1, 1), (3, 3)])
    if rank is None:
        return whole
    return [{key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()} for batch in whole]


def train(name, batches, wrap):
    make, combine = (METHODS | OWN)[name]
    network = wrap(late_toy.network_of("segmentation", combine))
    method = make(network, late_toy.metric_of("segmentation"))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    engine = late_toy.trainer(network, batches, method, task="segmentation", optimizer=optimizer, epochs=EPOCHS)
    engine.loss_function = DiceCrossEntropyLoss(ce_weight=CE_WEIGHT)
    course = []

    @engine.on(Events.ITERATION_COMPLETED)
    def keep(engine):
        course.append({n.removeprefix("module."): p.detach().clone() for n, p in network.named_parameters()})

    engine.run()
    weights = {n.removeprefix("module."): p.detach().clone() for n, p in network.named_parameters()}
    return {"weights": weights, "rows": engine.rows, "state": method.state_dict(), "course": course}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    for name in METHODS | OWN:
        torch.save(train(name, data(name, rank), DistributedDataParallel), f"{folder}/{name}{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return folder


def both(folder, name):
    return [torch.load(folder / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS | OWN)
def test_two_ranks_stay_together(name, two_ranks):
    first, second = both(two_ranks, name)
    (network,) = (late_toy.network_of("segmentation", (METHODS | OWN)[name][1]),)
    for parameter, weight in first["weights"].items():
        assert weight.isfinite().all(), parameter
        assert torch.equal(second["weights"][parameter], weight), parameter
        assert not torch.equal(network.get_parameter(parameter), weight), parameter
    for mine, other in zip(first["rows"], second["rows"], strict=True):
        assert all(other[key] == value for key, value in mine.items() if key.startswith("epsilon/"))
    assert len(first["rows"]) == STEPS * EPOCHS


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_take_the_steps_of_one_process(name, two_ranks):
    first, _ = both(two_ranks, name)
    single = train(name, data(name), lambda module: module)
    for parameter, weight in single["weights"].items():
        torch.testing.assert_close(first["weights"][parameter], weight, rtol=0, atol=1e-5, msg=parameter)
    for found, row in zip(first["rows"], single["rows"], strict=True):
        for key, value in row.items():
            if key.startswith(("epsilon/", "learns/")):
                assert found[key] == pytest.approx(value, rel=1e-6), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qmf", "qmf lacking", "qmf without ranking"])
def test_the_history_is_everyone_s(name, two_ranks):
    histories = [item["state"]["history"] for item in both(two_ranks, name)]
    assert histories[0]["samples"] == histories[1]["samples"]
    for key in ("sums", "counts"):
        assert torch.equal(histories[0][key], histories[1][key])
    cases = data(name)
    assert set(histories[0]["samples"]) == {case for batch in cases for case in batch["case"]}
    have = sum(b["present"].sum().item() if "present" in b else 4 * len(b["case"]) for b in cases)
    assert histories[0]["counts"].sum().item() == EPOCHS * have
    if name == "qmf without ranking":  # then the weights are those of one process, and the losses too
        single = train(name, cases, lambda module: module)["state"]["history"]
        order = [single["samples"].index(case) for case in histories[0]["samples"]]
        torch.testing.assert_close(histories[0]["sums"], single["sums"][order], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_whose_turn_it_is_not_stays_in_both(two_ranks):
    """DDP gives zeros to those that wait; None must come of it, or momentum would move them."""
    first, _ = both(two_ranks, "reconboost lacking")
    turns = [[row[f"learns/{m}"] for m in toy.MODALITIES] for row in first["rows"]]
    assert turns == [[1, 0, 0, 0]] * 2 + [[1] * 4] * 2 + [[0, 1, 0, 0]] * 2 + [[1] * 4] * 2 + [[0, 0, 1, 0]] * 2
    for (before, after), turn in zip(pairwise(first["course"]), turns[1:], strict=True):
        for modality, learns in zip(toy.MODALITIES, turn, strict=True):
            names = [name for name in after if name.startswith(f"networks.{modality}.")]
            assert names
            moved = [not torch.equal(before[name], after[name]) for name in names]
            assert any(moved) if learns else not any(moved)
