# SPDX-License-Identifier: Apache-2.0
"""What the names of files, folders and channels say of a volume: the modality's words, as people write them."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from monai_cggm.data.layouts import LABEL

#: A brain mask and its like: a volume that is neither a modality nor the label.
IGNORED = "(ignored)"

#: Modality -> the words that name it, in lower case; ``+`` joins words that follow each other.
NAMES: Mapping[str, str] = {
    "flair": "flair t2f t2flair t2+flair t2w+flair dark+fluid tirm t2+tirm",
    "t1ce": "t1ce t1c t1gd t1gad t1km t1wks t1ks t1post t1wce t1cw cet1 gdt1 t1+ce t1+gd t1+gad t1+km t1+ks t1+post "
    "t1+contrast t1w+ce t1w+gd t1w+gad t1w+post t1w+contrast post+t1 ce+t1 gd+t1 ce+t1w gd+t1w",
    "t1": "t1 t1w t1n t1pre mprage t1+pre",
    "t2": "t2 t2w",
    "t2star": "t2star t2s t2starw t2+star",
    "pd": "pd pdw",
    "adc": "adc",
    "dwi": "dwi hbv",
    "dce": "dce",
    "swi": "swi",
    "asl": "asl",
    "fa": "fa",
    "md": "md",
    "cbf": "cbf",
    "cbv": "cbv rcbv",
    "mtt": "mtt",
    "tmax": "tmax",
    "ttp": "ttp",
    "mra": "mra tof",
    "ct": "ct ncct",
    "cta": "cta",
    "ctp": "ctp",
    "ctres": "ctres",
    "pet": "pet",
    "suv": "suv",
    LABEL: "seg segm segs segmentation segmentations dseg mask masks label labels labelmap lesion lesions gold "
    "gold+standard gt groundtruth ground+truth truth roi rois annotation annotations delineation contour",
    IGNORED: "brainmask brain+mask mask+brain bet+mask probseg",
}

Vocabulary = Mapping[tuple[str, ...], str]

_CONTRAST = {"ce", "gd", "gad", "km", "ks", "post", "contrast"}
#: What follows one of these is where an image was moved to, not what it is: ``T1_to_FLAIR``, ``space-T1w_FLAIR``.
_TOWARDS = {"to", "into", "space", "regto"}
#: Keys that a batch has beside its modalities.
_TAKEN = {"image", LABEL, "labels", "case", "patient", "present", "fused", "pred", "logits", "train", "eval"}


def words_of(name: str) -> list[str]:
    """Split a name into words, in lower case.

    Example:
        >>> words_of("p01-T1_post.brain")
        ['p01', 't1', 'post', 'brain']
    """
    return [match[0].lower() for match in written_words(name)]


def vocabulary_of(extra: Sequence[str] = ()) -> dict[tuple[str, ...], str]:
    """Words that name a key -> the key: :data:`NAMES`, and names that a user adds.

    Example:
        >>> vocabulary_of(["T1 rho"])[("t1", "rho")]
        't1_rho'
    """
    words = {tuple(name.split("+")): key for key, names in NAMES.items() for name in names.split()}
    for name in extra:
        words.setdefault(tuple(words_of(name)), slug_of(name))
    return words


def modality_of(name: str) -> str:
    """The key of a modality that somebody else named: a known one, or the name made safe for a configuration.

    Example:
        >>> [modality_of(name) for name in ("T1w", "t1gd", "FLAIR", "$CT soft tissue", "image", "2")]
        ['t1', 't1ce', 'flair', 'ct_soft_tissue', 'image_1', 'm_2']
    """
    known = vocabulary_of().get(tuple(words_of(name)))
    return slug_of(name) if known in (None, LABEL, IGNORED) else str(known)


def slug_of(name: str) -> str:
    """A name as a key of a batch and of a ``torch.nn.ModuleDict``: lower-case letters, digits and ``_``."""
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "modality"
    if slug[0].isdigit():
        slug = f"m_{slug}"
    # A ModuleDict refuses the names of its own attributes, such as "type".
    return f"{slug}_1" if slug in _TAKEN or hasattr(torch.nn.ModuleDict, slug) else slug


def key_of(
    name: str, vocabulary: Vocabulary, constant: Mapping[str, int] | None = None
) -> tuple[str | None, frozenset[int], tuple[str, ...]]:
    """Tell which key a name names.

    Args:
        name: of a file without endings, or of a folder.
        vocabulary: see :func:`vocabulary_of`.
        constant: word -> how often it is in every name of the data set; such words decide nothing where others do.

    Returns:
        The key or None, which words (by number) name it, and, where the words name several keys, these.

    Example:
        >>> key_of("p01_T1_to_FLAIR", vocabulary_of())
        ('t1', frozenset({1}), ())
        >>> key_of("p01_T1_T2", vocabulary_of())
        (None, frozenset(), ('t1', 't2'))
    """
    words = words_of(name)
    matches = matches_in(words, vocabulary)
    if len({key for key, _ in matches}) > 1:
        left = Counter(constant or {})
        deciding = []
        for key, indices in matches:
            mine = [words[index] for index in indices]
            if all(left[word] > 0 for word in mine):
                left.subtract(mine)
            else:
                deciding.append((key, indices))
        matches = deciding or matches
    keys = list(dict.fromkeys(key for key, _ in matches))
    used = frozenset(index for _, indices in matches for index in indices)
    for special in (IGNORED, LABEL):
        if special in keys:
            return special, used, ()
    if len(keys) > 1:
        return None, frozenset(), tuple(keys)
    return (keys[0], used, ()) if keys else (None, frozenset(), ())


def key_of_description(text: str, vocabulary: Vocabulary) -> str | None:
    """Tell which key a scanner's description of a sequence names: these say more than files' names, in any order.

    Example:
        >>> [key_of_description(t, vocabulary_of()) for t in ("t2_spc_flair_sag", "t1_mprage_tra_KM", "localizer")]
        ['flair', 't1ce', None]
    """
    words = words_of(text)
    keys = {key for key, _ in matches_in(words, vocabulary)}
    if keys == {"t2", "flair"}:
        return "flair"
    if "t1" in keys and keys <= {"t1", "t1ce"} and _CONTRAST & set(words):
        return "t1ce"
    return key_of(text, vocabulary)[0]


def fits(path: Path, root: Path, pattern: str) -> bool:
    """Whether a path fits a pattern in any letter case: its name or, with a ``/`` in the pattern, its place below root.

    Example:
        >>> fits(Path("d/p01/FLAIR.nii.gz"), Path("d"), "*flair*"), fits(Path("d/p01/a.nii"), Path("d"), "p02/*")
        (True, False)
    """
    name = path.relative_to(root).as_posix() if "/" in pattern else path.name
    return fnmatch.fnmatchcase(name.lower(), pattern.lower())


def written_words(name: str) -> list[re.Match[str]]:
    """The words of a name as they are written."""
    return list(re.finditer(r"[^\W_]+", name))


def matches_in(words: Sequence[str], vocabulary: Vocabulary) -> list[tuple[str, list[int]]]:
    """The keys that words name, one by one, each with the numbers of its words."""
    found: list[tuple[str, list[int]]] = []
    index = 0
    while index < len(words):
        for length in (3, 2, 1):
            run = tuple(words[index : index + length])
            key = vocabulary.get(run) if len(run) == length else None
            if key is not None:
                if index == 0 or words[index - 1] not in _TOWARDS:
                    found.append((key, list(range(index, index + length))))
                index += length
                break
        else:
            index += 1
    return found


def without_words(name: str, used: Iterable[int]) -> str:
    """A name without some of its words and without the separators that they leave behind."""
    kept = list(name)
    words = written_words(name)
    for index in used:
        for position in range(*words[index].span()):
            kept[position] = "\0"
    text = re.sub(r"([\W_])\0+[\W_]+", r"\1", "".join(kept)).replace("\0", "")
    return re.sub(r"^[\W_]+|[\W_]+$", "", text)
