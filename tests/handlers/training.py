# SPDX-License-Identifier: Apache-2.0
"""A whole training run in miniature: MONAI's engines, CGGM, random slices, dropout, batch norm, all handlers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from pathlib import Path

import numpy as np
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler, MeanDice, ValidationHandler, from_engine
from monai.transforms import AsDiscreted, Compose, RandGaussianNoised
from torch import nn

from monai_cggm.data import EpochSampler, SliceDataset
from monai_cggm.handlers import (
    BestModel,
    Checkpoints,
    ClipGradients,
    EpochSeed,
    Progress,
    RunInfo,
    RunLog,
    ValidationImages,
)
from monai_cggm.methods import CGGM
from monai_cggm.metrics import RegionDice
from monai_cggm.schedules import warmup_cosine
from monai_cggm.transforms import RandSlicesd, TumourSlicesd
from tests.methods import toy

CASES, BATCHES, EPOCHS = 6, 3, 3
SEED = 7


def volumes(number: int, seed: int) -> list[dict]:
    random = np.random.default_rng(seed)
    items = []
    for i in range(number):
        label = torch.from_numpy(random.integers(0, 4, (1, 8, 8, 6), dtype=np.uint8))
        image = torch.from_numpy(random.normal(size=(4, 8, 8, 6)).astype(np.float32)) + label
        items.append(TumourSlicesd()({"image": image, "label": label, "case": f"Phantom_{i:03d}"}))
    return items


def network() -> nn.Module:
    torch.manual_seed(SEED)
    net = toy.ToyNetwork()
    net.trunk.extend([nn.BatchNorm2d(5), nn.Dropout(0.3)])
    return net


def evaluator(net: nn.Module, handlers=()) -> SupervisedEvaluator:
    data = [{"image": v["image"][..., 2], "label": v["label"][..., 2]} for v in volumes(2, seed=2)]
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(data, batch_size=1, num_workers=0),
        network=net,
        postprocessing=AsDiscreted(["pred", "label"], argmax=[True, False], to_onehot=4),
        key_val_metric={"fusion_dice_mean": MeanDice(False, output_transform=from_engine(["pred", "label"]))},
        val_handlers=list(handlers),
    )


def build(run_dir: Path, *, epochs=EPOCHS, planned=EPOCHS, workers=0, resume=False, extra=(), cases=CASES):
    """Return a trainer as a bundle would make it."""
    net = network()
    classifiers = toy.ToyClassifiers(dropout=0.2)
    optimizer = torch.optim.SGD(
        [
            {"params": net.parameters(), "lr": 1e-2, "name": "network"},
            {"params": classifiers.parameters(), "lr": 6e-3, "name": "classifiers"},
        ],
        momentum=0.9,
        weight_decay=3e-4,
    )
    schedule = warmup_cosine(optimizer, epochs=planned, warmup_epochs=1)
    method = CGGM(net, classifiers, RegionDice({"WT": [1, 2, 3], "ET": [3]}, 4), rho=1.2, lam=0.1)
    data = SliceDataset(
        volumes(cases, seed=1),
        Compose([RandSlicesd(["image", "label"], num_slices=2), RandGaussianNoised("image", prob=0.5)]),
        seed=SEED,
    )
    sampler = EpochSampler(data, seed=SEED)
    best = BestModel(run_dir, net, classifiers)
    validator = evaluator(net, [best])
    log = RunLog(run_dir, validator=validator, modalities=toy.MODALITIES, balance_line=0.9)
    objects = {
        "model": net,
        "classifiers": classifiers,
        "optimizer": optimizer,
        "scheduler": schedule,
        "method": method,
        "best": best,
    }
    return SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=DataLoader(
            data, batch_size=2, sampler=sampler, num_workers=workers, drop_last=True, persistent_workers=workers > 0
        ),
        network=net,
        optimizer=optimizer,
        loss_function=toy.cross_entropy,
        optim_set_to_none=True,
        train_handlers=[
            Checkpoints(run_dir, objects, resume=resume),
            RunInfo(run_dir, config={"rho": 1.2, "lam": 0.1, "modalities": list(toy.MODALITIES)}),
            EpochSeed(sampler, SEED),
            method,
            ClipGradients([net, classifiers], 1.0),
            ValidationHandler(1, validator),
            LrScheduleHandler(schedule, print_lr=False),
            log,
            ValidationImages(log, validator, modalities=toy.MODALITIES, every=2),
            Progress(validator),
            *(make(validator) for make in extra),
        ],
    )


# ---------------------------------------------------------------------- killing it


class KillAt:
    """End this process with SIGKILL at a moment such as ``iteration 5``, ``validation 2``, ``save 2``, ``saved 2``."""

    def __init__(self, moment: str, validator: SupervisedEvaluator) -> None:
        self.event, number = moment.split()
        self.number = int(number)
        self.validator = validator

    def attach(self, engine: SupervisedTrainer) -> None:
        if self.event == "iteration":
            engine.add_event_handler(Events.ITERATION_COMPLETED(once=self.number), _kill)
        elif self.event == "validation":
            self.validator.add_event_handler(Events.ITERATION_COMPLETED(once=2), self._in_validation, engine)
        else:
            engine.add_event_handler(Events.EPOCH_STARTED(once=self.number), self._spoil_save)

    def _in_validation(self, validator, trainer) -> None:
        if trainer.state.epoch == self.number:
            _kill()

    def _spoil_save(self) -> None:
        save = torch.save

        def killed(state, file):
            save(state, file)
            if "iteration" in state:  # a checkpoint; model.pt, during validation, has none
                if self.event == "save":
                    file.truncate(file.tell() // 2)
                _kill()

        torch.save = killed


def _kill(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _run(run_dir: Path, options: dict, moment: str | None) -> None:
    # for the loader's workers: processes of a fork server would not notice that this one is killed
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    extra = [] if moment is None else [lambda validator: KillAt(moment, validator)]
    build(run_dir, extra=extra, **options).run()


def run(run_dir: Path, *, kill_at: str | None = None, **options) -> int:
    """Train in a process of its own; return its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_run, args=(run_dir, options, kill_at))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"training did not end: {run_dir}, {options}, {kill_at}")
    return process.exitcode
