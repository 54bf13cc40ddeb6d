"""A progress bar on terminals, if rich is installed."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def progress_bar(
    name: str, total: int | None, done: int = 0, *, shown: bool
) -> Iterator[Callable[..., None]]:
    """Yields a function that advances the bar by a count, with a note beside it."""
    console = _terminal() if shown else None
    if console is None:
        yield lambda count, note="": None
        return
    from rich import progress

    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[note]}"),
        progress.TimeRemainingColumn(compact=True),
        console=console,
    )
    with bar:
        task = bar.add_task(name, total=total, completed=done, note="")
        yield lambda count, note="": bar.update(task, advance=count, note=note)


def _terminal() -> Any:
    """Returns rich's console, or None without a terminal or without rich."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(stderr=True)
    return console if console.is_terminal else None
