"""One forward pass, two gradients, and nothing computed for zeros."""

from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from dtnh_jax import GradientPair, value_and_gradient_pair

LAYERS, WIDTH = 6, 8


def mlp_objective(params, x):
    """Six layers; the regularizer is of the fourth one's output."""
    regularizer = 0.0
    for i, weights in enumerate(params):
        x = jnp.tanh(x @ weights)
        if i == 3:
            regularizer = jnp.mean(x**2)
    return jnp.mean((x - 1) ** 2), regularizer


@pytest.fixture
def mlp():
    keys = jax.random.split(jax.random.key(0), LAYERS + 1)
    params = [jax.random.normal(key, (WIDTH, WIDTH)) for key in keys[:-1]]
    return params, jax.random.normal(keys[-1], (3, WIDTH))


def count(fun, primitive, *args):
    """How often a primitive is in the jaxpr of `fun`, calls within calls included."""

    def walk(jaxpr):
        found = Counter()
        for equation in jaxpr.eqns:
            found[equation.primitive.name] += 1
            for inner in programs.inner(equation.params):
                found += walk(inner)
        return found

    return walk(jax.make_jaxpr(fun)(*args).jaxpr)[primitive]


def two_grads(objective):
    """The plain way, as the reference: a gradient function for each term."""

    def pair(params, *args):
        return GradientPair(
            *[jax.grad(lambda p, i=i: objective(p, *args)[i])(params) for i in (0, 1)]
        )

    return pair


class PairTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_it_equals_two_gradients(self):
        keys = jax.random.split(jax.random.key(0), LAYERS + 1)
        params = [jax.random.normal(key, (WIDTH, WIDTH)) for key in keys[:-1]]
        x = jax.random.normal(keys[-1], (3, WIDTH))
        values, pair = self.variant(value_and_gradient_pair(mlp_objective))(params, x)
        chex.assert_trees_all_close(values, mlp_objective(params, x), rtol=1e-6)
        expected = two_grads(mlp_objective)(params, x)
        chex.assert_trees_all_close(pair, expected, rtol=1e-4, atol=1e-6)


def test_one_forward_pass_and_no_products_with_zeros(mlp):
    """Products: 6 forward; 6 + 5 back from the loss; 4 + 3 back from layer four.

    The input needs no gradient, hence 5 and 3. In all 24, where two gradients need 30
    (two forward passes) and one `jax.vjp` with two cotangents 28 (zeros below the
    top).
    """
    assert count(value_and_gradient_pair(mlp_objective), "dot_general", *mlp) == 24
    assert count(two_grads(mlp_objective), "dot_general", *mlp) > 24


def conv_objective(params, x):
    regularizer = 0.0
    for i, kernel in enumerate(params):
        x = jax.nn.relu(jax.lax.conv(x, kernel, (1, 1), "SAME"))
        if i == 1:
            regularizer = jnp.mean(x**2)
    return jnp.mean((x - 1) ** 2), regularizer


def test_compiled_flops_of_a_convolutional_network():
    keys = jax.random.split(jax.random.key(0), 5)
    params = [jax.random.normal(key, (8, 8, 3, 3)) for key in keys[:4]]
    x = jax.random.normal(keys[4], (4, 8, 16, 16))

    def flops(fun):
        analysis = jax.jit(fun).lower(params, x).compile().cost_analysis()
        return analysis["flops"]

    ours = flops(value_and_gradient_pair(conv_objective))
    one = flops(jax.value_and_grad(lambda p, x: conv_objective(p, x)[0]))
    two_layers = flops(jax.value_and_grad(lambda p, x: conv_objective([*p[:2]], x)[1]))
    forward = flops(conv_objective)
    # The loss's gradient, and the backward half of the regularizer's: two of four
    # layers, whose forward pass is shared.
    assert ours <= one + two_layers - forward / 2 + 0.02 * one


@pytest.mark.parametrize("remat", [False, True])
def test_auxiliary_data_and_checkpointing(mlp, remat):
    def objective(params, x):
        return mlp_objective(params, x), {"mean": jnp.mean(x), "count": 3}

    inner = jax.checkpoint(objective) if remat else objective
    run = jax.jit(value_and_gradient_pair(inner, has_aux=True))
    (values, aux), pair = run(*mlp)
    chex.assert_trees_all_close(values, mlp_objective(*mlp), rtol=1e-6)
    assert aux["count"] == 3
    np.testing.assert_allclose(aux["mean"], jnp.mean(mlp[1]), rtol=1e-6)
    expected = two_grads(mlp_objective)(*mlp)
    chex.assert_trees_all_close(pair, expected, rtol=1e-4, atol=1e-6)


def test_several_regularizers_have_a_gradient_each():
    def objective(params):
        return jnp.sum(params), {
            "l1": jnp.sum(jnp.abs(params)),
            "l2": jnp.sum(params**2),
        }

    (_, values), pair = value_and_gradient_pair(objective)(jnp.array([1.0, -2.0]))
    assert values == {"l1": 3.0, "l2": 5.0}
    np.testing.assert_array_equal(pair.loss, [1.0, 1.0])
    np.testing.assert_array_equal(pair.regularizer["l1"], [1.0, -1.0])
    np.testing.assert_array_equal(pair.regularizer["l2"], [2.0, -4.0])


def test_complex_and_integer_leaves_are_as_in_jax():
    params = {"z": jnp.array([1 + 2j]), "n": jnp.array([3]), "x": jnp.array(2.0)}

    def objective(params):
        square = jnp.sum(jnp.abs(params["z"]) ** 2)
        return square * params["x"] + params["n"][0], params["x"] ** 2

    _, pair = value_and_gradient_pair(objective)(params)
    expected = jax.grad(lambda p: objective(p)[0], allow_int=True)(params)
    np.testing.assert_allclose(pair.loss["z"], expected["z"], rtol=1e-6)
    np.testing.assert_allclose(pair.loss["x"], expected["x"], rtol=1e-6)
    assert pair.loss["n"].dtype == expected["n"].dtype == jax.dtypes.float0
    assert pair.regularizer["z"] == 0


def test_a_regularizer_that_is_a_plain_number_has_no_gradient():
    (_, value), pair = value_and_gradient_pair(lambda p: (jnp.sum(p), 0))(jnp.ones(2))
    assert value == 0
    np.testing.assert_array_equal(pair.regularizer, [0.0, 0.0])


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        (lambda p: jnp.sum(p), "got ArrayImpl"),
        (lambda p: (p, jnp.sum(p)), "got loss of shape"),
        (lambda p: (jnp.sum(p), {"kd": p}), "got kd of shape"),
        (lambda p: (jnp.sum(p), [jnp.sum(p)]), "got regularizer of list"),
        (lambda p: (jnp.sum(p),) * 3, "got tuple"),
    ],
)
def test_an_objective_of_another_kind_is_an_error(outputs, says):
    with pytest.raises(TypeError, match="`objective` must return"):
        value_and_gradient_pair(outputs)(jnp.ones(2))
    with pytest.raises(TypeError, match=says.replace("ArrayImpl", "")):
        value_and_gradient_pair(outputs)(jnp.ones(2))
