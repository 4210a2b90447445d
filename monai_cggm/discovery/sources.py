# SPDX-License-Identifier: Apache-2.0
"""Read volumes as they lie on a disk: a NIfTI file, a file that SimpleITK reads, a folder with one DICOM series."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813, as its own documentation does

from monai_cggm.data.checks import format_shape, read_voxels
from monai_cggm.discovery.found import Kind, Source
from monai_cggm.errors import some

T = TypeVar("T")

#: DICOM's names of an object that is no image.
_NO_IMAGE = {"SEG", "RTSTRUCT", "RTPLAN", "SR", "PR", "KO"}
#: The class that a DICOM file begins with, and those of waveforms, presentation states, raw data, reports, documents,
#: radiotherapy: a folder of slices may hold such files too.
_CLASS = re.compile(rb"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(\d+)")
_NO_SLICES = {b"9", b"11", b"66", b"88", b"104", b"481"}
#: From ITK's axes (left, posterior, superior) to NIfTI's (right, anterior, superior).
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


class SeveralSeriesError(ValueError):
    """A folder that holds several DICOM series.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        super().__init__(f"holds {count} DICOM series, expected one folder a series")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.count,)


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a volume are.

    Attributes:
        shape: voxels along the three axes.
        affine: 4 x 4, voxel index -> mm, axes to the right, to the front and up (as NIfTI's).
        channels: volumes in the file.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    channels: int = 1


def read_grid(source: Source) -> Grid:
    """Read a volume's geometry, not its voxels (of a DICOM series: the headers of all slices).

    Raises:
        ValueError: says what is wrong with the file, which it does not name: unreadable, 2-D, more than four axes,
            colours, an affine that maps no volume; a DICOM folder with another number of series than one, with slices
            that cannot be read (these it names), or whose slices make no regular grid.
    """
    grid = _guarded(lambda: _GRIDS[source.kind](source.path))
    if source.channel is not None and source.channel >= grid.channels:
        raise ValueError(f"has {grid.channels} channels, expected one with number {source.channel} (the first is 0)")
    if source.channel is None and grid.channels > 1:
        shape = format_shape((*grid.shape, grid.channels))
        raise ValueError(f"has shape {shape}, expected one 3-D volume: nothing names its {grid.channels} channels")
    return grid


def read_volumes(source: Source) -> tuple[np.ndarray, Grid]:
    """Read all voxels of a source's file, whichever its channel.

    Returns:
        The array ``(X, Y, Z, channels)`` in the file's own type (scaled where it says so), and the grid.

    Raises:
        ValueError: as :func:`read_grid`, and for files that end too early or are corrupt.
    """
    grid = read_grid(source)
    array = _guarded(lambda: _VOXELS[source.kind](source.path))
    return array.reshape((*grid.shape, grid.channels)), grid


def files_of(source: Source) -> list[Path]:
    """The files that a source's voxels are in, sorted: the slices of a DICOM series, a header and what is beside it."""
    path = source.path
    if path.is_dir():
        return sorted(path.iterdir())
    # An .mhd or .nhdr file has its voxels in another one beside it.
    detached = path.suffix.lower() in (".mhd", ".nhdr")
    return sorted(file for file in path.parent.iterdir() if file.stem == path.stem) if detached else [path]


def is_plain(source: Source) -> bool:
    """Whether a source is a 3-D NIfTI file, which needs no conversion."""
    return source.kind == "nifti" and source.channel is None and len(nib.load(source.path).shape) == 3


def series_description(folder: Path) -> str:
    """What a DICOM series says of its sequence. It may name a person: never print it.

    Raises:
        SeveralSeriesError: where the folder holds several, which no one description tells.
    """
    try:
        tags = _header(_series(folder)[0])
    except SeveralSeriesError:
        raise
    except (ValueError, RuntimeError):
        return ""
    told = [tags.GetMetaData(tag) for tag in ("0008|103e", "0018|1030", "0008|0060") if tags.HasMetaDataKey(tag)]
    return " ".join("PET" if text.strip() == "PT" else text for text in told)  # DICOM's code for it


def has_few_integers(source: Source, most: int = 32) -> bool:
    """Whether a volume holds two to ``most`` different values, all of them whole and none negative, as labels do."""
    try:
        values = np.unique(read_volumes(source)[0])
    except ValueError:
        return False
    return 1 < len(values) <= most and bool(np.all(np.isfinite(values))) and bool(np.all(values == np.abs(values // 1)))


def itk_image(array: np.ndarray, grid: Grid) -> sitk.Image:
    """An ITK image of one volume, whose array has the axes X, Y, Z."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    affine = _LPS_TO_RAS @ grid.affine  # its own inverse
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    return image


def _guarded(read: Callable[[], T]) -> T:
    try:
        return read()
    except ValueError:
        raise
    except Exception as error:  # of a dozen kinds, and each means that the file is no good
        # SimpleITK ends its long messages with what matters.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"cannot be read: {lines[-1] if lines else type(error).__name__}") from error


def _checked(shape: Sequence[int], affine: np.ndarray, channels: int) -> Grid:
    sizes = tuple(int(n) for n in shape)
    if len(sizes) < 3 or 1 in sizes:
        raise ValueError(f"is 2-D (shape {format_shape(sizes)}), expected a 3-D volume")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ValueError(f"has an affine that maps no volume: {affine.tolist()}")
    return Grid(sizes, affine, channels)


def _nifti_grid(path: Path) -> Grid:
    try:
        image = nib.load(path)
        shape, affine = image.shape, np.asarray(image.affine, dtype=float)
    except Exception as error:  # nibabel's own kinds are no ValueErrors, and some of those that are say little
        raise ValueError(f"cannot be read: {(str(error).splitlines() or [''])[0] or type(error).__name__}") from error
    if image.get_data_dtype().names:
        raise ValueError("holds colours, expected one number a voxel")
    if len(shape) == 5 and shape[3] == 1:  # NIfTI's own way to store vectors, which ITK uses
        shape = (*shape[:3], shape[4])
    if len(shape) > 4:
        raise ValueError(f"has shape {format_shape(shape)}, expected three axes, or four with channels")
    return _checked(shape[:3], affine, int(shape[3]) if len(shape) == 4 else 1)


def _nifti_voxels(path: Path) -> np.ndarray:
    array, problem = read_voxels(path)
    if array is None:
        raise ValueError(problem)
    return array


def _header(path: Path | str) -> Any:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


def itk_affine(spacing: Sequence[float], origin: Sequence[float], direction: np.ndarray) -> np.ndarray:
    """NIfTI's affine of an ITK image; of more than three axes, the first three count.

    Example:
        >>> itk_affine((1.0, 2.0, 3.0), (5.0, 6.0, 7.0), np.eye(3)).tolist()
        [[-1.0, 0.0, 0.0, -5.0], [0.0, -2.0, 0.0, -6.0], [0.0, 0.0, 3.0, 7.0], [0.0, 0.0, 0.0, 1.0]]
    """
    affine = np.eye(4)
    affine[:3, :3] = direction[:3, :3] * np.asarray(spacing[:3])
    affine[:3, 3] = origin[:3]
    return _LPS_TO_RAS @ affine


def _image_grid(path: Path) -> Grid:
    header = _header(path)
    size, axes = header.GetSize(), header.GetDimension()
    if axes < 3:
        raise ValueError(f"is 2-D (shape {format_shape(size)}), expected a 3-D volume")
    if axes > 4 or (axes == 4 and header.GetNumberOfComponents() > 1):
        raise ValueError(f"has shape {format_shape(size)}, expected three axes, or four with channels")
    direction = np.array(header.GetDirection()).reshape(axes, axes)
    channels = size[3] if axes == 4 else header.GetNumberOfComponents()
    return _checked(size[:3], itk_affine(header.GetSpacing(), header.GetOrigin(), direction), channels)


def _image_voxels(path: Path) -> np.ndarray:
    image = sitk.ReadImage(str(path))
    return _as_xyz(sitk.GetArrayFromImage(image), vector=image.GetNumberOfComponentsPerPixel() > 1)


def _as_xyz(array: np.ndarray, *, vector: bool = False) -> np.ndarray:
    """From ITK's order of axes (channel of a 4-D image first, components last) to X, Y, Z, channel."""
    return np.moveaxis(array, (0, 2), (2, 0)) if vector else array.T


def _series(folder: Path) -> list[str]:
    identifiers = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if len(identifiers) > 1:
        raise SeveralSeriesError(len(identifiers))
    if not identifiers:
        raise ValueError("holds 0 DICOM series, expected an image series (convert SEG and RTSTRUCT to NIfTI first)")
    files = list(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), identifiers[0]))
    header = _header(files[0])
    modality = header.GetMetaData("0008|0060").strip() if header.HasMetaDataKey("0008|0060") else ""
    if modality in _NO_IMAGE:
        raise ValueError(f"is a DICOM {modality} object, expected an image series: convert it to NIfTI first")
    return files


def _refuse_bad_slices(folder: Path, files: Sequence[str]) -> None:
    """GDCM leaves out what it cannot read: a gap, or a slice less at an end of the stack, is all that would be left."""
    names = {Path(file).name for file in files}
    kinds = {_kind_of_name(name) for name in names}
    others = [path for path in sorted(folder.iterdir()) if path.name not in names and not path.name.startswith(".")]
    bad = [path.name for path in others if _kind_of_name(path.name) in kinds and _is_bad_slice(path)]
    if bad:
        raise ValueError(f"has {len(bad)} slices that cannot be read ({some(bad)}), expected whole DICOM files")


def _kind_of_name(name: str) -> str:
    """The ending, where it has letters; of ``IM0001`` and ``1.2.840.5`` the whole name but for its numbers."""
    ending = Path(name).suffix
    return ending.lower() if re.search("[A-Za-z]", ending) else re.sub(r"\d+", "#", name)


def _is_bad_slice(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        told = _CLASS.search(stream.read(2048))
    if told is not None and told[1] in _NO_SLICES:
        return False
    try:
        _header(path)
    except RuntimeError:
        return True
    return False


def _dicom_grid(folder: Path) -> Grid:
    files = _series(folder)
    _refuse_bad_slices(folder, files)
    if len(files) == 1:
        return _image_grid(Path(files[0]))
    headers = [_header(file) for file in files]
    shapes = {header.GetSize()[:2] for header in headers}
    if len(shapes) > 1:
        raise ValueError(f"has slices of different sizes: {', '.join(sorted(map(format_shape, shapes)))}")
    directions = np.array([header.GetDirection()[:9] for header in headers]).reshape(-1, 3, 3)
    if np.abs(directions - directions[0]).max() > 1e-3:
        raise ValueError("has slices that are not parallel, expected one stack of slices")
    origins = np.array([header.GetOrigin()[:3] for header in headers])
    steps = np.diff(origins, axis=0)
    along = steps @ directions[0][:, 2]
    step = float(np.median(along))
    # GDCM sorts by place, and gives up where places repeat.
    if np.diff(np.sort(origins @ directions[0][:, 2])).min() < 1e-3:
        raise ValueError("has several slices in one place: a series of several volumes (time points, b-values)")
    if np.abs(along - step).max() > 0.1 * abs(step):
        raise ValueError(
            f"has slices {np.abs(along).min():.3g} to {np.abs(along).max():.3g} mm apart: is a slice missing?"
        )
    if np.linalg.norm(steps - np.outer(along, directions[0][:, 2]), axis=1).max() > 0.05 * abs(step):
        raise ValueError("has slices that are shifted against each other (a tilted gantry): resample it first")
    direction = directions[0].copy()
    direction[:, 2] *= np.sign(step)
    spacing = (*headers[0].GetSpacing()[:2], abs(float(along.mean())))
    channels = headers[0].GetNumberOfComponents()
    return _checked((*shapes.pop(), len(files)), itk_affine(spacing, origins[0], direction), channels)


def _dicom_voxels(folder: Path) -> np.ndarray:
    files = _series(folder)
    if len(files) == 1:
        return _image_voxels(Path(files[0]))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    return _as_xyz(sitk.GetArrayFromImage(reader.Execute()))


_GRIDS: Mapping[Kind, Callable[[Path], Grid]] = {"nifti": _nifti_grid, "image": _image_grid, "dicom": _dicom_grid}
_VOXELS: Mapping[Kind, Callable[[Path], np.ndarray]] = {
    "nifti": _nifti_voxels,
    "image": _image_voxels,
    "dicom": _dicom_voxels,
}
