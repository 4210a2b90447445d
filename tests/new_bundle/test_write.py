# SPDX-License-Identifier: Apache-2.0
"""From a folder to a trained bundle, its scores and a report, as a user does it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml
from monai.bundle import ConfigParser
from typer.testing import CliRunner

from monai_cggm.cli import app
from monai_cggm.discovery import discover
from monai_cggm.errors import DataError
from monai_cggm.new_bundle import NewBundle, Wishes, new_bundle, write
from tests.new_bundle.folders import CUBES, PATIENTS, bids, folders, msd, nnunet, volumes

#: an even smaller network and budget, for tests
TINY = ["encoder#width=8", "encoder#aspp_channels=8", "decoder_channels=8", "low_reduced=4", "slices_per_volume=2"]
TINY += ["epochs=2", "val_interval=2", "image_interval=2", "warmup_epochs=1"]


def made(tmp_path: Path, source: Path, **wishes) -> NewBundle:
    return new_bundle(discover(source), tmp_path / "bundle", Wishes(**{"network": "small", **wishes}), progress=False)


def command(*arguments: object) -> str:
    """What a command prints; it must succeed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def train_config(folder: Path) -> dict:
    return yaml.safe_load((folder / "configs/train.yaml").read_text())


def test_a_bundle_is_complete_and_says_what_was_found(tmp_path):
    bundle = made(tmp_path, folders(tmp_path / "data"), regions={"all": [1, 2], "core": [1]}, title="Two zones")
    names = {str(path.relative_to(bundle.folder)) for path in bundle.folder.rglob("*") if path.is_file()}
    configs = {"train.yaml", "evaluate.yaml", "inference.yaml", "multi_gpu_train.yaml", "metadata.json", "logging.conf"}
    configs |= {"mlflow.json"}
    assert names == {f"configs/{name}" for name in configs} | {
        *("LICENSE", "datalist.json", "split.json", "study.yaml", "docs/README.md", "docs/data_license.txt")
    }
    config = train_config(bundle.folder)
    assert config["modalities"] == ["adc", "t2"]
    assert config["labels"] == "0=0,1=1,2=2"
    assert config["num_classes"] == 3
    assert config["regions"] == {"all": [1, 2], "core": [1]}
    assert config["orientation"] == "LPS"
    assert config["slice_size"] == [48, 48]  # 32 × 36 voxels are not empty
    assert config["volumes_per_batch"] == 2
    assert config["encoder"]["backbone"] == "resnet18"
    inference = yaml.safe_load((bundle.folder / "configs/inference.yaml").read_text())
    for key in ("modalities", "labels", "num_classes", "orientation", "encoder", "decoder_channels", "low_reduced"):
        assert inference[key] == config[key]
    split = json.loads((bundle.folder / "split.json").read_text())
    assert sorted(case for part in ("train", "validation", "test") for case in split[part]) == list(PATIENTS)
    card = (bundle.folder / "docs/README.md").read_text()
    voxels = sum(int((volumes(number)[1] == 2).sum()) for number in range(len(PATIENTS)))
    assert f"| 2 | label_2 | 2 | {voxels:,} (" in card
    assert "Not a medical device" in card
    assert not any(patient in card for patient in PATIENTS)


def test_the_metadata_describe_the_network(tmp_path):
    bundle = made(tmp_path, nnunet(tmp_path / "data"))
    content = json.loads((bundle.folder / "configs/metadata.json").read_text())
    image, pred = content["network_data_format"]["inputs"]["image"], content["network_data_format"]["outputs"]["pred"]
    assert image["channel_def"] == {"0": "t2", "1": "adc"}  # dataset.json's order
    assert (image["num_channels"], image["spatial_shape"], image["modality"]) == (2, ["*", "*"], "MR")
    assert pred["channel_def"] == {"0": "background", "1": "transition_zone", "2": "peripheral_zone"}
    assert "BraTS" not in json.dumps(content)
    assert train_config(bundle.folder)["regions"] == {"transition_zone": [1], "peripheral_zone": [2]}


def test_nothing_of_brats_is_left_in_the_configurations(tmp_path):
    bundle = made(tmp_path, folders(tmp_path / "data"))
    for path in (bundle.folder / "configs").glob("*.yaml"):
        config = ConfigParser.load_config_file(path)
        values = {key: value for key, value in config.items() if not key.endswith("class_names")}
        assert not re.search(r"brats_cggm|t1ce|BraTS2021", json.dumps(values)), path.name


