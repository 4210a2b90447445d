# SPDX-License-Identifier: Apache-2.0
"""Run the BraTS bundle at a size that takes seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigWorkflow
from monai.data import set_track_meta

from monai_cggm.resources import share_path

BUNDLE = share_path("bundles/brats_cggm/configs")
CONFIGS = share_path("configs")

#: networks and volumes as small as they can be
TINY: dict[str, Any] = {
    "encoder": {"backbone": "resnet18", "output_stride": 16, "aspp_channels": 8, "width": 4, "norm": "batch"},
    "decoder_channels": 8,
    "low_reduced": 4,
    "slice_size": [32, 32],
    "volumes_per_batch": 2,
    "slices_per_volume": 2,
    "epochs": 2,
    "warmup_epochs": 1,
    "val_interval": 1,
    "image_interval": 2,
    "num_workers": 0,
    "split_sizes": [4, 1, 1],
}
#: what of it the network is made of
NETWORK = ("encoder", "decoder_channels", "low_reduced")


def files(*names: str) -> list[str]:
    """Paths of configuration files: those of the bundle by name, overlays by their path below ``configs``."""
    return [str(BUNDLE / n if (BUNDLE / n).exists() else CONFIGS / n) for n in names]


def workflow(*names: str, kind: str = "train", **overrides: Any) -> ConfigWorkflow:
    """Make and initialise a workflow; nothing has run yet."""
    made = ConfigWorkflow(config_file=files(*names), workflow_type=kind, logging_file=False, **overrides)
    hook = sys.excepthook
    made.initialize()
    sys.excepthook = hook
    return made


def run(*names: str, kind: str = "train", **overrides: Any) -> ConfigWorkflow:
    """Run a workflow to its end in this process."""
    made = workflow(*names, kind=kind, **overrides)
    try:
        made.run()
        made.finalize()
    finally:
        set_track_meta(True)
    return made


def command(*names: str, launcher: Sequence[str] = (), **overrides: Any) -> list[str]:
    """The command line that a user would give."""
    python = [sys.executable, *launcher, "-m", "monai.bundle", "run", "--logging_file", "False"]
    values = [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
    return [*python, "--config_file", str(files(*names)), *values]


def environment() -> dict[str, str]:
    """The environment for a command: one thread, and this checkout on the path."""
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
