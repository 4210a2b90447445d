# SPDX-License-Identifier: Apache-2.0
"""Run the BraTS bundle at a size that takes seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from monai.bundle import ConfigWorkflow, ckpt_export, onnx_export
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
#: for tests that compare two trainings to the last digit
BIT_FOR_BIT = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU adds numbers up in no fixed order")
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


def assert_exports_agree(
    network: torch.nn.Module, folder: Path, *, sizes: Sequence[tuple[int, ...]], **files: Any
) -> None:
    """Export a bundle's network as TorchScript and as ONNX, and hold both to the network itself.

    ``files`` are the arguments of MONAI's exports, and ``sizes`` those of the images, (B, M, H, W) or (B, M, H, W, D).
    """
    ckpt_export(filepath=str(folder / "model.ts"), **files)
    spatial = ("height", "width", "depth")[: len(sizes[0]) - 2]
    axes = {0: "batch", **dict(enumerate(spatial, start=2))}
    onnx_export(
        filepath=str(folder / "model.onnx"),
        use_trace=True,
        input_shape=[1, sizes[0][1], *(64 if len(spatial) == 2 else 32 for _ in spatial)],
        converter_kwargs={
            "dynamo": False,
            "opset_version": 18,
            "input_names": ["image"],
            "output_names": ["logits"],
            "dynamic_axes": {"image": axes, "logits": axes},
        },
        **files,
    )
    scripted = torch.jit.load(folder / "model.ts").eval()
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    for size in sizes:
        image = torch.randn(size)
        with torch.no_grad():
            expected = network(image)
            torch.testing.assert_close(scripted(image), expected, rtol=0, atol=1e-5)
        (logits,) = session.run(None, {"image": image.numpy()})
        np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=1e-4)


def command(*names: str, launcher: Sequence[str] = (), **overrides: Any) -> list[str]:
    """The command line that a user would give."""
    python = [sys.executable, *launcher, "-m", "monai.bundle", "run", "--logging_file", "False"]
    values = [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
    return [*python, "--config_file", str(files(*names)), *values]


def environment() -> dict[str, str]:
    """The environment for a command: one thread, and this checkout on the path."""
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
