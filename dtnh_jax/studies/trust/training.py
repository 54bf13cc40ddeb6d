"""Trains many networks in lockstep: seeds, folds and values of one method.

Dense networks are mapped over all three. Mapped convolutions would become grouped ones,
which are slow on a CPU, so convolutional networks are trained one after the other.

Shape letters: S seeds; F folds, the last of which is all examples; V values; T steps;
B examples in a batch; N examples of a training set.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array

import dtnh_jax
from dtnh_jax import regularizers
from dtnh_jax.linen import capture_features
from dtnh_jax.studies.trust.catalogue import METHODS, REGULARIZERS, Method
from dtnh_jax.studies.trust.methods import BUILDERS, OPTIMIZERS

Variables = dict[str, Any]  # {"params": tree, "batch_stats": tree}


class Data(NamedTuple):
    """Training data of one seed or of all seeds; arrays of NumPy or JAX."""

    images: Any  # [S N h w 1]
    labels: Any  # [S N]
    teacher: dict[str, Any]  # maps of the source, by layer [S N ...]
    order: Any  # [S F T B], rows of every batch


class State(NamedTuple):
    """Parameters, statistics and optimizer state."""

    params: Any
    batch_stats: Any
    opt_state: Any


class Trainer(NamedTuple):
    """The initial state and the training step of one method."""

    # (variables to start from, value, parameters of the source) -> state
    init: Callable[[Variables, Array, Any], State]
    # (state, value, parameters of the source, step, rows, images, labels, teacher)
    step: Callable[..., State]


def make_trainer(
    network: nn.Module,
    layers: Sequence[str],
    regularizer: str | None,
    method: str,
    optimizer: str,
    learning_rate: float,
    steps: int,
) -> Trainer:
    """Returns the functions of one network.

    Args:
      network: a network whose classifier is `head`.
      layers: paths of the layers whose outputs are regularized.
      regularizer: one of `REGULARIZERS`, or None.
      method: one of `BUILDERS`.
      optimizer: one of `OPTIMIZERS`.
      learning_rate: falls to 0 along a cosine.
      steps: number of training steps.
    """
    apply = capture_features(network, layers)
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    strength = REGULARIZERS[regularizer] if regularizer else 0.0

    def forward(params, batch_stats, images):
        (logits, new), found = apply(
            {"params": params, **batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        return logits, dict(new), found

    def transformation(value, source, rate):
        return BUILDERS[method](OPTIMIZERS[optimizer](), value, source, rate)

    def init(variables, value, source):
        params = variables["params"]
        others = {k: v for k, v in variables.items() if k != "params"}
        return State(params, others, transformation(value, source, 1.0).init(params))

    def held_out_gradient(state, images, labels):
        def error(params):
            logits = forward(params, state.batch_stats, images)[0]
            return regularizers.expected_error(logits, labels)

        return jax.grad(error)(state.params)

    def step(state, value, source, number, rows, images, labels, teacher):
        extra = {}
        if METHODS.get(method, Method(())).has_held_out:  # the second half of `rows`
            rows, held_out = jnp.split(rows, 2)
            h = held_out_gradient(state, images[held_out], labels[held_out])
            extra["held_out_grads"] = h
        images, labels = images[rows], labels[rows]
        teacher = {name: maps[rows] for name, maps in teacher.items()}

        def objective(params):
            logits, new, found = forward(params, state.batch_stats, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            loss, penalty = jnp.mean(losses), jnp.zeros([])
            if regularizer == "feature_map":
                penalty = strength * regularizers.feature_map(found, teacher)
            return (loss, penalty), new

        if regularizer == "feature_map":
            pairs = dtnh_jax.value_and_gradient_pair(objective, has_aux=True)
            (_, new), pair = pairs(state.params)
        else:
            alone = jax.grad(
                lambda p: (objective(p)[0][0], objective(p)[1]), has_aux=True
            )
            g, new = alone(state.params)
            pull = regularizers.l2_sp(source, new=["head"]).gradient(state.params)
            r = jax.tree.map(lambda x: strength * x, pull)
            pair = dtnh_jax.GradientPair(g, r)
        rate = jnp.maximum(schedule(number), 1e-12)
        updates, opt_state = transformation(value, source, rate).update(
            pair, state.opt_state, state.params, **extra
        )
        params = jax.tree.map(lambda p, u: p + rate * u, state.params, updates)
        return State(params, new, opt_state)

    return Trainer(init, step)


def train(
    trainer: Trainer,
    starts: Variables,
    values: Sequence[float],
    source: Any,
    data: Data,
    is_mapped: bool,
    parts: int = 1,
) -> list[Variables]:
    """Trains all networks; returns their variables `[S F V ...]` after equal parts.

    Args:
      trainer: initial state and step of the method.
      starts: initial variables of each seed `[S ...]`.
      values: values of the method's hyperparameter.
      source: parameters of the source.
      data: data of all seeds.
      is_mapped: whether one program trains all networks, instead of one after another.
      parts: number of equal parts of training; variables are returned after each.
    """
    seeds, folds, steps = data.order.shape[:3]
    numbers = jnp.asarray(values, jnp.float32)
    ends = [round(steps * part / parts) for part in range(1, parts + 1)]
    if is_mapped:
        return _mapped(trainer, starts, numbers, source, data, ends)
    init, step = jax.jit(trainer.init), jax.jit(trainer.step, donate_argnums=0)
    kept: list[list[Any]] = [[] for _ in ends]
    for seed in range(seeds):
        start, *examples = jax.tree.map(
            lambda x, seed=seed: x[seed],
            (starts, data.images, data.labels, data.teacher),
        )
        for fold in range(folds):
            order = jnp.asarray(data.order[seed, fold])
            for value in numbers:
                state = jax.tree.map(jnp.array, init(start, value, source))
                for number in range(steps):
                    state = step(state, value, source, number, order[number], *examples)
                    if number + 1 in ends:
                        kept[ends.index(number + 1)].append(
                            jax.device_get(_variables(state))
                        )
    shape = (seeds, folds, len(values))

    def stacked(found):
        return jax.tree.map(
            lambda *x: np.stack(x).reshape(*shape, *np.shape(x[0])), *found
        )

    return [stacked(found) for found in kept]


def _variables(state: State) -> Variables:
    return {"params": state.params, **state.batch_stats}


def _mapped(trainer, starts, values, source, data, ends):
    def over(function, in_axes):
        """Maps over values, folds and seeds, the innermost first."""
        for axes in in_axes:
            function = jax.vmap(function, axes)
        return function

    # All folds of a seed start from the same variables.
    folds = data.order.shape[1]
    init = jax.vmap(trainer.init, (None, 0, None))
    init = jax.vmap(init, (None, None, None), axis_size=folds)
    init = jax.jit(jax.vmap(init, (0, None, None)))
    rest = (None,) * 2
    step = over(
        trainer.step,
        [
            (0, 0, None, None, None, None, None, None),
            (0, None, *rest, 0, None, None, None),
            (0, None, *rest, 0, 0, 0, 0),
        ],
    )

    @jax.jit
    def run(state, order, first):
        def body(state, each):
            number, rows = each
            return step(state, values, source, number, rows, *data[:3]), None

        numbers = first + jnp.arange(len(order))
        return jax.lax.scan(body, state, (numbers, order))[0]

    state, found = init(starts, values, source), []
    order = jnp.moveaxis(jnp.asarray(data.order), 2, 0)
    for first, end in zip([0, *ends], ends):
        state = run(state, order[first:end], first)
        found.append(jax.device_get(_variables(state)))
    return found
