# SPDX-License-Identifier: Apache-2.0
"""Arrays and plain values out of pickle files, without running code from any of them.

A pickle is a program: it may call whatever Python can import. Here it may make numbers, words, bytes, None, lists,
tuples, dictionaries, sets and NumPy's arrays of numbers, words and these, and nothing else. NumPy's own restoring
functions trust what they are given (a made-up state of an array or a type can reach outside its memory), so none of
them is called: arrays are put together from the bytes that the file holds, after checks. Files by NumPy 1 and 2 and by
Python 2 are read.
"""

from __future__ import annotations

import math
import mmap
import pickle
import re
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from monai_cggm.errors import DataError

_PLAIN = (str, bytes, bytearray, int, float, type(None), set, frozenset)
#: what may be a key of a dictionary or a member of a set: the hash of tuples in tuples may take for ever, or end Python
_KEYS = (str, bytes, int, type(None))
#: dimensions of an array, NumPy's own limit, and its most words where all of them are empty and none is in the file
_DIMENSIONS, _EMPTY_WORDS = 64, 2**20
#: booleans, integers, floating-point numbers, bytes and text, as NumPy writes the names of types
_TYPE = re.compile(r"b1|[iu][1248]|f[248]|[SU]\d*|O\d?")
#: operations that make and fill plain values, name a class and call it, and nothing beyond
_OPERATIONS = frozenset(
    pickle.MARK + pickle.STOP + pickle.POP + pickle.POP_MARK + pickle.DUP + pickle.PROTO + pickle.FRAME
    + pickle.NONE + pickle.NEWTRUE + pickle.NEWFALSE
    + pickle.INT + pickle.BININT + pickle.BININT1 + pickle.BININT2 + pickle.LONG + pickle.LONG1 + pickle.LONG4
    + pickle.FLOAT + pickle.BINFLOAT
    + pickle.STRING + pickle.BINSTRING + pickle.SHORT_BINSTRING
    + pickle.UNICODE + pickle.BINUNICODE + pickle.SHORT_BINUNICODE + pickle.BINUNICODE8
    + pickle.BINBYTES + pickle.SHORT_BINBYTES + pickle.BINBYTES8 + pickle.BYTEARRAY8
    + pickle.LIST + pickle.EMPTY_LIST + pickle.APPEND + pickle.APPENDS
    + pickle.TUPLE + pickle.EMPTY_TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3
    + pickle.DICT + pickle.EMPTY_DICT + pickle.SETITEM + pickle.SETITEMS
    + pickle.EMPTY_SET + pickle.ADDITEMS + pickle.FROZENSET
    + pickle.GET + pickle.BINGET + pickle.LONG_BINGET
    + pickle.PUT + pickle.BINPUT + pickle.LONG_BINPUT + pickle.MEMOIZE
    + pickle.GLOBAL + pickle.STACK_GLOBAL + pickle.REDUCE + pickle.BUILD
)  # fmt: skip
#: operations that fill a dictionary or a set → the places of the keys, of what was put on the stack for them
_KEYS_OF = {
    pickle.SETITEM: slice(-2, -1),
    pickle.SETITEMS: slice(None, None, 2),
    pickle.DICT: slice(None, None, 2),
    pickle.ADDITEMS: slice(None),
    pickle.FROZENSET: slice(None),
}


