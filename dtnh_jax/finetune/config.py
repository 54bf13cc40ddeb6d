"""The options of a run, and values derived from them."""

import dataclasses
import hashlib
import json
import math
import pathlib
import re
from typing import Any, Literal

from dtnh_jax.finetune.directories import expanded
from dtnh_jax.finetune.methods import (
    ADDED,
    DEFAULT_METHODS,
    DEFAULT_STRENGTH,
    METHODS,
    RULES,
)
from dtnh_jax.finetune.option_types import Mesh, Strengths
from dtnh_jax.finetune.regularizers import REGULARIZERS

_DEFAULT_STEPS, _DEFAULT_EPOCHS = 36, 12
# For a target whose pictures are known; `splitting.sizes` counts those of the others.
OF_ELPV = {
    "train_per_class": 50,
    "validation_per_class": 100,
    "test_per_class": 300,
}
_OF_TARGET = {"elpv": OF_ELPV, "elpv-doubtful": OF_ELPV}
_DEFAULT_RATES = {"sgd": 0.01, "adamw": 0.001}
# Options for files and devices. They change results only by rounding, so a run may
# resume with other values of them.
_OF_NO_CONSEQUENCE = (
    "run_dir",
    "data_dir",
    "checkpoint_every",
    "keep_weights",
    "mesh",
    "remat",
    "distributed",
    "coordinator",
    "processes",
    "process_id",
    "heartbeat",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Fine-tunes a pretrained network on photographs, with and without DTNH.

    Trains every method with every seed, and tests each once after its training. Writes
    the report, its figures and all numbers to the run folder. Run the same command
    again to resume after an interruption.
    """

    source: str = "efficientnet-lite0"
    """Pretrained network: efficientnet-lite0 or efficientnet-lite1 (ImageNet);
    ARCHITECTURE:FILE for your own weights, such as resnet50:weights.safetensors; or
    MODULE:FUNCTION for your own network."""
    target: str = "elpv"
    """Target task: elpv (solar cells, functional or defective), or elpv-doubtful (the
    same, with cells of doubtful labels in the training set); folder:PATH for your own
    pictures, with a folder for each class; tfds:NAME for a data set of TensorFlow
    Datasets."""
    methods: tuple[str, ...] = DEFAULT_METHODS
    """Methods to compare: REGULARIZER adds the gradients, REGULARIZER+dtnh resolves
    conflicts, REGULARIZER+never_hurt cross-validates its trust; or `all`."""
    strength: Strengths = dataclasses.field(default_factory=dict)
    """Strengths that replace the defaults, such as l2_sp=0.1. Without --methods,
    --strength and --tune, l2_sp has a hundred times its usual strength."""
    tune: bool = False
    """First choose every strength that is not given by --strength, by validation
    accuracy."""
    scope: Literal["global", "leaf", "unit", "element"] = "global"
    """Resolve conflicts over all parameters together, or for each tensor, output
    channel or number."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum 0.9, or AdamW."""
    learning_rate: float | None = None
    """Initial learning rate, which falls to 0 along a cosine. By default 0.01 for sgd
    and 0.001 for adamw."""
    steps: int | None = None
    """Training steps of each method and seed. By default 36 for elpv, and otherwise 12
    passes over the training images, but at least 36 steps."""
    epochs: float | None = None
    """Passes over the training images, instead of --steps."""
    batch_size: int = 32
    """Images in a training step."""
    image_size: int = 64
    """Height and width of the resized photographs, in pixels."""
    train_per_class: int | None = None
    """Training images of each class; every seed draws other images if there are enough.
    By default 50, or the remaining images of the rarest class."""
    validation_per_class: int | None = None
    """Validation images of each class for --tune, the same for all seeds. By default
    100 for elpv; otherwise, with --tune, a sixth of the rarest class, at most 100."""
    test_per_class: int | None = None
    """Test images of each class, the same for all seeds. By default 300 for elpv;
    otherwise a third of the rarest class or its test split, at most 300."""
    cache_teacher: bool = True
    """Store the teacher's features of training images instead of recomputing them."""
    seeds: int = 2
    """Repetitions, each with other training images, head, order and dropout."""
    tuning_seeds: int | None = None
    """Repetitions for --tune. By default as many as --seeds."""
    checkpoint_every: int = 25
    """Steps between checkpoints, from which an interrupted run resumes."""
    mesh: Mesh = dataclasses.field(default_factory=dict)
    """Device mesh: batches are sharded over data and fsdp, weights over fsdp. One
    device by default, or all devices with --distributed."""
    accumulate: int = 1
    """Micro-batches of a batch: their gradients are averaged, then resolved."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of networks; parameters and gradients are float32."""
    remat: bool = False
    """Recompute cheap operations in the backward pass to save memory."""
    distributed: bool = False
    """Train with several processes; JAX detects them on clusters that it knows."""
    coordinator: str | None = None
    """Address of the first process and a free port, if JAX can not detect them."""
    processes: int | None = None
    """Number of processes, if JAX can not detect it."""
    process_id: int | None = None
    """Number of this process, from 0, if JAX can not detect it."""
    heartbeat: int = 100
    """Seconds without a signal after which another process counts as lost."""
    keep_weights: bool = True
    """Keep the fine-tuned networks in the run folder, for export and prediction."""
    run_dir: pathlib.Path | None = None
    """Folder for results. By default runs/default, or a folder named after options."""
    data_dir: pathlib.Path | None = None
    """Folder for prepared data. By default DTNH_DATA_DIR, or the user's cache."""

    def __post_init__(self):
        if tuple(self.methods) == ("all",):
            object.__setattr__(self, "methods", tuple(METHODS))
        is_open = not self.strength and not self.tune
        if is_open and tuple(self.methods) == DEFAULT_METHODS:
            object.__setattr__(self, "strength", dict(DEFAULT_STRENGTH))
        for name, number in _OF_TARGET.get(self.target, {}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, number)

    @property
    def strengths(self) -> dict[str, float]:
        """Strength of every regularizer in use, before tuning."""
        return {
            name: float(self.strength.get(name, REGULARIZERS[name].strength))
            for name in self.regularizers
        }

    @property
    def regularizers(self) -> tuple[str, ...]:
        """Regularizers of the methods."""
        used = [METHODS[name].regularizer for name in self.methods]
        return tuple(dict.fromkeys(name for name in used if name is not None))

    def rules(self, regularizer: str | None) -> tuple[str, ...]:
        """Returns the rules of a regularizer's methods; tuning needs the sum."""
        used = {
            METHODS[name].rule
            for name in self.methods
            if METHODS[name].regularizer == regularizer
        }
        return tuple(rule for rule in RULES if rule in used | {ADDED})

    def check_batches(self, devices: int) -> None:
        """Raises ValueError unless the devices divide a batch evenly."""
        if self.batch_size % (devices * self.accumulate):
            raise ValueError(
                f"`--batch-size` must be a multiple of {devices} devices times "
                f"{self.accumulate} (`--accumulate`), got {self.batch_size}."
            )

    @property
    def initial_learning_rate(self) -> float:
        """Learning rate at the first step."""
        if self.learning_rate is None:
            return _DEFAULT_RATES[self.optimizer]
        return self.learning_rate

    def total_steps(self, training_images: int) -> int:
        """Returns the number of training steps, from `steps` or `epochs`."""
        if self.epochs is not None:
            return math.ceil(self.epochs * training_images / self.batch_size)
        if self.steps is not None:
            return self.steps
        passes = math.ceil(_DEFAULT_EPOCHS * training_images / self.batch_size)
        return (
            _DEFAULT_STEPS if self.target in _OF_TARGET else max(_DEFAULT_STEPS, passes)
        )

    @property
    def folder(self) -> pathlib.Path:
        """The run folder."""
        if self.run_dir is not None:
            return expanded(self.run_dir)
        ours, plain = identity(self), identity(Config())
        if ours == plain:
            return pathlib.Path("runs", "default")
        changed = {key: value for key, value in ours.items() if value != plain[key]}
        digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode())
        target = re.sub(r"[^\w.-]+", "-", self.target)[-40:].strip("-.")
        return pathlib.Path("runs", f"{target}-{digest.hexdigest()[:8]}")


def identity(config: Config) -> dict[str, Any]:
    """The options that decide the results, ready for JSON: one identity, one folder."""
    options = dataclasses.asdict(config)
    for name in _OF_NO_CONSEQUENCE:
        del options[name]
    options["methods"] = list(config.methods)
    if not config.tune:  # a given strength and the same default are equal
        options["strength"] = config.strengths
    return options
