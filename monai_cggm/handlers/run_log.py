# SPDX-License-Identifier: Apache-2.0
"""What a run measures, row by row in two tables and as curves in TensorBoard."""

from __future__ import annotations

import csv
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

import ignite.distributed as idist
import torch
import yaml
from ignite.engine import Events
from monai.engines import Evaluator, SupervisedTrainer
from monai.utils import CommonKeys
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from monai_cggm.files import atomic_path

logger = logging.getLogger(__name__)

Row = dict[str, float]

TRAIN_LOSS = "train/loss"
EPOCH_LOSS = "train/epoch_loss"
BALANCE_LINE = "balance/mean"

#: scores of a segmentation's validation
DICE = ("dice_WT", "dice_TC", "dice_ET", "dice_mean")

_CHARTS = {
    "epsilon": "ε of each modality's classifier",
    "balance": "balance term B",
    "gradient_norm": "gradient norm before modulation",
    "modulated_norm": "gradient norm after modulation",
    "cosine": "cosine to the fusion's gradient",
    "loss": "losses",
}


class RunLog:
    """Write every number of a training run to ``run_dir``, in a form that survives a kill.

    * ``iterations.csv``: the loss, what the method left in ``trainer.state.scalars`` and the learning rates of every
      iteration. Each row reaches the file before the next iteration begins.
    * ``epochs.csv``: their means over each epoch, and the validation's metrics. Rewritten whole every epoch.
    * TensorBoard events, with one writer for the whole run. Every step is a trainer's iteration, so validation and
      training share an axis, and the curves of the modalities share a chart under *Custom Scalars*. Top-level numbers
      and words of ``run_dir/config.yaml`` (see :class:`monai_cggm.handlers.RunInfo`) appear under *HParams*.

    Columns and tags have the same names. No column holds a time of day: the tables of a run that was killed and
    resumed equal those of an uninterrupted one. When a run starts, rows and events after the iteration that it starts
    from are dropped (all of them for a new run).

    Under several processes each number is the mean over them, and the first one writes.

    Args:
        run_dir: the run's folder; TensorBoard's event files lie in it.
        validator: the evaluator that validates, for its metrics; None if there is none.
        modalities: names of the modalities, for charts of the classifiers' validation scores.
        scores: the validation's scores that have charts; under *HParams* those of the fusion.
        score_name: what the charts of scores are called.
        optimizer: for learning rates; default: the trainer's. Groups are called by their ``name``.
        balance_line: the mean that balance terms must have, ρ(M−1)/M, drawn among them where there are any.

    Attributes:
        writer: TensorBoard's writer, for handlers that add images; None on other processes and outside a run.

    Example:
        >>> log = RunLog("runs/one", modalities=["flair", "t1ce"], balance_line=1.2 * (2 - 1) / 2)
        >>> log.balance_line
        0.6
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        validator: Evaluator | None = None,
        modalities: Sequence[str] = (),
        scores: Sequence[str] = DICE,
        score_name: str = "Dice",
        optimizer: Optimizer | None = None,
        balance_line: float | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.validator = validator
        self.modalities = tuple(modalities)
        self.scores = tuple(scores)
        self.score_name = score_name
        self.optimizer = optimizer
        self.balance_line = balance_line
        self.writer: SummaryWriter | None = None
        self._iterations = IterationTable(self.run_dir / "iterations.csv")
        self._epochs = EpochTable(self.run_dir / "epochs.csv")
        self._this_epoch: list[Row] = []
        self._validation: Row = {}
        self._charts_written = False

    def attach(self, engine: SupervisedTrainer) -> None:
        """Attach to the trainer, after :class:`Checkpoints` and after a method that leaves scalars."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._log_iteration)
        engine.add_event_handler(Events.COMPLETED, self._finish)
        if self.validator is not None:
            self.validator.add_event_handler(Events.COMPLETED, self._log_validation, engine)

    # ------------------------------------------------------------------ events

    def _start(self, engine: SupervisedTrainer) -> None:
        # Asked for here, so that it comes after validation and before the checkpoint, in any order of handlers:
        # what a checkpoint says is done must be in the tables.
        if not engine.has_event_handler(self._log_epoch, Events.EPOCH_COMPLETED):
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._log_epoch)
        self._this_epoch, self._validation, self._charts_written = [], {}, False
        if idist.get_rank() != 0:
            return
        done = engine.state.iteration
        self._iterations.open(keep_until=done)
        self._epochs.open(keep_until=done)
        # TensorBoard hides events of earlier files from this step on; a complete run is left as it is
        self.writer = SummaryWriter(str(self.run_dir), purge_step=done + 1, flush_secs=10)
        self._write_hyperparameters(self.writer)

    def _log_iteration(self, engine: SupervisedTrainer) -> None:
        row = _mean_over_ranks({TRAIN_LOSS: loss_of(engine.state.output), **getattr(engine.state, "scalars", {})})
        row.update(self._learning_rates(engine))
        self._this_epoch.append(row)
        if self.writer is None:
            return
        self._iterations.append({"epoch": engine.state.epoch, "iteration": engine.state.iteration, **row})
        for tag, value in row.items():
            if not tag.startswith("learning_rate/"):
                self.writer.add_scalar(tag, value, engine.state.iteration)
        if not self._charts_written:
            self._charts_written = True
            self.writer.add_custom_scalars(chart_layout(row, self.modalities, self.scores, self.score_name))
        if engine.state.iteration == 1:
            self._draw_balance_line(self.writer, row, engine.state.iteration)

    def _log_validation(self, validator: Evaluator, trainer: SupervisedTrainer) -> None:
        self._validation = {f"validation/{k}": v for k, v in _numbers(validator.state.metrics).items()}
        if self.writer is not None:
            for tag, value in self._validation.items():
                self.writer.add_scalar(tag, value, trainer.state.iteration)

    def _log_epoch(self, engine: SupervisedTrainer) -> None:
        rows, validation = self._this_epoch, self._validation
        self._this_epoch, self._validation = [], {}
        if self.writer is None:
            return
        means, rates = _epoch_means(rows), _rates(rows[-1])
        step = engine.state.iteration
        self._epochs.append({"epoch": engine.state.epoch, "iteration": step, **means, **rates, **validation})
        for tag, value in {EPOCH_LOSS: means[EPOCH_LOSS], **rates}.items():
            self.writer.add_scalar(tag, value, step)
        self._draw_balance_line(self.writer, means, step)
        self._iterations.sync()
        self.writer.flush()

    def _finish(self, engine: SupervisedTrainer) -> None:
        self._iterations.close()
        if self.writer is not None:
            _, _, session_end = hparams({}, {})
            _add_summaries(self.writer, session_end)
            self.writer.close()
            self.writer = None

    # ------------------------------------------------------------------ parts

    def _learning_rates(self, engine: SupervisedTrainer) -> Row:
        groups = (self.optimizer or engine.optimizer).param_groups
        return {f"learning_rate/{g.get('name', f'group_{i}')}": float(g["lr"]) for i, g in enumerate(groups)}

    def _draw_balance_line(self, writer: SummaryWriter, row: Row, step: int) -> None:
        # joint training has a ρ in its configuration, too, and no balance terms
        if self.balance_line is not None and any(tag.startswith("balance/") for tag in row):
            writer.add_scalar(BALANCE_LINE, self.balance_line, step)

    def _write_hyperparameters(self, writer: SummaryWriter) -> None:
        path = self.run_dir / "config.yaml"
        if not path.is_file():
            return
        text = path.read_text(encoding="utf-8")
        writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))
        values = hyperparameters(yaml.safe_load(text) or {})
        metrics = {f"validation/fusion_{score}": 0.0 for score in self.scores}
        # SummaryWriter.add_hparams would open a second writer, and a run of its own in TensorBoard
        experiment, session, _ = hparams(values, metrics)
        _add_summaries(writer, experiment, session)


