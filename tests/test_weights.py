"""The reader of PyTorch checkpoints: exact on good files, and nothing else on bad.

There is no PyTorch here, so the tests write the legacy format themselves, opcode by
opcode; only this way can they also write what PyTorch would not.
"""

import builtins
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from dtnh_jax.finetune.weights.torch_files import WeightsError, read_torch_checkpoint

MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
KINDS = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
}


def dumped(value):
    return pickle.dumps(value, protocol=2)[2:-1]  # without the frame


def name_of(module, name):
    return f"c{module}\n{name}\n".encode()


def row(*items):
    return b"(" + b"".join(items) + b"t"


def storage(key, kind, size, view=b"N"):
    kind, key = name_of("torch", kind), dumped(key)
    return row(dumped("storage"), kind, key, dumped("cpu"), dumped(size), view) + b"Q"


def tensor(storage, shape, strides, offset=0):
    hooks = name_of("collections", "OrderedDict") + b")R"
    numbers = (dumped(offset), dumped(shape), dumped(strides), dumped(False))
    arguments = row(storage, *numbers, hooks)
    return name_of("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def state(**entries):
    """Pickles a dictionary as PyTorch does, its attribute `_metadata` included."""
    pairs = b"".join(dumped(key) + value for key, value in entries.items())
    metadata = dumped({"_metadata": {"": {"version": 1}}})
    return (
        name_of("collections", "OrderedDict") + b")R(" + pairs + b"u" + metadata + b"b"
    )


def checkpoint(body, arrays, magic=MAGIC, version=1001, system=SYSTEM, keys=None):
    pickles = [dumped(magic), dumped(version), dumped(system), body]
    pickles.append(dumped(list(arrays) if keys is None else keys))
    header = b"".join(b"\x80\x02" + item + b"." for item in pickles)
    blocks = (struct.pack("<q", a.size) + a.tobytes() for a in arrays.values())
    return header + b"".join(blocks)


SIX = np.arange(6, dtype=np.float32)
SMALL = checkpoint(
    state(
        a=tensor(storage("0", "FloatStorage", 6), (2, 3), (3, 1)),
        b=tensor(storage("1", "LongStorage", 1), (), ()),
        c=tensor(storage("0", "FloatStorage", 6), (2, 2), (1, 3), 1),
    ),
    {"0": SIX, "1": np.array([7])},
)


@pytest.fixture
def read(tmp_path):
    def read(content):
        path = tmp_path / "weights.pth"
        path.write_bytes(content)
        return read_torch_checkpoint(path)

    return read


def one(view, array=SIX, kind="FloatStorage", **options):
    """Returns a file with one tensor, `view` of which are shape, strides, offset."""
    body = state(a=tensor(storage("0", kind, array.size), *view))
    return checkpoint(body, {"0": array}, **options)


def test_it_reads_views_and_scalars(read):
    tensors = read(SMALL)
    assert list(tensors) == ["a", "b", "c"]
    np.testing.assert_array_equal(tensors["a"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(tensors["c"], [[1, 4], [2, 5]])
    assert tensors["b"] == 7
    assert tensors["b"].shape == ()
    assert np.shares_memory(tensors["a"], tensors["c"])
    assert not tensors["a"].flags.writeable


@pytest.mark.parametrize("kind", KINDS)
def test_it_reads_every_type_of_number(read, kind):
    array = np.array([1, 0, 100], KINDS[kind])
    value = read(one(((3,), (1,)), array, kind))["a"]
    assert value.dtype == array.dtype
    np.testing.assert_array_equal(value, array)


def test_empty_tensors_and_unused_strides(read):
    empty = np.zeros(0, np.float32)
    assert read(one(((0, 5), (5, 1)), empty))["a"].shape == (0, 5)
    np.testing.assert_array_equal(read(one(((1, 6), (2**62, 1))))["a"], [SIX])
    np.testing.assert_array_equal(read(one(((3,), (0,), 2)))["a"], [2, 2, 2])


CALLS = {
    "os": ("os", "system"),
    "posix": (os.name, "system"),
    "eval": ("builtins", "eval"),
    "torch": ("torch", "load"),
    "bfloat16": ("torch", "BFloat16Storage"),
    "submodule": ("torch._utils", "_rebuild_parameter"),
    "dotted": ("collections", "OrderedDict.fromkeys"),
    "numpy": ("numpy", "zeros"),
}


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_it_refuses_other_names_in_each_pickle(read, call, place, tmp_path):
    witness = tmp_path / "witness"
    attack = name_of(*call) + row(dumped(f"touch {witness}")) + b"R"
    pickles = [dumped(MAGIC), dumped(1001), dumped(SYSTEM), state(a=attack), b"]"]
    pickles[place] = attack
    content = b"".join(b"\x80\x02" + item + b"." for item in pickles)
    with pytest.raises(WeightsError, match=r"weights\.pth.*" + ".".join(call)):
        read(content)
    assert not witness.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_it_refuses_what_pickle_would_run(read, protocol, tmp_path, monkeypatch):
    calls = []

    class Attack:
        def __reduce__(self):
            return builtins.eval, ("1 / 0",)

    monkeypatch.setattr(builtins, "eval", calls.append)
    with pytest.raises(WeightsError, match="refused"):
        read(b"\x80\x02" + dumped(MAGIC) + b"." + pickle.dumps(Attack(), protocol))
    assert not calls


OPCODES = {
    "instance": b"(ios\nsystem\n",
    "object": b"(" + name_of("collections", "OrderedDict") + b"o",
    "new object": name_of("collections", "OrderedDict") + b")\x81",
    "extension": b"\x82\x01",
    "stack global": b"\x8c\x02os\x8c\x06system\x93",
    "frame": b"\x95" + b"\xff" * 8,
    "long bytes": b"\x8e" + b"\xff" * 7 + b"\x00",
    "byte array": b"\x96" + b"\xff" * 7 + b"\x00",
    "buffer": b"\x97",
    "text id": b"Pstorage\n",
    "text integer": b"I" + b"9" * 5000 + b"\n",
    "not an opcode": b"\xff",
}


@pytest.mark.parametrize("opcode", OPCODES.values(), ids=OPCODES.keys())
def test_it_refuses_other_opcodes(read, opcode):
    with pytest.raises(WeightsError, match="refused the pickle opcode"):
        read(checkpoint(state(a=opcode), {}))


ORDERED_DICT_TUPLE = ("collections", "OrderedDict")
ORDERED_DICT = name_of(*ORDERED_DICT_TUPLE)
STORAGE = storage("0", "FloatStorage", 6)
ABUSES = {
    "copies a dictionary": (ORDERED_DICT + row(b"}") + b"R", "refused a call"),
    "calls a type": (name_of("torch", "IntStorage") + b")R", "refused a call"),
    "calls a string": (dumped("eval") + b")R", "refused a call"),
    "calls a look-alike": (dumped(ORDERED_DICT_TUPLE) + b")R", "refused a call"),
    "changes a class": (ORDERED_DICT + dumped((None, {"a": 1})) + b"b", "no dict"),
    "sets an item of a class": (ORDERED_DICT + dumped("a") + b"Ns", "no dict"),
    "extends a class": (ORDERED_DICT + b"(Ne", "no list"),
    "tuple as a key": (b"}" + dumped(((),)) + b"Ns", "key of type tuple"),
    "forgets a value": (b"}(" + dumped("a") + b"u", "key without a value"),
    "too few items": (b"\x87" * 9, "damaged"),
    "unset memo": (b"j\xff\xff\xff\x7f", "damaged"),
    "no mark": (b"t" * 9, "damaged"),
    "storage is no tensor": (STORAGE, "entry 'a' is no tensor"),
    "number is no tensor": (STORAGE + b"K\x01\x86", "entry 'a' is no tensor"),
    "storage view": (storage("0", "FloatStorage", 6, b")"), "persistent id"),
    "negative storage": (storage("0", "FloatStorage", -1), "persistent id"),
    "storage size true": (storage("0", "FloatStorage", True), "persistent id"),
    "unknown id": (row(dumped("module"), b"N", b"N", b"N") + b"Q", "persistent id"),
    "two types": (STORAGE + storage("0", "LongStorage", 6) + b"\x86", "two types"),
    "not a string": (b"X\x02\x00\x00\x00\xff\xff", "damaged"),
}


@pytest.mark.parametrize(("abuse", "message"), ABUSES.values(), ids=ABUSES.keys())
def test_it_refuses_abuse_of_what_is_admitted(read, abuse, message):
    with pytest.raises(WeightsError, match=rf"weights\.pth.*{message}"):
        read(checkpoint(state(a=abuse), {"0": SIX}))


VIEWS = {
    "too long": ((7,), (1,)),
    "offset": ((6,), (1,), 1),
    "offset alone": ((), (), 6),
    "stride": ((2, 3), (4, 1)),
    "negative stride": ((2,), (-1,), 1),
    "negative offset": ((1,), (1,), -1),
    "negative shape": ((-1,), (1,)),
    "rank": ((6,), ()),
    "many axes": ((1,) * 65, (1,) * 65),
    "repeats": ((10**6, 10**6), (0, 0)),
    "overflow": ((2**32, 2**32), (2**32, 2**32)),
    "huge": ((2**63,), (0,)),
    "huge and empty": ((0, 2**62, 2**62), (1, 1, 1)),
    "not a number": (("a",), (1,)),
    "true": ((True,), (1,)),
    "no tuple": ([6], (1,)),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_it_refuses_views_beyond_their_storage(read, view):
    with pytest.raises(WeightsError):
        read(one(view))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"magic": 1}, "magic"),
        ({"version": 1002}, "version 1002"),
        ({"version": ((),)}, "version tuple"),
        ({"system": {"little_endian": False}}, "little-endian"),
        ({"system": []}, "little-endian"),
        ({"keys": []}, "list of storages"),
        ({"keys": ["0", "0"]}, "list of storages"),
        ({"keys": ["1"]}, "list of storages"),
        ({"keys": {}}, "dictionary of tensors"),
    ],
)
def test_it_says_what_is_wrong_with_the_header(read, options, message):
    with pytest.raises(WeightsError, match=message):
        read(one(((6,), (1,)), **options))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "magic"),
        (b"PK\x03\x04" + bytes(100), "zip"),
        (b"\x80\x04" + bytes(100), "refused"),
        (b"<html>not found</html>", "magic"),
        (SMALL + b"\0", "1 bytes follow"),
        (SMALL.replace(struct.pack("<q", 6), struct.pack("<q", 5)), "has 5 elements"),
        (SMALL.replace(struct.pack("<q", 6), struct.pack("<q", -1)), "has -1 elements"),
    ],
)
def test_it_says_what_is_wrong_with_the_file(read, content, message):
    with pytest.raises(WeightsError, match=message):
        read(content)


