# SPDX-License-Identifier: Apache-2.0
"""Masks of the brain and of the body.

Otsu, A threshold selection method from gray-level histograms, IEEE SMC 1979.
"""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk  # noqa: N813, as its own documentation does

_STRIPPED = 0.25  # share of voxels that are exactly 0, from which on an image counts as stripped of its background
_AIR = -500.0  # HU, between air and fat


def mask_of(image: sitk.Image, kind: str) -> sitk.Image:
    """Find the ``brain`` or the ``body`` in an image, uint8, without holes; empty where there is none."""
    inside = _largest(_brain(image) if kind == "brain" else _body(image))
    filled = sitk.BinaryFillhole(inside) if kind == "brain" else _fill_slices(inside)
    return sitk.Cast(filled, sitk.sitkUInt8)


def _brain(image: sitk.Image) -> sitk.Image:
    """What is not 0 where the background was set to 0 already, else what Otsu's threshold leaves."""
    voxels = sitk.GetArrayViewFromImage(image)
    if np.count_nonzero(voxels == 0) >= _STRIPPED * voxels.size:
        return sitk.NotEqual(image, 0.0)
    return sitk.OtsuThreshold(image, 0, 1, 200)


def _body(image: sitk.Image) -> sitk.Image:
    """What is denser than air in CT, else what Otsu's threshold leaves; without thin things such as the table."""
    low = float(sitk.GetArrayViewFromImage(image).min())
    inside = sitk.Greater(image, _AIR) if low < _AIR else sitk.OtsuThreshold(image, 0, 1, 200)
    return sitk.BinaryMorphologicalOpening(inside, [2, 2, 2])


def _largest(inside: sitk.Image) -> sitk.Image:
    return sitk.Equal(sitk.RelabelComponent(sitk.ConnectedComponent(inside)), 1)


def _fill_slices(inside: sitk.Image) -> sitk.Image:
    """Fill holes slice by slice: lungs and gut are open at the ends of the field of view."""
    axial = sitk.DICOMOrient(inside, "LPS")
    slices = [sitk.BinaryFillhole(axial[:, :, z]) for z in range(axial.GetSize()[2])]
    filled = sitk.JoinSeries(slices)
    filled.CopyInformation(axial)
    orientation = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(inside.GetDirection())
    back = sitk.DICOMOrient(filled, orientation)
    back.CopyInformation(inside)
    return back
