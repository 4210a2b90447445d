# SPDX-License-Identifier: Apache-2.0
"""What a discovered data set is made of, and the volumes that lie below a folder."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from monai_cggm.data.labels import convention_for
from monai_cggm.data.layouts import LABEL, folders_below
from monai_cggm.discovery.names import fits, some
from monai_cggm.errors import CaseError

Kind = Literal["nifti", "image", "dicom"]

_NIFTI = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
_IMAGE = re.compile(r"(\.seg)?\.(nrrd|nhdr|mha|mhd)$", re.IGNORECASE)
_DICOM = re.compile(r"\.(dcm|dicom|ima)$", re.IGNORECASE)
_PICTURE = re.compile(r"\.(png|jpe?g|bmp|tiff?|gif)$", re.IGNORECASE)
_BARE = re.compile(r"[^.]*|.*\.\d*", re.DOTALL)  # IM0001, 1.2.840.113619.2.5


@dataclass(frozen=True)
class Source:
    """Where one volume is.

    Attributes:
        path: the file, or the folder of a DICOM series.
        channel: which channel of a 4-D file, None where the file holds one volume.
        kind: ``"nifti"``, ``"image"`` (NRRD, MHA, MHD) or ``"dicom"``.
    """

    path: Path
    channel: int | None = None
    kind: Kind = "nifti"


@dataclass(frozen=True)
class FoundCase:
    """One case of a data set.

    Attributes:
        case_id: the ID, which can be a file's name.
        patient: the patient, whose cases belong in one part of a split.
        images: modality -> volume, in the order of the data set's modalities; a modality that is missing is not in it.
        label: the segmentation, where there is one.
        section: ``"training"``, ``"validation"`` or ``"test"``.
        place: where the case was found, for messages.
        convention: what a datalist says of the case under ``labels``.
        problems: what is wrong with it, such as two files for one modality, each with the file or folder.
    """

    case_id: str
    patient: str
    images: Mapping[str, Source]
    label: Source | None = None
    section: str = "training"
    place: str = ""
    convention: str | None = None
    problems: tuple[tuple[str, str], ...] = ()

    def told_convention(self) -> str | None:
        """Its label convention, as a datalist tells it or the ID of a known release; None where nothing does."""
        if self.convention is not None:
            return self.convention
        try:
            return convention_for(self.case_id)
        except CaseError:
            return None

    def sources(self) -> dict[str, Source]:
        """All volumes by key, the label last."""
        return {**self.images, **({"label": self.label} if self.label else {})}

    def errors(self) -> list[CaseError]:
        """Its problems as errors."""
        return [CaseError(self.case_id, problem, place) for problem, place in self.problems]


@dataclass(frozen=True)
class Found:
    """What :func:`monai_cggm.discovery.discover` found.

    Attributes:
        source: the folder or datalist.
        layout: ``"folders"``, ``"files"``, ``"nnunet"``, ``"msd"``, ``"bids"`` or ``"datalist"``.
        modalities: names, in the layout's own order where it has one (channel numbers, a datalist's keys), sorted
            otherwise; the notes say which.
        cases: the cases.
        label_names: value in the label files -> name, None where nothing tells it.
        label_regions: region -> values in the label files, where the data set joins values to regions.
        notes: sentences about what was recognised and how.
    """

    source: Path
    layout: str
    modalities: tuple[str, ...]
    cases: tuple[FoundCase, ...]
    label_names: Mapping[int, str] | None = None
    notes: tuple[str, ...] = ()
    label_regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def named_values(self) -> set[int]:
        """Values in the label files that have a name or are in a region.

        Example:
            >>> found = Found(Path("d"), "nnunet", (), (), {0: "background"}, label_regions={"gland": (1, 2)})
            >>> found.named_values
            {0, 1, 2}
        """
        return set(self.label_names or {}).union(*self.label_regions.values())

    def without(self, case_ids: Sequence[str]) -> Found:
        """The same without some cases."""
        return replace(self, cases=tuple(case for case in self.cases if case.case_id not in set(case_ids)))

    def to_predict(self) -> Found:
        """The same as cases to predict: without labels, and all of them test cases."""
        return replace(self, cases=tuple(replace(case, label=None, section="test") for case in self.cases))


@dataclass
class Draft:
    """A layout's reading of a folder, before IDs are made safe and the whole is judged.

    Cases whose patient nothing but the ID may tell have none yet.
    """

    layout: str
    cases: list[FoundCase]
    modalities: tuple[str, ...]
    label_names: Mapping[int, str] | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    label_regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Listing:
    """The volumes below a folder, and the pictures, which are none."""

    volumes: tuple[Source, ...]
    pictures: tuple[Path, ...]


def list_volumes(folder: Path) -> Listing:
    """List all volumes below a folder, sorted, through links to folders but none twice; hidden ones are left out.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     (Path(name) / "p01_flair.nii.gz").touch()
        ...     [volume.kind for volume in list_volumes(Path(name)).volumes]
        ['nifti']
    """
    volumes: list[Source] = []
    pictures: list[Path] = []
    for parent, names in folders_below(folder):
        paths = [parent / name for name in names]
        volumes += [Source(path) for path in paths if _NIFTI.search(path.name)]
        volumes += [Source(path, kind="image") for path in paths if _IMAGE.search(path.name)]
        if _has_dicom(paths):
            volumes.append(Source(parent, kind="dicom"))
        pictures += [path for path in paths if _PICTURE.search(path.name)]
    return Listing(tuple(volumes), tuple(pictures))


def stem_of(source: Source) -> str:
    """The name of a file without its endings, of a DICOM series its folder's.

    Example:
        >>> stem_of(Source(Path("a/p01.flair.nii.gz"))), stem_of(Source(Path("a/p01.v2"), kind="dicom"))
        ('p01.flair', 'p01.v2')
    """
    return source.path.name if source.kind == "dicom" else _IMAGE.sub("", _NIFTI.sub("", source.path.name))


def kind_of(path: Path) -> Kind | None:
    """The kind of volume that a path is, None where it is none."""
    if _NIFTI.search(path.name):
        return "nifti"
    if _IMAGE.search(path.name):
        return "image"
    return "dicom" if path.is_dir() else None


def rival_problems(files: Mapping[str, Sequence[Source]], root: Path, case_id: str) -> tuple[tuple[str, str], ...]:
    """What is wrong where several files of a case may be one modality, or its label, and how to choose one.

    Args:
        files: key -> the files that may be it.
        root: the data set's folder.
        case_id: the case.

    Example:
        >>> files = {"t1": [Source(Path("d/p1_T1.nii"))], "t2": [Source(Path(f"d/p1_T2{i}.nii")) for i in ("", "_n4")]}
        >>> rival_problems(files, Path("d"), "p1")  # doctest: +NORMALIZE_WHITESPACE
        (('2 files may be t2, expected one',
          'p1_T2.nii, p1_T2_n4.nii; choose with --modality "t2=*_T2.nii", for example'),)
    """
    names = [source.path.name for sources in files.values() for source in sources]
    doubled = [key for key, rivals in files.items() if len(rivals) > 1 and key != LABEL]
    # Several patterns alone would leave out what they do not name.
    others = f" --modalities {','.join(sorted(files.keys() - {LABEL}))}" if len(doubled) > 1 else ""
    found, chosen = [], []
    for key, rivals in files.items():
        if len(rivals) > 1:
            patterns = _patterns_for(rivals, root, case_id, names)
            pattern = next((p for p in patterns if sum(fits(r.path, root, p) for r in rivals) == 1), "PATTERN")
            chosen.append(f'--label "{pattern}"' if key == LABEL else f'--modality "{key}={pattern}"')
            listed = some(rival.path.relative_to(root).as_posix() for rival in rivals)
            found.append((f"{len(rivals)} files may be {key}, expected one", listed))
    # together: with one of the patterns alone the others would be asked for next
    advice = f"choose with {' '.join(chosen)}{others}, for example"
    return tuple((what, f"{listed}; {advice}") for what, listed in found)


def _patterns_for(rivals: Sequence[Source], root: Path, case_id: str, names: Sequence[str]) -> Iterator[str]:
    """Patterns that may tell one of a case's files from the others, in all cases: without the ID, names then places."""
    shared = next((index for index, letters in enumerate(zip(*names, strict=False)) if len(set(letters)) > 1), 0)
    front = re.sub(r"[\W_]*[^\W_]*$", "", names[0][:shared])
    for rival in rivals:
        name = rival.path.name
        shared_part = case_id if case_id in name else front
        yield "*".join(map(glob.escape, name.split(shared_part) if shared_part else [name]))
    for rival in rivals:
        yield "*".join(map(glob.escape, rival.path.relative_to(root).as_posix().split(case_id)))


def _has_dicom(paths: Sequence[Path]) -> bool:
    if any(_DICOM.search(path.name) for path in paths):
        return True
    bare = [path for path in paths if _BARE.fullmatch(path.name) and path.name != "DICOMDIR"]
    return any(_starts_as_dicom(path) for path in bare[:3])


def _starts_as_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False
