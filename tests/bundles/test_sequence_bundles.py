# SPDX-License-Identifier: Apache-2.0
"""The bundles of CMU-MOSI, IEMOCAP and UPMC-Food 101, each on data in its published format."""

import contextlib
import csv
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from monai.bundle import ConfigWorkflow, ckpt_export

from monai_cggm.data.features import load_features, modalities_in, split_features
from monai_cggm.data.phantom_features import write_phantom_features
from monai_cggm.errors import users_error
from monai_cggm.networks import modality_subsets, subset_predictor
from monai_cggm.resources import share_path
from tests.bundles.running import environment
from tests.data import test_published as published

BUNDLES = ("mosi_cggm", "iemocap_cggm", "food101_cggm")
DASHES = "# ------------------------------------------------------------------------------------------- parts\n"
#: networks as small as they can be
TINY = {"width": 8, "heads": 2, "layers": 1, "fusion_layers": 1}
#: Table 7 of the paper; a weight decay that it does not give is PyTorch's default
TABLE_7 = {
    "mosi_cggm": {
        "batch_size": 64, "optimizer_class": "$torch.optim.Adam", "weight_decay": 0.0, "epochs": 30,
        "paper": {"rho": 1.3, "lam": 0.20, "gradient_clip": 0.8}, "task": "regression",
    },
    "iemocap_cggm": {
        "batch_size": 32, "optimizer_class": "$torch.optim.AdamW", "weight_decay": 0.01, "epochs": 30,
        "paper": {"rho": 1.3, "lam": 0.15, "gradient_clip": 0.8}, "task": "classification",
    },
    "food101_cggm": {
        "batch_size": 128, "optimizer_class": "$torch.optim.AdamW", "weight_decay": 3e-3, "epochs": 80,
        "paper": {"rho": 1.3, "lam": 0.15, "gradient_clip": 0.8}, "task": "classification",
    },
}  # fmt: skip


def config(bundle, name="train.yaml"):
    return share_path(f"bundles/{bundle}/configs") / name


def loaded(bundle, name="train.yaml"):
    return yaml.safe_load(config(bundle, name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_numbers_are_those_of_the_paper(bundle):
    values = loaded(bundle)
    shared = {"learning_rate": 1e-3, "classifier_learning_rate": 5e-4, "gradient_clip": 0.8}
    sizes = {"width": 40, "layers": 5, "heads": 5, "fusion_layers": 3}
    expected = {**shared, **sizes, **TABLE_7[bundle]}
    assert {key: values[key] for key in expected} == expected
    assert values["scheduler"]["_target_"] == "torch.optim.lr_scheduler.StepLR"


@pytest.mark.parametrize("bundle", BUNDLES)
def test_what_all_have_in_common_is_the_same_text(bundle):
    """The bundles are complete in themselves, so they repeat each other; this keeps them in step."""
    ours, theirs = (config(name).read_text(encoding="utf-8").split(DASHES) for name in (bundle, "features_cggm"))
    assert ours[1] == theirs[1]
    keys = set(loaded(bundle)) ^ set(loaded("features_cggm"))
    assert not keys
    assert loaded(bundle)["imports"] == loaded("features_cggm")["imports"]
    for name in ("evaluate.yaml", "inference.yaml", "multi_gpu_train.yaml"):
        own, other = loaded(bundle, name), loaded("features_cggm", name)
        changed = {key for key in own | other if own.get(key) != other.get(key)}
        assert changed <= {"layers", "fusion_layers", "model_file"}, name


@pytest.mark.parametrize("bundle", BUNDLES)
def test_inference_has_training_s_sizes(bundle):
    train, inference = loaded(bundle), loaded(bundle, "inference.yaml")
    for key in ("width", "layers", "heads", "fusion_layers", "dropout_rate", "classifier_layers"):
        assert train[key] == inference[key], key


@pytest.mark.parametrize("bundle", BUNDLES)
def test_metadata_have_what_the_other_bundles_have(bundle):
    ours, theirs = (json.loads(config(n, "metadata.json").read_text()) for n in (bundle, "features_cggm"))
    assert ours.keys() == theirs.keys()
    versions = ("version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version")
    assert {key: ours[key] for key in versions} == {key: theirs[key] for key in versions}
    assert ours["name"] != theirs["name"]


def workflow(bundle, *names, kind="train", **overrides):
    files = [str(path if (path := config(bundle, n)).exists() else share_path("configs") / n) for n in names]
    made = ConfigWorkflow(config_file=files, workflow_type=kind, logging_file=False, **overrides)
    hook = sys.excepthook
    made.initialize()
    sys.excepthook = hook
    return made


def run(bundle, *names, kind="train", **overrides):
    made = workflow(bundle, *names, kind=kind, **overrides)
    made.run()
    made.finalize()
    return made


def write_food(folder, samples=80, seed=0):
    """What `monai-cggm prepare-food101` writes, of three dishes, with numbers that tell them apart."""
    rng = np.random.default_rng(seed)
    dishes = np.array(["apple_pie", "pho", "waffles"])
    label = np.arange(samples) % 3
    folder.mkdir()
    np.save(folder / "vision.npy", (np.eye(3)[label] * 2 + rng.normal(size=(samples, 3))).astype(np.float32))
    np.save(folder / "text.npy", (np.eye(3)[label] * 4 + rng.normal(size=(samples, 3))).astype(np.float32))
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "split"])
        for i in range(samples):
            writer.writerow([f"{dishes[label[i]]}_{i}", dishes[label[i]], "test" if i % 5 == 0 else "train"])
    return folder


