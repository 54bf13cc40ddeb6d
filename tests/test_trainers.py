"""The recipes of trainers, run in the trainers themselves; skipped without these."""

import dataclasses
import json

import equinox as eqx
import jax
import numpy as np
import optax
import pytest
from flax import nnx
from recipes import (
    TRAINERS,
    Names,
    combined,
    cosine,
    dot,
    minus,
    near,
    projected,
    resolved,
    run,
    times,
)

from dtnh_jax import add_regularizer, dtnh, value_and_gradient_pair
from dtnh_jax.regularizers import l2_sp, logit_distillation, lora_decay


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def params_of(model, kind=nnx.Param):
    return nnx.to_pure_dict(nnx.state(model, kind))


def like_flax_mnist(names: Names):
    model = names["CNN"](nnx.Rngs(0))
    start, adamw, rate = params_of(model), names["adamw"], names["RATE"]
    optimizer = nnx.Optimizer(model, names["tx"], wrt=nnx.Param)
    grad_fn, alone = nnx.jit(nnx.grad(names["loss_fn"])), jax.jit(adamw.update)
    adamw_state, conflicts = adamw.init(start), 0
    for _ in range(20):
        before = params_of(model)
        g = nnx.to_pure_dict(grad_fn(nnx.clone(model), names["batch"]))
        own, adamw_state = alone(g, adamw_state, before)
        r = minus(before, start)
        r["head"] = before["head"]  # which is new
        r = times(rate * 0.1, r)
        conflicts += dot(g, r) < 0
        names["train_step"](model, optimizer, names["metrics"], names["batch"])
        near(minus(params_of(model), before), minus(own, projected(g, r)), atol=1e-5)
    assert 0 < conflicts < 20
    near(params_of(names["model"]), params_of(model), atol=1e-5)
    assert np.all(model.norm.mean[...] != 0)
    assert model.dropout.rngs.count[...] == 20


def like_flax_imagenet(names: Names):
    start, end, batch = names["pretrained"], names["state"], names["batch"]
    tx, loss_fn = names["tx"], names["loss_fn"]
    grad_fn = jax.jit(jax.grad(loss_fn, has_aux=True))
    state = end.replace(step=0, opt_state=tx.init(start["params"]), **start)
    velocity, conflicts, losses = times(0.0, start["params"]), 0, []
    for _ in range(30):
        g, _ = grad_fn(state.params, state, batch)
        r = minus(state.params, start["params"])
        r["head"] = times(0.1, state.params["head"])
        conflicts += dot(g, r) < 0
        d = resolved(g, times(0.1, r))
        velocity = jax.tree.map(lambda v, x: 0.9 * v + x, velocity, d)
        step = jax.tree.map(lambda v, x: 0.9 * v + x, velocity, d)
        expected = minus(state.params, times(0.1, step))
        state, loss = names["step"](state, batch)
        near(state.params, expected, atol=1e-5)
        losses.append(float(loss))
    assert conflicts > 5
    assert losses[-1] < losses[0] - 0.05
    near(end.params, expected, atol=1e-4)

    def two_terms(params, state, batch):
        loss, new = loss_fn(params, state, batch)
        variables = {"params": params, "batch_stats": state.batch_stats}
        outputs = [
            state.apply_fn(each, batch["image"], train=False)
            for each in (variables, start)
        ]
        return (loss, logit_distillation(*outputs)), new

    tx = optax.chain(dtnh(0.1), optax.sgd(0.1))
    paired = state.replace(tx=tx, opt_state=tx.init(state.params))
    gradients = jax.jit(value_and_gradient_pair(two_terms, has_aux=True))
    (_, new), (g, r) = gradients(state.params, paired, batch)
    assert abs(cosine(g, r)) > 1e-3
    (_, new), pair = gradients(state.params, paired, batch)
    after = paired.apply_gradients(grads=pair, **new)
    near(after.params, minus(state.params, times(0.1, resolved(g, times(0.1, r)))))


def with_tunix(names: Names):
    from tunix import PeftTrainer, TrainingConfig

    tokens, objective, model = names["tokens"], names["objective"], names["model"]
    inputs = [{"tokens": tokens}]

    def adapted():
        base, rngs = (
            names["qwen3"].Qwen3(names["config"], rngs=nnx.Rngs(0)),
            nnx.Rngs(1),
        )
        example = tokens[:, :-1], *names["rest"]
        return names["qwix"].apply_lora_to_model(
            base, names["lora"], *example, rngs=rngs
        )

    def loss_fn(model, tokens):
        return objective(model, tokens)[0]

    def trained(model, tx, steps):
        config = TrainingConfig(eval_every_n_steps=1000, max_steps=steps)
        PeftTrainer(model, tx, config).with_loss_fn(loss_fn).train(inputs * steps)
        return model

    assert names["trainer"].train_steps == 20
    before, _ = objective(adapted(), tokens)
    plain = trained(adapted(), optax.adam(0.02), 20)
    (loss, kl), (plain_loss, plain_kl) = [objective(m, tokens) for m in (model, plain)]
    assert plain_loss < before - 0.1
    assert loss < before - 0.05
    assert 0 < kl < 0.9 * plain_kl
    others = nnx.Not(nnx.LoRAParam)
    near(params_of(model, others), params_of(adapted(), others), atol=0)

    # A regularizer of the weights is a line of the optimizer, also with qwix's names.
    pull = lora_decay(scale=8.0 / 4)
    start = params_of(plain, nnx.LoRAParam)
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    g = nnx.to_pure_dict(nnx.grad(loss_fn, argnums=wrt)(plain, tokens))
    r = times(0.1, pull.gradient(start))
    assert dot(r, r) > 1e-8
    trained(plain, optax.chain(add_regularizer(pull, 0.1), optax.sgd(0.1)), 1)
    expected = minus(start, times(0.1, resolved(g, r)))
    near(params_of(plain, nnx.LoRAParam), expected, atol=1e-5)


