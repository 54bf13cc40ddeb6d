"""Builds the optimizer of a method's adapters.

Strengths are data in the optimizer's state, so methods that differ only in strength
share a compiled step.
"""

from typing import Any

import jax.numpy as jnp
import optax

import dtnh_jax
from dtnh_jax import regularizers, rules
from dtnh_jax.lm.methods import DECAY, DTNH, NEVER_HURT, Method


def make_schedule(kind: str, rate: float, warmup: int, steps: int) -> optax.Schedule:
    """Returns a schedule: a rise to `rate` over `warmup` steps, then one by kind."""
    left = max(steps - warmup, 1)
    then = {
        "cosine": optax.cosine_decay_schedule(rate, left),
        "linear": optax.linear_schedule(rate, 0.0, left),
        "constant": optax.constant_schedule(rate),
    }[kind]
    if not warmup:
        return then
    # Not from 0, which would waste the first step.
    up = optax.linear_schedule(rate / warmup, rate, max(warmup - 1, 1))
    return optax.join_schedules([up, then], [warmup])


def make_optimizer(
    method: Method, schedule: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """Builds Adam with a method's additions.

    Its update takes the gradient of the loss, or of the sum for methods that add both.
    Methods with two gradients get the regularizer's as `regularizer_grads`, and some of
    them also that of held-out text, at some steps, as `held_out_grads`.

    Args:
      method: a method that is trained.
      schedule: schedule of the learning rate.
    """
    adam = optax.adam(schedule)
    rule = method.name.rpartition("+")[2]

    def build(strength: Any) -> optax.GradientTransformation:
        if rule == DTNH:
            # Adam gives the KL's steps the length of the loss's. At first the model is
            # its own reference: `eps` keeps rounding errors from being a whole step.
            of_kl = optax.adam(schedule, eps=1e-5)
            return dtnh_jax.decoupled(adam, strength, regularizer_optimizer=of_kl)
        if rule == NEVER_HURT:
            return optax.chain(dtnh_jax.never_hurt(strength), adam)
        if method.name == DECAY:
            return dtnh_jax.decoupled(
                adam,
                lambda step: strength * schedule(step),
                regularizer=regularizers.lora_decay(),
                rule=rules.weighted_sum,
            )
        return optax.chain(adam)

    injected = optax.inject_hyperparams(build)(strength=0.0)
    return optax.with_extra_args_support(injected)


def with_strength(state: Any, strength: float) -> Any:
    """Returns a state of `make_optimizer` with a strength."""
    return optax.tree.set(state, strength=jnp.float32(strength))
