# SPDX-License-Identifier: Apache-2.0
"""What a discovered data set is made of, and the volumes that lie below a folder."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from monai_cggm.data.labels import convention_for
from monai_cggm.data.layouts import LABEL, folders_below
from monai_cggm.discovery.names import fits
from monai_cggm.errors import CaseError, some

Kind = Literal["nifti", "image", "dicom"]

_NIFTI = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
_IMAGE = re.compile(r"(\.seg)?\.(nrrd|nhdr|mha|mhd)$", re.IGNORECASE)
_DICOM = re.compile(r"\.(dcm|dicom|ima)$", re.IGNORECASE)
_PICTURE = re.compile(r"\.(png|jpe?g|bmp|tiff?|gif)$", re.IGNORECASE)
#: Patterns that are tried on all files, at most: each takes as long as there are files.
_MOST_TRIED = 40
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

    @property
    def patients_advice(self) -> str:
        """What to add to a sentence where the patients are at fault, which only a datalist tells for certain."""
        return "" if self.layout == "datalist" else " (names tell the patients: say otherwise with --patient)"

    def without(self, case_ids: Sequence[str]) -> Found:
        """The same without some cases."""
        return replace(self, cases=tuple(case for case in self.cases if case.case_id not in set(case_ids)))

    def to_predict(self) -> Found:
        """The same as cases to predict: without labels, and all of them test cases."""
        return replace(self, cases=tuple(replace(case, label=None, section="test") for case in self.cases))


@dataclass
class Draft:
    """A layout's reading of a folder, before IDs are made safe and the whole is judged.

    Cases whose patient nothing but the ID may tell have none yet. Where names tell, ``seen`` are the modalities that
    they name, also those that were not asked for, and ``unused`` the volumes of no case.
    """

    layout: str
    cases: list[FoundCase]
    modalities: tuple[str, ...]
    label_names: Mapping[int, str] | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    label_regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    seen: tuple[str, ...] = ()
    unused: tuple[Source, ...] = ()

    @property
    def by_names(self) -> bool:
        """Whether the names of files told what they are, so that patterns can tell it too."""
        return self.layout in ("folders", "files", "bids")


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


class CasesFiles:
    """The files of all cases, to see what a pattern would choose in them.

    Args:
        cases: of each case, key -> the files that may be it.
        root: the data set's folder.
        volumes: all volumes below it; of no case, a pattern is best to fit none.

    Example:
        >>> files = CasesFiles([{"t1": [Source(Path("d/a_t1.nii"))]}, {"t1": [Source(Path("d/b_t1.nii"))]}], Path("d"))
        >>> files.best("t1", ["a_*", "*_t1.nii"]), files.best("t1", ["a_*"])
        (('*_t1.nii', 0), ('a_*', 1))
    """

    def __init__(
        self, cases: Sequence[Mapping[str, Sequence[Source]]], root: Path, volumes: Sequence[Source] = ()
    ) -> None:
        self._root = root
        self._keys = [set(files) for files in cases]
        self._having = Counter(key for keys in self._keys for key in keys)
        self._paths = [(n, source.path) for n, files in enumerate(cases) for of in files.values() for source in of]
        used = {path for _, path in self._paths}
        self._others = [source.path for source in volumes if source.path not in used]
        self._known: dict[tuple[str, str], tuple[int, int]] = {}

    def best(self, key: str, patterns: Iterable[str]) -> tuple[str | None, int]:
        """The pattern that gives most cases one file, and how many then have none or two, as far as it was tried."""
        best, best_worth = None, (-1, 0)
        for pattern in patterns:
            if (key, pattern) not in self._known and sum(known == key for known, _ in self._known) >= _MOST_TRIED:
                # names that differ in each case: the advice for the first cases is read, no other
                return best or pattern, 0
            worth = self._worth(key, pattern)
            if worth > best_worth:
                best, best_worth = pattern, worth
            if worth == (self._having[key], 0):
                break
        return best, self._having[key] - max(best_worth[0], 0)

    def _worth(self, key: str, pattern: str) -> tuple[int, int]:
        """In how many cases with the key a pattern fits one file alone; and less, the more files of no case it fits."""
        if (key, pattern) not in self._known:
            fitting = Counter(number for number, path in self._paths if fits(path, self._root, pattern))
            good = sum(key in self._keys[number] for number, count in fitting.items() if count == 1)
            self._known[key, pattern] = good, -sum(fits(path, self._root, pattern) for path in self._others)
        return self._known[key, pattern]


def rival_problems(
    files: Mapping[str, Sequence[Source]], root: Path, case_id: str, everywhere: CasesFiles | None = None
) -> tuple[tuple[str, str], ...]:
    """What is wrong where several files of a case may be one modality, or its label, and how to choose one.

    Args:
        files: key -> the files that may be it.
        root: the data set's folder.
        case_id: the case.
        everywhere: the files of all cases, so that the advice suits these too; default: this case's alone.

    Example:
        >>> files = {"t1": [Source(Path("d/p1_T1.nii"))], "t2": [Source(Path(f"d/p1_T2{i}.nii")) for i in ("", "_n4")]}
        >>> rival_problems(files, Path("d"), "p1")  # doctest: +NORMALIZE_WHITESPACE
        (('2 files may be t2, expected one',
          'p1_T2.nii, p1_T2_n4.nii; choose with --modality "t2=*_T2.nii", for example'),)
    """
    everywhere = everywhere or CasesFiles([files], root)
    names = [source.path.name for sources in files.values() for source in sources]
    doubled = [key for key, rivals in files.items() if len(rivals) > 1 and key != LABEL]
    # Several patterns alone would leave out what they do not name.
    others = f" --modalities {','.join(sorted(files.keys() - {LABEL}))}" if len(doubled) > 1 else ""
    found, chosen, losses = [], [], []
    for key, rivals in files.items():
        if len(rivals) > 1:
            telling = (p for p in _patterns_for(rivals, root, case_id, names) if _chooses_one(p, rivals, root))
            best, lost = everywhere.best(key, telling)
            pattern = best or "PATTERN"
            losses += [f"{lost} cases have no such {key}, or two: rename theirs"] if best and lost else []
            chosen.append(f'--label "{pattern}"' if key == LABEL else f'--modality "{key}={pattern}"')
            listed = some(rival.path.relative_to(root).as_posix() for rival in rivals)
            found.append((f"{len(rivals)} files may be {key}, expected one", listed))
    # together: with one of the patterns alone the others would be asked for next
    advice = "; ".join([f"choose with {' '.join(chosen)}{others}, for example", *losses])
    return tuple((what, f"{listed}; {advice}") for what, listed in found)


def _chooses_one(pattern: str, rivals: Sequence[Source], root: Path) -> bool:
    return sum(fits(rival.path, root, pattern) for rival in rivals) == 1


def _patterns_for(rivals: Sequence[Source], root: Path, case_id: str, names: Sequence[str]) -> Iterator[str]:
    """Patterns that may tell one of a case's files from the others, in all cases, the plainest first.

    They are names, then places, without the ID; names with an ID as long; and names that do not go on to the left as
    another file's does, which tells ``p10_t1`` from ``p10_n4_t1`` where IDs differ in length: ``*[!n]?_t1.nii.gz``.
    """
    shared = next((index for index, letters in enumerate(zip(*names, strict=False)) if len(set(letters)) > 1), 0)
    front = re.sub(r"[\W_]*[^\W_]*$", "", names[0][:shared])
    parts = [_around(rival.path.name, case_id) or _around(rival.path.name, front) for rival in rivals]
    for rival, around in zip(rivals, parts, strict=True):
        yield "*".join(map(glob.escape, around or [rival.path.name]))
    for rival in rivals:
        place = rival.path.relative_to(root).as_posix()
        yield "*".join(map(glob.escape, _around(place, case_id) or [place]))
    for rival, around in zip(rivals, parts, strict=True):
        if around:
            own = (len(rival.path.name) - sum(map(len, around))) // (len(around) - 1)
            yield ("?" * own).join(map(glob.escape, around))
    for rival, around in zip(rivals, parts, strict=True):
        for other in rivals if around else ():
            excluding = _not_going_on(around[-1], other.path.name)
            yield from (pattern for pattern in excluding if fits(rival.path, root, pattern))  # it, and not the odd one


def _around(name: str, case_id: str) -> list[str]:
    """What is around an ID that stands in a name as whole words; nothing where it does not."""
    parts = re.split(rf"(?<![^\W_]){re.escape(case_id)}(?![^\W_])", name, flags=re.IGNORECASE) if case_id else []
    return parts if len(parts) > 1 else []


def _not_going_on(end: str, other: str) -> Iterator[str]:
    """Patterns of names that end so, and before that differ from another name in one letter."""
    if other.lower().endswith(end.lower()):
        for place, letter in enumerate(reversed(other[: len(other) - len(end)])):
            if letter.isalnum():
                yield f"*[!{letter}]{'?' * place}{glob.escape(end)}"


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
