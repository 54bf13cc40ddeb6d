"""The arguments that all transformations share, checked before any compute is spent."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from dtnh_jax import _axes, _part, rules

Number = float | int | Array | np.ndarray | np.generic
Strength = Number | optax.Schedule
Mask = PyTree[bool] | Callable[[PyTree], PyTree[bool]]


# Rules with the scopes that they work in, each on what the one before it has left.
Stages = Sequence[tuple[rules.Rule, _part.Scope]]


class Options(NamedTuple):
    """Arguments of a transformation; see `dtnh` for what they mean."""

    stages: list[tuple[rules.Rule, _part.Scope]]
    strengths: dict[str, Strength]  # by regularizer, the only one named ""
    reference_decay: Number | None
    trust_ratio: Number | None
    mask: Mask | None
    is_coupled: bool  # whether the optimizer comes after, not before
    axes: tuple[str, ...]  # along which each device holds a part of the gradients

    @classmethod
    def checked(
        cls,
        rule: rules.Rule | Stages,
        strength: Strength | Mapping[str, Strength],
        scope: _part.Scope,
        reference_decay: Number | None,
        trust_ratio: Number | None,
        mask: Mask | None,
        is_coupled: bool = True,
        axis_name: _axes.AxisName | None = None,
    ) -> "Options":
        """Returns the options, or raises what the transformations document."""
        stages = _checked_stages(rule, scope)
        if isinstance(strength, Mapping):
            if not strength or not all(isinstance(k, str) and k for k in strength):
                raise ValueError(
                    "`strength` must name each regularizer by a string, got the keys "
                    f"{list(strength)}."
                )
            for name, value in strength.items():
                check_number(f"strength[{name!r}]", value, schedule=True)
            strengths = dict(strength)
        else:
            check_number("strength", strength, schedule=True)
            strengths = {"": strength}
        if reference_decay is not None:
            check_number("reference_decay", reference_decay, below=1.0)
        if trust_ratio is not None:
            check_number("trust_ratio", trust_ratio)
        axes = _axes.checked(axis_name)
        return cls(
            stages, strengths, reference_decay, trust_ratio, mask, is_coupled, axes
        )

    @property
    def several(self) -> bool:
        """Whether regularizers have names."""
        return "" not in self.strengths

    def by_name(self, given: Any, argument: str) -> dict[str, Any]:
        """Returns what is given for each regularizer, by name."""
        if not self.several:
            return {"": given}
        if not isinstance(given, Mapping) or set(given) != set(self.strengths):
            got = sorted(given) if isinstance(given, Mapping) else type(given).__name__
            raise ValueError(
                f"`{argument}` must be a dict with the keys of `strength`, "
                f"{sorted(self.strengths)}, got {got}."
            )
        return {name: given[name] for name in self.strengths}

    def join(self, by_name: dict[str, Any]) -> Any:
        """The inverse of `by_name`: a dict only where there are several."""
        return by_name if self.several else by_name[""]

    def strength_at(self, name: str, step: Array) -> Float[Array, ""]:
        """The strength of a regularizer at a step."""
        value = self.strengths[name]
        value = jnp.asarray(value(step) if callable(value) else value)
        return value.astype(jnp.promote_types(value.dtype, jnp.float16))


def _checked_stages(rule: Any, scope: Any) -> list[tuple[rules.Rule, _part.Scope]]:
    if isinstance(rule, (list, tuple)):
        if isinstance(scope, str) and scope == "global":
            stages = list(rule)
        else:
            raise ValueError(
                "`scope` must be left out where `rule` is a list of pairs (rule, "
                f"scope), got {scope!r}."
            )
    else:
        stages = [(rule, scope)]
    if not stages:
        raise ValueError("`rule` must have at least one pair (rule, scope), got none.")
    for stage in stages:
        if not (isinstance(stage, tuple) and len(stage) == 2 and callable(stage[0])):
            raise TypeError(
                "`rule` must be a function such as `dtnh_jax.rules.dtnh`, or a list "
                f"of pairs (rule, scope), got {stage!r}."
            )
        _part.check_scope(stage[1])
    return stages


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
        raise ValueError(f"`{argument}` must be at least 0 and {most}, got {value}.")
