"""Compares times of training steps, which are compiled once for all groups."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from dtnh_jax.studies.benchmarks import steps
from dtnh_jax.studies.benchmarks.networks import Network
from dtnh_jax.studies.benchmarks.rows import Row, timed
from dtnh_jax.studies.benchmarks.timing import interleaved


class Compiled:
    """Compiled steps by network and method, so that no two groups compile the same."""

    def __init__(self):
        self._compiled: dict[tuple[str, str], tuple[steps.Program, list[Any]]] = {}

    def of(self, network: Network, name: str) -> tuple[steps.Program, list[Any]]:
        """Returns the steps of a method and their executables."""
        key = network.name, name
        if key not in self._compiled:
            made = steps.program(network, name)
            self._compiled[key] = made, made.compile()
        return self._compiled[key]

    def calls(
        self, network: Network, names: Iterable[str]
    ) -> dict[str, Callable[[], Any]]:
        """Returns functions that take a method's steps at each call, by method."""
        return {name: _repeated(*self.of(network, name)) for name in names}


def _repeated(made: steps.Program, executables: list[Any]) -> Callable[[], Any]:
    # A copy, because the first step donates the initial state of the other methods.
    state = jax.tree.map(lambda x: jnp.array(x, copy=True), made.state)

    def call():
        nonlocal state
        out = None
        for run in executables:
            out = run(state, made.data)
            if made.is_advancing:
                state = out
        return out

    return call


def contest(
    group: str,
    network: Network,
    names: Iterable[str],
    compiled: Compiled,
    rounds: int,
) -> list[Row]:
    """Times a step of each method in turn; with several steps per call, their mean."""
    seconds = interleaved(compiled.calls(network, names), rounds)
    each = {name: taken / steps.METHODS[name].steps for name, taken in seconds.items()}
    return timed(group, network.name, each, steps.COMPARISONS)
