"""The gradient pair of NNX modules: what a forward pass changes, it changes once."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dtnh_jax import conflict_metrics, dtnh, regularizers
from dtnh_jax.nnx import capture_features, frozen_teacher, value_and_gradient_pair


class Block(nnx.Module):
    def __init__(self, inputs, outputs, rngs):
        self.dense = nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return self.activate(self.norm(self.dense(x)))

    @staticmethod
    def activate(x):
        return nnx.relu(x)


class Narrow(Block):
    """Has its forward pass from its base class."""


class Network(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(2, 4, rngs), Narrow(4, 3, rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        # Sowing elsewhere is deprecated, since there is `nnx.capture`.
        if hasattr(self, "__captures__") or not hasattr(nnx, "capture"):
            self.sow(nnx.Intermediate, "hidden", x)
        return self.head(self.dropout(x))


X = jax.random.normal(jax.random.key(0), (8, 2))
Y = jnp.arange(8) % 3
LAYERS = ["blocks/0", "blocks/1"]


def network():
    return Network(nnx.Rngs(0))


def moved_and_teacher():
    """A network away from its teacher, so that regularizers have gradients."""
    model = network()
    teacher = frozen_teacher(model)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p: 1.1 * p + 0.01, params))
    return model, teacher


def objective(model, teacher, x, y):
    logits, student = capture_features(model, LAYERS)(x)
    _, target = capture_features(teacher, LAYERS)(x)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, regularizers.feature_map(student, target)


def pure(tree):
    return nnx.to_pure_dict(tree)


def test_it_is_two_gradients_and_one_forward_pass():
    model, teacher = moved_and_teacher()
    model_of_g, model_of_r = nnx.clone(model), nnx.clone(model)
    values, pair = nnx.jit(value_and_gradient_pair(objective))(model, teacher, X, Y)

    def term(i):
        return nnx.jit(nnx.value_and_grad(lambda *args: objective(*args)[i]))

    loss, g = term(0)(model_of_g, teacher, X, Y)
    regularizer, r = term(1)(model_of_r, teacher, X, Y)
    np.testing.assert_allclose(values, (loss, regularizer), rtol=1e-5)
    assert jax.tree.structure(pair.loss) == jax.tree.structure(g)
    chex.assert_trees_all_close(pure(pair.loss), pure(g), rtol=1e-3, atol=1e-5)
    chex.assert_trees_all_close(pure(pair.regularizer), pure(r), rtol=1e-3, atol=1e-5)
    # Statistics and dropout's counter are as after the one pass of `nnx.grad`.
    assert model.dropout.rngs.count[...] == 1
    after, expected = (
        pure(nnx.state(m, nnx.Any(nnx.BatchStat, nnx.RngCount)))
        for m in (model, model_of_g)
    )
    chex.assert_trees_all_close(after, expected, rtol=1e-5)


@pytest.mark.parametrize("as_pair", [True, False])
def test_training_with_an_optimizer(as_pair):
    model, teacher = moved_and_teacher()
    before = pure(nnx.state(teacher))
    tx = optax.chain(dtnh(1.0), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    traces = []

    @nnx.jit
    def step(model, optimizer, teacher, x, y):
        traces.append(1)
        values, pair = value_and_gradient_pair(objective)(model, teacher, x, y)
        if as_pair:
            optimizer.update(model, pair)
        else:
            optimizer.update(model, pair.loss, regularizer_grads=pair.regularizer)
        return values

    for i in range(1, 4):
        step(model, optimizer, teacher, X, Y)
        assert model.dropout.rngs.count[...] == i
        assert conflict_metrics(optimizer.opt_state)["regularizer_norm"] > 0
    # The average of the statistics of three passes, from zero.
    assert not np.any(model.blocks[0].norm.mean[...] == 0)
    chex.assert_trees_all_equal(pure(nnx.state(teacher)), before)
    assert optimizer.step[...] == 3
    assert len(traces) == 1


def test_modules_among_the_arguments_are_changed_too():
    model = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    rngs, metric = nnx.Rngs(1), nnx.metrics.Average()

    def objective(model, x, *, rngs, batch):
        loss = jnp.sum(model(x + rngs.noise()[()].size))
        batch["metric"].update(values=loss)
        return (loss, jnp.sum(model.kernel[...] ** 2)), loss

    kwargs = {"rngs": rngs, "batch": {"metric": metric, "name": "train"}}

    def noisy(model, x, *, rngs, batch):
        values, loss = objective(model, x, rngs=rngs, batch=batch)
        return values, loss

    run = value_and_gradient_pair(noisy, has_aux=True)
    ((loss, _), aux), _ = run(model, jnp.ones((1, 3)), **kwargs)
    assert rngs.default.count[...] == 1
    assert loss == aux == metric.compute()


def test_a_teacher_from_outside_may_be_closed_over():
    model, teacher = moved_and_teacher()

    @nnx.jit
    def run(model):
        def of_model(model):
            return objective(model, teacher, X, Y)

        return value_and_gradient_pair(of_model)(model)

    values, _ = run(model)
    other, _ = moved_and_teacher()
    expected, _ = nnx.jit(value_and_gradient_pair(objective))(other, teacher, X, Y)
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_other_variables_can_be_differentiated():
    def has_name(path, value):
        del value
        return "head" in path

    model, teacher = moved_and_teacher()
    wrt = nnx.All(nnx.Param, has_name)
    run = value_and_gradient_pair(objective, wrt=wrt)
    _, pair = nnx.jit(run)(model, teacher, X, Y)
    assert set(pair.loss) == set(pair.regularizer) == {"head"}
    with pytest.raises(ValueError, match="`wrt` must select variables of the model"):
        value_and_gradient_pair(objective, wrt=nnx.LoRAParam)(model, teacher, X, Y)


def test_several_regularizers():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = optax.chain(dtnh({"l1": 0.1, "l2": 0.1}), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def objective(model, x):
        kernel = model.kernel[...]
        penalties = {"l1": jnp.sum(jnp.abs(kernel)), "l2": jnp.sum(kernel**2)}
        return jnp.sum(model(x) ** 2), penalties

    @nnx.jit
    def step(model, optimizer):
        values, pair = value_and_gradient_pair(objective)(model, jnp.ones((1, 3)))
        optimizer.update(model, pair)
        return values, pair

    kernel = model.kernel[...]
    (_, values), pair = step(model, optimizer)
    assert set(values) == set(pair.regularizer) == {"l1", "l2"}
    np.testing.assert_allclose(pair.regularizer["l2"]["kernel"][...], 2 * kernel)
    assert set(conflict_metrics(optimizer.opt_state)) == {"l1", "l2"}


def test_shared_variables_are_differentiated_once():
    class Tied(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(3, 3, use_bias=False, rngs=nnx.Rngs(0))
            self.second = self.first

        def __call__(self, x):
            return self.second(self.first(x))

    def tied(model, x):
        return jnp.sum(model(x)), jnp.sum(model.first.kernel[...])

    _, pair = value_and_gradient_pair(tied)(Tied(), jnp.ones((1, 3)))
    assert len(jax.tree.leaves(pair.loss)) == 1


def test_features_by_path_predicate_and_sown_name():
    model = network()
    model.eval()
    logits, found = capture_features(model, ["blocks/1", "blocks/0/dense"])(X)
    assert list(found) == ["blocks/1", "blocks/0/dense"]
    assert found["blocks/1"].shape == (8, 3)
    np.testing.assert_array_equal(found["blocks/0/dense"], model.blocks[0].dense(X))
    np.testing.assert_array_equal(logits, model(X))
    _, found = capture_features(model, lambda path: path.endswith("norm"))(X)
    assert set(found) == {"blocks/0/norm", "blocks/1/norm"}
    _, found = capture_features(model, ["hidden"])(X)
    assert found["hidden"].shape == (8, 3)


def test_capturing_leaves_classes_and_modules_as_they_were():
    model = network()
    before = [dict(vars(cls)) for cls in (Block, Narrow, nnx.BatchNorm)]
    attributes = set(vars(model.blocks[0]))
    capture_features(model, LAYERS)(X)
    assert [dict(vars(cls)) for cls in (Block, Narrow, nnx.BatchNorm)] == before
    assert set(vars(model.blocks[0])) == attributes
    # All the same the forward pass has updated the statistics, once.
    expected = 0.1 * model.blocks[0].dense(X).mean(0)
    np.testing.assert_allclose(model.blocks[0].norm.mean[...], expected, rtol=1e-4)
    with pytest.raises(TypeError):
        capture_features(model, LAYERS)()
    assert [dict(vars(cls)) for cls in (Block, Narrow, nnx.BatchNorm)] == before


def test_a_layer_that_is_called_twice_has_two_features():
    class Twice(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.layer(self.layer(x))

    output, found = capture_features(Twice(), ["layer"])(jnp.ones((1, 3)))
    assert len(found["layer"]) == 2
    np.testing.assert_array_equal(found["layer"][1], output)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        (["blocks/2"], r"got 'blocks/2'\. Near it are 'blocks/[01]'"),
        (["?"], "There are 'blocks', 'blocks/0', 'blocks/0/dense'"),
        (lambda path: False, "`layers` must select a layer .* among 'blocks'"),
    ],
)
def test_missing_layers_are_answered_with_near_ones(layers, says):
    model = network()
    model.eval()
    with pytest.raises(ValueError, match=says):
        capture_features(model, layers)(X)
    with pytest.raises(TypeError, match=r"write \['head'\]"):
        capture_features(model, "head")


def test_a_teacher_shares_nothing_with_the_model():
    model = network()
    teacher = frozen_teacher(model)
    assert model.blocks[0].norm.use_running_average is False
    assert teacher.blocks[0].norm.use_running_average is True
    np.testing.assert_array_equal(teacher(X), teacher(X))
    for leaf in jax.tree.leaves(nnx.state(model)):
        leaf.delete()  # as a train step does that donates the model
    assert np.all(np.isfinite(teacher(X)))


def test_a_tracer_can_be_a_teacher():
    @nnx.jit
    def run(model):
        return frozen_teacher(model)(X)

    assert run(network()).shape == (8, 3)
