# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import enum
import functools
import gzip
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor, set_track_meta
from monai.transforms import (
    CastToTyped,
    Compose,
    ConcatItemsd,
    CropForegroundd,
    DeleteItemsd,
    EnsureTyped,
    Lambdad,
    LoadImaged,
    NormalizeIntensityd,
    RandFlipd,
    ShiftIntensityd,
)

from monai_cggm.data.checks import load_cases
from monai_cggm.data.phantom import write_phantoms
from monai_cggm.data.volumes import CaseDataset, _describe, cached_volumes
from monai_cggm.errors import CaseError, DataError
from monai_cggm.transforms import LabelsToClassesd, TumourSlicesd, ValidateCased

SEQUENCES = ["flair", "t1"]
FILES = [*SEQUENCES, "label"]


@pytest.fixture
def cases(tmp_path: Path) -> list[dict[str, Any]]:
    write_phantoms(tmp_path / "phantoms", cases=3, shape=(40, 44, 32), spacing=4.5)
    return load_cases(tmp_path / "phantoms", SEQUENCES)


def _chain(*, meta: bool = True, last: list[Any] | None = None) -> Compose:
    return Compose(
        [
            LoadImaged(FILES, ensure_channel_first=True),
            ValidateCased(SEQUENCES),
            ConcatItemsd(SEQUENCES, name="image"),
            DeleteItemsd(SEQUENCES),
            CropForegroundd(
                ["image", "label"], source_key="image", start_coord_key=None, end_coord_key=None, allow_smaller=True
            ),
            LabelsToClassesd("label"),
            NormalizeIntensityd("image", nonzero=True, channel_wise=True),
            TumourSlicesd(),
            EnsureTyped(["image", "label"], dtype=[torch.float16, torch.uint8], track_meta=meta),
            *(last or []),
        ]
    )


def _quiet(cases: list[dict[str, Any]], transform: Any = None, **arguments: Any) -> Any:
    return cached_volumes(cases, _chain() if transform is None else transform, progress=False, **arguments)


def _assert_same(one: dict[Any, Any], other: dict[Any, Any]) -> None:
    assert set(one) == set(other)
    for key, value in one.items():
        assert type(value) is type(other[key]), key
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[key].dtype
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key
        else:
            assert value == other[key]


def test_volumes_are_what_numpy_makes_of_the_files(cases: list[dict[str, Any]]):
    volumes = _quiet(cases)
    assert len(volumes) == 3
    assert volumes.skipped == {}
    for case, volume in zip(cases, volumes, strict=True):
        arrays = np.stack([nib.load(case[key]).get_fdata() for key in SEQUENCES])
        label = np.asarray(nib.load(case["label"]).dataobj)
        inside = np.nonzero((arrays > 0).any(axis=0))
        box = tuple(slice(i.min(), i.max() + 1) for i in inside)
        expected = arrays[(slice(None), *box)]
        for channel in expected:
            brain = channel != 0
            channel[brain] = (channel[brain] - channel[brain].mean()) / channel[brain].std()
        np.testing.assert_allclose(np.asarray(volume["image"], dtype=float), expected, atol=4e-3)
        expected_label = np.where(label == 4, 3, label)[box]
        np.testing.assert_array_equal(np.asarray(volume["label"])[0], expected_label)
        np.testing.assert_array_equal(volume["tumour_voxels"], (expected_label > 0).sum(axis=(0, 1)))
        assert (volume["case"], volume["labels"]) == (case["case"], "brats2018")


@pytest.mark.parametrize("on_disk", [False, True])
def test_tensors_own_their_memory_slice_by_slice(cases: list[dict[str, Any]], tmp_path: Path, on_disk: bool):
    volume = _quiet(cases, cache_dir=tmp_path / "cache" if on_disk else None)[0]
    for key in ("image", "label"):
        plain = torch.as_tensor(volume[key]).as_subclass(torch.Tensor)
        assert plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
        assert plain[..., 3].is_contiguous()
        assert len(plain) == (2 if key == "image" else 1)
    files = list((tmp_path / "cache").glob("*")) if on_disk else []
    assert all(file.stat().st_size < 1.2 * 5 * 40 * 44 * 32 for file in files)


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("workers", [0, 3])
def test_disk_and_memory_hold_the_same(cases: list[dict[str, Any]], tmp_path: Path, meta: bool, workers: int):
    memory = _quiet(cases, _chain(meta=meta))
    disk = _quiet(cases, _chain(meta=meta), cache_dir=tmp_path / "cache", workers=workers)
    again = _quiet(cases, _chain(meta=meta), cache_dir=tmp_path / "cache")
    for index in range(3):
        _assert_same(memory[index], disk[index])
        _assert_same(memory[index], again[index])
    if meta:
        for key in ("image", "label"):
            one, other = memory[1][key], disk[1][key]
            assert isinstance(other, MetaTensor)
            torch.testing.assert_close(one.affine, other.affine)
            assert one.meta["filename_or_obj"] == other.meta["filename_or_obj"]
            np.testing.assert_array_equal(one.meta["original_affine"], other.meta["original_affine"])
            assert one.applied_operations[-1]["class"] == other.applied_operations[-1]["class"] == "CropForeground"
            assert one.applied_operations[-1]["orig_size"] == other.applied_operations[-1]["orig_size"]


