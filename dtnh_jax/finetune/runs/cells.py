"""Trains and evaluates cells, each a method with a seed; resumes unfinished ones."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np
import orbax.checkpoint as ocp
from rich.console import Console

from dtnh_jax import TrustChoice, smooth_accuracy
from dtnh_jax.finetune.data import loading
from dtnh_jax.finetune.methods import Method
from dtnh_jax.finetune.runs import (
    checkpoints,
    preparation,
    processes,
    progress,
    race,
    tensorboard,
    trained,
)
from dtnh_jax.finetune.runs.folder import Folder
from dtnh_jax.finetune.runs.interrupt import Interrupted
from dtnh_jax.finetune.runs.preparation import Experiment
from dtnh_jax.finetune.runs.statistics import accuracies
from dtnh_jax.finetune.training import loop

_EVALUATED_TOGETHER = 100  # photographs, rounded up to a multiple that fits the mesh


class Cell(NamedTuple):
    """One training: a method, its strength and a seed."""

    method: Method
    seed: int
    strength: float = 0.0
    is_tuning: bool = False
    trust: float | None = None  # of `never_hurt`, once it is chosen
    fold: int | None = None  # the held-out fold, while trust is chosen

    @property
    def name(self) -> str:
        """The name in files and lines of metrics."""
        name = self.method.name
        if self.is_tuning:
            name += f"-{self.strength:g}"
        if self.fold is not None:
            name += f"-trust{self.trust:g}-fold{self.fold}"
        return f"{name}-seed{self.seed}"


def run_cells(
    experiment: Experiment,
    folder: Folder,
    cells: list[Cell],
    evaluation_set: Callable[[], loading.Examples],
    console: Console,
    title: str,
) -> list[dict[str, Any]]:
    """Trains and evaluates incomplete cells; returns the results of all cells."""
    total = sum(
        1 + (race.MOST_TRAININGS if cell.method.never_hurts else 0) for cell in cells
    )
    with (
        progress.display(console, title, total, experiment.steps) as shown,
        _logging(shown, folder) as display,
    ):
        return [
            _result(experiment, folder, cell, evaluation_set, display) for cell in cells
        ]


def _result(
    experiment: Experiment,
    folder: Folder,
    cell: Cell,
    evaluation_set: Callable[[], loading.Examples],
    display: progress.Display,
) -> dict[str, Any]:
    """Returns the result of a cell, after training it unless it is complete."""
    result = processes.on_first(lambda: folder.result(cell.name))
    is_open = cell.method.never_hurts and cell.trust is None
    if result is None and is_open:
        choice, seconds = _race(experiment, folder.of_race(), cell, display)
        cell = cell._replace(trust=choice.trust)
        result = _run_cell(
            experiment,
            folder,
            cell,
            evaluation_set,
            display,
            {"trust": choice.trust, "trainings": choice.trainings + 1},
            seconds,
        )
    elif result is None:
        result = _run_cell(experiment, folder, cell, evaluation_set, display)
    elif is_open:
        display.skip(race.MOST_TRAININGS)
    text = f"{cell.name}: accuracy {100 * result['accuracy']:.1f}%"
    if "trainings" in result:
        text += f" with trust {result['trust']:g}, {result['trainings']} trainings"
    display.end(f"{text}, {result['seconds']:.0f} s")
    return result


def _race(
    experiment: Experiment, folder: Folder, cell: Cell, display: progress.Display
) -> tuple[TrustChoice, float]:
    """Chooses the trust of a cell; returns the choice and its duration in seconds."""
    labels, seconds = experiment.training_set(cell.seed).labels, []

    def train(trust: float, fold: int) -> np.ndarray:
        def held_out_set() -> loading.Examples:
            return experiment.held_out_set(cell.seed, fold)

        one = cell._replace(trust=trust, fold=fold)
        result = _result(experiment, folder, one, held_out_set, display)
        seconds.append(result["seconds"])
        return np.array(result["scores"])

    choice = race.choose(labels, cell.seed, train)
    display.skip(race.MOST_TRAININGS - len(seconds))
    return choice, sum(seconds)


def _logging(
    shown: progress.Display, folder: Folder
) -> contextlib.AbstractContextManager[progress.Display]:
    """Also logs the displayed metrics for TensorBoard, in the process that writes."""
    if not processes.is_first():
        return contextlib.nullcontext(shown)
    return tensorboard.logging(shown, folder.path / "tensorboard")


def _run_cell(
    experiment: Experiment,
    folder: Folder,
    cell: Cell,
    evaluation_set: Callable[[], loading.Examples],
    display: progress.Display,
    chosen: Mapping[str, Any] = MappingProxyType({}),
    seconds_before: float = 0.0,
) -> dict[str, Any]:
    """Trains from the last checkpoint or from the start, and evaluates at the end."""
    known = preparation.known(
        experiment, folder, cell.method, cell.seed, display, cell.fold
    )
    state, seconds = _train_cell(experiment, folder, cell, known, display)
    started = time.monotonic()
    examples = evaluation_set()
    devices = experiment.mesh.size
    together = -(-_EVALUATED_TOGETHER // devices) * devices
    logits = loop.logits_of(experiment.predict, state, known, examples, together)
    predicted = logits.argmax(axis=1).tolist()
    if cell.fold is not None:
        scores = smooth_accuracy(np.nan_to_num(logits), examples.labels)
        chosen = {"trust": cell.trust, "scores": scores.tolist()}
    accuracy, balanced_accuracy = accuracies(examples.labels, predicted)
    result = {
        "method": cell.method.name,
        "seed": cell.seed,
        "strength": cell.strength,
        **chosen,
        "accuracy": accuracy,
        "balanced_accuracy": balanced_accuracy,
        "predictions": predicted,
        "seconds": seconds_before + seconds + time.monotonic() - started,
    }
    is_last = not cell.is_tuning and cell.fold is None
    if experiment.config.keep_weights and is_last:
        trained.keep(
            experiment,
            folder.path,
            cell.method,
            cell.strength,
            cell.seed,
            state,
            known,
        )
    processes.on_first(lambda: folder.finish(cell.name, result))
    return result


def _train_cell(
    experiment: Experiment,
    folder: Folder,
    cell: Cell,
    known: loop.Known,
    display: progress.Display,
) -> tuple[loop.State, float]:
    """Returns the trained state and the total training time in seconds."""
    config = experiment.config
    started = time.monotonic()
    trainer = experiment.trainer(cell.method)
    classes = len(experiment.target.class_names)
    variables = loop.starting_variables(
        experiment.source, classes, cell.seed, cell.method
    )
    state = trainer.init(variables, cell.method, cell.strength, cell.trust or 0.0)
    batches = preparation.batches(experiment, folder, cell.method, cell.seed, cell.fold)
    path = folder.checkpoints(cell.name)
    newest, warnings = processes.on_first(lambda: checkpoints.newest_whole(path))
    for warning in warnings:
        display.say(f"{cell.name}: {warning}")
    with (
        checkpoints.open_checkpoints(path, config.checkpoint_every) as manager,
        processes.stop_requests() as stop_at,
    ):
        if newest is not None:
            template = ocp.args.StandardRestore(_arrays(state))
            state = state.replace(**manager.restore(newest, args=template))
        begin = int(state.step) // config.accumulate
        started -= processes.on_first(lambda: folder.rewind(cell.name, begin))
        display.begin(cell.name, begin, experiment.steps)
        training = loop.train(
            trainer,
            state,
            batches,
            known,
            loop.training_key(cell.seed),
            experiment.steps,
            config.accumulate,
        )
        with _metrics_file(folder) as file:
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
                if file:
                    file.write(_as_json(line) + "\n")
                    file.flush()
                display.update(line)
                if step == experiment.steps:
                    break
                received = stop_at()
                # Lines are on disk before their checkpoint; the first step has one.
                is_due = step % config.checkpoint_every == 0 or step == begin + 1
                if file and (is_due or received is not None):
                    os.fsync(file.fileno())
                checkpoints.save(
                    manager, step, _arrays(state), force=received is not None
                )
                if received is not None:
                    raise Interrupted(received)
    return state, time.monotonic() - started


@contextlib.contextmanager
def _metrics_file(folder: Folder) -> Iterator[TextIO | None]:
    """Opens the file of metrics in the process that writes it."""
    if not processes.is_first():
        yield None
        return
    with folder.metrics_path.open("a") as file:
        yield file


def _as_json(line: dict[str, Any]) -> str:
    """Returns a line of metrics as JSON, with null for numbers that are not finite."""
    finite = {
        key: None if isinstance(x, float) and not math.isfinite(x) else x
        for key, x in line.items()
    }
    return json.dumps(finite, allow_nan=False)


def _arrays(state: loop.State) -> dict[str, Any]:
    """Returns the arrays of a state, which are saved; the rest are functions."""
    names = ("step", "params", "opt_state", "batch_stats", "skipped")
    return {name: getattr(state, name) for name in names}
