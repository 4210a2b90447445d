# SPDX-License-Identifier: Apache-2.0
"""Grids in space, and images and labels on them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk  # noqa: N813, as its own documentation does
from numpy.typing import NDArray

from monai_cggm.alignment.images import pixel_limits
from monai_cggm.alignment.settings import LABEL_INTERPOLATIONS
from monai_cggm.discovery.sources import Grid

_SAME_PLACE = 1e-3  # mm between voxels that count as one


def box_of(grid: Grid) -> NDArray[np.float64]:
    """Lowest and highest coordinates (2, 3) of a grid's outer corners, LPS mm."""
    size = np.array(grid.shape, dtype=float)
    corners = np.array([(np.array(corner) * size - 0.5) for corner in np.ndindex(2, 2, 2)])
    places = (corners @ grid.affine[:3, :3].T + grid.affine[:3, 3]) * (-1, -1, 1)
    return np.stack([places.min(axis=0), places.max(axis=0)])


def span_text(box: NDArray[np.float64]) -> str:
    """A box in words, for messages."""
    return ", ".join(f"{axis} {low:.0f} to {high:.0f}" for axis, low, high in zip("xyz", *box, strict=True)) + " mm"


def new_grid(reference: sitk.Image, spacing: Sequence[float] | None) -> sitk.Image:
    """An empty image on the reference's grid, or on one of another spacing that starts at the same outer corner."""
    old = np.array(reference.GetSpacing())
    new = old if spacing is None else np.array(spacing, dtype=float)
    size = np.maximum(1, np.rint(np.array(reference.GetSize()) * old / new)).astype(int)
    grid = sitk.Image(size.tolist(), sitk.sitkUInt8)
    grid.SetSpacing(new.tolist())
    grid.SetDirection(reference.GetDirection())
    grid.SetOrigin(reference.TransformContinuousIndexToPhysicalPoint(((new / old - 1) / 2).tolist()))
    return grid


def on_grid(image: sitk.Image, grid: sitk.Image, transform: sitk.Transform, fill: float) -> sitk.Image:
    """Interpolate linearly, in the image's own voxel type."""
    if _same_places(image, grid, transform):
        return image
    kind = image.GetPixelID()
    if kind in (sitk.sitkFloat32, sitk.sitkFloat64):
        return sitk.Resample(image, grid, transform, sitk.sitkLinear, fill, kind)
    # ITK itself cuts fractions off.
    real = sitk.Resample(image, grid, transform, sitk.sitkLinear, fill, sitk.sitkFloat64)
    dtype = sitk.GetArrayViewFromImage(image).dtype
    voxels = np.clip(np.rint(sitk.GetArrayViewFromImage(real)), *pixel_limits(dtype)).astype(dtype)
    rounded = sitk.GetImageFromArray(voxels)
    rounded.CopyInformation(grid)
    return rounded


def label_on_grid(label: sitk.Image, grid: sitk.Image, transform: sitk.Transform, how: str) -> sitk.Image:
    """Resample a label, ``how`` it is interpolated, and keep its values."""
    if _same_places(label, grid, transform):
        return label
    return sitk.Resample(label, grid, transform, LABEL_INTERPOLATIONS[how], 0, label.GetPixelID())


def _same_places(image: sitk.Image, grid: sitk.Image, transform: sitk.Transform) -> bool:
    if image.GetSize() != grid.GetSize():
        return False
    corners = [[(n - 1) * corner for n, corner in zip(grid.GetSize(), c, strict=True)] for c in np.ndindex(2, 2, 2)]
    places = np.array([image.TransformContinuousIndexToPhysicalPoint(corner) for corner in corners])
    asked = np.array([transform.TransformPoint(grid.TransformContinuousIndexToPhysicalPoint(c)) for c in corners])
    return bool(np.abs(places - asked).max() <= _SAME_PLACE)


def covered_share(image: sitk.Image, grid: sitk.Image, transform: sitk.Transform) -> float:
    """Share of the grid's voxels that lie in the image's field of view."""
    ones = sitk.Image(image.GetSize(), sitk.sitkUInt8) + 1
    ones.CopyInformation(image)
    seen = sitk.Resample(ones, grid, transform, sitk.sitkNearestNeighbor, 0, sitk.sitkUInt8)
    return float(sitk.GetArrayViewFromImage(seen).mean())


def label_volumes(label: sitk.Image, moved: sitk.Image) -> dict[str, list[float]]:
    """Label value -> volume in mm³ on its own grid and on the new one."""
    sizes = [math.prod(image.GetSpacing()) for image in (label, moved)]
    arrays = [sitk.GetArrayViewFromImage(image) for image in (label, moved)]
    return {
        str(value): [round(int(np.sum(a == value)) * size, 3) for a, size in zip(arrays, sizes, strict=True)]
        for value in np.unique(arrays[0])
        if value != 0
    }
