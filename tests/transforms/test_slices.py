# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Randomizable

from monai_cggm.transforms import RandSlicesd, TumourSlicesd

KEYS = ["image", "label"]


def _item(depth: int = 12, tumour: dict[int, int] | None = None, brain: range = range(2, 10)) -> dict[str, Any]:
    """A case whose slice z holds the value z + 1 inside a brain, and tumour[z] voxels of tumour."""
    image = torch.zeros(2, 6, 5, depth, dtype=torch.float16)
    for z in brain:
        image[:, 1:5, 1:4, z] = z + 1
    image[1] = -image[1]  # after normalisation half of the brain is below 0
    label = torch.zeros(1, 6, 5, depth, dtype=torch.uint8)
    for z, count in (tumour or {}).items():
        flat = torch.zeros(12, dtype=torch.uint8)
        flat[:count] = 1 + z % 3
        label[0, 1:5, 1:4, z] = flat.reshape(4, 3)
    return TumourSlicesd(keys="label")({"case": "p01", "labels": "brats2018", "image": image, "label": label})


def _draw(item: dict[str, Any], seed: int = 0, **arguments: Any) -> list[dict[str, Any]]:
    return RandSlicesd(KEYS, **arguments).set_random_state(seed=seed)(item)


@pytest.mark.parametrize("depth", [12, 20])
def test_counts_are_those_of_the_slices(depth: int):
    item = _item(depth, {4: 3, 7: 12})
    expected_tumour = [(np.asarray(item["label"])[0, :, :, z] > 0).sum() for z in range(depth)]
    assert item["tumour_voxels"].tolist() == expected_tumour
    assert item["brain_voxels"].tolist() == [12 if 2 <= z < 10 else 0 for z in range(depth)]
    assert item["tumour_voxels"].dtype == item["brain_voxels"].dtype == torch.int32
    assert item["tumour_voxels"].untyped_storage().nbytes() == 4 * depth


def test_without_a_label_nothing_is_tumour():
    out = TumourSlicesd()({"image": torch.ones(1, 2, 2, 3)})
    assert out["tumour_voxels"].tolist() == [0, 0, 0]
    assert out["brain_voxels"].tolist() == [4, 4, 4]


@pytest.mark.parametrize("num_slices", [1, 3])
def test_slices_are_those_of_the_volume(num_slices: int):
    item = _item(tumour={3: 2, 5: 4, 6: 1, 8: 7})
    samples = _draw(item, num_slices=num_slices)
    assert len(samples) == num_slices
    for sample in samples:
        z = sample["slice"]
        assert isinstance(z, int)
        assert sample["image"].shape == (2, 6, 5)
        assert sample["label"].shape == (1, 6, 5)
        assert sample["image"].dtype == torch.float16
        assert sample["label"].dtype == torch.uint8
        torch.testing.assert_close(sample["image"], item["image"][..., z])
        torch.testing.assert_close(sample["label"], item["label"][..., z])
        assert sample["case"] == "p01"
        assert sample["labels"] == "brats2018"
        assert "tumour_voxels" not in sample
        assert "brain_voxels" not in sample


def test_slices_are_copies_of_their_own():
    item = _item(tumour={5: 4})
    before = {key: item[key].clone() for key in KEYS}
    samples = _draw(item, num_slices=3)  # the same slice three times
    assert [sample["slice"] for sample in samples] == [5, 5, 5]
    for sample in samples:
        assert sample["image"].untyped_storage().nbytes() == 2 * 6 * 5 * 2
        assert sample["image"].is_contiguous()
    samples[0]["image"] += 1
    samples[0]["label"] += 1
    for key in KEYS:
        assert torch.equal(item[key], before[key])
        assert torch.equal(samples[1][key], before[key][..., 5])


def test_slices_of_meta_tensors_are_plain():
    item = _item(tumour={5: 4})
    item["image"] = MetaTensor(item["image"])
    assert type(_draw(item)[0]["image"]) is torch.Tensor


def test_by_default_every_slice_has_tumour_and_all_of_them_come():
    item = _item(tumour={3: 2, 5: 4, 8: 7})
    drawn = [sample["slice"] for seed in range(50) for sample in _draw(item, seed, num_slices=2)]
    assert set(drawn) == {3, 5, 8}
    counts = [drawn.count(z) for z in (3, 5, 8)]
    assert min(counts) > 0.6 * 100 / 3


