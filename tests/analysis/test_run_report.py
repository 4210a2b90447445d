# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from monai_cggm.analysis.figures import LeftOut
from monai_cggm.analysis.run_report import markdown, table_5, table_6, table_8, write_report
from monai_cggm.analysis.runs import read_runs
from monai_cggm.data.phantom import write_phantoms
from monai_cggm.errors import DataError
from monai_cggm.handlers import GradientRecorder
from tests.analysis.folders import OBSERVE, cggm, make
from tests.bundles.running import TINY, workflow

CPU = {"device": "cpu", "threads": 1, "parameters": 1000}


def read(*folders):
    return read_runs(folders)[0]


def experiment(root):
    """A run of everything that the report wants."""
    with_them = {**CPU, "classifier_parameters": 2**18, "peak_memory_mb": 150.0, "training_seconds": 30.0}
    return [
        make(root / "joint", None, resources={**CPU, "classifier_parameters": 0, "peak_memory_mb": 120.0}),
        make(root / "flair", None, modalities=("flair",), dice=0.3),
        make(root / "observe", OBSERVE, dice=0.5, gradients=4, resources=with_them),
        make(root / "both", cggm(), dice=0.6, test=0.7),
        make(root / "both_1", cggm(), dice=0.8, seed=1),
        make(root / "magnitude", cggm(direction="off")),
        make(root / "direction", cggm(magnitude=False)),
        make(root / "rho", cggm(rho=1.0)),
    ]


def test_table_5(tmp_path):
    item = table_5(read(*experiment(tmp_path)))
    validation = item.data[item.data["scores"] == "validation, best epoch"].set_index("training")
    assert validation.loc["unimodal training", "flair"] == pytest.approx(0.3)
    assert math.isnan(validation.loc["unimodal training", "t1"])
    assert validation.loc["joint training, watched", "t1"] == pytest.approx(0.5 / 4)
    both = validation.loc["CGGM, ρ=1.2, λ=0.1, paper"]
    assert both["runs"] == 2
    assert both["flair"] == pytest.approx(0.35)
    assert both["flair_sd"] == pytest.approx(np.std([0.3, 0.4], ddof=1))
    (test,) = item.data[item.data["scores"] == "test"].to_dict("records")
    assert (test["training"], test["runs"]) == ("CGGM, ρ=1.2, λ=0.1, paper", 1)
    assert test["t1"] == pytest.approx(0.7 / 4)
    cells = item.shown.set_index(["training", "scores"]).loc[("CGGM, ρ=1.2, λ=0.1, paper", "validation, best epoch")]
    assert cells["flair"] == "0.350 ± 0.071"
    assert "joint" not in set(item.data["training"])


def test_table_6(tmp_path):
    item = table_6(read(*experiment(tmp_path)))
    table = item.data[item.data["scores"] == "validation, best epoch"].set_index("training")
    assert list(table.index) == [
        "joint training",
        "joint training, watched",
        "CGGM magnitude only, ρ=1.2, paper",
        "CGGM direction only, ρ=1.2, λ=0.1, paper",
        "CGGM, ρ=1, λ=0.1, paper",
        "CGGM, ρ=1.2, λ=0.1, paper",
    ]
    assert table.loc["CGGM, ρ=1.2, λ=0.1, paper", "WT"] == pytest.approx(0.7)
    assert "No run" not in item.caption
    lonely = table_6(read(tmp_path / "both"))
    assert "No run with scores of: magnitude, direction, joint training." in lonely.caption
    with pytest.raises(LeftOut, match="needs validation scores of a CGGM run"):
        table_6(read(tmp_path / "joint"))


def with_regions(folder, **names):
    """The run with other regions than BraTS's, in its tables."""
    for path in (folder / "epochs.csv", folder / "test/summary.csv"):
        if path.is_file():
            text = path.read_text()
            for old, new in names.items():
                text = text.replace(f"dice_{old}", f"dice_{new}")
            path.write_text(text)
    return folder


