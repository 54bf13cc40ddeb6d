"""Regularizers as values: anchored by `tx.init`, arguments of programs, in NNX.

Without a source they take the parameters at `tx.init` for the pretrained ones. With
one they are pytrees, and another one of the same shapes needs no new program.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dtnh_jax import add_regularizer
from dtnh_jax.regularizers import l1_sp, l2, l2_sp, l2_sp_fisher, lora_decay


def random_tree(seed):
    random = np.random.default_rng(seed)
    return {
        "body": {"kernel": jnp.asarray(random.standard_normal((3, 4)), jnp.float32)},
        "head": {"bias": jnp.asarray(random.standard_normal(2), jnp.float32)},
        "step": jnp.array(3),
    }


FISHER = jax.tree.map(lambda x: jnp.square(x).astype(jnp.float32), random_tree(2))


def fisher_pull(source=None, **options):
    return l2_sp_fisher(source, FISHER, **options)


MAKERS = {"l2_sp": l2_sp, "l1_sp": l1_sp, "l2_sp_fisher": fisher_pull}
each_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def assert_equal(tree, like):
    assert jax.tree.structure(tree) == jax.tree.structure(like)
    for leaf, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(like)):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-6)


# Self-anchored.


@each_maker
@pytest.mark.parametrize("options", [{}, {"new": ["head"], "new_strength": 0.5}])
def test_an_anchor_is_as_good_as_a_source(make, options):
    source, params = random_tree(0), random_tree(1)
    pull, wanted = make(**options), make(source, **options)
    assert wanted.anchor is None
    anchor = pull.anchor(source)
    np.testing.assert_allclose(
        pull.value(params, anchor), wanted.value(params), rtol=1e-6
    )
    assert_equal(pull.gradient(params, anchor), wanted.gradient(params))
    assert isinstance(anchor["step"], optax.MaskedNode)
    is_new = isinstance(anchor["head"]["bias"], optax.MaskedNode)
    assert is_new == bool(options)


@each_maker
def test_an_optimizer_from_configuration_pulls_back(make):
    source = random_tree(0)
    tx = optax.chain(add_regularizer(make(), 0.5), optax.sgd(0.1))
    del source["step"]
    fisher = {name: FISHER[name] for name in source}
    if make is fisher_pull:
        pull = l2_sp_fisher(fisher=fisher)
        tx = optax.chain(add_regularizer(pull, 0.5), optax.sgd(0.1))
    state = jax.jit(tx.init)(source)
    moved = jax.tree.map(lambda x: x + 1.0, source)
    zeros = jax.tree.map(jnp.zeros_like, source)
    updates, _ = jax.jit(tx.update)(zeros, state, moved)
    expected = jax.tree.map(lambda x: jnp.full_like(x, -0.05), source)
    if make is fisher_pull:
        expected = jax.tree.map(jnp.multiply, expected, fisher)
    for leaf, wanted in zip(jax.tree.leaves(updates), jax.tree.leaves(expected)):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-4)
    abstract = jax.eval_shape(tx.init, jax.eval_shape(lambda: source))
    assert jax.tree.structure(abstract) == jax.tree.structure(state)


def test_without_an_anchor_the_cure_is_named():
    for call in (l2_sp().value, l1_sp().gradient, fisher_pull().gradient):
        with pytest.raises(ValueError, match=r"self-anchored.*tx\.init.*source"):
            call(random_tree(0))
    with pytest.raises(ValueError, match=r"`fisher` must be a tree.*got None"):
        l2_sp_fisher()


def test_an_anchor_needs_values_and_knows_shapes():
    anchor = l2_sp(new=["head"], dtype=jnp.bfloat16).anchor
    shapes = jax.eval_shape(lambda: random_tree(0))
    with pytest.raises(ValueError, match=r"must have values.*\(3, 4\).*'body/kernel'"):
        anchor(shapes)
    abstract = jax.eval_shape(anchor, shapes)
    assert abstract["body"]["kernel"].dtype == jnp.bfloat16
    assert abstract["body"]["kernel"].shape == (3, 4)
    assert jax.tree.structure(abstract) == jax.tree.structure(anchor(random_tree(0)))
    with pytest.raises(ValueError, match="`params`, got 'haed'"):
        l2_sp(new=["haed"]).anchor(random_tree(0))


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_an_anchor_is_a_copy(jitted):
    params = random_tree(0)
    expected = jax.tree.map(np.array, params)
    anchor = (jax.jit if jitted else lambda f: f)(l2_sp().anchor)(params)
    jax.jit(lambda x: jax.tree.map(lambda x: x + 1, x), donate_argnums=0)(params)
    assert params["body"]["kernel"].is_deleted()
    np.testing.assert_array_equal(anchor["body"]["kernel"], expected["body"]["kernel"])


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="XLA on CPUs cannot place cut arrays"
)
def test_an_anchor_keeps_its_sharding_and_goes_to_the_memory():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    sharding = NamedSharding(mesh, P("x", None))
    params = {"w": jax.device_put(jnp.ones((16, 2)), sharding)}
    pull = l2_sp(memory_kind="pinned_host", dtype=jnp.bfloat16)
    anchor = pull.anchor(params)
    assert anchor["w"].sharding.spec == sharding.spec
    assert anchor["w"].sharding.memory_kind == "pinned_host"
    with jax.set_mesh(mesh):
        for kept in (anchor, jax.jit(pull.anchor)(params)):
            assert kept["w"].sharding.spec == sharding.spec
            gradient = jax.jit(pull.gradient)(params, kept)["w"]
            assert np.all(gradient == 0)
            assert gradient.sharding.spec == sharding.spec
            assert gradient.sharding.memory_kind == "device"


def test_an_anchor_from_a_checkpoint_may_be_of_numpy():
    source, params = random_tree(0), random_tree(1)
    anchor = jax.tree.map(np.asarray, l2_sp().anchor(source))
    assert_equal(l2_sp().gradient(params, anchor), l2_sp(source).gradient(params))


def test_leaves_that_are_masked_out_have_no_anchor():
    params = {"on": jnp.ones(2), "off": optax.MaskedNode(), "none": None}
    anchor = l2_sp().anchor(params)
    assert jax.tree.structure(anchor["off"]) == jax.tree.structure(optax.MaskedNode())
    gradient = l2_sp().gradient(params, anchor)
    assert np.all(gradient["on"] == 0)
    tx = optax.masked(
        add_regularizer(l2_sp(), 1.0), {"body": True, "head": False, "step": False}
    )
    source = random_tree(0)
    state = tx.init(source)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, source), state, random_tree(1))
    moved = random_tree(1)["body"]["kernel"] - source["body"]["kernel"]
    np.testing.assert_allclose(updates["body"]["kernel"], moved, rtol=1e-6)
    assert np.all(updates["head"]["bias"] == 0)


def test_a_fisher_must_be_there_for_every_pretrained_leaf():
    pull = l2_sp_fisher(fisher={**FISHER, "head": {"bias": None}})
    with pytest.raises(ValueError, match=r"every leaf that is not new.*'head/bias'"):
        pull.gradient(random_tree(1), pull.anchor(random_tree(0)))
    pull = l2_sp_fisher(fisher={**FISHER, "head": {"bias": None}}, new=["head"])
    params = random_tree(1)
    gradient = pull.gradient(params, pull.anchor(random_tree(0)))
    assert_equal(gradient["head"], params["head"])


# Arguments of programs.

ADAPTERS = {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 4))}
VALUES = {
    "l2": lambda seed: l2(),
    "l2_sp": lambda seed: l2_sp(random_tree(seed)),
    "l1_sp": lambda seed: l1_sp(random_tree(seed), new=["head"], new_strength=0.1),
    "l2_sp_fisher": lambda seed: fisher_pull(random_tree(seed)),
    "l2_sp of a function": lambda seed: l2_sp(
        random_tree(seed), new=lambda path: path == "head/bias"
    ),
    "l2_sp()": lambda seed: l2_sp(new=["head"], dtype=jnp.bfloat16),
    "l2_sp_fisher()": lambda seed: fisher_pull(new=["head"]),
    "lora_decay": lambda seed: lora_decay(scale=0.5),
}
each_value = pytest.mark.parametrize("make", VALUES.values(), ids=VALUES.keys())


@each_value
def test_one_program_for_all_of_the_same_shapes(make):
    params = ADAPTERS if make is VALUES["lora_decay"] else random_tree(9)

    @jax.jit
    def gradient(pull, params):
        if pull.anchor is None:
            return pull.gradient(params)
        return pull.gradient(params, pull.anchor(params))

    for seed in range(3):
        pull = make(seed)
        got = gradient(pull, params)
        if pull.anchor is None:
            expected = pull.gradient(params)
            for leaf, like in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
                np.testing.assert_allclose(leaf, like, rtol=1e-5)
    assert gradient._cache_size() == 1


@each_value
def test_regularizers_are_trees_for_every_transformation(make):
    first, second = make(0), make(1)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert hash(jax.tree.structure(first)) == hash(jax.tree.structure(second))
    mean = jax.tree.map(lambda x, y: (x + y) / 2, first, second)
    chosen = jax.lax.cond(True, lambda x, y: x, lambda x, y: y, first, second)
    last, _ = jax.lax.scan(lambda pull, _: (pull, None), first, length=3)
    for tree in (chosen, last):
        for leaf, like in zip(jax.tree.leaves(tree), jax.tree.leaves(first)):
            np.testing.assert_array_equal(leaf, like)
    assert jax.tree.structure(mean) == jax.tree.structure(first)


def test_the_mean_of_two_pulls_goes_to_the_mean_of_their_sources():
    params, first, second = random_tree(9), random_tree(0), random_tree(1)
    mean = jax.tree.map(lambda x, y: (x + y) / 2, l2_sp(first), l2_sp(second))
    source = jax.tree.map(lambda x, y: (x + y) / 2, first, second)
    np.testing.assert_allclose(
        mean.value(params), l2_sp(source).value(params), rtol=1e-6
    )


def test_other_options_are_another_program():
    source = random_tree(0)
    for other in (l1_sp(source), l2_sp(source, new=["head"])):
        assert jax.tree.structure(other) != jax.tree.structure(l2_sp(source))


# NNX.


class Net(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(2, 2, rngs=rngs)
        self.head = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.body(x))


def of_state(model, options):
    return l2_sp(nnx.state(model, nnx.Param), **options)


def of_pure_dict(model, options):
    return l2_sp(nnx.to_pure_dict(nnx.state(model, nnx.Param)), **options)


def of_nothing(model, options):
    return l2_sp(**options)


def of_fisher(model, options):
    params = nnx.state(model, nnx.Param)
    return l2_sp_fisher(params, jax.tree.map(jnp.ones_like, params), **options)


def of_fisher_alone(model, options):
    params = nnx.state(model, nnx.Param)
    return l2_sp_fisher(fisher=jax.tree.map(jnp.ones_like, params), **options)


@pytest.mark.parametrize(
    "make", [of_state, of_pure_dict, of_nothing, of_fisher, of_fisher_alone]
)
@pytest.mark.parametrize("options", [{}, {"new": ["head"], "new_strength": 0.0}])
def test_in_the_optimizer_of_nnx(make, options):
    model = Net(nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    tx = optax.chain(add_regularizer(make(model, options), 0.5), optax.sgd(1.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    nnx.update(model, jax.tree.map(lambda x: x + 1.0, nnx.state(model, nnx.Param)))

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: 0.0 * jnp.sum(model(jnp.ones((1, 2)))))(model)
        optimizer.update(model, grads)

    step(model, optimizer)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for name in ("body", "head"):
        moved = 1.0 if options and name == "head" else 0.5
        for leaf, was in zip(
            jax.tree.leaves(after[name]), jax.tree.leaves(before[name])
        ):
            np.testing.assert_allclose(leaf, was + moved, rtol=1e-5)


def test_paths_are_the_same_for_variables_and_their_values():
    model = Net(nnx.Rngs(0))
    seen = set()

    def new(path):
        seen.add(path)
        return path == "head/bias"

    l2_sp(nnx.state(model, nnx.Param), new=new)
    assert seen == {f"{at}/{x}" for at in ("body", "head") for x in ("bias", "kernel")}
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    with pytest.raises(ValueError, match=r"must be a tree like `params`.*'neck'"):
        of_state(model, {}).gradient({**params, "neck": jnp.ones(1)})
    with pytest.raises(ValueError, match=r"shapes.*'head/bias'"):
        of_state(model, {}).gradient(
            {**params, "head": {**params["head"], "bias": jnp.ones(3)}}
        )
