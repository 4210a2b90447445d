# SPDX-License-Identifier: Apache-2.0
"""Pickles: arrays and plain values come out, and no code runs."""

import builtins
import copyreg
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest

from monai_cggm.data.pickles import read_pickle
from monai_cggm.errors import DataError

VALUES = {
    "numbers": [0, 1, 255, 256, -1, 2**31, 2**70, -(2**70), 1.5, float("inf"), True, False],
    "words": ["", "a", "é", "日本"],
    "bytes": [b"", b"a", b"\x00\xff"],
    "nested": {"a": (None, (1,), (1, 2), (1, 2, 3, 4), {"b": [[]]}), 5: {"x", "y"}, "empty": set()},
}
ARRAYS = {
    "f4": np.arange(6, dtype=np.float32).reshape(2, 3),
    "f8": np.array([[1.5, -np.inf], [np.nan, 0.0]]),
    "f2": np.arange(4, dtype=np.float16),
    "big endian": np.arange(5, dtype=">f4"),
    "fortran": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "transposed": np.arange(6).reshape(2, 3).T,
    "i8": np.arange(-3, 3),
    "u1": np.array([[0, 255]], dtype=np.uint8),
    "bool": np.array([True, False]),
    "S": np.array([[b"video", b"1.5"]]),
    "U": np.array(["a", "日本"]),
    "big endian words": np.array(["a", "日\U0010ffff"], dtype=">U2"),
    "no row": np.zeros((0, 3), dtype=np.float32),
    "no dimension": np.array(2.5),
    "no letter": np.array([""]),
    "objects": np.array([["a", None], [3, b"x"]], dtype=object),
    "large": np.arange(100_000.0),
}


