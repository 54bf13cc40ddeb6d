"""ResNet-50 in linen, and its training steps with a distance of feature maps."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from dtnh_jax import regularizers
from dtnh_jax.regularizers import expected_error
from dtnh_jax.studies.accelerator.devices import dtype_of, host_normal
from dtnh_jax.studies.accelerator.steps import Task

Images = Float[Array, "batch height width 3"]
Maps = dict[str, Float[Array, "batch _ _ _"]]  # of a stage


class Bottleneck(nn.Module):
    """A residual block of three convolutions, of which the middle one has strides."""

    width: int
    strides: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns features of `4 * width` channels."""
        conv = functools.partial(
            nn.Conv, use_bias=False, dtype=self.dtype, param_dtype=self.dtype
        )
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=False,
            momentum=0.9,
            dtype=self.dtype,
            param_dtype=self.dtype,
        )
        strides = (self.strides, self.strides)
        y = nn.relu(norm()(conv(self.width, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.width, (3, 3), strides)(y)))
        y = norm()(conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = norm()(conv(4 * self.width, (1, 1), strides)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A network of bottlenecks, in training: batch statistics are those of the batch.

    Attributes:
      blocks: of each stage; ResNet-50 has 3, 4, 6 and 3.
      width: of the first stage, 64 in ResNet-50.
      classes: of the head.
      dtype: of parameters and features.
    """

    blocks: Sequence[int]
    width: int
    classes: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Images) -> tuple[Array, Maps]:
        """Returns logits in single precision, and the features of every stage."""
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.dtype}
        x = nn.Conv(self.width, (7, 7), (2, 2), use_bias=False, **kinds)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, momentum=0.9, **kinds)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        maps = {}
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                strides = 2 if stage and not block else 1
                x = Bottleneck(self.width * 2**stage, strides, self.dtype)(x)
            maps[f"stage_{stage}"] = x
        logits = nn.Dense(self.classes, **kinds)(jnp.mean(x, axis=(1, 2)))
        return logits.astype(jnp.float32), maps


def task(
    *,
    dtype: str,
    blocks: Sequence[int] = (3, 4, 6, 3),
    width: int = 64,
    classes: int = 1000,
    batch: int = 128,
    pixels: int = 160,
) -> Task:
    """The training steps of a network with random weights, images and teacher maps."""
    of = dtype_of(dtype)
    network = ResNet(tuple(blocks), width, classes, of)
    images = jax.ShapeDtypeStruct((batch, pixels, pixels, 3), of)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    (_, maps), _ = jax.eval_shape(
        functools.partial(network.apply, mutable=["batch_stats"]), variables, images
    )

    def forward(params: Any, stats: Any, x: Images) -> tuple[tuple[Array, Maps], Any]:
        outputs, updated = network.apply(
            {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
        )
        return outputs, updated["batch_stats"]

    def loss(params, stats, data):
        (logits, _), stats = forward(params, stats, data["images"])
        return _cross_entropy(logits, data["labels"]), stats

    def objective(params, stats, data):
        (logits, maps), stats = forward(params, stats, data["images"])
        distance = regularizers.feature_map(maps, data["teacher"])
        return (_cross_entropy(logits, data["labels"]), distance), stats

    def held_out(params, stats, data):
        (logits, _), _ = forward(params, stats, data["held-out images"])
        return expected_error(logits, data["held-out labels"])

    def data():
        rng = np.random.default_rng(1)

        def normal(like):
            alike = like is not images
            return host_normal(rng, like.shape, 1.0, like.dtype, alike)

        return {
            "images": normal(images),
            "labels": rng.integers(classes, size=batch, dtype=np.int32),
            "teacher": jax.tree.map(normal, maps),
            "held-out images": normal(images),
            "held-out labels": rng.integers(classes, size=batch, dtype=np.int32),
        }

    return Task(
        name="ResNet-50" if width == 64 else "ResNet",
        dtype=dtype,
        penalty="distillation",
        params=_weights(variables["params"]),
        aux=jax.tree.map(lambda x: np.ones(x.shape, x.dtype), variables["batch_stats"]),
        make_data=data,
        loss=loss,
        objective=objective,
        held_out=held_out,
        optimizer=optax.sgd(1e-4, momentum=0.9),
        strength=1e-4,
        with_pull=True,
    )


def _cross_entropy(logits: Array, labels: Int[Array, " batch"]) -> Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)


def _weights(like: Mapping[str, Any]) -> Any:
    """Random weights on the host: He's for kernels, 1 for scales, 0 for biases."""
    rng = np.random.default_rng(0)

    def leaf(path, x):
        name = str(getattr(path[-1], "key", path[-1]))
        if name != "kernel":
            return np.full(x.shape, float(name == "scale"), x.dtype)
        return host_normal(rng, x.shape, np.sqrt(2 / np.prod(x.shape[:-1])), x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, like)
