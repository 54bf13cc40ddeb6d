"""Trains and measures cells, each a method at a strength with a seed."""

import json
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from safetensors.numpy import load_file, save_file

from dtnh_jax.finetune.runs import progress
from dtnh_jax.finetune.runs.folder import Folder
from dtnh_jax.finetune.runs.interrupt import Interrupted, stop_signals
from dtnh_jax.finetune.training import meshes
from dtnh_jax.lm import networks
from dtnh_jax.lm.experiment import Experiment, initial_adapters
from dtnh_jax.lm.methods import METHODS, Method
from dtnh_jax.lm.networks import Tree
from dtnh_jax.lm.packing import Stream
from dtnh_jax.lm.programs import Program
from dtnh_jax.lm.step import State


class NotFiniteError(ArithmeticError):
    """Losses or gradients of a training are not finite."""


class Cell(NamedTuple):
    """One training, or a change of another one's result."""

    method: Method
    strength: float
    seed: int

    @property
    def name(self) -> str:
        """The name in files and lines of metrics."""
        has_strength = self.method.strengths != (0.0,)
        strength = f"-{self.strength:g}" if has_strength else ""
        return f"{self.method.name}{strength}-seed{self.seed}"


def all_cells(experiment: Experiment) -> list[Cell]:
    """Returns all cells of a run, each after the cell whose result it uses."""
    config = experiment.config
    methods = sorted(
        (METHODS[name] for name in config.methods),
        key=lambda method: method.after is not None,
    )
    return [
        Cell(method, strength, seed)
        for seed in range(config.seeds)
        for method in methods
        for strength in config.strengths_of(method.name)
    ]


def run_cells(
    experiment: Experiment, folder: Folder, console: Console
) -> list[dict[str, Any]]:
    """Runs incomplete cells; returns the results of all cells."""
    cells, steps = all_cells(experiment), experiment.config.steps
    results = []
    with (
        stop_signals() as received,
        progress.display(console, "Fine-tuning", len(cells), steps) as display,
    ):
        for cell in cells:
            result = folder.result(cell.name)
            if result is None:
                result = _run(experiment, folder, cell, display, received)
                folder.finish(cell.name, result)
            losses = ", ".join(
                f"{kind} {result[f'{kind}_loss']:.3f}" for kind in ("target", "kept")
            )
            display.end(f"{cell.name}: loss {losses}, {result['seconds']:.0f} s")
            results.append(result)
    return results


def base_result(experiment: Experiment, folder: Folder) -> dict[str, Any]:
    """Returns the measurements of the base model."""
    result = folder.result("base")
    if result is None:
        adapters = networks.scaled(initial_adapters(experiment, 0), 0.0)
        result = experiment.evaluate(adapters, experiment.splits)
        folder.finish("base", result)
    return result


def _run(
    experiment: Experiment,
    folder: Folder,
    cell: Cell,
    display: progress.Display,
    received: list[int],
) -> dict[str, Any]:
    started = time.monotonic()
    if cell.method.after is not None:
        adapters = networks.scaled(_load(experiment, folder, cell), 1 - cell.strength)
        measured = {}
    else:
        folder.rewind(cell.name, 0)
        adapters, measured = _train(experiment, folder, cell, display, received)
        _save(folder, cell, adapters)
    losses = experiment.evaluate(adapters, experiment.splits)
    _check_finite(losses, cell, "after training")
    return {
        "method": cell.method.name,
        "strength": cell.strength,
        "seed": cell.seed,
        **losses,
        **measured,
        "seconds": time.monotonic() - started,
    }


