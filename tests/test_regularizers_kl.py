"""The KL divergence to a reference model against its definition in float64.

And what large vocabularies need: little memory, and logits that are sharded.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from dtnh_jax import value_and_gradient_pair
from dtnh_jax.regularizers import kl_to_reference

SMALL = (3, 5, 7)
LARGE = (2, 35, 4096)  # in sixteen chunks, the last of them cut off
each_direction = pytest.mark.parametrize("direction", ["forward", "reverse"])
each_shape = pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["whole", "chunks"])


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def exact(logits, reference, direction, mask=None):
    """Value and gradient in float64."""
    log_p, log_q = log_softmax(logits), log_softmax(reference)
    p, q = np.exp(log_p), np.exp(log_q)
    if direction == "forward":
        tokens, slope = np.sum(q * (log_q - log_p), -1), p - q
    else:
        tokens = np.sum(p * (log_p - log_q), -1)
        slope = p * (log_p - log_q - tokens[..., None])
    mask = np.ones(tokens.shape) if mask is None else np.asarray(mask, np.float64)
    weights = mask / mask.sum()
    return np.sum(weights * tokens), weights[..., None] * slope


def pair_of_logits(shape=SMALL, dtype=jnp.float32, scale=3.0):
    random = np.random.default_rng(0)
    x, y = scale * random.standard_normal((2, *shape))
    return jnp.asarray(x, dtype), jnp.asarray(y, dtype)


@each_direction
def test_golden_values(direction):
    logits = jnp.array([[[0.0, 0.0], [1.0, 1.0]]])
    reference = jnp.log(jnp.array([[[0.75, 0.25], [0.5, 0.5]]]))
    forward = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    reverse = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    expected = {"forward": forward, "reverse": reverse}[direction] / 2
    got = kl_to_reference(logits, reference, direction=direction)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@each_direction
@each_shape
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_values_and_gradients_are_those_of_the_definition(direction, shape, dtype):
    logits, reference = pair_of_logits(shape, dtype)
    mask = np.random.default_rng(1).integers(0, 2, shape[:-1])

    @jax.jit
    def function(logits):
        return kl_to_reference(logits, reference, mask=mask, direction=direction)

    value, gradient = jax.value_and_grad(function)(logits)
    expected, slope = exact(logits, reference, direction, mask)
    assert value.dtype == jnp.float32
    assert gradient.dtype == dtype
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(function(logits), value, rtol=1e-6)
    precision = max(float(jnp.finfo(dtype).eps), 2e-5)
    if dtype == jnp.float16:  # whose small numbers are multiples of 6e-8
        np.testing.assert_allclose(gradient, slope, rtol=precision, atol=1e-7)
    else:
        largest = np.max(np.abs(slope))
        gradient = np.asarray(gradient, np.float64)
        np.testing.assert_allclose(gradient, slope, precision, 1e-6 * largest)


@each_direction
def test_numerical_gradients(direction):
    logits, reference = pair_of_logits((2, 3), scale=1.0)
    function = jax.jit(lambda x: kl_to_reference(x, reference, direction=direction))
    check_grads(function, (logits,), order=1, rtol=1e-2)


@each_direction
@each_shape
def test_one_forward_pass_gives_both_gradients(direction, shape):
    logits, reference = pair_of_logits(shape)

    def objective(logits):
        kl = kl_to_reference(logits, reference, direction=direction)
        return jnp.mean(jnp.square(logits)), kl

    _, pair = jax.jit(value_and_gradient_pair(objective))(logits)
    _, slope = exact(logits, reference, direction)
    np.testing.assert_allclose(pair.regularizer, slope, rtol=1e-4, atol=1e-7)


@each_direction
def test_a_small_divergence_is_not_lost_in_rounding(direction):
    logits, _ = pair_of_logits(LARGE)
    change = np.random.default_rng(2).standard_normal(LARGE)
    moved = logits + jnp.asarray(1e-4 * change, jnp.float32)
    expected, _ = exact(moved, logits, direction)
    assert 1e-9 < expected < 1e-8
    value = kl_to_reference(moved, logits, direction=direction)
    np.testing.assert_allclose(value, expected, rtol=1e-2)
    assert kl_to_reference(logits, logits, direction=direction) == 0


@each_direction
def test_the_mask_weights_tokens(direction):
    logits, reference = pair_of_logits()
    for mask in (
        np.random.default_rng(1).random(SMALL[:-1]).astype(np.float32),
        np.arange(15).reshape(SMALL[:-1]) % 3,
        np.arange(15).reshape(SMALL[:-1]) % 2 == 0,
    ):
        expected, _ = exact(logits, reference, direction, mask)
        value = kl_to_reference(logits, reference, mask=mask, direction=direction)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    # Padding may hold anything.
    mask = jnp.ones(SMALL[:-1]).at[1].set(0)
    spoilt = logits.at[1].set(jnp.nan), reference.at[1].set(-jnp.inf)
    expected, slope = exact(logits, reference, direction, mask)
    value, gradient = jax.value_and_grad(kl_to_reference)(
        *spoilt, mask=mask, direction=direction
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-7)


@each_direction
def test_a_mask_of_zeros_is_no_penalty(direction):
    logits, reference = pair_of_logits()
    with jax.debug_nans(True):
        value, gradient = jax.value_and_grad(kl_to_reference)(
            logits, reference, mask=jnp.zeros(SMALL[:-1]), direction=direction
        )
    assert value == 0
    assert np.all(gradient == 0)


@each_direction
def test_tokens_that_neither_model_has_cost_nothing(direction):
    logits, reference = (x.at[..., 2].set(-jnp.inf) for x in pair_of_logits())
    keep = [0, 1, 3, 4, 5, 6]
    expected, slope = exact(logits[..., keep], reference[..., keep], direction)
    value, gradient = jax.value_and_grad(kl_to_reference)(
        logits, reference, direction=direction
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient[..., keep], slope, rtol=1e-4, atol=1e-7)
    assert np.all(gradient[..., 2] == 0)


def test_a_divergence_can_be_infinite():
    logits, reference = pair_of_logits()
    without = logits.at[..., 2].set(-jnp.inf)
    assert kl_to_reference(without, reference) == np.inf
    assert np.isfinite(kl_to_reference(without, reference, direction="reverse"))


@each_direction
def test_the_reference_gets_no_gradient(direction):
    logits, reference = pair_of_logits()
    gradient = jax.grad(
        lambda r: (
            kl_to_reference(logits, r, direction=direction)
            + kl_to_reference(r, r, direction=direction)
        )
    )(reference)
    assert np.all(gradient == 0)


@each_direction
def test_examples_can_be_mapped_over(direction):
    logits, reference = pair_of_logits()
    each = jax.vmap(jax.grad(lambda x, y: kl_to_reference(x, y, direction=direction)))(
        logits, reference
    )
    for gradient, x, y in zip(each, logits, reference):
        expected = exact(x, y, direction)[1]
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


@each_direction
def test_memory_for_half_precision(direction):
    """Two float32 arrays like the logits never exist at once."""
    shape = (4, 80, 2048)
    logits = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    single = 4 * np.prod(shape)

    def forward(x, y):
        return kl_to_reference(x, y, direction=direction)

    def backward(x, y):
        value, linear = jax.linearize(lambda x: forward(x, y), x)
        return value, jax.linear_transpose(linear, x)(jnp.ones_like(value))

    for function in (forward, jax.value_and_grad(forward), backward):
        memory = jax.jit(function).lower(logits, logits).compile().memory_analysis()
        # XLA's CPU backend copies both inputs, which is as much as one of the two.
        assert memory.temp_size_in_bytes < 1.5 * single
        assert memory.output_size_in_bytes < 0.51 * single


@each_direction
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("shape", [(8, 4, 8), (8, 36, 1024)])
def test_logits_may_be_sharded_along_any_axis(direction, kind, shape):
    logits, reference = pair_of_logits(shape)
    mask = jnp.ones(shape[:-1]).at[0, 1].set(0)
    expected, slope = exact(logits, reference, direction, mask)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    function = jax.jit(
        lambda x, y: jax.value_and_grad(kl_to_reference)(
            x, y, mask=mask, direction=direction
        )
    )
    for spec in (P("x", None, "y"), P(None, "y", None)):
        sharding = NamedSharding(mesh, spec)
        arguments = jax.device_put((logits, reference), sharding)
        with jax.set_mesh(mesh):
            value, gradient = function(*arguments)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(gradient, slope, rtol=1e-3, atol=1e-8)
        if kind == AxisType.Explicit:
            assert gradient.sharding.is_equivalent_to(sharding, 3)


def test_errors_name_the_argument():
    logits, reference = pair_of_logits()
    with pytest.raises(ValueError, match=r"`direction` must be one of.*'backward'"):
        kl_to_reference(logits, reference, direction="backward")
    with pytest.raises(ValueError, match=r"`logits` and `reference_logits`.*\(3, 5\)"):
        kl_to_reference(logits, reference[..., 0])
    with pytest.raises(ValueError, match=r"`mask` must have.*\(3, 5\), got \(5,\)"):
        kl_to_reference(logits, reference, mask=np.ones(5, np.float32))
    for wrong in (logits.astype(jnp.int32), logits.astype(jnp.complex64)):
        with pytest.raises((TypeError, ValueError)):
            kl_to_reference(wrong, reference)
