# SPDX-License-Identifier: Apache-2.0
"""Train one cell of a comparison, score it, and keep the small results."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from monai_cggm.analysis.cells import ALONE, ENSEMBLE
from monai_cggm.analysis.measures import is_dice, score_columns
from monai_cggm.analysis.pages import without_folders
from monai_cggm.compare.study import Cell, Study, find_file
from monai_cggm.data.splits import PARTS
from monai_cggm.errors import DataError
from monai_cggm.files import atomic_path

#: how a process is started; tests put a stand-in here
Launch = Callable[[Sequence[str], Path, Mapping[str, str]], int]

#: the last line of a traceback, or what a command says in its place
_ERROR = re.compile(r"(error:|[\w.]*(Error|Exception|Interrupt)\b)")
_WRAPPING = re.compile(r"RuntimeError: Failed to (evaluate|instantiate)")

#: the folder in a run's own where networks lie that a method is given: methods look there (``teacher_runs``)
_TEACHERS = "teachers"

_AGAIN = "remove its folder to run the cell again"
_PACKAGES = ("monai_cggm", "monai", "torch", "pytorch-ignite", "numpy")


def facts_of(folder: Path) -> dict[str, Any] | None:
    """Return what ``cell.json`` in a folder says, or None where there is none.

    Raises:
        DataError: where it cannot be read.
    """
    path = folder / "cell.json"
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError([f"{path}: cannot be read as JSON ({error}); {_AGAIN}"]) from error
    if not isinstance(facts, dict) or "status" not in facts:
        raise DataError([f"{path}: says nothing of a cell; {_AGAIN}"])
    return facts


def plan_of(cell: Cell, study: Study) -> dict[str, Any]:
    """Return what defines a cell's result: a cell is kept, or gone on with, only while this stays the same."""
    cases = json.loads(cell.split.read_text(encoding="utf-8"))
    return {
        "arm": cell.arm.name,
        "split": cell.split.stem,
        "seed": cell.seed,
        "overlays": list(cell.arm.overlays),
        "settings": {**study.settings, **cell.arm.settings},
        "config": list(study.config),
        "evaluation": list(study.evaluation),
        "cases": fingerprint([sorted(cases.get(part, [])) for part in PARTS]),
        "part": study.part,
        **({"convention": study.convention} if is_dice(study.score) else {"score": study.score}),
        **({"needs": list(cell.arm.needs)} if cell.arm.needs else {}),
    }


def configuration_of(cell: Cell, study: Study) -> str:
    """Fingerprint of what the cell's configuration files say; comments do not count."""
    files = [*study.config, *cell.arm.overlays, *study.evaluation]
    return fingerprint([yaml.safe_load(find_file(file).read_text(encoding="utf-8")) for file in files])


