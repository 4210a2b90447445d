# SPDX-License-Identifier: Apache-2.0
"""Run the cells of a comparison, several side by side, and go on where an earlier start stopped."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import yaml

from monai_cggm.analysis.cells import ALONE, ENSEMBLE
from monai_cggm.compare.cell import Launch, configuration_of, facts_of, failed_cell, plan_of, run_cell, start
from monai_cggm.compare.study import Cell, Study, find_file
from monai_cggm.errors import DataError, users_error
from monai_cggm.files import atomic_path

logger = logging.getLogger(__name__)

#: told of a cell that begins (no facts) and of one that has ended (its facts)
Watcher = Callable[[Cell, Mapping[str, Any] | None], None]


def run_study(
    study: Study,
    data: str | Path,
    out: str | Path,
    *,
    jobs: int | None = None,
    threads: int = 1,
    watch: Watcher = lambda _cell, _facts: None,
    launch: Launch | None = None,
) -> list[dict[str, Any]]:
    """Train and score every cell of a study that is not finished yet.

    A cell that fails is recorded with the last line it said, and the others go on; a later start tries it again. A cell
    that was killed goes on from its last epoch. A cell that needs others begins once these have ended; where one of
    them failed, it is recorded as failed, too. One comparison at a time runs in a folder, and a cell that outlives the
    program that started it still counts as running.

    Args:
        study: what to run.
        data: the dataset, a folder or a datalist.
        out: the comparison's folder.
        jobs: cells at a time; default: one a GPU, or as many as the machine has cores for.
        threads: of each cell, on a CPU.
        watch: told of every cell that begins or ends.
        launch: how a process is run to its end; default: as a child.

    Returns:
        The facts of all cells, those that were finished before included.

    Raises:
        DataError: where the folder holds a cell that was run in another way than the study says, where another
            comparison runs in it, or where a split file is missing.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder), _Children() as children:
        splits = [find_file(name) for name in study.splits] or [_drawn_split(study, data, folder)]
        _check_names(splits)
        cells, ensembles = study.cells(splits), study.ensembles(splits)
        _refuse_other_plans(cells + ensembles, study, folder)
        if any(not _is_done(cell, folder) for cell in cells):
            _check_cases(splits, _cases(study, data), study)
        with atomic_path(folder / "study.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(study.described(), sort_keys=False), encoding="utf-8")
        run = _Runner(study, data, folder, _devices(jobs, threads), watch, launch or children.run, children.stop)
        # an ensemble is scored as soon as its members are there, so that an early stop leaves it with them
        return run.all(ensembles + cells)


class _Runner:
    def __init__(
        self,
        study: Study,
        data: str | Path,
        out: Path,
        devices: Sequence[Mapping[str, str]],
        watch: Watcher,
        launch: Launch,
        stop: Callable[[], None],
    ) -> None:
        self.study = study
        self.data = data
        self.out = out
        self.watch = watch
        self.launch = launch
        self.stop = stop
        self.workers = len(devices)
        self.free: SimpleQueue[Mapping[str, str]] = SimpleQueue()
        for device in devices:
            self.free.put(device)

    def all(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """Run cells in their order, except that one waits for those that it needs."""
        waiting = list(cells)
        found: list[dict[str, Any]] = []
        running: dict[Future[dict[str, Any]], Cell] = {}
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                while waiting or running:
                    unfinished = {cell.folder for cell in (*waiting, *running.values())}
                    ready = [c for c in waiting if unfinished.isdisjoint(self.needed_by(c))]
                    for cell in [c for c in ready if self.is_without_members(c)]:
                        waiting.remove(cell)
                        ready.remove(cell)
                    for cell in ready[: self.workers - len(running)]:
                        waiting.remove(cell)
                        running[pool.submit(self.one, cell)] = cell
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        del running[future]
                        found.append(future.result())
                return found
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()  # or leaving the pool would wait for the cells that run
                raise

    def needed_by(self, cell: Cell) -> set[str]:
        needed = _members(cell, self.study) if cell.arm.name == ENSEMBLE else self.study.needed_by(cell).values()
        return {other.folder for other in needed}

    def is_without_members(self, cell: Cell) -> bool:
        """Whether it is an ensemble whose members have ended, and one of them without a network."""
        return cell.arm.name == ENSEMBLE and not _members_are_done(cell, self.study, self.out)

    def one(self, cell: Cell) -> dict[str, Any]:
        found = facts_of(self.out / "cells" / cell.folder)
        if found is not None and found["status"] == "done":
            self.watch(cell, found)
            return found
        device = self.free.get()
        try:
            self.watch(cell, None)
            facts = self.run(cell, device)
            self.watch(cell, facts)
            return facts
        finally:
            self.free.put(device)

    def run(self, cell: Cell, device: Mapping[str, str]) -> dict[str, Any]:
        try:
            return run_cell(cell, self.study, self.out, self.data, device, self.launch)
        except Exception as error:  # whatever is wrong with one cell must not stop the others
            return failed_cell(cell, self.study, self.out, error)


class _Children:
    """Processes that end when this one is told to."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[bytes]] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def run(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
        with self.lock:
            if self.stopped:
                raise KeyboardInterrupt
            child = start(command, log, environment, **_INHERITED)
            self.running.add(child)
        code = child.wait()
        with self.lock:
            self.running.discard(child)
            if self.stopped:
                raise KeyboardInterrupt
        return code

    def __enter__(self) -> _Children:
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._terminated)
        return self

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            for child in self.running:
                child.terminate()

    def __exit__(self, *exception: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.before)

    def _terminated(self, number: int, frame: object) -> None:
        raise KeyboardInterrupt


#: what children inherit, besides the standard streams: the lock, so that it is held as long as one of them lives
_INHERITED: dict[str, Any] = {}


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(
                [f"another comparison runs in {folder}, or a cell that one left behind: wait for it, or end it"]
            ) from None
        _INHERITED["pass_fds"] = (file.fileno(),)
        try:
            yield
        finally:
            _INHERITED.clear()


def _devices(jobs: int | None, threads: int) -> list[dict[str, str]]:
    """What each worker's processes find in their environment."""
    import torch

    limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        return [{**limits, "CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(jobs or len(gpus))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [limits for _ in range(jobs or max(cores // threads, 1))]


def _cases(study: Study, data: str | Path) -> Sequence[dict[str, Any]]:
    """The cases, as the study's bundle finds them, with what it left out in their ``skipped``."""
    cases: Sequence[dict[str, Any]] = _part_of_bundle("cases", study, data)
    return cases


def _part_of_bundle(name: str, study: Study, data: str | Path) -> Any:
    """What the study's configuration makes under a name: ``cases``, or ``split``, drawn with the seed 0."""
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config([str(find_file(file)) for file in study.config])
    parser.update({**study.settings, "dataset_dir": str(data), "split_file": None, "seed": 0})
    try:
        return parser.get_parsed_content(name)
    except Exception as error:
        raise users_error(error) or error from None


def _drawn_split(study: Study, data: str | Path, folder: Path) -> Path:
    """One split for all cells, drawn once and kept."""
    path = folder / "split.json"
    if not path.is_file():
        from monai_cggm.data import write_split

        write_split(_part_of_bundle("split", study, data), path, 0)
    return path


def _alone(study: Study) -> list[str]:
    """The modalities that some arm is trained on alone."""
    return [modality for modality in study.modalities if f"{ALONE}{modality}" in study.arms]


def _check_cases(splits: Sequence[Path], cases: Sequence[dict[str, Any]], study: Study) -> None:
    """Refuse a split that does not fit the data before any cell is trained on it."""
    from monai_cggm.data import split_cases

    needed, alone = {"train", "validation", study.part}, _alone(study)
    problems = []
    for path in splits:
        split = split_cases(cases, split_file=path, ignore_missing=False)
        # where cases may lack modalities, a network of one sees fewer of them, and must not be left without any
        problems += [
            f"{path}: no {part} case has {modality}, and {ALONE}{modality} is to be trained on it alone: expected one"
            for part, items in split.items()
            for modality in alone
            if part in needed and items and not any(modality in item for item in items)
        ]
    if problems:
        raise DataError(problems)


def _check_names(splits: Sequence[Path]) -> None:
    stems = [path.stem for path in splits]
    if len(set(stems)) < len(stems):
        raise DataError([f"split files must differ in name, found {', '.join(stems)}"])


def _refuse_other_plans(cells: Sequence[Cell], study: Study, out: Path) -> None:
    """Refuse cells, finished or begun, that were run in another way than the study says now."""
    problems, older = [], []
    for cell in cells:
        done, begun = out / "cells" / cell.folder, out / "runs" / cell.folder
        plan = plan_of(cell, study)
        facts = facts_of(done)
        if facts is not None and facts["status"] == "done":
            where, before = done, facts
        elif (begun / "plan.json").is_file():
            # training would go on from the checkpoint of the other plan
            where, before = begun, json.loads((begun / "plan.json").read_text(encoding="utf-8"))
            plan["configuration"] = configuration_of(cell, study)
        else:
            continue
        changed = [
            f"{key} was {before.get(key)}, is {value}" for key, value in plan.items() if before.get(key) != value
        ]
        if changed:
            problems.append(f"{where} was run in another way ({'; '.join(changed)}): remove it, or take another folder")
        elif facts is not None and facts.get("configuration") not in (None, configuration_of(cell, study)):
            older.append(str(cell.folder))
    if older:
        shown = ", ".join(older[:3]) + (", …" if len(older) > 3 else "")
        logger.warning("configuration files have changed since %d kept cells were run: %s", len(older), shown)
    if problems:
        raise DataError(problems)


def _is_done(cell: Cell, out: Path) -> bool:
    facts = facts_of(out / "cells" / cell.folder)
    return facts is not None and facts["status"] == "done"


def _members(ensemble: Cell, study: Study) -> list[Cell]:
    cells = study.cells([ensemble.split])
    return [c for c in cells if c.seed == ensemble.seed and c.arm.name.startswith(ALONE)]


def _members_are_done(ensemble: Cell, study: Study, out: Path) -> bool:
    return all(_is_done(member, out) for member in _members(ensemble, study))
