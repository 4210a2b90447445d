# SPDX-License-Identifier: Apache-2.0
"""The command, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner, Result

import monai_cggm
from monai_cggm.cli import app
from monai_cggm.data.phantom import write_phantoms
from monai_cggm.data.phantom_features import write_phantom_features

CASES = ("Phantom_000", "Phantom_001", "Phantom_002")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "cases"
    write_phantoms(folder, cases=len(CASES), shape=(32, 32, 24), spacing=6.0)
    return folder


def spoil(root: Path) -> Path:
    """Put a NaN into one image."""
    path = root / CASES[1] / f"{CASES[1]}_t1.nii.gz"
    image = nib.load(path)
    array = np.asarray(image.dataobj, dtype=np.float32)
    array[0, 0, 0] = np.nan
    nib.save(nib.Nifti1Image(array, image.affine), path)
    return path


def test_check_of_good_cases(root: Path) -> None:
    result = run("check", root)
    assert result.exit_code == 0, result.output
    for case in CASES:
        (row,) = [line.split() for line in result.stdout.splitlines() if case in line]
        labels = np.asarray(nib.load(root / case / f"{case}_seg.nii.gz").dataobj)
        assert row[:6] == [case, "brats2018", "32x32x24", "6", "6", "6"]
        assert row[6:-2] == [str(value) for value in np.unique(labels)]
        assert row[-2:] == [f"{np.count_nonzero(labels):,}", "0"]
    assert "Label conventions: brats2018 3" in result.stdout
    assert result.stdout.splitlines()[-1] == "3 cases, no problem found"


def test_check_of_a_bad_case(root: Path) -> None:
    path = spoil(root)
    result = run("check", root)
    assert result.exit_code == 1
    problem = f"case {CASES[1]}: t1 has 1 NaN or infinite voxels, expected finite values ({path})"
    assert problem in result.stdout.splitlines()
    assert [line.split()[-1] for line in result.stdout.splitlines() if line.startswith(" Phantom")] == ["0", "1", "0"]
    assert result.stderr.splitlines()[-1] == "Error: 1 of 3 cases have problems"


def test_check_may_skip_bad_cases(root: Path) -> None:
    spoil(root)
    result = run("check", root, "--skip-bad")
    assert result.exit_code == 0
    assert f"case {CASES[1]}: t1 has 1 NaN" in result.stdout
    assert result.stdout.splitlines()[-1] == "3 cases, 1 bad ones to be left out (--skip-bad)"


def test_check_finds_repeated_ids(root: Path) -> None:
    """Two cases that are fine apart from their ID: only both together are wrong."""
    write_phantoms(root / "more", cases=1, shape=(32, 32, 24), spacing=6.0)
    result = run("check", root)
    assert result.exit_code == 1
    assert result.stdout.count("2 cases have this ID, expected one") == 2


def test_check_of_what_is_there(root: Path) -> None:
    (root / CASES[0] / f"{CASES[0]}_seg.nii.gz").unlink()
    (root / CASES[1] / f"{CASES[1]}_t2.nii.gz").unlink()
    result = run("check", root)
    assert result.exit_code == 1
    assert f"case {CASES[0]}: no label file" in result.stdout
    assert f"case {CASES[1]}: no t2 file" in result.stdout
    assert run("check", root, "--no-labels").exit_code == 1
    assert run("check", root, "--allow-missing").exit_code == 1
    assert run("check", root, "--no-labels", "--allow-missing").exit_code == 0
    assert run("check", root, "--no-labels", "--modalities", "flair,t1").exit_code == 0


def test_check_with_another_convention(root: Path) -> None:
    result = run("check", root, "--labels", "brats2023")
    assert result.exit_code == 1
    assert "label values [4] are not in the brats2023 map" in result.stdout
    assert "--labels brats2024, where 4 is the resection cavity" in result.stdout
    assert run("check", root, "--labels", "brats2024").exit_code == 0


def test_table_is_at_most_100_columns_wide(root: Path) -> None:
    for path in (root / CASES[0]).iterdir():
        path.rename(path.with_name(path.name.replace(CASES[0], "Brats18_" + 40 * "X")))
    result = run("check", root)
    assert result.exit_code == 0
    table = result.stdout.split("Label conventions")[0]
    assert max(map(len, table.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "none"], "Error: none does not exist: expected a folder of cases or a datalist (.json)"),
        (["check", ".", "--labels", "x"], "Error: unknown label convention 'x': expected one of brats2018"),
        (["check", ".", "--modalities", "t1,t1"], "Error: --modalities is 't1,t1': expected different names"),
        (["check", "."], "Error: no case in .: expected files such as ID_flair.nii.gz"),
        (["split", ".", "out.json"], "Error: no case in ."),
        (["path", "bundles/none"], "Error: 'bundles/none' does not come with the package"),
        (["path", "../x"], "Error: '../x' is outside the shipped files"),
        (
            ["phantom", "out", "--informativeness", "t1:1"],
            "Error: --informativeness is 't1:1': expected sequence=share",
        ),
        (["phantom", "out", "--informativeness", "pet=1"], "Error: informativeness names pet, expected some of flair"),
        (["phantom", "out", "--seed", "-1"], "Error: expected at least one case and a seed of at least 0"),
        (
            ["phantom-features", "x.pkl", "--informativeness", "text:1"],
            "Error: --informativeness is 'text:1': expected modality=share pairs",
        ),
        (["phantom-features", "x.npz"], "Error: expected a file that ends in .pkl, got x.npz"),
        (["prepare-food101", "nowhere", "out", "--tokens", "some"], "Error: tokens must be"),
        (["phantom-features", "x.pkl", "--task", "y"], "Error: task must be one of sentiment, emotion, got 'y'"),
    ],
)
def test_errors_end_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_phantom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def write(out: Path, **arguments: object) -> list[str]:
        calls.append((out, arguments))
        return list(CASES)

    monkeypatch.setattr("monai_cggm.data.phantom.write_phantoms", write)
    result = run("phantom", tmp_path / "demo", "--cases", "3", "--seed", "7", "--informativeness", "t1=0.5")
    assert result.exit_code == 0
    assert calls == [(tmp_path / "demo", {"cases": 3, "seed": 7, "informativeness": {"t1": 0.5}, "progress": True})]
    assert "Phantom_000 to Phantom_002" in result.stdout


def test_phantom_features(tmp_path: Path) -> None:
    out = tmp_path / "new" / "demo.pkl"
    shares = ("--informativeness", "audio=0.9")
    result = run("phantom-features", out, "--samples", "70", "--seed", "3", "--task", "emotion", *shares)
    assert result.exit_code == 0, result.output
    expected = tmp_path / "same.pkl"
    sizes = write_phantom_features(expected, samples=70, seed=3, task="emotion", informativeness={"audio": 0.9})
    assert out.read_bytes() == expected.read_bytes()
    assert result.stdout.strip() == f"{out}: " + ", ".join(f"{part} {count}" for part, count in sizes.items())
    again = run("phantom-features", tmp_path / "default.pkl", "--samples", "70")
    assert again.exit_code == 0
    write_phantom_features(expected, samples=70)
    assert (tmp_path / "default.pkl").read_bytes() == expected.read_bytes()


def test_split(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "split.json"
    result = run("split", root, out, "--sizes", "1,1,1", "--seed", "2")
    assert result.exit_code == 0, result.output
    assert "train 1, validation 1, test 1" in result.stdout
    content = json.loads(out.read_text())
    assert content.pop("seed") == 2
    assert sorted(case for ids in content.values() for case in ids) == list(CASES)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [("1,1", "three whole numbers"), ("a,1,1", "--sizes is 'a,1,1'"), ("2,2,2", "add up to 6, and there are 3 cases")],
)
def test_split_that_cannot_be(root: Path, tmp_path: Path, sizes: str, message: str) -> None:
    result = run("split", root, tmp_path / "split.json", "--sizes", sizes)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "split.json").exists()


def test_split_lists_all_bad_cases(root: Path, tmp_path: Path) -> None:
    for case in CASES[:2]:
        (root / case / f"{case}_t1.nii.gz").unlink()
    result = run("split", root, tmp_path / "split.json")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert [line.split(":")[0] for line in lines[-3:]] == [f"case {CASES[0]}", f"case {CASES[1]}", "Error"]
    assert lines[-1] == "Error: 2 problems"


def test_path() -> None:
    result = run("path", "bundles")
    assert result.exit_code == 0
    assert Path(result.stdout.strip()).is_dir()


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.strip() == f"monai-cggm {monai_cggm.__version__}"


@pytest.mark.parametrize("command", ["check", "phantom", "phantom-features", "prepare-food101", "split", "path"])
def test_help_has_examples(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"monai-cggm {command} " in result.stdout


def test_help_does_not_wait_for_pytorch() -> None:
    code = "import sys, monai_cggm.cli; sys.exit(any(name in sys.modules for name in ('torch', 'monai', 'nibabel')))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.parametrize(("folder", "count"), [("brats_2mm", 33), ("brats_1mm", 4)])
def test_real_cases(real_data: Path, folder: str, count: int) -> None:
    result = run("check", real_data / folder)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith(" Bra")]
    assert len(rows) == count
    assert all(row[-1] == "0" for row in rows)
    (row,) = [row for row in rows if row[0] == "BraTS-GLI-00000-000"]
    assert row[1] == "brats2023"
    assert row[6:10] == ["0", "1", "2", "3"]
    assert result.stdout.splitlines()[-1] == f"{count} cases, no problem found"
