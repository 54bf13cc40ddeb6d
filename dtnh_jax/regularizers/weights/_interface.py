"""The type of a regularizer of the weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from jaxtyping import Array, Float


class WeightRegularizer(NamedTuple):
    """A function of the parameters alone, with its gradient in closed form.

    The regularizers of this package are pytrees, whose leaves are the arrays that they
    keep, such as pretrained weights. So a compiled function can take them as arguments,
    and is not compiled again for other arrays of the same shapes.

    A regularizer without a source, such as `l2_sp()`, is self-anchored: `tx.init` of
    `add_regularizer` calls `anchor` with the parameters and keeps the result, and each
    update passes it to `gradient`.

    Attributes:
      value: maps the parameters to a scalar in float32; if self-anchored, maps
        `(params, anchor)`.
      gradient: maps the same to a tree like the parameters, in their dtypes.
      anchor: None, unless self-anchored. Maps the parameters to a copy that they are
        pulled back to: a tree of the same structure, with `optax.MaskedNode()` for
        leaves that are new or not floating.
    """

    value: Callable[..., Float[Array, ""]]
    gradient: Callable[..., optax.Updates]
    anchor: Callable[[optax.Params], optax.Params] | None = None


def check_weight_regularizer(regularizer: Any) -> None:
    """Raises TypeError unless `regularizer` is a `WeightRegularizer`."""
    if not isinstance(regularizer, WeightRegularizer):
        raise TypeError(
            "`regularizer` must be a WeightRegularizer such as `regularizers.l2_sp()`, "
            f"or a dict of them, got {type(regularizer).__name__}. A function `f` of "
            "the parameters becomes one as `WeightRegularizer(f, jax.grad(f))`."
        )
