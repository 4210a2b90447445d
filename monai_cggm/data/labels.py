# SPDX-License-Identifier: Apache-2.0
"""Label conventions: explicit maps from a data set's label values to the classes of training, and back.

Brain tumours have the classes 0 background, 1 necrotic and non-enhancing tumour core (NCR), 2 edema (ED), 3 enhancing
tumour (ET). Data sets number them differently, and the same number can mean different tissue: 4 is the enhancing tumour
in BraTS 2018-2021 and the resection cavity in BraTS 2024. So the convention is decided for each case by its ID, by a
datalist's ``labels`` field or by the user (``--labels``), and never guessed from the values in the file.

Any other data set spells its map out in the same place, ``"0=0,1=1,4=2"``: see :func:`label_convention`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch

from monai_cggm.errors import CaseError

#: Largest value in a file that a spelt-out map may name: what int16 holds, and float32 holds exactly.
LARGEST_VALUE = int(np.iinfo(np.int16).max)
#: Largest class, since volumes of classes are uint8.
LARGEST_CLASS = int(np.iinfo(np.uint8).max)

Volume = TypeVar("Volume", np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class LabelConvention:
    """How one data set writes its labels.

    Attributes:
        name: the text that ``--labels`` and a datalist's ``labels`` field use: ``brats2018`` or ``0=0,1=1,4=2``.
        to_class: value in the file -> class, from 0 on without gaps.
        from_class: class -> value in the file.
        note: what is particular about it.
    """

    name: str
    to_class: Mapping[int, int]
    from_class: Mapping[int, int]
    note: str = ""

    @property
    def num_classes(self) -> int:
        """How many classes there are, the background among them."""
        return len(self.from_class)


def _convention(
    name: str, to_class: dict[int, int], *, from_class: dict[int, int] | None = None, note: str = ""
) -> LabelConvention:
    inverse = from_class or {new: old for old, new in to_class.items()}
    return LabelConvention(name, MappingProxyType(to_class), MappingProxyType(inverse), note)


#: The conventions that have a name.
CONVENTIONS: Mapping[str, LabelConvention] = MappingProxyType(
    {
        convention.name: convention
        for convention in (
            _convention("brats2018", {0: 0, 1: 1, 2: 2, 4: 3}, note="BraTS 2018-2021: 4 is the enhancing tumour"),
            _convention("brats2023", {0: 0, 1: 1, 2: 2, 3: 3}, note="BraTS 2023: 3 is the enhancing tumour"),
            _convention(
                "brats2024",
                {0: 0, 1: 1, 2: 2, 3: 3, 4: 0},
                from_class={0: 0, 1: 1, 2: 2, 3: 3},
                # Many to one: a segmentation that is written back never holds a 4.
                note="BraTS 2024: as 2023, and 4 is the resection cavity, which becomes background",
            ),
            _convention(
                "msd", {0: 0, 1: 2, 2: 1, 3: 3}, note="MSD Task01: 1 is edema, 2 non-enhancing core, 3 enhancing"
            ),
        )
    }
)

#: What ``--labels`` and a datalist's ``labels`` field take, for error messages.
EXPECTED = f"one of {', '.join(CONVENTIONS)} or pairs of value=class such as 0=0,1=1"

#: What is wrong with a case whose convention nothing tells.
NOT_TOLD = f"its ID tells no label convention: give --labels ({EXPECTED}) or a 'labels' field in the datalist"

_PAIR = re.compile(r"\s*([0-9]+)\s*=\s*([0-9]+)\s*")
_PREFIXES = (
    (re.compile(r"brats(17|18|19|20|2017|2018|2019|2020|2021)_", re.IGNORECASE), "brats2018"),
    (re.compile(r"phantom_", re.IGNORECASE), "brats2018"),
    (re.compile(r"brats-", re.IGNORECASE), "brats2023"),
    (re.compile(r"brats_\d+$", re.IGNORECASE), "msd"),
)


def label_convention(text: str) -> LabelConvention:
    """Return the convention that a text names or spells out.

    A map is spelt out in pairs of ``value=class``, with commas between them and spaces where you like:

    - Values are those of the label files, whole numbers from 0 to 32767, each once. A value in a file that is not in
      the map is an error later, but for 0: where it is left out, the map begins with ``0=0``.
    - Classes are 0 (the background), 1, 2, ... without gaps, two at least and 256 at most.
    - Several values may be one class. A segmentation is then written back with the first one that the map names.

    Args:
        text: a name in :data:`CONVENTIONS` or a map.

    Returns:
        The convention. The ``name`` of a spelt-out one is the map in one fixed form, sorted by class, with the value
        that is written back before the others of its class.

    Raises:
        ValueError: says what is wrong with the text.

    Example:
        >>> dict(label_convention("brats2018").to_class)
        {0: 0, 1: 1, 2: 2, 4: 3}
        >>> lesions = label_convention("4 = 2, 3 = 1, 1 = 1")
        >>> lesions.name, lesions.num_classes, dict(lesions.from_class)
        ('0=0,3=1,1=1,4=2', 3, {0: 0, 1: 3, 2: 4})
    """
    if not isinstance(text, str) or ("=" not in text and text not in CONVENTIONS):
        raise ValueError(f"unknown label convention {text!r}: expected {EXPECTED}")
    return CONVENTIONS[text] if text in CONVENTIONS else _spelt_out(text)


@functools.lru_cache(maxsize=256)
def _spelt_out(text: str) -> LabelConvention:
    to_class = _pairs(text)
    # First, so that the background is written as 0 also where other values are background: 255=0 for "not drawn".
    to_class = to_class if 0 in to_class else {0: 0, **to_class}
    classes = set(to_class.values())
    gaps = [index for index in range(max(classes)) if index not in classes]
    if gaps:
        raise ValueError(f"label map {text!r}: no value is class {gaps[0]}, expected classes from 0 on without gaps")
    if len(classes) == 1:
        raise ValueError(f"label map {text!r}: every value is background, expected a class 1")
    from_class: dict[int, int] = {}
    for value, index in to_class.items():
        from_class.setdefault(index, value)
    ordered = sorted(to_class, key=lambda value: (to_class[value], from_class[to_class[value]] != value, value))
    return _convention(
        ",".join(f"{value}={to_class[value]}" for value in ordered),
        {value: to_class[value] for value in ordered},
        from_class={index: from_class[index] for index in sorted(from_class)},
        note=f"spelt out, {len(classes)} classes with the background",
    )


def _pairs(text: str) -> dict[int, int]:
    """Value -> class, in the order in which the text names them."""
    to_class: dict[int, int] = {}
    for part in text.split(","):
        pair = _PAIR.fullmatch(part)
        if pair is None:
            raise ValueError(
                f"label map {text!r}: found {part.strip()!r}, expected pairs of whole numbers from 0 on such as 0=0,1=1"
            )
        value, index = int(pair[1]), int(pair[2])
        if value in to_class:
            raise ValueError(f"label map {text!r}: the value {value} is there twice, expected once")
        if value > LARGEST_VALUE or index > LARGEST_CLASS:
            limits = f"values up to {LARGEST_VALUE} and classes up to {LARGEST_CLASS}"
            raise ValueError(f"label map {text!r}: found {value}={index}, expected {limits}")
        to_class[value] = index
    return to_class


def convention_for(case_id: str, override: str | None = None) -> str:
    """Name the label convention of a case.

    Args:
        case_id: the case's ID; its prefix tells the release: ``Brats18_`` ... ``BraTS2021_`` and ``Phantom_`` are
            ``brats2018``, ``BraTS-GLI-`` and its like ``brats2023``, ``BRATS_001`` is ``msd``. BraTS 2024 uses the
            names of 2023, so it has to be asked for.
        override: the user's or the datalist's word, which wins: a name or a map (see :func:`label_convention`).

    Returns:
        The convention's ``name``, for :func:`label_convention`.

    Raises:
        ValueError: where ``override`` is no convention.
        CaseError: where the ID's prefix is unknown and nothing else says it.

    Example:
        >>> convention_for("Brats18_2013_2_1"), convention_for("BraTS-GLI-00000-000")
        ('brats2018', 'brats2023')
        >>> convention_for("BraTS-GLI-00000-100", "brats2024")
        'brats2024'
        >>> convention_for("patient07", "1=1, 2=1")
        '0=0,1=1,2=1'
    """
    if override is not None:
        return label_convention(override).name
    for pattern, name in _PREFIXES:
        if pattern.match(case_id):
            return name
    raise CaseError(case_id, NOT_TOLD)


def unknown_labels(array: np.ndarray | torch.Tensor, convention: str) -> list[float]:
    """The first few values of a label volume that the convention does not know, NaN among them.

    Example:
        >>> unknown_labels(np.array([0, 1, 7]), "brats2018")
        [7.0]
    """
    return _values_outside(array, label_convention(convention).to_class)


def unknown_label_problem(array: np.ndarray | torch.Tensor, convention: str) -> str | None:
    """Say which label values the convention does not know, or None where it knows them all.

    Example:
        >>> unknown_label_problem(np.array([0, 1, 7]), "brats2018")
        'label values [7] are not in the brats2018 map (0, 1, 2, 4)'
        >>> unknown_label_problem(np.array([0, 1, 7]), "1=1,2=2")
        'label values [7] are not in the map 0=0,1=1,2=2'
    """
    known = label_convention(convention)
    strangers = _values_outside(array, known.to_class)
    if not strangers:
        return None
    named = f"the {known.name} map ({', '.join(map(str, known.to_class))})"
    text = f"label values [{', '.join(f'{v:g}' for v in strangers)}] are not in "
    text += named if known.name in CONVENTIONS else f"the map {known.name}"
    if known.name == "brats2023" and 4 in strangers:
        text += "; a case of BraTS 2024 needs --labels brats2024, where 4 is the resection cavity"
    return text


def to_classes(array: Volume, convention: str, case: str, path: str | Path | None = None) -> Volume:
    """Map a label volume from the file's values to classes.

    Args:
        array: any shape and any numeric type (a NumPy array, a tensor or a MONAI ``MetaTensor``, which keeps its
            affine and metadata).
        convention: a name or a map (see :func:`label_convention`).
        case: the case's ID, for the error.
        path: the file, for the error.

    Returns:
        The same kind of array and shape, of type uint8.

    Raises:
        CaseError: where a value is not in the convention's map.

    Example:
        >>> to_classes(np.array([0, 1, 2, 4]), "brats2018", "Brats18_2013_2_1")
        array([0, 1, 2, 3], dtype=uint8)
        >>> to_classes(np.array([0, 2, 5]), "2=1,5=1", "p01")
        array([0, 1, 1], dtype=uint8)
    """
    problem = unknown_label_problem(array, convention)
    if problem is not None:
        raise CaseError(case, problem, path)
    return mapped(array, label_convention(convention).to_class)


def to_labels(array: Volume, convention: str, case: str = "prediction", path: str | Path | None = None) -> Volume:
    """Map classes back to the values that the case's data set uses.

    Args:
        array: class indices, any shape; NumPy array, tensor or ``MetaTensor``.
        convention: a name or a map (see :func:`label_convention`).
        case: the case's ID, for the error.
        path: the file, for the error.

    Returns:
        The same kind of array and shape, of type uint8, or int16 where the convention has a value above 255.

    Raises:
        CaseError: where a value is no class.

    Example:
        >>> to_labels(np.array([0, 1, 2, 3]), "brats2018")
        array([0, 1, 2, 4], dtype=uint8)
    """
    known = label_convention(convention)
    strangers = _values_outside(array, known.from_class)
    if strangers:
        found = ", ".join(f"{v:g}" for v in strangers)
        raise CaseError(case, f"values [{found}] are no classes (0 to {known.num_classes - 1})", path)
    return mapped(array, known.from_class)


def _values_outside(array: Any, known: Mapping[int, int], most: int = 8) -> list[float]:
    """The first few values of the array that are not keys of the map (NaN among them)."""
    # A comparison a known value is several times cheaper than sorting nine million voxels for their unique values.
    plain = _plain(array)
    outside = np.ones(plain.shape, dtype=bool)
    for value in known:
        outside &= plain != value
    return [float(v) for v in np.unique(plain[outside])[:most]] if outside.any() else []


def _plain(array: Any) -> np.ndarray:
    if isinstance(array, torch.Tensor):
        array = array.detach().as_subclass(torch.Tensor).cpu().numpy()
    return np.asarray(array)


def mapped(array: Any, table: Mapping[int, int]) -> Any:
    """Map an array or tensor of values that are all keys of the table: to uint8, or int16 where that is too small."""
    large = max(table.values()) > np.iinfo(np.uint8).max
    if isinstance(array, torch.Tensor):
        tensor = torch.zeros_like(array, dtype=torch.int16 if large else torch.uint8)
        whole = array.to(torch.int16)  # PyTorch finds the uint8 44 equal to 300
        for old, new in table.items():
            tensor.masked_fill_(whole == old, new)
        return tensor
    result = np.zeros(array.shape, dtype=np.int16 if large else np.uint8)
    for old, new in table.items():
        result[array == old] = new
    return result
