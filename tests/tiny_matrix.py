"""A grid so small that its cells take nothing, and images written on the spot."""

import contextlib
import gzip
import struct

import jax
import numpy as np
import pytest
import tiny_network

from dtnh_jax.finetune.weights import sources as published
from dtnh_jax.studies.matrix import catalogue, images
from dtnh_jax.studies.matrix.config import Config, Photographs

PER_CLASS = 27
TINY = Config(
    sources=("fashion",),
    targets=("fashion-20", "digits-5"),
    regularizers=("feature_map",),
    strengths=(0.01, 100.0),
    rules=("none", "sum"),
    seeds=2,
    steps=3,
    batch_size=4,
    source_steps=2,
    widths=(2, 3, 4),
    validation_per_class=2,
    test_per_class=3,
    photographs=Photographs(
        steps=2,
        batch_size=4,
        image_size=16,
        train_per_class=5,
        validation_per_class=2,
        test_per_class=3,
    ),
)


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def write_fashion(directory, prefix):
    """Images of which no two are the same, even when they are made smaller."""
    numbers = np.arange(10 * PER_CLASS)
    pixels = np.zeros((len(numbers), 28, 28), np.uint8)
    pixels[:, :, :14] = (numbers % 16 * 16)[:, None, None]
    pixels[:, :, 14:] = (numbers // 16 * 12)[:, None, None]
    write_idx(directory / f"{prefix}-images-idx3-ubyte.gz", pixels)
    write_idx(directory / f"{prefix}-labels-idx1-ubyte.gz", numbers % 10)


@contextlib.contextmanager
def fashion(directory):
    """Has Fashion-MNIST in a directory, and no network take long to compile."""
    for prefix in ("train", "t10k"):
        write_fashion(directory, prefix)
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "FASHION_DIRECTORY", directory)
        images.load_images.cache_clear()
        yield
    images.load_images.cache_clear()
    jax.config.update("jax_disable_most_optimizations", before)


@contextlib.contextmanager
def imagenet():
    """Has a network of five layers stand for the one that learned ImageNet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(published.SOURCES, "tiny", tiny_network.TINY)
        patch.setitem(catalogue.SOURCES_OF_PHOTOGRAPHS, "imagenet", "tiny")
        yield