def _add_summaries(writer: SummaryWriter, *summaries: Any) -> None:
    for summary in summaries:
        cast(Any, writer.file_writer).add_summary(summary)


class IterationTable:
    """A CSV that grows by a row at a time; its columns are those of its first row.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []
        self._file: TextIO | None = None
        self._unknown: set[str] = set()

    def open(self, *, keep_until: int) -> None:
        """Drop rows after iteration ``keep_until``, and a row that is half-written; then append to the rest."""
        self.close()
        self.columns, rows = _read_rows(self.path, keep_until)
        if rows:
            with atomic_path(self.path) as temporary:
                _write_rows(temporary, self.columns, rows)
        else:
            self.columns = []
            self.path.unlink(missing_ok=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8", newline="")
        if keep_until != len(rows):
            logger.warning(f"{self.path} has {len(rows)} of the {keep_until} rows before the first one of this start")

    def append(self, row: Mapping[str, float]) -> None:
        """Append a row, with empty cells where it lacks a column; the file has it when this returns."""
        if self._file is None:
            raise RuntimeError(f"{self.path} is not open")
        writer = csv.writer(self._file, lineterminator="\n")
        if not self.columns:
            self.columns = list(row)
            writer.writerow(self.columns)
        unknown = set(row) - set(self.columns) - self._unknown
        if unknown:
            self._unknown |= unknown
            logger.warning(f"{self.path} was begun without {', '.join(sorted(unknown))}: only in TensorBoard")
        writer.writerow(_cells(row, self.columns))
        self._file.flush()

    def sync(self) -> None:
        """Force the rows to the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class EpochTable:
    """A small CSV that is replaced as a whole for each row, so that columns may come later (validation's, say).

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []
        self._rows: list[list[str]] = []

    def open(self, *, keep_until: int) -> None:
        """Read the rows up to iteration ``keep_until``."""
        self.columns, self._rows = _read_rows(self.path, keep_until)
        if not self._rows:
            self.columns = []
            self.path.unlink(missing_ok=True)

    def append(self, row: Mapping[str, float]) -> None:
        """Add a row, with empty cells where it lacks a column."""
        self.columns += [column for column in row if column not in self.columns]
        self._rows.append(_cells(row, self.columns))
        with atomic_path(self.path) as temporary:
            _write_rows(temporary, self.columns, self._rows)


def hyperparameters(config: Mapping[str, Any]) -> dict[str, float | str]:
    """Return the top-level numbers, words and lists of words of a configuration, for TensorBoard's HParams.

    Truth values become words, or HParams would show 0 and 1. Expressions and references that were not resolved are
    left out, and so is what holds parts of its own.

    Example:
        >>> hyperparameters({"rho": 1.2, "modalities": ["flair", "t1"], "device": "$torch.device('cpu')", "amp": False})
        {'rho': 1.2, 'modalities': 'flair, t1', 'amp': 'false'}
    """
    values: dict[str, float | str] = {}
    for name, value in config.items():
        if isinstance(value, (list, tuple)) and value and all(isinstance(v, (bool, int, float, str)) for v in value):
            value = ", ".join(map(str, value))
        if isinstance(value, bool):
            value = str(value).lower()
        if isinstance(value, (int, float)) or (isinstance(value, str) and value and value[0] not in "$@%"):
            values[str(name)] = value
    return values


def chart_layout(
    tags: Iterable[str], modalities: Sequence[str], scores: Sequence[str] = DICE, score_name: str = "Dice"
) -> dict[str, dict[str, list[Any]]]:
    """Lay out TensorBoard's Custom Scalars: one chart a quantity, one curve a modality.

    Args:
        tags: what each iteration logs; quantities that are not among them get no chart.
        modalities: names of the modalities.
        scores: the validation's scores.
        score_name: what their charts are called.

    Returns:
        What ``SummaryWriter.add_custom_scalars`` takes. Tags in it are regular expressions.
    """
    tags = list(tags)
    layout = {
        "Loss": {"loss": _lines([EPOCH_LOSS, "validation/loss"]), "learning rate": ["Multiline", ["learning_rate/.+"]]},
        f"Validation {score_name}": {"fusion": _lines([f"validation/fusion_{score}" for score in scores])},
    }
    if any(tag.startswith("epsilon/") for tag in tags):
        # the last one sums the others up
        for score in (scores[-1], *scores[:-1]):
            chart = _lines([f"validation/{predictor}_{score}" for predictor in ("fusion", *modalities)])
            title = f"fusion and each modality's classifier, {score.removeprefix('dice_')}"
            layout[f"Validation {score_name}"][title] = chart
    charts = {}
    for group, title in _CHARTS.items():
        curves = [tag for tag in tags if tag.startswith(f"{group}/")]
        if curves:
            charts[title] = _lines([*curves, *([BALANCE_LINE] if group == "balance" else [])])
    return {**layout, "Modalities": charts} if charts else layout


def _lines(tags: Iterable[str]) -> list[Any]:
    return ["Multiline", [f"{re.escape(tag)}$" for tag in tags]]


def _read_rows(path: Path, keep_until: int) -> tuple[list[str], list[list[str]]]:
    """Return the columns of a table and its whole rows up to an iteration."""
    if not path.is_file():
        return [], []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]  # a last line without its end was cut off
    lines = list(csv.reader(whole.splitlines()))
    if not lines or "iteration" not in lines[0]:
        return [], []
    columns, at = lines[0], lines[0].index("iteration")
    rows = [line for line in lines[1:] if len(line) == len(columns) and line[at].isdecimal()]
    return columns, [row for row in rows if int(row[at]) <= keep_until]


def _cells(row: Mapping[str, float], columns: Sequence[str]) -> list[str]:
    # repr is the shortest text that reads back as the same number
    return [repr(row[column]) if column in row else "" for column in columns]


def _write_rows(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        # earlier rows may be shorter than the columns are now
        writer.writerows([*row, *[""] * (len(columns) - len(row))] for row in rows)


def _epoch_means(rows: Sequence[Row]) -> Row:
    tags = dict.fromkeys(tag for row in rows for tag in row if not tag.startswith("learning_rate/"))
    means = {tag: _mean(row[tag] for row in rows if tag in row) for tag in tags}
    return {EPOCH_LOSS: means.pop(TRAIN_LOSS), **means}


def _rates(row: Row) -> Row:
    """The rates that a step was taken with; at the end of an epoch the schedule may have set the next one's."""
    return {tag: value for tag, value in row.items() if tag.startswith("learning_rate/")}


def loss_of(output: Any) -> float:
    """Return the loss in a trainer's output; a decollated one is a list with the same number in each item."""
    loss = (output[0] if isinstance(output, list) else output)[CommonKeys.LOSS]
    return float(loss.item() if isinstance(loss, torch.Tensor) else loss)


def _numbers(values: Mapping[str, Any]) -> Row:
    plain = {k: v.item() if isinstance(v, torch.Tensor) and v.numel() == 1 else v for k, v in values.items()}
    return {k: float(v) for k, v in plain.items() if isinstance(v, (int, float))}


def _mean_over_ranks(row: Mapping[str, float]) -> Row:
    if idist.get_world_size() == 1:
        return dict(row)
    means = torch.as_tensor(idist.all_reduce(torch.tensor(list(row.values()), dtype=torch.float64)))
    return dict(zip(row, (means / idist.get_world_size()).tolist(), strict=True))


def _mean(values: Iterable[float]) -> float:
    numbers = [value for value in values if not math.isnan(value)]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan
