"""Weight decay of low-rank adapters against their products, which it never forms."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from dtnh_jax.regularizers import lora_decay

each_mesh = pytest.mark.parametrize(
    "kind", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"]
)


def exact(tree):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]


def assert_close(tree, like, rtol=1e-6, atol=0.0):
    leaves, wanted = jax.tree.leaves(tree), jax.tree.leaves(like)
    assert len(leaves) == len(wanted)
    for leaf, want in zip(leaves, wanted):
        np.testing.assert_allclose(
            np.asarray(leaf, np.float64), want, rtol=rtol, atol=atol
        )


@jax.jit
def value_and_gradient(regularizer, params):
    return regularizer.value(params), regularizer.gradient(params)


def adapters(batch=(), inputs=5, rank=2, outputs=4, dtype=jnp.float32):
    random = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(random.standard_normal((*batch, *shape)), dtype)

    return {
        "dense": {"lora_a": array(inputs, rank), "lora_b": array(rank, outputs)},
        "other": {
            "kernel": array(3, 3),
            "lora": {"lora_a": array(3, 1), "lora_b": array(1, 3)},
        },
        "step": jnp.array(3),
    }


def product_decay(a, b, scale):
    """Value and gradients through the products, in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    product = scale * a @ b
    of_a = scale * product @ np.swapaxes(b, -1, -2)
    of_b = scale * np.swapaxes(a, -1, -2) @ product
    return 0.5 * np.sum(product**2), of_a, of_b


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_lora_decay_is_half_the_squared_norm_of_the_products(batch, scale):
    params = adapters(batch)
    total, gradient = value_and_gradient(lora_decay(scale=scale), params)
    expected = 0.0
    for ours, theirs in (
        (gradient["dense"], params["dense"]),
        (gradient["other"]["lora"], params["other"]["lora"]),
    ):
        value, of_a, of_b = product_decay(theirs["lora_a"], theirs["lora_b"], scale)
        expected += value
        np.testing.assert_allclose(ours["lora_a"], of_a, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(ours["lora_b"], of_b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert np.all(gradient["other"]["kernel"] == 0)
    assert gradient["other"]["kernel"].dtype == jnp.float32
    assert gradient["step"] == 3


def test_adapters_of_einsums_have_several_axes():
    """And are named after their weights, both as in qwix."""
    random = np.random.default_rng(0)
    shapes = {"q_lora_a": (6, 2), "q_lora_b": (2, 3, 4),
              "o_lora_a": (3, 4, 2), "o_lora_b": (2, 6)}  # fmt: skip
    params = {
        name: jnp.asarray(random.standard_normal(shape), jnp.float32)
        for name, shape in shapes.items()
    }
    total, gradient = value_and_gradient(lora_decay(scale=0.5), params)
    expected = 0.0
    for name in ("q", "o"):
        a, b = params[f"{name}_lora_a"], params[f"{name}_lora_b"]
        value, of_a, of_b = product_decay(a.reshape(-1, 2), b.reshape(2, -1), 0.5)
        expected += value
        for found, flat in zip(
            (gradient[f"{name}_lora_a"], gradient[f"{name}_lora_b"]), (of_a, of_b)
        ):
            flat = flat.reshape(found.shape)
            np.testing.assert_allclose(found, flat, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_lora_gradients_are_those_of_the_value():
    params = adapters((2,))
    del params["step"]
    decay = lora_decay(scale=0.5)
    value = jax.jit(decay.value)
    check_grads(value, (params,), 1, modes=["rev"], rtol=1e-2, atol=1e-3)
    by_autodiff = jax.grad(value)(params)
    assert_close(decay.gradient(params), exact(by_autodiff), rtol=1e-4, atol=1e-5)
    # As adapters begin, with `B` at zero.
    params["dense"]["lora_b"] = jnp.zeros((2, 2, 4))
    gradient = decay.gradient(params)["dense"]
    assert np.all(gradient["lora_a"] == 0)
    assert np.all(gradient["lora_b"] == 0)


def test_complex_adapters_have_the_norm_of_their_product():
    random = np.random.default_rng(0)
    a, b = (
        random.standard_normal(s) + 1j * random.standard_normal(s)
        for s in ((4, 2), (2, 3))
    )
    params = {"lora_a": jnp.asarray(a, "complex64"), "lora_b": jnp.asarray(b, "c8")}
    expected = 0.5 * np.sum(np.abs(a @ b) ** 2)
    np.testing.assert_allclose(lora_decay().value(params), expected, rtol=1e-5)
    gradient = lora_decay().gradient(params)
    np.testing.assert_allclose(gradient["lora_a"], a @ b @ b.conj().T, rtol=1e-5)
    np.testing.assert_allclose(gradient["lora_b"], a.conj().T @ a @ b, rtol=1e-5)


def test_products_are_never_formed():
    params = {"lora_a": jnp.ones((64, 2)), "lora_b": jnp.ones((2, 48))}
    for function in (lora_decay().value, lora_decay().gradient):
        program = str(jax.make_jaxpr(function)(params))
        assert "[64,2]" in program
        assert "64,48" not in program


def test_lora_decay_in_half_precision():
    params = adapters(dtype=jnp.bfloat16)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    value, gradient = value_and_gradient(lora_decay(), params)
    expected, wanted = value_and_gradient(lora_decay(), single)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert gradient["dense"]["lora_a"].dtype == jnp.bfloat16
    wanted = wanted["dense"]["lora_a"]
    np.testing.assert_allclose(
        np.asarray(gradient["dense"]["lora_a"], np.float32), wanted, rtol=1e-2
    )


def test_adapters_of_nnx_are_found():
    model = nnx.Sequential(
        nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0)),
        nnx.LoRA(4, 2, 3, rngs=nnx.Rngs(1)),
    )
    params = nnx.state(model, nnx.Param)
    params = jax.tree.map(lambda x: x + 0.1, params)
    first, second = params["layers"][0]["lora"], params["layers"][1]
    expected = sum(
        product_decay(pair["lora_a"][...], pair["lora_b"][...], 1.0)[0]
        for pair in (first, second)
    )
    assert expected > 0.01
    value, gradient = value_and_gradient(lora_decay(), params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert np.all(gradient["layers"][0]["kernel"][...] == 0)
    assert np.any(gradient["layers"][1]["lora_a"][...] != 0)
    # The product is what the network adds: without input, out is `x A B`.
    nnx.update(model, params)
    x = jnp.eye(4)
    product = np.asarray(model.layers[1](x), np.float64)
    np.testing.assert_allclose(
        0.5 * np.sum(product**2),
        lora_decay().value(nnx.state(model.layers[1], nnx.LoRAParam)),
        rtol=1e-5,
    )


def test_adapters_in_boxes_of_linen_are_found():
    params = {
        name: nn.Partitioned(value, names=(None, None))
        for name, value in (("a", jnp.ones((3, 1))), ("b", jnp.ones((1, 2))))
    }
    assert lora_decay(a="a", b="b").value(params) == 3.0


def test_empty_and_masked_adapters_cost_nothing():
    params = {"lora_a": jnp.zeros((3, 0)), "lora_b": jnp.zeros((0, 2))}
    assert lora_decay().value(params) == 0
    assert lora_decay().gradient(params)["lora_a"].shape == (3, 0)
    frozen = {"on": adapters()["dense"], "off": {"lora_a": None, "lora_b": None}}
    assert lora_decay().gradient(frozen)["off"] == {"lora_a": None, "lora_b": None}


def test_adapters_that_do_not_match_are_named():
    a, b = jnp.ones((3, 2)), jnp.ones((2, 4))
    for params, message in [
        ({"dense": {"kernel": a}}, r"must have adapters.*none among dense/kernel"),
        ({"dense": {"lora_a": a}}, r"'lora_b' next to every 'lora_a'.*dense/lora_a"),
        ({"x": {"lora_a": a}, "y": {"lora_b": b}}, r"got 'x/lora_a' alone"),
        ({"d": {"lora_a": a, "lora_b": a}}, r"\(3, 2\) at 'd/lora_a' and \(3, 2\)"),
        ({"d": {"lora_a": a[0], "lora_b": b}}, r"shapes.*'d/lora_a'"),
        ({"d": {"lora_a": a[None], "lora_b": b.T}}, r"shapes.*'d/lora_b'"),
        ({"d": {"v_lora_a": a, "w_lora_b": b}}, r"'lora_b' next to every 'lora_a'"),
    ]:
        for function in (lora_decay().value, lora_decay().gradient):
            with pytest.raises(ValueError, match=message):
                function(params)
    with pytest.raises(ValueError, match="must be different names, got 'w' twice"):
        lora_decay(a="w", b="w")


@each_mesh
@pytest.mark.parametrize("axis", [0, 1], ids=["sides", "rank"])
def test_sharded_adapters_keep_their_sharding(kind, axis):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 16, 8)).astype(np.float32)
    specs = (P("x", None), P(None, "x")) if axis == 0 else (P(None, "x"), P("x", None))
    params = {
        name: jax.device_put(value, NamedSharding(mesh, spec))
        for name, value, spec in zip(("lora_a", "lora_b"), (a, b.T), specs)
    }
    with jax.set_mesh(mesh):
        value, gradient = value_and_gradient(lora_decay(), params)
    expected, of_a, of_b = product_decay(a, b.T, 1.0)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient["lora_a"], of_a, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient["lora_b"], of_b, rtol=1e-4, atol=1e-4)
    for name, leaf in gradient.items():
        if kind == AxisType.Explicit or axis == 0:
            assert leaf.sharding.is_equivalent_to(params[name].sharding, 2)
