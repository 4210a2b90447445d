# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of training steps share: a device, its name and its clock."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import torch
import typer


def check_device(device: str) -> None:
    """Refuse a device that is none, or not there."""
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("PyTorch sees no GPU: use --device cpu")


def processor(device: str) -> str:
    """Name what steps are timed on."""
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()


def clock_of(device: str) -> Callable[[], float]:
    """Return a clock in seconds: CPU time of this process, or wall-clock time once the GPU has done its work."""
    if device == "cpu":
        return time.process_time

    def when_done() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return when_done
