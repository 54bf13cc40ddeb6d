"""Compares forgetting at the same target loss, on paths of target and kept losses.

A method's path has a point for each of its strengths, and that of plain adapters as
strength 0. WiSE-FT's path also has the base model. Between points, in the order of
their target losses, the path is a straight line; beyond them it is undefined.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dtnh_jax.finetune.runs.statistics import estimate
from dtnh_jax.lm.methods import LORA, WISE_FT

Losses = Mapping[str, Any]  # a cell's results, or the base model's
# Shares of what plain adapters gain on the target, at which all are compared.
SHARES = (0.5, 0.75, 0.9)


def above(
    method: str, cell: Losses, base: Losses, cells: Sequence[Losses]
) -> float | None:
    """Returns a cell's kept loss minus that of a method at the same target loss.

    Args:
      method: the method to compare with.
      cell: the cell; only its seed is compared.
      base: measurements of the base model.
      cells: results of all methods and seeds.

    Returns:
      Nats per token, or None if the method's path does not reach that target loss.
    """
    path = _path(method, cell["seed"], base, cells)
    kept = _at(path, cell["target_loss"], "kept_loss")
    return None if kept is None else cell["kept_loss"] - kept


def at_shares(
    methods: Sequence[str], base: Losses, cells: Sequence[Losses]
) -> dict[str, list[dict[str, Any]]]:
    """Returns each method's forgetting at shares of the gain of plain adapters.

    Returns:
      By method, for each of `SHARES`: estimates over seeds of the target loss, of
      forgetting (the kept loss minus the base model's) and of the KL on the kept text;
      None if the path of a seed does not reach that share.
    """
    plain = [cell for cell in cells if cell["method"] == LORA]
    found = {}
    for name in methods if plain else ():
        if name != LORA:
            found[name] = [_at_share(name, x, plain, base, cells) for x in SHARES]
    return found


def _at_share(
    name: str,
    share: float,
    plain: Sequence[Losses],
    base: Losses,
    cells: Sequence[Losses],
) -> dict[str, Any]:
    values: dict[str, list[float | None]] = {}
    for cell in plain:
        gain = base["target_loss"] - cell["target_loss"]
        target = base["target_loss"] - share * gain
        path = _path(name, cell["seed"], base, cells)
        kept = _at(path, target, "kept_loss")
        for key, value in (
            ("target_loss", target),
            ("forgotten", None if kept is None else kept - base["kept_loss"]),
            ("kept_kl", _at(path, target, "kept_kl")),
        ):
            values.setdefault(key, []).append(value)
    known = {
        key: None if None in each else estimate([x for x in each if x is not None])
        for key, each in values.items()
    }
    return {"share": share, **known}


def _path(name: str, seed: int, base: Losses, cells: Sequence[Losses]) -> list[Losses]:
    of_seed = [x for x in cells if x["seed"] == seed]
    own = [x for x in of_seed if x["method"] == name]
    if not own:
        return []
    plain = [x for x in of_seed if x["method"] == LORA]
    return [*plain, *own, base] if name == WISE_FT else [*plain, *own]


def _at(path: Sequence[Losses], target: float, key: str) -> float | None:
    """Returns a path's value at a target loss, or None."""
    points = sorted((point["target_loss"], point.get(key)) for point in path)
    if len(points) < 2 or not points[0][0] <= target <= points[-1][0]:
        return None
    return float(np.interp(target, *np.array(points).T))
