"""Two trees of gradients side by side, leaf by leaf, whatever is missing in either."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from dtnh_jax.gradients import GradientPair


def is_missing(leaf: Any) -> bool:
    """Whether a leaf stands for no array: `None`, or masked out by Optax."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def flatten(tree: PyTree) -> tuple[list[Any], Any]:
    """Like `jax.tree.flatten`, with missing leaves kept in the list."""
    return jax.tree.flatten(tree, is_leaf=is_missing)


def names(tree: PyTree) -> list[str]:
    """Returns the path of each leaf, missing ones included, such as `dense/kernel`."""
    paths, _ = jax.tree.flatten_with_path(tree, is_leaf=is_missing)
    return [path_name(path) for path, _ in paths]


def path_name(path: tuple[Any, ...]) -> str:
    """Spells a path with slashes; the same for dicts, linen, NNX and equinox."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_trainable(leaf: Any) -> bool:
    """Whether a leaf has an inner product: floating or complex, and not missing."""
    if is_missing(leaf):
        return False
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def split_pair(updates: PyTree, regularizer_grads: PyTree | None) -> GradientPair:
    """Finds the two gradients in either of the two ways in which they arrive.

    Args:
      updates: the loss gradient, or a `GradientPair`. NNX's optimizer turns a pair
        into a mapping with the pair's field names, which is understood too.
      regularizer_grads: the regularizer's gradient, where `updates` is no pair.

    Raises:
      ValueError: if the regularizer's gradient is missing, or given twice.
    """
    is_pair_of_nnx = (
        regularizer_grads is None
        and isinstance(updates, Mapping)
        and set(updates) == {"loss", "regularizer"}
    )
    if is_pair_of_nnx:
        updates = GradientPair(updates["loss"], updates["regularizer"])
    if isinstance(updates, GradientPair):
        if regularizer_grads is not None:
            raise ValueError(
                "`regularizer_grads` must be left out where `updates` is a "
                "GradientPair, got both."
            )
        return updates
    if regularizer_grads is None:
        raise ValueError(
            "`regularizer_grads` must be given where `updates` is not a GradientPair: "
            "call `update(GradientPair(loss, regularizer), state, params)` or "
            "`update(loss, state, params, regularizer_grads=regularizer)`, got "
            "neither."
        )
    return GradientPair(updates, regularizer_grads)


class Layout(NamedTuple):
    """The leaves that take part in conflicts, and how to put them back.

    A leaf takes part if it is trainable in the loss's gradient or in a regularizer's,
    and neither masked out here nor by Optax. Where one of the gradients lacks it,
    zeros stand in.
    """

    tree: PyTree  # the gradient of the loss
    at: list[int]  # which of its leaves take part
    xs: list[Array]  # these leaves

    def gather(self, tree: PyTree, name: str) -> list[Array]:
        """Returns the leaves of another tree that take part, zeros where missing."""
        leaves = align(tree, self.tree, name, "loss")
        return [_or_zeros(leaves[i], x) for i, x in zip(self.at, self.xs)]

    def pick(self, tree: PyTree) -> list[Any]:
        """Returns the same leaves of a tree of the same structure."""
        leaves, _ = flatten(tree)
        return [leaves[i] for i in self.at]

    def scatter(
        self, values: list[Array], onto: PyTree | None = None, others: Any = None
    ) -> PyTree:
        """Puts values in the places of the leaves that take part.

        Args:
          values: as many as leaves that take part.
          onto: the tree that keeps its other leaves; the loss's gradient by default.
          others: what stands for all other leaves instead, if given.
        """
        leaves, treedef = flatten(self.tree if onto is None else onto)
        if others is not None:
            leaves = [others] * len(leaves)
        for i, value in zip(self.at, values):
            leaves[i] = value
        return jax.tree.unflatten(treedef, leaves)


def layout(
    loss: PyTree, regularizers: list[PyTree], mask: Any, params: PyTree
) -> Layout:
    """Finds out which leaves take part in conflicts.

    Args:
      loss: gradient of the loss, or parameters.
      regularizers: gradients of the regularizers.
      mask: a prefix tree of bools, a function of `params` to one, or None.
      params: what a mask is a function of.

    Raises:
      ValueError: if the trees do not match.
    """
    columns = [flatten(loss)[0]]
    for tree in regularizers:
        columns.append(align(tree, loss, "regularizer_grads", "loss"))
    chosen = [True] * len(columns[0])
    if mask is not None:
        mask = mask(params) if callable(mask) else mask
        chosen = prefix_leaves(mask, loss, "mask")
    at, xs = [], []
    for i, (g, *rs) in enumerate(zip(*columns)):
        stands = [leaf for leaf in (g, *rs) if is_trainable(leaf)]
        if chosen[i] and stands and (g is None or is_trainable(g)):
            at.append(i)
            xs.append(_or_zeros(g, stands[0]))
    return Layout(loss, at, xs)


def _or_zeros(leaf: Any, like: Array | np.ndarray) -> Array:
    return jnp.asarray(leaf) if is_trainable(leaf) else jnp.zeros_like(like)


def align(tree: PyTree, like: PyTree, name: str, like_name: str) -> list[Any]:
    """Returns the leaves of `tree` in the order of those of `like`.

    A missing leaf of `tree` may stand for a whole subtree of `like`.

    Raises:
      ValueError: if the trees differ, with the path of the first leaf that does.
    """
    leaves, treedef = flatten(tree)
    like_leaves, like_treedef = flatten(like)
    if treedef != like_treedef:
        leaves = _align_by_path(tree, like, name, like_name)
    for i, (leaf, other) in enumerate(zip(leaves, like_leaves)):
        if is_missing(leaf) or is_missing(other):
            continue
        if jnp.shape(leaf) != jnp.shape(other):
            raise ValueError(
                f"`{name}` must have the shapes of `{like_name}`, got "
                f"{jnp.shape(leaf)} for {jnp.shape(other)} at '{names(like)[i]}'."
            )
    return leaves


def _align_by_path(tree, like, name, like_name) -> list[Any]:
    """The leaves of `tree` at the paths of `like`: slower, and says what differs."""
    found = dict(zip(names(tree), flatten(tree)[0]))
    unused = {path for path, leaf in found.items() if not is_missing(leaf)}
    leaves = []
    for path, other in zip(names(like), flatten(like)[0]):
        parts = path.split("/")
        above = ["/".join(parts[:n]) for n in range(len(parts) + 1)]
        missing = [at for at in above if at in found and is_missing(found[at])]
        if path in found:
            leaves.append(found[path])
            unused.discard(path)
        elif missing:  # a missing leaf that stands for a whole branch of `like`
            leaves.append(found[missing[0]])
        elif is_missing(other):  # the other way round
            leaves.append(None)
            unused = {at for at in unused if not at.startswith(f"{path}/")}
        else:
            raise ValueError(
                f"`{name}` must be a tree like `{like_name}`, got none at '{path}'."
            )
    extra = [path for path in found if path in unused]
    if extra:
        raise ValueError(
            f"`{name}` must be a tree like `{like_name}`, got a leaf at '{extra[0]}' "
            f"that `{like_name}` does not have."
        )
    return leaves


def prefix_leaves(prefix: PyTree, like: PyTree, name: str) -> list[Any]:
    """Spreads a prefix tree, such as a mask or labels, over the leaves of `like`.

    Raises:
      ValueError: if `prefix` is not a prefix of `like`.
    """
    if not flatten(like)[0]:  # also what Optax's `tree.map_params` gives to `init`
        return []
    leaves: list[Any] = []

    def spread(value, subtree):
        leaves.extend([value] * len(flatten(subtree)[0]))

    try:
        jax.tree.map(spread, prefix, like, is_leaf=is_missing)
    except ValueError as error:
        raise ValueError(
            f"`{name}` must be a prefix of the tree of the parameters: {error}"
        ) from error
    return leaves


def single(x: Array | np.ndarray) -> Any:
    """The dtype for sums: at least float32; complex or double precision is kept."""
    return jnp.promote_types(x.dtype, jnp.float32)


def as_float32(x: Array | np.ndarray) -> Array:
    """Casts to at least single precision, see `single`."""
    return jnp.asarray(x).astype(single(x))
