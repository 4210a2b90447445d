# SPDX-License-Identifier: Apache-2.0
import csv
import math
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ignite.engine import Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.handlers import LrScheduleHandler, ValidationHandler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import nn

from monai_cggm.handlers import RunLog
from monai_cggm.handlers.run_log import chart_layout

BATCHES = 2


def scalars_of(iteration):
    """What a method of two modalities might measure, recognisable by its iteration."""
    return {
        "loss/task": 10.0 + iteration,
        "loss/flair": 0.1 * iteration,
        "loss/t1": 1 / 3 + iteration,
        "epsilon/flair": iteration / 7,
        "epsilon/t1": math.nan if iteration == 1 else -iteration,
        "balance/flair": 1.0,
        "balance/t1": 0.2,
    }


class Resume:
    """Stands for Checkpoints: sets where the run goes on."""

    def __init__(self, epoch):
        self.epoch = epoch

    def attach(self, engine):
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine):
        engine.state.epoch, engine.state.iteration = self.epoch, self.epoch * engine.state.epoch_length


class Method:
    def __init__(self, scalars=scalars_of):
        self.scalars = scalars

    def attach(self, engine):
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self)

    def __call__(self, engine):
        engine.state.scalars = self.scalars(engine.state.iteration)


def validator():
    engine = SupervisedEvaluator(
        device=torch.device("cpu"), val_data_loader=data(1), network=nn.Identity(), decollate=False
    )

    def measure(engine):
        step = engine.state.epoch
        engine.state.metrics.update(
            {"fusion_dice_mean": 0.1 * step, "flair_dice_WT": torch.tensor(0.5), "loss": 2.0, "cases": ["a"]}
        )

    engine.add_event_handler(Events.EPOCH_COMPLETED, measure)
    return engine


def data(batches):
    return [{"image": torch.ones(2, 3) * (i + 1), "label": torch.zeros(2, 1)} for i in range(batches)]


def train(run_dir, *, epochs=3, start=0, method=None, interval=1, decollate=False):
    torch.manual_seed(0)
    network = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(
        [
            {"params": network.weight, "lr": 0.25, "name": "network"},
            {"params": network.bias, "lr": 0.5},
        ]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5 ** (epoch + start))
    evaluator = validator()
    log = RunLog(run_dir, validator=evaluator, modalities=["flair", "t1"], balance_line=0.6)
    losses = []
    engine = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=data(BATCHES),
        network=network,
        optimizer=optimizer,
        loss_function=nn.MSELoss(),
        decollate=decollate,
        train_handlers=[
            Resume(start),
            Method() if method is None else method,
            log,  # its order among these makes no difference
            LrScheduleHandler(schedule, print_lr=False),
            ValidationHandler(interval, evaluator),
        ],
    )
    engine.add_event_handler(IterationEvents.LOSS_COMPLETED, lambda e: losses.append(e.state.output["loss"].item()))
    engine.run()
    assert log.writer is None
    return losses


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def events(run_dir):
    return EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def curve(accumulated, tag):
    return [(event.step, event.value) for event in accumulated.Scalars(tag)]


