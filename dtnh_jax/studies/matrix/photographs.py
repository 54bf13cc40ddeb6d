"""The grid's other tier: a large network with its published weights, on photographs.

What the network is and how photographs are read is that of the fine-tuning command.
"""

import jax
import numpy as np

from dtnh_jax.finetune.data import loading
from dtnh_jax.finetune.data.target import Target
from dtnh_jax.finetune.weights.source import Source
from dtnh_jax.finetune.weights.sources import initial_variables, original_variables
from dtnh_jax.studies.matrix.config import Photographs
from dtnh_jax.studies.matrix.images import Images
from dtnh_jax.studies.matrix.sources import Pretrained
from dtnh_jax.studies.matrix.targets import Task, make_task
from dtnh_jax.studies.matrix.training import Variables


def load_task(name: str, target: Target, source: Source, options: Photographs) -> Task:
    """Splits a target, and reads its validation and test images.

    Args:
      name: for errors.
      target: where photographs are read from.
      source: whose network looks at them.
      options: numbers and sizes of images.

    Raises:
      ValueError: there are too few photographs.
    """

    def read(indices: np.ndarray) -> Images:
        found = loading.materialize(target, indices, options.image_size)
        return Images(found.images, found.labels, source.preprocess)

    return make_task(
        name,
        target.labels,
        read,
        train_per_class=options.train_per_class,
        validation_per_class=options.validation_per_class,
        test_per_class=options.test_per_class,
    )


def load_source(source: Source) -> Pretrained:
    """Reads published weights.

    Raises:
      ValueError: their package is missing, or they are not the network's.
    """
    return Pretrained(original_variables(source), f"{source.name}, {source.licence}")


def random_variables(source: Source, num_classes: int, seed: int) -> Variables:
    """What training from scratch starts from, and every new head."""
    key = jax.random.fold_in(jax.random.key(seed), 0)
    return initial_variables(source, num_classes, key, pretrained=False)
