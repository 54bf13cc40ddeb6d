"""Displays progress: bars on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft
from rich.text import Text

_SECONDS_BETWEEN_LINES = 30.0


@runtime_checkable
class Display(Protocol):
    """The interface between the loop and a progress display."""

    def say(self, text: str) -> None:
        """Shows a message."""

    def begin(self, cell: str, step: int, steps: int) -> None:
        """Starts or resumes a cell at a step."""

    def update(self, line: dict[str, Any]) -> None:
        """Shows a finished step; `line` is its line of `metrics.jsonl`."""

    def end(self, summary: str) -> None:
        """Completes the cell."""

    def skip(self, cells: int) -> None:
        """Removes cells that are not needed from the total."""


@contextlib.contextmanager
def display(console: Console, title: str, cells: int, steps: int) -> Iterator[Display]:
    """Shows progress over a number of cells with a number of steps each."""
    if not console.is_terminal:
        yield _Lines(console, cells)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeLeft(compact=True),
    )
    with _Noted(*columns, console=console) as progress:
        overall = progress.add_task(title, total=cells * steps)
        yield _Bars(progress, overall, steps)


def note(line: dict[str, Any]) -> str:
    """Formats the main numbers of a step."""
    parts = [f"loss {line['loss']:.3f}"]
    if "cosine" in line:
        parts.append(f"cosine {line['cosine']:+.2f}")
    if "conflict" in line:
        parts.append(f"in conflict {100 * line['conflict']:.0f}%")
    unit = next(u for u in ("images", "tokens") if f"{u}_per_second" in line)
    return ", ".join([*parts, f"{line[f'{unit}_per_second']:.0f} {unit}/s"])


class _Noted(Progress):
    """Bars above a line of numbers, because 80 columns are too narrow for both."""

    note = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.note, no_wrap=True, overflow="ellipsis")


class _Bars:
    def __init__(self, progress: _Noted, overall: Any, steps: int):
        self._progress, self._overall, self._steps = progress, overall, steps
        self._cells_done, self._task = 0, None

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def begin(self, cell: str, step: int, steps: int) -> None:
        self._progress.note = "compiling"
        self._task = self._progress.add_task(cell, total=steps, completed=step)

    def update(self, line: dict[str, Any]) -> None:
        assert self._task is not None
        self._progress.note = note(line)
        self._progress.update(self._task, completed=line["step"])
        done = self._cells_done * self._steps + line["step"]
        self._progress.update(self._overall, completed=done)

    def end(self, summary: str) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = None
        self._cells_done += 1
        self._progress.update(self._overall, completed=self._cells_done * self._steps)
        self.say(summary)
        self._progress.note = ""

    def skip(self, cells: int) -> None:
        self._cells_done += cells
        self._progress.update(self._overall, completed=self._cells_done * self._steps)


class _Lines:
    def __init__(self, console: Console, cells: int):
        self._console, self._cells = console, cells
        self._cells_done, self._cell, self._steps = 0, "", 0
        self._last = time.monotonic()

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        self._print(text)

    def begin(self, cell: str, step: int, steps: int) -> None:
        self._cell, self._steps = cell, steps
        if step:
            self._print(f"{cell}: resumes after step {step} of {steps}")

    def update(self, line: dict[str, Any]) -> None:
        if time.monotonic() - self._last > _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            at = f"step {line['step']} of {self._steps}"
            self._print(f"{self._cell}: {at}, {note(line)}")

    def end(self, summary: str) -> None:
        self._cells_done += 1
        self._last = time.monotonic()
        self._print(f"[{self._cells_done}/{self._cells}] {summary}")

    def skip(self, cells: int) -> None:
        self._cells_done += cells