@pytest.mark.parametrize("decollate", [False, True])
def test_iterations(tmp_path, decollate):
    losses = train(tmp_path, decollate=decollate)
    rows = table(tmp_path / "iterations.csv")
    assert [(row["epoch"], row["iteration"]) for row in rows] == [
        (str(1 + i // BATCHES), str(i + 1)) for i in range(3 * BATCHES)
    ]
    assert [float(row["train/loss"]) for row in rows] == losses
    for i, row in enumerate(rows, start=1):
        for tag, value in scalars_of(i).items():
            assert float(row[tag]) == value or (math.isnan(float(row[tag])) and math.isnan(value))
        assert float(row["learning_rate/network"]) == 0.25 * 0.5 ** ((i - 1) // BATCHES)
        assert float(row["learning_rate/group_1"]) == 0.5 * 0.5 ** ((i - 1) // BATCHES)
    assert not any("time" in column for column in rows[0])


def test_epochs(tmp_path):
    losses = train(tmp_path)
    rows = table(tmp_path / "epochs.csv")
    assert [(row["epoch"], row["iteration"]) for row in rows] == [("1", "2"), ("2", "4"), ("3", "6")]
    for epoch, row in enumerate(rows, start=1):
        first, second = (scalars_of(2 * epoch - 1), scalars_of(2 * epoch))
        assert float(row["train/epoch_loss"]) == pytest.approx(sum(losses[2 * epoch - 2 : 2 * epoch]) / 2)
        assert float(row["loss/t1"]) == pytest.approx((first["loss/t1"] + second["loss/t1"]) / 2)
        assert float(row["learning_rate/network"]) == 0.25 * 0.5 ** (epoch - 1)  # the epoch's own, not the next one's
        assert float(row["validation/fusion_dice_mean"]) == 0.1 * epoch
        assert float(row["validation/flair_dice_WT"]) == 0.5
    assert float(rows[0]["epsilon/t1"]) == -2.0  # the mean of what is a number
    assert "validation/cases" not in rows[0]


def test_epochs_without_validation_have_empty_cells(tmp_path):
    train(tmp_path, epochs=4, interval=2)
    rows = table(tmp_path / "epochs.csv")
    assert [row["validation/loss"] for row in rows] == ["", "2.0", "", "2.0"]


def test_tensorboard_has_the_same_numbers_on_one_axis(tmp_path):
    losses = train(tmp_path)
    found = events(tmp_path)
    assert curve(found, "train/loss") == [(i, pytest.approx(v)) for i, v in enumerate(losses, start=1)]
    assert [step for step, _ in curve(found, "train/epoch_loss")] == [2, 4, 6]
    assert curve(found, "validation/fusion_dice_mean") == [(2 * e, pytest.approx(0.1 * e)) for e in (1, 2, 3)]
    assert curve(found, "epsilon/flair") == [(i, pytest.approx(i / 7)) for i in range(1, 7)]
    assert curve(found, "balance/mean") == [(step, pytest.approx(0.6)) for step in (1, 2, 4, 6)]
    assert curve(found, "learning_rate/network") == [(2, 0.25), (4, 0.125), (6, 0.0625)]
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def layout_of(accumulated):
    layout = layout_pb2.Layout()
    (event,) = accumulated.Tensors("custom_scalars__config__")
    layout.ParseFromString(event.tensor_proto.string_val[0])
    return {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in layout.category
    }


def test_the_modalities_curves_share_charts(tmp_path):
    train(tmp_path)
    layout = layout_of(events(tmp_path))
    modalities = layout["Modalities"]
    assert modalities["balance term B"] == ["balance/flair$", "balance/t1$", "balance/mean$"]
    assert modalities["ε of each modality's classifier"] == ["epsilon/flair$", "epsilon/t1$"]
    assert not any("cosine" in title for title in modalities)  # this method measures none
    validation = layout["Validation Dice"]
    assert validation["fusion"] == [f"validation/fusion_dice_{r}$" for r in ("WT", "TC", "ET", "mean")]
    assert [f"validation/{p}_dice_ET$" for p in ("fusion", "flair", "t1")] in validation.values()


def test_joint_training_has_no_empty_charts():
    layout = chart_layout(["train/loss"], ["flair", "t1"])
    assert set(layout) == {"Loss", "Validation Dice"}
    assert set(layout["Validation Dice"]) == {"fusion"}


def test_scores_of_another_task_have_charts_of_their_own():
    layout = chart_layout(["epsilon/audio"], ["audio", "text"], ["f1", "accuracy"], "scores")
    charts = layout["Validation scores"]
    assert charts["fusion"] == ["Multiline", ["validation/fusion_f1$", "validation/fusion_accuracy$"]]
    predictors = ("fusion", "audio", "text")
    expected = [f"validation/{predictor}_accuracy$" for predictor in predictors]
    assert charts["fusion and each modality's classifier, accuracy"] == ["Multiline", expected]
    assert "Validation Dice" not in layout


def test_a_run_without_method_and_validation(tmp_path):
    train(tmp_path, method=Method(lambda iteration: {}), interval=100)
    assert list(table(tmp_path / "iterations.csv")[0]) == [
        "epoch",
        "iteration",
        "train/loss",
        "learning_rate/network",
        "learning_rate/group_1",
    ]
    assert "balance/mean" not in events(tmp_path).Tags()["scalars"]


def next_second():
    """Event files are read in the order of their names, which begin with the second in which they were made.

    Two files of one process and second go by a counter without leading zeros, so that the tenth comes before the ninth.
    """
    now = int(time.time())
    while int(time.time()) == now:
        time.sleep(0.01)


@pytest.mark.parametrize("stopped", [1, 2])
@pytest.mark.parametrize("half", ["", "3,5,0.1", "3,"])
def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path, stopped, half):
    """The first start got beyond the epoch that the second goes on from, and its last row may be cut off."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(whole, epochs=3)
    train(resumed, epochs=2)
    with (resumed / "iterations.csv").open("a") as file:
        file.write(half)
    next_second()
    train(resumed, epochs=3, start=stopped)
    # the toy network itself is not resumed, so the loss is not compared
    for name in ("iterations.csv", "epochs.csv"):
        expected, found = table(whole / name), table(resumed / name)
        for row in (*expected, *found):
            row.pop("train/loss", None)
            row.pop("train/epoch_loss", None)
        assert found == expected
    accumulated = events(resumed)
    for tag in ("epsilon/flair", "validation/fusion_dice_mean", "learning_rate/network", "balance/mean"):
        assert curve(accumulated, tag) == curve(events(whole), tag), tag
    assert [step for step, _ in curve(accumulated, "train/loss")] == list(range(1, 7))


def test_a_new_run_hides_what_a_killed_one_left(tmp_path):
    train(tmp_path, epochs=3)
    train(tmp_path, epochs=1)
    assert [row["iteration"] for row in table(tmp_path / "iterations.csv")] == ["1", "2"]
    assert [row["epoch"] for row in table(tmp_path / "epochs.csv")] == ["1"]
    assert [step for step, _ in curve(events(tmp_path), "train/loss")] == [1, 2]


def test_says_when_rows_are_missing(tmp_path, caplog):
    train(tmp_path, epochs=2)
    path = tmp_path / "iterations.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    train(tmp_path, epochs=3, start=2)
    assert "iterations.csv has 2 of the 4 rows" in caplog.text


def test_columns_are_those_of_the_first_row(tmp_path, caplog):
    def scalars(iteration):
        return {"loss/task": 1.0} if iteration == 1 else {"cosine/flair": 0.5}

    train(tmp_path, method=Method(scalars), epochs=1)
    rows = table(tmp_path / "iterations.csv")
    assert [row["loss/task"] for row in rows] == ["1.0", ""]
    assert "cosine/flair" not in rows[0]
    assert caplog.text.count("was begun without cosine/flair") == 1
    assert curve(events(tmp_path), "cosine/flair") == [(2, 0.5)]
    assert table(tmp_path / "epochs.csv")[0]["cosine/flair"] == "0.5"


def test_each_row_is_in_the_file_before_the_next_iteration(tmp_path):
    lines = []

    class Look(Method):
        def __call__(self, engine):
            super().__call__(engine)
            path = tmp_path / "iterations.csv"
            lines.append(len(path.read_text().splitlines()))

    train(tmp_path, method=Look(), epochs=2)
    assert lines == [0, 2, 3, 4]


def test_hyperparameters(tmp_path):
    (tmp_path / "config.yaml").write_text("rho: 1.2\nmodalities: [flair, t1]\namp: false\nnet: {width: 3}\nx: $1 + 1\n")
    train(tmp_path)
    found = events(tmp_path)
    start = found.summary_metadata[hparams_metadata.SESSION_START_INFO_TAG]
    content = plugin_data_pb2.HParamsPluginData.FromString(start.plugin_data.content)
    values = content.session_start_info.hparams
    assert {name: value.WhichOneof("kind") for name, value in values.items()} == {
        "rho": "number_value",
        "modalities": "string_value",
        "amp": "string_value",
    }
    assert values["rho"].number_value == 1.2
    assert values["modalities"].string_value == "flair, t1"
    assert hparams_metadata.SESSION_END_INFO_TAG in found.summary_metadata
    (text,) = found.Tensors("config/text_summary")
    assert b"    rho: 1.2\n" in text.tensor_proto.string_val[0]
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    losses = train(folder / "run", epochs=2, method=Method(lambda iteration: {"loss/task": 10.0 * rank + iteration}))
    torch.save(losses, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_log_their_mean_once(tmp_path):
    mp.spawn(worker, args=(tmp_path,), nprocs=2)
    rows = table(tmp_path / "run/iterations.csv")
    assert [float(row["loss/task"]) for row in rows] == [5.0 + i for i in range(1, 5)]
    losses = torch.tensor([torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)])
    assert [float(row["train/loss"]) for row in rows] == pytest.approx(losses.mean(dim=0).tolist())
    assert len(list((tmp_path / "run").glob("events.out.tfevents.*"))) == 1
