# SPDX-License-Identifier: Apache-2.0
"""The command ``monai-cggm to-nnunet``."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from monai_cggm.cli import app
from tests.new_bundle.folders import PATIENTS, folders


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["to-nnunet", *map(str, arguments)])
    return result.exit_code, result.output


def test_a_data_set_with_the_split_of_a_bundle(tmp_path: Path) -> None:
    source = folders(tmp_path / "data")
    split = tmp_path / "split.json"
    parts = {"train": PATIENTS[:2], "validation": PATIENTS[2:3], "test": PATIENTS[3:]}
    split.write_text(json.dumps({"seed": 0, **{part: list(ids) for part, ids in parts.items()}}))
    code, text = invoke(tmp_path / "raw", "--data", source, "--id", 501, "--name", "Zones", "--split", split)
    assert code == 0, text
    folder = tmp_path / "raw" / "Dataset501_Zones"
    assert "Channels: 0000 adc, 0001 t2" in text
    assert "class 2 was 2" in text
    assert len(list((folder / "imagesTr").iterdir())) == 2 * 3
    assert len(list((folder / "imagesTs").iterdir())) == 2
    assert json.loads((folder / "splits_final.json").read_text()) == [{"train": ["p01", "p02"], "val": ["p03"]}]
    assert "The fold: after nnUNetv2_plan_and_preprocess" in text


def test_regions_of_the_data_set_or_of_the_user_or_none(tmp_path: Path) -> None:
    source = folders(tmp_path / "data")
    files = {"t2": "T2", "adc": "ADC", "label": "seg"}
    cases = [{"case": p, **{k: f"{p}/{p}_{name}.nii.gz" for k, name in files.items()}} for p in PATIENTS]
    (source / "list.json").write_text(json.dumps({"regions": {"gland": [1, 2], "core": [2]}, "training": cases}))
    for number, (options, labels) in enumerate(
        [
            ((), {"gland": [1, 2], "core": 2}),
            (("--region", "all=1,2"), {"all": [1, 2]}),
            (("--no-regions",), {"label_1": 1, "label_2": 2}),
        ]
    ):
        out = tmp_path / f"raw{number}"
        code, text = invoke(out, "--data", source / "list.json", "--id", 501, "--name", "Zones", *options)
        assert code == 0, text
        written = json.loads((out / "Dataset501_Zones/dataset.json").read_text())["labels"]
        assert written == {"background": 0, **labels}
    both = ("--region", "all=1,2", "--no-regions")
    code, text = invoke(tmp_path / "raw", "--data", source / "list.json", "--id", 501, "--name", "Zones", *both)
    assert (code, "--region and --no-regions exclude each other" in text) == (1, True)


def test_a_split_by_patients_that_names_do_not_tell(tmp_path: Path) -> None:
    """The split of a bundle that was made with --patient goes with the same option."""
    source = folders(tmp_path / "data")
    for number, patient in enumerate(PATIENTS):
        case = f"s{number % 2}_scan{number}"
        (source / patient).rename(source / case)
        for file in (source / case).iterdir():
            file.rename(source / case / file.name.replace(patient, case))
    ids = sorted(path.name for path in source.iterdir())
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"seed": 0, "train": ids[:2], "validation": ids[2:3], "test": ids[3:]}))
    options = (tmp_path / "raw", "--data", source, "--id", 501, "--name", "Zones", "--split", split)
    code, text = invoke(*options)
    assert code == 1
    assert "is in both" in text
    assert "(names tell the patients: say otherwise with --patient)" in " ".join(text.split())
    code, text = invoke(*options, "--patient", ".+")
    assert code == 0, text
    assert "train 2, validation 1, test 1" in text


def test_what_nnunet_cannot_take_is_refused(tmp_path: Path) -> None:
    source = folders(tmp_path / "data")
    (source / "p02" / "p02_T2.nii.gz").unlink()
    code, text = invoke(tmp_path / "raw", "--data", source, "--id", 501, "--name", "Zones")
    assert code == 1
    assert "p02" in text
    assert not (tmp_path / "raw").exists()


@pytest.mark.skipif(importlib.util.find_spec("nnunetv2") is None, reason="needs nnU-Net: pip install nnunetv2")
@pytest.mark.parametrize("regions", [(), ("--region", "gland=1,2", "--region", "lesion=2")])
def test_nnunet_itself_accepts_what_was_written(
    tmp_path: Path, regions: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    code, text = invoke(
        tmp_path / "raw", "--data", folders(tmp_path / "data"), "--id", 501, "--name", "Zones", *regions
    )
    assert code == 0, text
    folder = tmp_path / "raw" / "Dataset501_Zones"
    verify_dataset_integrity(str(folder), num_processes=1)
    said = capfd.readouterr().out
    assert "verify_dataset_integrity Done" in said
    assert "Error" not in said
    described = json.loads((folder / "dataset.json").read_text())
    labels = LabelManager(described["labels"], described.get("regions_class_order"))
    if regions:
        assert [tuple([one] if isinstance(one, int) else one) for one in labels.foreground_regions] == [(1, 2), (2,)]
    else:
        assert list(labels.foreground_labels) == [1, 2]
