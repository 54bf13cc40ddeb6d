"""Regularizers of the weights against their formulas in float64, and their gradients.

And where the pretrained weights are kept: in which precision, memory and sharding, and
that a compiled function does not have them written into its program.
"""

import re

import equinox
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from dtnh_jax import add_regularizer
from dtnh_jax.regularizers import (
    WeightRegularizer,
    l1_sp,
    l2,
    l2_sp,
    l2_sp_fisher,
)

KINDS = ["device", "pinned_host", "unpinned_host"]
COLLECTIVES = (
    r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|"
    r"collective-broadcast)(-start)?\("
)


def random_tree(seed, dtype=jnp.float32):
    random = np.random.default_rng(seed)
    return {
        "body": {"kernel": jnp.asarray(random.standard_normal((3, 4)), dtype)},
        "head": {"bias": jnp.asarray(random.standard_normal(2), dtype)},
    }


def params_and_source(dtype=jnp.float32):
    return random_tree(0, dtype), random_tree(1, dtype)


FISHER = jax.tree.map(jnp.square, random_tree(2))


def exact(tree):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]


def is_head(path):
    return path.startswith("head/")


def fisher_pull(source, **options):
    return l2_sp_fisher(source, FISHER, **options)


# The penalty of a displacement `d` with Fisher `f`, and its gradient.
PULLS = {
    "l2_sp": (l2_sp, lambda d, f: 0.5 * np.sum(d**2), lambda d, f: d),
    "l1_sp": (l1_sp, lambda d, f: np.sum(np.abs(d)), lambda d, f: np.sign(d)),
    "l2_sp_fisher": (
        fisher_pull,
        lambda d, f: 0.5 * np.sum(f * d**2),
        lambda d, f: f * d,
    ),
}
each_pull = pytest.mark.parametrize(
    ("make", "penalty", "slope"), PULLS.values(), ids=PULLS.keys()
)
each_maker = pytest.mark.parametrize(
    "make", [row[0] for row in PULLS.values()], ids=PULLS.keys()
)
each_mesh = pytest.mark.parametrize(
    "kind", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"]
)


def assert_close(tree, like, rtol=1e-6, atol=0.0):
    leaves, wanted = jax.tree.leaves(tree), jax.tree.leaves(like)
    assert len(leaves) == len(wanted)
    for leaf, want in zip(leaves, wanted):
        np.testing.assert_allclose(
            np.asarray(leaf, np.float64), want, rtol=rtol, atol=atol
        )


@jax.jit
def gradient_of(pull, params):
    return pull.gradient(params)


@jax.jit
def value_and_gradient(regularizer, params):
    return regularizer.value(params), regularizer.gradient(params)


def test_l2_is_half_the_squared_norm():
    params, _ = params_and_source()
    half = 0.5 * sum(np.sum(p**2) for p in exact(params))
    np.testing.assert_allclose(l2().value(params), half, rtol=1e-6)
    assert_close(l2().gradient(params), exact(params))


@each_pull
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_pulls_are_their_formulas(make, penalty, slope, jitted):
    params, source = params_and_source()
    pull = make(source)
    moved = [p - s for p, s in zip(exact(params), exact(source))]
    columns = list(zip(moved, exact(FISHER)))
    wrap = jax.jit if jitted else lambda f: f
    expected = sum(penalty(d, f) for d, f in columns)
    np.testing.assert_allclose(wrap(pull.value)(params), expected, rtol=1e-6)
    gradient = wrap(pull.gradient)(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert_close(gradient, [slope(d, f) for d, f in columns], rtol=1e-5, atol=1e-6)


@each_pull
def test_a_new_head_has_plain_l2_of_its_own_strength(make, penalty, slope):
    params, source = params_and_source()
    body, head = exact(params)
    moved, fisher = body - exact(source)[0], exact(FISHER)[0]
    expected = penalty(moved, fisher) + 0.05 * np.sum(head**2)
    without_head = {"body": source["body"], "head": {"bias": None}}
    for pull in (
        make(source, new=is_head, new_strength=0.1),
        make(source, new=["head"], new_strength=0.1),
        make(source, new=("head/bias",), new_strength=0.1),
        make(without_head, new_strength=0.1),
        make({"body": source["body"], "head": None}, new_strength=0.1),
    ):
        np.testing.assert_allclose(pull.value(params), expected, rtol=1e-6)
        gradient = pull.gradient(params)
        np.testing.assert_allclose(gradient["head"]["bias"], 0.1 * head, rtol=1e-6)
        np.testing.assert_allclose(
            gradient["body"]["kernel"], slope(moved, fisher), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda source: l2(),
        *[row[0] for row in PULLS.values()],
        lambda source: l2_sp(source, new=is_head, new_strength=0.3),
        lambda source: l1_sp(source, new=["head"], new_strength=0.3),
    ],
)
def test_closed_form_gradients_are_those_of_the_value(make):
    params, source = params_and_source()
    regularizer = make(source)
    value = jax.jit(regularizer.value)
    by_autodiff = jax.grad(value)(params)
    assert_close(regularizer.gradient(params), exact(by_autodiff))
    check_grads(value, (params,), 1, modes=["rev"], rtol=1e-2)


