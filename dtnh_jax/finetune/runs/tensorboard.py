"""Writes the scalars of every step for TensorBoard."""

import contextlib
import math
import pathlib
from collections.abc import Iterator
from typing import Any

from tensorboardX import SummaryWriter

from dtnh_jax.finetune.runs.progress import Display

_NO_SCALARS = ("cell", "method", "seed", "step")
_SECONDS_BETWEEN_WRITES = 10


@contextlib.contextmanager
def logging(display: Display, folder: pathlib.Path) -> Iterator[Display]:
    """Wraps a display, and also writes its metrics for TensorBoard.

    Args:
      display: the progress display.
      folder: parent of a folder for every cell. When a cell resumes, TensorBoard
        discards the steps that are trained again.
    """
    logged = _Logged(display, folder)
    try:
        yield logged
    finally:
        logged.close()


class _Logged:
    def __init__(self, display: Display, folder: pathlib.Path):
        self._display, self._folder = display, folder
        self._writer: Any = None

    def say(self, text: str) -> None:
        self._display.say(text)

    def begin(self, cell: str, step: int, steps: int) -> None:
        self.close()
        self._writer = SummaryWriter(
            str(self._folder / cell),
            purge_step=step + 1 if step else None,
            flush_secs=_SECONDS_BETWEEN_WRITES,
        )
        self._display.begin(cell, step, steps)

    def update(self, line: dict[str, Any]) -> None:
        for name, value in line.items():
            # A number that is not finite would print a warning at every step.
            if name not in _NO_SCALARS and value is not None and math.isfinite(value):
                self._writer.add_scalar(name, value, line["step"])
        self._display.update(line)

    def end(self, summary: str) -> None:
        self.close()
        self._display.end(summary)

    def skip(self, cells: int) -> None:
        self._display.skip(cells)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None
