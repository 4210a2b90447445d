# SPDX-License-Identifier: Apache-2.0
"""Read run folders, also those of killed runs, and say which method each one is of."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from monai_cggm.errors import DataError

#: the column by which a run chooses its model
VALIDATION_DICE = "validation/val_dice"

#: states of training in the order in which figures and tables show them
STATES = ("unimodal", "joint", "observe", "magnitude", "direction", "both", "neither", "other")
#: the paper's method, whole or in part
CGGM_STATES = ("magnitude", "direction", "both")
#: joint training: its network is the same with and without classifiers beside it
BASELINE_STATES = ("joint", "observe")

#: settings that may differ between runs of one experiment without a word
_HOUSEKEEPING = {"bundle_root", "run_dir", "resume", "device", "num_workers", "cache_dir", "image_interval", "seed"}
#: settings of which CGGM's label says everything, or nothing where they have this value
_CGGM_DEFAULTS = {"rho": None, "lam": None, "rule": None, "direction": "gradient", "magnitude": True}


@dataclass(frozen=True)
class Kind:
    """What was trained, but for the seed. Runs of equal kinds are repetitions of each other.

    Attributes:
        state: one of :data:`STATES`. ``both`` is CGGM with magnitude and direction; ``neither`` is CGGM with both
            switched off; ``other`` is another method, or CGGM under a control (``control``) or with ``lagged``.
        label: what a figure's legend calls it.
        rho: ρ of a CGGM run.
        lam: λ of a CGGM run; 0 without the direction term.
        family: what else tells the kind from others, for sweeps over ρ and λ.
    """

    state: str
    label: str
    rho: float | None = None
    lam: float | None = None
    family: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder as far as it can be read.

    Attributes:
        folder: where it is.
        name: the folder's name; with its parent's where two runs share one.
        kind: what was trained.
        modalities: names of the modalities.
        seed: the run's seed; None where the configuration does not say.
        config: ``config.yaml``; empty where there is none.
        epochs: ``epochs.csv``, a row an epoch; empty where there is none.
        iterations: ``iterations.csv``, a row an iteration; empty where there is none.
        tests: scores of ``test/summary.csv`` by predictor and score, Dice from 0 to 1.
        resources: ``resources.json``; empty where there is none.
        problems: what could not be read or is not complete, one line each.
    """

    folder: Path
    name: str
    kind: Kind
    modalities: tuple[str, ...]
    seed: int | None
    config: Mapping[str, Any]
    epochs: pd.DataFrame
    iterations: pd.DataFrame
    tests: Mapping[tuple[str, str], float]
    resources: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)

    @property
    def best(self) -> pd.Series | None:
        """The row of the best epoch on validation, the one that ``model.pt`` is of; None without validation."""
        if VALIDATION_DICE not in self.epochs or not self.epochs[VALIDATION_DICE].notna().any():
            return None
        return self.epochs.loc[self.epochs[VALIDATION_DICE].idxmax()]

    @property
    def epochs_done(self) -> int:
        """How many epochs are complete."""
        return 0 if self.epochs.empty else int(self.epochs["epoch"].max())

    @property
    def epochs_planned(self) -> int | None:
        """How many epochs were asked for; None where the configuration does not say."""
        planned = _number(self.config.get("epochs"))
        return None if planned is None else int(planned)

    def score(self, part: str, predictor: str, score: str = "dice_mean") -> float:
        """Return a mean over cases, or NaN where it was not computed.

        Args:
            part: ``validation`` (at the best epoch) or ``test``.
            predictor: ``fusion`` or a modality, whose classifier is meant.
            score: ``dice_WT`` and the like, or ``dice_mean``.
        """
        if part == "test":
            return self.tests.get((predictor, score), float("nan"))
        best = self.best
        return float("nan") if best is None else float(best.get(f"validation/{predictor}_{score}", float("nan")))


