"""Co-tuning: trains the old head with probabilities of the pretrained classes."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Integer

_SUM_TOLERANCE = 3e-3  # of a row's sum; rounding to bfloat16 changes it by up to 2e-3


def co_tuning(
    source_logits: Float[Array | np.ndarray, "batch source"],
    labels: Integer[Array | np.ndarray, " _"],
    relationship: Float[Array | np.ndarray, "_ _"],
) -> Float[Array, ""]:
    """Returns the cross-entropy of the old head with the classes related to a label.

    With label `y`, an example adds `-sum over source classes s of p(s | y) log q(s)`,
    where `p` is a row of `relationship` and `q` is the softmax of `source_logits`. It
    is averaged over the batch. The relationship gets no gradient.

    Args:
      source_logits: `[batch, source classes]`, logits of the pretrained head, which
        stays in the network beside the new head and is trained with it.
      labels: `[batch]`, labels of the target task. Under `jax.jit` a label out of range
        can not raise; it makes the result NaN.
      relationship: `[target classes, source classes]`, rows of probabilities; see
        `category_relationship`.

    Returns:
      A scalar in float32. Its minimum, at `q = p`, is the entropy of the rows. The
      reference implementation uses strength 2.3.

    Raises:
      ValueError: shapes do not match; or, unless traced, a row of `relationship` has no
        probabilities, or a label is out of range.

    Example:
      >>> relationship = jnp.array([[1.0, 0.0], [0.5, 0.5]])
      >>> logits = jnp.array([[0.0, 0.0]])  # of two source classes
      >>> print(f"{co_tuning(logits, jnp.array([1]), relationship):.3f}")
      0.693

    References:
      You et al., 2020, "Co-Tuning for Transfer Learning", section 3,
      https://papers.nips.cc/paper/2020/hash/c8067ad1937f728f51288b3eb986afaa-Abstract.html
    """
    _check_categories(source_logits, labels, relationship)
    # A product, because JAX cannot index by labels that are sharded over explicit axes.
    classes = jnp.arange(len(relationship), dtype=jnp.int32)[None, :]
    is_class = jnp.asarray(labels).astype(jnp.int32)[:, None] == classes
    rows = jnp.asarray(relationship).astype(jnp.float32)
    target = jnp.matmul(
        is_class.astype(jnp.float32), rows, precision=jax.lax.Precision.HIGHEST
    )
    # Under `jit`, a wrong label must not act like a row of zeros.
    has_row = jnp.any(is_class, axis=1, keepdims=True)
    target = jax.lax.stop_gradient(jnp.where(has_row, target, jnp.nan))
    predicted = jax.nn.log_softmax(source_logits.astype(jnp.float32))
    # Masked source classes, with a logit of -inf, would give 0 * -inf.
    terms = jnp.where(target == 0, 0.0, target * predicted)
    return -jnp.sum(terms) / max(len(terms), 1)


def _check_categories(
    source_logits: Array | np.ndarray,
    labels: Array | np.ndarray,
    relationship: Array | np.ndarray,
) -> None:
    """Checks values that are not traced; raises what `co_tuning` documents."""
    if labels.shape != source_logits.shape[:1]:
        raise ValueError(
            f"`labels` must have the batch of `source_logits`, {len(source_logits)}, "
            f"got shape {labels.shape}."
        )
    if relationship.shape[1] != source_logits.shape[1]:
        raise ValueError(
            "`relationship` must have a column for each source class, "
            f"{source_logits.shape[1]} as in `source_logits`, got shape "
            f"{relationship.shape}."
        )
    if not isinstance(relationship, Tracer):
        rows = np.asarray(relationship, np.float64)
        sums = rows.sum(axis=1)
        # Written so that NaN fails too.
        right = (rows >= 0).all(axis=1) & (np.abs(sums - 1) <= _SUM_TOLERANCE)
        if not right.all():
            row = int(np.argmin(right))
            raise ValueError(
                "`relationship` must have rows of probabilities, at least 0 and of "
                f"sum 1, got row {row} with a least entry of {rows[row].min():g} and "
                f"sum {sums[row]:g}."
            )
    if not isinstance(labels, Tracer) and labels.size:
        least, most = int(labels.min()), int(labels.max())
        if least < 0 or most >= len(relationship):
            raise ValueError(
                f"`labels` must be from 0 to {len(relationship) - 1}, the rows of "
                f"`relationship`, got {least} to {most}."
            )