@each_maker
def test_gradients_at_the_source_are_zero(make):
    source = random_tree(1)
    pull = make(source)
    assert pull.value(source) == 0
    for gradient in (pull.gradient(source), jax.grad(pull.value)(source)):
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


def test_complex_displacements_have_moduli_and_directions():
    source = {"w": jnp.array([1 + 1j, 2.0])}
    params = {"w": jnp.array([4 + 5j, 2.0])}
    pull = l1_sp(source)
    np.testing.assert_allclose(pull.value(params), 5.0, rtol=1e-6)
    direction = np.array([0.6 + 0.8j, 0.0])
    np.testing.assert_allclose(pull.gradient(params)["w"], direction, rtol=1e-6)
    # JAX's derivative by a complex number is the conjugate of the gradient.
    derivative = jax.grad(pull.value)(params)["w"]
    np.testing.assert_allclose(derivative, direction.conj(), rtol=1e-6)
    weighted = l2_sp_fisher(source, {"w": jnp.array([2.0, 1.0])})
    np.testing.assert_allclose(weighted.value(params), 25.0, rtol=1e-6)


@each_maker
def test_half_precision_keeps_its_dtype_and_is_summed_in_float32(make):
    params, source = params_and_source(jnp.bfloat16)
    as_float32 = [
        jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in (params, source)
    ]
    pull, single = make(source, new=is_head), make(as_float32[1], new=is_head)
    value = pull.value(params)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, single.value(as_float32[0]), rtol=1e-2)
    gradient = pull.gradient(params)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(gradient))
    assert_close(gradient, exact(single.gradient(as_float32[0])), rtol=1e-2)
    # A source of higher precision does not raise that of the gradient.
    for leaf in jax.tree.leaves(make(random_tree(1)).gradient(params)):
        assert leaf.dtype == jnp.bfloat16


def test_l2_keeps_the_dtype_of_the_parameters():
    params = random_tree(0, jnp.bfloat16)
    gradient = l2().gradient(params)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(gradient))
    assert l2().value(params).dtype == jnp.float32


def test_empty_trees_and_leaves_have_no_penalty():
    assert l2().value({}) == 0
    for pull in (
        l2_sp({"w": jnp.zeros((0, 3))}),
        l1_sp({"w": jnp.zeros((0, 3))}),
        l2_sp_fisher({"w": jnp.zeros((0, 3))}, {"w": jnp.zeros((0, 3))}),
    ):
        assert pull.value({"w": jnp.zeros((0, 3))}) == 0
        assert pull.gradient({"w": jnp.zeros((0, 3))})["w"].shape == (0, 3)
    assert l1_sp({}).value({}) == 0


@each_maker
def test_integers_are_left_alone(make):
    params = {**random_tree(0), "step": jnp.array(3)}
    source = {**random_tree(1), "step": None}
    pull = make(source)
    assert pull.gradient(params)["step"] == 3
    assert pull.value(params) == pull.value({**params, "step": jnp.array(7)})


