"""How networks of one kind are trained: the small ones, and those of photographs."""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from dtnh_jax.finetune.data.targets import load_target
from dtnh_jax.finetune.weights.sources import load_source
from dtnh_jax.studies.matrix import (
    batches,
    evaluation,
    photographs,
    sources,
    targets,
    training,
)
from dtnh_jax.studies.matrix.catalogue import (
    SOURCES_OF_PHOTOGRAPHS,
    TARGETS,
    TARGETS_OF_PHOTOGRAPHS,
)
from dtnh_jax.studies.matrix.config import Config
from dtnh_jax.studies.matrix.networks import FEATURE_LAYERS, ResNet8
from dtnh_jax.studies.matrix.regularizers import REGULARIZERS


class Family(NamedTuple):
    """What cells share; everything is made when first asked for, and kept."""

    steps: int
    licence: str | None  # of the images, where it has to be shown
    evaluator: evaluation.Network
    task: Callable[[str], targets.Task]  # of a target
    source: Callable[[str], sources.Pretrained]
    fresh: Callable[[int], training.Variables]  # random, of a seed
    reference: Callable[[str], float]  # the usual strength of a regularizer
    data: Callable[[str, int], batches.Data]  # of a target and a seed
    # Of a source, a target and a seed: with what the teacher makes of it.
    data_with_teacher: Callable[[str, str, int], batches.Data]
    # Both of a regularizer or None, a rule and an optimizer.
    parts: Callable[[str | None, str, str], training.Parts]
    trainer: Callable[[str | None, str, str], training.Trainer]


def small(config: Config, data_dir: pathlib.Path) -> Family:
    """The networks that are pretrained here, on images of 16 pixels."""
    network = ResNet8(widths=config.widths)
    evaluator = evaluation.evaluator(network, FEATURE_LAYERS)

    def task(name: str) -> targets.Task:
        return targets.load_task(
            name, data_dir, config.validation_per_class, config.test_per_class
        )

    def source(name: str) -> sources.Pretrained:
        return sources.load_source(
            name, network, evaluator, config.source_steps, data_dir
        )

    most = max(target.train_per_class for target in TARGETS.values())
    return _family(
        network,
        FEATURE_LAYERS,
        evaluator,
        task,
        source,
        lambda seed: sources.initial_variables(network, seed),
        lambda name: REGULARIZERS[name].reference,
        licence=None,
        see=evaluator.outputs,
        rows=most * network.num_classes,
        steps=config.steps,
        batch_size=config.batch_size,
    )


def of_photographs(
    config: Config, source_name: str, target_name: str, data_dir: pathlib.Path
) -> Family:
    """A published network, with a head for the classes of one target.

    Raises:
      ValueError: the target can not be read.
    """
    options = config.photographs
    source = load_source(SOURCES_OF_PHOTOGRAPHS[source_name])
    target = load_target(TARGETS_OF_PHOTOGRAPHS[target_name], data_dir=data_dir)
    classes, layers = len(target.class_names), source.feature_layers

    @functools.cache
    def evaluator(num_classes: int) -> evaluation.Network:
        return evaluation.evaluator(source.module(num_classes), layers)

    def see(variables: training.Variables, inputs: Any) -> dict[str, np.ndarray]:
        original = evaluator(len(variables["params"]["head"]["bias"]))
        return original.outputs(variables, inputs)

    return _family(
        source.module(classes),
        layers,
        evaluator(classes),
        lambda name: photographs.load_task(name, target, source, options),
        lambda name: photographs.load_source(source),
        lambda seed: photographs.random_variables(source, classes, seed),
        lambda name: REGULARIZERS[name].on_photographs,
        licence=target.licence,
        see=see,
        rows=classes * options.train_per_class,
        steps=options.steps,
        batch_size=options.batch_size,
    )


def _family(
    network: nn.Module,
    layers: Sequence[str],
    evaluator: evaluation.Network,
    task: Callable[[str], targets.Task],
    source: Callable[[str], sources.Pretrained],
    fresh: Callable[[int], training.Variables],
    reference: Callable[[str], float],
    *,
    licence: str | None,
    see: Callable[..., dict[str, np.ndarray]],  # (variables of a source, inputs)
    rows: int,
    steps: int,
    batch_size: int,
) -> Family:
    """Keeps what is made, and puts images and what teachers make of them together."""
    task, source = functools.cache(task), functools.cache(source)

    @functools.lru_cache(maxsize=32)
    def data(target: str, seed: int) -> batches.Data:
        images = task(target).training_set(seed)
        return batches.make_data(images, rows, steps, batch_size, seed)

    @functools.lru_cache(maxsize=8)
    def data_with_teacher(name: str, target: str, seed: int) -> batches.Data:
        plain = data(target, seed)
        seen = see(source(name).variables, plain.images)
        return plain._replace(teacher=jax.device_put(seen))

    def of_form(make: Callable[..., Any]) -> Callable[..., Any]:
        return functools.cache(
            lambda regularizer, rule, optimizer: make(
                network, layers, regularizer, rule, optimizer, steps
            )
        )

    return Family(
        steps,
        licence,
        evaluator,
        task,
        source,
        functools.lru_cache(fresh),
        reference,
        data,
        data_with_teacher,
        of_form(training.make_parts),
        of_form(training.make_trainer),
    )
