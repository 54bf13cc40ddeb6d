"""Chooses the numbers of training, validation and test pictures, and draws them.

All classes have the same number in each set. By default the rarest class determines the
numbers: a third of its pictures for the test, a sixth for validation with `--tune`, the
rest for training, each limited by the caps below. A target with its own test split is
tested on that split.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dtnh_jax.finetune.config import Config
from dtnh_jax.finetune.data import loading
from dtnh_jax.finetune.data.target import Splits, Target

_MOST = {"train": 50, "validation": 100, "test": 300}


class Sizes(NamedTuple):
    """Numbers of pictures of each class."""

    train: int  # of every seed
    validation: int
    test: int

    def as_options(self) -> dict[str, int]:
        """Returns the options of `Config` for these numbers."""
        return {f"{name}_per_class": each for name, each in self._asdict().items()}


def sizes(target: Target, config: Config) -> Sizes:
    """Returns the numbers of pictures of each class: the options', or defaults.

    Args:
      target: the target to split.
      config: the options; `*_per_class` replace the defaults.

    Returns:
      The numbers. `draw` checks that there are enough pictures.

    Raises:
      ValueError: a class has no pictures, or too few to leave some for each set.

    Example:
      >>> import grain
      >>> photographs = Target(
      ...     "cups", "mine", ("mug", "glass"), grain.MapDataset.range(90),
      ...     np.array([0] * 30 + [1] * 60))
      >>> sizes(photographs, Config(target="folder:cups"))
      Sizes(train=20, validation=0, test=10)
    """
    own = target.splits
    everything = np.arange(len(target.labels))
    pool = everything if own is None else own.train
    left = _rarest(target, pool, "training")
    given = Sizes(
        config.train_per_class or 0,
        config.validation_per_class or 0,
        config.test_per_class or 0,
    )
    if own is not None:
        test = given.test or min(_rarest(target, own.test, "testing"), _MOST["test"])
    else:
        test = given.test or min(max(left // 3, 1), _MOST["test"])
    validation = given.validation
    if config.validation_per_class is None and config.tune:
        if own is not None and len(own.validation):
            validation = _rarest(target, own.validation, "validation")
        else:
            validation = max(left // 6, 1)
        validation = min(validation, _MOST["validation"])
    left -= test if own is None else 0
    left -= 0 if own is not None and len(own.validation) else validation
    if left < 1 and not given.train:
        raise ValueError(
            f"{target.name} has too few pictures of a class to leave one for training "
            f"beside {validation} (`--validation-per-class`) and {test} "
            "(`--test-per-class`)."
        )
    return Sizes(given.train or min(left, _MOST["train"]), validation, test)


def draw(target: Target, wanted: Sizes) -> Splits:
    """Draws validation and test sets, and the pool of training pictures of all seeds.

    Args:
      target: the target, with or without its own splits.
      wanted: numbers of pictures of each class.

    Returns:
      Indices. The training set has as many of each class as the rarest class, which may
      be more than `wanted.train`.

    Raises:
      ValueError: a class has fewer pictures than wanted.
    """
    own = target.splits
    if own is None:
        rarest = _rarest(target, np.arange(len(target.labels)), "training")
        kept = wanted.validation + wanted.test
        return loading.split(
            target.labels,
            seed=0,
            train_per_class=max(rarest - kept, wanted.train),
            validation_per_class=wanted.validation,
            test_per_class=wanted.test,
        )
    labels, classes = target.labels, range(len(target.class_names))
    held_out = 0 if len(own.validation) else wanted.validation
    rarest = _rarest(target, own.train, "training")
    asked = {
        "training": (own.train, wanted.train + held_out),
        "validation": (own.validation, wanted.validation - held_out),
        "testing": (own.test, wanted.test),
    }
    for part, (indices, least) in asked.items():
        for label in classes:
            if (found := int(np.sum(labels[indices] == label))) < least:
                raise ValueError(
                    f"Class {target.class_names[label]} of {target.name} has {found} "
                    f"pictures for {part}, but {least} are asked for: see "
                    "`--train-per-class`, `--validation-per-class`, `--test-per-class`."
                )

    def some(indices, start, stop):
        shuffled = [_shuffled(labels, indices, label)[start:stop] for label in classes]
        return np.sort(np.concatenate(shuffled))

    if held_out:
        validation = some(own.train, 0, held_out)
    else:
        validation = some(own.validation, 0, wanted.validation)
    return Splits(
        some(own.train, held_out, rarest), validation, some(own.test, 0, wanted.test)
    )


def _rarest(target: Target, indices: Int[np.ndarray, " n"], part: str) -> int:
    """Returns the number of examples of the rarest class; raises if it is 0."""
    counts = np.bincount(target.labels[indices], minlength=len(target.class_names))
    if missing := [target.class_names[i] for i in np.flatnonzero(counts == 0)]:
        shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise ValueError(f"{target.name} has no pictures for {part} of: {shown}.")
    return int(counts.min())


def _shuffled(
    labels: Int[np.ndarray, " n"], indices: Int[np.ndarray, " m"], label: int
) -> Int[np.ndarray, " k"]:
    """Returns the members of a class in a fixed random order."""
    members = indices[labels[indices] == label]
    draws = np.random.PCG64([0, label]).random_raw(len(members))
    return members[np.argsort(draws, kind="stable")]
