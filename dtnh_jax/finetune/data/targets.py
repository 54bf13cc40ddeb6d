"""The targets: classification tasks that are read by index."""

import contextlib
import io
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds

from dtnh_jax.finetune import directories
from dtnh_jax.finetune.config import OF_ELPV
from dtnh_jax.finetune.data import elpv, loading
from dtnh_jax.finetune.data.class_folders import load_folder
from dtnh_jax.finetune.data.pictures import UnreadableError, read_picture
from dtnh_jax.finetune.data.target import Splits, Target
from dtnh_jax.finetune.data.tfds_target import load_tfds


def load_target(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    outputs: Sequence[pathlib.Path] = (),
) -> Target:
    """Opens a target, and prepares it on disk the first time.

    Args:
      name: one of `TARGETS`, `folder:PATH` (see `load_folder`), or `tfds:NAME` (see
        `load_tfds`).
      data_dir: directory of prepared data sets. By default the environment variable
        `DTNH_DATA_DIR`, or else `dtnh_jax` in the user's cache directory
        (`XDG_CACHE_HOME`, or `~/.cache`).
      outputs: folders for results. Within a folder of pictures they are not classes,
        and neither is `data_dir`.

    Returns:
      The target.

    Raises:
      ValueError: `name` is unknown, or it is no set of pictures in classes.
      TargetUnavailableError: a package that the target needs is missing.
    """
    if not is_target(name):
        known = ", ".join(repr(known) for known in (*TARGETS, *FAMILIES))
        raise ValueError(f"`name` must be one of {known}, got {name!r}.")
    if name in TARGETS:
        return TARGETS[name](directories.data_dir(data_dir))
    family, member = _family(name)
    return FAMILIES[family](member, _Places(data_dir, outputs))


class _Places(NamedTuple):
    """The folders that are written."""

    data_dir: str | os.PathLike[str] | None
    outputs: Sequence[pathlib.Path]

    def written(self) -> list[pathlib.Path]:
        """All of these folders."""
        with contextlib.suppress(ValueError):  # without a home nothing is cached
            return [*self.outputs, directories.data_dir(self.data_dir)]
        return [*self.outputs]


def is_target(name: str) -> bool:
    """Returns whether `load_target` accepts a name, without opening it."""
    return name in TARGETS or _family(name)[0] in FAMILIES


def _family(name: str) -> tuple[str, str]:
    """Splits a name into its key of `FAMILIES`, or "", and the rest."""
    family, _, member = name.partition(":")
    known = (key for key in FAMILIES if member and key.startswith(f"{family}:"))
    return next(known, ""), member


def _load_elpv(data_dir: pathlib.Path) -> Target:
    """Returns the target ELPV: functional and defective solar cells."""
    stored, probability = _read_elpv(data_dir, "certain")
    return Target(
        name="elpv",
        licence=elpv.LICENCE,
        class_names=elpv.CLASS_NAMES,
        examples=grain.MapDataset.source(stored).map_with_index(_decode),
        labels=probability.astype(int),
    )


def _load_doubtful_elpv(data_dir: pathlib.Path) -> Target:
    """Returns ELPV, trained on the cells that its experts doubted as well.

    A probability of 1/3 counts as functional there and one of 2/3 as defective.
    Validation and test pictures are those of `elpv`.
    """
    stored, probability = _read_elpv(data_dir, "all")
    labels = (probability > 0.5).astype(int)
    certain = np.flatnonzero((probability == 0) | (probability == 1))
    kept = {name: OF_ELPV[name] for name in ("validation_per_class", "test_per_class")}
    rarest = int(np.bincount(labels[certain]).min())
    own = loading.split(
        labels[certain], seed=0, train_per_class=rarest - sum(kept.values()), **kept
    )
    validation, test = certain[own.validation], certain[own.test]
    rest = np.setdiff1d(np.arange(len(labels)), np.concatenate([validation, test]))
    share = 100 * np.mean(~np.isin(rest, certain))
    return Target(
        name="elpv-doubtful",
        licence=elpv.LICENCE,
        class_names=elpv.CLASS_NAMES,
        examples=grain.MapDataset.source(stored).map_with_index(
            lambda index, example: (
                _decode(index, example) | {"label": int(labels[index])}
            )
        ),
        labels=labels,
        splits=Splits(rest, validation, test),
        notes=(
            f"{share:.0f}% of the pictures for training have labels that the experts "
            "doubted; none of those for validation and testing have.",
        ),
    )


def _read_elpv(data_dir: pathlib.Path, config: str) -> tuple[Any, np.ndarray]:
    """Returns the stored photographs, not decoded, and how likely each is defective."""
    try:
        builder = elpv.prepare(data_dir, config)
        # TFDS wraps the method in a way that pyright reads as taking no arguments.
        stored = builder.as_data_source(
            split="train",  # pyright: ignore[reportCallIssue]
            decoders={"image": tfds.decode.SkipDecoding()},
        )
        probability = [float(example["probability"]) for example in stored]
    except elpv.TargetUnavailableError:
        raise
    except Exception as error:  # TFDS and readers of damaged files raise any exception
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"The target 'elpv' can not be prepared in, or read from, {data_dir}: "
            f"{cause:.300}. If {data_dir / 'elpv'} is damaged, delete it."
        ) from error
    return stored, np.array(probability)


def _decode(index: int, example: dict[str, Any]) -> dict[str, Any]:
    """Returns an example of TFDS with its image decoded.

    TFDS would decode with OpenCV if that is installed, and log a message if not. PIL
    always gives the same pixels.
    """
    try:
        pixels = read_picture(io.BytesIO(example["image"]))
    except Exception as error:  # readers of damaged files raise any exception
        damaged = f"picture {index} of elpv can not be read: {error}"
        raise UnreadableError(damaged) from error
    return {"image": pixels, "label": example["label"]}


# A new target is a function of the directory for prepared data, and a row here.
TARGETS: dict[str, Callable[[pathlib.Path], Target]] = {
    "elpv": _load_elpv,
    "elpv-doubtful": _load_doubtful_elpv,
}
# Each function opens the target that is named after the colon.
FAMILIES: dict[str, Callable[[str, _Places], Target]] = {
    "folder:PATH": lambda path, places: load_folder(path, places.written()),
    "tfds:NAME": lambda name, places: load_tfds(
        name, directories.data_dir(places.data_dir)
    ),
}
