"""Features of a frozen teacher on disk, so that later epochs need no forward pass.

Requires Grain, from the extra `finetune`. The directory has a folder for each teacher,
choice of layers and number of examples, with these files:

meta.json        description of the arrays, and the number of complete examples
digests.npy      digest of each example's bytes, uint8 [n, 16]
features-*.npy   features of one layer, [n, ...]
lock             held while a process fills the folder
"""

import hashlib
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import grain
import jax
import numpy as np
from jaxtyping import PyTree

from dtnh_jax.teacher_cache._files import (
    UNUSABLE,
    Stored,
    create,
    locked,
    open_folder,
    write_meta,
)
from dtnh_jax.teacher_cache._hashes import digest, fingerprint

_VERSION = 1  # of the format; part of the folder's key
_ENTRY = "teacher"

Example = Mapping[str, Any]  # of arrays
Examples = grain.MapDataset | grain.sources.RandomAccessDataSource


class StaleCacheError(ValueError):
    """An example differs from the one of its cached features."""


def cache_features(
    directory: str | os.PathLike[str],
    examples: Examples,
    compute: Callable[[Any], Mapping[str, Any]],
    *,
    teacher: PyTree,
    layers: Sequence[str],
    batch_size: int = 64,
    progress: bool = True,
) -> grain.MapDataset:
    """Computes a teacher's features of every example once, and keeps them on disk.

    The first call runs `compute` over all examples. Later calls, in other processes
    too, read the stored features. After an interruption, the next call resumes.

    Random augmentation would change examples after their features were computed. So
    each example is compared with its stored digest whenever it is read. Augmentation
    after this dataset can not be detected.

    A teacher is identified by its variables. Other changes of `compute`, such as
    another architecture or preprocessing, are not detected: use another directory then.

    Args:
      directory: folder of the features. It may also hold features of other teachers,
        layers and numbers of examples. Other data of the same size, such as another
        split, need another directory.
      examples: read by index; dicts of arrays of equal shapes, without an entry
        "teacher". At least one example, and not repeated.
      compute: maps a batch `{entry: [batch_size, ...]}` to features by layer,
        `{layer: [batch_size, ...]}`; for example the jitted forward pass in evaluation
        mode. Batches have one size, so it compiles once: repeats of the last example
        fill the last batch, and their features are dropped.
      teacher: the variables that `compute` uses; they are hashed.
      layers: names of the layers to store, among those that `compute` returns.
      batch_size: examples in a batch, at least 1.
      progress: whether to show a progress bar, if the standard error is a terminal.

    Returns:
      A dataset of the examples, in their order, with another entry
      `"teacher": {layer: array}`, to shuffle, repeat and batch. It can be sent to
      Grain's worker processes.

    Raises:
      ValueError: an argument is out of range, examples differ in shape, or `compute`
        returns other features than documented.
      StaleCacheError: a ValueError; also while reading, if an example differs from the
        one of its features.

    Example:
      >>> import tempfile
      >>> folder = tempfile.TemporaryDirectory()
      >>> examples = [{"image": np.full(2, i, np.float32)} for i in range(3)]
      >>> weights = {"w": np.eye(2, dtype=np.float32)}
      >>> def compute(batch):
      ...     return {"last": batch["image"] @ weights["w"]}
      >>> cached = cache_features(
      ...     folder.name, examples, compute, teacher=weights, layers=["last"]
      ... )
      >>> cached[2]
      {'image': array([2., 2.], dtype=float32),
       'teacher': {'last': array([2., 2.], dtype=float32)}}
      >>> folder.cleanup()
    """
    names = _checked_layers(layers)
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    count = len(examples)
    if not 0 < count < sys.maxsize:
        got = "a dataset that repeats" if count else "0"
        raise ValueError(
            f"`examples` must hold a finite number of examples, at least 1, got {got}. "
            "Repeat the dataset that `cache_features` returns instead."
        )
    if digest(_read(examples, 0)) != digest(_read(examples, 0)):
        raise StaleCacheError(
            "`examples` must return the same example at every read, got two at index "
            "0: drop random augmentation."
        )
    key = [_VERSION, fingerprint(teacher), names, count]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    folder = pathlib.Path(directory).expanduser().absolute() / name
    try:
        is_complete = open_folder(folder).done == count
    except UNUSABLE:
        is_complete = False
    if not is_complete:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            _fill(folder, examples, compute, names, batch_size, progress)
    cached = _Cached(examples, folder)
    _ = cached[0]  # detects other data now, not in the first epoch
    return grain.MapDataset.source(cached)


