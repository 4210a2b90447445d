# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from monai_cggm.data.phantom import write_phantoms
from monai_cggm.data.slices import SliceDataset
from tests.scripts.loading import script_module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_module("bench_data")


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory, script: ModuleType) -> Any:
    folder = tmp_path_factory.mktemp("bench")
    write_phantoms(folder / "data", cases=2, shape=(48, 40, 32), spacing=4.0)
    setup = script.read_setup(folder / "data", 2, folder / "stores")
    for way in prepared_ways(script):
        script.write_store(way, setup)
    return setup


def prepared_ways(script: ModuleType) -> list[str]:
    return [way for way in script.WAYS if way != "naive" and (script.has_h5py() or way not in script.HDF5)]


def test_all_prepared_ways_give_the_same_slices(script: ModuleType, setup: Any):
    def slices(way: str) -> list[dict[str, Any]]:
        dataset = SliceDataset(script.volumes_of(way, setup), setup.stage("cropped", 2))
        return [one for index in range(2) for one in dataset[(1, index)]]

    expected = slices("store")
    assert len(expected) == 4
    assert expected[0]["image"].shape == (4, 160, 160)
    assert expected[0]["image"].any()
    for way in prepared_ways(script):
        for one, other in zip(expected, slices(way), strict=True):
            assert one["slice"] == other["slice"], way
            for key in ("image", "label"):
                assert torch.equal(one[key].float(), other[key].float()), (way, key)
    # the store was written once, and no way made it again under another name
    assert len(list((setup.stores / "store").iterdir())) == 2


def test_stages_are_the_bundles_own_transforms(script: ModuleType, setup: Any):
    steps = {stage: [type(t).__name__ for t in setup.stage(stage, 3).transforms] for stage in script.STAGES}
    assert steps["slice"] == ["RandSlicesd"]
    assert steps["cropped"] == ["RandSlicesd", "SpatialPadd", "RandSpatialCropd", "CastToTyped"]
    assert steps["augmented"] == [type(t).__name__ for t in setup.augmentation.transforms]
    assert setup.stage("slice", 3).transforms[0].num_slices == 3


def test_a_way_is_measured_in_every_stage_and_state(script: ModuleType, setup: Any):
    rows = script.measure("store", setup, 3)
    assert {(row["stage"], row["slices"], row["state"]) for row in rows} == {
        (stage, slices, state) for stage in script.STAGES for slices in (1, 4) for state in ("cold", "warm")
    }
    for row in rows:
        assert len(row["wall_ms"]) == len(row["cpu_ms"]) == 2 * 3
        assert min(row["wall_ms"]) > 0
        assert len(row["resident"]) == 3
    memory = script.measure("memory", setup, 1)
    assert {row["state"] for row in memory} == {"memory"}


def test_slow_ways_take_a_case_before_they_are_timed_and_few_passes(script: ModuleType, setup: Any, monkeypatch: Any):
    taken: list[int] = []
    monkeypatch.setattr(script, "take_naively", lambda files, turn, slices: taken.append(turn) or slices)
    rows = script.measure("naive", setup, 5)
    assert [len(row["wall_ms"]) for row in rows] == [2 * script.SLOW_PASSES] * 4
    assert len(taken) == 2 * (1 + 2 * 2 * script.SLOW_PASSES)


def test_threads_prepare_the_same_store(script: ModuleType, setup: Any):
    rows = [row for way in script.PREPARE for row in script.prepare(way, setup)]
    assert [row["workers"] for row in rows] == [0, 2]
    assert all(row["seconds_per_case"] > 0 and row["cpu_seconds_per_case"] > 0 for row in rows)
    assert rows[0]["peak_megabytes"] > 0
    names = [sorted(file.name for file in (setup.stores / way).iterdir()) for way in script.PREPARE]
    assert len(names[0]) == 2
    assert names[0] == names[1]


def test_residency_follows_what_is_read(tmp_path: Path, script: ModuleType):
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    script.flush([file])
    script.read_through([file])
    assert script.resident_share([file]) == 1.0
    script.evict([file])
    share = script.resident_share([file])
    if share == 1.0:
        pytest.skip("this file system keeps everything in memory")
    assert share == 0.0
    with file.open("rb", buffering=0) as stream:
        stream.seek(1 << 19)
        stream.read(1)
    assert 0 < script.resident_share([file]) < 1


