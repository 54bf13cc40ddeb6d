"""Image classification sets of TensorFlow Datasets, without TensorFlow.

`--target tfds:NAME`, `tfds:NAME/CONFIG` or `tfds:NAME:VERSION` reads a set from the
data directory; if it is missing, TFDS downloads and prepares it there.
"""

import contextlib
import importlib.util
import io
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.features import image_feature

from dtnh_jax.finetune.data.elpv import TargetUnavailableError
from dtnh_jax.finetune.data.pictures import UnreadableError, read_picture
from dtnh_jax.finetune.data.survey import survey
from dtnh_jax.finetune.data.target import Target, published_splits

_SPLITS = ("train", "validation", "test")


def load_tfds(name: str, data_dir: pathlib.Path) -> Target:
    """Opens a set of TFDS, and prepares it the first time.

    Args:
      name: name for `tfds.builder`: that of the set, optionally with `/` and a config
        (by default the first) and `:` and a version (by default the latest).
      data_dir: folder of prepared sets, in the format array_record.

    Returns:
      The target. Its splits are TFDS's train, validation and test. Examples without a
      label, as in the test sets of competitions, are left out.

    Raises:
      ValueError: there is no such set, or it is not for image classification.
      TargetUnavailableError: the set can not be downloaded or read here.
    """
    builder = _builder(name, data_dir)
    image_key, label_key = _keys(name, builder.info)
    builder = _prepared(name, builder, data_dir)
    if "train" not in builder.info.splits:
        known = ", ".join(builder.info.splits)
        raise ValueError(f"`tfds:{name}` must have a split train, got {known}.")
    if not np.issubdtype(_features(builder.info)[image_key].np_dtype, np.integer):
        raise ValueError(
            f"`tfds:{name}` must have pictures of integers, got {image_key} of floats, "
            "which TFDS stores in another way."
        )
    try:
        sources = {
            split: _source(name, builder, split, image_key)
            for split in _SPLITS
            if split in builder.info.splits
        }
        labelled = [  # of the examples with a label: split, index in it, label
            (split, index, label)
            for split, source in sources.items()
            for index, label in enumerate(_labels(source, label_key))
            if label >= 0
        ]
        seen = survey(
            (sources[split][index][image_key] for split, index, _ in labelled),
            [f"{split}[{index}]" for split, index, _ in labelled],
            what="pictures",
        )
    except TargetUnavailableError:
        raise
    except Exception as error:  # readers of damaged records raise any exception
        raise _unreadable(name, builder.data_path, error) from error
    rows = [labelled[i] for i in seen.good]
    splits, notes = published_splits(
        *(
            np.array([i for i, row in enumerate(rows) if row[0] == s], int)
            for s in _SPLITS
        )
    )

    def read(index: int) -> dict[str, Any]:
        split, row, label = rows[index]
        try:
            encoded = sources[split][row][image_key]
            picture = read_picture(io.BytesIO(encoded), seen.white)
        except Exception as error:
            gone = f"{split}[{row}] of `tfds:{name}` can not be read any more: {error}"
            raise UnreadableError(gone) from error
        return {"image": picture, "label": label}

    info, features = builder.info, _features(builder.info)
    stated = info.redistribution_info.license.strip().split("\n")[0]
    return Target(
        name=f"tfds:{name}",
        licence=stated or f"not stated by TFDS, see {info.homepage}",
        class_names=tuple(features[label_key].names),
        examples=grain.MapDataset.range(len(rows)).map(read),
        labels=np.array([label for *_, label in rows], int),
        splits=splits,
        notes=(*seen.notes, *notes),
        digest=seen.digest,
        white=seen.white,
    )


