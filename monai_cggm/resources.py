# SPDX-License-Identifier: Apache-2.0
"""Where the bundles and configurations are that come with the package."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

_PACKAGE = Path(__file__).resolve().parent


def share_path(relative: str = "") -> Path:
    """Find a shipped file or folder: in the installed package's ``share`` folder, or in a checkout of the project.

    Args:
        relative: path below the root that holds ``bundles/`` and ``configs/``.

    Raises:
        FileNotFoundError: where it is not shipped; the message lists what its folder has.
        ValueError: where the path leaves the root.

    Example:
        >>> share_path("bundles").name
        'bundles'
    """
    parts = PurePosixPath(relative.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"{relative!r} is outside the shipped files: expected a path such as bundles/brats_cggm")
    root = _share_root()
    path = root / parts
    if not path.exists():
        above = next(folder for folder in path.parents if folder.is_dir())
        names = sorted(entry.name for entry in above.iterdir() if not entry.name.startswith("."))
        has = ", ".join(names) or "nothing"
        raise FileNotFoundError(f"{relative!r} does not come with the package: {above} has {has}")
    return path


def _share_root() -> Path:
    installed = _PACKAGE / "share"
    # Beside an installed package lie other packages' files, so only a checkout's root is taken.
    checkout = _PACKAGE.parent
    return checkout if not installed.is_dir() and (checkout / "pyproject.toml").is_file() else installed
