"""Train steps for linen: one forward pass, batch statistics once, a frozen teacher."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze
from flax.linen import fp8_ops
from flax.training import train_state

from dtnh_jax import (
    GradientPair,
    add_regularizer,
    conflict_metrics,
    dtnh,
    linen,
    regularizers,
)


class Block(nn.Module):
    """Inherits nothing, sows one value, and knows of no regularizer."""

    width: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.width, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        self.sow("shown", "map", x)
        return nn.relu(x)


class Network(nn.Module):
    classes: int = 3

    @nn.compact
    def __call__(self, x, train):
        x = Block(4, name="first")(x, train)
        x = Block(6, name="second")(x, train)
        x = nn.Dropout(0.5, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(self.classes, name="head")(x)


MODEL = Network()
BATCH = {
    "x": jax.random.normal(jax.random.key(0), (8, 6, 6, 2)),
    "y": jnp.arange(8) % 3,
}
SOURCE = MODEL.init(jax.random.key(1), BATCH["x"], train=False)
SOURCE = {"params": SOURCE["params"], "batch_stats": SOURCE["batch_stats"]}
KEY = jax.random.key(2)


def forward(network, batch, train):
    return network(batch["x"], train)


def cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def feature_map(student, teacher, batch):
    del batch
    return regularizers.feature_map(student.features, teacher.features)


def moved_state(tx, **kwargs):
    """A state away from the source, where regularizers have gradients."""
    params = jax.tree.map(lambda p: 1.1 * p + 0.01, SOURCE["params"])
    return linen.TrainState.create(
        apply_fn=MODEL.apply,
        params=params,
        batch_stats=SOURCE["batch_stats"],
        tx=tx,
        **kwargs,
    )


def by_hand(state, layers):
    """The same step as a user would write it, with two calls of `jax.grad`."""
    rngs = {"params": jax.random.fold_in(KEY, state.step)}

    def run(params):
        logits, updated = MODEL.apply(
            {"params": params, "batch_stats": state.batch_stats},
            BATCH["x"],
            train=True,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=True,
            rngs=rngs,
        )
        return cross_entropy(logits, BATCH), updated

    _, target = MODEL.apply(
        SOURCE, BATCH["x"], train=False, capture_intermediates=True, mutable=[]
    )

    def penalty(params):
        student, teacher = (
            {name: tree["intermediates"][name]["__call__"][0] for name in layers}
            for tree in (run(params)[1], target)
        )
        return regularizers.feature_map(student, teacher)

    (loss, updated), g = jax.value_and_grad(run, has_aux=True)(state.params)
    value, r = jax.value_and_grad(penalty)(state.params)
    new = state.apply_gradients(grads=GradientPair(g, r))
    return new.replace(batch_stats=updated["batch_stats"]), loss, value


def count_convolutions(fun, *args):
    return str(jax.make_jaxpr(fun)(*args)).count(" conv_general_dilated[")


def test_it_is_the_step_that_one_would_write_by_hand():
    layers = ["first", "second"]
    step = linen.train_step(MODEL, forward, cross_entropy, feature_map, features=layers)
    run = jax.jit(chex.assert_max_traces(step, 1), donate_argnums=0)
    tx = optax.chain(dtnh(1.0), optax.sgd(0.1, momentum=0.9))
    ours, theirs = moved_state(tx), moved_state(tx)
    ours = ours.replace(batch_stats=jax.tree.map(jnp.copy, ours.batch_stats))
    by_hand_jit = jax.jit(lambda state: by_hand(state, layers))
    for _ in range(3):
        ours, metrics = run(ours, BATCH, KEY, SOURCE)
        theirs, loss, value = by_hand_jit(theirs)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
        np.testing.assert_allclose(metrics["regularizer"], value, rtol=1e-4)
    assert int(ours.step) == 3
    chex.assert_trees_all_close(ours.batch_stats, theirs.batch_stats, rtol=1e-3)
    chex.assert_trees_all_close(ours.params, theirs.params, rtol=1e-3, atol=1e-4)
    assert set(conflict_metrics(ours.opt_state)) >= {"cosine", "removed"}


def test_the_network_runs_once_and_the_teacher_once():
    step = linen.train_step(
        MODEL, forward, cross_entropy, feature_map, features=["first"]
    )
    state = moved_state(dtnh(1.0))
    # Forward: two of the student, and two of the teacher. Back from the loss: two for
    # kernels, one for the input of the second; from the first block: one for kernels.
    assert count_convolutions(step, state, BATCH, KEY, SOURCE) == 2 + 2 + 3 + 1


def test_regularizers_of_weights_need_no_second_backward_pass():
    pull = add_regularizer(regularizers.l2_sp(SOURCE["params"]), 0.1)
    state = moved_state(optax.chain(pull, optax.sgd(0.1)))
    step = linen.train_step(MODEL, forward, cross_entropy)
    assert count_convolutions(step, state, BATCH, KEY) == 2 + 3
    new, metrics = jax.jit(step)(state, BATCH, KEY)
    assert set(metrics) == {"loss"}
    assert conflict_metrics(new.opt_state)["regularizer_norm"] > 0


def test_several_regularizers_metrics_and_another_teacher():
    wide = Network(classes=5)
    teacher = wide.init(jax.random.key(3), BATCH["x"], train=False)

    def loss(logits, batch):
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch["y"])
        return cross_entropy(logits, batch), {"accuracy": accuracy}

    def penalties(student, teacher, batch):
        assert student.output.shape == (8, 3)
        assert teacher.output.shape == (8, 5)
        return {
            "maps": feature_map(student, teacher, batch),
            "logits": jnp.mean(student.output**2),
        }

    step = linen.train_step(
        MODEL,
        forward,
        loss,
        penalties,
        features=["first"],
        teacher_model=wide,
        has_aux=True,
    )
    state = moved_state(dtnh({"maps": 1.0, "logits": 0.1}))

    def step_and_metrics(*args):
        state, metrics = step(*args)
        return metrics, conflict_metrics(state.opt_state)

    metrics, conflicts = jax.eval_shape(step_and_metrics, state, BATCH, KEY, teacher)
    assert set(metrics) == {"loss", "regularizer", "accuracy"}
    assert set(metrics["regularizer"]) == set(conflicts) == {"maps", "logits"}


def test_dropout_differs_from_step_to_step_and_is_repeatable():
    step = jax.jit(linen.train_step(MODEL, forward, cross_entropy))
    first = moved_state(optax.set_to_zero())
    second, a = step(first, BATCH, KEY)
    _, b = step(second.replace(batch_stats=first.batch_stats), BATCH, KEY)
    _, again = step(first, BATCH, KEY)
    assert a["loss"] != b["loss"]
    assert a["loss"] == again["loss"]


def test_networks_without_batch_statistics_or_dropout():
    model = nn.Dense(3)
    x = jnp.ones((2, 4))
    state = linen.TrainState.create(
        apply_fn=model.apply, tx=optax.sgd(0.01), **model.init(KEY, x)
    )
    step = linen.train_step(
        model, lambda net, x, train: net(x), lambda out, x: jnp.sum(out**2)
    )
    _, before = step(state, x)
    _, after = step(step(state, x)[0], x)
    assert after["loss"] < before["loss"]


@pytest.mark.parametrize("names", [(), ("a", "b")], ids=["one", "several"])
def test_scales_of_layers_in_8_bits_are_those_of_the_loss(names):
    """Flax overwrites them with what comes in the place of their gradients."""
    model, x = nn.Dense(4, dot_general_cls=fp8_ops.Fp8DotGeneralOp), jnp.ones((2, 4))
    variables = model.init(KEY, x)

    def train(variables, x, tx, names):
        state = train_state.TrainState.create(
            apply_fn=model.apply, params=variables, tx=tx
        )
        for _ in range(2):
            grads = jax.grad(lambda p: jnp.sum(model.apply(p, x) ** 2))(state.params)
            if names is not None:
                zero = jax.tree.map(jnp.zeros_like, grads)
                grads = GradientPair(grads, dict.fromkeys(names, zero) or zero)
            state = state.apply_gradients(grads=grads)
        return state.params

    strength = dict.fromkeys(names, 1.0) or 1.0
    resolved = optax.chain(dtnh(strength), optax.sgd(0.1))
    found = jax.jit(partial(train, tx=resolved, names=names))(variables, x)
    plain = partial(train, tx=optax.sgd(0.1), names=None)
    chex.assert_trees_all_close(found, jax.jit(plain)(variables, x), rtol=1e-5)
    scales = found["_overwrite_with_gradient"]
    assert np.all(jax.tree.leaves(scales)[1] != 1)


FROZEN = {"body": False, "head": True}
FREEZE = {
    "masked": optax.masked(optax.set_to_zero(), {"body": True, "head": False}),
    "partition": optax.partition(
        {"yes": optax.adam(0.1), "no": optax.set_to_zero()},
        {"body": "no", "head": "yes"},
    ),
}


def step_of_two_layers(tx, has_regularizer=True):
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="head")(nn.tanh(nn.Dense(3, name="body")(x)))

    model, x = Two(), jnp.ones((2, 4))
    state = linen.TrainState.create(apply_fn=model.apply, tx=tx, **model.init(KEY, x))

    def regularizer(student, teacher, x):
        return jnp.mean(student.output)

    step = linen.train_step(
        model,
        lambda net, x, train: net(x),
        lambda out, x: jnp.sum(out**2),
        regularizer if has_regularizer else None,
    )
    return jax.eval_shape(step, state, x)


@pytest.mark.parametrize("how", FREEZE)
@pytest.mark.parametrize("has_regularizer", [True, False])
def test_freezing_too_late_is_warned_of(how, has_regularizer):
    def add(**options):
        pull = add_regularizer(regularizers.l2(), 0.1, **options)
        return dtnh(0.1, **options) if has_regularizer else pull

    with pytest.warns(UserWarning, match=r"freezes 'body/bias' and 1 more .* `mask`"):
        step_of_two_layers(optax.chain(add(), FREEZE[how]), has_regularizer)
    # They share no inner product with others here, or are trained.
    for tx in (
        optax.chain(add(mask=FROZEN), FREEZE[how]),
        optax.chain(add(scope="leaf"), FREEZE[how]),
        optax.chain(add(), optax.adam(0.1)),
    ):
        step_of_two_layers(tx, has_regularizer)


def test_frozen_statistics_stay_frozen_dicts():
    state = moved_state(optax.sgd(0.1))
    state = state.replace(batch_stats=freeze(state.batch_stats))
    step = linen.train_step(MODEL, forward, cross_entropy)
    new, _ = jax.eval_shape(step, state, BATCH, KEY)
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_forgotten_statistics_are_an_error():
    state = moved_state(optax.sgd(0.1)).replace(batch_stats={})
    step = linen.train_step(MODEL, forward, cross_entropy)
    with pytest.raises(ValueError, match=r"`state.batch_stats` must .* got 0 arrays"):
        jax.eval_shape(step, state, BATCH, KEY)


def test_a_regularizer_of_weights_is_sent_to_the_optimizer():
    with pytest.raises(TypeError, match="regularizer"):
        linen.train_step(MODEL, forward, cross_entropy, regularizers.l2())


def test_features_by_path_predicate_and_sown_name():
    args = SOURCE, BATCH["x"], False
    logits, found = linen.capture_features(MODEL, ["second/conv", "first"])(*args)
    assert {k: v.shape for k, v in found.items()} == {
        "second/conv": (8, 6, 6, 6),
        "first": (8, 6, 6, 4),
    }
    assert list(found) == ["second/conv", "first"]
    np.testing.assert_array_equal(logits, MODEL.apply(*args))
    _, found = linen.capture_features(MODEL, lambda path: path.endswith("conv"))(*args)
    assert set(found) == {"first/conv", "second/conv"}
    _, sown = linen.capture_features(MODEL, ["first/map"], collection="shown")(*args)
    assert sown["first/map"].shape == (8, 6, 6, 4)


def test_capturing_returns_what_apply_does_and_no_more():
    apply = linen.capture_features(MODEL, ["first"])
    kwargs = {"mutable": ["batch_stats"], "rngs": {"dropout": KEY}}
    got, _ = apply(SOURCE, BATCH["x"], True, **kwargs)
    chex.assert_trees_all_equal(got, MODEL.apply(SOURCE, BATCH["x"], True, **kwargs))
    # What an earlier call captured is not captured again.
    _, earlier = MODEL.apply(SOURCE, BATCH["x"], False, capture_intermediates=True)
    _, found = apply({**SOURCE, **earlier}, BATCH["x"], False)
    assert found["first"].shape == (8, 6, 6, 4)


def test_a_layer_that_is_called_twice_has_two_features():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(3, name="layer")
            return layer(layer(x))

    x = jnp.ones((1, 3))
    variables = Twice().init(KEY, x)
    output, found = linen.capture_features(Twice(), ["layer"])(variables, x)
    assert len(found["layer"]) == 2
    np.testing.assert_array_equal(found["layer"][1], output)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        (["first", "secnd"], r"got 'secnd'\. Near it are 'second'"),
        (["Block_0/conv"], r"got 'Block_0/conv'\. Near it are .*'first/conv'"),
        (["?"], r"There are 'Dropout_0', 'first', 'first/conv', 'first/norm', 'head'"),
        (lambda path: False, "`layers` must select a layer .* among 'Dropout_0'"),
    ],
)
def test_missing_layers_are_answered_with_near_ones(layers, says):
    with pytest.raises(ValueError, match=says):
        linen.capture_features(MODEL, layers)(SOURCE, BATCH["x"], False)


def test_a_lone_string_is_no_sequence_of_layers():
    with pytest.raises(TypeError, match=r"write \['first'\]"):
        linen.capture_features(MODEL, "first")
