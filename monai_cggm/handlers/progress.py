# SPDX-License-Identifier: Apache-2.0
"""How far the run is."""

from __future__ import annotations

import io
import sys

import ignite.distributed as idist
from ignite.engine import Events
from monai.engines import Evaluator, Trainer
from tqdm import tqdm

from monai_cggm.handlers.run_log import loss_of


class Progress:
    """One progress bar over all iterations of the run, with the loss and the last validation result.

    Ignite's ``ProgressBar`` counts within an epoch, or in whole epochs; this one counts the run, and goes on where a
    resumed run goes on. Where the error stream is no terminal (a log file, CI), it prints a line an epoch instead.
    Under several processes only the first one shows it.

    Args:
        validator: the evaluator that validates, for its key metric; None if there is none.

    Example:
        >>> progress = Progress()
    """

    def __init__(self, validator: Evaluator | None = None) -> None:
        self.validator = validator
        self._bar: tqdm | None = None
        self._terminal = True
        self._loss = float("nan")

    def attach(self, engine: Trainer) -> None:
        """Attach to the trainer, after :class:`Checkpoints`."""
        if idist.get_rank() != 0:
            return
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
        engine.add_event_handler(Events.COMPLETED, self._finish)
        if self.validator is not None:
            self.validator.add_event_handler(Events.STARTED, self._note_validation, engine)

    def _start(self, engine: Trainer) -> None:
        if not engine.has_event_handler(self._end_epoch, Events.EPOCH_COMPLETED):  # after validation
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=engine.state.max_epochs * engine.state.epoch_length,
            initial=engine.state.iteration,
            unit="it",
            # without a terminal it only keeps the time, and _end_epoch prints
            file=sys.stderr if self._terminal else io.StringIO(),
            mininterval=0.2 if self._terminal else float("inf"),
            dynamic_ncols=self._terminal,
            ncols=None if self._terminal else 110,
        )

    def _advance(self, engine: Trainer) -> None:
        if self._bar is not None:
            self._loss = loss_of(engine.state.output)
            self._describe(engine)
            self._bar.update()

    def _note_validation(self, validator: Evaluator, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.set_description(f"epoch {trainer.state.epoch}/{trainer.state.max_epochs}, validating")

    def _describe(self, engine: Trainer) -> None:
        if self._bar is not None:
            self._bar.set_description(f"epoch {engine.state.epoch}/{engine.state.max_epochs}", refresh=False)
            self._bar.set_postfix_str(self._results(), refresh=False)

    def _results(self) -> str:
        parts = [f"loss {self._loss:.3f}"]
        name = self.validator.state.key_metric_name if self.validator is not None else None
        if self.validator is not None and name in self.validator.state.metrics:
            parts.append(f"{name} {float(self.validator.state.metrics[name]):.3f}")
        return ", ".join(parts)

    def _end_epoch(self, engine: Trainer) -> None:
        self._describe(engine)
        if self._bar is not None and not self._terminal:
            print(self._bar, file=sys.stderr, flush=True)

    def _finish(self, engine: Trainer) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
