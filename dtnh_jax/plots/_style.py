"""What all figures share: colours that colour-blind readers can tell apart."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Those of Okabe and Ito.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
HATCHES = ("", "//", "..", "xx", "--", "\\\\", "oo")
GREY = "#777777"

# Of text with names that users gave, in which a `$` is a dollar and no mathematics.
VERBATIM: Mapping[str, Any] = {"parse_math": False}

# More names than this stand beside the axes and not below them.
FEW = 8


def blank(width: float, height: float) -> "Figure":
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def legend(figure: "Figure", handles: Sequence[Any], names: Sequence[str]) -> None:
    """Names lines below the axes, or beside them where there are many."""
    if len(names) > FEW:
        where: dict[str, Any] = {"loc": "outside right lower", "fontsize": 8}
    else:
        inches = 0.75 + 0.085 * max(map(len, names))  # of a line and its name
        fit = max(int(figure.get_figwidth() / inches), 1)
        columns = -(-len(names) // -(-len(names) // fit))  # rows of about one length
        where = {"loc": "outside lower center", "ncols": columns}
    # Named afterwards: a name that begins with `_` would be left out.
    made = figure.legend(handles, ["name"] * len(names), **where)
    for text, name in zip(made.get_texts(), names):
        text.set(text=name, **VERBATIM)


def points(difference: float) -> str:
    """A difference of accuracies from -1 to 1, in percentage points with its sign."""
    rounded = round(100 * difference, 1)
    return f"{rounded:+.1f}" if rounded else "0.0"


def span(numbers: Mapping[str, float], show: Callable[[float], str]) -> str:
    """The least and the greatest number, and whose they are, for a title."""
    low, high = (end(numbers, key=numbers.__getitem__) for end in (min, max))
    if len(numbers) == 1:
        return f"{show(numbers[low])} ({low})"
    if numbers[low] == numbers[high]:
        return f"{show(numbers[low])} (all)"
    return f"from {show(numbers[low])} ({low}) to {show(numbers[high])} ({high})"
