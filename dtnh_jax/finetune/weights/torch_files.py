"""Reads PyTorch checkpoints without PyTorch, and without trusting them.

The format is the one before the zip files of PyTorch 1.6: three small pickles (magic
number, version, sizes of types), the pickled dictionary, the pickled keys of its
storages, and then the storages, each a count followed by that many elements. `pickles`
interprets the pickles.
"""

import math
import os
import pickle
import struct
from pathlib import Path

import numpy as np

from dtnh_jax.finetune.weights.pickles import Pickles, Storage, Tensor, WeightsError

__all__ = ["WeightsError", "read_torch_checkpoint"]

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001


def read_torch_checkpoint(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the tensors of a state dictionary in PyTorch's legacy (non-zip) format.

    Nothing from the file is executed, and memory stays within a small factor of the
    file's size, whatever sizes the file claims.

    Args:
      path: a file that `torch.save` wrote before PyTorch 1.6, or later with
        `_use_new_zipfile_serialization=False`.

    Returns:
      Arrays by name, in the file's order. They are read-only, and tensors that
      shared a storage in PyTorch share its memory here.

    Raises:
      WeightsError: the file is damaged, or is no dictionary of tensors.
      OSError: the file can not be read.

    Example:
      >>> tensors = read_torch_checkpoint("weights.pth")  # doctest: +SKIP
      >>> tensors["_fc.weight"].shape  # doctest: +SKIP
      (1000, 1280)
    """
    content = Path(path).read_bytes()
    try:
        return _read(content)
    except WeightsError as error:
        raise WeightsError(f"`{path}`: {error}") from None
    except (ValueError, TypeError, LookupError, struct.error) as error:
        # Any other error of the interpreter: the file is not a valid pickle.
        raise WeightsError(f"`{path}` is damaged: {error}") from error


def _read(content: bytes) -> dict[str, np.ndarray]:
    if content.startswith(b"PK"):
        raise WeightsError(
            "a zip file, but only the legacy format is read; save it again with "
            "`torch.save(..., _use_new_zipfile_serialization=False)`."
        )
    pickles = Pickles(content)
    if not content.startswith(pickle.PROTO) or pickles.load() != _MAGIC:
        raise WeightsError("not a PyTorch checkpoint: the magic number is missing.")
    if (version := pickles.load()) != _VERSION:
        shown = version if isinstance(version, int) else type(version).__name__
        raise WeightsError(f"version {shown} of the format, not {_VERSION}.")
    system = pickles.load()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise WeightsError("the file was not written on a little-endian machine.")
    tensors, keys = pickles.load(), pickles.load()
    if not isinstance(tensors, dict) or not isinstance(keys, list):
        raise WeightsError("the file holds no dictionary of tensors.")
    if len(set(keys)) != len(keys) or set(keys) != set(pickles.storages):
        raise WeightsError("the list of storages differs from those the tensors use.")
    storages = _read_storages(
        memoryview(content)[pickles.position :], [pickles.storages[key] for key in keys]
    )
    return {name: _view(name, value, storages) for name, value in tensors.items()}


def _read_storages(
    data: memoryview, storages: list[Storage]
) -> dict[Storage, np.ndarray]:
    arrays = {}
    for storage in storages:
        # Check sizes against the remaining bytes before any allocation.
        end = 8 + storage.size * np.dtype(storage.dtype).itemsize
        if len(data) < end:
            raise WeightsError(
                f"truncated: storage {storage.key!r:.50} needs {end} bytes, and "
                f"{len(data)} are left."
            )
        (size,) = struct.unpack("<q", data[:8])
        if size != storage.size:
            raise WeightsError(
                f"storage {storage.key!r:.50} has {size} elements, not the "
                f"{storage.size} that its tensors expect."
            )
        array = np.frombuffer(data[8:end], storage.dtype).copy()  # aligns it
        array.flags.writeable = False
        arrays[storage] = array
        data = data[end:]
    if data:
        raise WeightsError(f"{len(data)} bytes follow the last storage.")
    return arrays


def _view(
    name: object, value: object, storages: dict[Storage, np.ndarray]
) -> np.ndarray:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise WeightsError(f"entry {name!r:.100} is no tensor.")
    flat = storages[value.storage]
    if 0 in value.shape:
        return np.zeros(value.shape, flat.dtype)
    last = value.offset + sum((n - 1) * s for n, s in zip(value.shape, value.strides))
    # A view may repeat elements (stride 0), but a copy of it must not exhaust memory.
    if math.prod(value.shape) > flat.size or last >= flat.size:
        raise WeightsError(
            f"tensor {name!r:.100} reaches out of its storage of {flat.size} elements: "
            f"shape {value.shape}, strides {value.strides}, offset {value.offset}."
        )
    # The stride of an axis of length 1 is never used, and may be too big for NumPy.
    strides = [s * flat.itemsize * (n > 1) for n, s in zip(value.shape, value.strides)]
    return np.lib.stride_tricks.as_strided(
        flat[value.offset :], value.shape, strides, writeable=False
    )
