# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from tests.scripts.loading import script_module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_module("bench_step")


@pytest.fixture
def invoke(script, monkeypatch):
    tiny = {
        name: replace(size, image=(16, 16), batch=2, encoder={**size.encoder, "backbone": "resnet18", "width": 8})
        for name, size in script.sizes_of_the_bundle(2).items()
    }
    monkeypatch.setattr(script, "sizes_of_the_bundle", lambda _batch: tiny)
    threads = torch.get_num_threads()
    app = typer.Typer()
    app.command()(script.main)
    yield lambda *arguments: CliRunner().invoke(app, arguments)
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("layer", "forward"),
    [
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), 2 * 256 * 8 * 9),
        (nn.Conv2d(8, 6, 3, padding=1), 2 * 256 * 8 * 6 * 9),
        (nn.Conv2d(8, 6, 3, stride=2, padding=1), 2 * 64 * 8 * 6 * 9),
        (nn.ConvTranspose2d(8, 6, 2, stride=2), 2 * 256 * 8 * 6 * 4),
    ],
)
def test_a_convolution_s_gradients_cost_what_its_forward_pass_does(script, layer, forward):
    own = {torch.ops.aten.convolution_backward: script.backward_operations}
    for needs, times in ((True, 3), (False, 2)):
        with FlopCounterMode(display=False, custom_mapping=own) as counter:
            layer(torch.randn(3, 8, 16, 16, requires_grad=needs)).sum().backward()
        assert counter.get_total_flops() == times * 3 * forward


def test_sizes_are_the_bundle_s(script):
    sizes = script.sizes_of_the_bundle(7)
    assert (sizes["paper"].encoder["backbone"], sizes["paper"].image, sizes["paper"].batch) == (
        "resnet101",
        (160, 160),
        7,
    )
    assert (sizes["small"].encoder["width"], sizes["small"].batch, sizes["small"].image) == (12, 16, (64, 64))


@pytest.mark.slow
def test_each_training_is_related_to_joint_training(invoke, tmp_path: Path):
    out = tmp_path / "step.json"
    result = invoke("--sizes", "small", "--rounds", "2", "--json", str(out))
    assert result.exit_code == 0, result.output
    numbers = json.loads(out.read_text())["sizes"]["small"]
    assert list(numbers["ms_per_step"]) == ["joint", "observe", "cggm", "recipe"]
    for way, milliseconds in numbers["ms_per_step"].items():
        assert numbers["times_joint"][way] == pytest.approx(milliseconds / numbers["ms_per_step"]["joint"], abs=0.01)
        assert numbers["encoder_passes"][way] == 4
        assert way in result.output
    # what CGGM adds to watching are the gradients of the head; the recipe runs the fusion twice
    floor = numbers["floor"]
    assert 1 < floor["observe"] < floor["cggm"] < floor["recipe"] < 2


@pytest.mark.slow
def test_growth_is_drawn(invoke, script, monkeypatch, tmp_path: Path):
    few = {"2 modalities": 2, "3 modalities": 3}
    monkeypatch.setattr(
        script, "growing", lambda size: {name: replace(size, modalities=number) for name, number in few.items()}
    )
    picture, out = tmp_path / "growth.svg", tmp_path / "growth.json"
    result = invoke("--growth", "--rounds", "1", "--plot", str(picture), "--json", str(out))
    assert result.exit_code == 0, result.output
    assert picture.read_text().lstrip().startswith("<?xml")
    sizes = json.loads(out.read_text())["sizes"]
    assert {name: s["encoder_passes"] for name, s in sizes.items()} == {
        name: {"joint": number, "cggm": number} for name, number in few.items()
    }


@pytest.mark.parametrize("arguments", [("--sizes", "tiny"), ("--ways", "joint,cgm")])
def test_what_does_not_exist_is_named(invoke, arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "there is no" in result.output
