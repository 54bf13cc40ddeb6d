"""The arguments that transformations share, and their checks."""

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
    """Arguments of a transformation; their meaning is documented in `dtnh`."""

    rule: rules.Rule
    strengths: dict[str, Strength]  # by name; a single regularizer has the name ""
    regularizers: dict[str, WeightRegularizer] | None  # None for gradient pairs
    scope: _geometry.Scope
    ema_decay: Number | None
    max_ratio: Strength | None
    mask: Mask | None
    axes: tuple[str, ...]  # along which each device holds a part of the gradients

    def by_name(self, values: Any, argument: str) -> dict[str, Any]:
        """Returns an argument's value for each regularizer, by name."""
        if "" in self.strengths:
            return {"": values}
        if not isinstance(values, Mapping) or set(values) != set(self.strengths):
            got = (
                sorted(values) if isinstance(values, Mapping) else type(values).__name__
            )
            raise ValueError(
                f"`{argument}` must be a dict with the keys of `strength`, "
                f"{sorted(self.strengths)}, got {got}."
            )
        return {name: values[name] for name in self.strengths}

    def join(self, by_name: dict[str, Any]) -> Any:
        """Inverts `by_name`: returns a dict only if regularizers have names."""
        return by_name[""] if "" in self.strengths else by_name

    def anchors(self, params: optax.Params) -> PyTree:
        """Returns the initial parameters that self-anchored regularizers keep."""
        regularizers = self.regularizers or {}
        if not any(each.anchor for each in regularizers.values()):
            return None
        anchors = {n: r.anchor and r.anchor(params) for n, r in regularizers.items()}
        return self.join(anchors)

    def strength_at(self, name: str, step: Array) -> Float[Array, ""]:
        """Returns the strength of a regularizer at a step."""
        return value_at(self.strengths[name], step)

    def max_ratio_at(self, step: Array) -> Float[Array, ""] | None:
        """Returns the bound at a step, or None for no bound."""
        return None if self.max_ratio is None else value_at(self.max_ratio, step)


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
      ValueError: a value is out of range.
      TypeError: an argument has the wrong type.
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


def value_at(value: Strength, step: Array) -> Float[Array, ""]:
    """Returns a number, or a schedule's value at a step, in at least float32."""
    return as_float32(value(step) if callable(value) else value)


def check_optimizer(argument: str, value: Any) -> None:
    """Raises TypeError unless `value` is an Optax transformation."""
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
    """Raises unless `value` is a number in [0, below), or a traced scalar."""
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
        upper = "finite" if math.isinf(below) else f"below {below:g}"
        raise ValueError(
            f"`{argument}` must be at least 0 and {upper}, got {value}."
            + (f" {_CURE}" if _is_half(value) else "")
        )


_CURE = (
    "Half precision rounds 0.999 to 1: pass `hyperparam_dtype=jnp.float32` to "
    "`optax.inject_hyperparams`."
)


def _is_half(value: Any) -> bool:
    dtype = jnp.result_type(value)
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4


def _below_one(decay: Number) -> Number:
    """Returns a traced decay, or the largest number below 1 if it was rounded to 1.

    Warns about a traced decay in half precision, because its rounding cannot be seen.
    """
    if not isinstance(decay, Tracer):
        return decay
    is_half = _is_half(decay)
    largest = 1 - float(jnp.finfo(decay.dtype if is_half else jnp.bfloat16).epsneg)
    if is_half:
        warnings.warn(
            f"`ema_decay` is a traced {decay.dtype}, used as at most {largest:.4g}. "
            f"{_CURE}",
            stacklevel=4,
        )
    decay = as_float32(decay)
    # A decay in float32 may have been rounded in half precision before.
    return jnp.where(decay < 1, decay, largest)
