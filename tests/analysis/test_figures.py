# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pandas as pd
import pytest

from monai_cggm.analysis.figures import (
    LeftOut,
    figure_2,
    figure_3,
    figure_4,
    figure_5,
    figure_6,
    figure_7,
    mean_cosines,
    regions_of,
    regions_text,
)
from monai_cggm.analysis.runs import read_runs
from tests.analysis.folders import OBSERVE, cggm, make


def read(*folders):
    return read_runs(folders)[0]


def panels(item):
    return [axes for axes in item.figure.axes if axes.lines or axes.collections or axes.texts]


def legend(item):
    return [text.get_text() for legend in item.figure.legends for text in legend.get_texts()]


def source(item):
    return item.figure.get_supxlabel().replace("\n", " ")


def test_figure_2_is_of_runs_without_modulation(tmp_path):
    runs = read(
        make(tmp_path / "a", OBSERVE, dice=0.4),
        make(tmp_path / "b", OBSERVE, seed=1, dice=0.6),
        make(tmp_path / "c", cggm()),
    )
    item = figure_2(runs)
    data = item.data.set_index(["panel", "series", "epoch"]).sort_index()
    dice = data.loc[("validation Dice", "fusion")]
    np.testing.assert_allclose(dice["mean"], [0.4, 0.4, 0.5, 0.4])
    np.testing.assert_allclose(dice["sd"], np.std([0.4, 0.6], ddof=1))
    assert dice["runs"].tolist() == [2, 2, 2, 2]
    np.testing.assert_allclose(data.loc[("validation Dice", "t1"), "mean"], 0.25 * dice["mean"])
    np.testing.assert_allclose(data.loc[("ε on training batches", "t1"), "mean"], [0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(data.loc[("gradient magnitude", "t1"), "mean"], 2.0)
    assert [axes.get_title() for axes in panels(item)] == list(dict.fromkeys(item.data["panel"]))
    assert panels(item)[2].get_ylabel() == "norm of the encoder's gradient"
    assert {axes.get_xlabel() for axes in panels(item)} == {"epoch"}
    assert legend(item) == ["flair", "t1", "fusion"]
    assert item.caption.endswith("From runs a, b (observe; seeds 0, 1).")
    assert source(item) == "From runs a, b (observe; seeds 0, 1). Bands: standard deviation over runs."
    band = panels(item)[0].collections[-1].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(0.5 + np.std([0.4, 0.6], ddof=1))


def test_figure_3_is_beside_figure_2_on_shared_axes(tmp_path):
    runs = read(make(tmp_path / "c", cggm(), dice=0.9), make(tmp_path / "a", OBSERVE, dice=0.3))
    item = figure_3(runs)
    grid = np.array(item.figure.axes[:10]).reshape(5, 2)
    assert [axes.get_title() for axes in grid[0]] == ["observe", "CGGM, ρ=1.2, λ=0.1, paper"]
    assert all(left.get_ylim() == right.get_ylim() for left, right in grid)
    assert grid[3, 0].texts[0].get_text() == "not modulated"
    alone = figure_3(runs[:1])
    assert len(panels(alone)) == 5
    assert set(alone.data["kind"]) == {"CGGM, ρ=1.2, λ=0.1, paper"}
    assert set(alone.data[alone.data["panel"] == "gradient magnitude after modulation"]["mean"]) == {0.5}


def test_captions_name_runs_that_were_not_finished(tmp_path):
    item = figure_2(read(make(tmp_path / "a", OBSERVE, planned=50)))
    assert item.caption.endswith("From run a (observe; seed 0; a stopped after 4 of 50 epochs).")


def test_figures_without_their_runs_are_left_out(tmp_path):
    runs = read(make(tmp_path / "j", None))
    reasons = {
        figure_2: "methods/observe.yaml",
        figure_3: "needs a run of CGGM",
        figure_4: "j has no gradients.npz",
        figure_5: "differ in rho or lam",
        figure_6: "needs a run with classifiers",
        figure_7: "balance terms",
    }
    for figure, reason in reasons.items():
        with pytest.raises(LeftOut, match=reason):
            figure(runs)


@pytest.mark.parametrize(("records", "modalities"), [(3, ("flair", "t1")), (14, ("flair", "t1", "t2"))])
def test_figure_4(tmp_path, records, modalities):
    item = figure_4(read(make(tmp_path / "g", OBSERVE, gradients=records, modalities=modalities)))
    assert len(item.data) == 2 * len(modalities) * records
    assert legend(item)[: len(modalities)] == list(modalities)
    assert legend(item)[-2:] == ["fusion, this modality alone", "classifier"]
    assert item.figure.axes[0].get_title() == "g (observe)"
    # groups that lie apart in 16 dimensions lie apart in the map, whichever side they are from
    if records > 3:
        centres = item.data.groupby("modality")[["x", "y"]].mean()
        places, own = item.data[["x", "y"]].to_numpy(), item.data["modality"].to_numpy()
        distances = np.linalg.norm(places[:, None] - centres.to_numpy()[None], axis=2)
        assert (centres.index[distances.argmin(axis=1)] == own).all()
    again = figure_4(read(tmp_path / "g"))
    np.testing.assert_array_equal(again.data[["x", "y"]], item.data[["x", "y"]])


def test_figure_4_needs_three_records(tmp_path):
    with pytest.raises(LeftOut, match=r"g/gradients\.npz has 2 records, and three are needed"):
        figure_4(read(make(tmp_path / "g", OBSERVE, gradients=2)))


@pytest.mark.parametrize("shape", [(4, 2, 5), (3, 3, 7)])
def test_mean_cosines(shape):
    random = np.random.default_rng(1)
    a, b = random.normal(size=shape), random.normal(size=shape)
    for i in range(shape[1]):
        for j in range(shape[1]):
            pairs = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a[:, i], b[:, j], strict=True)]
            assert mean_cosines(a, b)[i, j] == pytest.approx(np.mean(pairs))


