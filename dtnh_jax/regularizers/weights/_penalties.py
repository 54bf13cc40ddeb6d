"""Penalties of the weights: pulls to zero, or back to the pretrained weights."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.tree_util import Partial
from jaxtyping import Array, Float

from dtnh_jax import _trees
from dtnh_jax.regularizers.weights import _anchors, _pull
from dtnh_jax.regularizers.weights._anchors import New
from dtnh_jax.regularizers.weights._interface import WeightRegularizer


def l2() -> WeightRegularizer:
    """Pulls the parameters to zero: `1/2 ||params||^2`, summed over all entries.

    Returns:
      A `WeightRegularizer`; its gradient is `params`.

    Example:
      >>> print(l2().value({"w": jnp.array([3.0, 4.0])}))
      12.5
    """
    return WeightRegularizer(Partial(_l2_value), Partial(_l2_gradient))


def _l2_value(params: optax.Params) -> Float[Array, ""]:
    total = jnp.zeros([], jnp.float32)
    for leaf in jax.tree.leaves(params):
        if _trees.is_trainable(leaf):
            part = _pull.half_square(_trees.as_float32(leaf))
            total += part.astype(jnp.float32)
    return total


def _l2_gradient(params: optax.Params) -> optax.Updates:
    return jax.tree.map(jnp.asarray, params)


def l2_sp(
    source_params: optax.Params | None = None,
    *,
    new: New | None = None,
    new_strength: float = 1.0,
    dtype: Any = None,
    memory_kind: str | None = None,
) -> WeightRegularizer:
    """Pulls the parameters back to the pretrained ones: `1/2 ||params - source||^2`.

    The penalty is summed over all entries. New parameters, such as a new head, have no
    pretrained value; as in the paper, they get `new_strength / 2 ||params||^2`.
    A leaf is new if `new` selects its path, or if it is `None` in `source_params`.

    Without `source_params` the regularizer is self-anchored: the source is a copy of
    the parameters that `tx.init` gets, and the optimizer's state keeps it. This suits
    trainers that build their optimizer before any parameters exist.

    If a compiled function closes over a regularizer with a source, the source becomes a
    constant of its program. That is slow to compile for large networks, and the
    constant stays on the device, whatever `memory_kind` says. Instead pass the
    regularizer to the function as an argument, as in the second example.

    Args:
      source_params: pretrained parameters, a tree like the parameters in training.
        They are copied with their sharding, so the originals may be donated or changed.
        None uses the parameters that `tx.init` gets.
      new: prefixes of the paths of new leaves, by whole components: `["head"]` selects
        `head` and `head/kernel`, not `header/kernel`. Or a function that maps a path
        such as `"head/kernel"` to whether the leaf is new.
      new_strength: strength of the penalty on new leaves, relative to the strength of
        the whole.
      dtype: dtype of the copy, if it is smaller than the leaf's own. `jnp.bfloat16`
        takes half the memory of float32 and moves the target of each weight by up to
        `2**-8` of its size.
      memory_kind: the memory for the copy, such as `"pinned_host"`: then it takes no
        device memory between steps, and every use copies it to the device once. Inside
        compiled functions JAX knows only `"device"` and `"pinned_host"`.

    Returns:
      A `WeightRegularizer`; its gradient, `params - source_params`, needs no autodiff.

    Raises:
      TypeError: `new` is a string.
      ValueError: `new_strength` is negative, `new` or one of its prefixes selects no
        leaf, `dtype` is not floating, or the device has no such memory; on use, the
        parameters are no tree like `source_params`, or the regularizer is self-anchored
        and `value` or `gradient` gets no anchor.

    Example:
      >>> source = {"body": jnp.array([1.0, 2.0]), "head": jnp.zeros(1)}
      >>> pull = l2_sp(source, new=["head"], new_strength=0.1)
      >>> params = {"body": jnp.array([2.0, 2.0]), "head": jnp.ones(1)}
      >>> print(pull.gradient(params))
      {'body': Array([1., 0.], dtype=float32), 'head': Array([0.1], dtype=float32)}

      As an argument of a compiled step:

      >>> from dtnh_jax import add_regularizer
      >>> @jax.jit
      ... def step(params, grads, pull):
      ...     tx = optax.chain(add_regularizer(pull, 0.5), optax.sgd(1.0))
      ...     updates, _ = tx.update(grads, tx.init(params), params)
      ...     return optax.apply_updates(params, updates)
      >>> grads = {"body": jnp.array([1.0, 0.0]), "head": jnp.zeros(1)}
      >>> print(step(params, grads, pull)["body"])
      [0.5 2. ]

      Self-anchored, in an optimizer that is built from configuration:

      >>> tx = optax.chain(add_regularizer(l2_sp(), 0.1), optax.adam(1e-3))
      >>> state = tx.init(source)  # keeps a copy of the source

    References:
      Li et al., 2018, equations 3 and 4, https://arxiv.org/abs/1802.01483
    """
    keeping = _anchors.Keeping.checked(new, dtype, memory_kind)
    return _pull_back("l2", source_params, None, new_strength, keeping)


def l1_sp(
    source_params: optax.Params | None = None,
    *,
    new: New | None = None,
    new_strength: float = 1.0,
    dtype: Any = None,
    memory_kind: str | None = None,
) -> WeightRegularizer:
    """Keeps most parameters at their pretrained values: `||params - source||_1`.

    The penalty is the sum of the absolute displacements of all entries. New leaves get
    `new_strength / 2 ||params||^2`, as in `l2_sp`: a square, as in the paper.

    The pull does not depend on the distance. A step of plain descent that is longer
    than the remaining distance overshoots the source, by less than the step.

    Args:
      source_params: as in `l2_sp`.
      new: as in `l2_sp`.
      new_strength: as in `l2_sp`.
      dtype: as in `l2_sp`. The pull does not fade near its target, which
        `jnp.bfloat16` rounds.
      memory_kind: as in `l2_sp`.

    Returns:
      A `WeightRegularizer`; its gradient is `sign(params - source_params)`, 0 where
      they are equal. For complex parameters, that is the displacement divided by its
      modulus.

    Raises:
      TypeError: as in `l2_sp`.
      ValueError: as in `l2_sp`.

    Example:
      >>> source = {"body": jnp.array([1.0, 2.0]), "head": jnp.zeros(1)}
      >>> pull = l1_sp(source, new=["head"])
      >>> params = {"body": jnp.array([4.0, 2.0]), "head": jnp.array([2.0])}
      >>> print(pull.value(params))  # |4 - 1| + 1/2 * 2^2
      5.0
      >>> print(pull.gradient(params)["body"])
      [1. 0.]

    References:
      Li et al., 2018, section 3, "L1-SP", https://arxiv.org/abs/1802.01483

    Differs from the authors' code, which excludes biases and the parameters of
    normalization.
    """
    keeping = _anchors.Keeping.checked(new, dtype, memory_kind)
    return _pull_back("l1", source_params, None, new_strength, keeping)


def l2_sp_fisher(
    source_params: optax.Params | None = None,
    fisher: optax.Params | None = None,
    *,
    new: New | None = None,
    new_strength: float = 1.0,
    dtype: Any = None,
    memory_kind: str | None = None,
) -> WeightRegularizer:
    """Pulls parameters back in proportion to their Fisher information.

    The penalty is `1/2 sum_j F_j (params_j - source_j)^2`, where `F` is the diagonal of
    the Fisher information of the pretrained network, see `diagonal_fisher`. New leaves
    get `new_strength / 2 ||params||^2`, as in `l2_sp`.

    `F` has the size of one example's squared gradient, often far below 1. So strength
    and `new_strength` differ from those of `l2_sp`.

    Args:
      source_params: as in `l2_sp`.
      fisher: a tree like the parameters, of numbers at least 0. Required; without
        `source_params`, pass it by name. New leaves are ignored and may be `None`.
      new: as in `l2_sp`.
      new_strength: as in `l2_sp`.
      dtype: as in `l2_sp`, for both trees. Float16 would lose entries of `F` below
        `6e-8`; `jnp.bfloat16` has the range of float32.
      memory_kind: as in `l2_sp`, for both trees.

    Returns:
      A `WeightRegularizer`; its gradient is `F * (params - source_params)`.

    Raises:
      TypeError: as in `l2_sp`.
      ValueError: as in `l2_sp`; `fisher` is not given, is no tree like the parameters,
        lacks a leaf that is not new, or has entries that are complex, negative or not
        finite.

    Example:
      >>> source, fisher = {"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([4.0, 0.0])}
      >>> pull = l2_sp_fisher(source, fisher)
      >>> print(pull.gradient({"w": jnp.array([2.0, 3.0])})["w"])
      [4. 0.]

    References:
      Li et al., 2018, section 3, "L2-SP-Fisher", https://arxiv.org/abs/1802.01483;
      Kirkpatrick et al., 2017, equation 3, https://arxiv.org/abs/1612.00796

    Differs from the authors' code, which excludes biases and the parameters of
    normalization, and can add a constant to `F` or clip it: do that to the tree.
    """
    if fisher is None:
        raise ValueError(
            "`fisher` must be a tree like the parameters, got None: `diagonal_fisher` "
            "estimates one."
        )
    keeping = _anchors.Keeping.checked(new, dtype, memory_kind)
    return _pull_back("l2", source_params, fisher, new_strength, keeping)


def _pull_back(
    norm: Literal["l1", "l2"],
    source_params: optax.Params | None,
    fisher: optax.Params | None,
    new_strength: float,
    keeping: _anchors.Keeping,
) -> WeightRegularizer:
    """Returns the regularizer, self-anchored if there is no source."""
    if not new_strength >= 0:
        raise ValueError(f"`new_strength` must be at least 0, got {new_strength}.")
    pull = _pull.Pull(norm, float(new_strength))
    if source_params is None:
        if fisher is not None:
            is_new = _anchors.new_leaves(fisher, keeping.new, "fisher")
            _check_fisher(fisher, is_new)
            fisher = _anchors.copies(fisher, is_new, keeping)
        return WeightRegularizer(
            Partial(_pull.anchored_value, pull, fisher),
            Partial(_pull.anchored_gradient, pull, fisher),
            Partial(_anchors.anchor, keeping),
        )
    is_new = _anchors.new_leaves(source_params, keeping.new)
    if fisher is not None:
        leaves = _trees.align(fisher, source_params, "fisher", "source_params")
        treedef = _trees.flatten(source_params)[1]
        aligned = jax.tree.unflatten(treedef, leaves)
        _check_fisher(aligned, is_new)
        fisher = _anchors.copies(aligned, is_new, keeping)
    source = _anchors.copies(source_params, is_new, keeping)
    # As arguments of `Partial`, the copies are leaves of the regularizer.
    return WeightRegularizer(
        Partial(_pull.value, pull, fisher, source),
        Partial(_pull.gradient, pull, fisher, source),
    )


def _check_fisher(fisher: optax.Params, is_new: list[bool]) -> None:
    """Checks `fisher` unless it is traced; raises what `l2_sp_fisher` documents."""
    paths, (leaves, _) = _trees.names(fisher), _trees.flatten(fisher)
    for path, leaf, skip in zip(paths, leaves, is_new):
        if skip:
            continue
        if _trees.is_missing(leaf):
            raise ValueError(
                "`fisher` must have an array for every leaf that is not new, got "
                f"{leaf} at '{path}'."
            )
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise ValueError(
                f"`fisher` must be real, got {jnp.result_type(leaf)} at '{path}'."
            )
        if isinstance(leaf, Tracer):
            continue
        with jax.ensure_compile_time_eval():
            is_fine = jnp.all(jnp.isfinite(leaf) & (jnp.asarray(leaf) >= 0))
        if not is_fine:
            raise ValueError(
                "`fisher` must be finite and at least 0, got entries that are not at "
                f"'{path}'."
            )
