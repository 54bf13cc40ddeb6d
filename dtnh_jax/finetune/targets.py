"""What can be fine-tuned on: classification tasks that are read by index."""

import dataclasses
import io
import os
import pathlib
from collections.abc import Callable
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int
from PIL import Image

from dtnh_jax.finetune import elpv

# Letters of shapes: n examples, h by w pixels of c channels.


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A classification task, not yet split, resized or in memory.

    Attributes:
      name: what `load_target` knows it by.
      licence: one line to print wherever the data is used.
      class_names: the name of each label, in the order of labels.
      examples: read by index; gives `{"image": uint8 [h, w, c], "label": int}`, with
        1 or 3 channels. Sizes may differ from one example to the next.
      labels: the label of every example, so that `split` decodes no image.
    """

    name: str
    licence: str
    class_names: tuple[str, ...]
    examples: grain.sources.RandomAccessDataSource
    labels: Int[np.ndarray, " n"]


def load_target(name: str, *, data_dir: str | os.PathLike[str] | None = None) -> Target:
    """Opens a target, and prepares it on disk the first time.

    Args:
      name: one of `TARGETS`.
      data_dir: directory of prepared data sets. By default the environment variable
        `DTNH_DATA_DIR`, and without it `dtnh_jax` in the user's cache directory
        (`XDG_CACHE_HOME`, or `~/.cache`).

    Returns:
      The target.

    Raises:
      ValueError: `name` is unknown.
      TargetUnavailableError: a package that the target is read from is missing.
    """
    if name not in TARGETS:
        known = ", ".join(repr(known) for known in TARGETS)
        raise ValueError(f"`name` must be one of {known}, got {name!r}.")
    directory = default_data_dir() if data_dir is None else pathlib.Path(data_dir)
    return TARGETS[name](directory.expanduser())


def default_data_dir() -> pathlib.Path:
    """Returns where targets are prepared unless the caller says otherwise."""
    if chosen := os.environ.get("DTNH_DATA_DIR"):
        return pathlib.Path(chosen)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dtnh_jax"


def _load_elpv(data_dir: pathlib.Path) -> Target:
    """Returns ELPV: is this solar cell functional or defective?"""
    builder = elpv.prepare(data_dir)
    # TFDS wraps the method in a way that pyright reads as taking no arguments.
    stored = builder.as_data_source(
        split="train",  # pyright: ignore[reportCallIssue]
        decoders={"image": tfds.decode.SkipDecoding()},
    )
    return Target(
        name="elpv",
        licence=elpv.LICENCE,
        class_names=elpv.CLASS_NAMES,
        examples=grain.MapDataset.source(stored).map(_decode),
        labels=np.array([example["label"] for example in stored]),
    )


def _decode(example: dict[str, Any]) -> dict[str, Any]:
    """Returns an example of TFDS with its image decoded.

    TFDS would do it, with OpenCV where that is installed, and log that it should be
    where it is not. PIL gives everybody the same pixels.
    """
    with Image.open(io.BytesIO(example["image"])) as image:
        pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return {"image": pixels, "label": example["label"]}


# A new target is a function of the directory for prepared data, and a row here.
TARGETS: dict[str, Callable[[pathlib.Path], Target]] = {"elpv": _load_elpv}
