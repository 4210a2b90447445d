# SPDX-License-Identifier: Apache-2.0
"""Tables with a row a sample, and their rows in an order, without copying them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

#: numbers that are looked at together: 16 MiB in float32
BLOCK = 2**22


@dataclass(frozen=True)
class Table:
    """An array with a row a sample.

    Attributes:
        values: ``(N,)``, ``(N, D)`` or ``(N, T, D)``.
        where: the file, and the key in it if it has several, for messages.
        pieces: rows and ``where`` of each file or key, where the rows come from several.
        ids: the samples' IDs, where the file has them.
        turnable: whether a file of this kind may hold it with a column a sample, as MATLAB's do.
        following: further arrays, whose rows come after those of ``values``: parts that lie in several files.
        skipped: of labels: rows that cannot be used → the reason.
        parted: of a split: groups that it may have in several parts, as published ones do.
    """

    values: np.ndarray
    where: str
    ids: tuple[str, ...] | None = None
    turnable: bool = False
    following: tuple[np.ndarray, ...] = ()
    skipped: Mapping[int, str] = field(default_factory=dict)
    parted: frozenset[str] = frozenset()
    pieces: tuple[tuple[int, str], ...] = ()

    def __len__(self) -> int:
        return sum(map(len, (self.values, *self.following)))

    def lies(self, row: int) -> tuple[int, str]:
        """Return where a row lies, for messages: its number in its own file or key, from 1, and that one's ``where``.

        Example:
            >>> table = Table(np.zeros(5), "labels", pieces=((3, "y_train"), (2, "y_test")))
            >>> table.lies(2), table.lies(3)
            ((3, 'y_train'), (1, 'y_test'))
        """
        for size, where in self.pieces:
            if row < size:
                return row + 1, where
            row -= size
        return row + 1, self.where


class Rows:
    """The rows of one or several arrays, in an order, none of them copied.

    Arrays that lie in files (``np.memmap``) are read where a row is used and never as a whole. Of others, float16 and
    float32 stay what they are, and other numbers become float32.

    Args:
        arrays: ``(N1, …, D)``, ``(N2, …, D)``, …, alike but for the number of rows.
        order: which rows, and where each of them goes; all of them as they lie, if None.

    Example:
        >>> rows = Rows([np.array([[1.0], [2.0]]), np.array([[3.0]])], order=[2, 0])
        >>> len(rows), rows.shape, rows[0], rows[1]
        (2, (2, 1), array([3.], dtype=float32), array([1.], dtype=float32))
    """

    def __init__(self, arrays: Sequence[np.ndarray], order: Sequence[int] | None = None) -> None:
        self.arrays = tuple(_plain(array) for array in arrays)
        self.order = None if order is None else np.asarray(order, dtype=np.intp)
        self._starts = np.cumsum([0, *map(len, self.arrays)])

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        return (len(self), *self.arrays[0].shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """As of an array: a type that holds the numbers of all of them."""
        return np.result_type(*self.arrays)

    def __len__(self) -> int:
        return int(self._starts[-1]) if self.order is None else len(self.order)

    def __getitem__(self, row: int) -> np.ndarray:
        at = row if self.order is None else int(self.order[row])
        if len(self.arrays) == 1:
            return self.arrays[0][at]
        piece = int(np.searchsorted(self._starts, at, side="right")) - 1
        return self.arrays[piece][at - self._starts[piece]]

    def taken(self, rows: Sequence[int]) -> Rows:
        """Return these rows of them, in their order.

        Example:
            >>> Rows([np.arange(3.0)[:, None]]).taken([2, 1]).taken([1])[0].item()
            1.0
        """
        new = object.__new__(type(self))
        order = np.asarray(rows, dtype=np.intp)
        new.arrays, new._starts = self.arrays, self._starts
        new.order = order if self.order is None else self.order[order]
        return new

    def blocks(self, numbers: int = BLOCK) -> Iterator[tuple[int, np.ndarray]]:
        """Give the rows in blocks: the place of a block's first row, and the block.

        Args:
            numbers: most numbers in a block; one row is the least.

        Example:
            >>> [(start, block.tolist()) for start, block in Rows([np.zeros((3, 1))]).blocks(numbers=2)]
            [(0, [[0.0], [0.0]]), (2, [[0.0]])]
        """
        size = max(1, numbers // max(1, int(np.prod(self.shape[1:]))))
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            if self.order is not None and len(self.arrays) == 1:
                yield start, self.arrays[0][self.order[start:stop]]
            elif len(self.arrays) == 1:
                yield start, self.arrays[0][start:stop]
            else:
                yield start, np.stack([self[row] for row in range(start, stop)])


class Place(NamedTuple):
    """Where the numbers of an array lie in a file, in the place of the numbers.

    Attributes:
        path: the file.
        offset: the first number's, in bytes.
        dtype: as of the array.
        shape: likewise.
        strides: likewise.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/a.npy", np.arange(6.0).reshape(2, 3))
        ...     place = Place.of(np.load(f"{folder}/a.npy", mmap_mode="r")[1])
        ...     place.read(np.memmap(place.path, mode="r")).tolist()
        [3.0, 4.0, 5.0]
    """

    path: str
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, array: np.ndarray) -> Place | None:
        """Return the place of a mapped array or a view of one; None for numbers that may be in memory alone."""
        owner: Any = array
        mapped: np.memmap | None = None
        while isinstance(owner, np.ndarray):
            mapped = owner if isinstance(owner, np.memmap) else mapped
            owner = owner.base
        if mapped is None or mapped.filename is None or mapped.mode == "c":
            return None
        offset = mapped.offset + array.ctypes.data - mapped.ctypes.data
        return cls(str(mapped.filename), offset, array.dtype, array.shape, array.strides)

    def read(self, file: np.ndarray) -> np.ndarray:
        """Return the array.

        Args:
            file: the file's bytes, mapped.
        """
        return np.ndarray(self.shape, self.dtype, file, self.offset, self.strides)


def _plain(array: np.ndarray) -> np.ndarray:
    if isinstance(array, np.memmap):
        return np.asarray(array)  # the same memory, without a class of its own for every row
    if array.dtype in (np.float16, np.float32) or array.dtype.kind not in "fiub":
        return array
    with np.errstate(over="ignore"):  # what becomes infinite is found by the check
        return array.astype(np.float32)
