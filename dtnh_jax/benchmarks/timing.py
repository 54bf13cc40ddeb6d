"""Times of several things in turn, so that what slows one down slows all down."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Times(NamedTuple):
    """How long one thing took, in seconds, over the rounds of a run."""

    median: float
    low: float  # the quartiles
    high: float
    ratio: float  # median of the ratios to the first thing in the same round
    ratio_low: float
    ratio_high: float


def interleaved(
    calls: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 2
) -> dict[str, Times]:
    """Calls everything once a round, and compares within rounds.

    Args:
      calls: functions by name, each of which returns arrays to wait for. The first is
        what the others are compared with.
      rounds: how often each is called, at least 1.
      warm_up: rounds before that do not count, for compilation.

    Returns:
      Times by name.

    Raises:
      ValueError: if there is nothing to call, or no round.

    Example:
      >>> times = interleaved({"a": lambda: 0, "b": lambda: sum(range(9))}, rounds=3)
      >>> times["a"].ratio
      1.0
    """
    if not calls or rounds < 1:
        raise ValueError(
            f"`calls` and `rounds` must be at least one, got {len(calls)} and {rounds}."
        )
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warm_up + rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            jax.block_until_ready(call())
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    first = np.array(next(iter(seconds.values())))
    return {
        name: Times(*_quartiles(each), *_quartiles(np.array(each) / first))
        for name, each in seconds.items()
    }


def _quartiles(values: Any) -> tuple[float, float, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float(median), float(low), float(high)
