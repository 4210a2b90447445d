# SPDX-License-Identifier: Apache-2.0
"""Trainings of new bundles off the beaten track: other workers, files that went bad, modalities that are missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from monai_cggm.cli import app
from monai_cggm.discovery import discover
from monai_cggm.errors import users_error
from monai_cggm.new_bundle import Wishes, new_bundle
from monai_cggm.resources import share_path
from tests.bundles.running import run
from tests.new_bundle.folders import folders, save, volumes
from tests.new_bundle.test_write import TINY

#: a run of seconds; so few channels do not gain from any other order in memory
SMALL: dict[str, Any] = {
    "encoder#width": 4,
    "encoder#aspp_channels": 8,
    "decoder_channels": 8,
    "low_reduced": 4,
    "memory_format": "$torch.contiguous_format",
    "slices_per_volume": 2,
    "epochs": 2,
    "val_interval": 2,
    "image_interval": 2,
    "warmup_epochs": 1,
    "num_workers": 0,
}


def made(tmp_path: Path, source: Path, **wishes: Any) -> Path:
    found = discover(source, allow_missing=wishes.get("allow_missing", False))
    return new_bundle(found, tmp_path / "bundle", Wishes(network="small", **wishes), progress=False).folder


def started(folder: Path, out: Path, *overlays: str, **overrides: Any) -> None:
    """Run a bundle, to its end, in this process."""
    names = [str(folder / "configs/train.yaml"), *overlays]
    run(*names, bundle_root=str(folder), run_dir=str(out), **{**SMALL, **overrides})


@pytest.mark.slow
def test_workers_that_share_nothing_give_the_same_training(tmp_path):
    """Windows and macOS start workers anew: all that they are sent must survive it, and draws must not change."""
    folder = made(tmp_path, folders(tmp_path / "data"))
    started(folder, tmp_path / "none")
    overrides = {"num_workers": 1, "train#dataloader#multiprocessing_context": "spawn"}
    started(folder, tmp_path / "spawn", **overrides)
    one, other = (pd.read_csv(tmp_path / name / "iterations.csv") for name in ("none", "spawn"))
    assert len(one) == 2
    pd.testing.assert_frame_equal(one, other)


def truncated(path: Path) -> Path:
    """The header stays whole: what only looks at headers sees nothing."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    return path


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_went_bad_is_named_with_its_case(workers, cache, tmp_path):
    folder = made(tmp_path, folders(tmp_path / "data"))
    case = json.loads((folder / "split.json").read_text())["train"][-1]
    bad = truncated(tmp_path / "data" / case / f"{case}_T2.nii.gz")
    overrides = {"num_workers": workers, "cache_dir": str(tmp_path / "cache") if cache else None}
    with pytest.raises(Exception, match=r"instantiate|evaluate") as caught:
        started(folder, tmp_path / "run", **overrides)
    error = users_error(caught.value)
    assert str(error).startswith(f"case {case}: t2 ")
    assert str(bad) in str(error)
    assert len(str(error).splitlines()) == 1
    assert not (tmp_path / "run/iterations.csv").exists()


@pytest.mark.slow
def test_compare_says_which_file_went_bad(tmp_path):
    folder = made(tmp_path, folders(tmp_path / "data"))
    case = json.loads((folder / "split.json").read_text())["train"][-1]
    truncated(tmp_path / "data" / case / f"{case}_ADC.nii.gz")
    arguments = ["compare", str(folder / "study.yaml"), "--data", str(folder / "datalist.json"), "--out"]
    arguments += [str(tmp_path / "comparison"), "--arms", "joint", "--jobs", "1"]
    result = CliRunner().invoke(app, arguments + [part for value in TINY for part in ("--set", value)])
    assert result.exit_code != 0
    (facts,) = (json.loads(path.read_text()) for path in (tmp_path / "comparison/cells").rglob("cell.json"))
    assert facts["status"] == "failed"
    assert facts["error"].startswith(f"error: case {case}: adc ")
    assert f"{case}_ADC.nii.gz" in facts["error"]
    assert f"case {case}: adc" in " ".join(result.output.split())
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_cases_that_lack_modalities(tmp_path):
    """A training case and a test case lack one each: scores are finite, and subsets are of what a case has."""
    parts = {"training": ("a", "b", "c"), "validation": ("d",), "test": ("e", "f")}
    lacking = {"b": "adc", "f": "t2"}
    content: dict[str, list[dict[str, str]]] = {part: [] for part in parts}
    for number, (part, case) in enumerate((part, case) for part, cases in parts.items() for case in cases):
        images, label = volumes(number)
        files = dict(zip(("t2", "adc", "label"), (*images, label), strict=True))
        files.pop(lacking.get(case, ""), None)
        for key, voxels in files.items():
            save(tmp_path / f"data/{case}_{key}.nii.gz", voxels)
        content[part].append({"case": case, **{key: f"data/{case}_{key}.nii.gz" for key in files}})
    (tmp_path / "list.json").write_text(json.dumps(content))
    folder = made(tmp_path, tmp_path / "list.json", allow_missing=True)
    config = yaml.safe_load((folder / "configs/train.yaml").read_text())
    assert (config["allow_missing"], config["volumes_per_batch"]) == (True, 3)
    card = (folder / "docs/README.md").read_text()
    assert "adc is missing in 1 cases" in card
    assert "t2 is missing in 1 cases" in card
    subsets = str(share_path("configs/protocols/subsets.yaml"))
    for overlays in ((), (str(share_path("configs/methods/cggm.yaml")),)):
        out = tmp_path / f"run{len(overlays)}"
        started(folder, out, *overlays)
        iterations = pd.read_csv(out / "iterations.csv")
        assert np.isfinite(iterations[["train/loss", "loss/task", "loss/t2", "loss/adc"]]).all(axis=None)
        started(folder, out, *overlays, str(folder / "configs/evaluate.yaml"), subsets, part="test", hd95=False)
        scores = pd.read_csv(out / "test_subsets/cases.csv")
        rows = {case: set(scores.loc[scores["case"] == case, "predictor"]) for case in ("e", "f")}
        assert rows["e"] == {"fusion", "fusion[t2]", "fusion[adc]", "t2", "adc"}
        assert {"fusion", "fusion[adc]", "adc"} <= rows["f"]
        there = scores[(scores["case"] == "e") | scores["predictor"].isin(["fusion", "fusion[adc]", "adc"])]
        dice = there[[name for name in scores if name.startswith("dice_")]]
        assert len(dice) == 8
        assert dice.notna().all(axis=None)
        assert ((dice >= 0) & (dice <= 1)).all(axis=None)
