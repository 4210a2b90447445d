# SPDX-License-Identifier: Apache-2.0
"""Scores of every case and every predictor during an evaluation, and the tables made of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pandas as pd
import torch
from ignite.engine import Engine, Events
from ignite.exceptions import NotComputableError
from ignite.metrics import Metric
from monai.data import MetaTensor
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from monai_cggm.errors import CaseError
from monai_cggm.files import atomic_path
from monai_cggm.metrics.region_scores import BRATS_REGIONS, EMPTY_CONVENTIONS, nan_mean, region_scores
from monai_cggm.networks.subsets import FUSION

Row = dict[str, Any]

_IDENTITY = ("case", "predictor", "convention")
logger = logging.getLogger(__name__)


class RegionScores(Metric):
    """Scores whole volumes by region, a row for each case and predictor; the value is the fusion's mean Dice.

    The engine's output must have ``pred``, logits ``(B, K, *spatial)`` or a dictionary of them by predictor (``fusion``
    among them; a lone tensor is the fusion), and ``label``, class indices ``(B, 1, *spatial)``; the engine's batch must
    have the cases' IDs. So a MONAI evaluator needs ``decollate=False`` and no post-processing of ``pred``. The scores
    are :func:`monai_cggm.metrics.region_scores` on the label's grid; the voxels' size comes from the label's affine.

    When the epoch is completed, on every process, over the cases of all processes:

    - the value, under the metric's name: the mean over cases of the fusion's mean Dice over regions;
    - ``engine.state.metrics["<predictor>_dice_<region>"]`` and ``["<predictor>_dice_mean"]``, means over cases, and
      ``["fusion_hd95_<region>"]`` if asked for;
    - ``engine.state.metric_details["cases"]``: the rows, sorted by case, as dictionaries with ``case``, ``predictor``,
      ``convention`` and the scores.

    A distributed sampler that pads its last round scores a case in two processes; it is counted once, and logged.

    Args:
        regions: the classes that make up each region.
        convention: what empty regions score, a name in :data:`monai_cggm.metrics.EMPTY_CONVENTIONS`.
        hd95: whether to compute HD95 too, of the fusion only: the classifiers' scattered predictions make it slow.
        case_key: the batch's key for the cases' IDs.

    Raises:
        ValueError: for an unknown convention.

    Example:
        >>> truth = torch.zeros(1, 1, 6, 6, 6, dtype=torch.uint8)
        >>> truth[..., 2:4] = 1
        >>> logits = torch.nn.functional.one_hot(truth[:, 0].long(), 2).movedim(-1, 1).float()
        >>> evaluator = Engine(lambda engine, batch: {"pred": logits, "label": batch["label"]})
        >>> RegionScores({"lesion": [1]}).attach(evaluator, "val_dice")
        >>> evaluator.run([{"label": truth, "case": ["a"]}]).metrics
        {'val_dice': 1.0, 'fusion_dice_lesion': 1.0, 'fusion_dice_mean': 1.0}
    """

    def __init__(
        self,
        regions: Mapping[str, Sequence[int]] = BRATS_REGIONS,
        *,
        convention: str = "brats_legacy",
        hd95: bool = False,
        case_key: str = "case",
    ) -> None:
        if convention not in EMPTY_CONVENTIONS:
            known = ", ".join(EMPTY_CONVENTIONS)
            raise ValueError(f"unknown convention {convention!r} for empty regions: expected one of {known}")
        self.regions = dict(regions)
        self.convention = convention
        self.hd95 = hd95
        self.case_key = case_key
        self._rows: list[Row] = []
        self._all_rows: list[Row] = []
        super().__init__()

    def reset(self) -> None:
        """Forget all rows."""
        self._rows = []
        self._all_rows = []

    @torch.no_grad()
    def iteration_completed(self, engine: Engine) -> None:
        """Score the engine's current batch."""
        output: Any = engine.state.output
        batch: Any = engine.state.batch
        if not isinstance(output, Mapping) or not isinstance(batch, Mapping):
            raise TypeError(
                "RegionScores needs a batch and an output that are dictionaries of batched tensors; "
                "give a MONAI evaluator decollate=False"
            )
        for key, found in (("pred", output), ("label", output), (self.case_key, batch)):
            if key not in found:
                raise KeyError(f"RegionScores needs {key!r}, found {sorted(map(str, found))}")
        pred = output["pred"]
        self.update((pred if isinstance(pred, Mapping) else {FUSION: pred}, output["label"], batch[self.case_key]))

    def update(self, output: tuple[Mapping[str, Tensor], Tensor, Sequence[str]]) -> None:
        """Score a batch.

        Args:
            output: logits ``(B, K, *spatial)`` by predictor, labels ``(B, 1, *spatial)`` and the ``B`` cases' IDs.

        Raises:
            ValueError: where the fusion's logits or IDs are missing.
            CaseError: for a case that was scored already, logits with NaN, or labels and logits that do not fit.
        """
        predictions, labels, cases = output
        if FUSION not in predictions:
            raise ValueError(f"the predictions {list(predictions)} lack {FUSION!r}")
        if isinstance(cases, str) or len(cases) != len(labels):
            raise ValueError(f"expected {len(labels)} case IDs, one for each label of the batch, got {cases!r}")
        seen = {row["case"] for row in self._rows}
        for index, case in enumerate(cases):
            if case in seen:
                raise CaseError(case, "scored twice in one evaluation: two cases share this ID")
            seen.add(case)
            self._rows += self._rows_of(case, {name: p[index] for name, p in predictions.items()}, labels, index)

    def compute(self) -> float:
        """Return the fusion's mean Dice over the regions and the cases of all processes."""
        self._all_rows = gathered_rows(self._rows)
        if not self._all_rows:
            raise NotComputableError("RegionScores scored no case")
        return nan_mean([row["dice_mean"] for row in self._all_rows if row["predictor"] == FUSION])

    def completed(self, engine: Engine, name: str) -> None:
        """Write the value, the means and the rows into the engine's state."""
        super().completed(engine, name)
        engine.state.metrics.update(self._means())
        state: Any = engine.state
        if not hasattr(state, "metric_details"):
            state.metric_details = {}
        state.metric_details["cases"] = [dict(row) for row in self._all_rows]

    def _rows_of(self, case: str, predictions: Mapping[str, Tensor], labels: Tensor, index: int) -> Iterator[Row]:
        label = labels.as_tensor()[index, 0] if isinstance(labels, MetaTensor) else labels[index, 0]
        spacing = self._spacing(labels, index)  # some conventions need it for Dice too
        for name in sorted(predictions, key=lambda predictor: predictor != FUSION):
            logits = predictions[name]
            try:
                pred = _class_map(logits, label)
                scores = region_scores(
                    pred,
                    label,
                    regions=self.regions,
                    spacing=spacing,
                    convention=self.convention,
                    hd95=self.hd95 and name == FUSION,
                )
            except ValueError as error:
                raise CaseError(case, f"{name}: {error}") from error
            yield {"case": case, "predictor": name, "convention": self.convention, **scores}

    @staticmethod
    def _spacing(labels: Tensor, index: int) -> tuple[float, ...] | None:
        """Size of a voxel in mm from the label's affine; None where it has none."""
        if not isinstance(labels, MetaTensor):
            return None
        affine = labels.affine
        affine = (affine[index] if affine.ndim == 3 else affine).double()
        return tuple(torch.linalg.vector_norm(affine[:-1, : labels.ndim - 2], dim=0).tolist())

    def _means(self) -> dict[str, float]:
        means = {}
        for predictor in dict.fromkeys(row["predictor"] for row in self._all_rows):
            rows = [row for row in self._all_rows if row["predictor"] == predictor]
            for score in (key for key in rows[0] if key not in _IDENTITY):
                means[f"{predictor}_{score}"] = nan_mean([row[score] for row in rows])
        return means


