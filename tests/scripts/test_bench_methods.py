# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import logging
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from typer.testing import CliRunner

from tests.scripts.loading import script_module

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_module("bench_methods")


@pytest.fixture
def invoke(script):
    app = typer.Typer()
    app.command()(script.main)
    yield lambda *arguments: CliRunner().invoke(app, arguments)
    logging.disable(logging.NOTSET)


@pytest.mark.slow
def test_steps_that_count_are_timed_and_related_to_joint_training(invoke, tmp_path: Path):
    out = tmp_path / "bench.json"
    result = invoke("--arms", "agm,umt", "--rounds", "1", "--json", str(out))
    assert result.exit_code == 0, result.output
    numbers = json.loads(out.read_text())
    assert numbers["steps"] == {"joint": 2, "agm": 2, "umt": 2}
    assert numbers["times_joint"]["joint"] == 1.0
    for arm, milliseconds in numbers["ms_per_step"].items():
        assert numbers["times_joint"][arm] == pytest.approx(milliseconds / numbers["ms_per_step"]["joint"], abs=0.01)
        assert milliseconds > 1
        # of two steps the median is the mean
        assert numbers["median_ms"][arm] == milliseconds
        assert arm in result.output


def test_an_arm_that_does_not_exist_is_named(invoke):
    result = invoke("--arms", "joint,agmm")
    assert result.exit_code == 2
    assert "no arm agmm" in result.output


@pytest.mark.parametrize("device", ["tpu", pytest.param("cuda", marks=NO_GPU)])
def test_a_device_that_is_not_there_is_named(invoke, device):
    result = invoke("--device", device)
    assert result.exit_code == 2
    assert ("PyTorch sees no GPU" if device == "cuda" else "must be cpu or cuda, got 'tpu'") in result.output
