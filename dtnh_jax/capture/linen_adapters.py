"""Recovers the pretrained network from adapted parameters of Flax linen."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


def without_adapters(params: T, *, b: str = "lora_b") -> T:
    """Returns the parameters of the pretrained network, without a copy of its weights.

    Low-rank adapters leave the pretrained weights unchanged, so a reference model costs
    a forward pass and no memory. In the returned tree, the second factors of all
    adapters are zero; all other leaves are those of `params`.

    Args:
      params: parameters of a network with adapters, or all its variables.
      b: suffix of the second factors' names. The default matches those of qwix, such as
        `"kernel_lora_b"`, and of Flax, `"lora_b"`.

    Returns:
      A tree like `params`, for the same `model.apply`.

    Raises:
      ValueError: no leaf has such a name.

    Example:
      >>> import jax.numpy as jnp
      >>> from dtnh_jax.linen import without_adapters
      >>> w, a, b = jnp.ones((3, 3)), jnp.ones((3, 1)), jnp.ones((1, 3))
      >>> params = {"dense": {"kernel": w, "kernel_lora_a": a, "kernel_lora_b": b}}
      >>> base = without_adapters(params)
      >>> print(base["dense"]["kernel_lora_b"], base["dense"]["kernel"] is w)
      [[0. 0. 0.]] True
    """
    found = []

    def zeroed(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if not name.endswith(b):
            return leaf
        found.append(name)
        return jnp.zeros_like(leaf)

    base = jax.tree.map_with_path(zeroed, params)
    if not found:
        raise ValueError(
            f"`params` must have adapters, leaves whose names end in {b!r}, got none."
        )
    return base
