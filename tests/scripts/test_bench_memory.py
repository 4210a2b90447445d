# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from monai_cggm.data.phantom import write_phantoms
from tests.scripts.loading import script_module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_module("bench_memory")


@pytest.fixture
def here(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure in this process: a fresh one takes seconds to start."""
    monkeypatch.setattr(script, "in_a_process", script.measure)


def test_numbers_of_a_tiny_store(tmp_path: Path, script: ModuleType, here: None):
    write_phantoms(tmp_path / "data", cases=2, shape=(48, 40, 32), spacing=4.0)
    (tmp_path / "work").mkdir()
    result = script.bench(tmp_path / "data", 2, [2, 5], [0], 1, 2, None, tmp_path / "work")
    stored = [file.stat().st_size for file in (tmp_path / "work/prepared").iterdir()]
    assert len(stored) == 2
    # four float16 sequences and a uint8 label a voxel, after a description of a few pages
    volumes = script.CachedVolumes(sorted((tmp_path / "work/prepared").iterdir()))
    voxels = sum(math.prod(volume["label"].shape) for volume in volumes) / 2
    assert result["store_bytes_per_case"] == pytest.approx(sum(stored) / 2)
    assert 9 * voxels < result["store_bytes_per_case"] < 9 * voxels + 5 * 4096
    copies = sorted((tmp_path / "work/store").iterdir())
    assert len({file.stat().st_ino for file in copies}) == 5
    assert [file.stat().st_nlink for file in copies] == [1] * 5
    assert [(run["cases"], run["slices"]) for run in result["runs"]] == [(2, 8), (5, 20)]
    for run in result["runs"]:
        # no less than the slices that a batch holds in float32
        assert run["peak_megabytes"]["used"] > 8 * 4 * 160 * 160 * 4 / 1e6
        assert run["peak_megabytes"]["used"] >= run["start_megabytes"]["used"] > 0
    (line,) = result["fits"]
    assert math.isfinite(line["used"]["kilobytes_per_case"])
    assert line["used"]["extrapolated"]
    assert line["used"]["standard_error"] is None


def test_a_line_is_fitted(script: ModuleType):
    runs = [
        {"cases": n, "workers": 2, "peak_megabytes": {"used": 300 + 0.25 * n, "anonymous": 400.0}} for n in (10, 20, 40)
    ]
    line = script.fit(runs)
    assert line["workers"] == 2
    assert line["used"]["kilobytes_per_case"] == pytest.approx(250)
    assert line["used"]["megabytes_full"] == pytest.approx(300 + 0.25 * 1251)
    assert line["anonymous"]["kilobytes_per_case"] == pytest.approx(0, abs=1e-6)
    runs[-1] = {"cases": 1251, "workers": 2, "peak_megabytes": {"used": 1.0, "anonymous": 1.0}}
    assert not script.fit(runs)["used"]["extrapolated"]


def test_a_slope_has_its_error(script: ModuleType):
    """Two runs at 0 cases and two at 2: slope 1, residuals ±1; its variance is 4 / 2 over the sum of squares, 4."""
    peaks = [(0, 1.0), (0, 3.0), (2, 3.0), (2, 5.0)]
    runs = [{"cases": n, "workers": 0, "peak_megabytes": {"used": mb, "anonymous": mb}} for n, mb in peaks]
    used = script.fit(runs)["used"]
    assert used["kilobytes_per_case"] == pytest.approx(1000)
    assert used["standard_error"] == pytest.approx(1000 * math.sqrt(0.5))


def test_runs_that_fail_are_listed_beside_the_others(tmp_path: Path, script: ModuleType, monkeypatch: Any, capsys: Any):
    def in_a_process(store: Path, size: int, workers: int, *_: Any) -> dict[str, Any]:
        if size == 4 and workers:
            return {"cases": size, "workers": workers, "failed": "MemoryError"}
        peak = {"used": 100.0 + size, "anonymous": 100.0}
        return {"cases": size, "workers": workers, "slices": 1, "seconds": 1.0, "peak_megabytes": peak}

    monkeypatch.setattr(script, "in_a_process", in_a_process)
    write_phantoms(tmp_path / "data", cases=1, shape=(24, 20, 16), spacing=8.0)
    result = script.bench(tmp_path / "data", 1, [2, 4], [0, 2], 2, 2, 1.0, tmp_path / "work")
    assert [(run["workers"], run["cases"]) for run in result["runs"]] == [(0, 2), (0, 4), (2, 2), (2, 4)] * 2
    assert [line["workers"] for line in result["fits"]] == [0]
    script.show({**result, "data": "phantoms"})
    said = " ".join(capsys.readouterr().out.split())
    assert "2 workers, 4 cases: failed, MemoryError" in said
    assert "1000.00 kB a case (standard error 0.00)" in said


def test_a_process_that_fails_says_why(tmp_path: Path, script: ModuleType, monkeypatch: Any):
    failing = tmp_path / "failing.py"
    monkeypatch.setattr(script, "__file__", str(failing))
    for text, reason in (("import sys; sys.exit('MemoryError')", "MemoryError"), ("exit(3)", "exit status 3")):
        failing.write_text(text)
        run = script.in_a_process(tmp_path, 5, 2, None, 1.0)
        assert run == {"cases": 5, "workers": 2, "failed": reason}


def test_the_peak_sees_what_is_held_and_let_go(script: ModuleType):
    with script.PeakMemory(interval=60) as peak:
        before = dict(peak.megabytes)
        held = torch.ones(50_000_000, dtype=torch.uint8)
        peak.sample()
        del held
        peak.sample()
    for name in ("used", "anonymous"):
        assert peak.megabytes[name] - before[name] == pytest.approx(50, abs=5)


def test_pages_of_files_do_not_count(tmp_path: Path, script: ModuleType):
    (tmp_path / "file").write_bytes(bytes(50_000_000))
    with script.PeakMemory(interval=60) as peak:
        before = dict(peak.megabytes)
        mapped = torch.from_file(str(tmp_path / "file"), size=50_000_000, dtype=torch.uint8)
        assert int(mapped.sum()) == 0
        peak.sample()
    assert peak.megabytes["used"] - before["used"] < 5


def test_a_store_too_large_for_the_disk_is_refused(tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "case").write_bytes(bytes(1000))

    class Usage:
        free = 19_000

    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(typer.BadParameter, match=r"10 cases take 0\.0 GB, more than 50% of the 0\.0 GB"):
        script.repeat([tmp_path / "case"], 10, tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []
    script.repeat([tmp_path / "case"], 9, tmp_path / "other")
    assert len(list((tmp_path / "other").iterdir())) == 9


@pytest.mark.parametrize("sizes", ["8", "8,8"])
def test_one_size_gives_no_slope(script: ModuleType, sizes: str):
    app = typer.Typer()
    app.command()(script.main)
    result = CliRunner().invoke(app, ["--sizes", sizes])
    assert result.exit_code == 2
    assert "a slope needs two sizes or more" in result.output


@pytest.mark.slow
def test_table_and_json(tmp_path: Path, script: ModuleType):
    write_phantoms(tmp_path / "data", cases=3, shape=(48, 40, 32), spacing=4.0)
    app = typer.Typer()
    app.command()(script.main)
    options: list[Any] = ["--data", tmp_path / "data", "--cases", 3, "--sizes", "2,4", "--workers", "1", "--batch", 2]
    options += ["--repeats", 1, "--train", "--limit-gb", 8, "--scratch", tmp_path, "--json", tmp_path / "memory.json"]
    result = CliRunner().invoke(app, list(map(str, options)), catch_exceptions=False)
    assert result.exit_code == 0
    numbers = json.loads((tmp_path / "memory.json").read_text())
    for runs in (numbers["runs"], numbers["trainings"]):
        assert [(run["cases"], run["workers"], run.get("slices")) for run in runs] == [(2, 1, 8), (4, 1, 16)], runs
    reading, training = ([run["peak_megabytes"]["used"] for run in numbers[key]] for key in ("runs", "trainings"))
    assert min(training) > min(reading)  # a network, its gradients, and its momentum
    assert "RLIMIT_DATA" in numbers["limit"]
    said = " ".join(result.stdout.split())
    assert said.count("1251 cases (extrapolated)") == 2
    assert "one epoch of training from disk" in said


def test_training_needs_cases_to_validate_on(script: ModuleType):
    app = typer.Typer()
    app.command()(script.main)
    result = CliRunner().invoke(app, ["--train"])
    assert result.exit_code == 2
    assert "training needs three cases to repeat, got 2" in " ".join(result.output.split())


@pytest.mark.slow
def test_a_training_beyond_its_limit_is_listed(tmp_path: Path, script: ModuleType):
    write_phantoms(tmp_path / "data", cases=3, shape=(48, 40, 32), spacing=4.0)
    result = script.bench(tmp_path / "data", 3, [2], [0], 1, 2, 0.1, tmp_path / "work", train=True)
    assert len(result["trainings"]) == 1
    assert re.search("memory|allocate|out of space", result["trainings"][0]["failed"], re.IGNORECASE), result[
        "trainings"
    ]
    assert result["training_fits"] == []
