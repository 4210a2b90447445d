# SPDX-License-Identifier: Apache-2.0
"""Samples of feature tables and sequences: reading, checks, splits, standardisation, batches."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ignite.distributed as idist
import numpy as np
import torch
from monai.utils import CommonKeys
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from monai_cggm.batches import FUSED, PADDING, PRESENT
from monai_cggm.data.rows import BLOCK, Place, Rows, Table
from monai_cggm.data.splits import PART_OF, Split, check_patients, split_cases
from monai_cggm.data.tables import (
    GROUPS,
    IDS,
    LABELS,
    LENGTHS,
    SPLITS,
    is_special,
    joined_parts,
    read_tables,
    turned,
)
from monai_cggm.errors import DataError
from monai_cggm.files import atomic_path

logger = logging.getLogger(__name__)

Task = Literal["classification", "regression"]
TASKS: tuple[Task, ...] = ("classification", "regression")

#: keys of a sample that no modality may be called
RESERVED = {"case", "patient", "label", "part", "parted", "index", CommonKeys.IMAGE, PRESENT, FUSED}


@dataclass(frozen=True)
class Description:
    """What a network must know of a data set, and what its predictions mean; a run keeps it in ``data.json``.

    Attributes:
        task: ``classification`` or ``regression``.
        modalities: their names, in the order of a mask's columns.
        sizes: numbers at each position of each modality.
        classes: the label that each class index stands for; empty for regression.

    Example:
        >>> Description("classification", ("audio",), {"audio": 4}, ("calm", "angry")).outputs
        2
    """

    task: Task
    modalities: tuple[str, ...]
    sizes: Mapping[str, int]
    classes: tuple[str, ...] = ()

    @property
    def outputs(self) -> int:
        """How many outputs a network has: the number of classes, or 1."""
        return len(self.classes) if self.task == "classification" else 1

    def write(self, folder: str | Path) -> None:
        """Write ``data.json`` into a run's folder, on the first process."""
        if idist.get_rank() == 0:
            with atomic_path(Path(folder) / "data.json") as temporary:
                temporary.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Description:
        """Read what :meth:`write` wrote.

        Args:
            path: ``data.json``, or a file beside it, such as ``model.pt``.

        Raises:
            DataError: where it is missing or is no such file.
        """
        file = Path(path)
        file = file if file.suffix == ".json" else file.parent / "data.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            modalities, classes = tuple(content["modalities"]), tuple(content["classes"])
            return cls(content["task"], modalities, dict(content["sizes"]), classes)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError([f"{file} cannot be read ({error}): expected what a training run wrote there"]) from error


