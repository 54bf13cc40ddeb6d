"""The options of `dtnh matrix`."""

import dataclasses
import pathlib
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Photographs:
    """How a large pretrained network is fine-tuned on photographs."""

    steps: int = 36
    """Training steps of each cell."""
    batch_size: int = 64
    """Images in a training step."""
    image_size: int = 64
    """Height and width that photographs are resized to, in pixels."""
    train_per_class: int = 100
    """Training images of each class; every seed draws others."""
    validation_per_class: int = 100
    """Validation images of each class; the same for all seeds."""
    test_per_class: int = 300
    """Test images of each class; the same for all seeds."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures whether regularizers hurt: many small fine-tunings.

    Every cell of the grid is trained, validated and tested once, and written to the run
    folder. The learning rate of each source and target is chosen on validation images
    with plain fine-tuning. The same command goes on after an interruption, and other
    seeds, rules, sources and so on add cells to the same folder. Commands whose sources
    or targets differ may run at the same time.
    """

    sources: tuple[str, ...] = ("fashion", "mnist", "shuffled", "absurd")
    """Networks to start from; also imagenet (EfficientNet-Lite0), for elpv."""
    targets: tuple[str, ...] = ("digits-5", "digits-20", "fashion-20", "mnist-5")
    """Tasks to fine-tune on, named for their training images of each class; also elpv
    (photographs of solar cells), for imagenet, and digits-20-noisy and
    fashion-20-noisy, where four training labels in ten are wrong."""
    regularizers: tuple[str, ...] = ("l2_sp", "feature_map")
    """What pulls back to the source; also l1_sp, attention_transfer and
    logit_distillation."""
    strengths: tuple[float, ...] = (1e-4, 1e-2, 1.0, 1e2)
    """Multiples of each regularizer's usual strength."""
    rules: tuple[str, ...] = ("none", "sum", "dtnh", "never-hurt")
    """What becomes of conflicts. Plain fine-tuning, to which all is compared, always
    runs; `none` adds training from scratch."""
    optimizers: tuple[str, ...] = ("sgd",)
    """sgd (Nesterov momentum 0.9) or adamw."""
    seeds: int = 5
    """Repetitions, with other training images, head and order each."""
    steps: int = 150
    """Training steps of each cell."""
    batch_size: int = 32
    """Images in a training step."""
    source_steps: int = 1500
    """Training steps of each source, of 64 images."""
    widths: tuple[int, ...] = (16, 32, 64)
    """Channels of the network's three blocks."""
    validation_per_class: int = 30
    """Validation images of each class; the same for all seeds."""
    test_per_class: int = 100
    """Test images of each class; the same for all seeds."""
    photographs: Photographs = Photographs()
    split: Literal["validation", "test"] = "test"
    """Which accuracy the report is about: choose recipes by validation."""
    harm: bool = False
    """Afterwards train the same cells again, and look at what each step does."""
    report_only: bool = False
    """Make the report from the cells that are done, and train nothing."""
    run_dir: pathlib.Path = pathlib.Path("runs", "matrix")
    """Folder for results."""
    data_dir: pathlib.Path | None = None
    """Folder for sources and data. By default DTNH_DATA_DIR, or the user's cache."""
