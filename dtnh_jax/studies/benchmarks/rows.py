"""The rows of the table, from the times of the things in it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dtnh_jax.studies.benchmarks.timing import Seconds, Spread, spread


class Against(NamedTuple):
    """What something is compared with, round by round."""

    label: str
    seconds: Callable[[Seconds], Any]  # how long it would take with a ratio of 1
    target: float | None = None  # what the ratio should be at most


class Row(NamedTuple):
    """One thing that was measured; with what it is compared with, if anything."""

    group: str
    subject: str  # such as a network
    name: str
    value: Spread
    unit: str
    against: str | None = None
    ratio: Spread | None = None
    target: float | None = None

    @property
    def is_met(self) -> bool | None:
        """Whether the median ratio is within the target, if there is one."""
        if self.target is None or self.ratio is None:
            return None
        return self.ratio.median <= self.target

    def plain(self) -> dict[str, Any]:
        """The row ready for JSON, without nesting."""
        record: dict[str, Any] = {"is_met": self.is_met}
        for key, value in self._asdict().items():
            if key in ("value", "ratio"):
                low, high = (value.low, value.high) if value else (None, None)
                record |= {f"{key}_low": low, f"{key}_high": high}
                value = value.median if value else None
            record[key] = value
        return record


def one(name: str, target: float | None = None, label: str | None = None) -> Against:
    """Compares with one of the other things that were timed."""
    return Against(label or name, lambda seconds: seconds[name], target)


def timed(
    group: str,
    subject: str,
    seconds: Seconds,
    comparisons: Mapping[str, Sequence[Against]],
    unit: str = "ms",
) -> list[Row]:
    """Rows of a contest: one for each comparison, or one alone where there is none.

    Args:
      group: of rows.
      subject: what was timed.
      seconds: of every round, by name.
      comparisons: by name; those of things that were not timed are left out.
      unit: of the values, `"ms"` or `"s"`.

    Example:
      >>> import numpy as np
      >>> seconds = {"plain": np.array([1.0, 2.0]), "ours": np.array([1.5, 3.0])}
      >>> rows = timed("steps", "net", seconds, {"ours": [one("plain", target=1.6)]})
      >>> rows[1].ratio.median, rows[1].is_met
      (1.5, True)
    """
    scale = {"ms": 1000, "s": 1}[unit]
    rows = []
    for name, each in seconds.items():
        value = spread(scale * each)
        for against in comparisons.get(name, ()) or (None,):
            row = Row(group, subject, name, value, unit)
            if against is not None:
                ratio = spread(each / against.seconds(seconds))
                row = row._replace(
                    against=against.label, ratio=ratio, target=against.target
                )
            rows.append(row)
    return rows
