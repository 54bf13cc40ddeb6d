"""Copies of pretrained parameters: which leaves have one, and where it is kept."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array

from dtnh_jax import _trees

# Prefixes of paths such as `head`, or a function that tells from a path.
New = Sequence[str] | Callable[[str], bool]


def new_leaves(source_params: optax.Params, new: New | None) -> list[bool]:
    """Tells of each leaf whether it is new: missing in the source, or picked by `new`.

    Raises:
      TypeError: if `new` is a string, or holds anything else than strings.
      ValueError: if `new`, or one of its prefixes, picks out no leaf.
    """
    paths = _trees.names(source_params)
    missing = [_trees.is_missing(leaf) for leaf in _trees.flatten(source_params)[0]]
    if new is None:
        return missing
    if callable(new):
        picked = [bool(new(path)) for path in paths]
        if not any(picked):
            raise ValueError(
                f"`new` must pick out a leaf, got none among {', '.join(paths[:8])} ..."
            )
    else:
        prefixes = _checked_prefixes(new, paths)
        picked = [any(_is_under(path, at) for at in prefixes) for path in paths]
    return [a or b for a, b in zip(missing, picked)]


def _checked_prefixes(new: Sequence[str], paths: list[str]) -> list[str]:
    if isinstance(new, str):  # which would be taken for its letters
        raise TypeError(
            "`new` must be a sequence of prefixes of paths, or a function of a path, "
            f"got the string {new!r}: write new=[{new!r}]."
        )
    for prefix in new:
        if not isinstance(prefix, str):
            raise TypeError(
                f"`new` must hold prefixes of paths such as 'head', got {prefix!r}."
            )
    prefixes = [prefix.rstrip("/") for prefix in new]
    for prefix in prefixes:
        if not any(_is_under(path, prefix) for path in paths):
            raise ValueError(
                f"`new` must hold prefixes of the paths of `source_params`, got "
                f"{prefix!r}, where there is nothing. {_near(prefix, paths)}"
            )
    return prefixes


def _is_under(path: str, prefix: str) -> bool:
    """Whether a path is at a prefix or below it; `header` is not below `head`."""
    return path == prefix or path.startswith(f"{prefix}/")


def _near(prefix: str, paths: list[str]) -> str:
    parts = [path.split("/") for path in paths]
    known = {"/".join(p[:n]): None for p in parts for n in range(1, len(p) + 1)}
    near = difflib.get_close_matches(prefix, known, n=5, cutoff=0.4)
    listed = ", ".join(repr(path) for path in near or paths[:8])
    return f"{'Near it' if near else 'There'} are {listed}."


def check_dtype(dtype: Any) -> None:
    """Raises ValueError for what is no floating type to keep anchors in."""
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"`dtype` must be a floating type such as jnp.bfloat16, got {dtype!r}."
        )


def keep(leaf: Any, dtype: Any, memory_kind: str | None) -> Array:
    """Copies an array, with the sharding that it has, to where it is to be kept.

    Raises:
      ValueError: if its device has no memory of that kind, or if it is traced and so
        has no place of its own.
    """
    if isinstance(leaf, Tracer):
        if memory_kind is not None:
            raise ValueError(
                "`memory_kind` must be None inside of a compiled function, where "
                f"arrays have no place of their own, got {memory_kind!r}: put the "
                "arrays there before, or make the regularizer outside and give it to "
                "the function as an argument."
            )
        return leaf if dtype is None else _at_most(to_device(leaf), dtype)
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
    """Casts what is floating and larger; complex numbers and integers stay."""
    is_larger = x.dtype.itemsize > jnp.dtype(dtype).itemsize
    is_real = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(dtype) if is_real and is_larger else x


def to_device(x: Array) -> Array:
    """Copies an array from host memory to the device's, in its sharding."""
    is_traced = isinstance(x, Tracer)
    if is_traced:
        is_elsewhere = jax.typeof(x).memory_space == jax.memory.Space.Host
    else:
        is_elsewhere = x.sharding.memory_kind not in (None, _default_kind(x))
    return jax.device_put(x, jax.memory.Space.Device) if is_elsewhere else x


def _default_kind(x: Array) -> str:
    return next(iter(x.sharding.addressable_devices)).default_memory().kind
