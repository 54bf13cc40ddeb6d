"""The options of a run, and what follows from them alone."""

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
_OF_TARGET = {
    "elpv": {
        "train_per_class": 50,
        "validation_per_class": 100,
        "test_per_class": 300,
    }
}
_DEFAULT_RATES = {"sgd": 0.01, "adamw": 0.001}
# These say where and how often files are written, and on how many devices it runs.
# They change no result but for rounding, so a run may go on with others.
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

    Every method is trained with every seed and tested once, after its training. The
    report, its figures and all numbers are written to the run folder. An interrupted
    run goes on where it was when the same command is given again.
    """

    source: str = "efficientnet-lite0"
    """Pretrained network to start from: efficientnet-lite0 or -lite1 (ImageNet); with
    weights of your own ARCHITECTURE:FILE, such as resnet50:weights.safetensors; or
    MODULE:FUNCTION, which describes a network of your own."""
    target: str = "elpv"
    """Task to fine-tune on: elpv (solar cells, functional or defective); folder:PATH,
    your own pictures, a folder for each class; tfds:NAME, a set of TensorFlow Datasets.
    """
    methods: tuple[str, ...] = DEFAULT_METHODS
    """What to compare: REGULARIZER adds the gradients, REGULARIZER+dtnh resolves them,
    REGULARIZER+never_hurt chooses how far to trust it by cross-validation; or `all`."""
    strength: Strengths = dataclasses.field(default_factory=dict)
    """Strengths to use instead of the default ones, such as l2_sp=0.1. Without
    --methods, --strength and --tune, l2_sp has a hundred times its usual strength."""
    tune: bool = False
    """Choose every strength that is not given by validation accuracy first."""
    scope: Literal["global", "leaf", "unit", "element"] = "global"
    """Resolve over all parameters, each tensor, each output channel, each number."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum 0.9, or AdamW."""
    learning_rate: float | None = None
    """Falls to 0 along a cosine. By default 0.01 for sgd and 0.001 for adamw."""
    steps: int | None = None
    """Training steps of each method and seed. By default 36 for elpv, and otherwise 12
    passes over the training images, but at least 36 steps."""
    epochs: float | None = None
    """Passes over the training images, instead of --steps."""
    batch_size: int = 32
    """Images in a training step."""
    image_size: int = 64
    """Height and width that photographs are resized to, in pixels."""
    train_per_class: int | None = None
    """Training images of each class; every seed draws others, where there are others.
    By default 50, or what the rarest class has left."""
    validation_per_class: int | None = None
    """Validation images of each class, for --tune; the same for all seeds. By default
    100 for elpv; otherwise with --tune up to 100, a sixth of the rarest class."""
    test_per_class: int | None = None
    """Test images of each class; the same for all seeds. By default 300 for elpv;
    otherwise up to 300, a third of the rarest class, or from the test split."""
    cache_teacher: bool = True
    """Keep what the teacher makes of the training images, instead of asking it anew."""
    seeds: int = 2
    """Repetitions, with other training images, head, order and dropout each."""
    tuning_seeds: int | None = None
    """Repetitions of --tune. By default as many as --seeds."""
    checkpoint_every: int = 25
    """Steps between checkpoints, from which an interrupted run goes on."""
    mesh: Mesh = dataclasses.field(default_factory=dict)
    """Devices to spread over: batches over data and fsdp, weights over fsdp. By default
    one, or all devices of --distributed."""
    accumulate: int = 1
    """Parts of a batch, one after the other: gradients are averaged, then resolved."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What networks compute in; parameters and gradients are float32."""
    remat: bool = False
    """Compute anew what is cheap to compute, instead of keeping it in memory."""
    distributed: bool = False
    """Train with several processes as one, which JAX finds on clusters it knows."""
    coordinator: str | None = None
    """Address of the first process and a free port, where JAX can not find out."""
    processes: int | None = None
    """How many there are, where JAX can not find out."""
    process_id: int | None = None
    """The number of this one, from 0, where JAX can not find out."""
    heartbeat: int = 100
    """Seconds without a sign of life after which another process counts as lost."""
    keep_weights: bool = True
    """Keep the fine-tuned networks in the run folder, to export or predict with."""
    run_dir: pathlib.Path | None = None
    """Folder for results. By default runs/default, or another for other options."""
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
        """The strength of every regularizer in use, before any tuning."""
        return {
            name: float(self.strength.get(name, REGULARIZERS[name].strength))
            for name in self.regularizers
        }

    @property
    def regularizers(self) -> tuple[str, ...]:
        """The regularizers that the methods use."""
        used = [METHODS[name].regularizer for name in self.methods]
        return tuple(dict.fromkeys(name for name in used if name is not None))

    def rules(self, regularizer: str | None) -> tuple[str, ...]:
        """The rules that the methods use on a regularizer; tuning needs the sum."""
        used = {
            METHODS[name].rule
            for name in self.methods
            if METHODS[name].regularizer == regularizer
        }
        return tuple(rule for rule in RULES if rule in used | {ADDED})

    def check_batches(self, devices: int) -> None:
        """Raises ValueError unless a batch can be cut for so many devices."""
        if self.batch_size % (devices * self.accumulate):
            raise ValueError(
                f"`--batch-size` must be a multiple of {devices} devices times "
                f"{self.accumulate} (`--accumulate`), got {self.batch_size}."
            )

    @property
    def initial_learning_rate(self) -> float:
        """The learning rate at the first step."""
        if self.learning_rate is None:
            return _DEFAULT_RATES[self.optimizer]
        return self.learning_rate

    def total_steps(self, training_images: int) -> int:
        """The length of training, whichever way it was given."""
        if self.epochs is not None:
            return math.ceil(self.epochs * training_images / self.batch_size)
        if self.steps is not None:
            return self.steps
        passes = math.ceil(_DEFAULT_EPOCHS * training_images / self.batch_size)
        return _DEFAULT_STEPS if self.target == "elpv" else max(_DEFAULT_STEPS, passes)

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
    if not config.tune:  # a given strength says no more than the same default
        options["strength"] = config.strengths
    return options
