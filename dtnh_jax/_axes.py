"""Sums over devices that hold parts of the gradients, under `jax.shard_map`.

In `jax.shard_map`, `jax.pmap` and `jax.vmap(..., axis_name=...)` a sum over a leaf runs
over this device's part of it. Jit with sharded arrays does not need this file: there
the compiler adds the collectives.

Shape letters: L leaves.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

AxisName = str | tuple[str, ...]


def checked(axis_name: Any) -> tuple[str, ...]:
    """Returns the names of axes as a tuple, which is empty for None."""
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    if names is None:
        return ()
    if not isinstance(names, tuple) or not all(isinstance(n, str) for n in names):
        raise TypeError(
            "`axis_name` must be the name of an axis or a tuple of names, got "
            f"{axis_name!r}."
        )
    if not names or not all(names) or len(set(names)) < len(names):
        raise ValueError(
            f"`axis_name` must be at least one name, each only once, got {axis_name!r}."
        )
    return names


def count(axes: tuple[str, ...]) -> int:
    """Returns the number of devices along the axes.

    Raises:
      ValueError: the caller is not mapped over these axes.
    """
    try:
        return math.prod(jax.lax.axis_size(axis) for axis in axes)
    except NameError as error:
        raise ValueError(
            "`axis_name` must name axes over which `update` is mapped, by "
            f"`jax.shard_map` or `jax.vmap(..., axis_name=...)`, got {axes}: {error}. "
            "Leave it out under jit with sharded arrays."
        ) from error


def copies(
    leaves: Sequence[Sequence[ArrayLike]], axes: tuple[str, ...]
) -> Int[np.ndarray, "L"]:
    """Returns how many devices hold the same copy of each leaf; 1 if all differ.

    Types under `jax.shard_map` show this, unless it is called with `check_vma=False`.
    Elsewhere types do not show it, and every device counts as holding its own part.

    Args:
      leaves: for each of L leaves, the arrays of its inner product.
      axes: mapped axes.
    """
    count(axes)
    typed = [axis for axis in axes if axis in _varying(jax.lax.axis_index(axis))]

    def copies_of(arrays):
        varying = set().union(*[_varying(array) for array in arrays])
        return math.prod(
            jax.lax.axis_size(axis) for axis in typed if axis not in varying
        )

    return np.array([copies_of(arrays) for arrays in leaves], int)


def sum_over_devices(values: Sequence[Array], axes: tuple[str, ...]) -> list[Array]:
    """Sums arrays of one shape over devices, in one collective."""
    if not axes:
        return list(values)
    return list(jnp.unstack(_psum(jnp.stack(values), axes)))


def all_devices(flag: Bool[Array, ""], axes: tuple[str, ...]) -> Bool[Array, ""]:
    """Returns whether a flag is true on every device."""
    if not axes:
        return flag
    count(axes)
    return _psum(jnp.where(flag, 0, 1), axes) == 0


def check_parts(
    grads: Sequence[Any], params: Sequence[Any], axes: tuple[str, ...]
) -> None:
    """Raises ValueError if devices share parameters but not their gradients."""
    for grad, param in zip(grads, params):
        own = set(axes) & (_varying(grad) - _varying(param))
        if own:
            raise ValueError(
                "`axis_name` must name axes along which parameters are sharded, got "
                f"{axes}, but along {sorted(own)} every device has the same parameters "
                "and gradients of its own examples: average those gradients with "
                "`jax.lax.pmean` before `update`, and leave the axis out."
            )


def cast_like(x: Any, like: Any) -> Array:
    """Returns a value with the type of `like`: dtype, sharding and varying axes."""
    return _sharded(as_varying(x.astype(like.dtype), like), like)


def shard_like(x: Any, like: Any) -> Array:
    """Returns a value with the sharding of `like`, unless it already has one."""
    on_mesh = _explicit_sharding(x) is not None
    return as_varying(x if on_mesh else _sharded(x, like), like)


def _sharded(x: Any, like: Any) -> Array:
    """Shards a value like `like`, if that is on an explicit mesh."""
    sharding = _explicit_sharding(like)
    if sharding is None or sharding == _explicit_sharding(x):
        return x
    return jax.sharding.reshard(x, sharding)


def _explicit_sharding(x: Any) -> jax.sharding.NamedSharding | None:
    """Returns the sharding in a value's type, or None without an explicit mesh."""
    sharding: Any = _type(x).sharding
    is_explicit = sharding and AxisType.Explicit in sharding.mesh.axis_types
    return sharding if is_explicit else None


def zeros(like: jax.ShapeDtypeStruct) -> Array:
    """Returns zeros of a type from `jax.eval_shape`, on any mesh."""
    return as_varying(jnp.zeros(like.shape, like.dtype, device=like.sharding), like)


def as_varying(x: Array, like: Any) -> Array:
    """Marks a value as varying over the axes over which `like` varies."""
    return _made_varying(x, _varying(like) - _varying(x))


def _psum(values: Array, axes: tuple[str, ...]) -> Array:
    missing = set(axes) & _varying(jax.lax.axis_index(axes)) - _varying(values)
    # Under typed axes `psum` rejects values that do not vary over them.
    return jax.lax.psum(_made_varying(values, missing), axes)


def _type(x: Any) -> Any:
    return x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)


def _made_varying(x: Any, axes: Collection[str]) -> Any:
    if not axes:
        return x
    if not hasattr(jax.lax, "pcast"):  # before jax 0.9
        return jax.lax.pvary(x, tuple(axes))  # pyright: ignore
    return jax.lax.pcast(x, tuple(axes), to="varying")


def _varying(array: Any) -> frozenset[str]:
    """Returns the axes over which a value varies, by its type under `jax.shard_map`."""
    kind = _type(array)
    if (manual := getattr(kind, "manual_axis_type", None)) is not None:
        return manual.varying
    return getattr(kind, "vma", None) or frozenset()  # before jax 0.10
