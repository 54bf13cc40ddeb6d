"""From a target to batches.

`split` draws indices, `materialize` reads their examples into arrays, `views` adds
mirror images, and the two `*_batches` functions make batches for a loop.
"""

import dataclasses
from typing import Any

import grain
import numpy as np
from jaxtyping import Bool, Int, Int32, UInt8
from PIL import Image

from dtnh_jax.finetune.data.pictures import quiet
from dtnh_jax.finetune.data.target import Splits, Target

# Letters of shapes: n examples, b of them in a batch, h by w pixels of c channels.
Batch = dict[str, Any]  # arrays
VIEWS = 4  # of an example, see `views`


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Examples in memory, of one size."""

    images: UInt8[np.ndarray, "n h w 3"]
    labels: Int32[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, rows: np.ndarray) -> "Examples":
        """Returns the examples at `rows`, in that order."""
        return Examples(self.images[rows], self.labels[rows])


def split(
    labels: Int[np.ndarray, " n"],
    *,
    seed: int,
    train_per_class: int,
    validation_per_class: int,
    test_per_class: int | None = None,
) -> Splits:
    """Draws the same number of examples from every class, without overlap.

    Each class is shuffled once. Validation takes the first examples, training the next,
    and test the last. So for one seed the test set does not depend on
    `train_per_class`, and a smaller training set is part of every larger one, as curves
    over the number of training examples require. With `test_per_class` None the test
    set is the rest, which shrinks as the training set grows.

    Args:
      labels: the label of every example, at least 0.
      seed: seed of the shuffles, at least 0.
      train_per_class: training examples of each class, at least 1.
      validation_per_class: validation examples of each class, at least 0.
      test_per_class: test examples of each class, at least 1; None takes the rest, with
        the target's proportions of classes.

    Returns:
      The indices of the three sets.

    Raises:
      ValueError: a number is out of range, or a class has too few examples.

    Example:
      >>> labels = np.array([0, 0, 0, 0, 1, 1, 1])
      >>> s = split(labels, seed=0, train_per_class=1, validation_per_class=1)
      >>> [labels[indices].tolist() for indices in s]
      [[0, 1], [0, 1], [0, 0, 1]]
    """
    _at_least("seed", seed, 0)
    _at_least("train_per_class", train_per_class, 1)
    _at_least("validation_per_class", validation_per_class, 0)
    if test_per_class is not None:
        _at_least("test_per_class", test_per_class, 1)
    if not len(labels):
        raise ValueError("`labels` must hold at least 1 label, got 0.")
    _at_least("labels", int(labels.min()), 0)
    asked_for_test = 1 if test_per_class is None else test_per_class
    asked = train_per_class + validation_per_class + asked_for_test

    parts: list[list[np.ndarray]] = []
    for label in range(labels.max() + 1):
        members = np.flatnonzero(labels == label)
        if len(members) < asked:
            raise ValueError(
                f"Class {label} has {len(members)} examples, but {asked} are asked "
                f"for: {train_per_class} (`train_per_class`) + {validation_per_class} "
                f"(`validation_per_class`) + {asked_for_test} (`test_per_class`"
                + (", which leaves at least 1)." if test_per_class is None else ").")
            )
        # The raw stream, because NumPy guarantees that it never changes; the result of
        # `Generator.permutation` may (NEP 19). With a stream for each class, the draw
        # of a class does not depend on the sizes of the others.
        draws = np.random.PCG64([seed, label]).random_raw(len(members))
        shuffled = members[np.argsort(draws, kind="stable")]
        train_end = validation_per_class + train_per_class
        test_start = (
            train_end if test_per_class is None else len(members) - test_per_class
        )
        parts.append(
            [
                shuffled[validation_per_class:train_end],
                shuffled[:validation_per_class],
                shuffled[test_start:],
            ]
        )
    return Splits(*(np.sort(np.concatenate(part)) for part in zip(*parts)))


def materialize(
    target: Target, indices: Int[np.ndarray, " n"], image_size: int
) -> Examples:
    """Reads and resizes examples, and keeps them in memory.

    Targets of fine-tuning are small (2,223 images at 96 pixels: 61 MB). Decoding a
    photograph takes milliseconds, as long as a training step on it, so each photograph
    is decoded and resized once instead of once per epoch.

    Args:
      target: the target to read from.
      indices: indices of the examples, in the order of the result.
      image_size: height and width of the result, in pixels; the aspect ratio is not
        kept. Bicubic, with antialiasing.

    Returns:
      The examples. Grey images have three equal channels.

    Raises:
      ValueError: `image_size` is below 1, an index is out of range, or an image has
        neither 1 nor 3 channels.
    """
    _at_least("image_size", image_size, 1)
    total = len(target.labels)
    if len(indices) and (indices.min() < 0 or indices.max() >= total):
        raise ValueError(
            f"`indices` must be from 0 to {total - 1}, the examples of {target.name!r},"
            f" got {indices.min()} to {indices.max()}."
        )

    def resized(index: int) -> np.ndarray:
        pixels = target.examples[index]["image"]
        if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3):
            raise ValueError(
                f"Example {index} of {target.name!r} must be [h, w, 1] or [h, w, 3], "
                f"got {list(pixels.shape)}."
            )
        # PIL recognizes a grey image by its missing axis.
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
        return np.asarray(image.convert("RGB"))

    images = np.empty((len(indices), image_size, image_size, 3), np.uint8)
    if len(indices):
        # Grain's threads read them, because PIL releases the interpreter lock.
        reader = grain.MapDataset.source(indices.tolist()).map(resized)
        with quiet():
            for row, image in enumerate(reader.to_iter_dataset()):
                images[row] = image
    return Examples(images, target.labels[indices].astype(np.int32))


def views(examples: Examples) -> grain.MapDataset:
    """Returns four views of every image: original, upside down, mirrored, and both.

    Args:
      examples: at least one example.

    Returns:
      A dataset of `VIEWS` times as many `{"image": uint8 [h, w, 3], "label": int32}`;
      the views of an example are adjacent.

    Raises:
      ValueError: there are no examples.
    """
    if not len(examples):
        raise ValueError("`examples` must hold at least 1 example, got 0.")

    def read(index: int) -> dict[str, Any]:
        example, view = divmod(index, VIEWS)
        image = examples.images[example]
        image = image[::-1] if view & 1 else image
        image = image[:, ::-1] if view & 2 else image
        return {"image": image, "label": examples.labels[example]}

    return grain.MapDataset.range(VIEWS * len(examples)).map(read)


def training_batches(
    views: grain.MapDataset, batch_size: int, seed: int
) -> grain.MapDataset[Batch]:
    """Returns endless batches, shuffled each epoch, with a random view of each example.

    A batch may span two epochs. So every example occurs once per epoch and every batch
    is full, even if `batch_size` exceeds the number of examples.

    Args:
      views: result of `views`, or with more entries, such as those of
        `teacher_cache.cache_features`.
      batch_size: examples in a batch, at least 1.
      seed: seed of order and views, from 0 to 2**32 - 1.

    Returns:
      A dataset whose element at `step` is the batch of that step,
      `{"image": uint8 [b, h, w, 3], "label": int32 [b]}`. It is a pure function of the
      arguments and `step`, so a loop can resume at any step.

    Raises:
      ValueError: an argument is out of range.
    """
    _at_least("batch_size", batch_size, 1)
    if not 0 <= seed < 2**32:
        raise ValueError(f"`seed` must be from 0 to 2**32 - 1, got {seed}.")

    def draw(example: int, rng: np.random.Generator) -> int:
        return VIEWS * example + int(rng.integers(VIEWS))

    return (
        grain.MapDataset.range(len(views) // VIEWS)
        .seed(seed)
        .shuffle()
        .repeat()  # before `batch`, which would otherwise drop each epoch's remainder
        .random_map(draw)
        .map(lambda view: views[view])
        .batch(batch_size)
    )


def evaluation_batches(examples: Examples, batch_size: int) -> list[Batch]:
    """Splits examples, in order, into batches of one size, so that jit compiles once.

    Args:
      examples: the examples; full batches are views of their arrays.
      batch_size: examples in a batch, at least 1.

    Returns:
      Batches `{"image": uint8 [b, h, w, 3], "label": int32 [b], "mask": bool [b]}`.
      The mask is False for the zeros that pad the last batch: leave them out of sums.

    Raises:
      ValueError: `batch_size` is below 1.
    """
    _at_least("batch_size", batch_size, 1)

    def padded(array: np.ndarray, start: int) -> np.ndarray:
        rows = array[start : start + batch_size]
        missing = batch_size - len(rows)
        if not missing:
            return rows
        return np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))

    mask: Bool[np.ndarray, " n"] = np.ones(len(examples), bool)
    columns = {"image": examples.images, "label": examples.labels, "mask": mask}
    return [
        {key: padded(column, start) for key, column in columns.items()}
        for start in range(0, len(examples), batch_size)
    ]


def _at_least(argument: str, value: int, bound: int) -> None:
    """Raises ValueError unless `value` is at least `bound`."""
    if value < bound:
        raise ValueError(f"`{argument}` must be at least {bound}, got {value}.")
