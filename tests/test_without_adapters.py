"""The pretrained network inside of an adapted one: its outputs, and no copy of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dtnh_jax.nnx
from dtnh_jax import linen, regularizers


class Network(nnx.Module):
    """Two adapted layers, of the two kinds that Flax has."""

    def __init__(self, rngs):
        base = nnx.Linear(4, 8, rngs=rngs)
        self.wrapped = nnx.LoRA(4, 2, 8, base_module=base, rngs=rngs)
        self.inside = nnx.LoRALinear(8, 3, lora_rank=2, rngs=rngs)

    def __call__(self, x):
        return self.inside(jax.nn.relu(self.wrapped(x)))

    def pretrained(self, x):
        w, b = self.inside.kernel, self.inside.bias
        return jax.nn.relu(self.wrapped.base_module(x)) @ w[...] + b[...][None]


def trained_network():
    network = Network(nnx.Rngs(0))
    for layer in (network.wrapped, network.inside.lora):
        layer.lora_b[...] = jnp.ones_like(layer.lora_b[...])
    return network


def test_outputs_are_those_of_the_pretrained_network():
    network, x = trained_network(), jnp.ones((2, 4))
    base = dtnh_jax.nnx.without_adapters(network)
    np.testing.assert_array_equal(base(x), network.pretrained(x))
    assert np.abs(base(x) - network(x)).max() > 0.1
    assert isinstance(base, Network)


def test_weights_are_shared_and_the_adapted_network_is_as_it_was():
    network = trained_network()
    base = dtnh_jax.nnx.without_adapters(network)
    ours, theirs = network.inside, base.inside
    assert theirs.kernel.get_value() is ours.kernel.get_value()
    theirs.kernel[...] = jnp.zeros_like(theirs.kernel[...])
    theirs.lora.lora_b[...] = theirs.lora.lora_b[...] - 1
    assert ours.kernel[...].any()
    assert (ours.lora.lora_b[...] == 1).all()


def test_the_reference_in_a_train_step_gets_no_gradient():
    network, x = trained_network(), jnp.ones((2, 4))

    def objective(model):
        logits = model(x)
        reference = dtnh_jax.nnx.without_adapters(model)(x)
        return jnp.sum(logits), regularizers.kl_to_reference(logits, reference)

    @nnx.jit
    def gradients(model):
        of = dtnh_jax.nnx.value_and_gradient_pair(objective, wrt=nnx.LoRAParam)
        return of(model)

    (_, value), pair = gradients(network)
    reference = network.pretrained(x)
    expected = regularizers.kl_to_reference(network(x), reference)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    leaves = jax.tree.leaves(pair.regularizer)
    assert len(leaves) == 4
    assert all(np.abs(leaf).max() > 0 for leaf in leaves)


def test_a_network_without_adapters_is_refused():
    with pytest.raises(ValueError, match=r"`model` must have adapters.*this Linear"):
        dtnh_jax.nnx.without_adapters(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"`params` must have adapters.*'lora_b'"):
        linen.without_adapters({"kernel": jnp.ones(2)})


class Dense(nn.Module):
    """A dense layer with an adapter."""

    @nn.compact
    def __call__(self, x):
        a = self.param("lora_a", nn.initializers.ones, (x.shape[-1], 2))
        b = self.param("lora_b", nn.initializers.ones, (2, 3))
        return nn.Dense(3)(x) + x @ a @ b


def test_linen_outputs_are_those_of_the_pretrained_network():
    model, x = Dense(), jnp.ones((2, 4))
    variables = model.init(jax.random.key(0), x)
    base = linen.without_adapters(variables)
    inner = variables["params"]["Dense_0"]
    expected = nn.Dense(3).apply({"params": inner}, x)
    np.testing.assert_array_equal(model.apply(base, x), expected)
    assert base["params"]["Dense_0"]["kernel"] is inner["kernel"]
    assert (model.apply(variables, x) != expected).all()


def test_adapters_of_qwix():
    qwix = pytest.importorskip("qwix")
    x = jnp.ones((2, 4))
    rule = qwix.LoraProvider(module_path=".*", rank=2, alpha=2.0)
    network = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    expected = network(x)
    adapted = qwix.apply_lora_to_model(network, rule, x, rngs=nnx.Rngs(1))
    adapted.kernel_lora_b[...] = jnp.ones_like(adapted.kernel_lora_b[...])
    base = dtnh_jax.nnx.without_adapters(adapted)
    np.testing.assert_allclose(base(x), expected, rtol=1e-6)
    assert np.abs(adapted(x) - expected).max() > 0.01

    dense = nn.Dense(3)
    adapted = qwix.apply_lora_to_model(dense, rule)
    variables = adapted.init(jax.random.key(0), x)
    params = variables["params"]
    params["kernel_lora_b"] = jnp.ones_like(params["kernel_lora_b"])
    plain = {"params": {name: params[name] for name in ("kernel", "bias")}}
    expected = dense.apply(plain, x)
    base = linen.without_adapters(variables)
    np.testing.assert_allclose(adapted.apply(base, x), expected, rtol=1e-6)
    assert np.abs(adapted.apply(variables, x) - expected).max() > 0.01
