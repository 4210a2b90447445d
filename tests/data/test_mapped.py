# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import json
import mmap
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from monai_cggm.data import mapped
from monai_cggm.data.mapped import read_ahead, read_tensors
from monai_cggm.transforms import RandSlicesd

TENSORS = {
    "image": torch.arange(3 * 2 * 5 * 7).view(3, 2, 5, 7).to(torch.float16),
    "label": torch.arange(35, dtype=torch.uint8).view(5, 7),
    "mask": torch.tensor([True, False, True]),
    "affine": torch.eye(4, dtype=torch.float64),
    "bfloat": torch.linspace(-1, 1, 9).to(torch.bfloat16),
    "float": torch.rand(2, 3),
    "int": torch.tensor([2**40, -1]),
    "int32": torch.arange(-2, 3, dtype=torch.int32),
    "int16": torch.arange(-2, 3, dtype=torch.int16),
    "int8": torch.arange(-2, 3, dtype=torch.int8),
    "number": torch.tensor(2.5),
    "nothing": torch.zeros(0, 4),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "p01.safetensors", metadata={"item": "text", "long": "x" * 100_000})
    return tmp_path / "p01.safetensors"


def _write(file: Path, header: Any, content: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content)
    return file


def test_reads_what_safetensors_reads(file: Path):
    tensors, metadata = read_tensors(file)
    with safe_open(file, framework="pt") as stored:
        assert set(tensors) == set(stored.keys()) == set(TENSORS)
        assert metadata == stored.metadata()
        for name, tensor in tensors.items():
            expected = stored.get_tensor(name)
            assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
            assert torch.equal(tensor, expected)
            assert torch.equal(tensor, TENSORS[name])


def test_a_tensor_holds_its_own_part_of_the_map_and_writes_to_memory_alone(file: Path):
    before = file.read_bytes()
    tensors, _ = read_tensors(str(file))
    for tensor in tensors.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    tensors["image"] += 1
    assert torch.equal(tensors["image"], TENSORS["image"] + 1)
    assert torch.equal(tensors["label"], TENSORS["label"])
    assert file.read_bytes() == before


def test_tensors_outlive_their_file(file: Path):
    image = read_tensors(file)[0]["image"]
    file.unlink()
    assert torch.equal(image, TENSORS["image"])


