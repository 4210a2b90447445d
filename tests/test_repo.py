# SPDX-License-Identifier: Apache-2.0
"""Rules that the repository keeps about itself."""

import json
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import monai_cggm

REPOSITORY = Path(__file__).resolve().parents[1]
SPDX = "# SPDX-License-Identifier: Apache-2.0"


def repository_files() -> list[Path]:
    """What is under version control, and what would be with the next commit."""
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("needs git and a clone: this is an unpacked archive")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [REPOSITORY / name for name in listing.stdout.split("\0") if name]
    return [file for file in files if file.is_file()]


def names(files: list[Path]) -> list[str]:
    return [str(file.relative_to(REPOSITORY)) for file in files]


def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements_of(package: str, extra: str) -> list[Requirement]:
    """What an installed package requires on this machine; nothing where it is not installed."""
    try:
        listed = [Requirement(one) for one in requires(package) or []]
    except PackageNotFoundError:
        return []
    return [one for one in listed if one.marker is None or one.marker.evaluate({"extra": extra})]


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("#")[0].strip().split("==") for line in lines if line.split("#")[0].strip()]
    return {canonicalize_name(name): pinned for name, pinned in pairs}


def test_licence_line_comes_first() -> None:
    def has_it(file: Path) -> bool:
        lines = file.read_text(encoding="utf-8").splitlines()[:2]
        return SPDX in (lines[1:] if lines and lines[0].startswith("#!") else lines[:1])

    files = [file for file in repository_files() if file.suffix in {".py", ".sh"}]
    assert files
    assert names([file for file in files if not has_it(file)]) == []


def test_no_large_files() -> None:
    assert names([file for file in repository_files() if file.stat().st_size > 1_000_000]) == []


def test_no_images_of_patients_and_no_weights() -> None:
    """Not even small ones: tests make what they need, and data sets have terms of their own."""
    unwanted = re.compile(r"\.(nii(\.gz)?|dcm|mha|nrrd|npz|pt|pth|ckpt|onnx)$|tfevents")
    assert names([file for file in repository_files() if unwanted.search(file.name)]) == []


def test_licence_is_whole() -> None:
    text = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert project()["license"] == "Apache-2.0"


@pytest.mark.parametrize("script", ["scripts/setup.sh", "scripts/test.sh", "scripts/demo.sh", ".ci/run"])
def test_shell_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(REPOSITORY / script)], check=True)


def test_configurations_parse() -> None:
    files = [file for file in repository_files() if file.suffix in {".json", ".yaml", ".yml"}]
    for file in files:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
        assert content, f"{file} is empty"


def test_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert citation["version"] == monai_cggm.__version__
    newest = re.search(r"^## (\S+)", changelog, flags=re.MULTILINE)
    assert newest is not None
    assert newest[1] == monai_cggm.__version__


def test_every_requirement_is_pinned_within_its_range() -> None:
    metadata = project()
    wanted = metadata["dependencies"] + [one for extra in metadata["optional-dependencies"].values() for one in extra]
    for requirement in map(Requirement, wanted):
        pinned = pins().get(canonicalize_name(requirement.name))
        assert pinned is not None, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(pinned), f"constraints.txt pins {pinned}, outside of {requirement}"


def test_pins_cover_what_the_requirements_bring_along() -> None:
    """All that is installed here is pinned; the parts of a CUDA build are not, as PyTorch pins them itself."""
    metadata = project()
    queue = [Requirement(one) for one in metadata["dependencies"] + metadata["optional-dependencies"]["test"]]
    seen: set[tuple[str, str]] = set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        for extra in {(name, extra) for extra in requirement.extras or {""}} - seen:
            seen.add(extra)
            queue += requirements_of(*extra)
    unpinned = {name for name, _ in seen} - set(pins())
    assert {name for name in unpinned if not name.startswith(("nvidia-", "cuda-", "triton"))} == set()
