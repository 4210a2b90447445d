# SPDX-License-Identifier: Apache-2.0
"""Align all cases of a data set, several at a time, and write the new data set's list and report."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from monai_cggm.alignment.case import align_case, case_problems, is_done, part_folder, record_of
from monai_cggm.alignment.images import itk_reason
from monai_cggm.alignment.report import not_registered, write_report
from monai_cggm.alignment.settings import RECORD, AlignSettings
from monai_cggm.data.labels import convention_for
from monai_cggm.data.layouts import LABEL
from monai_cggm.discovery.convert import list_cases, refuse_folder
from monai_cggm.discovery.found import Found, FoundCase
from monai_cggm.errors import CaseError, DataError


@dataclass(frozen=True)
class Aligned:
    """What became of the cases.

    Attributes:
        folder: the new data set.
        made: IDs of the cases that were aligned.
        kept: IDs of those that were there already, with the same settings and inputs.
        problems: why the others were refused, a line each with the case and the file.
        refused: IDs of the others.
        incomplete: ID -> modalities that an aligned case lacks, and ``"label"`` where others have one.
        unregistered: ID -> modalities whose registration was refused, so that they kept their place.
        unlisted: folders that an earlier run made of cases which are not in the datalist now: those that went away,
            and refused ones. They stay where they are.
    """

    folder: Path
    made: tuple[str, ...]
    kept: tuple[str, ...]
    problems: tuple[str, ...]
    refused: tuple[str, ...]
    incomplete: Mapping[str, Sequence[str]]
    unregistered: Mapping[str, Sequence[str]]
    unlisted: tuple[str, ...]


def align(
    found: Found,
    out: str | Path,
    settings: AlignSettings,
    *,
    labels: str | None = None,
    workers: int = 0,
    console: Console | None = None,
) -> Aligned:
    """Resample the modalities of each case on the grid of one of them, and write a new data set.

    Images are interpolated linearly and keep their units and their voxel type (integers are rounded; what N4 corrected
    is float32). A label keeps its values; it becomes 0 outside its own grid. Nothing of an input's header goes into the
    outputs but its geometry.

    ``out`` gets ``ID/ID_<modality>.nii.gz``, ``ID/ID_seg.nii.gz``, ``ID/ID_mask.nii.gz``, ``ID/align.json`` (what was
    done) and ``ID/overlay.svg``, and for all cases ``datalist.json`` (sections, patients, label conventions and names
    of label values stay), which everything here reads, and ``report.html``. A case's folder appears when all of it is
    written. A second run makes only what is missing or had other settings or inputs (by size and time of change), and
    deletes nothing: the folder of a case that went away stays, and is named.

    Args:
        found: the cases (see :func:`~monai_cggm.discovery.discover`, with ``keep_bad=True``: a bad case is refused
            here).
        out: the folder to make, outside of the data.
        settings: what to do.
        labels: a label convention for every case, which goes into the datalist.
        workers: processes; each works on one case with one thread. 0 works in this process. (Processes are spawned: a
            script needs its ``if __name__ == "__main__"``.)
        console: where to show progress and to name bad cases as they are found; None shows nothing.

    Returns:
        What became of the cases. A bad case is refused and the others are made.

    Raises:
        DataError: where ``out`` and the data lie in one another, or a worker dies.
        ValueError: where ``labels`` is no convention.

    Example:
        >>> import tempfile
        >>> import SimpleITK as sitk
        >>> from monai_cggm.data.phantom import write_phantoms
        >>> from monai_cggm.discovery import discover
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = write_phantoms(folder / "cases", cases=1, shape=(16, 16, 16), spacing=10.0)
        >>> settings = AlignSettings("t1", ("t1", "t2"), spacing=(10.0, 10.0, 20.0))
        >>> done = align(discover(folder / "cases", keep_bad=True), folder / "aligned", settings)
        >>> done.made, sitk.ReadImage(str(folder / "aligned/Phantom_000/Phantom_000_t2.nii.gz")).GetSize()
        (('Phantom_000',), (16, 16, 8))
    """
    if labels is not None:
        convention_for("", labels)
    folder = Path(out).expanduser().absolute()
    cases = [_chosen(case, settings, labels) for case in found.cases]
    _check_folders(found, folder)
    refused = [error for case in cases for error in case.errors()]
    bad = {error.case for error in refused}
    kept = {case.case_id for case in cases if case.case_id not in bad and is_done(case, folder, settings)}
    waiting = [case for case in cases if case.case_id not in bad | kept]
    # Threads are enough for headers and labels: most of the time goes into gzip, which releases the interpreter.
    with ThreadPoolExecutor(max(1, workers)) as pool:
        problems = pool.map(partial(case_problems, settings=settings, out=folder), waiting)
        refused += [error for errors in problems for error in errors]
    for error in refused:
        _tell(console, error)
    bad |= {error.case for error in refused}
    refused += _run([case for case in waiting if case.case_id not in bad], folder, settings, workers, console)
    bad |= {error.case for error in refused}
    good = [case for case in cases if case.case_id not in bad]
    records = {case.case_id: record_of(folder / case.case_id) or {} for case in good}
    paths = {case.case_id: _outputs(case, records[case.case_id], folder) for case in good}
    if good:  # an earlier run's list is better than an empty one
        list_cases(replace(found, cases=tuple(good)), paths, folder)
    unlisted = _unlisted(good, folder) if good else ()
    write_report(records, refused, unlisted, settings, folder)
    wanted = [*settings.modalities, *([LABEL] if any(case.label for case in cases) else [])]
    lacking = {case.case_id: [key for key in wanted if key not in case.sources()] for case in good}
    return Aligned(
        folder=folder,
        made=tuple(case.case_id for case in good if case.case_id not in kept),
        kept=tuple(case.case_id for case in good if case.case_id in kept),
        problems=tuple(map(str, refused)),
        refused=tuple(sorted(bad)),
        incomplete={case_id: names for case_id, names in lacking.items() if names},
        unregistered={case_id: names for case_id, record in records.items() if (names := not_registered(record))},
        unlisted=unlisted,
    )


def _chosen(case: FoundCase, settings: AlignSettings, labels: str | None) -> FoundCase:
    images = {name: case.images[name] for name in settings.modalities if name in case.images}
    return replace(case, images=images, convention=labels or case.told_convention())


def _check_folders(found: Found, out: Path) -> None:
    refuse_folder(out, found)
    target = out.resolve()
    for case in found.cases:
        for source in case.sources().values():
            if source.path.resolve().is_relative_to(target):
                raise DataError(
                    [f"case {case.case_id}: {source.path} is inside {out}: expected an output folder without data"]
                )


def _outputs(case: FoundCase, record: Mapping[str, Sequence[str]], out: Path) -> dict[str, Path]:
    """Key -> file of what was made of a case."""
    names = {name: name for name in case.images} | ({LABEL: "seg"} if case.label is not None else {}) | {"mask": "mask"}
    files = {key: f"{case.case_id}_{name}.nii.gz" for key, name in names.items()}
    return {key: out / case.case_id / file for key, file in files.items() if file in record["files"]}


def _unlisted(listed: Sequence[FoundCase], out: Path) -> tuple[str, ...]:
    """Folders of cases that this command made earlier and that are not listed now; hidden ones nobody reads."""
    names = {case.case_id for case in listed}
    made = [path.parent.name for path in out.glob(f"*/{RECORD}")]
    return tuple(sorted(name for name in made if name not in names and not name.startswith(".")))


def _run(
    cases: Sequence[FoundCase], out: Path, settings: AlignSettings, workers: int, console: Console | None
) -> list[CaseError]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    errors: list[CaseError] = []
    with Progress(*columns, console=console, disable=console is None) as progress:
        task = progress.add_task("Aligning", total=len(cases))
        for error in _attempts(cases, out, settings, workers):
            progress.advance(task)
            if error is not None:
                errors.append(error)
                _tell(console, error)
    return errors


def _attempts(
    cases: Sequence[FoundCase], out: Path, settings: AlignSettings, workers: int
) -> Iterator[CaseError | None]:
    """Align cases; yield what went wrong with each as it ends."""
    attempt = partial(_attempt, out=out, settings=settings)
    if workers == 0 or not cases:
        yield from map(attempt, cases)
        return
    others = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")  # ITK's threads do not survive a fork
    pool = ProcessPoolExecutor(min(workers, len(cases)), mp_context=context, initializer=_leave_interrupts)
    try:
        with _interrupts_ignored():
            jobs = [pool.submit(attempt, case) for case in cases]
        for job in as_completed(jobs):
            yield job.result()
    except BaseException as error:
        # Ctrl-C above all. A registration takes its time and need not come to its end: nothing of it shows yet.
        pool.shutdown(wait=False, cancel_futures=True)
        for process in [child for child in multiprocessing.active_children() if child not in others]:
            process.terminate()
            process.join()
        for case in cases:
            shutil.rmtree(part_folder(out, case), ignore_errors=True)
        if isinstance(error, BrokenProcessPool):
            message = "a worker process died, perhaps for lack of memory: try fewer workers; finished cases are kept"
            raise DataError([message]) from error
        raise
    finally:
        pool.shutdown()


def _leave_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to all; the first process decides


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """What is started in here ignores Ctrl-C from its first moment on, not only once its imports are done."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may change this
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _attempt(case: FoundCase, out: Path, settings: AlignSettings) -> CaseError | None:
    try:
        align_case(case, out, settings)
    except CaseError as error:
        return error
    except OSError as error:
        return CaseError(case.case_id, f"cannot be read or written: {error.strerror or error}", error.filename)
    except MemoryError:
        return CaseError(case.case_id, "does not fit into memory: try fewer workers or a coarser spacing")
    except RuntimeError as error:
        return CaseError(case.case_id, f"SimpleITK failed: {itk_reason(error)}", case.place)
    return None


def _tell(console: Console | None, error: CaseError) -> None:
    if console is not None:
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
