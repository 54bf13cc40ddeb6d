"""The transformations that add a regularizer's gradient to the loss gradient."""

from collections.abc import Mapping

import optax

from dtnh_jax import rules
from dtnh_jax._axes import AxisName
from dtnh_jax._given import Getters, checked_regularizers, given_gradients
from dtnh_jax._options import Mask, Number, Options, Stages, Strength
from dtnh_jax._part import Scope
from dtnh_jax._protect import (
    ConflictState,
    add_parts,
    init_state,
    regularizer_parts,
)
from dtnh_jax.regularizers.weights import WeightRegularizer


def dtnh(
    strength: Strength | Mapping[str, Strength],
    *,
    scope: Scope = "global",
    reference_decay: Number | None = None,
    trust_ratio: Number | None = None,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds a regularizer's gradient, less the part of it that works against the loss.

    With `g` the gradient of the loss, `r` that of the regularizer and `strength` its
    factor, the update is

    `g + strength * (r - min(0, <g, r>) / ||g||^2 * g)`.

    Where the two agree that is the gradient of `loss + strength * regularizer`; where
    they conflict it is the nearest direction that lowers the loss as fast as `g`.

    Args:
      strength: factor of the regularizer, at least 0: a number, a schedule of the
        step, or a dict of these by the names of several regularizers.
      scope: over what inner products run: `"global"` (the paper), `"leaf"`, `"unit"`
        (one output channel: all axes but the last), `"element"`, or labels of the
        parameters, a tree or a function as `optax.partition` takes them. A finer
        scope implies the guarantees of every coarser one.
      reference_decay: protect the moving average of the loss gradient with this decay
        per step, instead of the gradient of this mini-batch.
      trust_ratio: at most how long the regularizer's part of the update may be, as a
        multiple of the protected gradient's norm in the same group (per leaf at
        element scope). The part is all that is added to the loss gradient; rules that
        shorten that gradient, such as `rules.mgda`, have it in their part too.
      mask: a tree of bools, or a function of the parameters to one, as in
        `optax.masked`. Leaves that are masked out get the loss gradient alone and take
        no part in inner products.
      axis_name: only for loops that are mapped over devices, by `jax.shard_map`,
        `jax.pmap` or `jax.vmap(..., axis_name=...)`, and in which each device holds a
        PART of the parameters and of both gradients (fully sharded or tensor parallel):
        the axis along which they are cut, or a tuple of axes. Inner products are then
        summed over it, see `resolve_conflicts`. Leave it out where every device has all
        parameters and gradients of its own part of the batch (data parallel): average
        these with `jax.lax.pmean` first, and every device resolves the same. Leave it
        out under jit with sharded arrays, too: there the compiler does this.

    Returns:
      A transformation of a `GradientPair`, or of the loss gradient with the other one
      as the keyword `regularizer_grads`. What it returns is like the loss gradient.

    Raises:
      ValueError: for values that are out of range or trees that do not match.
      TypeError: for arguments of another kind.

    Example:
      >>> import jax.numpy as jnp
      >>> from dtnh_jax import GradientPair, dtnh
      >>> tx = optax.chain(dtnh(strength=1.0), optax.sgd(1.0))
      >>> params = jnp.zeros(2)
      >>> g, r = jnp.array([1.0, 0.0]), jnp.array([-1.0, 2.0])
      >>> updates, state = tx.update(GradientPair(g, r), tx.init(params), params)
      >>> print(updates)  # what `r` had against `g` is gone, the rest is kept
      [-1. -2.]

    References:
      Wan et al., 2019, https://arxiv.org/abs/1911.07489
    """
    return resolve_conflicts(
        rules.dtnh,
        strength,
        scope=scope,
        reference_decay=reference_decay,
        trust_ratio=trust_ratio,
        mask=mask,
        axis_name=axis_name,
    )


def resolve_conflicts(
    rule: rules.Rule | Stages,
    strength: Strength | Mapping[str, Strength],
    *,
    scope: Scope = "global",
    reference_decay: Number | None = None,
    trust_ratio: Number | None = None,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds a regularizer's gradient to the loss gradient, as far as `rule` allows.

    With `g` the loss gradient, `m` the gradient that is protected (`g`, or with
    `reference_decay` its moving average) and `r` the regularizer's gradient times
    `strength`, the update is `g + (w[0] - 1) * m + w[1] * r`, where `w = rule(G)` and
    `G` is the Gram matrix of `(m, r)` in each group of `scope`.

    Inner products are summed in float32. A regularizer gradient that is not finite is
    left out of that update and counted in `conflict_metrics`; a loss gradient that is
    not finite is passed on as it is, for `optax.apply_if_finite` to see. Several
    regularizers are resolved each on its own and then added.

    Average gradients over devices and micro-batches before this transformation, clip
    them after it: rules are not linear.

    With `axis_name` all that is measured is one vector, which is summed over devices
    once (twice where it is out of range and has to be scaled). One more sum is needed
    for what scopes `"unit"` and `"element"` report, and one for each further pair in a
    list of rules. Metrics are of the whole gradients. At scope `"unit"` a unit is what
    a device holds of it: cut leaves along their last axis to have whole ones, else the
    scope is a finer one. Leaves that all devices hold alike, such as small biases,
    count once in `jax.shard_map`, where types tell. With `check_vma=False`, in
    `jax.pmap` and in `jax.vmap` nothing tells, and they count once for each device:
    mask them out there, or let `scope` keep them apart.

    Args:
      rule: maps Gram matrices `[..., 2, 2]` to weights `[..., 2]`; see
        `dtnh_jax.rules`. Or a list of pairs of a rule and its scope, each working on
        what the one before it has left of the regularizer, such as
        `[(rules.gate, "leaf"), (rules.dtnh, "element")]`.
      strength: as in `dtnh`.
      scope: as in `dtnh`.
      reference_decay: as in `dtnh`.
      trust_ratio: as in `dtnh`.
      mask: as in `dtnh`.
      axis_name: as in `dtnh`.

    Returns:
      A transformation like that of `dtnh`.

    Raises:
      ValueError: for values that are out of range or trees that do not match.
      TypeError: for arguments of another kind.

    Example:
      >>> import jax.numpy as jnp
      >>> from dtnh_jax import resolve_conflicts, rules
      >>> tx = resolve_conflicts(rules.weighted_sum, strength=0.5, scope="leaf")
      >>> g, r = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([-1.0, 2.0])}
      >>> updates, state = tx.update(g, tx.init(g), regularizer_grads=r)
      >>> print(updates["w"])
      [0.5 1. ]
    """
    options = Options.checked(
        rule,
        strength,
        scope,
        reference_decay,
        trust_ratio,
        mask,
        axis_name=axis_name,
    )

    def init(params):
        return init_state(options, params)

    def update(updates, state, params=None, *, regularizer_grads=None, **extra_args):
        del extra_args
        loss, getters = given_gradients(
            options, None, updates, regularizer_grads, params
        )
        return _add_parts(options, loss, getters, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


def add_regularizer(
    regularizer: WeightRegularizer | Mapping[str, WeightRegularizer],
    strength: Strength | Mapping[str, Strength],
    *,
    rule: rules.Rule | Stages | None = None,
    scope: Scope = "global",
    reference_decay: Number | None = None,
    trust_ratio: Number | None = None,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of a regularizer of the weights to plain gradients.

    It stands in a chain where `optax.add_decayed_weights` would. The regularizer's
    gradient is computed from the parameters in closed form, without a backward pass.

    Args:
      regularizer: of the weights, see `dtnh_jax.regularizers`, or a dict of several.
      strength: factor of the regularizer, as in `dtnh`; a dict with the same keys
        where there are several.
      rule: how conflicts are resolved; `rules.dtnh` by default.
      scope: as in `dtnh`.
      reference_decay: as in `dtnh`.
      trust_ratio: as in `dtnh`.
      mask: as in `dtnh`.
      axis_name: as in `dtnh`.

    Returns:
      A transformation of the loss gradient. Its `update` needs `params`.

    Raises:
      ValueError: for values that are out of range or trees that do not match.
      TypeError: for arguments of another kind.

    Example:
      >>> import jax.numpy as jnp
      >>> from dtnh_jax import add_regularizer
      >>> from dtnh_jax.regularizers import l2_sp
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> pull = add_regularizer(l2_sp(params), strength=0.1)
      >>> tx = optax.chain(pull, optax.sgd(0.1))
      >>> state = tx.init(params)
      >>> grads = {"w": jnp.array([1.0, 1.0])}
      >>> updates, state = tx.update(grads, state, params)
    """
    options = Options.checked(
        rules.dtnh if rule is None else rule,
        strength,
        scope,
        reference_decay,
        trust_ratio,
        mask,
        axis_name=axis_name,
    )
    regularizers = checked_regularizers(options, regularizer)

    def init(params):
        return init_state(options, params)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        loss, getters = given_gradients(options, regularizers, updates, None, params)
        return _add_parts(options, loss, getters, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


def _add_parts(
    options: Options,
    loss: optax.Updates,
    getters: Getters,
    state: ConflictState,
    params: optax.Params | None,
) -> tuple[optax.Updates, ConflictState]:
    """The update of every transformation here: the loss gradient plus what is left."""
    layout, parts, state = regularizer_parts(options, loss, getters, state, params)
    return add_parts(layout, parts), state
