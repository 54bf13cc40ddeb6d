"""One training: a step that has everything but its form as data, and a loop over it.

Strengths, learning rates, sources, targets and seeds are arguments of the compiled
step. So there is one compilation for a rule, a regularizer and an optimizer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int32

import dtnh_jax
from dtnh_jax import GradientPair, regularizers
from dtnh_jax.linen import capture_features
from dtnh_jax.matrix.images import Images
from dtnh_jax.matrix.networks import FEATURE_LAYERS
from dtnh_jax.matrix.rules import ALONE, OPTIMIZERS, RULES

Variables = dict[str, Any]  # {"params": tree, "batch_stats": tree}


class Regularizer(NamedTuple):
    """A regularizer of the grid; one of the two functions is given."""

    reference: float  # the usual strength, of which the grid has multiples
    # Parameters of the source -> regularizer of the parameters.
    of_weights: Callable[[Any], regularizers.WeightRegularizer] | None = None
    # (maps of the student, maps of the teacher) -> scalar.
    of_maps: Callable[[Any, Any], Array] | None = None


REGULARIZERS = {
    # As in the Transfer-Learning-Library: 0.01, for the pretrained part and for plain
    # L2 on the new head; of 1/2 the sum of squares over all parameters.
    "l2_sp": Regularizer(
        0.01, of_weights=lambda source: regularizers.l2_sp(source, new=["head"])
    ),
    # Of 1/2 the sum of squares over positions and channels of two layers, 3072 values,
    # averaged over the batch. Libraries differ in what they average over, so this is
    # no one's default: in first trials 0.001 helped a little, and 0.1 was ruin.
    "feature_map": Regularizer(0.001, of_maps=regularizers.feature_map),
}


class Data(NamedTuple):
    """What is trained on, on the device; rows that `order` does not name are idle."""

    images: Float[Array, "n size size 1"]
    labels: Int32[Array, " n"]
    order: Int32[Array, "steps batch"]  # the rows of every step's batch
    maps: dict[str, Float[Array, "n _ _ _"]]  # of the teacher, by layer; or none


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


def make_trainer(
    network: nn.Module,
    regularizer_name: str | None,
    rule: str,
    optimizer: str,
    steps: int,
) -> Trainer:
    """Builds a step, which is compiled at its first call.

    Args:
      network: its classifier is `head`.
      regularizer_name: one of `REGULARIZERS`; None with the rule `ALONE`.
      rule: one of `RULES`.
      optimizer: one of `OPTIMIZERS`.
      steps: length of training.
    """
    regularizer = REGULARIZERS[regularizer_name] if regularizer_name else None
    schedule = optax.cosine_decay_schedule(1.0, steps)
    apply = capture_features(network, FEATURE_LAYERS)

    def transformation(strength):
        return RULES[rule](OPTIMIZERS[optimizer](), strength)

    def init(variables: Variables) -> State:
        variables = jax.tree.map(lambda x: jnp.array(x, copy=True), variables)
        zero = np.float32(0)
        return State(
            jnp.zeros([], jnp.int32),
            variables["params"],
            variables["batch_stats"],
            transformation(0.0).init(variables["params"]),
            jnp.asarray(zero),
            jnp.asarray(zero),
        )

    def forward(params, state, images, labels):
        (logits, updated), maps = apply(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses), updated["batch_stats"], maps

    def gradients(state, rows, data, source_params):
        images, labels = data.images[rows], data.labels[rows]
        if regularizer and regularizer.of_maps:
            of_maps = regularizer.of_maps
            teacher = {name: maps[rows] for name, maps in data.maps.items()}

            def objective(params):
                loss, batch_stats, maps = forward(params, state, images, labels)
                return (loss, of_maps(maps, teacher)), batch_stats

            (_, batch_stats), pair = dtnh_jax.value_and_gradient_pair(
                objective, has_aux=True
            )(state.params)
            return pair, batch_stats

        def of_loss(params):
            loss, batch_stats, _ = forward(params, state, images, labels)
            return loss, batch_stats

        grads, batch_stats = jax.grad(of_loss, has_aux=True)(state.params)
        if regularizer and regularizer.of_weights:
            pull = regularizer.of_weights(source_params)
            grads = GradientPair(grads, pull.gradient(state.params))
        return grads, batch_stats

    def step(state: State, data: Data, source_params: Any, settings: Settings) -> State:
        rows = data.order[state.step]
        grads, batch_stats = gradients(state, rows, data, source_params)
        updates, opt_state = transformation(settings.strength).update(
            grads, state.opt_state, state.params
        )
        rate = settings.learning_rate * schedule(state.step)
        updates = jax.tree.map(lambda x: rate * x, updates)
        seen = {"cosine": 0.0, "conflict": 0.0}
        if rule != ALONE:
            seen = dtnh_jax.conflict_metrics(opt_state)
        return State(
            state.step + 1,
            optax.apply_updates(state.params, updates),
            batch_stats,
            opt_state,
            state.cosine + seen["cosine"],
            state.conflict + seen["conflict"],
        )

    return Trainer(jax.jit(init), jax.jit(step, donate_argnums=0))


def make_data(
    images: Images, rows: int, steps: int, batch_size: int, seed: int
) -> Data:
    """Puts training images on the device, with the order of their batches.

    Args:
      images: at least one.
      rows: the size of the arrays, at least that of `images`: zeros fill them up, so
        that targets of different sizes share a compilation.
      steps: number of batches.
      batch_size: images in a batch.
      seed: of the order.
    """
    missing = rows - len(images.labels)
    inputs = np.pad(images.inputs(), [(0, missing), (0, 0), (0, 0), (0, 0)])
    return Data(
        jnp.asarray(inputs),
        jnp.asarray(np.pad(images.labels, [(0, missing)])),
        jnp.asarray(order(len(images.labels), steps, batch_size, seed)),
        {},
    )


def order(
    examples: int, steps: int, batch_size: int, seed: int
) -> Int32[np.ndarray, "steps batch"]:
    """Which examples are in the batch of every step: shuffled anew each epoch.

    Batches run on over the end of an epoch, so all of them are full and every example
    is seen once an epoch.

    Example:
      >>> rows = order(examples=4, steps=2, batch_size=2, seed=0)
      >>> print(np.sort(rows.ravel()))
      [0 1 2 3]
    """
    epochs = -(-steps * batch_size // examples)
    # The raw stream, because NumPy promises that it never changes (NEP 19).
    draws = [np.random.PCG64([seed, e]).random_raw(examples) for e in range(epochs)]
    rows = np.concatenate([np.argsort(draw, kind="stable") for draw in draws])
    return rows[: steps * batch_size].reshape(steps, batch_size).astype(np.int32)


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
