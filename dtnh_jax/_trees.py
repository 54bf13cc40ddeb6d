"""Pairs the leaves of two trees, with zeros for missing leaves."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, PyTree

from dtnh_jax._gradients import GradientPair

Mask = PyTree[bool] | Callable[[PyTree], PyTree[bool]]
_VALUE = jax.tree_util.GetAttrKey("value")


def is_missing(leaf: Any) -> bool:
    """Returns whether a leaf is `None` or masked out by Optax."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def is_trainable(leaf: Any) -> bool:
    """Returns whether a leaf has an inner product: floating or complex, not missing."""
    if is_missing(leaf):
        return False
    dtype = jax.dtypes.result_type(leaf)
    # 8-bit numbers are scales of quantized layers, not gradients of parameters.
    return jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize > 1


def flatten(tree: PyTree) -> tuple[list[Any], Any]:
    """Flattens like `jax.tree.flatten`, but keeps missing leaves in the list."""
    return jax.tree.flatten(tree, is_leaf=is_missing)


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a path joined by slashes; the same for dicts, linen, NNX and Equinox."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def names(tree: PyTree) -> list[str]:
    """Returns the path of each leaf, missing ones included, such as `dense/kernel`.

    Variables of NNX and boxes of linen have the path without `value`.
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_missing)
    is_box = [bool(path) and path[-1] == _VALUE for path, _ in paths]
    return [
        path_name(path[:-1] if boxed else path)
        for boxed, (path, _) in zip(is_box, paths)
    ]


def sum_dtype(x: Any) -> Any:
    """Returns the dtype for sums: at least float32, and complex or double like `x`."""
    dtype = jax.dtypes.result_type(x)
    is_single = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 4
    return dtype if is_single else jnp.dtype(jnp.float32)


def as_float32(x: Any) -> Array:
    """Casts to at least single precision, see `sum_dtype`."""
    return jnp.asarray(x).astype(sum_dtype(x))


def split_pair(updates: PyTree, regularizer_grads: PyTree | None) -> GradientPair:
    """Returns both gradients, from a pair or from the two arguments.

    Args:
      updates: the loss gradient, or a `GradientPair`. A mapping with the field names of
        a pair, which NNX's optimizer makes of it, is accepted too.
      regularizer_grads: the regularizer's gradient, if `updates` is not a pair.

    Raises:
      ValueError: the regularizer's gradient is missing, or given twice.
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
                "`regularizer_grads` must be left out if `updates` is a GradientPair, "
                "got both."
            )
        return updates
    if regularizer_grads is None:
        raise ValueError(
            "`regularizer_grads` must be given if `updates` is not a GradientPair: "
            "call `update(GradientPair(loss, regularizer), state, params)` or "
            "`update(loss, state, params, regularizer_grads=regularizer)`, got "
            "neither."
        )
    return GradientPair(updates, regularizer_grads)


def split_updates(
    options: Any,
    updates: optax.Updates,
    regularizer_grads: Any,
    params: optax.Params | None,
    anchor: PyTree,
) -> tuple[optax.Updates, dict[str, Callable[[], optax.Updates]]]:
    """Splits the arguments of `update` into the loss and the regularizers' gradients.

    Args:
      options: arguments of the transformation.
      updates: a pair, or the loss gradient.
      regularizer_grads: the regularizers' gradients, if `updates` is not a pair.
      params: the parameters, for the gradients of regularizers of the weights.
      anchor: the parameters that self-anchored regularizers keep.

    Returns:
      The loss gradient, and by name functions that return the regularizers' gradients.
      For regularizers of the weights, each call computes the gradient again.
    """
    if options.regularizers is None:
        loss, grads = split_pair(updates, regularizer_grads)
        grads = options.by_name(grads, "regularizer_grads")
        return loss, {name: lambda r=r: r for name, r in grads.items()}
    if params is None:
        raise ValueError(
            "`params` must be given to `update`, because they determine the "
            "regularizer's gradient, got None."
        )
    gradients = {}
    for name, regularizer in options.regularizers.items():
        kept = []
        if regularizer.anchor is not None:
            kept = [options.by_name(anchor, "state.anchor")[name]]
        gradients[name] = recomputed(regularizer.gradient, params, *kept)
    return updates, gradients


