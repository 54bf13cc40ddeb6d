"""Every recipe of the documentation runs by itself, and does what its words say.

Those of trainers are run by `test_trainers`.
"""

import ast
import functools
import importlib
import re

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from recipes import (
    FENCE,
    SECTIONS,
    TRAINERS,
    At,
    Names,
    code_of,
    combined,
    cosine,
    dot,
    gradient,
    gradient_pair,
    minus,
    near,
    resolved,
    run,
    times,
    trained,
    walk,
)

import dtnh_jax
from dtnh_jax import (
    add_regularizer,
    conflict_metrics,
    decoupled,
    value_and_gradient_pair,
)
from dtnh_jax.regularizers import feature_map, l2_sp, logit_distillation, lora_decay


def adamw_with_schedules(names: Names):
    assert names["losses"][-1] < 0.3 * names["losses"][0]
    adamw, start, tx = names["adamw"], names["pretrained"], names["tx"]
    batches = [()] * names["STEPS"]
    grad = gradient(names["loss"], names["x"], names["y"])
    own_step = jax.jit(adamw.update)

    def harms(steps, optimizer_state):
        """What the regularizer's part costs, in units of AdamW's own progress."""
        found = []
        for at in steps[2:50]:  # later steps are not told from rounding
            g = grad(at)
            alone, _ = own_step(g, optimizer_state(at.state), at.params)
            part = minus(minus(at.new_params, at.params), alone)
            found.append(dot(g, part) / abs(dot(g, alone)))
        return np.array(found)

    steps = walk(names["step"], start, tx.init(start), batches)
    near(steps[-1].new_params, names["params"])
    assert harms(steps, lambda state: state.optimizer).max() < 1e-4
    in_front = optax.chain(add_regularizer(l2_sp(start), names["fading"]), adamw)

    grads = jax.grad(lambda params: names["loss"](params, names["x"], names["y"]))
    steps_in_front = trained(in_front, grads, start, batches)
    assert harms(steps_in_front, lambda state: state[1]).max() > 1e-2

    for at in (2, 10, names["STEPS"] - 1):  # both schedules are in the strength
        strength = float(names["learning_rate"](at) * names["fading"](at))
        moved = minus(steps[at].params, start)
        length = strength * dot(moved, moved) ** 0.5
        assert length > 0
        found = conflict_metrics(steps[at].new_state)["regularizer_norm"]
        np.testing.assert_allclose(found, length, rtol=1e-3)


def low_rank_adapters(names: Names):
    assert names["losses"][-1] < 0.75 * names["losses"][0]
    params, pretrained = names["params"], names["pretrained"]
    for name, adapter in params["adapters"].items():
        product = np.asarray(adapter["lora_a"], np.float64) @ adapter["lora_b"]
        assert product.shape == pretrained[name].shape
        values = np.linalg.svd(product, compute_uv=False)
        assert values[0] > 1e-2
        assert values[2] < 1e-5 * values[0]  # of rank 2
    kept = {x.shape for x in jax.tree.leaves((names["state"], params))}
    assert kept.isdisjoint(x.shape for x in jax.tree.leaves(pretrained))

    start = {"adapters": names["adapters"], "head": np.zeros((16, 3), np.float32)}
    batches = [(pretrained,)] * len(names["losses"])
    steps = walk(names["step"], start, names["tx"].init(start), batches)
    near(steps[-1].new_params, params)
    grad = gradient(names["loss"], names["x"], names["y"])
    for at in steps:
        pull = times(0.0, at.params)
        for name, adapter in combined(np.array, at.params["adapters"]).items():
            a, b = adapter["lora_a"], adapter["lora_b"]
            pull["adapters"][name] = {"lora_a": a @ b @ b.T, "lora_b": a.T @ a @ b}
        # What came into the momentum at this step.
        before, after = at.state[1][0].trace, at.new_state[1][0].trace
        near(minus(after, times(0.9, before)), resolved(grad(at), times(0.1, pull)))

    def loss(params, frozen):
        return names["loss"](params, frozen, names["x"], names["y"])

    free = optax.sgd(0.1, momentum=0.9)
    without = trained(free, jax.grad(loss), start, batches)[-1].new_params
    value = jax.jit(lora_decay().value)
    assert 0 < value(params) < 0.9 * value(without)