def test_tables_have_the_regions_of_the_runs(tmp_path):
    observe = with_regions(make(tmp_path / "observe", OBSERVE), WT="gland", TC="zone_1", ET="lesion")
    both = with_regions(make(tmp_path / "both", cggm(), dice=0.6, test=0.7), WT="gland", TC="zone_1", ET="lesion")
    runs = read(observe, both)
    item = table_6(runs)
    assert list(item.shown) == ["training", "scores", "runs", "gland", "zone_1", "lesion", "mean"]
    test = item.data[item.data["scores"] == "test"].set_index("training")
    assert test.loc["CGGM, ρ=1.2, λ=0.1, paper", "lesion"] == pytest.approx(0.7)
    assert table_5(runs).caption.startswith("Mean Dice over gland, zone_1 and lesion of each")


def test_regions_that_some_runs_lack(tmp_path):
    other = with_regions(make(tmp_path / "both", cggm()), WT="lesion", TC="gland", ET="rim")
    runs = read(make(tmp_path / "observe", OBSERVE), other)
    item = table_6(runs)
    assert list(item.shown)[3:] == ["WT", "TC", "ET", "lesion", "gland", "rim", "mean"]
    shown = item.shown.set_index("training").loc["joint training, watched"]
    assert (shown["WT"], shown["lesion"], shown["mean"]) == ("0.500", "–", "0.500")
    expected = "Mean Dice over regions (WT, TC and ET in observe; lesion, gland and rim in both) of each"
    assert table_5(runs).caption.startswith(expected)


def test_table_8(tmp_path):
    item = table_8(read(*experiment(tmp_path)))
    (row,) = item.data.to_dict("records")
    assert row["classifier parameters"] == 2**18
    assert row["their size in float32 (MB)"] == 1.0
    assert row["additional memory (MB)"] == 30.0
    assert item.caption.endswith("From runs joint (joint; seed 0); observe (observe; seed 0).")
    gpu = {"device": "cuda", "threads": 1, "parameters": 1000, "classifier_parameters": 4}
    alone = table_8(read(tmp_path / "joint", make(tmp_path / "gpu", OBSERVE, resources=gpu)))
    assert math.isnan(alone.data["additional memory (MB)"].item())
    assert "No joint training with resources.json on the same device" in alone.caption


@pytest.mark.slow
def test_the_report_holds_everything_in_order(tmp_path):
    report = write_report(experiment(tmp_path / "runs"), tmp_path / "out")
    assert report.left_out == {}
    names = [f"figure_{i}" for i in range(2, 8)] + ["table_5", "table_6", "table_8"]
    assert list(report.made) == names
    page = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    places = [page.index(f"]({name}.csv)") for name in names]
    assert places == sorted(places)
    for name in names:
        assert len(pd.read_csv(tmp_path / "out" / f"{name}.csv")) == len(report.made[name].data)
        if name.startswith("figure"):
            assert imread(tmp_path / "out" / f"{name}.png").std() > 0.01
            assert "observe" in (tmp_path / "out" / f"{name}.svg").read_text(encoding="utf-8") or name == "figure_7"
    assert "| both | CGGM, ρ=1.2, λ=0.1, paper | 0 | 4 of 4 | 3 | 0.600 | 0.700 |" in page
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".tmp")]


