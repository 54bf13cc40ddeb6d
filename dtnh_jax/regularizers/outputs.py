"""Regularizers of a network's outputs."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Integer

_SUM_TOLERANCE = 3e-3  # of probabilities; rounding to bfloat16 costs up to 2e-3


def logit_distillation(
    student_logits: Float[Array | np.ndarray, "batch classes"],
    teacher_logits: Float[Array | np.ndarray, "_ _"],
    temperature: float = 2.0,
) -> Float[Array, ""]:
    """Divergence of softened class probabilities, `T^2 KL(teacher || student)`.

    Summed over classes and averaged over the batch; the factor `T^2` keeps gradients
    of one size at every temperature. The teacher's logits get no gradient.

    Args:
      student_logits: `[batch, classes]`, of the network in training.
      teacher_logits: `[batch, classes]`, of the pretrained network on that batch.
      temperature: by which logits are divided, above 0.

    Returns:
      A scalar in float32, at least 0, and 0 where the logits agree.

    Raises:
      ValueError: if shapes differ or the temperature is not positive.

    Example:
      >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[4.0, 0.0]])
      >>> print(f"{logit_distillation(student, teacher):.3f}")
      1.311

    References:
      Hinton et al., 2015, section 2, https://arxiv.org/abs/1503.02531

    Differs from the paper by the teacher's entropy, which has no gradient: the paper
    has the cross-entropy.
    """
    return temperature**2 * _divergence(student_logits, teacher_logits, temperature)


def lwf(
    student_logits: Float[Array | np.ndarray, "batch classes"],
    teacher_logits: Float[Array | np.ndarray, "_ _"],
    temperature: float = 3.0,
) -> Float[Array, ""]:
    """Learning without Forgetting: `KL(teacher || student)` of the old head's outputs.

    Both logits are those of the pretrained classes on images of the new task: the old
    head stays in the network beside the new one, and is trained with it. Probabilities
    are softened by the temperature. Summed over classes and averaged over the batch.
    The teacher's logits get no gradient.

    Args:
      student_logits: `[batch, classes]`, of the old head on the network in training.
      teacher_logits: `[batch, classes]`, of the pretrained network on that batch.
      temperature: by which logits are divided, above 0. Its gradient shrinks with
        `1 / T^2`, other than that of `logit_distillation`, so a strength belongs to
        a temperature. Usual are 3 with strength 4, and the paper's 2 with strength 1.

    Returns:
      A scalar in float32, at least 0, and 0 where the logits agree.

    Raises:
      ValueError: if shapes differ or the temperature is not positive.

    Example:
      >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[6.0, 0.0]])
      >>> print(f"{lwf(student, teacher):.3f}")
      0.328

    References:
      Li and Hoiem, 2016, equations 2 and 3, https://arxiv.org/abs/1606.09282

    Differs from the paper by the teacher's entropy, which has no gradient: the paper
    has the cross-entropy.
    """
    return _divergence(student_logits, teacher_logits, temperature)


def co_tuning(
    source_logits: Float[Array | np.ndarray, "batch source"],
    labels: Integer[Array | np.ndarray, " _"],
    relationship: Float[Array | np.ndarray, "_ _"],
) -> Float[Array, ""]:
    """Cross-entropy of the old head to what a label says of the pretrained classes.

    With `y` the label of an example: `-sum over source classes s of p(s | y) log q(s)`,
    where `p` is a row of `relationship` and `q` is the softmax of `source_logits`.
    Summed over source classes and averaged over the batch. The relationship gets no
    gradient.

    Args:
      source_logits: `[batch, source classes]`, of the pretrained head, which stays in
        the network beside the new one and is trained with it.
      labels: `[batch]`, of the target task. Under `jax.jit` one that is out of range
        can not raise, and makes the result NaN.
      relationship: `[target classes, source classes]`, rows of probabilities; see
        `category_relationship`.

    Returns:
      A scalar in float32. It is least, the entropy of the rows, where `q` is `p`. The
      reference implementation's strength for it is 2.3.

    Raises:
      ValueError: if shapes do not match, or, unless traced, a row of `relationship`
        is not one of probabilities or a label is out of range.

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
    rows = jnp.asarray(relationship).at[jnp.asarray(labels)]
    # NaN, because by default a wrong label would take the nearest row there is.
    target = rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    target = jax.lax.stop_gradient(target).astype(jnp.float32)
    predicted = jax.nn.log_softmax(source_logits.astype(jnp.float32))
    # Source classes that are masked out, with a logit of -inf, would give 0 * -inf.
    terms = jnp.where(target == 0, 0.0, target * predicted)
    return -jnp.sum(terms) / max(len(terms), 1)


def _divergence(
    student_logits: Array | np.ndarray,
    teacher_logits: Array | np.ndarray,
    temperature: float,
) -> Array:
    """Returns `KL(teacher || student)` at a temperature, averaged over the batch."""
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "`student_logits` and `teacher_logits` must have one shape, got "
            f"{student_logits.shape} and {teacher_logits.shape}."
        )
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}.")
    student = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    teacher = jax.lax.stop_gradient(
        jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    )
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    return jnp.sum(divergence) / max(len(divergence), 1)


def _check_categories(
    source_logits: Array | np.ndarray,
    labels: Array | np.ndarray,
    relationship: Array | np.ndarray,
) -> None:
    """Raises what `co_tuning` documents, as far as values are known."""
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
        # So that NaN is wrong too.
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
