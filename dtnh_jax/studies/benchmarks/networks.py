"""The networks of the benchmarks, each with its source and a batch of noise."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from dtnh_jax import regularizers
from dtnh_jax.finetune.weights.sources import initial_variables, load_source
from dtnh_jax.linen import capture_features
from dtnh_jax.studies.benchmarks.encoder import Encoder
from dtnh_jax.studies.benchmarks.perceptron import Perceptron
from dtnh_jax.studies.trust.networks import NETWORKS, ResNet8

CLASSES = 10
_CHANNELS = 16  # of a token


class Network(NamedTuple):
    """A network whose parameters differ slightly from its source."""

    name: str
    params: Any
    batch_stats: Any  # empty for a network that has none
    source_params: Any
    # "inputs", "labels", and the features of the "teacher" by layer. Its forward pass
    # is the same for all methods and not timed.
    batch: dict[str, Any]
    # (params, batch_stats, batch) -> (loss, distance of features), batch_stats
    objective: Callable[[Any, Any, Any], tuple[tuple[Array, Array], Any]]


def residual(batch_size: int, image_size: int) -> Network:
    """Returns ResNet-8 on grey images."""
    inputs = _noise((batch_size, image_size, image_size, 1))
    module = ResNet8(CLASSES)
    variables = jax.jit(partial(module.init, train=False))(jax.random.key(0), inputs)
    return _network("ResNet-8", module, variables, inputs, NETWORKS["resnet"][1])


def encoder(batch_size: int, layers: int, width: int, tokens: int) -> Network:
    """Returns a transformer encoder, distilled at every layer."""
    inputs = _noise((batch_size, tokens, _CHANNELS))
    module = Encoder(CLASSES, layers, width)
    variables = jax.jit(module.init)(jax.random.key(0), inputs)
    names = [f"layer_{number}" for number in range(1, layers + 1)]
    return _network("transformer encoder", module, variables, inputs, names)


def perceptron(batch_size: int, layers: int, width: int) -> Network:
    """Returns a perceptron of square matrices: many parameters, little computation."""
    inputs = _noise((batch_size, width))
    module = Perceptron(CLASSES, layers, width)
    variables = jax.jit(module.init)(jax.random.key(0), inputs)
    name = f"MLP {layers} x {width} x {width}, batch {batch_size}"
    return _network(name, module, variables, inputs, [f"layer_{layers}"])


def pretrained(source_name: str, batch_size: int, image_size: int) -> Network:
    """Returns a source of the fine-tuning command, with a new head."""
    source = load_source(source_name)
    shape = (batch_size, image_size, image_size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return _network(
        {"efficientnet-lite0": "EfficientNet-Lite0"}.get(source_name, source_name),
        source.module(CLASSES),
        initial_variables(source, CLASSES, jax.random.key(0), pretrained=True),
        source.preprocess(pixels),
        source.feature_layers,
    )


def _network(
    name: str, module: nn.Module, source: Any, inputs: Array, layers: Sequence[str]
) -> Network:
    apply = capture_features(module, layers)
    _, teacher = jax.jit(partial(apply, train=False))(source, inputs)
    labels = np.random.default_rng(1).integers(0, CLASSES, len(inputs))
    batch = {"inputs": inputs, "labels": jnp.asarray(labels), "teacher": teacher}
    rngs = {"dropout": jax.random.key(1)}

    def objective(params, batch_stats, batch):
        variables = {"params": params, "batch_stats": batch_stats}
        (logits, updated), student = apply(
            variables, batch["inputs"], train=True, mutable=["batch_stats"], rngs=rngs
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["labels"]
        )
        distance = regularizers.feature_map(student, batch["teacher"])
        return (jnp.mean(losses), distance), updated.get("batch_stats", {})

    # At the source itself, regularizers of the weights have no gradient.
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda x: x + 0.01 * jnp.asarray(rng.standard_normal(x.shape, np.float32)),
        source["params"],
    )
    stats = source.get("batch_stats", {})
    return Network(name, params, stats, source["params"], batch, objective)


def _noise(shape: tuple[int, ...]) -> Float[Array, "..."]:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
