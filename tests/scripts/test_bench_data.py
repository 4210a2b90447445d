# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner

from monai_cggm.data.phantom import write_phantoms
from tests.scripts.loading import script_module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_module("bench_data")


def test_table_and_json_hold_every_way(tmp_path: Path, script: ModuleType):
    write_phantoms(tmp_path / "data", cases=2, shape=(48, 40, 32), spacing=4.0)
    app = typer.Typer()
    app.command()(script.main)
    out = tmp_path / "bench.json"
    arguments = ["--data", str(tmp_path / "data"), "--cases", "1", "--rounds", "2", "--json", str(out)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    numbers = json.loads(out.read_text())
    assert numbers["cases"] == 1
    assert numbers["shape"] == [48, 40, 32]
    assert numbers["machine"]["threads"] == 1
    assert len(numbers["ms_per_slice"]) == 5
    naive = numbers["ms_per_slice"][script.NAIVE]
    for way, milliseconds in numbers["ms_per_slice"].items():
        assert milliseconds > 0
        assert numbers["times_faster"][way] == pytest.approx(naive / milliseconds, rel=0.05, abs=0.1)
        assert way.split(",")[0] in result.stdout


def test_ways_take_turns_and_the_first_round_does_not_count(script: ModuleType):
    calls: list[tuple[str, int]] = []

    def way(name: str, slices: int):
        return lambda turn: calls.append((name, turn)) or slices

    times = script.take_turns({script.NAIVE: way("naive", 1), "cached": way("cached", 4)}, rounds=3)
    assert {name: len(values) for name, values in times.items()} == {script.NAIVE: 3, "cached": 3}
    assert [name for name, _ in calls[:10]] == ["naive", *["cached"] * 8, "naive"]
    assert len({turn for name, turn in calls if name == "cached"}) == 4 * 8


def test_the_naive_way_reads_whole_files(tmp_path: Path, script: ModuleType):
    write_phantoms(tmp_path, cases=1, shape=(48, 40, 32), spacing=4.0)
    files = sorted(map(str, tmp_path.rglob("*.nii.gz")))
    assert len(files) == 5
    assert script.take_naively(files, 3) == 1
    Path(files[-1]).write_bytes(Path(files[-1]).read_bytes()[:-500])
    with pytest.raises(EOFError):
        script.take_naively(files, 3)