class Samples(list[dict[str, Any]]):
    """Samples, and what all of them have in common.

    Each is a dictionary: ``case`` (its ID), ``patient`` (its group, which a split keeps together), one array a
    modality, ``(D,)`` or ``(T, D)``, of those that it has, ``label`` where there are labels, and ``part`` where the
    file says what part of a split it is in. ``parted`` marks samples of a group that a published split parts; see
    :func:`split_features`.

    Args:
        items: the samples.
        description: of the data set.
        skipped: ID → reason, of the samples that were left out: in published files those of no class or of several,
            and where one modality is read and may be missing, those without it. Anywhere else a sample that cannot be
            used is an error.

    Attributes:
        description: as given.
        skipped: as given.
    """

    def __init__(
        self, items: Iterable[dict[str, Any]], description: Description, skipped: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(items)
        self.description = description
        self.skipped = dict(skipped or {})


def load_features(
    source: str | Path,
    modalities: Sequence[str] | None = None,
    *,
    task: Task = "classification",
    allow_missing: bool = False,
    need_label: bool = True,
    classes: Sequence[str] | None = None,
    limits: tuple[float, float] | None = None,
) -> Samples:
    """Read feature tables or sequences, one a modality, and check them.

    ``source`` is a folder with a file a modality (``audio.csv``, ``text.npz``, …) and ``labels.csv`` (or ``.npy``,
    ``.npz``, ``.mat``), or one ``.npz`` or ``.mat`` file that has an array a modality and one of labels; see
    :func:`monai_cggm.data.tables.read_tables`. Arrays are ``(N, D)``, or ``(N, T, D)`` for sequences, whose lengths may
    stand in ``<modality>_lengths``. No file can run code here. What others publish of CMU-MOSI, CMU-MOSEI and IEMOCAP
    is read as it lies, too (:mod:`monai_cggm.data.published`).

    Arrays in ``.npy`` files of a folder may be larger than the memory: they are mapped, checked in blocks, and a
    sample's numbers are read when they are used, in the type that they have there. Other numbers become float32, or
    stay float16.

    Rows of different files belong together by their IDs, where files have them, and by their place otherwise. Where
    ``labels.csv`` alone has IDs, its order is that of all.
    ``groups`` (a file, key, or column of ``labels.csv``) names what a split must not part: a speaker, a video.
    ``splits``, or names such as ``x_train`` and ``x_test``, give a split that comes with the data.

    Classes may be words, or whole numbers from any start; they are numbered in their order, the order of numbers for
    numbers, and the log says which is which.

    Args:
        source: folder or file.
        modalities: names and order of those to use; default: all that are found. Of a MATLAB cell of views: names for
            all of them, in the file's order, or some of ``view1`` to ``viewV``.
        task: ``classification``, or ``regression`` of one number.
        allow_missing: whether a sample may lack modalities (one is enough): a row that is NaN throughout, in pickles,
            too, although none that is published has one. Where one modality is read, samples without it are left out.
        need_label: whether there must be labels; without it they are not read.
        classes: the classes that are known already, so that no other may come.
        limits: of a regression: the least and the greatest label that the scale has.

    Returns:
        The samples, in the order of the first modality's file; ``skipped`` says which ones the file has beyond them.

    Raises:
        ValueError: for another task.
        DataError: lists what is wrong: missing files and modalities, parts that are empty or lack a modality, lengths
            or IDs that do not fit, NaN, labels that are missing, no whole numbers, of no known class or beyond the
            limits. A row is named by its number in its own file, from 1, without a head.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rng = np.random.default_rng(0)
        ...     np.savez(f"{folder}/two.npz", a=rng.normal(size=(4, 3)), b=rng.normal(size=(4, 5)), y=[1, 1, 2, 2])
        ...     samples = load_features(f"{folder}/two.npz")
        >>> samples.description.sizes, samples.description.classes, samples[0]["label"]
        ({'a': 3, 'b': 5}, ('1', '2'), 0)
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    tables, parts = joined_parts(read_tables(source))
    tables = _renamed(tables, modalities)
    names = _modalities(tables, modalities, source)
    labels = _special(tables, LABELS) if need_label else None
    if need_label and labels is None:
        raise DataError([f"{source} has no labels, expected a file or an array called {', '.join(LABELS[:4])}"])
    features = {name: _matrix(tables[name], None if labels is None else labels.values.size) for name in names}
    _check_lengths(tables)
    beside = {name + LENGTHS: tables[name + LENGTHS] for name in names if name + LENGTHS in tables}
    special = {"label": labels} | {n: _special(tables, kind) for n, kind in (("group", GROUPS), ("split", SPLITS))}
    beside |= {name: table for name, table in special.items() if table is not None}
    ids = _ids(features, _special(tables, IDS), [_special(tables, LABELS), *beside.values()], parts)
    places = _places({**features, **beside}, ids)
    # only published files skip rows: their tables have one order, and say the split in a table
    skipped = {} if labels is None else {ids[row]: reason for row, reason in labels.skipped.items()}
    used = [row for row, case in enumerate(ids) if case not in skipped] if skipped else None
    order = ids if used is None else [ids[row] for row in used]
    if not order:
        raise DataError([f"{source} has no sample that can be used"])
    rows = {name: _rows(table, places[name], used) for name, table in features.items()}
    # which row of its table a sample has: what is aligned is in the samples' order
    own = {name: _own_rows(place, used, len(ids)) for name, place in places.items()}
    aligned = {name: table.values.ravel()[own[name]] for name, table in beside.items()}
    lengths = {name: aligned[name + LENGTHS] for name in names if name + LENGTHS in aligned}
    called = {name: _Called(table, own[name], order) for name, table in {**features, **beside}.items()}
    part_of = _parts(aligned["split"], called["split"]) if "split" in aligned else parts
    present = _check_values(rows, lengths, called, allow_missing)
    items = _items(order, rows, lengths, present)
    group_of = [str(group) for group in aligned["group"]] if "group" in aligned else order
    parted = beside["split"].parted if "split" in beside else frozenset()
    for row, item in enumerate(items):
        item["patient"] = group_of[row]
        if part_of is not None:
            item["part"] = part_of[row]
        if group_of[row] in parted:
            item["parted"] = True
    known: tuple[str, ...] = tuple(classes or ())
    if labels is not None:
        targets, known = _labels(aligned["label"], called["label"], task, known, limits)
        for item, target in zip(items, targets, strict=True):
            item["label"] = target
    if len(names) == 1:  # of those that it may lack; classes and groups are known from all
        lacking = {item["case"]: f"has no {names[0]}" for item in items if names[0] not in item}
        items = [item for item in items if item["case"] not in lacking]
        if lacking:
            skipped |= lacking
            logger.warning("Left out %d of %d samples of %s without %s", len(lacking), len(order), source, names[0])
    description = Description(task, tuple(names), {n: rows[n].shape[-1] for n in names}, known)
    _tell(source, description, len(items), present, skipped)
    return Samples(items, description, skipped)


def modalities_in(source: str | Path) -> list[str]:
    """Return the names of all modalities of a folder or file, in its order.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/two.npz", b=np.zeros((4, 3)), a=np.zeros((4, 5)), y=[1, 1, 2, 2])
        ...     modalities_in(f"{folder}/two.npz")
        ['b', 'a']
    """
    return _modalities(joined_parts(read_tables(source))[0], None, source)


def split_features(
    samples: Samples,
    *,
    sizes: Sequence[int] | None = None,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    split_file: str | Path | None = None,
    source: Literal["draw", "file"] | None = None,
) -> Split:
    """Split samples into training, validation and test parts; a group's samples stay together.

    Splits that others publish of a data set may part a group, a video for example. They are taken as they are, so that
    results can be compared; no part that is drawn here shares a group with another one.

    Args:
        samples: from :func:`load_features`.
        sizes: see :func:`monai_cggm.data.split_cases`.
        fractions: see there; where the data come with a training and a test part only, the validation part is drawn
            with their first two from those of the training part whose groups are not in the test part.
        seed: seed of the draw.
        split_file: JSON of IDs, which wins over everything.
        source: ``"file"``: the split that comes with the data. ``"draw"``: another one. None: the data's, where there
            is one and no ``sizes`` are asked for.

    Returns:
        ``{"train": [...], "validation": [...], "test": [...]}``.

    Raises:
        DataError: where the data come with no split and ``source`` is ``"file"``, where a group is in two parts of it
            and it is none that others have published, and as in :func:`monai_cggm.data.split_cases`.
        ValueError: for another ``source``.

    Example:
        >>> items = [{"case": f"row_{i}", "part": "test" if i < 2 else "train"} for i in range(8)]
        >>> samples = Samples(items, Description("classification", ("a",), {"a": 1}, ("0", "1")))
        >>> {part: len(chosen) for part, chosen in split_features(samples).items()}
        {'train': 5, 'validation': 1, 'test': 2}
    """
    if source not in (None, "draw", "file"):
        raise ValueError(f"source must be 'draw', 'file' or None, got {source!r}")
    own = bool(samples) and all("part" in sample for sample in samples)
    if source == "file" and not own:
        raise DataError(
            ["the data come with no split: expected arrays x_train and x_test, or a column or file `split`"]
        )
    if split_file is not None or not own or source == "draw" or (source is None and sizes is not None):
        return split_cases(samples, sizes=sizes, fractions=fractions, seed=seed, split_file=split_file)
    split: Split = {part: [s for s in samples if s["part"] == part] for part in ("train", "validation", "test")}
    if not split["train"]:
        raise DataError(["the split that comes with the data has no training part; --split_source draw makes another"])
    if not split["validation"] and split["train"]:
        tested = {s["patient"] for s in split["test"] if "parted" in s}
        free = [s for s in split["train"] if s.get("patient") not in tested]
        if not free:
            raise DataError(["every group of the training part is in the test part, too: none is left for validation"])
        share = fractions[1] / (fractions[0] + fractions[1])
        validated = split_cases(free, fractions=(1 - share, share, 0.0), seed=seed)["validation"]
        chosen = {s["case"] for s in validated}
        split |= {"train": [s for s in split["train"] if s["case"] not in chosen], "validation": validated}
    check_patients(split)
    return split


def feature_statistics(samples: Sequence[Mapping[str, Any]], modalities: Sequence[str]) -> dict[str, Any]:
    """Return mean and standard deviation of each number of each modality, over samples and positions.

    Fit it on the training part alone. A number that never changes gets the standard deviation 1.

    Args:
        samples: the training part.
        modalities: names.

    Returns:
        Modality → (mean, standard deviation), each ``(D,)``, for ``statistics`` of
        :class:`monai_cggm.networks.sequence.MultimodalTransformer`.

    Raises:
        DataError: for a modality that no sample has.

    Example:
        >>> mean, std = feature_statistics([{"a": np.array([1.0, 5.0])}, {"a": np.array([3.0, 5.0])}], ["a"])["a"]
        >>> mean.tolist(), std.tolist()
        ([2.0, 5.0], [1.0, 1.0])
    """
    statistics = {}
    for name in modalities:
        count, mean, squares, largest = 0, np.zeros(()), np.zeros(()), np.zeros(())
        for block in _blocks_of(samples, name):
            # Chan, Golub and LeVeque's sums of squares about the mean, joined block by block
            size, center = len(block), block.mean(axis=0)
            share = size / (count + size)
            squares = squares + ((block - center) ** 2).sum(axis=0) + (center - mean) ** 2 * count * share
            mean = mean + (center - mean) * share
            largest = np.maximum(largest, np.abs(block).max(axis=0))
            count += size
        if not count:
            raise DataError([f"modality {name}: no training sample has it"])
        std = np.sqrt(squares / count)
        # rounding leaves a constant column with a deviation that is not quite 0
        constant = std <= 1e-9 * np.maximum(largest, 1e-30)
        statistics[name] = (mean, np.where(constant, 1.0, std))
    return statistics


def _blocks_of(samples: Iterable[Mapping[str, Any]], name: str) -> Iterator[np.ndarray]:
    """A modality's positions one below the other in float64, ``(n, D)``, some samples at a time."""
    rows: list[np.ndarray] = []
    numbers = 0
    for sample in samples:
        if name not in sample:
            continue
        rows.append(np.atleast_2d(sample[name]))
        numbers += rows[-1].size
        if numbers >= BLOCK:
            yield np.concatenate(rows).astype(np.float64)
            rows, numbers = [], 0
    if rows:
        yield np.concatenate(rows).astype(np.float64)


class FeatureDataset(Dataset):
    """Samples as a network takes them.

    An item has ``image``, a dict with a float32 tensor a modality (zeros for one that the sample lacks); ``present``,
    boolean ``(M,)``; ``case``; ``index``, its place in the data set; and ``label``: a class index, or ``(1,)`` for
    regression.

    A pickle of it, which a worker process that is spawned gets, says where the numbers of mapped files lie; it does not
    hold them.

    Args:
        samples: as :func:`load_features` gives them, or some of them.
        description: of the data set.

    Raises:
        DataError: for no sample.

    Example:
        >>> description = Description("classification", ("a", "b"), {"a": 2, "b": 3}, ("no", "yes"))
        >>> item = FeatureDataset([{"case": "x", "a": np.array([1.0, 2.0]), "label": 1}], description)[0]
        >>> item["image"], item["present"].tolist(), item["label"].item()
        ({'a': tensor([1., 2.]), 'b': tensor([0., 0., 0.])}, [True, False], 1)
    """

    def __init__(self, samples: Sequence[Mapping[str, Any]], description: Description) -> None:
        if not samples:
            raise DataError(["this part of the split has no sample"])
        self.samples = samples
        self.description = description
        self.sequences = {
            name for name in description.modalities if any(np.ndim(s[name]) == 2 for s in samples if name in s)
        }

    def __getstate__(self) -> dict[str, Any]:
        """Return what a worker process gets that is spawned: of mapped files, where the numbers lie in them."""
        samples = [
            {name: (isinstance(value, np.ndarray) and Place.of(value)) or value for name, value in sample.items()}
            for sample in self.samples
        ]
        return {**self.__dict__, "samples": samples}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the files again, each once."""
        self.__dict__ |= state
        paths = {value.path for sample in self.samples for value in sample.values() if isinstance(value, Place)}
        files = {path: np.memmap(path, mode="r") for path in paths}
        self.samples = [
            {name: value.read(files[value.path]) if isinstance(value, Place) else value for name, value in s.items()}
            for s in self.samples
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """Return a sample.

        Args:
            key: its index, or (epoch, index), as :class:`monai_cggm.data.EpochSampler` draws them.
        """
        index = range(len(self))[key[1] if isinstance(key, tuple) else key]
        sample = self.samples[index]
        names = self.description.modalities
        item: dict[str, Any] = {
            CommonKeys.IMAGE: {name: self._values(sample, name) for name in names},
            PRESENT: torch.tensor([name in sample for name in names]),
            "case": sample["case"],
            "index": index,
        }
        if "label" in sample:
            classes = self.description.task == "classification"
            label = sample["label"]
            item[CommonKeys.LABEL] = torch.tensor(label) if classes else torch.tensor([label], dtype=torch.float32)
        return item

    def present(self) -> list[tuple[bool, ...]]:
        """Return which modalities each sample has."""
        return [tuple(name in sample for name in self.description.modalities) for sample in self.samples]

    def _values(self, sample: Mapping[str, Any], name: str) -> Tensor:
        if name in sample:
            values = np.asarray(sample[name], dtype=np.float32)
            return torch.from_numpy(values if values.flags.writeable else values.copy())  # a mapped file's are not
        size = self.description.sizes[name]
        return torch.zeros(1, size) if name in self.sequences else torch.zeros(size)


def collate_features(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make a batch of items of :class:`FeatureDataset`: sequences are filled up to the longest, with a mask of it.

    Args:
        items: B items.

    Returns:
        ``image``: modality → ``(B, D)``, or ``(B, T, D)`` with ``<modality>_padding`` ``(B, T)``; ``present``
        ``(B, M)``; ``label`` ``(B,)`` or ``(B, 1)``; ``case``, a list; ``index`` ``(B,)``.

    Example:
        >>> two = [{"image": {"a": torch.ones(n, 2)}, "present": torch.tensor([True]), "case": str(n), "index": n}
        ...        for n in (1, 3)]
        >>> collate_features(two)["image"]["a_padding"].tolist()
        [[False, True, True], [False, False, False]]
    """
    inputs: dict[str, Tensor] = {}
    for name in items[0][CommonKeys.IMAGE]:
        values = [item[CommonKeys.IMAGE][name] for item in items]
        if values[0].dim() == 1:
            inputs[name] = torch.stack(values)
        else:
            inputs[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
            lengths = torch.tensor([len(value) for value in values])
            inputs[name + PADDING] = torch.arange(inputs[name].shape[1]) >= lengths.unsqueeze(1)
    batch: dict[str, Any] = {
        CommonKeys.IMAGE: inputs,
        PRESENT: torch.stack([item[PRESENT] for item in items]),
        "case": [item["case"] for item in items],
        "index": torch.tensor([item["index"] for item in items]),
    }
    if CommonKeys.LABEL in items[0]:
        batch[CommonKeys.LABEL] = torch.stack([item[CommonKeys.LABEL] for item in items])
    return batch


class PresenceBatches(Sampler[list[int]]):
    """Batches of samples that have the same modalities, in the data set's order, for evaluation.

    A prediction from a subset of the modalities is then made for all samples of a batch or for none. Under several
    processes each gets its share of every kind of batch.

    Args:
        dataset: what to sample.
        batch_size: most samples of a batch.
        num_replicas: processes; by default those of the run.
        rank: this process; likewise.

    Example:
        >>> description = Description("classification", ("a", "b"), {"a": 1, "b": 1}, ("no", "yes"))
        >>> both, one = {"a": np.zeros(1), "b": np.zeros(1)}, {"a": np.zeros(1)}
        >>> list(PresenceBatches(FeatureDataset([both, one, both, both], description), 2))
        [[0, 2], [3], [1]]
    """

    def __init__(
        self, dataset: FeatureDataset, batch_size: int, num_replicas: int | None = None, rank: int | None = None
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        step = idist.get_world_size() if num_replicas is None else num_replicas
        first = idist.get_rank() if rank is None else rank
        alike: dict[tuple[bool, ...], list[int]] = {}
        for index, present in enumerate(dataset.present()):
            alike.setdefault(present, []).append(index)
        shares = [indices[first::step] for indices in alike.values()]
        self.batches = [share[i : i + batch_size] for share in shares for i in range(0, len(share), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


# ---------------------------------------------------------------------- what load_features is made of


def _check_lengths(tables: Mapping[str, Table]) -> None:
    """Refuse lengths of no modality, whose padding would be read as numbers."""
    problems = [
        f"{name}: lengths of no modality, expected one of {', '.join(n for n in tables if not is_special(n))} "
        f"({table.where})"
        for name, table in tables.items()
        if name.endswith(LENGTHS) and name.removesuffix(LENGTHS) not in tables
    ]
    if problems:
        raise DataError(problems)


def _special(tables: Mapping[str, Table], names: Sequence[str]) -> Table | None:
    return next((table for name, table in tables.items() if name.lower() in names), None)


def _renamed(tables: dict[str, Table], modalities: Sequence[str] | None) -> dict[str, Table]:
    """Views of a cell under the names that were given for all of them."""
    views = [name for name, table in tables.items() if table.turnable and name.startswith("view")]
    if modalities is None or len(views) != len(modalities) or set(modalities) & set(tables):
        return tables
    new = dict(zip(views, modalities, strict=True))
    return {new.get(name, name): table for name, table in tables.items()}


def _modalities(tables: Mapping[str, Table], wanted: Sequence[str] | None, source: str | Path) -> list[str]:
    found = [name for name in tables if not is_special(name)]
    names = found if wanted is None else list(wanted)
    problems = [
        f"modality {name}: not found in {source}, which has {', '.join(found) or 'none'}"
        for name in names
        if name not in found
    ]
    problems += [f"modality {name}: this name means something else in a sample" for name in names if name in RESERVED]
    # a key of padding masks, and ModuleDict's separator
    problems += [f"modality {name}: a name may not end in {PADDING!r}" for name in names if name.endswith(PADDING)]
    problems += [f"modality {name}: a name may not have a dot in it" for name in names if "." in name]
    if not names:
        problems.append(f"{source} has no modality")
    if len(set(names)) != len(names):
        problems.append(f"modalities must differ from each other, got {names}")
    if problems:
        raise DataError(problems)
    return names


def _matrix(table: Table, samples: int | None) -> Table:
    """A modality's table with a row a sample, also where a row is one number."""
    table = turned(table, samples)
    if table.values.ndim > 1:
        return table
    return replace(table, values=table.values[:, None], following=tuple(piece[:, None] for piece in table.following))


def _ids(
    features: Mapping[str, Table], ids: Table | None, others: Sequence[Table | None], parts: Sequence[str] | None
) -> list[str]:
    """The samples' IDs in their order: the first modality's that has some, those of all, the labels', or places.

    Labels name the rows where they are not needed, too: a prediction then has the sample's own name.
    """
    given = next((table for table in features.values() if table.ids is not None), None)
    first = next(iter(features.values()))
    if given is not None and given.ids is not None:
        found, where = list(given.ids), given.where
    elif ids is not None:
        found, where = [str(i).strip() for i in ids.values.ravel().tolist()], ids.where
    elif (named := next((t for t in others if t is not None and t.ids is not None), None)) is not None:
        found, where = list(named.ids or ()), named.where
    else:
        width = len(str(len(first)))
        kinds = parts if parts is not None and len(parts) == len(first) else ["row"] * len(first)
        return [f"{kind}_{i:0{width}d}" for i, kind in enumerate(kinds, 1)]
    repeated = sorted(case for case, times in Counter(found).items() if times > 1)
    problems = [f"ID {case!r} is there more than once ({where})" for case in repeated[:5]]
    problems += [f"row {i} has no ID ({where})" for i, case in enumerate(found, 1) if not case][:5]
    if problems:
        raise DataError(problems)
    return found


def _places(tables: Mapping[str, Table], order: Sequence[str]) -> dict[str, list[int] | None]:
    """Where the rows of each table are, in the order of the IDs; None where they lie in it."""
    places: dict[str, list[int] | None] = {}
    problems = []
    known = set(order)
    for name, table in tables.items():
        size = table.values.size if _is_vector(name) else len(table)
        what = name if _is_vector(name) else f"modality {name}"
        if table.ids is None or table.ids == tuple(order):
            places[name] = None
            if size != len(order):
                problems.append(f"{what}: {size} rows, expected {len(order)} ({table.where})")
            continue
        rows = {case: i for i, case in enumerate(table.ids)}
        lacking, unknown = [c for c in order if c not in rows], [c for c in table.ids if c not in known]
        for kind, some in (("lacks", lacking), ("has unknown", unknown)):
            if some:
                problems.append(f"{what}: {kind} {len(some)} IDs, the first is {some[0]!r} ({table.where})")
        if len(table.ids) != size or len(rows) != len(table.ids):
            problems.append(f"{what}: {len(rows)} different IDs for {size} rows ({table.where})")
        if not problems:
            places[name] = [rows[case] for case in order]
    if problems:
        raise DataError(problems)
    return places


def _is_vector(name: str) -> bool:
    return name in ("label", "group", "split") or name.endswith(LENGTHS)


def _rows(table: Table, places: Sequence[int] | None, used: Sequence[int] | None) -> Rows:
    rows = Rows((table.values, *table.following), places)
    return rows if used is None else rows.taken(used)


def _own_rows(places: Sequence[int] | None, used: Sequence[int] | None, samples: int) -> np.ndarray:
    rows = np.arange(samples) if places is None else np.asarray(places)
    return rows if used is None else rows[used]


@dataclass(frozen=True)
class _Called:
    """What messages call the samples of a table, whose rows may have another order than the samples."""

    table: Table
    rows: np.ndarray
    cases: Sequence[str]

    def named(self, sample: int) -> tuple[str, str]:
        """A sample's row and ID, and where the row lies."""
        number, where = self.table.lies(int(self.rows[sample]))
        return f"row {number} ({self.cases[sample]})", where


def _items(
    order: Sequence[str], rows: Mapping[str, Rows], lengths: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Samples with their features, none of which is copied."""
    items: list[dict[str, Any]] = [{"case": case} for case in order]
    for name, values in rows.items():
        ends = lengths.get(name)
        for row, item in enumerate(items):
            if present[name][row]:
                item[name] = values[row] if ends is None else values[row][: int(ends[row])]
    return items


def _check_values(
    rows: Mapping[str, Rows],
    lengths: Mapping[str, np.ndarray],
    called: Mapping[str, _Called],
    allow_missing: bool,
) -> dict[str, np.ndarray]:
    """Say which samples have which modality, ``(N,)`` a modality, after a look at every number."""
    present, problems = {}, []
    for name, values in rows.items():
        if values.dtype.kind not in "fiub" or len(values.shape) not in (2, 3) or 0 in values.shape:
            kind = "objects" if values.dtype == object else f"{values.dtype} {values.shape}"
            problems.append(
                f"modality {name}: holds {kind}, expected numbers (N, D) or sequences (N, T, D) "
                f"({called[name].table.where})"
            )
            continue
        problem = _length_problem(lengths[name], values.shape, called[name + LENGTHS]) if name in lengths else None
        if problem:
            problems.append(f"modality {name}: {problem}")
            continue
        bad, empty = _bad_and_empty(values, lengths[name].astype(int) if name in lengths else None)
        wrong = bad & ~(empty & allow_missing) | (empty & (not allow_missing))
        if wrong.any():
            first, where = called[name].named(int(wrong.argmax()))
            hint = "; a row that is NaN throughout counts as missing with allow_missing" if empty[wrong].all() else ""
            problems.append(
                f"modality {name}: {int(wrong.sum())} rows with NaN, infinite or no values, the first is "
                f"{first}{hint} ({where})"
            )
        present[name] = ~empty
    if not problems:
        none = ~np.stack(list(present.values())).any(axis=0)
        if none.all() or (none.any() and len(rows) > 1):
            first, where = next(iter(called.values())).named(int(none.argmax()))
            problems.append(f"{first} has none of the modalities {', '.join(rows)} ({where})")
    if problems:
        raise DataError(problems)
    return present


def _bad_and_empty(rows: Rows, lengths: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows that have NaN or infinity within their length, and rows that are NaN throughout or of length 0."""
    bad, empty = np.zeros(len(rows), dtype=bool), np.zeros(len(rows), dtype=bool)
    for start, block in rows.blocks():
        here = slice(start, start + len(block))
        with np.errstate(over="ignore"):
            finite = np.isfinite(block.astype(np.float32, copy=False))
        if not finite.all():
            empty[here] = np.isnan(block).reshape(len(block), -1).all(axis=1)
            if lengths is not None:
                finite |= (np.arange(block.shape[1]) >= lengths[here, None])[..., None]
            bad[here] = ~finite.reshape(len(block), -1).all(axis=1)
        if lengths is not None:
            empty[here] |= lengths[here] == 0
    return bad, empty


def _length_problem(lengths: np.ndarray, shape: Sequence[int], called: _Called) -> str | None:
    if len(shape) != 3:
        return f"has lengths and is no sequence (N, T, D) ({called.table.where})"
    wrong = ~np.isin(lengths, np.arange(shape[1] + 1))
    if not wrong.any():
        return None
    sample = int(wrong.argmax())
    row, where = called.named(sample)
    return f"length {lengths[sample]} in {row}, expected 0 to {shape[1]} ({where})"


def _parts(values: np.ndarray, called: _Called) -> list[str]:
    words = [str(value).strip().lower() for value in values]
    sample = next((i for i, word in enumerate(words) if word not in PART_OF), None)
    if sample is not None:
        row, where = called.named(sample)
        raise DataError([f"split: {words[sample]!r} in {row}, expected train, validation or test ({where})"])
    return [PART_OF[word] for word in words]


def _labels(
    values: np.ndarray, called: _Called, task: Task, known: tuple[str, ...], limits: tuple[float, float] | None
) -> tuple[list[Any], tuple[str, ...]]:
    """Targets, and the classes that they count through."""
    where = called.table.where
    if values.dtype == object:
        raise DataError([f"labels: hold objects, expected numbers or words ({where})"])

    def refuse(rows: np.ndarray, expected: str) -> None:
        if rows.any():
            index = int(rows.argmax())
            row, file = called.named(index)
            raise DataError([f"labels: {row} is {str(values[index])!r}, expected {expected} ({file})"])

    numbers = _as_numbers(values)
    if task == "regression":
        if numbers is None:
            refuse(
                np.array([_as_numbers(value) is None for value in values]), "a number; words need --task classification"
            )
            return [], ()
        refuse(~np.isfinite(numbers), "a finite number")
        if limits is not None:
            low, high = limits
            refuse((numbers < low) | (numbers > high), f"{low:g} to {high:g}; another scale needs --sentiment false")
        return [float(n) for n in numbers], ()
    if numbers is None:
        words = [str(value).strip() for value in values]
        refuse(np.array([not word for word in words]), "a class")
        classes = known or tuple(sorted(set(words)))
    else:
        refuse(
            ~np.isfinite(numbers) | (numbers != np.round(numbers)),
            "a whole number or a word for classification; other numbers need --task regression",
        )
        words = [str(int(n)) for n in numbers]
        classes = known or tuple(str(int(n)) for n in np.unique(numbers))
    place = {name: i for i, name in enumerate(classes)}
    shown = ", ".join(classes[:10])
    refuse(np.array([word not in place for word in words]), f"one of the {len(classes)} classes {shown}")
    if len(classes) < 2:
        raise DataError([f"labels: one class only, {classes[0]!r}: there is nothing to tell apart ({where})"])
    return [place[word] for word in words], classes


def _as_numbers(values: np.ndarray) -> np.ndarray | None:
    try:
        return values.astype(np.float64)
    except ValueError:
        return None


def _tell(
    source: str | Path,
    description: Description,
    samples: int,
    present: Mapping[str, np.ndarray],
    skipped: Mapping[str, str],
) -> None:
    of = ", ".join(f"{name} ({description.sizes[name]})" for name in description.modalities)
    missing = {name: int((~there).sum()) for name, there in present.items() if not there.all() and len(present) > 1}
    lines = [f"{samples} samples in {source} of {of}"]
    if description.classes:
        shown = [f"{i} = {name}" for i, name in enumerate(description.classes)]
        lines.append(f"classes: {', '.join(shown[:20])}{', …' if len(shown) > 20 else ''}")
    if missing:
        lines.append("without " + ", ".join(f"{name}: {count}" for name, count in missing.items()))
    if skipped:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in Counter(skipped.values()).most_common())
        lines.append(f"{len(skipped)} samples left out ({reasons})")
    logger.info("; ".join(lines))