@pytest.fixture(scope="module", params=BUNDLES)
def bundle(request):
    return request.param


@pytest.fixture(scope="module")
def data(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp(bundle)
    if bundle == "food101_cggm":
        return write_food(folder / "food101_features")
    task = "sentiment" if bundle == "mosi_cggm" else "emotion"
    write_phantom_features(folder / "data.pkl", samples=160, seed=3, task=task)
    return folder / "data.pkl"


@pytest.fixture(scope="module")
def trained(bundle, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "recipe"
    run(bundle, "train.yaml", **arguments(data, folder))
    return folder


def arguments(data, folder, **overrides):
    sizes = {**TINY, "epochs": 4, "batch_size": 16, "learning_rate": 0.01, "classifier_learning_rate": 0.01}
    return {**sizes, "dataset_dir": str(data), "run_dir": str(folder), **overrides}


def test_it_trains_evaluates_and_predicts(bundle, data, trained, tmp_path):
    split = json.loads((trained / "split.json").read_text())
    own = split_features(load_features(data, task=TABLE_7[bundle]["task"]))
    assert {part: split[part] for part in own} == {part: [s["case"] for s in own[part]] for part in own}
    epochs = pd.read_csv(trained / "epochs.csv")
    score = "mae" if bundle == "mosi_cggm" else "accuracy"
    names = ("fusion", *modalities_in(data))
    assert {f"validation/{name}_{score}" for name in names} <= set(epochs.columns)
    loss = epochs["train/epoch_loss"]
    assert loss.iloc[-1] < loss.iloc[0]

    run(bundle, "train.yaml", "evaluate.yaml", **arguments(data, trained, part="test"))
    scores = pd.read_csv(trained / "test/cases.csv")
    fusion = scores[scores["predictor"] == "fusion"].set_index("case")
    assert set(fusion.index) == set(split["test"])
    summary = pd.read_csv(trained / "test/summary.csv").set_index(["predictor", "score"])["mean"]
    kinds = {"mae", "pearson", "acc2", "f1", "acc7"} if bundle == "mosi_cggm" else {"accuracy", "f1"}
    assert {kind for _, kind in summary.index} == kinds
    column = fusion["absolute_error" if bundle == "mosi_cggm" else "accuracy"]
    assert summary["fusion", score] == pytest.approx(column.mean())

    places = {"dataset_dir": str(data), "model_file": str(trained / "model.pt"), "output_dir": str(tmp_path)}
    run(bundle, "inference.yaml", kind="infer", unimodal="true", **places, **TINY)
    predicted = pd.read_csv(tmp_path / "predictions.csv").set_index("case")
    assert {f"{m}_prediction" for m in modalities_in(data)} <= set(predicted.columns)
    mine = predicted.loc[fusion.index, "prediction"]
    if bundle == "mosi_cggm":
        np.testing.assert_allclose(mine, fusion["prediction"], rtol=1e-4, atol=1e-5)
    else:
        assert mine.tolist() == fusion["prediction"].tolist()


@pytest.mark.parametrize("method", ["joint", "cggm", "relative"])
def test_methods_of_images_work_on_it(bundle, method, data, tmp_path):
    extra = {"rule": "positive"} if method == "cggm" else {}
    if method != "joint":
        extra["scale"] = "update"
    names = ("train.yaml", f"methods/{method}.yaml")
    run(bundle, *names, **arguments(data, tmp_path / "run", epochs=1, **extra))
    table = pd.read_csv(tmp_path / "run/iterations.csv")
    assert np.isfinite(table.to_numpy(dtype=float)).all()
    names_of = modalities_in(data)
    if method == "relative":
        terms = table[[f"balance/{name}" for name in names_of]].to_numpy()
        assert np.ptp(terms) > 0.01
        np.testing.assert_allclose(terms.mean(axis=1), 1.0)
    if method == "cggm":
        # equations 6 and 7 under the rule, from the logged measures alone
        epsilon = table[[f"epsilon/{name}" for name in names_of]].to_numpy()
        rose = np.clip(np.diff(epsilon, axis=0), 0.0, None)
        total, count, rho = rose.sum(axis=1, keepdims=True), len(names_of), TABLE_7[bundle]["paper"]["rho"]
        with np.errstate(invalid="ignore", divide="ignore"):
            expected = np.where(total > 0, rho * (total - rose) / total, rho * (count - 1) / count)
        terms = table[[f"balance/{name}" for name in names_of]].to_numpy()[1:]
        np.testing.assert_allclose(terms, expected, rtol=2e-3, atol=1e-4)
        assert np.ptp(terms) > 0.01
    run(
        bundle, *names, "evaluate.yaml", "protocols/subsets.yaml",
        **arguments(data, tmp_path / "run", epochs=1, part="test", **extra),
    )  # fmt: skip
    scores = pd.read_csv(tmp_path / "run/test_subsets/cases.csv")
    expected = {subset_predictor(s, modalities_in(data)) for s in modality_subsets(modalities_in(data))}
    assert expected <= set(scores["predictor"])
    counts = scores[scores["predictor"].isin(expected)].groupby("predictor")["case"].nunique()
    assert counts.nunique() == 1


#: not those above, what is about images or for evaluation only, and what needs other runs
OTHERS = {path.stem for path in share_path("configs/methods").glob("*.yaml")}
OTHERS -= {"joint", "cggm", "relative", "segresnet", "ensemble", "umt", "g_blending"}
#: the bundles have the same text: all methods on one of regression, and those to which classes make a difference
PAIRS = [("mosi_cggm", method) for method in sorted(OTHERS)]
PAIRS += [(name, method) for name in BUNDLES[1:] for method in ("agm", "pmr", "qmf")]


@pytest.mark.parametrize(("bundle", "method"), PAIRS, indirect=["bundle"], scope="module")
def test_the_other_methods_train_on_it(bundle, method, data, tmp_path):
    extra = {"boost_epochs": 1, "rectify_epochs": 1} if method == "reconboost" else {}
    if method == "unimodal":
        extra["modalities"] = modalities_in(data)[:1]
    told = arguments(data, tmp_path / "run", epochs=1, **extra)
    if bundle == "mosi_cggm" and method in ("pmr", "qmf"):  # regression has no class, and so no prototype or energy
        with pytest.raises(Exception, match="instantiate") as caught:
            workflow(bundle, "train.yaml", f"methods/{method}.yaml", **told)
        assert "one output" in str(caught.value.__cause__)
        return
    run(bundle, "train.yaml", f"methods/{method}.yaml", **told)
    table = pd.read_csv(tmp_path / "run/iterations.csv")
    assert np.isfinite(table.to_numpy(dtype=float)).all()
    assert table["train/loss"].nunique() == len(table) >= 3
    assert len(pd.read_csv(tmp_path / "run/epochs.csv")) == 1


def test_the_methods_that_need_other_networks_train_on_it(bundle, data, tmp_path):
    apart = str(tmp_path / "apart" / "{modality}")
    names = modalities_in(data)
    for name, method, seen in (*((m, "unimodal", [m]) for m in names), ("joint", "joint", names)):
        told = arguments(data, apart.format(modality=name), epochs=1, modalities=seen)
        run(bundle, "train.yaml", f"methods/{method}.yaml", **told)
    for method, logged in (("umt", "loss/teachers"), ("g_blending", "blending/")):
        told = arguments(data, tmp_path / method, epochs=1, teacher_runs=apart)
        run(bundle, "train.yaml", f"methods/{method}.yaml", **told)
        table = pd.read_csv(tmp_path / method / "iterations.csv")
        assert np.isfinite(table.to_numpy(dtype=float)).all()
        assert table["train/loss"].nunique() == len(table) >= 3
        own = table[[column for column in table if column.startswith(logged)]]
        assert (own >= 0).to_numpy().all()
        assert own.to_numpy().max() > 0


def test_new_samples_are_predicted_from_one_file_of_arrays(bundle, data, trained, tmp_path):
    """Padding behind each sequence, its length, and no label: the predictions are those from the published file."""
    samples = [s for s in load_features(data, task=TABLE_7[bundle]["task"]) if s["part"] == "test"][:9]
    arrays = {"ids": np.array([s["case"] for s in samples])}
    for name in modalities_in(data):
        rows = [np.atleast_2d(s[name]) for s in samples]
        arrays[f"{name}_lengths"] = np.array([len(row) for row in rows])
        arrays[name] = np.full((len(rows), 60, rows[0].shape[1]), 7.0, dtype=np.float32)
        for padded, row in zip(arrays[name], rows, strict=True):
            padded[: len(row)] = row
    np.savez(tmp_path / "new.npz", **arrays)
    run_of = {"model_file": str(trained / "model.pt"), **TINY}
    for name, source in (("published", data), ("new", tmp_path / "new.npz")):
        places = {"dataset_dir": str(source), "output_dir": str(tmp_path / name)}
        run(bundle, "inference.yaml", kind="infer", **places, **run_of)
    new, published = (
        pd.read_csv(tmp_path / name / "predictions.csv", index_col="case") for name in ("new", "published")
    )
    assert sorted(new.index) == sorted(arrays["ids"])
    if bundle == "mosi_cggm":
        np.testing.assert_allclose(new["prediction"], published.loc[new.index, "prediction"], rtol=1e-4, atol=1e-5)
    else:
        assert new["prediction"].tolist() == published.loc[new.index, "prediction"].tolist()


def test_another_network_or_part_is_refused_in_words(bundle, data, trained, tmp_path):
    with pytest.raises(RuntimeError) as caught:
        run(bundle, "train.yaml", "evaluate.yaml", **arguments(data, trained, part="tests"))
    assert str(users_error(caught.value)) == "part=tests: a split has the parts train, validation, test"
    places = {"dataset_dir": str(data), "model_file": str(trained / "model.pt"), "output_dir": str(tmp_path / "out")}
    with pytest.raises(RuntimeError) as caught:
        run(bundle, "inference.yaml", kind="infer", **places, **{**TINY, "layers": 2})
    assert "do not fit this network; give the overlays and the network's sizes" in str(users_error(caught.value))
    assert not (tmp_path / "out").exists()


def test_properties_are_where_other_tools_look(bundle, data, trained, tmp_path):
    assert workflow(bundle, "train.yaml", **arguments(data, tmp_path)).check_properties() == []
    places = {"dataset_dir": str(data), "model_file": str(trained / "model.pt")}
    assert workflow(bundle, "inference.yaml", kind="infer", **places, **TINY).check_properties() == []


def test_the_network_is_exported_with_its_padding_masks(bundle, data, trained, tmp_path):
    """By MONAI's own command, as the README has it; a dictionary goes in, with and without modalities missing."""
    places = {"dataset_dir": str(data), "model_file": str(trained / "model.pt")}
    infer = workflow(bundle, "inference.yaml", kind="infer", **places, **TINY)
    network = infer.parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(trained / "model.pt", weights_only=True)["model"])
    network.eval()
    with contextlib.chdir(share_path(f"bundles/{bundle}")):
        ckpt_export(
            "network_def", filepath=str(tmp_path / "model.ts"), ckpt_file=str(trained / "model.pt"),
            meta_file="configs/metadata.json", config_file="configs/inference.yaml", key_in_ckpt="model",
            model_file=str(trained / "model.pt"), **TINY,
        )  # fmt: skip
    x = next(iter(infer.parser.get_parsed_content("dataloader")))["image"]
    assert any(key.endswith("_padding") for key in x) == (bundle != "food101_cggm")
    exported = torch.jit.load(tmp_path / "model.ts")
    torch.testing.assert_close(exported(x), network(x))
    present = torch.rand(len(network(x)), len(modalities_in(data)), generator=torch.Generator().manual_seed(0)) > 0.5
    present[:, 0] |= ~present.any(dim=1)
    assert not present.all()
    torch.testing.assert_close(exported(x, present=present), network(x, present=present))
    assert not torch.allclose(network(x, present=present), network(x))


#: dialogues that leave a validation part
MORE = {f"d{number}": [0, 1, 2, 3] for number in range(5)}


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("mosi_cggm", lambda folder, rng: (published.mosi(folder / "mosi", rng), folder / "mosi")[1]),
        ("iemocap_cggm", lambda folder, rng: published.written(folder, tuple(published.dialogues(rng, **MORE)))),
    ],
    ids=["utterances of MOSI", "dialogues of IEMOCAP"],
)
def test_the_other_published_forms_go_from_training_to_predictions(name, write, tmp_path):
    """A vector a modality; the parts are the published ones, of which the training part gives the validation part."""
    source = write(tmp_path, np.random.default_rng(0))
    told = arguments(source, tmp_path / "run", task="classification", epochs=2, batch_size=2)
    run(name, "train.yaml", **told)
    run(name, "train.yaml", "evaluate.yaml", **told, part="test")
    samples = load_features(source)
    words = samples.description.classes
    truth = {s["case"]: words[s["label"]] for s in samples if s["part"] == "test"}
    scores = pd.read_csv(tmp_path / "run/test/cases.csv")
    scores = scores[scores["predictor"] == "fusion"].set_index("case")
    assert scores["truth"].to_dict() == truth
    places = {"dataset_dir": str(source), "model_file": str(tmp_path / "run/model.pt"), "output_dir": str(tmp_path)}
    run(name, "inference.yaml", kind="infer", **places, **TINY)
    predicted = pd.read_csv(tmp_path / "predictions.csv").set_index("case")
    assert predicted.loc[scores.index, "prediction"].tolist() == scores["prediction"].tolist()
    assert len(predicted) == len(load_features(source, need_label=False))


