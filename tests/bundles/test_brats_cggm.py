# SPDX-License-Identifier: Apache-2.0
"""The BraTS bundle as its user meets it."""

import gzip
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import SimpleITK
import torch
import yaml
from monai.bundle import ConfigParser, verify_metadata, verify_net_in_out

from monai_cggm.data import volumes
from monai_cggm.data.phantom import write_phantoms
from monai_cggm.errors import users_error
from monai_cggm.networks import MultimodalSegmenter
from tests.bundles.running import (
    BIT_FOR_BIT,
    BUNDLE,
    CONFIGS,
    NETWORK,
    TINY,
    assert_exports_agree,
    command,
    environment,
    run,
    workflow,
)

#: what is merged over train.yaml for training: not plans of a comparison, nor what is for evaluation only
OVERLAYS = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.rglob("*.yaml")
    if path.parent.name not in ("hardware", "studies") and path.stem not in ("ensemble", "patches_3d_inference")
)
METHOD_PARTS = {"epsilon", "balance", "gradient_norm", "modulated_norm", "cosine"}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, cases=6, shape=(40, 44, 20), spacing=4.0)
    return folder


@pytest.fixture(scope="module")
def trained(cases, tmp_path_factory):
    """The folder of a finished run of two epochs."""
    folder = tmp_path_factory.mktemp("run") / "cggm"
    run("train.yaml", "methods/cggm.yaml", dataset_dir=str(cases), run_dir=str(folder), **TINY)
    return folder


def test_a_run_leaves_everything_it_learnt(trained):
    names = {p.name for p in trained.iterdir()}
    assert {"config.yaml", "environment.json", "split.json", "iterations.csv", "epochs.csv", "model.pt"} <= names
    assert "resources.json" in names
    assert [p.name for p in sorted((trained / "checkpoints").iterdir())] == ["epoch_0001.pt", "epoch_0002.pt"]
    iterations = pd.read_csv(trained / "iterations.csv")
    assert iterations["iteration"].tolist() == [1, 2, 3, 4]
    for part in METHOD_PARTS:
        assert {f"{part}/{m}" for m in ("flair", "t1ce", "t1", "t2")} <= set(iterations.columns)
    total = iterations["loss/task"] + 0.1 * iterations["loss/gm"]
    total += sum(iterations[f"loss/{m}"] for m in ("flair", "t1ce", "t1", "t2"))
    np.testing.assert_allclose(iterations["train/loss"], total, rtol=1e-5)
    rate = iterations[["learning_rate/network", "learning_rate/classifiers"]].to_numpy()
    np.testing.assert_allclose(rate[:, 1] / rate[:, 0], 0.6)
    epochs = pd.read_csv(trained / "epochs.csv")
    assert epochs["validation/loss"].between(0.5, 5).all()
    assert 0 <= epochs["validation/fusion_dice_WT"].iloc[-1] <= 1
    assert {f"validation/{m}_dice_mean" for m in ("fusion", "flair", "t1ce", "t1", "t2")} <= set(epochs.columns)
    assert yaml.safe_load((trained / "config.yaml").read_text())["rho"] == 1.2
    model = torch.load(trained / "model.pt", weights_only=True)
    assert set(model) == {"model", "classifiers", "epoch"}
    assert not any("classifiers" in key for key in model["model"])


def test_a_new_run_does_not_begin_over_another_one(trained, cases):
    before = (trained / "iterations.csv").read_text()
    with pytest.raises(Exception, match="check_folder") as caught:
        workflow("train.yaml", dataset_dir=str(cases), run_dir=str(trained), **TINY)
    assert "already holds checkpoints of a run, up to epoch 2" in str(users_error(caught.value))
    assert (trained / "iterations.csv").read_text() == before


def test_words_of_the_command_line_are_taken_for_what_they_mean(cases, tmp_path):
    words = {"amp": "false", "magnitude": "false", "both": "false", "skip_bad": "false", "resume": "false"}
    made = workflow(
        "train.yaml",
        "methods/cggm.yaml",
        "parts/dropout.yaml",
        dataset_dir=str(cases),
        run_dir=str(tmp_path),
        **{**TINY, **words},
    )
    assert made.parser.get_parsed_content("method").magnitude is False
    assert made.parser.get_parsed_content("dropout").both is False
    assert made.parser.get_parsed_content("train#handlers#0").resume is False
    assert made.parser.get_parsed_content("train#trainer").amp is False


