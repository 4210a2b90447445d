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
from monai_cggm.data.checks import read_voxels
from monai_cggm.discovery.convert import image_voxels
from monai_cggm.discovery.found import Source
from monai_cggm.discovery.sources import Grid, files_of, itk_affine, itk_image, read_grid, read_volumes


def read_header(source: Source) -> Grid:
    """The grid of one 3-D image of numbers; ValueError says what is wrong with it."""
    if not source.path.exists():
        raise ValueError("does not exist")
    if source.kind == "dicom":
        return _judged(source)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(source.path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(f"cannot be read: {itk_reason(error, source.path)}") from error
    size, axes = reader.GetSize(), reader.GetDimension()
    if axes != 3 or min(size) < 2 or reader.GetNumberOfComponents() > 1:
        _judged(source)
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if "complex" in kind:
        raise ValueError(f"holds {kind} voxels, expected real numbers")
    # ITK's geometry, also of a 4-D file: other readers choose otherwise where a header has two.
    direction = np.array(reader.GetDirection()).reshape(axes, axes)
    return Grid(size[:3], itk_affine(reader.GetSpacing(), reader.GetOrigin(), direction))


def _judged(source: Source) -> Grid:
    try:
        return read_grid(source)
    except ValueError as error:
        reason = str(error)
        for file in files_of(source) if source.kind == "dicom" else ():
            reason = _unnamed(reason, file)
        raise ValueError(_unnamed(reason, source.path)) from error


def itk_reason(error: Exception, path: Path | None = None) -> str:
    """ITK's own words on an error, without where in its source it was raised."""
    reason = (str(error).splitlines() or [""])[-1].removeprefix("sitk::ERROR: ").removeprefix("ITK ERROR: ")
    return _unnamed(reason, path)


def _unnamed(reason: str, path: Path | None) -> str:
    """A reason for the report: without folders, and without the file's name, which may be a patient's."""
    for name in () if path is None else (f'"{path}"', f"'{path}'", str(path), path.name):
        reason = reason.replace(name, "this file")
    return without_folders(reason)


def read_image(source: Source) -> sitk.Image:
    """Read an image without what its header says beside geometry; ValueError says what is wrong with it."""
    grid, path = read_header(source), source.path
    if source.kind == "dicom":
        array, _ = read_volumes(source)
        return itk_image(image_voxels(array[..., 0]), grid)
    voxels = None
    if path.name.lower().endswith((".nii", ".nii.gz")):
        # ITK fills up a NIfTI file that ends too soon, reads its NaN as 0, and says nothing.
        voxels, problem = read_voxels(path)
        if problem is not None:
            raise ValueError(_unnamed(problem, path))
    try:
        image = _one_channel(sitk.ReadImage(str(path)), source.channel or 0)
    except RuntimeError as error:
        raise ValueError(f"cannot be read: {itk_reason(error, path)}") from error
    values = sitk.GetArrayViewFromImage(image) if voxels is None else _nifti_channel(voxels, source.channel or 0)
    bad = int(values.size - np.count_nonzero(np.isfinite(values)))
    if bad:
        raise ValueError(f"has {bad} NaN or infinite voxels, expected finite values")
    return _bare(image)


def _one_channel(image: sitk.Image, channel: int) -> sitk.Image:
    if image.GetNumberOfComponentsPerPixel() > 1:
        image = sitk.VectorIndexSelectionCast(image, channel)
    axes = image.GetDimension()
    if axes == 3:
        return image
    size = [*image.GetSize()[:3], *[0] * (axes - 3)]
    index = [*[0] * (axes - 1), channel if image.GetSize()[-1] > 1 else 0]
    return sitk.Extract(image, size, index, sitk.ExtractImageFilter.DIRECTIONCOLLAPSETOSUBMATRIX)


def _nifti_channel(voxels: np.ndarray, channel: int) -> np.ndarray:
    return voxels if voxels.ndim == 3 else voxels.reshape(*voxels.shape[:3], -1)[..., channel]


def _bare(image: sitk.Image) -> sitk.Image:
    for key in image.GetMetaDataKeys():
        image.EraseMetaData(key)
    return image


def read_label(source: Source) -> sitk.Image:
    """Read a label in an integer type; ValueError says what is wrong with it."""
    image = read_image(source)
    voxels = sitk.GetArrayViewFromImage(image)
    if np.any(voxels != np.rint(voxels)):
        raise ValueError("holds fractions, expected whole numbers")
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
