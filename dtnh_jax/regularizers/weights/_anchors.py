"""Copies of pretrained parameters for regularizers of the weights."""

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array

from dtnh_jax import _trees

# Prefixes of paths such as `head`, or a function from a path to a bool.
New = Sequence[str] | Callable[[str], bool]

# The memories that JAX can name inside compiled functions.
_SPACES = {
    "device": jax.memory.Space.Device,
    "pinned_host": jax.memory.Space.Host,
}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Keeping:
    """Options of the copies, which are constants of a compiled program."""

    new: tuple[str, ...] | Callable[[str], bool] | None
    dtype: Any
    memory_kind: str | None

    @classmethod
    def checked(cls, new: New | None, dtype: Any, memory_kind: str | None) -> "Keeping":
        """Checks the options; raises what `l2_sp` documents."""
        if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"`dtype` must be a floating type such as jnp.bfloat16, got {dtype!r}."
            )
        dtype = None if dtype is None else jnp.dtype(dtype)
        return cls(_checked_new(new), dtype, memory_kind)


def anchor(keeping: Keeping, params: optax.Params) -> optax.Params:
    """Copies the floating leaves that are not new, for an optimizer's state.

    Raises:
      ValueError: leaves are shapes without values; also as in `copies`.
    """
    for path, leaf in zip(_trees.names(params), _trees.flatten(params)[0]):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                "`params` must have values for a self-anchored regularizer to copy, "
                f"got only the shape {leaf.shape} at '{path}': call `tx.init` with "
                "arrays, or `jax.eval_shape(tx.init, params)` for shapes."
            )
    is_fixed = [not _trees.is_trainable(leaf) for leaf in _trees.flatten(params)[0]]
    is_new = new_leaves(params, keeping.new, "params")
    left_out = [a or b for a, b in zip(is_fixed, is_new)]
    return copies(params, left_out, keeping)


def copies(tree: optax.Params, left_out: list[bool], keeping: Keeping) -> optax.Params:
    """Returns a tree of copies, with `optax.MaskedNode()` for leaves left out."""
    leaves, treedef = _trees.flatten(tree)
    kept = [
        optax.MaskedNode() if skip else _copy(leaf, keeping.dtype, keeping.memory_kind)
        for leaf, skip in zip(leaves, left_out)
    ]
    return jax.tree.unflatten(treedef, kept)


def new_leaves(
    tree: optax.Params, new: New | None, name: str = "source_params"
) -> list[bool]:
    """Returns for each leaf whether it is new: missing in the tree, or among `new`.

    Raises:
      ValueError: `new`, or one of its prefixes, selects no leaf.
    """
    missing = [_trees.is_missing(leaf) for leaf in _trees.flatten(tree)[0]]
    at = _trees.names(tree)
    if new is None or not at:  # no leaf: the placeholder of `optax.tree.map_params`
        return missing
    if callable(new):
        picked = [bool(new(path)) for path in at]
        if not any(picked):
            raise ValueError(
                f"`new` must select a leaf, got none among {', '.join(at[:8])} ..."
            )
    else:
        prefixes = [prefix.rstrip("/") for prefix in new]
        for prefix in prefixes:
            if not any(_is_under(path, prefix) for path in at):
                raise ValueError(
                    f"`new` must hold prefixes of the paths of `{name}`, got "
                    f"{prefix!r}, where there is nothing. {_near(prefix, at)}"
                )
        picked = [any(_is_under(path, prefix) for prefix in prefixes) for path in at]
    return [a or b for a, b in zip(missing, picked)]


def _checked_new(new: New | None) -> tuple[str, ...] | Callable[[str], bool] | None:
    """Raises TypeError for a string, which would count as a sequence of letters."""
    if new is None or callable(new):
        return new
    if isinstance(new, str):
        raise TypeError(
            "`new` must be a sequence of prefixes of paths, or a function of a path, "
            f"got the string {new!r}: write new=[{new!r}]."
        )
    for prefix in new:
        if not isinstance(prefix, str):
            raise TypeError(
                f"`new` must hold prefixes of paths such as 'head', got {prefix!r}."
            )
    return tuple(new)


def _is_under(path: str, prefix: str) -> bool:
    """Returns whether a path is `prefix` or below it; `header` is not below `head`."""
    return path == prefix or path.startswith(f"{prefix}/")


def _near(prefix: str, at: list[str]) -> str:
    parts = [path.split("/") for path in at]
    known = {"/".join(p[:n]): None for p in parts for n in range(1, len(p) + 1)}
    near = difflib.get_close_matches(prefix, known, n=5, cutoff=0.4)
    listed = ", ".join(repr(path) for path in near or at[:8])
    return f"{'Near it' if near else 'There'} are {listed}."


def _copy(leaf: Any, dtype: Any, memory_kind: str | None) -> Array:
    """Copies an array to a memory, with the array's sharding.

    Raises:
      ValueError: the device has no memory of that kind, or the array is traced and JAX
        has no name for the memory.
    """
    if isinstance(leaf, Tracer):
        # A copy, so that the output of a compiled function is not its input again.
        kept = jnp.array(to_device(leaf), copy=True)
        kept = kept if dtype is None else _at_most(kept, dtype)
        if memory_kind is None:
            return kept
        if memory_kind not in _SPACES:
            raise ValueError(
                f"`memory_kind` must be one of {sorted(_SPACES)} inside a compiled "
                f"function, got {memory_kind!r}."
            )
        return jax.device_put(kept, _SPACES[memory_kind])
    kept = jnp.array(leaf)
    if dtype is not None:
        kept = _at_most(kept, dtype)
    if memory_kind is None:
        return kept
    device = min(kept.sharding.addressable_devices, key=lambda device: device.id)
    kinds = [memory.kind for memory in device.addressable_memories()]
    if memory_kind not in kinds:
        raise ValueError(
            f"`memory_kind` must be one that the device has, {kinds}, got "
            f"{memory_kind!r}."
        )
    return jax.device_put(kept, kept.sharding.with_memory_kind(memory_kind))


def _at_most(x: Array, dtype: Any) -> Array:
    """Casts floating arrays of a larger dtype; leaves complex and integer ones."""
    is_larger = x.dtype.itemsize > jnp.dtype(dtype).itemsize
    is_real = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(dtype) if is_real and is_larger else x


def to_device(x: Array | np.ndarray) -> Array:
    """Copies an array from host to device memory, with its sharding."""
    if not isinstance(x, jax.Array):  # an anchor from a checkpoint, in NumPy's memory
        return jnp.asarray(x)
    if isinstance(x, Tracer):
        is_elsewhere = jax.typeof(x).memory_space == jax.memory.Space.Host
    else:
        is_elsewhere = x.sharding.memory_kind not in (None, _default_kind(x))
    return jax.device_put(x, jax.memory.Space.Device) if is_elsewhere else x


def _default_kind(x: Array) -> str:
    return next(iter(x.sharding.addressable_devices)).default_memory().kind
