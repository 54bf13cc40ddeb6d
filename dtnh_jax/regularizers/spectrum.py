"""Regularizers of the singular values of a batch of features."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dtnh_jax.regularizers.features._maps import on_every_device


def batch_spectral_shrinkage(
    features: Float[Array | np.ndarray, "..."], k: int = 1
) -> Float[Array, ""]:
    """Shrinks the `k` smallest singular values of a batch of features.

    The penalty is the sum of the squares of the `k` smallest of the `min(batch, dim)`
    singular values of the feature matrix. It is a sum over the batch, not a mean: it
    grows with the number of examples, so the best strength depends on the batch size.
    The reference implementation uses strength 0.001 and `k` 1, at batches of 48.

    It needs no teacher, and complements another regularizer, such as `l2_sp`.

    Args:
      features: `[batch, dim]`, the input of the head of the network in training. On
        meshes with explicit axes they are gathered.
      k: number of singular values to shrink, from 1 to `min(batch, dim)`.

    Returns:
      A scalar in float32, exact to about `1e-6` times the square of the largest
      singular value; 0 for an empty matrix. Its first derivative is exact, higher ones
      are not. If the `k`-th and the next smallest singular values are equal, the
      gradient is that of one of them.

    Raises:
      TypeError: `k` is no integer.
      ValueError: `features` is no matrix, or `k` is out of range.

    Example:
      >>> features = jnp.array([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
      >>> print(batch_spectral_shrinkage(features))
      4.0

    References:
      Chen et al., 2019, "Catastrophic Forgetting Meets Negative Transfer", section 4,
      https://papers.nips.cc/paper/2019/hash/c6bff625bdb0393992c9d4db0c6bbe45-Abstract.html

    Differs from the reference implementation, which differentiates a singular value
    decomposition of the features. Its derivative is NaN for repeated values and for
    zeros, towards which this regularizer leads.
    """
    if features.ndim != 2:
        raise ValueError(
            f"`features` must be [batch, dim], got shape {features.shape}: pool or "
            "flatten feature maps first."
        )
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
        raise TypeError(f"`k` must be an integer, got {k!r}.")
    rank = min(features.shape)
    if k < 1 or (rank and k > rank):
        raise ValueError(
            f"`k` must be from 1 to min(batch, dim), {rank} for features of shape "
            f"{features.shape}, got {k}."
        )
    if not rank:
        return jnp.zeros([], jnp.float32)
    matrix = on_every_device(jnp.asarray(features).astype(jnp.float32))
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    # Eigenvalues of this Gram matrix are the squares; `eigh` sorts them upwards. The
    # sum of the k smallest is the minimum of `||U^T F||^2` over all U with k
    # orthonormal columns, which the eigenvectors attain. At a minimum the derivative
    # through U is zero, so the gradient `2 U U^T F` with constant U is exact. The
    # derivative of `eigh` would divide by differences of eigenvalues, which may be 0.
    held = jax.lax.stop_gradient(wide)
    _, directions = jnp.linalg.eigh(_product(held, held.T))
    smallest = directions[:, :k]  # [rank, k]
    return jnp.sum(jnp.square(_product(smallest.T, wide)))


def _product(a: Array, b: Array) -> Array:
    """Returns the matrix product in full float32, whatever the default is."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