def test_properties_of_the_bundle_are_where_other_tools_look(cases, tmp_path):
    train = workflow("train.yaml", dataset_dir=str(cases), run_dir=str(tmp_path), **TINY)
    assert train.check_properties() == []
    network = {key: TINY[key] for key in NETWORK}
    infer = workflow("inference.yaml", kind="infer", dataset_dir=str(cases), **network)
    assert infer.check_properties() == []


def write_networks(folder):
    """Run folders of each modality alone, and of all, as far as a teacher is read from them."""
    names = ("flair", "t1ce", "t1", "t2")
    for run_folder, modalities in {**{name: [name] for name in names}, "joint": names}.items():
        (folder / run_folder).mkdir(parents=True)
        network = MultimodalSegmenter(modalities, 4, **{key: TINY[key] for key in NETWORK})
        torch.save({"model": network.state_dict(), "epoch": 1}, folder / run_folder / "model.pt")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_builds_a_trainer(overlay, cases, tmp_path):
    after = ("methods/cggm.yaml",) if overlay.startswith(("parts/", "ablations/")) else ()
    if overlay in ("methods/umt.yaml", "methods/g_blending.yaml"):  # they look for trained networks before long work
        write_networks(tmp_path / "teachers")
    made = workflow("train.yaml", *after, overlay, dataset_dir=str(cases), run_dir=str(tmp_path), **TINY)
    trainer = made.parser.get_parsed_content("train#trainer")
    assert len(trainer.data_loader) == 2


def attached(made):
    """What acts on training, in its order; the recorder of gradients is always there and changes nothing."""
    return [name for name in made.parser.get_parsed_content("train#handlers#3").names if name != "GradientRecorder"]


@pytest.mark.parametrize("hardware", [(), ("hardware/cpu.yaml",)])
def test_the_recipe_is_the_default_and_the_paper_one_word_away(hardware, cases, tmp_path):
    def made(*overlays):
        files = ("train.yaml", *hardware, *overlays)
        return workflow(*files, dataset_dir=str(cases), run_dir=str(tmp_path), **TINY)

    recipe = made()
    assert attached(recipe) == ["ModalityDropout", "UnimodalObserver", "AuxiliaryLosses", "ClipGradients", "RunLog"]
    assert recipe.parser.get_parsed_content("dropout").both is True
    assert recipe.parser.get_parsed_content("auxiliary").weights.tolist() == [0.25] * 4
    assert recipe.parser.get_parsed_content("clipping").max_norm == 1.0
    paper = made("methods/cggm.yaml")
    assert attached(paper) == ["CGGM", "ClipGradients", "RunLog"]
    method = paper.parser.get_parsed_content("method")
    assert (method.rule, method.rho, method.lam, method.direction) == ("paper", 1.2, 0.1, "gradient")
    assert (method.magnitude, method.control, method.max_share) == (True, "none", None)
    assert paper.parser.get_parsed_content("clipping").max_norm is None
    assert paper.parser.get_parsed_content("log").balance_line == pytest.approx(0.9)
    joint = made("methods/joint.yaml")
    assert attached(joint) == ["ClipGradients", "RunLog"]
    assert joint.parser.get_parsed_content("clipping").max_norm == 1.0


@pytest.mark.parametrize("overlays", [(), ("methods/joint.yaml",), ("methods/qmf.yaml",), ("parts/average.yaml",)])
def test_all_networks_are_on_the_device_that_is_asked_for(overlays, cases, tmp_path):
    """Where there is no GPU, a device without storage stands in for it."""
    arguments = {"dataset_dir": str(cases), "run_dir": str(tmp_path), "device": "$torch.device('meta')", **TINY}
    for more in ((), ("evaluate.yaml",), ("evaluate.yaml", "protocols/subsets.yaml")):
        made = workflow("train.yaml", *overlays, *more, **{**arguments, "split_file": None})
        parts = ["validate#evaluator"] if more else ["train#trainer", "validate#evaluator"]
        for part in parts:
            network = made.parser.get_parsed_content(part).network
            assert {value.device.type for value in (*network.parameters(), *network.buffers())} == {"meta"}, (
                more,
                part,
            )


