# SPDX-License-Identifier: Apache-2.0
"""Bring the modalities of each case onto one grid: resampling, rigid registration, bias correction and masks.

Everything is done with SimpleITK. Places and shifts are in mm in its LPS space (x to the patient's left, y to the back,
z up), whose first two axes are NIfTI's with the other sign.
"""

from __future__ import annotations

from monai_cggm.alignment.case import align_case
from monai_cggm.alignment.cases import Aligned, align
from monai_cggm.alignment.registration import Move
from monai_cggm.alignment.settings import AlignSettings

__all__ = ["AlignSettings", "Aligned", "Move", "align", "align_case"]