def fingerprint(content: Any) -> str:
    """Twelve hexadecimal digits that differ where plain values differ."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def run_cell(
    cell: Cell, study: Study, out: Path, data: str | Path, environment: Mapping[str, str], launch: Launch
) -> dict[str, Any]:
    """Train a cell (or go on with it), score it, and write its folder under ``out/cells``.

    Training and scoring are processes of their own, ``python -m monai.bundle run``, whose output goes to
    ``out/runs/<cell>/log.txt``.

    Returns:
        The cell's facts, as in ``cell.json``; ``status`` is ``done`` or ``failed``, with the ``error`` in a line.

    Raises:
        DataError: where cells that it needs are not done, or their networks are not there.
    """
    run_dir = out / "runs" / cell.folder
    run_dir.mkdir(parents=True, exist_ok=True)
    _take_needed(cell, study, out, run_dir / _TEACHERS)
    _write_json(run_dir / "plan.json", {**plan_of(cell, study), "configuration": configuration_of(cell, study)})
    settings = _write_settings(cell, study, run_dir, data)
    error = None
    if cell.arm.name == ENSEMBLE:
        _join_members(cell, study, out, run_dir)
    else:
        error = _run(cell, study.config, [settings], run_dir, environment, launch)
    if error is None:
        error = _run(cell, study.config, [*map(find_file, study.evaluation), settings], run_dir, environment, launch)
    facts = _facts(cell, study, out, run_dir, error)
    if error is None:
        _keep_results(run_dir, out / "cells" / cell.folder, study, facts["modalities"])
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    _write_json(out / "cells" / cell.folder / "cell.json", facts)
    return facts


def failed_cell(cell: Cell, study: Study, out: Path, error: BaseException) -> dict[str, Any]:
    """Record a cell that could not be run to its end for a reason of its own.

    It reads no file but the split, for a file that cannot be read may be the reason.
    """
    facts = {**plan_of(cell, study), "status": "failed", "error": _plain(f"{type(error).__name__}: {error}", out)}
    _write_json(out / "cells" / cell.folder / "cell.json", facts)
    return facts


def _take_needed(cell: Cell, study: Study, out: Path, folder: Path) -> None:
    """Put the networks that a cell needs into its own run: ``teachers/<modality, or arm>/model.pt``.

    Nothing else of the other runs is needed, and no path of this machine in the configuration.
    """
    problems = []
    for name, needed in study.needed_by(cell).items():
        taken = folder / name / "model.pt"
        if taken.is_file():  # it was begun with this one
            continue
        problem = _problem_with(needed.folder, out)
        if problem:
            problems.append(problem)
            continue
        with atomic_path(taken) as temporary:
            shutil.copyfile(out / "runs" / needed.folder / "model.pt", temporary)
    if problems:
        raise DataError(problems)


def _problem_with(needed: str, out: Path) -> str | None:
    """Why the network of a cell that another one needs cannot be had; None where it can."""
    facts = facts_of(out / "cells" / needed) or {"status": "outstanding", "error": None}
    if facts["status"] != "done":
        reason = f": {facts['error']}" if facts["error"] else ""
        return f"it needs {needed}, which is {facts['status']}{reason}"
    if not (out / "runs" / needed / "model.pt").is_file():
        return (
            f"it needs runs/{needed}/model.pt, and there is no such file: remove cells/{needed} and start again, which "
            "trains it anew"
        )
    return None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_settings(cell: Cell, study: Study, run_dir: Path, data: str | Path) -> Path:
    values = {
        **study.settings,
        **cell.arm.settings,
        "seed": cell.seed,
        "dataset_dir": str(Path(data).resolve()),
        "run_dir": str(run_dir.resolve()),
        "split_file": str(cell.split.resolve()),
        "resume": True,
        "part": study.part,
        **({"convention": study.convention} if is_dice(study.score) else {}),
    }
    path = run_dir / "settings.yaml"
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def _run(
    cell: Cell,
    config: Sequence[str],
    last: Sequence[Path],
    run_dir: Path,
    environment: Mapping[str, str],
    launch: Launch,
) -> str | None:
    """Start a bundle with the cell's overlays; return None or, where it failed, the last line that it said."""
    files = [*map(find_file, config), *map(find_file, cell.arm.overlays), *last]
    command = [sys.executable, "-m", "monai.bundle", "run", "--logging_file", "False"]
    log = run_dir / "log.txt"
    before = log.stat().st_size if log.is_file() else 0
    code = launch([*command, "--config_file", str([str(f) for f in files])], log, environment)
    return None if code == 0 else _last_words(log, code, before)


def start(command: Sequence[str], log: Path, environment: Mapping[str, str], **kwargs: Any) -> subprocess.Popen[bytes]:
    """Start a process whose output is appended to a file."""
    with log.open("ab") as file:
        # a session of its own: Ctrl-C reaches this program alone, which then ends its children
        kwargs.setdefault("start_new_session", os.name == "posix")
        return subprocess.Popen(
            list(command), stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment}, **kwargs
        )


def _last_words(log: Path, code: int, start: int) -> str:
    """What a process said last, or the error that it ended with, in one line.

    MONAI wraps an error in others that only say that a part of the configuration failed: these are passed over.
    """
    said = log.read_bytes()[start:].decode("utf-8", errors="replace")
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["no output"]
    if code < 0:
        return f"killed by signal {-code}; last line: {lines[-1]}"[:300]
    errors = [line for line in reversed(lines) if _ERROR.match(line)]
    return next((line for line in errors if not _WRAPPING.match(line)), (errors or lines[::-1])[0])[:300]