@BIT_FOR_BIT
def test_observe_equals_joint_bit_for_bit(cases, tmp_path):
    weights = {}
    for name in ("joint", "observe"):
        run("train.yaml", f"methods/{name}.yaml", dataset_dir=str(cases), run_dir=str(tmp_path / name), **TINY)
        weights[name] = torch.load(tmp_path / name / "checkpoints" / "epoch_0002.pt", weights_only=True)["model"]
    assert all(torch.equal(weights["joint"][key], weights["observe"][key]) for key in weights["joint"])


def test_the_paper_s_slice_protocol_scores_the_same_slices_every_time(cases, tmp_path):
    scores = []
    for name in ("a", "b"):
        overrides = {**TINY, "epochs": 1, "volumes_per_batch": 2}
        run(
            "train.yaml",
            "protocols/paper_slices.yaml",
            dataset_dir=str(cases),
            run_dir=str(tmp_path / name),
            **overrides,
        )
        scores.append(pd.read_csv(tmp_path / name / "epochs.csv"))
        names = ("train.yaml", "protocols/paper_slices.yaml", "evaluate.yaml")
        run(*names, dataset_dir=str(cases), run_dir=str(tmp_path / name), **overrides)
        assert pd.read_csv(tmp_path / name / "validation" / "cases.csv")["case"].nunique() == 1
    pd.testing.assert_frame_equal(*scores)
    assert scores[0]["iteration"].iloc[-1] == 2


def test_evaluation_writes_scores_and_names_its_convention(trained, cases, capsys):
    run("train.yaml", "evaluate.yaml", dataset_dir=str(cases), run_dir=str(trained), part="test", **TINY)
    scores = pd.read_csv(trained / "test" / "cases.csv")
    split = json.loads((trained / "split.json").read_text())
    assert set(scores["case"]) == set(split["test"])
    assert set(scores["predictor"]) == {"fusion", "flair", "t1ce", "t1", "t2"}
    assert set(scores["convention"]) == {"brats_legacy"}
    fusion = scores[scores["predictor"] == "fusion"]
    assert fusion[["hd95_WT", "hd95_TC", "hd95_ET"]].notna().all(axis=None)
    assert (trained / "test" / "summary.csv").is_file()
    printed = capsys.readouterr().out
    assert "brats_legacy" in printed
    assert max(map(len, printed.splitlines())) <= 80


def one_case(cases, folder, *, label, case="Phantom_002"):
    shutil.copytree(cases / case, folder / case)
    if not label:
        (folder / case / f"{case}_seg.nii.gz").unlink()
    return folder


def infer(trained, source, out, **overrides):
    network = {key: TINY[key] for key in NETWORK}
    arguments = {"dataset_dir": str(source), "model_file": str(trained / "model.pt"), "output_dir": str(out)}
    return run("inference.yaml", kind="infer", **arguments, **network, **overrides)


@pytest.mark.parametrize("label", [False, True])
def test_inference_keeps_geometry_and_label_values(label, trained, cases, tmp_path):
    source = one_case(cases, tmp_path / "in", label=label)
    infer(trained, source, tmp_path / "out")
    written = nib.load(tmp_path / "out" / "Phantom_002_seg.nii.gz")
    image = nib.load(source / "Phantom_002" / "Phantom_002_flair.nii.gz")
    assert written.shape == image.shape
    np.testing.assert_array_equal(written.affine, image.affine)
    assert written.header["qform_code"] == image.header["qform_code"]
    assert written.header["sform_code"] == image.header["sform_code"]
    assert written.get_data_dtype() == np.uint8
    assert set(np.unique(written.dataobj)) <= {0, 1, 2, 4}
    itk, reference = (
        SimpleITK.ReadImage(str(p))
        for p in (tmp_path / "out" / "Phantom_002_seg.nii.gz", source / "Phantom_002" / "Phantom_002_flair.nii.gz")
    )
    assert itk.GetSize() == reference.GetSize()
    np.testing.assert_allclose(itk.GetOrigin(), reference.GetOrigin())
    np.testing.assert_allclose(itk.GetDirection(), reference.GetDirection())
    np.testing.assert_allclose(itk.GetSpacing(), reference.GetSpacing())


