"""All methods with all seeds: tuning, training, testing, one cell after the other."""

import functools
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from rich.console import Console

from dtnh_jax import teacher_cache
from dtnh_jax.finetune import data, estimates, loop, progress
from dtnh_jax.finetune.config import Config
from dtnh_jax.finetune.folder import Folder
from dtnh_jax.finetune.interrupt import Interrupted, stop_signals
from dtnh_jax.finetune.methods import METHODS, REGULARIZERS, Method
from dtnh_jax.finetune.sources import Source, load_source, original_variables
from dtnh_jax.finetune.statistics import accuracies
from dtnh_jax.finetune.targets import Target, load_target


class Cell(NamedTuple):
    """One training: a method, its strength and a seed."""

    method: Method
    seed: int
    strength: float = 0.0
    is_tuning: bool = False

    @property
    def name(self) -> str:
        """Names files, and lines of metrics."""
        strength = f"-{self.strength:g}" if self.is_tuning else ""
        return f"{self.method.name}{strength}-seed{self.seed}"


class Experiment(NamedTuple):
    """What all cells share, loaded and checked."""

    config: Config
    source: Source
    target: Target
    steps: int
    splits: data.Splits  # its training set is what seeds draw from
    training_set: Callable[[int], data.Examples]  # of a seed
    validation_set: Callable[[], data.Examples]  # read when first called, as is
    test_set: Callable[[], data.Examples]
    trainer: Callable[[str | None], loop.Trainer]  # of a regularizer
    predict: Callable[..., Any]
    variables: loop.Variables  # of the source, with the original head


def prepare(config: Config) -> Experiment:
    """Reads weights and photographs, and draws the splits.

    Validation and test sets are the same for all seeds; otherwise the validation set
    of one seed, on which strengths are chosen, would be in another's test set. Each
    seed draws its training images from what is left.

    Raises:
      ValueError: in one line, for all that can be wrong with either.
    """
    source = load_source(config.source)
    source = source._replace(load=functools.cache(source.load))
    target = load_target(config.target, data_dir=config.data_dir)
    classes = len(target.class_names)
    kept = config.validation_per_class + config.test_per_class
    rarest = int(np.bincount(target.labels, minlength=classes).min())
    pool = max(rarest - kept, config.train_per_class)  # `split` says what is missing
    splits = data.split(
        target.labels,
        seed=0,
        train_per_class=pool,
        validation_per_class=config.validation_per_class,
        test_per_class=config.test_per_class,
    )
    variables = original_variables(source)
    network = source.module(classes)
    steps = config.total_steps(config.train_per_class * classes)

    def materialize(indices) -> data.Examples:
        return data.materialize(target, indices, config.image_size)

    @functools.cache
    def training_set(seed: int) -> data.Examples:
        indices = splits.train
        if config.train_per_class < pool:
            drawn = data.split(
                target.labels[indices],
                seed=seed,
                train_per_class=config.train_per_class,
                validation_per_class=0,
            )
            indices = indices[drawn.train]
        return materialize(indices)

    @functools.cache
    def trainer_of(regularizer: str | None) -> loop.Trainer:
        return loop.make_trainer(source, network, regularizer, config, steps)

    return Experiment(
        config,
        source,
        target,
        steps,
        splits,
        training_set,
        functools.cache(lambda: materialize(splits.validation)),
        functools.cache(lambda: materialize(splits.test)),
        trainer_of,
        loop.make_predictor(source, network),
        variables,
    )


