# SPDX-License-Identifier: Apache-2.0
"""Tensors of a safetensors file through a memory map, and no more of the disk read than is wanted."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import math
import mmap
import operator
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["read_ahead", "read_tensors"]

#: the format's names of the types that are read here
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: Bytes of the first read. A prepared case's header, and the small tensors that the format puts behind it, fit in.
_FIRST_READ = 1 << 16
#: the format's own limit
_LONGEST_HEADER = 100_000_000


def read_tensors(file: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Map a file in the format of safetensors into memory.

    The package ``safetensors`` reads the header through a map of its own; the first touch of a map brings in as much as
    the system reads ahead, megabytes on some disks. Here it is one read of 64 KiB, all that opening a cold file costs.

    Args:
        file: a file that ``safetensors.torch.save_file`` wrote. It must not be changed in place while one of the
            tensors is in use; once they are here it may be replaced or deleted (not on Windows).

    Returns:
        The tensors by name, and the file's metadata. A tensor's storage is its own part of the map: its pages are read
        when they are touched (see :func:`read_ahead`), and what is written to them stays in this process.

    Raises:
        ValueError: where the file is not in that format, is shorter or longer than its header says, has tensors that
            overlap, or numbers of a type that is not read here.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"image": torch.arange(6).view(2, 3)}, f"{folder}/p01.safetensors", metadata={"case": "p01"})
        ...     tensors, metadata = read_tensors(f"{folder}/p01.safetensors")
        >>> tensors["image"].tolist(), metadata
        ([[0, 1, 2], [3, 4, 5]], {'case': 'p01'})
    """
    header, start, size = _read_header(file)
    metadata: dict[str, str] = header.pop("__metadata__", {})
    layouts = _layouts(header, start, size)
    mapped = torch.UntypedStorage.from_file(os.fspath(file), False, size)
    tensors = {
        name: torch.empty(0, dtype=dtype).set_(mapped[start + first : start + stop]).view(shape)
        for name, (dtype, shape, first, stop) in layouts.items()
    }
    return tensors, metadata


def read_ahead(tensor: torch.Tensor) -> None:
    """Ask the system to read a contiguous tensor's pages from the disk, at once and no others.

    Without it each first touch of a page waits for the disk, and for all that the system reads ahead. It is advice, and
    does nothing for tensors that are in memory already or on a GPU, or where the system has no ``madvise``.

    Args:
        tensor: contiguous, of any shape, such as a slice of what :func:`read_tensors` returned.

    Example:
        >>> volume = torch.zeros(155, 4, 240, 240)
        >>> read_ahead(volume[80])
    """
    madvise = _madvise()
    if madvise is None or tensor.device.type != "cpu":
        return
    begin = tensor.data_ptr() - tensor.data_ptr() % mmap.PAGESIZE
    madvise(begin, tensor.data_ptr() + tensor.nbytes - begin, mmap.MADV_WILLNEED)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The system's function, which Python's standard library offers for its own maps only."""
    if not hasattr(mmap, "MADV_WILLNEED"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def _read_header(file: str | Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the tensors begin, and the file's size."""
    with open(file, "rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):  # to read these bytes, and none ahead
            with contextlib.suppress(OSError):  # no file system has to take advice
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        size = os.fstat(stream.fileno()).st_size
        read = stream.read(_FIRST_READ)
        start = 8 + int.from_bytes(read[:8], "little")
        if len(read) < 8 or start > min(size, _LONGEST_HEADER):
            raise ValueError("it is no safetensors file, or a part of one")
        while len(read) < start:
            more = stream.read(start - len(read))
            if not more:
                raise ValueError("it ends within its header")
            read += more
    try:
        header = json.loads(read[8:start])
    except RecursionError as error:
        raise ValueError("its header is no dictionary of tensors") from error
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its header is no dictionary of tensors and texts")
    return header, start, size


def _layouts(header: Mapping[str, Any], start: int, size: int) -> dict[str, tuple[torch.dtype, list[int], int, int]]:
    """Type, shape, first byte and the byte after the last of each tensor: they fill the file, and none overlaps."""
    layouts = {}
    for name, entry in header.items():
        try:
            dtype, shape, (first, stop) = _DTYPES[entry["dtype"]], list(entry["shape"]), entry["data_offsets"]
            numbers = [operator.index(number) for number in (*shape, first, stop)]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"its tensor {name} is described by {entry}, which is not read here") from error
        if min(numbers) < 0 or stop - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"its tensor {name} of shape {shape} does not fill the bytes {first} to {stop}")
        if (start + first) % dtype.itemsize:
            raise ValueError(f"its tensor {name} begins at byte {start + first}, where no {dtype} can lie")
        layouts[name] = dtype, shape, first, stop
    end = 0
    for _, _, first, stop in sorted(layouts.values(), key=lambda layout: layout[2:]):
        if first != end:
            raise ValueError(f"its tensors leave out or share bytes from {min(first, end)} on")
        end = stop
    if size != start + end:
        raise ValueError(f"its {size} bytes are not as many as its header says")
    return layouts
