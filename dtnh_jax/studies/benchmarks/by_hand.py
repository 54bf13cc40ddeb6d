"""DTNH in as few lines as possible, without this library."""

import jax
import jax.numpy as jnp
import optax


def by_hand(strength: float) -> optax.GradientTransformation:
    """`g + strength * (r - min(<g, r>, 0) / ||g||^2 * g)`, of all parameters together.

    It has three sums, one of them only to log the angle. It does not handle extreme
    scales, scopes, or numbers that are not finite.

    Args:
      strength: factor of the regularizer.

    Returns:
      A transformation of a `GradientPair`. Its state is the cosine of the angle.

    Example:
      >>> from dtnh_jax import GradientPair
      >>> tx = by_hand(strength=1.0)
      >>> g, r = jnp.array([1.0, 0.0]), jnp.array([-1.0, 1.0])
      >>> updates, cosine = tx.update(GradientPair(g, r), tx.init(g))
      >>> print(updates, cosine.round(3))
      [1. 1.] -0.707

    References:
      Wan et al., 2019, https://arxiv.org/abs/1911.07489
    """

    def init(params):
        del params
        return jnp.zeros([])

    def update(updates, state, params=None):
        del state, params
        g, r = updates
        gg, gr, rr = (
            jnp.asarray(optax.tree.vdot(*each)) for each in ((g, g), (g, r), (r, r))
        )
        share = jnp.minimum(gr, 0) / gg
        new = jax.tree.map(lambda g, r: g + strength * (r - share * g), g, r)
        return new, gr * jax.lax.rsqrt(gg) * jax.lax.rsqrt(rr)

    return optax.GradientTransformation(init, update)
