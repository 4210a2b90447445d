# SPDX-License-Identifier: Apache-2.0
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from monai_cggm.compare import read_study, run_study, runner
from monai_cggm.compare.cell import _TEACHERS, _last_words, facts_of
from monai_cggm.data import split_cases
from monai_cggm.data.checks import Cases
from monai_cggm.errors import DataError
from monai_cggm.resources import share_path
from tests.compare.test_study import written

#: what the data hold
CASES = [{"case": name, **dict.fromkeys(("flair", "t1ce", "t1", "t2"), name)} for name in "abc"]
SPLIT = {"seed": 0, "train": ["a"], "validation": ["b"], "test": ["c"]}
HEADER = ["case", "predictor", "convention", "dice_WT", "dice_mean", "hd95_WT"]


class Bundle:
    """Stands in for `python -m monai.bundle run`: writes what a run writes, and keeps what it was asked for."""

    def __init__(self, fail=(), before=lambda settings: None):
        self.calls = []
        self.fail = set(fail)
        self.before = before

    def __call__(self, command, log, environment):
        files = [Path(f) for f in yaml.safe_load(command[command.index("--config_file") + 1])]
        settings = yaml.safe_load(files[-1].read_text())
        scoring = any(f.name == "evaluate.yaml" for f in files)
        run_dir = Path(settings["run_dir"])
        arm = run_dir.parent.name
        self.calls.append((arm, settings["seed"], "score" if scoring else "train", files, environment))
        self.before(settings)
        if arm in self.fail:
            log.write_text(f"Traceback\nRuntimeError: lr is wrong in {run_dir}\n")
            return 1
        if scoring:
            self.score(run_dir, settings)
        else:
            (run_dir / "epochs.csv").write_text(
                "epoch,iteration,validation/val_dice\n1,5,0.25\n2,10,0.75\n3,15,\n4,20,0.5\n"
            )
            resources = {"training_seconds": 2.5, "peak_memory_mb": 10.0 + settings["seed"], "parameters": 7}
            resources |= {"classifier_parameters": 0, "device": "cpu", "threads": 1}
            (run_dir / "resources.json").write_text(json.dumps(resources))
            (run_dir / "checkpoints").mkdir(exist_ok=True)
            self.trained(run_dir, settings)
        return 0

    def trained(self, run_dir, settings):
        """What else a training leaves behind."""

    def score(self, run_dir, settings):
        folder = run_dir / f"{settings['part']}_subsets"
        folder.mkdir()
        with (folder / "cases.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(HEADER)
            rows.writerow(["c", "fusion", settings["convention"], 0.123456789, 1.0, 3.25])
            rows.writerow(["c", "fusion[t1+t2]", settings["convention"], 0.5, 0.5, ""])
            rows.writerow(["c", "t2", settings["convention"], 0.0, 0.0, ""])


@pytest.fixture(autouse=True)
def cases(monkeypatch):
    """The data are not what is tested here."""
    monkeypatch.setattr(runner, "_cases", lambda study, data: CASES)


@pytest.fixture
def study(tmp_path):
    split = tmp_path / "part.json"
    split.write_text(json.dumps(SPLIT))
    return read_study(written(tmp_path, splits=[str(split)], seeds=[0, 1]))


def run(study, tmp_path, bundle, **kwargs):
    return run_study(study, tmp_path, tmp_path / "out", launch=bundle, jobs=1, **kwargs)


def test_a_cell_is_trained_scored_and_kept_in_small(study, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    bundle = Bundle()
    facts = run(study, tmp_path, bundle)
    assert len(facts) == 6
    assert {f["status"] for f in facts} == {"done"}
    arm, seed, what, files, environment = bundle.calls[0]
    assert (arm, seed, what) == ("joint", 0, "train")
    assert [f.name for f in files] == ["train.yaml", "joint.yaml", "settings.yaml"]
    assert environment == {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    assert [f.name for f in bundle.calls[1][3]] == ["train.yaml", "joint.yaml", "evaluate.yaml", "settings.yaml"]
    settings = yaml.safe_load(files[-1].read_text())
    assert settings["epochs"] == 4
    assert settings["seed"] == 0
    assert settings["resume"] is True
    assert settings["split_file"] == str(tmp_path / "part.json")
    folder = tmp_path / "out/cells/joint/part-seed1"
    assert (folder / "scores.csv").read_text().splitlines() == [
        "case,part,predictor,subset,dice_WT,dice_mean,hd95_WT",
        "c,test,fusion,flair+t1ce+t1+t2,0.1235,1.0000,3.2500",
        "c,test,fusion,t1+t2,0.5000,0.5000,",
        "c,test,t2,t2,0.0000,0.0000,",
    ]
    cell = facts_of(folder)
    assert cell["best_epoch"] == 2  # the largest validation Dice
    assert cell["iterations"] == 20
    assert cell["epochs"] == 4
    assert cell["validations"] == 3
    assert cell["peak_memory_mb"] == 11.0
    assert cell["overlays"] == ["configs/methods/joint.yaml"]
    assert str(tmp_path) not in (folder / "cell.json").read_text()
    assert str(tmp_path) not in (tmp_path / "out/study.yaml").read_text().replace(str(tmp_path / "part.json"), "")
    assert not (tmp_path / "out/runs/joint/part-seed1/checkpoints").exists()


def test_finished_cells_are_kept_and_the_others_go_on(study, tmp_path):
    run(study, tmp_path, Bundle(fail={"recipe"}))
    again = Bundle()
    facts = run(study, tmp_path, again)
    assert {(arm, seed) for arm, seed, *_ in again.calls} == {("recipe", 0), ("recipe", 1)}
    assert {f["status"] for f in facts} == {"done"}


def test_a_cell_that_fails_is_reported_and_stops_nothing(study, tmp_path):
    seen = []
    facts = run(study, tmp_path, Bundle(fail={"recipe"}), watch=lambda cell, fact: seen.append((cell.folder, fact)))
    failed = [f for f in facts if f["status"] == "failed"]
    assert [(f["arm"], f["seed"]) for f in failed] == [("recipe", 0), ("recipe", 1)]
    assert failed[0]["error"] == "RuntimeError: lr is wrong in OUT/runs/recipe/part-seed0"
    assert not (tmp_path / "out/cells/recipe/part-seed0/scores.csv").exists()
    assert len([f for _, f in seen if f is None]) == 6
    assert len([f for _, f in seen if f is not None]) == 6


def test_a_damaged_file_of_a_cell_that_fails_stops_nothing(study, tmp_path):
    def damage(settings):
        if "recipe" in settings["run_dir"]:
            (Path(settings["run_dir"]) / "epochs.csv").write_text("epoch,iteration\n,\n")

    facts = run(study, tmp_path, Bundle(fail={"recipe"}, before=damage))
    assert [f["status"] for f in facts].count("done") == 4
    found = json.loads((tmp_path / "out/cells/recipe/part-seed0/cell.json").read_text())
    assert (found["status"], found["seed"]) == ("failed", 0)
    assert found["error"].startswith("ValueError: invalid literal for int()")


def test_a_finished_cell_of_another_plan_is_not_taken_for_one_of_this(study, tmp_path):
    run(study, tmp_path, Bundle())
    other = read_study(tmp_path / "study.yaml", settings={"epochs": 5}, seeds=[0, 1])
    bundle = Bundle()
    with pytest.raises(DataError) as error:
        run(other, tmp_path, bundle)
    assert len(error.value.problems) == 6
    assert "settings was {'epochs': 4}, is {'epochs': 5}" in error.value.problems[0]
    assert bundle.calls == []


def test_a_cell_that_was_begun_does_not_go_on_under_another_plan(study, tmp_path):
    run(study, tmp_path, Bundle(fail={"joint", "recipe", "plain"}))
    other = read_study(tmp_path / "study.yaml", settings={"learning_rate": 9.0}, seeds=[0, 1])
    with pytest.raises(DataError) as error:
        run(other, tmp_path, Bundle())
    assert len(error.value.problems) == 6
    assert "is {'epochs': 4, 'learning_rate': 9.0}" in error.value.problems[0]


def test_another_split_of_the_same_name_is_another_plan(study, tmp_path):
    run(study, tmp_path, Bundle())
    (tmp_path / "part.json").write_text(json.dumps({**SPLIT, "train": ["c"], "test": ["a"]}))
    with pytest.raises(DataError, match="cases was"):
        run(study, tmp_path, Bundle())


def test_changed_overlays_are_told_of_finished_cells_and_refused_of_begun_ones(tmp_path, caplog):
    (tmp_path / "part.json").write_text(json.dumps(SPLIT))
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("lam: 0.1")
    arms = {"joint": {"overlays": [str(overlay)]}, "plain": None}
    study = read_study(written(tmp_path, arms=arms, splits=[str(tmp_path / "part.json")], seeds=[0]))
    run(study, tmp_path, Bundle(fail={"plain"}))
    overlay.write_text("lam: 0.1  # a comment changes nothing")
    run(study, tmp_path, Bundle(fail={"plain"}))
    assert "have changed since" not in caplog.text
    overlay.write_text("lam: 0.2")
    run(study, tmp_path, Bundle(fail={"plain"}))
    assert "configuration files have changed since 1 kept cells were run: joint/part-seed0" in caplog.text
    (tmp_path / "out/cells/joint/part-seed0/cell.json").unlink()
    with pytest.raises(DataError, match="configuration was"):
        run(study, tmp_path, Bundle())


def test_a_fault_of_our_own_is_one_cell_s_too(study, tmp_path):
    class Empty(Bundle):
        def score(self, run_dir, settings):
            if run_dir.parent.name == "plain":
                (run_dir / "test_subsets").mkdir()
                (run_dir / "test_subsets/cases.csv").write_text("case,predictor\n")
            else:
                super().score(run_dir, settings)

    facts = run(study, tmp_path, Empty())
    assert {f["arm"]: f["status"] for f in facts} == {"joint": "done", "recipe": "done", "plain": "failed"}
    error = facts_of(tmp_path / "out/cells/plain/part-seed1")["error"]
    assert error == "DataError: the scoring wrote no case into test_subsets/cases.csv"


def test_a_split_that_does_not_fit_the_data_is_refused_before_any_training(study, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_cases", lambda study, data: CASES[:2])
    bundle = Bundle()
    with pytest.raises(DataError, match="case c: is in the split and not among the cases"):
        run(study, tmp_path, bundle)
    assert bundle.calls == []


def test_a_modality_that_no_case_of_a_part_has_cannot_be_trained_alone(tmp_path, monkeypatch):
    (tmp_path / "part.json").write_text(json.dumps(SPLIT))
    gap = [{k: v for k, v in case.items() if (k, case["case"]) != ("t2", "c")} for case in CASES]
    monkeypatch.setattr(runner, "_cases", lambda study, data: gap)
    changes = {"splits": [str(tmp_path / "part.json")], "seeds": [0], "settings": {"modalities": ["t1", "t2"]}}
    bundle = Bundle()
    with pytest.raises(
        DataError, match=r"part\.json: no test case has t2, and alone_t2 is to be trained on it"
    ) as error:
        run(read_study(written(tmp_path, alone=True, arms={"joint": None}, **changes)), tmp_path, bundle)
    assert len(error.value.problems) == 1
    assert bundle.calls == []
    chosen = read_study(written(tmp_path, alone=True, arms={"joint": None}, part="validation", **changes))
    runner._check_cases([tmp_path / "part.json"], gap, chosen)  # nothing looks at the test cases
    together = run(read_study(written(tmp_path, alone=False, arms={"joint": None}, **changes)), tmp_path, bundle)
    assert [f["status"] for f in together] == ["done"]


def test_a_split_may_name_what_the_data_left_out(study, tmp_path, monkeypatch):
    cases = Cases(CASES[:2], {"c": "its labels are of no class"})
    monkeypatch.undo()
    monkeypatch.setattr(runner, "_part_of_bundle", lambda name, study, data: cases)
    assert {f["status"] for f in run(study, tmp_path, Bundle())} == {"done"}


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        (b"Traceback\nValueError: no\nhint: mirror padding\n", 1, "ValueError: no"),
        (b"IndexError: 7\nTraceback\nRuntimeError: Failed to evaluate ConfigExpression:\n", 1, "IndexError: 7"),
        (
            b"RuntimeError: Failed to instantiate component 'x'\n",
            1,
            "RuntimeError: Failed to instantiate component 'x'",
        ),
        (b"error: /data does not exist\n", 1, "error: /data does not exist"),
        (b"epoch 3\n", -9, "killed by signal 9; last line: epoch 3"),
        (b"WARNING: mirror padding\nlast\n", 3, "last"),
        (b"", 1, "no output"),
    ],
)
def test_the_last_words_are_those_of_the_last_attempt(tmp_path, said, code, words):
    log = tmp_path / "log.txt"
    log.write_bytes(b"RuntimeError: an old fault\n")
    start = log.stat().st_size
    with log.open("ab") as file:
        file.write(said)
    assert _last_words(log, code, start) == words


@pytest.mark.parametrize(
    ("visible", "jobs", "expected"), [(None, None, ["0", "1"]), ("2,5", None, ["2", "5"]), ("2,5", 3, ["2", "5", "2"])]
)
def test_one_cell_a_gpu_of_those_that_may_be_used(monkeypatch, visible, jobs, expected):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    devices = runner._devices(jobs, threads=3)
    assert [device["CUDA_VISIBLE_DEVICES"] for device in devices] == expected
    assert {device["OMP_NUM_THREADS"] for device in devices} == {"3"}


def test_side_by_side(study, tmp_path):
    both = threading.Barrier(2, timeout=20)
    waited = []

    def before(settings):
        if settings["seed"] == 0 and len(waited) < 2:
            waited.append(1)
            both.wait()  # passes only where two cells run at a time

    facts = run_study(study, tmp_path, tmp_path / "out", launch=Bundle(before=before), jobs=2, threads=3)
    assert len(facts) == 6


def test_members_first_then_their_ensemble(tmp_path):
    torch = pytest.importorskip("torch")
    (tmp_path / "part.json").write_text(json.dumps(SPLIT))
    path = written(
        tmp_path,
        alone=True,
        splits=[str(tmp_path / "part.json")],
        seeds=[3],
        settings={"modalities": ["t1", "t2"]},
        arms={"joint": None},
    )

    def before(settings):
        if settings["modalities"] != ["t1", "t2"]:
            state = {"weight": torch.tensor([float(settings["modalities"] == ["t2"])])}
            torch.save({"model": state}, Path(settings["run_dir"]) / "model.pt")

    bundle = Bundle(before=before)
    facts = run(read_study(path), tmp_path, bundle)
    assert [(arm, what) for arm, _, what, *_ in bundle.calls][-1] == ("ensemble", "score")
    assert ("ensemble", "train") not in [(arm, what) for arm, _, what, *_ in bundle.calls]
    joined = torch.load(tmp_path / "out/runs/ensemble/part-seed3/model.pt", weights_only=True)["model"]
    assert {k: v.item() for k, v in joined.items()} == {"networks.t1.weight": 0.0, "networks.t2.weight": 1.0}
    ensemble = next(f for f in facts if f["arm"] == "ensemble")
    assert ensemble["parameters"] == 14
    assert ensemble["training_seconds"] == 5.0
    alone = next(f for f in facts if f["arm"] == "alone_t1")
    assert alone["modalities"] == ["t1"]
    first = (tmp_path / "out/cells/alone_t1/part-seed3/scores.csv").read_text().splitlines()[1]
    assert first.startswith("c,test,fusion,t1,")


def test_an_ensemble_does_not_wait_for_the_next_seed(tmp_path):
    torch = pytest.importorskip("torch")
    (tmp_path / "part.json").write_text(json.dumps(SPLIT))
    changes = {"alone": True, "splits": [str(tmp_path / "part.json")], "seeds": [3, 4], "arms": {"joint": None}}
    path = written(tmp_path, **changes, settings={"modalities": ["t1", "t2"]})

    def before(settings):
        torch.save({"model": {"weight": torch.zeros(1)}}, Path(settings["run_dir"]) / "model.pt")

    bundle = Bundle(before=before)
    run(read_study(path), tmp_path, bundle)
    scored = [(arm, seed) for arm, seed, what, *_ in bundle.calls if what == "score"]
    arms = ["joint", "alone_t1", "alone_t2", "ensemble"]
    assert scored == [(arm, seed) for seed in (3, 4) for arm in arms]


class Networks(Bundle):
    """Leaves a model.pt behind, which says whose it is."""

    def trained(self, run_dir, settings):
        (run_dir / "model.pt").write_text(f"{run_dir.parent.name} {settings['seed']}")


@pytest.fixture
def needy(tmp_path):
    """An arm that needs the networks alone, and one that needs the reference too; no ensemble: t2 is not among them."""
    (tmp_path / "part.json").write_text(json.dumps(SPLIT))
    arms = {"joint": None, "umt": {"needs": "alone"}, "blending": {"needs": ["alone", "joint"]}, "plain": None}
    return written(
        tmp_path,
        alone=True,
        splits=[str(tmp_path / "part.json")],
        seeds=[3, 4],
        settings={"modalities": ["t1", "t2"]},
        arms=arms,
    )


@pytest.fixture(autouse=True)
def no_ensembles(monkeypatch, request):
    """Its members are no networks in tests of what needs them."""
    if "needy" in request.fixturenames:
        monkeypatch.setattr(runner, "_members_are_done", lambda *_: False)


def test_an_arm_gets_the_networks_that_it_needs(needy, tmp_path):
    bundle = Networks()
    facts = run(read_study(needy), tmp_path, bundle)
    assert {f["status"] for f in facts} == {"done"}
    trained = [(arm, seed) for arm, seed, what, *_ in bundle.calls if what == "train"]
    # it begins as soon as the last that it needs has ended, and not after everything else
    assert trained == [
        *[("joint", 3), ("plain", 3), ("alone_t1", 3), ("alone_t2", 3), ("umt", 3), ("blending", 3)],
        *[("joint", 4), ("plain", 4), ("alone_t1", 4), ("alone_t2", 4), ("umt", 4), ("blending", 4)],
    ]
    teachers = tmp_path / "out/runs/blending/part-seed4/teachers"
    found = {path.parent.name: path.read_text() for path in teachers.rglob("model.pt")}
    assert found == {"t1": "alone_t1 4", "t2": "alone_t2 4", "joint": "joint 4"}
    assert {p.name for p in (tmp_path / "out/runs/umt/part-seed3/teachers").iterdir()} == {"t1", "t2"}
    cell = facts_of(tmp_path / "out/cells/umt/part-seed3")
    assert cell["needs"] == ["alone"]
    assert str(tmp_path) not in (tmp_path / "out/runs/umt/part-seed3/plan.json").read_text()
    assert "needs" not in facts_of(tmp_path / "out/cells/joint/part-seed3")
    again = Networks()
    assert len(run(read_study(needy), tmp_path, again)) == 12
    assert again.calls == []


@pytest.mark.parametrize("name", ["umt", "g_blending"])
def test_the_overlays_look_where_the_networks_are_put(name):
    """The contract with the methods that need them."""
    overlay = yaml.safe_load(share_path(f"configs/methods/{name}.yaml").read_text("utf-8"))
    assert overlay["teacher_runs"] == f"$@run_dir + '/{_TEACHERS}/{{modality}}'"


def test_side_by_side_an_arm_waits_for_what_it_needs(needy, tmp_path):
    """Networks alone take long; the arm without needs begins before them, and those that need them after them."""
    events = []

    def before(settings):
        arm = Path(settings["run_dir"]).parent.name
        events.append((arm, settings["seed"]))
        time.sleep(0.3 if arm.startswith("alone") else 0.0)

    facts = run_study(read_study(needy), tmp_path, tmp_path / "out", launch=Networks(before=before), jobs=3)
    assert [f["error"] for f in facts] == [None] * 12
    for seed in (3, 4):
        members = [max(i for i, event in enumerate(events) if event == (f"alone_{m}", seed)) for m in ("t1", "t2")]
        for arm in ("umt", "blending"):
            assert events.index((arm, seed)) > max(members)
    assert events.index(("umt", 3)) < len(events) - 6


def test_an_arm_whose_needs_fail_fails_with_the_reason_and_is_tried_again(needy, tmp_path):
    study = read_study(needy)
    facts = run(study, tmp_path, Networks(fail={"alone_t1"}))
    failed = {f["arm"]: f["error"] for f in facts if f["status"] == "failed" and f["seed"] == 3}
    assert set(failed) == {"alone_t1", "umt", "blending"}
    assert failed["umt"] == (
        "DataError: it needs alone_t1/part-seed3, which is failed: "
        "RuntimeError: lr is wrong in OUT/runs/alone_t1/part-seed3"
    )
    assert {f["arm"] for f in facts if f["status"] == "done"} == {"joint", "plain", "alone_t2"}
    again = Networks()
    assert {f["status"] for f in run(study, tmp_path, again)} == {"done"}
    assert {arm for arm, *_ in again.calls} == {"alone_t1", "umt", "blending"}


def test_cells_that_were_kept_without_their_runs_are_named(needy, tmp_path):
    study = read_study(needy, arms=["alone_t1", "alone_t2"])
    run(study, tmp_path, Networks())
    shutil.rmtree(tmp_path / "out/runs")
    facts = run(read_study(needy, seeds=[3]), tmp_path, Networks())
    error = next(f["error"] for f in facts if f["arm"] == "umt")
    assert error.startswith(
        "DataError: 2 problems: it needs runs/alone_t1/part-seed3/model.pt, and there is no such file"
    )
    assert "remove cells/alone_t2/part-seed3 and start again, which trains it anew" in error
    for modality in ("t1", "t2"):
        shutil.rmtree(tmp_path / f"out/cells/alone_{modality}/part-seed3")
    shutil.rmtree(tmp_path / "out/cells/joint/part-seed3")
    assert {f["status"] for f in run(read_study(needy, seeds=[3]), tmp_path, Networks())} == {"done"}


def test_a_cell_that_was_begun_goes_on_with_the_networks_that_it_was_given(needy, tmp_path):
    study = read_study(needy, seeds=[3])
    run(study, tmp_path, Networks(fail={"umt"}))
    (tmp_path / "out/runs/alone_t1/part-seed3/model.pt").write_text("another")
    run(study, tmp_path, Networks())
    assert (tmp_path / "out/runs/umt/part-seed3/teachers/t1/model.pt").read_text() == "alone_t1 3"


def test_an_ensemble_without_the_runs_of_its_members_says_so(tmp_path):
    (tmp_path / "part.json").write_text(json.dumps(SPLIT))
    changes = {"alone": True, "splits": [str(tmp_path / "part.json")], "seeds": [0], "arms": {"joint": None}}
    facts = run(read_study(written(tmp_path, **changes)), tmp_path, Bundle())  # which writes no model.pt
    error = next(f["error"] for f in facts if f["arm"] == "ensemble")
    assert "it needs runs/alone_t1ce/part-seed0/model.pt, and there is no such file" in error


class Classification(Bundle):
    """Scores samples, and validates by accuracy."""

    columns = ("case", "predictor", "truth", "prediction", "accuracy")

    def trained(self, run_dir, settings):
        epochs = "epoch,iteration,train/epoch_loss,validation/val_accuracy,validation/loss\n"
        epochs += "1,5,1.0,0.25,9\n2,10,0.5,0.5,8\n3,15,0.4,0.75,7\n4,20,0.3,0.5,6\n"
        (run_dir / "epochs.csv").write_text(epochs)

    def score(self, run_dir, settings):
        assert "convention" not in settings
        folder = run_dir / f"{settings['part']}_subsets"
        folder.mkdir()
        with (folder / "cases.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(self.columns)
            rows.writerow(["007", "fusion", 3, 3, 1][: len(self.columns)])
            rows.writerow(["007", "t2", 3, 8, 0][: len(self.columns)])


def test_a_classification_is_kept_by_its_accuracy(tmp_path):
    (tmp_path / "part.json").write_text(json.dumps(SPLIT))
    path = written(tmp_path, score="accuracy", splits=[str(tmp_path / "part.json")], seeds=[0], arms={"joint": None})
    run(read_study(path), tmp_path, Classification())
    folder = tmp_path / "out/cells/joint/part-seed0"
    assert (folder / "scores.csv").read_text().splitlines() == [
        "case,part,predictor,subset,accuracy",
        "007,test,fusion,flair+t1ce+t1+t2,1.0000",
        "007,test,t2,t2,0.0000",
    ]
    cell = facts_of(folder)
    assert (cell["best_epoch"], cell["validations"]) == (3, 4)
    assert cell["score"] == "accuracy"
    assert "convention" not in cell
    other = read_study(written(tmp_path, splits=[str(tmp_path / "part.json")], seeds=[0], arms={"joint": None}))
    with pytest.raises(DataError, match="convention was None, is brats_legacy"):
        run(other, tmp_path, Bundle())


def test_a_score_that_the_scoring_does_not_write_is_named(tmp_path):
    class Less(Classification):
        columns = ("case", "predictor", "truth", "prediction")

    (tmp_path / "part.json").write_text(json.dumps(SPLIT))
    path = written(tmp_path, score="accuracy", splits=[str(tmp_path / "part.json")], seeds=[0], arms={"joint": None})
    (facts,) = run(read_study(path), tmp_path, Less())
    assert facts["error"] == (
        "DataError: test_subsets/cases.csv has no accuracy, found case, predictor, truth, prediction"
    )


def test_cells_of_before_have_the_plan_of_a_dice_study(study, tmp_path):
    """What an older version wrote is neither run again nor refused."""
    run(study, tmp_path, Bundle())
    keys = "arm split seed overlays settings config evaluation cases part convention configuration"
    assert list(facts_of(tmp_path / "out/cells/joint/part-seed0"))[:11] == keys.split()


def test_cases_and_a_drawn_split_are_those_of_the_bundle(tmp_path, monkeypatch):
    monkeypatch.undo()  # the stand-in for the cases
    (tmp_path / "train.yaml").write_text(
        "modalities: [t1, t2]\nseed: 9\nsplit_sizes: null\nsplit_file: nowhere.json\ndataset_dir: null\nepochs: 1\n"
        "cases: \"$[{'case': @dataset_dir + str(i)} for i in range(8)]\"\n"
        "split: {_target_: monai_cggm.data.split_cases, cases: '@cases', sizes: '@split_sizes', seed: '@seed',\n"
        "  split_file: '@split_file'}\n"
    )
    changes = {"config": [str(tmp_path / "train.yaml")], "arms": {"joint": None}, "seeds": [0]}
    study = read_study(written(tmp_path, **changes, settings={"split_sizes": [4, 3, 1]}))
    assert [case["case"] for case in runner._cases(study, "s")] == [f"s{i}" for i in range(8)]
    run_study(study, "s", tmp_path / "out", launch=Bundle(), jobs=1)
    drawn = json.loads((tmp_path / "out/split.json").read_text())
    assert [len(drawn[part]) for part in ("train", "validation", "test")] == [4, 3, 1]
    assert drawn["seed"] == 0
    cases = [{"case": f"s{i}"} for i in range(8)]
    expected = split_cases(cases, sizes=[4, 3, 1], seed=0)
    assert drawn["test"] == [case["case"] for case in expected["test"]]


def test_bad_data_are_told_plainly_before_any_training(tmp_path, monkeypatch):
    monkeypatch.undo()
    bundle = Bundle()
    with pytest.raises(DataError, match="nowhere"):
        run_study(read_study(written(tmp_path, seeds=[0])), tmp_path / "nowhere", tmp_path / "out", launch=bundle)
    assert bundle.calls == []


def test_no_ensemble_without_all_of_its_members(tmp_path):
    (tmp_path / "part.json").write_text(json.dumps(SPLIT))
    path = written(tmp_path, alone=True, splits=[str(tmp_path / "part.json")], seeds=[0], arms={"joint": None})
    facts = run(read_study(path), tmp_path, Bundle(fail={"alone_t1"}))
    assert {f["arm"] for f in facts} == {"joint", "alone_flair", "alone_t1ce", "alone_t1", "alone_t2"}


@pytest.mark.skipif(os.name != "posix", reason="the lock is POSIX")
def test_one_comparison_at_a_time_in_a_folder(study, tmp_path):
    import fcntl

    (tmp_path / "out").mkdir()
    with (tmp_path / "out/.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another comparison runs in"):
            run(study, tmp_path, Bundle())
    assert len(run(study, tmp_path, Bundle())) == 6


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_comparison_that_is_told_to_end_takes_its_cells_with_it(study, tmp_path, number):
    # every cell is a process that would sleep for a minute
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/child\nexec sleep 60\n")
    fake.chmod(0o755)
    code = (
        # what a shell starts in the background would ignore it
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys; from monai_cggm.compare import read_study, run_study; from monai_cggm.compare import cell\n"
        "from monai_cggm.compare import runner\n"
        f"runner._cases = lambda study, data: {CASES!r}\n"
        f"cell.sys = type('S', (), {{'executable': {str(fake)!r}}})\n"
        f"study = read_study({str(tmp_path / 'study.yaml')!r})\n"
        f"run_study(study, {str(tmp_path)!r}, {str(tmp_path / 'out')!r}, jobs=1)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    child = tmp_path / "child"
    for _ in range(1200):  # a busy machine takes long to import
        if child.is_file() and child.read_text().strip():
            break
        time.sleep(0.1)
    pid = int(child.read_text())
    parent.send_signal(number)
    assert parent.wait(timeout=120) != 0  # half a second where nothing else runs
    time.sleep(0.5)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert facts_of(tmp_path / "out/cells/joint/part-seed0") is None  # neither done nor failed: it goes on next time


@pytest.mark.parametrize(
    ("text", "message"), [('{"arm": ', "cannot be read as JSON"), ("[1]", "says nothing of a cell")]
)
def test_a_cell_whose_facts_are_broken_is_named(study, tmp_path, text, message):
    run(study, tmp_path, Bundle())
    broken = next(tmp_path.glob("out/cells/recipe/*/cell.json"))
    broken.write_text(text)
    with pytest.raises(DataError, match=rf"recipe.*cell.json: {message}.*remove its folder to run the cell again"):
        run(study, tmp_path, Bundle())
