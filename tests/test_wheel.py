# SPDX-License-Identifier: Apache-2.0
"""The package as a user installs it: built, put into a fresh environment, used far from the checkout."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import monai_cggm

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    """Run without anything of the checkout on Python's path; what it printed is in the error where it fails."""
    unwanted = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MONAI_CGGM_TEST_DATA"}
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def relative_files(folder: Path) -> set[str]:
    """The files that a wheel should hold of a folder of the checkout."""
    return {
        str(file.relative_to(REPOSITORY))
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith(".")
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive of the checkout, and the wheel that was built out of that archive alone."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", out, cwd=REPOSITORY)
    (archive,) = out.glob("*.tar.gz")
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as tar:
        tar.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=source)
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of an environment that has the wheel, and borrows the dependencies from this one."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    python = environment / "bin/python"
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=environment)
    # A path in a .pth file lends packages, but not the .pth file there that an editable install of the checkout left.
    site_packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=environment).strip()
    )
    lent = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (site_packages / "dependencies.pth").write_text("\n".join(lent) + "\n")
    return environment / "bin"


def test_wheel_holds_package_bundles_and_configurations(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    shared = relative_files(REPOSITORY / "bundles") | relative_files(REPOSITORY / "configs")
    assert "bundles/brats_cggm/configs/train.yaml" in shared
    assert {f"monai_cggm/share/{name}" for name in shared} <= held
    assert relative_files(REPOSITORY / "monai_cggm") <= held
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in held)
    # And nothing else: no tests, no scripts, no runs.
    assert {name.split("/")[0] for name in held} == {"monai_cggm", f"monai_cggm-{monai_cggm.__version__}.dist-info"}


def test_source_archive_is_complete(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {member.name.partition("/")[2] for member in tar.getmembers()}
    for wanted in (
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
        "constraints.txt",
        "scripts/test.sh",
        "tests/conftest.py",
    ):
        assert wanted in held


def test_works_from_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    origin = run(installed / "python", "-c", "import monai_cggm; print(monai_cggm.__file__)", cwd=tmp_path)
    assert Path(origin.strip()).is_relative_to(installed.parent)
    assert monai_cggm.__version__ in run(installed / "monai-cggm", "--version", cwd=tmp_path)

    bundle = Path(run(installed / "monai-cggm", "path", "bundles/brats_cggm", cwd=tmp_path).strip())
    assert bundle.is_relative_to(installed.parent)
    assert not bundle.is_relative_to(REPOSITORY)
    assert (bundle / "configs/train.yaml").is_file()
    assert (bundle / "configs/metadata.json").is_file()
    assert Path(run(installed / "monai-cggm", "path", "configs", cwd=tmp_path).strip()).is_dir()
    assert list(tmp_path.iterdir()) == []


def test_installed_bundle_parses(installed: Path, tmp_path: Path) -> None:
    """MONAI reads the shipped configuration and finds the package's own parts that it names."""
    code = """
from monai.bundle import ConfigParser
from monai_cggm.resources import share_path
configs = share_path("bundles/brats_cggm/configs")
parser = ConfigParser()
parser.read_meta(configs / "metadata.json")
parser.read_config(configs / "train.yaml")
parser["encoder"].update(backbone="resnet18", width=8)
parser.parse()
print(type(parser.get_parsed_content("network_def")).__module__)
"""
    assert run(installed / "python", "-c", code, cwd=tmp_path).split()[-1].startswith("monai_cggm.")
