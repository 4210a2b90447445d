# SPDX-License-Identifier: Apache-2.0
"""What the overlays of parts, the new methods and missing sequences do to a run of the BraTS bundle."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from ignite.engine import Events
from monai.data import set_track_meta

from monai_cggm.data.phantom import write_phantoms
from monai_cggm.errors import users_error
from monai_cggm.networks import LateFusion, MultimodalSegmenter, modality_subsets, subset_predictor
from tests.bundles.running import BIT_FOR_BIT, NETWORK, TINY, run, workflow
from tests.handlers.test_resume import assert_equal

MODALITIES = ("flair", "t1ce", "t1", "t2")
SPLIT = {
    "seed": 0,
    "train": [f"Phantom_00{i}" for i in range(4)],
    "validation": ["Phantom_004"],
    "test": ["Phantom_005"],
}
CGGM = ("train.yaml", "methods/cggm.yaml")
SMALL = {**TINY, "split_sizes": None, "hd95": False}
ALL_PARTS = (
    "parts/guided_dropout.yaml",
    "parts/balanced_auxiliary.yaml",
    "parts/distillation.yaml",
    "parts/average.yaml",
)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder / "in", cases=6, shape=(40, 44, 20), spacing=4.0)
    (folder / "split.json").write_text(json.dumps(SPLIT))
    return folder


def of(cases, run_dir, **overrides):
    """Arguments of a run."""
    return {
        **SMALL, "dataset_dir": str(cases / "in"), "split_file": str(cases / "split.json"), "run_dir": str(run_dir),
        **overrides,
    }  # fmt: skip


@pytest.fixture(scope="module")
def plain(cases, tmp_path_factory):
    """A run of CGGM, which has no part."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run(*CGGM, **of(cases, folder))
    return folder


def iterations(folder):
    return pd.read_csv(folder / "iterations.csv")


def columns(table, group):
    return table[[f"{group}/{m}" for m in MODALITIES]].to_numpy()


def attached(made):
    """What acts on training, in its order; the recorder of gradients is always there and changes nothing."""
    return [name for name in made.parser.get_parsed_content("train#handlers#3").names if name != "GradientRecorder"]


def dropout_acts(table, plain):
    """The classifiers of the first step are as they were, and the fusion is not."""
    for group in ("epsilon", "loss"):
        np.testing.assert_array_equal(columns(table, group)[0], columns(plain, group)[0])
    assert table["loss/task"][0] != plain["loss/task"][0]


def auxiliary_acts(table, plain):
    for group in ("epsilon", "loss", "balance"):
        np.testing.assert_array_equal(columns(table, group)[0], columns(plain, group)[0])
    assert table["loss/task"][0] == plain["loss/task"][0]
    assert (columns(table, "gradient_norm")[0] != columns(plain, "gradient_norm")[0]).all()


def distillation_acts(table, plain):
    assert (table["loss/distillation"] > 0).all()
    assert table["loss/task"][0] == plain["loss/task"][0]
    total = (
        table["loss/task"] + 0.1 * table["loss/gm"] + columns(table, "loss").sum(axis=1) + table["loss/distillation"]
    )
    np.testing.assert_allclose(table["train/loss"], total, rtol=1e-5)


def average_acts(table, plain):
    """Training itself is as it was."""
    pd.testing.assert_frame_equal(table, plain)


def relative_acts(table, plain):
    balance = columns(table, "balance")
    np.testing.assert_allclose(balance.mean(axis=1), 1.0, rtol=1e-6)
    assert (balance == balance[0]).all()  # held for 20 iterations
    epsilon = columns(table, "epsilon")[0]
    raw = np.clip(1 + (epsilon.mean() - epsilon) / epsilon.mean(), 0.5, 1.5)
    np.testing.assert_allclose(balance[0], raw / raw.mean(), rtol=1e-6)
    assert "loss/gm" not in table


