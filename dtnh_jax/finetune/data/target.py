"""What a task of classification is, wherever its pictures come from."""

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
    """Indices into one target, ascending and without an overlap."""

    train: Int[np.ndarray, " train"]
    validation: Int[np.ndarray, " validation"]
    test: Int[np.ndarray, " test"]


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A classification task, not yet split, resized or in memory.

    Attributes:
      name: what `load_target` knows it by.
      licence: one line to print wherever the data is used.
      class_names: the name of each label, in the order of labels.
      examples: read by index; gives `{"image": uint8 [h, w, c], "label": int}`, with
        1 or 3 channels. Sizes may differ from one example to the next.
      labels: the label of every example, so that `split` decodes no image.
      splits: of its publishers, if they define a test set; that of validation may be
        empty, and examples may be in none of the three.
      notes: sentences to print once, such as which pictures were left out.
      digest: of the pictures, where those of a name may be other ones another time.
      white: in pictures of more than 8 bits, see `pictures.white_of`.
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
    """What tells a target's pictures from those of another, ready for JSON.

    Returns:
      A `digest` of all that decides which pictures are in which set, and for a sentence
      on what differs how many `pictures` each class has.

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
    """What to make of splits of which one or two may be empty.

    Args:
      train: indices, at least one.
      validation: indices, or none.
      test: indices, or none.

    Returns:
      `Target.splits`, None if all examples are in `train`; and notes. Many data sets
      have one split beside that for training and call it validation: it is what they
      are compared on, so it is the test set here.

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
