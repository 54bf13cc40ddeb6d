"""Programs of JAX, as tests look into them."""

from jax.extend import core


def inner(params):
    """The programs among the parameters of an operation, in all versions of JAX."""
    found = []
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(each, (core.Jaxpr, core.ClosedJaxpr)):
                found.append(each)
    return found