def gradient_accumulation(names: Names):
    every, losses = names["EVERY"], names["losses"]
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:20])
    xs, ys, start = names["xs"], names["ys"], names["pretrained"]
    pair = gradient_pair(names["objective"])
    steps = walk(names["step"], start, names["tx"].init(start), zip(xs, ys))
    near(steps[-1].new_params, names["params"])
    moved = [bool(np.any(at.params["w"] != at.new_params["w"])) for at in steps]
    assert moved == [False, False, False, True] * (len(xs) // every)

    def clipped(d):
        return times(min(1.0, 1 / dot(d, d) ** 0.5), d)

    apart, cosines = [], []
    for i in range(0, len(xs), every):
        first, last = steps[i], steps[i + every - 1]
        joined = first._replace(
            batch=(np.concatenate(xs[i : i + every]), np.concatenate(ys[i : i + every]))
        )
        g, r = pair(joined)
        cosines.append(cosine(g, r))
        expected = minus(first.params, times(0.5, clipped(resolved(g, times(0.5, r)))))
        near(last.new_params, expected)
        each = [pair(at) for at in steps[i : i + every]]
        resolved_each = [resolved(g, times(0.5, r)) for g, r in each]
        mean = combined(lambda *ds: sum(ds) / every, *resolved_each)
        other = minus(first.params, times(0.5, clipped(mean)))
        apart.append(np.abs(expected["w"] - other["w"]).max())
    assert min(cosines) < 0
    assert max(apart) > 1e-2


def mixed_precision(names: Names):
    assert names["losses"][-1] < 0.7 * names["losses"][0]
    half, single = {np.dtype(jnp.bfloat16)}, {np.dtype(np.float32)}

    def floating(tree):
        dtypes = {x.dtype for x in jax.tree.leaves(tree)}
        return {dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)}

    assert floating(names["pair"]) == half
    assert floating((names["masters"], names["state"])) == single
    rounded = optax.tree.cast(names["masters"], jnp.bfloat16)
    assert dot(minus(names["masters"], rounded), minus(names["masters"], rounded)) > 0

    masters, cosines = names["pretrained"], []
    state = names["tx"].init(masters)
    for _ in names["losses"]:
        before = masters
        masters, state, _, (g, r) = names["step"](masters, state)
        assert floating((g, r)) == half
        update = times(-1 / 0.3, minus(masters, before))
        for leaf, exact in zip(
            jax.tree.leaves(update), jax.tree.leaves(resolved(g, times(0.05, r)))
        ):
            np.testing.assert_allclose(leaf, exact, rtol=2**-8, atol=1e-6)
            # What dtnh returns is in half precision, and its product by 0.3 is not.
            moved = leaf[leaf != 0]
            rest = np.abs(moved - moved.astype(jnp.bfloat16).astype(float))
            assert np.median(rest / np.abs(moved)) < 2**-12
        metrics = conflict_metrics(state)
        assert metrics["cosine"].dtype == jnp.float32
        np.testing.assert_allclose(metrics["cosine"], cosine(g, r), atol=1e-6)
        cosines.append(cosine(g, r))
    near(masters, names["masters"])
    assert min(cosines) < -0.1
    rounded = np.array(cosines).astype(jnp.bfloat16)
    assert np.abs(rounded.astype(float) - cosines).max() > 1e-4  # it would be seen


def a_new_head(names: Names):
    start, grad = names["start"], gradient(names["loss"], names["x"], names["y"])

    def train(tx):
        own_step = functools.partial(names["step"], tx)
        return walk(own_step, start, tx.init(start), [()] * 60)

    steps = train(names["left_alone"])
    for at in steps:
        g = grad(at)
        pull = {"body": times(0.5, minus(at.params["body"], start["body"]))}
        d = {**g, "body": resolved({"body": g["body"]}, pull)["body"]}
        near(at.new_params, minus(at.params, times(0.1, d)))
    assert dot(pull, {"body": g["body"]}) < 0
    assert steps[-1].seen[0] < 0.6 * steps[0].seen[0]

    steps = train(names["decayed"])
    for at in steps:
        head = times(0.1, at.params["head"])
        pull = {"body": minus(at.params["body"], start["body"]), "head": head}
        d = resolved(grad(at), times(0.5, pull))
        near(at.new_params, minus(at.params, times(0.1, d)))
    near(steps[-1].new_params, names["params"])
    assert names["losses"][-1] < 0.6 * names["losses"][0]

    unpulled = l2_sp(start, new=["head"], new_strength=0.0)
    longer = []
    for at in train(optax.chain(add_regularizer(unpulled, 0.5), optax.sgd(0.1))):
        g, update = grad(at)["head"], minus(at.new_params, at.params)["head"]
        longer.append(-dot(g, update) / (0.1 * dot(g, g)))
        np.testing.assert_allclose(update, -0.1 * longer[-1] * g, atol=1e-6)
    assert min(longer) > 1 - 1e-3
    assert max(longer) > 1.05


