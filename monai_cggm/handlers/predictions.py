# SPDX-License-Identifier: Apache-2.0
"""Predicted classes and numbers: scores of every predictor, and the tables made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import pandas as pd
import torch
from ignite.engine import Engine, Events
from ignite.exceptions import NotComputableError
from ignite.metrics import Metric
from monai.utils import CommonKeys
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from monai_cggm.batches import PRESENT
from monai_cggm.errors import CaseError
from monai_cggm.files import atomic_path
from monai_cggm.handlers.scores import gathered_rows
from monai_cggm.metrics.prediction_scores import prediction_scores
from monai_cggm.networks.subsets import FUSION

Row = dict[str, Any]


class PredictionScores(Metric):
    """Scores predicted classes or numbers, a row for each case and predictor.

    The engine's output must have ``pred``, ``(B, K)`` or a dictionary of them by predictor (``fusion`` among them; a
    lone tensor is the fusion), and ``label``, ``(B,)`` or ``(B, 1)``; the engine's batch must have the cases' IDs. So a
    MONAI evaluator needs ``decollate=False``. Where samples lack modalities, those of a batch must have the same ones
    (:class:`monai_cggm.data.features.PresenceBatches`).

    When the epoch is completed, on every process, over the cases of all processes:

    - the value, under the metric's name, higher is better: the fusion's accuracy, or minus its mean absolute error;
    - ``engine.state.metrics["<predictor>_<score>"]``, see :mod:`monai_cggm.metrics.prediction_scores`;
    - ``engine.state.metric_details["cases"]``: the rows, sorted by case, with ``case``, ``predictor``, ``truth``,
      ``prediction``, and ``accuracy`` (1 or 0) or ``absolute_error``;
    - ``engine.state.metric_details["scores"]``: predictor → scores.

    Args:
        classes: the label of each class index, for the rows; None or none: regression.
        sentiment: see :func:`monai_cggm.metrics.prediction_scores.regression_scores`.
        case_key: the batch's key for the cases' IDs.

    Example:
        >>> logits, batch = torch.eye(2), {"label": torch.tensor([0, 0]), "case": ["a", "b"]}
        >>> evaluator = Engine(lambda engine, batch: {"pred": logits, "label": batch["label"]})
        >>> PredictionScores(["cat", "dog"]).attach(evaluator, "val_accuracy")
        >>> metrics = evaluator.run([batch]).metrics
        >>> metrics["val_accuracy"], metrics["fusion_accuracy"]
        (0.5, 0.5)
    """

    def __init__(self, classes: Sequence[str] | None = None, *, sentiment: bool = True, case_key: str = "case") -> None:
        self.classes = list(classes or [])
        self.sentiment = sentiment
        self.case_key = case_key
        self._rows: list[Row] = []
        self._all_rows: list[Row] = []
        self._scores: dict[str, Mapping[str, float]] = {}
        super().__init__()

    def reset(self) -> None:
        """Forget all rows."""
        self._rows, self._all_rows, self._scores = [], [], {}

    @torch.no_grad()
    def iteration_completed(self, engine: Engine) -> None:
        """Score the engine's current batch."""
        output: Any = engine.state.output
        batch: Any = engine.state.batch
        if not isinstance(output, Mapping) or not isinstance(batch, Mapping):
            raise TypeError(
                "PredictionScores needs a batch and an output that are dictionaries of batched tensors; "
                "give a MONAI evaluator decollate=False"
            )
        present = batch.get(PRESENT)
        if present is not None and not bool((present == present[0]).all()):
            raise ValueError("samples of a batch lack different modalities: an evaluation needs PresenceBatches")
        pred = output[CommonKeys.PRED]
        predictions = pred if isinstance(pred, Mapping) else {FUSION: pred}
        self.update((predictions, output[CommonKeys.LABEL], batch[self.case_key]))

    def update(self, output: tuple[Mapping[str, Tensor], Tensor, Sequence[str]]) -> None:
        """Score a batch.

        Args:
            output: predictions ``(B, K)`` by predictor, labels ``(B,)`` or ``(B, 1)`` and the ``B`` cases' IDs.

        Raises:
            ValueError: where the fusion's predictions or IDs are missing.
            CaseError: for a prediction that is not a number.
        """
        predictions, labels, cases = output
        if FUSION not in predictions:
            raise ValueError(f"the predictions {list(predictions)} lack {FUSION!r}")
        if isinstance(cases, str) or len(cases) != len(labels):
            raise ValueError(f"expected {len(labels)} case IDs, one for each label of the batch, got {cases!r}")
        truth = labels.flatten().tolist()
        for name in sorted(predictions, key=lambda predictor: predictor != FUSION):
            values = decided(predictions[name], bool(self.classes))
            for case, true, value in zip(cases, truth, values, strict=True):
                if not math.isfinite(value):
                    raise CaseError(case, f"{name}: the prediction is not a number, or infinite")
                self._rows.append({"case": case, "predictor": name, "truth": true, "prediction": value})

    def compute(self) -> float:
        """Return the fusion's accuracy, or minus its mean absolute error, over the cases of all processes."""
        self._all_rows = gathered_rows(self._rows)
        if not self._all_rows:
            raise NotComputableError("PredictionScores scored no case")
        task = "classification" if self.classes else "regression"
        sides: dict[str, tuple[list[float], list[float]]] = {}
        for row in self._all_rows:
            true, predicted = sides.setdefault(row["predictor"], ([], []))
            true.append(row["truth"])
            predicted.append(row["prediction"])
        self._scores = {name: prediction_scores(task, *pair, sentiment=self.sentiment) for name, pair in sides.items()}
        fusion = self._scores[FUSION]
        return fusion["accuracy"] if self.classes else -fusion["mae"]

    def completed(self, engine: Engine, name: str) -> None:
        """Write the value, the scores and the rows into the engine's state."""
        super().completed(engine, name)
        engine.state.metrics.update({f"{p}_{s}": v for p, scores in self._scores.items() for s, v in scores.items()})
        state: Any = engine.state
        if not hasattr(state, "metric_details"):
            state.metric_details = {}
        state.metric_details["cases"] = [self._written(row) for row in self._all_rows]
        state.metric_details["scores"] = self._scores

    def _written(self, row: Row) -> Row:
        if not self.classes:
            return {**row, "absolute_error": abs(row["truth"] - row["prediction"])}
        named = {key: self.classes[row[key]] for key in ("truth", "prediction")}
        return {**row, **named, "accuracy": int(row["truth"] == row["prediction"])}


