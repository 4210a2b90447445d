# SPDX-License-Identifier: Apache-2.0
import getpass
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from ignite.engine import Engine
from monai.bundle import ConfigParser, ConfigWorkflow

import monai_cggm
from monai_cggm.handlers import RunInfo, write_run_info
from monai_cggm.handlers.run_info import bundle_parser, environment, resolved_config

BUNDLE = """
run_dir: .
epochs: 3
lr: 0.5
rate: "$@lr / 10"
network:
  _target_: torch.nn.Linear
  in_features: 2
  out_features: 1
optimizer:
  _target_: torch.optim.SGD
  params: $@network.parameters()
  lr: "@rate"
  momentum: 0.9
trainer:
  _target_: SupervisedTrainer
  device: $torch.device('cpu')
  max_epochs: "@epochs"
  train_data_loader: "$[{'image': torch.ones(1, 2), 'label': torch.ones(1, 1)}]"
  network: "@network"
  optimizer: "@optimizer"
  loss_function:
    _target_: torch.nn.MSELoss
  train_handlers:
  - _target_: monai_cggm.handlers.RunInfo
    run_dir: "@run_dir"
    split: {train: [{case: Phantom_000}], validation: [], test: []}
    seed: 4
run:
- $@trainer.run()
"""

EXPECTED_OPTIMIZER = {"_target_": "torch.optim.SGD", "params": "$@network.parameters()", "lr": 0.05, "momentum": 0.9}


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/train.yaml").write_text(BUNDLE)
    (tmp_path / "configs/short.yaml").write_text("epochs: 1\noptimizer#momentum: 0.8\n")
    (tmp_path / "configs/metadata.json").write_text('{"version": "0.0.1"}')
    return tmp_path


def written(run_dir):
    return yaml.safe_load((run_dir / "config.yaml").read_text())


def test_a_bundle_run_writes_its_own_configuration(bundle):
    files = [str(bundle / "configs/train.yaml"), str(bundle / "configs/short.yaml")]
    workflow = ConfigWorkflow(files, logging_file=False, run_dir=str(bundle / "out"), lr=0.25)
    workflow.initialize()
    workflow.run()
    config = written(bundle / "out")
    assert (config["epochs"], config["lr"], config["rate"]) == (1, 0.25, 0.025)
    assert config["optimizer"] == {**EXPECTED_OPTIMIZER, "lr": 0.025, "momentum": 0.8}
    assert config["trainer"]["max_epochs"] == 1
    assert config["trainer"]["network"] == "@network"
    assert "_meta_" not in config
    assert json.loads((bundle / "out/split.json").read_text()) == {
        "seed": 4,
        "train": ["Phantom_000"],
        "validation": [],
        "test": [],
    }


def test_what_it_writes_builds_the_same_objects(bundle):
    ConfigWorkflow(str(bundle / "configs/train.yaml"), logging_file=False, run_dir=str(bundle / "out")).run()
    optimizer = ConfigParser(written(bundle / "out")).get_parsed_content("optimizer")
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"]) == (0.05, 0.9)


@pytest.mark.slow
def test_from_the_command_line(bundle):
    arguments = ["--config_file", "configs/train.yaml", "--run_dir", "out", "--epochs", "2", "--logging_file", "False"]
    subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", *arguments],
        cwd=bundle,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        check=True,
        capture_output=True,
    )
    assert written(bundle / "out")["epochs"] == 2
    command = json.loads((bundle / "out/environment.json").read_text())["command"]
    assert command[1:4] == ["-m", "monai.bundle", "run"]
    assert "/" not in command[0]


def test_there_is_no_bundle_outside_one():
    assert bundle_parser() is None
    assert RunInfo("anywhere").config() == {}


def test_resolved_config_keeps_objects_as_they_are_written():
    parser = ConfigParser(
        {
            "a": 1,
            "names": ["x", "y"],
            "nested": {"b": "@a", "c": ["@names", "$@a + 1", "$@names[1]"], "unused": "$1 / 0"},
            "device": "$torch.device('cpu')",
            "cases": "$[{'case': 'Phantom_000'}]",
            "_meta_": {"version": "1"},
        }
    )
    parser.get_parsed_content("nested::b")
    parser.get_parsed_content("nested::c")
    parser.get_parsed_content("device")
    parser.get_parsed_content("cases")
    assert resolved_config(parser) == {
        "a": 1,
        "names": ["x", "y"],
        "nested": {"b": 1, "c": [["x", "y"], 2, "y"], "unused": "$1 / 0"},
        "device": "$torch.device('cpu')",
        "cases": "$[{'case': 'Phantom_000'}]",
    }


def test_home_folder_and_user_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")
    monkeypatch.setattr(
        sys, "orig_argv", ["/home/alice/env/bin/python", "-m", "x", "--dir", "/home/alice/data", "/mnt/alice/brats"]
    )
    paths = {"data": Path("/home/alice/data"), "more": ["/home/alice", "/home/alicent"], "run": "runs/alice_1"}
    write_run_info(tmp_path, paths)
    assert written(tmp_path) == {"data": "~/data", "more": ["~", "/home/alicent"], "run": "runs/alice_1"}
    command = json.loads((tmp_path / "environment.json").read_text())["command"]
    assert command == ["python", "-m", "x", "--dir", "~/data", "/mnt/user/brats"]


def test_environment_names_versions():
    found = environment()
    assert torch.__version__.startswith(found["packages"]["torch"])  # some builds leave "+cu130" out
    assert found["packages"]["monai_cggm"] == monai_cggm.__version__
    assert {"monai", "numpy", "pytorch-ignite"} <= set(found["packages"])
    assert found["processes"] == 1
    json.dumps(found)


@pytest.mark.parametrize("skipped", [None, {}, {"Phantom_003": "label is missing"}])
def test_files(tmp_path, skipped):
    write_run_info(tmp_path / "run", {"rate": 1e-05, "clip": None, "shape": (1, 2)}, skipped=skipped)
    assert written(tmp_path / "run") == {"rate": 1e-05, "clip": None, "shape": [1, 2]}
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.yaml", "environment.json", *(["skipped.json"] if skipped else [])}


def test_a_resumed_run_keeps_its_split(tmp_path):
    def start(train, iteration):
        engine = Engine(lambda *_: None)
        engine.state.iteration = iteration
        split = {"train": [{"case": c} for c in train], "validation": [{"case": "v"}], "test": []}
        RunInfo(tmp_path, split=split, config={})(engine)

    start(["a", "b"], 0)
    start(["b", "a"], 3)
    with pytest.raises(ValueError, match=r"split.json: the train cases are not those .*different: b, c"):
        start(["a", "c"], 3)
    start(["a", "c"], 0)  # a new run may have another
    assert json.loads((tmp_path / "split.json").read_text())["train"] == ["a", "c"]
