# SPDX-License-Identifier: Apache-2.0
import copy
import logging
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ignite.engine import Events
from ignite.handlers import Checkpoint
from monai.engines import SupervisedEvaluator, SupervisedTrainer, Workflow
from monai.handlers import CheckpointLoader
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from monai_cggm.handlers import BestModel, Checkpoints
from monai_cggm.handlers.checkpoint import unwrapped

BATCHES = 2


def parts(seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    return {"model": network, "optimizer": optimizer}


def data(batches=BATCHES):
    generator = torch.Generator().manual_seed(1)
    return [
        {"image": torch.randn(4, 3, generator=generator), "label": torch.randn(4, 1, generator=generator)}
        for _ in range(batches)
    ]


def trainer(objects, handlers, *, epochs, batches=BATCHES, **kwargs):
    return SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=data(batches),
        network=objects["model"],
        optimizer=objects["optimizer"],
        loss_function=nn.MSELoss(),
        train_handlers=handlers,
        decollate=False,
        optim_set_to_none=True,
        **kwargs,
    )


def train(run_dir, *, epochs, resume=False, keep=2, seed=0, batches=BATCHES, extra=None):
    """Train from weights of ``seed``; return the parts and the engine."""
    objects = parts(seed)
    checkpoints = Checkpoints(run_dir, {**objects, **(extra or {})}, keep=keep, resume=resume)
    engine = trainer(objects, [checkpoints], epochs=epochs, batches=batches)
    engine.run()
    return objects, engine


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


class Value:
    """The least that can be put into a checkpoint."""

    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def test_what_a_checkpoint_holds(tmp_path):
    objects, _ = train(tmp_path, epochs=3)
    state = torch.load(tmp_path / "checkpoints/epoch_0003.pt", weights_only=True)
    assert set(state) == {"epoch", "iteration", "model", "optimizer"}
    assert (state["epoch"], state["iteration"]) == (3, 3 * BATCHES)
    assert_same(state["model"], objects["model"].state_dict())


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keeps_the_newest_across_resumes(tmp_path, keep):
    train(tmp_path, epochs=3, keep=keep)
    assert names(tmp_path) == [f"epoch_000{e}.pt" for e in range(4 - min(keep, 3), 4)]
    train(tmp_path, epochs=5, keep=keep, resume=True)
    assert names(tmp_path) == [f"epoch_000{e}.pt" for e in range(6 - keep, 6)]


def test_an_extended_run_equals_a_long_one(tmp_path):
    expected, _ = train(tmp_path / "long", epochs=5)
    train(tmp_path / "short", epochs=2)
    found, engine = train(tmp_path / "short", epochs=5, resume=True, seed=9)
    assert (engine.state.epoch, engine.state.iteration) == (5, 5 * BATCHES)
    assert_same(found["model"].state_dict(), expected["model"].state_dict())


@pytest.mark.parametrize("epochs", [2, 3])
def test_a_complete_run_ends_at_once(tmp_path, caplog, epochs):
    expected, _ = train(tmp_path, epochs=3)
    before = names(tmp_path)
    found, engine = train(tmp_path, epochs=epochs, resume=True, seed=9)
    assert f"3 epochs are done, and {epochs} are asked for; nothing is left to train" in caplog.text
    assert engine.state.epoch == 3
    assert names(tmp_path) == before
    assert_same(found["model"].state_dict(), expected["model"].state_dict())


@pytest.mark.parametrize(
    ("word", "meaning"),
    [("true", True), ("True", True), ("false", False), ("False", False), (True, True), (False, False)],
)
def test_resume_takes_the_words_of_a_command_line(tmp_path, word, meaning):
    assert Checkpoints(tmp_path, parts(), resume=word).resume is meaning


def test_resume_refuses_another_word(tmp_path):
    with pytest.raises(ValueError, match="resume must be true or false, got 'nearly'"):
        Checkpoints(tmp_path, parts(), resume="nearly")


