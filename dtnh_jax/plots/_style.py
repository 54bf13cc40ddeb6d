"""Colours, legends and number formats of all figures."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours of Okabe and Ito.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
HATCHES = ("", "//", "..", "xx", "--", "\\\\", "oo")
GREY = "#777777"

# For text with names by users, in which `$` is a dollar sign, not mathematics.
VERBATIM: Mapping[str, Any] = {"parse_math": False}

# A legend with more names than this is beside the axes, not below them.
FEW = 8


def blank(width: float, height: float) -> "Figure":
    """Returns an empty figure, with its size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def legend(figure: "Figure", handles: Sequence[Any], names: Sequence[str]) -> None:
    """Adds a legend below the axes, or beside them if it is long."""
    if len(names) > FEW:
        where: dict[str, Any] = {"loc": "outside right lower", "fontsize": 8}
    else:
        inches = 0.75 + 0.085 * max(map(len, names))  # width of a line and its name
        fit = max(int(figure.get_figwidth() / inches), 1)
        columns = -(-len(names) // -(-len(names) // fit))  # rows of about one length
        where = {"loc": "outside lower center", "ncols": columns}
    # Set texts afterwards: matplotlib leaves out names that begin with `_`.
    made = figure.legend(handles, ["name"] * len(names), **where)
    for text, name in zip(made.get_texts(), names):
        text.set(text=name, **VERBATIM)


def points(difference: float) -> str:
    """Formats a difference of accuracies, from -1 to 1, in signed percentage points."""
    rounded = round(100 * difference, 1)
    return f"{rounded:+.1f}" if rounded else "0.0"


def span(numbers: Mapping[str, float], show: Callable[[float], str]) -> str:
    """Formats the smallest and the largest number with their names, for a title."""
    low, high = (end(numbers, key=numbers.__getitem__) for end in (min, max))
    if len(numbers) == 1:
        return f"{show(numbers[low])} ({low})"
    if numbers[low] == numbers[high]:
        return f"{show(numbers[low])} (all)"
    return f"from {show(numbers[low])} ({low}) to {show(numbers[high])} ({high})"
