# SPDX-License-Identifier: Apache-2.0
"""Nothing that a file's header says of a person is in anything that a bundle writes, from its making to its report."""

from __future__ import annotations

import base64
import gzip
import io
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from monai_cggm.discovery import discover
from monai_cggm.new_bundle import Wishes, new_bundle
from tests.bundles.running import environment
from tests.discovery.test_convert import dicom
from tests.new_bundle.folders import AFFINE, volumes
from tests.new_bundle.test_write import TINY, command

NAME, FIRST, BORN, NUMBER, CLINIC = "Quixworth", "Zebulon", "19431107", "MRN7781204", "Hollowmere"
PERSON = f"{NAME}^{FIRST}"
#: what headers say; none of it may be anywhere
HEADERS = (NAME, FIRST, BORN, NUMBER, CLINIC, "Planted^Person")
#: what names of files say; --copy leaves them behind too
FILES = ("Braithwell",)
MODALITIES = ("ADC", "T2")

#: a run of seconds; so few channels do not gain from any other order in memory
SMALL = [*TINY, "memory_format=$torch.contiguous_format"]
#: what of it the network is made of
NETWORK = ("encoder", "decoder_channels", "low_reduced", "memory_format")

TAGS = {"t0010_0010": PERSON, "t0010_0020": NUMBER, "t0010_0030": BORN, "t0008_0080": CLINIC, "t0008_103e": f"x {NAME}"}


