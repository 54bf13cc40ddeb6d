"""The arguments that transformations share, checked before any compute is spent."""

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from dtnh_jax import _axes, _geometry, rules
from dtnh_jax._trees import Mask, as_float32
from dtnh_jax.regularizers.weights import WeightRegularizer, check_weight_regularizer

Number = float | int | Array | np.ndarray | np.generic
Strength = Number | optax.Schedule


class Options(NamedTuple):
    """Arguments of a transformation; see `dtnh` for what they mean."""

    rule: rules.Rule
    strengths: dict[str, Strength]  # by regularizer, the only one named ""
    regularizers: dict[str, WeightRegularizer] | None  # None where pairs come in
    scope: _geometry.Scope
    ema_decay: Number | None
    max_ratio: Strength | None
    mask: Mask | None
    axes: tuple[str, ...]  # along which each device holds a part of the gradients

    def by_name(self, given: Any, argument: str) -> dict[str, Any]:
        """Returns what is given for each regularizer, by name."""
        if "" in self.strengths:
            return {"": given}
        if not isinstance(given, Mapping) or set(given) != set(self.strengths):
            got = sorted(given) if isinstance(given, Mapping) else type(given).__name__
            raise ValueError(
                f"`{argument}` must be a dict with the keys of `strength`, "
                f"{sorted(self.strengths)}, got {got}."
            )
        return {name: given[name] for name in self.strengths}

    def join(self, by_name: dict[str, Any]) -> Any:
        """The inverse of `by_name`: a dict only where regularizers have names."""
        return by_name[""] if "" in self.strengths else by_name

    def anchors(self, params: optax.Params) -> PyTree:
        """What self-anchored regularizers keep of the first parameters."""
        regularizers = self.regularizers or {}
        if not any(each.anchor for each in regularizers.values()):
            return None
        made = {n: r.anchor and r.anchor(params) for n, r in regularizers.items()}
        return self.join(made)

    def strength_at(self, name: str, step: Array) -> Float[Array, ""]:
        """The strength of a regularizer at a step."""
        return at(self.strengths[name], step)

    def max_ratio_at(self, step: Array) -> Float[Array, ""] | None:
        """The bound at a step, or None for no bound."""
        return None if self.max_ratio is None else at(self.max_ratio, step)


def checked_options(
    rule: rules.Rule | None,
    strength: Strength | Mapping[str, Strength],
    regularizer: WeightRegularizer | Mapping[str, WeightRegularizer] | None = None,
    scope: _geometry.Scope = "global",
    ema_decay: Number | None = None,
    max_ratio: Strength | None = None,
    mask: Mask | None = None,
    axis_name: _axes.AxisName | None = None,
) -> Options:
    """Returns the arguments of a transformation.

    Raises:
      ValueError: for values that are out of range.
      TypeError: for arguments of another kind.
    """
    # A function as the default would be a schedule to `optax.inject_hyperparams`.
    rule = rules.dtnh if rule is None else rule
    if not callable(rule):
        raise TypeError(
            "`rule` must be a function such as `dtnh_jax.rules.dtnh`, got "
            f"{type(rule).__name__}."
        )
    _geometry.check_scope(scope)
    if ema_decay is not None:
        check_number("ema_decay", ema_decay, below=1.0)
        ema_decay = _below_one(ema_decay)
    if max_ratio is not None:
        check_number("max_ratio", max_ratio, schedule=True)
    options = Options(
        rule,
        _checked_strengths(strength),
        None,
        scope,
        ema_decay,
        max_ratio,
        mask,
        _axes.checked(axis_name),
    )
    if regularizer is None:
        return options
    regularizers = options.by_name(regularizer, "regularizer")
    for value in regularizers.values():
        check_weight_regularizer(value)
    return options._replace(regularizers=regularizers)


def _checked_strengths(strength: Any) -> dict[str, Strength]:
    if not isinstance(strength, Mapping):
        check_number("strength", strength, schedule=True)
        return {"": strength}
    if not strength or not all(isinstance(k, str) and k for k in strength):
        raise ValueError(
            "`strength` must name each regularizer by a string, got the keys "
            f"{list(strength)}."
        )
    for name, value in strength.items():
        check_number(f"strength[{name!r}]", value, schedule=True)
    return dict(strength)


def at(value: Strength, step: Array) -> Float[Array, ""]:
    """Returns a number, or a schedule's at a step, in at least float32."""
    return as_float32(value(step) if callable(value) else value)


def check_optimizer(argument: str, value: Any) -> None:
    """Raises TypeError for what is no Optax transformation."""
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"`{argument}` must be an Optax optimizer such as `optax.adamw(1e-3)`, got "
            f"{type(value).__name__}."
        )


def check_count(argument: str, value: Any) -> None:
    """Raises unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{argument}` must be an integer, got {value!r}.")
    if value < 1:
        raise ValueError(f"`{argument}` must be at least 1, got {value}.")


def check_number(
    argument: str, value: Any, *, schedule: bool = False, below: float = math.inf
) -> None:
    """Raises unless `value` is a number in [0, below), or something traced."""
    if schedule and callable(value):
        return
    kinds = "a number or a schedule" if schedule else "a number"
    if isinstance(value, (bool, np.bool_)) or not isinstance(
        value, (int, float, np.ndarray, np.generic, jax.Array)
    ):
        raise TypeError(f"`{argument}` must be {kinds}, got {value!r}.")
    if jnp.shape(value) != () or not jnp.isdtype(
        jnp.result_type(value), ("integral", "real floating")
    ):
        raise TypeError(
            f"`{argument}` must be a real scalar, got shape {jnp.shape(value)} of "
            f"{jnp.result_type(value)}."
        )
    if isinstance(value, Tracer):
        return
    if not 0 <= float(value) < below:
        most = "finite" if math.isinf(below) else f"below {below:g}"
        raise ValueError(
            f"`{argument}` must be at least 0 and {most}, got {value}."
            + (f" {_CURE}" if _is_half(value) else "")
        )


_CURE = (
    "Numbers in half precision are rounded, 0.999 to 1: where "
    "`optax.inject_hyperparams` makes them, give it `hyperparam_dtype=jnp.float32`."
)


def _is_half(value: Any) -> bool:
    dtype = jnp.result_type(value)
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4


def _below_one(decay: Number) -> Number:
    """Returns a decay that is below 1, even where half precision has lost that.

    Warns of one in half precision whose value cannot be seen: what it was is not known.
    """
    if not isinstance(decay, Tracer):
        return decay
    is_half = _is_half(decay)
    most = 1 - float(jnp.finfo(decay.dtype if is_half else jnp.bfloat16).epsneg)
    if is_half:
        warnings.warn(
            f"`ema_decay` is a traced {decay.dtype}, taken as at most {most:.4g}. "
            f"{_CURE}",
            stacklevel=4,
        )
    decay = as_float32(decay)
    return jnp.where(decay < 1, decay, most)  # also of one that was in half precision
