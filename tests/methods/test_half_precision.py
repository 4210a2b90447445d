# SPDX-License-Identifier: Apache-2.0
"""Under autocast networks run in half precision, and what methods measure must not."""

import itertools

import pytest
import torch
from ignite.engine import Events

from monai_cggm.losses import DiceCrossEntropyLoss
from monai_cggm.methods import (
    AGM,
    CGGM,
    MSLR,
    OGMGE,
    PMR,
    QMF,
    UME,
    UMT,
    GBlending,
    Greedy,
    ReconBoost,
    RelativeBalance,
    UnimodalObserver,
)
from tests.methods import late_toy, toy
from tests.methods.test_g_blending import trained_apart
from tests.methods.toy import everything, metric

OBSERVERS = {
    "observe": lambda n, c: UnimodalObserver(n, c, metric()),
    "cggm": lambda n, c: CGGM(n, c, metric(), lam=0.5, rule="clamped"),
    "relative": lambda n, c: RelativeBalance(n, c, metric(), every=1),
    "ogm_ge": lambda n, c: OGMGE(n, c, metric(), noise=False),
    "mslr": lambda n, c: MSLR(n, c, metric()),
    "greedy": lambda n, c: Greedy(n, c, metric(), start_epoch=1),
    "agm": lambda n, c: AGM(n, c, metric()),
    "pmr": lambda n, c: PMR(n, c, metric()),
    "umt": lambda n, c: UMT(n, c, metric(), teachers=dict(toy.MaskedNetwork().encoders.items()), weight=1.0),
}
#: made from trained networks, which lie in a folder
NEEDY = {
    "g_blending": lambda n, c, runs: GBlending(
        n, c, metric(), runs=trained_apart(runs, toy.MaskedNetwork, toy.MODALITIES), build=toy.MaskedNetwork,
        loaders={"train": toy.batches(2, seed=1), "validation": toy.batches(1, seed=2)},
    ),
}  # fmt: skip
LATE = {
    "ume": (UME, "probabilities"),
    "qmf": (QMF, "energy"),
    "reconboost": (lambda n, m: ReconBoost(n, m, boost_epochs=1, rectify_epochs=1), "sum"),
}


@pytest.fixture
def run(tmp_path):
    """Counts its calls: each has a folder of its own."""
    numbers = itertools.count()
    return lambda name, **kwargs: two_epochs(name, tmp_path / str(next(numbers)), **kwargs)


def two_epochs(name, folder, half=False, lr=0.0, **kwargs):
    """Two epochs, by default with weights that stay; what was logged in every step, the method and the network."""
    rows = []
    torch.manual_seed(0)
    if name in LATE:
        make, combine = LATE[name]
        network = late_toy.network_of("segmentation", combine)
        method = make(network, late_toy.metric_of("segmentation"))
        data, sgd = late_toy.batches("segmentation", 3), torch.optim.SGD(network.parameters(), lr=lr)
        engine = late_toy.trainer(network, data, method, task="segmentation", optimizer=sgd, epochs=2, **kwargs)
    else:
        network, classifiers = toy.MaskedNetwork(), toy.ToyClassifiers()
        method = NEEDY[name](network, classifiers, folder) if name in NEEDY else OBSERVERS[name](network, classifiers)
        data = toy.batches(3, batch=4, size=24)
        engine = toy.trainer(network, everything(network, classifiers), data, method, epochs=2, lr=lr, **kwargs)
    engine.loss_function = DiceCrossEntropyLoss()
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: rows.append(dict(e.state.scalars)))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        engine.run()
    return rows, method, network


@pytest.mark.parametrize("name", OBSERVERS | NEEDY | LATE)
def test_measures_are_those_of_full_precision(run, name):
    half, full = run(name, half=True)[0], run(name)[0]
    assert len(half) == len(full) == 6
    for found, right in zip(half, full, strict=True):
        assert found.keys() == right.keys()
        for key, value in right.items():
            # a voxel between two classes may change sides, and CGGM's B is a ratio of differences of such scores
            group = key.split("/")[0]
            if not (name == "cggm" and group in ("balance", "balance_bounded", "modulated_norm")) and key != "loss/gm":
                assert found[key] == pytest.approx(value, rel=0.05, abs=0.08 if group == "epsilon" else 0.03), key


def test_prototypes_count_in_full_precision(run):
    _, method, _ = run("pmr", half=True)
    labels = torch.cat([batch["label"] for batch in toy.batches(3, batch=4, size=24)]).flatten().long()
    views = torch.nn.functional.one_hot(labels, 4).double().sum(dim=0)
    assert views.sum() == 3 * 4 * 24 * 24
    features = torch.ones(len(labels), 2, dtype=torch.bfloat16)
    method._sums.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        method._collect("flair", features, torch.nn.functional.one_hot(labels, 4).float())
    # a count in bfloat16, which has 8 bits, would be a multiple of 8 here
    torch.testing.assert_close(method._sums["flair"][:, -1], views, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA is not available")
@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.GradScaler:FutureWarning")
@pytest.mark.parametrize("name", OBSERVERS | NEEDY | LATE)
def test_a_loss_scale_changes_neither_what_is_measured_nor_a_weight(run, name):
    """A power of two cancels exactly, so a method that forgets to take it out of a gradient is told at once."""
    (plain, _, network), (scaled, _, other) = (
        run(name, lr=0.1),
        run(name, lr=0.1, handlers=[toy.ScaleOnCpu()], amp=True),
    )
    assert len(plain) == 6
    for found, right in zip(scaled, plain, strict=True):
        assert found == pytest.approx(right, rel=1e-4, abs=1e-6)
    for (key, weight), after in zip(network.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(after, weight, rtol=1e-5, atol=1e-6, msg=key)