def read_pickle(path: str | Path) -> Any:
    """Read a pickle file that holds arrays and plain values.

    Args:
        path: the file, of any protocol.

    Returns:
        What it holds. Python 2's strings are read as Latin-1. Arrays may be read-only.

    Raises:
        DataError: for a file that cannot be read, that ends too early, or that holds anything else; nothing of it is
            called.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "two.pkl")
        ...     _ = path.write_bytes(pickle.dumps({"a": np.arange(3.0), "b": ["x", None]}))
        ...     read_pickle(path)
        {'a': array([0., 1., 2.]), 'b': ['x', None]}
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise EOFError
            # of a mapped file no more is read, and no memory taken for more, than there is, whatever the pickle says
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _finished(_Reader(mapped, encoding="latin1").load(), {})
    except _Refused as error:
        raise DataError(
            [
                f"{path.stem}: holds {error}, expected only arrays, numbers and words; it is not read, since it could "
                f"run code ({path})"
            ]
        ) from None
    except OSError as error:
        raise DataError([f"{path.stem}: cannot be read: {error.strerror} ({path})"]) from error
    except EOFError as error:
        raise DataError([f"{path.stem}: ends too early, expected a whole pickle ({path})"]) from error
    except Exception as error:  # a stream that is broken can raise anything
        found = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise DataError([f"{path.stem}: is no pickle, or a broken one: {found} ({path})"]) from error


class _Refused(pickle.UnpicklingError):
    """What is not read, as words for a message."""


class _Function:
    """What a pickle may call. It has no attributes that a pickle could set."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise _Refused(f"a change of a function ({name})")

    def __setstate__(self, state: Any) -> None:
        raise _Refused("a change of a function")


class _Type:
    """A type of array: the name that NumPy gives it, and the order of its bytes."""

    __slots__ = ("name", "order", "size")
    __hash__ = None  # type: ignore[assignment]  # no key of a dictionary, no member of a set

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name.decode("latin1") if isinstance(name, bytes) else name
        self.order, self.size = "|", -1
        if not isinstance(self.name, str) or not _TYPE.fullmatch(self.name):
            found = repr(self.name[:40]) if isinstance(self.name, str) else _kind(self.name)
            raise _Refused(f"a NumPy array of type {found}")

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 7 or any(part is not None for part in state[2:5] + state[8:]):
            raise _Refused("a structured NumPy type")
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "=") or not isinstance(state[5], int):
            raise _Refused("a NumPy type that is not one")
        self.order, self.size = order, state[5]

    @property
    def objects(self) -> bool:
        return self.name.startswith("O")

    def dtype(self) -> np.dtype:
        kind = self.name[0]
        if kind in "SU" and self.name == kind:
            return np.dtype(f"{self.order}{kind}{max(self.size, 0) // (4 if kind == 'U' else 1)}")
        return np.dtype(f"{self.order}{self.name}")


class _Array:
    """An array that is being restored."""

    __slots__ = ("elements", "values")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.values: np.ndarray | None = None
        self.elements: list[Any] = []

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("the state of an array has not five parts")
        _, shape, kind, fortran, data = state
        self.fill(data, kind, shape, "F" if fortran else "C")

    def fill(self, data: Any, kind: Any, shape: Any, order: Any) -> None:
        if not isinstance(kind, _Type) or order not in ("C", "F") or self.values is not None:
            raise ValueError("an array without a type or an order, or restored twice")
        if (
            not isinstance(shape, tuple)
            or len(shape) > _DIMENSIONS
            or not all(type(size) is int and 0 <= size < 2**63 for size in shape)
        ):
            raise ValueError("an array without a shape")
        count = math.prod(shape)
        if kind.objects:
            if type(data) is not list or len(data) != count:
                raise ValueError(f"an array of {count} objects, and not as many objects")
            self.elements = data
            self.values = np.empty(shape, dtype=object)  # filled by `finished`; a list is in C order always
            return
        data = data.encode("latin1") if isinstance(data, str) else data
        dtype = kind.dtype()
        if not isinstance(data, (bytes, bytearray)) or len(data) != count * dtype.itemsize:
            raise ValueError(f"an array of {count} x {dtype.itemsize} bytes, and not as many bytes")
        if not len(data):
            if count > _EMPTY_WORDS:
                raise ValueError(f"an array of {count} empty words")
            self.values = np.broadcast_to(np.zeros((), dtype), shape)  # one word, for all of them
            return
        characters = np.dtype("u4").newbyteorder(dtype.byteorder)
        if dtype.kind == "U" and np.frombuffer(data, characters).max() > sys.maxunicode:
            raise ValueError("an array of words with a character that does not exist")
        self.values = np.frombuffer(data, dtype).reshape(shape, order=order)

    def finished(self, seen: dict[int, Any]) -> np.ndarray:
        if self.values is None:
            raise ValueError("an array without contents")
        elements, self.elements = self.elements, []
        for place, element in zip(np.ndindex(self.values.shape), elements, strict=False):
            self.values[place] = _finished(element, seen)
        return self.values


