"""Warns about parameters that are frozen after a transformation of this library.

Their gradients still count in its inner products and norms, as noise.
"""

import warnings
from typing import Any

import jax
import optax
from jax.extend import core

from dtnh_jax import _trees
from dtnh_jax._geometry import Measured
from dtnh_jax._gradients import GradientPair


def warn_of_freezing(
    tx: optax.GradientTransformation,
    grads: optax.Updates | GradientPair,
    state: optax.OptState,
    params: optax.Params,
) -> None:
    """Warns about parameters that an optimizer freezes after resolution.

    The check reads the program of an update. A parameter is frozen if its update
    depends on no gradient. It is frozen too late if the updates of other parameters and
    the sums of a transformation of this library depend on its gradient. There is no
    warning if each parameter has an inner product of its own.

    Args:
      tx: an optimizer.
      grads: the argument of its `update`.
      state: the optimizer's state.
      params: the parameters.
    """
    loss = grads.loss if isinstance(grads, GradientPair) else grads
    leaves, treedef = jax.tree.flatten(loss)

    def update(leaves, grads, state, params):
        loss = jax.tree.unflatten(treedef, leaves)
        pair = grads._replace(loss=loss) if isinstance(grads, GradientPair) else loss
        updates, state = tx.update(pair, state, params)
        inner = jax.tree.leaves(state, is_leaf=_is_measured)
        sums = [x.sums for x in inner if _is_measured(x)]
        shared = [x for x in sums if x.shape[-1] < len(leaves)]
        return jax.tree.leaves(updates), shared

    rest = None if grads is loss else grads
    program, shapes = jax.make_jaxpr(update, return_shape=True)(
        leaves, rest, state, params
    )
    found = _dependencies(program.jaxpr)
    of_updates, of_sums = found[: len(shapes[0])], found[len(shapes[0]) :]
    if len(of_updates) != len(leaves):
        return
    others, measured = 0, 0
    for each in of_updates:
        others |= each
    for each in of_sums:
        measured |= each
    paths = zip(_trees.names(loss), _trees.flatten(loss)[0])
    names = [name for name, leaf in paths if not _trees.is_missing(leaf)]
    late = [
        name
        for i, name in enumerate(names)
        if not of_updates[i] and (others & measured) >> i & 1
    ]
    if late:
        more = f" and {len(late) - 1} more" if len(late) > 1 else ""
        warnings.warn(
            f"The optimizer freezes '{late[0]}'{more} after a transformation of "
            "dtnh_jax, whose inner products and norms include the gradients of frozen "
            "parameters. Pass that transformation a `mask` of the trained parameters.",
            stacklevel=3,
        )


def _is_measured(node: Any) -> bool:
    return isinstance(node, Measured)


def _dependencies(program: core.Jaxpr) -> list[int]:
    """Returns the inputs on which each output may depend, as bits of a number."""
    known = {variable: 1 << i for i, variable in enumerate(program.invars)}

    def inputs_of(atom):
        return 0 if isinstance(atom, core.Literal) else known.get(atom, 0)

    for equation in program.eqns:
        bits = 0
        for atom in equation.invars:
            bits |= inputs_of(atom)
        known.update(dict.fromkeys(equation.outvars, bits))
    return [inputs_of(atom) for atom in program.outvars]