@each_maker
def test_the_source_is_a_copy_so_donated_parameters_are_safe(make):
    params, source = params_and_source()
    pull = make(source)
    before = pull.value(params)
    step = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
    step(source)
    assert source["body"]["kernel"].is_deleted()
    assert pull.value(params) == before


# Where the source is kept.


@each_maker
@pytest.mark.parametrize("memory_kind", KINDS)
def test_every_memory_has_the_same_numbers(make, memory_kind):
    params, source = params_and_source()
    plain, kept = make(source), make(source, memory_kind=memory_kind)
    for leaf in jax.tree.leaves(kept):
        assert leaf.sharding.memory_kind == memory_kind

    @jax.jit
    def compiled(pull, params):  # as an argument, and closed over
        return pull.value(params), pull.gradient(params), kept.gradient(params)

    value, as_argument, closed_over = compiled(kept, params)
    np.testing.assert_allclose(value, plain.value(params), rtol=1e-6)
    np.testing.assert_allclose(kept.value(params), plain.value(params), rtol=1e-6)
    wanted = jax.tree.leaves(plain.gradient(params))
    for gradient in (kept.gradient(params), as_argument, closed_over):
        for leaf, want in zip(jax.tree.leaves(gradient), wanted):
            np.testing.assert_array_equal(leaf, want)
            assert leaf.sharding.memory_kind == "device"


def test_as_an_argument_the_source_stays_in_host_memory_until_it_is_used():
    params, source = params_and_source()
    kept = l2_sp(source, memory_kind="pinned_host")
    compiled = gradient_of.lower(kept, params).compile()
    of_pull, of_params = compiled.input_shardings[0]
    assert {s.memory_kind for s in jax.tree.leaves(of_pull) if s} == {"pinned_host"}
    assert {s.memory_kind for s in jax.tree.leaves(of_params)} == {"device"}


@each_maker
def test_a_smaller_dtype_halves_the_memory_at_a_known_cost(make):
    params, source = params_and_source()
    for leaf in jax.tree.leaves(make(source, dtype=jnp.bfloat16)):
        assert leaf.dtype == jnp.bfloat16
    larger = make(source, dtype=jnp.float64)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(larger))
    assert make(source, dtype=jnp.bfloat16).gradient(params)["head"]["bias"].dtype == (
        jnp.float32
    )


def test_the_error_of_bfloat16_is_as_documented():
    source = {"w": jnp.linspace(1.0, 2.0, 4001), "z": jnp.ones(2, jnp.complex64)}
    pull = l2_sp(source, dtype=jnp.bfloat16)
    gradient = pull.gradient(source)
    error = np.max(np.abs(gradient["w"]) / source["w"])
    assert 2**-9 < error <= 2**-8
    assert np.all(gradient["z"] == 0)  # complex numbers are kept as they are


MILLION = {"w": jax.random.normal(jax.random.key(0), (1000, 1000))}


def test_as_an_argument_the_source_is_not_written_into_the_program():
    pull = l2_sp(MILLION)
    lowered = gradient_of.lower(pull, MILLION)
    assert len(lowered.as_text()) < 10_000
    # And of the two copies, of the value and the gradient, one is passed on.
    size = lowered.compile().memory_analysis().argument_size_in_bytes
    assert size == 2 * MILLION["w"].nbytes


@each_maker
def test_a_traced_source_is_an_argument_too(make):
    params, source = params_and_source()

    @jax.jit
    def gradient(source, params):
        return make(source, new=["head"], dtype=jnp.bfloat16).gradient(params)

    expected = make(source, new=["head"], dtype=jnp.bfloat16).gradient(params)
    assert_close(gradient(source, params), exact(expected), rtol=1e-5)
    # Where it was put into host memory before, it is copied on use.
    on_host = jax.tree.map(
        lambda x: jax.device_put(x, x.sharding.with_memory_kind("pinned_host")), source
    )
    assert_close(gradient(on_host, params), exact(expected), rtol=1e-5)
    assert_close(
        jax.jit(lambda s, p: make(s).gradient(p))(on_host, params),
        exact(make(source).gradient(params)),
        rtol=1e-5,
    )