class _NoClass:
    """Stands for the class ``numpy.ndarray``: to be named, not to be called."""

    __slots__ = ()


_NDARRAY = _NoClass()


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if kind is not _NDARRAY:
        raise _Refused("an array of another class than numpy.ndarray")
    return _Array()


def _frombuffer(data: Any, kind: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.fill(data, kind, shape, order)
    return array


def _scalar(kind: Any, data: Any = b"") -> Any:
    if isinstance(kind, _Type) and kind.objects:
        raise _Refused("a NumPy scalar of type object")
    array = _frombuffer(data, kind, (1,), "C")
    assert array.values is not None
    return array.values[0].item()


def _encode(text: Any, encoding: Any = "") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _Refused("a call of _codecs.encode that makes no bytes")
    return text.encode("latin1")


def _bytes(*arguments: Any) -> bytes:
    if arguments:
        raise _Refused("a call of bytes")
    return b""


def _set(elements: Any = ()) -> set[Any]:
    if not isinstance(elements, (list, tuple)):
        raise _Refused("a call of set")
    return set(_keys(elements))


_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Function(_Type),
    ("_codecs", "encode"): _Function(_encode),
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Function(_reconstruct) for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Function(_scalar) for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Function(_frombuffer) for core in ("core", "_core")},
    **{(module, "set"): _Function(_set) for module in ("builtins", "__builtin__")},
    **{(module, "bytes"): _Function(_bytes) for module in ("builtins", "__builtin__")},
}


def _keys(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if not isinstance(value, _KEYS):
            raise ValueError(f"{_kind(value)} is a key of a dictionary or in a set, expected a word or a whole number")
    return values


def _kind(value: Any) -> str:
    return type(value).__name__.strip("_").lower()


def _no_operation(reader: Any) -> None:
    raise _Refused("an operation that makes objects of other classes")


def _with_keys(operation: Callable[[Any], None], which: slice) -> Callable[[Any], None]:
    """The operation, after a look at what is to be a key."""

    def checked(reader: Any) -> None:
        _keys(reader.stack[which])
        operation(reader)

    return checked


def _bytearray(reader: Any) -> None:
    (size,) = struct.unpack("<Q", reader.read(8))
    reader.append(bytearray(reader.read(size)))  # pickle's own makes one of this size before it reads


# The implementation in Python, since the one in C has operations that cannot be taken away: extension codes look up
# objects that other code has registered, without asking `find_class`.
class _Reader(pickle._Unpickler):
    dispatch = {  # noqa: RUF012
        **{
            code: operation if code in _OPERATIONS else _no_operation
            for code, operation in pickle._Unpickler.dispatch.items()
        },
        **{code[0]: _with_keys(pickle._Unpickler.dispatch[code[0]], which) for code, which in _KEYS_OF.items()},
        pickle.BYTEARRAY8[0]: _bytearray,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}"[:200]) from None


def _finished(value: Any, seen: dict[int, Any]) -> Any:
    """Put arrays in the place of what stands for them, all through nested values."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, _Array):
        return value.finished(seen)
    if isinstance(value, tuple):
        # once each: a tuple of twice the same tuple, many times over, is a few bytes in a file and would never end.
        # Both are kept, so that no other object gets this one's number
        if id(value) not in seen:
            seen[id(value)] = (value, tuple(_finished(element, seen) for element in value))
        return seen[id(value)][1]
    if not isinstance(value, (list, dict)):
        raise _Refused("a function or a class in the place of a value")
    if id(value) in seen:
        return value
    seen[id(value)] = value
    if isinstance(value, list):
        value[:] = [_finished(element, seen) for element in value]
    else:
        for key in value:
            value[key] = _finished(value[key], seen)
    return value