def tune(
    experiment: Experiment, folder: Folder, console: Console
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Chooses strengths by the mean validation accuracy over seeds.

    Each regularizer is tuned with its gradient simply added, and its resolved forms
    get the same strength, so that a pair of methods differs by the rule alone. Of
    equal strengths the smaller wins.

    Returns:
      Strengths by regularizer, and the table that they were chosen from, whose first
      row is fine-tuning without a regularizer.
    """
    config = experiment.config
    open_names = [name for name in config.regularizers if name not in config.strength]
    candidates = [("fine-tuning", 0.0)] + [
        (name, strength) for name in open_names for strength in REGULARIZERS[name].grid
    ]
    cells = [
        Cell(METHODS[name], seed, strength, is_tuning=True)
        for seed in range(config.tuning_seeds or config.seeds)
        for name, strength in candidates
    ]
    results = run_cells(
        experiment,
        folder.of_tuning(),
        cells,
        experiment.validation_set,
        console,
        "tuning",
    )
    table = [
        {
            "method": name,
            "strength": strength,
            "accuracies": [
                result["accuracy"]
                for result in results
                if (result["method"], result["strength"]) == (name, strength)
            ],
        }
        for name, strength in candidates
    ]
    strengths = dict(config.strengths)
    for name in open_names:
        rows = [row for row in table if row["method"] == name]
        best = max(rows, key=lambda row: np.mean(row["accuracies"]))
        strengths[name] = best["strength"]
    return strengths, table


def test(
    experiment: Experiment,
    folder: Folder,
    strengths: dict[str, float],
    console: Console,
) -> list[dict[str, Any]]:
    """Trains every method with every seed and tests each once, at its end."""
    methods = [METHODS[name] for name in experiment.config.methods]
    cells = [
        Cell(method, seed, strengths.get(method.regularizer or "", 0.0))
        for seed in range(experiment.config.seeds)
        for method in methods
    ]
    return run_cells(experiment, folder, cells, experiment.test_set, console, "all")


def run_cells(
    experiment: Experiment,
    folder: Folder,
    cells: list[Cell],
    evaluation_set: Callable[[], data.Examples],
    console: Console,
    title: str,
) -> list[dict[str, Any]]:
    """Trains and evaluates cells that are not complete; returns all their results."""
    with progress.display(console, title, len(cells), experiment.steps) as display:
        results = []
        for cell in cells:
            result = folder.result(cell.name)
            if result is None:
                result = _run_cell(experiment, folder, cell, evaluation_set, display)
            accuracy = f"accuracy {100 * result['accuracy']:.1f}%"
            seconds = f"{result['seconds']:.0f} s"
            display.end(f"{cell.name}: {accuracy}, {seconds}")
            results.append(result)
    return results


def _run_cell(
    experiment: Experiment,
    folder: Folder,
    cell: Cell,
    evaluation_set: Callable[[], data.Examples],
    display: progress.Display,
) -> dict[str, Any]:
    """Trains from the last checkpoint, or the start, and evaluates at the end."""
    known = _known(experiment, folder, cell, display)
    state, seconds = _train_cell(experiment, folder, cell, known, display)
    started = time.monotonic()
    examples = evaluation_set()
    predicted = loop.predictions(experiment.predict, state, known, examples)
    accuracy, balanced_accuracy = accuracies(examples.labels, predicted)
    result = {
        "method": cell.method.name,
        "seed": cell.seed,
        "strength": cell.strength,
        "accuracy": accuracy,
        "balanced_accuracy": balanced_accuracy,
        "predictions": predicted,
        "seconds": seconds + time.monotonic() - started,
    }
    folder.finish(cell.name, result)
    return result


def _known(
    experiment: Experiment, folder: Folder, cell: Cell, display: progress.Display
) -> loop.Known:
    """What the regularizer of a cell has to know; estimated once for a seed."""
    name = cell.method.regularizer
    asked = REGULARIZERS[name].estimate if name else None
    if asked is None:
        return loop.Known(experiment.variables)
    question = estimates.Question(
        experiment.source,
        experiment.variables,
        experiment.training_set(cell.seed),
        len(experiment.target.class_names),
        cell.seed,
        folder.prepared / f"{asked}-seed{cell.seed}",
    )
    if not estimates.is_known(question):
        display.say(f"{cell.name}: measuring the {asked.replace('_', ' ')} first")
    return loop.Known(experiment.variables, estimates.estimate(asked, question))


def _views(experiment: Experiment, folder: Folder, cell: Cell) -> grain.MapDataset:
    """The training images of a cell, with what the teacher makes of them if needed."""
    views = data.views(experiment.training_set(cell.seed))
    name = cell.method.regularizer
    has_teacher = name is not None and REGULARIZERS[name].has_teacher
    if not (has_teacher and experiment.config.cache_teacher):
        return views
    see = jax.jit(functools.partial(loop.look, experiment.source))
    return teacher_cache.cache_features(
        folder.prepared / f"teacher-seed{cell.seed}",
        views,
        lambda batch: see(experiment.variables, batch["image"]),
        teacher=experiment.variables,
        layers=loop.teacher_layers(experiment.source),
        progress=False,  # there is a display already
    )


def _train_cell(
    experiment: Experiment,
    folder: Folder,
    cell: Cell,
    known: loop.Known,
    display: progress.Display,
) -> tuple[loop.State, float]:
    """Returns the trained state, and the seconds that training it took in all."""
    config = experiment.config
    started = time.monotonic()
    trainer = experiment.trainer(cell.method.regularizer)
    classes = len(experiment.target.class_names)
    variables = loop.starting_variables(
        experiment.source, classes, cell.seed, cell.method
    )
    state = trainer.init(variables, cell.method, cell.strength)
    views = _views(experiment, folder, cell)
    batches = data.training_batches(views, config.batch_size, cell.seed)
    with (
        folder.checkpoints(cell.name, config.checkpoint_every) as checkpoints,
        stop_signals() as received,
    ):
        if (latest := checkpoints.latest_step()) is not None:
            template = ocp.args.StandardRestore(_arrays(state))
            state = state.replace(**checkpoints.restore(latest, args=template))
        begin = int(state.step)
        started -= folder.rewind(cell.name, begin)
        display.begin(cell.name, begin, experiment.steps)
        training = loop.train(
            trainer,
            state,
            batches,
            known,
            loop.training_key(cell.seed),
            experiment.steps,
        )
        with folder.metrics_path.open("a") as file:
            before = time.monotonic()
            for step, (state, metrics) in enumerate(training, start=begin + 1):
                numbers = {key: x.item() for key, x in jax.device_get(metrics).items()}
                now = time.monotonic()
                line = {
                    "cell": cell.name,
                    "method": cell.method.name,
                    "seed": cell.seed,
                    "step": step,
                    **numbers,
                    "images_per_second": config.batch_size / (now - before),
                    "seconds": now - started,
                }
                before = now
                file.write(json.dumps(line) + "\n")
                file.flush()
                display.update(line)
                if step == experiment.steps:
                    break
                stop = bool(received)
                arrays = ocp.args.StandardSave(_arrays(state))
                checkpoints.save(step, args=arrays, force=stop)
                if stop:
                    raise Interrupted(received[0])
    return state, time.monotonic() - started


def _arrays(state: loop.State) -> dict[str, Any]:
    """What of a state is saved; the rest of it is functions."""
    names = ("step", "params", "opt_state", "batch_stats")
    return {name: getattr(state, name) for name in names}
