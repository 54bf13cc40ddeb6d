"""Whether a regularizer's part of every single step works against the loss."""

import functools
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float
from rich.console import Console

from dtnh_jax import first_order_harm
from dtnh_jax.finetune.runs.interrupt import Interrupted, stop_signals
from dtnh_jax.studies.matrix import cells as grid
from dtnh_jax.studies.matrix import progress, records, training
from dtnh_jax.studies.matrix.catalogue import ALONE
from dtnh_jax.studies.matrix.cells import Cell, Record, Records
from dtnh_jax.studies.matrix.rules import OPTIMIZERS
from dtnh_jax.studies.matrix.study import Study, setting
from dtnh_jax.studies.matrix.tables import grouped


class Seen(NamedTuple):
    """What the regularizer's part of a step does to the loss, at every step.

    The part is the applied update minus that of the same optimizer that was given the
    gradients of the loss alone, at the same parameters, from the first step on. So what
    momentum keeps of earlier parts is in it.
    """

    harm: Bool[Array, "*steps"]  # it raises the loss of the batch to first order
    fresh_harm: Bool[Array, "*steps"]  # and that of the next batch
    # The loss after the step minus that after the step without the part.
    change: Float[Array, "*steps"]
    fresh_change: Float[Array, "*steps"]


@functools.cache
def make_probe(parts: training.Parts, optimizer: str) -> Any:
    """Returns a compiled step that also returns what its regularizer did.

    Args:
      parts: of the training.
      optimizer: one of `OPTIMIZERS`, the one that the training has.

    Returns:
      A function of (state, state of the optimizer that sees the loss alone, data,
      parameters of the source, settings) to both states and `Seen`. The states are
      donated.
    """
    alone = OPTIMIZERS[optimizer]()

    def step(state, shadow, data, source_params, settings):
        params, scale = state.params, parts.rate(state, settings)
        rows = data.order[state.step]
        others = data.order[(state.step + 1) % len(data.order)]
        pair, batch_stats = parts.gradients(state, rows, data, source_params)
        fresh = jax.grad(parts.loss)(params, state, others, data)
        new_state, updates = parts.advance(state, pair, settings)
        without, shadow = alone.update(pair.loss, shadow, params)
        without = jax.tree.map(lambda x: scale * x, without)
        other_params = optax.apply_updates(params, without)

        def change(rows):
            with_part = parts.loss(new_state.params, state, rows, data)
            return with_part - parts.loss(other_params, state, rows, data)

        seen = Seen(
            _is_harm(pair.loss, updates, without),
            _is_harm(fresh, updates, without),
            change(rows),
            change(others),
        )
        return new_state._replace(batch_stats=batch_stats), shadow, seen

    return jax.jit(step, donate_argnums=(0, 1))


def _is_harm(grads: Any, updates: Any, without: Any) -> Bool[Array, ""]:
    """Whether an update is worse than another, by more than rounding can make it."""
    total = jax.tree.map(
        lambda g, new, old: jnp.sum(jnp.abs(g) * (jnp.abs(new) + jnp.abs(old))),
        *(grads, updates, without),
    )
    rounding = 2.0**-20 * optax.tree.sum(total)
    return first_order_harm(grads, updates, without) > rounding


def todo(study: Study, trained: Records, done: Records) -> Iterator[Cell]:
    """Yields the cells of a configuration whose steps are not known yet.

    Args:
      study: of the configuration.
      trained: what learning rates are chosen from.
      done: cells whose steps are known.
    """
    config = study.config
    for seed in range(config.seeds):
        for pair, optimizer in itertools.product(grid.pairs(config), config.optimizers):
            rate = grid.chosen_rate(trained, *pair, optimizer)
            assert rate is not None  # the grid was trained first
            for cell in grid.grid_cells(config, *pair, optimizer, rate, seed):
                if cell.regularizer != ALONE and cell not in done:
                    yield cell


def run(study: Study, folder: pathlib.Path, console: Console) -> None:
    """Trains the cells of a configuration once more, and keeps what steps did.

    Raises:
      Interrupted: a signal came; the cell in training was finished.
    """
    trained, path = records.read(folder / "cells.jsonl"), folder / "harm.jsonl"
    path.touch()
    done = records.read(path)
    cells = list(todo(study, trained, done))
    with (
        stop_signals() as received,
        progress.display(console, len(cells), 0) as show,
    ):
        for cell in cells:
            record = run_cell(study, cell)
            records.append(path, record)
            show(cell.name, f"harm at {100 * record['harm']:.0f}% of steps")
            if received:
                raise Interrupted(received[0])


def run_cell(study: Study, cell: Cell) -> Record:
    """Trains a cell, and says what the regularizer's part of its steps did.

    Returns:
      The fields of the cell, and over its steps: shares with `harm` and `fresh_harm`;
      shares where the loss is higher with the part, `raised` and `fresh_raised`, or
      not a number; medians of the differences, `change` and `fresh_change`, None where
      training diverged.
    """
    start = setting(study, cell)
    family = study.family(cell.source, cell.target)
    parts = family.parts(cell.regularizer, cell.rule, cell.optimizer)
    probe = make_probe(parts, cell.optimizer)
    state = start.trainer.init(start.variables)
    shadow = OPTIMIZERS[cell.optimizer]().init(state.params)
    found = []
    for _ in range(len(start.data.order)):
        state, shadow, seen = probe(
            state, shadow, start.data, start.source_params, start.settings
        )
        found.append(seen)
    columns = [np.stack(column) for column in zip(*jax.device_get(found))]
    harm, fresh_harm, change, fresh_change = columns

    def median(changes: np.ndarray) -> float | None:
        value = float(np.median(changes))
        return value if np.isfinite(value) else None

    return {
        **cell._asdict(),
        "harm": float(np.mean(harm)),
        "fresh_harm": float(np.mean(fresh_harm)),
        "raised": float(np.mean(~(change <= 0))),
        "fresh_raised": float(np.mean(~(fresh_change <= 0))),
        "change": median(change),
        "fresh_change": median(fresh_change),
    }


def summarize(found: Records) -> list[dict[str, Any]]:
    """Means of shares and medians of changes, by rule and optimizer."""
    shares = ("harm", "fresh_harm", "raised", "fresh_raised")
    rows = []
    for (rule, optimizer), members in grouped(
        ((cell.rule, cell.optimizer), record) for cell, record in found.items()
    ):
        changes = {
            key: [record[key] for record in members if record[key] is not None]
            for key in ("change", "fresh_change")
        }
        rows.append(
            {
                "rule": rule,
                "optimizer": optimizer,
                "cells": len(members),
                **{k: float(np.mean([r[k] for r in members])) for k in shares},
                **{k: float(np.median(v)) if v else None for k, v in changes.items()},
            }
        )
    return rows