class AlignedLeaves(NamedTuple):
    """The leaves of the loss gradient that take part in inner products.

    A leaf takes part if it is trainable in the loss gradient or in a regularizer's, and
    neither this library's mask nor Optax's leaves it out. Zeros replace a leaf that one
    of the gradients lacks.
    """

    tree: PyTree  # the loss gradient
    places: list[int]  # indices of its leaves that take part
    like: list[Any]  # for each of these an array of its shape and dtype

    def pick(self, tree: PyTree, name: str) -> list[Array]:
        """Returns a tree's leaves that take part, in float32; zeros if missing."""
        leaves = align(tree, self.tree, name, "loss")
        return [
            as_float32(leaves[i])
            if is_trainable(leaves[i])
            else jnp.zeros(jnp.shape(x), sum_dtype(x))
            for i, x in zip(self.places, self.like)
        ]

    def restore(self, values: Sequence[Array]) -> PyTree:
        """Returns the loss gradient with new values, in the dtypes of the old ones."""
        leaves, treedef = flatten(self.tree)
        for i, value, x in zip(self.places, values, self.like):
            leaves[i] = value.astype(jax.dtypes.result_type(x))
        return jax.tree.unflatten(treedef, leaves)

    def getter(self, gradient: Callable[[], PyTree], name: str) -> Callable[[], Any]:
        """Returns a function that calls `gradient` and picks from its result."""
        return lambda: self.pick(gradient(), name)

    def onto(self, tree: PyTree, values: Sequence[Array]) -> PyTree:
        """Returns `tree`, which is like the loss gradient, with new values."""
        leaves, treedef = flatten(tree)
        places = self.places
        if treedef != flatten(self.tree)[1]:
            there, here = names(tree), names(self.tree)
            places = [there.index(here[i]) for i in places]
        for i, value in zip(places, values):
            leaves[i] = value
        return jax.tree.unflatten(treedef, leaves)

    def subtracted(self, tree: PyTree, values: Sequence[Array]) -> PyTree:
        """Subtracts values from the leaves of a tree like the loss gradient."""
        leaves = align(tree, self.tree, "updates", "loss")
        there = [leaves[i] for i in self.places]
        less = [
            (as_float32(x) - value).astype(x.dtype) if is_trainable(x) else x
            for x, value in zip(there, values)
        ]
        return self.onto(tree, less)

    def zeros(self) -> PyTree:
        """Returns zeros in at least float32; `optax.MaskedNode` for other leaves."""
        treedef = flatten(self.tree)[1]
        leaves: list[Any] = [optax.MaskedNode()] * treedef.num_leaves
        for i, x in zip(self.places, self.like):
            leaves[i] = jnp.zeros_like(x, sum_dtype(x))
        return jax.tree.unflatten(treedef, leaves)


def aligned(
    loss: PyTree, regularizers: Sequence[PyTree], mask: Mask | None, params: PyTree
) -> AlignedLeaves:
    """Returns the leaves that take part in inner products.

    Args:
      loss: gradient of the loss, or parameters; shapes and dtypes suffice.
      regularizers: gradients of the regularizers.
      mask: a prefix tree of bools, a function from `params` to one, or None.
      params: the parameters, for a mask that is a function of them.

    Raises:
      ValueError: the trees do not match.
    """
    columns = [flatten(loss)[0]]
    for tree in regularizers:
        columns.append(align(tree, loss, "regularizer_grads", "loss"))
    chosen = [True] * len(columns[0])
    if mask is not None:
        mask = mask(params) if callable(mask) else mask
        chosen = prefix_leaves(mask, loss, "mask")
    places, like = [], []
    for i, (g, *rs) in enumerate(zip(*columns)):
        trainable = [leaf for leaf in (g, *rs) if is_trainable(leaf)]
        if chosen[i] and trainable and (g is None or is_trainable(g)):
            places.append(i)
            like.append(trainable[0])
    return AlignedLeaves(loss, places, like)


def align(tree: PyTree, like: PyTree, name: str, like_name: str) -> list[Any]:
    """Returns the leaves of `tree` in the order of those of `like`.

    A missing leaf of `tree` may replace a whole subtree of `like`.

    Raises:
      ValueError: the trees differ; the error names the path of the first such leaf.
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
    """Returns the leaves of `tree` at the paths of `like`; errors name the path."""
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
        elif missing:  # a missing leaf of `tree` replaces a subtree of `like`
            leaves.append(found[missing[0]])
        elif is_missing(other):  # a missing leaf of `like` replaces a subtree
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
    """Broadcasts a prefix tree, such as a mask or labels, to the leaves of `like`.

    Raises:
      ValueError: `prefix` is not a prefix of `like`.
    """
    if not flatten(like)[0]:  # such as the placeholder of `optax.tree.map_params`
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


def prevent_cse(tree: PyTree) -> PyTree:
    """Returns the same values, hidden from XLA's common subexpression elimination.

    On a CPU, XLA writes a subexpression that two sums share to memory. Elsewhere it can
    fuse both sums into one kernel that reads each array once, which a barrier would
    prevent; so only the CPU gets one.
    """
    is_traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))
    if not is_traced or jax.default_backend() != "cpu":
        return tree
    # Leaf by leaf, because under `jax.shard_map` leaves may vary over different axes.
    hide = jax.lax.optimization_barrier
    return jax.tree.map(lambda x: hide(x) if is_trainable(x) else x, tree)


def computed_once(x: Array) -> Array:
    """Returns the same numbers, in a form that XLA computes once for all leaves.

    On a CPU, XLA repeats cheap operations, sums over all leaves included, in the loop
    of every leaf, which makes compilation slow. It does not repeat a division.
    """
    return x / prevent_cse(jnp.ones_like(x))


def recomputed(
    function: Callable[..., PyTree], tree: PyTree, *args: PyTree
) -> Callable[[], PyTree]:
    """Returns a function that computes `function(tree, *args)` again at every call.

    The function is traced once. Outside of jit it is also computed only once.
    """
    if not any(isinstance(x, Tracer) for x in jax.tree.leaves((tree, args))):
        value = function(tree, *args)
        return lambda: value
    compiled, known = jax.jit(function), tree

    def compute():
        nonlocal known
        value = compiled(known, *args)
        known = prevent_cse(known)
        return value

    return compute
