"""Regularizers against their formulas in float64, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dtnh_jax.regularizers import (
    WeightRegularizer,
    feature_map,
    l2,
    l2_sp,
    logit_distillation,
)


def params_and_source(dtype=jnp.float32):
    random = np.random.default_rng(0)

    def tree():
        return {
            "body": {"kernel": jnp.asarray(random.standard_normal((3, 4)), dtype)},
            "head": {"bias": jnp.asarray(random.standard_normal(2), dtype)},
        }

    return tree(), tree()


def exact(tree):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]


def is_head(path):
    return path.startswith("head/")


def test_l2_and_l2_sp_are_half_squared_distances():
    params, source = params_and_source()
    half = 0.5 * sum(np.sum(p**2) for p in exact(params))
    np.testing.assert_allclose(l2().value(params), half, rtol=1e-6)
    pairs = zip(exact(params), exact(source))
    half = 0.5 * sum(np.sum((p - s) ** 2) for p, s in pairs)
    np.testing.assert_allclose(l2_sp(source).value(params), half, rtol=1e-6)


def test_a_new_head_has_plain_l2_of_its_own_strength():
    params, source = params_and_source()
    body, head = exact(params)
    expected = 0.5 * np.sum((body - exact(source)[0]) ** 2) + 0.05 * np.sum(head**2)
    without_head = {"body": source["body"], "head": {"bias": None}}
    for pull in (
        l2_sp(source, new=is_head, new_strength=0.1),
        l2_sp(without_head, new_strength=0.1),
        l2_sp({"body": source["body"], "head": None}, new_strength=0.1),
    ):
        np.testing.assert_allclose(pull.value(params), expected, rtol=1e-6)
        gradient = pull.gradient(params)
        np.testing.assert_allclose(gradient["head"]["bias"], 0.1 * head, rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda source: l2(),
        l2_sp,
        lambda source: l2_sp(source, new=is_head, new_strength=0.3),
    ],
)
def test_closed_form_gradients_are_those_of_the_value(make):
    params, source = params_and_source()
    regularizer = make(source)
    by_autodiff = jax.grad(regularizer.value)(params)
    for ours, theirs in zip(
        jax.tree.leaves(regularizer.gradient(params)), jax.tree.leaves(by_autodiff)
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    check_grads(regularizer.value, (params,), 1, modes=["rev"], rtol=1e-2)


def test_weight_gradients_keep_the_dtype_of_the_parameters():
    params, _ = params_and_source(jnp.bfloat16)
    _, source = params_and_source()
    for regularizer in (l2(), l2_sp(source, new=is_head, new_strength=0.1)):
        for leaf in jax.tree.leaves(regularizer.gradient(params)):
            assert leaf.dtype == jnp.bfloat16
        assert regularizer.value(params).dtype == jnp.float32


def test_the_source_is_a_copy_so_donated_parameters_are_safe():
    params = {"w": jnp.ones(3)}
    pull = l2_sp(params)
    step = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
    moved = step(params)
    assert params["w"].is_deleted()
    np.testing.assert_array_equal(pull.gradient(moved)["w"], np.ones(3))


def test_empty_trees_and_leaves_have_no_penalty():
    assert l2().value({}) == 0
    empty = {"w": jnp.zeros((0, 3))}
    assert l2_sp(empty).value(empty) == 0


def test_weight_regularizers_say_what_does_not_match():
    params, source = params_and_source()
    with pytest.raises(ValueError, match="`new_strength` must be at least 0, got -1"):
        l2_sp(source, new_strength=-1.0)
    with pytest.raises(ValueError, match=r"`new` must pick out a leaf.*body/kernel"):
        l2_sp(source, new=lambda path: path == "nothing")
    with pytest.raises(
        ValueError, match=r"`source_params` must be a tree like.*'head/bias'"
    ):
        l2_sp({"body": source["body"]}).gradient(params)


def maps(dtype=jnp.float32):
    random = np.random.default_rng(0)
    shapes = {"early": (2, 4, 4, 3), "late": (2, 5, 6)}
    return [
        {name: jnp.asarray(random.standard_normal(shape), dtype)
         for name, shape in shapes.items()}
        for _ in range(2)
    ]  # fmt: skip


def test_feature_map_sums_over_layers_and_averages_over_the_batch():
    student, teacher = maps()
    pairs = zip(exact(student), exact(teacher))
    expected = 0.5 * sum(np.sum((s - t) ** 2) for s, t in pairs) / 2
    np.testing.assert_allclose(feature_map(student, teacher), expected, rtol=1e-6)
    as_lists = feature_map(list(student.values()), list(teacher.values()))
    np.testing.assert_allclose(as_lists, expected, rtol=1e-6)


def test_logit_distillation_is_the_softened_divergence():
    random = np.random.default_rng(0)
    s, t = random.standard_normal((2, 5, 7))

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)

    p, q = softmax(t / 3), softmax(s / 3)
    expected = 9 * np.mean(np.sum(p * np.log(p / q), -1))
    got = logit_distillation(jnp.float32(s), jnp.float32(t), temperature=3.0)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_data_dependent_gradients_by_finite_differences():
    student, teacher = maps()
    check_grads(lambda s: feature_map(s, teacher), (student,), 1, rtol=1e-2)
    s, t = student["late"][:, 0], teacher["late"][:, 0]
    check_grads(lambda s: logit_distillation(s, t), (s,), 1, rtol=1e-2)


def test_teachers_get_no_gradient():
    student, teacher = maps()
    gradient = jax.grad(lambda t: feature_map(student, t))(teacher)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))
    s, t = student["late"][:, 0], teacher["late"][:, 0]
    assert np.all(jax.grad(lambda t: logit_distillation(s, t))(t) == 0)


def test_half_precision_is_summed_in_float32():
    student, teacher = maps(jnp.bfloat16)
    pairs = zip(exact(student), exact(teacher))
    expected = 0.5 * sum(np.sum((s - t) ** 2) for s, t in pairs) / 2
    got = feature_map(student, teacher)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    logits = student["late"][:, 0]
    assert logit_distillation(logits, teacher["late"][:, 0]).dtype == jnp.float32


def test_an_empty_batch_costs_nothing():
    empty = {"conv": jnp.zeros((0, 2, 2, 3))}
    assert feature_map(empty, empty) == 0
    assert logit_distillation(jnp.zeros((0, 3)), jnp.zeros((0, 3))) == 0


def test_maps_that_do_not_match_are_named():
    student, teacher = maps()
    with pytest.raises(ValueError, match="same layers"):
        feature_map(student, {"early": teacher["early"]})
    with pytest.raises(ValueError, match=r"one shape.*'late'"):
        feature_map(student, teacher | {"late": teacher["early"]})
    with pytest.raises(ValueError, match="must have one shape"):
        logit_distillation(jnp.zeros((2, 3)), jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="`temperature` must be above 0, got 0"):
        logit_distillation(jnp.zeros((2, 3)), jnp.zeros((2, 3)), temperature=0.0)


def test_any_function_becomes_a_weight_regularizer():
    def value(params):
        return jnp.sum(jnp.abs(params))

    regularizer = WeightRegularizer(value, jax.grad(value))
    np.testing.assert_array_equal(regularizer.gradient(jnp.array([-2.0])), [-1.0])
