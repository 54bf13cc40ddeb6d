"""Creates, opens and checks the files of a cache of features; see `teacher_cache`."""

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
except ImportError:  # on Windows: there, two processes must not fill one folder
    fcntl = None

# Errors of reading a folder that is missing, incomplete or damaged.
UNUSABLE = (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError)


class Stored(NamedTuple):
    """The content of a folder, mapped from its files."""

    meta: dict[str, Any]
    digests: np.ndarray  # uint8 [n, 16]
    features: dict[str, np.ndarray]  # [n, ...] by layer

    @property
    def done(self) -> int:
        """Number of complete examples."""
        return self.meta["done"]


def open_folder(folder: pathlib.Path, mode: Literal["r", "r+"] = "r") -> Stored:
    """Maps the files of a folder; raises one of `UNUSABLE` if they are damaged."""
    meta = json.loads((folder / "meta.json").read_text())
    arrays = {}
    for name, entry in meta["arrays"].items():
        path, dtype = folder / entry["file"], jnp.dtype(entry["dtype"])
        # Before it is mapped, because mapping for writing extends a truncated file.
        is_whole = path.stat().st_size == entry["bytes"]
        array = np.load(path, mmap_mode=mode) if is_whole else None
        if array is None or list(array.shape) != entry["shape"]:
            raise ValueError(f"{path} does not match meta.json.")
        arrays[name] = array.view(dtype)  # the file stores bfloat16 as two bytes
    stored = Stored(meta, arrays.pop(""), arrays)
    if not 0 <= stored.done <= len(stored.digests):
        raise ValueError(f"{folder} has {stored.done} of {len(stored.digests)}.")
    return stored


def create(
    folder: pathlib.Path, count: int, values: Mapping[str, np.ndarray]
) -> Stored:
    """Creates files for features with the shapes of one batch."""
    digests = np.empty((0, DIGEST_BYTES), np.uint8)
    meta: dict[str, Any] = {"done": 0, "arrays": {}}
    # A layer's name may not be a valid file name.
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
    """Writes meta.json atomically."""
    _files.replace(folder / "meta.json", json.dumps(meta, indent=1) + "\n")


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Waits while another process fills the folder; the lock ends with that process."""
    with (folder / "lock").open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
