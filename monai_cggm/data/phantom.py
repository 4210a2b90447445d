# SPDX-License-Identifier: Apache-2.0
"""A generator of multi-sequence brain phantoms, for demonstrations and tests without patients' data.

Every case is a skull-stripped head with grey and white matter, deep grey nuclei, ventricles and sulci, and one or more
lesions: a necrotic core inside an enhancing rim inside edema. Mean intensities, before the bias field, noise and the
case's own gain (1 is white matter on T1):

========================  =====  =====  =====  =====
tissue                    flair  t1ce   t1     t2
========================  =====  =====  =====  =====
cerebrospinal fluid       0.25   0.35   0.35   1.60
grey matter               0.85   0.80   0.75   0.95
white matter              0.75   1.00   1.00   0.75
necrotic core (label 1)   0.80   0.50   0.50   1.30
edema (label 2)           1.40   0.75   0.75   1.35
enhancing rim (label 4)   1.15   1.60   0.70   1.10
========================  =====  =====  =====  =====

They follow each sequence's physics in its order of brightness, not in measured values: T2 shows water bright; FLAIR is
T2 weighted with the free water of the CSF nulled, so that edema stands out; T1 shows water dark; T1 after contrast
differs from it where the contrast agent leaks, in the rim.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike
from tqdm import tqdm

from monai_cggm.files import atomic_path

SEQUENCES = ("flair", "t1ce", "t1", "t2")

_CSF, _GREY, _WHITE, _NECROSIS, _EDEMA, _RIM = range(6)
_INTENSITIES: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "flair": (0.25, 0.85, 0.75, 0.80, 1.40, 1.15),
        "t1ce": (0.35, 0.80, 1.00, 0.50, 0.75, 1.60),
        "t1": (0.35, 0.75, 1.00, 0.50, 0.75, 0.70),
        "t2": (1.60, 0.95, 0.75, 1.30, 1.35, 1.10),
    }
)
_LABELS = {_NECROSIS: 1, _EDEMA: 2, _RIM: 4}

_HEAD = (68.0, 84.0, 62.0)  # mm, semi-axes of the brain
_SCALE = 400.0  # of intensity 1, in the files' integers
_BIAS = 0.15  # of the bias field's logarithm, at most
_SPREAD = 0.06  # of a tissue's intensity from case to case, relative, standard deviation
_TEXTURE = 0.04  # inside a tissue, in units of white matter


@dataclass(frozen=True)
class Phantom:
    """One case in memory.

    Attributes:
        images: sequence -> int16 ``(H, W, D)``, 0 outside the brain and above 0 inside.
        label: int16 ``(H, W, D)`` with values 0, 1, 2, 4, as BraTS 2018 has them.
        affine: 4 x 4, voxels to mm, axes running to the left, the back and the top (LPS) as in BraTS.
    """

    images: Mapping[str, np.ndarray]
    label: np.ndarray
    affine: np.ndarray


def make_phantom(
    seed: int | Sequence[int],
    *,
    shape: Sequence[int] = (120, 120, 77),
    spacing: float = 2.0,
    informativeness: Mapping[str, float] | None = None,
    lesions: int | None = None,
    noise: float = 0.04,
) -> Phantom:
    """Draw one case.

    Anatomy is drawn in millimetres and shrinks where the field of view is too small for it, so a seed gives the same
    head and lesions at every resolution.

    Args:
        seed: of this case, as ``numpy.random.default_rng`` takes it.
        shape: voxels (left, back, top), each at least 16; BraTS has 240 x 240 x 155.
        spacing: voxel size in mm, the same along each axis.
        informativeness: sequence -> contrast of the lesions there, from 0 (no lesion can be seen) to 1 (as in the
            module's table); 1 where a sequence is not named.
        lesions: how many, at least 0; by default 1 in 70 % of the cases, 2 in 20 %, 3 in 10 %.
        noise: standard deviation in units of white matter on T1.

    Raises:
        ValueError: where an argument is out of its range.

    Example:
        >>> phantom = make_phantom(0, shape=(48, 48, 32), spacing=4.0)
        >>> np.unique(phantom.label)
        array([0, 1, 2, 4], dtype=int16)
        >>> sorted(phantom.images), phantom.images["t1"].dtype
        (['flair', 't1', 't1ce', 't2'], dtype('int16'))
    """
    weights = _checked(shape, spacing, informativeness, lesions, noise)
    anatomy_rng, contrast_rng, noise_rng = np.random.default_rng(seed).spawn(3)
    grid = _Grid.of(shape, spacing)
    brain, healthy = _draw_head(grid, anatomy_rng)
    lesion = _draw_lesions(grid, brain, healthy, anatomy_rng, lesions)
    label = np.zeros(grid.shape, dtype=np.int16)
    for tissue, value in _LABELS.items():
        label[lesion == tissue] = value
    images = {}
    for sequence in SEQUENCES:
        mean = _mean_intensities(sequence, healthy, lesion, weights[sequence], contrast_rng)
        mean += _TEXTURE * grid.smooth_noise(contrast_rng, wavelength=12.0)
        mean *= np.exp(_BIAS * np.clip(grid.smooth_noise(contrast_rng, wavelength=120.0), -1.0, 1.0))
        mean += noise * noise_rng.standard_normal(grid.shape, dtype=np.float32)
        gain = _SCALE * contrast_rng.uniform(0.7, 1.3)
        # 1 at least inside the brain: exactly 0 is what tells the background.
        images[sequence] = np.where(brain, np.clip(np.rint(mean * gain), 1, 32767), 0).astype(np.int16)
    return Phantom(images, label, _affine(shape, spacing))


def write_phantoms(
    out: str | Path,
    *,
    cases: int = 10,
    seed: int = 0,
    shape: Sequence[int] = (120, 120, 77),
    spacing: float = 2.0,
    informativeness: Mapping[str, float] | None = None,
    lesions: int | None = None,
    progress: bool = False,
) -> list[str]:
    """Write cases in the layout of BraTS 2018: ``out/Phantom_000/Phantom_000_flair.nii.gz`` and so on.

    Case k depends on ``seed`` and k alone: more cases later leave the first ones as they are. Files are written whole
    or not at all, and equal to the last byte for equal arguments; existing ones are replaced.

    Args:
        out: folder, made where it is missing.
        cases: how many, at least 1.
        seed: at least 0.
        shape: see :func:`make_phantom`; so are the next three.
        spacing: in mm.
        informativeness: sequence -> 0 to 1.
        lesions: a case.
        progress: show a progress bar.

    Returns:
        The IDs, ``Phantom_000`` and so on.

    Raises:
        ValueError: where an argument is out of its range.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as out:
        ...     write_phantoms(out, cases=2, shape=(32, 32, 24), spacing=6.0, informativeness={"t1": 0.2})
        ['Phantom_000', 'Phantom_001']
    """
    if cases < 1 or seed < 0:
        raise ValueError(f"expected at least one case and a seed of at least 0, got cases={cases}, seed={seed}")
    ids = [f"Phantom_{index:03d}" for index in range(cases)]
    for index, case_id in enumerate(tqdm(ids, desc="Phantoms", unit="case", disable=not progress)):
        phantom = make_phantom(
            (seed, index), shape=shape, spacing=spacing, informativeness=informativeness, lesions=lesions
        )
        for name, array in {**phantom.images, "seg": phantom.label}.items():
            _write_nifti(array, phantom.affine, Path(out) / case_id / f"{case_id}_{name}.nii.gz")
    return ids


@dataclass(frozen=True)
class _Grid:
    """The volume's voxels in head coordinates: mm from the brain's centre, for a brain of the usual size."""

    shape: tuple[int, int, int]
    axes: tuple[np.ndarray, np.ndarray, np.ndarray]

    @classmethod
    def of(cls, shape: Sequence[int], spacing: float) -> _Grid:
        # One scale for all axes keeps lesions round; 0.96 leaves a rim of background.
        scale = min(1.0, *(0.96 * size * spacing / (2.0 * axis) for size, axis in zip(shape, _HEAD, strict=True)))
        axes = [(np.arange(size, dtype=np.float32) - (size - 1) / 2) * np.float32(spacing / scale) for size in shape]
        x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
        return cls((int(shape[0]), int(shape[1]), int(shape[2])), (x, y, z))

    def radius(self, centre: ArrayLike, semi_axes: ArrayLike) -> np.ndarray:
        """Distance from a centre where 1 is an ellipsoid's surface; ``(H, W, D)`` float32."""
        centres, sizes = np.asarray(centre, dtype=np.float32), np.asarray(semi_axes, dtype=np.float32)
        x, y, z = (((a - c) / s) ** 2 for a, c, s in zip(self.axes, centres, sizes, strict=True))
        return np.sqrt(x + y + z)

    def smooth_noise(self, rng: np.random.Generator, *, wavelength: float) -> np.ndarray:
        """A random field of about mean 0 and standard deviation 1 with structures of ``wavelength`` mm.

        Its nodes are fixed in head coordinates, so that it does not depend on the resolution.
        """
        step = wavelength / 2
        # Nodes reach a little beyond the head; the background needs none.
        half = [int(np.ceil(1.1 * axis / step)) + 1 for axis in _HEAD]
        field = rng.standard_normal([2 * n + 1 for n in half]).astype(np.float32)
        # Interpolation axis by axis is a few small matrix products, many times faster than a general one.
        for axis, (positions, n) in enumerate(zip(self.axes, half, strict=True)):
            weights = _hat_weights(positions.ravel() / np.float32(step) + n, 2 * n + 1)
            field = np.moveaxis(np.tensordot(weights, field, axes=(1, axis)), 0, axis)
        # Between its nodes an interpolated field varies less than at them.
        return field * np.float32(1.5**1.5)


def _hat_weights(positions: np.ndarray, nodes: int) -> np.ndarray:
    """Linear interpolation as a matrix ``(positions, nodes)``; beyond the ends the last node's value goes on."""
    places = np.clip(positions, 0, nodes - 1)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(nodes, dtype=np.float32)))


