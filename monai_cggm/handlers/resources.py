# SPDX-License-Identifier: Apache-2.0
"""What a training cost: time, memory, parameters."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch import nn

from monai_cggm.files import atomic_path


class Resources:
    """Write ``run_dir/resources.json`` after every epoch, on rank 0.

    ``training_seconds`` from the first iteration on, validations included, over all starts of a resumed run;
    ``peak_memory_mb`` (2²⁰ bytes): on a GPU the most that PyTorch had allocated, on a CPU the most that the whole
    process held, data and libraries included; ``parameters`` of the network and ``classifier_parameters``; ``device``
    and ``threads``.

    Args:
        run_dir: the run's folder.
        modules: ``model`` and, if there are any, ``classifiers``.

    Example:
        >>> Resources("runs/one", {"model": nn.Linear(2, 1)}).parameters
        {'parameters': 3, 'classifier_parameters': 0}
    """

    def __init__(self, run_dir: str | Path, modules: Mapping[str, nn.Module]) -> None:
        self.path = Path(run_dir) / "resources.json"
        sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
        self.parameters = {"parameters": sizes["model"], "classifier_parameters": sizes.get("classifiers", 0)}
        self._start = 0.0
        self._before = 0.0

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def _begin(self, engine: Engine) -> None:
        self._start = time.perf_counter()
        # a run that goes on from a checkpoint adds to what it took before
        self._before = _seconds_in(self.path) if engine.state.epoch else 0.0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def _write(self, engine: Engine) -> None:
        if idist.get_rank() != 0:
            return
        facts: dict[str, Any] = {
            "training_seconds": round(self._before + time.perf_counter() - self._start, 1),
            "peak_memory_mb": round(_peak_memory_mb(), 1),
            **self.parameters,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
        }
        with atomic_path(self.path) as temporary:
            temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _seconds_in(path: Path) -> float:
    return float(json.loads(path.read_text(encoding="utf-8"))["training_seconds"]) if path.is_file() else 0.0


def _peak_memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows has no such count
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
