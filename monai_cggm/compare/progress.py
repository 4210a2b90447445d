# SPDX-License-Identifier: Apache-2.0
"""Bars for the cells that run, and a line for each that has ended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Event, Thread
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from monai_cggm.compare.study import Cell, Study


class CellProgress:
    """Show on a terminal which cells run and how many of their epochs are done; the ``watch`` of a study.

    Args:
        study: the study.
        out: the comparison's folder.
        console: where to.
    """

    def __init__(self, study: Study, out: Path, console: Console) -> None:
        self.study = study
        self.out = out
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console)
        self.all = self.progress.add_task("cells", total=None)
        self.running: dict[Cell, TaskID] = {}
        self.stop = Event()
        self.poll = Thread(target=self._poll, daemon=True)

    def __enter__(self) -> CellProgress:
        splits = max(len(self.study.splits), 1) * len(self.study.seeds)
        total = splits * (len(self.study.arms) + self.study.alone)
        self.progress.update(self.all, total=total)
        self.progress.start()
        self.poll.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.progress.stop()

    def __call__(self, cell: Cell, facts: Mapping[str, Any] | None) -> None:
        """Take note of a cell that begins (no facts) or has ended."""
        if facts is None:
            epochs = {**self.study.settings, **cell.arm.settings}.get("epochs")
            self.running[cell] = self.progress.add_task(cell.folder, total=epochs)
            return
        self.progress.advance(self.all)
        if cell in self.running:
            self.progress.remove_task(self.running.pop(cell))
            reason = f": {facts['error']}" if facts["error"] else ""
            self.progress.console.print(escape(f"{cell.folder}: {facts['status']}{reason}"), highlight=False)

    def _poll(self) -> None:
        while not self.stop.wait(2.0):
            for cell, task in list(self.running.items()):
                path = self.out / "runs" / cell.folder / "epochs.csv"
                if path.is_file():
                    self.progress.update(task, completed=len(path.read_text(encoding="utf-8").splitlines()) - 1)