def test_a_folder_that_has_a_bundle_is_refused(tmp_path):
    source = folders(tmp_path / "data")
    made(tmp_path, source)
    with pytest.raises(DataError, match="has a bundle already"):
        made(tmp_path, source)
    with pytest.raises(DataError, match=r"lies in .*data, where its files would be found as cases"):
        new_bundle(discover(source), source / "bundle", progress=False)
    assert not (source / "bundle").exists()
    described = nnunet(tmp_path / "raw")
    with pytest.raises(DataError, match="where its files would be found as cases"):
        new_bundle(discover(described / "dataset.json"), described / "bundle", progress=False)


def test_too_few_patients(tmp_path):
    source = folders(tmp_path / "data")
    for patient in PATIENTS[2:]:
        (source / patient / f"{patient}_seg.nii.gz").unlink()
    found = discover(source, need_label=False)
    with pytest.raises(DataError, match="2 patients with a label, expected 3 at least"):
        new_bundle(found, tmp_path / "bundle", progress=False)
    with pytest.raises(DataError, match=r"4 patients with a label, expected 5 at least.*5 folds too"):
        new_bundle(discover(folders(tmp_path / "more")), tmp_path / "bundle", Wishes(folds=5), progress=False)
    assert not (tmp_path / "bundle").exists()


def test_cases_without_a_label_are_left_out_and_folds_cover_all_others(tmp_path):
    source = folders(tmp_path / "data")
    (source / "p04" / "p04_seg.nii.gz").unlink()
    bundle = new_bundle(discover(source, need_label=False), tmp_path / "bundle", Wishes(folds=3), progress=False)
    assert bundle.unlabelled == ("p04",)
    study = yaml.safe_load((bundle.folder / "study.yaml").read_text())
    assert study["splits"] == ["split_fold0.json", "split_fold1.json", "split_fold2.json"]
    tested = [json.loads((bundle.folder / name).read_text())["test"] for name in study["splits"]]
    assert sorted(case for cases in tested for case in cases) == ["p01", "p02", "p03"]
    assert "p04" not in (bundle.folder / "datalist.json").read_text()


def a_datalist(source: Path, **parts: Sequence[str]) -> Path:
    content = {
        part: [
            {"case": p, "t2": f"{p}/{p}_T2.nii.gz", "adc": f"{p}/{p}_ADC.nii.gz", "label": f"{p}/{p}_seg.nii.gz"}
            for p in patients
        ]
        for part, patients in parts.items()
    }
    (source / "mine.json").write_text(json.dumps(content))
    return source / "mine.json"


def test_the_parts_of_a_datalist_are_kept(tmp_path):
    source = folders(tmp_path / "data")
    path = a_datalist(source, training=PATIENTS[:2], validation=PATIENTS[2:3], test=PATIENTS[3:])
    bundle = made(tmp_path, path)
    content = json.loads(path.read_text())
    content["test"][0]["labels"] = "brats2018"
    (source / "mixed.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"different label conventions \(p03 none, p04 brats2018\)"):
        new_bundle(discover(source / "mixed.json"), tmp_path / "no", progress=False)
    split = json.loads((bundle.folder / "split.json").read_text())
    assert (split["train"], split["validation"], split["test"]) == (["p01", "p02"], ["p03"], ["p04"])
    assert bundle.parts_from == "the data set's own"


@pytest.mark.parametrize(("told", "lacking"), [("test", "validation"), ("validation", "test")])
@pytest.mark.parametrize("kept", PATIENTS)
def test_a_part_that_a_datalist_lacks_is_drawn_from_training(tmp_path, told, lacking, kept):
    source = folders(tmp_path / "data")
    others = [patient for patient in PATIENTS if patient != kept]
    bundle = made(tmp_path, a_datalist(source, **{"training": others, told: [kept]}))
    split = json.loads((bundle.folder / "split.json").read_text())
    assert split[told] == [kept]
    assert (len(split["train"]), len(split[lacking])) == (2, 1)
    assert {*split["train"], *split[lacking]} == set(others)
    assert bundle.parts_from == f"the data set's own, {lacking} drawn from training by patient"


def test_a_patient_in_two_parts_of_a_datalist(tmp_path):
    source = folders(tmp_path / "data")
    path = a_datalist(source, training=PATIENTS[:3], test=PATIENTS[3:])
    content = json.loads(path.read_text())
    content["training"][0]["patient"] = content["test"][0]["patient"] = "one"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="case p04: patient one is in both train and test"):
        made(tmp_path, path)
    assert not (tmp_path / "bundle").exists()


