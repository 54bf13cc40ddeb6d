"""Options that are written as NAME=VALUE."""

from collections.abc import Sequence
from typing import Annotated

import tyro


def _read_mesh(words: Sequence[str]) -> dict[str, int]:
    """Returns the sizes in `data=4,fsdp=2`."""
    pairs = [part.partition("=") for word in words for part in word.split(",")]
    if not all(equals and size.isdecimal() for _, equals, size in pairs):
        raise ValueError("a mesh is written AXIS=SIZE,AXIS=SIZE, such as data=4,fsdp=2")
    if len({axis for axis, _, _ in pairs}) < len(pairs):
        raise ValueError("a mesh has each of its axes once")
    return {axis: int(size) for axis, _, size in pairs}


Mesh = Annotated[
    dict[str, int],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="AXIS=SIZE,...",
        instance_from_str=_read_mesh,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [
            ",".join(f"{k}={v}" for k, v in value.items())
        ],
    ),
]


def _read_strengths(words: Sequence[str]) -> dict[str, float]:
    """Returns the strengths in `l2_sp=0.1 feature_map=0.001`."""
    pairs = [word.partition("=") for word in words]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError("strengths are written NAME=NUMBER, such as l2_sp=0.1")
    return {name: float(number) for name, _, number in pairs}


Strengths = Annotated[
    dict[str, float],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=NUMBER",
        instance_from_str=_read_strengths,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{k}={v:g}" for k, v in value.items()],
    ),
]
