# SPDX-License-Identifier: Apache-2.0
"""Read what a discovered data set holds: grids, label values, and what is wrong."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from monai_cggm.data.checks import geometry_problems, image_problem
from monai_cggm.data.layouts import LABEL
from monai_cggm.discovery.found import Found, FoundCase, Source
from monai_cggm.discovery.problems import Problem, sentences
from monai_cggm.discovery.sources import Grid, read_grid, read_volumes
from monai_cggm.errors import DataError

#: How many different values a label may have.
MOST_LABELS = 256

#: Interpolation with splines goes so far beyond the values at an edge, of the highest one, at most.
RINGING = 0.1

#: What of each axis a corner is.
_CORNER = 1 / 32


@dataclass(frozen=True)
class Intensities:
    """How far the values of an image go, and what is around the object in it.

    Attributes:
        lowest: the smallest value.
        highest: the largest value.
        corners: the largest value in the corners, but for the four highest of the eight: a table or an arm reaches into
            some, and noise has an upper end.
    """

    lowest: float
    highest: float
    corners: float


@dataclass(frozen=True)
class CaseSurvey:
    """What one case holds.

    Attributes:
        case_id: the case's ID.
        shape: voxels along each axis, of the first volume that could be read; None where none could.
        spacing: voxel size in mm.
        orientation: where the axes point to, such as ``"RAS"`` or ``"LPS"``.
        label_values: value -> voxels, in the label.
        intensities: modality -> its values, where they were read.
        missing: modalities that it lacks.
        problems: empty where the case is fine.
    """

    case_id: str
    shape: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    orientation: str | None = None
    label_values: Mapping[int, int] = field(default_factory=dict)
    intensities: Mapping[str, Intensities] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Survey:
    """What all cases hold.

    Attributes:
        cases: one survey a case, in the order of the cases found.

    Example:
        >>> one = CaseSurvey("p01", (4, 4, 3), (1.0, 1.0, 2.0), "RAS", {0: 40, 1: 8})
        >>> survey = Survey((one, CaseSurvey("p02", (4, 4, 3), (1.0, 1.0, 2.0), "RAS", {0: 48})))
        >>> survey.shapes, survey.label_values, survey.label_cases
        ({(4, 4, 3): 2}, {0: 88, 1: 8}, {0: 2, 1: 1})
    """

    cases: tuple[CaseSurvey, ...]

    @property
    def shapes(self) -> dict[tuple[int, ...], int]:
        """Shape -> cases, the most frequent first."""
        return dict(Counter(case.shape for case in self.cases if case.shape).most_common())

    @property
    def spacings(self) -> dict[tuple[float, ...], int]:
        """Voxel size in mm (to a micrometre) -> cases, the most frequent first."""
        return dict(Counter(case.spacing for case in self.cases if case.spacing).most_common())

    @property
    def orientations(self) -> dict[str, int]:
        """Orientation -> cases, the most frequent first."""
        return dict(Counter(case.orientation for case in self.cases if case.orientation).most_common())

    @property
    def label_values(self) -> dict[int, int]:
        """Value in the labels -> voxels over all cases."""
        totals: Counter[int] = Counter()
        for case in self.cases:
            totals.update(case.label_values)
        return dict(sorted(totals.items()))

    @property
    def label_cases(self) -> dict[int, int]:
        """Value in the labels -> cases that have it."""
        return dict(sorted(Counter(value for case in self.cases for value in case.label_values).items()))

    @property
    def missing(self) -> dict[str, tuple[str, ...]]:
        """Modality -> cases that lack it."""
        keys = sorted({key for case in self.cases for key in case.missing})
        return {key: tuple(case.case_id for case in self.cases if key in case.missing) for key in keys}

    @property
    def problems(self) -> tuple[str, ...]:
        """All problems, each with its case."""
        return tuple(str(problem) for case in self.cases for problem in case.problems)

    @property
    def bad_cases(self) -> tuple[str, ...]:
        """The cases with problems: ``found.without(survey.bad_cases)`` are the others."""
        return tuple(case.case_id for case in self.cases if case.problems)


def survey_cases(
    found: Found, *, workers: int = 0, progress: bool = True, skip_bad: bool = False, images: bool = True
) -> Survey:
    """Read every volume, once, after all headers.

    A case's volumes must have one grid: shape, orientation, and the place of every voxel to
    :data:`monai_cggm.data.checks.AFFINE_TOLERANCE`. Labels must be whole numbers, none negative, at most
    :data:`MOST_LABELS` of them, and where the data set names its labels, these. Images must be finite, and not empty.

    Args:
        found: see :func:`monai_cggm.discovery.discover`.
        workers: threads (0 and 1 are the same); each holds one file, uncompressed.
        progress: show a progress bar.
        skip_bad: return a survey that lists problems, instead of failing.
        images: whether to read the voxels of images, too; their headers and the labels' voxels are read in any case.

    Returns:
        The survey.

    Raises:
        DataError: one sentence for each kind of problem, which names the first volumes with it, unless ``skip_bad``;
            of headers (2-D, unreadable, different grids), if there are any, else of voxels.
    """
    with (
        ThreadPoolExecutor(max(workers, 1)) as pool,
        tqdm(total=len(found.cases), desc="Looking at cases", unit="case", disable=not progress) as bar,
    ):
        # What headers tell is told before voxels are read, which takes long.
        headers = list(pool.map(_headers_of, found.cases))
        wrong = sentences([problem for one in headers for problem in one.problems], len(found.cases))
        if wrong and not skip_bad:
            raise DataError(wrong)
        cases = []
        for one in pool.map(lambda case, header: _survey_case(case, found, header, images), found.cases, headers):
            cases.append(one)
            bar.update()
    survey = Survey(tuple(cases))
    problems = sentences([problem for case in cases for problem in case.problems], len(cases))
    if not problems and survey.label_values and set(survey.label_values) == {0}:
        problems = [f"the labels of {found.source} hold 0 only: is the right file the label?"]
    if problems and not skip_bad:
        raise DataError(problems)
    return survey


def label_counts(source: Source) -> dict[int, int]:
    """Count the voxels of each value of a label.

    Raises:
        ValueError: says what is wrong with it: unreadable, NaN, values that are no whole numbers, negative ones, too
            many different ones.
    """
    array = read_volumes(source)[0]
    if array.dtype.kind not in "biuf":
        raise ValueError(f"holds {array.dtype} voxels, expected whole numbers")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("has NaN or infinite voxels, expected whole numbers")
    channel = array[..., source.channel or 0]
    values, counts = np.unique(channel, return_counts=True)
    bad = [float(value) for value in values if float(value) != int(value)]
    if bad:
        shown = ", ".join(f"{value:g}" for value in bad[:3])
        raise ValueError(f"has values that are no whole numbers ({shown}): is it a probability map, or interpolated?")
    if values[0] < 0:
        raise ValueError(f"has negative values ({int(values[0])}), expected 0 for the background and more for the rest")
    if len(values) > MOST_LABELS:
        raise ValueError(f"has {len(values)} different values, expected at most {MOST_LABELS}: is it an image?")
    return {int(value): int(count) for value, count in zip(values, counts, strict=True)}


@dataclass(frozen=True)
class _Headers:
    """The grids of a case's volumes, and what is wrong with them."""

    grids: Mapping[str, Grid]
    problems: tuple[Problem, ...]


