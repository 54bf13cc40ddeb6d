"""Differences between versions of NNX, from flax 0.12.0 on."""

from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx

_HAS_CAPTURE = hasattr(nnx, "capture")
_MARK = "_dtnh_is_captured"  # before `nnx.capture`: an attribute of modules


def value_of(variable: Any) -> Any:
    """Returns the array of a variable."""
    return variable.get_value() if hasattr(variable, "get_value") else variable.value


def modules_of(model: nnx.Module) -> Iterator[tuple[tuple[Any, ...], nnx.Module]]:
    """Yields the path of each module, and the module."""
    return nnx.iter_modules(model) if _HAS_CAPTURE else model.iter_modules()


def captured(
    network: nnx.Module, run: Callable[[nnx.Module], Any]
) -> tuple[Any, dict[str, Any]]:
    """Runs a network, and returns its sown intermediates by path."""
    if _HAS_CAPTURE:
        output, state = nnx.capture(run, nnx.Intermediate)(network)
    else:
        for _, module in modules_of(network):
            setattr(module, _MARK, True)
        nnx.pop(network, nnx.Intermediate)  # those of earlier calls
        output = run(network)
        state = nnx.pop(network, nnx.Intermediate)
    flat = nnx.to_flat_state(state)
    return output, {"/".join(map(str, path)): value_of(x) for path, x in flat}


def sown_by(module: Any) -> dict[str, Any] | None:
    """Returns a module's sown values so far; None if the network captures nothing."""
    if not _HAS_CAPTURE:
        found = {
            name: value_of(x)
            for name, x in vars(module).items()
            if isinstance(x, nnx.Intermediate)
        }
        return found if hasattr(module, _MARK) else None
    if not hasattr(module, "__captures__"):
        return None
    kinds = [x for x in module.__captures__ if type(x) is nnx.Intermediate]
    return {name: value for x in kinds for name, value in value_of(x).items()}