class ScoresWriter:
    """Writes the rows of :class:`RegionScores` and prints their means, when an evaluation is completed, on rank 0.

    - ``cases.csv``: a row for each case and predictor: ``case, predictor, convention, dice_<region>…, dice_mean`` and
      ``hd95_<region>`` (mm; empty where it was not computed).
    - ``summary.csv``: a row for each predictor and score: ``predictor, score, mean, sd, n, convention``, with the
      sample's standard deviation over the ``n`` cases that have the score.
    - a table on the terminal: mean Dice (0 to 1) of the fusion and of each modality's classifier, and the fusion's mean
      HD95.

    Regions and convention are those of the rows. Each file appears complete or not at all.

    Args:
        output_dir: folder for the two files, made if need be.
        quiet: whether to leave out the table.

    Example:
        >>> import tempfile
        >>> evaluator = Engine(lambda engine, batch: None)
        >>> evaluator.state.metric_details = {"cases": [
        ...     {"case": "a", "predictor": "fusion", "convention": "brats_legacy", "dice_WT": 0.9, "dice_mean": 0.9}]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ScoresWriter(folder, quiet=True).attach(evaluator)
        ...     _ = evaluator.run([0])
        ...     print((Path(folder) / "cases.csv").read_text().strip())
        case,predictor,convention,dice_WT,dice_mean
        a,fusion,brats_legacy,0.9,0.9
    """

    def __init__(self, output_dir: str | Path, *, quiet: bool = False) -> None:
        self.output_dir = Path(output_dir)
        self.quiet = quiet

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator that has a :class:`RegionScores`."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write both files and print the table."""
        if idist.get_rank() != 0:
            return
        rows = getattr(engine.state, "metric_details", {}).get("cases")
        if not rows:
            raise ValueError("ScoresWriter found no scores: the evaluator needs a RegionScores metric")
        cases = pd.DataFrame(rows)
        summary = _summary(cases)
        for name, frame in (("cases.csv", cases), ("summary.csv", summary)):
            with atomic_path(self.output_dir / name) as path:
                frame.to_csv(path, index=False)
        if not self.quiet:
            console = Console()
            console.width = min(80, console.width)
            console.print(_table(summary, cases["case"].nunique()))


