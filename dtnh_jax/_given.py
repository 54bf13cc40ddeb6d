"""What transformations are given, checked and sorted: the loss's, the regularizers'."""

from collections.abc import Callable, Mapping
from typing import Any

import optax

from dtnh_jax import _axes, _measure, _trees
from dtnh_jax._options import Options
from dtnh_jax.regularizers.weights import WeightRegularizer, check_weight_regularizer

# Of gradients, by regularizer. They are called more than once, so that what is in
# closed form is never kept in memory, and told how often `hide` is to be applied.
Getters = dict[str, Callable[[int], optax.Updates]]


def checked_regularizers(
    options: Options, regularizer: Any
) -> dict[str, WeightRegularizer]:
    """Returns regularizers of the weights by name, if that is what they are."""
    regularizers = options.by_name(regularizer, "regularizer")
    for value in regularizers.values():
        check_weight_regularizer(value)
    return regularizers


def given_gradients(
    options: Options,
    regularizers: Mapping[str, WeightRegularizer] | None,
    updates: optax.Updates,
    regularizer_grads: Any,
    params: optax.Params | None,
) -> tuple[optax.Updates, Getters]:
    """Sorts what `update` is given into the loss gradient and the regularizers'.

    Args:
      options: of the transformation.
      regularizers: of the weights, whose gradients are worked out from the parameters;
        None where gradients come as a pair.
      updates: gradient of the loss, or a pair.
      regularizer_grads: of the regularizers, where `updates` is no pair.
      params: the parameters.

    Returns:
      The loss gradient, and functions that return the others.
    """
    if regularizers is None:
        loss, given = _trees.split_pair(updates, regularizer_grads)
        grads = options.by_name(given, "regularizer_grads")
        return loss, {name: lambda _, r=r: r for name, r in grads.items()}
    if params is None:
        raise ValueError(
            "`params` must be given to `update`, because the regularizer's gradient is "
            "computed from them, got None."
        )

    def getter(each: WeightRegularizer, at: optax.Params = params):
        return lambda times: each.gradient(_measure.hide(at, times))

    return updates, {name: getter(each) for name, each in regularizers.items()}


def layout_of(
    options: Options,
    loss: optax.Updates,
    getters: Getters,
    params: optax.Params | None,
) -> _trees.Layout:
    """Finds the leaves that take part in an update.

    Raises:
      ValueError: if trees do not match, or devices' parts of them do not.
    """
    trees = [get(0) for get in getters.values()]
    found = _trees.layout(loss, trees, options.mask, loss if params is None else params)
    if options.axes and params is not None:
        _axes.check_parts(found.xs, found.gather(params, "params"), options.axes)
    return found
