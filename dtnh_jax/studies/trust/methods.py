"""A builder for each method: combines the gradients of loss and regularizer.

A builder takes the optimizer, whose learning rate is 1, the value of the method's
hyperparameter, which may be traced, and the source's parameters. It returns a
transformation of a `GradientPair` that needs `params`. Its updates are multiplied by
the learning rate, and so is a regularizer that is added after the optimizer, as in
AdamW.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dtnh_jax import GradientPair, cautious, never_hurt, resolve_conflicts, rules

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(1.0, momentum=0.9),
    "adamw": lambda: optax.adamw(1.0, weight_decay=0.0),
}
# Large enough that only the bound matters, whatever the regularizer.
UNBOUNDED = 1e4
Number = Float[Array, ""] | float
Builder = Callable[
    [optax.GradientTransformation, Number, Any, Number], optax.GradientTransformation
]


def alone(optimizer, value, source, rate):
    """Uses the loss alone."""
    del value, source, rate

    def update(updates, state, params=None):
        pair: GradientPair = updates
        return optimizer.update(pair.loss, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def in_front(rule: rules.Rule, **options: Any) -> Builder:
    """Resolves before the optimizer; the value is the strength."""

    def build(optimizer, value, source, rate):
        del source, rate
        return optax.chain(resolve_conflicts(rule, value, **options), optimizer)

    return build


def trust(optimizer, value, source, rate):
    """Applies `never_hurt` at a level of trust."""
    del source, rate
    return optax.chain(never_hurt(UNBOUNDED, trust=value), optimizer)


def one_pass(optimizer, value, source, rate):
    """Applies `never_hurt` with a trust that it learns in training."""
    del value, source, rate
    return optax.chain(never_hurt(UNBOUNDED), optimizer)


def metabalance(optimizer, value, source, rate, strength=100.0, decay=0.9):
    """Brings the regularizer's gradient down to the loss gradient's size, by leaf.

    Norms are moving averages; the value is the relax factor.

    References:
      He et al., 2022, strategy A, https://arxiv.org/abs/2203.06801
    """
    del source, rate

    def init(params):
        zeros = jax.tree.map(lambda _: jnp.zeros([]), params)
        return zeros, zeros, optimizer.init(params)

    def update(updates, state, params=None):
        pair: GradientPair = updates
        of_g, of_r, inner = state

        def average(old, x):
            return decay * old + (1 - decay) * jnp.sqrt(jnp.sum(x * x))

        r = jax.tree.map(lambda x: strength * x, pair.regularizer)
        of_g, of_r = (
            jax.tree.map(average, of_g, pair.loss),
            jax.tree.map(average, of_r, r),
        )

        def balanced(g, r, m, n):
            scaled = (value * m / jnp.maximum(n, 1e-30) + 1 - value) * r
            return g + jnp.where(n > m, scaled, r)

        total = jax.tree.map(balanced, pair.loss, r, of_g, of_r)
        total, inner = optimizer.update(total, inner, params)
        return total, (of_g, of_r, inner)

    return optax.GradientTransformation(init, update)


def pcd(optimizer, value, source, rate, decay=0.999):
    """Takes the direction nearest to the loss's with `value` of the other's progress.

    Gradients are normalized by moving averages of their norms, and the direction has
    the length of the loss gradient.

    References:
      https://arxiv.org/abs/2606.29521
    """
    del source, rate

    def init(params):
        return jnp.zeros([]), jnp.zeros([]), jnp.zeros([]), optimizer.init(params)

    def update(updates, state, params=None):
        pair: GradientPair = updates
        step, of_g, of_r, inner = state
        g, r = pair
        gg, gr, rr = (optax.tree.vdot(*each) for each in ((g, g), (g, r), (r, r)))
        of_g, of_r = (
            decay * old + (1 - decay) * x for old, x in ((of_g, gg), (of_r, rr))
        )
        unbias = 1 - decay ** (step + 1)
        a, b = (jax.lax.rsqrt(x / unbias + 1e-16) for x in (of_g, of_r))
        gg, gr, rr = a * a * gg, a * b * gr, b * b * rr
        w = jnp.where(rr > 0, jnp.maximum(0, value - gr / jnp.maximum(rr, 1e-30)), 0)
        square = gg + 2 * w * gr + w * w * rr
        longer = jnp.sqrt(gg / jnp.maximum(square, 1e-30))
        d = jax.tree.map(lambda g, r: longer * (g + w * b / a * r), g, r)
        d, inner = optimizer.update(d, inner, params)
        return d, (step + 1, of_g, of_r, inner)

    return optax.GradientTransformation(init, update)


def beside(optimizer, value, source, rate):
    """Cautious decay: adds the regularizer where the optimizer's step agrees."""
    del source, rate
    return cautious(optimizer, value)