OVERLAYS = {
    "parts/dropout.yaml": (["ModalityDropout", "CGGM"], dropout_acts),
    "parts/guided_dropout.yaml": (["ModalityDropout", "CGGM"], dropout_acts),
    "parts/auxiliary.yaml": (["CGGM", "AuxiliaryLosses"], auxiliary_acts),
    "parts/balanced_auxiliary.yaml": (["CGGM", "AuxiliaryLosses"], auxiliary_acts),
    "parts/distillation.yaml": (["CGGM", "Distillation"], distillation_acts),
    "parts/average.yaml": (["CGGM"], average_acts),
    "methods/relative.yaml": (["RelativeBalance"], relative_acts),
}


@BIT_FOR_BIT
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_overlay_does_what_it_says(overlay, plain, cases, tmp_path):
    names, acts = OVERLAYS[overlay]
    made = run(*CGGM, overlay, **of(cases, tmp_path / "run"))
    last = ["EMAHandler"] if "average" in overlay else []
    assert attached(made) == [*names, "ClipGradients", *last, "RunLog"]
    table = iterations(tmp_path / "run")
    assert table["iteration"].tolist() == [1, 2, 3, 4]
    acts(table, iterations(plain))
    first, second = (
        torch.load(folder / "checkpoints/epoch_0002.pt", weights_only=True)["model"]
        for folder in (plain, tmp_path / "run")
    )
    same = all(torch.equal(first[key], second[key]) for key in first)
    assert same == (overlay == "parts/average.yaml")


def test_a_run_without_parts_attaches_none_and_leaves_its_resources(cases, plain):
    made = workflow(*CGGM, **of(cases, plain, resume=True))
    assert attached(made) == ["CGGM", "ClipGradients", "RunLog"]
    facts = json.loads((plain / "resources.json").read_text())
    network = made.parser.get_parsed_content("network_def")
    assert facts["parameters"] == sum(p.numel() for p in network.parameters())
    assert facts["classifier_parameters"] > 0
    assert facts["training_seconds"] > 0


@pytest.mark.parametrize("overlays", [("methods/joint.yaml", "parts/dropout.yaml", "parts/average.yaml")])
def test_joint_training_takes_the_parts_that_need_no_classifier(overlays, cases, tmp_path):
    made = run("train.yaml", *overlays, **of(cases, tmp_path / "run"))
    assert attached(made) == ["ModalityDropout", "ClipGradients", "EMAHandler", "RunLog"]
    saved = torch.load(tmp_path / "run/model.pt", weights_only=True)
    assert set(saved) == {"model", "epoch"}
    assert json.loads((tmp_path / "run/resources.json").read_text())["classifier_parameters"] == 0


def test_controls_and_a_bound_from_the_command_line(cases, tmp_path):
    run(*CGGM, **of(cases, tmp_path / "run", control="constant", max_share=1e-3, lam=10.0, epochs=1))
    table = iterations(tmp_path / "run")
    assert np.ptp(columns(table, "balance"), axis=1).max() == 0.0
    assert (table["lam"] < 10.0).all()


def test_all_parts_have_their_properties_where_other_tools_look(cases, tmp_path):
    made = workflow("train.yaml", "methods/relative.yaml", *ALL_PARTS, **of(cases, tmp_path))
    assert made.check_properties() == []
    parts = ["ModalityDropout", "RelativeBalance", "AuxiliaryLosses", "Distillation"]
    assert attached(made) == [*parts, "ClipGradients", "EMAHandler", "RunLog"]
    assert made.parser.get_parsed_content("log").balance_line == 1.0
    method = made.parser.get_parsed_content("method")
    assert made.parser.get_parsed_content("dropout").guide is method
    assert made.parser.get_parsed_content("auxiliary").observer is method


