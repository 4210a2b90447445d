# SPDX-License-Identifier: Apache-2.0
"""The bundle for feature tables and sequences as its user meets it."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from monai.bundle import ConfigWorkflow

from monai_cggm.data.features import load_features, split_features
from monai_cggm.errors import users_error
from monai_cggm.networks import modality_subsets, subset_predictor
from monai_cggm.networks.sequence import MultimodalTransformer
from monai_cggm.resources import share_path
from tests.bundles.running import CONFIGS, environment
from tests.handlers.test_resume import assert_equal

BUNDLE = share_path("bundles/features_cggm/configs")
MODALITIES = ("audio", "text", "video")
TINY = {
    "width": 8, "heads": 2, "layers": 1, "fusion_layers": 1, "dropout_rate": 0.1, "epochs": 2, "batch_size": 8,
    "learning_rate": 0.01, "classifier_learning_rate": 0.01,
}  # fmt: skip
NETWORK = ("width", "heads", "layers", "fusion_layers")
#: what is about images, for evaluation only, or needs other runs
NOT_HERE = {"segresnet", "ensemble", "released", "paper_slices", "cell", "subsets", "umt", "g_blending"}
NOT_HERE |= {"regions", "patches_3d", "patches_3d_inference"}
OVERLAYS = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.rglob("*.yaml")
    if path.parent.name in ("methods", "parts", "ablations", "protocols") and path.stem not in NOT_HERE
)


def files(*names):
    return [str(BUNDLE / n if (BUNDLE / n).exists() else CONFIGS / n) for n in names]


def workflow(*names, kind="train", **overrides):
    made = ConfigWorkflow(config_file=files(*names), workflow_type=kind, logging_file=False, **overrides)
    hook = sys.excepthook
    made.initialize()
    sys.excepthook = hook
    return made


def run(*names, kind="train", **overrides):
    made = workflow(*names, kind=kind, **overrides)
    made.run()
    made.finalize()
    return made


def signal(task, samples=60, seed=0):
    """A target, and three modalities that say something about it: a vector, a sequence, and noise."""
    rng = np.random.default_rng(seed)
    label = np.arange(samples) % 3
    target = label if task == "classification" else (label - 1) * 1.5 + rng.normal(size=samples) * 0.1
    lengths = rng.integers(2, 6, size=samples)
    features = {
        "audio": np.eye(3)[label] * 4 + rng.normal(size=(samples, 3)),
        "text": np.eye(3)[label][:, None] * 2 + rng.normal(size=(samples, 5, 3)),
        "video": rng.normal(size=(samples, 4)),
    }
    return target, features, lengths


def write(folder, task="classification", **kwargs):
    """``three.npz`` with vectors, sequences with lengths, and labels."""
    target, features, lengths = signal(task, **kwargs)
    words = np.array(["calm", "angry", "sad"])[target] if task == "classification" else target
    path = folder / "three.npz"
    np.savez(path, **features, text_lengths=lengths, labels=words)
    return path


@pytest.fixture(scope="module", params=["classification", "regression"])
def task(request):
    return request.param


@pytest.fixture(scope="module")
def data(task, tmp_path_factory):
    return write(tmp_path_factory.mktemp(task), task)


def of(data, folder, task="classification", **overrides):
    return {**TINY, "task": task, "dataset_dir": str(data), "run_dir": str(folder), **overrides}


@pytest.fixture(scope="module")
def trained(task, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "recipe"
    run("train.yaml", **of(data, folder, task, epochs=6, sentiment="true"))  # the regression's is such a scale
    return folder


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    return write(tmp_path_factory.mktemp("classes"))


def test_a_run_leaves_everything_it_learnt(trained, task):
    names = {p.name for p in trained.iterdir()}
    assert {"config.yaml", "environment.json", "split.json", "iterations.csv", "epochs.csv", "model.pt"} <= names
    epochs = pd.read_csv(trained / "epochs.csv")
    score = "accuracy" if task == "classification" else "mae"
    assert {f"validation/{m}_{score}" for m in ("fusion", *MODALITIES)} <= set(epochs.columns)
    if task == "classification":
        np.testing.assert_array_equal(epochs["validation/val_accuracy"], epochs["validation/fusion_accuracy"])
        assert epochs["validation/val_accuracy"].max() > 0.75
    else:
        np.testing.assert_allclose(epochs["validation/val_negative_mae"], -epochs["validation/fusion_mae"])
        assert epochs["validation/val_negative_mae"].iloc[-1] > epochs["validation/val_negative_mae"].iloc[0]
        assert {f"validation/fusion_{s}" for s in ("pearson", "acc2", "acc7", "f1")} <= set(epochs.columns)
    iterations = pd.read_csv(trained / "iterations.csv")
    for part in ("epsilon", "gradient_norm", "cosine", "loss"):
        assert {f"{part}/{m}" for m in MODALITIES} <= set(iterations.columns)
    best = torch.load(trained / "model.pt", weights_only=True)
    key = epochs["validation/val_accuracy" if task == "classification" else "validation/val_negative_mae"]
    assert best["epoch"] == epochs["epoch"][key.idxmax()]
    assert set(best) == {"model", "classifiers", "epoch"}
    assert yaml.safe_load((trained / "config.yaml").read_text())["modalities"] == list(MODALITIES)


def test_the_network_carries_the_statistics_of_the_training_part_alone(trained, data, task):
    split = json.loads((trained / "split.json").read_text())
    samples = {s["case"]: s for s in load_features(data, task=task)}
    rows = np.stack([samples[case]["audio"] for case in split["train"]])
    steps = np.concatenate([samples[case]["text"] for case in split["train"]])
    weights = torch.load(trained / "model.pt", weights_only=True)["model"]
    for name, values in (("audio", rows), ("text", steps)):
        np.testing.assert_allclose(weights[f"encoders.{name}.mean"], values.mean(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(weights[f"encoders.{name}.std"], values.std(axis=0), rtol=1e-5)
    everything = np.stack([s["audio"] for s in samples.values()])
    assert not np.allclose(weights["encoders.audio.mean"], everything.mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize("overlays", [(), ("methods/joint.yaml",), ("methods/ume.yaml",), ("parts/average.yaml",)])
def test_all_networks_are_on_the_device_that_is_asked_for(overlays, data, task, tmp_path):
    """Where there is no GPU, a device without storage stands in for it."""
    arguments = of(data, tmp_path, task) | {"device": "$torch.device('meta')", "split_file": None}
    for more in ((), ("evaluate.yaml",), ("evaluate.yaml", "protocols/subsets.yaml")):
        made = workflow("train.yaml", *overlays, *more, **arguments)
        for part in ["validate#evaluator"] if more else ["train#trainer", "validate#evaluator"]:
            network = made.parser.get_parsed_content(part).network
            assert {value.device.type for value in (*network.parameters(), *network.buffers())} == {"meta"}, (
                more,
                part,
            )


def test_evaluation_scores_each_sample_and_inference_predicts_the_same(trained, data, task, tmp_path, capsys):
    run("train.yaml", "evaluate.yaml", **of(data, trained, task, part="test"))
    scores = pd.read_csv(trained / "test/cases.csv")
    split = json.loads((trained / "split.json").read_text())
    own = "accuracy" if task == "classification" else "absolute_error"
    assert list(scores.columns) == ["case", "predictor", "truth", "prediction", own]
    assert set(scores["predictor"]) == {"fusion", *MODALITIES}
    fusion = scores[scores["predictor"] == "fusion"].set_index("case")
    assert set(fusion.index) == set(split["test"])
    summary = pd.read_csv(trained / "test/summary.csv").set_index(["predictor", "score"])["mean"]
    assert summary["fusion", "accuracy" if task == "classification" else "mae"] == pytest.approx(fusion[own].mean())
    assert "fusion" in capsys.readouterr().out

    target, features, lengths = signal(task)
    np.savez(tmp_path / "new.npz", **features, text_lengths=lengths)
    arguments = {"dataset_dir": str(tmp_path / "new.npz"), "model_file": str(trained / "model.pt")}
    network = {key: TINY[key] for key in NETWORK}
    run("inference.yaml", kind="infer", output_dir=str(tmp_path / "out"), unimodal="true", **arguments, **network)
    predicted = pd.read_csv(tmp_path / "out/predictions.csv").set_index("case")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["predictions.csv"]
    assert len(predicted) == len(target)
    for name, prefix in (("fusion", ""), *((m, f"{m}_") for m in MODALITIES)):
        truth = scores[scores["predictor"] == name].set_index("case")["prediction"]
        mine = predicted.loc[truth.index, f"{prefix}prediction"]
        if task == "classification":
            assert mine.tolist() == truth.tolist()
            chances = predicted[[f"{prefix}probability_{c}" for c in ("angry", "calm", "sad")]]
            np.testing.assert_allclose(chances.sum(axis=1), 1.0, atol=2e-6)
            assert (
                chances.idxmax(axis=1).str.removeprefix(f"{prefix}probability_") == predicted[f"{prefix}prediction"]
            ).all()
        else:
            np.testing.assert_allclose(mine, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_that_is_not_about_images_works_unchanged(overlay, classes, tmp_path):
    arguments = of(classes, tmp_path / "run", epochs=1)
    if "unimodal" in overlay:
        arguments["modalities"] = ["text"]
    names = ["train.yaml", overlay]
    if overlay.startswith("ablations/"):
        names.insert(1, "methods/cggm.yaml")
    if "guided_dropout" in overlay or "balanced_auxiliary" in overlay:
        names.insert(1, "methods/relative.yaml")
    run(*names, **arguments)
    table = pd.read_csv(tmp_path / "run/iterations.csv")
    assert len(table) == 5
    assert np.isfinite(table.to_numpy(dtype=float)).all()


def test_observe_equals_joint_bit_for_bit(classes, tmp_path):
    weights = {}
    for name in ("joint", "observe"):
        run("train.yaml", f"methods/{name}.yaml", **of(classes, tmp_path / name))
        weights[name] = torch.load(tmp_path / name / "checkpoints/epoch_0002.pt", weights_only=True)["model"]
    assert all(torch.equal(weights["joint"][key], weights["observe"][key]) for key in weights["joint"])


def test_a_run_with_all_parts_resumes_exactly(classes, tmp_path):
    names = ("train.yaml", "methods/relative.yaml", "parts/dropout.yaml", "parts/auxiliary.yaml", "parts/average.yaml")
    run(*names, **of(classes, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    (tmp_path / "again/checkpoints/epoch_0002.pt").unlink()
    run(*names, **of(classes, tmp_path / "again", resume=True))
    for file in ("checkpoints/epoch_0002.pt", "model.pt"):
        whole, again = (torch.load(tmp_path / name / file, weights_only=True) for name in ("whole", "again"))
        assert_equal(again, whole, file)
    for table in ("iterations.csv", "epochs.csv"):
        assert (tmp_path / "whole" / table).read_text() == (tmp_path / "again" / table).read_text()


@pytest.mark.parametrize("method", ["methods/joint.yaml", "methods/cggm.yaml"])
def test_every_subset_is_scored(method, classes, tmp_path):
    arguments = of(classes, tmp_path / "run", epochs=1)
    run("train.yaml", method, **arguments)
    run("train.yaml", method, "evaluate.yaml", "protocols/subsets.yaml", **arguments, part="test")
    scores = pd.read_csv(tmp_path / "run/test_subsets/cases.csv")
    expected = {subset_predictor(s, MODALITIES) for s in modality_subsets(MODALITIES)}
    assert set(scores["predictor"]) == expected | (set() if "joint" in method else set(MODALITIES))
    assert scores.groupby("predictor")["case"].nunique().eq(9).all()


def test_samples_that_lack_modalities(tmp_path):
    _, features, lengths = signal("classification")
    features["audio"][::4] = np.nan
    features["text"][1::4] = np.nan
    labels = np.arange(60) % 3
    path = tmp_path / "three.npz"
    np.savez(path, **features, text_lengths=lengths, labels=labels)
    with pytest.raises(Exception, match="instantiate") as caught:
        workflow("train.yaml", **of(path, tmp_path / "run"))
    message = str(users_error(caught.value))
    assert "modality audio: 15 rows" in message
    assert "allow_missing" in message
    arguments = of(path, tmp_path / "run", allow_missing="true", gradient_interval=2)
    run("train.yaml", "methods/cggm.yaml", "parts/dropout.yaml", **arguments)
    table = pd.read_csv(tmp_path / "run/iterations.csv")
    assert np.isfinite(table.to_numpy(dtype=float)).all()
    assert np.isfinite(np.load(tmp_path / "run/gradients.npz")["fusion"]).all()
    overlays = ("methods/cggm.yaml", "parts/dropout.yaml", "evaluate.yaml", "protocols/subsets.yaml")
    run("train.yaml", *overlays, **arguments, part="validation")
    scores = pd.read_csv(tmp_path / "run/validation_subsets/cases.csv")
    have = {s["case"]: set(MODALITIES) & set(s) for s in load_features(path, allow_missing=True)}
    for predictor, rows in scores.groupby("predictor"):
        if predictor == "fusion":
            assert set(rows["case"]) == set(scores["case"])
        else:
            needs = set(predictor.removeprefix("fusion[").removesuffix("]").split("+"))
            assert set(rows["case"]) == {case for case in set(scores["case"]) if needs <= have[case]}


def test_words_of_the_command_line_and_a_split_of_one_s_own(classes, tmp_path):
    samples = load_features(classes)
    split = {part: [s["case"] for s in items] for part, items in split_features(samples, seed=5).items()}
    (tmp_path / "split.json").write_text(json.dumps(split))
    command = [sys.executable, "-m", "monai.bundle", "run", "--logging_file", "False"]
    arguments = of(classes, tmp_path / "run", epochs=1, amp="false", modalities="['text','audio']")
    arguments["split_file"] = str(tmp_path / "split.json")
    command += ["--config_file", str(files("train.yaml"))]
    command += [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/split.json").read_text())["train"] == split["train"]
    assert json.loads((tmp_path / "run/data.json").read_text())["modalities"] == ["text", "audio"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 50}, "42 training cases are fewer than batch_size=50"),
        ({"val_interval": 3}, "val_interval=3 is beyond the last of 2 epochs"),
    ],
)
def test_a_plan_that_leads_nowhere_is_refused_before_it_starts(change, message, classes, tmp_path):
    with pytest.raises(Exception, match="check_plan") as caught:
        workflow("train.yaml", **of(classes, tmp_path / "run", **change))
    assert message in str(users_error(caught.value))
    assert not (tmp_path / "run").exists()


def test_properties_are_where_other_tools_look(trained, data, task, tmp_path):
    made = workflow("train.yaml", **of(data, tmp_path, task))
    assert made.check_properties() == []
    arguments = {"dataset_dir": str(data), "model_file": str(trained / "model.pt")}
    infer = workflow("inference.yaml", kind="infer", **arguments, **{key: TINY[key] for key in NETWORK})
    assert infer.check_properties() == []


def test_inference_has_training_s_sizes():
    train, inference = (yaml.safe_load((BUNDLE / name).read_text()) for name in ("train.yaml", "inference.yaml"))
    for key in ("width", "layers", "heads", "fusion_layers", "dropout_rate", "classifier_layers"):
        assert train[key] == inference[key], key


def test_metadata_have_what_the_other_bundle_s_have():
    metadata, other = (
        json.loads((share_path(f"bundles/{name}/configs") / "metadata.json").read_text())
        for name in ("features_cggm", "brats_cggm")
    )
    assert metadata.keys() == other.keys()
    assert metadata["version"] in metadata["changelog"]
    for key in ("monai_version", "pytorch_version", "numpy_version"):
        assert metadata[key] == other[key]


def test_the_network_is_exported_as_it_is(trained, data, task, tmp_path):
    arguments = {"dataset_dir": str(data), "model_file": str(trained / "model.pt")}
    infer = workflow("inference.yaml", kind="infer", **arguments, **{key: TINY[key] for key in NETWORK})
    network = infer.parser.get_parsed_content("network_def")
    assert isinstance(network, MultimodalTransformer)
    network.load_state_dict(torch.load(trained / "model.pt", weights_only=True)["model"])
    torch.jit.script(network.eval()).save(tmp_path / "model.ts")
    x = {"audio": torch.randn(2, 3), "text": torch.randn(2, 4, 3), "video": torch.randn(2, 4)}
    assert torch.equal(torch.jit.load(tmp_path / "model.ts")(x), network(x))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2])
def test_two_processes_score_every_sample_once(processes, classes, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher, "-m", "monai.bundle", "run", "--logging_file", "False"]
    command += ["--config_file", str(files("train.yaml", "multi_gpu_train.yaml"))]
    arguments = of(classes, tmp_path / "run", epochs=2, dropout_rate=0.0)
    command += [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run("train.yaml", "evaluate.yaml", **arguments, part="validation")
    scores = pd.read_csv(tmp_path / "run/validation/cases.csv")
    best = torch.load(tmp_path / "run/model.pt", weights_only=True)["epoch"]
    epochs = pd.read_csv(tmp_path / "run/epochs.csv").set_index("epoch")
    for predictor, rows in scores.groupby("predictor"):
        assert rows["accuracy"].mean() == pytest.approx(epochs.loc[best, f"validation/{predictor}_accuracy"])


@pytest.mark.real_data
def test_the_digits_are_learnt(real_data, tmp_path):
    arguments = {
        "dataset_dir": str(real_data / "multiview/handwritten_6views.mat"), "run_dir": str(tmp_path / "run"),
        "epochs": 2,
    }  # fmt: skip
    made = run("train.yaml", "methods/joint.yaml", **arguments)
    split = json.loads((tmp_path / "run/split.json").read_text())
    assert [len(split[part]) for part in ("train", "validation", "test")] == [1318, 282, 400]
    assert made.parser.get_parsed_content("cases").description.outputs == 10
    assert pd.read_csv(tmp_path / "run/epochs.csv")["validation/val_accuracy"].iloc[-1] > 0.9
