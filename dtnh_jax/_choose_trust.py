"""Chooses how far to trust a regularizer: a race of levels over folds."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int
from scipy import special

from dtnh_jax._arguments import check_count

# To trust it or not: levels between or beyond these keep no more of the help, and each
# is one more to choose wrongly.
LEVELS = (0.0, 1.0)
_SOFTNESS = 0.3  # of `smooth_accuracy`, in root mean squares of the margins


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
    scored on it; then without the second, and compared on the examples of all folds so
    far. A level drops out if it is worse than the best by more than one standard error
    of their difference, example by example, or scores every example as a lower level
    does. With two levels and four folds that takes two to eight trainings. Of equal
    levels the lower one is taken. Then train once more on all examples, with the level
    that was found.

    Score by what matters in the end: for classifiers by `smooth_accuracy`, or whether
    an example is classified correctly. Neither the cross-entropy nor the probability of
    the label will do. A network that is held back predicts with less confidence, which
    the one rewards where labels are wrong and the other punishes, right or wrong.

    Args:
      evaluate: of a level, the rows to train on and the rows held out: trains with
        `never_hurt(..., trust=level)` and returns a score of every held-out example,
        `[held out]`, the higher the better. Use the same start and as many steps for
        every level.
      examples: how many there are, or their classes `[n]`, which folds then share
        evenly.
      levels: of trust, at least 0; 0 is to do without the regularizer, and is always
        one of them. One beside it is enough, see the results of the study.
      folds: at least 2.
      seed: of the cut.

    Returns:
      The level, with what every training scored.

    Raises:
      ValueError: for values that are out of range, or scores that do not fit.
      TypeError: for arguments of another kind.

    Example:
      >>> def evaluate(trust, train, held_out):  # stands for a training
      ...     return np.full(len(held_out), trust)
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


def smooth_accuracy(
    logits: Float[ArrayLike, "n classes"], labels: Int[ArrayLike, " n"]
) -> Float[np.ndarray, " n"]:
    """Returns how far each example is classified correctly, from 0 to 1.

    It is `sigmoid(margin / (0.3 * rms))`, with the margin between the logit of the
    label and the largest other one, and the root mean square of all margins. So it is
    an accuracy in which a near miss counts more than a bad one, which makes it less
    noisy where examples are few; and it does not depend on how confident a network is:
    twice the logits are the same score.

    Args:
      logits: of the examples, finite.
      labels: their classes, from 0.

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