def _train(
    experiment: Experiment,
    folder: Folder,
    cell: Cell,
    display: progress.Display,
    received: list[int],
) -> tuple[Tree, dict[str, Any]]:
    """Returns trained adapters, and time and memory of a step."""
    config = experiment.config
    _, programs = experiment.trainers[cell.method.name]
    state = initial_state(experiment, cell)
    strength = jnp.float32(cell.strength)
    seconds: dict[bool, list[float]] = {}
    memory: list[int] = []
    display.begin(cell.name, 0, config.steps)
    with folder.metrics_path.open("a") as file:
        begun = time.monotonic()
        for number, (rows, held_out) in enumerate(_batches(experiment, cell)):
            numbers, took, h = {}, 0.0, None
            if held_out is not None:
                args = (state.adapters, experiment.base, held_out)
                program = experiment.held_out.get(*args)
                (metrics, h), took = _timed(program, args, memory)
                numbers |= metrics
            args = (state, experiment.base, strength, rows, h)
            (state, metrics), more = _timed(programs.get(*args), args, memory)
            took += more
            numbers |= metrics
            numbers = {key: float(x) for key, x in jax.device_get(numbers).items()}
            seconds.setdefault(held_out is not None, []).append(took)
            _check_finite(numbers, cell, f"at step {number + 1}")
            line = {
                "cell": cell.name,
                "method": cell.method.name,
                "seed": cell.seed,
                "step": number + 1,
                **numbers,
                "tokens_per_second": rows.weights.size / took,
                "seconds": time.monotonic() - begun,
            }
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            display.update(line)
            if received:
                raise Interrupted(received[0])
    medians = {kind: statistics.median(each) for kind, each in seconds.items()}
    count = sum(map(len, seconds.values()))
    mean = sum(medians[kind] * len(each) for kind, each in seconds.items()) / count
    measured = {"step_seconds": mean, "temporary_bytes": max(memory, default=None)}
    return state.adapters, measured


def initial_state(experiment: Experiment, cell: Cell) -> State:
    """Returns the initial state of a cell's training."""
    trainer, _ = experiment.trainers[cell.method.name]
    init = jax.jit(
        lambda adapters: meshes.constrain(
            experiment.mesh, trainer.init(adapters, cell.strength)
        )
    )
    return init(initial_adapters(experiment, cell.seed))


def _check_finite(numbers: Mapping[str, float], cell: Cell, when: str) -> None:
    if not np.isfinite(list(numbers.values())).all():
        raise NotFiniteError(
            f"{cell.name} has numbers that are not finite {when}: set a lower "
            "`--learning-rate` or strength"
        )


def _timed(program: Program, args: Any, memory: list[int]) -> tuple[Any, float]:
    """Runs a program; returns its result and seconds, and notes its memory."""
    memory += [] if program.temporary is None else [program.temporary]
    before = time.monotonic()
    result = jax.block_until_ready(program.call(*args))
    return result, time.monotonic() - before


def _batches(experiment: Experiment, cell: Cell) -> Iterator[tuple[Any, Any]]:
    """Yields the rows of every step, and held-out rows if the method needs them."""
    config, splits = experiment.config, experiment.splits
    train = Stream(splits.train, config.batch_size, cell.seed)
    held_out = Stream(splits.held_out, config.batch_size, cell.seed)
    for step in range(config.steps):
        rows, others = meshes.place_rows(experiment.mesh, train[step]), None
        if cell.method.has_held_out and step % config.held_out_every == 0:
            others = held_out[step // config.held_out_every]
            others = meshes.place_rows(experiment.mesh, others)
        yield rows, others


def _path(folder: Folder, method: str, seed: int, strength: float) -> Any:
    name = Cell(METHODS[method], strength, seed).name
    return folder.path / "adapters" / f"{name}.safetensors"


def _save(folder: Folder, cell: Cell, adapters: Tree) -> None:
    """Saves trained adapters by the paths of their leaves."""
    path = _path(folder, cell.method.name, cell.seed, cell.strength)
    path.parent.mkdir(exist_ok=True)
    named = {_key(at): x for at, x in jax.tree.leaves_with_path(adapters)}
    save_file(jax.device_get(named), path)


def _key(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _load(experiment: Experiment, folder: Folder, cell: Cell) -> Tree:
    """Loads the adapters of another method with the same seed."""
    after = METHODS[str(cell.method.after)]
    named = load_file(_path(folder, after.name, cell.seed, after.strengths[0]))
    like = experiment.network.adapters
    found = [named[_key(at)] for at, _ in jax.tree.leaves_with_path(like)]
    adapters = jax.tree.unflatten(jax.tree.structure(like), found)
    return meshes.place(experiment.mesh, adapters)