@pytest.mark.real_data
def test_the_two_classes_of_mosi_s_utterances_are_learnt(real_data, tmp_path):
    """Mostly from the text: the answer "positive" gives 0.62, and a logistic regression on the same features 0.76."""
    values = arguments(real_data / "mosi", tmp_path / "run", task="classification", epochs=3, batch_size=64)
    run("mosi_cggm", "train.yaml", **values)
    run("mosi_cggm", "train.yaml", "evaluate.yaml", **values, part="test")
    summary = pd.read_csv(tmp_path / "run/test/summary.csv").set_index(["predictor", "score"])["mean"]
    scores = pd.read_csv(tmp_path / "run/test/cases.csv")
    assert scores[scores["predictor"] == "fusion"]["case"].nunique() == 752
    assert {kind for _, kind in summary.index} == {"accuracy", "f1"}
    assert 0.70 < summary["fusion", "accuracy"] < 0.82
    assert summary["text", "accuracy"] > summary["audio", "accuracy"] + 0.05


@pytest.mark.slow
def test_two_processes_train_on_sequences_and_score_every_sample_once(tmp_path):
    write_phantom_features(tmp_path / "data.pkl", samples=160, seed=3)
    values = arguments(tmp_path / "data.pkl", tmp_path / "run", epochs=2, dropout_rate=0.0)
    files = [str(config("mosi_cggm", name)) for name in ("train.yaml", "multi_gpu_train.yaml")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "monai.bundle", "run", "--logging_file", "False", "--config_file", str(files)]
    command += [word for key, value in values.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run("mosi_cggm", "train.yaml", "evaluate.yaml", **values, part="validation")
    best = torch.load(tmp_path / "run/model.pt", weights_only=True)["epoch"]
    epochs = pd.read_csv(tmp_path / "run/epochs.csv").set_index("epoch")
    scores = pd.read_csv(tmp_path / "run/validation/cases.csv")
    for predictor, rows in scores.groupby("predictor"):
        expected = epochs.loc[best, f"validation/{predictor}_mae"]
        assert rows["absolute_error"].mean() == pytest.approx(expected, rel=1e-4)