def test_the_kept_model_is_the_mean_of_the_weights(cases, tmp_path):
    arguments = of(cases, tmp_path / "run", average_momentum=0.3)
    made = workflow(*CGGM, "parts/average.yaml", **arguments)
    trainer = made.parser.get_parsed_content("train#trainer")
    network = made.parser.get_parsed_content("network_def")
    averages = [{key: value.clone() for key, value in network.state_dict().items()}]

    @trainer.on(Events.ITERATION_COMPLETED)
    def by_hand(engine):
        averages.append(
            {
                key: 0.7 * averages[-1][key] + 0.3 * value if value.is_floating_point() else value.clone()
                for key, value in network.state_dict().items()
            }
        )

    try:
        made.run()
    finally:
        set_track_meta(True)
    saved = torch.load(tmp_path / "run/model.pt", weights_only=True)
    expected = averages[2 * saved["epoch"]]
    kept = {key: value.to(expected[key].device) for key, value in saved["model"].items()}
    for key, value in kept.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7, msg=key)
    moved = [key for key, value in network.state_dict().items() if not torch.equal(value, kept[key])]
    assert len(moved) > len(saved["model"]) // 2

    # validation scored the mean, and evaluation scores it again
    run(*CGGM, "parts/average.yaml", "evaluate.yaml", **arguments)
    scores = pd.read_csv(tmp_path / "run/validation/cases.csv").set_index("predictor")["dice_mean"]
    epoch = pd.read_csv(tmp_path / "run/epochs.csv").set_index("epoch").loc[saved["epoch"]]
    for predictor in ("fusion", *MODALITIES):
        assert scores[predictor] == pytest.approx(epoch[f"validation/{predictor}_dice_mean"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["methods/cggm.yaml", "methods/relative.yaml"])
def test_a_run_with_all_parts_resumes_exactly(method, cases, tmp_path):
    names = ("train.yaml", method, *ALL_PARTS)
    run(*names, **of(cases, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    (tmp_path / "again/checkpoints/epoch_0002.pt").unlink()
    run(*names, **of(cases, tmp_path / "again", resume=True))
    for file in ("checkpoints/epoch_0002.pt", "model.pt"):
        whole, again = (torch.load(tmp_path / name / file, weights_only=True) for name in ("whole", "again"))
        assert_equal(again, whole, file)
    assert "averaged" in torch.load(tmp_path / "whole/checkpoints/epoch_0002.pt", weights_only=True)
    for table in ("iterations.csv", "epochs.csv"):
        assert (tmp_path / "whole" / table).read_text() == (tmp_path / "again" / table).read_text()


def test_a_run_of_mrd_resumes_exactly(cases, tmp_path):
    """Its draws follow from the number of the iteration: nothing of them stands in a checkpoint."""
    names = ("train.yaml", "methods/mrd.yaml")
    run(*names, **of(cases, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    (tmp_path / "again/checkpoints/epoch_0002.pt").unlink()
    run(*names, **of(cases, tmp_path / "again", resume=True))
    whole, again = (
        torch.load(tmp_path / n / "checkpoints/epoch_0002.pt", weights_only=True) for n in ("whole", "again")
    )
    assert_equal(again, whole, "checkpoint")
    assert (tmp_path / "whole/iterations.csv").read_text() == (tmp_path / "again/iterations.csv").read_text()
    losses = []
    for name in ("mrd", "joint"):
        made = workflow("train.yaml", f"methods/{name}.yaml", **of(cases, tmp_path / name, epochs=1))
        made.run()
        losses.append(pd.read_csv(tmp_path / name / "iterations.csv")["train/loss"].iloc[0])
    assert losses[0] != losses[1]  # the same weights and slices, and the fusion sees less of them


def test_every_subset_of_the_sequences_is_scored(plain, cases):
    names = [subset_predictor(subset, MODALITIES) for subset in modality_subsets(MODALITIES)]
    for overlays in (("evaluate.yaml",), ("evaluate.yaml", "protocols/subsets.yaml")):
        run(*CGGM, *overlays, **of(cases, plain, part="test"))
    scores = pd.read_csv(plain / "test_subsets/cases.csv")
    assert len(names) == 15
    assert scores["predictor"].tolist() == [*names, *MODALITIES]
    assert set(scores["case"]) == {"Phantom_005"}
    subsets, whole = (pd.read_csv(plain / f / "cases.csv").set_index("predictor") for f in ("test_subsets", "test"))
    np.testing.assert_allclose(subsets.loc[whole.index, "dice_mean"], whole["dice_mean"], atol=1e-6)
    assert subsets["dice_mean"].between(0, 1).all()


def test_an_ensemble_of_networks_of_one_sequence_is_scored(cases, tmp_path):
    arguments = {key: SMALL[key] for key in NETWORK}
    ensemble = LateFusion.of_modalities(MODALITIES, MultimodalSegmenter, num_classes=4, **arguments)
    torch.save({"model": ensemble.state_dict(), "epoch": 1}, tmp_path / "model.pt")
    shutil.copy(cases / "split.json", tmp_path / "split.json")
    overlays = ("methods/ensemble.yaml", "evaluate.yaml", "protocols/subsets.yaml")
    run("train.yaml", *overlays, **of(cases, tmp_path, part="test"))
    scores = pd.read_csv(tmp_path / "test_subsets/cases.csv")
    names = [subset_predictor(subset, MODALITIES) for subset in modality_subsets(MODALITIES)]
    assert scores["predictor"].tolist() == [*names, *MODALITIES]


@pytest.fixture(scope="module")
def lacking(cases, tmp_path_factory):
    """A training case lacks t1ce, and the validation case lacks t2."""
    folder = tmp_path_factory.mktemp("lacking")
    shutil.copytree(cases, folder, dirs_exist_ok=True)
    (folder / "in/Phantom_001/Phantom_001_t1ce.nii.gz").unlink()
    (folder / "in/Phantom_004/Phantom_004_t2.nii.gz").unlink()
    return folder


def test_cases_that_lack_sequences_are_refused_by_name(lacking, tmp_path):
    with pytest.raises(Exception, match="instantiate") as caught:
        workflow("train.yaml", **of(lacking, tmp_path / "run"))
    message = str(users_error(caught.value))
    for case, sequence in (("Phantom_001", "t1ce"), ("Phantom_004", "t2")):
        assert any(case in line and sequence in line for line in message.splitlines()), message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overlays",
    [
        pytest.param((), id="recipe"),
        pytest.param(("methods/cggm.yaml",), id="cggm"),
        pytest.param(("methods/relative.yaml", *ALL_PARTS), id="all parts", marks=pytest.mark.slow),
        pytest.param(("methods/joint.yaml", "parts/dropout.yaml"), id="joint", marks=pytest.mark.slow),
    ],
)
def test_cases_that_lack_sequences_are_trained_on_where_they_may(overlays, lacking, tmp_path):
    arguments = of(lacking, tmp_path / "run", allow_missing="true")
    made = workflow("train.yaml", *overlays, **arguments)
    trainer = made.parser.get_parsed_content("train#trainer")
    network = made.parser.get_parsed_content("network_def")
    told = []
    network.register_forward_pre_hook(
        lambda module, _args, kwargs: told.append(kwargs.get("present")) if module.training else None, with_kwargs=True
    )
    lacked = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: lacked.append((e.state.batch["case"], e.state.batch["present"]))
    )
    try:
        made.run()
    finally:
        set_track_meta(True)
    for (ids, present), mask in zip(lacked, told, strict=True):
        assert present.tolist() == [[m != "t1ce" or case != "Phantom_001" for m in MODALITIES] for case in ids]
        # a mask may have two rows a sample: complete, and with a subset
        assert mask is None or not (mask.cpu() & ~present.repeat(len(mask) // len(present), 1)).any()
        assert mask is not None or present.all()
    assert any(not present.all() for _, present in lacked)
    table = iterations(tmp_path / "run")
    assert len(table) == 4
    assert np.isfinite(table.to_numpy()).all()

    run("train.yaml", *overlays, "evaluate.yaml", **arguments)
    scores = pd.read_csv(tmp_path / "run/validation/cases.csv")
    watched = [] if "methods/joint.yaml" in overlays else ["flair", "t1ce", "t1"]
    assert scores["predictor"].tolist() == ["fusion", *watched]
    assert scores["dice_mean"].notna().all()
