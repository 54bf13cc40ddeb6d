"""Pairs of gradient trees for property tests: any structure, any scale."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

# A fixed choice of shapes, since each new one compiles every operation anew.
SHAPES = st.lists(
    st.sampled_from([(), (3,), (2, 3), (2, 1, 4)]), min_size=1, max_size=3
)


@st.composite
def pairs(draw, low: int = -3, high: int = 3):
    """Two trees of one structure, with scales of `10**low` to `10**high` each.

    Some leaves are zero, some are antiparallel, so that every branch is met.
    """
    shapes = draw(SHAPES)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    g_scale, r_scale = (10.0 ** draw(st.integers(low, high)) for _ in range(2))
    g, r = [], []
    for shape in shapes:
        x, y = random.standard_normal(shape), random.standard_normal(shape)
        kind = draw(
            st.sampled_from(["any", "any", "any", "opposed", "zero g", "zero r"])
        )
        x, y = {
            "any": (x, y),
            "opposed": (x, -x),
            "zero g": (0 * x, y),
            "zero r": (x, 0 * y),
        }[kind]
        g.append(jnp.asarray(x * g_scale, jnp.float32))
        r.append(jnp.asarray(y * r_scale, jnp.float32))
    nest = draw(st.sampled_from([list, tuple, _nested]))
    return nest(g), nest(r)


def _nested(leaves):
    return {"first": leaves[0], "rest": {str(i): x for i, x in enumerate(leaves[1:])}}


def lengths(*trees) -> float:
    """The largest norm among trees: what rounding errors are relative to."""
    return max(
        float(np.sqrt(sum(np.sum(np.asarray(x, np.longdouble) ** 2)
                          for x in jax.tree.leaves(tree))))
        for tree in trees
    )  # fmt: skip