def test_naive_takes_whole_files_and_several_slices(tmp_path: Path, script: ModuleType):
    write_phantoms(tmp_path, cases=1, shape=(48, 40, 32), spacing=4.0)
    files = sorted(map(str, tmp_path.rglob("*.nii.gz")))
    assert len(files) == 5
    assert script.take_naively(files, 3, 4) == 4
    Path(files[-1]).write_bytes(Path(files[-1]).read_bytes()[:-500])
    with pytest.raises(EOFError):
        script.take_naively(files, 3)


def row(way: str, state: str, wall: list[float], cpu: list[float], resident: list[float]) -> dict[str, Any]:
    return {
        **{"way": way, "stage": "slice", "slices": 1, "state": state},
        **{"wall_ms": wall, "cpu_ms": cpu, "resident": resident},
    }


def test_medians_are_over_processes_and_compared_in_the_same_state(script: ModuleType):
    found = script.summarise(
        [
            row("store", "warm", [1.0, 2.0], [1.0, 1.0], [1.0]),
            row("store", "warm", [9.0], [1.0], [1.0]),
            row("store", "cold", [4.0], [2.0], [0.0]),
            row("persistent", "warm", [30.0], [20.0], [1.0]),
            row("persistent", "cold", [200.0], [60.0], [0.0]),
            row("memory", "memory", [0.5], [0.5], []),
        ]
    )
    rows = {(one["way"], one["state"]): one for one in found}
    assert rows["store", "warm"]["wall_ms"] == 2.0
    assert rows["store", "warm"]["slices_per_second"] == 500.0
    assert rows["store", "warm"]["timed"] == 3
    assert rows["persistent", "warm"]["store_faster_wall"] == 15.0
    assert rows["persistent", "warm"]["store_faster_cpu"] == 20.0
    assert rows["persistent", "cold"]["store_faster_wall"] == 50.0
    assert rows["memory", "memory"]["store_faster_wall"] == 0.25


def test_the_cold_table_says_that_memory_is_compared_with_the_warm_store(script: ModuleType, capsys: Any):
    found = [row("store", state, [1.0], [1.0], [share]) for state, share in (("cold", 0.0), ("warm", 1.0))]
    facts = {"data": "phantoms", "shape": [1], "slice_size": [1], "slices_per_volume": 1, "ways": script.WAYS}
    facts |= {"skipped": {}, "megabytes_per_case": {}, "preparation": []}
    for ways, times in ((found, 0), ([*found, row("memory", "memory", [0.5], [0.5], [])], 1)):
        script.show({**facts, "measured": script.summarise(ways)})
        said = " ".join(capsys.readouterr().out.split())
        assert said.count("over the store with a warm") == times


@pytest.mark.parametrize("share", [0.5, float("nan")])
def test_what_was_not_cold_or_may_not_have_been_is_left_out(script: ModuleType, share: float):
    found = script.summarise([row("store", "cold", [1.0], [1.0], [0.0, share]), row("store", "warm", [1], [1], [1.0])])
    assert [one["state"] for one in found] == ["warm"]


@pytest.mark.slow
def test_table_and_json_hold_every_way(tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    write_phantoms(tmp_path / "data", cases=1, shape=(48, 40, 32), spacing=4.0)
    monkeypatch.setattr(script, "has_h5py", lambda: False)
    app = typer.Typer()
    app.command()(script.main)
    out = tmp_path / "bench.json"
    options = ["--data", tmp_path / "data", "--cases", 1, "--passes", 1, "--repeats", 1, "--json", out]
    result = CliRunner().invoke(app, [*map(str, options), "--ways", "naive,hdf5"], catch_exceptions=False)
    assert result.exit_code == 0
    numbers = json.loads(out.read_text())
    assert numbers["shape"] == [48, 40, 32]
    assert numbers["machine"]["threads"] == 1
    assert numbers["skipped"] == {"hdf5": "h5py is not installed"}
    assert list(numbers["ways"]) == ["store", "naive"]
    # four float16 sequences and a uint8 label
    store = 9 * math.prod(numbers["prepared_shape"][1:]) / 1e6
    assert numbers["megabytes_per_case"]["store"] == pytest.approx(store, abs=0.1)
    assert {one["way"] for one in numbers["measured"]} == {"store", "naive"}
    assert "left out, h5py is not installed" in result.stdout
    assert [row["workers"] for row in numbers["preparation"]] == [0, 2]
    assert "num_workers 2" in result.stdout


def test_an_unknown_way_is_an_error(script: ModuleType):
    app = typer.Typer()
    app.command()(script.main)
    result = CliRunner().invoke(app, ["--ways", "store,zarr"])
    assert result.exit_code == 2
    assert "no way zarr" in result.output
