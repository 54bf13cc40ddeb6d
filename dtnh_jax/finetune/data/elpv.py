"""Photographs of solar cells, working or broken: a TFDS builder over a PyPI package.

The package `elpv-dataset` carries the photographs themselves, so nothing here
downloads anything, and nothing here imports TensorFlow.
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
_NO_LABEL = -1  # how TFDS writes that an example has no class

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
    """A target is known, but what it is read from is not installed."""


# Not registered by name: nothing looks it up, and a reload of this module would fail.
class Elpv(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The ELPV data set.

    Config `certain` holds the 2,223 cells whose probability is 0 (functional) or 1
    (defective). Config `all` adds the 401 that the experts doubted, with label -1:
    to call them either would be our opinion, and nobody's measurement.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "As in elpv-dataset 1.0.0."}
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(name="certain", description="Probability 0 or 1."),
        tfds.core.BuilderConfig(name="all", description="Every photograph."),
    ]

    # Where TFDS would look for checksums of downloads. Left to itself it searches with
    # the package importlib_resources, which it does not declare: often it is missing.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        """Returns what TFDS shows and stores next to the records."""
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
            # Keep the order of the table: an index then names the same photograph
            # under every version of TFDS, whose shuffle is its own affair.
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
        """Yields the row number in the table and the example, for the rows wanted."""
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
    """Writes the records under `data_dir` (77 MB, two seconds), unless they are there.

    TFDS writes into a directory of another name and renames it at the end, so what
    an interrupted call leaves behind is never read.

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
        _package_data()  # before TFDS makes directories and adds lines to the error
        try:
            with _quiet():
                elpv.download_and_prepare()
        except OSError:
            # The rename fails where another process, such as the run of another
            # seed, was faster. Its records are as good as ours.
            if not elpv.data_path.exists():
                raise
        elpv = builder()  # reads what is there, whoever wrote it
    return elpv


def _package_data() -> Traversable:
    """Returns the directory with the table and the photographs."""
    try:
        return importlib.resources.files("elpv_dataset") / "data"
    except ModuleNotFoundError as error:
        raise TargetUnavailableError(
            "The target 'elpv' is read from the package elpv-dataset, which is not "
            "installed. Cure: pip install elpv-dataset"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from printing and drawing bars; leaves warnings and logs alone."""
    # The switch has a public setter and no getter.
    had_bars = getattr(tqdm_utils, "_active", True)
    tfds.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(had_bars)
