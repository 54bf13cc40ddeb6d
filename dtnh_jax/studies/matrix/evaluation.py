"""What a network makes of images in evaluation mode, a batch at a time."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Array
from scipy import special

from dtnh_jax.linen import capture_features
from dtnh_jax.studies.matrix.training import Variables

_BATCH = 100


class Network(NamedTuple):
    """Compiled functions of a network in evaluation mode."""

    # (variables, images [b, s, s, c]) -> logits [b, classes], maps by layer [b, ...].
    look: Callable[[Variables, Any], tuple[Array, dict[str, Array]]]

    def outputs(self, variables: Variables, inputs: Any) -> dict[str, np.ndarray]:
        """The feature maps of all images by layer, and as `head` their logits."""
        found = [
            jax.device_get({**maps, "head": logits})
            for logits, maps in (self.look(variables, x) for x in _batches(inputs))
        ]
        return {
            layer: np.concatenate([maps[layer] for maps in found])[: len(inputs)]
            for layer in found[0]
        }

    def evaluate(
        self, variables: Variables, inputs: Any, labels: np.ndarray
    ) -> tuple[float, float]:
        """Returns accuracy and mean cross-entropy, which may be NaN."""
        found = [self.look(variables, batch)[0] for batch in _batches(inputs)]
        logits = np.concatenate(jax.device_get(found))[: len(labels)]
        accuracy = np.mean(logits.argmax(axis=1) == labels)
        with np.errstate(invalid="ignore"):  # of networks that diverged
            likelihoods = special.log_softmax(logits.astype(np.float64), axis=1)
        loss = -np.mean(likelihoods[np.arange(len(labels)), labels])
        return float(accuracy), float(loss)


def evaluator(network: nn.Module, layers: Sequence[str]) -> Network:
    """Returns the functions of a network, which are compiled once.

    Args:
      network: returns logits.
      layers: those whose maps are wanted, by path.
    """
    apply = capture_features(network, layers)
    return Network(jax.jit(lambda *given: apply(*given, train=False)))


def _batches(images: Any) -> list[Any]:
    """Cuts images into batches of one size; zeros fill up the last."""
    missing = -len(images) % _BATCH
    padded = np.pad(np.asarray(images), [(0, missing), (0, 0), (0, 0), (0, 0)])
    return np.split(padded, len(padded) // _BATCH)
