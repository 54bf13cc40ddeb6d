"""Costs of regularizers in a step of fine-tuning, relative to the step without one."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax.serialization import msgpack_restore, msgpack_serialize

from dtnh_jax.finetune.config import Config
from dtnh_jax.finetune.methods import METHODS
from dtnh_jax.finetune.regularizers import REGULARIZERS
from dtnh_jax.finetune.runs.checks import one_of
from dtnh_jax.finetune.training import loop
from dtnh_jax.finetune.weights.sources import load_source, original_variables
from dtnh_jax.studies.benchmarks.rows import Row, one, timed
from dtnh_jax.studies.benchmarks.timing import interleaved

GROUP = "regularizers"
CLASSES = 2


def contests(names: Sequence[str]) -> list[list[str]]:
    """Returns groups of methods that are compared, with their baseline first.

    Raises:
      ValueError: a name is unknown, or a baseline is missing.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        one_of("methods", name, METHODS)
        groups.setdefault(METHODS[name].baseline, []).append(name)
    for baseline, members in groups.items():
        if baseline not in members:
            raise ValueError(f"`--methods` must have {baseline}, got none.")
        members.sort(key=lambda name, first=baseline: name != first)
    return list(groups.values())


def steps_of(
    names: Sequence[str], batch_size: int, image_size: int, source_name: str
) -> dict[str, Callable[[], Any]]:
    """Returns a train step for each method, on pixels of noise.

    Args:
      names: names of `finetune.methods.METHODS`. A regularizer of the weights that
        needs an estimate gets one of the right shape; others are not supported.
      batch_size: images in a batch.
      image_size: height and width of images.
      source_name: name of the pretrained network.
    """
    source = load_source(source_name)
    original = original_variables(source)
    rng = np.random.default_rng(0)
    shape = (batch_size, image_size, image_size, 3)
    batch = {
        "image": jax.numpy.asarray(rng.integers(0, 256, shape, np.uint8)),
        "label": jax.numpy.asarray(rng.integers(0, CLASSES, batch_size)),
    }
    network = source.module(CLASSES)
    config = Config(methods=tuple(names))
    # Features of the teacher, as with `--cache-teacher`.
    teacher = jax.jit(functools.partial(loop.look, source))(original, batch["image"])

    @functools.cache
    def trainer(regularizer: str | None, never_hurts: bool) -> loop.Trainer:
        return loop.make_trainer(
            source, network, regularizer, config, 1000, never_hurts=never_hurts
        )

    def make(name: str) -> Callable[[], Any]:
        method = METHODS[name]
        row = REGULARIZERS.get(method.regularizer or "")
        strength = row.strength if row else 0.0
        variables = loop.starting_variables(source, CLASSES, 0, method)
        made = trainer(method.regularizer, method.never_hurts)
        state = made.init(variables, method, strength)
        known = loop.Known(original, _estimate(row.estimate if row else None, original))
        seen = {**batch, "teacher": teacher} if row and row.has_teacher else batch

        def step():
            nonlocal state
            state, metrics = made.step(state, seen, known, loop.training_key(0))
            return metrics

        return step

    return {name: make(name) for name in names}


def _estimate(name: str | None, original: Any) -> Any:
    if name is None:
        return None
    if name != "fisher":
        raise ValueError(f"`methods` must not need an estimate, got one of {name}.")
    ones = jax.tree.map(np.ones_like, original["params"])
    return msgpack_restore(msgpack_serialize({**ones, "head": None}))


def measure(
    names: Sequence[str],
    *,
    batch_size: int,
    image_size: int,
    rounds: int,
    source_name: str,
) -> list[Row]:
    """Times a step of each method; the first method is the baseline of the others."""
    calls = steps_of(names, batch_size, image_size, source_name)
    seconds = interleaved(calls, rounds)
    comparisons = {name: [one(names[0])] for name in names[1:]}
    return timed(GROUP, source_name, seconds, comparisons)