def test_it_refuses_every_truncation(read):
    for length in range(len(SMALL)):
        with pytest.raises(WeightsError):
            read(SMALL[:length])


def test_mutated_files_are_read_or_refused(read):
    rng = np.random.default_rng(0)
    for _ in range(500):
        content = bytearray(SMALL)
        for _ in range(rng.integers(1, 4)):
            at = rng.integers(len(content))
            if rng.random() < 0.6:
                content[at] = rng.integers(256)
            elif rng.random() < 0.5:
                del content[at : at + rng.integers(1, 9)]
            else:
                content[at:at] = content[: rng.integers(60)]
        try:
            tensors = read(bytes(content))
        except WeightsError:
            continue
        assert sum(value.size for value in tensors.values()) < 100


START = b"\x80\x02" + dumped(MAGIC) + b"."
BIG_DICT = dumped({str(i): 0 for i in range(999)})
COPIES = BIG_DICT + b"q\x01" + (ORDERED_DICT + b"h\x01\x85R") * 999
BIG_STORAGE = tensor(storage("0", "DoubleStorage", 2**40), (1,), (1,))
BOMBS = {
    "storage": checkpoint(state(a=BIG_STORAGE), {"0": SIX}),
    "string": b"\x80\x02X\xff\xff\xff\x7f",
    "memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "view": one(((10**9,), (0,))),
    "nested tuples": START + b"\x80\x02)" + b"\x85" * 9999 + b".",
    "copies": checkpoint(b"(" + COPIES + b"t", {}),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_memory_stays_within_the_size_of_the_file(read, bomb):
    tracemalloc.start()
    with pytest.raises(WeightsError):
        read(bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**21


def test_it_bounds_the_number_of_opcodes(read, monkeypatch):
    monkeypatch.setattr("dtnh_jax.finetune.weights.pickles._MAX_OPCODES", 100)
    with pytest.raises(WeightsError, match="more than 100 opcodes"):
        read(b"\x80\x02" + b"}" * 200)


def test_a_missing_file_is_not_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_torch_checkpoint(tmp_path / "none.pth")
