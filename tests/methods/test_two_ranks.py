# SPDX-License-Identifier: Apache-2.0
"""Two processes over gloo must take the step that one process with the whole batch takes."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from monai_cggm.losses import DiceCrossEntropyLoss
from monai_cggm.methods import CGGM, UnimodalObserver
from monai_cggm.metrics import RegionDice
from tests.methods import toy

REGIONS = {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}
STEPS = 3


def data(rank=None):
    """Batches of four; the first half (rank 0) holds hardly any tumour, the second is full of it."""
    whole = toy.batches(STEPS, batch=4, size=8)
    for batch in whole:
        batch["label"][:2, :, 1:] = 0
    if rank is None:
        return whole
    return [{k: v[2 * rank : 2 * rank + 2] for k, v in batch.items()} for batch in whole]


def train(method_name, batches, wrap):
    torch.manual_seed(0)
    network, classifiers = wrap(toy.ToyNetwork()), wrap(toy.ToyClassifiers())
    metric = RegionDice(REGIONS, 4)
    method = {
        "observe": lambda: UnimodalObserver(network, classifiers, metric),
        "cggm": lambda: CGGM(network, classifiers, metric, rho=1.2, lam=0.5),
        "positive": lambda: CGGM(network, classifiers, metric, rho=1.2, lam=0.5, rule="positive"),
        "weights": lambda: CGGM(network, classifiers, metric, rho=1.2, lam=0.5, direction="weights"),
    }[method_name]()
    parameters = [*network.parameters(), *classifiers.parameters()]
    engine = toy.trainer(
        network, parameters, batches, method, loss=DiceCrossEntropyLoss(ce_weight=(0.2, 0.3, 0.25, 0.25))
    )
    engine.run()
    plain = {
        n.replace("module.", ""): p.detach().clone() for m in (network, classifiers) for n, p in m.named_parameters()
    }
    return plain, engine.state.scalars


METHODS = ("observe", "cggm", "positive", "weights")


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for name in METHODS:
        weights, scalars = train(name, data(rank), DistributedDataParallel)
        torch.save({"weights": weights, "scalars": scalars}, f"{folder}/{name}{rank}.pt")
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
    single, scalars = train(name, data(), lambda module: module)
    for parameter, weight in single.items():
        assert torch.equal(first["weights"][parameter], second["weights"][parameter]), parameter
        torch.testing.assert_close(first["weights"][parameter], weight, rtol=0, atol=1e-5, msg=parameter)
    for key, value in scalars.items():
        if key.split("/")[0] in ("epsilon", "balance", "cosine", "gradient_norm", "modulated_norm"):
            assert first["scalars"][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
            assert second["scalars"][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    torch.manual_seed(0)
    untrained = toy.ToyNetwork().state_dict()
    assert max((single[n] - w).abs().max().item() for n, w in untrained.items()) > 1e-2
