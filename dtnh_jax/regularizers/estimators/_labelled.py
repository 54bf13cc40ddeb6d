"""Logits of labelled examples, in float64 on the host."""

import numpy as np
from jaxtyping import Array


def checked(
    logits: Array | np.ndarray,
    labels: Array | np.ndarray,
    num_classes: int,
    argument: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits in float64 and labels, or raises what the callers document."""
    if labels.shape != logits.shape[:1] or not logits.size:
        raise ValueError(
            f"`{argument}` and `labels` must have one number of examples, at least 1, "
            f"got shapes {logits.shape} and {labels.shape}."
        )
    values, targets = np.asarray(logits, np.float64), np.asarray(labels)
    if targets.min() < 0 or targets.max() >= num_classes:
        raise ValueError(
            f"`labels` must be from 0 to {num_classes - 1}, got {targets.min()} to "
            f"{targets.max()}."
        )
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"`{argument}` must be finite, got {values[int(np.argmin(finite))]} for "
            f"example {int(np.argmin(finite))}."
        )
    return values, targets.astype(np.int64)  # `bincount` takes no unsigned integers


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns log probabilities over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