def _headers_of(case: FoundCase) -> _Headers:
    grids: dict[str, Grid] = {}
    problems = []
    sources = case.sources()
    for key, source in sources.items():
        try:
            grids[key] = read_grid(source)
        except ValueError as error:
            problems.append(Problem(case.case_id, key, str(error), source.path))
    differing, advice = _grid_problems(grids)
    apart = [Problem(case.case_id, key, what, sources[key].path, advice) for key, what in differing.items()]
    return _Headers(grids, (*apart, *problems))


def _survey_case(case: FoundCase, found: Found, headers: _Headers, images: bool) -> CaseSurvey:
    grids = headers.grids
    problems: list[tuple[str, str]] = []
    intensities: dict[str, Intensities] = {}
    # images are long to read: not of a case that is refused anyway
    for sources in _by_file(case.images) if images and not headers.problems else ():
        looked, bad = _look_at_images(sources)
        intensities |= looked
        problems += bad.items()
    counts: dict[int, int] = {}
    if case.label is not None and LABEL in grids:
        try:
            counts = label_counts(case.label)
        except ValueError as error:
            problems.append((LABEL, str(error)))
        unknown = sorted(set(counts) - {0} - found.named_values) if found.label_names else []
        if unknown:
            problems.append((LABEL, f"has values {unknown} that the list of labels does not name"))
    first = next(iter(grids.values()), None)
    paths = {key: source.path for key, source in case.sources().items()}
    return CaseSurvey(
        case.case_id,
        first.shape if first else None,
        _spacing(first) if first else None,
        _orientation(first) if first else None,
        counts,
        intensities,
        tuple(key for key in found.modalities if key not in case.images),
        (*headers.problems, *(Problem(case.case_id, key, what, paths[key]) for key, what in problems)),
    )


def _by_file(sources: Mapping[str, Source]) -> list[dict[str, Source]]:
    """Put together what one 4-D file holds, to read it once."""
    files: dict[Path, dict[str, Source]] = {}
    for key, source in sources.items():
        files.setdefault(source.path, {})[key] = source
    return list(files.values())


def _look_at_images(sources: Mapping[str, Source]) -> tuple[dict[str, Intensities], dict[str, str]]:
    """The values of the images in one file, and what is wrong with them."""
    looked: dict[str, Intensities] = {}
    problems: dict[str, str] = {}
    first = next(iter(sources))
    try:
        voxels = read_volumes(sources[first])[0]
    except ValueError as error:
        return {}, {first: str(error)}
    for key, source in sources.items():
        image = voxels[..., source.channel or 0]
        if problem := image_problem(image):
            problems[key] = problem
        else:
            looked[key] = Intensities(float(image.min()), float(image.max()), _corners(image))
    return looked, problems


def _corners(image: np.ndarray) -> float:
    ends = [(slice(0, size), slice(-size, None)) for size in (math.ceil(n * _CORNER) for n in image.shape)]
    # half of them may hold something else: a table lies in four
    return sorted(float(image[corner].max()) for corner in itertools.product(*ends))[3]


def _grid_problems(grids: Mapping[str, Grid]) -> tuple[dict[str, str], str]:
    """What is wrong with the volumes that lie on another grid than most of the case's, and what to do about it."""
    geometries = {key: (grid.shape, grid.affine) for key, grid in grids.items()}
    compared = {key: geometry_problems({key: geometries[key], **geometries}) for key in geometries}
    first = min(compared, key=lambda key: len(compared[key]), default="")
    differing = {}
    for key, problem in compared.get(first, {}).items():
        one, other = _orientation(grids[key]), _orientation(grids[first])
        differing[key] = f"has {problem}" + (f" (it lies {one}, {first} {other})" if one != other else "")
    reference = "" if first == LABEL else f" --reference {first}"
    return differing, f"bring all volumes of a case to one grid first: monai-cggm align{reference}"


def _spacing(grid: Grid) -> tuple[float, ...]:
    return tuple(round(float(size), 3) for size in np.linalg.norm(grid.affine[:3, :3], axis=0))


def _orientation(grid: Grid) -> str:
    return "".join(code or "?" for code in nib.aff2axcodes(grid.affine))
