"""The train step, and training with it: from a state to a later one.

A `Trainer` holds one compiled step for one regularizer. Seeds, strengths, rules and
what is known of the source are data to it, so all of them share the compilation.
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
from dtnh_jax import GradientPair
from dtnh_jax.finetune.adapters import add_adapters, new_adapters
from dtnh_jax.finetune.config import Config
from dtnh_jax.finetune.data import Examples, evaluation_batches
from dtnh_jax.finetune.methods import ADDED, REGULARIZERS, Method, Seen, any_rule
from dtnh_jax.finetune.sources import (
    Source,
    Variables,
    initial_variables,
    original_variables,
)
from dtnh_jax.linen import capture_features

Metrics = dict[str, Array]  # scalars by name


class Known(NamedTuple):
    """What a regularizer knows before training begins."""

    source: Variables  # pretrained, with the original head
    estimate: Any = None  # see `estimates`


class State(train_state.TrainState):
    """All that changes in training; `step` is how many steps are done.

    The parameters are the network's; with a `source_head` beside the `head`; or the
    `head` and `adapters` alone.
    """

    params: Any  # `TrainState` says FrozenDict, which Flax has ceased to return
    batch_stats: Any


class Trainer(NamedTuple):
    """How to train with one regularizer."""

    # (variables to start from, method, strength) -> state; the variables are copied.
    init: Callable[[Variables, Method, float], State]
    # (state, batch, what is known, key of the run) -> state, metrics. The state is
    # donated: use the new one. The metrics are those before the update.
    step: Callable[[State, Any, Known, PRNGKeyArray], tuple[State, Metrics]]


def make_trainer(
    source: Source,
    network: Any,
    regularizer_name: str | None,
    config: Config,
    steps: int,
) -> Trainer:
    """Builds an optimizer and a step, which is compiled at its first call.

    Args:
      source: what the network takes its images from.
      network: with the target's number of classes.
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
    if regularizer is not None:

        def resolve(strength, rule):
            return dtnh_jax.resolve_conflicts(
                any_rule(rules, rule), strength, scope=config.scope
            )

        # What is in the state is data, and no reason to compile again.
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

    apply = capture_features(network, [*source.feature_layers, "pooled"])

    def forward(params, state, batch, known, key):
        """Returns the loss, new batch statistics, and what a regularizer may see."""
        (logits, updated), found = apply(
            {
                "params": network_params(params, known.source["params"]),
                "batch_stats": state.batch_stats,
            },
            source.preprocess(batch["image"]),
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(key, state.step)},
        )
        labels = batch["label"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        pooled, source_logits = found.pop("pooled"), None
        if "source_head" in params:
            kept = params["source_head"]
            source_logits = pooled @ kept["kernel"] + kept["bias"][None, :]
        teacher = dict(batch.get("teacher", {}))
        teacher_logits = teacher.pop("head", None)
        seen = Seen(found, pooled, source_logits, teacher, teacher_logits, labels)
        return jnp.mean(loss), updated["batch_stats"], seen

    def step(
        state: State, batch: dict[str, Any], known: Known, key: PRNGKeyArray
    ) -> tuple[State, Metrics]:
        metrics = {}
        if regularizer and regularizer.of_batch:
            if regularizer.has_teacher and "teacher" not in batch:
                teacher = look(source, known.source, batch["image"])
                batch = {**batch, "teacher": teacher}

            def objective(params, of_batch=regularizer.of_batch):
                loss, batch_stats, seen = forward(params, state, batch, known, key)
                return (loss, of_batch(seen, known.estimate)), batch_stats

            ((loss, value), batch_stats), grads = dtnh_jax.value_and_gradient_pair(
                objective, has_aux=True
            )(state.params)
            metrics["regularizer"] = value
        else:

            def of_loss(params):
                loss, batch_stats, _ = forward(params, state, batch, known, key)
                return loss, batch_stats

            (loss, batch_stats), grads = jax.value_and_grad(of_loss, has_aux=True)(
                state.params
            )
            if regularizer and regularizer.of_weights:
                pull = regularizer.of_weights(known.source["params"], known.estimate)
                grads = GradientPair(grads, pull.gradient(state.params))
                metrics["regularizer"] = pull.value(state.params)
        metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        state = state.apply_gradients(grads=grads).replace(batch_stats=batch_stats)
        if regularizer is not None:
            metrics |= dtnh_jax.conflict_metrics(state.opt_state)
        return state, {"loss": loss, **metrics}

    return Trainer(init, jax.jit(step, donate_argnums=0))


def look(source: Source, variables: Variables, images: Any) -> dict[str, Array]:
    """What the pretrained network makes of images: its maps by layer, and logits.

    Args:
      source: the network.
      variables: pretrained, with the original head.
      images: as the source's `preprocess` takes them.

    Returns:
      Outputs by path; those of `head` are the logits of the original classes.
    """
    network = source.module(len(variables["params"]["head"]["bias"]))
    apply = capture_features(network, teacher_layers(source))
    return apply(variables, source.preprocess(images), train=False)[1]


def teacher_layers(source: Source) -> list[str]:
    """The layers whose outputs regularizers may want of the teacher."""
    return [*source.feature_layers, "head"]


def network_params(params: Any, source_params: Any) -> Any:
    """The network's parameters: those of a state, or the source's with adapters."""
    if "adapters" not in params:
        return params
    adapted = add_adapters(source_params, params["adapters"])
    return {**adapted, "head": params["head"]}


def starting_variables(
    source: Source, num_classes: int, seed: int, method: Method
) -> Variables:
    """What a seed starts from; methods of one seed have the same head."""
    key = jax.random.key(seed)
    variables = initial_variables(
        source, num_classes, jax.random.fold_in(key, 0), method.is_pretrained
    )
    params = variables["params"]
    if method.has_adapters:
        adapters = new_adapters(params, jax.random.fold_in(key, 2))
        params = {"head": params["head"], "adapters": adapters}
    if method.regularizer and REGULARIZERS[method.regularizer].keeps_source_head:
        kept = original_variables(source)["params"]["head"]
        params = {**params, "source_head": kept}
    return {**variables, "params": params}


def training_key(seed: int) -> PRNGKeyArray:
    """The key of a seed's dropout; methods of one seed drop the same units."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def train(
    trainer: Trainer,
    state: State,
    batches: Any,
    known: Known,
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
      known: of the regularizer.
      key: of the run; each step folds its number in.
      steps: where to stop.

    Yields:
      The state, to be used before the next step donates it, and the step's metrics.
    """
    start = int(state.step)
    batch = batches[start]
    for step in range(start, steps):
        state, metrics = trainer.step(state, batch, known, key)
        batch = batches[step + 1]  # prepared while the device is at work
        yield state, metrics


def make_predictor(source: Source, network: Any) -> Callable[..., Array]:
    """Returns a compiled function of (state, known, images) to class numbers."""

    @jax.jit
    def of_variables(params, batch_stats, source_params, images) -> Int[Array, " b"]:
        params = network_params(params, source_params)
        variables = {"params": params, "batch_stats": batch_stats}
        logits = network.apply(variables, source.preprocess(images), train=False)
        return jnp.argmax(logits, axis=-1)

    def predict(state: State, known: Known, images: Any) -> Array:
        return of_variables(
            state.params, state.batch_stats, known.source["params"], images
        )

    return predict


def predictions(
    predict: Callable[..., Array],
    state: State,
    known: Known,
    examples: Examples,
    batch_size: int = 100,
) -> list[int]:
    """The class that a network finds most likely, for every example."""
    found = [
        np.asarray(predict(state, known, batch["image"]))[batch["mask"]]
        for batch in evaluation_batches(examples, batch_size)
    ]
    return np.concatenate(found).tolist()
