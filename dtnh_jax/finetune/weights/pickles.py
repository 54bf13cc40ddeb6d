"""Interprets the pickles of PyTorch checkpoints, without trusting them.

A pickle is a program. This module does not pass it to `pickle`: it interprets the few
opcodes that `torch.save` writes for a dictionary of tensors, refuses the others, and
never calls a function that a file names.
"""

import io
import pickle
import struct
from typing import Any, NamedTuple

# Bounds what pickles of one-byte opcodes can allocate; Lite0 takes 10 thousand.
_MAX_OPCODES = 1_000_000
DTYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
}
_MARK = object()


class WeightsError(ValueError):
    """A file of weights is damaged, or has content that is not allowed."""


class _Global(NamedTuple):
    """A name that the pickle looked up; it is compared, but never imported."""

    module: str
    name: str


_ORDERED_DICT = _Global("collections", "OrderedDict")
_TENSOR = _Global("torch._utils", "_rebuild_tensor_v2")
_ADMITTED = {_ORDERED_DICT, _TENSOR, *(_Global("torch", name) for name in DTYPES)}


class Storage(NamedTuple):
    """An array of numbers after the pickles."""

    key: str
    dtype: str
    size: int  # in elements


class Tensor(NamedTuple):
    """A view of a storage, which is read later; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Pickles:
    """Interprets the pickles at the start of a file, one `load` after another."""

    def __init__(self, content: bytes):
        self._stream = io.BytesIO(content)
        self._opcodes = 0
        self.storages: dict[str, Storage] = {}

    @property
    def position(self) -> int:
        """Number of bytes of the pickles so far."""
        return self._stream.tell()

    def load(self) -> Any:
        """Returns the value of the next pickle."""
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        while (opcode := self._take(1)) != pickle.STOP:
            self._opcodes += 1
            if self._opcodes > _MAX_OPCODES:
                raise WeightsError(f"more than {_MAX_OPCODES} opcodes.")
            self._step(opcode, stack, memo)
        (value,) = stack
        return value

    def _step(self, opcode: bytes, stack: list[Any], memo: dict[int, Any]) -> None:
        match opcode:
            case pickle.PROTO:
                self._take(1)
            case pickle.MARK:
                stack.append(_MARK)
            case pickle.BINPUT:
                memo[self._integer("<B")] = stack[-1]
            case pickle.LONG_BINPUT:
                memo[self._integer("<I")] = stack[-1]
            case pickle.BINGET:
                stack.append(memo[self._integer("<B")])
            case pickle.LONG_BINGET:
                stack.append(memo[self._integer("<I")])
            case pickle.NONE:
                stack.append(None)
            case pickle.NEWTRUE:
                stack.append(True)
            case pickle.NEWFALSE:
                stack.append(False)
            case pickle.BININT1:
                stack.append(self._integer("<B"))
            case pickle.BININT2:
                stack.append(self._integer("<H"))
            case pickle.BININT:
                stack.append(self._integer("<i"))
            case pickle.LONG1:
                digits = self._take(self._integer("<B"))
                stack.append(int.from_bytes(digits, "little", signed=True))
            case pickle.BINUNICODE:
                stack.append(self._take(self._integer("<I")).decode())
            case pickle.EMPTY_TUPLE:
                stack.append(())
            case pickle.EMPTY_LIST:
                stack.append([])
            case pickle.EMPTY_DICT:
                stack.append({})
            case pickle.TUPLE:
                stack.append(tuple(_pop_to_mark(stack)))
            case pickle.TUPLE1:
                stack.append((stack.pop(),))
            case pickle.TUPLE2:
                stack[-2:] = [(stack[-2], stack[-1])]
            case pickle.TUPLE3:
                stack[-3:] = [(stack[-3], stack[-2], stack[-1])]
            case pickle.APPEND:
                _extend(stack, [stack.pop()])
            case pickle.APPENDS:
                _extend(stack, _pop_to_mark(stack))
            case pickle.SETITEM:
                value, key = stack.pop(), stack.pop()
                _update(stack, [key, value])
            case pickle.SETITEMS:
                _update(stack, _pop_to_mark(stack))
            case pickle.GLOBAL:
                stack.append(self._global())
            case pickle.BINPERSID:
                stack.append(self._storage(stack.pop()))
            case pickle.REDUCE:
                arguments, function = stack.pop(), stack.pop()
                stack.append(_reduce(function, arguments))
            case pickle.BUILD:
                # Attributes of the dictionary, such as torch's `_metadata`: dropped.
                stack.pop()
                _top(stack, dict)
            case _:
                raise WeightsError(f"refused the pickle opcode {opcode!r}.")

    def _take(self, count: int) -> bytes:
        taken = self._stream.read(count)
        if len(taken) < count:
            raise WeightsError(
                f"truncated: {count} bytes wanted, {len(taken)} are left."
            )
        return taken

    def _integer(self, layout: str) -> int:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _global(self) -> _Global:
        module, name = self._stream.readline(), self._stream.readline()
        if not name.endswith(b"\n"):
            raise WeightsError("truncated in a global name.")
        found = _Global(module[:-1].decode(), name[:-1].decode())
        if found not in _ADMITTED:
            raise WeightsError(
                f"refused the global `{found.module:.100}.{found.name:.100}`."
            )
        return found

    def _storage(self, identity: Any) -> Storage:
        """Returns the storage of ("storage", type, key, device, size, view)."""
        match identity:
            case (
                "storage",
                _Global("torch", name),
                str(key),
                str(),
                int(size),
                None,
            ) if type(size) is int and 0 <= size < 2**63:
                storage = Storage(key, DTYPES[name], size)
            case _:
                raise WeightsError("refused a persistent id that is no plain storage.")
        if self.storages.setdefault(key, storage) != storage:
            raise WeightsError(f"storage {key!r:.50} has two types or sizes.")
        return storage


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    """Removes the last mark and all values above it; returns these values."""
    above = []
    while (item := stack.pop()) is not _MARK:
        above.append(item)
    return above[::-1]


def _top(stack: list[Any], kind: type) -> Any:
    if type(stack[-1]) is not kind:
        raise WeightsError(f"a pickle changes something that is no {kind.__name__}.")
    return stack[-1]


def _extend(stack: list[Any], items: list[Any]) -> None:
    _top(stack, list).extend(map(_string, items))


def _update(stack: list[Any], items: list[Any]) -> None:
    target, keys, values = _top(stack, dict), items[::2], items[1::2]
    if len(keys) != len(values):
        raise WeightsError("a pickle sets a key without a value.")
    target.update(zip(map(_string, keys), values))


def _string(key: object) -> str:
    # To hash nested tuples could take exponential time, or the whole C stack.
    if type(key) is not str:
        raise WeightsError(f"a key of type {type(key).__name__}, not str.")
    return key


def _reduce(function: object, arguments: Any) -> Any:
    """Returns the result of a call of one of the two allowed functions."""
    # The type is checked too, because a pickle can build an equal tuple itself.
    if isinstance(function, _Global) and function == _ORDERED_DICT and arguments == ():
        return {}
    if isinstance(function, _Global) and function == _TENSOR:
        match arguments:
            case (Storage() as storage, int(offset), tuple(shape), tuple(strides), *_):
                numbers = (offset, *shape, *strides)
                if (
                    len(shape) == len(strides) <= 32
                    and all(type(n) is int and n >= 0 for n in numbers)
                    and max(numbers) < 2**63
                ):
                    return Tensor(storage, offset, shape, strides)
        raise WeightsError("refused a tensor with unusual arguments.")
    raise WeightsError("refused a call of a function that makes no tensor.")
