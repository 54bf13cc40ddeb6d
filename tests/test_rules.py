"""What conflict rules promise, on every kind of gradient pair.

A rule sees only their Gram matrix, which is two norms and a cosine: hence the grid. The
weights are single precision, as in training; what they promise is checked in double.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from dtnh_jax import rules

NORMS = (0.0, 1e-15, 1e-6, 1.0, 3.0, 1e6, 1e15)
COSINES = (-1.0, -0.999, -0.9, -0.3, 0.0, 0.3, 0.9, 0.999, 1.0)

# A new rule is one row here.
PROMISES = {
    rules.weighted_sum: {"plain sum", "linear", "alike"},
    rules.dtnh: {"never slows", "plain sum", "safe"},
    rules.gate: {"never slows", "plain sum", "safe", "jumps"},
    rules.orthogonal: {"never slows", "never speeds", "linear", "safe"},
    rules.dynamic_barrier: {"never slows", "safe"},
    rules.pcgrad: {"plain sum", "alike", "safe", "helps both"},
    rules.dualproj: {"plain sum", "alike", "safe", "helps both"},
    rules.cagrad: {"alike"},
    rules.mgda: {"alike", "safe", "helps both", "short"},
    rules.imtl_g: {"alike", "safe", "helps both", "short", "bisects"},
    rules.nash_mtl: {"alike", "safe", "helps both", "bisects"},
    rules.aligned_mtl: {"alike", "short"},
}


def that(*promises, but=()):
    """Parametrizes a test with the rules that make all of some promises."""
    kept = [
        rule
        for rule, made in PROMISES.items()
        if made.issuperset(promises) and not made.intersection(but)
    ]
    return pytest.mark.parametrize("rule", kept, ids=lambda rule: rule.__name__)


def gram_of(g, r, cosine):
    return [[g * g, g * r * cosine], [g * r * cosine, r * r]]


def grid(norms=NORMS, cosines=COSINES):
    """Returns Gram matrices `[n, 2, 2]` as a rule gets them."""
    cells = itertools.product(norms, norms, cosines)
    return jnp.array([gram_of(*cell) for cell in cells], jnp.float32)


def opposite_numbers():
    """Returns gradients of one parameter, in conflict."""
    g, r = np.array(list(itertools.product(NORMS[1:], NORMS[1:]))).T
    return g, -r


def gram_of_numbers(g, r):
    return jnp.array([[g * g, g * r], [g * r, r * r]], jnp.float32).transpose(2, 0, 1)


def apart(cosines=(-0.95, -0.6, -0.2, 0.0, 0.2, 0.6, 0.95)):
    """Pairs that no solver in double precision has trouble with."""
    return grid([1e-3, 0.1, 0.8, 1.0, 1.1, 7.0, 1e3], cosines)


def double(*arrays):
    return [np.asarray(x, np.float64) for x in arrays]


def progress(gram, weights):
    """Inner products of the update with both gradients `[..., 2]`, and rounding."""
    gram, weights = double(gram, weights)
    summands = gram * weights[..., None, :]
    return summands.sum(-1), 1e-6 * np.abs(summands).sum(-1)


def plane(gram):
    """Two vectors `[..., 2, 2]` in the plane that have the Gram matrix."""
    (gram,) = double(gram)
    g, r = np.sqrt(gram[..., 0, 0]), np.sqrt(gram[..., 1, 1])
    along = np.divide(gram[..., 0, 1], g, out=np.zeros_like(g), where=g > 0)
    across = np.sqrt(np.maximum(0, r * r - along * along))
    rows = [np.stack([g, 0 * g], -1), np.stack([along, across], -1)]
    return np.stack(rows, -2)


def update_of(vectors, weights):
    return np.einsum("...i,...ij->...j", np.asarray(weights, np.float64), vectors)


def assert_same_update(gram, ours, exact, rtol=1e-5):
    """Weights to rounding: of the update, relative to its two summands."""
    vectors = plane(gram)
    ours, exact = double(ours, exact)
    size = np.linalg.norm(vectors, axis=-1)
    scale = np.maximum((np.abs(ours) * size).sum(-1), (np.abs(exact) * size).sum(-1))
    error = np.linalg.norm(update_of(vectors, ours - exact), axis=-1)
    wrong = error > rtol * scale
    assert not wrong.any(), (np.asarray(gram)[wrong], ours[wrong], exact[wrong])


# What every rule promises.


def test_every_rule_is_in_the_table():
    not_rules = {"Gram", "Rule"}
    assert {rule.__name__ for rule in PROMISES} == set(rules.__all__) - not_rules


@that()
def test_weights_are_finite(rule):
    gram = grid()
    ours = rule(gram)
    assert ours.shape == gram.shape[:-1]
    assert np.all(np.isfinite(ours))


@that()
def test_scale_does_not_matter(rule):
    gram = grid()
    for scale in (2.0**-20, 2.0**20):  # exact in floating point
        np.testing.assert_allclose(rule(scale * gram), rule(gram), rtol=1e-6)


@that()
def test_without_one_gradient_the_update_is_the_other(rule):
    gram = grid([0.0, 1e-15, 1.0, 1e15], [0.0])
    gram = gram[(gram[:, 0, 0] == 0) | (gram[:, 1, 1] == 0)]
    ours = update_of(plane(gram), rule(gram))
    np.testing.assert_array_equal(ours, plane(gram).sum(-2))


@that()
def test_nothing_depends_on_how_a_rule_is_called(rule):
    gram = grid([0.0, 1e-6, 1.0, 3.0])
    entries = rules.Gram(gram[:, 0, 0], gram[:, 0, 1], gram[:, 1, 1])
    plain = rule(gram)
    one_by_one = jnp.stack([rule(each) for each in gram[::29]])
    assert_same_update(gram[::29], one_by_one, plain[::29])
    assert_same_update(gram, jax.jit(rule)(gram), plain)
    assert_same_update(gram, jax.vmap(rule)(gram), plain)
    assert_same_update(gram, rule(gram.reshape(4, -1, 2, 2)).reshape(-1, 2), plain)
    assert_same_update(gram, rule(entries), plain)


@that()
def test_entries_are_never_put_together(rule):
    class Apart(rules.Gram):
        def __jax_array__(self):
            raise AssertionError("a Gram matrix was put together")

    ones = jnp.ones([5])
    assert rule(Apart(ones, 0 * ones, ones)).shape == (5, 2)


@that()
def test_the_precision_is_kept(rule):
    assert rule(jnp.eye(2, dtype=jnp.float16)).dtype == jnp.float16
    assert rule(jnp.eye(2)).dtype == jnp.float32


@that(but=["jumps"])
def test_nothing_jumps_where_a_conflict_begins(rule):
    before, at, after = grid([1.0], [1e-6, 0.0, -1e-6])
    np.testing.assert_allclose(rule(before), rule(at), atol=1e-5)
    np.testing.assert_allclose(rule(after), rule(at), atol=1e-5)


def test_the_gate_jumps():
    gram = grid([1.0], [0.0, -1e-6])
    np.testing.assert_array_equal(rules.gate(gram), [[1, 1], [1, 0]])


# What some promise.


@that("never slows")
def test_the_loss_is_never_slower_than_alone(rule):
    gram = grid()
    got, rounding = progress(gram, rule(gram))
    assert np.all(got[:, 0] >= np.asarray(gram)[:, 0, 0] - rounding[:, 0])


@that("never speeds")
def test_the_loss_is_never_faster_than_alone(rule):
    gram = grid()
    got, rounding = progress(gram, rule(gram))
    assert np.all(got[:, 0] <= np.asarray(gram)[:, 0, 0] + rounding[:, 0])


@that("safe")
def test_the_loss_is_never_raised(rule):
    gram = grid()
    got, rounding = progress(gram, rule(gram))
    assert np.all(got[:, 0] >= -rounding[:, 0])


@that(but=["safe"])
def test_the_others_may_raise_the_loss(rule):
    gram = jnp.array(gram_of(1.0, 10.0, -0.9))
    assert progress(gram, rule(gram))[0][0] < 0


@that("helps both")
def test_the_regularizer_is_never_raised_either(rule):
    gram = grid()
    got, rounding = progress(gram, rule(gram))
    assert np.all(got >= -rounding)


@that(but=["helps both", "alike"])
def test_rules_that_protect_the_loss_may_raise_the_regularizer(rule):
    gram = jnp.array(gram_of(10.0, 1.0, -0.9))
    assert progress(gram, rule(gram))[0][1] < 0


@that("plain sum")
def test_without_conflict_the_update_is_the_sum(rule):
    gram = grid(cosines=[cosine for cosine in COSINES if cosine >= 0])
    np.testing.assert_array_equal(rule(gram), jnp.ones_like(gram[..., 0]))


@that("alike")
def test_both_gradients_are_treated_alike(rule):
    gram = grid()
    swapped = gram[:, ::-1, ::-1]
    np.testing.assert_allclose(rule(swapped)[:, ::-1], rule(gram), rtol=1e-6)


@that("alike")
def test_equal_lengths_have_equal_weights(rule):
    ours = rule(jnp.array([gram_of(2.0, 2.0, cosine) for cosine in COSINES]))
    np.testing.assert_allclose(ours[:, 0], ours[:, 1], rtol=1e-5)


@that("alike")
def test_twice_the_same_gradient_is_its_plain_sum(rule):
    if rule is rules.cagrad:  # it always goes to the edge of its ball
        rule = functools.partial(rule, c=0.0)
    np.testing.assert_allclose(rule(jnp.full([2, 2], 9.0)), [1, 1], rtol=1e-6)


@that("linear")
def test_the_regularizers_sign_and_scale_pass_through(rule):
    gram = apart()
    part = rule(gram) - jnp.array([[1.0, 0.0]])
    for scale in (-1.0, 0.5, -4.0):
        by = jnp.array([[1.0, scale]])
        ours = rule(gram * by[:, :, None] * by[:, None]) * by - jnp.array([[1.0, 0.0]])
        np.testing.assert_allclose(ours, scale * part, rtol=1e-4, atol=1e-6)


@that("bisects")
def test_the_direction_halves_the_angle_at_any_strength(rule):
    gram = grid([1e-15, 1e-6, 1.0, 3.0, 1e15], COSINES[1:])  # not of opposite ones
    ours = np.asarray(rule(gram), np.float64)
    size = np.sqrt(np.asarray(gram, np.float64)[:, [0, 1], [0, 1]])
    along = ours * size  # along unit vectors
    np.testing.assert_allclose(along[:, 0], along[:, 1], rtol=1e-5)


@that("short")
def test_the_shorter_gradient_bounds_the_update(rule):
    # Not of parallel ones: for `aligned_mtl` these are a single gradient.
    gram = grid([1e-6, 1.0, 3.0, 1e6], COSINES[1:-1])
    ours = np.linalg.norm(update_of(plane(gram), rule(gram)), axis=-1)
    size = np.sqrt(np.asarray(gram, np.float64)[:, [0, 1], [0, 1]])
    assert np.all(ours <= 4 * size.min(-1) + 1e-6 * size.max(-1))


@pytest.mark.parametrize("c", [0.0, 0.2, 0.9])
def test_cagrad_lowers_the_sum_of_both(c):
    gram = grid()
    got, rounding = progress(gram, rules.cagrad(gram, c=c))
    least = (1 - c) * np.asarray(gram, np.float64).sum((1, 2))
    assert np.all(got.sum(-1) >= least - 4 * rounding.sum(-1) - 1e-5 * abs(least))


@pytest.mark.parametrize(
    "rule", [rules.pcgrad, rules.dualproj, rules.mgda, rules.imtl_g, rules.nash_mtl]
)
def test_opposite_gradients_cancel_where_both_are_protected(rule):
    g, r = opposite_numbers()
    ours = double(rule(gram_of_numbers(g, r)))[0] * np.stack([g, r], -1)
    assert np.all(np.abs(ours.sum(-1)) <= 1e-6 * np.abs(ours).max(-1))


def test_the_rounding_of_a_cosine_is_not_an_angle():
    opposite, parallel = grid([3.0], [-1 + 2.0**-22, 1 - 2.0**-22])
    np.testing.assert_array_equal(rules.nash_mtl(opposite), [0, 0])
    np.testing.assert_array_equal(rules.aligned_mtl(opposite), [1, 1])
    np.testing.assert_array_equal(rules.aligned_mtl(parallel), [1, 1])


# Golden values.

ORTHOGONAL = [[1.0, 0.0], [0.0, 4.0]]
CONFLICT = [[1.0, -3.0], [-3.0, 25.0]]  # cosine -3/5, area 4
AGREEMENT = [[1.0, 3.0], [3.0, 25.0]]  # cosine 3/5, area 4
SIMILAR = [[5.0, -4.0], [-4.0, 4.0]]  # area 2, ||g - r||^2 = 17

GOLDEN = [
    (rules.weighted_sum, ORTHOGONAL, (1, 1)),
    (rules.weighted_sum, CONFLICT, (1, 1)),
    (rules.weighted_sum, SIMILAR, (1, 1)),
    (rules.dtnh, CONFLICT, (4, 1)),  # 1 + 3/1
    (rules.dtnh, AGREEMENT, (1, 1)),
    (rules.dtnh, SIMILAR, (1.8, 1)),  # 1 + 4/5
    (rules.gate, ORTHOGONAL, (1, 1)),
    (rules.gate, CONFLICT, (1, 0)),
    (rules.gate, AGREEMENT, (1, 1)),
    (rules.orthogonal, CONFLICT, (4, 1)),  # 1 + 3/1
    (rules.orthogonal, AGREEMENT, (-2, 1)),  # 1 - 3/1
    (rules.orthogonal, SIMILAR, (1.8, 1)),  # 1 + 4/5
    (rules.dynamic_barrier, CONFLICT, (4, 1)),  # 1 + 3/1
    (rules.dynamic_barrier, AGREEMENT, (0, 1)),  # 1 - 3/1 < 0
    (rules.dynamic_barrier, ORTHOGONAL, (1, 1)),
    (rules.pcgrad, CONFLICT, (4, 1.12)),  # 1 + 3/1, 1 + 3/25
    (rules.pcgrad, AGREEMENT, (1, 1)),
    (rules.pcgrad, SIMILAR, (1.8, 2)),  # 1 + 4/5, 1 + 4/4
    (rules.dualproj, CONFLICT, (3, 1)),  # <g, g + r> = -2, so 2 g more
    (rules.dualproj, AGREEMENT, (1, 1)),
    (rules.dualproj, SIMILAR, (1, 1)),  # <g, g + r> = 1, <r, g + r> = 0
    (rules.cagrad, ORTHOGONAL, (1 + 5**0.5 / 2, 1)),  # q^2 = 9/4 > 4/3: c sqrt(5) / 1
    (rules.cagrad, CONFLICT, (1 + 5**0.5, 1)),  # q^2 = 36 > 4/3: c sqrt(20) / 1
    (rules.cagrad, AGREEMENT, (1 + 8**0.5, 1)),  # q^2 = 36 > 4/3: c sqrt(32) / 1
    # q = 1/2 and R = sqrt(13)/4: 1 + (8 R - 1) / 17, 1 + (9 R + 1) / 17
    (rules.cagrad, SIMILAR, (1.3653591, 1.5360290)),
    (rules.mgda, ORTHOGONAL, (1.6, 0.4)),  # 4 : 1
    (rules.mgda, CONFLICT, (1.75, 0.25)),  # 28 : 4
    (rules.mgda, AGREEMENT, (2, 0)),  # 22 : -2
    (rules.mgda, SIMILAR, (16 / 17, 18 / 17)),  # 8 : 9
    (rules.imtl_g, ORTHOGONAL, (4 / 3, 2 / 3)),  # lengths 1, 2
    (rules.imtl_g, CONFLICT, (5 / 3, 1 / 3)),  # lengths 1, 5
    (rules.imtl_g, AGREEMENT, (5 / 3, 1 / 3)),
    (rules.nash_mtl, ORTHOGONAL, (17**0.25, 17**0.25 / 2)),  # ||G||^2 = 1 + 16
    # ||G||^2 = 1 + 2 * 9 + 625 and 1 + cos = 0.4 or 1.6
    (rules.nash_mtl, CONFLICT, (644**0.25 / 0.4**0.5, 644**0.25 / 0.4**0.5 / 5)),
    (rules.nash_mtl, AGREEMENT, (644**0.25 / 1.6**0.5, 644**0.25 / 1.6**0.5 / 5)),
    (rules.aligned_mtl, ORTHOGONAL, (1, 0.5)),  # (4 + 2, 1 + 2) / (4 + 2)
    # Largest eigenvalue 13 + sqrt(153): (25 + 4 + 3, 1 + 4 + 3) / (17 + sqrt(153))
    (rules.aligned_mtl, CONFLICT, (32 / 29.369317, 8 / 29.369317)),
    (rules.aligned_mtl, AGREEMENT, (26 / 29.369317, 2 / 29.369317)),
]


@pytest.mark.parametrize(
    ("rule", "gram", "weights"),
    GOLDEN,
    ids=[f"{rule.__name__}-{gram[0][1]:g}" for rule, gram, _ in GOLDEN],
)
def test_golden_values(rule, gram, weights):
    np.testing.assert_allclose(rule(jnp.array(gram)), weights, rtol=1e-6)


def test_golden_values_at_the_end_of_the_range():
    gram = jnp.array(gram_of(1.0, 1e-15, 0.0))
    np.testing.assert_allclose(rules.mgda(gram), [2e-30, 2], rtol=1e-6)
    np.testing.assert_allclose(rules.imtl_g(gram), [2e-15, 2], rtol=1e-6)
    np.testing.assert_allclose(rules.nash_mtl(gram), [1, 1e15], rtol=1e-6)
    np.testing.assert_allclose(rules.aligned_mtl(gram), [1e-15, 1], rtol=1e-6)
    np.testing.assert_allclose(rules.cagrad(gram), [1, 5e14], rtol=1e-6)


# Independent solvers, in double precision.


@pytest.mark.parametrize(
    ("rule", "aim"), [(rules.dtnh, [1, 1]), (rules.dynamic_barrier, [0, 1])]
)
def test_projections_onto_the_half_space_of_enough_progress(rule, aim):
    gram = apart()
    for vectors, ours in zip(plane(gram), np.asarray(rule(gram))):
        g, r = vectors
        exact = oracle.project(g, aim[0] * g + r - g)  # it projects g + its argument
        scale = np.linalg.norm(vectors, axis=-1).sum()
        np.testing.assert_allclose(update_of(vectors, ours), exact, atol=1e-5 * scale)


def in_dual_cone(gram, aim):
    """The shortest `v @ (g, r)` with `v >= aim`: every set of active bounds is tried.

    That is the projection of `aim @ (g, r)` onto the dual cone, by Proposition 1 of
    https://arxiv.org/abs/2406.16232.
    """
    (xx, xy), (_, yy) = gram
    tries = [aim, (aim[0], -xy * aim[0] / yy), (-xy * aim[1] / xx, aim[1])]
    tries = [np.array(v) for v in tries if v[0] >= aim[0] and v[1] >= aim[1]]
    return min(tries, key=lambda v: v @ gram @ v)


def test_dualproj_solves_its_quadratic_program():
    gram = apart()
    exact = [in_dual_cone(each, (1.0, 1.0)) for each in double(gram)[0]]
    assert_same_update(gram, rules.dualproj(gram), exact)


def test_pcgrad_solves_the_quadratic_programs_of_upgrad():
    gram = apart()
    exact = [
        in_dual_cone(each, (1.0, 0.0)) + in_dual_cone(each, (0.0, 1.0))
        for each in double(gram)[0]
    ]
    assert_same_update(gram, rules.pcgrad(gram), exact)


def minimize(function, low, high):
    """Golden section search of convex functions, all at once."""
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    ratio = (5**0.5 - 1) / 2
    for _ in range(100):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        is_left = function(left) < function(right)
        low, high = np.where(is_left, low, left), np.where(is_left, right, high)
    return (low + high) / 2


def between(vectors, share):
    """A point between the two gradients."""
    share = share[:, None]
    return share * vectors[:, 0] + (1 - share) * vectors[:, 1]


def test_mgda_finds_the_shortest_vector():
    gram = apart()
    vectors = plane(gram)
    zero = np.zeros(len(gram))
    share = minimize(
        lambda share: np.linalg.norm(between(vectors, share), axis=-1), zero, zero + 1
    )
    ours = np.linalg.norm(update_of(vectors, rules.mgda(gram)), axis=-1)
    shortest = np.linalg.norm(between(vectors, share), axis=-1)
    np.testing.assert_allclose(ours, 2 * shortest, rtol=1e-5)
    np.testing.assert_allclose(rules.mgda(gram).sum(-1), 2, rtol=1e-6)


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9])
def test_cagrad_solves_its_dual_problem(c):
    gram = apart()
    vectors = plane(gram)
    mean = vectors.mean(1)
    radius = c * np.linalg.norm(mean, axis=-1)

    def dual(share):
        inner = between(vectors, share)
        length = np.linalg.norm(inner, axis=-1)
        return np.sum(inner * mean, -1) + radius * length

    zero = np.zeros(len(gram))
    share = minimize(dual, zero, zero + 1)
    by = radius / np.linalg.norm(between(vectors, share), axis=-1)
    exact = np.stack([0.5 + by * share, 0.5 + by * (1 - share)], -1)
    assert_same_update(gram, rules.cagrad(gram, c=c), 2 * exact, rtol=1e-4)


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9])
def test_no_point_of_the_ball_is_better_than_cagrads(c):
    gram = apart()
    vectors = plane(gram)
    total = vectors.sum(1)
    radius = c * np.linalg.norm(total, axis=-1)
    angles = np.linspace(0, 2 * np.pi, 721)
    circle = np.stack([np.cos(angles), np.sin(angles)], -1)
    points = total[:, None] + radius[:, None, None] * circle
    ours = update_of(vectors, rules.cagrad(gram, c=c))
    distance = np.linalg.norm(ours - total, axis=-1)
    np.testing.assert_allclose(distance, radius, rtol=1e-4)
    worse_off = np.einsum("nij,nj->ni", vectors, ours).min(-1)
    best = np.einsum("nij,naj->nai", vectors, points).min(-1).max(-1)
    lengths = np.linalg.norm(vectors, axis=-1)
    assert np.all(worse_off >= best - 1e-5 * lengths.min(-1) * lengths.sum(-1))


def test_imtl_g_has_equal_projections():
    gram = apart()
    vectors = plane(gram)
    units = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    ours = update_of(vectors, rules.imtl_g(gram))
    projections = np.einsum("nij,nj->ni", units, ours)
    np.testing.assert_allclose(projections[:, 0], projections[:, 1], rtol=1e-4)
    np.testing.assert_allclose(rules.imtl_g(gram).sum(-1), 2, rtol=1e-6)


def test_nash_mtl_solves_its_equation():
    gram = apart()
    exact, ours = double(gram, rules.nash_mtl(gram))
    frobenius = np.linalg.norm(exact, axis=(1, 2))
    bargain = ours * np.einsum("nij,nj->ni", exact, ours)
    np.testing.assert_allclose(bargain, frobenius[:, None] * np.ones(2), rtol=1e-4)


def test_aligned_mtl_agrees_with_the_singular_value_decomposition():
    gram = apart()
    vectors = plane(gram)
    left, values, right = np.linalg.svd(vectors)
    exact = values[:, -1:] * (left @ right).sum(1)
    ours = update_of(vectors, rules.aligned_mtl(gram))
    error = np.linalg.norm(ours - exact, axis=-1)
    assert np.all(error <= 1e-5 * np.linalg.norm(exact, axis=-1))


def test_pcgrad_is_its_algorithm():
    gram = apart()
    for each, ours in zip(*double(gram, rules.pcgrad(gram))):
        vectors = plane(each)
        exact = np.zeros(2)
        for mine, other in (vectors, vectors[::-1]):
            conflict = min(0, mine @ other)
            exact += mine - conflict / (other @ other) * other
        scale = np.abs(vectors).sum()
        np.testing.assert_allclose(update_of(vectors, ours), exact, atol=1e-5 * scale)


# Identities between rules.


def test_pcgrad_is_dtnh_for_each_gradient():
    gram = grid()
    mutual = [rules.dtnh(gram)[:, 0], rules.dtnh(gram[:, ::-1, ::-1])[:, 0]]
    np.testing.assert_array_equal(rules.pcgrad(gram), jnp.stack(mutual, -1))


def test_dtnh_is_the_sum_without_conflict_and_orthogonal_in_conflict():
    gram = grid()
    both = jnp.maximum(rules.weighted_sum(gram), rules.orthogonal(gram))
    np.testing.assert_array_equal(rules.dtnh(gram), both)


def test_the_dynamic_barrier_is_orthogonal_but_never_against_the_loss():
    gram = grid()
    both = jnp.maximum(rules.orthogonal(gram), 0)
    np.testing.assert_array_equal(rules.dynamic_barrier(gram), both)


def test_dualproj_is_dtnh_less_the_loss_where_the_regularizer_outweighs_it():
    gram = grid([1.0, 3.0, 1e6], [-1.0, -0.9, -0.5])
    gram = gram[gram[:, 0, 0] + gram[:, 0, 1] < 0]
    less = rules.dtnh(gram) - jnp.array([[1.0, 0.0]])
    np.testing.assert_allclose(rules.dualproj(gram), less, rtol=1e-6)


def test_nash_mtl_is_imtl_g_at_another_length():
    gram = grid([1e-6, 1.0, 3.0, 1e6], COSINES[1:])
    nash, impartial = rules.nash_mtl(gram), rules.imtl_g(gram)
    ratio = nash / impartial
    np.testing.assert_allclose(ratio[:, 0], ratio[:, 1], rtol=1e-5)


def test_for_single_numbers_dtnh_is_the_gate():
    g, r = opposite_numbers()
    ours = double(rules.dtnh(gram_of_numbers(g, r)))[0] * np.stack([g, r], -1)
    size = np.abs(ours).max(-1)
    assert np.all(np.abs(ours.sum(-1) - g) <= 1e-6 * size)


def test_cagrad_without_a_ball_is_the_plain_sum():
    gram = grid()
    np.testing.assert_array_equal(
        rules.cagrad(gram, c=0.0), jnp.ones_like(gram[..., 0])
    )


def test_the_radius_of_cagrad_may_be_traced():
    gram = apart()
    traced = jax.jit(lambda gram, c: rules.cagrad(gram, c=c))(gram, 0.3)
    assert_same_update(gram, traced, rules.cagrad(gram, c=0.3))


@pytest.mark.parametrize("c", [-0.1, 1.0, 2.0])
def test_the_radius_of_cagrad_is_checked(c):
    with pytest.raises(ValueError, match=r"`c` must be at least 0 and below 1, got"):
        rules.cagrad(jnp.eye(2), c=c)