def read_runs(folders: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    """Read run folders, each one once, and list those that hold no run.

    Args:
        folders: run folders.

    Returns:
        The runs in their order, and a line for each folder that is left out.

    Raises:
        DataError: if no folder holds a run.

    Example:
        >>> read_runs(["runs/nowhere"])
        Traceback (most recent call last):
        ...
        monai_cggm.errors.DataError: runs/nowhere: no such folder
    """
    paths = list({Path(folder).resolve(): Path(folder) for folder in folders}.items())
    names = [path.name for path, _ in paths]
    runs, left_out = [], []
    for path, given in paths:
        name = path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}"
        try:
            runs.append(read_run(given, name))
        except DataError as error:
            left_out.append(str(error))
    if not runs:
        raise DataError(left_out or ["no run folder was given"])
    return runs, left_out


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """Read one run folder.

    Rows that a killed run left half-written are dropped. What is missing or not complete is said in ``problems``.

    Args:
        folder: the run's folder.
        name: what to call it; default: the folder's name.

    Raises:
        DataError: where there is no such folder, or neither ``iterations.csv`` nor ``epochs.csv`` has a row.
    """
    path = Path(folder)
    if not path.is_dir():
        raise DataError([f"{path}: no such folder"])
    problems: list[str] = []
    config = _read_config(path / "config.yaml", problems)
    epochs = read_table(path / "epochs.csv", "epoch", problems)
    iterations = read_table(path / "iterations.csv", "iteration", problems)
    if epochs.empty and iterations.empty:
        raise DataError([f"{path}: no run folder: neither epochs.csv nor iterations.csv has a row"])
    columns = [*epochs.columns, *iterations.columns]
    called = name or path.resolve().name
    seed = _number(config.get("seed"))
    run = Run(
        folder=path,
        name=called,
        kind=kind_of(config, columns, called),
        modalities=_modalities(config, columns),
        seed=None if seed is None else int(seed),
        config=config,
        epochs=epochs,
        iterations=iterations,
        tests=_read_summary(path / "test" / "summary.csv", problems),
        resources=_read_resources(path / "resources.json", problems),
        problems=problems,
    )
    if run.epochs_planned is not None and run.epochs_done < run.epochs_planned:
        problems.append(f"not finished: {run.epochs_done} of {run.epochs_planned} epochs are done")
    return run


def by_kind(runs: Sequence[Run]) -> dict[Kind, list[Run]]:
    """Sort runs into kinds, baselines first; runs of one kind are repetitions with other seeds."""
    kinds: dict[Kind, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (STATES.index(run.kind.state), run.kind.label)):
        kinds.setdefault(run.kind, []).append(run)
    return kinds


def runs_of(kinds: Mapping[Kind, Sequence[Run]]) -> list[Run]:
    """Return the runs of all kinds, kind by kind."""
    return [run for group in kinds.values() for run in group]


def over_runs(runs: Sequence[Run], table: str, column: str) -> pd.DataFrame:
    """Average a column over runs.

    Args:
        runs: repetitions.
        table: ``epochs`` or ``iterations``.
        column: the column; runs without it do not count.

    Returns:
        Columns ``epoch`` or ``iteration``, ``mean``, ``sd`` (sample standard deviation; NaN for a single run) and
        ``runs``, a row where any run has a finite value; no row where no run has the column.
    """
    axis = {"epochs": "epoch", "iterations": "iteration"}[table]
    tables = [getattr(run, table) for run in runs]
    curves = [frame.drop_duplicates(axis, keep="last").set_index(axis)[column] for frame in tables if column in frame]
    if not curves:
        return pd.DataFrame({axis: [], "mean": [], "sd": [], "runs": []})
    values = pd.concat(curves, axis=1).sort_index().replace([np.inf, -np.inf], np.nan).dropna(how="all")
    return pd.DataFrame(
        {"mean": values.mean(axis=1), "sd": values.std(axis=1, ddof=1), "runs": values.count(axis=1)}
    ).reset_index(names=axis)


