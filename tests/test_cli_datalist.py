# SPDX-License-Identifier: Apache-2.0
"""``monai-cggm datalist``, run as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from monai.bundle import ConfigParser
from typer.testing import CliRunner, Result

from monai_cggm.cli import app
from monai_cggm.resources import share_path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["datalist", *(str(argument) for argument in arguments)])


def image(path: Path, seed: int = 0, spacing: float = 2.0) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).integers(1, 900, (10, 12, 14)).astype(np.int16)
    made = sitk.GetImageFromArray(voxels)
    made.SetSpacing((spacing,) * 3)
    sitk.WriteImage(made, str(path))
    return voxels.T


def test_new_cases_go_into_inference(tmp_path: Path) -> None:
    """BIDS with NRRD files and a lesion mask that is not wanted: the bundle's own configuration reads the list."""
    voxels = {}
    for case in ("sub-1", "sub-2"):
        voxels[case] = [image(tmp_path / f"new/{case}/anat/{case}_{key}.nrrd", 3) for key in ("FLAIR", "T1w")]
        image(tmp_path / f"new/derivatives/old/{case}/anat/{case}_dseg.nrrd")
    out = tmp_path / "out"
    result = run(out, "--data", tmp_path / "new", "--no-labels", "--workers", "1")
    assert result.exit_code == 0, result.output
    assert "2 cases of 2 patients." in result.stdout
    assert f"{out / 'datalist.json'}: 2 cases with flair, t1" in result.stdout
    assert result.stdout.splitlines()[-1].endswith(f"configs/inference.yaml --dataset_dir {out / 'datalist.json'}")
    content = json.loads((out / "datalist.json").read_text())
    assert [sorted(item) for item in content["test"]] == [["case", "flair", "patient", "t1"]] * 2
    parser = ConfigParser()
    parser.read_config(share_path("bundles/brats_cggm/configs/inference.yaml"))
    parser.update({"dataset_dir": str(out / "datalist.json"), "modalities": ["flair", "t1"], "labels": "brats2023"})
    (first, second) = parser.get_parsed_content("dataset").data
    assert (first["case"], second["case"]) == ("sub-1", "sub-2")
    prepared = parser.get_parsed_content("dataset")[0]["image"]
    assert prepared.shape == (2, 14, 12, 10)
    whole = voxels["sub-1"][0].astype(float)
    np.testing.assert_allclose(prepared[0].numpy(), (whole - whole.mean()) / whole.std(), atol=1e-4)


def test_labelled_cases(tmp_path: Path) -> None:
    for key in ("flair", "t1"):
        image(tmp_path / f"set/a/{key}.nii.gz")
    refused = " ".join(run(tmp_path / "out", "--data", tmp_path / "set").stderr.split())
    assert "has a label: expected a file with seg, mask" in refused
    assert refused.endswith("new cases to predict need none (monai-cggm datalist --no-labels)")
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "set/a/t1.nii.gz")) > 500, str(tmp_path / "set/a/seg.nii.gz"))
    result = run(tmp_path / "out", "--data", tmp_path / "set", "--copy")
    assert result.exit_code == 0, result.output
    assert "inference" not in result.stdout
    (item,) = json.loads((tmp_path / "out/datalist.json").read_text())["training"]
    assert item["label"] == "volumes/a/label.nii.gz"


