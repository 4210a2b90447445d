# SPDX-License-Identifier: Apache-2.0
"""``monai-cggm align``, run as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from monai_cggm.cli import app
from monai_cggm.data.layouts import find_cases
from monai_cggm.data.phantom import write_phantoms

CASES = ("Phantom_000", "Phantom_001")
MODALITIES = ["flair", "t1ce", "t1", "t2"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["align", *(str(argument) for argument in arguments)])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "cases"
    write_phantoms(folder, cases=len(CASES), shape=(24, 24, 18), spacing=8.0)
    return folder


def test_align(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(root, out, "--reference", "t1", "--spacing", "8,8,16", "--workers", "0")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-4:] == [
        "2 cases of 2 patients.",
        "Modalities in alphabetical order: flair, t1, t1ce, t2.",
        f"{out}: 2 cases aligned, 0 were there already, 0 refused",
        f"Report: {out / 'report.html'}",
    ]
    cases = find_cases(out / "datalist.json", MODALITIES)
    assert [(case.case_id, case.convention) for case in cases] == [(case, "brats2018") for case in CASES]
    for case in cases:
        for path in [*case.images.values(), case.label]:
            assert nib.load(path).header.get_zooms() == (8.0, 8.0, 16.0)
    again = run(root, out, "--reference", "t1", "--spacing", "8,8,16", "--workers", "0")
    assert f"{out}: 0 cases aligned, 2 were there already, 0 refused" in again.stdout.splitlines()


def test_every_option_arrives(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = [
        "--mask",
        "brain",
        "--apply-mask",
        "--label-interpolation",
        "gaussian",
        "--label-on",
        "t2",
        "--n4-on",
        "t2",
    ]
    result = run(root, out, "--reference", "t1", "--modalities", "t1,t2", *options, "--fill", "t2=7", "--workers", "0")
    assert result.exit_code == 0, result.output
    assert json.loads((out / CASES[0] / "align.json").read_text())["settings"] == {
        "reference": "t1",
        "modalities": ["t1", "t2"],
        "register": False,
        "n4": ["t2"],
        "mask": "brain",
        "apply_mask": True,
        "spacing": None,
        "label_interpolation": "gaussian",
        "label_on": "t2",
        "fill": {"t2": 7.0},
    }


def test_a_bad_case_ends_with_exit_code_1(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (root / CASES[0] / f"{CASES[0]}_t1.nii.gz").unlink()
    (root / CASES[1] / f"{CASES[1]}_t2.nii.gz").unlink()
    result = run(root, out, "--reference", "t1", "--workers", "0")
    assert result.exit_code == 1
    problem = f"case {CASES[0]}: has no t1, which is the reference: found flair, t1ce, t2 ({root / CASES[0]})"
    assert problem in result.stderr.splitlines()
    assert result.stderr.splitlines()[-1] == "Error: 1 cases have problems"
    assert f"case {CASES[1]} lacks t2" in result.stdout.splitlines()
    assert f"{out}: 1 cases aligned, 0 were there already, 1 refused" in result.stdout


def test_a_case_that_went_away_is_told_at_the_end(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--reference", "t1", "--modalities", "t1,t2", "--workers", "0")
    assert "earlier runs" not in run(root, out, *options).stdout
    (root / CASES[1]).rename(tmp_path / "elsewhere")
    result = run(root, out, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-3:] == [
        f"{out}: 0 cases aligned, 1 were there already, 0 refused",
        f"Report: {out / 'report.html'}",
        f"Folders of earlier runs that are not in {out / 'datalist.json'}: {CASES[1]}; "
        f"remove them, or give {out / 'datalist.json'}, since a command that is given the whole folder takes them in.",
    ]
    assert (out / CASES[1] / "align.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reference", "ct"], "Error: the reference is 'ct', expected one of the modalities flair, t1, t1ce, t2"),
        (["--reference", "t1", "--spacing", "1,1"], "Error: --spacing has 2 numbers: expected three"),
        (["--reference", "t1", "--spacing", "a"], "Error: --spacing is 'a': expected three numbers"),
        (["--reference", "t1", "--fill", "ct"], "Error: --fill is 'ct': expected sequence=value pairs"),
        (["--reference", "t1", "--labels", "x"], "Error: unknown label convention 'x'"),
    ],
)
def test_errors_end_with_one_line(root: Path, options: list[str], message: str) -> None:
    result = run(root, root.parent / "out", *options)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(message)
    assert not (root.parent / "out").exists()


def test_patterns_that_no_file_fits(root: Path) -> None:
    """The labels alone make no case."""
    result = run(root, root.parent / "out", "--reference", "t1", "--modality", "t1=*XX*", "--modality", "flair=*YY*")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"t1 is in no case of {root}: no file fits the pattern *XX*",
        f"flair is in no case of {root}: no file fits the pattern *YY*",
        "Error: 2 problems",
    ]
    assert not (root.parent / "out").exists()


def test_an_output_inside_the_data(root: Path) -> None:
    result = run(root, root / "out", "--reference", "t1")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {root / 'out'} lies in {root}, where its files would be found as cases")


def test_an_interrupt_says_how_to_go_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("monai_cggm.alignment.case._build", interrupted)
    result = run(root, root.parent / "out", "--reference", "t1", "--workers", "0")
    assert result.exit_code == 130
    assert (
        result.stderr.splitlines()[-1]
        == f"Stopped. What is finished is in {root.parent / 'out'}; the same command goes on."
    )
    assert list((root.parent / "out").iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_stops_the_workers_and_leaves_only_what_is_finished(root: Path, repository: Path) -> None:
    """Two cases in two processes that take far longer than the test waits for."""
    out = root.parent / "out"
    shape = (200, 200, 160)
    noise = np.random.default_rng(0).integers(0, 900, shape).astype(np.int16)
    for case in CASES:
        for name in ("t1", "t2"):
            image = nib.Nifti1Image(noise, np.diag([1.0, 1.0, 1.0, 1.0]))
            nib.save(image, root / case / f"{case}_{name}.nii.gz")
        (root / case / f"{case}_seg.nii.gz").unlink()
    command = [sys.executable, "-m", "monai_cggm.cli", "align", root, out, "--reference", "t1", "--modalities", "t1,t2"]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    with subprocess.Popen(
        [*map(str, command), "--n4", "--workers", "2"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # A shell's background jobs, and all that they start, ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        end = time.monotonic() + 600
        while not list(out.glob(".*.part")) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1].startswith("Stopped. What is finished is in")
    assert "Traceback" not in errors
    assert list(out.iterdir()) == []
