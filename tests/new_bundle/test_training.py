# SPDX-License-Identifier: Apache-2.0
"""Trainings of new bundles off the beaten track: other workers, files that went bad, modalities that are missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from scipy.ndimage import map_coordinates
from typer.testing import CliRunner

from monai_cggm.cli import app
from monai_cggm.discovery import discover
from monai_cggm.errors import users_error
from monai_cggm.losses import RegionDiceCrossEntropyLoss
from monai_cggm.new_bundle import Wishes, new_bundle
from monai_cggm.resources import share_path
from tests.bundles.running import environment, run
from tests.losses.test_regions import reference
from tests.new_bundle.folders import AFFINE, PATIENTS, folders, save, volumes
from tests.new_bundle.test_write import TINY, command

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


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_the_report_has_their_numbers(tmp_path):
    """With CGGM, whose B needs the sums over both processes."""
    folder = made(tmp_path, folders(tmp_path / "data"))
    cggm = str(share_path("configs/methods/cggm.yaml"))
    # one epoch, and no statistics over the batch: otherwise the two differ
    words = {"encoder#norm": "instance", "epochs": 1, "val_interval": 1, "image_interval": 1, "warmup_epochs": 0}
    started(folder, tmp_path / "one", cggm, **words)
    first, second = in_two_processes(folder, tmp_path / "two", cggm, **words)
    assert all(torch.equal(first[key], second[key]) for key in first)
    one, two = (torch.load(tmp_path / name / "checkpoints/epoch_0001.pt", weights_only=True) for name in ("one", "two"))
    for part in ("model", "classifiers"):
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, rtol=0, atol=1e-5, msg=key)
    alone, both = (pd.read_csv(tmp_path / name / "iterations.csv") for name in ("one", "two"))
    names = [f"{part}/{name}" for part in ("epsilon", "balance") for name in ("adc", "t2")]
    np.testing.assert_allclose(both[names], alone[names], rtol=1e-4)
    assert_reported(tmp_path / "two", tmp_path / "report", ("adc", "t2"))
    assert "Mean Dice over label_1 and label_2 of each" in (tmp_path / "report/report.md").read_text()


def in_two_processes(folder: Path, out: Path, *overlays: str, **overrides: Any) -> list[dict[str, torch.Tensor]]:
    """Run a bundle as the head of its multi_gpu_train.yaml says; the weights that each process ends with."""
    spy = "$torch.save({k: v for m in (@network_def, @classifiers_def) for k, v in m.state_dict().items()}, "
    spy += f"{str(out.parent)!r} + f'/rank{{idist.get_rank()}}.pt')"
    (out.parent / "spy.yaml").write_text(yaml.safe_dump({"run": ["$@train#trainer.run()", spy]}))
    files = ["configs/train.yaml", *overlays, "configs/multi_gpu_train.yaml", str(out.parent / "spy.yaml")]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    line += ["-m", "monai.bundle", "run", "--logging_file", "False", "--config_file", str(files)]
    for key, value in {**SMALL, **overrides, "run_dir": out}.items():
        line += [f"--{key}", str(value)]
    ended = subprocess.run(line, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [torch.load(out.parent / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def assert_reported(folder: Path, out: Path, modalities: tuple[str, ...]) -> None:
    """``monai-cggm report`` of a run of one epoch with CGGM has the numbers of its tables."""
    printed = " ".join(command("report", folder, "--out", out).split())
    assert "Figure 3 Training with CGGM: figure_3.png, .svg, .csv" in printed
    assert "Table 5 Dice of the classifiers: table_5.csv" in printed
    curves = pd.read_csv(out / "figure_3.csv").set_index(["panel", "series"])["mean"]
    (table,) = pd.read_csv(out / "table_5.csv").to_dict("records")
    (epoch,) = pd.read_csv(folder / "epochs.csv").to_dict("records")
    for name in ("fusion", *modalities):
        dice = epoch[f"validation/{name}_dice_mean"]
        assert dice > 0
        assert table[name] == pytest.approx(dice)
        assert curves["validation Dice", name] == pytest.approx(dice)
    for name in modalities:
        assert curves["ε on training batches", name] == pytest.approx(epoch[f"epsilon/{name}"])
        modulated = epoch[f"gradient_norm/{name}"] * epoch[f"balance/{name}"]
        assert curves["gradient magnitude after modulation", name] == pytest.approx(modulated, rel=1e-4)


@pytest.mark.slow
def test_a_bundle_trains_on_its_own_overlapping_regions(tmp_path, monkeypatch):
    """Loss and scores are those of the regions that were asked for by label values, which are not class numbers."""
    source = folders(tmp_path / "data")
    for patient in PATIENTS:  # values 0, 3, 7
        file = source / patient / f"{patient}_seg.nii.gz"
        save(file, np.array([0, 3, 7], np.uint8)[np.asarray(nib.load(file).dataobj).astype(int)], AFFINE)
    folder = made(tmp_path, source, regions={"gland": [3, 7], "core": [7], "rim": [3]})
    calls: list[tuple[np.ndarray, np.ndarray, float]] = []
    forward = RegionDiceCrossEntropyLoss.forward

    def recorded(self: RegionDiceCrossEntropyLoss, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        loss = forward(self, logits, label)
        calls.append((logits.detach().double().numpy(), label.numpy(), loss.item()))
        return loss

    monkeypatch.setattr(RegionDiceCrossEntropyLoss, "forward", recorded)
    started(folder, tmp_path / "run", str(share_path("configs/parts/regions.yaml")))
    regions = {"gland": [1, 2], "core": [2], "rim": [1]}
    for logits, label, loss in calls:
        assert set(np.unique(label)) <= {0, 1, 2}
        assert loss == pytest.approx(reference(logits, label, regions, 1.0, 1.0), abs=1e-5)
    # In each step the fusion's loss and those of the classifiers; a validation has the fusion's alone.
    steps = pd.read_csv(tmp_path / "run/iterations.csv")[["loss/task", "loss/adc", "loss/t2"]]
    written = [loss for _, _, loss in calls]
    np.testing.assert_allclose([*steps.iloc[0], *steps.iloc[1]], written[:6], rtol=1e-5)
    epochs = pd.read_csv(tmp_path / "run/epochs.csv")
    assert epochs["validation/loss"].iloc[1] == pytest.approx(written[6], rel=1e-5)
    scores = epochs.filter(regex="^validation/.+_dice_").iloc[1]
    expected = {f"validation/{who}_dice_{name}" for who in ("fusion", "adc", "t2") for name in (*regions, "mean")}
    assert set(scores.index) == expected
    means = [scores[[f"validation/{who}_dice_{name}" for name in regions]].mean() for who in ("fusion", "adc", "t2")]
    np.testing.assert_allclose(scores.filter(like="_mean"), means, atol=1e-6)


@pytest.mark.slow
def test_a_pet_on_a_grid_of_its_own_is_aligned_and_trained_on(tmp_path):
    source, out = tmp_path / "data", tmp_path / "aligned"
    turned = np.array([[-2.0, 0.3, 0, 4], [-0.3, -2.0, 0, 3], [0, 0, 3.5, -4], [0, 0, 0, 1]])
    for number, patient in enumerate(PATIENTS):
        (ct,), label = volumes(number, 1)
        uptake = (label == 2) * 8.0 + 1.0
        shape = (22, 24, 14)
        there = grid_of(shape, turned, AFFINE)
        pet = map_coordinates(uptake, there, order=1, mode="nearest").reshape(shape)
        pet += np.random.default_rng(number).uniform(0, 0.1, shape)
        for key, voxels, affine in (
            ("ct", ct, AFFINE),
            ("pet", pet.astype(np.float32), turned),
            ("seg", label, AFFINE),
        ):
            save(source / patient / f"{patient}_{key}.nii.gz", voxels, affine)
    refused = CliRunner().invoke(app, ["new-bundle", str(tmp_path / "bundle"), "--data", str(source)])
    assert refused.exit_code == 1
    assert "monai-cggm align" in " ".join(refused.output.split())

    command("align", source, out, "--reference", "ct", "--modalities", "ct,pet", "--workers", 0)
    for patient in PATIENTS:
        before, after = (nib.load(root / patient / f"{patient}_pet.nii.gz") for root in (source, out))
        np.testing.assert_allclose(after.affine, AFFINE, atol=1e-5)
        pet, places = np.asarray(before.dataobj), grid_of(after.shape, AFFINE, turned)
        inside = ((places >= 0) & (places <= np.array(pet.shape)[:, None] - 1)).all(axis=0)
        assert 0.5 < inside.mean() < 1
        expected = map_coordinates(pet, places, order=1)
        np.testing.assert_allclose(np.asarray(after.dataobj).ravel()[inside], expected[inside], atol=1e-4)
        ct, label = (nib.load(out / patient / f"{patient}_{key}.nii.gz") for key in ("ct", "seg"))
        (unmoved,), truth = volumes(PATIENTS.index(patient), 1)
        np.testing.assert_array_equal(ct.dataobj, unmoved)
        np.testing.assert_array_equal(label.dataobj, truth)

    folder = made(tmp_path, out)
    assert yaml.safe_load((folder / "configs/train.yaml").read_text())["modalities"] == ["ct", "pet"]
    started(folder, tmp_path / "run", epochs=1, val_interval=1, image_interval=1, warmup_epochs=0)
    (step,) = pd.read_csv(tmp_path / "run/iterations.csv").to_dict("records")
    assert np.isfinite([step["train/loss"], step["loss/ct"], step["loss/pet"]]).all()
    assert min(step["gradient_norm/ct"], step["gradient_norm/pet"]) > 0


def grid_of(shape: tuple[int, ...], affine: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Where the voxels of one grid lie among those of another, (3, voxels)."""
    voxels = np.indices(shape).reshape(3, -1)
    world = affine[:3, :3] @ voxels + affine[:3, 3:]
    return np.linalg.solve(other[:3, :3], world - other[:3, 3:])


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
