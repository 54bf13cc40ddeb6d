"""Loss on the target against loss on the original task."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dtnh_jax.plots._style import COLOURS, DASHES, GREY, blank, legend, span

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
      title names the methods that forget least and most, each at its lowest target
      loss.

    Raises:
      ValueError: there are no methods, or a method has no points.

    Example:
      >>> figure = forgetting({"lora": [(3.2, 2.6)], "kl": [(3.4, 2.4)]}, (4.1, 2.3))
      >>> figure.axes[0].get_xlabel()
      'loss on the target (nats per token)'
      >>> figure.get_suptitle()
      'Forgotten: from +0.10 (kl) to +0.30 (lora) nats'
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
    forgotten = {name: min(points)[1] - base[1] for name, points in curves.items()}
    figure.suptitle(f"Forgotten: {span(forgotten, '{:+.2f}'.format)} nats", fontsize=11)
    return figure
