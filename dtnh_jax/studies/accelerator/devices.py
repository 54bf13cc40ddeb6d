"""The device, and arrays on it without compiling anything."""

import platform
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

DTYPES = ("float32", "bfloat16")


def about() -> dict[str, Any]:
    """What was measured on what."""
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
    """New copies on the device, also of arrays that are there already."""
    # A CPU would share memory with the array, which is then given away.
    copy = True if jax.default_backend() == "cpu" else None
    return jax.tree.map(lambda x: jax.device_put(np.array(x, copy=copy)), tree)


def host_normal(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    scale: float,
    dtype: Any,
    alike: bool = False,
) -> np.ndarray:
    """Random numbers on the host, which costs no compilation.

    Args:
      rng: where they come from.
      shape: of the array.
      scale: their standard deviation.
      dtype: of the array.
      alike: draw only one entry of the first axis and let all be views of it. That is
        for large arrays, of which drawing all takes too long.
    """
    drawn = scale * rng.standard_normal(shape[1:] if alike else shape, np.float32)
    return np.broadcast_to(drawn.astype(dtype), shape)


def on_host(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function whose operations run on the host, and puts the result back.

    For what runs once, such as making an optimizer's state: an accelerator would
    compile a program for each of its shapes.
    """
    try:
        host = jax.devices("cpu")[0]
    except RuntimeError:  # there is the accelerator's backend alone
        host = jax.devices()[0]
    with jax.default_device(host):
        return put(function(*args))


def dtype_of(name: str) -> Any:
    """The dtype of a name, as NumPy takes it.

    Example:
      >>> dtype_of("bfloat16").itemsize
      2
    """
    return jnp.dtype(name)


def same_structure(tree: Any, like: Any) -> Any:
    """Returns a tree's leaves in the structure of another tree.

    Two regularizers may differ in nothing but the identity of their functions, which
    is enough to need another program.
    """
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(tree))
