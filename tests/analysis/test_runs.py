# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import numpy as np
import pytest

from monai_cggm.analysis.runs import (
    by_kind,
    differing_settings,
    kind_of,
    over_runs,
    read_gradients,
    read_run,
    read_runs,
)
from monai_cggm.errors import DataError
from tests.analysis.folders import CGGM, OBSERVE, cggm, make


@pytest.mark.parametrize(
    ("method", "modalities", "state", "label"),
    [
        (None, ["flair", "t1"], "joint", "joint"),
        (None, ["t1"], "unimodal", "t1 alone"),
        (OBSERVE, ["flair", "t1"], "observe", "observe"),
        (cggm(), ["flair", "t1"], "both", "CGGM, ρ=1.2, λ=0.1, paper"),
        (cggm(rule="positive", direction="weights"), ["flair"], "both", "CGGM, ρ=1.2, λ=0.1, positive, weights"),
        (cggm(direction="off"), ["flair", "t1"], "magnitude", "CGGM magnitude only, ρ=1.2, paper"),
        (cggm(direction=False), ["flair", "t1"], "magnitude", "CGGM magnitude only, ρ=1.2, paper"),
        (cggm(lam=0), ["flair", "t1"], "magnitude", "CGGM magnitude only, ρ=1.2, paper"),
        (cggm(magnitude="false"), ["flair", "t1"], "direction", "CGGM direction only, ρ=1.2, λ=0.1, paper"),
        (cggm(magnitude=False, direction="off"), ["flair"], "neither", "CGGM with both off, ρ=1.2, paper"),
        (cggm(direction="lagged"), ["flair", "t1"], "other", "CGGM, ρ=1.2, λ=0.1, paper, lagged"),
        (cggm(control="none", max_share=None), ["flair", "t1"], "both", "CGGM, ρ=1.2, λ=0.1, paper"),
        (cggm(control="shuffled"), ["flair"], "other", "CGGM, ρ=1.2, λ=0.1, paper, control=shuffled"),
        (cggm(max_share=0.5), ["flair"], "both", "CGGM, ρ=1.2, λ=0.1, paper, max_share=0.5"),
        ({"_target_": "mine.Relative", "strength": 1.0, "head": "@head"}, ["t1"], "other", "Relative, strength=1"),
    ],
)
def test_kind_by_configuration(method, modalities, state, label):
    kind = kind_of({"method": method, "modalities": modalities}, [], "run")
    assert (kind.state, kind.label) == (state, label)


def test_further_parts_make_another_kind():
    part = {"_target_": "monai_cggm.methods.AuxiliaryLosses", "observer": "@method", "weight": 1.0}
    other = {**part, "follow_balance": True}
    labels = [kind_of({"method": OBSERVE, "auxiliary": p}, [], "run").label for p in (None, part, other)]
    assert labels == [
        "observe",
        "observe + AuxiliaryLosses (weight=1)",
        "observe + AuxiliaryLosses (weight=1, follow_balance=true)",
    ]
    averaged = kind_of({"method": None, "modalities": ["a", "b"], "average": {"_target_": "EMAHandler"}}, [], "run")
    assert (averaged.state, averaged.label) == ("other", "joint + averaged weights")


@pytest.mark.parametrize(
    ("columns", "state"),
    [
        (["loss/task"], "joint"),
        (["epsilon/t1"], "observe"),
        (["epsilon/t1", "balance/t1"], "magnitude"),
        (["epsilon/t1", "balance/t1", "loss/gm"], "both"),
    ],
)
def test_kind_by_columns(columns, state):
    kind = kind_of({"rho": 1.2}, columns, "tuesday")
    assert (kind.state, kind.label) == (state, "tuesday")


def test_reads_a_run(tmp_path):
    run = read_run(make(tmp_path / "one", cggm(), seed=3, dice=0.6, test=0.4, resources={"peak_memory_mb": 10.0}))
    assert (run.name, run.seed, run.modalities, run.epochs_done, run.problems) == ("one", 3, ("flair", "t1"), 4, [])
    assert run.best is not None
    assert run.best["epoch"] == 3
    assert run.score("validation", "fusion") == pytest.approx(0.6)
    assert run.score("validation", "t1", "dice_WT") == pytest.approx(0.15)
    assert run.score("test", "flair") == pytest.approx(0.2)
    assert np.isnan(run.score("test", "nobody"))
    assert run.resources == {"peak_memory_mb": 10.0}


def test_a_killed_run_is_read_without_its_half_rows(tmp_path):
    folder = make(tmp_path / "killed", cggm(), epochs=2, planned=9)
    path = folder / "iterations.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:11]) + "1,11\n" + lines[11][:9])
    run = read_run(folder)
    assert run.iterations["iteration"].tolist() == list(range(1, 11))
    assert run.problems == [
        "iterations.csv: 2 rows half-written, left out",
        "not finished: 2 of 9 epochs are done",
    ]


