"""Regularizers of feature maps against their formulas in float64, and at their edges.

What they have in common is one table; what each of them promises beyond stands below.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dtnh_jax.regularizers import (
    attention_transfer,
    cka,
    delta,
    feature_map,
    relational,
)

SHAPES = {"early": (5, 4, 3, 3), "late": (5, 4, 6)}
ATTENTION = {
    name: np.random.default_rng(7).dirichlet(np.ones(shape[-1])).astype(np.float32)
    for name, shape in SHAPES.items()
}


def weighted(student, teacher):
    """`delta` with weights of 1 where `ATTENTION` has none."""
    weights = {
        name: ATTENTION.get(name, np.ones(x.shape[-1], np.float32))
        for name, x in (student.items() if isinstance(student, dict) else ())
    }
    return delta(student, teacher, weights)


def maps(dtype=jnp.float32, shapes=SHAPES, seed=0):
    random = np.random.default_rng(seed)
    return [
        {name: jnp.asarray(random.standard_normal(shape), dtype)
         for name, shape in shapes.items()}
        for _ in range(2)
    ]  # fmt: skip


def exact(tree):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]


def layers(student, teacher):
    return zip(exact(student), exact(teacher))


def feature_map_oracle(student, teacher):
    pairs = layers(student, teacher)
    return 0.5 * sum(np.sum((s - t) ** 2) for s, t in pairs) / 5


def delta_oracle(student, teacher):
    total = 0.0
    for name in student:
        s, t = exact(student[name])[0], exact(teacher[name])[0]
        for example in range(len(s)):
            for channel, weight in enumerate(ATTENTION[name].astype(np.float64)):
                difference = s[example, ..., channel] - t[example, ..., channel]
                total += weight / 2 * np.mean(difference**2) / len(s)
    return total


def attention_transfer_oracle(student, teacher):
    def look(x):
        q = np.mean(x**2, -1).reshape(-1)
        return q / np.linalg.norm(q)

    return sum(
        np.mean([0.5 * np.sum((look(a) - look(b)) ** 2) for a, b in zip(s, t)])
        for s, t in layers(student, teacher)
    )


def huber(x):
    return 0.5 * x**2 if abs(x) <= 1 else abs(x) - 0.5


def relational_oracle(student, teacher, distance=1.0, angle=2.0):
    total = 0.0
    for s, t in layers(student, teacher):
        b = range(len(s))
        s, t = s.reshape(len(s), -1), t.reshape(len(t), -1)
        pairs = [(i, j) for i in b for j in b if i != j]
        ours, theirs = (
            np.array([np.linalg.norm(x[i] - x[j]) for i, j in pairs]) for x in (s, t)
        )
        differences = ours / ours.mean() - theirs / theirs.mean()
        total += distance * np.mean([huber(x) for x in differences])

        def cosine(x, i, j, k):
            left, right = x[i] - x[j], x[k] - x[j]
            return left @ right / (np.linalg.norm(left) * np.linalg.norm(right))

        total += angle * np.mean(
            [
                huber(cosine(s, i, j, k) - cosine(t, i, j, k))
                for i, j in pairs
                for k in b
                if k not in (i, j)
            ]
        )
    return total


def cka_oracle(student, teacher):
    total = 0.0
    for s, t in layers(student, teacher):
        s, t = s.reshape(len(s), -1), t.reshape(len(t), -1)
        s, t = s - s.mean(0), t - t.mean(0)
        norms = np.linalg.norm(s.T @ s) * np.linalg.norm(t.T @ t)
        total += 1 - np.linalg.norm(t.T @ s) ** 2 / norms
    return total


REGULARIZERS = {
    "feature_map": (feature_map, feature_map_oracle),
    "delta": (weighted, delta_oracle),
    "attention_transfer": (attention_transfer, attention_transfer_oracle),
    "relational": (relational, relational_oracle),
    "cka": (cka, cka_oracle),
}
each = pytest.mark.parametrize(
    ("regularizer", "oracle"), REGULARIZERS.values(), ids=REGULARIZERS.keys()
)
VALUE = {f: jax.jit(f) for f, _ in REGULARIZERS.values()}
BOTH = {f: jax.jit(jax.value_and_grad(f, (0, 1))) for f, _ in REGULARIZERS.values()}


def value_and_gradient(regularizer, student, teacher):
    value, (gradient, of_teacher) = BOTH[regularizer](student, teacher)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(of_teacher))
    assert value.dtype == jnp.float32
    assert value.shape == ()
    assert np.isfinite(value)
    for leaf in jax.tree.leaves(gradient):
        assert np.all(np.isfinite(leaf))
    return value, gradient


@each
def test_values_are_those_of_the_formula(regularizer, oracle):
    student, teacher = maps()
    expected = oracle(student, teacher)
    np.testing.assert_allclose(VALUE[regularizer](student, teacher), expected, 2e-5)
    one, other = ({"late": x["late"]} for x in (student, teacher))
    np.testing.assert_allclose(VALUE[regularizer](one, other), oracle(one, other), 2e-5)


@pytest.mark.parametrize("name", ["feature_map", "relational", "cka"])
def test_maps_may_be_without_positions(name):
    regularizer, oracle = REGULARIZERS[name]
    student, teacher = maps(shapes={"pooled": (5, 7)})
    np.testing.assert_allclose(
        VALUE[regularizer](student, teacher), oracle(student, teacher), rtol=2e-5
    )


@pytest.mark.parametrize("regularizer", [feature_map, attention_transfer, cka])
def test_sequences_are_as_good_as_dicts(regularizer):
    student, teacher = maps()
    as_arrays = [[np.asarray(x) for x in tree.values()] for tree in (student, teacher)]
    expected = VALUE[regularizer](student, teacher)
    np.testing.assert_allclose(regularizer(*as_arrays), expected, rtol=1e-5)


@each
def test_gradients_by_finite_differences(regularizer, oracle):
    del oracle
    student, teacher = maps(shapes={"early": (4, 2, 2, 3), "late": (4, 2, 6)})
    f = jax.jit(lambda s: regularizer(s, teacher))
    check_grads(f, (student,), 1, modes=["rev"], rtol=1e-2, atol=1e-3)


@each
def test_equal_maps_are_at_the_minimum(regularizer, oracle):
    del oracle
    teacher, _ = maps()
    value, gradient = value_and_gradient(regularizer, teacher, teacher)
    np.testing.assert_allclose(value, 0, atol=1e-12)
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_allclose(leaf, 0, atol=1e-6)


@each
def test_students_get_a_gradient_and_teachers_none(regularizer, oracle):
    del oracle
    _, gradient = value_and_gradient(regularizer, *maps())  # asserts the latter
    for name in ("early", "late"):
        assert np.any(np.abs(gradient[name]) > 1e-6)


@each
def test_half_precision_is_computed_in_float32(regularizer, oracle):
    del oracle
    student, teacher = maps(jnp.bfloat16)
    value, gradient = value_and_gradient(regularizer, student, teacher)
    widened = [
        {k: x.astype(jnp.float32) for k, x in m.items()} for m in (student, teacher)
    ]
    np.testing.assert_allclose(value, VALUE[regularizer](*widened), rtol=1e-5)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(gradient))


@each
@pytest.mark.parametrize(
    "shape", [(0, 3), (0, 2, 2, 3), (3, 0), (3, 2, 2, 0), (3, 0, 4), (1, 0)]
)
def test_nothing_costs_nothing(regularizer, oracle, shape):
    del oracle
    empty = {"layer": jnp.zeros(shape)}
    value, _ = value_and_gradient(regularizer, empty, empty)
    assert value == 0


@each
def test_maps_of_zero_have_finite_gradients(regularizer, oracle):
    del oracle
    student, teacher = maps()
    zero = jax.tree.map(jnp.zeros_like, student)
    value_and_gradient(regularizer, zero, teacher)
    value_and_gradient(regularizer, student, zero)
    value, _ = value_and_gradient(regularizer, zero, zero)
    assert value == 0


@each
def test_nans_are_not_hidden(regularizer, oracle):
    del oracle
    student, teacher = maps(shapes={"late": (5, 4, 6)})
    student["late"] = student["late"].at[1, 2, 3].set(jnp.nan)
    assert np.isnan(VALUE[regularizer](student, teacher))


@each
def test_maps_that_do_not_match_are_named(regularizer, oracle):
    del oracle
    student, teacher = maps()
    with pytest.raises(ValueError, match=r"`teacher` must have the.*got \['early'\]"):
        regularizer(student, {"early": teacher["early"]})
    with pytest.raises(ValueError, match="`teacher` must have the layers of `student`"):
        regularizer(list(student.values()), [*teacher.values(), jnp.ones((5, 3))])
    for empty in ({}, [], ()):
        with pytest.raises(ValueError, match="`student` must have at least one layer"):
            regularizer(empty, empty)
        with pytest.raises(ValueError, match="`teacher` must have at least one layer"):
            regularizer(student, empty)
    with pytest.raises(
        ValueError, match=r"must have maps of one .*\(4, 4, 6\).*'late'"
    ):
        regularizer(student, teacher | {"late": teacher["late"][:4]})


def not_arrays(argument, kind):
    """The error, or that of jaxtyping, which looks at arguments before us in tests."""
    return f"`{argument}` must be an array.*{kind}|parameter '{argument}'"


@each
def test_only_arrays_are_maps(regularizer, oracle):
    del oracle
    student, teacher = maps()
    for wrong, kind in (
        ("late", "str"),
        (b"late", "bytes"),
        (3, "int"),
        (None, "None"),
    ):
        with pytest.raises(TypeError, match=not_arrays("student", kind)):
            regularizer(wrong, teacher)
        with pytest.raises(TypeError, match=not_arrays("teacher", kind)):
            regularizer(student, wrong)
    with pytest.raises(ValueError, match=r"`teacher` .* got a number at layer 'late'"):
        regularizer(student, teacher | {"late": jnp.float32(1.0)})


def test_a_tuple_from_sow_is_no_map():
    student, teacher = maps()
    with pytest.raises(TypeError, match=r"an array.*tuple.*'late'|parameter 'student'"):
        feature_map(student | {"late": (student["late"],)}, teacher)


@pytest.mark.parametrize(
    "regularizer", [feature_map, attention_transfer, relational, cka, delta]
)
def test_an_array_alone_is_one_layer(regularizer):
    student, teacher = maps(shapes={"late": (4, 7, 8)})
    x, y = student["late"], teacher["late"]
    weights = np.full(8, 1 / 8, np.float32)
    alone, listed = ((weights,), ([weights],)) if regularizer is delta else ((), ())
    expected = regularizer([x], [y], *listed)
    assert expected > 0
    assert regularizer(x, y, *alone) == expected
    assert regularizer(np.asarray(x), [y], *alone) == expected
    with pytest.raises(ValueError, match=r"`teacher` must have the layers of"):
        regularizer(x, {"late": y}, *alone)


def test_the_distance_of_an_array_is_not_that_of_its_rows():
    x, y = jnp.zeros((4, 7, 8)), jnp.ones((4, 7, 8))
    assert feature_map(x, y) == 0.5 * 7 * 8
    assert feature_map(list(x), list(y)) == 4 * 0.5 * 8  # four layers, batches of 7


@pytest.mark.parametrize("regularizer", [feature_map, weighted])
def test_channels_have_to_be_the_same(regularizer):
    student, teacher = maps()
    with pytest.raises(ValueError, match=r"maps of one shape.*'late'"):
        regularizer(student, teacher | {"late": teacher["late"][..., :2]})


# What `delta` does with its weights.


def test_delta_with_weights_of_the_number_of_positions_is_feature_map():
    student, teacher = maps()
    weights = [
        np.full(shape[-1], np.prod(shape[1:-1]), np.float32)
        for shape in SHAPES.values()
    ]
    got = delta(list(student.values()), list(teacher.values()), weights)
    np.testing.assert_allclose(got, feature_map(student, teacher), rtol=1e-6)


def test_channels_without_weight_are_free():
    student, teacher = maps(shapes={"late": (5, 4, 2)})
    gradient = jax.grad(delta)(student, teacher, {"late": jnp.array([1.0, 0.0])})
    assert np.all(gradient["late"][..., 0] != 0)
    assert np.all(gradient["late"][..., 1] == 0)


def test_weights_get_no_gradient():
    student, teacher = maps()
    gradient = jax.grad(delta, argnums=2)(student, teacher, ATTENTION)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


def test_weights_that_do_not_match_are_named():
    student, teacher = maps()
    with pytest.raises(ValueError, match=r"`channel_attention` .* got \['early'\]"):
        delta(student, teacher, {"early": ATTENTION["early"]})
    with pytest.raises(ValueError, match=r"`channel_attention` .* got \[0, 1\]"):
        delta(student, teacher, list(ATTENTION.values()))
    with pytest.raises(ValueError, match=r"`channel_attention` .* at least one layer"):
        delta(student, teacher, {})
    with pytest.raises(TypeError, match=not_arrays("channel_attention", "str")):
        delta(student, teacher, "late")
    wrong = ATTENTION | {"late": np.ones(4, np.float32)}
    with pytest.raises(ValueError, match=r"got shape \(4,\) for 6 channels .* 'late'"):
        delta(student, teacher, wrong)


# What `attention_transfer` does not see.


def test_attention_maps_know_neither_channels_nor_scale():
    student, teacher = maps()
    expected = attention_transfer(student, teacher)
    doubled = {k: jnp.concatenate([v, -v], -1) for k, v in teacher.items()}
    np.testing.assert_allclose(
        attention_transfer(student, doubled), expected, rtol=1e-5
    )
    for scale in (1e-12, 1e12):
        scaled = jax.tree.map(lambda x, scale=scale: x * scale, student)
        value, _ = value_and_gradient(attention_transfer, scaled, teacher)
        np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_a_zero_map_is_half_a_distance_from_any_other():
    student, teacher = maps(shapes={"late": (1, 4, 6)})
    zero = jax.tree.map(jnp.zeros_like, student)
    value, gradient = value_and_gradient(attention_transfer, zero, teacher)
    np.testing.assert_allclose(value, 0.5, rtol=1e-6)
    assert np.all(gradient["late"] == 0)


def test_one_position_has_nowhere_else_to_look():
    student, teacher = maps(shapes={"pooled": (5, 7), "small": (5, 1, 1, 3)})
    np.testing.assert_allclose(attention_transfer(student, teacher), 0, atol=1e-6)


def test_positions_have_to_be_the_same():
    student, teacher = maps()
    with pytest.raises(ValueError, match=r"batch size and positions.*'late'"):
        attention_transfer(student, teacher | {"late": teacher["late"][:, :2]})


@pytest.mark.parametrize("regularizer", [attention_transfer, weighted])
def test_maps_need_an_axis_of_channels(regularizer):
    flat = {"layer": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"\[batch, \.\.\., channels\].*'layer'"):
        regularizer(flat, flat)


# What relations between examples do not see.


def moved(tree):
    """The same maps turned around the origin of their features, scaled and shifted."""
    random = np.random.default_rng(3)

    def move(x):
        flat = np.asarray(x, np.float64).reshape(len(x), -1)
        turn, _ = np.linalg.qr(random.standard_normal((flat.shape[1],) * 2))
        return jnp.asarray((3 * flat @ turn + 1).reshape(x.shape), jnp.float32)

    return jax.tree.map(move, tree)


@pytest.mark.parametrize("regularizer", [relational, cka])
def test_relations_are_invariant_to_rotation_scale_and_shift(regularizer):
    student, teacher = maps()
    value = VALUE[regularizer]
    expected = value(student, teacher)
    assert expected > 0.1
    np.testing.assert_allclose(value(moved(student), teacher), expected, rtol=1e-4)
    np.testing.assert_allclose(value(student, moved(teacher)), expected, rtol=1e-4)
    np.testing.assert_allclose(value(moved(teacher), teacher), 0, atol=1e-5)


@pytest.mark.parametrize("regularizer", [relational, cka])
def test_networks_may_have_other_widths(regularizer):
    student, teacher = maps()
    widened = {
        k: jnp.concatenate([v, jnp.zeros_like(v)], -1) for k, v in teacher.items()
    }
    value, _ = value_and_gradient(regularizer, student, widened)
    expected = VALUE[regularizer](student, teacher)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("regularizer", [relational, cka])
@pytest.mark.parametrize("value", [0.1, 1e4])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_examples_that_all_coincide(regularizer, value, size):
    # Thirds and sevenths of such numbers are rounded.
    student, teacher = maps(shapes={"layer": (size, 5)})
    alike = {"layer": jnp.full((size, 5), value)}
    penalty, gradient = value_and_gradient(regularizer, alike, teacher)
    assert np.all(gradient["layer"] == 0)
    assert regularizer is relational or penalty == 0
    penalty, gradient = value_and_gradient(regularizer, student, alike)
    if regularizer is cka:
        assert penalty == 0
        assert np.all(gradient["layer"] == 0)


@pytest.mark.parametrize("regularizer", [relational, cka])
def test_two_examples_that_coincide(regularizer):
    student, teacher = maps(shapes={"layer": (4, 5)})
    twins = {"layer": student["layer"].at[2].set(student["layer"][0])}
    value, gradient = value_and_gradient(regularizer, twins, teacher)
    assert value > 0
    assert np.max(np.abs(gradient["layer"])) < 10
    value_and_gradient(regularizer, teacher, twins)
    value, _ = value_and_gradient(regularizer, twins, twins)
    np.testing.assert_allclose(value, 0, atol=1e-12)


def test_angles_with_twins_count_as_cosine_zero():
    corner = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    twins = jnp.array([[0.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    # Two of three angles have a twin as a side and as their corner: 0 instead of
    # 1/sqrt(2) in one, and right as it is in the other. At the third both sides agree.
    got = relational([twins], [corner], distance=0.0, angle=1.0)
    cosines = np.array([0.0, np.sqrt(0.5), 1 - np.sqrt(0.5)])
    np.testing.assert_allclose(got, np.mean(0.5 * cosines**2), rtol=1e-6)


def test_a_pair_has_one_distance_and_no_angle():
    student, teacher = maps(shapes={"layer": (2, 5)})
    for regularizer in (relational, cka):
        value, gradient = value_and_gradient(regularizer, student, teacher)
        np.testing.assert_allclose(value, 0, atol=1e-6)
        np.testing.assert_allclose(gradient["layer"], 0, atol=1e-5)


@pytest.mark.parametrize("factors", [(1.0, 0.0), (0.0, 1.0), (0.5, 3.0), (0.0, 0.0)])
def test_factors_of_distances_and_angles(factors):
    distance, angle = factors
    student, teacher = maps()
    got = relational(student, teacher, distance=distance, angle=angle)
    expected = relational_oracle(student, teacher, distance, angle)
    np.testing.assert_allclose(got, expected, rtol=2e-5)


@pytest.mark.parametrize("name", ["distance", "angle"])
def test_factors_are_not_negative(name):
    student, teacher = maps()
    with pytest.raises(ValueError, match=f"`{name}` must be at least 0, got -1"):
        relational(student, teacher, **{name: -1.0})


def test_cka_is_between_0_and_1():
    values = [
        VALUE[cka](*maps(shapes={"layer": (size, 2)}, seed=seed))
        for size in (3, 8)
        for seed in range(10)
    ]
    assert min(values) >= 0
    assert max(values) <= 1 + 1e-6
    assert max(values) > 0.8  # such pairs are among them
    # Examples that differ in one network where they agree in the other.
    student, teacher = jnp.array([1.0, -1, 1, -1]), jnp.array([1.0, 1, -1, -1])
    np.testing.assert_allclose(cka([student], [teacher]), 1, rtol=1e-6)
