# SPDX-License-Identifier: Apache-2.0
"""What configs/protocols/patches_3d.yaml makes of the BraTS bundle: volumes' patches in place of slices."""

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, get_track_meta

from monai_cggm.data import EpochSampler, SliceDataset, cached_volumes
from monai_cggm.data.phantom import make_phantom, write_phantoms
from monai_cggm.inferers import PatchInferer
from monai_cggm.networks import MultimodalSegmenter, modality_subsets, subset_predictor
from monai_cggm.transforms import TumourSlicesd
from tests.bundles.running import NETWORK, TINY, files, run, workflow

MODALITIES = ("flair", "t1ce", "t1", "t2")
PATCHES = "protocols/patches_3d.yaml"
PATCH = [16, 16, 12]
#: what the command line says; the network's size is a file, because a word for `encoder` would replace the overlay's
WORDS = {
    "epochs": 1, "warmup_epochs": 0, "volumes_per_batch": 2, "patches_per_volume": 2, "patch_size": PATCH,
    "split_sizes": [2, 1, 1], "hd95": False,
}  # fmt: skip
#: parts that go with a method, and so are tried with one
AFTER = {"parts/guided_dropout.yaml": "relative", "parts/balanced_auxiliary.yaml": "relative"}
#: of each build of network, loss and part one, and methods that look at a voxel or at weights
OVERLAYS = [
    *(
        f"methods/{name}.yaml"
        for name in ("agm", "cggm", "ogm_ge", "pmr", "qmf", "reconboost", "segresnet", "ume", "umt")
    ),
    *(f"parts/{name}.yaml" for name in ("distillation", "dropout", "regions")),
]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder / "in", cases=4, shape=(28, 32, 24), spacing=6.0)
    (folder / "tiny.json").write_text(json.dumps(TINY))
    return folder


def of(cases, run_dir, *names):
    """The arguments of a run: its files, and what the command line says."""
    return ("train.yaml", str(cases / "tiny.json"), PATCHES, *names), {
        **WORDS,
        "dataset_dir": str(cases / "in"),
        "run_dir": str(run_dir),
    }


@pytest.fixture(scope="module")
def trained(cases, tmp_path_factory):
    """The folder of a finished run of one epoch: the recipe, which has parts and classifiers."""
    folder = tmp_path_factory.mktemp("run") / "recipe"
    names, words = of(cases, folder)
    run(*names, **words)
    return folder


@pytest.fixture(scope="module")
def volumes():
    items = []
    for index in range(3):
        phantom = make_phantom((0, index), shape=(40, 36, 28 + index), spacing=5.0)
        image = torch.from_numpy(np.stack([phantom.images[m] for m in MODALITIES])).to(torch.float16) / 400
        label = torch.from_numpy(phantom.label).to(torch.uint8)[None]
        items.append(TumourSlicesd()({"case": f"Phantom_{index:03d}", "image": image, "label": label}))
    return cached_volumes(items, [], progress=False)


def dataset(volumes, **words):
    """The overlay's own random transforms over some volumes."""
    parser = ConfigParser()
    parser.read_config(files("train.yaml", PATCHES))
    parser.update({"patch_size": PATCH, **words})
    return SliceDataset(volumes, parser.get_parsed_content("train#preprocessing"), seed=3)


def test_patches_are_drawn_by_seed_epoch_and_case_and_are_one_size(volumes):
    patches = dataset(volumes, patches_per_volume=2)

    def batches(workers):
        sampler = EpochSampler(patches, seed=3)
        sampler.set_epoch(5)
        return list(DataLoader(patches, batch_size=3, sampler=sampler, num_workers=workers))

    (batch,), (other,) = batches(0), batches(2)
    assert batch["image"].shape == (6, 4, *PATCH)
    assert batch["label"].shape == (6, 1, *PATCH)
    assert (batch["image"].dtype, batch["label"].dtype) == (torch.float32, torch.uint8)
    assert type(batch["image"]) is torch.Tensor
    assert get_track_meta()
    assert len(set(batch["case"])) == 3
    assert torch.equal(batch["image"], other["image"])
    assert torch.equal(batch["label"], other["label"])
    assert not torch.equal(patches[(5, 0)][0]["image"], patches[(6, 0)][0]["image"])
    assert not torch.equal(patches[(5, 0)][0]["image"], patches[(5, 0)][1]["image"])