class PredictionScoresWriter:
    """Writes the rows and scores of :class:`PredictionScores` and prints the scores, on rank 0.

    - ``cases.csv``: a row for each case and predictor: ``case, predictor, truth, prediction`` and ``accuracy`` (1 or
      0), or ``absolute_error``.
    - ``summary.csv``: a row for each predictor and score: ``predictor, score, mean, n``, over the ``n`` cases; F1 and
      the correlation are those of all cases together.
    - a table on the terminal, of ``fusion``, the classifiers, and as many subsets as are no more than ``rows``.

    Each file appears complete or not at all.

    Args:
        output_dir: folder for the two files, made if need be.
        quiet: whether to leave out the table.
        rows: most rows of the table.

    Example:
        >>> import tempfile
        >>> evaluator = Engine(lambda engine, batch: {"pred": torch.eye(2), "label": torch.tensor([0, 0])})
        >>> PredictionScores(["cat", "dog"]).attach(evaluator, "val_accuracy")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     PredictionScoresWriter(folder, quiet=True).attach(evaluator)
        ...     _ = evaluator.run([{"case": ["a", "b"]}])
        ...     print((Path(folder) / "cases.csv").read_text().strip())
        case,predictor,truth,prediction,accuracy
        a,fusion,cat,cat,1
        b,fusion,cat,dog,0
    """

    def __init__(self, output_dir: str | Path, *, quiet: bool = False, rows: int = 20) -> None:
        self.output_dir = Path(output_dir)
        self.quiet = quiet
        self.rows = rows

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator that has a :class:`PredictionScores`."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write both files and print the table."""
        if idist.get_rank() != 0:
            return
        details = getattr(engine.state, "metric_details", {})
        if not details.get("cases") or "scores" not in details:
            raise ValueError("PredictionScoresWriter found no scores: the evaluator needs a PredictionScores metric")
        cases = pd.DataFrame(details["cases"])
        counts = cases["predictor"].value_counts()
        summary = pd.DataFrame(
            {"predictor": predictor, "score": score, "mean": value, "n": counts[predictor]}
            for predictor, scores in details["scores"].items()
            for score, value in scores.items()
        )
        _write_csv(cases, self.output_dir / "cases.csv")
        _write_csv(summary, self.output_dir / "summary.csv")
        if not self.quiet:
            console = Console()
            console.width = min(80, console.width)
            console.print(_table(details["scores"], cases["case"].nunique(), self.rows))


