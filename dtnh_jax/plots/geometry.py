"""Two gradients in the plane."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from dtnh_jax import rules
from dtnh_jax.plots._style import COLOURS, GREY, blank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# In inches: the sides of the picture, and the room for names at each end.
_SIDES = np.array([6.2, 4.1])
_ROOM = np.array([1.6, 0.5])


def projection(g: Sequence[float], r: Sequence[float]) -> "Figure":
    """Plots two gradients in the plane, their sum, and its projection by DTNH.

    Args:
      g: gradient of the loss, two numbers.
      r: gradient of the regularizer times its strength, two numbers.

    Returns:
      A figure. The shaded half-plane holds the updates that lower the loss at least as
      fast as `g` alone; DTNH projects `g + r` onto it. The title says whether the two
      gradients conflict.

    Raises:
      ValueError: `g` or `r` is not two numbers, or `g` is zero.

    Example:
      >>> figure = projection([1.0, 0.0], [-0.5, 1.0])
      >>> figure.get_suptitle()
      'In conflict: DTNH moves g + r to where the loss falls as fast as with g'
      >>> projection([1.0, 0.0], [0.5, 1.0]).get_suptitle()
      'No conflict: DTNH is g + r'
    """
    ours, theirs = np.asarray(g, float), np.asarray(r, float)
    if ours.shape != (2,) or theirs.shape != (2,) or not ours.any():
        raise ValueError(
            f"`g` and `r` must be two numbers each, `g` not zero, got {g} and {r}."
        )
    total = ours + theirs
    gram = np.array([[ours @ ours, ours @ theirs], [ours @ theirs, theirs @ theirs]])
    weights = np.asarray(rules.dtnh(jnp.asarray(gram, jnp.float32)))
    update = weights[0] * ours + weights[1] * theirs
    has_conflict = bool(ours @ theirs < 0)
    figure = blank(*(side + 0.5 for side in _SIDES))
    axes = figure.subplots()
    points = np.array([np.zeros(2), ours, theirs, total, update])
    low, high = points.min(axis=0), points.max(axis=0)
    # Both axes have the same scale, chosen so that the names fit.
    scale = np.max((high - low) / (_SIDES - 2 * _ROOM))  # units per inch
    middle, half = (low + high) / 2, scale * _SIDES / 2
    axes.set_xlim(middle[0] - half[0], middle[0] + half[0])
    axes.set_ylim(middle[1] - half[1], middle[1] + half[1])
    along, across = ours / np.linalg.norm(ours), np.array([-ours[1], ours[0]])
    far = 10 * half.max()
    across = far * across / np.linalg.norm(across)
    corners = [ours - across, ours + across, *(
        ours + far * along + sign * across for sign in (1, -1)
    )]  # fmt: skip
    axes.fill(*np.transpose(corners), color=COLOURS[2], alpha=0.12, linewidth=0)
    axes.plot(*np.transpose(corners[:2]), color=COLOURS[2], linewidth=1)
    arrows = {
        "g, the loss": (ours, COLOURS[0], "-"),
        "r, the regularizer": (theirs, "#B07800", "-"),  # a darker COLOURS[4]
        "g + r": (total, GREY, "--"),
        "DTNH": (update, COLOURS[1], "-"),
    }
    if not has_conflict:
        del arrows["g + r"]
        arrows["DTNH = g + r"] = arrows.pop("DTNH")
    ends = {name: end / scale * 72 for name, (end, *_) in arrows.items()}
    drawn = [np.linspace(total, update, 40), np.linspace(corners[0], corners[1], 2000)]
    offsets = _offsets(ends, np.concatenate(drawn) / scale * 72)
    for (name, (end, colour, dashes)), offset in zip(arrows.items(), offsets):
        style = {"arrowstyle": "-|>", "color": colour, "lw": 2, "ls": dashes}
        style |= {"shrinkA": 0, "shrinkB": 0}
        axes.annotate("", end, (0, 0), arrowprops=style)
        axes.annotate(
            name,
            end,
            textcoords="offset points",
            xytext=offset,
            color=colour,
            ha="center",
            va="center",
        )
    axes.plot(*np.transpose([total, update]), ":", color=GREY)
    axes.set_xlabel("shaded: the loss falls at least as fast as with g alone")
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    figure.suptitle(
        "In conflict: DTNH moves g + r to where the loss falls as fast as with g"
        if has_conflict
        else "No conflict: DTNH is g + r",
        fontsize=11,
    )
    return figure


def _offsets(
    ends: Mapping[str, np.ndarray], dots: np.ndarray
) -> list[tuple[float, float]]:
    """Returns the positions of names, relative to the ends of their arrows, in points.

    Each name is as near to its arrow's end, and as straight ahead of it, as possible
    without covering an arrow, a dot of another line, or a name that is already placed.
    """
    taken = [end * share for end in ends.values() for share in np.linspace(0, 1, 40)]
    taken += list(dots)
    found = []
    for name, end in ends.items():
        half = np.array([3.2 * len(name), 7.0])  # of the text
        ahead = end / (np.linalg.norm(end) or 1.0)
        choices = []
        for away in (4.0, 12.0, 24.0, 40.0):
            for turn in np.linspace(-np.pi, np.pi, 24, endpoint=False):
                cos, sin = np.cos(turn), np.sin(turn)
                side = np.array([[cos, -sin], [sin, cos]]) @ ahead
                # The name's centre, for this distance of its edge from the end.
                offset = side * (half + away)
                gaps = np.abs(np.array(taken) - end - offset) - half
                is_free = bool((gaps.max(axis=1) > 2).all())
                choices.append((not is_free, away + 8 * abs(turn), *offset))
        *_, x, y = min(choices)
        found.append((float(x), float(y)))
        grid = np.linspace(-1, 1, 12)
        taken += [end + (x, y) + half * (a, b) for a in grid for b in grid]
    return found
