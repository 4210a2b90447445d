# SPDX-License-Identifier: Apache-2.0
"""Volumes that are prepared once and kept, in memory or on disk."""

from __future__ import annotations

import base64
import copy
import enum
import functools
import hashlib
import json
import logging
import os
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import monai
import numpy as np
import torch
from monai.data import Dataset as MonaiDataset
from monai.data import MetaTensor, get_track_meta
from monai.transforms import Compose, Transform
from monai.transforms.traits import RandomizableTrait
from safetensors.torch import save_file
from torch.utils.data import Dataset
from tqdm import tqdm

from monai_cggm.data.checks import check_case
from monai_cggm.data.layouts import LABEL, Case
from monai_cggm.data.mapped import read_tensors
from monai_cggm.errors import CaseError, DataError
from monai_cggm.files import atomic_path

logger = logging.getLogger(__name__)

#: Part of the name of every file on disk: raise it where a change of this package makes old files wrong.
_FORMAT = 2
_TENSOR, _META_TENSOR, _ARRAY, _TUPLE = "__tensor__", "__meta_tensor__", "__array__", "__tuple__"
_MARKS = {_TENSOR, _META_TENSOR, _ARRAY, _TUPLE}


class CachedVolumes(Dataset):
    """Prepared cases, kept in memory or as files.

    An item is a new dictionary each time, but the tensors in it are the cache's own: do not change them in place.

    Args:
        items: one prepared case each, or the file that holds it.
        skipped: case ID -> reason, of the cases that were left out.

    Attributes:
        skipped: as given.
    """

    def __init__(
        self, items: Sequence[Mapping[Hashable, Any] | Path], skipped: Mapping[str, str] | None = None
    ) -> None:
        self.items = list(items)
        self.skipped = dict(skipped or {})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[Hashable, Any]:
        item = self.items[index]
        if not isinstance(item, Path):
            return dict(item)
        try:
            return _read_volume(item)
        except Exception as error:
            problem = f"the prepared volume {item} cannot be read ({error}): the next run makes it anew"
            raise DataError([problem]) from error


class CaseDataset(MonaiDataset):
    """MONAI's ``Dataset`` of cases, whose errors name the case and its file.

    Args:
        data: datalist items (see :func:`monai_cggm.data.load_cases`).
        transform: MONAI transforms.

    Raises:
        CaseError: where an item is asked for that cannot be prepared.

    Example:
        >>> CaseDataset([{"case": "p01", "image": 1}], monai.transforms.Identityd("image"))[0]["image"]
        1
    """

    def _transform(self, index: int) -> Any:
        try:
            return super()._transform(index)
        except Exception as error:
            raise _case_error(self.data[index], error) from error


def cached_volumes(
    cases: Sequence[Mapping[Any, Any]],
    transform: Callable | Sequence[Callable],
    *,
    cache_dir: str | Path | None = None,
    workers: int = 0,
    skip_bad: bool = False,
    progress: bool = True,
) -> CachedVolumes:
    """Run the deterministic transforms over all cases, before the first epoch, and keep what comes out.

    In memory (the default) every process holds all the volumes. With ``cache_dir`` they are files in the format of
    safetensors, which are read through a memory map and can run no code: memory does not grow with the number of cases,
    and the processes of a run and the runs after it share the files. A file's name depends on the case's entry, on size
    and time of its files and on the transforms with all their settings, so a changed configuration never meets old
    volumes; the folder may be deleted at any time. MONAI's metadata take longer to read than a slice: while its
    ``set_track_meta(False)`` is in force, they are left out, and volumes are plain tensors.

    Tensors ``(C, H, W, D)`` are stored slice by slice, all channels of a slice together, so that a slice is one piece
    and reading it touches no others; each owns its memory: a crop does not keep the whole volume. End the chain with
    ``CastToTyped`` to a small type.

    MONAI's ``CacheDataset`` and ``PersistentDataset`` do much of this. This function is there because they stop at the
    first error without naming the case, share one reader among threads, and, on disk, notice neither changed files nor
    changed settings, lose affines under ``weights_only`` and can leave a truncated file behind.

    Args:
        cases: datalist items (see :func:`monai_cggm.data.load_cases`).
        transform: deterministic MONAI transforms; random ones belong in :class:`monai_cggm.data.SliceDataset`.
        cache_dir: folder for the volumes.
        workers: threads that prepare cases at the same time (0 and 1 are the same); each needs the memory of about
            five uncompressed float32 volumes.
        skip_bad: leave bad cases out, log them and list them in ``skipped``, instead of failing.
        progress: show a progress bar (on the first process only).

    Returns:
        The volumes, in the order of ``cases``.

    Raises:
        CaseError: at the first bad case, which it names with its file, unless ``skip_bad``.
        DataError: where no case is left.
        ValueError: where ``transform`` holds a random transform, or there are no cases.

    Example:
        >>> cases = [{"case": "p01", "image": torch.ones(1, 4, 4, 2)}]
        >>> volumes = cached_volumes(cases, monai.transforms.CastToTyped("image", dtype=torch.float16), progress=False)
        >>> volumes[0]["case"], volumes[0]["image"].dtype
        ('p01', torch.float16)
    """
    if not cases:
        raise ValueError("no cases to prepare")
    chain = _deterministic_chain(transform)
    prepare: Callable[[Mapping[Hashable, Any]], dict[Hashable, Any] | Path]
    if cache_dir is None:
        prepare = functools.partial(_prepare, chain=chain)
    else:
        prepare = functools.partial(_prepare_on_disk, chain=chain, folder=Path(cache_dir), settings=_describe(chain))
    items: list[dict[Hashable, Any] | Path | None] = [None] * len(cases)
    problems: dict[int, CaseError] = {}

    def fill(index: int) -> None:
        try:
            items[index] = prepare(cases[index])
        except CaseError as error:
            if not skip_bad:
                raise
            problems[index] = error

    _run(fill, _own_share_first(len(cases)), workers=workers, progress=progress and idist.get_rank() == 0)
    lines = [str(problems[index]) for index in sorted(problems)]
    if lines:
        logger.warning("Left out %d bad cases:\n  %s", len(lines), "\n  ".join(lines))
    good = [item for item in items if item is not None]
    if not good:
        raise DataError(["no case could be prepared", *lines])
    return CachedVolumes(good, {problems[index].case: str(problems[index]) for index in sorted(problems)})


