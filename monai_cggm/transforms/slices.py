# SPDX-License-Identifier: Apache-2.0
"""From volumes to training slices."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable
from monai.transforms.traits import MultiSampleTrait

from monai_cggm.data.mapped import read_ahead

__all__ = ["RandSlicesd", "TumourSlicesd"]


class TumourSlicesd(MapTransform):
    """Count the tumour and the brain voxels of every slice, so that slices can be drawn without reading the volume.

    Goes last in the deterministic chain: the counts are cached with the volume. Slices are those along the last axis.

    Args:
        keys: one label of classes, ``(1, H, W, D)``; every class but 0 is tumour. An item without it (inference) counts
            as one without tumour.
        image_key: the image ``(M, H, W, D)`` with a background of exactly 0; voxels that are not 0 in some channel
            are brain.
        tumour_key: where the counts of tumour voxels go: int32 ``(D,)``.
        brain_key: where the counts of brain voxels go: int32 ``(D,)``.

    Example:
        >>> label = torch.zeros(1, 4, 4, 3)
        >>> label[0, :2, 0, 1] = 3
        >>> item = TumourSlicesd(keys="label")({"image": torch.ones(2, 4, 4, 3), "label": label})
        >>> item["tumour_voxels"], item["brain_voxels"]
        (tensor([0, 2, 0], dtype=torch.int32), tensor([16, 16, 16], dtype=torch.int32))
    """

    def __init__(
        self,
        keys: KeysCollection = "label",
        image_key: str = "image",
        tumour_key: str = "tumour_voxels",
        brain_key: str = "brain_voxels",
    ) -> None:
        super().__init__(keys, allow_missing_keys=True)
        if len(self.keys) != 1:
            raise ValueError(f"TumourSlicesd reads one label, got keys {self.keys}")
        self.image_key = image_key
        self.tumour_key = tumour_key
        self.brain_key = brain_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return ``data`` with the two counts added."""
        counted = dict(data)
        brain = _plain(counted[self.image_key]).ne(0).any(dim=0)
        counted[self.brain_key] = _voxels_per_slice(brain)
        label = counted.get(self.keys[0])
        tumour = torch.zeros_like(brain) if label is None else _plain(label)[0] > 0
        counted[self.tumour_key] = _voxels_per_slice(tumour)
        return counted


class RandSlicesd(Randomizable, MapTransform, MultiSampleTrait):
    """Draw some slices of a volume, by default slices with tumour.

    Each of the ``num_slices`` slices is one without tumour with probability ``tumour_free_share``. Slices are drawn
    uniformly, without replacement as long as there are enough of their kind. A case without tumour gives slices of
    brain; so does any case for the kind of slice that it has none of. Two slices of a case are never views of the same
    memory, nor of the cached volume: they may be changed in place.

    The slices are plain tensors even where the volume is a ``MetaTensor``: a slice's affine means nothing to the
    network, and its book-keeping costs as much time as the augmentation. The type stays that of the volume
    (``float16`` in the cache): convert after the crop, where there is least to convert.

    Args:
        keys: the volumes to slice alike, ``(C, H, W, D)`` each.
        num_slices: slices a call.
        tumour_free_share: probability in [0, 1] that a slice is one without tumour.
        min_voxels: a slice with fewer tumour voxels is no slice with tumour, and with any no slice without.
        tumour_key: the counts that :class:`TumourSlicesd` stored.
        brain_key: likewise.
        allow_missing_keys: accept items that lack some of ``keys``.

    Returns:
        A list of ``num_slices`` dictionaries: ``keys`` as ``(C, H, W)``, ``slice`` the index along the last axis, and
        everything else of the item but the counts, shared and not copied.

    Raises:
        ValueError: where an argument is out of its range.

    Example:
        >>> item = {"case": "p01", "image": torch.rand(2, 8, 8, 5), "label": torch.zeros(1, 8, 8, 5)}
        >>> item["label"][..., 3] = 1
        >>> draw = RandSlicesd(keys=["image", "label"], num_slices=2).set_random_state(seed=0)
        >>> [(s["slice"], tuple(s["image"].shape)) for s in draw(TumourSlicesd()(item))]
        [(3, (2, 8, 8)), (3, (2, 8, 8))]
    """

    def __init__(
        self,
        keys: KeysCollection,
        num_slices: int = 1,
        tumour_free_share: float = 0.0,
        min_voxels: int = 1,
        *,
        tumour_key: str = "tumour_voxels",
        brain_key: str = "brain_voxels",
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        if num_slices < 1:
            raise ValueError(f"num_slices must be at least 1, got {num_slices}")
        if not 0.0 <= tumour_free_share <= 1.0:
            raise ValueError(f"tumour_free_share must lie in [0, 1], got {tumour_free_share}")
        if min_voxels < 1:
            raise ValueError(f"min_voxels must be at least 1, got {min_voxels}")
        self.num_slices = num_slices
        self.tumour_free_share = tumour_free_share
        self.min_voxels = min_voxels
        self.tumour_key = tumour_key
        self.brain_key = brain_key
        self.indices: list[int] = []

    def randomize(self, data: Mapping[Hashable, Any]) -> None:
        """Draw the slices' indices from the item's counts."""
        tumour = np.asarray(data[self.tumour_key])
        brain = np.asarray(data[self.brain_key]) > 0
        brain_slices = np.flatnonzero(brain) if brain.any() else np.arange(len(brain))
        with_tumour = np.flatnonzero(tumour >= self.min_voxels)
        without_tumour = np.flatnonzero(brain & (tumour == 0))
        free = int(np.count_nonzero(self.R.random_sample(self.num_slices) < self.tumour_free_share))
        self.indices = [
            *self._draw(with_tumour if len(with_tumour) else brain_slices, self.num_slices - free),
            *self._draw(without_tumour if len(without_tumour) else brain_slices, free),
        ]

    def __call__(self, data: Mapping[Hashable, Any]) -> list[dict[Hashable, Any]]:
        """Return the slices."""
        self.randomize(data)
        rest = {k: v for k, v in data.items() if k not in (*self.keys, self.tumour_key, self.brain_key)}
        keys = list(self.key_iterator(dict(data)))
        slices = [{key: _plain(data[key])[..., index] for key in keys} for index in self.indices]
        for part in (part for one in slices for part in one.values() if part.is_contiguous()):
            read_ahead(part)  # of all slices, before the first is waited for
        return [
            {
                **{key: part.clone(memory_format=torch.contiguous_format) for key, part in one.items()},
                **rest,
                "slice": index,
            }
            for one, index in zip(slices, self.indices, strict=True)
        ]

    def _draw(self, pool: np.ndarray, size: int) -> list[int]:
        return [int(i) for i in self.R.choice(pool, size=size, replace=size > len(pool))]


def _plain(volume: Any) -> torch.Tensor:
    return torch.as_tensor(volume).as_subclass(torch.Tensor)


def _voxels_per_slice(mask: torch.Tensor) -> torch.Tensor:
    return mask.sum(dim=(0, 1), dtype=torch.int32)
