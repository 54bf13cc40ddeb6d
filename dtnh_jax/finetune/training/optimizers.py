"""Builds the optimizer of two gradients from a configuration."""

from collections.abc import Callable, Sequence
from typing import Any

import optax
from jax import lax

import dtnh_jax
from dtnh_jax import rules
from dtnh_jax.finetune.config import Config
from dtnh_jax.finetune.methods import ADDED, Method

RULES: dict[str, rules.Rule] = {ADDED: rules.weighted_sum, "dtnh": rules.dtnh}


def any_rule(names: Sequence[str], index: Any) -> rules.Rule:
    """Returns the rule at an index of `names`, which may be traced.

    Rules only see four numbers, so applying all and selecting one costs nothing. The
    methods of one regularizer then share a compiled step, which takes half a minute to
    compile.
    """

    def rule(gram):
        weights = [RULES[name](gram) for name in names]
        return weights[0] if len(weights) == 1 else lax.select_n(index, *weights)

    return rule


def make_optimizer(
    regularizer_name: str | None, config: Config, steps: int, *, never_hurts: bool
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds the optimizer of all methods with the same regularizer.

    Gradients are averaged over `--accumulate` batches first, then resolved.

    Args:
      regularizer_name: one of `REGULARIZERS`; None for the loss gradient alone.
      config: configuration of the optimizer, the scope, and the rules of its methods.
      steps: number of training steps.
      never_hurts: whether `dtnh_jax.never_hurt` replaces the rules.

    Returns:
      A transformation, and the learning rate as a function of its updates so far. With
      a regularizer, its state has the hyperparameters `strength` and `rule`; with
      `never_hurt`, `strength` and `trust`.
    """
    schedule = optax.cosine_decay_schedule(config.initial_learning_rate, steps)
    if config.optimizer == "sgd":
        optimizer = optax.sgd(schedule, momentum=0.9, nesterov=True)
    else:
        optimizer = optax.adamw(schedule)
    names = config.rules(regularizer_name)
    if regularizer_name is not None:

        def resolve(strength, rule):
            return dtnh_jax.resolve_conflicts(
                any_rule(names, rule), strength, scope=config.scope
            )

        # Hyperparameters in the state are data, so changes do not compile again.
        if never_hurts:
            trusting = optax.inject_hyperparams(dtnh_jax.never_hurt)
            resolving = trusting(strength=0.0, trust=0.0)
        else:
            resolving = optax.inject_hyperparams(resolve)(strength=0.0, rule=0)
        optimizer = optax.chain(resolving, optimizer)
    if config.accumulate == 1:
        return optimizer, schedule
    if regularizer_name is not None:
        return dtnh_jax.accumulate_pairs(optimizer, config.accumulate), schedule
    several = optax.MultiSteps(optimizer, config.accumulate)
    return several.gradient_transformation(), schedule


def rule_number(
    regularizer_name: str | None, config: Config, *, never_hurts: bool
) -> Callable[[Method], int]:
    """Returns a function from a method to the `rule` of its optimizer's state."""
    names = config.rules(regularizer_name)

    def number(method: Method) -> int:
        if method.regularizer is None:
            return 0
        if method.never_hurts != never_hurts:
            raise ValueError(
                "`method` must be one of the trainer's methods, got "
                f"{method.name}: see `never_hurts`."
            )
        return 0 if never_hurts else names.index(method.rule or ADDED)

    return number


def with_hyperparameters(opt_state: Any, **numbers: Any) -> Any:
    """Returns a state of `make_optimizer` with other hyperparameters."""
    return optax.tree.set(opt_state, **numbers)
