# SPDX-License-Identifier: Apache-2.0
"""Data sets of random volumes with a bright box, in the layouts in which people keep them."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (36, 40, 8)
#: slices five times as thick as wide, along head-feet
AFFINE = np.diag([-1.0, -1.0, 5.0, 1.0])
#: voxels that are cubes: patches
CUBES = np.diag([-1.0, -1.0, 1.0, 1.0])
PATIENTS = ("p01", "p02", "p03", "p04")


def volumes(patient: int, modalities: int = 2) -> tuple[list[np.ndarray], np.ndarray]:
    """Images that are brighter where the label is 2, darker where it is 1, and 0 at the border; and that label."""
    generator = np.random.default_rng(patient)
    label = np.zeros(SHAPE, np.uint8)
    label[8:26, 10:30, 2:6] = 2
    label[12:18, 14:22, 3:5] = 1
    images = []
    for number in range(modalities):
        image = generator.normal(100 + 10 * number, 5, SHAPE) + 60.0 * (label == 2) - 40.0 * (label == 1)
        image[:2] = image[-2:] = image[:, :2] = image[:, -2:] = 0
        images.append(image.astype(np.float32))
    return images, label


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)


def folders(root: Path, modalities: tuple[str, ...] = ("T2", "ADC"), affine: np.ndarray = AFFINE) -> Path:
    """A folder a patient, a file a modality."""
    for number, patient in enumerate(PATIENTS):
        images, label = volumes(number, len(modalities))
        for name, image in zip(modalities, images, strict=True):
            save(root / patient / f"{patient}_{name}.nii.gz", image, affine)
        save(root / patient / f"{patient}_seg.nii.gz", label, affine)
    return root


def nnunet(root: Path, affine: np.ndarray = AFFINE) -> Path:
    """nnU-Net's raw data."""
    for number, patient in enumerate(PATIENTS):
        images, label = volumes(number)
        for channel, image in enumerate(images):
            save(root / "imagesTr" / f"{patient}_{channel:04d}.nii.gz", image, affine)
        save(root / "labelsTr" / f"{patient}.nii.gz", label, affine)
    content = {
        "channel_names": {"0": "T2", "1": "ADC"},
        "labels": {"background": 0, "transition zone": 1, "peripheral zone": 2},
        "numTraining": len(PATIENTS),
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def msd(root: Path) -> Path:
    """The Medical Segmentation Decathlon's: one file of all modalities."""
    for number, patient in enumerate(PATIENTS):
        images, label = volumes(number)
        save(root / "imagesTr" / f"{patient}.nii.gz", np.stack(images, axis=-1))
        save(root / "labelsTr" / f"{patient}.nii.gz", label)
    listed = [{"image": f"./imagesTr/{p}.nii.gz", "label": f"./labelsTr/{p}.nii.gz"} for p in PATIENTS]
    content = {
        "modality": {"0": "T2", "1": "ADC"},
        "labels": {"0": "background", "1": "TZ", "2": "PZ"},
        "training": listed,
        "test": [],
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def bids(root: Path) -> Path:
    """BIDS, with the labels among the derivatives."""
    for number, patient in enumerate(PATIENTS):
        images, label = volumes(number)
        for suffix, image in zip(("T2w", "FLAIR"), images, strict=True):
            save(root / f"sub-{patient}" / "anat" / f"sub-{patient}_{suffix}.nii.gz", image)
        save(root / "derivatives" / "masks" / f"sub-{patient}" / "anat" / f"sub-{patient}_dseg.nii.gz", label)
    (root / "dataset_description.json").write_text(json.dumps({"Name": "test", "BIDSVersion": "1.8.0"}))
    return root