def with_equimo(names: Names):
    teacher, x, y = (names[name] for name in ("teacher", "x", "y"))
    params, _ = eqx.partition(teacher, eqx.is_inexact_array)
    state, conflicts = names["tx"].init(params), 0
    gradients = eqx.filter_jit(value_and_gradient_pair(names["objective"]))
    for _ in names["losses"]:
        _, (g, r) = gradients(params, teacher, x, y)
        conflicts += dot(g, r) < 0
        d = resolved(g, times(0.01, r))
        expected = minus(params, times(0.1, d))
        params, state, _ = names["step"](params, state, teacher, x, y)
        near(params, expected, atol=1e-5)
    assert conflicts > 5
    near(names["params"], params, atol=1e-4)
    assert names["losses"][-1] < names["losses"][0] - 0.05

    source, _ = eqx.partition(teacher, eqx.is_inexact_array)
    tx = add_regularizer(l2_sp(source, new=["head"]), 0.1)
    update, _ = jax.jit(tx.update)(g, tx.init(params), params)
    moved = minus(params, source)
    moved = eqx.tree_at(lambda tree: tree.head, moved, params.head)
    near(update, resolved(g, times(0.1, moved)), atol=1e-5)


def at_kauldron(trainer, data):
    """The parameters before training, and logits as a function of them."""
    apply, x = trainer.model.apply, data["x"]
    return trainer.init_state().params, lambda p: apply({"params": p}, x)["logits"]


def with_kauldron(names: Names):
    data, ends, ours = names["data"], names["ends"], names["ours"]
    trainer = names["trainer_of"](ours)
    start, logits = at_kauldron(trainer, data)
    grad = jax.jit(jax.grad(lambda p: cross_entropy(logits(p), data["y"][:, 0])))
    conflicts = 0
    for name in ("plain sum", "resolved"):
        params = start
        for _ in range(41):  # from 0 to `num_train_steps`
            g, r = grad(params), times(0.3, minus(params, start))
            conflicts += dot(g, r) < -1e-6
            d = resolved(g, r) if name == "resolved" else combined(np.add, g, r)
            params = jax.tree.map(np.float32, minus(params, times(0.2, d)))
        near(ends[name].params, params, atol=1e-4)
    assert conflicts > 20
    near(ends["resolved"].opt_state[0].anchor, start)

    class Loaded(names["kd"].ckpts.InitTransform):
        def transform(self, state):
            return state.replace(params=jax.tree.map(lambda x: x + 1, state.params))

    step = dataclasses.replace(trainer.trainstep, init_transform=Loaded())
    state = step.init(trainer.train_ds.element_spec)
    near(state.params, combined(lambda x: x + 1, start))
    near(state.opt_state[0].anchor, state.params)

    # What a run writes down of its configuration is enough to build it again.
    konfig = names["konfig"]
    written = json.loads(konfig.ConfigDict({"line": ours}).to_json())
    assert "dtnh_jax" in json.dumps(written)
    tx = konfig.resolve(konfig.ConfigDict(written))["line"]
    near(tx.init(start).anchor, start)


def with_kauldron_and_a_pair(names: Names):
    data, trainer = names["data"], names["trainer"]
    start, logits = at_kauldron(trainer, data)

    def objective(params):
        found = logits(params)
        loss = cross_entropy(found, data["y"][:, 0])
        return loss, logit_distillation(found, logits(start))

    gradients = jax.jit(value_and_gradient_pair(objective))
    start, state, conflicts = jax.device_get(start), trainer.init_state(), 0
    for _ in range(41):  # from 0 to `num_train_steps`
        before = jax.device_get(state.params)
        _, (g, r) = gradients(before)
        conflicts += dot(g, r) < 0
        state, _ = trainer.trainstep.step(state, data)
        d = resolved(g, times(0.5, r))
        near(state.params, minus(before, times(0.2, d)), atol=1e-5)
    assert conflicts > 20
    # The recipe's own run, in which rounding adds up over all steps.
    near(names["state"].params, state.params, atol=3e-4)
    near(names["state"].collections["source"], start)


CHECKS = {
    "NNX, as in Flax's MNIST example": like_flax_mnist,
    "Flax linen, as in its ImageNet example": like_flax_imagenet,
    "tunix, PeftTrainer": with_tunix,
    "equimo": with_equimo,
    "kauldron": with_kauldron,
    "kauldron: a second gradient": with_kauldron_and_a_pair,
}


@pytest.mark.filterwarnings("ignore")  # what trainers warn of is theirs
@pytest.mark.parametrize("title", TRAINERS)
def test_a_recipe_does_what_it_says(title, capsys):
    for package in TRAINERS[title]:
        pytest.importorskip(package)
    with jax.numpy_rank_promotion("allow"):  # and so is how they broadcast
        names = run(title)
        assert 1 <= len(capsys.readouterr().out.splitlines()) <= 3
        CHECKS[title](names)
