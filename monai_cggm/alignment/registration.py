# SPDX-License-Identifier: Apache-2.0
"""Find how a modality moved against the reference: rigid, by mutual information.

Mattes et al., PET-CT image registration in the chest using free-form deformations, IEEE TMI 2003.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813, as its own documentation does

from monai_cggm.alignment.grids import covered_share
from monai_cggm.alignment.images import itk_reason

_SEED = 20
BINS = 50
_SAMPLES = 60_000  # voxels of the reference that one step of a registration looks at
_PYRAMID = ((4, 4.0), (2, 2.0), (1, 1.0))  # shrink factor, smoothing in mm
_FEWEST = 16  # slices that a level of the pyramid keeps along each axis


@dataclass(frozen=True)
class Move:
    """How a modality moves: identity unless a registration found something better.

    Attributes:
        transform: from points of the reference to points of the modality, LPS mm.
        information: Mattes mutual information (nats) with the reference before and after, None where not registered.
        refused: why what the registration found was not taken.
    """

    transform: sitk.Euler3DTransform = field(default_factory=sitk.Euler3DTransform)
    information: tuple[float | None, float | None] | None = None
    refused: str | None = None

    def as_record(self, grid: sitk.Image) -> dict[str, Any]:
        """Angles, and the shift of the grid's centre, which does not depend on the centre of rotation."""
        if self.information is None:
            return {}
        centre = np.array(grid.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in grid.GetSize()]))
        shift = np.array(self.transform.TransformPoint(centre.tolist())) - centre
        angles = (self.transform.GetAngleX(), self.transform.GetAngleY(), self.transform.GetAngleZ())
        return {
            "angles_degrees": [round(math.degrees(angle), 4) for angle in angles],
            "shift_mm": [round(float(part), 4) for part in shift],
            "centre_mm": [round(float(part), 4) for part in centre],
            "mutual_information": list(self.information),
            "refused": self.refused,
        }


def registered(reference: sitk.Image, image: sitk.Image) -> Move:
    """Find the rigid transform from the reference to an image, or say why it stays where it is."""
    fixed, moving = _from_zero(reference), _from_zero(image)
    identity = _identity(fixed)
    before = _information(fixed, moving, identity)
    try:
        transform = _search(fixed, moving, _start(fixed, moving, before))
    except RuntimeError as error:
        return Move(information=(before, None), refused=f"it failed: {itk_reason(error)}")
    after = _information(fixed, moving, transform)
    if after is None or (before is not None and after <= before):
        return Move(information=(before, after), refused="it made the mutual information worse")
    # Mutual information only sees what overlaps, and may call a corner that fits a success.
    if covered_share(image, reference, transform) < covered_share(image, reference, identity) / 2:
        return Move(information=(before, after), refused="it moved half of the overlap out of view")
    return Move(transform, (before, after))


def _from_zero(image: sitk.Image) -> sitk.Image:
    """Float32 from 0 on: the centre of mass of CT's negative numbers is nowhere."""
    real = sitk.Cast(image, sitk.sitkFloat32)
    return real - float(sitk.GetArrayViewFromImage(real).min())


def _identity(image: sitk.Image) -> sitk.Euler3DTransform:
    transform = sitk.Euler3DTransform()
    transform.SetCenter(image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()]))
    return transform


def _start(fixed: sitk.Image, moving: sitk.Image, before: float | None) -> sitk.Euler3DTransform:
    """The images' centres of mass one on the other, or both as they are where that fits better already."""
    moments = sitk.Euler3DTransform(
        sitk.CenteredTransformInitializer(
            fixed, moving, sitk.Euler3DTransform(), sitk.CenteredTransformInitializerFilter.MOMENTS
        )
    )
    found = _information(fixed, moving, moments)
    if found is None or (before is not None and before >= found):
        return _identity(fixed)
    return moments


def _method(fixed: sitk.Image, shrinks: Sequence[int]) -> sitk.ImageRegistrationMethod:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetMetricSamplingStrategy(method.RANDOM)
    shares = [min(1.0, _SAMPLES * shrink**3 / fixed.GetNumberOfPixels()) for shrink in shrinks]
    method.SetMetricSamplingPercentagePerLevel(shares, _SEED)
    return method


def _information(fixed: sitk.Image, moving: sitk.Image, transform: sitk.Transform) -> float | None:
    """Mattes mutual information in nats, None where the images do not overlap."""
    method = _method(fixed, [1])
    method.SetInitialTransform(sitk.Euler3DTransform(transform), False)
    try:
        value = float(-method.MetricEvaluate(fixed, moving))
    except RuntimeError:
        return None
    return round(value, 6) if math.isfinite(value) and value > 0 else None


def _search(fixed: sitk.Image, moving: sitk.Image, start: sitk.Euler3DTransform) -> sitk.Euler3DTransform:
    """Find the rigid transform with the most mutual information, from coarse to fine."""
    most = max(1, min(fixed.GetSize()) // _FEWEST)
    shrinks = [min(shrink, most) for shrink, _ in _PYRAMID]
    method = _method(fixed, shrinks)
    method.SetShrinkFactorsPerLevel(shrinks)
    method.SetSmoothingSigmasPerLevel([sigma for _, sigma in _PYRAMID])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=4.0, minStep=1e-3, numberOfIterations=300, relaxationFactor=0.8, gradientMagnitudeTolerance=1e-8
    )
    method.SetOptimizerScalesFromPhysicalShift()
    found = sitk.Euler3DTransform(start)
    method.SetInitialTransform(found, True)  # in its place: what Execute returns has another type
    method.Execute(fixed, moving)
    return found