def test_resume_without_checkpoints_starts_from_scratch(tmp_path, caplog):
    expected, _ = train(tmp_path / "one", epochs=2)
    found, _ = train(tmp_path / "two", epochs=2, resume=True)
    assert "training starts from scratch" in caplog.text
    assert_same(found["model"].state_dict(), expected["model"].state_dict())


def test_a_new_run_does_not_go_over_another_ones_checkpoints(tmp_path):
    train(tmp_path, epochs=2)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    with pytest.raises(FileExistsError, match=r"checkpoints already holds .* up to epoch 2: .*resume.* another run"):
        train(tmp_path, epochs=2)
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before


def truncate(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def empty(path):
    path.write_bytes(b"")


def garble(path):
    """Change one byte of one weight, which torch.load does not notice."""
    content = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["model"]["0.weight"].numpy().tobytes()
    content[content.index(weight) + 5] ^= 0xFF
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [truncate, empty, garble])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, caplog, damage):
    expected, _ = train(tmp_path / "whole", epochs=4)
    train(tmp_path / "damaged", epochs=3)
    damage(tmp_path / "damaged/checkpoints/epoch_0003.pt")
    found, _ = train(tmp_path / "damaged", epochs=4, resume=True, seed=9)
    assert any("epoch_0003.pt cannot be read" in record.message for record in caplog.records)
    assert any(
        "going on from" in record.message and "epoch_0002.pt: 2 of 4" in record.message for record in caplog.records
    )
    assert_same(found["model"].state_dict(), expected["model"].state_dict())
    assert names(tmp_path / "damaged") == ["epoch_0003.pt", "epoch_0004.pt"]


def test_does_not_start_from_scratch_when_no_checkpoint_can_be_read(tmp_path):
    train(tmp_path, epochs=3)
    for path in (tmp_path / "checkpoints").iterdir():
        truncate(path)
    with pytest.raises(RuntimeError, match=r"none of the checkpoints .* can be read \(epoch_0002.pt, epoch_0003.pt\)"):
        train(tmp_path, epochs=4, resume=True)


def test_a_left_over_temporary_file_is_removed(tmp_path, caplog):
    train(tmp_path, epochs=2)
    (tmp_path / "checkpoints/.tmp4711-epoch_0003.pt").write_bytes(b"half")
    train(tmp_path, epochs=3, resume=True)
    assert "removed .tmp4711-epoch_0003.pt" in caplog.text
    assert names(tmp_path) == ["epoch_0002.pt", "epoch_0003.pt"]


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    train(tmp_path, epochs=2)

    def fail(state, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        train(tmp_path, epochs=3, resume=True)
    assert names(tmp_path) == ["epoch_0001.pt", "epoch_0002.pt"]


@pytest.mark.parametrize("extra", [{"method": Value(1.0)}, {"method": Value(2.0), "best": Value(0.0)}])
def test_refuses_a_checkpoint_of_another_configuration(tmp_path, extra):
    train(tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"holds model, optimizer, and this run has .*method, model"):
        train(tmp_path, epochs=2, resume=True, extra=extra)


def test_refuses_a_network_that_does_not_fit(tmp_path):
    train(tmp_path, epochs=1)
    objects = parts()
    objects["model"] = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    with pytest.raises(RuntimeError, match=r"Missing key|size mismatch"):
        trainer(objects, [Checkpoints(tmp_path, objects, resume=True)], epochs=2).run()


def test_refuses_another_number_of_iterations_an_epoch(tmp_path):
    train(tmp_path, epochs=2)
    with pytest.raises(ValueError, match=r"after 4 iterations in 2 epochs, and this run has 3 an epoch"):
        train(tmp_path, epochs=3, resume=True, batches=3)


def test_notices_after_one_epoch_that_a_state_cannot_be_loaded(tmp_path):
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        train(tmp_path, epochs=5, extra={"method": Value(np.float64(1.0))})
    assert torch.load(tmp_path / "checkpoints/epoch_0001.pt", weights_only=False)["epoch"] == 1


def test_parts_that_are_switched_off_are_passed_over(tmp_path):
    train(tmp_path, epochs=1, extra={"classifiers": None})
    state = torch.load(tmp_path / "checkpoints/epoch_0001.pt", weights_only=True)
    assert "classifiers" not in state


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda module: torch.compile(module, backend="eager")])
def test_states_have_no_prefix_of_a_wrapper(tmp_path, wrap):
    module = nn.Linear(2, 1)
    checkpoints = Checkpoints(tmp_path, {"model": wrap(module)})
    assert checkpoints.objects["model"] is module
    assert unwrapped(nn.DataParallel(wrap(module))) is module


