"""Hashes of trees that do not depend on the types of containers and arrays."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from dtnh_jax import _trees

DIGEST_BYTES = 16


def fingerprint(tree: PyTree) -> str:
    """Hashes a tree: paths, dtypes, shapes and bytes of its leaves.

    Only the paths of containers count, so a `FrozenDict` hashes like a dict.

    Args:
      tree: a tree of arrays and numbers, such as a network's variables.

    Returns:
      A SHA-256 in hexadecimal digits.

    Raises:
      TypeError: a leaf is neither an array nor a number; the error names its path.

    Example:
      >>> fingerprint({"w": np.ones(2)}) == fingerprint({"w": jnp.ones(2, float)})
      False
      >>> fingerprint({"w": np.float32([1, 1])}) == fingerprint({"w": jnp.ones(2)})
      True
    """
    return _hashed(tree, hashlib.sha256()).hexdigest()


def digest(tree: PyTree) -> bytes:
    """Returns a short hash of a tree, `DIGEST_BYTES` long; see `fingerprint`."""
    return _hashed(tree, hashlib.blake2b(digest_size=DIGEST_BYTES)).digest()


def _hashed(tree: PyTree, into: Any) -> Any:
    """Feeds a tree to a hash: paths, dtypes, shapes and bytes of its leaves."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(
            leaf.dtype, jax.dtypes.prng_key
        ):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        name = _trees.path_name(path)
        if array.dtype.hasobject:
            raise TypeError(
                f"A leaf must be an array or a number, got {type(leaf).__name__} at "
                f"{name!r}."
            )
        # As JSON, so that different sequences of leaves give different bytes.
        head = [name, array.dtype.name, array.dtype.byteorder, array.shape]
        into.update(json.dumps(head).encode() + b"\n")
        into.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return into
