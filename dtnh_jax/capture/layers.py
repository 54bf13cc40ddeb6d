"""Selects layers of Flax networks by name; errors suggest similar names."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Paths such as `encoder/block_3`, or a function from a path to a bool.
Layers = Sequence[str] | Callable[[str], bool]


def is_wanted(layers: Layers, path: str) -> bool:
    """Returns whether a path is among the layers; "", the network itself, never is."""
    if not path:
        return False
    return bool(layers(path)) if callable(layers) else path in layers


def holds_wanted(layers: Layers, path: str) -> bool:
    """Returns whether a path, or one of a scan's layers there, is among the layers."""
    if callable(layers) or is_wanted(layers, path):
        return is_wanted(layers, path)
    return any(
        each.startswith(f"{path}/") and _is_index(each[len(path) + 1 :])
        for each in layers
    )


def _is_index(path: str) -> bool:
    return all(part.isdecimal() for part in path.split("/"))


def check_layers(layers: Layers) -> None:
    """Raises TypeError for a string, which would count as a sequence of letters."""
    if isinstance(layers, str):
        raise TypeError(
            "`layers` must be a sequence of paths, or a function of a path, got the "
            f"string {layers!r}: write [{layers!r}]."
        )


def without_call(path: str) -> str:
    """Returns the path of the layer whose output Flax stores at `path`."""
    return "" if path == "__call__" else path.removesuffix("/__call__")


def single(value: Any) -> Any:
    """Unpacks the tuple of a layer that was called once."""
    is_single = isinstance(value, tuple) and len(value) == 1
    return value[0] if is_single else value


def pick_layers(
    layers: Layers,
    found: Mapping[str, Mapping[str, Any]],
    all_names: Callable[[], Sequence[str]],
    why_lost: str = "",
) -> dict[str, Any]:
    """Returns the features of the layers, in the order of `layers`.

    Args:
      layers: paths, or a function from a path to a bool.
      found: captured values by path, then by index; `""` if there is no index.
      all_names: returns all paths. Called only if one is missing.
      why_lost: explanation for a layer that runs but is not in `found`.

    Raises:
      ValueError: a layer is missing; the error names the most similar paths.
    """
    names = {
        path: {index: f"{path}/{index}" if index else path for index in parts}
        for path, parts in found.items()
    }
    flat = {names[p][i]: x for p, parts in found.items() for i, x in parts.items()}

    def layer_names():
        return [name for name in {*all_names(), *flat} if name]

    if callable(layers):
        wanted = [path for path in found if is_wanted(layers, path)]
        if not wanted:
            raise ValueError(
                "`layers` must select a layer of the network, got none among "
                f"{_listed(sorted(layer_names()))}."
            )
        return {name: flat[name] for path in wanted for name in names[path].values()}
    picked = {}
    for path in layers:
        if path in flat:
            picked[path] = flat[path]
        elif path in names:
            picked |= {name: flat[name] for name in names[path].values()}
        else:
            others = sorted(layer_names())
            if path in others and why_lost:
                raise ValueError(f"`layers` must be captured, got {path!r}{why_lost}")
            near = difflib.get_close_matches(path, others, n=5, cutoff=0.4)
            near_or_all = _listed(near or others)
            raise ValueError(
                f"`layers` must be paths of layers that the network calls, got "
                f"{path!r}. {'Near it' if near else 'There'} are {near_or_all}."
            )
    return picked


def _listed(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown} ..." if len(names) > most else shown or "no layers at all"
