"""The files of a cache of features: made, opened and checked; see `teacher_cache`."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from dtnh_jax import _files
from dtnh_jax.teacher_cache._hashes import DIGEST_BYTES

try:
    import fcntl
except ImportError:  # on Windows, where two processes must not fill one folder
    fcntl = None

# What reading a folder raises that is missing, cut off or garbled.
UNUSABLE = (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError)


class Stored(NamedTuple):
    """What a folder holds, mapped from its files."""

    meta: dict[str, Any]
    digests: np.ndarray  # uint8 [n, 16]
    features: dict[str, np.ndarray]  # [n, ...] by layer

    @property
    def done(self) -> int:
        """How many examples are complete."""
        return self.meta["done"]


def open_folder(folder: pathlib.Path, mode: Literal["r", "r+"] = "r") -> Stored:
    """Maps the files of a folder; raises one of `UNUSABLE` if they are not whole."""
    meta = json.loads((folder / "meta.json").read_text())
    arrays = {}
    for name, entry in meta["arrays"].items():
        path, dtype = folder / entry["file"], jnp.dtype(entry["dtype"])
        # Before it is mapped: mapping a file to write it fills up what is cut off.
        is_whole = path.stat().st_size == entry["bytes"]
        array = np.load(path, mmap_mode=mode) if is_whole else None
        if array is None or list(array.shape) != entry["shape"]:
            raise ValueError(f"{path} is not what meta.json says.")
        arrays[name] = array.view(dtype)  # a file knows bfloat16 as two bytes
    stored = Stored(meta, arrays.pop(""), arrays)
    if not 0 <= stored.done <= len(stored.digests):
        raise ValueError(f"{folder} has {stored.done} of {len(stored.digests)}.")
    return stored


def create(
    folder: pathlib.Path, count: int, values: Mapping[str, np.ndarray]
) -> Stored:
    """Makes files for features like those of one batch."""
    digests = np.empty((0, DIGEST_BYTES), np.uint8)
    meta: dict[str, Any] = {"done": 0, "arrays": {}}
    # A layer's name may be no name of a file, and is never empty.
    for number, (name, value) in enumerate({"": digests, **values}.items()):
        file = f"features-{number}.npy" if name else "digests.npy"
        shape, dtype = (count, *value.shape[1:]), value.dtype
        np.lib.format.open_memmap(folder / file, "w+", dtype=dtype, shape=shape)
        meta["arrays"][name] = {
            "file": file,
            "bytes": (folder / file).stat().st_size,
            "shape": list(shape),
            "dtype": dtype.name,
        }
    write_meta(folder, meta)
    return open_folder(folder, "r+")


def write_meta(folder: pathlib.Path, meta: dict[str, Any]) -> None:
    """Writes meta.json so that readers see the old file or the new one, whole."""
    _files.replace(folder / "meta.json", json.dumps(meta, indent=1) + "\n")


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Waits while another process fills the folder; a killed one lets go."""
    with (folder / "lock").open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
