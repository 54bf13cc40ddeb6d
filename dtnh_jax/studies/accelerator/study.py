"""Runs the whole study in order of importance, within a time limit."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from dtnh_jax.studies.accelerator import (
    contest,
    devices,
    language,
    llama,
    machine,
    programs,
    resnet,
    steps,
    tracing,
    transformation,
)
from dtnh_jax.studies.accelerator.contest import Contest
from dtnh_jax.studies.accelerator.rows import Results, Row
from dtnh_jax.studies.accelerator.timing import Clock

_ALONE = "compilation alone"
_FIRST = ("plain",)  # whose compilation tunes kernels for all others
_CORE = ("plain", "pull sum", "pull DTNH", "sum", "DTNH")
_EXTRA = ("plain", "sum", "DTNH", "refreshed", "held out")
_ALL = (*_CORE, *_EXTRA[3:])


class Scale(NamedTuple):
    """The sizes of networks, data and contests."""

    copied: int = 400_000_000
    side: int = 8192
    sizes: tuple[int, ...] = (100_000_000, 400_000_000, 10_000_000)
    resnet: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    language: dict[str, Any] = {}  # noqa: RUF012
    lora: tuple[bool, ...] = (False, True)  # ways to train the language model
    updates: int = 20  # in a profile
    seconds: float = 6.0  # for the times of one contest of steps, at most
    alone: int = 50  # programs that are compiled once more, at most
    reserve: float = 25.0  # seconds that are kept for profiles


# Every code path in little time; the numbers mean nothing.
TINY = Scale(
    copied=10_000,
    side=32,
    sizes=(2_000, 4_000, 1_000),
    resnet={"blocks": (1,), "width": 4, "classes": 3, "batch": 2, "pixels": 8},
    language={
        "size": llama.Size(2, 12, 2, 1, 16, 11), "batch": 2, "tokens": 6, "rank": 2
    },
    updates=2,
    alone=1,
    seconds=0.2,
    reserve=5.0,
)  # fmt: skip


class Wave(NamedTuple):
    """Programs that are compiled together, and then timed."""

    compiled: list[Contest]
    timed: list[Contest]
    least: float  # seconds that must be left to start


def has_accelerator() -> bool:
    """Returns whether JAX's default device is not the host."""
    return jax.default_backend() != "cpu"


def run(
    folder: pathlib.Path,
    *,
    seconds: float,
    workers: int,
    scale: Scale = Scale(),  # noqa: B008  (a tuple)
    dtypes: Sequence[str] = devices.DTYPES,
    rest: bool = False,
) -> Results:
    """Runs all waves, and writes results to a folder after each.

    Args:
      folder: folder for the results.
      seconds: time limit. Rows that no longer fit are listed as skipped.
      workers: number of programs that are compiled at once.
      scale: the sizes of everything.
      dtypes: dtypes of parameters and gradients.
      rest: start with the rows that an interrupted run lacks: refreshed weights,
        held-out gradients and small sizes.
    """
    clock = Clock(seconds)
    limits = {"seconds": seconds, "compiled at once": workers}
    results = Results(folder, devices.about() | limits)
    waves, profiles = _plan(results, scale, dtypes, rest)
    found: programs.Found = {}
    for number, wave in enumerate(waves, 1):
        left = clock.left() - scale.reserve
        if left < wave.least:
            _skip(results, wave, f"{max(left, 0):.0f} s left, {wave.least:.0f} needed")
            continue
        jobs = [program for each in wave.compiled for program in each.programs()]
        # The rest is kept for the times.
        programs.compile_all(jobs, found, workers=workers, seconds=0.8 * left)
        print(f"wave {number} compiled at {clock.passed():.0f} s", flush=True)
        for place, each in enumerate(wave.timed):
            left = clock.left() - scale.reserve
            fair = max(left, 0.0) / (len(wave.timed) - place)
            _measure(each, found, results, min(scale.seconds, 0.7 * fair))
        print(f"wave {number} ended at {clock.passed():.0f} s", flush=True)
    for each, name in profiles:
        if clock.left() < 0.2 * scale.reserve:
            row = results.row(tracing.GROUP, f"{each.group}: {name}", each.dtype)
            results.skip(row, f"{clock.left():.0f} s left")
            continue
        tracing.measure(each, name, found, results, scale.updates)
    _alone(waves, found, results, clock, scale.alone)
    results.about["took seconds"] = round(clock.passed(), 1)
    results.about["most bytes in use"] = contest.peak_in_use()
    results.write()
    return results