class _OwnStorage(Transform):
    """Give every tensor of an item its own memory, volumes slice by slice."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return {k: _own(v) if isinstance(v, torch.Tensor) else v for k, v in data.items()}


def _own(tensor: torch.Tensor) -> torch.Tensor:
    plain = _slices_last(_slices_first(tensor.as_subclass(torch.Tensor)).clone(memory_format=torch.contiguous_format))
    if isinstance(tensor, MetaTensor):
        return MetaTensor(plain, meta=tensor.meta, applied_operations=tensor.applied_operations)
    return plain


def _slices_first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(3, 0, 1, 2) if tensor.ndim == 4 else tensor


def _slices_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(1, 2, 3, 0) if tensor.ndim == 4 else tensor


def _deterministic_chain(transform: Callable | Sequence[Callable]) -> Compose:
    chain = transform if isinstance(transform, Compose) else Compose(transform)
    steps = list(chain.flatten().transforms)
    random = [type(step).__name__ for step in steps if isinstance(step, RandomizableTrait)]
    if random:
        raise ValueError(
            f"{', '.join(random)} would be frozen in the cache: give random transforms to SliceDataset, not here"
        )
    return Compose([*steps, _OwnStorage()], lazy=chain.lazy, overrides=chain.overrides)


def _prepare(case: Mapping[Hashable, Any], chain: Compose) -> dict[Hashable, Any]:
    try:
        # A copy a case: a reader keeps the names of the files it last read, and another thread would see them.
        return dict(copy.deepcopy(chain)(dict(case)))
    except Exception as error:
        raise _case_error(case, error) from error


def _case_error(case: Mapping[Hashable, Any], error: Exception) -> CaseError:
    """Find the error under MONAI's wrapping, and the file that it is about."""
    cause: BaseException = error
    while not isinstance(cause, CaseError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, CaseError):
        return CaseError(cause.case, cause.problem, cause.path)
    case_id = str(case.get("case", "without an ID"))
    files = {str(k): Path(v) for k, v in case.items() if isinstance(v, str) and v.lower().endswith((".nii", ".nii.gz"))}
    label = files.pop(LABEL, None)
    report = check_case(Case(case_id, files, label, convention=case.get("labels")), list(files), need_label=False)
    if report.problems:
        return CaseError(case_id, "; ".join(report.problems))
    reason = str(cause).strip() or "no reason given"
    return CaseError(case_id, f"{type(cause).__name__} in its preparation: {reason}", next(iter(files.values()), None))


def _own_share_first(count: int) -> list[int]:
    """This process's share of the cases, then the others', which by then are mostly on disk."""
    rank, world = idist.get_rank(), idist.get_world_size()
    return sorted(range(count), key=lambda index: ((index - rank) % world, index))


def _run(work: Callable[[int], None], order: Sequence[int], *, workers: int, progress: bool) -> None:
    with (
        ThreadPoolExecutor(max(workers, 1)) as pool,
        tqdm(total=len(order), desc="Preparing cases", unit="case", disable=not progress) as bar,
    ):
        futures = [pool.submit(work, index) for index in order]
        try:
            for future in futures:
                future.result()
                bar.update()
        finally:
            for future in futures:
                future.cancel()


