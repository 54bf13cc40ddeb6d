"""What is fine-tuned on: little of images that no source has seen."""

import pathlib
from typing import NamedTuple

import numpy as np

from dtnh_jax.finetune import data
from dtnh_jax.matrix.images import Images, load_images


class Target(NamedTuple):
    """A task of the grid: which images, and how many of each class are trained on."""

    images: str  # one of `images.LOADERS`
    train_per_class: int


# A new target is a row here; it has to have ten classes.
TARGETS = {
    "digits-5": Target("digits", 5),
    "digits-20": Target("digits", 20),
    "fashion-20": Target("fashion-test", 20),
    "mnist-5": Target("mnist", 5),
}


class Task(NamedTuple):
    """A target in memory; validation and test images are the same for all seeds."""

    pool: Images  # what seeds draw their training images from
    train_per_class: int
    validation: Images
    test: Images

    def training_set(self, seed: int) -> Images:
        """The training images of a seed; a smaller set is part of a larger one."""
        drawn = data.split(
            self.pool.labels,
            seed=seed,
            train_per_class=self.train_per_class,
            validation_per_class=0,
            test_per_class=None,
        )
        return self.pool.pick(drawn.train)


def load_task(
    name: str, data_dir: pathlib.Path, validation_per_class: int, test_per_class: int
) -> Task:
    """Reads a target and splits it.

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
    rarest = int(np.bincount(images.labels).min())
    # One more than a seed draws, because `split` leaves at least one; it also says
    # what is missing.
    least = target.train_per_class + 1
    try:
        splits = data.split(
            images.labels,
            seed=0,
            train_per_class=max(rarest - validation_per_class - test_per_class, least),
            validation_per_class=validation_per_class,
            test_per_class=test_per_class,
        )
    except ValueError as error:
        raise ValueError(f"Target {name}: {error}") from error
    return Task(
        images.pick(splits.train),
        target.train_per_class,
        images.pick(splits.validation),
        images.pick(splits.test),
    )
