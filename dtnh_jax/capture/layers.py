"""Layers by name, for the features of Flax networks: picked out, or near misses."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Paths such as `encoder/block_3`, or a function that tells from a path.
Layers = Sequence[str] | Callable[[str], bool]


def is_wanted(layers: Layers, path: str) -> bool:
    """Whether a path is among the layers; the network itself, at "", never is."""
    if not path:
        return False
    return bool(layers(path)) if callable(layers) else path in layers


def check_layers(layers: Layers) -> None:
    """Raises TypeError for a lone string, which would be taken for its letters."""
    if isinstance(layers, str):
        raise TypeError(
            "`layers` must be a sequence of paths, or a function of a path, got the "
            f"string {layers!r}: write [{layers!r}]."
        )


def without_call(path: str) -> str:
    """The layer whose output Flax stores at a path: its own is named `__call__`."""
    return "" if path == "__call__" else path.removesuffix("/__call__")


def single(value: Any) -> Any:
    """Unpacks what Flax keeps of a layer that was called once."""
    is_single = isinstance(value, tuple) and len(value) == 1
    return value[0] if is_single else value


def pick_layers(
    layers: Layers, found: Mapping[str, Any], all_names: Callable[[], Sequence[str]]
) -> dict[str, Any]:
    """Returns the features of the layers, in the order in which they are asked for.

    Args:
      layers: paths, or a function that tells from a path.
      found: what was captured, by path.
      all_names: returns every path that there is. Called only if one is missing.

    Raises:
      ValueError: if a layer is missing, with the paths that are most like it.
    """

    def layer_names():
        return [name for name in all_names() if name]

    if callable(layers):
        picked = {path: value for path, value in found.items() if layers(path)}
        if not picked:
            raise ValueError(
                "`layers` must pick out a layer of the network, got none among "
                f"{_listed(layer_names())}."
            )
        return picked
    for path in layers:
        if path not in found:
            names = layer_names()
            near = difflib.get_close_matches(path, names, n=5, cutoff=0.4)
            near_or_all = _listed(near or names)
            raise ValueError(
                f"`layers` must be paths of layers that the network calls, got "
                f"{path!r}. {'Near it' if near else 'There'} are {near_or_all}."
            )
    return {path: found[path] for path in layers}


def _listed(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown} ..." if len(names) > most else shown or "no layers at all"