def differing_settings(runs: Sequence[Run]) -> pd.DataFrame:
    """Return the top-level settings in which runs differ, a row a setting and a column a run.

    Seeds, paths and what only concerns speed or pictures do not count; nor do settings with parts of their own.
    """
    configs = {run.name: run.config for run in runs if run.config}
    names = dict.fromkeys(name for config in configs.values() for name in config if name not in _HOUSEKEEPING)
    texts = {name: [_text(config.get(name)) for config in configs.values()] for name in names}
    different = {
        name: values for name, values in texts.items() if all(v is not None for v in values) and len(set(values)) > 1
    }
    return pd.DataFrame.from_dict(different, orient="index", columns=list(configs)).rename_axis("setting").reset_index()


def read_gradients(run: Run) -> dict[str, np.ndarray] | str:
    """Return what ``gradients.npz`` holds (see ``GradientRecorder``), or why it cannot be read."""
    path = run.folder / "gradients.npz"
    if not path.is_file():
        return f"{run.name} has no gradients.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in ("iteration", "classifier", "fusion", "modalities")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        return f"{run.name}/gradients.npz cannot be read ({error})"


# ---------------------------------------------------------------------- which method


def kind_of(config: Mapping[str, Any], columns: Sequence[str], name: str) -> Kind:
    """Tell what was trained from a run's configuration, or from its columns where that does not say.

    Args:
        config: ``config.yaml``.
        columns: of the run's tables.
        name: the run's name, which labels what no configuration names.

    Example:
        >>> kind_of({"method": None, "modalities": ["flair", "t1"]}, [], "run").label
        'joint'
        >>> method = {"_target_": "monai_cggm.methods.CGGM", "rho": 1.2, "lam": 0.1, "magnitude": False}
        >>> kind = kind_of({"method": method}, [], "run")
        >>> kind.state, kind.label
        ('direction', 'CGGM direction only, ρ=1.2, λ=0.1, paper')
    """
    if "method" not in config:
        return Kind(_state_by_columns(columns), name)
    method = config["method"] if isinstance(config["method"], Mapping) else {}
    target = str(method.get("_target_", "")).rpartition(".")[2]
    parts = sorted(_other_parts(config))
    if not target:
        modalities = _modalities(config, columns)
        state, label = ("unimodal", f"{modalities[0]} alone") if len(modalities) == 1 else ("joint", "joint")
    elif target == "UnimodalObserver":
        state, label = "observe", "observe"
    else:
        return _steered(target, method, parts)
    return Kind("other" if parts else state, " + ".join([label, *parts]))


def _steered(target: str, method: Mapping[str, Any], parts: Sequence[str]) -> Kind:
    told = _told(method)
    if target != "CGGM":
        label = ", ".join([target, *(f"{name}={value}" for name, value in told.items())])
        return Kind("other", " + ".join([label, *parts]), family=(("method", label), *((part, "") for part in parts)))
    rho = _number(method.get("rho", 1.2))
    direction = told.get("direction", "gradient")
    lam = 0.0 if direction in ("off", "false") else _number(method.get("lam", 0.1))
    magnitude = told.get("magnitude", "true") in ("true", "1", "yes")
    extra = {name: value for name, value in told.items() if name not in _CGGM_DEFAULTS}
    state = {(True, True): "both", (True, False): "magnitude", (False, True): "direction"}.get(
        (magnitude, bool(lam)), "neither"
    )
    words = {"magnitude": " magnitude only", "direction": " direction only", "neither": " with both off"}.get(state, "")
    sizes = [f"ρ={rho:g}" if rho is not None else "", f"λ={lam:g}" if lam else ""]
    rule = told.get("rule", "paper")
    ways = [rule, direction if lam and direction != "gradient" else ""]
    label = ", ".join(filter(None, [f"CGGM{words}", *sizes, *ways, *(f"{k}={v}" for k, v in extra.items())]))
    special = bool(parts) or direction == "lagged" or any(name != "max_share" for name in extra)
    family = {"rule": rule, "magnitude": str(magnitude), "direction": direction if lam else "gradient", **extra}
    return Kind(
        "other" if special else state, " + ".join([label, *parts]), rho=rho, lam=lam, family=tuple(family.items())
    )


