"""Recovers the pretrained network from an adapted module of NNX."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import filterlib

M = TypeVar("M", bound=nnx.Module)


def without_adapters(model: M, *, adapters: filterlib.Filter = nnx.LoRAParam) -> M:
    """Returns the pretrained network of an adapted one, without a copy of its weights.

    Low-rank adapters leave the pretrained weights unchanged, so a reference model costs
    a forward pass and no memory. In the returned module all adapters are zero; all
    other variables hold the arrays of `model`. Call this inside the train step: then
    the compiled program uses the current `model` in every step.

    Args:
      model: a module with adapters of `nnx.LoRA`, `nnx.LoRALinear` or qwix
        (`qwix.apply_lora_to_model`).
      adapters: filter of the variables that are set to zero.

    Returns:
      A separate module: a call that changes it, for example its dropout counters, does
      not change `model`.

    Raises:
      ValueError: `model` has no adapters.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from dtnh_jax.nnx import without_adapters
      >>> linear = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
      >>> model = nnx.LoRA(3, 2, 4, base_module=linear, rngs=nnx.Rngs(1))
      >>> model.lora_b[...] = jnp.ones((2, 4))  # as after some training
      >>> x = jnp.ones((1, 3))
      >>> bool((model(x) == linear(x)).all())
      False
      >>> bool((without_adapters(model)(x) == linear(x)).all())
      True
    """
    graphdef, adapted, rest = nnx.split(model, adapters, ...)
    if not jax.tree.leaves(adapted):
        raise ValueError(
            f"`model` must have adapters, variables that {adapters!r} selects, got "
            f"none in this {type(model).__name__}."
        )
    zeros: Any = jax.tree.map(jnp.zeros_like, adapted)
    # New variables that hold the same arrays.
    return nnx.merge(graphdef, zeros, rest, copy=True)
