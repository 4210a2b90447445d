# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from monai.bundle import ConfigParser
from torch import nn
from typer.testing import CliRunner

from tests.scripts.loading import script_module

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_module("bench_inference")


@pytest.fixture(autouse=True)
def _threads():
    threads, tf32 = torch.get_num_threads(), (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    yield
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


@pytest.fixture
def tiny(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The script with a network small enough for a test."""
    overlay = tmp_path / "tiny.json"
    encoder = {"backbone": "resnet18", "stem_stride": 1, "output_stride": 8, "width": 4, "aspp_channels": 8}
    overlay.write_text(json.dumps({"encoder": encoder, "decoder_channels": 8, "low_reduced": 4}))
    monkeypatch.setitem(script.OVERLAYS, "cpu", [overlay])
    app = typer.Typer()
    app.command()(script.main)

    def invoke(*arguments: str) -> tuple[str, dict]:
        out = tmp_path / "bench.json"
        shape = ["--shape", "24", "20", "16", "--rounds", "1", "--batch", "4"]
        result = CliRunner().invoke(app, [*shape, "--json", str(out), *arguments], catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout, json.loads(out.read_text())

    return invoke


def test_ways_that_see_the_same_volume_find_the_same(script: ModuleType, tiny, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(script, "has_bf16", lambda device: False)
    output, numbers = tiny()
    ways = [script.NAIVE, script.MONAI, script.BATCHES, script.EMPTY, script.BOX, script.CHANNELS_LAST]
    ways += [script.NAIVE_BOX, script.FLOOR]
    seconds = numbers["seconds_per_volume"]
    assert list(seconds) == ways
    assert numbers["tf32"] is False
    for way, value in seconds.items():
        least, most = numbers["least_and_most_seconds"][way]
        assert 0 < least <= value <= most
        assert numbers["volumes_per_minute"][way] == pytest.approx(60 / value, rel=0.05, abs=0.01)
        assert numbers["times_faster"][way] == pytest.approx(seconds[script.NAIVE] / value, rel=0.05, abs=0.01)
    # no prediction, no difference
    for differ in (numbers["differ_same_volume"], numbers["differ_whole_volume"]):
        assert set(differ) == set(ways) - {script.FLOOR}
    # a voxel in two thousand may lie at a tie of float32
    assert all(share <= 5e-4 for share in numbers["differ_same_volume"].values())
    whole = numbers["differ_whole_volume"]
    assert whole[script.EMPTY] == numbers["differ_same_volume"][script.EMPTY]
    # a box is another image to the network
    assert whole[script.NAIVE_BOX] > 1e-3
    assert whole[script.BOX] == pytest.approx(whole[script.NAIVE_BOX], abs=5e-4)
    assert all(size < full for size, full in zip(numbers["box"], numbers["shape"], strict=True))
    assert numbers["empty_slices"] >= numbers["shape"][2] - numbers["box"][2] > 1
    assert min(numbers["classes_in_brain"]) > 0
    assert (numbers["clock"], numbers["trained"], numbers["machine"]["threads"]) == ("CPU time", False, 1)
    assert "No bf16" in output
    assert "x".join(map(str, numbers["box"])) in output


def test_bf16_where_there_is_some_and_a_trained_network(
    script: ModuleType, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(script, "has_bf16", lambda device: True)
    config = ConfigParser()
    config.read_config([str(script.BUNDLE), str(script.OVERLAYS["cpu"][0])])
    network = config.get_parsed_content("network_def")
    nn.init.zeros_(network.head.weight)
    network.head.bias.data.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    torch.save({"model": network.state_dict()}, tmp_path / "model.pt")
    output, numbers = tiny("--model", str(tmp_path / "model.pt"), "--threads", "2")
    assert script.BF16 in numbers["seconds_per_volume"]
    assert numbers["bf16"]
    assert "No bf16" not in output
    # this one calls everything class 2
    assert numbers["trained"]
    assert numbers["classes_in_brain"][:2] == [0, 0]
    assert set(numbers["differ_whole_volume"].values()) == {0.0}
    assert (numbers["clock"], numbers["machine"]["threads"]) == ("wall time", 2)


@pytest.mark.parametrize("device", ["tpu", pytest.param("cuda", marks=NO_GPU)])
def test_a_device_that_is_not_there_is_named(script: ModuleType, device: str):
    app = typer.Typer()
    app.command()(script.main)
    result = CliRunner().invoke(app, ["--device", device])
    assert result.exit_code == 2
    assert ("PyTorch sees no GPU" if device == "cuda" else "must be cpu or cuda, got 'tpu'") in result.output


def test_ways_take_turns_and_the_first_round_does_not_count(script: ModuleType):
    calls: list[str] = []
    classes = torch.zeros(1, 2, 2, 2)
    ways = {"one": lambda: calls.append("one") or classes, "two": lambda: calls.append("two")}
    times, found = script.take_turns(ways, 3, torch.device("cpu"))
    assert calls == ["one", "two"] * 4
    assert {name: len(values) for name, values in times.items()} == {"one": 3, "two": 3}
    assert list(found) == ["one"]


def test_box_and_shares(script: ModuleType):
    brain = torch.zeros(1, 5, 6, 7, dtype=torch.bool)
    brain[0, 1:3, 2:6, 3:4] = True
    box = script.bounding_box(brain[0])
    assert box == (slice(1, 3), slice(2, 6), slice(3, 4))
    inside = torch.arange(1, 9).view(1, 2, 4, 1)
    whole = script.placed(inside, brain, box)
    assert torch.equal(whole[brain], torch.arange(1, 9))
    assert whole.sum() == math.comb(9, 2)
    other = whole.clone()
    other[0, 1, 2, 3] = 0
    other[0, 0, 0, 0] = 5  # outside the brain nobody counts
    assert script.differing(whole, other, brain) == 1 / 8
    assert script.placed(whole, brain, None) is whole


def test_bf16_is_told_by_the_processors_flags(script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    for flags, expected in (("fpu avx2", False), ("avx512f avx512_bf16", True), ("amx_bf16", True)):
        monkeypatch.setattr(Path, "read_text", lambda *args, flags=flags, **kwargs: f"flags\t: {flags}\n")
        assert script.has_bf16(torch.device("cpu")) is expected

    def unreadable(*args, **kwargs):
        raise FileNotFoundError("/proc/cpuinfo")

    monkeypatch.setattr(Path, "read_text", unreadable)
    assert script.has_bf16(torch.device("cpu")) is False
