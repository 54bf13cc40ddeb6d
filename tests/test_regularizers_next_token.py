"""The KL without the label, and the one from stored predictions, against definitions.

Definitions are in float64; what is common to every KL is tested with
`kl_to_reference`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dtnh_jax.regularizers import (
    TopK,
    kl_to_reference,
    masked_kl,
    top_k_kl,
    top_k_of_reference,
)

SMALL = (3, 5, 7)
LARGE = (2, 35, 4096)  # in sixteen chunks, the last of them cut off
each_direction = pytest.mark.parametrize("direction", ["forward", "reverse"])


def probabilities(x):
    x = np.asarray(x, np.float64)
    exp = np.exp(x - x.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def divergence(p, q, direction):
    a, b = (q, p) if direction == "forward" else (p, q)
    return np.sum(a * np.log(a / b), -1)


def without(p, labels):
    """Removes the label of every token, and scales the rest to the sum 1."""
    rows = p.reshape(-1, p.shape[-1])
    kept = [np.delete(row, y) for row, y in zip(rows, labels.ravel())]
    kept = [row / row.sum() for row in kept]
    return np.stack(kept).reshape(*p.shape[:-1], -1)


def make(shape=SMALL, dtype=jnp.float32):
    random = np.random.default_rng(0)
    x, y = 3 * random.standard_normal((2, *shape))
    labels = random.integers(shape[-1], size=shape[:-1])
    return jnp.asarray(x, dtype), jnp.asarray(y, dtype), labels


@each_direction
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["whole", "chunks"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_masked_kl_is_that_of_the_alternatives(direction, shape, dtype):
    logits, reference, labels = make(shape, dtype)
    mask = np.random.default_rng(1).integers(0, 2, shape[:-1])
    p, q = (without(probabilities(x), labels) for x in (logits, reference))
    expected = np.sum(mask * divergence(p, q, direction)) / mask.sum()
    got = masked_kl(logits, reference, labels, mask=mask, direction=direction)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@each_direction
def test_masked_kl_does_not_move_the_labels_logit(direction):
    logits, reference, labels = make()

    @jax.jit
    def function(x):
        return masked_kl(x, reference, labels, direction=direction)

    check_grads(function, (logits,), order=1, modes=["rev"], rtol=1e-2)
    slope = jax.grad(function)(logits)
    of_labels = np.take_along_axis(np.asarray(slope), labels[..., None], -1)
    assert not of_labels.any()
    assert np.abs(slope).max() > 1e-3
    raised = logits + 5.0 * jax.nn.one_hot(labels, SMALL[-1])
    np.testing.assert_allclose(function(raised), function(logits), rtol=1e-5)


def test_masked_kl_refuses_labels_that_are_no_words():
    logits, reference, labels = make()
    wrong = labels.copy()
    wrong[0, 0] = SMALL[-1]
    with pytest.raises(ValueError, match="`labels` must be from 0 to 6, got"):
        masked_kl(logits, reference, wrong)
    with pytest.raises(ValueError, match="`labels` must have the shape"):
        masked_kl(logits, reference, labels[:2])
    with pytest.raises(TypeError, match="labels"):
        masked_kl(logits, reference, labels.astype(np.float32))
    assert np.isnan(jax.jit(masked_kl)(logits, reference, wrong))
    mask = np.ones(SMALL[:-1])
    mask[0, 0] = 0
    assert np.isfinite(masked_kl(logits, reference, wrong, mask=mask))


def events(p, tokens):
    chosen = np.take_along_axis(p, tokens, -1)
    return np.concatenate([chosen, 1 - chosen.sum(-1, keepdims=True)], -1)


@each_direction
def test_top_k_kl_is_that_of_k_tokens_and_the_rest(direction):
    logits, reference, _ = make()
    stored = top_k_of_reference(reference, k=3)
    tokens = np.asarray(stored.tokens)
    q = probabilities(reference)
    np.testing.assert_array_equal(tokens, np.argsort(-q, -1)[..., :3])
    np.testing.assert_allclose(
        np.exp(stored.log_probabilities), events(q, tokens), rtol=1e-5
    )
    mask = np.random.default_rng(1).integers(0, 2, SMALL[:-1])
    each = divergence(
        events(probabilities(logits), tokens), events(q, tokens), direction
    )
    got = top_k_kl(logits, stored, mask=mask, direction=direction)
    np.testing.assert_allclose(got, np.sum(mask * each) / mask.sum(), rtol=1e-5)

    @jax.jit
    def function(x):
        return top_k_kl(x, stored, direction=direction)

    check_grads(function, (logits,), order=1, modes=["rev"], rtol=1e-2)


@each_direction
def test_more_tokens_come_nearer_to_the_whole(direction):
    logits, reference, _ = make()
    whole = kl_to_reference(logits, reference, direction=direction)
    few, most = (
        top_k_kl(logits, top_k_of_reference(reference, k), direction=direction)
        for k in (1, 6)
    )
    assert 0 < few < whole
    np.testing.assert_allclose(most, whole, rtol=1e-5)
    np.testing.assert_allclose(
        top_k_kl(reference, top_k_of_reference(reference, 2), direction=direction),
        0.0,
        atol=1e-6,
    )


def test_what_was_stored_gets_no_gradient_and_may_be_numpy():
    logits, reference, _ = make(dtype=jnp.bfloat16)
    stored = TopK(*map(np.asarray, top_k_of_reference(reference, 2)))
    value, slope = jax.value_and_grad(top_k_kl)(logits, stored)
    assert value.dtype == jnp.float32
    assert slope.dtype == jnp.bfloat16
    _, of_stored = jax.grad(top_k_kl, argnums=1, allow_int=True)(logits, stored)
    assert not np.asarray(of_stored).any()


def test_top_k_refuses_what_does_not_fit():
    logits, reference, _ = make()
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"`k` must be .* 7, got {k}"):
            top_k_of_reference(reference, k)
    stored = top_k_of_reference(reference, 2)
    with pytest.raises(ValueError, match="`reference` must hold tokens"):
        top_k_kl(logits[:2], stored)
    with pytest.raises(ValueError, match="`direction` must be one of"):
        top_k_kl(logits, stored, direction="both")