def test_metadata_are_left_out_while_monai_tracks_none(cases: list[dict[str, Any]], tmp_path: Path):
    volumes = _quiet(cases[:1], cache_dir=tmp_path / "cache")
    tracked = volumes[0]
    set_track_meta(False)
    try:
        plain = volumes[0]
    finally:
        set_track_meta(True)
    for key in ("image", "label"):
        assert type(plain[key]) is torch.Tensor
        assert torch.equal(plain[key], tracked[key].as_tensor())
    assert torch.equal(plain["tumour_voxels"], tracked["tumour_voxels"])


def test_volumes_outlive_their_items(cases: list[dict[str, Any]], tmp_path: Path):
    image = _quiet(cases[:1], cache_dir=tmp_path / "cache")[0]["image"]
    assert torch.equal(torch.as_tensor(image), torch.as_tensor(_quiet(cases[:1])[0]["image"]))


class _Colour(enum.Enum):
    RED = "red"


def test_everything_that_an_item_may_hold_comes_back(tmp_path: Path):
    large = torch.arange(6000).remainder(97)
    item = {
        "case": "p01",
        "nothing": None,
        "numbers": [True, 3, 0.1, float("inf"), (1, (2, [3])), {"a": {"b": ()}}],
        "arrays": [np.array("abc"), np.array([b"x", b"yz"]), np.zeros((0, 3)), np.array(1.5, dtype=np.float16)],
        "small": [torch.tensor(2.5), torch.zeros(0, 4), torch.tensor([True, False]), torch.rand(2, 3, 4, 5)],
        "large": [large, large > 50, large.view(2, 3, 100, 10), torch.rand(70, 80).T],
    }
    case = {**item, "enum": _Colour.RED, "scalar": np.float32(0.5), "brain": large}
    back = _quiet([case], CastToTyped("brain", dtype=torch.bfloat16), cache_dir=tmp_path)[0]
    assert (back.pop("enum"), back.pop("scalar")) == ("red", 0.5)
    assert torch.equal(back.pop("brain"), large.to(torch.bfloat16))
    assert set(back) == set(item)
    for key in ("case", "nothing", "numbers"):
        assert back[key] == item[key]
    for one, other in zip(item["arrays"], back["arrays"], strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(one, other)
        assert other.flags.writeable
    for one, other in zip([*item["small"], *item["large"]], [*back["small"], *back["large"]], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Path("x"), "PosixPath"),
        (torch.float16, "dtype"),
        (np.array([None]), "ndarray"),
        ({1: 2}, "dict"),
        ({"__tuple__": []}, "dict"),
    ],
)
def test_what_the_files_cannot_hold_is_refused(tmp_path: Path, value: Any, name: str):
    with pytest.raises(TypeError, match=f"the cache on disk cannot hold a {name}"):
        _quiet([{"case": "p01", "value": value}], [], cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_threads_do_not_mix_cases(cases: list[dict[str, Any]]):
    many = cases * 6
    for case, volume in zip(many, _quiet(many, workers=6), strict=True):
        assert volume["case"] == case["case"]
        assert volume["image"].meta["filename_or_obj"] == case["flair"]
        assert volume["label"].meta["filename_or_obj"] == case["label"]


def test_items_are_new_dictionaries(cases: list[dict[str, Any]]):
    volumes = _quiet(cases[:1])
    volumes[0]["image"] = None
    del volumes[0]["label"]
    assert volumes[0]["image"] is not None
    assert "label" in volumes[0]
    assert cases[0]["flair"].endswith(".nii.gz")  # nor is the datalist touched


def test_the_cache_on_disk_is_read_and_not_made_again(cases: list[dict[str, Any]], tmp_path: Path):
    _quiet(cases, cache_dir=tmp_path / "cache")
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    assert len(times) == 3
    _quiet(cases, cache_dir=tmp_path / "cache")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()} == times