def several_regularizers(names: Names):
    losses, start = names["losses"], names["pretrained"]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    pair, apart = gradient_pair(names["objective"]), []
    batches = list(zip(names["xs"], names["ys"]))
    steps = walk(names["step"], start, names["tx"].init(start), batches)
    near(steps[-1].new_params, names["params"])
    for at in steps:
        g, features = pair(at)
        weights = minus(at.params, start)
        rs = times(0.01, features), times(0.1, weights)
        d = resolved(g, *rs)
        near(at.new_params, minus(at.params, times(0.5, d)))
        assert dot(g, d) > dot(g, g) * (1 - 1e-6)
        metrics = conflict_metrics(at.new_state)
        assert set(metrics) == {"features", "weights"}
        for found, r in zip((metrics["features"], metrics["weights"]), rs):
            np.testing.assert_allclose(found["cosine"], cosine(g, r), atol=1e-4)
        together = resolved(g, combined(np.add, *rs))
        apart.append(0.5 * np.abs(minus(d, together)["body"]).max())
    assert max(apart) > 1e-4  # where one was in conflict and the other was not


def continual_learning(names: Names):
    (old_before, new_before), *_, (old_after, new_after) = names["history"]
    assert new_after < 0.6 * new_before
    assert old_after <= max(old for old, _ in names["history"]) < 2 * old_before

    start, data = {"w": names["old_w"]}, (names["replay"], names["fresh"])
    batches = [()] * len(names["history"])
    pair = gradient_pair(names["objective"], *data)
    steps = walk(names["step"], start, names["tx"].init(start), batches)
    near(steps[-1].new_params, names["params"])
    cosines = []
    for at in steps:
        old, new = pair(at)
        cosines.append(cosine(old, new))
        d = resolved(old, times(0.1, new))
        near(at.new_params, minus(at.params, times(0.1, d)))
        update = minus(at.new_params, at.params)
        assert -dot(old, update) > 0.1 * dot(old, old) - 1e-5
    assert min(cosines) < -0.1

    def old_loss_after(direction):
        """Trains by a formula instead."""
        at = steps[0]
        for _ in batches:
            change = times(0.1, direction(*pair(at)))
            at = at._replace(params=minus(at.params, change))
        return names["task_loss"](at.params, names["replay"])

    assert old_loss_after(lambda old, new: times(0.1, new)) > 100 * old_before
    assert old_loss_after(lambda old, new: combined(np.add, old, times(0.1, new))) > (
        5 * old_before
    )
    assert old_loss_after(lambda old, new: resolved(times(0.1, new), old)) > (
        100 * old_before
    )

    # Adam for the new task: whatever it does, rehearsal is as fast as by itself.
    tx = decoupled(optax.sgd(0.1), 1.0, regularizer_optimizer=optax.adam(0.02))
    both = value_and_gradient_pair(names["objective"])
    steps = trained(tx, lambda params: both(params, *data)[1], start, batches)
    for at in steps:
        old, _ = pair(at)
        update = minus(at.new_params, at.params)
        assert -dot(old, update) > 0.1 * dot(old, old) - 1e-5
    end = steps[-1].new_params
    assert names["task_loss"](end, names["fresh"]) < 0.8 * new_before
    assert names["task_loss"](end, names["replay"]) < 5 * old_before


