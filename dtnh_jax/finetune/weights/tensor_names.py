"""Converts between named tensors of files and variables of linen networks."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dtnh_jax.finetune.weights.source import Variables
from dtnh_jax.finetune.weights.torch_files import WeightsError

Path = tuple[str, ...]  # of a variable, starting with its collection
_NAMED = 20  # problems named in a message


def variable_shapes(module: nn.Module) -> dict[Path, jax.ShapeDtypeStruct]:
    """Returns the shape of every variable, by its path."""
    images = jnp.zeros((1, 32, 32, 3))  # any size: only channels determine shapes
    init = partial(module.init, train=False)
    shapes: Any = flatten_dict(jax.eval_shape(init, jax.random.key(0), images))
    return {path: leaf for path, leaf in shapes.items() if path[0] != "intermediates"}


def linen_name(path: Path) -> str:
    """Returns the name of a variable in files with Flax's names.

    Example:
      >>> linen_name(("params", "head", "bias"))
      'params/head/bias'
    """
    return "/".join(path)


def named_variables(
    tensors: Mapping[str, np.ndarray],
    module: nn.Module,
    name_of: Callable[[Path], str],
    title: str,
) -> Variables:
    """Returns the variables of a network from named tensors.

    Args:
      tensors: tensors by name; `num_batches_tracked` is ignored. If names are not those
        of `linen_name`, the layout is PyTorch's: outputs first.
      module: the network.
      name_of: maps the path of a variable to the name of its tensor.
      title: name of the network, for messages.

    Returns:
      {"params": tree, "batch_stats": tree} of NumPy arrays, float32.

    Raises:
      WeightsError: naming missing, surplus and misshapen tensors.
    """
    shapes = variable_shapes(module)
    names = {path: name_of(path) for path in shapes}
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith("num_batches_tracked")
    }
    problems = [
        *(f"{n} is missing" for n in names.values() if n not in tensors),
        *(f"{n} is unknown" for n in tensors.keys() - set(names.values())),
    ]
    variables = {}
    for path, expected in shapes.items():
        if (name := names[path]) not in tensors:
            continue
        value = tensors[name]
        if name_of is not linen_name:
            value = _outputs_last(value, len(expected.shape))
        if value.shape == expected.shape:
            variables[path] = np.ascontiguousarray(value, np.float32)
        else:
            problems.append(
                f"{name} has shape {tensors[name].shape}, which does not give "
                f"the {expected.shape} of {'/'.join(path)}"
            )
    if problems:
        problems.sort()
        more = len(problems) - _NAMED
        tail = f"; and {more} more" if more > 0 else ""
        raise WeightsError(
            f"Not the tensors of {title}: {'; '.join(problems[:_NAMED])}{tail}."
        )
    return unflatten_dict(variables)


def _outputs_last(tensor: np.ndarray, rank: int) -> np.ndarray:
    """Returns a view with outputs last; a matrix for a pointwise kernel."""
    if tensor.ndim == 4 and rank == 2 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    if tensor.ndim == 4:
        tensor = tensor.transpose(2, 3, 1, 0)
    elif tensor.ndim == 2:
        tensor = tensor.T
    return tensor


def torch_tensors(
    variables: Variables, name_of: Callable[[Path], str]
) -> dict[str, np.ndarray]:
    """Inverts `named_variables`: returns tensors in PyTorch's layout, outputs first.

    Args:
      variables: variables of a network whose dense layers, except the `head`, are 1x1
        convolutions in PyTorch.
      name_of: maps the path of a variable to the name of its tensor.
    """
    flat: Any = flatten_dict(variables)
    tensors = {}
    for path, leaf in flat.items():
        tensor = np.asarray(leaf)
        if tensor.ndim == 4:
            tensor = tensor.transpose(3, 2, 0, 1)
        elif tensor.ndim == 2:
            tensor = tensor.T if path[-2] == "head" else tensor.T[:, :, None, None]
        tensors[name_of(path)] = tensor
    return tensors
