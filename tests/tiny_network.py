"""The command with one more source: a network so small that a step takes nothing.

It has all that the loop has to take care of: batch statistics, dropout, a head of its
own and feature maps. Its weights are drawn once and called pretrained.
"""

import functools
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dtnh_jax.finetune.weights.sources import SOURCES, Source


class TinyNetwork(nn.Module):
    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train):
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        norm = functools.partial(nn.BatchNorm, momentum=0.9, dtype=self.dtype)
        x = nn.Conv(4, (3, 3), strides=4, dtype=self.dtype, name="stem")(images)
        x = norm(use_running_average=not train, name="norm")(x)
        x = dense(6, use_bias=False, name="mix")(nn.relu(x))
        x = nn.relu(x).mean((1, 2))
        self.sow("intermediates", "pooled", x)
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return dense(self.num_classes, name="head")(x)


def _load():
    images = jnp.zeros((1, 16, 16, 3))
    return dict(TinyNetwork(7).init(jax.random.key(42), images, train=False))


TINY = Source(
    name="tiny",
    licence="none",
    module=TinyNetwork,
    preprocess=lambda images: jnp.asarray(images, jnp.float32) / 255,
    feature_layers=("norm",),
    load=_load,
)

if __name__ == "__main__":
    from dtnh_jax._cli import main

    SOURCES["tiny"] = TINY
    sys.exit(main())
