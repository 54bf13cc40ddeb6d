"""What a step of `dtnh lm` costs: beside plain adapters, and beside the KL sum."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from dtnh_jax.finetune.training import meshes
from dtnh_jax.lm import cells, experiment
from dtnh_jax.lm.cells import Cell
from dtnh_jax.lm.config import Config
from dtnh_jax.lm.experiment import Experiment
from dtnh_jax.lm.methods import DECAY, DTNH, KL, LORA, METHODS, NEVER_HURT
from dtnh_jax.lm.packing import Stream
from dtnh_jax.studies.benchmarks.programs import exactly
from dtnh_jax.studies.benchmarks.rows import Row, one, timed
from dtnh_jax.studies.benchmarks.timing import interleaved

GROUP = "language"
# Of the KL sum. Its floor is 4/3: a forward and a backward pass, the reference's
# forward pass, and one more backward pass.
_TARGET = 1.4
_RESOLVED, _LEARNED = f"{KL}+{DTNH}", f"{KL}+{NEVER_HURT}"
_JUDGE = "gradient of held-out text"
_EVERY = (1, 4)  # steps from one such gradient to the next
NAMES = (LORA, KL, _RESOLVED, _LEARNED, DECAY)


def measure(
    model: str, target: str, kept: str, tokens: Sequence[int], rounds: int
) -> list[Row]:
    """Times and temporary memory of a step of each method, and their ratios.

    Args:
      model: as `dtnh lm --model`.
      target: as `--target`.
      kept: as `--kept`.
      tokens: rows of a batch, and tokens of a row.
      rounds: how often everything is timed, in turn.
    """
    batch, context = tokens
    config = Config(
        model=model,
        target=target,
        kept=kept,
        methods=NAMES,
        batch_size=batch,
        context=context,
        test_rows=1,
    )
    prepared = experiment.prepare(config)
    subject = f"{prepared.model.name}, {batch} x {context} tokens"
    calls, sizes = _steps(prepared)
    seconds = dict(interleaved(calls, rounds))
    for every in _EVERY:
        seconds[_learned(every)] = seconds[_LEARNED] + seconds[_JUDGE] / every
    comparisons = {
        KL: [one(LORA)],
        _RESOLVED: [one(KL, _TARGET), one(LORA)],
        _LEARNED: [one(KL, _TARGET), one(LORA)],
        **{_learned(every): [one(KL), one(LORA)] for every in _EVERY},
        DECAY: [one(LORA)],
    }
    return timed(GROUP, subject, seconds, comparisons) + _memory(subject, sizes)


def _steps(
    prepared: Experiment,
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """Returns a training step for each method, and MB that it needs."""
    config = prepared.config
    rows = meshes.place_rows(
        prepared.mesh, Stream(prepared.splits.train, config.batch_size, 0)[0]
    )
    calls: dict[str, Callable[[], Any]] = {}
    sizes: dict[str, float] = {}

    def add(name: str, programs: Any, args: tuple[Any, ...], state: Any = None) -> None:
        after = () if state is None else (state,)
        program = programs.get(*after, *args)
        if program.temporary is not None:
            sizes[name] = 1e-6 * program.temporary

        def call():
            nonlocal after
            result, last = program.call(*after, *args)
            after = (result,) if after else ()
            return last

        calls[name] = call

    for name in config.methods:
        _, programs = prepared.trainers[name]
        strength = config.strengths_of(name)[0]
        state = cells.initial_state(prepared, Cell(METHODS[name], strength, 0))
        args = prepared.base, jnp.float32(strength), rows, None
        add(name, programs, args, state)
    adapters = experiment.initial_adapters(prepared, 0)
    add(_JUDGE, prepared.held_out, (adapters, prepared.base, rows))
    return calls, sizes


def _memory(subject: str, sizes: dict[str, Any]) -> list[Row]:
    """Rows of what a step needs beside its arguments, as the compiler knows it."""
    # A plain step needs its activations, and little beside them.
    double = f"{KL} and {LORA}"
    known = {**sizes, double: sizes.get(KL, 0.0) + sizes.get(LORA, 0.0)}
    against = {
        KL: [(LORA, None)],
        _RESOLVED: [(KL, None), (double, 1.0)],
        _LEARNED: [(KL, None), (double, 1.0)],
        DECAY: [(LORA, None)],
    }
    rows = []
    for name, size in sizes.items():
        group = f"{GROUP}: temporary memory"
        row = Row(group, subject, name, exactly(size), "MB")
        if name not in against:
            rows.append(row)
        for other, target in against.get(name, ()):
            ratio = exactly(size / known[other])
            rows.append(row._replace(against=other, ratio=ratio, target=target))
    return rows


def _learned(every: int) -> str:
    return f"{_LEARNED}, held out every {every}"
