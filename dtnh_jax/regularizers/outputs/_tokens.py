"""Masks of examples or tokens, as weights of a mean."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float


def weights_of_mean(
    mask: Array | np.ndarray | None, shape: tuple[int, ...]
) -> Float[Array, "..."]:
    """Returns weights that sum to 1, or zeros if the mask is all zeros.

    Raises:
      ValueError: the mask has another shape.
    """
    if mask is None:
        mask = jnp.ones(shape, jnp.float32)
    elif jnp.shape(mask) != shape:
        raise ValueError(
            "`mask` must have the shape of the logits without their last axis, "
            f"{shape}, got {jnp.shape(mask)}."
        )
    mask = jax.lax.stop_gradient(jnp.asarray(mask).astype(jnp.float32))
    total = jnp.sum(mask)
    return mask / jnp.where(total == 0, 1.0, total)


def check_floating(logits: Array | np.ndarray, argument: str) -> None:
    """Raises TypeError for integers and complex numbers."""
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"`{argument}` must be floating, got {logits.dtype}.")


def log_normalizer(x: Float[Array, "*batch n"]) -> Float[Array, "*batch 1"]:
    """Returns `log(sum(exp(x)))` over the last axis, with length 1 there."""
    most = jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))
    most = jnp.where(jnp.isfinite(most), most, 0.0)
    return most + jnp.log(jnp.sum(jnp.exp(x - most), axis=-1, keepdims=True))


def check_labels(
    labels: Array | np.ndarray, mask: Array | np.ndarray | None, classes: int
) -> None:
    """Raises ValueError for a label out of range, unless it is traced or masked."""
    if isinstance(labels, Tracer) or isinstance(mask, Tracer):
        return
    kept = np.asarray(labels)
    if mask is not None:
        kept = kept[np.asarray(mask) != 0]
    if kept.size and (kept.min() < 0 or kept.max() >= classes):
        raise ValueError(
            f"`labels` must be from 0 to {classes - 1}, got {kept.min()} to "
            f"{kept.max()}."
        )
