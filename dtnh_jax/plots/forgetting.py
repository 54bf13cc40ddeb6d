"""Loss on the target against loss on the original task."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dtnh_jax.plots._style import COLOURS, DASHES, GREY, blank, legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX*"


def forgetting(
    curves: Mapping[str, Sequence[tuple[float, float]]], base: tuple[float, float]
) -> "Figure":
    """Plots losses on the target and on the original task: lower left is better.

    Args:
      curves: for each method, a point `(target loss, original loss)` for each of its
        strengths, in nats per token.
      base: the same point of the model before fine-tuning.

    Returns:
      A figure; a line joins the points of a method in the order of target losses. The
      title states the lowest target loss and the most that is forgotten.

    Raises:
      ValueError: there are no methods, or a method has no points.

    Example:
      >>> figure = forgetting({"lora": [(3.2, 2.6)], "kl": [(3.4, 2.4)]}, (4.1, 2.3))
      >>> figure.axes[0].get_xlabel()
      'loss on the target (nats per token)'
      >>> figure.get_suptitle()
      'Target loss from 4.10 to 3.20, forgotten up to +0.30 nats'
    """
    if not curves:
        raise ValueError("`curves` must hold at least 1 method, got 0.")
    for name, points in curves.items():
        if not points:
            raise ValueError(f"`curves[{name!r}]` must hold a point, got none.")
    figure = blank(6.0, 4.6)
    axes = figure.subplots()
    handles = []
    for number, points in enumerate(curves.values()):
        xs, ys = zip(*sorted(points))
        handles += axes.plot(
            xs,
            ys,
            color=COLOURS[number % len(COLOURS)],
            linestyle=DASHES[number % len(DASHES)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=5,
            linewidth=1.2,
        )
    handles += axes.plot(*base, "+", color=GREY, markersize=10, linestyle="none")
    axes.axhline(base[1], color=GREY, linewidth=0.8)
    axes.set_xlabel("loss on the target (nats per token)")
    axes.set_ylabel("loss on the original task (nats per token)")
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    legend(figure, handles, [*curves, "base model"])
    learned = min(x for points in curves.values() for x, _ in points)
    forgotten = max(y for points in curves.values() for _, y in points) - base[1]
    figure.suptitle(
        f"Target loss from {base[0]:.2f} to {learned:.2f}, forgotten up to "
        f"{forgotten:+.2f} nats",
        fontsize=11,
    )
    return figure
