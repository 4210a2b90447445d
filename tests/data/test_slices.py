# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, get_track_meta
from monai.transforms import (
    CastToTyped,
    Compose,
    CopyItemsd,
    DeleteItemsd,
    MaskIntensityd,
    RandFlipd,
    RandGaussianNoised,
    RandRotate90d,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSpatialCropd,
    SpatialPadd,
)

from monai_cggm.data.phantom import make_phantom
from monai_cggm.data.slices import EpochSampler, SliceDataset
from monai_cggm.data.volumes import cached_volumes
from monai_cggm.transforms import RandSlicesd, TumourSlicesd

KEYS = ["image", "label"]
SEQUENCES = ("flair", "t1ce", "t1", "t2")


@pytest.fixture(scope="module")
def volumes() -> list[dict[str, Any]]:
    items = []
    for index in range(5):
        phantom = make_phantom((0, index), shape=(48, 48, 32), spacing=4.0)
        image = torch.from_numpy(np.stack([phantom.images[s] for s in SEQUENCES])).to(torch.float16) / 400
        label = torch.from_numpy(phantom.label)[None].to(torch.uint8)
        items.append(TumourSlicesd()({"case": f"Phantom_{index:03d}", "image": image, "label": label}))
    return items


def _augmentation(size: int = 32, num_slices: int = 3) -> Compose:
    return Compose(
        [
            RandSlicesd(KEYS, num_slices=num_slices, tumour_free_share=0.3),
            SpatialPadd(KEYS, spatial_size=(size, size)),
            RandSpatialCropd(KEYS, roi_size=(size, size), random_size=False),
            CastToTyped("image", dtype=torch.float32),
            CopyItemsd("image", names="brain"),
            RandScaleIntensityd("image", prob=0.5, factors=0.2, channel_wise=True),
            RandShiftIntensityd("image", prob=0.5, offsets=0.2, channel_wise=True),
            RandGaussianNoised("image", prob=0.5, std=0.1),
            MaskIntensityd("image", mask_key="brain", select_fn=torch.Tensor.bool),
            DeleteItemsd("brain"),
            RandFlipd(KEYS, prob=0.5, spatial_axis=0),
            RandFlipd(KEYS, prob=0.5, spatial_axis=1),
            RandRotate90d(KEYS, prob=0.5, max_k=3),
        ]
    )


def _batches(dataset: SliceDataset, *, workers: int = 0, epoch: int = 1, **arguments: Any) -> list[dict[str, Any]]:
    sampler = EpochSampler(dataset, seed=3, **arguments)
    sampler.set_epoch(epoch)
    return list(DataLoader(dataset, batch_size=2, sampler=sampler, num_workers=workers))


def _same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return len(one) == len(other) and all(
        set(a) == set(b) and all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("size", [32, 64])  # smaller and larger than the slices
def test_batches_are_slices_times_cases(volumes: list[dict[str, Any]], size: int):
    batch = _batches(SliceDataset(volumes, _augmentation(size)))[0]
    assert batch["image"].shape == (6, 4, size, size)
    assert batch["label"].shape == (6, 1, size, size)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].dtype == torch.uint8
    assert type(batch["image"]) is torch.Tensor
    assert len(batch["case"]) == 6
    assert len(set(batch["case"])) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_draws_do_not_depend_on_workers(volumes: list[dict[str, Any]], workers: int):
    dataset = SliceDataset(volumes, _augmentation(), seed=7)
    assert _same(_batches(dataset), _batches(dataset, workers=workers))


def test_draws_do_not_depend_on_what_was_drawn_before(volumes: list[dict[str, Any]]):
    dataset = SliceDataset(volumes, _augmentation(), seed=7)
    first = _batches(dataset, epoch=4)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    dataset.transform.set_random_state(seed=5)
    for key in ((9, 1), 2, (4, 0)):
        dataset[key]
    assert _same(_batches(dataset, epoch=4), first)
    assert _same(_batches(SliceDataset(volumes, _augmentation(), seed=7), epoch=4), first)


def test_draws_leave_the_global_generators_alone(volumes: list[dict[str, Any]]):
    dataset = SliceDataset(volumes, _augmentation())
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    dataset[(1, 0)]
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


def test_seed_epoch_and_case_each_change_the_draws(volumes: list[dict[str, Any]]):
    same_case = [volumes[0]] * 3
    dataset = SliceDataset(same_case, _augmentation(), seed=7)
    image = dataset[(1, 0)][0]["image"]
    assert torch.equal(dataset[(1, 0)][0]["image"], image)
    assert not torch.equal(dataset[(2, 0)][0]["image"], image)
    assert not torch.equal(dataset[(1, 1)][0]["image"], image)
    assert not torch.equal(SliceDataset(same_case, _augmentation(), seed=8)[(1, 0)][0]["image"], image)


def test_an_index_alone_means_the_same_slices_every_time(volumes: list[dict[str, Any]]):
    dataset = SliceDataset(volumes, _augmentation())
    assert _same(dataset[2], dataset[(0, 2)])
    assert _same(dataset[-1], dataset[4])
    with pytest.raises(IndexError):
        dataset[5]


