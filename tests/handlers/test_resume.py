# SPDX-License-Identifier: Apache-2.0
"""A run that is killed and resumed must equal one that was not, bit for bit."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.handlers import training

SIGKILLED = -9


def load(path):
    return torch.load(path, weights_only=True)


def assert_equal(found, expected, where=""):
    """Compare states down to the last bit of the last tensor."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_equal(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, item in enumerate(expected):
            assert_equal(found[i], item, f"{where}/{i}")
    else:
        assert found == expected, where


def tensorboard(run_dir):
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "images": 0}).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    images = {tag: [e.step for e in events.Images(tag)] for tag in events.Tags()["images"]}
    return scalars, images


def assert_same_run(found, expected, epoch):
    assert_equal(
        load(found / f"checkpoints/epoch_{epoch:04d}.pt"), load(expected / f"checkpoints/epoch_{epoch:04d}.pt")
    )
    assert_equal(load(found / "model.pt"), load(expected / "model.pt"))
    for table in ("iterations.csv", "epochs.csv"):
        assert (found / table).read_text() == (expected / table).read_text()
    assert tensorboard(found) == tensorboard(expected)
    assert sorted(p.name for p in (found / "checkpoints").iterdir()) == sorted(
        p.name for p in (expected / "checkpoints").iterdir()
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    assert training.run(run_dir) == 0
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("moment", ["iteration 2", "iteration 5", "validation 2", "save 2", "saved 3"])
def test_killed_and_resumed(uninterrupted, tmp_path, moment, workers):
    assert training.run(tmp_path, workers=workers, kill_at=moment) == SIGKILLED
    left = sorted(p.name for p in tmp_path.glob("checkpoints/*"))
    assert any(name.startswith(".tmp") for name in left) == moment.startswith("save")
    assert training.run(tmp_path, workers=workers, resume=True) == 0
    assert_same_run(tmp_path, uninterrupted, training.EPOCHS)