def test_a_file_without_tensors(tmp_path: Path):
    save_file({}, tmp_path / "empty.safetensors", metadata={"case": "p01"})
    assert read_tensors(tmp_path / "empty.safetensors") == ({}, {"case": "p01"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no safetensors file"),
        (b"1234567", "no safetensors file"),
        (b"PK\x03\x04 something else altogether", "no safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "no dictionary"),
        ((20).to_bytes(8, "little") + b'{"__metadata__": []}', "no dictionary"),
        ((200_000).to_bytes(8, "little") + b"[" * 200_000, "no dictionary"),
        ((200_000).to_bytes(8, "little") + b"[" * 100, "no safetensors file"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path / "other")


@pytest.mark.parametrize("change", [-1, -40, 1])
def test_a_file_of_another_length_is_refused(file: Path, change: int):
    content = file.read_bytes()
    file.write_bytes(content[:change] if change < 0 else content + b"\0" * change)
    with pytest.raises(ValueError, match=f"its {len(content) + change} bytes are not as many as its header says"):
        read_tensors(file)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}, "tensor a is described by .*F8_E4M3"),
        ({"dtype": "U8", "shape": [4.0], "data_offsets": [0, 4]}, "tensor a is described by"),
        ({"dtype": "U8", "shape": 4, "data_offsets": [0, 4]}, "tensor a is described by"),
        ({"dtype": "U8", "shape": [4], "data_offsets": [0]}, "tensor a is described by"),
        ({"shape": [4], "data_offsets": [0, 4]}, "tensor a is described by"),
        ([], "tensor a is described by"),
        ({"dtype": "U8", "shape": [3], "data_offsets": [1, 4]}, "leave out or share bytes from 0 on"),
        ({"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}, "are not as many as its header says"),
        ({"dtype": "F16", "shape": [4], "data_offsets": [0, 4]}, r"a of shape \[4\] does not fill the bytes 0 to 4"),
        ({"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}, r"a of shape \[4\] does not fill the bytes -4 to 0"),
        ({"dtype": "U8", "shape": [-2, -2], "data_offsets": [0, 4]}, r"does not fill the bytes 0 to 4"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, entry: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        read_tensors(_write(tmp_path / "bad", {"a": entry}, b"1234"))


def test_tensors_that_share_bytes_or_lie_askew_are_refused(tmp_path: Path):
    one = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    with pytest.raises(ValueError, match="leave out or share bytes from 2 on"):
        read_tensors(_write(tmp_path / "bad", {"a": one, "b": one | {"data_offsets": [2, 6]}}, b"123456"))
    header = {
        "a": one | {"shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "I64", "shape": [1], "data_offsets": [1, 9]},
    }
    with pytest.raises(ValueError, match=r"tensor b begins at byte .*, where no torch\.int64 can lie"):
        read_tensors(_write(tmp_path / "bad", header, b"123456789"))


def test_a_file_that_ends_while_it_is_read(file: Path, monkeypatch: pytest.MonkeyPatch):
    """As where it is cut short by another process; a loop that waits for the rest would never end."""
    size = file.stat()
    file.write_bytes(file.read_bytes()[:80_000])
    monkeypatch.setattr(os, "fstat", lambda _: size)
    with pytest.raises(ValueError, match="it ends within its header"):
        read_tensors(file)


def test_a_file_system_that_takes_no_advice(file: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    assert torch.equal(read_tensors(file)[0]["image"], TENSORS["image"])


def _resident(tensor: torch.Tensor) -> np.ndarray:
    """Which pages of a tensor are in the page cache, by the system's own count."""
    begin = tensor.data_ptr() - tensor.data_ptr() % mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.nbytes - begin
    states = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(begin), ctypes.c_size_t(length), states) == 0
    return np.array(states) & 1


def _mapped_and_out_of_the_page_cache(tmp_path: Path) -> torch.Tensor:
    file = tmp_path / "volume.safetensors"
    save_file({"image": torch.arange(64 * 65536, dtype=torch.uint8).view(64, 1, 256, 256)}, file)
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        if not hasattr(os, "posix_fadvise") or not hasattr(ctypes.CDLL(None), "mincore"):
            pytest.skip("this system can neither empty its page cache nor tell what is in it")
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if _resident(torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)).any():
        pytest.skip("this file system keeps its files in memory")
    image = read_tensors(file)[0]["image"]
    assert not _resident(image[1:]).any()  # opening reads 64 KiB, a slice's size, and nothing else
    return image


def test_read_ahead_brings_in_a_slice_and_no_other(tmp_path: Path):
    image = _mapped_and_out_of_the_page_cache(tmp_path)
    read_ahead(image[40])
    for _ in range(1000):  # it does not wait for the disk
        if _resident(image[40]).all():
            break
        time.sleep(0.01)
    assert _resident(image[40]).all()
    assert _resident(image[8:40]).mean() < 0.05
    assert _resident(image[42:]).mean() < 0.05
    assert torch.equal(image[40, 0], torch.arange(65536, dtype=torch.uint8).view(256, 256))


def test_drawing_slices_reads_those_slices_and_no_others(tmp_path: Path):
    image = _mapped_and_out_of_the_page_cache(tmp_path)
    voxels = torch.zeros(64, dtype=torch.int32)
    voxels[[20, 50]] = 9
    item = {"image": image.permute(1, 2, 3, 0), "tumour_voxels": voxels, "brain_voxels": torch.ones(64)}
    drawn = RandSlicesd("image", num_slices=2).set_random_state(seed=0)(item)
    assert sorted(one["slice"] for one in drawn) == [20, 50]
    assert _resident(image[20]).all()
    for part in (image[8:20], image[22:50], image[52:]):
        assert _resident(part).mean() < 0.05


def test_read_ahead_leaves_memory_as_it_is_and_does_without_the_system(monkeypatch: pytest.MonkeyPatch):
    tensor = torch.rand(3, 1000)
    before = tensor.clone()
    read_ahead(tensor[1])
    read_ahead(torch.empty(0))
    assert torch.equal(tensor, before)
    monkeypatch.setattr(mapped, "_madvise", lambda: None)
    read_ahead(tensor[1])
    assert torch.equal(tensor, before)
