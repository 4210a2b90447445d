# SPDX-License-Identifier: Apache-2.0
"""Methods of late fusion in both bundles: trained, scored with all subsets, and used on new cases."""

import json
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.bundle import ckpt_export

from monai_cggm.data.phantom import write_phantoms
from monai_cggm.networks import LateFusion, MultimodalSegmenter, modality_subsets, subset_predictor
from tests.bundles import test_features_cggm as features
from tests.bundles.running import BIT_FOR_BIT, BUNDLE, CONFIGS, NETWORK, TINY, run, workflow
from tests.handlers.test_resume import assert_equal

MODALITIES = ("flair", "t1ce", "t1", "t2")
SPLIT = {
    "seed": 0,
    "train": [f"Phantom_00{i}" for i in range(4)],
    "validation": ["Phantom_004"],
    "test": ["Phantom_005"],
}
#: overlay → how the networks are combined, the method's class, what it is told, and the settings of this test
METHODS = {
    "ume": ("probabilities", "UME", {}, {"gradient_clip": 0.5}),
    "qmf": ("energy", "QMF", {"rank_weight": 0.3}, {}),
    "reconboost": ("sum", "ReconBoost", {"boost_epochs": 1, "rectify_epochs": 1, "agreement": 0.25}, {}),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder / "in", cases=6, shape=(40, 44, 20), spacing=4.0)
    (folder / "split.json").write_text(json.dumps(SPLIT))
    return folder


def of(cases, run_dir, **overrides):
    return {
        **TINY, "split_sizes": None, "hd95": False, "dataset_dir": str(cases / "in"),
        "split_file": str(cases / "split.json"), "run_dir": str(run_dir), **overrides,
    }  # fmt: skip


def arguments_of(method):
    _, _, told, settings = METHODS[method]
    return {**told, **settings}


@pytest.fixture(scope="module")
def trained(cases, tmp_path_factory):
    """A run of each method, made when it is asked for."""
    folder, done = tmp_path_factory.mktemp("runs"), {}

    def of_method(method):
        if method not in done:
            run("train.yaml", f"methods/{method}.yaml", **of(cases, folder / method, **arguments_of(method)))
            done[method] = folder / method
        return done[method]

    return of_method


