"""Features of a frozen teacher on disk, so that later epochs need no forward pass.

It needs Grain, from the extra `finetune`. In the directory given, a folder for each
teacher, choice of layers and number of examples holds:

meta.json        what is stored, and how many examples are complete
digests.npy      of the bytes of each example, uint8 [n, 16]
features-*.npy   of one layer each, [n, ...]
lock             held while the folder is being filled
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

_VERSION = 1  # of the format; another one is another key
_ENTRY = "teacher"

Example = Mapping[str, Any]  # of arrays
Examples = grain.MapDataset | grain.sources.RandomAccessDataSource


class StaleCacheError(ValueError):
    """An example is not the one that the cached features were computed from."""


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

    The first call runs `compute` over all examples; later ones, also of other
    processes, read what it gave. A call that was killed goes on where it was.

    Features belong to an example as it is: random augmentation would leave them behind.
    So each example is compared, whenever it is read, with the one that its features
    were computed from. What is done to images after this can not be noticed.

    Of the teacher, its variables are what tells one from another. What else `compute`
    does, such as its architecture or preprocessing, is not seen: give another directory
    when that changes.

    Args:
      directory: where to keep features. It may hold those of other teachers, layers
        and numbers of examples; other data, such as another split, of the same size
        need a directory of their own.
      examples: read by index; dicts of arrays, all of one shape, without an entry
        "teacher". At least one, and not repeated.
      compute: maps a batch `{entry: [batch_size, ...]}` to features by layer,
        `{layer: [batch_size, ...]}`; the jitted forward pass in evaluation mode. It
        gets batches of one size, so it compiles once: repeats of the last example,
        whose features are dropped, fill up the last batch.
      teacher: the variables that `compute` uses, which are hashed.
      layers: the names of the layers to keep, of those that `compute` gives.
      batch_size: examples in a batch, at least 1.
      progress: whether to show a bar, where the standard error is a terminal.

    Returns:
      A dataset of the examples, in their order, with a further entry
      `"teacher": {layer: array}`, to shuffle, repeat and batch. It can be sent to
      Grain's worker processes.

    Raises:
      ValueError: if an argument is out of range, examples differ in shape, or
        `compute` does not give what it should.
      StaleCacheError: a ValueError; also while reading, if an example is another than
        when its features were computed.

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
            f"`examples` must hold a number of examples, at least 1, got {got}. Repeat "
            "what `cache_features` returns."
        )
    if digest(_read(examples, 0)) != digest(_read(examples, 0)):
        raise StaleCacheError(
            "`examples` must give the same example whenever it is read, got two at "
            "index 0: drop random augmentation."
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
    _ = cached[0]  # other data are found out now, not in the first epoch
    return grain.MapDataset.source(cached)


class _Cached:
    """Examples with their features, from a folder that is complete."""

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
        # Copies, so that nobody holds on to the files or finds arrays read-only.
        features = {name: np.array(x[index]) for name, x in stored.features.items()}
        return {**example, _ENTRY: features}

    def __getstate__(self) -> dict[str, Any]:
        # Each process maps the files itself; pickled, they would be sent as a whole.
        return {**self.__dict__, "_stored": None}


def _fill(
    folder: pathlib.Path,
    examples: Examples,
    compute: Callable[[Any], Mapping[str, Any]],
    names: list[str],
    batch_size: int,
    progress: bool,
) -> None:
    """Computes the features that a folder does not hold yet."""
    count, stored = len(examples), None
    try:
        stored = open_folder(folder, "r+")
    except UNUSABLE:
        # Deleted, not overwritten: some process may have mapped the old files.
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
                    f"`compute` must give {features.dtype} {expected} at layer "
                    f"{name!r}, as in {folder}, got {value.dtype} {value.shape}. "
                    "Delete that folder if the data or the model have changed."
                )
            features[start:end] = value[: end - start]
        stored.digests[start:end] = [
            np.frombuffer(digest(row), np.uint8) for row in rows
        ]
        for array in (stored.digests, *stored.features.values()):
            cast(np.memmap, array).flush()
        # Last: what it counts as done is on disk.
        stored.meta["done"] = end
        write_meta(folder, stored.meta)


def _read(examples: Examples, index: int) -> Example:
    """Returns an example, or raises if it is none that features can be added to."""
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
    """Returns a batch of the rows, filled up with repeats of the last one."""
    filled = rows + rows[-1:] * (batch_size - len(rows))
    try:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *filled)
    except ValueError as error:
        raise ValueError(
            "`examples` must all have the same entries and shapes, those from "
            f"{start} to {start + len(rows) - 1} have not: {error}"
        ) from error


def _computed(values: Mapping[str, Any], names: list[str]) -> dict[str, np.ndarray]:
    """Returns the features of the layers asked for, on the host."""
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(
            f"`compute` must give every layer of `layers`, got none for {missing[0]!r} "
            f"but {list(values)}."
        )
    arrays = jax.device_get({name: values[name] for name in names})
    return {name: np.asarray(array) for name, array in arrays.items()}


def _checked_layers(layers: Sequence[str]) -> list[str]:
    """Returns the names in the order of the alphabet, which does not matter."""
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
    """Raises unless an example is the one that its features belong to."""
    if digest(example) != digests[index].tobytes():
        raise StaleCacheError(
            f"Example {index} is not the one that its features in {folder} were "
            "computed from: delete that folder if the data have changed, or drop "
            "random augmentation."
        )


def _tracked(starts: Sequence[int], progress: bool) -> Iterable[int]:
    """Shows a bar over the batches, on a terminal alone."""
    if not (progress and starts and sys.stderr.isatty()):
        return starts
    from rich.console import Console
    from rich.progress import track

    return track(starts, "Features of the teacher", console=Console(stderr=True))
