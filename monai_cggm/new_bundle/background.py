# SPDX-License-Identifier: Apache-2.0
"""Which value is the background of each modality: 0, or in CT a negative one, from which a bundle shifts it to 0."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from monai_cggm.discovery import Intensities, Survey
from monai_cggm.discovery.survey import RINGING
from monai_cggm.errors import DataError
from monai_cggm.new_bundle.texts import as_text

#: Air in Hounsfield units with its noise; lungs begin above it. It is not what the corners hold: outside of a scanner's
#: circle they hold padding without noise, while the air inside has some.
_AIR = -900.0


def choose_floors(
    survey: Survey, modalities: tuple[str, ...], wanted: Mapping[str, float | None]
) -> tuple[dict[str, float], dict[str, str]]:
    """Tell where each modality's background ends.

    Preparation takes exactly 0 for the background. A modality whose background is negative has a floor: from it the
    values are counted, and what is not above it becomes 0. The corners of the volumes tell, the first of these that
    holds for all cases:

    - No value is negative: no floor.
    - The corners are at -900 or lower: air in Hounsfield units, whose noise goes as far as that.
    - The smallest value is the same in all volumes and fills their corners: that one (CT cut off at -160).
    - The corners hold 0, and no value is as low as air: no floor (z-scores within a mask).
    - Negative values are small, a tenth of the highest value at most, and there is no ct in the modality's name: no
      floor (ringing of an interpolation).

    Args:
        survey: of the labelled cases.
        modalities: their names.
        wanted: what wins over the data: modality -> floor, None for a background of 0.

    Returns:
        Modality -> floor, of those that have one; and modality -> what was decided, in words, of those with negative
        values or a wish.

    Raises:
        DataError: where a wish names no modality or is no number, and where the data do not tell.

    Example:
        >>> from monai_cggm.discovery import CaseSurvey
        >>> case = CaseSurvey("p01", intensities={"ct": Intensities(-1024, 2000, -1020), "pet": Intensities(0, 9, 0)})
        >>> choose_floors(Survey((case,)), ("ct", "pet"), {})
        ({'ct': -900.0}, {'ct': '-900 and below: air in Hounsfield units'})
    """
    problems = floor_problems(modalities, wanted)
    if problems:
        raise DataError(problems)
    floors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for key in modalities:
        values = {case.case_id: case.intensities[key] for case in survey.cases if key in case.intensities}
        try:
            floor, reason = (wanted[key], "asked for") if key in wanted else _floor(key, values)
        except ValueError as error:
            problems.append(
                f"{key} has negative values, and where its background ends cannot be told: {error}; say it: --floor "
                f"{key}={plain_number(_AIR)} for air in CT, --floor {key}=none where the background is 0, or else the "
                f"highest value of the background"
            )
            continue
        if floor is not None:
            floors[key] = floor
        if reason:
            reasons[key] = f"{'0' if floor is None else f'{plain_number(floor)} and below'}: {reason}"
    if problems:
        raise DataError(problems)
    return floors, reasons


def floor_problems(modalities: Sequence[str], wanted: Mapping[str, float | None]) -> list[str]:
    """What is wrong with the floors that are wished for, which no data are needed to tell."""
    problems = [f"floor of {key}: expected one of {', '.join(modalities)}" for key in wanted if key not in modalities]
    return problems + [
        f"floor of {key}: found {floor}, expected a number"
        for key, floor in wanted.items()
        if floor is not None and not np.isfinite(floor)
    ]


def plain_number(value: float) -> int | float:
    """Return whole numbers as such, which are written without a point.

    Example:
        >>> plain_number(-1000.0), plain_number(-0.5)
        (-1000, -0.5)
    """
    return int(value) if value == int(value) else value


def above_background(image: np.ndarray, floor: float | None) -> np.ndarray:
    """Which voxels are not background."""
    return np.asarray(image != 0 if floor is None else image > floor)


def with_background(text: str, floors: Mapping[str, float]) -> str:
    """Let a configuration's preparation count from the floors, and crop to what is not background.

    Args:
        text: ``train.yaml`` or ``inference.yaml``.
        floors: modality -> floor, see :func:`choose_floors`.
    """
    # MONAI crops to values above 0; z-scores have values below, too
    text, crops = re.subn(r"(\n +|, )source_key: image\b", r"\g<0>\1select_fn: $torch.Tensor.bool", text)
    if crops != 1:
        raise ValueError(f"expected one crop to the foreground in the configuration, found {crops}")
    if not floors:
        return text
    values = {key: plain_number(floor) for key, floor in floors.items()}
    setting = as_text({"floors": (values, "what is not above it is background; in training and inference alike")})
    steps = "".join(
        f"  - _target_: ScaleIntensityRanged          # {key} - floor, not below 0\n    keys: {key}\n"
        f"    a_min: $@floors['{key}']\n    a_max: $@floors['{key}'] + 1\n    b_min: 0\n    clip: true\n"
        "    allow_missing_keys: true\n"
        for key in floors
    )
    text, settings = re.subn(r"(?m)^orientation: .*\n", lambda found: found[0] + setting, text)
    text, fills = re.subn(r"(?m)^  - .*\bFillMissingd\b", lambda found: steps + found[0], text)
    text, checks = re.subn(r"(?m)(\bValidateCased, .*)\}$", r"\1,\n     floors: '@floors'}", text)
    if (settings, fills, checks) != (1, 1, 1):
        raise ValueError("expected one orientation, one ValidateCased and one FillMissingd in the configuration")
    return text


def _floor(key: str, values: Mapping[str, Intensities]) -> tuple[float | None, str]:
    corners = {case: image.corners for case, image in values.items()}
    lowest = min((image.lowest for image in values.values()), default=0.0)
    if lowest >= 0:
        return None, ""
    if max(corners.values()) <= _AIR:
        return _AIR, "air in Hounsfield units"
    if all(image.lowest == image.corners == lowest for image in values.values()):
        return lowest, "the smallest value of all volumes, which fills their corners"
    if set(corners.values()) == {0} and lowest > _AIR:
        return None, "it fills the corners of all volumes; negative values belong to the object"
    small = all(image.lowest >= -RINGING * image.highest for image in values.values())
    if small and "ct" not in key:
        return None, "negative values are small, as interpolation makes them"
    low, high = min(corners, key=corners.__getitem__), max(corners, key=corners.__getitem__)
    raise ValueError(
        f"the corners hold {corners[low]:g} in case {low} and {corners[high]:g} in case {high}, the smallest value is "
        f"{lowest:g}"
    )
