"""The loss of next tokens, and regularizers of the same outputs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dtnh_jax.lm.networks import Network, Tree
from dtnh_jax.lm.packing import Rows
from dtnh_jax.nnx import without_adapters
from dtnh_jax.regularizers import expected_error, kl_to_reference, masked_kl

# Each maps (logits, the base model's logits, rows) to nats per token that is learned.
OF_OUTPUTS: dict[str, Callable[[Array, Array, Rows], Array]] = {
    "kl": lambda logits, reference, rows: kl_to_reference(
        logits, reference, mask=rows.weights
    ),
    "masked_kl": lambda logits, reference, rows: masked_kl(
        logits, reference, rows.labels, mask=rows.weights
    ),
}


def next_token_losses(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Cross-entropy of every token in nats, in float32.

    The backward pass only keeps the logits, without a float32 array of their size.
    """
    return jax.checkpoint(_losses)(logits, labels)


def _losses(logits: Array, labels: Array) -> Array:
    logits = logits.astype(jnp.float32)
    words = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    chosen = jnp.sum(jnp.where(words == labels[..., None], logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def outputs(network: Network, adapters: Tree, base: Tree, rows: Rows) -> Array:
    """Returns the logits of every next token."""
    module = network.module(adapters, base)
    return module(rows.tokens, rows.segments, rows.positions)


def outputs_of_base(network: Network, adapters: Tree, base: Tree, rows: Rows) -> Array:
    """Returns the logits of the base model, from the same weights."""
    module = without_adapters(network.module(adapters, base))
    return module(rows.tokens, rows.segments, rows.positions)


def mean(values: Array, weights: Array) -> Float[Array, ""]:
    """Returns a weighted mean, 0 if all weights are 0."""
    total = jnp.sum(weights)
    return jnp.sum(values * weights) / jnp.where(total == 0, 1.0, total)


def loss(network: Network, adapters: Tree, base: Tree, rows: Rows) -> Float[Array, ""]:
    """Returns the mean loss of next tokens, in nats."""
    logits = outputs(network, adapters, base, rows)
    return mean(next_token_losses(logits, rows.labels), rows.weights)


def loss_and_regularizer(
    name: str, network: Network, adapters: Tree, base: Tree, rows: Rows
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the mean loss and one of `OF_OUTPUTS`, from one forward pass."""
    logits = outputs(network, adapters, base, rows)
    reference = outputs_of_base(network, adapters, base, rows)
    value = mean(next_token_losses(logits, rows.labels), rows.weights)
    return value, OF_OUTPUTS[name](logits, reference, rows)


def held_out_error(
    network: Network, adapters: Tree, base: Tree, rows: Rows
) -> Float[Array, ""]:
    """Returns the mean of `1 - p(next token)`, the loss for held-out text."""
    logits = outputs(network, adapters, base, rows)
    return expected_error(logits, rows.labels, mask=rows.weights)


def measures(
    network: Network, adapters: Tree, base: Tree, rows: Rows
) -> dict[str, Any]:
    """Returns sums over the tokens of rows: loss, KL to the base model, and count."""
    logits = outputs(network, adapters, base, rows)
    reference = outputs_of_base(network, adapters, base, rows)
    tokens = jnp.sum(rows.weights)
    losses = next_token_losses(logits, rows.labels)
    return {
        "loss": jnp.sum(losses * rows.weights),
        "kl": kl_to_reference(logits, reference, mask=rows.weights) * tokens,
        "tokens": tokens,
    }
