"""Describes the device, and puts arrays on it without compilation."""

import platform
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

DTYPES = ("float32", "bfloat16")


def about() -> dict[str, Any]:
    """Returns a description of the device and the versions."""
    device = jax.devices()[0]
    precision = getattr(jax.config, "jax_default_matmul_precision", None)
    return {
        "device": f"{device.device_kind} ({device.platform})",
        "jax": jax.__version__,
        "optax": optax.__version__,
        "python": platform.python_version(),
        "precision of float32 products": precision or "the backend's default",
    }


def put(tree: Any) -> Any:
    """Copies arrays to the device, also those that are already there."""
    # A CPU would share the memory of the array, which is then donated.
    copy = True if jax.default_backend() == "cpu" else None
    return jax.tree.map(lambda x: jax.device_put(np.array(x, copy=copy)), tree)


def host_normal(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    scale: float,
    dtype: Any,
    alike: bool = False,
) -> np.ndarray:
    """Draws normal numbers on the host, without compilation.

    Args:
      rng: generator of the numbers.
      shape: shape of the array.
      scale: standard deviation.
      dtype: dtype of the array.
      alike: draw only one entry of the first axis, and make all entries views of it,
        for arrays that are too large to draw.
    """
    drawn = scale * rng.standard_normal(shape[1:] if alike else shape, np.float32)
    return np.broadcast_to(drawn.astype(dtype), shape)


def on_host(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function on the host, and copies the result to the device.

    Use it for functions that run once, such as an optimizer's `init`: an accelerator
    would compile a program for each shape.
    """
    try:
        host = jax.devices("cpu")[0]
    except RuntimeError:  # there is the accelerator's backend alone
        host = jax.devices()[0]
    with jax.default_device(host):
        return put(function(*args))


def dtype_of(name: str) -> Any:
    """Returns NumPy's dtype for a name.

    Example:
      >>> dtype_of("bfloat16").itemsize
      2
    """
    return jnp.dtype(name)


def same_structure(tree: Any, like: Any) -> Any:
    """Returns a tree's leaves in the structure of another tree.

    Two regularizers may differ only in the identity of their functions, which is enough
    to need another program.
    """
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(tree))
