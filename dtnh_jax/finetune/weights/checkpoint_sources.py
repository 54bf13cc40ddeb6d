"""Networks with your own weights: `ARCHITECTURE:FILE` or `MODULE:FUNCTION`."""

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dtnh_jax.finetune.models import resnet
from dtnh_jax.finetune.models.efficientnet import EfficientNetLite0
from dtnh_jax.finetune.weights import lite
from dtnh_jax.finetune.weights.source import Source, Variables
from dtnh_jax.finetune.weights.tensor_files import COLLECTIONS, read_tensors
from dtnh_jax.finetune.weights.tensor_names import Path, linen_name, named_variables


class Architecture(NamedTuple):
    """A network without weights, and PyTorch's names of its tensors."""

    module: Callable[[int], nn.Module]  # number of classes -> network
    preprocess: Callable[..., Any]
    feature_layers: tuple[str, ...]
    torch_name: Callable[[Path], str]


ARCHITECTURES = {
    **{
        name: Architecture(
            partial(EfficientNetLite0, stages=stages),
            lite.centre_at_127,
            lite.feature_layers(stages),
            partial(lite.torch_name, stages),
        )
        for name, stages in lite.STAGES.items()
    },
    **{
        name: Architecture(
            partial(resnet.ResNet, depth=depth),
            resnet.standardize,
            resnet.feature_layers(depth),
            resnet.torch_name,
        )
        for name, depth in resnet.DEPTHS.items()
    },
}


def source_of_file(architecture: str, path: str) -> Source:
    """Returns a known network with the weights of a file, which `Source.load` reads.

    Args:
      architecture: one of `ARCHITECTURES`.
      path: a file or folder that `read_tensors` reads, with PyTorch's names
        (torchvision's, for ResNets) or linen's. It may have any number of classes.

    Returns:
      The source. Its `load` raises WeightsError, which names tensors, if the file
      belongs to another network.

    Example:
      >>> source_of_file("resnet18", "weights.safetensors").feature_layers[-1]
      'stage_4_block_2'
    """
    known = ARCHITECTURES[architecture]

    def load() -> Variables:
        tensors = read_tensors(path)
        name_of = names_in(tensors, architecture)
        bias = tensors.get(name_of(("params", "head", "bias")))
        classes = len(bias) if bias is not None and bias.ndim == 1 else 1000
        return named_variables(
            tensors, known.module(classes), name_of, f"{architecture}, in {path}"
        )

    return Source(
        name=f"{architecture}:{path}",
        licence=f"your own weights, in {path}",
        module=known.module,
        preprocess=known.preprocess,
        feature_layers=known.feature_layers,
        load=load,
    )


def names_in(
    tensors: Iterable[str], architecture: str | None = None
) -> Callable[[Path], str]:
    """Returns a function to names of a file: linen's if it has them, else PyTorch's.

    Args:
      tensors: the names in the file.
      architecture: one of `ARCHITECTURES`; others only have linen's names.
    """
    is_linen = any(name.split("/")[0] in COLLECTIONS for name in tensors)
    if is_linen or architecture not in ARCHITECTURES:
        return linen_name
    return ARCHITECTURES[architecture].torch_name


def source_of_function(module: str, function: str) -> Source:
    """Returns the user's own network, from a function without arguments.

    Args:
      module: name of the module to import, also from the current directory.
      function: name of the function, which returns a `Source`. The source's `module`
        must make linen networks that are called as `network(images, train=bool)`, have
        a dense submodule `head`, and sow its input as `pooled` in "intermediates".

    Returns:
      The source.

    Raises:
      ValueError: there is no such function, or it returns no such source.
    """
    spec = f"{module}:{function}"
    if os.getcwd() not in sys.path:  # console scripts lack the current directory
        sys.path.append(os.getcwd())
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`{spec}` can not be imported: {error}.") from error
    source = make() if callable(make) else make
    if not isinstance(source, Source):
        raise ValueError(
            f"`{spec}` must return a `dtnh_jax.finetune.weights.sources.Source`, got "
            f"{type(source).__name__}."
        )
    _check_network(spec, source)

    def load() -> Variables:
        return {"batch_stats": {}, **source.load()}  # a network may have none

    return source._replace(name=spec, load=load)


def _check_network(spec: str, source: Source) -> None:
    """Raises ValueError unless the loop can use a network; computes nothing."""
    network = source.module(3)

    def init(key):
        images = source.preprocess(jnp.zeros((1, 32, 32, 3), jnp.uint8))
        return network.init(key, images, train=False, mutable=True)

    try:
        found: Any = jax.eval_shape(init, jax.random.key(0))
    except Exception as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"The network of `{spec}` does not run: {first}") from error
    head = found["params"].get("head", {})
    kernel, bias = head.get("kernel"), head.get("bias")
    if kernel is None or bias is None or kernel.ndim != 2 or bias.shape != (3,):
        raise ValueError(
            f"The network of `{spec}` must have a dense submodule `head` with as many "
            f"outputs as classes, got the submodules {', '.join(found['params'])}."
        )
    if "pooled" not in found.get("intermediates", {}):
        raise ValueError(
            f"The network of `{spec}` must sow the input of its head: "
            '`self.sow("intermediates", "pooled", x)`.'
        )