def test_saves_after_everything_else_and_loads_before(tmp_path):
    """Listed first, it sees what other handlers do at an epoch's end, even those that join at the start."""
    value = Value(0)
    seen = []

    class Late:
        def attach(self, engine):
            engine.add_event_handler(Events.STARTED, self.start)

        def start(self, engine):
            seen.append((engine.state.epoch, value.value))
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.count)

        def count(self, engine):
            value.value += 1

    def run(epochs, resume):
        objects = parts()
        checkpoints = Checkpoints(tmp_path, {**objects, "value": value}, resume=resume)
        trainer(objects, [checkpoints, Late()], epochs=epochs).run()

    run(2, resume=False)
    assert torch.load(tmp_path / "checkpoints/epoch_0002.pt", weights_only=True)["value"] == {"value": 2}
    value.value = 100
    run(3, resume=True)
    assert seen == [(0, 0), (2, 2)]
    assert torch.load(tmp_path / "checkpoints/epoch_0003.pt", weights_only=True)["value"] == {"value": 3}


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_the_loss_scale_is_resumed(tmp_path):
    class Scaled(SupervisedTrainer):
        def run(self):
            self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
            Workflow.run(self)  # the trainer's own run would make a scaler for CUDA

    def run(epochs, resume):
        objects = parts()
        engine = Scaled(
            device=torch.device("cpu"),
            max_epochs=epochs,
            train_data_loader=data(),
            network=objects["model"],
            optimizer=objects["optimizer"],
            loss_function=nn.MSELoss(),
            train_handlers=[Checkpoints(tmp_path, objects, resume=resume)],
            decollate=False,
            amp=True,
        )
        engine.run()
        return engine.scaler.state_dict()

    whole = run(2, resume=False)
    assert whole["scale"] == 128.0  # grew once in four steps
    assert run(2, resume=True) == whole


@pytest.mark.parametrize(
    ("objects", "keep", "message"),
    [
        ({}, 2, "nothing to save"),
        ({"model": None}, 2, "nothing to save"),
        ({"epoch": nn.Linear(1, 1)}, 2, "may not be named epoch"),
        ({"model": nn.Linear(1, 1)}, 0, "keep must be at least 1"),
    ],
)
def test_refuses_wrong_arguments(tmp_path, objects, keep, message):
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path, objects, keep=keep)


# ---------------------------------------------------------------------- two processes


