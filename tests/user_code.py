"""How users write it; pyright checks this file as strictly as the package."""

import jax
import jax.numpy as jnp
import optax

from dtnh_jax import (
    GradientPair,
    accumulate_pairs,
    add_regularizer,
    conflict_metrics,
    decoupled,
    dtnh,
    resolve_conflicts,
    rules,
    value_and_gradient_pair,
)
from dtnh_jax.regularizers import WeightRegularizer, l2, l2_sp

Params = dict[str, jax.Array]


def objective(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden = jnp.tanh(x @ params["body"])
    return jnp.mean(hidden @ params["head"]), jnp.mean(hidden**2)


def double(gram: jax.Array) -> jax.Array:
    return 2 * rules.dtnh(gram)


def train(params: Params, x: jax.Array) -> Params:
    warm_up = optax.linear_schedule(0.0, 0.1, 100)
    for tx in (
        optax.chain(dtnh(0.1), optax.adam(1e-3)),
        optax.chain(resolve_conflicts(double, warm_up, scope="leaf"), optax.sgd(0.1)),
        resolve_conflicts(rules.gate, jnp.array(1), scope="element", max_ratio=warm_up),
        dtnh({"features": 0.1, "logits": warm_up}, scope={"body": "a", "head": "b"}),
        accumulate_pairs(dtnh(0.1, mask=lambda p: {"body": True, "head": False}), 4),
        decoupled(optax.adamw(1e-3), 1e-4, max_ratio=1.0),
    ):
        state = tx.init(params)
        (loss, _), pair = value_and_gradient_pair(objective)(params, x)
        assert isinstance(pair, GradientPair)
        updates, state = tx.update(pair, state, params)
        updates, state = tx.update(
            pair.loss, state, params, regularizer_grads=pair.regularizer
        )
        new = optax.apply_updates(params, updates)
        assert isinstance(new, dict)
        metrics: dict[str, jax.Array] = conflict_metrics(state)
        print(float(loss), metrics["cosine"])

    pull: WeightRegularizer = l2_sp(params, new=lambda path: path == "head")
    both = {"pull": pull, "decay": l2()}
    tx = optax.chain(
        add_regularizer(both, {"pull": 0.1, "decay": 0.01}), optax.sgd(0.1)
    )
    grads = jax.grad(lambda p: objective(p, x)[0])(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    del updates
    return params
