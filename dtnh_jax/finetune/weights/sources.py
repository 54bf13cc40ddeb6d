"""The pretrained networks, and their variables."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import PRNGKeyArray

from dtnh_jax.finetune.weights import checkpoint_sources
from dtnh_jax.finetune.weights.lite import STAGES, lite_source, lite_variables
from dtnh_jax.finetune.weights.source import Images as Images
from dtnh_jax.finetune.weights.source import Source, Variables
from dtnh_jax.finetune.weights.source import (
    SourceUnavailableError as SourceUnavailableError,
)
from dtnh_jax.finetune.weights.tensor_names import variable_shapes


def load_source(name: str) -> Source:
    """Returns a source; its weights are read only when `load` is called.

    Args:
      name: one of `SOURCES`; `ARCHITECTURE:FILE` for your own weights, such as
        `resnet50:weights.safetensors`, see `checkpoint_sources.source_of_file`; or
        `MODULE:FUNCTION` for your own network, see `source_of_function` there.

    Raises:
      ValueError: the name is unknown; the message lists the known ones.

    Example:
      >>> load_source("efficientnet-lite0").feature_layers[0]
      'stage_2_block_2'
    """
    if not is_source(name):
        raise ValueError(f"`name` must be one of {known_sources()}, got {name!r}.")
    if name in SOURCES:
        return SOURCES[name]
    what, _, where = name.partition(":")
    if what in checkpoint_sources.ARCHITECTURES:
        return checkpoint_sources.source_of_file(what, where)
    return checkpoint_sources.source_of_function(what, where)


def is_source(name: str) -> bool:
    """Returns whether `load_source` accepts a name, without opening it."""
    what, _, where = name.partition(":")
    if what in checkpoint_sources.ARCHITECTURES:
        return name in SOURCES or bool(where)
    is_function = where.isidentifier() and all(map(str.isidentifier, what.split(".")))
    return name in SOURCES or is_function


def known_sources() -> str:
    """Returns a list of the known sources, for messages."""
    architectures = ", ".join(
        f"{name}:FILE" for name in checkpoint_sources.ARCHITECTURES
    )
    return f"{', '.join(SOURCES)}, {architectures}, MODULE:FUNCTION"


def initial_variables(
    source: Source, num_classes: int, key: PRNGKeyArray, pretrained: bool
) -> Variables:
    """Returns the initial variables of training.

    Args:
      source: the network; its weights are read only if `pretrained`.
      num_classes: size of the new head, at least 1.
      key: key for the random initialisation; if `pretrained`, of the head alone.
      pretrained: whether all variables except the head are the source's weights.

    Returns:
      {"params": tree, "batch_stats": tree} for `source.module(num_classes)`.

    Raises:
      ValueError: `num_classes` is below 1.
      SourceUnavailableError: the package of the weights is missing.
      WeightsError: the weights belong to another network.
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
    """Returns the source's weights, with the original head."""
    return jax.tree.map(jnp.asarray, source.load())


def _random_variables(module: nn.Module, key: PRNGKeyArray) -> Variables:
    """Draws variables with the distribution of `module.init`.

    These are LeCun normal kernels, and constants. All kernels come from one draw,
    because `module.init` compiles a draw for each shape, which takes a CPU 10 to 20
    seconds.
    """
    shapes = variable_shapes(module)
    kernels = [path for path in shapes if path[-1] == "kernel"]
    sizes = [math.prod(shapes[path].shape) for path in kernels]
    draw = np.asarray(jax.random.truncated_normal(key, -2, 2, (sum(sizes),)))
    constants = {"scale": 1, "var": 1, "bias": 0, "mean": 0}
    if not {path[-1] for path in shapes} <= {"kernel", *constants}:
        return _drawn_by_module(module, key)  # it has other variables
    variables = {
        path: np.full(leaf.shape, constants[path[-1]], np.float32)
        for path, leaf in shapes.items()
        if path[-1] != "kernel"
    }
    for path, values in zip(kernels, np.split(draw, np.cumsum(sizes)[:-1])):
        shape = shapes[path].shape
        fan_in = math.prod(shape[:-1])
        # 0.8796 is the deviation of a normal truncated at two deviations.
        variables[path] = values.reshape(shape) / np.sqrt(fan_in * 0.87962566**2)
    tree = unflatten_dict(jax.tree.map(jnp.float32, variables))
    return {"batch_stats": {}, **tree}


def _drawn_by_module(module: nn.Module, key: PRNGKeyArray) -> Variables:
    init = jax.jit(partial(module.init, train=False))
    drawn = init(key, jnp.zeros((1, 32, 32, 3)))
    return {name: drawn.get(name, {}) for name in ("params", "batch_stats")}


def lite0_variables(tensors: dict[str, np.ndarray]) -> Variables:
    """Renames and transposes PyTorch's tensors of EfficientNet-Lite0 for linen.

    Args:
      tensors: a state dictionary with 1000 classes; `num_batches_tracked` is ignored.

    Returns:
      {"params": tree, "batch_stats": tree} of NumPy arrays, float32.

    Raises:
      WeightsError: naming missing, surplus and misshapen tensors.
    """
    return lite_variables("efficientnet-lite0", tensors)


# Those whose weights install as packages.
SOURCES = {name: lite_source(name) for name in STAGES}
