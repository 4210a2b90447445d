# SPDX-License-Identifier: Apache-2.0
"""Align one case: its folder is made whole or not at all.

Tustison et al., N4ITK: improved N3 bias correction, IEEE TMI 2010.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813, as its own documentation does
from numpy.typing import NDArray

from monai_cggm.alignment.grids import box_of, covered_share, label_on_grid, label_volumes, new_grid, on_grid, span_text
from monai_cggm.alignment.images import one_thread, pixel_limits, read_header, read_image, read_label, write_image
from monai_cggm.alignment.masks import mask_of
from monai_cggm.alignment.registration import Move, registered
from monai_cggm.alignment.report import write_picture
from monai_cggm.alignment.settings import OVERLAY, RECORD, AlignSettings
from monai_cggm.data.checks import image_problem
from monai_cggm.data.layouts import LABEL
from monai_cggm.discovery.found import FoundCase, Source
from monai_cggm.discovery.sources import files_of
from monai_cggm.discovery.survey import RINGING
from monai_cggm.errors import CaseError

_FORMAT = 2

#: N4 takes every so many voxels along an axis, as its field is slow, and leaves so many at least
_N4_SHRINK, _N4_FEWEST = 4, 8


def align_case(case: FoundCase, out: Path, settings: AlignSettings) -> None:
    """Align one case and write its folder; the part of :func:`align` that a worker does.

    It is built in a hidden folder, which then takes the place of an older one; files of that one which are not this
    command's are carried over.

    Raises:
        CaseError: where a file cannot be used; nothing is written then.
    """
    part = part_folder(out, case)
    shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed
    part.mkdir(parents=True)
    try:
        with one_thread():
            _build(case, part, settings)
        _show(part, out / case.case_id)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def case_problems(case: FoundCase, settings: AlignSettings, out: Path) -> list[CaseError]:
    """What headers and the label tell about a case before any long work."""
    errors: list[CaseError] = []
    final = out / case.case_id
    if final.exists() and not (final / RECORD).is_file():
        message = f"its folder in the output exists and holds no {RECORD}: expected none, or one of an earlier run"
        errors.append(CaseError(case.case_id, message, final))
    if settings.reference not in case.images:
        found = ", ".join(case.images) or "none"
        message = f"has no {settings.reference}, which is the reference: found {found}"
        return [*errors, CaseError(case.case_id, message, case.place)]
    if case.label is not None and settings.drawn_on not in case.images:
        message = f"has no {settings.drawn_on}, on which its label was drawn: found {', '.join(case.images)}"
        errors.append(CaseError(case.case_id, message, case.place))
    boxes: dict[str, NDArray[np.float64]] = {}
    for key, source in case.sources().items():
        try:
            boxes[key] = box_of(read_header(source))
            if key == LABEL:
                read_label(source)
        except ValueError as error:
            errors.append(CaseError(case.case_id, f"{key} {error}", source.path))
    for key, box in boxes.items():
        reference = boxes.get(settings.reference)
        if reference is not None and (np.maximum(box[0], reference[0]) >= np.minimum(box[1], reference[1])).any():
            message = (
                f"{key} and {settings.reference} lie apart in space: {key} spans {span_text(box)}, "
                f"expected an overlap with {span_text(reference)}"
            )
            errors.append(CaseError(case.case_id, message, case.sources()[key].path))
    return errors


def _build(case: FoundCase, part: Path, settings: AlignSettings) -> None:
    inputs = _inputs(case)
    images = {name: _read_image(case, name, settings) for name in case.images}
    fills = {name: _fill_value(case, name, image, settings) for name, image in images.items()}
    for name in settings.n4:
        if name in images:
            images[name] = _bias_corrected(case, name, images[name])
    reference = images[settings.reference]
    moves = {
        name: registered(reference, image) if settings.register and name != settings.reference else Move()
        for name, image in images.items()
    }
    grid = new_grid(reference, settings.spacing)
    aligned = {name: on_grid(image, grid, moves[name].transform, fills[name]) for name, image in images.items()}
    covered = {name: covered_share(image, grid, moves[name].transform) for name, image in images.items()}
    for name, share in covered.items():
        if share == 0:
            message = f"{name} covers no voxel of {settings.reference}'s grid"
            raise CaseError(case.case_id, message, case.images[name].path)
    write_picture(images, aligned, moves, settings, part)
    outputs = dict(aligned)
    notes: list[str] = []
    if settings.mask != "none":
        outputs["mask"] = _case_mask(case, aligned[settings.reference], settings)
        if settings.apply_mask:
            outputs |= {name: sitk.Mask(image, outputs["mask"], fills[name]) for name, image in aligned.items()}
    volumes: dict[str, list[float]] = {}
    if case.label is not None:
        label = _case_label(case, case.label)
        move = moves[settings.drawn_on].transform
        outputs["seg"] = label_on_grid(label, grid, move, settings.label_interpolation)
        volumes = label_volumes(label, outputs["seg"])
        notes += _label_notes(volumes)
    files = [write_image(image, part / f"{case.case_id}_{name}.nii.gz") for name, image in outputs.items()]
    record = {
        "format": _FORMAT,
        "settings": _settings_record(settings),
        "inputs": inputs,
        "files": [*files, OVERLAY, RECORD],
        "space": "LPS, mm",
        "grid": _grid_record(grid),
        "modalities": {
            name: {
                "fill": fills[name],
                "n4": name in settings.n4,
                "covers": round(covered[name], 4),
                **moves[name].as_record(grid),
            }
            for name in images
        },
        "label_volumes_mm3": volumes,
        "notes": notes,
    }
    (part / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _read_image(case: FoundCase, name: str, settings: AlignSettings) -> sitk.Image:
    source = case.images[name]
    try:
        image = read_image(source)
    except ValueError as error:
        raise CaseError(case.case_id, f"{name} {error}", source.path) from error
    problem = image_problem(sitk.GetArrayViewFromImage(image))
    if problem is not None:
        raise CaseError(case.case_id, f"{name} {problem}", source.path)
    return image


def _case_mask(case: FoundCase, reference: sitk.Image, settings: AlignSettings) -> sitk.Image:
    mask = mask_of(reference, settings.mask)
    # Applied, it would leave no image; written, it is wrong of any case.
    if not sitk.GetArrayViewFromImage(mask).any():
        message = (
            f"the {settings.mask} mask of {settings.reference} has no voxel, expected at least one: "
            "choose another mask or none"
        )
        raise CaseError(case.case_id, message, case.images[settings.reference].path)
    return mask


def _case_label(case: FoundCase, source: Source) -> sitk.Image:
    try:
        return read_label(source)
    except ValueError as error:
        raise CaseError(case.case_id, f"{LABEL} {error}", source.path) from error


def _label_notes(volumes: Mapping[str, Sequence[float]]) -> list[str]:
    if not volumes:
        return ["label has no value but 0, as that of a healthy control"]
    return [f"label value {value} is lost on the new grid" for value, (_, new) in volumes.items() if new == 0]


def _fill_value(case: FoundCase, name: str, image: sitk.Image, settings: AlignSettings) -> float:
    voxels = sitk.GetArrayViewFromImage(image)
    value = float(settings.fill.get(name, _background(voxels)))
    if (
        np.issubdtype(voxels.dtype, np.integer)
        and voxels.dtype.type(np.clip(value, *pixel_limits(voxels.dtype))) != value
    ):
        message = f"{name} holds {voxels.dtype} voxels, which cannot be the fill value {value:g}"
        raise CaseError(case.case_id, message, case.images[name].path)
    return value


def _background(voxels: np.ndarray) -> float:
    """0, as training takes it; where values go far below, as in CT and not by an interpolation, the smallest."""
    lowest, highest = float(voxels.min()), float(voxels.max())
    return lowest if lowest < -RINGING * max(highest, 0.0) else 0.0


def _bias_corrected(case: FoundCase, name: str, image: sitk.Image) -> sitk.Image:
    """Divide an MR image by the slow field that N4 finds inside Otsu's mask, on a coarser grid; float32."""
    real = sitk.Cast(image, sitk.sitkFloat32)
    low = float(sitk.GetArrayViewFromImage(real).min())
    if low < 0:
        message = f"{name} has values down to {low:g}, expected 0 or more: N4 takes their logarithm, and is for MR"
        raise CaseError(case.case_id, message, case.images[name].path)
    mask = sitk.OtsuThreshold(real, 0, 1, 200)
    # An axis of few thick slices keeps enough of them for the field's splines.
    factors = [max(1, min(_N4_SHRINK, size // _N4_FEWEST)) for size in real.GetSize()]
    corrector = sitk.N4BiasFieldCorrectionImageFilter()
    corrector.Execute(sitk.Shrink(real, factors), sitk.Shrink(mask, factors))
    # SimpleITK divides in float64.
    return sitk.Cast(real / sitk.Exp(corrector.GetLogBiasFieldAsImage(real)), sitk.sitkFloat32)


def _inputs(case: FoundCase) -> dict[str, dict[str, int]]:
    """Size and time of change of each input. No names: they may be a patient's."""
    return {key: _state(source) for key, source in case.sources().items()}


def _state(source: Source) -> dict[str, int]:
    files = [path.stat() for path in files_of(source)]
    return {
        "bytes": sum(status.st_size for status in files),
        "mtime_ns": max((status.st_mtime_ns for status in files), default=0),
        **({"files": len(files)} if len(files) > 1 else {}),
        **({"channel": source.channel} if source.channel is not None else {}),
    }


def _settings_record(settings: AlignSettings) -> dict[str, Any]:
    return dict(json.loads(json.dumps({**asdict(settings), "label_on": settings.drawn_on})))


def record_of(folder: Path) -> dict[str, Any] | None:
    """What a case's folder says of how it was made; None where it says nothing, or in another format."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("format") == _FORMAT else None


def is_done(case: FoundCase, out: Path, settings: AlignSettings) -> bool:
    """Whether a case is there already, from the same inputs with the same settings, and whole."""
    folder = out / case.case_id
    record = record_of(folder)
    if record is None or _without_names(record.get("settings")) != _without_names(_settings_record(settings)):
        return False
    try:
        same = record.get("inputs") == _inputs(case)
    except OSError:
        return False
    return same and all((folder / name).is_file() for name in record.get("files", [RECORD]))


def _without_names(settings: Any) -> Any:
    """Settings without the data set's modalities: the inputs tell which of them the case has."""
    return {**settings, "modalities": None} if isinstance(settings, dict) else settings


def _grid_record(grid: sitk.Image) -> dict[str, Any]:
    return {
        "size": list(grid.GetSize()),
        "spacing": list(grid.GetSpacing()),
        "origin": list(grid.GetOrigin()),
        "direction": list(grid.GetDirection()),
    }


def part_folder(out: Path, case: FoundCase) -> Path:
    """The hidden folder in which a case is built."""
    return out / f".{case.case_id}.part"


def _show(part: Path, final: Path) -> None:
    """Give a finished folder its name, in place of an older one, whose other files are copied over before."""
    old = final.with_name(f".{final.name}.old")
    if old.exists() and not final.exists():
        os.replace(old, final)  # a run was killed between the two renames below
    shutil.rmtree(old, ignore_errors=True)
    if not final.exists():
        os.replace(part, final)
        return
    ours = (record_of(final) or {}).get("files", [])
    for path in final.iterdir():
        if path.name not in ours and not (part / path.name).exists():
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, part / path.name)
    os.replace(final, old)
    os.replace(part, final)
    shutil.rmtree(old)
