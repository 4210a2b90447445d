# SPDX-License-Identifier: Apache-2.0
"""What a bundle for a data set is to be: numbers and names, chosen from what the data are."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from monai_cggm.data.labels import LARGEST_VALUE, label_convention
from monai_cggm.discovery import CaseSurvey, Found, Survey
from monai_cggm.discovery.dataset_json import BACKGROUND, IGNORE
from monai_cggm.discovery.names import slug_of
from monai_cggm.discovery.sources import read_volumes
from monai_cggm.errors import DataError
from monai_cggm.new_bundle.background import above_background, choose_floors, floor_problems

#: Slices where voxels are so many times longer along one axis than along another: nnU-Net's threshold (Isensee et al.,
#: Nature Methods 2021) for data that it does not treat as isotropic.
COARSE = 3.0

#: Axis of the patient (left-right, front-back, head-feet) -> orientation of volumes whose last axis it is.
ORIENTATIONS = ("PSL", "LSP", "LPS")
_AXES = {"L": 0, "R": 0, "P": 1, "A": 1, "S": 2, "I": 2}
_AXIS_NAMES = ("left-right", "front-back", "head-feet")

#: Numbers of the two sizes of network: the paper's, and the one of configs/hardware/cpu.yaml.
_LARGEST_SLICE = {"paper": 160, "small": 96}
_LARGEST_PATCH = {"paper": 96, "small": 48}
_SLICES_A_BATCH = {"paper": 64, "small": 16}
_VOLUMES_A_BATCH = {"paper": 16, "small": 4}
_MULTIPLE = 16

#: Iterations that a training has at least, and validations of it.
_ITERATIONS, _PAPER_EPOCHS, _VALIDATIONS = 600, 150, 10

#: A class weighs at most so many times what the commonest weighs.
_MOST_WEIGHT = 4.0

#: Prepared volumes that are kept in memory, at most, before a folder takes them.
_MEMORY_BYTES = 4e9

#: Cases whose first modality is read to see how much of the field of view is empty.
_READ_CASES = 5

_REGION = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_REGION_NAME = f"region {{!r}}: expected a name of letters, digits and _, other than mean, {BACKGROUND}, {IGNORE}"


@dataclass(frozen=True)
class Wishes:
    """What a user may ask for; None leaves it to the data.

    Attributes:
        title: the bundle's name in words.
        spatial_dims: 2 for slices, 3 for patches.
        regions: name -> values in the label files; nested and overlapping ones are welcome.
        network: ``"paper"`` (ResNet-101 encoders, for GPUs) or ``"small"`` (for CPUs).
        allow_missing: whether cases may lack modalities.
        folds: cross-validation instead of one split.
        seed: seed of the split and of training.
        floors: modality -> value at which its background ends, None where the background is 0.
    """

    title: str | None = None
    spatial_dims: int | None = None
    regions: Mapping[str, Sequence[int]] = field(default_factory=dict)
    network: str = "paper"
    allow_missing: bool = False
    folds: int | None = None
    seed: int = 0
    floors: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class BundlePlan:
    """The numbers and names of a bundle.

    Attributes:
        title: its name in words.
        modalities: channel order.
        classes: value in the label files -> name, in the order of the classes, the background first.
        regions: name -> classes.
        spatial_dims: 2 or 3.
        orientation: of the prepared volumes; slices are taken along the last axis.
        size: of the slices or patches.
        class_weights: of the cross-entropy.
        network: ``"paper"`` or ``"small"``.
        volumes_per_batch: cases in a batch.
        samples_per_volume: slices or patches of each.
        epochs: of training.
        val_interval: epochs between validations.
        allow_missing: whether cases may lack modalities.
        on_disk: whether prepared volumes are kept in a folder instead of in memory.
        floors: modality -> value at which its background ends, of those whose background is not 0.
        reasons: choice -> why, in words, for the one who reads what was printed.
        warnings: what training will not see, a sentence each.
    """

    title: str
    modalities: tuple[str, ...]
    classes: Mapping[int, str]
    regions: Mapping[str, tuple[int, ...]]
    spatial_dims: int
    orientation: str
    size: tuple[int, ...]
    class_weights: tuple[float, ...]
    network: str
    volumes_per_batch: int
    samples_per_volume: int
    epochs: int
    val_interval: int
    allow_missing: bool
    on_disk: bool
    floors: Mapping[str, float]
    reasons: Mapping[str, str]
    warnings: tuple[str, ...] = ()

    @property
    def label_map(self) -> str:
        """The label convention, spelt out: ``value=class`` pairs.

        Example:
            >>> from dataclasses import fields
            >>> values = dict.fromkeys(f.name for f in fields(BundlePlan)) | {"classes": {0: "background", 4: "ET"}}
            >>> BundlePlan(**values).label_map
            '0=0,4=1'
        """
        return ",".join(f"{value}={number}" for number, value in enumerate(self.classes))


def plan_bundle(
    found: Found, survey: Survey, trained: Sequence[Collection[str]], wishes: Wishes | None = None
) -> BundlePlan:
    """Choose a bundle's numbers and names.

    Slices are taken where voxels are three times as long along one axis as along another (:data:`COARSE`), along the
    longest; otherwise patches. Sizes cover the part of the field of view that is not empty, up to what the paper and
    nnU-Net train with. Cross-entropy weighs classes by one over the square root of their share of the voxels, the
    rarest four times the commonest at most: a choice of this package.

    Args:
        found: the labelled cases.
        survey: of the same cases.
        trained: IDs of those that train, once a split: the fewest fill a batch, and all of them weigh the classes.
        wishes: what wins over the data.

    Returns:
        The plan.

    Raises:
        DataError: lists every wish that does not fit the data, or every modality whose background the data do not tell.
        ValueError: where a wish makes no sense for any data.
    """
    wishes = wishes or Wishes()
    _check(wishes)
    training_cases = min(map(len, trained))
    training = Survey(tuple(case for case in survey.cases if any(case.case_id in ids for ids in trained)))
    classes = _classes(found, survey)
    number = {value: index for index, value in enumerate(classes)}
    regions = _regions(wishes.regions or found.label_regions, classes, number)
    spacing = _by_axis(survey.cases, "spacing")
    axis, dims, why = _dimensions(spacing, wishes.spatial_dims)
    orientation = ORIENTATIONS[axis]
    floors, backgrounds = choose_floors(survey, found.modalities, wishes.floors)
    extent = _extent(found, survey, floors)
    order = [_AXES[code] for code in orientation]
    largest = (_LARGEST_SLICE if dims == 2 else _LARGEST_PATCH)[wishes.network]
    size = tuple(min(largest, _up(extent[a])) for a in order[:dims])
    if dims == 2:
        size = (max(size),) * 2  # slices are turned by 90° in training
    volumes = min(_VOLUMES_A_BATCH[wishes.network] if dims == 2 else 2, training_cases)
    samples = _SLICES_A_BATCH[wishes.network] // volumes if dims == 2 else 2
    a_epoch = max(1, training_cases // volumes)
    epochs = max(_PAPER_EPOCHS if wishes.network == "paper" else 1, math.ceil(_ITERATIONS / a_epoch))
    val_interval = max(1, epochs // _VALIDATIONS)
    epochs = val_interval * math.ceil(epochs / val_interval)
    a_batch = f"{_cases(volumes)}, {samples} {'slices' if dims == 2 else 'patches'} of each"
    memory = sum(math.prod(c.shape) for c in survey.cases if c.shape) * (2 * len(found.modalities) + 1)
    on_disk = memory > _MEMORY_BYTES
    shown = " × ".join(f"{extent[a]:.0f}" for a in order)
    return BundlePlan(
        title=wishes.title or f"Segmentation from {', '.join(found.modalities)}",
        modalities=found.modalities,
        classes=classes,
        regions=regions,
        spatial_dims=dims,
        orientation=orientation,
        size=size,
        class_weights=_weights([training.label_values.get(value, 0) for value in classes]),
        network=wishes.network,
        volumes_per_batch=volumes,
        samples_per_volume=samples,
        epochs=epochs,
        val_interval=val_interval,
        allow_missing=wishes.allow_missing,
        on_disk=on_disk,
        floors=floors,
        reasons={
            **{f"background of {key}": text for key, text in backgrounds.items()},
            "slices or patches": why,
            "their size": f"{' × '.join(map(str, size))}: the images fill {shown} voxels",
            "a batch": a_batch,
            "epochs": f"{epochs} of {a_epoch} iteration{'s' * (a_epoch > 1)}, validated every {val_interval}",
            "class weights": f"one over the root of the share, in {_cases(len(training.cases))} of training",
            "prepared volumes": f"about {memory / 1e9:.1f} GB, kept {'on disk' if on_disk else 'in memory'}",
        },
        warnings=tuple(_warnings(found, survey, trained, classes, regions)),
    )


def check_wishes(found: Found, wishes: Wishes) -> None:
    """Refuse what can be judged before any volume is read.

    Args:
        found: the labelled cases.
        wishes: what wins over the data.

    Raises:
        DataError: for regions of impossible names, floors of no modality or that are no number, and a label that is to
            be ignored.
        ValueError: where a wish makes no sense for any data.
    """
    _check(wishes)
    problems = [_REGION_NAME.format(name) for name in wishes.regions if not _is_region(name)]
    problems += floor_problems(found.modalities, wishes.floors)
    problems += _merging(found)
    if IGNORE in map(str.lower, (found.label_names or {}).values()):
        problems.append(
            f"{found.source} has a label named ignore, whose voxels are to be left out of training, which is not done "
            "here: give them another label or the background's, in the files and where they are described"
        )
    if problems:
        raise DataError(problems)


def _merging(found: Found) -> Iterator[str]:
    """Problems of maps that a datalist tells, in which values share a class: here each value has its own."""
    for name in sorted({case.convention for case in found.cases if case.convention}):
        try:
            to_class = label_convention(name).to_class
        except ValueError:  # no convention's name: a bundle spells its own map out
            continue
        shared = [value for value, number in to_class.items() if list(to_class.values()).count(number) > 1]
        if shared:
            yield (
                f"{found.source}: its 'labels' {name!r} make one class of values {', '.join(map(str, shared))}, and a "
                "bundle gives each value its own: leave 'labels' out, and join values by regions"
            )


def _warnings(
    found: Found,
    survey: Survey,
    trained: Sequence[Collection[str]],
    classes: Mapping[int, str],
    regions: Mapping[str, Sequence[int]],
) -> Iterator[str]:
    """What is named and nowhere, or in no case that trains, of the values, modalities and regions."""
    nowhere = [value for value in classes if value not in survey.label_values]
    for value in nowhere:
        yield f"No label has the value {value} ({classes[value]}): this class has nothing to learn from."
    for number, ids in enumerate(trained):
        cases = [case for case in survey.cases if case.case_id in ids]
        seen = set().union(*(case.label_values for case in cases))
        present = {key for key in found.modalities if any(key not in case.missing for case in cases)}
        fold = f" of fold {number}" if len(trained) > 1 else ""
        lacking = [f"value {value} ({classes[value]})" for value in classes if value not in {*seen, *nowhere}]
        lacking += [key for key in found.modalities if key not in present]
        if lacking:
            yield f"No case that trains{fold} has {', '.join(lacking)}."
    scored = {number for members in regions.values() for number in members}
    left = [str(value) for number, value in enumerate(classes) if number > 0 and number not in scored]
    if left:
        yield f"No region has value {', '.join(left)}: trained on, not scored."


def _is_region(name: str) -> bool:
    return _REGION.fullmatch(name) is not None and name.lower() not in ("mean", BACKGROUND, IGNORE)


def _check(wishes: Wishes) -> None:
    if wishes.spatial_dims not in (None, 2, 3):
        raise ValueError(f"spatial_dims must be 2 or 3, got {wishes.spatial_dims}")
    if wishes.network not in _LARGEST_SLICE:
        raise ValueError(f"network must be one of {', '.join(_LARGEST_SLICE)}, got {wishes.network!r}")
    # In a configuration, a text that begins otherwise may be a program, and YAML knows more line breaks than \n.
    if wishes.title is not None and not (re.match(r"\w", wishes.title) and wishes.title.isprintable()):
        raise ValueError(f"title must be one line that begins with a letter or digit, got {wishes.title!r}")


def _classes(found: Found, survey: Survey) -> dict[int, str]:
    """Value -> name, the background first; every value that the labels have or that the data set names."""
    values = sorted({0, *survey.label_values} | found.named_values)
    if len(values) < 2:
        raise DataError([f"the labels of {found.source} hold 0 only: is the right file the label?"])
    if 0 not in survey.label_values:
        shown = ", ".join(map(str, survey.label_values))
        raise DataError([f"no label of {found.source} has the value 0, the background: found {shown}"])
    if values[-1] > LARGEST_VALUE:
        raise DataError([f"{found.source}: label value {values[-1]}, expected values up to {LARGEST_VALUE}"])
    names = {0: "background"}
    for value in values[1:]:
        text = (found.label_names or {}).get(value, "")
        name = slug_of(text) if re.search(r"[a-z0-9]", text.lower()) else f"label_{value}"
        # scores have a column of the regions' mean
        names[value] = f"{name}_{value}" if name in (*names.values(), "mean") else name
    return names


def _regions(
    wanted: Mapping[str, Sequence[int]], classes: Mapping[int, str], number: Mapping[int, int]
) -> dict[str, tuple[int, ...]]:
    if not wanted:
        return {name: (number[value],) for value, name in classes.items() if number[value] > 0}
    problems = []
    for name, values in wanted.items():
        if not _is_region(name):
            problems.append(_REGION_NAME.format(name))
        odd = [value for value in values if number.get(value, 0) == 0]
        if odd or not values:
            known = ", ".join(str(value) for value in classes if number[value] > 0)
            found = ", ".join(map(str, odd)) or "no value"
            problems.append(f"region {name}: found {found}, expected values of the labels: {known}")
    if problems:
        raise DataError(problems)
    return {name: tuple(sorted({number[value] for value in values})) for name, values in wanted.items()}


def _by_axis(cases: Sequence[CaseSurvey], what: str) -> tuple[float, float, float]:
    """The median of spacings or shapes along each axis of the patient."""
    rows = []
    for case in cases:
        values = getattr(case, what)
        if values is not None:
            codes = case.orientation or ""
            axes = [_AXES.get(code, position) for position, code in enumerate(codes)]
            row = dict(zip(axes if len(set(axes)) == 3 else range(3), values, strict=False))
            rows.append([float(row[axis]) for axis in range(3)])
    if not rows:
        raise DataError(["no case with a readable grid"])
    first, second, third = (median(column) for column in zip(*rows, strict=True))
    return first, second, third


def _dimensions(spacing: Sequence[float], wish: int | None) -> tuple[int, int, str]:
    """The axis along which slices are taken, 2 or 3, and why."""
    longest = max(range(3), key=lambda axis: (spacing[axis], axis))
    ratio = max(spacing) / min(spacing)
    others = [spacing[axis] for axis in range(3) if axis != longest]
    axis = longest if spacing[longest] > 1.2 * max(others) else 2
    sizes = " × ".join(f"{size:.3g}" for size in spacing)
    told = f"voxels are {sizes} mm ({', '.join(_AXIS_NAMES)})"
    dims = wish or (2 if ratio >= COARSE else 3)
    if dims == 3:
        return 2, 3, f"patches ({'asked for' if wish else 'not far from cubes'}): {told}"
    return axis, 2, f"slices along {_AXIS_NAMES[axis]} ({'asked for' if wish else 'coarse'}): {told}"


def _extent(found: Found, survey: Survey, floors: Mapping[str, float]) -> tuple[float, float, float]:
    """Voxels along each axis of the patient that are not empty: of a few cases' first modality, at most of all."""
    known = {case.case_id: case for case in survey.cases}
    boxes = []
    for case in found.cases[:_READ_CASES]:
        key, source = next(iter(case.images.items()))
        filled = above_background(read_volumes(source)[0][..., source.channel or 0], floors.get(key))
        ends = [np.flatnonzero(filled.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
        shape = tuple(int(end[-1] - end[0] + 1) if len(end) else filled.shape[axis] for axis, end in enumerate(ends))
        boxes.append(CaseSurvey(case.case_id, shape, orientation=known[case.case_id].orientation))
    return _by_axis(boxes, "shape")


def _cases(count: int) -> str:
    return f"{count} case{'s' * (count > 1)}"


def _up(size: float) -> int:
    return max(_MULTIPLE, _MULTIPLE * math.ceil(size / _MULTIPLE))


def _weights(voxels: Sequence[int]) -> tuple[float, ...]:
    """One over the square root of each class's share, bounded, adding up to 1."""
    raw = np.asarray([max(count, 1) for count in voxels], dtype=float) ** -0.5
    bounded = np.minimum(raw / raw.min(), _MOST_WEIGHT)
    return tuple(round(float(weight), 3) for weight in bounded / bounded.sum())
