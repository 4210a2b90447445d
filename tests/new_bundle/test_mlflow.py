# SPDX-License-Identifier: Apache-2.0
"""MONAI's ``--tracking`` with the settings in configs/tracking, and the real MLflow, where it is installed."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pandas as pd
import pytest
import yaml
from monai.bundle import ConfigParser
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

from monai_cggm.resources import share_path
from tests.bundles import test_features_cggm as features
from tests.new_bundle.folders import folders
from tests.new_bundle.test_training import made, started

TRACKING = share_path("configs/tracking/mlflow.json")
CONFIGURATIONS = sorted(share_path("bundles").glob("*/configs/*.yaml"))
NEEDS = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs mlflow: pip install mlflow-skinny")


def test_the_settings_are_those_of_monai_with_another_output():
    """Nothing else of MONAI's is lost: the same engines, keys and handlers, and the loss as our trainers give it."""
    settings = json.loads(TRACKING.read_text())
    assert settings["handlers_id"] == DEFAULT_MLFLOW_SETTINGS["handlers_id"]
    assert set(settings["configs"]) == set(DEFAULT_MLFLOW_SETTINGS["configs"])
    for engine in ("trainer", "validator", "evaluator"):
        assert set(settings["configs"][engine]) >= set(DEFAULT_MLFLOW_SETTINGS["configs"][engine]) - {"artifacts"}
    trainer = ConfigParser({"transform": settings["configs"]["trainer"]["output_transform"]})
    assert trainer.get_parsed_content("transform")({"loss": 0.5, "pred": None}) == 0.5
    # why `--tracking mlflow` does not do, as docs/how-to/mlflow.md says: this is no number
    default = ConfigParser({"transform": DEFAULT_MLFLOW_SETTINGS["configs"]["trainer"]["output_transform"]})
    assert default.get_parsed_content("transform")({"loss": 0.5, "pred": None}) == (0.5,)


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_every_bundle_has_what_the_settings_name(path):
    """The names that the settings refer to, and the handlers' lists that MONAI adds to."""
    config = yaml.safe_load(path.read_text())
    if path.stem == "train":
        assert isinstance(config["train"]["handlers"], list)
        assert isinstance(config["validate"]["handlers"], list)
        assert "run_dir" in config
    elif path.stem == "inference":
        assert isinstance(config["handlers"], list)
        assert "output_dir" in config
    elif path.stem == "evaluate":
        assert isinstance(config["validate#handlers"], list)
        assert "output_dir" in config
    if path.stem in ("train", "inference"):
        assert "bundle_root" in config
        assert {"$import monai", "$import torch"} <= set(config["imports"])


@pytest.mark.slow
@NEEDS
def test_mlflow_has_the_loss_the_rates_and_the_scores(tmp_path):
    import mlflow

    folder = made(tmp_path, folders(tmp_path / "data"))
    out = tmp_path / "run"
    tracking = {"tracking": str(TRACKING)}
    started(folder, out, **tracking)
    evaluate = str(folder / "configs/evaluate.yaml")
    started(folder, out, evaluate, part="test", hd95=False, **tracking)
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlruns.db")
    experiment = client.get_experiment_by_name("monai_cggm")
    runs = {found.info.run_name: found for found in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {str(out), f"{out}/test"}
    training = runs[str(out)]
    assert training.info.status == "FINISHED"
    assert training.data.params == {"max_epochs": "2", "epoch_length": "1"}
    iterations, epochs = pd.read_csv(out / "iterations.csv"), pd.read_csv(out / "epochs.csv")
    history = client.get_metric_history(training.info.run_id, "train_loss")
    np.testing.assert_allclose([point.value for point in history], iterations["train/loss"], rtol=1e-5)
    rates = client.get_metric_history(training.info.run_id, "lr_group_0")
    assert [point.step for point in rates] == [1, 2]
    (dice,) = client.get_metric_history(training.info.run_id, "val_dice")
    assert dice.step == 2
    np.testing.assert_allclose(dice.value, epochs["validation/val_dice"].iloc[-1], rtol=1e-5)
    assert [file.path[-5:] for file in client.list_artifacts(training.info.run_id)] == [".json"]
    scores = pd.read_csv(out / "test/cases.csv")
    fusion = scores.loc[scores["predictor"] == "fusion", "dice_mean"].mean()
    np.testing.assert_allclose(runs[f"{out}/test"].data.metrics["fusion_dice_mean"], fusion, rtol=1e-5)
    # names of subsets are none that MLflow takes: their tables are written, and it is told nothing
    subsets = str(share_path("configs/protocols/subsets.yaml"))
    started(folder, out, evaluate, subsets, part="test", hd95=False, **tracking)
    assert (out / "test_subsets/cases.csv").is_file()


@pytest.mark.slow
@NEEDS
def test_mlflow_takes_a_bundle_for_feature_tables(tmp_path):
    import mlflow

    data, out = features.write(tmp_path), tmp_path / "run"
    overrides = {**features.of(data, out), "bundle_root": str(tmp_path), "experiment_name": "mine", "run_name": "one"}
    features.run("train.yaml", tracking=str(TRACKING), **overrides)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlruns.db")
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (run.info.run_name, run.info.status) == ("one", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "fusion_accuracy")
    epochs = pd.read_csv(out / "epochs.csv")
    assert [point.step for point in history] == epochs["epoch"].tolist()
    np.testing.assert_allclose([p.value for p in history], epochs["validation/fusion_accuracy"], rtol=1e-5)
    losses = client.get_metric_history(run.info.run_id, "train_loss")
    np.testing.assert_allclose([p.value for p in losses], pd.read_csv(out / "iterations.csv")["train/loss"], rtol=1e-5)
