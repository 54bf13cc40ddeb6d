"""Makes rows of the table from measured times."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dtnh_jax.studies.benchmarks.timing import Seconds, Spread, spread


class Against(NamedTuple):
    """A comparison, round by round."""

    label: str
    seconds: Callable[[Seconds], Any]  # the time for a ratio of 1
    target: float | None = None  # the largest ratio that meets the target


class Row(NamedTuple):
    """A measurement, with its comparison if there is one."""

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
        """Returns the row for JSON, without nesting."""
        record: dict[str, Any] = {"is_met": self.is_met}
        for key, value in self._asdict().items():
            if key in ("value", "ratio"):
                low, high = (value.low, value.high) if value else (None, None)
                record |= {f"{key}_low": low, f"{key}_high": high}
                value = value.median if value else None
            record[key] = value
        return record


def one(name: str, target: float | None = None, label: str | None = None) -> Against:
    """Returns a comparison with another timed function."""
    return Against(label or name, lambda seconds: seconds[name], target)


def timed(
    group: str,
    subject: str,
    seconds: Seconds,
    comparisons: Mapping[str, Sequence[Against]],
    unit: str = "ms",
) -> list[Row]:
    """Returns a row for each comparison, or a single row without comparison.

    Args:
      group: group of the rows.
      subject: the subject, such as a network.
      seconds: seconds of every round, by name.
      comparisons: comparisons by name; those with untimed functions are left out.
      unit: unit of the values, `"ms"` or `"s"`.

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