def test_says_what_is_missing_or_broken(tmp_path):
    folder = make(tmp_path / "poor", OBSERVE, test=0.5, resources={})
    (folder / "config.yaml").write_text("a: [1\n")
    (folder / "resources.json").write_text("{")
    (folder / "test" / "summary.csv").write_text("what\never\n")
    (folder / "iterations.csv").unlink()
    run = read_run(folder)
    assert run.kind.state == "observe"
    assert run.modalities == ("flair", "t1")
    assert (run.tests, run.resources, run.iterations.empty) == ({}, {}, True)
    files = ["config.yaml cannot be read", "no iterations.csv", "test/summary.csv cannot", "resources.json cannot"]
    assert all(start in problem for start, problem in zip(files, run.problems, strict=True)), run.problems


@pytest.mark.parametrize("content", ["", "epoch,iteration\n", "epoch,iteration\n1,"])
def test_a_folder_without_a_row_is_no_run(tmp_path, content):
    (tmp_path / "epochs.csv").write_text(content)
    with pytest.raises(DataError, match=r"neither epochs\.csv nor iterations\.csv has a row"):
        read_run(tmp_path)


def test_reads_each_folder_once_and_tells_equal_names_apart(tmp_path):
    first, second = make(tmp_path / "a/run", None), make(tmp_path / "b/run", None)
    runs, left_out = read_runs([first, second, str(first), tmp_path / "none"])
    assert [run.name for run in runs] == ["a/run", "b/run"]
    assert left_out == [f"{tmp_path / 'none'}: no such folder"]


def test_runs_are_averaged_over_seeds(tmp_path):
    folders = [make(tmp_path / f"s{i}", OBSERVE, seed=i, dice=d, epochs=2 + i) for i, d in enumerate((0.4, 0.6))]
    runs, _ = read_runs([*folders, make(tmp_path / "c", cggm())])
    groups = by_kind(runs)
    assert [kind.state for kind in groups] == ["observe", "both"]
    (group, _) = groups.values()
    found = over_runs(group, "epochs", "validation/val_dice")
    # of two epochs the first is the best, of three the second
    assert found["epoch"].tolist() == [1, 2, 3]
    np.testing.assert_allclose(found["mean"], [np.mean([0.4, 0.5]), np.mean([0.3, 0.6]), 0.5])
    np.testing.assert_allclose(found["sd"], [np.std([0.4, 0.5], ddof=1), np.std([0.3, 0.6], ddof=1), np.nan])
    assert found["runs"].tolist() == [2, 2, 1]
    assert over_runs(group, "epochs", "validation/none").empty


def test_infinite_values_do_not_count(tmp_path):
    folder = make(tmp_path / "one", cggm(), terms=lambda name, n: np.inf if n == 2 else 1.0)
    assert 2 not in over_runs([read_run(folder)], "iterations", "balance/t1")["iteration"].tolist()


def test_settings_that_differ(tmp_path):
    one = make(tmp_path / "one", None, config={"run_dir": "here", "gradient_clip": 1.0, "encoder": {"width": 1}})
    two = make(tmp_path / "two", None, seed=1, config={"run_dir": "there", "gradient_clip": None})
    runs, _ = read_runs([one, two])
    assert differing_settings(runs).to_dict("records") == [{"setting": "gradient_clip", "one": "1", "two": "null"}]
    assert differing_settings(runs[:1]).empty


def test_gradients_that_cannot_be_read(tmp_path):
    run = read_run(make(tmp_path / "one", cggm(), gradients=2))
    assert isinstance(read_gradients(run), dict)
    path = run.folder / "gradients.npz"
    path.write_bytes(path.read_bytes()[:100])
    assert "one/gradients.npz cannot be read" in str(read_gradients(run))
    path.unlink()
    assert read_gradients(run) == "one has no gradients.npz"


def test_reading_needs_no_torch():
    code = "import sys, monai_cggm.analysis.run_report; print({'torch', 'monai', 'sklearn'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_method_that_is_the_default_has_the_papers_numbers():
    assert kind_of({"method": CGGM}, [], "run").rho == 1.2


def test_b_on_the_gradient_goes_without_saying_and_on_the_update_does_not():
    method = {"_target_": "monai_cggm.methods.CGGM", "rho": 1.2, "lam": 0.1}
    plain, gradient, update = (
        kind_of({"method": {**method, **extra}}, [], "run")
        for extra in ({}, {"scale": "gradient"}, {"scale": "update"})
    )
    assert gradient == plain
    assert plain.state == "both"
    assert (update.state, update.label) == ("other", "CGGM, ρ=1.2, λ=0.1, paper, scale=update")
