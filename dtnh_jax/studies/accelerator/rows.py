"""The results: a list of rows, written to disk after every change, and a table."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from dtnh_jax.finetune import files
from dtnh_jax.studies.accelerator.timing import Spread, spread

NOT_REACHED = "not reached"
_COLUMNS = (
    "row",
    "type",
    "ms (quartiles)",
    "against",
    "temp, peak MB",
    "trace, compile s",
    "more",
)


@dataclasses.dataclass
class Row:
    """One measurement, or the reason for its absence."""

    group: str
    name: str
    dtype: str
    # Why there is no measurement; None if there is one.
    skipped: str | None = NOT_REACHED
    milliseconds: Spread | None = None  # of one step
    rounds: int = 0
    # Ratios to other rows of the group, round by round, and to a floor.
    against: dict[str, Spread] = dataclasses.field(default_factory=dict)
    # Bytes: temporary, arguments, outputs, and at the peak.
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    trace_seconds: float | None = None  # of one thread's own time
    compile_seconds: float | None = None  # by the clock, beside others
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        """The key of the row."""
        return self.group, self.name, self.dtype

    def timed(self, seconds: list[float]) -> None:
        """Records the time of a step over the rounds."""
        self.milliseconds = spread([1e3 * each for each in seconds])
        self.rounds = len(seconds)
        self.skipped = None


def ratios(ours: list[float], theirs: list[float]) -> Spread:
    """Returns the ratio of two times, round by round."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


class Results:
    """All rows and their files."""

    def __init__(
        self, folder: pathlib.Path, about: Mapping[str, Any], name: str = "results"
    ):
        self.about = dict(about)
        self._name = name
        self.rows: dict[tuple[str, str, str], Row] = {}
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def plan(self, rows: Iterable[Row]) -> None:
        """Lists rows before measurement, so that none is lost."""
        for row in rows:
            self.rows.setdefault(row.key, row)
        self.write()

    def row(self, group: str, name: str, dtype: str) -> Row:
        """Returns a row, planned or new."""
        return self.rows.setdefault((group, name, dtype), Row(group, name, dtype))

    def skip(self, row: Row, reason: str) -> None:
        """Records why a row could not be measured."""
        row.skipped = reason
        self.write()

    def brief(self) -> str:
        """Returns a line for each group and name, short enough for the end of a log."""
        lines: dict[tuple[str, str], list[str]] = {}
        for row in self.rows.values():
            lines.setdefault((row.group, row.name), []).append(_brief(row))
        return "\n".join(
            f"{group}: {name}: {' | '.join(cells)}"
            for (group, name), cells in lines.items()
        )

    def write(self) -> None:
        """Writes the JSON file and the Markdown file atomically."""
        content = {
            "about": self.about,
            "rows": [dataclasses.asdict(row) for row in self.rows.values()],
        }
        written = {
            f"{self._name}.json": json.dumps(content, indent=1) + "\n",
            f"{self._name}.md": markdown(self.about, self.rows.values()),
        }
        for name, text in written.items():
            files.write(self._folder / name, text)


def markdown(about: Mapping[str, Any], rows: Iterable[Row]) -> str:
    """Returns a heading, a table for each group, and the skipped rows."""
    rows = list(rows)
    lines = ["# On an accelerator", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    for group in dict.fromkeys(row.group for row in rows):
        measured = [r for r in rows if r.group == group and r.skipped is None]
        if not measured:
            continue
        lines += [
            "",
            f"## {group}",
            "",
            f"| {' | '.join(_COLUMNS)} |",
            f"|{' --- |' * len(_COLUMNS)}",
        ]
        lines += [f"| {' | '.join(_cells(row))} |" for row in measured]
    skipped = [row for row in rows if row.skipped is not None]
    if skipped:
        lines += ["", "## Skipped", ""]
        lines += [f"- {r.group}, {r.name}, {r.dtype}: {r.skipped}" for r in skipped]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    ms = row.milliseconds
    known = [key for key in ("temp", "peak") if key in row.memory]
    memory = [f"{row.memory[key] / 1e6:.0f}" for key in known]
    seconds = [s for s in (row.trace_seconds, row.compile_seconds) if s is not None]
    return [
        row.name,
        row.dtype,
        f"{ms.median:.3f} ({ms.low:.3f}-{ms.high:.3f})" if ms else "",
        "; ".join(f"{r.median:.3f} {name}" for name, r in row.against.items()),
        ", ".join(memory),
        ", ".join(f"{each:.1f}" for each in seconds),
        "; ".join(f"{name} {_short(value)}" for name, value in row.more.items()),
    ]


def _brief(row: Row) -> str:
    if row.skipped is not None:
        return f"skipped ({row.skipped[:60]})"
    against = [f"x{r.median:.2f}" for r in row.against.values()]
    most = row.memory.get("peak")
    memory = [f"{most / 1e9:.1f} GB"] if most else []
    time = [f"{row.milliseconds.median:.3f} ms"] if row.milliseconds else []
    if not time and row.compile_seconds is not None:
        time = [f"{row.trace_seconds:.1f} + {row.compile_seconds:.1f} s"]
    named = ("GB/s", "TFLOP/s", "copies to the host", "busy share")
    more = [f"{n} {_short(row.more[n])}" for n in named if n in row.more]
    return " ".join([*time, *against, *memory, *more])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
