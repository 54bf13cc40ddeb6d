"""Training and predicting: loops over compiled steps."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from dtnh_jax.finetune.data.loading import Examples, evaluation_batches
from dtnh_jax.finetune.training import meshes
from dtnh_jax.finetune.training.network import (
    Known,
    State,
    look,
    network_params,
    starting_variables,
    teacher_layers,
    training_key,
)
from dtnh_jax.finetune.training.step import ALL_FINITE, Metrics, Trainer, make_trainer
from dtnh_jax.finetune.weights.sources import Source, Variables

__all__ = [
    "Known",
    "Metrics",
    "NotFiniteError",
    "State",
    "Trainer",
    "Variables",
    "logits_of",
    "look",
    "make_predictor",
    "make_trainer",
    "starting_variables",
    "teacher_layers",
    "train",
    "training_key",
]
PATIENCE = 5  # consecutive batches that may be skipped


class NotFiniteError(ArithmeticError):
    """Losses or gradients were not finite in too many consecutive batches."""


def train(
    trainer: Trainer,
    state: State,
    batches: Any,
    known: Known,
    key: PRNGKeyArray,
    steps: int,
    accumulate: int = 1,
) -> Iterator[tuple[State, Metrics]]:
    """Trains from the step of `state`, and yields after every step.

    A Python loop over compiled steps, because `lax.scan` runs convolutions several
    times slower on CPUs.

    Args:
      trainer: the trainer that made the state.
      state: the initial state; donated.
      batches: batches by number, the result of `loading.training_batches`.
      known: data of the regularizer.
      key: key of the run; each batch folds in its number.
      steps: the last step.
      accumulate: number of batches in a step, as in the trainer's optimizer.

    Yields:
      The state, to be used before the next step donates it, and the step's metrics:
      means over its batches for losses, the last values for others.

    Raises:
      NotFiniteError: the loss or its gradient was not finite in `PATIENCE` consecutive
        batches; the error names the step and the first leaf.
    """
    start = int(state.step)
    in_a_row, skipped = 0, int(state.skipped)
    batch = batches[start]
    for step in itertools.count(start // accumulate):
        if step >= steps:
            return
        lines = []
        for number in range(step * accumulate, (step + 1) * accumulate):
            state, metrics = trainer.step(state, batch, known, key)
            batch = batches[number + 1]  # prepared while the device computes
            in_a_row = in_a_row + 1 if int(metrics["skipped_batches"]) > skipped else 0
            skipped = int(metrics["skipped_batches"])
            if in_a_row == PATIENCE:
                raise NotFiniteError(_what_is_wrong(step + 1, state, metrics))
            lines.append(metrics)
        yield state, _joined(lines)


def _joined(lines: list[Metrics]) -> Metrics:
    metrics = {key: x for key, x in lines[-1].items() if key != "not_finite"}
    if len(lines) == 1:
        return metrics
    means = {"loss", "regularizer"} & metrics.keys()
    return metrics | {
        key: jnp.mean(jnp.stack([line[key] for line in lines])) for key in means
    }


def _what_is_wrong(step: int, state: State, metrics: Metrics) -> str:
    """Returns a message on the first number that is not finite."""
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(state.params)
    ]
    finite = [bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(state.params)]
    number = int(metrics["not_finite"])
    if not all(finite):
        where = f"parameter {names[finite.index(False)]} holds"
    elif number > ALL_FINITE:
        where = f"the gradient of the loss for {names[number]}, or its update, holds"
    else:
        where = "the loss, though not its gradient, holds"
    return (
        f"training stopped at step {step}: {where} numbers that are not finite, in "
        f"{PATIENCE} consecutive batches. None of them was applied"
    )


def make_predictor(
    source: Source, network: Any, mesh: Mesh | None = None
) -> Callable[..., Array]:
    """Returns a compiled function from (state, known, images) to logits."""
    mesh = meshes.make_mesh() if mesh is None else mesh

    @jax.jit
    def of_variables(params, batch_stats, source_params, images) -> Float[Array, "b c"]:
        params = network_params(params, source_params)
        variables = {"params": params, "batch_stats": batch_stats}
        logits = network.apply(variables, source.preprocess(images), train=False)
        return meshes.whole(mesh, jnp.asarray(logits, jnp.float32))

    def predict(state: State, known: Known, images: Any) -> Array:
        return of_variables(
            state.params,
            state.batch_stats,
            known.source["params"],
            meshes.place_rows(mesh, images),
        )

    return predict


def logits_of(
    predict: Callable[..., Array],
    state: State,
    known: Known,
    examples: Examples,
    batch_size: int = 100,
) -> Float[np.ndarray, "n classes"]:
    """Returns the logits of a network for every example.

    Args:
      predict: result of `make_predictor`.
      state: the trained state.
      known: data of the regularizer.
      examples: examples to evaluate.
      batch_size: a multiple of the devices in the mesh.
    """
    found = [
        np.asarray(predict(state, known, batch["image"]))[batch["mask"]]
        for batch in evaluation_batches(examples, batch_size)
    ]
    return np.concatenate(found)