def test_regions_and_ignored_voxels_of_nnunet(tmp_path):
    source = nnunet(tmp_path / "data")
    content = json.loads((source / "dataset.json").read_text())
    content["labels"] = {"background": 0, "whole gland": [1, 2], "peripheral": 2}
    (source / "dataset.json").write_text(json.dumps(content))
    bundle = made(tmp_path, source)
    assert train_config(bundle.folder)["regions"] == {"whole_gland": [1, 2], "peripheral": [2]}
    other = new_bundle(
        discover(source), tmp_path / "wish", Wishes(network="small", regions={"TZ": [1]}), progress=False
    )
    assert train_config(other.folder)["regions"] == {"TZ": [1]}
    # The datalist beside them says so too, for the next bundle and for nnU-Net.
    assert discover(bundle.folder / "datalist.json").label_regions == {"whole_gland": (1, 2), "peripheral": (2,)}
    assert discover(other.folder / "datalist.json").label_regions == {"TZ": (1,)}
    for labels in ({"background": 0, "gland": 1, "ignore": 2}, {"background": 0, "gland": [1, 3], "ignore": 2}):
        (source / "dataset.json").write_text(json.dumps(content | {"labels": labels}))
        with pytest.raises(DataError, match="has a label named ignore, whose voxels are to be left out of training"):
            new_bundle(discover(source), tmp_path / "no", Wishes(network="small"), progress=False)
        assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"network": "huge"}, "network must be one of"),
        ({"regions": {"mean": (1,)}}, "region 'mean': expected a name"),
        ({"floors": {"pet": 0.0}}, "floor of pet: expected one of adc, t2"),
        ({"floors": {"t2": float("nan")}}, "floor of t2: found nan, expected a number"),
    ],
)
def test_wishes_are_judged_before_volumes_are_read(tmp_path, monkeypatch, wishes, message):
    monkeypatch.setattr(write, "survey_cases", lambda *_, **__: pytest.fail("volumes were read"))
    with pytest.raises((DataError, ValueError), match=message):
        made(tmp_path, folders(tmp_path / "data"), **wishes)


