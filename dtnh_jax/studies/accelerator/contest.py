"""Times programs in turn and compares them: the rows of one group and dtype."""

import gc
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from dtnh_jax.studies.accelerator.programs import Compiled, Found, Program, first_line
from dtnh_jax.studies.accelerator.rows import Results, Row, ratios
from dtnh_jax.studies.accelerator.timing import Runner, interleaved


class Entry(NamedTuple):
    """A row and its programs."""

    name: str
    programs: tuple[Program, ...]
    start: Callable[[], Any]  # returns a new state on the device
    pattern: tuple[int, ...] = (0,)  # the programs of a period, one for each step
    against: tuple[str, ...] = ()  # names of entries to compare with
    reads: tuple[str, ...] | None = None  # keys of the data; all of them by default
    refused: str | None = None  # reason why the row can not be measured


class Contest(NamedTuple):
    """Entries that share their data and are timed side by side."""

    group: str
    dtype: str
    entries: tuple[Entry, ...]
    data: Callable[[], Any]  # returns what all steps read, on the device
    # Adds to a row what only this group knows, from the seconds of its rounds and all
    # entries as they were left.
    note: Callable[[Row, list[float], Mapping[str, "Steps"]], None] = lambda *_: None

    def only(self, names: Iterable[str]) -> "Contest":
        """Returns the contest with some of its entries."""
        kept = set(names)
        return self._replace(entries=tuple(e for e in self.entries if e.name in kept))

    def programs(self) -> list[Program]:
        """Returns all programs, in order."""
        return list(itertools.chain(*[entry.programs for entry in self.entries]))

    def planned(self) -> list[Row]:
        """Returns the rows before measurement."""
        return [Row(self.group, entry.name, self.dtype) for entry in self.entries]


class Steps:
    """Runs an entry, and keeps its state."""

    def __init__(self, entry: Entry, calls: list[Compiled], data: Any):
        self.state = entry.start()
        self.report: Any = None
        self._calls = itertools.cycle([calls[i].call for i in entry.pattern])
        keys = data if entry.reads is None else entry.reads
        self._data = {key: data[key] for key in keys}

    def __call__(self) -> Any:
        """Starts a step."""
        self.state, self.report = next(self._calls)(self.state, self._data)
        return self.state, self.report


def refused(name: str, error: Exception) -> Entry:
    """Returns an entry whose row can not be measured, with the reason."""
    reason = f"{type(error).__name__}: {first_line(error)}"
    return Entry(name, (), lambda: None, refused=reason)


def ready(entry: Entry, found: Found) -> tuple[list[Compiled], str | None]:
    """Returns an entry's compiled programs, or the reason why there are none."""
    if entry.refused:
        return [], entry.refused
    calls = [found.get(p.key, "not compiled") for p in entry.programs]
    reasons = [each for each in calls if isinstance(each, str)]
    return [c for c in calls if not isinstance(c, str)], next(iter(reasons), None)


def measure(contest: Contest, found: Found, results: Results, seconds: float) -> None:
    """Times the entries that have compiled, and notes the reasons of all others.

    Rows that were measured before, with other entries, keep their first numbers.
    """
    data = contest.data()
    runs: dict[str, Steps] = {}
    calls: dict[str, list[Compiled]] = {}
    for entry in contest.entries:
        row = results.row(contest.group, entry.name, contest.dtype)
        calls[entry.name], reason = ready(entry, found)
        if reason is None:
            runs[entry.name] = Steps(entry, calls[entry.name], data)
        elif row.skipped is not None:
            row.skipped = reason
    periods = {entry.name: len(entry.pattern) for entry in contest.entries}
    timed = interleaved(
        {name: Runner(step, periods[name]) for name, step in runs.items()}, seconds
    )
    for entry in contest.entries:
        row = results.row(contest.group, entry.name, contest.dtype)
        if row.skipped is None:  # measured before
            continue
        if entry.name not in timed:
            _say(row)
            continue
        row.timed(timed[entry.name])
        for other in entry.against:
            if other in timed:
                row.against[other] = ratios(timed[entry.name], timed[other])
        each = calls[entry.name]
        keys = each[0].memory
        row.memory = {
            key: max(call.memory.get(key, 0) for call in each) for key in keys
        }
        row.trace_seconds = sum(call.trace_seconds for call in each)
        row.compile_seconds = sum(call.compile_seconds for call in each)
        contest.note(row, timed[entry.name], runs)
        _say(row)
    results.write()
    gc.collect()


def peak_in_use() -> int | None:
    """Returns the peak memory of the process on the device, if it is reported."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def _say(row: Row) -> None:
    """Prints a line, so that an interrupted run has printed its results."""
    ms, where = row.milliseconds, f"{row.group}, {row.name}, {row.dtype}"
    if row.skipped is not None or ms is None:
        print(f"{where}: skipped, {row.skipped}", flush=True)
        return
    compared = "".join(f", {r.median:.3f} {name}" for name, r in row.against.items())
    print(f"{where}: {ms.median:.3f} ms{compared}", flush=True)