@pytest.mark.slow
def test_the_same_runs_give_the_same_files(tmp_path):
    folders = experiment(tmp_path / "runs")[2:4]
    for out in ("a", "b"):
        write_report(folders, tmp_path / out)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_what_cannot_be_made_is_said_and_not_left_from_before(tmp_path):
    folders = experiment(tmp_path / "runs")
    write_report(folders, tmp_path / "out")
    killed = make(tmp_path / "runs/killed", OBSERVE, planned=9)
    report = write_report([killed, tmp_path / "runs/none"], tmp_path / "out")
    assert sorted(report.made) == ["figure_2", "figure_6", "table_5"]
    assert not (tmp_path / "out/figure_7.png").exists()
    assert report.outcomes["Figure 2"] == "Training without modulation: figure_2.png, .svg, .csv"
    assert report.outcomes["Figure 5"].startswith("left out: needs several CGGM runs")
    assert report.notes == [
        f"{tmp_path / 'runs/none'}: no such folder",
        "killed: not finished: 4 of 9 epochs are done",
    ]
    page = report.page.read_text(encoding="utf-8")
    assert all(note in page for note in report.notes)
    assert "- Figure 7: needs a run with balance terms" in page


def test_says_where_repetitions_differ_in_more_than_the_seed(tmp_path):
    make(tmp_path / "a", OBSERVE, config={"learning_rate": 0.1})
    make(tmp_path / "b", OBSERVE, seed=1, config={"learning_rate": 0.2})
    report = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert report.notes == ["a, b are averaged as observe, and differ in learning_rate"]
    assert "| learning_rate | 0.1 | 0.2 |" in report.page.read_text(encoding="utf-8")


@pytest.mark.parametrize("missing", ["config.yaml", "epochs.csv", "iterations.csv"])
@pytest.mark.parametrize("method", [None, OBSERVE, pytest.param(cggm(), marks=pytest.mark.slow)])
def test_a_folder_that_lacks_a_file_is_no_traceback(tmp_path, missing, method):
    folder = make(tmp_path / "run", method)
    (folder / missing).unlink()
    report = write_report([folder], tmp_path / "out")
    assert len(report.made) + len(report.left_out) == 9
    assert any(missing in note for note in report.notes)


@pytest.mark.slow
@pytest.mark.parametrize("column", ["epoch", "validation/val_dice", "epsilon/t1", "iteration", "balance/t1"])
def test_a_table_that_lacks_a_column_is_no_traceback(tmp_path, column):
    folder = make(tmp_path / "run", cggm())
    for name in ("epochs.csv", "iterations.csv"):
        pd.read_csv(folder / name).drop(columns=column, errors="ignore").to_csv(folder / name, index=False)
    report = write_report([folder], tmp_path / "out")
    assert len(report.made) + len(report.left_out) == 9


def test_no_run_at_all(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        write_report([tmp_path / "none"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_markdown():
    table = pd.DataFrame({"a": ["1", "x|y"], "b": ["2", "3"]})
    assert markdown(table).splitlines() == ["| a | b |", "|---|---|", "| 1 | 2 |", "| x\\|y | 3 |"]


@pytest.mark.slow
def test_a_real_run_of_the_bundle(tmp_path):
    write_phantoms(tmp_path / "cases", cases=6, shape=(40, 44, 20), spacing=4.0)
    folder = tmp_path / "cggm"
    files = ("train.yaml", "methods/cggm.yaml")
    made = workflow(*files, dataset_dir=str(tmp_path / "cases"), run_dir=str(folder), **TINY)
    parsed = made.parser.get_parsed_content
    GradientRecorder(parsed("method"), folder, every=1).attach(parsed("train#trainer"))
    made.run()
    made.finalize()
    report = write_report([folder], tmp_path / "out")
    assert {"figure_3", "figure_4", "figure_6", "figure_7", "table_5", "table_6"} <= set(report.made)
    assert report.runs[0].kind.label == "CGGM, ρ=1.2, λ=0.1, paper"
    epochs = pd.read_csv(folder / "epochs.csv")
    drawn = report.made["figure_3"].data.set_index(["panel", "series", "epoch"])["mean"]
    for epoch in (1, 2):
        row = epochs.set_index("epoch").loc[epoch]
        assert drawn["validation Dice", "t1ce", epoch] == row["validation/t1ce_dice_mean"]
        assert drawn["gradient direction", "t2", epoch] == row["cosine/t2"]
    assert len(report.made["figure_4"].data) == 2 * 4 * 4
