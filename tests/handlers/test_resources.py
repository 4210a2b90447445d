# SPDX-License-Identifier: Apache-2.0
"""Time, memory and parameters of a training."""

import json
import sys

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from monai_cggm.handlers import Checkpoints, Resources, resources
from tests.methods import toy


class Clock:
    """A clock that a test moves."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(resources.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def facts(folder):
    return json.loads((folder / "resources.json").read_text())


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ({"model": nn.Linear(3, 2)}, (8, 0)),
        ({"model": nn.Conv2d(2, 4, 3, bias=False), "classifiers": nn.Linear(1, 1)}, (72, 2)),
        # batch norm's running statistics are no parameters
        ({"model": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "classifiers": nn.ReLU()}, (10, 0)),
    ],
)
def test_parameters_are_counted(modules, expected, tmp_path):
    counted = Resources(tmp_path, modules).parameters
    assert (counted["parameters"], counted["classifier_parameters"]) == expected


def run(folder, clock, *, epochs, seconds, resume=False):
    network, classifiers = toy.parts()
    engine = toy.trainer(
        network,
        network.parameters(),
        toy.batches(2),
        handlers=[
            Checkpoints(folder, {"model": network}, resume=resume),
            Resources(folder, {"model": network, "classifiers": classifiers}),
        ],
        epochs=epochs,
    )

    @engine.on(Events.ITERATION_COMPLETED)
    def work(engine):
        clock.now += seconds

    engine.run()
    return network, classifiers


def test_seconds_add_up_over_the_starts_of_a_run(clock, tmp_path):
    network, classifiers = run(tmp_path, clock, epochs=2, seconds=1.5)
    assert facts(tmp_path)["training_seconds"] == 6.0
    clock.now += 500  # the pause does not count
    run(tmp_path, clock, epochs=3, seconds=10.0, resume=True)
    assert facts(tmp_path)["training_seconds"] == 26.0
    run(tmp_path, clock, epochs=3, seconds=10.0, resume=True)  # complete already
    assert facts(tmp_path)["training_seconds"] == 26.0
    found = facts(tmp_path)
    assert found["parameters"] == sum(p.numel() for p in network.parameters())
    assert found["classifier_parameters"] == sum(p.numel() for p in classifiers.parameters())
    assert found["threads"] == torch.get_num_threads()
    assert isinstance(found["device"], str)


def test_a_new_run_begins_at_zero(clock, tmp_path):
    (tmp_path / "resources.json").write_text('{"training_seconds": 99.0}')
    run(tmp_path, clock, epochs=1, seconds=1.0)
    assert facts(tmp_path)["training_seconds"] == 2.0


def test_every_epoch_leaves_a_whole_file(clock, tmp_path):
    engine = Engine(lambda engine, batch: None)
    Resources(tmp_path / "deep" / "run", {"model": nn.Linear(1, 1)}).attach(engine)
    seen = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: setattr(clock, "now", clock.now + 3))

    @engine.on(Events.EPOCH_COMPLETED)
    def read(engine):
        seen.append(facts(tmp_path / "deep" / "run")["training_seconds"])

    engine.run([0], max_epochs=3)
    assert seen == [3.0, 6.0, 9.0]
    assert [p.name for p in (tmp_path / "deep" / "run").iterdir()] == ["resources.json"]


@pytest.mark.skipif(torch.cuda.is_available() or sys.platform != "linux", reason="counts in kB, and the CPU's memory")
def test_peak_memory_is_the_process_s(clock, tmp_path):
    run(tmp_path, clock, epochs=1, seconds=1.0)
    with open("/proc/self/status", encoding="utf-8") as status:
        (line,) = (line for line in status if line.startswith("VmHWM"))
    assert facts(tmp_path)["peak_memory_mb"] == pytest.approx(int(line.split()[1]) / 1024, rel=0.05)


def test_only_the_first_process_writes(clock, monkeypatch, tmp_path):
    monkeypatch.setattr(resources.idist, "get_rank", lambda: 1)
    network, _ = toy.parts()
    toy.trainer(network, network.parameters(), toy.batches(1), handlers=[Resources(tmp_path, {"model": network})]).run()
    assert not list(tmp_path.iterdir())