@pytest.mark.parametrize("size", [PATCH, [48, 32, 32]])  # within the volumes, and larger along two axes
def test_patches_own_their_memory_and_leave_the_volumes_alone(volumes, size):
    before = [{name: volume[name].clone() for name in ("image", "label")} for volume in volumes]
    patches = dataset(volumes, patch_size=size)
    for epoch in range(3):
        for index in range(len(volumes)):
            (sample,) = patches[(epoch, index)]
            for name in ("image", "label"):
                value = sample[name]
                assert value.shape[1:] == torch.Size(size)
                assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
                value.fill_(7)
    for volume, copies in zip(volumes, before, strict=True):
        assert all(torch.equal(volume[name], copy) for name, copy in copies.items())


def test_the_background_of_a_patch_stays_zero_and_its_label_moves_with_it(volumes):
    # nothing is cut off, so that a patch is its volume, moved; not square, as a turn would stand in for a flip
    whole = dataset(volumes, patch_size=[40, 44, 32])
    moved = {axis: 0 for axis in range(3)}
    augmented = 0
    for epoch in range(8):
        (sample,) = whole[(epoch, 1)]
        image, label = sample["image"], sample["label"][0]
        original = volumes[1]["image"]
        assert torch.equal(image.count_nonzero(dim=(1, 2, 3)), original.count_nonzero(dim=(1, 2, 3)))
        assert torch.equal(
            label.unique(return_counts=True)[1][1:], volumes[1]["label"].unique(return_counts=True)[1][1:]
        )
        assert (image != 0).all(dim=0)[label > 0].all()
        augmented += not torch.isin(image[0][image[0] != 0], original[0].float()).all()
        # where image and label are moved alike, edema is brighter than the rest in FLAIR, wherever it went
        inside = (image != 0).all(dim=0)
        assert image[0][label == 2].mean() > image[0][inside & (label == 0)].mean()
        for axis in moved:
            centre = inside.nonzero()[:, axis].float().mean()
            tumour = (label > 0).nonzero()[:, axis].float().mean()
            moved[axis] += int(tumour > centre)
    assert augmented > 2
    assert all(0 < count < 8 for count in moved.values())  # flipped along each axis, sometimes


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_of_patches_with_a_centre_in_the_tumour(volumes, share):
    # one voxel, so that the centre is all of it
    patches = dataset(volumes, patch_size=[1, 1, 1], tumour_share=share, patches_per_volume=20)
    found = [bool(sample["label"].any()) for sample in patches[(0, 0)]]
    assert found == [share == 1.0] * 20


def test_what_is_not_square_is_not_turned(volumes):
    square, other = dataset(volumes), dataset(volumes, patch_size=[16, 12, 8])
    assert [patches.transform.transforms[-1].prob for patches in (square, other)] == [0.5, 0.0]
    assert tuple(square.transform.transforms[-1].spatial_axes) == (0, 1)
    assert {tuple(other[(epoch, 0)][0]["image"].shape) for epoch in range(8)} == {(4, 16, 12, 8)}


def test_a_run_trains_and_validates_in_patches(trained):
    iterations, epochs = (pd.read_csv(trained / f"{name}.csv") for name in ("iterations", "epochs"))
    assert len(iterations) == 1
    assert np.isfinite(iterations.to_numpy()).all()
    assert {f"loss/{m}" for m in MODALITIES} <= set(iterations)
    for name in ("fusion", *MODALITIES):
        assert epochs[f"validation/{name}_dice_mean"].between(0, 1).all()
    weights = torch.load(trained / "model.pt", weights_only=True)["model"]
    assert weights["encoders.flair.trunk.conv1.weight"].dim() == 5
    assert weights["head.weight"].dim() == 5


