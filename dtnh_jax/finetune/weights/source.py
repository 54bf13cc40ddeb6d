"""The type of a pretrained network."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float, UInt8

Images = UInt8[Array, "b h w 3"] | UInt8[np.ndarray, "b h w 3"]
Variables = dict[str, Any]  # {"params": tree, "batch_stats": tree}


class SourceUnavailableError(ValueError):
    """The package of a source's weights is not installed."""


class Source(NamedTuple):
    """A pretrained network, with its weights and preprocessing.

    The network's classifier is a dense submodule `head`, and its input is sown as
    `pooled` in "intermediates".
    """

    name: str
    licence: str  # of the weights, one line
    module: Callable[[int], nn.Module]  # number of classes -> network
    preprocess: Callable[[Images], Float[Array, "b h w 3"]]
    feature_layers: tuple[str, ...]  # paths of the modules to distil by default
    load: Callable[[], Variables]  # NumPy float32 trees, with the original head