def worker(rank, folder, epochs):
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{epochs}", rank=rank, world_size=2)
    objects = parts(seed=rank)  # DDP starts every rank from rank 0's weights, a checkpoint from its own
    objects["model"] = DistributedDataParallel(objects["model"])
    objects["optimizer"] = torch.optim.Adam(objects["model"].parameters(), lr=0.1)
    value = Value(10 * rank)
    checkpoints = Checkpoints(folder / "run", {**objects, "value": value}, resume=True)
    engine = trainer(objects, [checkpoints], epochs=epochs)
    seen = []
    engine.add_event_handler(Events.EPOCH_STARTED, lambda: seen.append((engine.state.epoch, value.value)))
    engine.run()
    torch.save({"seen": seen, "weights": objects["model"].module.state_dict()}, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_one_writes_both_load(tmp_path):
    mp.spawn(worker, args=(tmp_path, 2), nprocs=2)
    state = torch.load(tmp_path / "run/checkpoints/epoch_0002.pt", weights_only=True)
    assert not any(key.startswith("module.") for key in state["model"])
    assert state["value"] == {"value": 0}
    truncate(tmp_path / "run/checkpoints/epoch_0002.pt")
    mp.spawn(worker, args=(tmp_path, 3), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ranks[0]["seen"] == ranks[1]["seen"] == [(2, 0), (3, 0)]
    assert names(tmp_path / "run") == ["epoch_0002.pt", "epoch_0003.pt"]


# ---------------------------------------------------------------------- best model


def validated(best, values, start=1):
    """Run the evaluator once an epoch with the key metric set to each value."""
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"), val_data_loader=data(1), network=nn.Identity(), decollate=False
    )
    evaluator.state.key_metric_name = "dice"
    current = {}
    evaluator.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.state.metrics.update(current))
    best.attach(evaluator)
    for epoch, value in enumerate(values, start=start):
        current["dice"] = value
        with torch.no_grad():
            best.parts["model"].weight.fill_(epoch)
        evaluator.run(epoch)


def test_best_model_keeps_the_best_epochs_weights(tmp_path):
    network, classifiers = nn.Linear(2, 1), nn.Linear(3, 1)
    best = BestModel(tmp_path, nn.DataParallel(network), classifiers)
    validated(best, [0.2, 0.5, 0.5, float("nan"), 0.4])
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert set(state) == {"model", "classifiers", "epoch"}
    assert (best.best, best.epoch, state["epoch"]) == (0.5, 2, 2)
    assert torch.equal(state["model"]["weight"], torch.full((1, 2), 2.0))
    assert_same(state["classifiers"], classifiers.state_dict())
    validated(best, [0.6], start=6)
    assert torch.load(tmp_path / "model.pt", weights_only=True)["epoch"] == 6
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_best_model_remembers_what_it_has_to_beat(tmp_path):
    first = BestModel(tmp_path, nn.Linear(2, 1))
    validated(first, [0.5])
    resumed = BestModel(tmp_path, nn.Linear(2, 1))
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    validated(resumed, [0.4], start=2)
    assert torch.load(tmp_path / "model.pt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("worst", [-3.5, 0.0])
def test_the_first_result_is_kept_however_bad(tmp_path, worst):
    best = BestModel(tmp_path, nn.Linear(2, 1))
    validated(best, [worst])
    assert best.state_dict() == {"best": worst, "epoch": 1}
    assert (tmp_path / "model.pt").is_file()


def test_a_result_that_is_no_number_is_reported(tmp_path, caplog):
    best = BestModel(tmp_path, nn.Linear(2, 1))
    validated(best, [math.nan])
    assert "dice is not a number in epoch 1" in caplog.text
    assert not (tmp_path / "model.pt").exists()


def test_best_model_names_a_missing_metric(tmp_path):
    with pytest.raises(ValueError, match="no metric 'fusion_dice_mean'; it has dice"):
        validated(BestModel(tmp_path, nn.Linear(2, 1), metric="fusion_dice_mean"), [0.5])


def test_monai_and_ignite_load_the_best_model_strictly(tmp_path):
    network = nn.Linear(2, 1)
    validated(BestModel(tmp_path, network, nn.Linear(3, 1)), [0.5])
    by_ignite, by_monai = nn.Linear(2, 1), nn.Linear(2, 1)
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    Checkpoint.load_objects(to_load={"model": by_ignite}, checkpoint=state)
    loader = CheckpointLoader(str(tmp_path / "model.pt"), {"model": by_monai}, map_location="cpu", strict=True)
    evaluator = SupervisedEvaluator(device=torch.device("cpu"), val_data_loader=data(1), network=by_monai)
    loader(evaluator)
    for loaded in (by_ignite, by_monai):
        assert_same(loaded.state_dict(), network.state_dict())