def _shift(value: float) -> Callable[[Any], Any]:
    return lambda image: image + value


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([ShiftIntensityd("image", offset=0.5)], [ShiftIntensityd("image", offset=0.6)]),
        ([Lambdad("image", func=lambda x: x + 1)], [Lambdad("image", func=lambda x: x + 2)]),
        ([Lambdad("image", func=_shift(1))], [Lambdad("image", func=_shift(2))]),
        (
            [Lambdad("image", func=functools.partial(torch.add, other=1))],
            [Lambdad("image", func=functools.partial(torch.add, other=2))],
        ),
        ([], [CastToTyped("image", dtype=torch.float64)]),
    ],
)
def test_other_settings_make_other_files(
    cases: list[dict[str, Any]], tmp_path: Path, before: list[Any], after: list[Any]
):
    one = _quiet(cases[:1], _chain(last=before), cache_dir=tmp_path / "cache")[0]["image"]
    other = _quiet(cases[:1], _chain(last=after), cache_dir=tmp_path / "cache")[0]["image"]
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert other.dtype != one.dtype or not torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_a_changed_file_is_prepared_again(cases: list[dict[str, Any]], tmp_path: Path):
    before = _quiet(cases[:1], cache_dir=tmp_path / "cache")[0]
    label = nib.load(cases[0]["label"])
    empty = nib.Nifti1Image(np.zeros(label.shape, dtype=np.int16), label.affine)
    nib.save(empty, cases[0]["label"])
    after = _quiet(cases[:1], cache_dir=tmp_path / "cache")[0]
    assert before["label"].any()
    assert not after["label"].any()