def test_whole_volumes_are_scored_and_every_subset(trained, cases):
    names, words = of(cases, trained, "evaluate.yaml")
    run(*names, **words)
    run(*names, "protocols/subsets.yaml", **words)
    whole, subsets = (pd.read_csv(trained / f / "cases.csv") for f in ("validation", "validation_subsets"))
    predictors = [subset_predictor(subset, MODALITIES) for subset in modality_subsets(MODALITIES)]
    assert whole["predictor"].tolist() == ["fusion", *MODALITIES]
    assert subsets["predictor"].tolist() == [*predictors, *MODALITIES]
    same = [subsets[subsets["predictor"] == name].iloc[0, 2:].tolist() for name in whole["predictor"]]
    assert [row.tolist() for _, row in whole.iloc[:, 2:].iterrows()] == same


def test_new_cases_are_segmented_in_patches(trained, cases, tmp_path):
    network = tmp_path / "tiny.json"
    network.write_text(json.dumps({key: TINY[key] for key in NETWORK}))
    made = run(
        "inference.yaml",
        str(network),
        "protocols/patches_3d_inference.yaml",
        kind="infer",
        dataset_dir=str(cases / "in"),
        model_file=str(trained / "model.pt"),
        output_dir=str(tmp_path / "out"),
        patch_size=PATCH,
    )
    inferer = made.parser.get_parsed_content("inferer")
    assert type(inferer) is PatchInferer
    assert (list(inferer.roi_size), inferer.overlap) == (PATCH, 0.25)
    written = sorted((tmp_path / "out").glob("*.nii.gz"))
    assert len(written) == 4
    for index, file in enumerate(written):
        image = nib.load(cases / "in" / f"Phantom_00{index}" / f"Phantom_00{index}_flair.nii.gz")
        segmentation = nib.load(file)
        assert segmentation.shape == image.shape
        np.testing.assert_array_equal(segmentation.affine, image.affine)
        assert set(np.unique(segmentation.dataobj)) <= {0, 1, 2, 4}


def test_the_small_network_of_a_cpu_becomes_one_of_volumes(cases, tmp_path):
    names = ("train.yaml", "hardware/cpu.yaml", PATCHES)
    words = {"dataset_dir": str(cases / "in"), "run_dir": str(tmp_path), "split_sizes": [2, 1, 1]}
    made = workflow(*names, **words, patch_size=[32, 32, 32])
    network = made.parser.get_parsed_content("network")
    assert network.spatial_dims == 3
    encoder = network.encoders["flair"]
    assert (encoder.trunk.conv1.out_channels, encoder.output_stride, encoder.low_stride) == (12, 8, 2)
    inferer = made.parser.get_parsed_content("validate#inferer")
    assert (type(inferer), list(inferer.roi_size), inferer.sw_batch_size) == (PatchInferer, [32, 32, 32], 4)
    for size in ((32, 32, 32), (33, 30, 17)):
        logits = network(torch.randn(1, 4, *size, device=network.head.weight.device))
        assert logits.shape == (1, 4, *size)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def write_networks(folder):
    """Run folders of each modality alone, and of all, as far as a teacher is read from them."""
    size = {key: TINY[key] for key in NETWORK}
    size["encoder"] = {**size["encoder"], "spatial_dims": 3}
    for name, modalities in {**{m: [m] for m in MODALITIES}, "joint": MODALITIES}.items():
        (folder / name).mkdir(parents=True)
        network = MultimodalSegmenter(modalities, 4, **size)
        torch.save({"model": network.state_dict(), "epoch": 1}, folder / name / "model.pt")


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_method_and_part_trains_in_patches(overlay, cases, tmp_path):
    if overlay in ("methods/umt.yaml", "methods/g_blending.yaml"):  # they look for trained networks before long work
        write_networks(tmp_path / "teachers")
    before = () if overlay.startswith("methods/") else (f"methods/{AFTER.get(overlay, 'observe')}.yaml",)
    names, words = of(cases, tmp_path, *before, overlay)
    run(*names, **words)
    iterations, epochs = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("iterations", "epochs"))
    assert np.isfinite(iterations["train/loss"]).all()
    scores = [name for name in epochs if name.endswith("_dice_mean")]
    assert scores
    assert epochs[scores].apply(lambda column: column.between(0, 1)).all(axis=None)
