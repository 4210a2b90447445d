# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: the machine they ran on, a device and its clock."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer


def check_device(device: str) -> None:
    """Refuse a device that is none, or not there."""
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("PyTorch sees no GPU: use --device cpu")


def machine(device: str = "cpu") -> dict[str, Any]:
    """What numbers depend on. Read it before the measurement: the load is to be that of others.

    A load near the number of cores makes wall-clock times preliminary.
    """
    facts = {
        "processor": processor(device),
        "device": device,
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_gib": memory_gib(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        facts |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        }
    return facts


def processor(device: str) -> str:
    """Name what is timed."""
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name; Python's own is empty on most Linux systems."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gib() -> float | None:
    """The machine's memory; None where the system does not tell."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def counts_cpu_time(device: str) -> bool:
    """CPU time is what one thread costs; of several it would add up what they do at the same time."""
    return device == "cpu" and torch.get_num_threads() == 1


def clock_name(device: str) -> str:
    """Name what :func:`clock_of` shows, for tables and files of numbers."""
    return "CPU time" if counts_cpu_time(device) else "wall time"


def clock_of(device: str) -> Callable[[], float]:
    """Return a clock in seconds: CPU time of this process, or wall-clock time once the device has done its work."""
    if counts_cpu_time(device):
        return time.process_time
    if device == "cpu":
        return time.perf_counter

    def when_done() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return when_done