@pytest.mark.parametrize("method", METHODS)
def test_a_run_trains_and_validates_every_network(method, trained):
    folder = trained(method)
    iterations, epochs = (pd.read_csv(folder / f"{name}.csv") for name in ("iterations", "epochs"))
    assert len(iterations) == 4
    assert np.isfinite(iterations.to_numpy()).all()
    for m in MODALITIES:
        assert {f"loss/{m}", f"epsilon/{m}"} <= set(iterations)
        assert epochs[f"validation/{m}_dice_mean"].between(0, 1).all()
    assert epochs["validation/fusion_dice_mean"].between(0, 1).all()
    saved = torch.load(folder / "model.pt", weights_only=True)
    assert set(saved) == {"model", "epoch"}
    assert {key.split(".")[1] for key in saved["model"]} == set(MODALITIES)
    members = iterations[[f"loss/{m}" for m in MODALITIES]].sum(axis=1)
    expected = {
        "ume": members,
        "qmf": iterations["loss/task"] + members + 0.3 * iterations.get("loss/rank", 0),
        "reconboost": np.where(iterations["epoch"] == 1, iterations.get("loss/boosted"), iterations["loss/task"]),
    }[method]
    np.testing.assert_allclose(iterations["train/loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_overlay_says_what_is_attached(method, cases, tmp_path):
    combine, name, told, _ = METHODS[method]
    made = workflow("train.yaml", f"methods/{method}.yaml", **of(cases, tmp_path, **arguments_of(method)))
    assert made.check_properties() == []
    assert made.parser.get_parsed_content("train#handlers#3").names == [name, "ClipGradients", "RunLog"]
    network = made.parser.get_parsed_content("network_def")
    assert network.combine == combine
    assert all(type(member) is MultimodalSegmenter for member in network.networks.values())
    attached = made.parser.get_parsed_content("method")
    assert attached.network is network
    for key, value in told.items():
        assert getattr(attached, key) == value
    clipped = made.parser.get_parsed_content("clipping").modules
    assert clipped == (list(network.networks.values()) if method == "ume" else [network])
    if method == "reconboost":
        torch.testing.assert_close(attached.ce_weight, torch.tensor([0.2, 0.3, 0.25, 0.25]))


@pytest.mark.parametrize("method", METHODS)
def test_every_subset_and_every_network_is_scored(method, trained, cases):
    folder = trained(method)
    overlays = ("train.yaml", f"methods/{method}.yaml", "evaluate.yaml")
    arguments = of(cases, folder, **arguments_of(method))
    run(*overlays, **arguments)
    run(*overlays, "protocols/subsets.yaml", **arguments)
    whole, subsets = (pd.read_csv(folder / f / "cases.csv") for f in ("validation", "validation_subsets"))
    names = [subset_predictor(subset, MODALITIES) for subset in modality_subsets(MODALITIES)]
    assert whole["predictor"].tolist() == ["fusion", *MODALITIES]
    assert subsets["predictor"].tolist() == [*names, *MODALITIES]
    epoch = pd.read_csv(folder / "epochs.csv").set_index("epoch").loc[torch.load(folder / "model.pt")["epoch"]]
    for rows in (whole.set_index("predictor"), subsets.set_index("predictor")):
        for predictor in ("fusion", *MODALITIES):
            expected = epoch[f"validation/{predictor}_dice_mean"]
            assert rows.loc[predictor, "dice_mean"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_new_case_is_segmented_by_all_networks_together(method, trained, cases, tmp_path):
    folder = trained(method)
    source = tmp_path / "in"
    shutil.copytree(cases / "in" / "Phantom_005", source / "Phantom_005")
    network = {key: TINY[key] for key in NETWORK}
    made = run(
        "inference.yaml", f"methods/{method}.yaml", kind="infer", dataset_dir=str(source),
        model_file=str(folder / "model.pt"), output_dir=str(tmp_path / "out"), **network,
    )  # fmt: skip
    assert made.check_properties() == []
    written = nib.load(tmp_path / "out/Phantom_005_seg.nii.gz")
    assert written.shape == nib.load(source / "Phantom_005/Phantom_005_flair.nii.gz").shape
    assert set(np.unique(written.dataobj)) <= {0, 1, 2, 4}
    used = made.parser.get_parsed_content("network_def")
    assert isinstance(used, LateFusion)
    assert used.combine == METHODS[method][0]
    saved = torch.load(folder / "model.pt", weights_only=True)["model"]
    assert all(torch.equal(saved[key].cpu(), value.cpu()) for key, value in used.state_dict().items())


def test_a_trained_network_exports(trained, tmp_path):
    files = [str(BUNDLE / "inference.yaml"), str(CONFIGS / "methods/qmf.yaml")]
    ckpt_export(
        net_id="network_def", filepath=str(tmp_path / "model.ts"), ckpt_file=str(trained("qmf") / "model.pt"),
        meta_file=str(BUNDLE / "metadata.json"), config_file=files, key_in_ckpt="model",
        **{f"network_def#{key}": TINY[key] for key in NETWORK},
    )  # fmt: skip
    network = LateFusion.of_modalities(
        MODALITIES, MultimodalSegmenter, "energy", num_classes=4, **{key: TINY[key] for key in NETWORK}
    ).eval()
    network.load_state_dict(torch.load(trained("qmf") / "model.pt", weights_only=True)["model"])
    x = torch.randn(2, 4, 40, 52)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(tmp_path / "model.ts").eval()(x), network(x))


@BIT_FOR_BIT
@pytest.mark.parametrize("method", ["qmf"])
def test_a_run_resumes_exactly(method, trained, cases, tmp_path):
    folder = trained(method)
    shutil.copytree(folder, tmp_path / "again")
    (tmp_path / "again/checkpoints/epoch_0002.pt").unlink()
    run("train.yaml", f"methods/{method}.yaml", **of(cases, tmp_path / "again", resume=True, **arguments_of(method)))
    whole, again = (
        torch.load(f / "checkpoints/epoch_0002.pt", weights_only=True) for f in (folder, tmp_path / "again")
    )
    assert_equal(again, whole, "checkpoint")
    assert sorted(whole["method"]["history"]["samples"]) == SPLIT["train"]
    assert whole["method"]["history"]["counts"].unique().tolist() == [4.0]  # two slices of each case in each epoch


def test_parts_go_with_them(cases, tmp_path):
    run(
        "train.yaml",
        "methods/qmf.yaml",
        "parts/dropout.yaml",
        "parts/average.yaml",
        **of(cases, tmp_path / "run", epochs=1),
    )
    iterations = pd.read_csv(tmp_path / "run/iterations.csv")
    assert np.isfinite(iterations.to_numpy()).all()
    epochs = pd.read_csv(tmp_path / "run/epochs.csv")
    assert {f"validation/{m}_dice_mean" for m in MODALITIES} <= set(epochs)


@pytest.mark.parametrize(
    ("method", "task"),
    [("ume", "classification"), ("ume", "regression"), ("qmf", "classification"), ("reconboost", "regression")],
)
def test_tables_and_sequences_with_gaps(method, task, tmp_path):
    """The same overlays, on dictionaries of vectors and sequences of which some are missing."""
    target, tables, lengths = features.signal(task)
    tables["audio"][::4] = np.nan
    tables["text"][1::4] = np.nan
    source = tmp_path / "three.npz"
    np.savez(source, **tables, text_lengths=lengths, labels=target)
    arguments = features.of(source, tmp_path / "run", task, allow_missing="true", epochs=3)
    overlay = f"methods/{method}.yaml"
    told = {"boost_epochs": 1, "rectify_epochs": 1} if method == "reconboost" else {}
    features.run("train.yaml", overlay, **arguments, **told)
    iterations = pd.read_csv(tmp_path / "run/iterations.csv")
    assert np.isfinite(iterations.to_numpy(dtype=float)).all()
    overlays = (overlay, "evaluate.yaml", "protocols/subsets.yaml")
    features.run("train.yaml", *overlays, **arguments, **told, part="test")
    scores = pd.read_csv(tmp_path / "run/test_subsets/cases.csv")
    names = [subset_predictor(subset, features.MODALITIES) for subset in modality_subsets(features.MODALITIES)]
    assert set(scores["predictor"]) == {*names, *features.MODALITIES}

    network = {key: features.TINY[key] for key in features.NETWORK}
    features.run(
        "inference.yaml", overlay, kind="infer", dataset_dir=str(source), model_file=str(tmp_path / "run/model.pt"),
        output_dir=str(tmp_path / "out"), allow_missing="true", **network,
    )  # fmt: skip
    predicted = pd.read_csv(tmp_path / "out/predictions.csv").set_index("case")
    truth = scores[scores["predictor"] == "fusion"].set_index("case")["prediction"]
    np.testing.assert_allclose(predicted.loc[truth.index, "prediction"].astype(float), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_teachers_of_one_modality_on_tables_with_gaps(tmp_path):
    """UMT and G-Blending train them first, each on the samples that have its modality, of this run's split."""
    target, tables, _ = features.signal("classification")
    tables = {name: tables[name] for name in ("audio", "video")}
    tables["audio"][::4] = np.nan
    tables["video"][1::4] = np.nan
    source = tmp_path / "two.npz"
    np.savez(source, **tables, labels=target)
    settings = {
        "allow_missing": "true", "epochs": 2, "modalities": list(tables), "train_teachers": "true",
        "teacher_runs": str(tmp_path / "teachers" / "{modality}"),
    }  # fmt: skip
    for method in ("umt", "g_blending"):
        features.run("train.yaml", f"methods/{method}.yaml", **features.of(source, tmp_path / method, **settings))
        iterations = pd.read_csv(tmp_path / method / "iterations.csv")
        assert np.isfinite(iterations.to_numpy(dtype=float)).all()
    mine = json.loads((tmp_path / "umt/split.json").read_text())
    have = {name: {f"row_{i + 1:02d}" for i in range(60) if np.isfinite(tables[name][i]).all()} for name in tables}
    for name in tables:
        theirs = json.loads((tmp_path / "teachers" / name / "split.json").read_text())
        for part in ("train", "validation", "test"):
            assert theirs[part] == [case for case in mine[part] if case in have[name]]
            assert len(theirs[part]) < len(mine[part])
        log = (tmp_path / "teachers" / name / "log.txt").read_text()
        assert f"Left out 15 of 60 samples of {source} without {name}" in log
    assert (iterations[["blending/audio", "blending/video"]].to_numpy() > 0).all()


def test_qmf_refuses_regression(tmp_path):
    source = features.write(tmp_path, "regression")
    with pytest.raises(Exception, match="instantiate") as caught:
        features.workflow("train.yaml", "methods/qmf.yaml", **features.of(source, tmp_path / "run", "regression"))
    assert "these networks have one output (regression)" in str(caught.value.__cause__)