def test_inference_takes_a_case_without_a_sequence_only_when_told(trained, cases, tmp_path):
    source = one_case(cases, tmp_path / "in", label=False)
    (source / "Phantom_002" / "Phantom_002_t1ce.nii.gz").unlink()
    with pytest.raises(Exception, match="instantiate") as caught:
        infer(trained, source, tmp_path / "out")
    assert "case Phantom_002" in str(caught.value.__cause__)
    assert "t1ce" in str(caught.value.__cause__)
    assert not (tmp_path / "out").exists()
    infer(trained, source, tmp_path / "out", allow_missing=True)
    assert (tmp_path / "out" / "Phantom_002_seg.nii.gz").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"volumes_per_batch": 5}, "4 training cases are fewer than volumes_per_batch=5"),
        ({"split_sizes": [5, 0, 1]}, "no validation case"),
        ({"val_interval": 3}, "val_interval=3 is beyond the last of 2 epochs"),
    ],
)
def test_a_plan_that_leads_nowhere_is_refused_before_it_starts(change, message, cases, tmp_path):
    with pytest.raises(Exception, match="check_plan") as caught:
        workflow("train.yaml", dataset_dir=str(cases), run_dir=str(tmp_path), **{**TINY, **change})
    assert message in str(users_error(caught.value))


def test_inference_prepares_images_as_training_does():
    train, inference = (yaml.safe_load((BUNDLE / name).read_text()) for name in ("train.yaml", "inference.yaml"))
    for key in ("modalities", "num_classes", "encoder", "decoder_channels", "low_reduced", "network_def"):
        assert train[key] == inference[key], key

    def settings(config, transform):
        (step,) = (t for t in config["preprocessing"]["transforms"] if t["_target_"] == transform)
        return {k: v for k, v in step.items() if k not in ("keys", "start_coord_key", "end_coord_key")}

    for transform in ("Orientationd", "CropForegroundd", "NormalizeIntensityd"):
        assert settings(train, transform) == settings(inference, transform)


def test_the_bundle_exports(trained, tmp_path):
    shared = {
        "net_id": "network_def",
        "ckpt_file": str(trained / "model.pt"),
        "meta_file": str(BUNDLE / "metadata.json"),
        "config_file": str(BUNDLE / "inference.yaml"),
        "key_in_ckpt": "model",
        **{f"network_def#{key}": TINY[key] for key in NETWORK},
    }
    network = MultimodalSegmenter(
        ["flair", "t1ce", "t1", "t2"], 4, encoder=TINY["encoder"], decoder_channels=8, low_reduced=4
    ).eval()
    network.load_state_dict(torch.load(trained / "model.pt", weights_only=True)["model"])
    assert_exports_agree(network, tmp_path, sizes=[(1, 4, 48, 64), (3, 4, 37, 50)], **shared)


def test_the_ten_lines_of_python_run(repository):
    page = (repository / "docs/how-to/use_from_python.md").read_text()
    exec(page.split("```python\n")[1].split("```")[0], {})


def test_metadata_names_the_channels_in_the_order_of_the_configuration():
    metadata = json.loads((BUNDLE / "metadata.json").read_text())
    modalities = yaml.safe_load((BUNDLE / "train.yaml").read_text())["modalities"]
    channels = metadata["network_data_format"]["inputs"]["image"]["channel_def"]
    assert [channels[str(i)] for i in range(len(modalities))] == modalities
    assert yaml.safe_load((BUNDLE / "inference.yaml").read_text())["modalities"] == modalities


def test_metadata_has_what_the_specification_asks_for(tmp_path):
    required = ["version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version", "task"]
    required += ["description", "authors", "copyright", "network_data_format"]
    tensor = {"type": "object", "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "channel_def"]}
    schema = {
        "type": "object",
        "required": required,
        "properties": {
            "network_data_format": {
                "required": ["inputs", "outputs"],
                "additionalProperties": {"additionalProperties": tensor},
            }
        },
    }
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    metadata = json.loads((BUNDLE / "metadata.json").read_text())
    metadata["schema"] = "https://example.invalid/schema.json"  # not fetched: the file is there
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    verify_metadata(meta_file=str(tmp_path / "metadata.json"), filepath=str(tmp_path / "schema.json"))
    assert metadata["version"] in metadata["changelog"]


def test_the_network_takes_and_gives_what_the_metadata_says():
    arguments = {f"network_def#{key}": TINY[key] for key in NETWORK}
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(BUNDLE / "metadata.json"),
        config_file=str(BUNDLE / "inference.yaml"),
        any=48,
        **arguments,
    )


