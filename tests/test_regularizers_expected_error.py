"""The expected error against its definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dtnh_jax.regularizers import expected_error

SHAPES = [(6, 4), (3, 5, 4)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=["examples", "tokens"])


def examples(shape, dtype=jnp.float32):
    random = np.random.default_rng(0)
    logits = jnp.asarray(2 * random.standard_normal(shape), dtype)
    return logits, random.integers(0, shape[-1], shape[:-1])


def probabilities(logits):
    logits = np.asarray(logits, np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def errors(logits, labels):
    p = np.take_along_axis(probabilities(logits), labels[..., None], -1)
    return 1 - p[..., 0]


@each_shape
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_is_the_mean_probability_of_other_classes(shape, dtype):
    logits, labels = examples(shape, dtype)
    value, gradient = jax.jit(jax.value_and_grad(expected_error))(logits, labels)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, errors(logits, labels).mean(), rtol=1e-6)
    p, one_hot = probabilities(logits), np.eye(shape[-1])[labels]
    slope = (1 - errors(logits, labels))[..., None] * (p - one_hot) / labels.size
    assert gradient.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(gradient, np.float64), slope, rtol=max(1e-5, jnp.finfo(dtype).eps)
    )


@each_shape
def test_numerical_gradients(shape):
    logits, labels = examples(shape)
    function = jax.jit(lambda x: expected_error(x, labels))
    check_grads(function, (logits,), order=1, rtol=1e-2)


@each_shape
def test_the_mask_weights_entries_and_hides_the_rest(shape):
    logits, labels = examples(shape)
    mask = np.random.default_rng(1).integers(0, 3, shape[:-1])
    mask[0] = 0
    expected = np.sum(mask * errors(logits, labels)) / mask.sum()
    labels[0] = -100  # as padding often is
    spoilt = logits.at[0].set(jnp.nan)
    for wrap in (lambda f: f, jax.jit):
        value, gradient = wrap(jax.value_and_grad(expected_error))(
            spoilt, labels, mask=mask
        )
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        assert np.all(gradient[0] == 0)
        assert np.all(np.isfinite(gradient))
    assert expected_error(spoilt, labels, mask=np.zeros_like(mask)) == 0


def test_sure_answers_are_right_or_wrong():
    logits = jnp.array([[1e4, 0.0], [1e4, -jnp.inf]])
    value, gradient = jax.value_and_grad(expected_error)(logits, jnp.array([0, 1]))
    assert value == 0.5
    assert np.all(gradient == 0)


def test_every_integer_type_of_labels_will_do():
    logits = jnp.zeros((1, 300)).at[0, 5].set(10.0)
    expected = expected_error(logits, jnp.array([5]))
    for dtype in (np.uint8, np.int16, np.int64):
        assert expected_error(logits, np.array([5], dtype)) == expected


def test_errors_name_the_argument():
    logits, labels = examples((6, 4))
    with pytest.raises(ValueError, match=r"`labels` must have the shape.*\(5,\)"):
        expected_error(logits, labels[:5])
    with pytest.raises(ValueError, match="`labels` must be from 0 to 3, got 0 to 4"):
        expected_error(logits, np.array([0, 1, 2, 3, 4, 0]))
    with pytest.raises(ValueError, match="`mask` must have the shape"):
        expected_error(logits, labels, mask=np.ones(4, np.float32))
    wrong = jnp.array([0, 1, 2, 3, 4, 0])
    assert np.isnan(jax.jit(expected_error)(logits, wrong))
    one_hot = jax.nn.one_hot(labels, 4)
    with pytest.raises(Exception, match=r"labels"):  # by jaxtyping here
        expected_error(logits, one_hot)
