# SPDX-License-Identifier: Apache-2.0
"""Errors about a user's data, each of which names the case, the file and what was expected."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

#: the last error in the text of the one that PyTorch raises for a worker of a data loader
_WORKERS = re.compile(
    r"DataLoader worker.*^monai_cggm\.errors\.(?:CaseError|DataError): (.*)\Z", re.DOTALL | re.MULTILINE
)


class CaseError(ValueError):
    """One case that cannot be used.

    Args:
        case: the case's ID.
        message: what was found and what was expected.
        path: the file at fault, where there is one.

    Example:
        >>> print(CaseError("Brats18_2013_2_1", "no t1ce file", "data/Brats18_2013_2_1"))
        case Brats18_2013_2_1: no t1ce file (data/Brats18_2013_2_1)
    """

    def __init__(self, case: str, message: str, path: str | Path | None = None) -> None:
        self.case = case
        self.problem = message
        self.path = path
        super().__init__(f"case {case}: {message}" + ("" if path is None else f" ({path})"))

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is pickled by its `args` otherwise, which here is the finished text, and loses the case on its
        # way out of a worker process.
        return type(self), (self.case, self.problem, self.path)


class DataError(ValueError):
    """Several problems of a data set at once, so that a user can mend them in one go.

    Args:
        problems: one line a problem; each names its case and its file.

    Example:
        >>> print(DataError(["case a: no label", "case b: no t1ce"]))
        2 problems:
          case a: no label
          case b: no t1ce
    """

    def __init__(self, problems: Sequence[str]) -> None:
        # PyTorch makes a worker's error anew from its text, and takes another one where that is refused
        if isinstance(problems, str):
            raise TypeError(f"problems must be a list of them, got one text: {problems!r}")
        self.problems = list(problems)
        if len(self.problems) == 1:
            super().__init__(self.problems[0])
        else:
            super().__init__("\n  ".join([f"{len(self.problems)} problems:", *self.problems]))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


def users_error(error: BaseException | None) -> CaseError | DataError | FileExistsError | None:
    """Return the error about data or about an existing run folder that caused ``error``, or None.

    MONAI wraps what a part of a configuration raises in errors of its own, and PyTorch what a worker of a data loader
    raises, as a text; this looks through them.

    Example:
        >>> try:
        ...     try:
        ...         raise CaseError("p01", "no t1ce file")
        ...     except CaseError as cause:
        ...         raise RuntimeError("Failed to instantiate component") from cause
        ... except RuntimeError as wrapped:
        ...     print(users_error(wrapped))
        case p01: no t1ce file
    """
    while error is not None:
        if isinstance(error, (CaseError, DataError, FileExistsError)):
            return error
        told = _WORKERS.search(str(error)) if isinstance(error, RuntimeError) else None
        if told is not None:
            return DataError([told[1].strip()])
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def show_plainly() -> None:
    """Let the process end with one plain message, not a traceback, where the user's data or run folder is at fault.

    Bundles call it when they are initialised. Other errors keep their traceback.
    """

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        plain = users_error(error)
        if plain is None:
            sys.__excepthook__(kind, error, traceback)
        else:
            print(f"error: {plain}", file=sys.stderr)

    sys.excepthook = hook


def some(names: Iterable[object], most: int = 5) -> str:
    """A list in words, cut after a few.

    Example:
        >>> some(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    texts = [text if (text := str(name)).isprintable() else repr(text) for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
