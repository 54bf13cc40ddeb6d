"""Distillation: keeps class probabilities near those of the pretrained network."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def logit_distillation(
    student_logits: Float[Array | np.ndarray, "batch classes"],
    teacher_logits: Float[Array | np.ndarray, "_ _"],
    temperature: float = 2.0,
) -> Float[Array, ""]:
    """Returns the divergence of softened probabilities, `T^2 KL(teacher || student)`.

    It is summed over classes and averaged over the batch. The factor `T^2` keeps
    gradients at the same scale for every temperature. The teacher's logits get no
    gradient.

    Args:
      student_logits: `[batch, classes]`, logits of the network in training.
      teacher_logits: `[batch, classes]`, logits of the pretrained network on the same
        batch.
      temperature: divisor of the logits, above 0.

    Returns:
      A scalar in float32, at least 0, and 0 if the probabilities are equal.

    Raises:
      ValueError: shapes differ, or the temperature is not positive.

    Example:
      >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[4.0, 0.0]])
      >>> print(f"{logit_distillation(student, teacher):.3f}")
      1.311

    References:
      Hinton et al., 2015, section 2, https://arxiv.org/abs/1503.02531

    Differs from the paper, which has the cross-entropy, by the teacher's entropy; that
    has no gradient.
    """
    return temperature**2 * _divergence(student_logits, teacher_logits, temperature)


def lwf(
    student_logits: Float[Array | np.ndarray, "batch classes"],
    teacher_logits: Float[Array | np.ndarray, "_ _"],
    temperature: float = 3.0,
) -> Float[Array, ""]:
    """Learning without Forgetting: `KL(teacher || student)` of the old head's outputs.

    Both logits are those of the pretrained classes on images of the new task: the old
    head stays in the network beside the new head, and is trained with it. The
    temperature softens probabilities. The divergence is summed over classes and
    averaged over the batch. The teacher's logits get no gradient.

    Args:
      student_logits: `[batch, classes]`, logits of the old head in the network in
        training.
      teacher_logits: `[batch, classes]`, logits of the pretrained network on the same
        batch.
      temperature: divisor of the logits, above 0. Unlike in `logit_distillation`, the
        gradient shrinks with `1 / T^2`, so the best strength depends on the
        temperature. Common are 3 with strength 4, and the paper's 2 with strength 1.

    Returns:
      A scalar in float32, at least 0, and 0 if the probabilities are equal.

    Raises:
      ValueError: shapes differ, or the temperature is not positive.

    Example:
      >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[6.0, 0.0]])
      >>> print(f"{lwf(student, teacher):.3f}")
      0.328

    References:
      Li and Hoiem, 2016, equations 2 and 3, https://arxiv.org/abs/1606.09282

    Differs from the paper, which has the cross-entropy, by the teacher's entropy; that
    has no gradient.
    """
    return _divergence(student_logits, teacher_logits, temperature)


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