BAD = {
    "missing sequence": (lambda f: (f / "Phantom_001_t1ce.nii.gz").unlink(), "t1ce"),
    "truncated": (lambda f: _halve(f / "Phantom_001_t2.nii.gz"), "Phantom_001_t2.nii.gz"),
    "unknown label": (lambda f: _relabel(f / "Phantom_001_seg.nii.gz", 7), "7"),
    "not a number": (lambda f: _spoil(f / "Phantom_001_flair.nii.gz"), "flair"),
}


def _halve(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _relabel(path, value):
    image = nib.load(path)
    data = np.asarray(image.dataobj).copy()
    data[data == 2] = value
    nib.save(nib.Nifti1Image(data, image.affine, image.header), path)


def _spoil(path):
    image = nib.load(path)
    data = np.asarray(image.dataobj).astype(np.float32)
    data[20, 20, 10] = np.nan
    nib.save(nib.Nifti1Image(data, image.affine), path)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_case_stops_training_before_it_starts_and_can_be_skipped(kind, cases, tmp_path):
    spoil, named = BAD[kind]
    shutil.copytree(cases, tmp_path / "in")
    spoil(tmp_path / "in" / "Phantom_001")
    split = {
        "seed": 0,
        "train": [f"Phantom_00{i}" for i in range(4)],
        "validation": ["Phantom_004"],
        "test": ["Phantom_005"],
    }
    (tmp_path / "split.json").write_text(json.dumps(split))
    arguments = {"dataset_dir": str(tmp_path / "in"), "split_file": str(tmp_path / "split.json"), **TINY, "epochs": 1}
    with pytest.raises(Exception, match="instantiate") as caught:
        run("train.yaml", run_dir=str(tmp_path / "run"), **arguments)
    message = str(users_error(caught.value))
    assert "Phantom_001" in message
    assert named in message
    assert not list(tmp_path.glob("run/checkpoints/*"))
    run("train.yaml", run_dir=str(tmp_path / "run"), skip_bad=True, **arguments)
    skipped = json.loads((tmp_path / "run" / "skipped.json").read_text())
    assert list(skipped) == ["Phantom_001"]
    assert named in skipped["Phantom_001"]
    assert len(pd.read_csv(tmp_path / "run" / "iterations.csv")) == 1


@pytest.mark.slow
def test_the_command_ends_with_one_plain_line(cases, tmp_path):
    shutil.copytree(cases, tmp_path / "in")
    with gzip.open(tmp_path / "in" / "Phantom_003" / "Phantom_003_t1.nii.gz", "wb") as file:
        file.write(b"nothing")
    ended = subprocess.run(
        command("train.yaml", dataset_dir=tmp_path / "in", run_dir=tmp_path / "run", **TINY),
        capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("error: case Phantom_003")
    assert "Traceback" not in ended.stderr


def last_state(run_dir, epoch):
    return torch.load(Path(run_dir) / "checkpoints" / f"epoch_{epoch:04d}.pt", weights_only=True)


def flat(state, prefix=""):
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{prefix}/{key}").items()}
    if isinstance(state, (list, tuple)):
        return {k: v for i, value in enumerate(state) for k, v in flat(value, f"{prefix}/{i}").items()}
    return {prefix: state}


def test_volumes_are_prepared_by_num_workers_threads_into_the_same_store(cases, tmp_path, monkeypatch):
    prepare, asked = volumes._run, []

    def spy(*arguments, workers, progress):
        asked.append(workers)
        prepare(*arguments, workers=workers, progress=False)

    monkeypatch.setattr(volumes, "_run", spy)
    stores = []
    for workers in (0, 2):
        config = ConfigParser()
        config.read_config(str(BUNDLE / "train.yaml"))
        folder = tmp_path / str(workers)
        config.update({**TINY, "dataset_dir": str(cases), "cache_dir": str(folder), "num_workers": workers})
        for part in ("train", "validate"):
            config.get_parsed_content(f"{part}#volumes")
        stores.append(sorted(folder.iterdir()))
    assert asked == [0, 0, 2, 2]
    names, others = ([file.name for file in store] for store in stores)
    assert len(names) == 5  # of training and validation, not the test's
    assert names == others
    for one, other in zip(*map(volumes.CachedVolumes, stores), strict=True):
        assert one["case"] == other["case"]
        assert one["image"].any()
        assert torch.equal(one["image"].affine, other["image"].affine)
        for key in ("image", "label", "tumour_voxels", "brain_voxels"):
            assert torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])), key


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "method"), [(0, ()), (2, ("methods/cggm.yaml",))])
def test_a_killed_run_goes_on_to_the_same_end(workers, method, cases, tmp_path):
    arguments = {**TINY, "dataset_dir": cases, "num_workers": workers, "epochs": 4}
    files = ("train.yaml", *method)
    subprocess.run(command(*files, run_dir=tmp_path / "whole", **arguments), check=True, env=environment())
    killed = subprocess.Popen(command(*files, run_dir=tmp_path / "killed", **arguments), env=environment())
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed" / "checkpoints" / "epoch_0002.pt").exists():
        assert killed.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    subprocess.run(
        command(*files, run_dir=tmp_path / "killed", resume="true", **arguments), check=True, env=environment()
    )
    whole, resumed = (flat(last_state(tmp_path / name, 4)) for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]) if isinstance(value, torch.Tensor) else value == resumed[key], key
    for table in ("iterations.csv", "epochs.csv"):
        assert (tmp_path / "whole" / table).read_text() == (tmp_path / "killed" / table).read_text()


