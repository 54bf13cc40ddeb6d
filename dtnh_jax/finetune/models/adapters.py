"""Low-rank adapters: frozen pretrained matrices plus small trained ones."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PRNGKeyArray

from dtnh_jax.finetune.methods import METHODS

RANK = 4


def new_adapters(params: Any, key: PRNGKeyArray, rank: int = RANK) -> Any:
    """Draws adapters of all matrices except the head's; initially they add zero.

    Args:
      params: parameters of the network, with a `head`.
      key: key for `lora_a`, `[inputs, rank]`, which is normal with variance
        `1 / inputs`. `lora_b`, `[rank, outputs]`, is zero.
      rank: rank of the product, at least 1.

    Returns:
      A tree with `lora_a` and `lora_b` in place of every adapted `kernel`.

    References:
      Hu et al., 2021, section 4.1, https://arxiv.org/abs/2106.09685
    """
    adapters: dict[tuple[str, ...], Any] = {}
    for number, (path, leaf) in enumerate(_matrices(params).items()):
        inputs, outputs = leaf.shape
        draw = jax.random.normal(jax.random.fold_in(key, number), (inputs, rank))
        adapters[(*path[:-1], "lora_a")] = draw / inputs**0.5
        adapters[(*path[:-1], "lora_b")] = jnp.zeros((rank, outputs))
    return unflatten_dict(adapters)


def add_adapters(params: Any, adapters: Any) -> Any:
    """Returns the parameters with `lora_a @ lora_b` added to every adapted kernel."""
    flat: Any = flatten_dict(params)
    products: Any = flatten_dict(adapters)
    for path in _matrices(params):
        a, b = (products[(*path[:-1], name)] for name in ("lora_a", "lora_b"))
        flat[path] = flat[path] + a @ b
    return unflatten_dict(flat)


def check_adapters(params: Any, methods: Sequence[str], name: str) -> None:
    """Raises ValueError for methods with adapters if there is no matrix to adapt."""
    asked = [method for method in methods if METHODS[method].has_adapters]
    if asked and not _matrices(params):
        raise ValueError(
            f"`--methods` must be without {asked[0]} for {name}, which has no matrices "
            "to adapt but its head's: its layers are convolutions."
        )


def _matrices(params: Any) -> dict[tuple[str, ...], Any]:
    flat: Any = flatten_dict(params)
    return {
        path: leaf
        for path, leaf in flat.items()
        if path[-1] == "kernel" and leaf.ndim == 2 and path[0] != "head"
    }