def test_slices_of_a_case_differ_while_there_are_enough():
    item = _item(tumour={3: 2, 5: 4, 8: 7})
    for seed in range(20):
        assert len({sample["slice"] for sample in _draw(item, seed, num_slices=3)}) == 3
        assert len(_draw(item, seed, num_slices=5)) == 5


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share_of_tumour_free_slices(share: float):
    item = _item(tumour={3: 2, 5: 4, 8: 7})
    drawn = [
        sample["slice"] for seed in range(200) for sample in _draw(item, seed, num_slices=2, tumour_free_share=share)
    ]
    free = [z for z in drawn if z not in (3, 5, 8)]
    # 400 draws: the standard error of the share is at most 0.025.
    assert len(free) / len(drawn) == pytest.approx(share, abs=0.08)
    assert set(free) <= {2, 4, 6, 7, 9}  # brain, but no tumour


def test_min_voxels_keeps_specks_out_of_both_kinds():
    item = _item(tumour={3: 2, 5: 4, 8: 7})
    drawn = [s["slice"] for seed in range(60) for s in _draw(item, seed, num_slices=2, min_voxels=4)]
    assert set(drawn) == {5, 8}
    free = [s["slice"] for seed in range(60) for s in _draw(item, seed, min_voxels=4, tumour_free_share=1.0)]
    assert set(free) == {2, 4, 6, 7, 9}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_case_without_tumour_gives_brain(share: float):
    drawn = {s["slice"] for seed in range(80) for s in _draw(_item(), seed, num_slices=2, tumour_free_share=share)}
    assert drawn == set(range(2, 10))


def test_a_case_with_tumour_everywhere_gives_tumour():
    item = _item(tumour={z: 3 for z in range(2, 10)})
    drawn = {s["slice"] for seed in range(80) for s in _draw(item, seed, tumour_free_share=1.0)}
    assert drawn == set(range(2, 10))


@pytest.mark.parametrize("depth", [1, 3])
def test_a_case_without_brain_does_not_hang(depth: int):
    item = _item(depth, brain=range(0))
    assert len(_draw(item, num_slices=4)) == 4


def test_random_state_decides_and_nothing_else():
    item = _item(tumour={z: 3 for z in range(2, 10)})
    draw = RandSlicesd(KEYS, num_slices=2, tumour_free_share=0.5)

    def indices(seed: int) -> list[int]:
        draw.set_random_state(seed=seed)
        return [sample["slice"] for _ in range(5) for sample in draw(item)]

    first = indices(7)
    np.random.seed(1)
    torch.manual_seed(1)
    draw(_item())
    assert indices(7) == first
    assert indices(8) != first
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    draw(item)
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()


def test_compose_seeds_it_like_any_random_transform():
    item = _item(tumour={z: 3 for z in range(2, 10)})
    chain = Compose([RandSlicesd(KEYS, num_slices=3)])
    assert isinstance(chain.transforms[0], Randomizable)
    runs = [[s["slice"] for s in chain.set_random_state(seed=3)(item)] for _ in range(2)]
    assert runs[0] == runs[1]


def test_other_entries_are_shared():
    item = {**_item(tumour={5: 4}), "present": torch.tensor([True, False])}
    assert _draw(item)[0]["present"] is item["present"]


def test_missing_keys_only_where_allowed():
    item = _item(tumour={5: 4})
    del item["label"]
    with pytest.raises(KeyError):
        _draw(item)
    assert "label" not in _draw(item, allow_missing_keys=True)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_slices": 0}, "num_slices must be at least 1, got 0"),
        ({"tumour_free_share": 1.1}, "tumour_free_share must lie in"),
        ({"tumour_free_share": float("nan")}, "tumour_free_share must lie in"),
        ({"min_voxels": 0}, "min_voxels must be at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        RandSlicesd(KEYS, **arguments)


def test_counting_reads_one_label():
    with pytest.raises(ValueError, match="reads one label"):
        TumourSlicesd(keys=["label", "other"])
