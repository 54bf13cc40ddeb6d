"""`choose_trust`: cross-validates levels of trust, and drops the clearly worse ones."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int
from scipy import special

from dtnh_jax._arguments import check_count

# To trust the regularizer or not. In the study level 1 helps as much and harms twice as
# much where it is chosen wrongly, and more levels are more to choose wrongly.
LEVELS = (0.0, 0.5)
# A difference is clear from so many standard errors on, the one-sided level of 10%.
# Cells of the study lose a little more with less, and keep less help with more.
_CLEAR = 1.28
_SOFTNESS = 0.3  # of `smooth_accuracy`, in root mean squares of the margins


class TrustChoice(NamedTuple):
    """The level that `choose_trust` chose, and the scores that it compared."""

    trust: float
    # Mean score of each level, on each fold that it was scored on.
    scores: dict[float, list[float]]

    @property
    def trainings(self) -> int:
        """Number of trainings that the choice took."""
        return sum(map(len, self.scores.values()))


def choose_trust(
    evaluate: Callable[[float, np.ndarray, np.ndarray], Any],
    examples: int | np.ndarray,
    *,
    levels: Sequence[float] = LEVELS,
    folds: int = 4,
    seed: int = 0,
) -> TrustChoice:
    """Chooses the trust of `never_hurt` by cross-validation, as a race of levels.

    The examples are split into folds. Every level is trained without the first fold
    and scored on it. The remaining levels are then trained without the second fold and
    compared on the examples of both folds, and so on. After each fold a level drops out
    if it is clearly worse than the best level, by more than 1.28 standard errors of
    their paired difference (a one-sided level of 10%), or if it gives every example the
    same score as a lower level. If 0 is still in the race after the last fold, it wins:
    a regularizer is trusted only if it is clearly better than none. Otherwise the best
    level wins, and ties go to the lower one. Two levels and four folds take two to
    eight trainings. Afterwards, train once more on all examples with the chosen level.

    Score classifiers by `smooth_accuracy`, or by 1 for a correct and 0 for a wrong
    prediction. Do not use the cross-entropy or the probability of the label: both
    depend on the confidence of a network, which a regularizer lowers. The cross-entropy
    rewards that where labels are wrong; the probability punishes it everywhere.

    Args:
      evaluate: maps a level, the rows to train on and the held-out rows to a score of
        every held-out example, `[held out]`; higher is better. It trains with
        `never_hurt(..., trust=level)`, from the same initial parameters and for the
        same number of steps at every level.
      examples: number of examples, or their classes `[n]`; folds then hold equal
        shares of every class.
      levels: candidates for `trust`, at least 0. 0, which is to do without the
        regularizer, is always added. One level besides 0 suffices in the study.
      folds: number of folds, at least 2.
      seed: seed of the split.

    Returns:
      The chosen level, with the mean score of every training.

    Raises:
      ValueError: a value is out of range, or the scores have another shape, or no
        level has finite ones.
      TypeError: an argument has the wrong type.

    Example:
      >>> def evaluate(trust, train, held_out):  # stands for a training
      ...     return np.full(len(held_out), trust)
      >>> choose_trust(evaluate, examples=40).trust
      0.5

    References:
      Races: Maron and Moore, 1994, "Hoeffding races"; over folds, Krueger et al., 2015,
      https://jmlr.org/papers/v16/krueger15a.html
    """
    candidates = _checked_levels(levels)
    parts = cut_in_folds(examples, folds, seed)
    everything = np.sort(np.concatenate(parts))

    def score(level: float, fold: int) -> Float[np.ndarray, " n"]:
        held_out = parts[fold]
        scores = evaluate(level, np.setdiff1d(everything, held_out), held_out)
        return _checked_score(scores, level, len(held_out))

    alive, by_level = race(score, candidates, folds)
    means = {
        level: [float(scores.mean()) for scores in by_fold]
        for level, by_fold in by_level.items()
    }
    return TrustChoice(0.0 if 0.0 in alive else alive[0], means)


def smooth_accuracy(
    logits: Float[ArrayLike, "n classes"], labels: Int[ArrayLike, " n"]
) -> Float[np.ndarray, " n"]:
    """Returns a smooth version of "classified correctly" for each example, from 0 to 1.

    It is `sigmoid(margin / (0.3 * rms))`. The margin is the logit of the label minus
    the largest other logit, and `rms` is the root mean square of all margins. A near
    miss scores higher than a bad miss, so the mean is less noisy than accuracy on few
    examples. The score does not depend on a network's confidence: twice the logits give
    the same score.

    Args:
      logits: finite logits of the examples.
      labels: classes of the examples, from 0.

    Example:
      >>> logits = np.array([[2.0, 0.0], [0.2, 0.0], [0.0, 1.0]])
      >>> print(smooth_accuracy(logits, np.array([0, 0, 0])).round(2))
      [0.99 0.63 0.07]
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    rows = np.arange(len(labels))
    right = logits[rows, labels]
    others = logits.copy()
    others[rows, labels] = -np.inf
    margin = right - others.max(axis=1)
    scale = _SOFTNESS * np.sqrt(np.mean(margin**2))
    return special.expit(margin / scale if scale > 0 else margin)