def test_figure_5_joins_runs_that_differ_in_one_number(tmp_path):
    runs = read(
        make(tmp_path / "r10", cggm(rho=1.0), dice=0.50),
        make(tmp_path / "r12", cggm(rho=1.2), dice=0.60),
        make(tmp_path / "r12b", cggm(rho=1.2), dice=0.70, seed=1),
        make(tmp_path / "l3", cggm(lam=0.3), dice=0.40),
        make(tmp_path / "other", cggm(rho=1.3, rule="positive"), dice=0.9),
        make(tmp_path / "joint", None, dice=0.55),
    )
    item = figure_5(runs)
    data = item.data.set_index(["panel", "run"])
    assert set(data.index) == {
        ("ρ", "r10"), ("ρ", "r12"), ("ρ", "r12b"), ("λ", "r12"), ("λ", "r12b"), ("λ", "l3"), ("baseline", "joint"),
    }  # fmt: skip
    assert data.loc[("ρ", "r12"), "mean"] == pytest.approx(0.65)
    assert data.loc[("ρ", "r12b"), "sd"] == pytest.approx(np.std([0.6, 0.7], ddof=1))
    assert data.loc[("ρ", "r10"), "mean"] == pytest.approx(0.5)
    assert data.loc[("λ", "l3"), "value"] == 0.3
    rho, lam = panels(item)
    assert (rho.get_xlabel(), lam.get_xlabel()) == ("ρ (no unit)", "λ (no unit)")
    assert rho.get_ylabel() == "mean Dice, validation, best epoch"
    np.testing.assert_allclose(rho.containers[0].lines[0].get_xydata(), [[1.0, 0.5], [1.2, 0.65]])
    (baseline,) = [line for line in rho.lines if line.get_label() == "joint training"]
    assert baseline.get_ydata()[0] == pytest.approx(0.55)
    assert "other" not in item.caption


def regions(folder, *names):
    """Give a run's validation these regions, up to three, instead of WT, TC and ET."""
    table = pd.read_csv(folder / "epochs.csv")
    old = ("WT", "TC", "ET")
    scores = {column: table.pop(column) for column in [*table] if column.endswith(old)}
    for column, values in scores.items():
        index = old.index(column[-2:])
        if index < len(names):
            table[column[:-2] + names[index]] = values
    table.to_csv(folder / "epochs.csv", index=False)
    return folder


def test_captions_name_the_regions_of_the_runs(tmp_path):
    runs = read(
        regions(make(tmp_path / "a", OBSERVE), "white_matter lesion"),
        regions(make(tmp_path / "r10", cggm(rho=1.0)), "white_matter lesion"),
        regions(make(tmp_path / "r12", cggm(rho=1.2)), "white_matter lesion"),
    )
    assert [regions_of(run) for run in runs] == [("white_matter lesion",)] * 3
    assert "classifier (mean over white_matter lesion), ε" in figure_2(runs).caption
    assert figure_5(runs).caption.startswith("Mean Dice over white_matter lesion of the best epoch")


