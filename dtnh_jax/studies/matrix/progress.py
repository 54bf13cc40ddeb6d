"""What is shown while cells are trained: a bar, or now and then a line of a log."""

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 30.0


@contextlib.contextmanager
def display(
    console: Console, total: int, done: int
) -> Iterator[Callable[[str, str], None]]:
    """Shows how many of all cells are complete, and how much time is left.

    Args:
      console: a terminal or a log.
      total: cells in all.
      done: cells that were complete before.

    Yields:
      A function to call with the name and the result of a cell that is complete.
    """
    if not console.is_terminal:
        yield _lines(console, total, done)
        return
    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("compiling", total=total, completed=done)

        def show(name: str, result: str) -> None:
            progress.update(task, advance=1, description=f"{name}: {result}")

        yield show


def _lines(console: Console, total: int, done: int) -> Callable[[str, str], None]:
    began = last = time.monotonic()
    count = done

    def show(name: str, result: str) -> None:
        nonlocal count, last
        count += 1
        now = time.monotonic()
        if now - last < _SECONDS_BETWEEN_LINES and count < total:
            return
        last = now
        left = (total - count) * (now - began) / (count - done)
        console.print(
            f"[{count}/{total}] {name}: {result}; {duration(left)} left",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    return show


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    Example:
      >>> duration(3725.4)
      '1:02:05'
    """
    return str(datetime.timedelta(seconds=round(seconds)))
