"""Batch spectral shrinkage against the singular value decomposition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dtnh_jax.regularizers import batch_spectral_shrinkage

value_and_grad = jax.jit(jax.value_and_grad(batch_spectral_shrinkage), static_argnums=1)


def features(batch, dim, dtype=jnp.float32):
    random = np.random.default_rng(0)
    return jnp.asarray(random.standard_normal((batch, dim)), dtype)


def oracle(matrix, k):
    """Returns the value, its gradient by the decomposition, and the largest square."""
    u, s, v = np.linalg.svd(np.float64(matrix), full_matrices=False)
    return np.sum(s[-k:] ** 2), 2 * (u[:, -k:] * s[-k:]) @ v[-k:], s[0] ** 2


def matrix_of_rank(rank, batch=6, dim=9):
    random = np.random.default_rng(1)
    left, right = (
        random.standard_normal((batch, rank)),
        random.standard_normal((rank, dim)),
    )
    return jnp.float32(left @ right)


@pytest.mark.parametrize(
    ("shape", "k"),
    [((1, 1), 1), ((4, 9), 1), ((4, 9), 4), ((9, 4), 2), ((5, 5), 3), ((32, 1280), 2)],
)
def test_the_smallest_squares_are_summed(shape, k):
    matrix = features(*shape)
    value, gradient = value_and_grad(matrix, k)
    expected, expected_gradient, scale = oracle(matrix, k)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6 * scale)
    # A gradient is of the size of a singular value.
    atol = 1e-4 * np.sqrt(scale)
    np.testing.assert_allclose(gradient, expected_gradient, atol=atol)
    assert value.dtype == jnp.float32


def test_one_is_the_default_and_a_batch_is_summed():
    matrix = features(3, 5)
    assert batch_spectral_shrinkage(matrix) == batch_spectral_shrinkage(matrix, 1)
    twice = batch_spectral_shrinkage(jnp.concatenate([matrix.T, matrix.T]))
    once = batch_spectral_shrinkage(matrix.T)
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("k", [1, 3])
def test_gradients_by_finite_differences(shape, k):
    check_grads(
        lambda x: batch_spectral_shrinkage(x, k),
        (features(*shape),),
        1,
        modes=["rev"],
        rtol=2e-2,
    )


@pytest.mark.parametrize("k", [1, 2, 4])
def test_repeated_singular_values_have_a_gradient(k):
    value, gradient = value_and_grad(jnp.eye(4), k)
    np.testing.assert_allclose(value, k, rtol=1e-6)
    # Twice a projection onto k of the directions, whichever they are.
    half = np.asarray(gradient) / 2
    np.testing.assert_allclose(half @ half, half, atol=1e-6)
    np.testing.assert_allclose(np.trace(half), k, rtol=1e-6)


def test_repeats_outside_the_smallest_do_not_blur_the_gradient():
    diagonal = jnp.array([3.0, 3.0, 3.0, 1.0, 1.0])
    value, gradient = value_and_grad(jnp.diag(diagonal), 2)
    np.testing.assert_allclose(value, 2, rtol=1e-5)
    np.testing.assert_allclose(gradient, np.diag([0, 0, 0, 2, 2]), atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_vanishing_singular_values_have_neither_value_nor_gradient(rank):
    matrix = matrix_of_rank(rank)
    scale = oracle(matrix, 1)[2]
    for k in (1, 6 - rank):
        value, gradient = value_and_grad(matrix, k)
        np.testing.assert_allclose(value, 0, atol=1e-6 * scale)
        np.testing.assert_allclose(gradient, 0 * matrix, atol=1e-3 * np.sqrt(scale))
    value, gradient = value_and_grad(matrix, 6)  # all of them: the squared norm
    np.testing.assert_allclose(value, np.sum(np.square(matrix)), rtol=1e-5)
    np.testing.assert_allclose(gradient, 2 * matrix, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_zeros_have_a_zero_gradient(shape):
    value, gradient = value_and_grad(jnp.zeros(shape), 2)
    assert value == 0
    assert np.all(gradient == 0)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_an_empty_batch_costs_nothing(shape):
    value, gradient = value_and_grad(jnp.zeros(shape), 1)
    assert value == 0
    assert gradient.shape == shape


def test_a_step_along_the_gradient_shrinks_only_what_is_small():
    matrix = features(6, 9)
    _, gradient = value_and_grad(matrix, 2)
    before = np.linalg.svd(np.float64(matrix), compute_uv=False)
    after = np.linalg.svd(np.float64(matrix - 0.25 * gradient), compute_uv=False)
    np.testing.assert_allclose(after[:4], before[:4], rtol=1e-4)
    np.testing.assert_allclose(after[4:], before[4:] / 2, rtol=1e-3)


def test_half_precision_is_decomposed_in_float32():
    matrix = features(4, 9, jnp.bfloat16)
    value, gradient = value_and_grad(matrix, 2)
    assert value.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    expected, _ = value_and_grad(matrix.astype(jnp.float32), 2)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    by_numpy = batch_spectral_shrinkage(np.asarray(matrix, np.float64), 2)
    np.testing.assert_allclose(by_numpy, expected, rtol=1e-5)


def test_features_and_k_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\[batch, dim\], got .*\(2, 3, 3, 4\): pool"):
        batch_spectral_shrinkage(jnp.zeros((2, 3, 3, 4)))
    with pytest.raises(ValueError, match=r"\[batch, dim\], got shape \(4,\)"):
        batch_spectral_shrinkage(jnp.zeros(4))
    for k in (0, -1, 4):
        with pytest.raises(ValueError, match=rf"from 1 to min.* 3 for .*\(3, 5\).*{k}"):
            batch_spectral_shrinkage(jnp.zeros((3, 5)), k)
    with pytest.raises(ValueError, match="`k` must be from 1"):
        batch_spectral_shrinkage(jnp.zeros((0, 5)), 0)
