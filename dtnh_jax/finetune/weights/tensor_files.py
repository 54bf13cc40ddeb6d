"""Reads files of weights: tensors by name."""

import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import flax.serialization
import numpy as np
import orbax.checkpoint as ocp
import safetensors
from flax.traverse_util import flatten_dict

from dtnh_jax.finetune.directories import expanded
from dtnh_jax.finetune.weights.torch_files import WeightsError, read_torch_checkpoint

COLLECTIONS = ("params", "batch_stats")


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a file, or the folder of a checkpoint, by its suffix.

    Nothing in the file is executed; for PyTorch's pickles see `read_torch_checkpoint`.

    Args:
      path: `.safetensors`; `.pth` or `.pt` in PyTorch's legacy format; `.msgpack` from
        `flax.serialization.to_bytes`; or a folder that orbax wrote.

    Returns:
      Arrays by name. Paths of trees are joined by `/`, as in `params/head/bias`. Of a
      tree with "params", such as a `TrainState`, only "params" and "batch_stats" are
      returned.

    Raises:
      WeightsError: the file is missing, damaged or of another kind.
    """
    path = expanded(path)
    if path.is_dir():
        read = _read_orbax
    elif not path.exists():
        raise WeightsError(f"There is no file of weights `{path}`.")
    elif path.suffix in _READERS:
        read = _READERS[path.suffix]
    else:
        known = ", ".join(_READERS)
        raise WeightsError(
            f"`{path}` must end in one of {known}, or be a folder that orbax wrote."
        )
    try:
        return read(path)
    except WeightsError:
        raise
    except Exception as error:  # readers of damaged files raise any exception
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise WeightsError(f"`{path}` can not be read: {first:.200}") from error


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    # It checks the header against the size of the file before it allocates memory.
    with safetensors.safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read_msgpack(path: pathlib.Path) -> dict[str, np.ndarray]:
    return _flat(flax.serialization.msgpack_restore(path.read_bytes()))


def _read_orbax(path: pathlib.Path) -> dict[str, np.ndarray]:
    if (path / "default").is_dir():  # of a step of a `CheckpointManager`
        path = path / "default"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found: Any = reader.metadata(path.absolute()).item_metadata
        if found is None:
            raise WeightsError(f"`{path}` is no checkpoint of orbax.")
        # As NumPy arrays, because more devices may have written them than are here.
        return _flat(
            reader.restore(
                path.absolute(),
                ocp.args.PyTreeRestore(
                    restore_args=_tree_map(
                        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), found.tree
                    )
                ),
            )
        )


def _tree_map(of_leaf: Callable[[Any], Any], tree: Any) -> Any:
    """Maps over dictionaries and lists; anything else is a leaf, None too."""
    if isinstance(tree, dict):
        return {key: _tree_map(of_leaf, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_tree_map(of_leaf, value) for value in tree]
    return of_leaf(tree)


def _flat(tree: Any) -> dict[str, np.ndarray]:
    if not isinstance(tree, dict):
        raise WeightsError("the file holds no dictionary of tensors.")
    if "params" in tree:
        tree = {key: tree[key] for key in COLLECTIONS if tree.get(key)}
    flat: Any = flatten_dict(tree, sep="/")
    for name, value in flat.items():
        if math.prod(np.shape(value)) and not np.issubdtype(
            np.asarray(value).dtype, np.number
        ):
            raise WeightsError(f"entry {name!r:.100} is no tensor.")
    return {name: np.asarray(value) for name, value in flat.items()}


_READERS = {
    ".safetensors": _read_safetensors,
    ".pth": read_torch_checkpoint,
    ".pt": read_torch_checkpoint,
    ".msgpack": _read_msgpack,
}
