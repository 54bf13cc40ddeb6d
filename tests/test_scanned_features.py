"""Features of layers that are scanned over are those of the unrolled network."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dtnh_jax.nnx
from dtnh_jax import linen, regularizers

LAYERS, BATCH, WIDTH = 3, 5, 4
X = jax.random.normal(jax.random.key(0), (BATCH, WIDTH))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.Dense(WIDTH, name="dense")(x)
        self.sow("intermediates", "before", y)
        return x + nn.tanh(y), None


class Scanned(nn.Module):
    axis: int = 0
    passed_on: tuple[str, ...] = ("intermediates",)
    remat: bool = False
    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            nn.remat(Block) if self.remat else Block,
            variable_axes={"params": 0} | dict.fromkeys(self.passed_on, self.axis),
            split_rngs={"params": True},
            length=LAYERS,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(name="blocks")
        kernel = nn.initializers.lecun_normal()
        if self.boxed:
            kernel = nn.with_partitioning(kernel, (None, "model"))
        x, _ = blocks(x, None)
        return nn.Dense(2, kernel_init=kernel, name="head")(x)


class Unrolled(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(LAYERS):
            x, _ = Block(name=f"block_{i}")(x, None)
        return nn.Dense(2, name="head")(x)


VARIABLES = Scanned().init(jax.random.key(1), X)


def unrolled(variables):
    params = dict(nn.unbox(variables)["params"])
    blocks = params.pop("blocks")
    each = {
        f"block_{i}": jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(LAYERS)
    }
    return {"params": each | params}


def features(variables, layers, model=None):
    """Of the unrolled network, under the names that the scanned one's have."""
    if model is not None:
        return linen.capture_features(model, layers)(variables, X)[1]
    names = {
        name.replace(f"blocks{rest}/{i}", f"block_{i}{rest}"): name
        for i in range(LAYERS)
        for rest in ("", "/dense", "/before")
        for name in [f"blocks{rest}/{i}"]
        if f"blocks{rest}" in layers
    }
    apply = linen.capture_features(Unrolled(), list(names))
    found = apply(unrolled(variables), X)[1]
    carries = {k: v[0] if isinstance(v, tuple) else v for k, v in found.items()}
    return {names[name]: x for name, x in carries.items()}


@pytest.mark.parametrize(
    "model",
    [Scanned(), Scanned(axis=1), Scanned(axis=-1, remat=True), Scanned(boxed=True)],
    ids=["first axis", "second axis", "last axis, remat", "boxed"],
)
def test_every_layer_of_a_scan_has_its_own_map(model):
    layers = ["blocks", "blocks/dense", "blocks/before"]
    variables = model.init(jax.random.key(1), X)
    found = features(variables, layers, model)
    expected = features(variables, layers)
    assert list(found) == [f"{name}/{i}" for name in layers for i in range(LAYERS)]
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


@pytest.mark.parametrize("of", [regularizers.feature_map, regularizers.cka])
def test_regularizers_and_their_gradients_are_those_of_the_unrolled_network(of):
    moved = jax.tree.map(lambda x: 1.2 * x + 0.1, VARIABLES)

    def scanned(variables):
        return of(*[features(v, ["blocks"], Scanned()) for v in (variables, VARIABLES)])

    def by_hand(variables):
        return of(*[features(v, ["blocks"]) for v in (variables, VARIABLES)])

    values, gradients = zip(
        *[jax.jit(jax.value_and_grad(f))(moved) for f in (scanned, by_hand)]
    )
    np.testing.assert_allclose(*values, rtol=1e-5)
    chex.assert_trees_all_close(*gradients, rtol=1e-4, atol=1e-6)


def test_one_layer_of_a_scan_may_be_asked_for():
    everything = features(VARIABLES, ["blocks/dense"], Scanned())
    found = features(VARIABLES, ["head", "blocks/dense/1"], Scanned())
    assert list(found) == ["head", "blocks/dense/1"]
    chex.assert_trees_all_close(
        found["blocks/dense/1"], everything["blocks/dense/1"], rtol=1e-6
    )
    found = features(VARIABLES, lambda path: path.endswith("dense"), Scanned())
    assert set(found) == {f"blocks/dense/{i}" for i in range(LAYERS)}
    with pytest.raises(ValueError, match=r"got 'blocks/dense/3'. Near it are 'blocks/"):
        features(VARIABLES, ["blocks/dense/3"], Scanned())