def _builder(name: str, data_dir: pathlib.Path) -> tfds.core.DatasetBuilder:
    try:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:  # whose message lists all sets
        raise ValueError(
            f"`tfds:{name}` is neither known to TFDS nor prepared in {data_dir}: see "
            "https://www.tensorflow.org/datasets/catalog"
        ) from error
    except ImportError:
        raise  # the command says what to install
    except Exception as error:  # unknown config or version, damaged files
        raise ValueError(f"`tfds:{name}` can not be opened: {_cause(error)}") from error


def _keys(name: str, info: tfds.core.DatasetInfo) -> tuple[str, str]:
    """Returns the keys of the picture and its class."""
    features = _features(info)
    images = [k for k, v in features.items() if type(v) is tfds.features.Image]
    classes = [k for k, v in features.items() if type(v) is tfds.features.ClassLabel]
    match info.supervised_keys:
        case (str(image), str(label)) if image in images and label in classes:
            return image, label
    if len(images) == len(classes) == 1:
        return images[0], classes[0]
    found = [f"{key} ({type(value).__name__})" for key, value in features.items()]
    raise ValueError(
        f"`tfds:{name}` must have one picture (Image) and one class (ClassLabel) in an "
        f"example, got {', '.join(found) or 'none'}."
    )


def _features(info: tfds.core.DatasetInfo) -> dict[str, Any]:
    """Returns the features of an example; none if it is no dictionary."""
    features: Any = info.features
    return dict(features.items()) if hasattr(features, "items") else {}


def _prepared(
    name: str, builder: tfds.core.DatasetBuilder, data_dir: pathlib.Path
) -> tfds.core.DatasetBuilder:
    """Returns a builder that can be read, after a download if needed."""
    if not builder.data_path.exists():
        try:
            with _encoding_by_pil():
                builder.download_and_prepare()
        except Exception as error:  # network, disk, checksums, packages, licences
            raise TargetUnavailableError(
                f"`tfds:{name}` can not be prepared in {data_dir}: {_cause(error)}. "
                "Prepare it on a machine where TFDS can, with "
                "`file_format='array_record'`, and pass that folder as `--data-dir`."
            ) from error
        builder = _builder(name, data_dir)
    return builder


def _source(
    name: str, builder: tfds.core.DatasetBuilder, split: str, image_key: str
) -> Sequence[dict[str, Any]]:
    """Returns the examples of a split, with encoded pictures."""
    try:
        # TFDS wraps the method in a way that pyright reads as taking no arguments.
        return builder.as_data_source(
            split=split,  # pyright: ignore[reportCallIssue]
            decoders={image_key: tfds.decode.SkipDecoding()},
        )
    except NotImplementedError as error:
        raise TargetUnavailableError(
            f"`tfds:{name}` is prepared in {builder.data_path} in a format that can "
            "not be read by index: set another `--data-dir`, or prepare it with "
            "`file_format='array_record'`."
        ) from error


def _unreadable(name: str, path: Any, error: Exception) -> TargetUnavailableError:
    return TargetUnavailableError(
        f"`tfds:{name}` can not be read from {path}: {_cause(error)}. Delete that "
        "folder to prepare it again."
    )


def _cause(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def _labels(source: Sequence[dict[str, Any]], label_key: str) -> Iterator[int]:
    for index in range(len(source)):
        yield int(source[index][label_key])


@contextlib.contextmanager
def _encoding_by_pil() -> Iterator[None]:
    """Makes TFDS encode arrays with PIL instead of TensorFlow, which is missing.

    PNG is lossless either way. Most sets consist of files and are not encoded at all.
    """
    if importlib.util.find_spec("tensorflow"):
        yield
        return

    def encode(encoder: Any, array: np.ndarray) -> bytes:
        grey = array[..., 0] if array.shape[-1] == 1 else array
        return encoder._encode_pil_image(Image.fromarray(grey))

    encoder, original = image_feature._ImageEncoder, "_encode_image"
    kept = getattr(encoder, original)
    setattr(encoder, original, encode)
    try:
        yield
    finally:
        setattr(encoder, original, kept)
