"""Sums over the devices of a loop in which each holds a part of the gradients.

In `jax.shard_map`, `jax.pmap` and `jax.vmap(..., axis_name=...)` a sum over a leaf is
one over what this device has of it. With jit and sharded arrays nothing of this file is
needed: there the compiler adds the collectives.

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
    """Returns the names of axes as a tuple, none for None."""
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
    """How many devices there are along the axes.

    Raises:
      ValueError: outside of a function that is mapped over these axes.
    """
    try:
        return math.prod(jax.lax.axis_size(axis) for axis in axes)
    except NameError as error:
        raise ValueError(
            "`axis_name` must name axes that `update` is mapped over, by "
            f"`jax.shard_map` or `jax.vmap(..., axis_name=...)`, got {axes}: {error}. "
            "Under jit alone, where arrays are sharded but not mapped over, leave it "
            "out."
        ) from error


def copies(
    leaves: Sequence[Sequence[ArrayLike]], axes: tuple[str, ...]
) -> Int[np.ndarray, "L"]:
    """How many devices hold the same of each leaf: 1 where all of them differ.

    The types of `jax.shard_map` tell, unless it is called with `check_vma=False`; in
    other loops nothing does, and every device is taken to hold a part of its own.

    Args:
      leaves: for each of L leaves the arrays that are multiplied there.
      axes: along which devices are counted.
    """
    count(axes)
    told = [axis for axis in axes if axis in _varying(jax.lax.axis_index(axis))]

    def of_leaf(arrays):
        varying = set().union(*[_varying(array) for array in arrays])
        return math.prod(
            jax.lax.axis_size(axis) for axis in told if axis not in varying
        )

    return np.array([of_leaf(arrays) for arrays in leaves], int)


def add(values: Sequence[Array], axes: tuple[str, ...]) -> list[Array]:
    """Sums arrays of one shape over devices: one collective."""
    if not axes:
        return list(values)
    return list(jnp.unstack(_psum(jnp.stack(values), axes)))


def everywhere(flag: Bool[Array, ""], axes: tuple[str, ...]) -> Bool[Array, ""]:
    """Whether something is so on every device."""
    if not axes:
        return flag
    count(axes)
    return _psum(jnp.where(flag, 0, 1), axes) == 0


def check_parts(
    grads: Sequence[Any], params: Sequence[Any], axes: tuple[str, ...]
) -> None:
    """Raises ValueError where devices have the same parameters and own gradients."""
    for grad, param in zip(grads, params):
        own = set(axes) & (_varying(grad) - _varying(param))
        if own:
            raise ValueError(
                f"`axis_name` must name axes along which parameters are cut, got {axes}"
                f", but along {sorted(own)} every device has the same parameters and "
                "gradients of its own: average these with `jax.lax.pmean` before "
                "`update`, and leave the axis out."
            )


def of_type(x: Any, like: Any) -> Array:
    """Returns a value in the type of another: dtype, sharding, axes it varies over."""
    return _sharded(as_varying(x.astype(like.dtype), like), like)


def widened(x: Any, like: Any) -> Array:
    """Returns a value as another one is spread over devices, unless it is already."""
    on_mesh = _explicit_sharding(x) is not None
    return as_varying(x if on_mesh else _sharded(x, like), like)


def _sharded(x: Any, like: Any) -> Array:
    """Shards a value as another one is, if that is on an explicit mesh."""
    sharding = _explicit_sharding(like)
    if sharding is None or sharding == _explicit_sharding(x):
        return x
    return jax.sharding.reshard(x, sharding)


def _explicit_sharding(x: Any) -> jax.sharding.NamedSharding | None:
    """The sharding in a value's type, which only explicit meshes have."""
    sharding: Any = _type(x).sharding
    is_explicit = sharding and AxisType.Explicit in sharding.mesh.axis_types
    return sharding if is_explicit else None


def zeros(like: jax.ShapeDtypeStruct) -> Array:
    """Returns zeros of a type, such as `jax.eval_shape` gives, on any mesh."""
    return as_varying(jnp.zeros(like.shape, like.dtype, device=like.sharding), like)


def as_varying(x: Array, like: Any) -> Array:
    """Lets a value differ between devices, for types, where another one does."""
    return _made_varying(x, _varying(like) - _varying(x))


def _psum(values: Array, axes: tuple[str, ...]) -> Array:
    missing = set(axes) & _varying(jax.lax.axis_index(axes)) - _varying(values)
    # In types, what all devices have in common has no sum over them.
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
    """The axes along which a value's type in `jax.shard_map` says that it differs."""
    kind = _type(array)
    if (manual := getattr(kind, "manual_axis_type", None)) is not None:
        return manual.varying
    return getattr(kind, "vma", None) or frozenset()  # before jax 0.10