def _prepare_on_disk(case: Mapping[Hashable, Any], chain: Compose, folder: Path, settings: str) -> Path:
    file = folder / f"{_fingerprint(case, settings)}.safetensors"
    if file.exists():
        try:
            _read_volume(file)
            return file
        except Exception as error:  # whatever is wrong with it, it can be made again
            logger.warning("Making %s again, which cannot be read: %s", file, error)
    tensors: dict[str, torch.Tensor] = {}
    rest = json.dumps(_packed(_prepare(case, chain), tensors))
    with atomic_path(file) as temporary:
        save_file(tensors, temporary, metadata={"item": rest})
    return file


def _read_volume(file: Path) -> dict[Hashable, Any]:
    tensors, metadata = read_tensors(file)
    item: dict[Hashable, Any] = _unpacked(
        json.loads(metadata["item"]), {name: _slices_last(tensor) for name, tensor in tensors.items()}
    )
    return item


def _fingerprint(case: Mapping[Hashable, Any], settings: str) -> str:
    files = [str(value) for value in case.values() if isinstance(value, (str, os.PathLike)) and os.path.isfile(value)]
    stamps = [(name, os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in files]
    text = "\n".join([str(_FORMAT), monai.__version__, settings, _describe(dict(case)), repr(stamps)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _describe(value: Any, above: tuple[int, ...] = ()) -> str:
    """A text that is equal for equal settings, in every process.

    Not a pickle: that refuses the lambdas that configurations hold, and depends on which equal objects are shared.
    """
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, os.PathLike, np.dtype, torch.dtype)):
        return repr(value)
    if id(value) in above:
        return "(above)"
    describe = functools.partial(_describe, above=(*above, id(value)))
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, enum.Enum):
        return f"{kind}.{value.name}"
    if isinstance(value, (type, types.BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, types.CodeType):
        return f"code({value.co_code.hex()}, {value.co_names}, {describe(value.co_consts)})"
    if isinstance(value, types.FunctionType):
        closure = [cell.cell_contents for cell in value.__closure__ or ()]
        return f"{value.__module__}({describe(value.__code__)}, {describe(value.__defaults__)}, {describe(closure)})"
    if isinstance(value, functools.partial):
        return f"partial({describe(value.func)}, {describe(value.args)}, {describe(value.keywords)})"
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        array = np.ascontiguousarray(value)
        return f"{kind}({array.dtype}, {array.shape}, {hashlib.sha256(array.tobytes()).hexdigest()})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(sorted(f"{describe(k)}: {describe(v)}" for k, v in value.items())) + "}"
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(map(describe, value))) + "}"
    if isinstance(value, (list, tuple)):
        return f"{kind}[{', '.join(map(describe, value))}]"
    # Random states and loggers are no settings, and change from run to run.
    if isinstance(value, (np.random.RandomState, np.random.Generator, torch.Generator, logging.Logger)):
        return kind
    return f"{kind}({describe(getattr(value, '__dict__', {}))})"


def _packed(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Turn an item into what JSON holds, and put its tensors, by a name each, into ``tensors``."""
    packed = functools.partial(_packed, tensors=tensors)
    if isinstance(value, MetaTensor):
        # a text in the text, which is not parsed where nobody wants it
        metadata = json.dumps(packed([dict(value.meta), value.applied_operations]))
        return {_META_TENSOR: [packed(value.as_tensor()), metadata]}
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = _slices_first(value.detach().cpu()).contiguous()
        return {_TENSOR: name}
    if isinstance(value, np.ndarray) and value.dtype.kind not in "OV":
        # in the text, whatever its size: a header has dozens of tiny arrays, and volumes are tensors
        return {_ARRAY: [value.dtype.str, list(value.shape), base64.b64encode(value.tobytes()).decode()]}
    if isinstance(value, np.generic):
        return packed(value.item())
    if isinstance(value, enum.Enum):
        return packed(value.value)
    if isinstance(value, Mapping) and all(isinstance(k, str) and k not in _MARKS for k in value):
        return {str(k): packed(v) for k, v in value.items()}
    if type(value) is tuple:
        return {_TUPLE: [packed(v) for v in value]}
    if isinstance(value, (list, tuple)):
        return [packed(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"the cache on disk cannot hold a {type(value).__name__}: {value!r}")


def _unpacked(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of :func:`_packed`."""
    unpacked = functools.partial(_unpacked, tensors=tensors)
    if isinstance(value, list):
        return [unpacked(v) for v in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _META_TENSOR in value:
        tensor, metadata = value[_META_TENSOR]
        if not get_track_meta():
            return unpacked(tensor)
        meta, operations = unpacked(json.loads(metadata))
        return MetaTensor(unpacked(tensor), meta=meta, applied_operations=operations)
    if _ARRAY in value:
        dtype, shape, data = value[_ARRAY]
        return np.frombuffer(bytearray(base64.b64decode(data)), dtype=dtype).reshape(shape)
    if _TUPLE in value:
        return tuple(unpacked(value[_TUPLE]))
    return {k: unpacked(v) for k, v in value.items()}