def _draw_head(grid: _Grid, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The brain's mask and its healthy tissue."""
    semi_axes = np.array(_HEAD) * rng.uniform(0.90, 0.98, size=3)
    shape = grid.smooth_noise(rng, wavelength=60.0)
    folds = grid.smooth_noise(rng, wavelength=14.0)
    depth = grid.radius((0, 0, 0), semi_axes) + 0.02 * np.clip(shape, -1.5, 1.5)
    brain = depth < 0.96
    tissue = np.full(grid.shape, _WHITE, dtype=np.int8)
    tissue[depth + 0.08 * folds > 0.80] = _GREY
    tissue[(depth > 0.86) & (folds > 0.7)] = _CSF  # sulci
    fissure = (np.abs(grid.axes[0]) < 1.5) & (grid.axes[2] > 5.0) & (depth > 0.5)
    tissue[fissure] = _CSF
    opening = rng.uniform(0.8, 1.3)
    for side in (-1.0, 1.0):
        nucleus = grid.radius((side * 22.0, 2.0, -2.0), (9.0, 16.0, 10.0)) + 0.1 * folds < 1.0
        tissue[nucleus & (depth < 0.75)] = _GREY
        ventricle = grid.radius((side * 9.0, 0.0, 8.0), (5.0 * opening, 28.0, 8.0 * opening)) + 0.05 * folds < 1.0
        tissue[ventricle] = _CSF
    return brain, tissue


def _draw_lesions(
    grid: _Grid, brain: np.ndarray, healthy: np.ndarray, rng: np.random.Generator, lesions: int | None
) -> np.ndarray:
    """The lesions' tissue, 0 where there is none."""
    count = int(rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1])) if lesions is None else lesions
    lesion = np.zeros(grid.shape, dtype=np.int8)
    for number in range(count):
        size = rng.uniform(16.0, 32.0) if number == 0 else rng.uniform(9.0, 15.0)  # mm, radius of the edema
        centre = _lesion_centre(rng)
        core_size = size * rng.uniform(0.5, 0.7)
        rim = max(rng.uniform(0.2, 0.4) * core_size, 2.5)
        outline = grid.smooth_noise(rng, wavelength=24.0)
        detail = grid.smooth_noise(rng, wavelength=12.0)
        distance = grid.radius(centre, rng.uniform(0.85, 1.15, size=3))
        edema = (distance + 0.15 * size * outline < size) & (healthy != _CSF)
        rim_outside = distance + 0.10 * core_size * (outline + detail)
        lesion[edema & (lesion == 0)] = _EDEMA
        lesion[rim_outside < core_size] = _RIM
        lesion[rim_outside < core_size - rim] = _NECROSIS
    lesion[~brain] = 0
    return lesion