def _other_parts(config: Mapping[str, Any]) -> set[str]:
    """What else changes training, with its settings: dropout of modalities, further losses, averaged weights."""
    found: set[str] = {"averaged weights"} if isinstance(config.get("average"), Mapping) else set()
    queue: list[Any] = [value for name, value in config.items() if name != "method"]
    while queue:
        value = queue.pop()
        if isinstance(value, Mapping):
            module, _, target = str(value.get("_target_", "")).rpartition(".")
            if module.startswith("monai_cggm.methods"):
                settings = [f"{name}={text}" for name, text in _told(value).items()]
                found.add(f"{target} ({', '.join(settings)})" if settings else target)
            queue += value.values()
        elif isinstance(value, list):
            queue += value
    return found


def _told(part: Mapping[str, Any]) -> dict[str, str]:
    """The plain settings of a part that say something: B on the gradient is what equation 8 says."""
    texts = {str(name): _text(value) for name, value in part.items() if name not in ("_target_", "seed", "modalities")}
    silent = ("null", "none")
    return {
        name: text
        for name, text in texts.items()
        if text is not None and text not in silent and (name, text) != ("scale", "gradient")
    }


def _state_by_columns(columns: Sequence[str]) -> str:
    groups = {column.partition("/")[0] for column in columns}
    if "balance" in groups:
        return "both" if "loss/gm" in columns else "magnitude"
    return "observe" if "epsilon" in groups else "joint"


def _modalities(config: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, ...]:
    named = config.get("modalities")
    if isinstance(named, list) and named:
        return tuple(map(str, named))
    seen = (column.partition("/")[2] for column in columns if column.startswith("epsilon/"))
    return tuple(dict.fromkeys(seen))


def _text(value: Any) -> str | None:
    """A plain value, or a list of them, as a word; None for what is not plain."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value:g}"
    if isinstance(value, str):
        return None if value[:1] in ("$", "@", "%") else value
    if isinstance(value, list) and not any(isinstance(v, (list, Mapping)) for v in value):
        return ", ".join(map(str, value))
    return None


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


# ---------------------------------------------------------------------- files


def read_table(path: Path, axis: str, problems: list[str]) -> pd.DataFrame:
    """Read a table of numbers, without rows that are half-written; an empty one where there is none.

    Args:
        path: the CSV file.
        axis: the column that numbers the rows, without which a table is of no use.
        problems: gets a line for what is wrong.
    """
    if not path.is_file():
        problems.append(f"no {path.name}")
        return pd.DataFrame()
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]  # a last line without its end was cut off
    columns, *rows = list(csv.reader(io.StringIO(whole))) or [[]]
    complete = [row for row in rows if len(row) == len(columns)]
    cut = len(rows) - len(complete) + (len(whole) < len(text))
    if cut:
        problems.append(f"{path.name}: {cut} row{'s' if cut > 1 else ''} half-written, left out")
    if not complete or axis not in columns:
        problems.append(f"{path.name} has no {f'column {axis}' if complete else 'whole row'}: not used")
        return pd.DataFrame()
    return pd.DataFrame(complete, columns=columns).apply(pd.to_numeric, errors="coerce")


def _read_config(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        problems.append("no config.yaml: the method is told by the columns")
        return {}
    try:
        # the C loader: a configuration lists every case, which takes the other one seconds
        content = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(f"config.yaml cannot be read ({str(error).splitlines()[0]}): the method is told by the columns")
        return {}
    return content if isinstance(content, dict) else {}


def _read_resources(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        problems.append(f"resources.json cannot be read ({error})")
        return {}
    return content if isinstance(content, dict) else {}


def _read_summary(path: Path, problems: list[str]) -> dict[tuple[str, str], float]:
    if not path.is_file():
        return {}
    try:
        table = pd.read_csv(path)
        rows = zip(table["predictor"], table["score"], table["mean"], strict=True)
        return {(str(predictor), str(score)): float(mean) for predictor, score, mean in rows}
    except (ValueError, KeyError) as error:
        problems.append(f"test/summary.csv cannot be read ({error})")
        return {}
