"""Costs of programs that are known before they run: compile time and memory."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import jax
from jax.experimental.compilation_cache import compilation_cache

from dtnh_jax.studies.benchmarks import contests, steps
from dtnh_jax.studies.benchmarks.networks import Network
from dtnh_jax.studies.benchmarks.rows import Against, Row, one, timed
from dtnh_jax.studies.benchmarks.timing import Spread, interleaved

_TARGET = 1.2  # relative to the step that adds the gradients
_COMPILED: Mapping[str, Sequence[Against]] = {
    steps.L2_SP: [],
    steps.L2_SP_BY_HAND: [one(steps.L2_SP)],
    steps.L2_SP_DTNH: [one(steps.L2_SP, _TARGET), one(steps.L2_SP_BY_HAND)],
    steps.DISTILLATION: [],
    steps.DISTILLATION_BY_HAND: [one(steps.DISTILLATION)],
    steps.DISTILLATION_DTNH: [
        one(steps.DISTILLATION, _TARGET),
        one(steps.DISTILLATION_BY_HAND),
    ],
}
_KEPT = {
    steps.L2_SP_DTNH: steps.L2_SP,
    steps.DISTILLATION_DTNH: steps.DISTILLATION,
    steps.L2_SP_NEVER_HURT: steps.L2_SP,
    "distillation, never_hurt": steps.DISTILLATION,
}


def compile_times(
    network: Network,
    rounds: int,
    comparisons: Mapping[str, Sequence[Against]] = _COMPILED,
    group: str = "compile",
) -> list[Row]:
    """Measures the seconds to trace and compile a step.

    Args:
      network: the network.
      rounds: rounds in which each step is compiled.
      comparisons: comparisons by name of `steps.METHODS`. By default the plain step,
        DTNH, and DTNH by hand.
      group: group of the rows.
    """
    programs = {name: steps.program(network, name) for name in comparisons}
    for made in programs.values():
        made.lower()  # the first call imports and traces more than later ones

    def compiling(name):
        return lambda: programs[name].compile() and None

    with _nothing_from_disk():
        calls = {name: compiling(name) for name in programs}
        seconds = interleaved(calls, rounds, warm_up=0)
    return timed(group, network.name, seconds, comparisons, unit="s")


def memory(network: Network, compiled: contests.Compiled) -> list[Row]:
    """Measures the peak memory of a step in bytes, by the compiler's analysis."""
    found = {}
    for name in dict.fromkeys([*_KEPT.values(), *_KEPT]):
        stats = compiled.of(network, name)[1][0].memory_analysis()
        found[name] = 1e-6 * (
            stats.argument_size_in_bytes
            + stats.output_size_in_bytes
            + stats.temp_size_in_bytes
            - stats.alias_size_in_bytes
        )
    rows = []
    for name, size in found.items():
        row = Row("memory", network.name, name, exactly(size), "MB")
        if name in _KEPT:
            ratio = exactly(size / found[_KEPT[name]])
            row = row._replace(against=_KEPT[name], ratio=ratio)
        rows.append(row)
    return rows


def exactly(value: float) -> Spread:
    """Returns a spread for a number without variation."""
    return Spread(value, value, value)


@contextlib.contextmanager
def _nothing_from_disk() -> Iterator[None]:
    """Disables the compilation cache, so that every program is compiled."""
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore  (made at run time)
    # The flag is read once, until the cache is reset.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