def spd(optimizer, value, source, rate):
    """Selective projection decay towards the source, leaf by leaf, except a new head.

    References:
      Tian et al., 2024, https://arxiv.org/abs/2411.01713
    """

    def update(updates, state, params=None):
        pair: GradientPair = updates
        assert params is not None
        steps, state = optimizer.update(pair.loss, state, params)

        def decayed(g, u, p, s):
            before, after = p - s, p + rate * u - s
            new, old = jnp.sqrt(jnp.sum(after**2)), jnp.sqrt(jnp.sum(before**2))
            ratio = jnp.clip((new - old) / jnp.maximum(new, 1e-30), 0, 1)
            is_selected = jnp.sum(g * before) > 0
            pull = jnp.where(is_selected, value * ratio / rate, 0)
            return u - pull * after

        return _but_head(decayed, steps, pair.loss, steps, params, source), state

    return optax.GradientTransformation(optimizer.init, update)


def ftp(optimizer, value, source, rate, step_size=0.01):
    """Fast trainable projection: a radius around the source for each output channel.

    Radii use the norm of maximum absolute row sums. Adam learns them from the next
    batch's gradient; the value multiplies the gradients that shrink a radius.

    References:
      Tian et al., 2023, https://arxiv.org/abs/2310.19182
    """
    adam = optax.scale_by_adam()

    def rows(x):  # over all axes but the last: an output channel
        axes = tuple(range(x.ndim - 1))
        return jnp.sum(x, axis=axes, keepdims=True) if axes else x

    def init(params):
        radius = jax.tree.map(lambda p: jnp.full_like(rows(p), 1e-8), params)
        slopes = jax.tree.map(jnp.zeros_like, params)
        return (
            jnp.zeros([], jnp.int32),
            radius,
            slopes,
            adam.init(radius),
            optimizer.init(params),
        )

    def update(updates, state, params=None):
        pair: GradientPair = updates
        assert params is not None
        step, radius, slopes, moments, inner = state
        steps, inner = optimizer.update(pair.loss, inner, params)
        grads = jax.tree.map(lambda g, c: rows(g * c), pair.loss, slopes)
        grads = jax.tree.map(lambda g: jnp.where(g > 0, value * g, g), grads)
        moved, moments = adam.update(grads, moments)
        moved = jax.tree.map(lambda old, u: old - step_size * u, radius, moved)
        radius = jax.tree.map(lambda a, b: jnp.where(step == 0, a, b), radius, moved)
        away = jax.tree.map(lambda p, u, s: p + rate * u - s, params, steps, source)
        norms = jax.tree.map(lambda c: rows(jnp.abs(c)) + 1e-8, away)
        radius = jax.tree.map(lambda x, n: jnp.clip(x, 1e-8, jnp.max(n)), radius, norms)

        def projected(u, p, s, c, x, n):
            return (s + jnp.clip(x / n, 0, 1) * c - p) / rate

        found = _but_head(projected, steps, steps, params, source, away, radius, norms)
        slopes = jax.tree.map(lambda c, n: c / n, away, norms)
        return found, (step + 1, radius, slopes, moments, inner)

    return optax.GradientTransformation(init, update)


def _but_head(function, otherwise, *trees):
    """Maps over all leaves except the new head, which has no pretrained values."""
    found = {
        name: jax.tree.map(function, *(tree[name] for tree in trees))
        for name in otherwise
        if name != "head"
    }
    return {**found, "head": otherwise["head"]}


BUILDERS: dict[str, Builder] = {
    "plain": alone,
    "sum": in_front(rules.weighted_sum),
    "trust": trust,
    "one-pass": one_pass,
    "dtnh": in_front(rules.dtnh),
    # The decay is the default of the authors' code.
    "bloop": in_front(rules.orthogonal, ema_decay=0.9),
    "pcgrad": in_front(rules.pcgrad),
    "metabalance": metabalance,
    "pcd": pcd,
    "cautious": beside,
    "spd": spd,
    "ftp": ftp,
}
