"""Results of each method, with its hyperparameter chosen as its users would."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dtnh_jax._choose_trust import LEVELS, race
from dtnh_jax.studies.trust.catalogue import OF_PLAIN
from dtnh_jax.studies.trust.measure import AXES

# A method's result: `values`, axes `[V][S]`, `right` `[V][S][folds]`.
Found = dict[str, Any]


class Race(NamedTuple):
    """How `never_hurt`, or a variant of it, chooses its trust."""

    levels: tuple[float, ...] = LEVELS
    judge: str = "smooth"  # which of a cell's scores
    # Whether trust must be clearly better than none, or just better.
    is_clear: bool = True


RACED = {
    "trust": Race(),
    "trust-of-one": Race(levels=(0.0, 1.0)),
    "trust-of-both": Race(levels=(0.0, 0.5, 1.0)),
    "trust-by-any-lead": Race(is_clear=False),
    "trust-by-accuracy": Race(judge="right"),
    "trust-by-probability": Race(judge="probability"),
}


class Outcome(NamedTuple):
    """A method's results, by seed."""

    axes: dict[str, Float[np.ndarray, " S"]]
    values: list[float]
    trainings: Float[np.ndarray, " S"]


def outcome_of(name: str, plain: Found, found: Found) -> Outcome:
    """Chooses the number of a method for each seed.

    Trust is raced over the folds. Every other method takes the value with the highest
    accuracy on the first fold, a held-out quarter of the training examples, as most
    users would; plain fine-tuning is a candidate too, and ties go to the first. Then
    every method trains on all examples.

    Args:
      name: name of the method.
      plain: results of plain fine-tuning.
      found: results of the method, by value.
    """
    seeds = len(plain["target"][0])
    rows = [_chosen(name, plain, found, seed) for seed in range(seeds)]
    axes = {}
    for axis in AXES:
        both = [plain[axis][0], *found[axis]]
        axes[axis] = np.array([both[row][seed] for seed, (row, _) in enumerate(rows)])
    values = [0.0, *found["values"]]
    return Outcome(
        axes, [values[row] for row, _ in rows], np.array([1.0 + n for _, n in rows])
    )


def _chosen(name: str, plain: Found, found: Found, seed: int) -> tuple[int, int]:
    """Returns the row of a value (from 1; 0 is plain) and the number of trainings."""
    if not found["right"][0][0]:  # one value, but a second gradient in every step
        return 1, 1
    judge = RACED[name].judge if name in RACED else "right"
    scores = [_numbers(plain[judge][0][seed])]
    scores += [_numbers(each[seed]) for each in found[judge]]
    if name in RACED:
        values = [0.0, *found["values"]]

        def score(value, fold):
            return scores[values.index(value)][fold]

        raced = [x for x in values if x in RACED[name].levels]
        alive, by_level = race(score, raced, len(scores[0]))
        is_out = RACED[name].is_clear and 0.0 in alive
        best = 0.0 if is_out else alive[0]
        return values.index(best), sum(map(len, by_level.values()))
    totals = [each[0].sum() for each in scores]
    return int(np.argmax(totals)), 1 if name in OF_PLAIN else len(scores)


def _numbers(folds: list[Any]) -> list[Float[np.ndarray, " n"]]:
    return [np.array(list(fold), float) for fold in folds]


def best_in_hindsight(plain: Found, found: Found) -> float:
    """Returns the largest gain of any strength on the target's test images, or 0."""
    gains = np.array(found["target"]) - np.array(plain["target"])
    return max(float(gains.mean(axis=1).max()), 0.0)
