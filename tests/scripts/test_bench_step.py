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
    written = json.loads(out.read_text())
    assert (written["clock"], written["machine"]["device"], written["lines"]) == ("CPU time", "cpu", {})
    numbers = written["sizes"]["small"]
    assert list(numbers["ms_per_step"]) == ["joint", "observe", "cggm", "recipe"]
    for way, milliseconds in numbers["ms_per_step"].items():
        low, high = numbers["times_joint_quartiles"][way]
        assert low <= numbers["times_joint"][way] <= high
        assert milliseconds > 0
        assert numbers["encoder_passes"][way] == [4, 4]
        assert numbers["steps"][way] == 2
        assert way in result.output
    assert numbers["host_waits"] is None
    # what CGGM adds to watching are the gradients of the head; the recipe runs the fusion twice
    floor, done = numbers["floor"], numbers["done"]
    assert 1 == floor["joint"] < floor["observe"] < floor["cggm"] < floor["recipe"] < 2
    for way, least in floor.items():
        # the steps do little that the parts do not: the heads' gradients by their closed form
        assert least <= done[way] < 1.05 * least, way


def test_only_steps_that_take_their_turn_are_timed_and_no_gradient_stays(script, monkeypatch):
    size = replace(
        script.sizes_of_the_bundle(2)["small"], image=(16, 16), batch=2, modalities=2,
        encoder={"backbone": "resnet18", "width": 8, "norm": "batch"},
    )  # fmt: skip
    trainers = []
    build = script.trainer_of
    monkeypatch.setattr(script, "trainer_of", lambda *given: trainers.append(build(*given)) or trainers[-1])
    held: list[int] = []
    take = script.step

    def step(trainer, turn):
        held.append(sum(p.grad is not None for t in trainers if t is not trainer for p in t.network.parameters()))
        take(trainer, turn)

    monkeypatch.setattr(script, "step", step)
    ticks = iter(range(1000))
    monkeypatch.setattr(script, "clock_of", lambda _device: lambda: float(next(ticks)))
    with script.Progress(disable=True) as progress:
        found = script.bench(size, ["joint", "cggm"], 3, torch.device("cpu"), progress, "tiny")
    assert found["steps"] == {"joint": 3, "cggm": 3}
    assert found["ms_per_step"] == {"joint": 1000.0, "cggm": 1000.0}
    assert set(held[: 2 * 4]) == {0}


def test_classifiers_at_the_paper_s_size_are_as_small_as_the_docs_say(script, repository):
    found = script.parameters_of(script.sizes_of_the_bundle(2)["paper"])
    page = (repository / "docs/results.md").read_text(encoding="utf-8")
    assert f"| all four classifiers | {found['parameters']:,} | {found['megabytes']:.1f} |" in page
    assert found["megabytes"] < 8


def test_both_ways_to_count_epsilon_are_timed(script, monkeypatch):
    size = replace(script.sizes_of_the_bundle(2)["small"], image=(16, 16), batch=2, modalities=3)
    called = []
    sums, helper = script.RegionDice.sums, script.DiceHelper.__call__
    monkeypatch.setattr(script.RegionDice, "sums", lambda *given: called.append("one count") or sums(*given))
    monkeypatch.setattr(script.DiceHelper, "__call__", lambda *given: called.append("helper") or helper(*given))
    times = script.epsilon_times(size, 2, torch.device("cpu"))
    assert called == ["one count", *["helper"] * 3] * 3
    assert set(times) == {"region_dice", "dice_helper"}


