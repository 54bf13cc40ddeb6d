"""Chooses how far to trust a regularizer: a race of levels over folds."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dtnh_jax._arguments import check_count

# Of which one is right for any strength, as `never_hurt` sets the scale itself.
LEVELS = (0.0, 0.1, 1.0, 3.0)
_REMAINING = (2, 2, 1)  # at most so many levels go on after the first folds


class TrustChoice(NamedTuple):
    """What `choose_trust` found."""

    trust: float
    # Mean score of each level, on each fold that it was trained on.
    scores: dict[float, list[float]]

    @property
    def trainings(self) -> int:
        """How many trainings it took."""
        return sum(map(len, self.scores.values()))


def choose_trust(
    evaluate: Callable[[float, np.ndarray, np.ndarray], Any],
    examples: int | np.ndarray,
    *,
    levels: Sequence[float] = LEVELS,
    folds: int = 4,
    seed: int = 0,
) -> TrustChoice:
    """Finds the level of trust for `never_hurt` by cross-validation, as a race.

    The examples are cut into folds. Every level is trained without the first fold and
    scored on it; the levels that do well go on to the next one, where they are compared
    on the examples of all folds so far. A level drops out if it is worse than the best
    by more than one standard error of their difference, example by example, or scores
    every example as a lower level does; at most two go on after the first fold, and
    after the third the better one is taken. So it takes four to eight trainings, where
    all levels on all folds take sixteen. Of equal levels the lower one is taken. Then
    train once more on all examples, with the level that was found.

    Score by what matters in the end. For classifiers that is whether an example is
    classified correctly. The cross-entropy will not do: any regularizer that flattens
    predictions improves it where labels are wrong.

    Args:
      evaluate: of a level, the rows to train on and the rows held out: trains with
        `never_hurt(..., trust=level)` and returns a score of every held-out example,
        `[held out]`, the higher the better. Use the same start and as many steps for
        every level.
      examples: how many there are, or their classes `[n]`, which folds then share
        evenly.
      levels: of trust, at least 0; 0 is to do without the regularizer, and is always
        one of them.
      folds: at least 2.
      seed: of the cut.

    Returns:
      The level, with what every training scored.

    Raises:
      ValueError: for values that are out of range, or scores that do not fit.
      TypeError: for arguments of another kind.

    Example:
      >>> def evaluate(trust, train, held_out):  # stands for a training
      ...     return np.full(len(held_out), -abs(trust - 1.0))
      >>> choose_trust(evaluate, examples=40).trust
      1.0

    References:
      Races: Maron and Moore, 1994, "Hoeffding races"; over folds, Krueger et al., 2015,
      https://jmlr.org/papers/v16/krueger15a.html
    """
    candidates = _checked_levels(levels)
    parts = cut_in_folds(examples, folds, seed)
    everything = np.sort(np.concatenate(parts))

    def score(level: float, fold: int) -> Float[np.ndarray, " n"]:
        held_out = parts[fold]
        given = evaluate(level, np.setdiff1d(everything, held_out), held_out)
        return _checked_score(given, level, len(held_out))

    return race(score, candidates, folds)


def race(
    score: Callable[[float, int], Float[np.ndarray, " n"]],
    levels: Sequence[float],
    folds: int,
) -> TrustChoice:
    """Races levels over folds, as `choose_trust` says.

    Args:
      score: of a level and a fold: a score of every example that it holds out.
      levels: in ascending order.
      folds: how many there are.
    """
    alive, seen = list(levels), {level: [] for level in levels}
    for fold in range(folds):
        for level in alive:
            seen[level].append(score(level, fold))
        alive = remaining([np.concatenate(seen[level]) for level in alive], alive)
        if not alive:
            raise ValueError(
                "`evaluate` must return finite scores, got none at the levels "
                f"{list(levels)}."
            )
        if fold < len(_REMAINING):
            alive = alive[: _REMAINING[fold]]
        if len(alive) == 1:
            break
    scores = {x: [float(each.mean()) for each in found] for x, found in seen.items()}
    return TrustChoice(alive[0], scores)


def remaining(
    scores: Sequence[Float[np.ndarray, " n"]], levels: Sequence[float]
) -> list[float]:
    """Returns the levels that are not clearly worse than the best, the best first.

    One with a score that is not finite, whose training diverged, is left out; so is one
    that scores every example as a lower level does.

    Args:
      scores: of the same examples, for each level.
      levels: in ascending order.
    """
    finite = [i for i in range(len(levels)) if np.isfinite(scores[i]).all()]
    distinct = {
        scores[i].tobytes(): i for i in sorted(finite, key=lambda i: -levels[i])
    }
    order = sorted(distinct.values(), key=lambda i: (-scores[i].sum(), levels[i]))

    def is_close(score: np.ndarray) -> bool:
        lead = scores[order[0]] - score
        return bool(lead.sum() <= np.sqrt(np.sum(lead**2)))

    return [levels[i] for i in order if is_close(scores[i])]


def cut_in_folds(
    examples: int | np.ndarray, folds: int, seed: int
) -> list[Int[np.ndarray, " held_out"]]:
    """Returns the rows that each fold holds out, in ascending order.

    Args:
      examples: how many, or their classes, which folds share evenly.
      folds: at least 2, and at most as many as examples.
      seed: of the cut.

    Raises:
      ValueError: for values that are out of range.
      TypeError: for arguments of another kind.
    """
    check_count("folds", folds)
    if isinstance(examples, int):
        check_count("examples", examples)
        classes = np.zeros(examples, int)
    else:
        classes = np.asarray(examples)
        if classes.ndim != 1:
            raise ValueError(
                "`examples` must be a number or an array of one axis, got the shape "
                f"{classes.shape}."
            )
    if not 2 <= folds <= len(classes):
        raise ValueError(
            f"`folds` must be from 2 to the number of examples, {len(classes)}, got "
            f"{folds}."
        )
    rows = np.random.default_rng(seed).permutation(len(classes))
    rows = rows[np.argsort(classes[rows], kind="stable")]
    return [np.sort(rows[fold::folds]) for fold in range(folds)]


def _checked_levels(levels: Sequence[float]) -> list[float]:
    found = sorted({0.0, *map(float, levels)})
    if len(found) < 2 or not all(0 <= x < np.inf for x in found):
        raise ValueError(
            f"`levels` must hold finite numbers of at least 0, got {list(levels)}."
        )
    return found


def _checked_score(given: Any, level: float, count: int) -> Float[np.ndarray, " n"]:
    score = np.asarray(given, np.float64)
    if score.shape != (count,):
        raise ValueError(
            f"`evaluate` must return a score of every held-out example, [{count}], got "
            f"the shape {score.shape} at trust {level:g}."
        )
    return score