def instead_of_weight_decay(names: Names):
    start, adamw, loss = names["pretrained"], names["adamw"], jax.jit(names["loss"])
    x, y = names["x"], names["y"]
    batches = [(x[rows], y[rows]) for rows in names["batches"]]
    steps = walk(names["step"], start, names["tx"].init(start), batches)
    near(steps[-1].new_params, names["params"])
    alone = trained(adamw, jax.grad(loss), start, batches)[-1].new_params

    def way(end):
        return dot(minus(end, start), minus(end, start)) ** 0.5

    assert way(names["params"]) < 0.8 * way(alone)
    assert float(loss(names["params"], x, y)) < 0.6 * float(loss(start, x, y))


def whether_to_trust(names: Names):
    start, fit, choice = names["pretrained"], names["fit"], names["choice"]
    x, y, order = (names[name] for name in ("x", "y", "batches"))
    fresh = np.random.default_rng(1).standard_normal((1000, 32)).astype(np.float32)
    answers = fresh @ (start["w"] + names["change"])

    def loss(params, x, y):
        return jnp.mean((x @ params["w"] - y) ** 2)

    def error(params):
        return float(loss(params, fresh, answers))

    def strong(params, x, y):
        moved = jax.tree.map(lambda p, s: p - s, params, start)
        grads = jax.grad(loss)(params, x, y)
        return jax.tree.map(lambda g, m: g + 1e4 * m, grads, moved)

    adamw = optax.adamw(0.03, weight_decay=0.0)
    batches = [(x[rows], y[rows]) for rows in order]
    alone = trained(adamw, jax.jit(jax.grad(loss)), start, batches)[-1].new_params
    near(fit(0.0, x, y, order), alone)
    assert choice.trust > 0
    assert choice.trainings <= 8
    held_out = {level: np.mean(each) for level, each in choice.scores.items()}
    assert held_out[choice.trust] > held_out[0.0]
    assert error(names["params"]) < 0.9 * error(alone)
    ruined = trained(adamw, jax.jit(strong), start, batches)[-1].new_params
    assert error(ruined) > 1.1 * error(names["params"])


def porting_from_pytorch(names: Names):
    """The loop of the `py` block, in double precision and with its own gradients."""
    alpha, beta = names["ALPHA"], names["BETA"]
    x, y = np.asarray(names["x"], np.float64), names["y"]
    start = combined(np.array, names["start"])
    params, velocity = start, times(0.0, start)
    for _ in range(50):
        hidden = np.tanh(x @ params["body"])
        odds = np.exp(hidden @ params["head"])
        error = (odds / odds.sum(axis=1, keepdims=True) - np.eye(3)[y]) / len(x)
        back = (error @ params["head"].T) * (1 - hidden**2)
        grads = {
            "body": x.T @ back + 2 * alpha * (params["body"] - start["body"]),
            "head": hidden.T @ error + 2 * beta * params["head"],
        }
        velocity = combined(lambda v, g: 0.9 * v + g, velocity, grads)
        params = minus(params, times(0.05, velocity))
    as_before, resolving = names["ends"]["PyTorch"], names["ends"]["resolved"]
    near(as_before, params, atol=2e-5)
    assert np.abs(resolving["body"] - as_before["body"]).max() > 1e-2
    before, after = (names["loss"](end, x, y) for end in (as_before, resolving))
    assert after < before < 0.5 * names["loss"](names["start"], x, y)


def layers_by_hand(activation, regularizer, names: Names, start):
    """Both gradients of a network of two layers, `[w, b, w, b]`."""

    def run(params):
        hidden = names["x"] @ params[0] + params[1][None, :]
        return hidden, activation(hidden) @ params[2] + params[3][None, :]

    def objective(params):
        found, target = run(params), run(start)
        losses = optax.softmax_cross_entropy_with_integer_labels(found[1], names["y"])
        return losses.mean(), regularizer(found, target)

    return gradient_pair(objective)


