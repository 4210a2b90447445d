# SPDX-License-Identifier: Apache-2.0
"""What is wrong with volumes, and one sentence for what is wrong with many of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: Volumes that a sentence names.
NAMED = 3

_NUMBER = re.compile(r"\d[\d.,x]*(e-?\d+)?")


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with one volume.

    Attributes:
        case_id: the case.
        key: modality or ``"label"``.
        what: what was found, and after ``, expected`` what was expected.
        path: the file, or the folder of a series.
        advice: what to do about it; empty where the rest says it.

    Example:
        >>> print(Problem("p01", "t1", "is 2-D (shape 5x4), expected a 3-D volume", Path("p01/t1.nii")))
        case p01: t1 is 2-D (shape 5x4), expected a 3-D volume (p01/t1.nii)
    """

    case_id: str
    key: str
    what: str
    path: Path
    advice: str = ""

    def __str__(self) -> str:
        """The sentence."""
        return f"{self._found(self.what)}{f'; {self.advice}' if self.advice else ''}"

    def kind(self) -> tuple[str, str]:
        """Equal for problems that differ in their volumes and numbers alone."""
        return _NUMBER.sub("#", self.what.replace(str(self.path), "")), self.advice

    def after(self, first: Problem) -> str:
        """The rest of a sentence that began with another problem of this kind."""
        return self._found("" if self.what == first.what else self.what.partition(", expected")[0])

    def _found(self, what: str) -> str:
        return " ".join(part for part in (f"case {self.case_id}: {self.key}", what, f"({self.path})") if part)


def sentences(problems: Sequence[Problem], cases: int) -> list[str]:
    """Write one sentence for each kind of problem, which names the first volumes and counts the others.

    Args:
        problems: of all cases.
        cases: how many cases there are.

    Example:
        >>> flat = "is 2-D (shape {}), expected a 3-D volume"
        >>> problems = [Problem(f"p{n}", "t1", flat.format(f"5x{n}"), Path(f"{n}.nii")) for n in (4, 4, 5, 6, 7)]
        >>> print(*sentences(problems, cases=9))  # doctest: +NORMALIZE_WHITESPACE
        4 of 9 cases: case p4: t1 is 2-D (shape 5x4), expected a 3-D volume (4.nii); case p4: t1 (4.nii);
        case p5: t1 is 2-D (shape 5x5) (5.nii); and 2 more volumes
    """
    kinds: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind(), []).append(problem)
    return [str(same[0]) if len(same) == 1 else _sentence(same, cases) for same in kinds.values()]


def _sentence(same: Sequence[Problem], cases: int) -> str:
    first = same[0]
    several = len({problem.case_id for problem in same})
    named = [str(first).removesuffix(f"; {first.advice}"), *(problem.after(first) for problem in same[1:NAMED])]
    left = len(same) - len(named)
    more = [f"and {left} more volume{'s' * (left > 1)}"] if left else []
    advice = [first.advice] if first.advice else []
    return f"{several} of {cases} cases: " + "; ".join([*named, *more, *advice])