def test_commands_are_quoted_where_a_path_has_spaces(tmp_path, monkeypatch):
    folders(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    text = command("new-bundle", "my bundle", "--data", "data", "--network", "small")
    assert "  monai-cggm compare 'my bundle/study.yaml' --data 'my bundle/datalist.json' --out comparison\n" in text
    assert "  cd 'my bundle' && python -m monai.bundle run" in text
    assert "\ncd 'my bundle'\n" in (tmp_path / "my bundle/docs/README.md").read_text()


def test_the_command_prints_what_it_found_and_what_comes_next(tmp_path):
    source = folders(tmp_path / "data")
    out = tmp_path / "bundle"
    text = command("new-bundle", out, "--data", source, "--region", "all=1,2", "--modality", "t2=*_T2*", "--modality",
                   "adc=*ADC*", "--network", "small")  # fmt: skip
    assert "4 cases of 4 patients" in text
    assert re.search(r"modalities\s+t2, adc", text)
    assert re.search(r"spacing \(mm\)\s+1 × 1 × 5 \(4 cases\)", text)
    assert re.search(r"slices along head-feet \(coarse\)", text)
    assert re.search(r"orientation\s+LPS \(4 cases\), turned to LPS", text)
    assert f"monai-cggm compare {out / 'study.yaml'}" in text.replace("\n", "")
    for option, value, message in (
        ("--modality", "flair", "--modality is 'flair': expected different names, such as flair="),
        ("--region", "WT=a", "--region is 'a': expected whole numbers"),
    ):
        result = CliRunner().invoke(app, ["new-bundle", str(tmp_path / "no"), "--data", str(source), option, value])
        assert result.exit_code == 1
        assert message in result.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "arms"),
    [(folders, ["joint", "dropout"]), (nnunet, ["joint"]), (msd, ["joint"]), (bids, ["joint"])],
)
def test_two_commands_from_a_folder_to_a_report(layout, arms, tmp_path, monkeypatch):
    """Whatever the layout: a bundle, trainings, their scores from every subset, and the report."""
    source = layout(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    command("new-bundle", "bundle", "--data", source, "--network", "small")
    text = command("compare", "bundle/study.yaml", "--data", "bundle/datalist.json", "--out", "comparison", "--arms",
                   arms[-1], *(part for value in TINY for part in ("--set", value)), "--jobs", "1")  # fmt: skip
    assert "Report: comparison/report.html" in text
    modalities = train_config(tmp_path / "bundle")["modalities"]
    regions = list(train_config(tmp_path / "bundle")["regions"])
    tested = json.loads((tmp_path / "bundle/split.json").read_text())["test"]
    for arm in arms:
        scores = pd.read_csv(tmp_path / f"comparison/cells/{arm}/split-seed0/scores.csv")
        fused = scores[scores["predictor"] == "fusion"]
        assert set(fused["case"]) == set(tested)
        assert set(fused["subset"]) == {"+".join(modalities), *modalities}
        assert {f"dice_{region}" for region in regions} <= set(scores.columns)
        assert fused["dice_mean"].between(0, 1).all()
    report = (tmp_path / "comparison/report.md").read_text()
    assert all(f"| {arm} | " in report for arm in arms)
    assert (tmp_path / "comparison/report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_a_trained_bundle_segments_in_the_values_and_grid_of_the_data(tmp_path, monkeypatch):
    """The box is easy to see: some epochs find it, and what is written lies where it is."""
    import subprocess
    import sys

    from tests.bundles.running import environment

    source = folders(tmp_path / "data", affine=np.diag([1.0, -1.0, 5.0, 1.0]))
    bundle = made(tmp_path, source, regions={"box": [1, 2]})
    run = [sys.executable, "-m", "monai.bundle", "run", "--logging_file", "False", "--run_dir", "runs/a"]
    small = ["--encoder#width", "8", "--epochs", "30", "--val_interval", "30", "--image_interval", "30"]
    train = [*run, "--config_file", "configs/train.yaml", *small]
    subprocess.run(train, cwd=bundle.folder, env=environment(), check=True, capture_output=True)
    segment = [sys.executable, "-m", "monai.bundle", "run", "--logging_file", "False"]
    segment += ["--config_file", "configs/inference.yaml", "--encoder#width", "8", "--dataset_dir", "datalist.json"]
    segment += ["--model_file", "runs/a/model.pt", "--output_dir", "out"]
    subprocess.run(segment, cwd=bundle.folder, env=environment(), check=True, capture_output=True)
    found = 0
    for patient in PATIENTS:
        (file,) = (bundle.folder / "out").rglob(f"{patient}_seg.nii.gz")
        written, truth = nib.load(file), nib.load(source / patient / f"{patient}_seg.nii.gz")
        np.testing.assert_allclose(written.affine, truth.affine)
        seen, there = np.asarray(written.dataobj) > 0, np.asarray(truth.dataobj) > 0
        found += 2 * (seen & there).sum() / (seen.sum() + there.sum())
    assert found / len(PATIENTS) > 0.7


@pytest.mark.slow
@pytest.mark.real_data
def test_multiple_sclerosis_as_it_lies(real_data, tmp_path, monkeypatch):
    """Real files with long names, three patients, a binary label: two commands, and what they say in the end."""
    source = real_data / "ms_lesions"
    if not source.is_dir():
        pytest.skip("needs ms_lesions in MONAI_CGGM_TEST_DATA")
    monkeypatch.chdir(tmp_path)
    text = command("new-bundle", "bundle", "--data", source, "--network", "small", "--region", "lesion=1")
    assert "patches (not far from cubes): voxels are 1 × 1 × 1 mm" in text
    config = train_config(tmp_path / "bundle")
    assert (config["labels"], config["num_classes"], config["regions"]) == ("0=0,1=1", 2, {"lesion": [1]})
    assert config["encoder#spatial_dims"] == 3
    # large patches that do not overlap, in so few channels: seconds for a whole brain
    settings = [value for value in TINY if "slices" not in value and "width" not in value]
    settings += ["encoder#width=4", "patches_per_volume=1", "patch_size=[64,64,64]", "patch_overlap=0.0"]
    command("compare", "bundle/study.yaml", "--data", "bundle/datalist.json", "--out", "comparison", "--arms", "joint",
            *(part for value in settings for part in ("--set", value)))  # fmt: skip
    scores = pd.read_csv(tmp_path / "comparison/cells/joint/split-seed0/scores.csv")
    fusion = scores[scores["predictor"] == "fusion"]
    assert len(fusion) == 15
    assert scores["dice_lesion"].between(0, 1).all()

    assert_reported(tmp_path / "comparison", fusion.set_index("subset"), "flair+t1+t1ce+t2")
    written = [path for path in (tmp_path / "comparison").rglob("report.*")]
    assert not any(str(real_data) in path.read_text() for path in written)


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize(
    ("page", "options", "left_out"),
    [("tutorial_own_data.md", "", 0), ("how-to/my_dataset.md", " --spatial-dims 2 --network small", 2)],
)
def test_pages_show_what_the_command_prints(real_data, tmp_path, monkeypatch, page, options, left_out):
    if not (real_data / "ms_lesions").is_dir():
        pytest.skip("needs ms_lesions in MONAI_CGGM_TEST_DATA")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "ms_lesions").symlink_to(real_data / "ms_lesions")
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    (line, shown) = re.search(
        r"```bash\nmonai-cggm (new-bundle [^\n]+)\n.*?```text\n(.+?)```", text, re.DOTALL
    ).groups()
    result = CliRunner().invoke(app, (line + options).split())
    assert result.exit_code == 0, result.output
    printed, told = ([line.strip() for line in t.splitlines() if line.strip()] for t in (result.stdout, shown))
    assert told.count("…") == left_out
    if left_out:
        places = [printed.index(line) for line in told if line != "…"]  # all of them are there, in this order
        assert places == sorted(places)
    else:
        assert told == printed


def assert_reported(folder: Path, scores: pd.DataFrame, whole: str) -> None:
    """The tables and pages of a comparison of one arm and one test case have its scores, given by subset."""
    dice, hd95 = scores.loc[whole, ["dice_lesion", "hd95_lesion"]]
    (full,) = pd.read_csv(folder / "tables/full_set.csv").to_dict("records")
    assert (full["arm"], full["splits"], full["seeds"], full["cases"]) == ("joint", 1, 1, 1)
    assert (full["dice_lesion"], full["hd95_lesion"]) == pytest.approx((dice, hd95), abs=1e-6)
    (subsets,) = pd.read_csv(folder / "tables/subsets.csv").to_dict("records")
    assert {name: subsets[name] for name in scores.index} == pytest.approx(dict(scores["dice_lesion"]), abs=1e-6)
    assert subsets["missing_3"] == pytest.approx(scores.loc[["flair", "t1", "t1ce", "t2"], "dice_lesion"].mean())
    row = ["joint training", f"{dice:.3f} ± –", f"{dice:.3f} ± –", f"{hd95:.1f} ± –", "0 of 1", "1", "1", "1"]
    plain, page = ((folder / f"report.{ending}").read_text() for ending in ("md", "html"))
    assert f"| {' | '.join(row)} |" in plain
    assert row in [re.findall(r"<t[hd][^>]*>([^<]*)", line) for line in page.splitlines() if line.startswith("<tr>")]
    assert "<img" in page
    assert not re.search(r"(src|href)=.https?:", page)


def cubes(root: Path) -> Path:
    """Voxels that are cubes: patches."""
    return folders(root, affine=CUBES)


def test_patches_where_voxels_are_cubes(tmp_path):
    bundle = made(tmp_path, cubes(tmp_path / "data"))
    train, inference = (
        ConfigParser.load_config_files(str(bundle.folder / f"configs/{name}.yaml")) for name in ("train", "inference")
    )
    for config in (train, inference):
        assert config["encoder"]["spatial_dims"] == 3
        assert config["patch_size"] == [32, 48, 16]
        assert not {"slice_size", "slices_per_volume", "tumour_free_share", "slices_at_once"} & set(config)
        assert str(config["memory_format"]) == "$torch.contiguous_format"
    assert train["patches_per_volume"] == 2
    assert train["validate"]["inferer"]["_target_"] == inference["inferer"]["_target_"]
    assert inference["inferer"]["_target_"] == "monai_cggm.inferers.PatchInferer"
    paper = new_bundle(discover(tmp_path / "data"), tmp_path / "paper", progress=False)
    config = ConfigParser.load_config_files(str(paper.folder / "configs/train.yaml"))
    assert (config["encoder"]["backbone"], config["encoder"]["width"]) == ("resnet18", 32)
    metadata = json.loads((paper.folder / "configs/metadata.json").read_text())
    assert metadata["network_data_format"]["inputs"]["image"]["spatial_shape"] == ["*", "*", "*"]


@pytest.mark.slow
def test_two_commands_with_patches(tmp_path, monkeypatch):
    source = cubes(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    command("new-bundle", "bundle", "--data", source, "--network", "small")
    settings = [*(value for value in TINY if "slices" not in value), "patches_per_volume=1"]
    command("compare", "bundle/study.yaml", "--data", "bundle/datalist.json", "--out", "comparison", "--arms", "cggm",
            *(part for value in settings for part in ("--set", value)), "--jobs", "1")  # fmt: skip
    for arm in ("joint", "cggm"):
        scores = pd.read_csv(tmp_path / f"comparison/cells/{arm}/split-seed0/scores.csv")
        assert scores["dice_mean"].between(0, 1).all()
