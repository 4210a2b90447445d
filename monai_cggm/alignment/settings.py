# SPDX-License-Identifier: Apache-2.0
"""What `monai-cggm align` is told to do, and what its files are called."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import SimpleITK as sitk  # noqa: N813, as its own documentation does

from monai_cggm.data.layouts import LABEL, is_safe_id
from monai_cggm.errors import DataError

MASKS = ("none", "brain", "body")
LABEL_INTERPOLATIONS = {"nearest": sitk.sitkNearestNeighbor, "gaussian": sitk.sitkLabelGaussian}
#: What the command wrote of a case, and with which settings from which files.
RECORD = "align.json"
OVERLAY = "overlay.svg"
REPORT = "report.html"
#: Names that mean something else in a case's folder or in a datalist.
_TAKEN = ("seg", "mask", LABEL, "labels", "case", "patient")


@dataclass(frozen=True)
class AlignSettings:
    """What to do with every case.

    Attributes:
        reference: the modality on whose grid the others are resampled.
        modalities: those to align; a case may lack any but the reference.
        register: find a rigid transform for each other modality, by mutual information with the reference.
        n4: the modalities whose bias field is corrected, MR only.
        mask: ``none``, ``brain`` or ``body``, made from the reference and written as ``ID_mask.nii.gz``.
        apply_mask: also set the images outside the mask to their background.
        spacing: voxel size of the new grid in mm, None for the reference's own.
        label_interpolation: ``nearest`` or ``gaussian`` (the most likely label, smoother outlines).
        label_on: the modality on which the label was drawn and with which it moves, None for the reference.
        fill: modality -> value outside its field of view and its mask; for the others 0, or the image's own minimum
            where that is below minus a tenth of its maximum.

    Raises:
        DataError: lists everything that does not fit together.

    Example:
        >>> AlignSettings("ct", ("ct", "pet"), mask="body").drawn_on
        'ct'
        >>> AlignSettings("t1", ("ct", "pet"), apply_mask=True)
        Traceback (most recent call last):
        monai_cggm.errors.DataError: 2 problems:
          the reference is 't1', expected one of the modalities ct, pet
          the mask is to be applied, but none is to be made: expected mask brain or body
    """

    reference: str
    modalities: tuple[str, ...]
    register: bool = False
    n4: tuple[str, ...] = ()
    mask: str = "none"
    apply_mask: bool = False
    spacing: tuple[float, float, float] | None = None
    label_interpolation: str = "nearest"
    label_on: str | None = None
    fill: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = list(_settings_problems(self))
        if problems:
            raise DataError(problems)

    @property
    def drawn_on(self) -> str:
        """The modality with which the label moves."""
        return self.label_on or self.reference


def _settings_problems(settings: AlignSettings) -> Iterator[str]:
    names = settings.modalities
    listed = ", ".join(names)
    for name in names:
        if not is_safe_id(name) or name in _TAKEN:
            yield f"a modality is called {name!r}, expected a name for files, and none of {', '.join(_TAKEN)}"
    if len(set(names)) != len(names) or not names:
        yield f"the modalities are {listed or 'none'}, expected different names"
    if settings.reference not in names:
        yield f"the reference is {settings.reference!r}, expected one of the modalities {listed}"
    if settings.label_on is not None and settings.label_on not in names:
        yield f"the label is drawn on {settings.label_on!r}, expected one of the modalities {listed}"
    for what, chosen_names in (("N4 is for", settings.n4), ("a fill value is for", settings.fill)):
        for name in chosen_names:
            if name not in names:
                yield f"{what} {name!r}, expected one of the modalities {listed}"
    if settings.mask not in MASKS:
        yield f"the mask is {settings.mask!r}, expected one of {', '.join(MASKS)}"
    elif settings.apply_mask and settings.mask == "none":
        yield "the mask is to be applied, but none is to be made: expected mask brain or body"
    if settings.label_interpolation not in LABEL_INTERPOLATIONS:
        expected = ", ".join(LABEL_INTERPOLATIONS)
        yield f"the label interpolation is {settings.label_interpolation!r}, expected one of {expected}"
    spacing = settings.spacing
    if spacing is not None and (len(spacing) != 3 or not all(math.isfinite(size) and size > 0 for size in spacing)):
        yield f"the spacing is {', '.join(f'{size:g}' for size in spacing)}, expected three sizes above 0 mm"
    for name, value in settings.fill.items():
        if not math.isfinite(value):
            yield f"the fill value of {name} is {value}, expected a number"
