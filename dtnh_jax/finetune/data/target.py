"""The type of a classification task."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int

# Letters of shapes: n examples, h by w pixels of c channels.


class Splits(NamedTuple):
    """Indices of a target's examples, ascending and disjoint."""

    train: Int[np.ndarray, " train"]
    validation: Int[np.ndarray, " validation"]
    test: Int[np.ndarray, " test"]


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A classification task, not yet split, resized or in memory.

    Attributes:
      name: its name for `load_target`.
      licence: one line, to be printed when the data are used.
      class_names: the name of each label, in the order of labels.
      examples: read by index; returns `{"image": uint8 [h, w, c], "label": int}`, with
        1 or 3 channels. Sizes of examples may differ.
      labels: the label of every example, so that `split` decodes no image.
      splits: the publishers' splits, if they define a test set. The validation split
        may be empty, and examples may be in none of the three.
      notes: sentences to print once, for example on pictures that were left out.
      digest: digest of the pictures, if the pictures of this name may change.
      white: white of pictures with more than 8 bits, see `pictures.white_of`.
    """

    name: str
    licence: str
    class_names: tuple[str, ...]
    examples: grain.sources.RandomAccessDataSource
    labels: Int[np.ndarray, " n"]
    splits: Splits | None = None
    notes: tuple[str, ...] = ()
    digest: str = ""
    white: Mapping[str, float] = dataclasses.field(default_factory=dict)


def contents(target: Target) -> dict[str, Any]:
    """Returns the identity of a target's pictures, for JSON.

    Returns:
      A `digest` of everything that determines the sets of pictures, and the number of
      `pictures` of each class, for messages.

    Example:
      >>> import grain
      >>> photographs = Target(
      ...     "cups", "mine", ("mug", "glass"), grain.MapDataset.range(3),
      ...     np.array([0, 1, 1]))
      >>> contents(photographs)["pictures"]
      {'mug': 1, 'glass': 2}
    """
    sets = [] if target.splits is None else [x.tolist() for x in target.splits]
    named = [target.class_names, target.labels.tolist(), sets, target.digest]
    counts = np.bincount(target.labels, minlength=len(target.class_names))
    return {
        "digest": hashlib.sha256(json.dumps(named).encode()).hexdigest(),
        "pictures": dict(zip(target.class_names, counts.tolist())),
    }


def published_splits(
    train: Int[np.ndarray, " train"],
    validation: Int[np.ndarray, " validation"],
    test: Int[np.ndarray, " test"],
) -> tuple[Splits | None, tuple[str, ...]]:
    """Returns splits and notes, from published splits that may be empty.

    Args:
      train: indices, at least one.
      validation: indices, or none.
      test: indices, or none.

    Returns:
      `Target.splits`, None if all examples are in `train`; and notes. Many data sets
      have one split besides training and call it validation. Methods are compared on
      it, so it is the test set here.

    Example:
      >>> nobody, some = np.zeros(0, int), np.array([2, 3])
      >>> published_splits(np.array([0, 1]), some, nobody)[0].test
      array([2, 3])
    """
    if len(test):
        return Splits(train, validation, test), ()
    if len(validation):
        note = "There is no test split: the validation split is the test set."
        return Splits(train, test, validation), (note,)
    return None, ()