def written(tmp_path, content, name="x.pkl"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def problem(path):
    with pytest.raises(DataError) as caught:
        read_pickle(path)
    (line,) = caught.value.problems
    assert str(path) in line
    assert line.startswith(f"{path.stem}: ")
    return line


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_and_arrays_of_every_protocol(protocol, tmp_path):
    nested = np.empty(2, dtype=object)
    nested[:] = [ARRAYS["f4"], {"inside": [ARRAYS["U"]]}]
    content = {**VALUES, "arrays": ARRAYS, "array of arrays": nested, "same": [ARRAYS["f8"]] * 2}
    found = read_pickle(written(tmp_path, pickle.dumps(content, protocol=protocol)))
    assert {key: found[key] for key in VALUES} == VALUES
    assert [type(value) for value in found["numbers"]] == [type(value) for value in VALUES["numbers"]]
    for key, array in ARRAYS.items():
        assert type(found["arrays"][key]) is np.ndarray
        assert found["arrays"][key].dtype == array.dtype
        np.testing.assert_array_equal(found["arrays"][key], array, err_msg=key)
    np.testing.assert_array_equal(found["array of arrays"][0], ARRAYS["f4"])
    assert found["array of arrays"][1]["inside"][0].tolist() == ["a", "日本"]
    np.testing.assert_array_equal(found["same"][1], ARRAYS["f8"])


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
@pytest.mark.parametrize("protocol", [0, 2])
def test_names_of_numpy_1_and_2(core, protocol, tmp_path):
    content = pickle.dumps([ARRAYS["f4"], np.float32(1.5), np.str_("word"), np.bool_(True), np.bytes_(b"")], protocol)
    assert content.count(b"numpy._core") + content.count(b"numpy.core") > 0
    content = content.replace(b"numpy._core", b"numpy.core").replace(b"numpy.core", core)
    array, *scalars = read_pickle(written(tmp_path, content))
    np.testing.assert_array_equal(array, ARRAYS["f4"])
    assert scalars == [1.5, "word", True, b""]


#: Python 2.7.18 and NumPy 1.16.6: cPickle.dumps(({"Ses01": array, "caf\xe9!": [1, "M", u"\xe9"]}, set(["a", "b"])), 2)
PYTHON_2 = (
    b"\x80\x02}q\x01(U\x05Ses01q\x02cnumpy.core.multiarra"
    b"y\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00"
    b"\x85U\x01b\x87Rq\x05(K\x01K\x02K\x02\x86cnumpy\ndtype\nq\x06U\x02f8K"
    b"\x00K\x01\x87Rq\x07(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U \x00\x00\x00"
    b"\x00\x00\x00\xf0?\x00\x00\x00\x00\x00\x00\x04\xc05X\x00f-\xebQ~\x18-DT\xfb!\t@tbU\x05caf"
    b"\xe9!q\x08]q\t(K\x01U\x01MX\x02\x00\x00\x00\xc3\xa9euc__builtin__\ns"
    b"et\nq\n]q\x0b(U\x01aU\x01be\x85Rq\x0c\x86."
)


def test_a_pickle_of_python_2(tmp_path):
    dialogues, names = read_pickle(written(tmp_path, PYTHON_2))
    np.testing.assert_array_equal(dialogues["Ses01"], [[1.0, -2.5], [3e300, np.pi]])
    assert dialogues["café!"] == [1, "M", "é"]
    assert names == {"a", "b"}


class Payload:
    """Calls a function when it is restored."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def object_array(value):
    array = np.empty(2, dtype=object)
    array[0], array[1] = "harmless", value
    return array


@pytest.mark.parametrize("where", [lambda v: v, lambda v: {"train": {"text": v}}, lambda v: (1, [v]), object_array])
@pytest.mark.parametrize("kind", ["system", "eval", "load", "open", "method"])
def test_code_does_not_run(kind, where, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    np.save(tmp_path / "inner.npy", np.array([Payload(ran.write_text, "")], dtype=object), allow_pickle=True)
    payload, named = {
        "system": (Payload(os.system, f"touch {ran}"), f"{os.name}.system"),
        "eval": (Payload(eval, f"open({str(ran)!r}, 'w')"), "builtins.eval"),
        "load": (Payload(np.load, str(tmp_path / "inner.npy"), None, True), "numpy.load"),
        "open": (Payload(open, str(ran), "w"), "io.open"),
        "method": (Payload(getattr, builtins, "eval"), "builtins.getattr"),
    }[kind]
    if kind == "method":
        payload = Payload(getattr, "a", "upper")  # a class's own attribute, the first step to others
    content = pickle.dumps(where(payload), protocol=4)
    line = problem(written(tmp_path, content))
    assert f"holds {named}, expected only arrays, numbers and words" in line
    assert "could run code" in line
    assert not ran.exists()
    if kind in ("system", "eval", "open"):  # the payload is one that works
        pickle.loads(content)
        assert ran.exists()


def short(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()


def named(module, name):
    return short(module) + short(name) + b"\x93"


ARRAY = named("numpy.core.multiarray", "_reconstruct")
NDARRAY = named("numpy", "ndarray")
EMPTY = ARRAY + NDARRAY + b"K\x00\x85C\x01b\x87R"
FROM_BUFFER = named("numpy.core.numeric", "_frombuffer")
DTYPE = named("numpy", "dtype")


def dtype(name, state=b""):
    return DTYPE + short(name) + b"\x89\x88\x87R" + state


def type_state(order, size):
    return b"(K\x03" + short(order) + b"NNN" + b"K" + bytes([size]) + b"K\x04K\x00tb"


def state(shape, kind, data):
    return b"(K\x01" + shape + kind + b"\x89" + data + b"tb"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ARRAY + named("numpy", "memmap") + b"K\x00\x85C\x01b\x87R", "numpy.memmap"),
        (ARRAY + b"NK\x00\x85C\x01b\x87R", "an array of another class"),
        (named("numpy", "core.multiarray._reconstruct"), "numpy.core.multiarray._reconstruct"),
        (named("builtins", "set.__class__"), "builtins.set.__class__"),
        (named("os.path", "os.system"), "os.path.os.system"),
        (named("_codecs", "encode") + short("x") + short("rot13") + b"\x86R", "_codecs.encode that makes no bytes"),
        (named("_codecs", "encode") + b"K\x05" + short("latin1") + b"\x86R", "_codecs.encode that makes no bytes"),
        (named("_codecs", "lookup"), "_codecs.lookup"),
        (named("builtins", "bytes") + b"K\x05\x85R", "a call of bytes"),
        (named("builtins", "set") + b"K\x05\x85R", "a call of set"),
        (named("builtins", "set") + b"}" + short("_function") + b"N" + b"sb", "a change of a function"),
        (named("builtins", "set"), "a function or a class in the place of a value"),
        (NDARRAY, "a function or a class in the place of a value"),
        (dtype("f8"), "a function or a class in the place of a value"),
        (dtype("O8") + b"0" + named("numpy.core.multiarray", "scalar") + dtype("O8") + b"]\x86R", "of type object"),
        (dtype("M8"), "a NumPy array of type 'M8'"),
        (dtype("V8"), "a NumPy array of type 'V8'"),
        (dtype("f16"), "a NumPy array of type 'f16'"),
        (dtype("f8,O"), "a NumPy array of type 'f8,O'"),
        # fields, a type of parts, and metadata in the state of a type
        (dtype("f8", b"(K\x03" + short("|") + b"N" + short("a") + b"\x85}K\x08K\x01K\x3ftb"), "structured NumPy type"),
        (dtype("f8", b"(K\x03" + short("|") + b"K\x05NNK\x08K\x01K\x00tb"), "structured NumPy type"),
        (dtype("f8", b"(K\x04" + short("|") + b"NNNK\x08K\x01K\x00}tb"), "structured NumPy type"),
        (dtype("f8", b"(K\x03" + short("?") + b"NNNK\x08K\x01K\x00tb"), "a NumPy type that is not one"),
        (b"X\x01\x00\x00\x00aQ", "an operation that makes objects"),  # BINPERSID
        (b"Pa\n", "an operation that makes objects"),  # PERSID
        (b"(ios\nsystem\n", "an operation that makes objects"),  # INST
        (b"(cos\nsystem\no", "os.system"),
        (b"(" + named("builtins", "set") + b"o", "an operation that makes objects"),  # OBJ
        (named("builtins", "set") + b")\x81", "an operation that makes objects"),  # NEWOBJ
        (named("builtins", "set") + b")}\x92", "an operation that makes objects"),  # NEWOBJ_EX
        (b"\x82\xf0", "an operation that makes objects"),  # EXT1
        (b"\x83\xf0\x00", "an operation that makes objects"),
        (b"\x84\xf0\x00\x00\x00", "an operation that makes objects"),
        (b"\x97", "an operation that makes objects"),  # NEXT_BUFFER
    ],
)  # fmt: skip
def test_tricks_are_refused(content, message, tmp_path):
    line = problem(written(tmp_path, b"\x80\x04" + content + b"."))
    assert message in line
    assert "it is not read, since it could run code" in line


def test_an_extension_code_does_not_reach_what_is_registered(tmp_path):
    copyreg.add_extension("os", "system", 0xF0)
    try:
        content = b"\x80\x04\x82\xf0" + short(f"touch {tmp_path}/ran") + b"\x85R."
        assert "an operation that makes objects" in problem(written(tmp_path, content))
        assert not (tmp_path / "ran").exists()
        pickle.loads(content)  # fills the cache, which is asked without a look at the class
        assert (tmp_path / "ran").exists()
        (tmp_path / "ran").unlink()
        problem(written(tmp_path, content))
        assert not (tmp_path / "ran").exists()
    finally:
        copyreg.remove_extension("os", "system", 0xF0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (EMPTY, "an array without contents"),
        (EMPTY + b"Nb", "the state of an array has not five parts"),
        (EMPTY + state(b"K\x02\x85", dtype("f8"), b"C\x0812345678"), "2 x 8 bytes, and not as many bytes"),
        (EMPTY + state(b"K\x01\x85", dtype("f8"), b"]"), "and not as many bytes"),
        (EMPTY + state(b"J\xff\xff\xff\xff\x85", dtype("f8"), b"C\x00"), "an array without a shape"),
        (EMPTY + state(b"\x88\x85", dtype("b1"), b"C\x01a"), "an array without a shape"),
        (EMPTY + state(b"K\x01\x85", b"N", b"C\x0812345678"), "an array without a type"),
        # bytes that would be taken for addresses of objects
        (EMPTY + state(b"K\x01\x85", dtype("O8"), b"C\x0812345678"), "an array of 1 objects, and not as many"),
        (EMPTY + state(b"K\x02\x85", dtype("O8"), b"]K\x01a"), "an array of 2 objects, and not as many"),
        (EMPTY + 2 * state(b"K\x01\x85", dtype("f8"), b"C\x0812345678"), "restored twice"),
        (FROM_BUFFER + b"(C\x0812345678" + dtype("f8") + b"K\x02\x85" + short("C") + b"tR", "2 x 8 bytes"),
        (named("builtins", "set") + b"]]a\x85R", "list is a key of a dictionary or in a set, expected a word"),
        (named("builtins", "set") + b"]" + EMPTY + b"a\x85R", "array is a key of a dictionary or in a set"),
        (b"}" + named("builtins", "set") + b"Ns", "function is a key of a dictionary or in a set"),
        (b"}(K\x01NG" + bytes(8) + b"Nu", "float is a key of a dictionary or in a set"),
        (b"}" + b"()" + b"Nu", "tuple is a key of a dictionary or in a set"),
        (b"(K\x01N)Nd", "tuple is a key of a dictionary or in a set"),
        (b"\x8f(K\x01)\x90", "tuple is a key of a dictionary or in a set"),
        (b"(K\x01)\x91", "tuple is a key of a dictionary or in a set"),
        (EMPTY + state(b"K\x01\x85", dtype("U1"), b"C\x04" + struct.pack("=I", 0x110000)), "does not exist"),
        (
            EMPTY + state(b"K\x02\x85", dtype("U", type_state(">", 4)), b"C\x08\0\0\0a\0\x11\0\0"),
            "a character that does not exist",
        ),
        (EMPTY + state(b"(" + 65 * b"K\x01" + b"t", dtype("f8"), b"C\x0812345678"), "an array without a shape"),
        (EMPTY + state(b"\x8a\x09" + bytes(8) + b"\x01\x85", dtype("S0"), b"C\x00"), "an array without a shape"),
        (b"K\x05)R", "not callable"),
        (EMPTY + b")R", "not callable"),
        (NDARRAY + b")R", "not callable"),
        (b"K\x05K\x06b", "no attribute"),
        (b"h\x07", "Memo value not found"),
        (b"\xff", "KeyError"),
        (b"C\xff", "ends too early"),
        (b"\x8e" + b"\xff" * 8, "exceeds system's maximum size"),
    ],
)  # fmt: skip
def test_broken_contents_are_one_error(content, message, tmp_path):
    path = written(tmp_path, b"\x80\x04" + content + (b"" if "early" in message else b"."))
    line = problem(path)
    assert message in line or (message == "KeyError" and "broken one: 255" in line)


def test_a_file_that_ends_too_early(tmp_path):
    for protocol in (0, 2, 4):
        content = pickle.dumps({"train": [ARRAYS["f4"], "ab"]}, protocol=protocol)
        for size in range(0, len(content), 2):
            path = written(tmp_path, content[:size])
            with pytest.raises(DataError) as caught:
                read_pickle(path)
            assert len(caught.value.problems) == 1
            assert str(path) in str(caught.value)
    assert "ends too early, expected a whole pickle" in problem(written(tmp_path, b""))
    assert "ends too early" in problem(written(tmp_path, content[:-1]))


def test_what_is_no_pickle(tmp_path):
    assert "is no pickle" in problem(written(tmp_path, b"1,2\n3,4\n"))
    assert "an operation that makes objects" in problem(written(tmp_path, b"PK\x03\x04 a file of torch.save"))
    assert "cannot be read: No such file" in problem(tmp_path / "nowhere.pkl")


def test_values_that_hold_themselves(tmp_path):
    loop = [1]
    loop.append(loop)
    found = read_pickle(written(tmp_path, pickle.dumps(loop)))
    assert found[1] is found
    deep = b"]" * 5_000 + b"a" * 4_999
    assert "is no pickle, or a broken one" in problem(written(tmp_path, b"\x80\x04" + deep + b"."))


def test_a_few_bytes_cannot_stand_for_endless_tuples(tmp_path):
    nested = ()
    for _ in range(200):
        nested = (nested, nested)
    (tmp_path / "small.pkl").write_bytes(pickle.dumps(nested))
    assert (tmp_path / "small.pkl").stat().st_size < 2000
    found = read_pickle(tmp_path / "small.pkl")
    for _ in range(200):
        assert found[0] is found[1]
        found = found[0]
    assert found == ()


#: tuples in tuples, deeper than Python compares, and as many as 2**200
DEEP, MANY = b")" + b"\x85" * 300_000, b")" + b"2\x86" * 200
NO_KEY = "tuple is a key of a dictionary or in a set, expected a word or a whole number"
#: a few bytes that would take all memory, all time or end Python, and what is said of them
BOMBS = {
    "key": (b"}" + DEEP + b"Ns", NO_KEY),
    "member": (b"\x8f(" + MANY + b"\x90", NO_KEY),
    "frozen": (b"(" + MANY + b"\x91", NO_KEY),
    "called": (named("builtins", "set") + b"](" + MANY + b"e\x85R", NO_KEY),
    "keys": (b"}(" + MANY + b"Nu", NO_KEY),
    "dictionary": (b"(" + MANY + b"Nd", NO_KEY),
    "type": (DTYPE + MANY + b"\x85R", "a NumPy array of type tuple"),
    "bytearray8": (b"\x96" + struct.pack("<Q", 2**36), "ends too early"),
    "binbytes8": (b"\x8e" + struct.pack("<Q", 2**36), "ends too early"),
    "binunicode8": (b"\x8d" + struct.pack("<Q", 2**36), "ends too early"),
    "binstring": (b"T" + struct.pack("<i", 2**31 - 1), "ends too early"),
    "long4": (b"\x8b" + struct.pack("<i", 2**31 - 1), "ends too early"),
    "frame": (b"\x95" + struct.pack("<Q", 2**36), "ends too early"),
    "bytes": (EMPTY + state(b"\x8a\x05\0\0\0\0\x10\x85", dtype("S0"), b"C\0"), "of 68719476736 empty words"),
    "text": (FROM_BUFFER + b"(C\0" + dtype("U") + b"M\0\x10M\0\x10\x86" + short("C") + b"tR", "16777216 empty words"),
}

# in a process of its own, with 256 MiB more than it has: a bomb must not take the test's, or the machine, down
READ = """
import resource, sys, types
import numpy as np

package = types.ModuleType("monai_cggm.data")  # without the rest of it, which takes seconds to import
package.__path__ = [sys.argv[1]]
sys.modules["monai_cggm.data"] = package
from monai_cggm.data.pickles import read_pickle
from monai_cggm.errors import DataError

taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, taken + 2**28))
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
for path in sys.argv[2:]:
    try:
        read_pickle(path)
    except DataError as error:
        print(error, flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a process as Linux does")
def test_a_few_bytes_take_no_memory_and_no_time(tmp_path, repository):
    paths = []
    for name, (content, message) in BOMBS.items():
        paths.append(written(tmp_path, b"\x80\x05" + content + (b"" if "early" in message else b"."), f"{name}.pkl"))
    reader = [sys.executable, "-c", READ, str(repository / "monai_cggm" / "data"), *map(str, paths)]
    done = subprocess.run(reader, cwd=repository, capture_output=True, text=True, timeout=120, check=False)
    for path, line, (_, message) in zip(paths, done.stdout.splitlines(), BOMBS.values(), strict=False):
        assert line.startswith(f"{path.stem}: ")
        assert message in line
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(BOMBS)


def test_empty_words_and_arrays_without_rows(tmp_path):
    content = EMPTY + state(b"M\xe8\x03\x85", dtype("S0"), b"C\0")
    found = read_pickle(written(tmp_path, b"\x80\x04" + content + b"."))
    assert found.tolist() == [b""] * 1000
    nothing = read_pickle(written(tmp_path, pickle.dumps(np.zeros((3, 0, 2), dtype=np.float16))))
    assert (nothing.shape, nothing.dtype) == ((3, 0, 2), np.float16)