def contents(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """A file's bytes, and what is packed in it: checkpoints are zip archives."""
    yield name, data
    if data[:2] == b"\x1f\x8b":
        yield from contents(f"{name}: unzipped", gzip.decompress(data))
    if data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                yield from contents(f"{name}: {member}", archive.read(member))


def in_base64(word: bytes) -> list[bytes]:
    """The characters that a word has within a longer text in base64, for its three places in a group of three."""
    forms = []
    for before in range(3):
        coded = base64.b64encode(b"\0" * before + word)
        forms.append(coded[-(-before * 8 // 6) : (before + len(word)) * 8 // 6])
    return forms


def hits(folder: Path, words: tuple[str, ...]) -> dict[str, list[str]]:
    """Word -> where it is: in a name or a file, packed or not, as ASCII, UTF-16 or base64, in any letter case."""
    found: dict[str, list[str]] = {word: [] for word in words}
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        name = path.relative_to(folder).as_posix()
        for where, data in contents(name, path.read_bytes()):
            lower = data.lower() + where.lower().encode()
            for word in words:
                plain = [word.lower().encode(code) for code in ("ascii", "utf-16-le", "utf-16-be")]
                coded = [form for text in plain_and_wide(word) for form in in_base64(text)]
                if any(form in lower for form in plain) or any(form in data for form in coded):
                    found[word].append(where)
    return {word: places for word, places in found.items() if places}


def plain_and_wide(word: str) -> list[bytes]:
    return [word.encode(code) for code in ("ascii", "utf-16-le", "utf-16-be")]


def save_nifti(path: Path, voxels: np.ndarray) -> None:
    image = nib.Nifti1Image(voxels, AFFINE)
    image.header["descrip"] = f"{PERSON} {BORN}".encode()
    image.header["aux_file"] = NUMBER.encode()
    image.header["db_name"] = CLINIC.encode()
    image.header["intent_name"] = NAME.encode()
    for code, text in ((6, PERSON.encode()), (4, f"<id>{NUMBER}</id>".encode("utf-16"))):
        image.header.extensions.append(nib.nifti1.Nifti1Extension(code, text))
    nib.save(image, path)


def save_itk(path: Path, voxels: np.ndarray) -> None:
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
    image.SetSpacing((1.0, 1.0, 5.0))
    for key, text in (("Patient", PERSON), ("Born", BORN), ("Number", NUMBER), ("Clinic", CLINIC)):
        image.SetMetaData(key, text)
    sitk.WriteImage(image, str(path), useCompression=False)
    if path.suffix == ".mha":  # ITK leaves the texts out of these
        content = path.read_bytes()
        at = content.index(b"ElementDataFile")
        path.write_bytes(content[:at] + f"Comment = {PERSON} {NUMBER} {BORN} {CLINIC}\n".encode() + content[at:])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Four patients in four formats, one of each in a format whose header names them."""
    root = tmp_path_factory.mktemp("planted") / "data"
    for number, (patient, ending) in enumerate(
        zip(("p01", "p02", "p03", "p04"), ("", "nii.gz", "nrrd", "mha"), strict=True)
    ):
        folder = root / patient
        folder.mkdir(parents=True)
        images, label = volumes(number)
        voxels = {**dict(zip(MODALITIES, images, strict=True)), "seg": label}
        for series, (key, array) in enumerate(voxels.items(), start=1):
            if not ending:
                dicom(folder / key, array.astype(np.int16), series=str(series), **TAGS)
                add_tag(folder / key)
            elif ending == "nii.gz":
                save_nifti(folder / f"{FILES[0]}_{key}.nii.gz", array)
            else:
                save_itk(folder / f"{FILES[0]}_{key}.{ending}", array)
    return root


def add_tag(folder: Path) -> None:
    """A private element, which readers of DICOM may keep."""
    file = next(folder.iterdir())
    patient = b"\x10\x00\x10\x00"
    content = file.read_bytes()
    at = content.index(patient)
    elements = b"".join(
        b"\x09\x00" + element + len(text).to_bytes(4, "little") + text
        for element, text in ((b"\x10\x00", b"ACME"), (b"\x10\x10", CLINIC.encode()))
    )
    file.write_bytes(content[:at] + elements + content[at:])


def test_the_search_finds_every_word_in_every_format(source):
    for patient, words in (("p01", HEADERS), *((p, HEADERS[:-1]) for p in ("p02", "p03", "p04"))):
        assert set(hits(source / patient, words)) == set(words), patient
    assert set(hits(source, FILES)) == set(FILES)


def test_the_search_looks_into_archives_and_codes(tmp_path):
    torch.save({"who": NAME}, tmp_path / "a.pt")
    (tmp_path / "b.gz").write_bytes(gzip.compress(FIRST.encode("utf-16-be")))
    for before in range(3):
        (tmp_path / f"c{before}.txt").write_bytes(base64.b64encode(b"x" * before + BORN.encode() + b"yz"))
    (tmp_path / f"{NUMBER.lower()}.txt").touch()
    found = hits(tmp_path, HEADERS)
    assert set(found) == {NAME, FIRST, BORN, NUMBER}
    assert {where[:2] for where in found[BORN]} == {"c0", "c1", "c2"}


@pytest.mark.parametrize("copy", [True, False])
def test_a_new_bundle_holds_nothing_of_the_headers(copy, source, tmp_path):
    new_bundle(discover(source), tmp_path / "bundle", Wishes(network="small"), copy=copy, progress=False)
    converted = {path.parent.name for path in (tmp_path / "bundle/volumes").rglob("*.nii.gz")}
    assert converted == ({"p01", "p02", "p03", "p04"} if copy else {"p01", "p03", "p04"})
    assert hits(tmp_path / "bundle", HEADERS) == {}
    # a file that stays where it is has its path in the datalist, and nowhere else
    assert hits(tmp_path / "bundle", FILES) == ({} if copy else {FILES[0]: ["datalist.json"]})


def use(folder: Path, *, compared: bool) -> None:
    """Do with a bundle in ``folder/bundle`` what a user does, and keep what is printed, in ``folder``."""
    python = [sys.executable, "-m", "monai.bundle", "run"]
    tiny = [word for value in SMALL for word in (f"--{value}".split("=", 1))]
    network = [word for value in SMALL if value.startswith(NETWORK) for word in f"--{value}".split("=", 1)]
    shared = ["--run_dir", "runs/a", "--cache_dir", "cache", "--num_workers", "0", *tiny]
    both = "['configs/train.yaml','configs/evaluate.yaml']"
    segment = ["--dataset_dir", "datalist.json", "--model_file", "runs/a/model.pt", "--output_dir", "segmentations"]
    commands = {
        "train": ["--config_file", "configs/train.yaml", *shared],
        "evaluate": ["--config_file", both, "--part", "test", *shared],
        "infer": ["--config_file", "configs/inference.yaml", *segment, *network],
    }
    for name, arguments in commands.items():
        with (folder / f"{name}.log").open("wb") as log:
            subprocess.run(
                [*python, *arguments], cwd=folder / "bundle", env=environment(), check=True, stdout=log, stderr=log
            )
    if compared:
        text = command("compare", folder / "bundle/study.yaml", "--data", folder / "bundle/datalist.json", "--out",
                       folder / "comparison", "--arms", "joint", "--jobs", "1",
                       *(part for value in SMALL for part in ("--set", value)))  # fmt: skip
        (folder / "compare.log").write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize("copy", [True, False])
def test_training_scores_segmentations_and_reports_hold_nothing_of_the_headers(copy, source, tmp_path):
    """Of a copy, not even names of files; otherwise the user's own paths, in the datalist and with prepared volumes."""
    made = new_bundle(discover(source), tmp_path / "bundle", Wishes(network="small"), copy=copy, progress=False)
    use(tmp_path, compared=copy)
    names = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert {".csv", ".gz", ".json", ".log", ".pt", ".safetensors", ".yaml"} <= names
    assert any(path.name.startswith("events.out") for path in made.folder.rglob("*"))
    assert len(list((made.folder / "segmentations").rglob("*_seg.nii.gz"))) == len(list(source.iterdir()))
    if copy:
        assert (tmp_path / "comparison/report.html").is_file()
        assert (tmp_path / "comparison/runs/joint/split-seed0/log.txt").is_file()
        assert hits(tmp_path, FILES) == {}
    else:  # prepared volumes on disk say what file they are of
        (places,) = hits(tmp_path, FILES).values()
        assert {place.partition("/")[2].partition("/")[0] for place in places} == {"datalist.json", "cache"}
    assert hits(tmp_path, HEADERS) == {}
