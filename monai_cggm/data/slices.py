# SPDX-License-Identifier: Apache-2.0
"""Random slices or patches of cached volumes; their draws depend on seed, epoch and case, and on nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from monai.data import DistributedSampler, get_track_meta, set_track_meta
from monai.transforms import Compose, Randomizable
from torch.utils.data import Dataset

from monai_cggm.data.volumes import CachedVolumes


class SliceDataset(Dataset):
    """Training slices, or patches, of volumes: one item is the list of a case's, which MONAI's ``DataLoader`` flattens.

    Before an item is made, the random transforms are seeded from (seed, epoch, index). So what is drawn does not depend
    on the number of workers or processes, nor on what was drawn before: a resumed run draws what an uninterrupted one
    would. The epoch comes with the key, from :class:`EpochSampler`; workers are copies of this object and would not
    notice an attribute that changes in the main process.

    Args:
        volumes: prepared cases (see :func:`monai_cggm.data.cached_volumes`).
        transform: the random transforms, first one that draws slices (``RandSlicesd``) or patches (MONAI's
            ``RandCropByPosNegLabeld``, say). The volumes are the cache's own and must not be changed in place, and
            neither must what MONAI crops, which is a view of them until a transform copies it. What leaves as a view
            is copied here: a patch in hand neither keeps its volume alive nor changes it.
        seed: an integer of at least 0.

    Example:
        >>> import torch
        >>> from monai_cggm.transforms import RandSlicesd, TumourSlicesd
        >>> item = {"image": torch.ones(1, 4, 4, 100), "label": torch.ones(1, 4, 4, 100)}
        >>> slices = SliceDataset([TumourSlicesd()(item)], RandSlicesd(["image", "label"], num_slices=3), seed=0)
        >>> [s["slice"] for s in slices[(1, 0)]] == [s["slice"] for s in slices[(1, 0)]]
        True
        >>> [s["slice"] for s in slices[(1, 0)]] == [s["slice"] for s in slices[(2, 0)]]
        False
    """

    def __init__(
        self, volumes: Sequence[Any] | Dataset, transform: Callable | Sequence[Callable], seed: int = 0
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.volumes = volumes
        self.transform = transform if isinstance(transform, Randomizable) else Compose(transform)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.volumes)  # type: ignore[arg-type]

    def __getitem__(self, key: int | tuple[int, int]) -> list[dict[str, Any]]:
        """Make the slices, or patches, of one case.

        Args:
            key: (epoch, index of the case), or the index alone, which means epoch 0: the same ones every time.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        index = range(len(self))[index]
        state = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)
        self.transform.set_random_state(seed=int(state[0]))
        # what prepares its volumes on the way may need the metadata itself
        volume = None if isinstance(self.volumes, CachedVolumes) else self.volumes[index]
        with _without_metadata():
            item = self.transform(self.volumes[index] if volume is None else volume)
        samples = item if isinstance(item, list) else [item]
        return [{name: _own(value) for name, value in sample.items()} for sample in samples]


class EpochSampler(DistributedSampler):
    """Shuffles cases and gives each process its share, as keys (epoch, index) for :class:`SliceDataset`.

    Process r of n takes places r, r + n, ... of the epoch's order, so that the n parts of a step are, together, the
    batch that one process would take. Without processes it is a seeded shuffle. ``set_epoch`` must be called before
    each epoch (:class:`monai_cggm.handlers.EpochSeed` does it); an iterator that is already running keeps its epoch.

    Args:
        dataset: what to sample.
        shuffle: whether to shuffle, differently each epoch.
        seed: the same in every process.
        even_divisible: repeat some cases so that every process gets as many.
        num_replicas: processes; by default those of the run.
        rank: this process; likewise.

    Example:
        >>> sampler = EpochSampler(range(4), seed=0)
        >>> sampler.set_epoch(7)
        >>> sorted(sampler)
        [(7, 0), (7, 1), (7, 2), (7, 3)]
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        shuffle: bool = True,
        seed: int = 0,
        even_divisible: bool = True,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__(
            dataset,  # type: ignore[arg-type]
            even_divisible=even_divisible,
            num_replicas=idist.get_world_size() if num_replicas is None else num_replicas,
            rank=idist.get_rank() if rank is None else rank,
            shuffle=shuffle,
            seed=seed,
        )

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        return ((epoch, index) for index in super().__iter__())


def _own(value: Any) -> Any:
    """A tensor that is a part of a larger one gets its own memory."""
    if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() > value.numel() * value.element_size():
        return value.clone(memory_format=torch.contiguous_format)
    return value


@contextmanager
def _without_metadata() -> Iterator[None]:
    """Let MONAI's transforms return plain tensors.

    Keeping the metadata of small samples, which nothing reads, takes longer than cropping and augmenting them. The
    switch is MONAI's own and global, so only the main thread of a process (a worker's too) may touch it.
    """
    if not get_track_meta() or threading.current_thread() is not threading.main_thread():
        yield
        return
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(True)