def test_a_traced_source_is_not_written_into_the_program():
    lowered = jax.jit(lambda s, p: l2_sp(s).gradient(p)).lower(MILLION, MILLION)
    assert len(lowered.as_text()) < 10_000
    # There is a name for the host's memory inside, but not for every other one.
    assert jax.jit(lambda s: l2_sp(s, memory_kind="pinned_host").value(s))(MILLION) == 0
    with pytest.raises(ValueError, match=r"`memory_kind` .* inside .*unpinned_host"):
        jax.jit(lambda s: l2_sp(s, memory_kind="unpinned_host").value(s))(MILLION)


@each_mesh
@pytest.mark.parametrize("memory_kind", [None, "pinned_host"])
def test_the_copy_is_sharded_like_the_source_and_nothing_is_gathered(kind, memory_kind):
    if memory_kind and kind == AxisType.Explicit and jax.__version_info__ < (0, 9):
        pytest.skip("an older XLA cannot fetch from host memory on explicit meshes")
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    sharding = NamedSharding(mesh, P("x", None))
    source = jax.device_put(jnp.arange(32.0).reshape(16, 2), sharding)
    params = jax.device_put(jnp.ones((16, 2)), sharding)
    options = {"memory_kind": memory_kind, "dtype": jnp.bfloat16}
    pulls = [make(source, **options) for make in (l2_sp, l1_sp)]
    pulls.append(l2_sp_fisher(source, source, **options))
    kept = jax.tree.leaves(pulls)
    assert len(kept) == 2 * (1 + 1 + 2)
    for leaf in kept:
        assert leaf.sharding.spec == sharding.spec
        assert leaf.addressable_shards[0].data.shape == (2, 2)

    def gradients(pulls, params):
        return [pull.gradient(params) for pull in pulls]

    with jax.set_mesh(mesh):
        program = jax.jit(gradients).lower(pulls, params).compile()
        value = jax.jit(lambda pull, p: pull.value(p)).lower(pulls[0], params).compile()
        for gradient in program(pulls, params):
            assert gradient.sharding.is_equivalent_to(sharding, 2)
    assert not re.search(COLLECTIVES, program.as_text())
    assert re.search(COLLECTIVES, value.as_text())  # its sum: the search finds it


def test_an_unknown_memory_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"`memory_kind` must.*pinned_host.*'disk'"):
        l2_sp({"w": jnp.ones(2)}, memory_kind="disk")


def test_a_dtype_that_is_not_floating_is_named():
    with pytest.raises(ValueError, match=r"`dtype` must be a floating type.*int8"):
        l1_sp({"w": jnp.ones(2)}, dtype=jnp.int8)


# New leaves by their paths.


