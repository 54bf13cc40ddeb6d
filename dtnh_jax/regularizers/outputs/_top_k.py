"""The divergence from a reference model's stored most likely tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from dtnh_jax.regularizers.outputs._tokens import (
    check_floating,
    log_normalizer,
    weights_of_mean,
)


class TopK(NamedTuple):
    """The `k` most likely tokens of a reference model's predictions.

    Attributes:
      tokens: `[..., k]`, the most likely tokens, in descending order.
      log_probabilities: `[..., k + 1]` in float32: those of the tokens, and last that
        of all other tokens together.
    """

    tokens: Int[Array, "... k"]
    log_probabilities: Float[Array, "... m"]


def top_k_of_reference(
    reference_logits: Float[Array | np.ndarray, "... vocabulary"], k: int
) -> TopK:
    """Returns the most likely tokens of a reference model, to be stored for `top_k_kl`.

    With a vocabulary of 49,152 and `k = 32` they take a thousandth of the logits'
    memory. So the reference model can run once over all training tokens, before
    training.

    Args:
      reference_logits: `[batch, tokens, vocabulary]`, or with any other axes before the
        last.
      k: number of tokens to keep, at least 1 and less than the vocabulary.

    Returns:
      Tokens and log probabilities: arrays to be saved and passed to `top_k_kl`.

    Raises:
      TypeError: logits are not floating.
      ValueError: `k` is out of range.

    Example:
      >>> stored = top_k_of_reference(jnp.log(jnp.array([0.5, 0.3, 0.1, 0.1])), k=2)
      >>> print(stored.tokens, jnp.exp(stored.log_probabilities).round(3))
      [0 1] [0.5 0.3 0.2]
    """
    check_floating(reference_logits, "reference_logits")
    words = reference_logits.shape[-1] if reference_logits.ndim else 0
    if not 1 <= k < words:
        raise ValueError(
            f"`k` must be at least 1 and less than the vocabulary, {words}, got {k}."
        )
    logits = jnp.asarray(reference_logits).astype(jnp.float32)
    _, tokens = jax.lax.top_k(logits, k)
    return TopK(tokens, _log_probabilities(logits, tokens))


def top_k_kl(
    logits: Float[Array | np.ndarray, "... vocabulary"],
    reference: TopK,
    *,
    mask: Float[Array | np.ndarray, "..."]
    | Integer[Array | np.ndarray, "..."]
    | Bool[Array | np.ndarray, "..."]
    | None = None,
    direction: str = "forward",
) -> Float[Array, ""]:
    """Returns the divergence from stored predictions of a reference model.

    "forward" is `KL(q || p)` and "reverse" is `KL(p || q)`. Here `p` are the model's
    and `q` the reference's probabilities of `k + 1` events: each of the reference's `k`
    most likely tokens, and any other token. The result is at most the divergence over
    the whole vocabulary. It is equal to it if both models divide the rest among the
    other tokens in the same way. The reference gets no gradient.

    Args:
      logits: `[batch, tokens, vocabulary]` of the network in training; or with any
        other axes before the last.
      reference: result of `top_k_of_reference` for the same tokens.
      mask: weights of tokens, `[batch, tokens]`, for example 0 for padding and prompts.
      direction: "forward" or "reverse".

    Returns:
      A scalar in float32: nats per token, as the mean weighted by `mask`; 0 if all
      weights are 0.

    Raises:
      TypeError: logits are not floating.
      ValueError: shapes do not match, or the direction is unknown.

    Example:
      >>> reference = jnp.array([[[4.0, 0.0, 0.0], [1.0, 3.0, 0.0]]])
      >>> stored = top_k_of_reference(reference, k=1)
      >>> print(f"{top_k_kl(jnp.zeros((1, 2, 3)), stored):.3f}")
      0.739

    References:
      The bound: Cover and Thomas, 2006, "Elements of information theory", theorem 2.7.1
      (log sum inequality)
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(
            f"`direction` must be one of ('forward', 'reverse'), got {direction!r}."
        )
    check_floating(logits, "logits")
    tokens, stored = reference
    k = tokens.shape[-1] if tokens.ndim else 0
    rows = logits.shape[:-1]
    if tokens.shape != (*rows, k) or stored.shape != (*rows, k + 1):
        raise ValueError(
            "`reference` must hold tokens [batch, tokens, k] and log probabilities "
            f"[batch, tokens, k + 1] for logits {logits.shape}, got {tokens.shape} and "
            f"{stored.shape}."
        )
    weights = weights_of_mean(mask, rows)
    log_p = jax.checkpoint(_log_probabilities)(jnp.asarray(logits), tokens)
    log_q = jax.lax.stop_gradient(jnp.asarray(stored).astype(jnp.float32))
    first, second = (log_q, log_p) if direction == "forward" else (log_p, log_q)
    is_possible = first > -jnp.inf
    gap = jnp.where(is_possible, first - second, 0.0)
    # A mean of `exp(-gap) - 1 + gap`, which is at least 0 even after rounding.
    terms = jnp.exp(first) * (jnp.expm1(-gap) + gap)
    divergences = jnp.sum(jnp.where(is_possible, terms, jnp.exp(second)), axis=-1)
    return jnp.sum(jnp.where(weights != 0, weights * divergences, 0.0))


def _log_probabilities(logits: Array, tokens: Array) -> Float[Array, "... m"]:
    """Returns log probabilities of the tokens, and last of all others together."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens, axis=-1)
    others = jnp.put_along_axis(logits, tokens, -jnp.inf, axis=-1, inplace=False)
    events = jnp.concatenate([chosen, log_normalizer(others)], axis=-1)
    return events - log_normalizer(events)
