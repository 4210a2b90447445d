# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that a killed run goes on from, and the weights of the best epoch."""

from __future__ import annotations

import logging
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.engines import Evaluator, Trainer
from monai.utils.misc import str2bool
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from monai_cggm.files import atomic_path

logger = logging.getLogger(__name__)

_PATTERN = "epoch_*.pt"
_OWN_KEYS = ("epoch", "iteration", "scaler")


class Stateful(Protocol):
    """What can be put into a checkpoint: modules, optimizers, schedules, methods."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return tensors and plain values."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Go back to what :meth:`state_dict` returned."""


class Checkpoints:
    """Save everything that training goes on from at the end of each epoch, and load it again.

    A checkpoint ``run_dir/checkpoints/epoch_0007.pt`` holds ``epoch``, ``iteration``, the state of each of ``objects``
    under its name, and that of the gradient scaler where mixed precision is on. It is written to a temporary name,
    forced to the disk and renamed: a run that is killed leaves whole checkpoints only. It loads with
    ``torch.load(..., weights_only=True)``.

    List it first among the trainer's handlers. It then loads before any of them starts; and it saves after all that
    the other handlers do at the end of an epoch (validation, the schedule's step, the log), wherever they are listed,
    because it asks for that event last. Under several processes the first one writes and all of them load.

    Resuming goes on after the newest checkpoint that can be read; one that cannot is reported by name. A run that was
    already complete ends at once; with a larger ``max_epochs`` it is extended.

    Args:
        run_dir: the run's folder; under several machines one that all of them see.
        objects: what to save, by name: the network as ``model``, ``classifiers``, ``optimizer``, ``scheduler``, the
            balancing method, :class:`BestModel`. ``None`` (a part that is switched off) is passed over. Modules may be
            wrapped for several processes; their states are saved without the wrapper's prefix.
        keep: how many of the newest checkpoints to keep.
        resume: go on from the newest checkpoint; words such as "true" and "false" will do. Without a checkpoint,
            training starts from scratch and says so.

    Raises:
        ValueError: for no objects, a name that is taken, ``keep`` below 1, another word for ``resume``; when training
            starts, where a checkpoint has other parts or another number of iterations an epoch than this run.
        FileExistsError: when training starts, where ``resume`` is False and the folder already holds checkpoints.
        RuntimeError: when training starts, where there are checkpoints and none can be read.

    Example:
        >>> network = nn.Linear(2, 1)
        >>> checkpoints = Checkpoints("runs/one", {"model": network, "classifiers": None}, resume=True)
        >>> sorted(checkpoints.objects)
        ['model']
    """

    def __init__(
        self, run_dir: str | Path, objects: Mapping[str, Stateful | None], *, keep: int = 2, resume: bool | str = False
    ) -> None:
        self.folder = Path(run_dir) / "checkpoints"
        self.objects = {name: unwrapped(item) for name, item in objects.items() if item is not None}
        self.keep = keep
        self.resume = _is_true(resume)
        self._loads_back = False
        if not self.objects:
            raise ValueError("objects is empty: there is nothing to save")
        taken = sorted(set(self.objects) & set(_OWN_KEYS))
        if taken:
            raise ValueError(f"objects may not be named {', '.join(taken)}: checkpoints use {', '.join(_OWN_KEYS)}")
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")

    def attach(self, engine: Trainer) -> None:
        """Attach to a trainer, before all other handlers."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_STARTED, self._come_last)

    def paths(self) -> list[Path]:
        """Return the checkpoints that are there, the oldest first."""
        return sorted(self.folder.glob(_PATTERN), key=_epoch_of)

    def check_folder(self) -> None:
        """Refuse to begin a new run over another one's checkpoints; training does this when it starts.

        Raises:
            FileExistsError: where ``resume`` is False and the folder holds checkpoints.
        """
        found = self.paths()
        if found and not self.resume:
            raise FileExistsError(
                f"{self.folder} already holds checkpoints of a run, up to epoch {_epoch_of(found[-1])}: go on from "
                f"there with resume=true (--resume true), or choose another run folder, so that nothing is lost"
            )

    # ------------------------------------------------------------------ loading

    def _start(self, engine: Trainer) -> None:
        self.check_folder()
        if not self.resume:
            return
        if idist.get_rank() == 0:
            for left_over in self.folder.glob(f".tmp*-{_PATTERN}"):
                _say(f"removed {left_over.name}, which a killed run left half-written")
                left_over.unlink(missing_ok=True)
        path = self._newest_readable()
        if path is None:
            _say(f"there is no checkpoint in {self.folder}: training starts from scratch")
            return
        self._load(engine, path)
        done, epochs = engine.state.epoch, engine.state.max_epochs
        if done >= epochs:
            _say(f"{path} is complete: {done} epochs are done, and {epochs} are asked for; nothing is left to train")
        else:
            _say(f"going on from {path}: {done} of {epochs} epochs are done")

    def _newest_readable(self) -> Path | None:
        chosen = ""
        # one process chooses, so that all of them load the same file
        if idist.get_rank() == 0:
            chosen = next((path.name for path in reversed(self.paths()) if _readable(path)), "")
        if idist.get_world_size() > 1:
            chosen = str(idist.broadcast(chosen, src=0, safe_mode=True))
        if not chosen and self.paths():
            raise RuntimeError(
                f"none of the checkpoints in {self.folder} can be read ({', '.join(p.name for p in self.paths())}): "
                "restore one from a copy, or choose another run folder to start from scratch"
            )
        return self.folder / chosen if chosen else None

    def _load(self, engine: Trainer, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        parts = set(state) - set(_OWN_KEYS)
        if parts != set(self.objects):
            raise ValueError(
                f"{path} holds {', '.join(sorted(parts))}, and this run has {', '.join(sorted(self.objects))}: it was "
                "written by a run of another configuration"
            )
        if state["iteration"] != state["epoch"] * engine.state.epoch_length:
            raise ValueError(
                f"{path} was written after {state['iteration']} iterations in {state['epoch']} epochs, and this run "
                f"has {engine.state.epoch_length} an epoch: the cases, batch size or processes are not the same"
            )
        for name, item in self.objects.items():
            item.load_state_dict(state[name])
        if engine.scaler is not None and "scaler" in state:
            engine.scaler.load_state_dict(state["scaler"])
        engine.state.epoch, engine.state.iteration = state["epoch"], state["iteration"]

    # ------------------------------------------------------------------ saving

    def _come_last(self, engine: Trainer) -> None:
        # Handlers of an event run in the order in which they were added, and by now all others have been.
        if not engine.has_event_handler(self._save, Events.EPOCH_COMPLETED):
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)

    def _save(self, engine: Trainer) -> None:
        if idist.get_rank() != 0:
            return
        state: dict[str, Any] = {"epoch": engine.state.epoch, "iteration": engine.state.iteration}
        state.update({name: item.state_dict() for name, item in self.objects.items()})
        if engine.scaler is not None:
            state["scaler"] = engine.scaler.state_dict()
        path = self.folder / f"epoch_{engine.state.epoch:04d}.pt"
        save_atomically(state, path)
        self._check_loads_back(path)
        for old in self.paths()[: -self.keep]:
            old.unlink(missing_ok=True)

    def _check_loads_back(self, path: Path) -> None:
        """Notice after the first epoch, and not after a crash weeks later, that some state cannot be loaded."""
        if not self._loads_back:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            self._loads_back = True


class BestModel:
    """Write the weights of the epoch with the best validation result to ``run_dir/model.pt``.

    The file holds the network's state under ``model``, the classifiers' under ``classifiers`` if they are given, and
    ``epoch``; tensors are on the CPU. It appears whole or not at all. Put this object into :class:`Checkpoints` too
    (as ``best``), so that a resumed run knows what it has to beat.

    Args:
        run_dir: the run's folder.
        network: the network.
        classifiers: unimodal classifiers, or None.
        metric: name of the validation metric, where larger is better; default: the evaluator's key metric.

    Attributes:
        best: the best value so far, ``-inf`` before the first.
        epoch: its epoch, 0 before the first.

    Example:
        >>> best = BestModel("runs/one", nn.Linear(2, 1))
        >>> best.state_dict()
        {'best': -inf, 'epoch': 0}
    """

    def __init__(
        self,
        run_dir: str | Path,
        network: nn.Module,
        classifiers: nn.Module | None = None,
        *,
        metric: str | None = None,
    ) -> None:
        self.path = Path(run_dir) / "model.pt"
        parts = {"model": network, "classifiers": classifiers}
        self.parts: dict[str, nn.Module] = {name: unwrapped(part) for name, part in parts.items() if part is not None}
        self.metric = metric
        self.best = -math.inf
        self.epoch = 0

    def attach(self, engine: Evaluator) -> None:
        """Attach to the evaluator that validates."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Evaluator) -> None:
        """Save the weights if the validation that has just ended is the best so far."""
        name = self.metric or engine.state.key_metric_name
        if name not in engine.state.metrics:
            raise ValueError(f"validation has no metric {name!r}; it has {', '.join(engine.state.metrics) or 'none'}")
        value = float(engine.state.metrics[name])
        if math.isnan(value):
            logger.warning(f"validation metric {name} is not a number in epoch {engine.state.epoch}: no model is kept")
        if not value > self.best:
            return
        self.best, self.epoch = value, int(engine.state.epoch)
        if idist.get_rank() == 0:
            state = {name: _on_cpu(part.state_dict()) for name, part in self.parts.items()}
            save_atomically({**state, "epoch": self.epoch}, self.path)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and its epoch."""
        return {"best": self.best, "epoch": self.epoch}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.best, self.epoch = float(state_dict["best"]), int(state_dict["epoch"])


def save_atomically(state: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint so that ``path`` is whole, or what it was before, even if the machine loses its power."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    if os.name == "posix":  # the new name is in the folder, which is forced to the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def unwrapped(item: Any) -> Any:
    """Return the module inside a wrapper for several processes or for ``torch.compile``; anything else as it is."""
    if isinstance(item, (DistributedDataParallel, DataParallel)):
        return unwrapped(item.module)
    return getattr(item, "_orig_mod", item)


def _is_true(resume: bool | str) -> bool:
    # a bundle's command line hands on "true" and "false" as words, and any word would be true
    try:
        return bool(str2bool(resume))
    except ValueError:
        raise ValueError(f"resume must be true or false, got {resume!r}") from None


def _say(message: str) -> None:
    # a warning, because it must be seen where nobody has set up logging
    if idist.get_rank() == 0:
        logger.warning(message)


def _epoch_of(path: Path) -> int:
    digits = path.stem.removeprefix("epoch_")
    return int(digits) if digits.isdecimal() else -1


def _readable(path: Path) -> bool:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums that torch.save writes
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} does not fit its checksum")
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        logger.warning(f"checkpoint {path} cannot be read and is passed over, the one before it is tried: {reason}")
        return False
    if not isinstance(state, dict) or not {"epoch", "iteration"} <= set(state):
        logger.warning(f"{path} is not a checkpoint of a run: expected the keys epoch and iteration")
        return False
    return True


def _on_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