def test_an_encoder_run_twice_more_raises_what_was_done_and_not_the_floor(script, monkeypatch):
    size = replace(
        script.sizes_of_the_bundle(2)["small"], image=(16, 16), batch=2, modalities=2,
        encoder={"backbone": "resnet18", "width": 8, "norm": "batch"},
    )  # fmt: skip
    modulate = script.CGGM.modulate

    def wasteful(self, step):
        for encoder in self.encoders.values():
            encoder(step.inputs[self.modalities[0]])[-1].sum().backward()
        modulate(self, step)

    with script.Progress(disable=True) as progress:
        before = script.bench(size, ["joint", "cggm"], 1, torch.device("cpu"), progress, "tiny")
        monkeypatch.setattr(script.CGGM, "modulate", wasteful)
        after = script.bench(size, ["joint", "cggm"], 1, torch.device("cpu"), progress, "tiny")
    assert after["floor"] == before["floor"]
    assert after["done"]["cggm"] > before["done"]["cggm"] + 0.3
    assert (before["encoder_passes"]["cggm"], after["encoder_passes"]["cggm"]) == ([2, 2], [4, 4])


def test_lines_through_a_family(script):
    def result(modalities, image, ms):
        return {"size": {"modalities": modalities, "image": image, "batch": 5}, "ms_per_step": {"joint": ms}}

    sizes = {f"{m} modalities": result(m, (8, 8), 3.0 * m + 2.0) for m in (2, 3, 5)}
    sizes |= {f"{n}×{n} pixels": result(4, (n, n), 0.5 * 5 * n * n + (n == 8)) for n in (2, 4, 8)}
    sizes |= {"two voxels": result(4, (2, 1, 1), 1.0), "one voxels": result(4, (1, 1, 1), 1.0)}
    lines = script.lines_of(sizes)
    assert list(lines) == ["modalities", "pixels"]
    assert lines["modalities"]["joint"] == {"ms_per_unit": 3.0, "ms_at_none": 2.0, "worst_residual": 0.0}
    assert lines["pixels"]["joint"]["ms_per_unit"] == pytest.approx(0.5, abs=0.01)
    assert 0.005 < lines["pixels"]["joint"]["worst_residual"] < 0.1


@pytest.mark.slow
def test_growth_is_drawn(invoke, script, monkeypatch, tmp_path: Path):
    few = {"2 modalities": 2, "3 modalities": 3, "4 modalities": 4}
    monkeypatch.setattr(
        script, "growing", lambda size: {
            **{name: replace(size, modalities=number) for name, number in few.items()},
            "16×16×16 voxels": replace(
                size,
                modalities=2,
                batch=1,
                image=(16,) * 3,
                channels_last=False,
                encoder={**size.encoder, "spatial_dims": 3},
            ),
        }
    )  # fmt: skip
    picture, out = tmp_path / "growth.svg", tmp_path / "growth.json"
    result = invoke("--growth", "--rounds", "1", "--plot", str(picture), "--json", str(out))
    assert result.exit_code == 0, result.output
    assert picture.read_text().lstrip().startswith("<?xml")
    written = json.loads(out.read_text())
    assert {name: s["encoder_passes"] for name, s in written["sizes"].items()} == {
        name: {"joint": [number] * 2, "cggm": [number] * 2} for name, number in {**few, "16×16×16 voxels": 2}.items()
    }
    assert list(written["lines"]) == ["modalities"]
    assert "cggm over modalities" in result.output


@pytest.mark.parametrize("arguments", [("--sizes", "tiny"), ("--ways", "joint,cgm")])
def test_what_does_not_exist_is_named(invoke, arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "there is no" in result.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--growth", "--sizes", "small"), "--sizes"),
        (("--growth", "--ways", "joint"), "--ways"),
        (("--growth", "--batch", "2"), "--batch"),
        (("--plot", "growth.svg"), "--growth"),
    ],
)
def test_options_without_effect_are_refused(invoke, arguments, told):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert told in result.output
    assert "leave out" in result.output or "give both" in result.output


def test_ratios_are_of_the_steps_of_one_turn(script: ModuleType):
    """A machine that is ten times as slow for a turn changes no ratio."""
    times = {"joint": [10.0, 12.0, 100.0, 10.0, 20.0], "cggm": [11.0, 15.0, 120.0, 13.0, 22.0]}
    found = script.over_joint(times)
    assert found["times_joint"] == {"joint": 1.0, "cggm": 1.2}
    assert found["times_joint_quartiles"] == {"joint": [1.0, 1.0], "cggm": [1.1, 1.25]}