def race(
    score: Callable[[float, int], Float[np.ndarray, " n"]],
    levels: Sequence[float],
    folds: int,
) -> tuple[list[float], dict[float, list[Float[np.ndarray, " n"]]]]:
    """Compares levels fold by fold, as described in `choose_trust`.

    Args:
      score: maps a level and a fold to a score of every example of that fold.
      levels: candidates, in ascending order.
      folds: number of folds.

    Returns:
      The levels left at the end, the best first, and the scores of every level, by
      fold.
    """
    alive, by_level = list(levels), {level: [] for level in levels}
    for fold in range(folds):
        for level in alive:
            by_level[level].append(score(level, fold))
        alive = remaining([np.concatenate(by_level[level]) for level in alive], alive)
        if not alive:
            raise ValueError(
                "`evaluate` must return finite scores, got none at the levels "
                f"{list(levels)}."
            )
        if len(alive) == 1:
            break
    return alive, by_level


def remaining(
    scores: Sequence[Float[np.ndarray, " n"]], levels: Sequence[float]
) -> list[float]:
    """Returns the levels that are not clearly worse than the best, the best first.

    Leaves out a level with a score that is not finite, because its training diverged,
    and a level that gives every example the same score as a lower level.

    Args:
      scores: for each level, the scores of the same examples.
      levels: candidates, in ascending order.
    """
    finite = [i for i in range(len(levels)) if np.isfinite(scores[i]).all()]
    distinct = {
        scores[i].tobytes(): i for i in sorted(finite, key=lambda i: -levels[i])
    }
    order = sorted(distinct.values(), key=lambda i: (-scores[i].sum(), levels[i]))

    def is_close(score: np.ndarray) -> bool:
        lead = scores[order[0]] - score
        return bool(lead.sum() <= _CLEAR * np.sqrt(np.sum(lead**2)))

    return [levels[i] for i in order if is_close(scores[i])]


def cut_in_folds(
    examples: int | np.ndarray, folds: int, seed: int
) -> list[Int[np.ndarray, " held_out"]]:
    """Returns the rows that each fold holds out, in ascending order.

    Args:
      examples: number of examples, or their classes, of which folds hold equal shares.
      folds: number of folds, from 2 to the number of examples.
      seed: seed of the split.

    Raises:
      ValueError: a value is out of range.
      TypeError: an argument has the wrong type.
    """
    check_count("folds", folds)
    if isinstance(examples, int):
        check_count("examples", examples)
        classes = np.zeros(examples, int)
    else:
        classes = np.asarray(examples)
        if classes.ndim != 1:
            raise ValueError(
                "`examples` must be a number or an array with one axis, got the shape "
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
    candidates = sorted({0.0, *map(float, levels)})
    if len(candidates) < 2 or not all(0 <= x < np.inf for x in candidates):
        raise ValueError(
            "`levels` must hold finite numbers of at least 0, one of them above 0, got "
            f"{list(levels)}."
        )
    return candidates


def _checked_score(scores: Any, level: float, count: int) -> Float[np.ndarray, " n"]:
    score = np.asarray(scores, np.float64)
    if score.shape != (count,):
        raise ValueError(
            f"`evaluate` must return a score of every held-out example, [{count}], got "
            f"the shape {score.shape} at trust {level:g}."
        )
    return score