def gathered_rows(own: Sequence[Row]) -> list[Row]:
    """Return the rows of all processes, each case and predictor once, in an order that does not depend on who did what.

    Args:
        own: this process's rows, with ``case`` and ``predictor``.
    """
    per_rank: Any = idist.all_gather(own) if idist.get_world_size() > 1 else [own]
    rows: dict[tuple[str, str], Row] = {}
    repeated = set()
    for row in (row for rank_rows in per_rank for row in rank_rows):
        key = (row["case"], row["predictor"])
        if key in rows:
            repeated.add(row["case"])
        rows.setdefault(key, row)
    if repeated and idist.get_rank() == 0:
        logger.warning(
            "%d case(s) were scored by more than one process, as a sampler that pads its last round does, "
            "and count once: %s",
            len(repeated),
            ", ".join(sorted(repeated)),
        )
    # A stable sort: the predictors of a case stay in their order.
    return sorted(rows.values(), key=lambda row: row["case"])


def _class_map(logits: Tensor, label: Tensor) -> Tensor:
    logits = logits.as_tensor() if isinstance(logits, MetaTensor) else logits
    if torch.isnan(logits).any():
        raise ValueError("the logits hold NaN")
    # A label outside the classes would count for no region, without a word.
    if not 0 <= label.min() <= label.max() < len(logits):
        raise ValueError(
            f"the label's values go from {label.min().item():g} to {label.max().item():g}, "
            f"expected classes 0 to {len(logits) - 1}"
        )
    return logits.argmax(dim=0).to(torch.uint8 if len(logits) <= 256 else torch.int32)


def _summary(cases: pd.DataFrame) -> pd.DataFrame:
    """Mean, sample standard deviation and number of cases of each score, predictors and scores in their first order."""
    long = cases.melt(id_vars=list(_IDENTITY), var_name="score")
    grouped = long.groupby(["predictor", "score"], sort=False)["value"]
    summary = grouped.agg(mean="mean", sd="std", n="count").reset_index()
    computed = summary["n"] > 0
    order = {predictor: rank for rank, predictor in enumerate(dict.fromkeys(cases["predictor"]))}
    summary = summary[computed].sort_values("predictor", key=lambda names: names.map(order), kind="stable")
    return summary.assign(convention=cases["convention"].iloc[0])


def _table(summary: pd.DataFrame, cases: int) -> Table:
    means = summary.pivot_table(index="predictor", columns="score", values="mean", sort=False)
    dice = [score for score in means.columns if score.startswith("dice_")]
    hd95 = [score for score in means.columns if score.startswith("hd95_")]
    convention = summary["convention"].iloc[0]
    table = Table(
        title=f"Mean over {cases} case{'s' if cases != 1 else ''}, whole volumes",
        caption=f"Empty regions: {convention} ({EMPTY_CONVENTIONS[convention].note})",
    )
    table.add_column("")
    for score in dice:
        table.add_column(f"Dice {score.removeprefix('dice_')}", justify="right")
    for score in hd95:
        table.add_column(f"HD95 {score.removeprefix('hd95_')} (mm)", justify="right")
    for predictor, row in means.iterrows():
        texts = [f"{row[score]:.3f}" for score in dice]
        texts += ["" if pd.isna(row[score]) else f"{row[score]:.1f}" for score in hd95]
        table.add_row(escape(str(predictor)), *texts)  # fusion[flair] is no markup
    return table
