"""The train step, and training with it: from a state to a later one.

A `Trainer` holds one compiled step for one regularizer. Seeds, strengths and rules are
data to it, so all of them share the compilation.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from jaxtyping import Array, Int, PRNGKeyArray

import dtnh_jax
from dtnh_jax.finetune.config import Config
from dtnh_jax.finetune.data import Examples, evaluation_batches
from dtnh_jax.finetune.methods import ADDED, REGULARIZERS, Method, any_rule
from dtnh_jax.finetune.sources import Source, Variables, initial_variables

Metrics = dict[str, Array]  # scalars by name


class State(train_state.TrainState):
    """All that changes in training; `step` is how many steps are done."""

    params: Any  # `TrainState` says FrozenDict, which Flax has ceased to return
    batch_stats: Any


class Trainer(NamedTuple):
    """How to train with one regularizer."""

    # (variables to start from, method, strength) -> state; the variables are copied.
    init: Callable[[Variables, Method, float], State]
    # (state, batch, the source's variables, key of the run) -> state, metrics. The
    # state is donated: use the new one. The metrics are those before the update.
    step: Callable[[State, Any, Variables, PRNGKeyArray], tuple[State, Metrics]]


def make_trainer(
    source: Source,
    network: Any,
    source_variables: Variables,
    regularizer_name: str | None,
    config: Config,
    steps: int,
) -> Trainer:
    """Builds an optimizer and a step, which is compiled at its first call.

    Args:
      source: what the network takes its images from.
      network: with the target's number of classes.
      source_variables: pretrained, with any head: where regularizers pull to.
      regularizer_name: one of `REGULARIZERS`, or None.
      config: for optimizer, scope, and the rules that its methods need.
      steps: length of training, for the schedule of the learning rate.
    """
    regularizer = REGULARIZERS[regularizer_name] if regularizer_name else None
    rules = config.rules(regularizer_name)
    schedule = optax.cosine_decay_schedule(config.initial_learning_rate, steps)
    if config.optimizer == "sgd":
        optimizer = optax.sgd(schedule, momentum=0.9, nesterov=True)
    else:
        optimizer = optax.adamw(schedule)

    of_weights = None
    of_features = regularizer.of_features if regularizer else None
    if regularizer and regularizer.of_weights:
        of_weights = regularizer.of_weights(source_variables["params"])

        def add(strength, rule):
            return dtnh_jax.add_regularizer(
                of_weights, strength, rule=any_rule(rules, rule), scope=config.scope
            )

        # What is in the state is data, and no reason to compile again.
        adding = optax.inject_hyperparams(add)(strength=0.0, rule=0)
        optimizer = optax.chain(adding, optimizer)
    elif of_features:

        def resolve(strength, rule):
            return dtnh_jax.resolve_conflicts(
                any_rule(rules, rule), strength, scope=config.scope
            )

        resolving = optax.inject_hyperparams(resolve)(strength=0.0, rule=0)
        optimizer = optax.chain(resolving, optimizer)

    def init(variables: Variables, method: Method, strength: float) -> State:
        # Copies, because steps donate the state and the source is still needed.
        variables = jax.tree.map(lambda x: jnp.array(x, copy=True), variables)
        state = State.create(
            apply_fn=network.apply,
            tx=optimizer,
            params=variables["params"],
            batch_stats=variables["batch_stats"],
        )
        state = state.replace(step=jnp.zeros([], jnp.int32))
        if regularizer is None:
            return state
        opt_state = optax.tree.set(
            state.opt_state,
            strength=jnp.asarray(strength, jnp.float32),
            rule=jnp.asarray(rules.index(method.rule or ADDED), jnp.int32),
        )
        return state.replace(opt_state=opt_state)

    def feature_maps(collection: dict[str, Array]) -> dict[str, Array]:
        return {name: collection[name] for name in source.feature_layers}

    def step(
        state: State, batch: dict[str, Any], teacher: Variables, key: PRNGKeyArray
    ) -> tuple[State, Metrics]:
        images = source.preprocess(batch["image"])
        dropout = jax.random.fold_in(key, state.step)

        def forward(params):
            logits, updated = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                mutable=["batch_stats", "features"],
                rngs={"dropout": dropout},
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, batch["label"]
            )
            return jnp.mean(losses), updated

        metrics = {}
        if of_features is None:  # the regularizer, if any, is in the optimizer
            (loss, updated), grads = jax.value_and_grad(forward, has_aux=True)(
                state.params
            )
            if of_weights is not None:
                metrics["regularizer"] = of_weights.value(state.params)
        else:
            _, shown = state.apply_fn(
                teacher, images, train=False, mutable=["features"]
            )
            target_maps = feature_maps(shown["features"])

            def objective(params, of_features=of_features):
                loss, updated = forward(params)
                maps = feature_maps(updated["features"])
                return (loss, of_features(maps, target_maps)), updated

            ((loss, value), updated), grads = dtnh_jax.value_and_gradient_pair(
                objective, has_aux=True
            )(state.params)
            metrics["regularizer"] = value
        metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        state = state.apply_gradients(grads=grads)
        state = state.replace(batch_stats=updated["batch_stats"])
        if regularizer is not None:
            metrics |= dtnh_jax.conflict_metrics(state.opt_state)
        return state, {"loss": loss, **metrics}

    return Trainer(init, jax.jit(step, donate_argnums=0))


def starting_variables(
    source: Source, num_classes: int, seed: int, is_pretrained: bool
) -> Variables:
    """What a seed starts from; methods of one seed have the same head."""
    key = jax.random.fold_in(jax.random.key(seed), 0)
    return initial_variables(source, num_classes, key, is_pretrained)


def training_key(seed: int) -> PRNGKeyArray:
    """The key of a seed's dropout; methods of one seed drop the same units."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def train(
    trainer: Trainer,
    state: State,
    batches: Any,
    source_variables: Variables,
    key: PRNGKeyArray,
    steps: int,
) -> Iterator[tuple[State, Metrics]]:
    """Trains from wherever the state is, and yields after every step.

    A Python loop over compiled steps: `lax.scan` runs convolutions several times
    slower on CPUs.

    Args:
      trainer: what made the state.
      state: the first one; donated.
      batches: indexed by step, as `data.training_batches` returns.
      source_variables: pretrained.
      key: of the run; each step folds its number in.
      steps: where to stop.

    Yields:
      The state, to be used before the next step donates it, and the step's metrics.
    """
    start = int(state.step)
    batch = batches[start]
    for step in range(start, steps):
        state, metrics = trainer.step(state, batch, source_variables, key)
        batch = batches[step + 1]  # prepared while the device is at work
        yield state, metrics


def make_predictor(source: Source, network: Any) -> Callable[..., Array]:
    """Returns a compiled function of (variables, uint8 images) to class numbers."""

    @jax.jit
    def predict(variables, images) -> Int[Array, " b"]:
        logits = network.apply(variables, source.preprocess(images), train=False)
        return jnp.argmax(logits, axis=-1)

    return predict


def predictions(
    predict: Callable[..., Array],
    state: State,
    examples: Examples,
    batch_size: int = 100,
) -> list[int]:
    """The class that a network finds most likely, for every example."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    found = [
        np.asarray(predict(variables, batch["image"]))[batch["mask"]]
        for batch in evaluation_batches(examples, batch_size)
    ]
    return np.concatenate(found).tolist()
