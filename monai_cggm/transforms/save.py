# SPDX-License-Identifier: Apache-2.0
"""Write segmentations in the space of the images that they were made from."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_numpy, ensure_tuple

from monai_cggm.data import is_safe_id
from monai_cggm.errors import CaseError
from monai_cggm.files import atomic_path
from monai_cggm.transforms.labels import ClassesToLabelsd

__all__ = ["SaveSegmentationd"]

#: Header fields of the image that say nothing about a segmentation, and may say something about a patient.
_NOT_COPIED = (
    *("descrip", "aux_file", "db_name", "data_type", "cal_min", "cal_max", "glmin", "glmax"),
    *("intent_code", "intent_name", "intent_p1", "intent_p2", "intent_p3"),
)

#: How far, in mm, a corner of the prediction may lie from the image's: rounding, and no more.
_TOLERANCE = 1e-2


class SaveSegmentationd(MapTransform):
    """Write class maps as ``<case>_seg.nii.gz`` with the input's geometry and the data set's own label values.

    The map must be back on the input's grid: after MONAI's ``Invertd``, where the pre-processing turned, cropped or
    resampled the image. A map of another shape is refused, and so is one whose own affine differs from the input's,
    which is how a forgotten ``Invertd`` shows where the shape happens to be the same.

    The file is uint8 (int16 where the convention has a value above 255), with affine, ``qform`` and ``sform`` with
    their codes, voxel size and units of the input's header as they are; no intensity scaling, and no description,
    intent or extension of the input. It appears whole or not at all, in place of an older one of that name. Classes are
    mapped by the case's own convention (:class:`ClassesToLabelsd`, which must therefore not run before).

    Args:
        keys: class maps, ``(1, *spatial)``, 0 the background; with several keys the file's name is
            ``<case>_<key>_seg.nii.gz``.
        output_dir: where to write, made if need be; not the folder of the input, whose ``_seg`` is the truth.
        image_keys: where to look for the input: the first that is a path or a volume read from one gives the header.
            Where ``LoadImaged`` read several files, these are its keys; ``image`` after ``ConcatItemsd``.
        case_key: the case's ID.
        convention_key: the entry with the case's label convention, a name or a map such as ``0=0,1=1,4=2`` (see
            :func:`monai_cggm.data.labels.label_convention`); where the item has none, the ID tells it.
        allow_missing_keys: accept items without these keys.

    Raises:
        CaseError: names the case and the file, where the ID is no safe file name, the input is not known or cannot be
            read, or the map does not fit it.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> affine = np.diag([-1.0, -1.0, 3.0, 1.0])
        >>> nib.save(nib.Nifti1Image(np.zeros((4, 4, 2), np.float32), affine), folder / "Phantom_000_flair.nii.gz")
        >>> item = {"case": "Phantom_000", "flair": str(folder / "Phantom_000_flair.nii.gz")}
        >>> item["pred"] = torch.full((1, 4, 4, 2), 3)                             # enhancing tumour everywhere
        >>> _ = SaveSegmentationd(keys="pred", output_dir=folder / "out", image_keys=["flair", "t1"])(item)
        >>> written = nib.load(folder / "out" / "Phantom_000_seg.nii.gz")
        >>> np.unique(written.dataobj), np.array_equal(written.affine, affine)
        (array([4], dtype=uint8), True)
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        *,
        output_dir: str | Path,
        image_keys: KeysCollection = "image",
        case_key: str = "case",
        convention_key: str = "labels",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_dir = Path(output_dir)
        self.image_keys = ensure_tuple(image_keys)
        self.case_key = case_key
        self._to_labels = ClassesToLabelsd(keys, convention_key, case_key, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the maps and return ``data`` as it was."""
        case = str(data.get(self.case_key, ""))
        if not is_safe_id(case):
            raise CaseError(case, "the ID is no safe file name: letters, digits, '.', '_' and '-', without '..'")
        source = self._source(data, case)
        if source.parent.resolve() == self.output_dir.resolve():
            raise CaseError(
                case, "would write among the inputs, where _seg is the truth: choose another folder", source
            )
        image = _opened(source, case)
        labelled = self._to_labels(data)
        for key in self.key_iterator(labelled):
            _check_grid(data[key], image, case, source)
            name = f"{case}_seg.nii.gz" if len(self.keys) == 1 else f"{case}_{key}_seg.nii.gz"
            segmentation = _segmentation(convert_to_numpy(labelled[key])[0], image)
            with atomic_path(self.output_dir / name) as path:
                nib.save(segmentation, path)
        return dict(data)

    def _source(self, data: Mapping[Hashable, Any], case: str) -> Path:
        """The file that the input was read from."""
        for key in self.image_keys:
            value = data.get(key)
            if isinstance(value, MetaTensor):
                value = value.meta.get("filename_or_obj")
            if isinstance(value, str | Path):
                return Path(value)
        raise CaseError(case, f"no file is known for any of {', '.join(map(str, self.image_keys))}")


def _opened(source: Path, case: str) -> Any:
    try:
        return nib.load(source)
    except Exception as error:  # nibabel's own errors, OSError, zlib.error ...
        raise CaseError(case, f"cannot read the input's header: {error}", source) from error


def _grid_shape(image: Any) -> tuple[int, ...]:
    """The image's shape without the trailing axes of size one that some tools write."""
    shape = tuple(image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _check_grid(pred: Any, image: Any, case: str, source: Path) -> None:
    expected = _grid_shape(image)
    if tuple(pred.shape) != (1, *expected):
        raise CaseError(
            case, f"the segmentation has shape {tuple(pred.shape)}, expected {(1, *expected)} as the input has", source
        )
    if not isinstance(pred, MetaTensor):
        return
    last = np.array([size - 1 for size in (*expected, 1, 1)[:3]])
    corners = np.array([(*last * corner, 1) for corner in np.ndindex(2, 2, 2)])
    distance = np.abs((pred.affine.double().cpu().numpy() - image.affine) @ corners.T).max()
    if not distance <= _TOLERANCE:
        raise CaseError(
            case,
            f"the segmentation lies up to {distance:.3g} mm off the input's grid: it was not inverted to it",
            source,
        )


def _segmentation(labels: np.ndarray, image: Any) -> Any:
    header = nib.Nifti1Header.from_header(image.header)
    header.set_data_dtype(labels.dtype)
    for field in _NOT_COPIED:
        header[field] = nib.Nifti1Header()[field]
    header.extensions.clear()
    # Without an affine of its own nibabel leaves qform, sform and their codes as the header has them.
    return nib.Nifti1Image(labels, None, header)
