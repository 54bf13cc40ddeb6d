"""Weight decay of the products of low-rank adapters, instead of their factors."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import Partial
from jaxtyping import Array, Float

from dtnh_jax import _trees
from dtnh_jax.regularizers.weights._interface import WeightRegularizer


def lora_decay(
    *, a: str = "lora_a", b: str = "lora_b", scale: float = 1.0
) -> WeightRegularizer:
    """Pulls an adapted network back to the pretrained one: `1/2 ||scale A B||_F^2`.

    A low-rank adapter adds `scale * A B` to a frozen weight, with `A` of shape
    `[..., in, rank]` and `B` of shape `[..., rank, out]`. qwix has `[*in, rank]` and
    `[rank, *out]` for einsums with several axes of inputs or outputs. This penalty is
    `l2_sp` of the adapted weights, without a copy of the pretrained ones. It is summed
    over all entries of all products, leading axes included.

    No product is formed: `||A B||_F^2` is the inner product of `A^T A` and `B B^T`,
    which have shape `[rank, rank]`. They are computed in float32.

    Args:
      a: name of the leaves `A`: the last component of their paths, or the end of it
        after an underscore, as in `kernel_lora_a` of qwix. An adapter is an `A` and a
        `B` whose paths are otherwise the same.
      b: name of the leaves `B`.
      scale: the network's factor of the products, often called alpha / rank. It is 1
        for `nnx.LoRA`, whose names and shapes are the default, and `alpha / rank` for
        qwix.

    Returns:
      A `WeightRegularizer`. Its gradient is `scale^2 A (B B^T)` for `A` and
      `scale^2 (A^T A) B` for `B`, and zero for all other leaves.

    Raises:
      ValueError: `a` and `b` are the same; on use, the parameters have no adapter, or
        an adapter's other factor is missing or has another rank.

    Example:
      >>> params = {"lora_a": jnp.array([[1.0], [2.0]]), "lora_b": jnp.array([[3.0]])}
      >>> decay = lora_decay()
      >>> print(decay.value(params))  # of the product [[3], [6]]
      22.5
      >>> print(decay.gradient(params)["lora_b"])
      [[15.]]

    References:
      Hu et al., 2021, "LoRA", equation 3, https://arxiv.org/abs/2106.09685

    Differs from weight decay of the adapters' parameters, `1/2 (||A||^2 + ||B||^2)`,
    which depends on how a product is split into its factors.
    """
    if a == b:
        raise ValueError(f"`a` and `b` must be different names, got {a!r} twice.")

    adapters = _Adapters(a, b, float(scale))
    return WeightRegularizer(Partial(_value, adapters), Partial(_gradient, adapters))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Adapters:
    """The names of the factors, and the scale: constants of a compiled program."""

    a: str
    b: str
    scale: float


def _value(adapters: _Adapters, params: optax.Params) -> Float[Array, ""]:
    total = jnp.zeros([], jnp.float32)
    for pair in _pairs(params, adapters):
        grams = _gram_of_a(pair.a) * jnp.conj(_gram_of_b(pair.b))
        part = 0.5 * adapters.scale**2 * jnp.sum(jnp.real(grams))
        total += part.astype(jnp.float32)
    return total


def _gradient(adapters: _Adapters, params: optax.Params) -> optax.Updates:
    leaves, treedef = _trees.flatten(params)
    slopes = [jnp.zeros_like(x) if _trees.is_trainable(x) else x for x in leaves]
    for pair in _pairs(params, adapters):
        of_a = _product("...ir,...rs->...is", pair.a, _gram_of_b(pair.b), pair.a)
        of_b = _product("...rs,...so->...ro", _gram_of_a(pair.a), pair.b, pair.b)
        for at, slope in ((pair.at_a, of_a), (pair.at_b, of_b)):
            slope = (adapters.scale**2 * slope).astype(slopes[at].dtype)
            slopes[at] = slope.reshape(slopes[at].shape)
    return jax.tree.unflatten(treedef, slopes)


class _Pair(NamedTuple):
    at_a: int  # index of the leaf `a`
    at_b: int
    a: Float[Array, "*batch inputs rank"] | Any  # in at least float32; or complex
    b: Float[Array, "*batch rank outputs"] | Any  # several axes in one where needed


def _pairs(params: optax.Params, adapters: _Adapters) -> list[_Pair]:
    """Finds pairs of leaves by their paths.

    Raises:
      ValueError: there is no pair, or a pair does not match.
    """
    a, b = adapters.a, adapters.b
    paths, (leaves, _) = _trees.names(params), _trees.flatten(params)
    found: dict[str, dict[str, int]] = {}
    for i, (path, leaf) in enumerate(zip(paths, leaves)):
        for name in (a, b):
            if f"/{path}".endswith((f"/{name}", f"_{name}")):
                if _trees.is_trainable(leaf):
                    found.setdefault(path.removesuffix(name), {})[name] = i
                break
    if not found:
        raise ValueError(
            f"`params` must have adapters, leaves named {a!r} and {b!r}, got none "
            f"among {', '.join(paths[:8])} ..."
        )
    pairs: list[_Pair] = []
    for at in found.values():
        if len(at) < 2:
            ((name, i),) = at.items()
            raise ValueError(
                f"`params` must have {b if name == a else a!r} next to every {name!r}, "
                f"got '{paths[i]}' alone."
            )
        x, y = jnp.asarray(leaves[at[a]]), jnp.asarray(leaves[at[b]])
        has_matrices = min(x.ndim, y.ndim) >= 2
        is_stacked = x.shape[:-2] == y.shape[:-2] and x.shape[-1:] == y.shape[-2:-1]
        if has_matrices and not is_stacked and x.shape[-1] == y.shape[0]:
            x = x.reshape(-1, x.shape[-1]) if x.ndim > 2 else x
            y = y.reshape(y.shape[0], -1) if y.ndim > 2 else y
        elif not (has_matrices and is_stacked):
            raise ValueError(
                "`params` must have adapters of shapes [..., in, rank] and [..., rank, "
                f"out], got {x.shape} at '{paths[at[a]]}' and {y.shape} at "
                f"'{paths[at[b]]}'."
            )
        x, y = _trees.as_float32(x), _trees.as_float32(y)
        pairs.append(_Pair(at[a], at[b], x, y))
    return pairs


def _gram_of_a(x: Array) -> Array:
    """Returns `A^H A`, of shape `[..., rank, rank]`."""
    return _product("...ir,...is->...rs", jnp.conj(x), x)


def _gram_of_b(y: Array) -> Array:
    """Returns `B B^H`, of shape `[..., rank, rank]`."""
    return _product("...ro,...so->...rs", y, jnp.conj(y))


def _product(equation: str, x: Array, y: Array, like: Array | None = None) -> Array:
    """Multiplies matrices in full precision, which is not the default of accelerators.

    On meshes with explicit axes, the result has the sharding of `like`; without `like`
    it is a small matrix that every device has.
    """
    sharding = jax.typeof(x if like is None else like).sharding
    if not sharding.mesh.axis_names or not sharding.mesh.are_all_axes_explicit:
        sharding = None
    elif like is None:
        spec = PartitionSpec(*sharding.spec[:-2], None, None)
        sharding = NamedSharding(sharding.mesh, spec)
    return jnp.einsum(
        equation, x, y, precision=jax.lax.Precision.HIGHEST, out_sharding=sharding
    )
