"""Every regularizer on explicit meshes, and under JAX's strictest settings.

On meshes with explicit axes, with a batch that is sharded, values and gradients are
those of one device. Strict means that no dtype or rank is promoted silently.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dtnh_jax import regularizers

RANDOM = np.random.default_rng(0)
MAPS = RANDOM.standard_normal((2, 8, 4, 6))
LABELS = RANDOM.integers(0, 6, (8, 4))
RELATIONSHIP = RANDOM.dirichlet(np.ones(6), 6).astype(np.float32)
WEIGHTS = np.full(6, 1 / 6, np.float32)


def listed(function):
    return lambda x, y: function([x], [y])


# Functions of two arrays [8, 4, 6].
FUNCTIONS = {
    "feature_map": listed(regularizers.feature_map),
    "delta": lambda x, y: regularizers.delta(x, y, WEIGHTS),
    "attention_transfer": listed(regularizers.attention_transfer),
    "relational": listed(regularizers.relational),
    "cka": listed(regularizers.cka),
    "spectrum, wide": lambda x, y: regularizers.batch_spectral_shrinkage(x[:, 0], 2),
    "spectrum, tall": lambda x, y: regularizers.batch_spectral_shrinkage(x[:, 0, :3]),
    "logits": lambda x, y: regularizers.logit_distillation(x[:, 0], y[:, 0]),
    "lwf": lambda x, y: regularizers.lwf(x[:, 0], y[:, 0]),
    "co_tuning": lambda x, y: regularizers.co_tuning(
        x[:, 0], jnp.argmax(y[:, 0], axis=-1), RELATIONSHIP
    ),
    "expected_error": lambda x, y: regularizers.expected_error(
        x, jnp.argmax(y, axis=-1), mask=y[..., 0] > 0
    ),
    "kl": lambda x, y: regularizers.kl_to_reference(x, y, mask=y[..., 0]),
    "reverse kl": lambda x, y: regularizers.kl_to_reference(x, y, direction="reverse"),
}
each = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())


@functools.cache
def on_one_device(function):
    return jax.jit(jax.value_and_grad(function))(*jnp.asarray(MAPS, jnp.float32))


@each
@pytest.mark.parametrize("spec", [P("x"), P(("x", "y"))], ids=str)
def test_a_sharded_batch_has_the_value_of_one_device(function, spec):
    expected, wanted = on_one_device(function)
    x, y = jnp.asarray(MAPS, jnp.float32)
    kinds = (AxisType.Explicit, AxisType.Explicit)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=kinds)
    sharding = NamedSharding(mesh, spec)
    x, y = jax.device_put((x, y), sharding)
    with jax.set_mesh(mesh):
        value, gradient = jax.jit(jax.value_and_grad(function))(x, y)
        if spec == P("x"):  # not compiled, types are the same: once will do
            np.testing.assert_allclose(function(x, y), expected, rtol=1e-5)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-6)
    assert gradient.sharding.is_equivalent_to(sharding, 3)


@pytest.fixture
def strict():
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        yield


@each
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_is_promoted_silently(function, dtype, strict):
    x, y = jnp.asarray(MAPS, dtype)
    value, gradient = jax.jit(jax.value_and_grad(function))(x, y)
    assert value.dtype == jnp.float32
    assert gradient.dtype == dtype
    assert np.isfinite(value)


PARAMS = {"lora_a": jnp.ones((3, 2), jnp.bfloat16), "lora_b": jnp.ones((2, 4))}
COMPLEX = {"w": jnp.ones(2, jnp.complex64)}
FISHER = {"lora_a": jnp.ones((3, 2)), "lora_b": np.ones((2, 4), np.float32)}


@pytest.mark.parametrize(
    ("regularizer", "params"),
    [
        (regularizers.l2(), PARAMS),
        (regularizers.l2(), COMPLEX),
        (regularizers.lora_decay(scale=np.float64(0.5)), PARAMS),
        (regularizers.l2_sp(PARAMS, new_strength=np.float64(0.1)), PARAMS),
        (regularizers.l2_sp(PARAMS, dtype=jnp.bfloat16, new=["lora_a"]), PARAMS),
        (regularizers.l1_sp(PARAMS, new=["lora_b"]), PARAMS),
        (regularizers.l1_sp(COMPLEX), COMPLEX),
        (regularizers.l2_sp_fisher(PARAMS, FISHER, dtype=jnp.bfloat16), PARAMS),
        (regularizers.l2_sp_fisher(COMPLEX, {"w": jnp.ones(2)}), COMPLEX),
    ],
)
def test_weights_are_not_promoted_silently(regularizer, params, strict):
    moved = jax.tree.map(lambda x: 2 * x, params)
    value, gradient = jax.jit(
        lambda pull, params: (pull.value(params), pull.gradient(params))
    )(regularizer, moved)
    assert value.dtype == jnp.float32
    for leaf, param in zip(jax.tree.leaves(gradient), jax.tree.leaves(params)):
        assert leaf.dtype == param.dtype
        assert np.any(leaf != 0)


def test_the_fisher_and_channels_are_measured_strictly(strict):
    params = {"w": jnp.ones((6, 3), jnp.bfloat16), "b": jnp.zeros((1, 3))}

    def logits(params, x):
        return x @ params["w"].astype(jnp.float32) + params["b"]

    x = jnp.asarray(MAPS[0, :, 0], jnp.float32)
    for options in (
        {"key": jax.random.key(0)},
        {"labels": lambda x: np.zeros(len(x), np.int64)},
    ):
        fisher = regularizers.diagonal_fisher(logits, params, [x], **options)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(fisher))
    attention = regularizers.channel_attention(
        lambda scales, x: jnp.mean(jnp.square(x * scales["x"][None])), {"x": 6}, [x]
    )
    np.testing.assert_allclose(attention["x"].sum(), 1.0, rtol=1e-5)