def _plan(
    results: Results, scale: Scale, dtypes: Sequence[str], rest: bool
) -> tuple[list[Wave], list[tuple[Contest, str]]]:
    """Builds all contests, lists their rows, and puts them in order."""
    ceilings = [machine.contest(scale.copied, scale.side, each) for each in dtypes]
    alone = {
        (size, dtype): transformation.contest(
            size, dtype, lambda dtype=dtype: machine.bandwidth(results, dtype)
        )
        for size in scale.sizes
        for dtype in dtypes
    }
    most, largest, _ = scale.sizes
    core = [
        alone[size, dtype].only(transformation.CORE)
        for size in (most, largest)
        for dtype in dtypes
    ]
    scopes = [alone[most, dtype] for dtype in dtypes]
    small = [alone[scale.sizes[2], dtype].only(transformation.CORE) for dtype in dtypes]

    def contests(make, options):
        made = []
        for each in options:
            try:
                task = make(**each)
                made.append((task, steps.contest(task, _ALL)))
            except Exception as error:  # one network must not end the others
                name = f"{make.__module__.rpartition('.')[2]} {each}"
                reason = f"{type(error).__name__}: {programs.first_line(error)}"
                results.skip(results.row(name, "all rows", each["dtype"]), reason)
        return made

    images = contests(resnet.task, [{"dtype": d, **scale.resnet} for d in dtypes])
    texts = contests(
        language.task,
        [
            {"dtype": dtype, "lora": lora, **scale.language}
            for dtype in dtypes
            for lora in scale.lora
        ],
    )

    def some(pairs, methods):
        return [
            each.only([steps.names(task).get(m, "") for m in methods])
            for task, each in pairs
        ]

    waves = [
        Wave([*ceilings, *core], [*ceilings, *core], 10),
        Wave(
            [*some([*images, *texts], _FIRST), *some(texts, _CORE)],
            some(texts, _CORE),
            30,
        ),
        Wave(some(images, _CORE), some(images, _CORE), 30),
        Wave(scopes, scopes, 10),
        Wave(some(images, _EXTRA), some(images, _EXTRA), 30),
        Wave(some(texts, _EXTRA), some(texts, _EXTRA), 30),
        Wave(small, small, 10),
    ]
    if rest:
        first = [*ceilings, *small, *scopes, *some(texts, _EXTRA)]
        waves = [
            Wave([*some(images, _FIRST), *first], first, 30),
            Wave(some(images, _EXTRA), some(images, _EXTRA), 30),
        ]
    profiles = [
        (each, transformation.GLOBAL) for each in (*core[: len(dtypes)], *small)
    ]
    profiles += [(each, steps.names(task)["DTNH"]) for task, each in texts[-1:]]
    order = [
        *ceilings,
        *scopes,
        *core,
        *small,
        *(each for _, each in [*images, *texts]),
    ]
    results.plan(row for each in order for row in each.planned())
    results.plan(
        Row(tracing.GROUP, f"{each.group}: {name}", each.dtype)
        for each, name in profiles
    )
    return waves, profiles


def _alone(
    waves: Sequence[Wave],
    found: programs.Found,
    results: Results,
    clock: Clock,
    count: int,
) -> None:
    """Compiles programs again, one at a time, to measure the time of a compilation.

    Uses the remaining time; kernels that are already tuned are not tuned again.
    """
    order = [each for wave in waves[1:3] for each in wave.timed[::-1]]
    jobs = [(each, program) for each in order for program in each.programs()]
    for each, program in jobs[:count]:
        known = found.get(program.key)
        if isinstance(known, str) or known is None:
            continue
        row = results.row(_ALONE, f"{each.group}: {program.key[2]}", each.dtype)
        if clock.left() < known.trace_seconds + known.compile_seconds + 2:
            results.skip(row, f"{max(clock.left(), 0):.0f} s left")
            continue
        jax.clear_caches()
        again = programs.compiled(program)
        row.trace_seconds = again.trace_seconds
        row.compile_seconds = again.compile_seconds
        row.skipped = None
        results.write()


def _measure(
    each: Contest, found: programs.Found, results: Results, seconds: float
) -> None:
    """Measures a contest; an exception becomes the result of its rows."""
    try:
        contest.measure(each, found, results, seconds)
    except Exception as error:  # out of memory, say: the next may fit
        reason = f"{type(error).__name__}: {programs.first_line(error)}"
        print(f"{each.group}, {each.dtype}: {reason}", flush=True)
        for row in each.planned():
            if (known := results.row(*row.key)).skipped is not None:
                results.skip(known, reason)


def _skip(results: Results, wave: Wave, reason: str) -> None:
    for each in wave.timed:
        for row in each.planned():
            if (known := results.row(*row.key)).skipped is not None:
                results.skip(known, reason)
