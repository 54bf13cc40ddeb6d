"""The methods that are compared: a regularizer, and a rule that resolves conflicts.

A method is called `<regularizer>` where the two gradients are simply added, and
`<regularizer>+<rule>` where a rule resolves their conflicts first. So a pair of those
differs by the rule alone. `<regularizer>+never_hurt` takes more than a rule: it keeps
moving averages of the loss gradient. `scratch`, `fine-tuning` and `lora` have no
regularizer.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax import lax
from jaxtyping import Array

from dtnh_jax import regularizers, rules

Maps = dict[str, Array]


class Seen(NamedTuple):
    """What a batch looks like to the network in training, and to its teacher."""

    maps: Maps  # of the layers that the source is distilled at
    pooled: Array  # what the head sees, [batch, channels]
    source_logits: Array | None  # of the original head, where that is kept
    teacher_maps: Maps
    teacher_logits: Array | None  # of the original classes
    labels: Array


class Regularizer(NamedTuple):
    """A regularizer that the command knows; one of the two functions is given."""

    strength: float  # by default, as `--tune` chose it
    grid: tuple[float, ...]  # of `--tune`
    # (parameters of the source, estimate) -> regularizer of the parameters.
    of_weights: Callable[[Any, Any], regularizers.WeightRegularizer] | None = None
    # (batch, estimate) -> scalar.
    of_batch: Callable[[Seen, Any], Array] | None = None
    has_teacher: bool = False  # whether the teacher has to look at the batch
    estimate: str | None = None  # one of `estimates.ESTIMATES`
    keeps_source_head: bool = False  # beside the new one, and trained with it
    has_adapters: bool = False  # the only weights, with the head, that are trained


class Method(NamedTuple):
    """What is trained."""

    name: str
    is_pretrained: bool = True
    regularizer: str | None = None
    rule: str | None = None
    has_adapters: bool = False

    @property
    def never_hurts(self) -> bool:
        """Whether it is `dtnh_jax.never_hurt` that adds the regularizer."""
        return self.rule == NEVER_HURT

    @property
    def plain(self) -> str | None:
        """The same method with the gradients added, if this one has a rule."""
        is_resolved = self.rule is not None and self.rule != ADDED
        return self.regularizer if is_resolved else None

    @property
    def baseline(self) -> str:
        """The same method without a regularizer."""
        return "lora" if self.has_adapters else "fine-tuning"


def _towards_source(make: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    """Has a regularizer leave out the head, which has no pretrained value."""
    return lambda params, _: make(params, new=["head"])


def _of_maps(distance: Callable[[Maps, Maps], Array], **options: Any) -> Regularizer:
    return Regularizer(
        of_batch=lambda seen, _: distance(seen.maps, seen.teacher_maps),
        has_teacher=True,
        **options,
    )


def _of_logits(distance: Callable[..., Array], **options: Any) -> Regularizer:
    return Regularizer(
        of_batch=lambda seen, _: distance(seen.source_logits, seen.teacher_logits),
        has_teacher=True,
        keeps_source_head=True,
        **options,
    )


# A new regularizer, or a new rule, is a row here.
REGULARIZERS = {
    "l2": Regularizer(
        strength=0.0001,
        grid=(0.0001, 0.001, 0.01),
        of_weights=lambda params, _: regularizers.l2(),
    ),
    "l2_sp": Regularizer(
        strength=0.1,
        grid=(0.01, 0.1, 1.0),
        of_weights=_towards_source(regularizers.l2_sp),
    ),
    "l1_sp": Regularizer(
        strength=1e-4,
        grid=(1e-4, 1e-3, 1e-2),
        of_weights=_towards_source(regularizers.l1_sp),
    ),
    "l2_sp_fisher": Regularizer(
        strength=0.1,
        grid=(0.01, 0.1, 1.0),
        of_weights=lambda params, fisher: regularizers.l2_sp_fisher(
            params, fisher, new=["head"]
        ),
        estimate="fisher",
    ),
    "lora_decay": Regularizer(
        strength=0.1,
        grid=(0.1, 1.0, 10.0),
        of_weights=lambda params, _: regularizers.lora_decay(),
        has_adapters=True,
    ),
    "feature_map": _of_maps(
        regularizers.feature_map, strength=1e-4, grid=(1e-5, 1e-4, 1e-3)
    ),
    "attention_transfer": _of_maps(
        regularizers.attention_transfer, strength=1.0, grid=(1.0, 10.0, 100.0)
    ),
    "delta": Regularizer(
        strength=1.0,
        grid=(0.01, 0.1, 1.0),
        of_batch=lambda seen, attention: regularizers.delta(
            seen.maps, seen.teacher_maps, attention
        ),
        has_teacher=True,
        estimate="channel_attention",
    ),
    "relational": _of_maps(
        regularizers.relational, strength=10.0, grid=(0.1, 1.0, 10.0)
    ),
    "cka": _of_maps(regularizers.cka, strength=10.0, grid=(0.1, 1.0, 10.0)),
    "logit_distillation": _of_logits(
        regularizers.logit_distillation, strength=0.01, grid=(0.01, 0.1, 1.0)
    ),
    "lwf": _of_logits(regularizers.lwf, strength=1.0, grid=(0.1, 1.0, 10.0)),
    "co_tuning": Regularizer(
        strength=0.1,
        grid=(0.01, 0.1, 1.0),
        of_batch=lambda seen, relationship: regularizers.co_tuning(
            seen.source_logits, seen.labels, relationship
        ),
        estimate="relationship",
        keeps_source_head=True,
    ),
    "batch_spectral_shrinkage": Regularizer(
        strength=0.0001,
        grid=(0.0001, 0.001, 0.01),
        of_batch=lambda seen, _: regularizers.batch_spectral_shrinkage(seen.pooled),
    ),
}
ADDED, NEVER_HURT = "sum", "never_hurt"
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


def _regularized(name: str, rule: str) -> Method:
    title = name if rule == ADDED else f"{name}+{rule}"
    return Method(title, True, name, rule, REGULARIZERS[name].has_adapters)


METHODS = {
    method.name: method
    for method in (
        Method("scratch", is_pretrained=False),
        Method("fine-tuning"),
        Method("lora", has_adapters=True),
        *(
            _regularized(name, rule)
            for name in REGULARIZERS
            for rule in (*RULES, NEVER_HURT)
        ),
    )
}
# What is compared unless `--methods` says otherwise; `all` there means `METHODS`.
DEFAULT_METHODS = (
    "scratch",
    "fine-tuning",
    "l2_sp",
    "l2_sp+dtnh",
    "feature_map",
    "feature_map+dtnh",
)
