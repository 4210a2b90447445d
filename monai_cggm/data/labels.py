# SPDX-License-Identifier: Apache-2.0
"""Label conventions: explicit maps from a data set's label values to the classes of training, and back.

The classes are 0 background, 1 necrotic and non-enhancing tumour core (NCR), 2 edema (ED), 3 enhancing tumour (ET).
Data sets number them differently, and the same number can mean different tissue: 4 is the enhancing tumour in BraTS
2018-2021 and the resection cavity in BraTS 2024. So the convention is decided for each case by its ID, by a datalist's
``labels`` field or by the user (``--labels``), and never guessed from the values in the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch

from monai_cggm.errors import CaseError

CLASS_NAMES = ("background", "NCR", "ED", "ET")

Volume = TypeVar("Volume", np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class LabelConvention:
    """How one data set writes its labels.

    Attributes:
        name: the name that ``--labels`` and a datalist's ``labels`` field use.
        to_class: value in the file -> class 0..3.
        from_class: class 0..3 -> value in the file.
        note: what is particular about it.
    """

    name: str
    to_class: Mapping[int, int]
    from_class: Mapping[int, int]
    note: str = ""


def _convention(
    name: str, to_class: dict[int, int], *, from_class: dict[int, int] | None = None, note: str = ""
) -> LabelConvention:
    inverse = from_class or {new: old for old, new in to_class.items()}
    return LabelConvention(name, MappingProxyType(to_class), MappingProxyType(inverse), note)


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

_PREFIXES = (
    (re.compile(r"brats(17|18|19|20|2017|2018|2019|2020|2021)_", re.IGNORECASE), "brats2018"),
    (re.compile(r"phantom_", re.IGNORECASE), "brats2018"),
    (re.compile(r"brats-", re.IGNORECASE), "brats2023"),
    (re.compile(r"brats_\d+$", re.IGNORECASE), "msd"),
)


def convention_for(case_id: str, override: str | None = None) -> str:
    """Name the label convention of a case.

    Args:
        case_id: the case's ID; its prefix tells the release: ``Brats18_`` ... ``BraTS2021_`` and ``Phantom_`` are
            ``brats2018``, ``BraTS-GLI-`` and its like ``brats2023``, ``BRATS_001`` is ``msd``. BraTS 2024 uses the
            names of 2023, so it has to be asked for.
        override: the user's or the datalist's word, which wins.

    Raises:
        ValueError: where ``override`` is no convention.
        CaseError: where the ID's prefix is unknown and nothing else says it.

    Example:
        >>> convention_for("Brats18_2013_2_1"), convention_for("BraTS-GLI-00000-000")
        ('brats2018', 'brats2023')
        >>> convention_for("BraTS-GLI-00000-100", "brats2024")
        'brats2024'
    """
    if override is not None:
        if override not in CONVENTIONS:
            raise ValueError(f"unknown label convention {override!r}: expected one of {', '.join(CONVENTIONS)}")
        return override
    for pattern, name in _PREFIXES:
        if pattern.match(case_id):
            return name
    raise CaseError(
        case_id,
        f"its ID tells no label convention: give --labels ({', '.join(CONVENTIONS)}) "
        "or a 'labels' field in the datalist",
    )


def unknown_labels(array: np.ndarray | torch.Tensor, convention: str) -> list[float]:
    """The first few values of a label volume that the convention does not know, NaN among them.

    Example:
        >>> unknown_labels(np.array([0, 1, 7]), "brats2018")
        [7.0]
    """
    return _values_outside(array, CONVENTIONS[convention].to_class)


def unknown_label_problem(array: np.ndarray | torch.Tensor, convention: str) -> str | None:
    """Say which label values the convention does not know, or None where it knows them all.

    Example:
        >>> unknown_label_problem(np.array([0, 1, 7]), "brats2018")
        'label values [7] are not in the brats2018 map (0, 1, 2, 4)'
    """
    known = CONVENTIONS[convention].to_class
    strangers = unknown_labels(array, convention)
    if not strangers:
        return None
    text = f"label values [{', '.join(f'{v:g}' for v in strangers)}] are not in the {convention} map"
    text += f" ({', '.join(map(str, known))})"
    if convention == "brats2023" and 4 in strangers:
        text += "; a case of BraTS 2024 needs --labels brats2024, where 4 is the resection cavity"
    return text


def to_classes(array: Volume, convention: str, case: str, path: str | Path | None = None) -> Volume:
    """Map a label volume from the file's values to the classes 0..3.

    Args:
        array: any shape and any numeric type (a NumPy array, a tensor or a MONAI ``MetaTensor``, which keeps its
            affine and metadata).
        convention: a name in :data:`CONVENTIONS`.
        case: the case's ID, for the error.
        path: the file, for the error.

    Returns:
        The same kind of array and shape, of type uint8.

    Raises:
        CaseError: where a value is not in the convention's map.

    Example:
        >>> to_classes(np.array([0, 1, 2, 4]), "brats2018", "Brats18_2013_2_1")
        array([0, 1, 2, 3], dtype=uint8)
    """
    problem = unknown_label_problem(array, convention)
    if problem is not None:
        raise CaseError(case, problem, path)
    return _mapped(array, CONVENTIONS[convention].to_class)


def to_labels(array: Volume, convention: str, case: str = "prediction", path: str | Path | None = None) -> Volume:
    """Map classes 0..3 back to the values that the case's data set uses.

    Args:
        array: class indices, any shape; NumPy array, tensor or ``MetaTensor``.
        convention: a name in :data:`CONVENTIONS`.
        case: the case's ID, for the error.
        path: the file, for the error.

    Returns:
        The same kind of array and shape, of type uint8.

    Raises:
        CaseError: where a value is no class.

    Example:
        >>> to_labels(np.array([0, 1, 2, 3]), "brats2018")
        array([0, 1, 2, 4], dtype=uint8)
    """
    table = CONVENTIONS[convention].from_class
    strangers = _values_outside(array, table)
    if strangers:
        found = ", ".join(f"{v:g}" for v in strangers)
        raise CaseError(case, f"values [{found}] are no classes (0 to {len(CLASS_NAMES) - 1})", path)
    return _mapped(array, table)


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


def _mapped(array: Any, table: Mapping[int, int]) -> Any:
    if isinstance(array, torch.Tensor):
        mapped = torch.zeros_like(array, dtype=torch.uint8)
        for old, new in table.items():
            mapped.masked_fill_(array == old, new)
        return mapped
    result = np.zeros(array.shape, dtype=np.uint8)
    for old, new in table.items():
        result[array == old] = new
    return result
