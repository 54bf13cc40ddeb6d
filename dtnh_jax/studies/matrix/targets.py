"""What is fine-tuned on: little of images that no source has seen."""

import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dtnh_jax.finetune.data import loading
from dtnh_jax.studies.matrix.catalogue import TARGETS
from dtnh_jax.studies.matrix.images import Images, load_images


class Task(NamedTuple):
    """A target that is split; validation and test images are the same for all seeds."""

    # Of a seed: its training images. A smaller set is part of a larger one.
    training_set: Callable[[int], Images]
    validation: Images
    test: Images


def load_task(
    name: str, data_dir: pathlib.Path, validation_per_class: int, test_per_class: int
) -> Task:
    """Reads a target of the small networks and splits it.

    Args:
      name: one of `TARGETS`.
      data_dir: see `images.load_images`.
      validation_per_class: validation images of each class.
      test_per_class: test images of each class.

    Raises:
      ValueError: its images can not be read, or are too few.
    """
    target = TARGETS[name]
    images = load_images(target.images, data_dir)
    return make_task(
        name,
        images.labels,
        images.pick,
        train_per_class=target.train_per_class,
        validation_per_class=validation_per_class,
        test_per_class=test_per_class,
        label_noise=target.label_noise,
    )


def make_task(
    name: str,
    labels: Int[np.ndarray, " n"],
    read: Callable[[np.ndarray], Images],
    *,
    train_per_class: int,
    validation_per_class: int,
    test_per_class: int,
    label_noise: float = 0.0,
) -> Task:
    """Splits images; what validation and test leave over is what seeds draw from.

    Args:
      name: for errors.
      labels: the class of every image.
      read: reads some of them, by index.
      train_per_class: training images of each class.
      validation_per_class: validation images of each class.
      test_per_class: test images of each class.
      label_noise: share of the training images whose label is that of another class,
        drawn at random. Those of validation and test are right.

    Raises:
      ValueError: the images are too few.
    """
    rarest = int(np.bincount(labels).min())
    # One more than a seed draws, because `split` leaves at least one; it also says
    # what is missing.
    least = train_per_class + 1
    try:
        splits = loading.split(
            labels,
            seed=0,
            train_per_class=max(rarest - validation_per_class - test_per_class, least),
            validation_per_class=validation_per_class,
            test_per_class=test_per_class,
        )
    except ValueError as error:
        raise ValueError(f"Target {name}: {error}") from error

    def training_set(seed: int) -> Images:
        drawn = loading.split(
            labels[splits.train],
            seed=seed,
            train_per_class=train_per_class,
            validation_per_class=0,
            test_per_class=None,
        )
        images = read(splits.train[drawn.train])
        return _with_noise(images, label_noise, int(labels.max()) + 1, seed)

    return Task(
        functools.lru_cache(maxsize=32)(training_set),
        read(splits.validation),
        read(splits.test),
    )


def _with_noise(images: Images, share: float, classes: int, seed: int) -> Images:
    """Gives some of the images the label of another class."""
    rng = np.random.default_rng(seed)
    labels = images.labels.copy()
    wrong = rng.permutation(len(labels))[: round(share * len(labels))]
    others = rng.integers(1, classes, len(wrong), labels.dtype)
    labels[wrong] = (labels[wrong] + others) % classes
    return images._replace(labels=labels)
