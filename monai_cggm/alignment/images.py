# SPDX-License-Identifier: Apache-2.0
"""Read and write images with SimpleITK: geometry and voxels, and nothing else of what a header says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813, as its own documentation does

from monai_cggm.analysis.pages import without_folders
from monai_cggm.data.checks import format_shape, read_voxels


def read_header(path: Path) -> sitk.ImageFileReader:
    """The header of one 3-D image of numbers; ValueError says what is wrong with it."""
    if not path.is_file():
        raise ValueError("does not exist")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(f"cannot be read: {itk_reason(error, path)}") from error
    size = reader.GetSize()
    if len(size) != 3 or min(size) < 2:
        raise ValueError(f"has shape {format_shape(size)}, expected a 3-D volume of at least two slices a side")
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if reader.GetNumberOfComponents() != 1 or "complex" in kind:
        raise ValueError(f"holds {kind} voxels of {reader.GetNumberOfComponents()} numbers, expected one real number")
    return reader


def itk_reason(error: Exception, path: Path | None = None) -> str:
    """ITK's own words on an error, without where in its source it was raised."""
    reason = (str(error).splitlines() or [""])[-1].removeprefix("sitk::ERROR: ").removeprefix("ITK ERROR: ")
    return _unnamed(reason, path)


def _unnamed(reason: str, path: Path | None) -> str:
    """A reason for the report: without folders, and without the file's name, which may be a patient's."""
    for name in () if path is None else (f'"{path}"', f"'{path}'", str(path), path.name):
        reason = reason.replace(name, "this file")
    return without_folders(reason)


def read_image(path: Path) -> sitk.Image:
    """Read an image without what its header says beside geometry; ValueError says what is wrong with it."""
    read_header(path)
    voxels = None
    if path.name.lower().endswith((".nii", ".nii.gz")):
        # ITK fills up a NIfTI file that ends too soon, reads its NaN as 0, and says nothing.
        voxels, problem = read_voxels(path)
        if problem is not None:
            raise ValueError(_unnamed(problem, path))
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise ValueError(f"cannot be read: {itk_reason(error, path)}") from error
    values = sitk.GetArrayViewFromImage(image) if voxels is None else voxels
    bad = int(values.size - np.count_nonzero(np.isfinite(values)))
    if bad:
        raise ValueError(f"has {bad} NaN or infinite voxels, expected finite values")
    return _bare(image)


def _bare(image: sitk.Image) -> sitk.Image:
    for key in image.GetMetaDataKeys():
        image.EraseMetaData(key)
    return image


def read_label(path: Path) -> sitk.Image:
    """Read a label in an integer type; ValueError says what is wrong with it."""
    image = read_image(path)
    voxels = sitk.GetArrayViewFromImage(image)
    if np.any(voxels != np.rint(voxels)):
        raise ValueError("holds fractions, expected whole numbers")
    if not voxels.any():
        raise ValueError("has no value but 0, expected at least one labelled voxel")
    if np.issubdtype(voxels.dtype, np.integer):
        return image
    return sitk.Cast(image, sitk.sitkUInt8 if voxels.min() >= 0 and voxels.max() <= 255 else sitk.sitkInt32)


def write_image(image: sitk.Image, path: Path) -> str:
    """Write an image, compressed, and return the file's name."""
    sitk.WriteImage(_bare(sitk.Image(image)), str(path), True)
    return path.name


def pixel_limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    """The lowest and the highest number that an integer type holds."""
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread a case: sums of several threads come in any order, and a registration then ends elsewhere."""
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    warns = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)
        sitk.ProcessObject.SetGlobalWarningDisplay(warns)