def test_the_background_stays_zero_and_labels_follow_the_image(volumes: list[dict[str, Any]]):
    dataset = SliceDataset(volumes, _augmentation(size=64), seed=1)  # nothing is cropped away
    augmented = 0
    for epoch in range(6):
        for sample in dataset[(epoch, 1)]:
            image, label = sample["image"], sample["label"][0]
            original = volumes[1]["image"][..., sample["slice"]].float()
            inside = (image != 0).all(dim=0)
            assert torch.equal(image.count_nonzero(dim=(1, 2)), original.count_nonzero(dim=(1, 2)))
            assert label.count_nonzero() == volumes[1]["label"][..., sample["slice"]].count_nonzero()
            assert inside[label > 0].all()
            augmented += not torch.isin(image[0][inside], original[0]).all()
            # Where image and label are moved alike, edema is brighter than the rest in FLAIR, wherever it went.
            if (label == 2).sum() > 20:
                assert image[0][label == 2].mean() > image[0][inside & (label == 0)].mean()
    assert augmented > 6


def test_the_cache_is_not_changed(volumes: list[dict[str, Any]]):
    before = [volume["image"].clone() for volume in volumes]
    dataset = SliceDataset(volumes, _augmentation())
    for epoch in range(3):
        _batches(dataset, epoch=epoch)
    assert all(torch.equal(volume["image"], image) for volume, image in zip(volumes, before, strict=True))


def test_memory_and_disk_give_the_same_slices(volumes: list[dict[str, Any]], tmp_path: Path):
    cast = CastToTyped("image", dtype=torch.float16)
    disk = cached_volumes(volumes, cast, cache_dir=tmp_path, progress=False)
    memory = cached_volumes(volumes, cast, progress=False)
    expected = _batches(SliceDataset(volumes, _augmentation(), seed=2))
    for cache in (memory, disk):
        for workers in (0, 2):
            assert _same(_batches(SliceDataset(cache, _augmentation(), seed=2), workers=workers), expected)


def test_metadata_is_off_only_inside(volumes: list[dict[str, Any]]):
    seen = []

    def note(data: Any) -> Any:
        seen.append(get_track_meta())
        if fail:
            raise RuntimeError("stop")
        return data

    fail = False
    dataset = SliceDataset(volumes, [RandSlicesd(KEYS), note])
    dataset[0]
    assert get_track_meta()
    thread = threading.Thread(target=lambda: dataset[0])
    thread.start()
    thread.join()
    assert seen == [False, True]
    fail = True
    with pytest.raises(RuntimeError):
        dataset[0]
    assert get_track_meta()


def test_one_sample_is_a_list_too(volumes: list[dict[str, Any]]):
    whole = SliceDataset(volumes, RandFlipd(KEYS, prob=0.5, spatial_axis=0))[0]
    assert isinstance(whole, list)
    assert len(whole) == 1


def test_negative_seeds_are_refused(volumes: list[dict[str, Any]]):
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        SliceDataset(volumes, _augmentation(), seed=-1)


@pytest.mark.parametrize(("count", "processes"), [(8, 1), (8, 2), (9, 2), (10, 4)])
def test_processes_together_take_what_one_takes(count: int, processes: int):
    single = EpochSampler(range(count), seed=5, num_replicas=1, rank=0)
    parts = [EpochSampler(range(count), seed=5, num_replicas=processes, rank=rank) for rank in range(processes)]
    orders = []
    for epoch in (1, 2):
        for sampler in (single, *parts):
            sampler.set_epoch(epoch)
        order = list(single)
        assert sorted(order) == [(epoch, index) for index in range(count)]
        shares = [list(part) for part in parts]
        assert len({len(share) for share in shares}) == 1
        interleaved = [key for step in zip(*shares, strict=True) for key in step]
        assert interleaved[:count] == order
        assert len(single) == count
        orders.append([index for _, index in order])
    assert orders[0] != orders[1]


def test_uneven_shares_repeat_no_case():
    shares = [list(EpochSampler(range(9), num_replicas=2, rank=rank, even_divisible=False)) for rank in (0, 1)]
    assert sorted(len(share) for share in shares) == [4, 5]
    assert sorted(index for share in shares for _, index in share) == list(range(9))


def test_order_without_shuffling():
    assert list(EpochSampler(range(3), shuffle=False)) == [(0, 0), (0, 1), (0, 2)]


def test_a_running_iterator_keeps_its_epoch():
    sampler = EpochSampler(range(3))
    sampler.set_epoch(1)
    running = iter(sampler)
    next(running)
    sampler.set_epoch(2)
    assert {epoch for epoch, _ in running} == {1}
    assert {epoch for epoch, _ in sampler} == {2}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_ignite_engine_trains_each_epoch_on_its_own_draws(workers: int):
    class Keys(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, key: tuple[int, int]) -> tuple[int, int]:
            return key

    sampler = EpochSampler(Keys(), seed=1)
    loader = DataLoader(
        Keys(), batch_size=2, sampler=sampler, num_workers=workers, persistent_workers=workers > 0, collate_fn=list
    )
    seen: list[tuple[int, list[tuple[int, int]]]] = []
    engine = Engine(lambda engine, batch: seen.append((engine.state.epoch, batch)))
    engine.add_event_handler(Events.EPOCH_STARTED, lambda engine: sampler.set_epoch(engine.state.epoch))
    engine.run(loader, max_epochs=3)
    assert len(seen) == 9
    for epoch, batch in seen:
        assert [key[0] for key in batch] == [epoch, epoch]
    for epoch in (1, 2, 3):
        indices = [key[1] for at, batch in seen if at == epoch for key in batch]
        assert sorted(indices) == list(range(6))