def _join_members(cell: Cell, study: Study, out: Path, run_dir: Path) -> None:
    """Put the members' weights into one model.pt."""
    import torch

    from monai_cggm.handlers.checkpoint import save_atomically

    members = {m: f"{ALONE}{m}/{cell.split.stem}-seed{cell.seed}" for m in study.modalities}
    problems = [problem for member in members.values() if (problem := _problem_with(member, out))]
    if problems:
        raise DataError(problems)
    weights: dict[str, Any] = {}
    for modality, member in members.items():
        path = out / "runs" / member / "model.pt"
        state = torch.load(path, map_location="cpu", weights_only=True)["model"]
        weights |= {f"networks.{modality}.{key}": value for key, value in state.items()}
    save_atomically({"model": weights, "epoch": 0}, run_dir / "model.pt")


def _facts(cell: Cell, study: Study, out: Path, run_dir: Path, error: str | None) -> dict[str, Any]:
    resources = _resources(cell, study, out, run_dir)
    settings = {**study.settings, **cell.arm.settings}
    return {
        **plan_of(cell, study),
        "configuration": configuration_of(cell, study),
        "status": "done" if error is None else "failed",
        "error": None if error is None else _plain(error, out),
        "modalities": list(settings.get("modalities", study.modalities)),
        **_epochs(run_dir / "epochs.csv"),
        **resources,
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _plain(error: str, out: Path) -> str:
    return without_folders(error.replace(f"{out.resolve()}/", "OUT/"))


def _resources(cell: Cell, study: Study, out: Path, run_dir: Path) -> dict[str, Any]:
    keys = ("training_seconds", "peak_memory_mb", "parameters", "classifier_parameters", "device", "threads")
    if cell.arm.name == ENSEMBLE:
        members = [
            out / "runs" / f"{ALONE}{m}" / f"{cell.split.stem}-seed{cell.seed}" / "resources.json"
            for m in study.modalities
        ]
    else:
        members = [run_dir / "resources.json"]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in members if path.is_file()]
    if not found:
        return dict.fromkeys(keys)
    added = {key: sum(f[key] for f in found) for key in ("training_seconds", "parameters", "classifier_parameters")}
    return {
        **{key: found[0].get(key) for key in keys},
        **added,
        "peak_memory_mb": max(f["peak_memory_mb"] for f in found),
    }


def _keep_results(run_dir: Path, folder: Path, study: Study, modalities: Sequence[str]) -> None:
    """Copy the scores, rounded, and the curves of the epochs."""
    part = study.part
    with (run_dir / f"{part}_subsets" / "cases.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise DataError([f"the scoring wrote no case into {part}_subsets/cases.csv"])
    scores = score_columns(rows[0], study.score)
    if study.score not in scores:
        raise DataError([f"{part}_subsets/cases.csv has no {study.score}, found {', '.join(rows[0])}"])
    with atomic_path(folder / "scores.csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["case", "part", "predictor", "subset", *scores])
        for row in rows:
            predictor, subset = _predictor_and_subset(row["predictor"], modalities)
            writer.writerow([row["case"], part, predictor, subset, *(_rounded(row[s]) for s in scores)])
    if (run_dir / "epochs.csv").is_file():
        with atomic_path(folder / "epochs.csv") as temporary:
            shutil.copyfile(run_dir / "epochs.csv", temporary)


def _predictor_and_subset(name: str, modalities: Sequence[str]) -> tuple[str, str]:
    if name == "fusion":
        return name, "+".join(modalities)
    if name.startswith("fusion["):
        return "fusion", name[len("fusion[") : -1]
    return name, name


def _rounded(value: str) -> str:
    return value and f"{float(value):.4f}"


def _epochs(path: Path) -> dict[str, int | None]:
    """How long a run went on, and which epoch validation chose: its key metric is the one called ``val_<score>``."""
    rows: list[dict[str, str]] = []
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    key = next((column for column in (rows[0] if rows else ()) if column.startswith("validation/val_")), "")
    scored = [row for row in rows if row.get(key)]
    best = max(scored, key=lambda row: float(row[key]), default=None)
    return {
        "epochs": int(rows[-1]["epoch"]) if rows else None,
        "validations": len(scored) if rows else None,
        "iterations": int(rows[-1]["iteration"]) if rows else None,
        "best_epoch": None if best is None else int(best["epoch"]),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
