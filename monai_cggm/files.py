# SPDX-License-Identifier: Apache-2.0
"""Writing files whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside ``path``; rename it to ``path`` when the block ends, remove it when it fails.

    The temporary name keeps all endings (``.nii.gz``), by which many writers choose the format, and holds the process
    number, so that two processes do not share it. Missing parent folders are made.

    Args:
        path: the final name.

    Yields:
        The name to write to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_path(Path(folder) / "scores.csv") as temporary:
        ...         _ = temporary.write_text("case,dice")
        ...     [file.name for file in Path(folder).iterdir()]
        ['scores.csv']
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".tmp{os.getpid()}-{final.name}")
    try:
        yield temporary
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