def test_a_scan_that_passes_nothing_on_is_told_how():
    model = Scanned(passed_on=())
    with pytest.raises(
        ValueError, match=r"got 'blocks', which .*'intermediates' to .*`variable_axes`"
    ):
        features(VARIABLES, ["blocks"], model)
    assert features(VARIABLES, ["head"], model)["head"].shape == (BATCH, 2)


def test_what_the_caller_gets_of_intermediates_has_no_marks():
    apply = linen.capture_features(Scanned(), ["blocks/dense"])
    (_, updated), _ = apply(VARIABLES, X, mutable=["intermediates"])
    (before,) = updated["intermediates"]["blocks"]["before"]
    assert before.shape == (LAYERS, BATCH, WIDTH)
    names = {
        key.key
        for path, _ in jax.tree.leaves_with_path(updated)
        for key in path
        if hasattr(key, "key")
    }
    assert names == {"intermediates", "blocks", "dense", "__call__", "before"}


class Nested(nn.Module):
    """Scans in a scan, an ensemble of heads, and a layer that is called twice."""

    @nn.compact
    def __call__(self, x):
        options = {
            "variable_axes": {"params": 0, "intermediates": 0},
            "split_rngs": {"params": True},
        }

        class Group(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.scan(Block, length=LAYERS, **options)(name="blocks")(x, None)

        x, _ = nn.scan(Group, length=2, **options)(name="groups")(x, None)
        heads = nn.vmap(nn.Dense, in_axes=None, axis_size=2, **options)
        x = heads(WIDTH, name="heads")(x).sum(0)
        embed = nn.Embed(6, WIDTH, name="embed")
        x = x + embed(jnp.arange(BATCH)) + embed(jnp.zeros(BATCH, int))
        return embed.attend(x)


def test_nested_scans_ensembles_and_tied_embeddings():
    variables = Nested().init(jax.random.key(2), X)
    layers = ["groups/blocks", "heads", "embed"]
    output, found = linen.capture_features(Nested(), layers)(variables, X)
    indices = [f"groups/blocks/{i}/{j}" for i in range(2) for j in range(LAYERS)]
    assert list(found) == [*indices, "heads/0", "heads/1", "embed"]
    params = variables["params"]
    x = X
    for name in indices:
        i, j = map(int, name.split("/")[2:])
        dense = params["groups"]["blocks"]["dense"]
        x = x + jnp.tanh(x @ dense["kernel"][i, j] + dense["bias"][i, j][None])
        np.testing.assert_allclose(found[name], x, rtol=1e-5)
    for i in range(2):
        kernel, bias = params["heads"]["kernel"][i], params["heads"]["bias"][i]
        np.testing.assert_allclose(found[f"heads/{i}"], x @ kernel + bias[None], 1e-4)
    table = params["embed"]["embedding"]
    np.testing.assert_array_equal(found["embed"][0], table[:BATCH])
    np.testing.assert_array_equal(found["embed"][1], table[jnp.zeros(BATCH, int)])
    assert output.shape == (BATCH, 6)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        y = self.dense(x)
        if hasattr(self, "__captures__") or not hasattr(nnx, "capture"):
            self.sow(nnx.Intermediate, "before", y)
        return x + nnx.tanh(y)


class NnxScanned(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return NnxBlock(rngs)

        self.blocks = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block, x):
            return block(x)

        return run(self.blocks, x)


def test_every_layer_of_a_scan_of_nnx_has_its_own_map():
    model = NnxScanned(nnx.Rngs(0))
    layers = ["blocks/dense", "blocks/before", "blocks"]
    capture = dtnh_jax.nnx.capture_features
    output, found = capture(model, layers)(X)
    assert list(found) == [f"{name}/{i}" for name in layers for i in range(LAYERS)]
    x = X
    for i in range(LAYERS):
        dense = model.blocks.dense
        y = x @ dense.kernel[...][i] + dense.bias[...][i][None]
        x = x + jnp.tanh(y)
        for name, expected in zip(layers, (y, y, x)):
            np.testing.assert_allclose(found[f"{name}/{i}"], expected, rtol=1e-5)
    np.testing.assert_allclose(output, x, rtol=1e-5)
    _, one = capture(model, ["blocks/1"])(X)
    np.testing.assert_allclose(one["blocks/1"], found["blocks/1"], rtol=1e-6)
