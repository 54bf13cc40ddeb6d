"""Costs on networks with many parameters and small batches, where they show most.

Every way to add L2-SP is compared with the plain sum and with DTNH by hand, in the time
of a step, in temporary memory, and in the time to trace and compile.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from dtnh_jax.studies.benchmarks import contests, programs, steps
from dtnh_jax.studies.benchmarks.networks import Network
from dtnh_jax.studies.benchmarks.rows import Against, Row, one, timed
from dtnh_jax.studies.benchmarks.timing import interleaved

GROUP = "mlp"
_PLAIN, _BY_HAND, _GLOBAL = steps.L2_SP, steps.L2_SP_BY_HAND, steps.L2_SP_DTNH
# Coarse scopes share an inner product among many parameters, fine ones among few.
_COARSE = (_GLOBAL, steps.L2_SP_LEAF, steps.L2_SP_LABELS)
_FINE = (steps.L2_SP_UNIT, steps.L2_SP_ELEMENT)
NAMES = (_PLAIN, _BY_HAND, *_COARSE, *_FINE, steps.L2_SP_NEVER_HURT)

_FINE_TO_GLOBAL = 1.25  # target of a step's time
_COMPILE = 1.3  # of DTNH by hand, for the coarse scopes
_TREES = 2  # like the parameters, that the fine scopes may need for a time


class Targets(NamedTuple):
    """Results of version 0.3 at the coarse scopes, as multiples of the plain sum."""

    time: float | None = None
    memory: float | None = None


# By the width of eight layers, with batches of 256 and of 64. Memory is that of steps
# which reuse the memory of the state before, as these do; without that, the plain sum
# needs next to none, and ratios are larger.
TARGETS = {512: Targets(1.13, 1.01), 1024: Targets(1.15, 2.82)}


def measure(
    network: Network,
    targets: Targets,
    compiled: contests.Compiled,
    rounds: int,
    compile_rounds: int,
) -> list[Row]:
    """Measures times, memory and compilation of one network.

    Args:
      network: see `networks.perceptron`.
      targets: targets of the coarse scopes.
      compiled: cache of programs.
      rounds: rounds in which each step is timed.
      compile_rounds: rounds in which each is compiled.
    """
    seconds = interleaved(compiled.calls(network, NAMES), rounds)
    return [
        *timed(GROUP, network.name, seconds, _of_times(targets)),
        *_memory(network, targets, compiled),
        *programs.compile_times(
            network, compile_rounds, _OF_COMPILING, f"{GROUP}: trace and compile"
        ),
    ]


def _of_times(targets: Targets) -> Mapping[str, list[Against]]:
    """Returns the comparisons of a step's time."""
    coarse = [one(_PLAIN, targets.time), one(_BY_HAND)]
    fine = [one(_PLAIN), one(_BY_HAND), one(_GLOBAL, _FINE_TO_GLOBAL)]
    return {
        **_OF_OTHERS,
        **dict.fromkeys(_COARSE, coarse),
        **dict.fromkeys(_FINE, fine),
    }


_OF_OTHERS = {
    _BY_HAND: [one(_PLAIN)],
    steps.L2_SP_NEVER_HURT: [one(_PLAIN), one(_BY_HAND)],
}
_OF_COMPILING = {
    _PLAIN: [],
    **_OF_OTHERS,
    **{name: [one(_PLAIN), one(_BY_HAND, _COMPILE)] for name in _COARSE},
    **{name: [one(_PLAIN), one(_BY_HAND)] for name in _FINE},
}


def _memory(
    network: Network, targets: Targets, compiled: contests.Compiled
) -> list[Row]:
    """Returns the temporary memory of steps, in megabytes."""
    found = {}
    for name in NAMES:
        stats = compiled.of(network, name)[1][0].memory_analysis()
        found[name] = 1e-6 * max(stats.temp_size_in_bytes, 1)  # to divide by
    tree = 1e-6 * sum(x.nbytes for x in jax.tree.leaves(network.params))
    allowed = found[_PLAIN] + _TREES * tree
    rows = []
    for name, size in found.items():
        compared: list[tuple[str, Any, float | None]] = []
        if name != _PLAIN:
            target = targets.memory if name in _COARSE else None
            compared.append((_PLAIN, found[_PLAIN], target))
        if name not in (_PLAIN, _BY_HAND):
            compared.append((_BY_HAND, found[_BY_HAND], None))
        if name in _FINE:
            title = f"{_PLAIN} and {_TREES} trees like the parameters"
            compared.append((title, allowed, 1.0))
        row = Row(
            f"{GROUP}: temporary memory",
            network.name,
            name,
            programs.exactly(size),
            "MB",
        )
        rows += [
            row._replace(against=label, ratio=programs.exactly(size / other), target=to)
            for label, other, to in compared
        ] or [row]
    return rows
