"""Makes a module from the files of a model: base weights and adapters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from dtnh_jax.lm.architecture import Adapters, Llama
from dtnh_jax.lm.model_files import ModelError, ModelFile, shape_of

Tree = Any  # nested dictionaries of arrays

_initial_a = nnx.initializers.he_uniform(batch_axis=0)


class Network(NamedTuple):
    """A model in two trees: trained adapters, and base weights."""

    graphdef: Any
    adapters: Tree  # shapes and dtypes only
    base: Tree

    def module(self, adapters: Tree, base: Tree) -> Llama:
        """Merges the trees, without copies of arrays."""
        return nnx.merge(self.graphdef, adapters, base)


def read_network(
    model: ModelFile, *, dtype: Any, adapters: Adapters, remat: bool = False
) -> Network:
    """Reads all base weights as NumPy arrays, with those of layers stacked.

    Args:
      model: an open model.
      dtype: dtype of the computation and of base weights.
      adapters: the adapters, in float32.
      remat: whether to recompute layers in the backward pass.

    Raises:
      ModelError: a tensor is missing or has another shape.
    """
    abstract = nnx.eval_shape(
        lambda: Llama(
            model.shape, dtype=dtype, adapters=adapters, remat=remat, rngs=nnx.Rngs(0)
        )
    )
    graphdef, trained, base = nnx.split(abstract, nnx.LoRAParam, ...)
    read = []
    for path, _ in nnx.to_flat_state(base):
        name = str(path[1] if path[0] == "blocks" else path[0])
        if path[0] != "blocks":
            read.append((path, _tensor(model, name).astype(dtype)))
            continue
        layers = [_tensor(model, f"{i}.{name}") for i in range(model.shape.layers)]
        # A kernel of Flax is `[inputs, outputs]`.
        stacked = np.stack([x.T for x in layers]).astype(dtype)
        read.append((path, stacked))
    filled = nnx.to_pure_dict(nnx.from_flat_state(read))
    return Network(graphdef, nnx.to_pure_dict(trained), filled)


def _tensor(model: ModelFile, name: str) -> np.ndarray:
    found, expected = model.read(name), shape_of(model.shape, name)
    if found.shape != expected:
        raise ModelError(
            f"the tensor {name} of {model.name} must have the shape {expected}, got "
            f"{found.shape}."
        )
    return found


def initial_adapters(network: Network, key: PRNGKeyArray) -> Tree:
    """Draws the first factors of all adapters; the second factors are zero."""
    leaves, treedef = jax.tree.flatten_with_path(network.adapters)
    keys = jax.random.split(key, len(leaves))

    def initial(path, leaf, key):
        if path[-1].key == "lora_a":
            return _initial_a(key, leaf.shape, leaf.dtype)
        return jnp.zeros(leaf.shape, leaf.dtype)

    return treedef.unflatten([initial(*each, key) for each, key in zip(leaves, keys)])


def scaled(adapters: Tree, factor: float) -> Tree:
    """Multiplies the products of all adapters by a factor."""
    return jax.tree.map_with_path(
        lambda path, x: factor * x if path[-1].key == "lora_b" else x, adapters
    )