def with_nnx(names: Names):
    losses = names["losses"]
    assert losses[-1] < 0.7 * losses[0]
    assert names["optimizer"].step[...] == len(losses)

    def weights(layers):
        return [np.asarray(x) for each in layers for x in (each.kernel, each.bias)]

    rngs = nnx.Rngs(0)  # the same as in the recipe
    start = weights([nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)])
    chex.assert_trees_all_equal(weights(names["teacher"].layers[::2]), start)
    pair = layers_by_hand(
        jnp.tanh,
        lambda found, target: feature_map([found[0]], [target[0]]),
        names,
        start,
    )
    at, conflicts = At(start, None, (), None, None, None), 0
    for _ in losses:
        g, r = pair(at)
        r = times(0.1, r)
        conflicts += sum(dot(a, b) < 0 for a, b in zip(g, r))
        d = [resolved(a, b) if np.any(a) else b for a, b in zip(g, r)]
        at = at._replace(params=minus(at.params, times(0.2, d)))
    assert conflicts > 10
    near(weights(names["model"].layers[::2]), at.params, atol=1e-4)
    metrics = conflict_metrics(names["optimizer"].opt_state)
    assert metrics["regularizer_norm"] > 0


def with_equinox(names: Names):
    losses, model, teacher = names["losses"], names["model"], names["teacher"]
    assert losses[-1] < 0.7 * losses[0]
    assert isinstance(model, eqx.nn.MLP)
    assert model.activation is teacher.activation
    assert any(callable(leaf) for leaf in jax.tree.leaves(teacher))

    def weights(network):
        return [x for each in network.layers for x in (each.weight.T, each.bias)]

    pair = layers_by_hand(
        jax.nn.relu,
        lambda found, target: logit_distillation(found[1], target[1]),
        names,
        weights(teacher),
    )
    at, cosines = At(weights(teacher), None, (), None, None, None), []
    for _ in losses:
        g, r = pair(at)
        cosines.append(cosine(g, r))
        at = at._replace(
            params=minus(at.params, times(0.2, resolved(g, times(0.1, r))))
        )
    assert min(cosines) < -0.1
    near(weights(model), at.params, atol=1e-4)
    pull = l2_sp(names["params"], new=["layers/1"]).gradient(names["params"])
    assert not np.any(pull.layers[0].weight)
    assert np.any(pull.layers[1].weight)


def logging_conflicts(names: Names):
    log, start = names["log"], names["start"]
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    grad = gradient(names["loss"], names["x"], names["y"])
    steps = walk(names["step"], start, names["tx"].init(start), [()] * len(log))
    near(steps[-1].new_params, names["params"])
    for at, line in zip(steps, log, strict=True):
        assert sorted(line) == [
            "conflict", "cosine", "loss", "loss_norm", "regularizer_norm", "removed",
            "skipped",
        ]  # fmt: skip
        assert not any(isinstance(value, jax.Array) for value in line.values())
        g, r = grad(at), minus(at.params, start)
        expected = cosine(g, r)
        np.testing.assert_allclose(line["cosine"], expected, atol=1e-4)
        angles = {name: cosine(g[name], r[name]) for name in g}
        size = {name: x.size for name, x in g.items()}
        conflict = sum(size[name] for name in g if angles[name] < 0)
        share = conflict / sum(size.values())
        np.testing.assert_allclose(line["conflict"], share, rtol=1e-5)
        np.testing.assert_allclose(line["loss_norm"], dot(g, g) ** 0.5, rtol=1e-3)
        norm = 0.1 * dot(r, r) ** 0.5
        np.testing.assert_allclose(line["regularizer_norm"], norm, rtol=1e-3)
        kept = [dot(r[n], r[n]) * (1 - min(0.0, angles[n]) ** 2) for n in g]
        removed = 1 - (sum(kept) / dot(r, r)) ** 0.5 if norm else 0
        np.testing.assert_allclose(line["removed"], removed, atol=1e-3)
        assert line["skipped"] == 0
        moved = minus(at.new_params, at.params)
        np.testing.assert_allclose(dot(moved, moved) ** 0.5, 0.2 * 0.1, rtol=1e-3)
    assert min(line["cosine"] for line in log) < -0.1
    assert min(line["loss_norm"] for line in log) > 0.1  # so all steps were clipped

    last = steps[-1]
    moved = minus(last.params, start)
    assert names["by_leaf"]["cosine"].shape == (2,)
    for found, name in zip(names["by_leaf"]["cosine"], ("body", "head")):
        expected = cosine(grad(last)[name], moved[name])
        np.testing.assert_allclose(found, expected, atol=1e-4)


