# SPDX-License-Identifier: Apache-2.0
"""Pictures of the modalities over the reference, and a page with all cases."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813, as its own documentation does
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray

from monai_cggm.alignment.grids import on_grid
from monai_cggm.alignment.registration import BINS, Move
from monai_cggm.alignment.settings import OVERLAY, REPORT, AlignSettings
from monai_cggm.analysis.pages import DASH, Picture, Section, Table, page, without_folders
from monai_cggm.data.checks import format_shape
from monai_cggm.discovery.convert import DATALIST
from monai_cggm.errors import CaseError, some
from monai_cggm.files import atomic_path

_TILE = 128  # pixels along the longer side of a picture
_LEVELS = 32  # of grey in a picture, which keeps it small
_MOST_PICTURES = 24  # cases with pictures in the report
_PLANES = ("axial", "coronal", "sagittal")


def write_picture(
    images: Mapping[str, sitk.Image],
    aligned: Mapping[str, sitk.Image],
    moves: Mapping[str, Move],
    settings: AlignSettings,
    part: Path,
) -> None:
    """Draw each modality over the reference, before and after a registration, and the reference over itself."""
    reference = aligned[settings.reference]
    rows: list[tuple[str, sitk.Image]] = []
    for name, image in aligned.items():
        if name == settings.reference:
            continue
        if settings.register:
            low = float(sitk.GetArrayViewFromImage(images[name]).min())
            rows.append((f"{name}, before", on_grid(images[name], reference, sitk.Euler3DTransform(), low)))
        rows.append((f"{name}, refused" if moves[name].refused else name, image))
    rows = rows or [(settings.reference, reference)]
    with rc_context({"svg.hashsalt": "monai_cggm", "svg.fonttype": "path", "font.size": 8.0}):
        figure = Figure(figsize=(7.2, 2.4 * len(rows)))
        background = _tiles(reference)
        for i, (title, image) in enumerate(rows):
            tiles = zip(background, _tiles(image), _PLANES, strict=True)
            for j, ((below, aspect), (above, _), plane) in enumerate(tiles):
                # Placed by hand: a layout that is worked out takes longer than the rest of a small case.
                axis = figure.add_axes((j / 3 + 0.01, 1 - (i + 1 - 0.02) / len(rows), 0.31, 0.88 / len(rows)))
                axis.imshow(np.stack([below, above, above], axis=-1), aspect=aspect, interpolation="none")
                axis.set_axis_off()
                axis.set_title(f"{title}: {plane}", parse_math=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    (part / OVERLAY).write_bytes(buffer.getvalue())


def _tiles(image: sitk.Image) -> list[tuple[NDArray[np.uint8], float]]:
    """Middle slices in three planes as grey levels, the front or the top upwards, and height over width of a pixel."""
    oriented = sitk.DICOMOrient(image, "LPS")
    voxels = sitk.GetArrayViewFromImage(oriented)
    dx, dy, dz = oriented.GetSpacing()
    z, y, x = (n // 2 for n in voxels.shape)
    low, high = np.percentile(voxels[:: max(1, z // 16)], (1, 99.5)).astype(float)
    slices = ((voxels[z], dy, dx), (voxels[::-1, y], dz, dx), (voxels[::-1, :, x], dz, dy))
    return [_tile(plane, height, width, low, high) for plane, height, width in slices]


def _tile(plane: NDArray[Any], height: float, width: float, low: float, high: float) -> tuple[NDArray[np.uint8], float]:
    rows, columns = (math.ceil(n / _TILE) for n in plane.shape)
    grey = np.clip((plane[::rows, ::columns].astype(float) - low) / max(high - low, 1e-12), 0, 1)
    levels = np.rint(grey * (_LEVELS - 1)) * (255 / (_LEVELS - 1))
    return levels.astype(np.uint8), (height * rows) / (width * columns)


def unlisted_text(names: Sequence[str], datalist: str, most: int = 20) -> str:
    """What to do about folders in the output that are of earlier runs only.

    Example:
        >>> unlisted_text(["p03", "p07"], "out/datalist.json").split("; ")[0]
        'Folders of earlier runs that are not in out/datalist.json: p03, p07'
    """
    return (
        f"Folders of earlier runs that are not in {datalist}: {some(names, most)}; "
        f"remove them, or give {datalist}, since a command that is given the whole folder takes them in."
    )


def write_report(
    records: Mapping[str, Mapping[str, Any]],
    refused: Sequence[CaseError],
    unlisted: Sequence[str],
    settings: AlignSettings,
    out: Path,
) -> None:
    """Write the page with what was done to every case, which stands alone."""
    sections = [
        Section("What was done", bullets=_described(settings)),
        _refused_section(refused),
        Section("Folders of earlier runs", [unlisted_text(unlisted, DATALIST, len(unlisted))]) if unlisted else None,
        Section("Cases", _case_notes(records), blocks=[_case_table(records)] if records else []),
    ]
    if settings.register and records:
        sections.append(_registration_section(records))
    if records:
        sections.append(_picture_section(records, settings, out))
    with atomic_path(out / REPORT) as path:
        path.write_text(page("Aligned cases", [s for s in sections if s is not None]), encoding="utf-8")


def _described(settings: AlignSettings) -> list[str]:
    spacing = "its own" if settings.spacing is None else " × ".join(f"{size:g}" for size in settings.spacing) + " mm"
    lines = [
        f"Modalities: {', '.join(settings.modalities)}.",
        f"Grid: that of {settings.reference}; spacing: {spacing}.",
        "Images: linear interpolation, in their own units and voxel type. Outside an image's field of view stands 0, "
        "or its minimum where that is far below 0, as in CT"
        + "".join(f", {value:g} for {name}" for name, value in settings.fill.items())
        + ".",
        f"Labels: {settings.label_interpolation} interpolation; they move with {settings.drawn_on}; 0 outside.",
    ]
    if settings.register:
        lines.append(
            f"Registration to {settings.reference}: rigid, Mattes mutual information ({BINS} bins), three levels, "
            "from the centres of mass or the headers' positions, whichever fits better; what made it worse was refused."
        )
    if settings.n4:
        lines.append(f"N4 bias correction inside Otsu's mask: {', '.join(settings.n4)}; these are float32.")
    if settings.mask != "none":
        applied = "; images are set to their background outside it" if settings.apply_mask else ""
        lines.append(f"Mask: {settings.mask}, from {settings.reference}{applied}.")
    return lines


def _refused_section(refused: Sequence[CaseError]) -> Section | None:
    if not refused:
        return None
    bullets = [f"{error.case}: {without_folders(error.problem)}" for error in refused]
    return Section("Refused cases", ["These are not in the data set."], bullets=bullets)


def _case_notes(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    notes = [f"{case_id}: {note}." for case_id, record in records.items() for note in record["notes"]]
    return notes if records else ["No case could be aligned."]


def _case_table(records: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = []
    for case_id, record in records.items():
        grid = record["grid"]
        covers = ", ".join(f"{name} {facts['covers']:.0%}" for name, facts in record["modalities"].items())
        spacing = " × ".join(f"{size:.4g}" for size in grid["spacing"])
        rows.append([case_id, format_shape(grid["size"]), spacing, covers])
    caption = "The new grids, and how much of each lies in the field of view of each modality."
    return Table(caption, ["case", "voxels", "spacing (mm)", "covered by"], rows)


def _registration_section(records: Mapping[str, Mapping[str, Any]]) -> Section:
    rows = []
    for case_id, record in records.items():
        for name, facts in record["modalities"].items():
            if "shift_mm" not in facts:
                continue
            information = [DASH if value is None else f"{value:.4f}" for value in facts["mutual_information"]]
            places = ["  ".join(f"{part:.2f}" for part in facts[key]) for key in ("angles_degrees", "shift_mm")]
            rows.append([case_id, name, *places, *information, facts["refused"] or "taken"])
    header = ["case", "modality", "angles (°)", "shift (mm)", "before", "after", "outcome"]
    caption = "Angles about x, y, z, the shift of the grid's centre, and mutual information (nats) with the reference."
    text = (
        "A transform leads from a point of the reference to the point of the modality that shows the same tissue; x is "
        "to the patient's left, y to the back, z up. Where one was refused, the modality kept its header's place."
    )
    return Section("Registration", [text], blocks=[Table(caption, header, rows)])


def _picture_section(records: Mapping[str, Mapping[str, Any]], settings: AlignSettings, out: Path) -> Section:
    first = sorted(records, key=lambda case_id: _interest(records[case_id]))
    pictures = [
        Picture(
            (out / case_id / OVERLAY).read_bytes(),
            f"Overlays of the modalities of {case_id} on {settings.reference}, in three planes.",
            case_id,
            case_id,
        )
        for case_id in first[:_MOST_PICTURES]
    ]
    text = (
        f"Middle slices: {settings.reference} in red, the other modality in cyan; where both are equally bright it is "
        "grey. The patient's left is on the right."
    )
    if len(first) > _MOST_PICTURES:
        text += (
            f" Shown are {_MOST_PICTURES} of {len(first)} cases, those first whose registration was refused or moved "
            f"them most; each case's folder has its own as {OVERLAY}."
        )
    return Section("Overlays", [text], blocks=pictures)


def _interest(record: Mapping[str, Any]) -> tuple[bool, float]:
    shifts = [math.hypot(*facts["shift_mm"]) for facts in record["modalities"].values() if "shift_mm" in facts]
    return not not_registered(record), -max(shifts, default=0.0)


def not_registered(record: Mapping[str, Any]) -> list[str]:
    """The modalities of a case whose registration was refused."""
    return [name for name, facts in record["modalities"].items() if facts.get("refused")]