class _Cached:
    """Examples with their features, from a complete folder."""

    def __init__(self, examples: Examples, folder: pathlib.Path):
        self._examples, self._folder = examples, folder
        self._stored: Stored | None = None

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._stored is None:
            self._stored = open_folder(self._folder)
        example, stored = _read(self._examples, index), self._stored
        _check(example, index, stored.digests, self._folder)
        # Copies, so that arrays are writable and do not keep the files open.
        features = {name: np.array(x[index]) for name, x in stored.features.items()}
        return {**example, _ENTRY: features}

    def __getstate__(self) -> dict[str, Any]:
        # Each process maps the files itself; pickling would send their content.
        return {**self.__dict__, "_stored": None}


def _fill(
    folder: pathlib.Path,
    examples: Examples,
    compute: Callable[[Any], Mapping[str, Any]],
    names: list[str],
    batch_size: int,
    progress: bool,
) -> None:
    """Computes the features that a folder lacks."""
    count, stored = len(examples), None
    try:
        stored = open_folder(folder, "r+")
    except UNUSABLE:
        # Deleted, not overwritten: a process may have mapped the old files.
        for path in [*folder.glob("*.npy"), *folder.glob("meta.json*")]:
            path.unlink()
    done = stored.done if stored else 0
    if stored and done:
        _check(_read(examples, 0), 0, stored.digests, folder)

    dataset = examples
    if not isinstance(dataset, grain.MapDataset):
        dataset = grain.MapDataset.source(dataset)
    # Grain's threads read ahead while the teacher computes.
    stream = iter(dataset[done:].to_iter_dataset()) if done < count else iter(())
    for start in _tracked(range(done, count, batch_size), progress):
        end = min(start + batch_size, count)
        rows: list[Any] = list(itertools.islice(stream, end - start))
        if len(rows) < end - start:
            raise ValueError("`examples` must not be filtered, some are missing.")
        values = _computed(compute(_stacked(rows, start, batch_size)), names)
        stored = stored or create(folder, count, values)
        for name, value in values.items():
            features = stored.features[name]
            expected = (batch_size, *features.shape[1:])
            if value.shape != expected or value.dtype != features.dtype:
                raise ValueError(
                    f"`compute` must return {features.dtype} {expected} at layer "
                    f"{name!r}, as in {folder}, got {value.dtype} {value.shape}. "
                    "Delete that folder if the data or the model have changed."
                )
            features[start:end] = value[: end - start]
        stored.digests[start:end] = [
            np.frombuffer(digest(row), np.uint8) for row in rows
        ]
        for array in (stored.digests, *stored.features.values()):
            cast(np.memmap, array).flush()
        # Last, so that the examples it counts are on disk.
        stored.meta["done"] = end
        write_meta(folder, stored.meta)


def _read(examples: Examples, index: int) -> Example:
    """Returns an example; raises ValueError if features can not be added to it."""
    example = examples[index]
    if not isinstance(example, Mapping) or _ENTRY in example:
        is_other = not isinstance(example, Mapping)
        got = type(example).__name__ if is_other else list(example)
        raise ValueError(
            f"`examples` must be dicts without an entry {_ENTRY!r}, got {got} at index "
            f"{index}."
        )
    return example


def _stacked(rows: list[Example], start: int, batch_size: int) -> Example:
    """Returns a batch of the rows, padded with repeats of the last one."""
    filled = rows + rows[-1:] * (batch_size - len(rows))
    try:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *filled)
    except ValueError as error:
        raise ValueError(
            "`examples` must all have the same entries and shapes; those from "
            f"{start} to {start + len(rows) - 1} differ: {error}"
        ) from error


def _computed(values: Mapping[str, Any], names: list[str]) -> dict[str, np.ndarray]:
    """Returns the features of the selected layers, on the host."""
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(
            "`compute` must return every layer of `layers`, got none for "
            f"{missing[0]!r} but {list(values)}."
        )
    arrays = jax.device_get({name: values[name] for name in names})
    return {name: np.asarray(array) for name, array in arrays.items()}


def _checked_layers(layers: Sequence[str]) -> list[str]:
    """Returns the names in alphabetical order, so that their order has no effect."""
    names = [layers] if isinstance(layers, str) else list(layers)
    if isinstance(layers, str) or not all(isinstance(x, str) and x for x in names):
        raise TypeError(f"`layers` must be a list of names, got {layers!r}.")
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"`layers` must be different names, at least one, got {names}."
        )
    return sorted(names)


def _check(
    example: Example, index: int, digests: np.ndarray, folder: pathlib.Path
) -> None:
    """Raises StaleCacheError unless an example matches its digest."""
    if digest(example) != digests[index].tobytes():
        raise StaleCacheError(
            f"Example {index} differs from the one of its features in {folder}: delete "
            "that folder if the data have changed, or drop random augmentation."
        )


def _tracked(starts: Sequence[int], progress: bool) -> Iterable[int]:
    """Shows a progress bar over the batches, if there is a terminal."""
    if not (progress and starts and sys.stderr.isatty()):
        return starts
    from rich.console import Console
    from rich.progress import track

    return track(starts, "Features of the teacher", console=Console(stderr=True))
