"""The type of a regularizer of the weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from jaxtyping import Array, Float


class WeightRegularizer(NamedTuple):
    """A function of the parameters alone, with its gradient in closed form.

    Those of this package are pytrees, whose leaves are the arrays that they keep, such
    as pretrained weights: a compiled function can have them as arguments, and is not
    compiled again for another one of the same shapes.

    A regularizer without a source, such as `l2_sp()`, is self-anchored: `tx.init` of
    `add_regularizer` calls `anchor` with the parameters and keeps the result, and each
    update gives it to `gradient`.

    Attributes:
      value: maps the parameters to a scalar in float32; if self-anchored, maps
        `(params, anchor)`.
      gradient: maps the same to a tree like the parameters, in their dtypes.
      anchor: None, unless self-anchored. Maps the parameters to a copy of those to be
        pulled back to: a tree of their structure, with `optax.MaskedNode()` in the
        place of leaves that are new or not floating.
    """

    value: Callable[..., Float[Array, ""]]
    gradient: Callable[..., optax.Updates]
    anchor: Callable[[optax.Params], optax.Params] | None = None


def check_weight_regularizer(regularizer: Any) -> None:
    """Raises TypeError for anything but a `WeightRegularizer`, with the cure."""
    if not isinstance(regularizer, WeightRegularizer):
        raise TypeError(
            "`regularizer` must be a WeightRegularizer such as `regularizers.l2_sp()`, "
            f"or a dict of them, got {type(regularizer).__name__}. A function `f` of "
            "the parameters becomes one as `WeightRegularizer(f, jax.grad(f))`."
        )
