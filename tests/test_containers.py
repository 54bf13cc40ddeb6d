"""A state made for one container of parameters, and gradients in another one."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from dtnh_jax import accumulate_pairs, add_regularizer, decoupled, dtnh
from dtnh_jax.regularizers import l2_sp


class Layers(NamedTuple):
    """Its fields are in another order than the keys of a dict."""

    w: jax.Array
    b: jax.Array


KINDS = {
    "dtnh": dtnh(1.0, ema_decay=0.5),
    "add_regularizer": add_regularizer(l2_sp(), 1.0, ema_decay=0.5),
    "decoupled": decoupled(optax.sgd(1.0), 1.0, ema_decay=0.5),
    "accumulate_pairs": accumulate_pairs(dtnh(1.0), every_k=2),
}
PARAMS = {"w": jnp.array([1.0, -3.0]), "b": jnp.array([0.5, 2.0])}
LOSS = {"w": jnp.array([2.0, 1.0]), "b": jnp.array([-1.0, 4.0])}
REGULARIZER = {"w": jnp.array([-5.0, 1.0]), "b": jnp.array([1.0, 0.0])}


def second_update(name, state):
    """Of gradients in a dict; the parameters have moved since `init`."""
    tx, moved = KINDS[name], jax.tree.map(jnp.sin, PARAMS)
    more = {} if name == "add_regularizer" else {"regularizer_grads": REGULARIZER}
    for factor in (1.0, 3.0):
        loss = jax.tree.map(lambda x, by=factor: by * x, LOSS)
        updates, state = tx.update(loss, state, moved, **more)
    return updates


@pytest.mark.parametrize("name", KINDS)
def test_leaves_are_paired_by_name(name):
    expected = second_update(name, KINDS[name].init(PARAMS))
    swapped = {"w": PARAMS["b"], "b": PARAMS["w"]}
    if name == "add_regularizer":  # pairs in flattened order would be seen
        wrong = second_update(name, KINDS[name].init(swapped))
        assert not jnp.allclose(wrong["w"], expected["w"])
    found = second_update(name, KINDS[name].init(Layers(**PARAMS)))
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_leaves_of_other_names_are_an_error(name):
    state = KINDS[name].init((PARAMS["w"], PARAMS["b"]))
    with pytest.raises(ValueError, match=r"must be a tree like .*'b'|'0'"):
        second_update(name, state)
