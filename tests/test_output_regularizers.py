"""Regularizers of outputs, against their formulas in float64, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.test_util import check_grads

from dtnh_jax.regularizers import (
    calibration_temperature,
    category_relationship,
    co_tuning,
    logit_distillation,
    lwf,
)

SHAPES = ((1, 2), (5, 7), (3, 1), (16, 40))
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_divergence = pytest.mark.parametrize("divergence", [logit_distillation, lwf])


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def logits(shape, dtype=jnp.float32):
    random = np.random.default_rng(0)
    student, teacher = 2 * random.standard_normal((2, *shape))
    return jnp.asarray(student, dtype), jnp.asarray(teacher, dtype)


def exact_divergence(student, teacher, temperature):
    p = softmax(np.float64(teacher) / temperature)
    q = softmax(np.float64(student) / temperature)
    return np.mean(np.sum(p * np.log(p / q), -1))


# Distillation, and learning without forgetting


@each_shape
@pytest.mark.parametrize("temperature", [0.5, 2.0, 3.0])
def test_divergences_are_those_of_softened_probabilities(shape, temperature):
    s, t = logits(shape)
    expected = exact_divergence(s, t, temperature)
    close = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(lwf(s, t, temperature), expected, **close)
    got = logit_distillation(s, t, temperature=temperature)
    np.testing.assert_allclose(got, temperature**2 * expected, **close)


def test_default_temperatures_are_those_of_the_papers_and_their_library():
    s, t = logits((5, 7))
    np.testing.assert_allclose(lwf(s, t), exact_divergence(s, t, 3), rtol=1e-5)
    got = logit_distillation(s, t)
    np.testing.assert_allclose(got, 4 * exact_divergence(s, t, 2), rtol=1e-5)


def test_the_gradient_of_lwf_is_that_of_the_papers_cross_entropy():
    s, t = logits((5, 7))
    # Equation 3, word for word: probabilities to the power of 1/T, and normalised.
    powers = softmax(np.float64(t)) ** (1 / 2)
    recorded = jnp.float32(powers / powers.sum(-1, keepdims=True))

    def cross_entropy(s):
        return -jnp.mean(jnp.sum(recorded * jax.nn.log_softmax(s / 2), -1))

    got = jax.grad(lwf)(s, t, 2.0)
    np.testing.assert_allclose(got, jax.grad(cross_entropy)(s), atol=1e-6)


@each_divergence
def test_gradients_of_divergences(divergence):
    s, t = logits((5, 7))
    check_grads(lambda s: divergence(s, t), (s,), 1, modes=["rev"], rtol=1e-2)
    assert np.all(jax.grad(divergence, 1)(s, t) == 0)  # none for the teacher
    at_the_start = jax.grad(divergence)(t, t)
    np.testing.assert_allclose(at_the_start, np.zeros((5, 7)), atol=1e-6)
    far = jax.grad(divergence)(1e4 * s, -1e4 * t)
    assert np.all(np.isfinite(far))


@each_divergence
def test_divergences_sum_half_precision_in_float32(divergence):
    s, t = logits((5, 7), jnp.bfloat16)
    got = jax.jit(divergence)(s, t)
    assert got.dtype == jnp.float32
    expected = divergence(s.astype(jnp.float32), t.astype(jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@each_divergence
def test_an_empty_batch_has_no_divergence(divergence):
    value, gradient = jax.value_and_grad(divergence)(
        jnp.zeros((0, 3)), np.zeros((0, 3))
    )
    assert value == 0
    assert gradient.shape == (0, 3)


@each_divergence
def test_divergences_say_what_does_not_match(divergence):
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(2, 4\)"):
        divergence(jnp.zeros((2, 3)), jnp.zeros((2, 4)))
    for wrong in (0.0, float("nan")):
        with pytest.raises(ValueError, match=f"must be above 0, got {wrong}"):
            divergence(jnp.zeros((2, 3)), jnp.zeros((2, 3)), temperature=wrong)


# Co-tuning


def co_tuning_problem(batch, source, target, dtype=jnp.float32):
    random = np.random.default_rng(0)
    relationship = random.dirichlet(0.3 * np.ones(source), size=target)
    return (
        jnp.asarray(2 * random.standard_normal((batch, source)), dtype),
        jnp.asarray(random.integers(0, target, batch)),
        jnp.asarray(relationship, jnp.float32),
    )


@pytest.mark.parametrize("sizes", [(1, 2, 1), (6, 9, 3), (4, 1, 2), (16, 40, 5)])
def test_co_tuning_is_a_cross_entropy_to_rows_of_the_relationship(sizes):
    x, labels, relationship = co_tuning_problem(*sizes)
    rows = np.float64(relationship)[labels]
    expected = -np.mean(np.sum(rows * np.log(softmax(np.float64(x))), -1))
    got = co_tuning(x, labels, relationship)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(co_tuning)(x, labels, relationship), got, 1e-6)
    closed_over = jax.jit(lambda x, labels: co_tuning(x, labels, relationship))
    np.testing.assert_allclose(closed_over(x, labels), got, 1e-6)
    unsigned = np.asarray(labels, np.uint8)
    assert co_tuning(np.asarray(x), unsigned, np.asarray(relationship)) == got


def test_gradients_of_co_tuning():
    x, labels, relationship = co_tuning_problem(6, 9, 3)
    check_grads(
        lambda x: co_tuning(x, labels, relationship), (x,), 1, modes=["rev"], rtol=1e-2
    )
    gradient = jax.grad(co_tuning, 2)(x, labels, relationship)
    assert np.all(gradient == 0)


def test_zeros_of_the_relationship_are_safe_where_logits_are_masked_out():
    relationship = jnp.array([[0.0, 1.0, 0.0], [0.25, 0.75, 0.0]])
    x = jnp.array([[1.0, 2.0, -jnp.inf], [1e4, 0.0, -jnp.inf]])
    labels = jnp.array([0, 1])
    value, gradient = jax.value_and_grad(co_tuning)(x, labels, relationship)
    np.testing.assert_allclose(value, (np.log1p(np.exp(-1)) + 0.75e4) / 2, rtol=1e-6)
    p = 1 / (1 + np.exp(-1))
    expected = [[1 - p, p - 1, 0], [0.75, -0.75, 0]]
    np.testing.assert_allclose(gradient, np.array(expected) / 2, rtol=1e-5)


def test_co_tuning_in_half_precision_and_on_nothing():
    x, labels, relationship = co_tuning_problem(6, 9, 3, jnp.bfloat16)
    got = co_tuning(x, labels, relationship)
    assert got.dtype == jnp.float32
    expected = co_tuning(x.astype(jnp.float32), labels, relationship)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    half = co_tuning(x, labels, relationship.astype(jnp.bfloat16))
    np.testing.assert_allclose(half, expected, rtol=1e-2)
    value, gradient = jax.value_and_grad(co_tuning)(x[:0], labels[:0], relationship)
    assert value == 0
    assert gradient.shape == (0, 9)


def test_co_tuning_says_what_does_not_match():
    x, labels, relationship = co_tuning_problem(6, 9, 3)
    with pytest.raises(ValueError, match=r"`labels` must have the batch.* 6, got.*5"):
        co_tuning(x, labels[:5], relationship)
    with pytest.raises(ValueError, match=r"column for each source class, 9 .*\(3, 8\)"):
        co_tuning(x, labels, relationship[:, :8])
    with pytest.raises(ValueError, match=r"rows of probabilities.* row 1 .*sum 2"):
        co_tuning(x, labels, relationship.at[1].multiply(2))
    negative = relationship.at[2, :2].set(jnp.array([-1.0, 1.0]))
    with pytest.raises(ValueError, match="row 2 with a least entry of -1"):
        jax.jit(lambda x: co_tuning(x, labels, negative))(x)
    with pytest.raises(ValueError, match=r"row 0 .*nan"):
        co_tuning(x, labels, relationship.at[0].set(jnp.nan))
    with pytest.raises(ValueError, match=r"`labels` must be from 0 to 2.*got 1 to 3"):
        co_tuning(x, jnp.array([1, 1, 1, 1, 2, 3]), relationship)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_wrong_label_that_is_traced_takes_no_other_row(wrong):
    x, labels, relationship = co_tuning_problem(6, 9, 3)
    got = jax.jit(co_tuning)(x, labels.at[0].set(wrong), relationship)
    assert np.isnan(got)


# The relationship of categories


def category_problem(n=60, source=6, target=3):
    """Returns logits that lean towards two source classes for each target class."""
    random = np.random.default_rng(1)
    labels = np.arange(n) % target
    x = random.standard_normal((n, source))
    x[np.arange(n), 2 * labels + random.integers(0, 2, n)] += 2
    return x, labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_direct_is_the_average_output_of_each_class(temperature):
    x, labels = category_problem()
    got = category_relationship(x, labels, 3, temperature=temperature)
    for label in range(3):
        expected = softmax(x[labels == label] / temperature).mean(0)
        np.testing.assert_allclose(got[label], expected, rtol=1e-6)
    assert got.dtype == jnp.float32


@pytest.mark.parametrize(("l2", "scale"), [(1.0, 1.0), (0.01, 1.0), (0.1, 10.0)])
def test_reverse_is_a_logistic_regression_turned_round(l2, scale):
    x, labels = category_problem()
    x = scale * x
    p = softmax(x)

    def objective(flat):
        z = p @ flat.reshape(6, 3)
        nll = np.sum(np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels])
        slope = p.T @ (softmax(z) - np.eye(3)[labels]) + l2 * flat.reshape(6, 3)
        return nll + l2 / 2 * flat @ flat, slope.ravel()

    options = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 5000}
    found = scipy.optimize.minimize(
        objective, np.zeros(18), jac=True, method="L-BFGS-B", options=options
    )
    joint = (softmax(found.x.reshape(6, 3)) * p.mean(0)[:, None]).T
    expected = joint / joint.sum(1, keepdims=True)
    got = category_relationship(x, labels, 3, method="reverse", l2=l2)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    again = category_relationship(x, labels, 3, method="reverse", l2=l2)
    np.testing.assert_array_equal(got, again)


def test_both_methods_count_where_outputs_are_certain():
    random = np.random.default_rng(2)
    labels = random.integers(0, 3, 300)
    source = random.integers(0, 5, 300)
    x = 1e3 * np.eye(6)[source]  # source class 5 never occurs
    counts = np.zeros((3, 6))
    np.add.at(counts, (labels, source), 1)
    expected = counts / counts.sum(1, keepdims=True)
    direct = category_relationship(x, labels, 3)
    np.testing.assert_allclose(direct, expected, atol=1e-6)
    reverse = category_relationship(x, labels, 3, method="reverse", l2=1e-6)
    np.testing.assert_allclose(reverse, expected, atol=1e-5)


@pytest.mark.parametrize("method", ["direct", "reverse"])
def test_relationships_are_what_co_tuning_takes(method):
    x, labels = category_problem()
    got = category_relationship(jnp.bfloat16(x), labels, 3, method=method)
    assert got.shape == (3, 6)
    assert np.isfinite(co_tuning(jnp.float32(x), labels, got))
    assert (np.argmax(got, axis=1) // 2 == np.arange(3)).all()
    # One class alone has nothing to be told from: its row is the average output.
    alone = category_relationship(x, 0 * labels, 1, method=method)
    np.testing.assert_allclose(alone[0], softmax(x).mean(0), rtol=1e-6)


def test_relationships_say_what_is_wrong():
    x, labels = category_problem()
    infinite = np.where(labels[:, None] == 2, np.inf, x)
    for wrong, message in [
        ({"num_classes": 4}, "each of the 4 classes, got none of class 3"),
        ({"num_classes": 2}, "`labels` must be from 0 to 1, got 0 to 2"),
        ({"num_classes": 0}, "`num_classes` must be at least 1, got 0"),
        ({"method": "both"}, r"`method` must be one of .*direct.*, got 'both'"),
        ({"temperature": 0.0}, "`temperature` must be above 0 and finite, got 0"),
        ({"l2": -1.0}, "`l2` must be above 0 and finite, got -1"),
        ({"labels": labels[:5]}, r"`source_logits` and `labels`.*\(60, 6\) and \(5,\)"),
        ({"source_logits": x[:0], "labels": labels[:0]}, "at least 1, got shapes"),
        ({"source_logits": infinite}, "finite, got .* example 2"),
    ]:
        arguments = {"source_logits": x, "labels": labels, "num_classes": 3} | wrong
        with pytest.raises(ValueError, match=message):
            category_relationship(**arguments)


# Calibration


@pytest.mark.parametrize("factor", [0.2, 1.0, 1.7, 8.0])
def test_calibration_recovers_the_factor_of_calibrated_logits(factor):
    random = np.random.default_rng(3)
    x = 2 * random.standard_normal((4000, 5))
    labels = np.argmax(x + random.gumbel(size=x.shape), axis=1)  # drawn from softmax(x)
    got = calibration_temperature(factor * x, labels)
    assert got == pytest.approx(factor, rel=0.05)

    def loss(log_temperature):
        p = softmax(factor * x / np.exp(log_temperature))
        return -np.mean(np.log(p[np.arange(len(x)), labels]))

    found = scipy.optimize.minimize_scalar(
        loss, bracket=(np.log(factor) - 0.1, np.log(factor) + 0.1), tol=1e-10
    )
    assert got == pytest.approx(np.exp(found.x), rel=1e-5)
    assert calibration_temperature(jnp.float32(factor * x), labels) == pytest.approx(
        got, rel=1e-5
    )


def test_calibration_is_at_its_bounds_where_there_is_no_minimum():
    labels = np.array([0, 1, 2])
    assert calibration_temperature(np.eye(3), labels) == 0.01  # all are right
    assert calibration_temperature(1e3 * np.eye(3), labels) == 0.01
    assert calibration_temperature(-np.eye(3), labels) == 100.0  # all are wrong
    constant = np.array([[1.0, 1.0], [-5.0, -5.0]])
    assert calibration_temperature(constant, labels[:2]) == 1.0


def test_calibration_finds_minima_at_extreme_scales():
    x = np.array([[1.0, 0.0]] * 4)  # right three times in four: sigmoid(1/T) is 3/4
    for scale in (0.02, 1e-1, 50.0):
        got = calibration_temperature(scale * x, np.array([0, 0, 0, 1]))
        assert got == pytest.approx(scale / np.log(3), rel=1e-5)


def test_calibration_says_what_is_wrong():
    with pytest.raises(
        ValueError, match=r"`logits` and `labels` .*\(2, 3\) and \(1,\)"
    ):
        calibration_temperature(np.zeros((2, 3)), np.zeros(1, int))
    with pytest.raises(ValueError, match="at least 1, got shapes"):
        calibration_temperature(np.zeros((0, 3)), np.zeros(0, int))
    with pytest.raises(ValueError, match="`labels` must be from 0 to 2, got 0 to 3"):
        calibration_temperature(np.zeros((2, 3)), np.array([0, 3]))
    with pytest.raises(
        ValueError, match=r"`logits` must be finite, got .*nan.*example 1"
    ):
        calibration_temperature(np.array([[0.0, 1.0], [np.nan, 0.0]]), np.array([0, 1]))
