"""ResNets: torchvision's names and shapes, and its logits from the same tensors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_resnet

from dtnh_jax.finetune.models.resnet import (
    DEPTHS,
    Depth,
    ResNet,
    feature_layers,
    standardize,
    torch_name,
)
from dtnh_jax.finetune.weights.tensor_names import named_variables, variable_shapes
from dtnh_jax.linen import capture_features

# As published: parameters, and entries of a state dictionary.
PUBLISHED = {
    "resnet18": ((2, 2, 2, 2), False, 11_689_512, 122),
    "resnet34": ((3, 4, 6, 3), False, 21_797_672, 218),
    "resnet50": ((3, 4, 6, 3), True, 25_557_032, 320),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_those_of_torchvision(name):
    blocks, is_bottleneck, parameters, entries = PUBLISHED[name]
    table = torch_resnet.shapes(blocks, is_bottleneck)
    assert len(table) == entries
    trained = ("running_mean", "running_var", "num_batches_tracked")
    sizes = [np.prod(s) for n, s in table.items() if not n.endswith(trained)]
    assert sum(sizes) == parameters

    ours = variable_shapes(ResNet(1000, DEPTHS[name]))
    by_name = {torch_name(path): leaf.shape for path, leaf in ours.items()}
    assert len(by_name) == len(ours)
    expected = {n: _linen_shape(s) for n, s in table.items() if "num_batches" not in n}
    assert by_name == expected


def _linen_shape(shape):
    """Returns the shape with outputs last."""
    return (*shape[2:], *shape[1::-1]) if len(shape) > 1 else shape


@pytest.mark.parametrize(
    "depth",
    [DEPTHS["resnet18"], Depth((1, 2, 1, 1), is_bottleneck=True)],
    ids=["resnet18", "bottlenecks"],
)
def test_logits_are_those_of_the_layers_of_torch(depth):
    tensors = torch_resnet.draw(depth.blocks, depth.is_bottleneck, classes=5)
    # A size whose halves are odd and even: wrong padding would show at each stride.
    images = np.random.default_rng(1).normal(size=(2, 3, 44, 37))
    expected = torch_resnet.logits(tensors, images, depth.blocks, depth.is_bottleneck)
    network = ResNet(5, depth)
    variables = named_variables(tensors, network, torch_name, "the test")
    run = jax.jit(lambda v, x: network.apply(v, x, train=False))
    got = run(variables, jnp.asarray(images.transpose(0, 2, 3, 1), jnp.float32))
    scale = np.abs(expected).max()
    assert np.abs(expected).min() < scale / 2  # not all alike
    np.testing.assert_allclose(got, expected, atol=2e-5 * scale)


def test_training_updates_statistics_and_the_features_are_found():
    depth = Depth((1, 1, 1, 1), is_bottleneck=False)
    network = ResNet(3, depth)
    tensors = torch_resnet.draw(depth.blocks, depth.is_bottleneck, classes=3)
    variables = named_variables(tensors, network, torch_name, "the test")
    layers = [*feature_layers(depth), "pooled"]
    assert layers[:2] == ["stage_1_block_1", "stage_2_block_1"]
    images = jnp.ones((2, 32, 32, 3))
    apply = capture_features(network, layers)
    (_, updated), found = jax.jit(
        lambda v: apply(v, images, train=True, mutable=["batch_stats"])
    )(variables)
    assert found["stage_2_block_1"].shape == (2, 4, 4, 128)
    assert found["pooled"].shape == (2, 512)
    before = variables["batch_stats"]["stem_norm"]["mean"]
    after = updated["batch_stats"]["stem_norm"]["mean"]
    assert not np.allclose(before, after)


def test_it_computes_in_half_precision():
    network = ResNet(3, DEPTHS["resnet50"], dtype=jnp.bfloat16)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    run = functools.partial(network.init_with_output, train=False)
    logits, variables = jax.eval_shape(run, jax.random.key(0), images)
    assert logits.dtype == jnp.bfloat16
    dtypes = {x.dtype for x in jax.tree.leaves(variables["params"])}
    assert dtypes == {jnp.dtype("float32")}


def test_images_are_standardized_by_channel():
    grey = jnp.full((1, 1, 1, 3), 255, jnp.uint8)
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    np.testing.assert_allclose(standardize(grey).reshape(3), expected, rtol=1e-6)
