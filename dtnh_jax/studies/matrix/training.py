"""One training: a step that has everything but its form as data, and a loop over it.

Strengths, learning rates, sources, targets and seeds are arguments of the compiled
step. So there is one compilation for a rule, a regularizer and an optimizer.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int32

import dtnh_jax
from dtnh_jax import GradientPair
from dtnh_jax.linen import capture_features
from dtnh_jax.studies.matrix.batches import Data
from dtnh_jax.studies.matrix.catalogue import ALONE
from dtnh_jax.studies.matrix.regularizers import REGULARIZERS, Regularizer
from dtnh_jax.studies.matrix.rules import OPTIMIZERS, RULES

Variables = dict[str, Any]  # {"params": tree, "batch_stats": tree}


class Settings(NamedTuple):
    """Numbers that are data to the compiled step."""

    strength: Float[Array, ""] | float
    learning_rate: Float[Array, ""] | float  # falls to 0 along a cosine


class State(NamedTuple):
    """All that changes in training."""

    step: Int32[Array, ""]
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    cosine: Float[Array, ""]  # of the two gradients, summed over steps
    conflict: Float[Array, ""]  # the share in conflict, summed over steps


class Trainer(NamedTuple):
    """How to train in one form."""

    # Variables to start from, which are copied -> state.
    init: Callable[[Variables], State]
    # (state, data, parameters of the source, settings) -> state; donates the old one.
    step: Callable[[State, Data, Any, Settings], State]


class Parts(NamedTuple):
    """What a step is made of, to be put together in more than one way."""

    # Parameters -> state of the optimizer.
    init: Callable[[Any], optax.OptState]
    # (state, rows, data, parameters of the source) -> gradients, which are a pair where
    # there is a regularizer, and new batch statistics.
    gradients: Callable[[State, Array, Data, Any], tuple[Any, Any]]
    # (parameters, state, rows, data) -> loss in training mode.
    loss: Callable[[Any, State, Array, Data], Float[Array, ""]]
    # (state, settings) -> learning rate of the step.
    rate: Callable[[State, Settings], Float[Array, ""]]
    # (state, gradients, settings) -> state after the step but for batch statistics and
    # sums, and what was added to the parameters.
    advance: Callable[[State, Any, Settings], tuple[State, Any]]


def make_parts(
    network: nn.Module,
    layers: Sequence[str],
    regularizer_name: str | None,
    rule: str,
    optimizer: str,
    steps: int,
) -> Parts:
    """Returns the functions that a step is made of; the arguments of `make_trainer`."""
    regularizer = REGULARIZERS[regularizer_name] if regularizer_name else None
    schedule = optax.cosine_decay_schedule(1.0, steps)
    is_of_logits = regularizer is not None and regularizer.of_logits is not None
    apply = capture_features(network, ["pooled"] if is_of_logits else layers)

    def transformation(strength):
        return RULES[rule](OPTIMIZERS[optimizer](), strength)

    def forward(params, state, rows, data):
        (logits, updated), found = apply(
            {"params": params, "batch_stats": state.batch_stats},
            data.images[rows],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(data.key, state.step)},
        )
        labels = data.labels[rows]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses), updated["batch_stats"], found

    def loss(params, state, rows, data):
        return forward(params, state, rows, data)[0]

    def gradients(state, rows, data, source_params):
        if regularizer and not regularizer.of_weights:
            wanted = ["head"] if is_of_logits else layers
            teacher = {name: data.teacher[name][rows] for name in wanted}

            def objective(params, regularizer=regularizer):
                loss, batch_stats, found = forward(params, state, rows, data)
                penalty = _penalty(regularizer, found, teacher, source_params)
                return (loss, penalty), batch_stats

            (_, batch_stats), pair = dtnh_jax.value_and_gradient_pair(
                objective, has_aux=True
            )(state.params)
            return pair, batch_stats

        def of_loss(params):
            loss, batch_stats, _ = forward(params, state, rows, data)
            return loss, batch_stats

        grads, batch_stats = jax.grad(of_loss, has_aux=True)(state.params)
        if regularizer and regularizer.of_weights:
            pull = regularizer.of_weights(source_params)
            grads = GradientPair(grads, pull.gradient(state.params))
        return grads, batch_stats

    def rate(state, settings):
        return settings.learning_rate * schedule(state.step)

    def advance(state, grads, settings):
        updates, opt_state = transformation(settings.strength).update(
            grads, state.opt_state, state.params
        )
        scale = rate(state, settings)
        updates = jax.tree.map(lambda x: scale * x, updates)
        params = optax.apply_updates(state.params, updates)
        state = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, updates

    return Parts(transformation(0.0).init, gradients, loss, rate, advance)


def make_trainer(
    network: nn.Module,
    layers: Sequence[str],
    regularizer_name: str | None,
    rule: str,
    optimizer: str,
    steps: int,
) -> Trainer:
    """Builds a step, which is compiled at its first call.

    Args:
      network: its classifier is `head`, and what that sees is sown as `pooled`.
      layers: of which maps are regularized, by path.
      regularizer_name: one of `REGULARIZERS`; None with the rule `ALONE`.
      rule: one of `RULES`.
      optimizer: one of `OPTIMIZERS`.
      steps: length of training.
    """
    parts = make_parts(network, layers, regularizer_name, rule, optimizer, steps)

    def init(variables: Variables) -> State:
        variables = jax.tree.map(lambda x: jnp.array(x, copy=True), variables)
        zero = np.float32(0)
        return State(
            jnp.zeros([], jnp.int32),
            variables["params"],
            variables["batch_stats"],
            parts.init(variables["params"]),
            jnp.asarray(zero),
            jnp.asarray(zero),
        )

    def step(state: State, data: Data, source_params: Any, settings: Settings) -> State:
        rows = data.order[state.step]
        grads, batch_stats = parts.gradients(state, rows, data, source_params)
        new_state, _ = parts.advance(state, grads, settings)
        seen = {"cosine": 0.0, "conflict": 0.0}
        if rule != ALONE:
            seen = dtnh_jax.conflict_metrics(new_state.opt_state)
        return new_state._replace(
            batch_stats=batch_stats,
            cosine=state.cosine + seen["cosine"],
            conflict=state.conflict + seen["conflict"],
        )

    return Trainer(jax.jit(init), jax.jit(step, donate_argnums=0))


def _penalty(
    regularizer: Regularizer, found: Any, teacher: Any, source_params: Any
) -> Float[Array, ""]:
    """A regularizer of what two networks make of a batch, by layer."""
    if regularizer.of_maps:
        return regularizer.of_maps(found, teacher)
    assert regularizer.of_logits  # all others are of weights
    head = source_params["head"]
    logits = found["pooled"] @ head["kernel"] + head["bias"][None, :]
    return regularizer.of_logits(logits, teacher["head"])


def train(
    trainer: Trainer,
    variables: Variables,
    data: Data,
    source_params: Any,
    settings: Settings,
) -> State:
    """Trains as many steps as the data has batches.

    A Python loop over compiled steps: `lax.scan` runs convolutions several times
    slower on CPUs.
    """
    state = trainer.init(variables)
    settings = Settings(*(jnp.asarray(x, jnp.float32) for x in settings))
    for _ in range(len(data.order)):
        state = trainer.step(state, data, source_params, settings)
    return state