def _lesion_centre(rng: np.random.Generator) -> np.ndarray:
    """A place in one hemisphere, away from the midline and not at the brain's border."""
    direction = rng.standard_normal(3)
    direction /= np.linalg.norm(direction)
    direction[0] = np.copysign(max(abs(direction[0]), 0.35), direction[0])
    return direction * np.array(_HEAD) * rng.uniform(0.40, 0.65)


def _mean_intensities(
    sequence: str, healthy: np.ndarray, lesion: np.ndarray, informativeness: float, rng: np.random.Generator
) -> np.ndarray:
    """Intensity without noise: healthy tissue, and its difference to the lesion's as far as the sequence shows it."""
    table = np.array(_INTENSITIES[sequence]) * (1.0 + _SPREAD * rng.standard_normal(len(_LABELS) + 3))
    healthy_map = table.astype(np.float32)[healthy]
    contrast = np.where(lesion > 0, table.astype(np.float32)[lesion] - healthy_map, np.float32(0))
    return healthy_map + np.float32(informativeness) * contrast


def _checked(
    shape: Sequence[int],
    spacing: float,
    informativeness: Mapping[str, float] | None,
    lesions: int | None,
    noise: float,
) -> dict[str, float]:
    if len(shape) != 3 or min(shape) < 16:
        raise ValueError(f"shape must be three sizes of at least 16 voxels, got {tuple(shape)}")
    if not spacing > 0:
        raise ValueError(f"spacing must be above 0 mm, got {spacing}")
    if lesions is not None and lesions < 0:
        raise ValueError(f"lesions must be at least 0, got {lesions}")
    if not noise >= 0:
        raise ValueError(f"noise must be at least 0, got {noise}")
    given = dict(informativeness or {})
    unknown = sorted(set(given) - set(SEQUENCES))
    if unknown:
        raise ValueError(f"informativeness names {', '.join(unknown)}, expected some of {', '.join(SEQUENCES)}")
    for sequence, value in given.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"informativeness of {sequence} must lie in [0, 1], got {value}")
    return {sequence: float(given.get(sequence, 1.0)) for sequence in SEQUENCES}


def _affine(shape: Sequence[int], spacing: float) -> np.ndarray:
    """BraTS's: voxel (0, last, 0) lies at the origin, and the first two axes run against the world's (RAS)."""
    affine = np.diag([-spacing, -spacing, spacing, 1.0])
    affine[1, 3] = (shape[1] - 1) * spacing
    return affine


def _write_nifti(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        # No time stamp in the archive: equal phantoms are equal files.
        temporary.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
