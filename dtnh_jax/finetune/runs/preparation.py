"""Prepares a run: weights, photographs, splits, teachers, estimates."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dtnh_jax import teacher_cache
from dtnh_jax.finetune.config import Config
from dtnh_jax.finetune.data import loading, splitting
from dtnh_jax.finetune.data.targets import Target, load_target
from dtnh_jax.finetune.methods import Method
from dtnh_jax.finetune.models.adapters import check_adapters
from dtnh_jax.finetune.regularizers import REGULARIZERS
from dtnh_jax.finetune.runs import processes, progress, race
from dtnh_jax.finetune.runs.folder import Folder
from dtnh_jax.finetune.training import estimates, loop, meshes
from dtnh_jax.finetune.training.network import in_dtype
from dtnh_jax.finetune.weights.sources import Source, load_source


class Experiment(NamedTuple):
    """The loaded and checked data that all cells share."""

    config: Config
    source: Source
    target: Target
    steps: int
    splits: loading.Splits  # seeds draw from its training set
    training_set: Callable[..., loading.Examples]  # of a seed, without a fold if given
    held_out_set: Callable[[int, int], loading.Examples]  # of a seed and a fold
    validation_set: Callable[[], loading.Examples]  # read at the first call
    test_set: Callable[[], loading.Examples]  # read at the first call
    trainer: Callable[[Method], loop.Trainer]  # one for each regularizer
    predict: Callable[..., Any]
    variables: loop.Variables  # of the source on the host, with the original head
    anchor: loop.Variables  # the same, on the mesh
    mesh: Mesh


def prepare(config: Config) -> Experiment:
    """Reads weights and photographs, and draws the splits.

    Validation and test sets are the same for all seeds. Otherwise the validation set of
    one seed, on which strengths are chosen, could be in another's test set. Each seed
    draws its training images from the rest.

    Raises:
      ValueError: weights or photographs can not be used; the message has one line.
    """
    mesh = meshes.make_mesh(config.mesh)
    config.check_batches(mesh.size)
    source = in_dtype(load_source(config.source), config.dtype)
    source = source._replace(load=functools.cache(source.load))
    target = processes.first_before_others(
        lambda: load_target(
            config.target, data_dir=config.data_dir, outputs=[config.folder]
        )
    )
    classes = len(target.class_names)
    sizes = splitting.sizes(target, config)
    config = dataclasses.replace(config, **sizes.as_options())
    splits = splitting.draw(target, sizes)
    variables = jax.tree.map(np.asarray, source.load())
    check_adapters(variables["params"], config.methods, source.name)
    network = source.module(classes)
    steps = config.total_steps(sizes.train * classes)

    def materialize(indices) -> loading.Examples:
        return loading.materialize(target, indices, config.image_size)

    @functools.cache
    def everything(seed: int) -> loading.Examples:
        indices = splits.train
        if sizes.train * classes < len(indices):
            drawn = loading.split(
                target.labels[indices],
                seed=seed,
                train_per_class=sizes.train,
                validation_per_class=0,
            )
            indices = indices[drawn.train]
        return materialize(indices)

    def training_set(seed: int, fold: int | None = None) -> loading.Examples:
        examples = everything(seed)
        if fold is None:
            return examples
        held_out = race.folds(examples.labels, seed)[fold]
        rows = np.setdiff1d(np.arange(len(examples.labels)), held_out)
        return examples.pick(rows)

    def held_out_set(seed: int, fold: int) -> loading.Examples:
        examples = everything(seed)
        return examples.pick(race.folds(examples.labels, seed)[fold])

    @functools.cache
    def made(regularizer: str | None, never_hurts: bool) -> loop.Trainer:
        return loop.make_trainer(
            source,
            network,
            regularizer,
            config,
            steps,
            never_hurts=never_hurts,
            mesh=mesh,
        )

    return Experiment(
        config,
        source,
        target,
        steps,
        splits,
        training_set,
        held_out_set,
        functools.cache(lambda: materialize(splits.validation)),
        functools.cache(lambda: materialize(splits.test)),
        lambda method: made(method.regularizer, method.never_hurts),
        loop.make_predictor(source, network, mesh),
        variables,
        meshes.place(mesh, variables),
        mesh,
    )


def known(
    experiment: Experiment,
    folder: Folder,
    method: Method,
    seed: int,
    display: progress.Display,
    fold: int | None = None,
) -> loop.Known:
    """Returns the data of a method's regularizer, estimated once per seed.

    With a fold, they are estimated without the held-out photographs.
    """
    name = method.regularizer
    asked = REGULARIZERS[name].estimate if name else None
    if asked is None:
        return loop.Known(experiment.anchor)
    question = estimates.Question(
        experiment.source,
        jax.tree.map(jnp.asarray, experiment.variables),
        experiment.training_set(seed, fold),
        len(experiment.target.class_names),
        seed,
        folder.prepared / f"{asked}-{_part(seed, fold)}",
    )

    def measure() -> Any:
        if not estimates.is_known(question):
            what = asked.replace("_", " ")
            display.say(f"{method.name}, seed {seed}: measuring the {what} first")
        return estimates.estimate(asked, question)

    found = processes.first_before_others(measure)
    return loop.Known(experiment.anchor, meshes.place(experiment.mesh, found))


def _part(seed: int, fold: int | None) -> str:
    """Returns a name for the photographs of a seed and a fold."""
    return f"seed{seed}" if fold is None else f"seed{seed}-fold{fold}"


def batches(
    experiment: Experiment,
    folder: Folder,
    method: Method,
    seed: int,
    fold: int | None = None,
) -> grain.MapDataset:
    """Returns the batches of a training, with the teacher's features if needed."""
    config = experiment.config

    def blocks_of(size: int) -> grain.MapDataset:
        views = _views(experiment, folder, method, seed, fold)
        return loading.training_batches(views, size, seed)

    size = config.batch_size // config.accumulate
    return meshes.batches(experiment.mesh, blocks_of, size)


def _views(
    experiment: Experiment,
    folder: Folder,
    method: Method,
    seed: int,
    fold: int | None,
) -> grain.MapDataset:
    views = loading.views(experiment.training_set(seed, fold))
    name = method.regularizer
    has_teacher = name is not None and REGULARIZERS[name].has_teacher
    if not (has_teacher and experiment.config.cache_teacher):
        return views
    see = jax.jit(functools.partial(loop.look, experiment.source))
    variables = jax.tree.map(jnp.asarray, experiment.variables)
    return processes.first_before_others(
        lambda: teacher_cache.cache_features(
            folder.prepared / f"teacher-{_part(seed, fold)}",
            views,
            lambda batch: see(variables, batch["image"]),
            teacher=variables,
            layers=loop.teacher_layers(experiment.source),
            progress=False,  # the run already has a progress display
        )
    )
