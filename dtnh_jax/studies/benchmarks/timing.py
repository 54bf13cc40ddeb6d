"""Times several functions in turn, so that a slow phase affects all of them."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

Seconds = Mapping[str, Float[np.ndarray, " rounds"]]  # by name


class Spread(NamedTuple):
    """The median and the quartiles of a number over rounds."""

    median: float
    low: float  # the quartiles
    high: float


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm_up: int = 2,
    pause: float = 0.0,
) -> dict[str, Float[np.ndarray, " rounds"]]:
    """Calls every function once per round, in the same order.

    Args:
      calls: functions by name, each of which returns arrays to wait for.
      rounds: number of rounds, at least 1.
      warm_up: number of earlier rounds that do not count, for compilation.
      pause: seconds of rest before every call, which do not count: the threads of a
        library may spin for a while after their work.

    Returns:
      Seconds of every round, by name.

    Raises:
      ValueError: there are no functions, or no rounds.

    Example:
      >>> seconds = interleaved({"a": lambda: 0, "b": lambda: sum(range(9))}, rounds=3)
      >>> seconds["b"].shape
      (3,)
    """
    if not calls or rounds < 1:
        raise ValueError(
            f"`calls` and `rounds` must be at least one, got {len(calls)} and {rounds}."
        )
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warm_up + rounds):
        for name, call in calls.items():
            if pause:
                time.sleep(pause)
            started = time.perf_counter()
            jax.block_until_ready(call())
            taken = time.perf_counter() - started
            if number >= warm_up:
                seconds[name].append(taken)
    return {name: np.array(each) for name, each in seconds.items()}


def spread(values: Float[np.ndarray, " rounds"]) -> Spread:
    """Returns the median and the middle half of numbers.

    Example:
      >>> print(*spread(np.array([1.0, 2.0, 3.0, 4.0, 9.0])))
      3.0 2.0 4.0
    """
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return Spread(float(median), float(low), float(high))