class Net(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(2, 2, rngs=rngs)
        self.header = nnx.Linear(2, 2, rngs=rngs)
        self.head = nnx.Linear(2, 2, rngs=rngs)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(2, name="header")(nn.Dense(2, name="body")(x))
        return nn.Dense(2, name="head")(x)


class EquinoxNet(equinox.Module):
    body: equinox.nn.Linear
    header: equinox.nn.Linear
    head: equinox.nn.Linear


def linen_params():
    return jax.jit(LinenNet().init)(jax.random.key(0), jnp.ones((1, 2)))["params"]


def nnx_params():
    return nnx.state(Net(nnx.Rngs(0)), nnx.Param)


def equinox_params():
    a, b, c = jax.random.split(jax.random.key(0), 3)
    net = EquinoxNet(
        equinox.nn.Linear(2, 2, key=a),
        equinox.nn.Linear(2, 2, key=b),
        equinox.nn.Linear(2, 2, key=c),
    )
    return equinox.filter(net, equinox.is_inexact_array)


@pytest.mark.parametrize("make_params", [linen_params, nnx_params, equinox_params])
def test_new_leaves_are_named_alike_in_all_libraries(make_params):
    source = make_params()
    params = jax.tree.map(lambda x: x + 1.0, source)
    for prefixes in (["head"], ["head/"], ("body", "head")):
        pull = l2_sp(source, new=prefixes, new_strength=0.5)
        gradient = pull.gradient(params)
        for name in ("body", "header", "head"):
            ours, theirs = (
                tree[name] if hasattr(tree, "keys") else getattr(tree, name)
                for tree in (gradient, params)
            )
            is_new = name in [prefix.rstrip("/") for prefix in prefixes]
            for leaf, param in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
                param = np.asarray(param)
                expected = 0.5 * param if is_new else np.ones_like(param)
                np.testing.assert_allclose(leaf, expected, rtol=1e-5)


def test_no_prefix_is_no_new_leaf():
    params, source = params_and_source()
    assert l2_sp(source, new=[]).value(params) == l2_sp(source).value(params)


def test_a_regularizer_is_an_argument_of_a_step_with_nnx():
    model = Net(nnx.Rngs(0))
    pull = l2_sp(nnx.state(model, nnx.Param), memory_kind="pinned_host")

    @nnx.jit
    def update(model, pull):
        params = nnx.state(model, nnx.Param)
        tx = add_regularizer(pull, 1.0)
        moved = jax.tree.map(lambda x: x + 1.0, params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        return tx.update(zeros, tx.init(params), moved)[0]

    for leaf in jax.tree.leaves(update(model, pull)):
        np.testing.assert_allclose(leaf, np.ones_like(leaf), rtol=1e-5)


@each_maker
def test_weight_regularizers_say_what_does_not_match(make):
    params, source = params_and_source()
    with pytest.raises(ValueError, match="`new_strength` must be at least 0, got -1"):
        make(source, new_strength=-1.0)
    with pytest.raises(ValueError, match=r"`new` must select a leaf.*body/kernel"):
        make(source, new=lambda path: path == "nothing")
    with pytest.raises(ValueError, match=r"got 'haed',.*Near it are.*'head'"):
        make(source, new=["head", "haed"])
    with pytest.raises(TypeError, match=r"got the string 'head': write new=\['head'\]"):
        make(source, new="head")
    with pytest.raises(
        ValueError, match=r"`source_params` must have the shapes.*'head/bias'"
    ):
        make(source).gradient({**params, "head": {"bias": jnp.ones(5)}})
    with pytest.raises(
        ValueError, match=r"`source_params` must be a tree like.*'neck'"
    ):
        make(source).value({**params, "neck": jnp.ones(1)})


def with_head(bias):
    return {"body": FISHER["body"], "head": {"bias": bias}}


def test_the_fisher_is_checked():
    _, source = params_and_source()
    for wrong, message in [
        ({"body": FISHER["body"]}, r"`fisher` must be a tree like.*'head/bias'"),
        (with_head(jnp.ones(3)), r"`fisher` must have the shapes.*'head/bias'"),
        (with_head(None), r"an array for every leaf that is not new.*'head/bias'"),
        (with_head(jnp.array([1.0, -1e-3])), r"at least 0.*'head/bias'"),
        (with_head(jnp.array([1.0, np.nan])), r"must be finite.*'head/bias'"),
        (with_head(np.array([1.0, np.inf])), r"must be finite.*'head/bias'"),
        (with_head(jnp.ones(2, jnp.complex64)), r"must be real.*'head/bias'"),
    ]:
        with pytest.raises(ValueError, match=message):
            l2_sp_fisher(source, wrong)
    params, _ = params_and_source()
    expected = fisher_pull(source, new=["head"]).value(params)
    for unused in (None, jnp.array([-1.0, np.nan])):  # where it is not looked at
        got = l2_sp_fisher(source, with_head(unused), new=["head"]).value(params)
        assert got == expected
    # What is known while tracing is checked then, what is traced is not.
    negative = with_head(-jnp.ones(2))
    with pytest.raises(ValueError, match=r"at least 0.*'head/bias'"):
        jax.jit(lambda s: l2_sp_fisher(s, negative).value(s))(source)
    traced = jax.jit(lambda f: l2_sp_fisher(source, f).value(params))(FISHER)
    np.testing.assert_allclose(traced, fisher_pull(source).value(params), rtol=1e-6)


def test_any_function_becomes_a_weight_regularizer():
    def value(params):
        return jnp.sum(jnp.abs(params))

    regularizer = WeightRegularizer(value, jax.grad(value))
    np.testing.assert_array_equal(regularizer.gradient(jnp.array([-2.0])), [-1.0])