@pytest.mark.slow
def test_settings_read_the_same_in_another_process():
    code = (
        "from tests.data.test_volumes import _chain\n"
        "from monai_cggm.data.volumes import _describe\n"
        "print(_describe(_chain()))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == _describe(_chain())


@pytest.mark.parametrize("damage", ["truncated", "empty", "other"])
def test_a_damaged_cache_file_is_made_again(
    cases: list[dict[str, Any]], tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
):
    good = _quiet(cases[:1], cache_dir=tmp_path / "cache")[0]
    (file,) = (tmp_path / "cache").iterdir()
    content = {"truncated": file.read_bytes()[:-2000], "empty": b"", "other": b"no archive at all"}[damage]
    file.unlink()  # not written in place: that would change the memory map of `good`
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        _assert_same(_quiet(cases[:1], cache_dir=tmp_path / "cache")[0], good)
    assert str(file) in caplog.text


def test_an_interrupted_write_leaves_no_file(
    cases: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def half(_: Any, file: Path, **__: Any) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("monai_cggm.data.volumes.save_file", half)
    with pytest.raises(KeyboardInterrupt):
        _quiet(cases[:1], cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def _truncate(case: dict[str, Any]) -> None:
    file = Path(case["t1"])
    file.write_bytes(file.read_bytes()[:-3000])


def _empty(case: dict[str, Any]) -> None:
    image = nib.load(case["t1"])
    nib.save(nib.Nifti1Image(np.zeros(image.shape, dtype=np.int16), image.affine), case["t1"])


def _no_gzip(case: dict[str, Any]) -> None:
    file = Path(case["t1"])
    file.write_bytes(gzip.decompress(file.read_bytes()))


def _bad_label(case: dict[str, Any]) -> None:
    image = nib.load(case["label"])
    label = np.asarray(image.dataobj).copy()
    label[label == 4] = 3
    nib.save(nib.Nifti1Image(label, image.affine), case["label"])


def _delete(case: dict[str, Any]) -> None:
    Path(case["t1"]).unlink()


BAD = [
    (_truncate, "t1", "cannot be read to its end"),
    (_empty, "t1", "is empty"),
    (_no_gzip, "t1", "cannot be read"),
    (_bad_label, "seg", r"label values \[3\] are not in the brats2018 map"),
    (_delete, "t1", "cannot be read"),
]


@pytest.mark.parametrize(("spoil", "name", "message"), BAD)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_case_stops_and_is_named(
    cases: list[dict[str, Any]], spoil: Callable[[dict[str, Any]], None], name: str, message: str, workers: int
):
    spoil(cases[1])
    with pytest.raises(CaseError, match=rf"^case Phantom_001: .*{message}.*Phantom_001_{name}.nii.gz"):
        _quiet(cases, workers=workers)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_bad_case_is_left_out_and_listed_on_demand(
    cases: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture, on_disk: bool
):
    _empty(cases[0])
    _truncate(cases[2])
    with caplog.at_level(logging.WARNING):
        volumes = _quiet(cases, skip_bad=True, workers=2, cache_dir=tmp_path / "cache" if on_disk else None)
    assert [volume["case"] for volume in volumes] == ["Phantom_001"]
    assert list(volumes.skipped) == ["Phantom_000", "Phantom_002"]
    assert all(line in caplog.text for line in volumes.skipped.values())
    if on_disk:
        assert len(list((tmp_path / "cache").iterdir())) == 1


def test_no_case_left_is_an_error(cases: list[dict[str, Any]]):
    _empty(cases[0])
    with pytest.raises(DataError, match="no case could be prepared"):
        _quiet(cases[:1], skip_bad=True)


def test_an_error_of_any_transform_names_the_case(cases: list[dict[str, Any]]):
    def fail(image: Any) -> None:
        raise RuntimeError("out of paper")

    with pytest.raises(CaseError, match="case Phantom_000: RuntimeError in its preparation: out of paper") as caught:
        _quiet(cases[:1], _chain(last=[Lambdad("image", func=fail)]))
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("nested", [False, True])
def test_random_transforms_are_refused(cases: list[dict[str, Any]], nested: bool):
    step: Any = Compose([RandFlipd("image", prob=0.5)]) if nested else RandFlipd("image", prob=0.5)
    with pytest.raises(ValueError, match="RandFlipd would be frozen"):
        _quiet(cases, [_chain(), step])


def test_no_cases_are_an_error():
    with pytest.raises(ValueError, match="no cases"):
        _quiet([])


@pytest.mark.parametrize(
    "chain", [CastToTyped("image", dtype=torch.float16), [CastToTyped("image", dtype=torch.float16)], Compose([])]
)
def test_any_kind_of_chain(chain: Any):
    volumes = _quiet([{"case": "p01", "image": torch.ones(1, 4, 4, 2)}], chain)
    assert volumes[0]["image"].shape == (1, 4, 4, 2)


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_start_with_their_own_share(cases: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, rank: int):
    seen: list[str] = []
    monkeypatch.setattr("ignite.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("ignite.distributed.get_rank", lambda: rank)

    class Note(Lambdad):
        def __call__(self, data: Any) -> Any:
            seen.append(data["case"])
            return dict(data)

    volumes = _quiet(cases, Note("case", func=str))
    ids = [f"Phantom_00{index}" for index in range(3)]
    assert [volume["case"] for volume in volumes] == ids
    assert seen == ([ids[0], ids[2], ids[1]] if rank == 0 else [ids[1], ids[0], ids[2]])


@pytest.mark.real_data
@pytest.mark.parametrize("case_id", ["Brats18_CBICA_APZ_1", "BraTS-GLI-00000-000"])
def test_real_cases_keep_every_tumour_voxel(real_data: Path, case_id: str):
    cases = [case for case in load_cases(real_data / "brats_2mm", SEQUENCES) if case["case"] == case_id]
    volume = _quiet(cases)[0]
    label = np.asarray(nib.load(cases[0]["label"]).dataobj)
    enhancing = 4 if case_id.startswith("Brats18") else 3
    for value, new in ((1, 1), (2, 2), (enhancing, 3)):
        assert int((volume["label"] == new).sum()) == int((label == value).sum()) > 0
    image = np.asarray(volume["image"], dtype=np.float64)
    for channel in image:
        brain = channel[channel != 0]
        assert brain.mean() == pytest.approx(0, abs=2e-3)
        assert brain.std() == pytest.approx(1, abs=2e-3)


def test_a_prepared_volume_that_goes_bad_is_named(cases: list[dict[str, Any]], tmp_path: Path) -> None:
    volumes = cached_volumes(cases, _chain(), cache_dir=tmp_path / "cache", progress=False)
    file = volumes.items[1]
    assert isinstance(file, Path)
    file.write_bytes(file.read_bytes()[:1000])
    assert volumes[0]["case"] == cases[0]["case"]
    with pytest.raises(DataError, match=rf"the prepared volume {file} cannot be read .*the next run makes it anew"):
        volumes[1]


def test_a_case_that_cannot_be_prepared_is_named(cases: list[dict[str, Any]]) -> None:
    dataset = CaseDataset(cases, _chain())
    assert dataset[0]["case"] == cases[0]["case"]
    file = Path(cases[2]["t1"])
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CaseError, match=rf"case {cases[2]['case']}: t1 .*cannot be read to its end"):
        dataset[2]
