"""The methods that are compared: a regularizer, and a rule that resolves conflicts.

A method is called `<regularizer>` where the two gradients are simply added, and
`<regularizer>+<rule>` where a rule resolves their conflicts first. So a pair of those
differs by the rule alone. `scratch` and `fine-tuning` have no regularizer.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax import lax

from dtnh_jax import regularizers, rules


class Regularizer(NamedTuple):
    """A regularizer that the command knows; one of the two functions is given."""

    strength: float  # by default, as `--tune` chose it for the default run
    grid: tuple[float, ...]  # of `--tune`
    # Parameters of the source, with a head -> regularizer of the parameters.
    of_weights: Callable[[Any], regularizers.WeightRegularizer] | None = None
    # Feature maps of student and teacher, by layer -> scalar.
    of_features: Callable[[Any, Any], Any] | None = None


class Method(NamedTuple):
    """What is trained; `plain` names the same method with the gradients added."""

    name: str
    is_pretrained: bool = True
    regularizer: str | None = None
    rule: str | None = None

    @property
    def plain(self) -> str | None:
        """The method that this one has to be compared with, if it has a rule."""
        is_resolved = self.rule is not None and self.rule != ADDED
        return self.regularizer if is_resolved else None


def _is_new(path: str) -> bool:
    """Whether a parameter has no pretrained value: the classifier of another task."""
    return path.startswith("head/")


def _l2_sp(source_params: Any) -> regularizers.WeightRegularizer:
    return regularizers.l2_sp(source_params, new=_is_new)


# A new regularizer, or a new rule, is a row here.
REGULARIZERS = {
    "l2_sp": Regularizer(
        strength=0.1,
        grid=(0.001, 0.01, 0.1, 1.0),
        of_weights=_l2_sp,
    ),
    "feature_map": Regularizer(
        strength=0.0001,
        grid=(1e-5, 1e-4, 1e-3, 1e-2),
        of_features=regularizers.feature_map,
    ),
}
ADDED = "sum"
RULES: dict[str, rules.Rule] = {ADDED: rules.weighted_sum, "dtnh": rules.dtnh}


def any_rule(names: Sequence[str], index: Any) -> rules.Rule:
    """One of `RULES` by its index in `names`, which may be traced.

    Rules see but four numbers, so to apply all and take one costs nothing, and the
    methods of one regularizer share a compiled step, which takes half a minute.
    """

    def rule(gram):
        weights = [RULES[name](gram) for name in names]
        return weights[0] if len(weights) == 1 else lax.select_n(index, *weights)

    return rule


_UNREGULARIZED = (Method("scratch", is_pretrained=False), Method("fine-tuning"))
METHODS = {
    method.name: method
    for method in (
        *_UNREGULARIZED,
        *(
            Method(name if rule == ADDED else f"{name}+{rule}", True, name, rule)
            for name in REGULARIZERS
            for rule in RULES
        ),
    )
}