class PredictionsWriter:
    """Writes what a network predicts for samples without a truth: ``predictions.csv``, a row a sample, on rank 0.

    Columns: ``case``; ``prediction``, a class's label or a number; ``probability_<class>`` for classes. A dictionary of
    predictions gives the like of the others, ``<modality>_prediction`` and so on, empty for samples that lack the
    modality. The file appears complete or not at all.

    Args:
        output_dir: folder for the file, made if need be.
        classes: the label of each class index; None or none: regression.
        case_key: the batch's key for the cases' IDs.

    Raises:
        CaseError: in a run, for a sample of which a prediction is no finite number.

    Example:
        >>> import tempfile
        >>> evaluator = Engine(lambda engine, batch: {"pred": torch.tensor([[0.0, 0.0], [0.0, 50.0]])})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     PredictionsWriter(folder, ["cat", "dog"]).attach(evaluator)
        ...     _ = evaluator.run([{"case": ["a", "b"]}])
        ...     print((Path(folder) / "predictions.csv").read_text().strip())
        case,prediction,probability_cat,probability_dog
        a,cat,0.5,0.5
        b,dog,0.0,1.0
    """

    def __init__(self, output_dir: str | Path, classes: Sequence[str] | None = None, case_key: str = "case") -> None:
        self.path = Path(output_dir) / "predictions.csv"
        self.classes = list(classes or [])
        self.case_key = case_key
        self._rows: list[Row] = []

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator that returns dictionaries of batched tensors (``decollate=False``)."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _start(self, engine: Engine) -> None:
        self._rows = []

    def _add(self, engine: Engine) -> None:
        output: Any = engine.state.output
        batch: Any = engine.state.batch
        pred = output[CommonKeys.PRED]
        columns: dict[str, list[Any]] = {"case": list(batch[self.case_key])}
        for name, logits in (pred if isinstance(pred, Mapping) else {FUSION: pred}).items():
            broken = ~logits.isfinite().all(dim=1)
            if broken.any():
                case = columns["case"][int(broken.int().argmax())]
                raise CaseError(case, f"{name} predicts NaN or infinity, expected numbers: weights or inputs are bad")
            columns |= self._columns("" if name == FUSION else f"{name}_", logits.detach())
        self._rows += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _columns(self, prefix: str, logits: Tensor) -> dict[str, list[Any]]:
        values = decided(logits, bool(self.classes))
        if not self.classes:
            return {f"{prefix}prediction": values}
        chances = logits.double().softmax(dim=1).cpu().numpy().round(6)
        return {
            f"{prefix}prediction": [self.classes[i] for i in values],
            **{f"{prefix}probability_{name}": chances[:, i].tolist() for i, name in enumerate(self.classes)},
        }

    def _write(self, engine: Engine) -> None:
        per_rank: Any = idist.all_gather(self._rows) if idist.get_world_size() > 1 else [self._rows]
        if idist.get_rank() == 0:
            rows = sorted((row for rows in per_rank for row in rows), key=lambda row: row["case"])
            _write_csv(pd.DataFrame(rows), self.path)


def decided(logits: Tensor, classes: bool) -> list[Any]:
    """Return what each row of ``(B, K)`` predicts: the likeliest class's index, or the number itself.

    Example:
        >>> decided(torch.tensor([[0.0, 2.0]]), classes=True), decided(torch.tensor([[1.5]]), classes=False)
        ([1], [1.5])
    """
    if classes:
        known = logits.isfinite().all(dim=1)
        return [c if k else np.nan for c, k in zip(logits.argmax(dim=1).tolist(), known.tolist(), strict=True)]
    return logits.flatten().tolist()


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)


def _table(scores: Mapping[str, Mapping[str, float]], cases: int, rows: int) -> Table:
    names = list(scores)
    if len(names) > rows:  # of many subsets, those of all and of single modalities are read first
        names = [name for name in names if "+" not in name]
    table = Table(title=f"Scores over {cases} case{'s' if cases != 1 else ''}")
    table.add_column("")
    for score in scores[FUSION]:
        table.add_column(score, justify="right")
    for name in names:
        table.add_row(escape(name), *(f"{value:.3f}" for value in scores[name].values()))
    return table