def test_what_it_says_of_checking_and_splitting_works(tmp_path: Path) -> None:
    """For labels whose values no ID tells, and for a release whose IDs do."""
    for number, values in enumerate(((0, 2, 5), (0, 1, 2, 4))):
        source = tmp_path / f"set{number}"
        for case in ("a", "b", "c"):
            name = case if number == 0 else f"Brats18_{case}_1"
            for key in ("flair", "t1"):
                image(source / f"{name}/{name}_{key}.nii.gz", spacing=1.0)
            voxels = np.resize(np.array(values, np.uint8), (10, 12, 14))
            sitk.WriteImage(sitk.GetImageFromArray(voxels), str(source / f"{name}/{name}_seg.nii.gz"))
        result = run(tmp_path / f"out{number}", "--data", source)
        assert result.exit_code == 0, result.output
        lines = [line.strip() for line in result.stdout.splitlines() if line.startswith("  monai-cggm ")]
        assert [line.split()[1] for line in lines] == ["check", "split"]
        assert [line.endswith(" --labels 0=0,2=1,5=2") for line in lines] == [number == 0] * 2
        for line in lines:
            arguments = line.replace(" split.json", f" {tmp_path / f'split{number}.json'}").split()[1:]
            ran = CliRunner().invoke(app, arguments)
            assert ran.exit_code == 0, ran.output
        assert json.loads((tmp_path / f"split{number}.json").read_text())["train"]


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        ("test part", ["check", "The data set has parts of its own: new-bundle keeps them."]),
        ("unlabelled", ["Without a label: 1 of 3 cases; check and split want one of every case."]),
        ("missing", ["check --allow-missing", "Some cases lack modalities: a training draws its split itself."]),
        ("convention", ["check", "split"]),
        ("one", ["A label convention is told of 1 of 3 cases: give the others 'labels' in the list."]),
    ],
)
def test_what_it_says_where_checking_or_splitting_is_not_for_all(
    tmp_path: Path, spoil: str, expected: list[str]
) -> None:
    cases = []
    for number in range(3):
        keys = ("flair", "t1") if (number, spoil) != (2, "missing") else ("flair",)
        for key in keys:
            image(tmp_path / f"{number}_{key}.nii.gz", number, spacing=1.0)
        voxels = np.resize(np.array((0, 1, 2), np.uint8), (10, 12, 14))
        sitk.WriteImage(sitk.GetImageFromArray(voxels), str(tmp_path / f"{number}_seg.nii.gz"))
        files = {key: f"{number}_{key}.nii.gz" for key in keys} | {"label": f"{number}_seg.nii.gz"}
        cases.append({"case": f"c{number}", **files})
    if spoil == "convention":  # the entries' own, which is not overruled
        cases = [{**case, "labels": "0=0,1=2,2=1"} for case in cases]
    if spoil == "one":
        cases[0]["labels"] = "0=0,1=2,2=1"
    held = [cases.pop()] if spoil in ("test part", "unlabelled") else []
    if spoil == "unlabelled":
        del held[0]["label"]
    (tmp_path / "list.json").write_text(json.dumps({"training": cases, "test": held}))
    options = ("--allow-missing",) if spoil == "missing" else ()
    result = run(tmp_path / "out", "--data", tmp_path / "list.json", *options)
    assert result.exit_code == 0, result.output
    told = result.stdout.split("To check its voxels, and to draw a split:\n")[1].splitlines()
    assert len(told) == len(expected)
    for line, text in zip(told, expected, strict=True):
        command, *rest = text.split()
        if command not in ("check", "split"):
            assert line.strip() == text
            continue
        assert line.startswith(f"  monai-cggm {command} ")
        assert ("--labels" in line) == (spoil != "convention")
        assert all(option in line for option in rest)
        arguments = line.replace(" split.json", f" {tmp_path / 'split.json'}").split()[1:]
        ran = CliRunner().invoke(app, arguments)
        assert ran.exit_code == 0, ran.output


def test_one_modality_where_others_may_be_missing(tmp_path: Path) -> None:
    image(tmp_path / "set/a/flair.nii.gz")
    arguments = (tmp_path / "out", "--data", tmp_path / "set", "--no-labels")
    assert "has one modality only (flair)" in run(*arguments).stderr
    assert run(*arguments, "--allow-missing").exit_code == 0


def test_a_modality_that_all_new_cases_lack(tmp_path: Path) -> None:
    """As the command's help has it."""
    for case in ("a", "b"):
        image(tmp_path / f"set/{case}/flair.nii.gz")
    result = run(
        tmp_path / "out", "--data", tmp_path / "set", "--no-labels", "--modalities", "flair,t1", "--allow-missing"
    )
    assert result.exit_code == 0, result.output
    assert "t1 is in no case." in result.stdout
    listed = json.loads((tmp_path / "out/datalist.json").read_text())["test"]
    assert [sorted(item) for item in listed] == [["case", "flair", "patient"]] * 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (("a/t1.nii.gz", 3.0), "bring all volumes of a case to one grid first: monai-cggm align"),
        (("a/t1_n4.nii.gz", 2.0), "Error: case a: 2 files may be t1, expected one (a/t1.nii.gz, a/t1_n4.nii.gz; "),
        (("b/flair.nii.gz", 2.0), "Error: t1 is missing in 1 of 2 cases: b ("),
    ],
)
def test_what_cannot_be_used_gets_one_sentence(tmp_path: Path, spoil: tuple[str, float], message: str) -> None:
    for key in ("flair", "t1"):
        image(tmp_path / f"set/a/{key}.nii.gz")
    image(tmp_path / "set" / spoil[0], spacing=spoil[1])
    result = run(tmp_path / "out", "--data", tmp_path / "set", "--no-labels")
    assert result.exit_code == 1
    assert message in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_list_inside_the_data(tmp_path: Path) -> None:
    for key in ("flair", "t1"):
        image(tmp_path / f"set/a/{key}.nii.gz")
    result = run(tmp_path / "set/out", "--data", tmp_path / "set", "--no-labels")
    assert f"{tmp_path / 'set/out'} lies in {tmp_path / 'set'}" in result.stderr
