"""Chooses the trust of `never_hurt`, by a race of levels over folds."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from dtnh_jax import TrustChoice, choose_trust
from dtnh_jax._choose_trust import cut_in_folds

MOST_TRAININGS = 8  # of one race: two levels on four folds
_FOLDS = 4


def count_folds(labels: Int[np.ndarray, " n"]) -> int:
    """Returns the number of folds of a training set; fewer for a tiny set."""
    return max(min(_FOLDS, len(labels)), 2)


def folds(labels: Int[np.ndarray, " n"], seed: int) -> list[np.ndarray]:
    """Returns the rows that each fold holds out."""
    return cut_in_folds(np.asarray(labels), count_folds(labels), seed)


def choose(
    labels: Int[np.ndarray, " n"],
    seed: int,
    train: Callable[[float, int], np.ndarray],
) -> TrustChoice:
    """Chooses the level for the training set of a seed.

    Args:
      labels: labels of the training set.
      seed: seed of the split into folds.
      train: maps a level and a fold to the scores of the fold's photographs, after
        training without them.
    """
    held_out_by = folds(labels, seed)

    def evaluate(trust, _, held_out):
        number = [np.array_equal(rows, held_out) for rows in held_out_by].index(True)
        return train(trust, number)

    return choose_trust(
        evaluate, np.asarray(labels), folds=count_folds(labels), seed=seed
    )
