"""Times several programs in turn, in blocks that hide the host's work."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Clock:
    """Measures the time until a limit."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._started = time.perf_counter()

    def passed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    def left(self) -> float:
        """Seconds until the limit, negative after it."""
        return self.seconds - self.passed()


class Spread(NamedTuple):
    """The median and the quartiles of a number over rounds."""

    median: float
    low: float
    high: float


class Runner(NamedTuple):
    """A program to time."""

    step: Callable[[], Any]  # starts one step and returns what it leaves behind
    # Blocks hold a multiple of so many steps: the period of a program that alternates.
    period: int = 1


def spread(values: Any) -> Spread:
    """Summarizes some numbers.

    Example:
      >>> spread([1.0, 2.0, 3.0, 4.0, 9.0])
      Spread(median=3.0, low=2.0, high=4.0)
    """
    low, median, high = np.quantile(np.asarray(values, float), [0.25, 0.5, 0.75])
    return Spread(float(median), float(low), float(high))


def interleaved(
    runners: Mapping[str, Runner],
    seconds: float,
    *,
    wait: Callable[[Any], Any] = jax.block_until_ready,
    shortest_block: float = 0.03,
    rounds: int = 11,
) -> dict[str, list[float]]:
    """Times every runner once per round, so that drifts of the machine affect all.

    A block has several steps and waits at its end: the accelerator runs one step while
    the host starts the next.

    Args:
      runners: runners by name.
      seconds: approximate time limit. There are at least 3 rounds.
      wait: waits for the result of a step.
      shortest_block: minimal seconds of a block, unless that means too few rounds.
      rounds: largest number of rounds.

    Returns:
      Seconds of one step, for every round, by name.
    """
    started = time.perf_counter()
    once: dict[str, float] = {}
    for name, runner in runners.items():
        for _ in range(runner.period):  # what happens only the first time
            wait(runner.step())
        once[name] = _block(runner, runner.period, wait)
    left = seconds - (time.perf_counter() - started)
    # Blocks of one length if there is time for them, so that all hide as much.
    blocks, round_ = {}, 0.0
    for least in (max([3, *(r.period for r in runners.values())]), 3, 1):
        blocks = {
            name: _steps(runner.period, once[name], shortest_block, least)
            for name, runner in runners.items()
        }
        round_ = sum(blocks[name] * once[name] for name in runners)
        if round_ * 3 <= left:
            break
    count = max(3, min(rounds, int(left / max(round_, 1e-9))))
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(count):
        if number >= 3 and time.perf_counter() - started > seconds:
            break
        for name, runner in runners.items():
            taken[name].append(_block(runner, blocks[name], wait))
    return taken


def _steps(period: int, once: float, shortest_block: float, least: int) -> int:
    """Returns the number of steps of a block, a multiple of the period."""
    wanted = math.ceil(shortest_block / max(once, 1e-6)) if least > 1 else 1
    return period * math.ceil(min(max(wanted, least), 400) / period)


def _block(runner: Runner, steps: int, wait: Callable[[Any], Any]) -> float:
    """Returns the seconds of one step, as the mean over a block."""
    started = time.perf_counter()
    left_behind = None
    for _ in range(steps):
        left_behind = runner.step()
    wait(left_behind)
    return (time.perf_counter() - started) / steps
