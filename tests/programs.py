"""Programs of JAX, as tests look into them."""

import jax
from jax.extend import core


def inner(params):
    """The programs among the parameters of an operation, in all versions of JAX."""
    found = []
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(each, (core.Jaxpr, core.ClosedJaxpr)):
                found.append(each)
    return found


def varying(tree, axis):
    """Lets values differ between devices, in types of `jax.shard_map`."""
    if not hasattr(jax.lax, "pcast"):  # before jax 0.9
        return jax.lax.pvary(tree, axis)
    return jax.lax.pcast(tree, axis, to="varying")
