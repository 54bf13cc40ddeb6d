"""A TFDS builder for ELPV, photographs of solar cells, from a PyPI package.

The package `elpv-dataset` contains the photographs, so this module downloads nothing.
It does not import TensorFlow.
"""

import contextlib
import importlib.resources
import io
import os
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import tqdm_utils

LICENCE = (
    "CC BY-NC-SA 4.0: not for commercial use, "
    "https://creativecommons.org/licenses/by-nc-sa/4.0"
)
CLASS_NAMES = ("functional", "defective")
_NO_LABEL = -1  # TFDS's label of an example without a class

_DESCRIPTION = """
2,624 electroluminescence photographs, 300x300 and grey, of the cells of 44 solar
modules. Experts gave each cell a probability of being defective: 0, 1/3, 2/3 or 1.
The publishers define no test set: all examples are in the split `train`, in the
order of the published table.
"""
_CITATION = """
@inproceedings{Buerhop2018,
  author = {Buerhop-Lutz, Claudia and Deitsch, Sergiu and Maier, Andreas and
            Gallwitz, Florian and Berger, Stephan and Doll, Bernd and Hauch, Jens and
            Camus, Christian and Brabec, Christoph J.},
  title = {A Benchmark for Visual Identification of Defective Solar Cells in
           Electroluminescence Imagery},
  booktitle = {European PV Solar Energy Conference and Exhibition (EU PVSEC)},
  year = {2018},
  doi = {10.4229/35thEUPVSEC20182018-5CV.3.15},
}
@article{Deitsch2019,
  author = {Deitsch, Sergiu and Christlein, Vincent and Berger, Stephan and
            Buerhop-Lutz, Claudia and Maier, Andreas and Gallwitz, Florian and
            Riess, Christian},
  title = {Automatic classification of defective photovoltaic module cells in
           electroluminescence images},
  journal = {Solar Energy},
  volume = {185},
  pages = {455--468},
  year = {2019},
  doi = {10.1016/j.solener.2019.02.067},
}
"""


class TargetUnavailableError(ValueError):
    """A package from which a target is read is missing."""


# Not registered by name: nothing looks it up, and a reload of this module would fail.
class Elpv(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The ELPV data set.

    Config `certain` holds the 2,223 cells whose probability is 0 (functional) or 1
    (defective). Config `all` adds the 401 other cells, about which the experts were
    uncertain, with label -1.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "As in elpv-dataset 1.0.0."}
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(name="certain", description="Probability 0 or 1."),
        tfds.core.BuilderConfig(name="all", description="Every photograph."),
    ]

    # Folder of TFDS's checksums. Without it, TFDS searches with importlib_resources, a
    # package that it does not declare and that is often missing.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        """Returns the metadata that TFDS stores beside the records."""
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            citation=_CITATION,
            license=LICENCE,
            homepage="https://github.com/zae-bayern/elpv-dataset",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(300, 300, 1), encoding_format="png"
                    ),
                    "label": tfds.features.ClassLabel(names=list(CLASS_NAMES)),
                    "probability": tfds.features.Scalar(np.float32),
                    "cell_type": tfds.features.ClassLabel(names=["mono", "poly"]),
                }
            ),
            supervised_keys=("image", "label"),
            # Keep the order of the table, so that an index means the same photograph
            # under every version of TFDS, whatever its shuffle.
            disable_shuffling=True,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        """Returns the one split."""
        del dl_manager  # nothing to download
        return {"train": self._generate_examples(_package_data())}

    def _generate_examples(
        self, data: Traversable
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields row number and example, for the rows of the config."""
        wants_doubtful = self.builder_config_name == "all"
        table = (data / "labels.csv").read_text(encoding="utf-8")
        for row, line in enumerate(table.splitlines()):
            path, probability, cell_type = line.split()
            probability = float(probability)
            certain = probability in (0.0, 1.0)
            if certain or wants_doubtful:
                yield (
                    row,
                    {
                        # Bytes: TFDS would call TensorFlow to encode an array.
                        "image": data.joinpath(*path.split("/")).read_bytes(),
                        "label": int(probability) if certain else _NO_LABEL,
                        "probability": probability,
                        "cell_type": cell_type,
                    },
                )


def prepare(data_dir: str | os.PathLike[str], config: str = "certain") -> Elpv:
    """Writes the records under `data_dir` (77 MB, two seconds), unless they exist.

    TFDS writes to a temporary directory and renames it at the end, so the remains of an
    interrupted call are never read.

    Args:
      data_dir: directory that holds prepared data sets; made if missing.
      config: `"certain"` or `"all"`, see `Elpv`.

    Returns:
      A builder to read from, with `as_data_source(split="train")`.

    Raises:
      TargetUnavailableError: nothing is prepared yet and `elpv-dataset` is missing.
    """

    def builder() -> Elpv:
        return Elpv(data_dir=data_dir, config=config, file_format="array_record")

    elpv = builder()
    if not elpv.data_path.exists():
        _package_data()  # before TFDS makes directories and extends the error
        try:
            with _quiet():
                elpv.download_and_prepare()
        except OSError:
            # The rename fails if another process, such as the run of another seed, was
            # faster. Its records are equal.
            if not elpv.data_path.exists():
                raise
        elpv = builder()  # reads the existing records
    return elpv


def _package_data() -> Traversable:
    """Returns the directory with the table and the photographs."""
    try:
        return importlib.resources.files("elpv_dataset") / "data"
    except ModuleNotFoundError as error:
        raise TargetUnavailableError(
            "The target 'elpv' needs the package elpv-dataset, which is not installed: "
            "pip install elpv-dataset"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences TFDS's prints and progress bars, but not warnings and logs."""
    # The switch has a public setter and no getter.
    had_bars = getattr(tqdm_utils, "_active", True)
    tfds.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(had_bars)
