# SPDX-License-Identifier: Apache-2.0
"""Shipped files are found in a checkout and in an installed package, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from monai_cggm import resources
from monai_cggm.resources import share_path


def install(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the package believe that it lies in a site-packages folder."""
    package = root / "site-packages" / "monai_cggm"
    (package / "share" / "bundles" / "brats_cggm").mkdir(parents=True)
    (root / "site-packages" / "other").mkdir()
    monkeypatch.setattr(resources, "_PACKAGE", package)
    return package


def test_checkout(repository: Path) -> None:
    assert share_path() == repository
    assert share_path("bundles") == repository / "bundles"
    assert share_path("bundles/") == repository / "bundles"


def test_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = install(tmp_path, monkeypatch)
    assert share_path("bundles/brats_cggm") == package / "share" / "bundles" / "brats_cggm"
    with pytest.raises(FileNotFoundError, match=r"'bundles/brats' .* has brats_cggm"):
        share_path("bundles/brats")
    with pytest.raises(FileNotFoundError, match=r"'other' .* has bundles"):
        share_path("other")


def test_package_without_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A neighbour in site-packages is never taken for a shipped file."""
    package = tmp_path / "monai_cggm"
    package.mkdir()
    (tmp_path / "bundles").mkdir()
    monkeypatch.setattr(resources, "_PACKAGE", package)
    with pytest.raises(FileNotFoundError, match="'bundles' does not come with the package"):
        share_path("bundles")


@pytest.mark.parametrize("path", ["..", "../x", "bundles/../../x", "/etc", "..\\x"])
def test_outside(path: str) -> None:
    with pytest.raises(ValueError, match="outside the shipped files"):
        share_path(path)
