"""Training on many devices, in parts, in other precisions: the same but rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_network
from jax.sharding import PartitionSpec as P

from dtnh_jax import regularizers
from dtnh_jax.finetune.config import Config
from dtnh_jax.finetune.data import loading
from dtnh_jax.finetune.methods import METHODS
from dtnh_jax.finetune.training import loop, meshes, network
from dtnh_jax.finetune.weights import sources

SOURCE = tiny_network.TINY
ORIGINAL = sources.original_variables(SOURCE)
KEY = loop.training_key(0)
BATCH, STEPS, STRENGTH = 8, 3, 0.3
METHODS_TRIED = [
    "fine-tuning",
    "l2_sp+dtnh",
    "feature_map+dtnh",
    pytest.param("l2_sp+never_hurt", marks=pytest.mark.slow),
]


@functools.cache
def examples():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 16, 16, 3), np.uint8)
    return loading.Examples(images, np.arange(20, dtype=np.int32) % 2)


def blocks_of(size):
    return loading.training_batches(loading.views(examples()), size, seed=0)


@functools.cache
def trained(name, mesh=(), **options):
    """Returns parameters, momentum, statistics and metrics of three steps."""
    config = Config(methods=("all",), learning_rate=0.1, **options)
    made_of = network.in_dtype(SOURCE, config.dtype)
    spread = meshes.make_mesh(dict(mesh))
    method = METHODS[name]
    trainer = loop.make_trainer(
        made_of,
        made_of.module(2),
        method.regularizer,
        config,
        STEPS,
        never_hurts=method.never_hurts,
        mesh=spread,
    )
    # Away from where the regularizer's gradient is zero.
    variables = loop.starting_variables(SOURCE, 2, 0, method)
    moved = jax.tree.map(lambda x: x + 0.01, variables["params"])
    state = trainer.init({**variables, "params": moved}, method, STRENGTH)
    assert_placed(spread, state)
    known = loop.Known(meshes.place(spread, ORIGINAL))
    batches = meshes.batches(spread, blocks_of, BATCH // config.accumulate)
    lines = []
    for after, metrics in loop.train(
        trainer, state, batches, known, KEY, STEPS, config.accumulate
    ):
        state = after
        # Whether the bias before a normalisation is in conflict is noise.
        lines.append(jax.device_get({**metrics, "conflict": 0.0}))
    assert_placed(spread, state)
    assert trainer.step._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]
    assert int(state.step) == STEPS * config.accumulate
    # Not the metrics in its state: of a bias before a normalisation they are noise.
    momentum = optax.tree.get(state.opt_state, "trace")
    kept = state.params, momentum, state.batch_stats
    return jax.device_get(kept), lines


def assert_placed(mesh, tree):
    for leaf in jax.tree.leaves(tree):
        expected = meshes.sharding_of(mesh, leaf.shape)
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), leaf.sharding


def assert_close(one, other, rtol):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=0.1 * rtol)


@pytest.mark.parametrize("name", METHODS_TRIED)
def test_a_mesh_has_the_results_of_one_device(name):
    one, lines = trained(name)
    many, others = trained(name, (("data", 2), ("fsdp", 2)))
    assert_close(one, many, rtol=1e-4)
    assert_close(lines, others, rtol=1e-4)


def test_parameters_moments_and_anchor_are_cut_alike():
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2})
    method = METHODS["l2_sp+dtnh"]
    config = Config(optimizer="adamw")
    trainer = loop.make_trainer(SOURCE, SOURCE.module(2), "l2_sp", config, 1, mesh=mesh)
    variables = loop.starting_variables(SOURCE, 2, 0, method)
    state = trainer.init(variables, method, STRENGTH)
    anchor = meshes.place(mesh, ORIGINAL["params"])
    moments = optax.tree.get(state.opt_state, "nu")
    for tree in (state.params, moments, anchor):
        mix = tree["mix"]["kernel"]  # [4, 6], the longer axis cut in two
        assert {shard.data.shape for shard in mix.addressable_shards} == {(4, 3)}
        kept = sum(shard.data.size for shard in mix.addressable_shards)
        assert kept == mesh.shape["data"] * mix.size  # fsdp keeps no copies
    heads = state.params["head"]["bias"], moments["head"]["bias"]
    assert heads[0].sharding == heads[1].sharding
    np.testing.assert_array_equal(
        anchor["mix"]["kernel"], ORIGINAL["params"]["mix"]["kernel"]
    )


def test_what_can_not_be_cut_is_whole_everywhere():
    mesh = meshes.make_mesh({"fsdp": 4})
    assert meshes.sharding_of(mesh, (7,)).is_fully_replicated
    assert meshes.sharding_of(mesh, ()).is_fully_replicated
    assert meshes.sharding_of(mesh, (0, 3)).is_fully_replicated
    assert meshes.sharding_of(mesh, (3, 4, 8)).spec == P(None, None, "fsdp")
    assert meshes.sharding_of(mesh, (8, 4)).spec == P("fsdp")


@pytest.mark.parametrize("sizes", [{}, {"data": 4}, {"data": 2, "fsdp": 4}])
def test_every_device_reads_its_rows_of_the_batch_of_one_device(sizes):
    mesh = meshes.make_mesh(sizes)
    ours = meshes.batches(mesh, blocks_of, BATCH)
    for step in (0, 1, 5):
        expected = blocks_of(BATCH)[step]
        batch = ours[step]
        for key in ("image", "label"):
            np.testing.assert_array_equal(batch[key], expected[key])
            shards = batch[key].addressable_shards
            assert len(shards) == mesh.size
            for shard in shards:
                assert len(shard.data) == BATCH // mesh.size
                np.testing.assert_array_equal(shard.data, expected[key][shard.index])


def test_parts_of_a_batch_are_averaged_before_conflicts_are_resolved():
    _, lines = trained("l2_sp+dtnh", accumulate=2)
    # The first step by hand, from the two parts' gradients.
    variables = loop.starting_variables(SOURCE, 2, 0, METHODS["l2_sp+dtnh"])
    params = jax.tree.map(lambda x: x + 0.01, variables["params"])

    @jax.jit
    def of_part(number, batch_stats, batch):
        def objective(params):
            logits, updated = SOURCE.module(2).apply(
                {"params": params, "batch_stats": batch_stats},
                SOURCE.preprocess(batch["image"]),
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.fold_in(KEY, number)},
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, batch["label"]
            )
            return losses.mean(), updated["batch_stats"]

        return jax.value_and_grad(objective, has_aux=True)(params)

    parts = blocks_of(BATCH // 2)
    (first, stats), g0 = of_part(0, variables["batch_stats"], parts[0])
    (second, _), g1 = of_part(1, stats, parts[1])
    np.testing.assert_allclose(lines[0]["loss"], (first + second) / 2, rtol=1e-5)
    g = jax.tree.map(lambda x, y: (x + y) / 2, g0, g1)
    pull = regularizers.l2_sp(ORIGINAL["params"], new=["head"])
    r = pull.gradient(params)
    norms = [optax.tree.norm(tree) for tree in (g, r)]
    cosine = optax.tree.vdot(g, r) / norms[0] / norms[1]
    np.testing.assert_allclose(lines[0]["cosine"], cosine, rtol=1e-4)
    np.testing.assert_allclose(lines[0]["loss_norm"], norms[0], rtol=1e-5)
    # Of the second step alone: its rate is that of a second update, not of a fourth.
    schedule = optax.cosine_decay_schedule(0.1, STEPS)
    rates = [float(line["learning_rate"]) for line in lines]
    np.testing.assert_allclose(rates, [schedule(n) for n in range(STEPS)], rtol=1e-6)


@pytest.mark.parametrize("name", ["fine-tuning", "l2_sp+dtnh"])
def test_parts_of_a_batch_on_a_mesh(name):
    one, lines = trained(name, accumulate=2)
    many, others = trained(name, (("data", 2), ("fsdp", 2)), accumulate=2)
    assert_close(one, many, rtol=1e-4)
    assert_close(lines, others, rtol=1e-4)


def test_half_precision_computes_so_and_keeps_single():
    single, lines = trained("feature_map+dtnh")
    half, others = trained("feature_map+dtnh", dtype="bfloat16")
    for leaf in jax.tree.leaves(half):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    losses = [[line["loss"] for line in each] for each in (lines, others)]
    np.testing.assert_allclose(*losses, rtol=0.02)
    assert losses[0] != losses[1]  # it is another precision
    assert_close(single[0], half[0], rtol=0.1)


def test_a_network_of_one_precision_is_refused():
    class Plain:
        pass

    plain = SOURCE._replace(module=lambda num_classes: Plain())
    with pytest.raises(ValueError, match="`--dtype` must be float32 for tiny"):
        network.in_dtype(plain, "bfloat16")


def test_what_is_computed_anew_is_the_same():
    kept, lines = trained("feature_map+dtnh")
    anew, others = trained("feature_map+dtnh", remat=True)
    assert_close(kept, anew, rtol=1e-5)
    assert_close(lines, others, rtol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"data": 16}, "at most 8 devices"), ({"data": 4, "fsdp": 4}, "data=4,fsdp=4")],
)
def test_a_mesh_of_more_devices_than_there_are_is_refused(sizes, message):
    with pytest.raises(ValueError, match=f"`--mesh` must take .*{message}"):
        meshes.make_mesh(sizes)
