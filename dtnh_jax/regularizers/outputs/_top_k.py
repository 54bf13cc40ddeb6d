"""The divergence from a reference of which only the likeliest tokens were stored."""

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
    """What is kept of a reference model's predictions, `k` tokens of each.

    Attributes:
      tokens: `[..., k]`, the likeliest ones, the likeliest first.
      log_probabilities: `[..., k + 1]` in float32: of those tokens, and at last of all
        others together.
    """

    tokens: Int[Array, "... k"]
    log_probabilities: Float[Array, "... m"]


def top_k_of_reference(
    reference_logits: Float[Array | np.ndarray, "... vocabulary"], k: int
) -> TopK:
    """Takes from a reference's logits what `top_k_kl` needs, to be stored.

    With a vocabulary of 49,152 and `k = 32` that is a thousandth of the logits, so a
    reference can be asked once for all training tokens, before training.

    Args:
      reference_logits: `[batch, tokens, vocabulary]`, or with any other axes before the
        last.
      k: how many tokens to keep, at least 1 and less than the vocabulary.

    Returns:
      Tokens and log probabilities; arrays, to be saved and passed to `top_k_kl`.

    Raises:
      TypeError: if logits are not floating.
      ValueError: if `k` is out of range.

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
    """Divergence from stored predictions: of `k` tokens, and of all others as one.

    "forward" is `KL(q || p)` and "reverse" is `KL(p || q)`. Here `p` is the model's and
    `q` the reference's probabilities of `k + 1` events: each of the reference's
    likeliest `k` tokens, and any other token. It is at most the divergence over the
    whole vocabulary, and equal to it where the models agree on how the rest is shared
    out.
    The reference gets no gradient.

    Args:
      logits: `[batch, tokens, vocabulary]` of the network in training; or with any
        other axes before the last.
      reference: of `top_k_of_reference`, for the same tokens.
      mask: weights of tokens, `[batch, tokens]`, such as 0 for padding and prompts.
      direction: "forward" or "reverse".

    Returns:
      A scalar in float32: nats per token, the mean over the tokens that `mask` keeps;
      0 if it keeps none.

    Raises:
      TypeError: if logits are not floating.
      ValueError: if shapes do not match or the direction is unknown.

    Example:
      >>> reference = jnp.array([[[4.0, 0.0, 0.0], [1.0, 3.0, 0.0]]])
      >>> stored = top_k_of_reference(reference, k=1)
      >>> print(f"{top_k_kl(jnp.zeros((1, 2, 3)), stored):.3f}")
      0.739

    References:
      That a sum of events diverges less: Cover and Thomas, 2006, "Elements of
      information theory", theorem 2.7.1 (log sum inequality)
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
    # As a mean of `exp(-gap) - 1 + gap`, which is at least 0 however it is rounded.
    terms = jnp.exp(first) * (jnp.expm1(-gap) + gap)
    divergences = jnp.sum(jnp.where(is_possible, terms, jnp.exp(second)), axis=-1)
    return jnp.sum(jnp.where(weights != 0, weights * divergences, 0.0))


def _log_probabilities(logits: Array, tokens: Array) -> Float[Array, "... m"]:
    """Returns those of some tokens, and at last that of all others together."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens, axis=-1)
    others = jnp.put_along_axis(logits, tokens, -jnp.inf, axis=-1, inplace=False)
    events = jnp.concatenate([chosen, log_normalizer(others)], axis=-1)
    return events - log_normalizer(events)