def built_before_the_parameters(names: Names):
    start, tx = names["pretrained"], names["tx"]
    grad = gradient(names["loss"], names["x"], names["y"])
    steps = walk(names["step"], start, tx.init(start), [()] * 40)
    near(steps[-1].new_params, names["params"])
    conflicts = 0
    for at in steps:
        g = grad(at)
        r = times(0.1, minus(at.params, start))
        r["head"] = 0 * r["head"]
        conflicts += dot(g, r) < 0
        near(minus(at.new_params, at.params), times(-0.2, resolved(g, r)))
    assert conflicts > 5
    assert names["moved"] > 0.1


def with_a_kl(names: Names):
    """The KL is less than without its steps, and the loss is no higher."""
    trained, objective, inputs = (names[x] for x in ("model", "objective", "inputs"))
    rngs = nnx.Rngs(0)
    linear = nnx.Linear(8, 20, rngs=rngs)
    embed = nnx.Embed(20, 8, rngs=rngs)
    adapter = nnx.LoRA(8, 2, 20, base_module=linear, rngs=rngs)
    plain = nnx.Sequential(embed, adapter)
    np.testing.assert_array_equal(
        trained.layers[1].base_module.kernel[...], linear.kernel[...]
    )
    tx = optax.adam(0.02)
    optimizer = nnx.Optimizer(plain, tx, wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        wrt = nnx.DiffState(0, nnx.LoRAParam)
        loss, g = nnx.value_and_grad(lambda m: objective(m, **inputs)[0], argnums=wrt)(
            model
        )
        optimizer.update(model, g)
        return loss

    losses = [float(step(plain, optimizer)) for _ in range(40)]
    assert losses[0] == names["losses"][0]
    assert names["losses"][-1] < losses[-1] < losses[0] - 0.3
    assert 0.1 < names["kl"] < 0.97 * float(objective(plain, **inputs)[1])


CHECKS = {
    "AdamW with schedules": adamw_with_schedules,
    "Low-rank adapters (LoRA)": low_rank_adapters,
    "Gradient accumulation": gradient_accumulation,
    "Mixed precision": mixed_precision,
    "A new head, left alone": a_new_head,
    "Several regularizers at once": several_regularizers,
    "Continual learning: protect the old task": continual_learning,
    "An optimizer that is built before the parameters": built_before_the_parameters,
    "Instead of weight decay": instead_of_weight_decay,
    "Whether to trust a regularizer": whether_to_trust,
    "Porting a PyTorch script with L2-SP": porting_from_pytorch,
    "NNX": with_nnx,
    "Language models: a KL to the base model": with_a_kl,
    "Equinox": with_equinox,
    "Logging conflicts": logging_conflicts,
}
each_section = pytest.mark.parametrize("title", SECTIONS)


def test_all_recipes_are_there_and_have_a_check():
    assert set(SECTIONS) == set(CHECKS) | set(TRAINERS)


@pytest.mark.parametrize("title", CHECKS)
def test_a_recipe_does_what_it_says(title, capsys):
    names = run(title)
    assert 1 <= len(capsys.readouterr().out.splitlines()) <= 3
    CHECKS[title](names)


@each_section
def test_a_recipe_has_one_block_between_words(title):
    text = SECTIONS[title]
    kinds = [kind for kind, _ in FENCE.findall(text)]
    other = ["py"] if "PyTorch" in title else []  # to compare with, not to run
    assert kinds == [*other, "python"]
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(kinds)
    assert all(words.strip() for words in FENCE.sub("```", text).split("```"))


@each_section
def test_a_recipe_is_short_and_public(title):
    code = code_of(title)
    assert len(code.splitlines()) <= (60 if title in TRAINERS else 45)
    assert max(map(len, code.splitlines())) <= 88
    nodes = list(ast.walk(ast.parse(code)))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    overridden = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    for node in nodes:
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_") or node.attr in overridden
            if isinstance(node.value, ast.Name) and node.value.id == "dtnh_jax":
                assert node.attr in dtnh_jax.__all__
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("dtnh_jax"):
            public = importlib.import_module(str(node.module)).__all__
            assert {alias.name for alias in node.names} <= set(public)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert {alias.asname or alias.name for alias in node.names} <= used
        if isinstance(node, ast.Import):
            is_module = [alias.name.startswith("dtnh_jax") for alias in node.names]
            # Configurations of kauldron import modules alone.
            assert not any(is_module) or "konfig" in code