def test_regions_in_words(tmp_path):
    runs = {
        "a": make(tmp_path / "a", OBSERVE),
        "b": regions(make(tmp_path / "b", OBSERVE, seed=1), "ET", "WT", "TC"),
        "c": regions(make(tmp_path / "c", OBSERVE, seed=2), "gland", "lesion"),
        "killed": make(tmp_path / "killed", None, test=0.5),
        "none": make(tmp_path / "none", None),
    }
    (runs["killed"] / "epochs.csv").unlink()
    pd.read_csv(runs["none"] / "iterations.csv").to_csv(runs["none"] / "epochs.csv", index=False)
    a, b, c, killed, none = read(*runs.values())
    assert regions_of(killed) == regions_of(a) == ("WT", "TC", "ET")  # without validation the tests tell
    assert regions_of(none) == ()
    assert regions_text([a, none]) == "WT, TC and ET"
    assert regions_text([a, b, c]) == "regions (WT, TC and ET in a, b; gland and lesion in c)"  # the order is no matter
    assert regions_text([none]) == "regions"


def test_figure_6_smooths_losses(tmp_path):
    runs = read(
        make(tmp_path / "a", OBSERVE),
        make(tmp_path / "b", cggm(direction="off")),
        make(tmp_path / "c", cggm(magnitude=False)),
        make(tmp_path / "d", cggm()),
    )
    item = figure_6(runs)
    titles = [axes.get_title() for axes in panels(item)]
    assert [title.split(",")[0] for title in titles] == [
        "observe",
        "CGGM magnitude only",
        "CGGM direction only",
        "CGGM",
    ]
    these = item.data[(item.data["kind"] == "observe") & (item.data["series"] == "t1")].set_index("iteration")
    assert these.loc[50, "mean"] == pytest.approx(1 / 50)
    assert these.loc[50, "smoothed"] == pytest.approx(np.mean([1 / n for n in (49, 50, 51)]))
    assert panels(item)[0].get_xlabel() == "iteration"
    assert panels(item)[0].get_ylabel() == "loss"
    assert legend(item) == ["task", "flair", "t1"]


def test_figure_7_cuts_its_axis_and_says_so(tmp_path):
    item = figure_7(read(make(tmp_path / "d", cggm(rho=1.4))))
    (axes,) = panels(item)
    (line,) = [line for line in axes.lines if line.get_label() == "ρ(M−1)/M"]
    assert line.get_ydata()[0] == pytest.approx(1.4 / 2)
    assert axes.get_ylim()[1] < 2
    assert (
        "CGGM, ρ=1.4, λ=0.1, paper: 1 of 200 points lie outside of the axis; terms go from 0.51 to 80." in item.caption
    )
    these = item.data[item.data["series"] == "flair"].set_index("iteration")
    assert these.loc[3, "mean"] == 80
    assert these.loc[3, "smoothed"] == pytest.approx(0.54)  # the median of 0.52, 80 and 0.54
    assert axes.get_ylabel() == "balance term B (no unit)"


def test_another_method_s_line_is_the_one_that_its_configuration_names(tmp_path):
    method = {**cggm(), "_target_": "monai_cggm.methods.RelativeBalance"}
    for name, config, labels in (("line", {"log": {"balance_line": 1.0}}, ["the mean of B"]), ("none", {}, [])):
        runs = read(make(tmp_path / name, method, config=config))
        item = figure_7(runs)
        (axes,) = panels(item)
        lines = [line for line in axes.lines if line.get_label() in ("ρ(M−1)/M", "the mean of B")]
        assert [line.get_label() for line in lines] == labels
        assert [line.get_ydata()[0] for line in lines] == [1.0] * len(labels)
        assert ("above the red line, the mean of B, a modality is promoted" in item.caption) is bool(labels)
        assert "ρ(M−1)/M" not in item.caption
        assert legend(item) == ["flair", "t1", *labels]
        assert figure_3(runs).title == "Training with modulation"


def test_figures_hold_six_kinds_at_most(tmp_path):
    folders = [make(tmp_path / f"r{i}", cggm(rho=1 + i / 10)) for i in range(8)]
    repeated = make(tmp_path / "again", cggm(rho=1.7), seed=1)
    item = figure_7(read(*folders, repeated))
    assert len(panels(item)) == 6
    assert "CGGM, ρ=1.7, λ=0.1, paper" in [axes.get_title() for axes in panels(item)]
