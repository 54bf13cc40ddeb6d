"""What one training sees: images, the order of their batches, and a teacher's view."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from dtnh_jax.studies.matrix.images import Images


class Data(NamedTuple):
    """What is trained on, on the device; rows that `order` does not name are idle."""

    images: Float[Array, "n size size channels"]
    labels: Int32[Array, " n"]
    order: Int32[Array, "steps batch"]  # the rows of every step's batch
    key: PRNGKeyArray  # of dropout, where the network has it
    # What the source makes of the images: maps by layer, and as `head` its logits.
    teacher: dict[str, Float[Array, "n ..."]]  # empty where nobody asks


def make_data(
    images: Images, rows: int, steps: int, batch_size: int, seed: int
) -> Data:
    """Puts training images on the device, with the order of their batches.

    Args:
      images: at least one.
      rows: the size of the arrays, at least that of `images`: zeros fill them up, so
        that targets of different sizes share a compilation.
      steps: number of batches.
      batch_size: images in a batch.
      seed: of the order and of dropout.
    """
    missing = rows - len(images.labels)
    inputs = np.pad(images.inputs(), [(0, missing), (0, 0), (0, 0), (0, 0)])
    return Data(
        jnp.asarray(inputs),
        jnp.asarray(np.pad(images.labels, [(0, missing)])),
        jnp.asarray(order(len(images.labels), steps, batch_size, seed)),
        jax.random.fold_in(jax.random.key(seed), 1),
        {},
    )


def order(
    examples: int, steps: int, batch_size: int, seed: int
) -> Int32[np.ndarray, "steps batch"]:
    """Which examples are in the batch of every step: shuffled anew each epoch.

    Batches run on over the end of an epoch, so all of them are full and every example
    is seen once an epoch.

    Example:
      >>> rows = order(examples=4, steps=2, batch_size=2, seed=0)
      >>> print(np.sort(rows.ravel()))
      [0 1 2 3]
    """
    epochs = -(-steps * batch_size // examples)
    # The raw stream, because NumPy promises that it never changes (NEP 19).
    draws = [np.random.PCG64([seed, e]).random_raw(examples) for e in range(epochs)]
    rows = np.concatenate([np.argsort(draw, kind="stable") for draw in draws])
    return rows[: steps * batch_size].reshape(steps, batch_size).astype(np.int32)