@pytest.mark.slow
def test_two_processes_end_with_equal_weights(cases, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    encoder = {**TINY["encoder"], "norm": "instance"}  # no statistics over the batch
    arguments = {**TINY, "encoder": encoder, "dataset_dir": cases, "epochs": 1}  # fewer validation cases than ranks
    spy = (
        "$torch.save({k: v for m in (@network_def, @classifiers_def) for k, v in m.state_dict().items()}, "
        + repr(str(tmp_path))
        + " + f'/rank{idist.get_rank()}.pt')"
    )
    (tmp_path / "spy.yaml").write_text(yaml.safe_dump({"run": ["$@train#trainer.run()", spy]}))
    files = ("train.yaml", "methods/cggm.yaml")  # without dropout, whose draws differ between ranks
    line = command(*files, "multi_gpu_train.yaml", launcher=launcher, run_dir=tmp_path / "two", **arguments)
    index = line.index("--config_file") + 1
    line[index] = str([*yaml.safe_load(line[index]), str(tmp_path / "spy.yaml")])
    ended = subprocess.run(line, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    run(*files, run_dir=str(tmp_path / "one"), **{**arguments, "dataset_dir": str(cases)})
    one, two = (last_state(tmp_path / name, 1) for name in ("one", "two"))
    for part in ("model", "classifiers"):
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, rtol=0, atol=1e-5, msg=key)


@pytest.mark.slow
@pytest.mark.real_data
def test_real_cases_from_check_to_segmentation(real_data, tmp_path):
    source = real_data / "brats_2mm"
    checked = subprocess.run(
        [sys.executable, "-m", "monai_cggm.cli", "check", str(source)],
        capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    arguments = {
        **TINY,
        "split_sizes": None,
        "split_file": str(CONFIGS / "splits/brats_2mm.json"),
        "volumes_per_batch": 4,
    }
    run("train.yaml", dataset_dir=str(source), run_dir=str(tmp_path / "run"), **arguments)
    iterations = pd.read_csv(tmp_path / "run" / "iterations.csv")
    assert len(iterations) == 2 * 5
    assert iterations["loss/task"].tail(3).mean() < iterations["loss/task"].head(3).mean()
    evaluation = {**arguments, "split_file": str(tmp_path / "run" / "split.json")}
    run(
        "train.yaml", "evaluate.yaml", dataset_dir=str(source), run_dir=str(tmp_path / "run"), part="test", **evaluation
    )
    assert pd.read_csv(tmp_path / "run" / "test" / "cases.csv")["case"].nunique() == 5
    # cases of 1 mm that are not in training; one keeps the labels of 2018, the other those of 2023
    for case, values in (("Brats18_TCIA10_628_1", {0, 1, 2, 4}), ("BraTS-GLI-00000-000", {0, 1, 2, 3})):
        shutil.copytree(real_data / "brats_1mm" / case, tmp_path / "in" / case)
        infer(tmp_path / "run", tmp_path / "in" / case, tmp_path / "out")
        written = nib.load(tmp_path / "out" / f"{case}_seg.nii.gz")
        image = nib.load(
            next((tmp_path / "in" / case).glob("*t1.nii.gz"), None) or next((tmp_path / "in" / case).glob("*t1n*"))
        )
        assert written.shape == image.shape == (240, 240, 155)
        np.testing.assert_array_equal(written.affine, image.affine)
        assert set(np.unique(written.dataobj)) <= values
