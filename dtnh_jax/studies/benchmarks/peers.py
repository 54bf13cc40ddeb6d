"""Against TorchJD: the same network, weights, batch and threads in PyTorch."""

# pyright: reportMissingImports=false, reportMissingModuleSource=false
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from dtnh_jax.studies.benchmarks import contests, steps
from dtnh_jax.studies.benchmarks.networks import Network
from dtnh_jax.studies.benchmarks.rows import Against, Row, one, timed
from dtnh_jax.studies.benchmarks.timing import Seconds, interleaved

GROUP = "peers"
# What TorchJD's UPGrad imports, too.
PACKAGES = ("torch", "torchjd", "qpsolvers", "quadprog")
PLAIN, RESOLVED = "ours, plain", "ours, DTNH"
FLOOR = f"ours, {steps.FLOOR}"
TORCH_PLAIN = "PyTorch, plain"
# By default `torch.vmap` computes both gradients at once; "in turn" is TorchJD's
# `parallel_chunk_size=1`, which suits a CPU.
PEERS = {
    "TorchJD PCGrad": ("PCGrad", None),
    "TorchJD UPGrad": ("UPGrad", None),
    "TorchJD UPGrad, in turn": ("UPGrad", 1),
}
# OpenMP's threads spin for a few milliseconds after their work.
_PAUSE = 0.02


def check_installed() -> None:
    """Raises ValueError if a peer is not installed; the message says how to."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"`--peers` needs {', '.join(missing)}, which is not installed: "
            "pip install 'dtnh-jax[peers]'."
        )


def versions() -> dict[str, str]:
    """Returns the peers' versions, for the results."""
    return {name: importlib.metadata.version(name) for name in ("torch", "torchjd")}


def measure(network: Network, rounds: int, is_convolutional: bool) -> list[Row]:
    """Times steps in both frameworks.

    Args:
      network: a network in linen.
      rounds: rounds in which each step is timed.
      is_convolutional: whether the network is convolutional; then absolute times have
        no target.

    Raises:
      ValueError: the two frameworks compute different values.
    """
    compiled = contests.Compiled()
    named = {
        PLAIN: steps.PLAIN,
        FLOOR: steps.FLOOR,
        RESOLVED: steps.DISTILLATION_DTNH,
    }
    ours = compiled.calls(network, named.values())
    calls = {
        **{name: ours[method] for name, method in named.items()},
        **torch_steps(network),
    }
    seconds = interleaved(calls, rounds, pause=_PAUSE)
    absolute = None if is_convolutional else 1.0
    comparisons = {
        FLOOR: [one(PLAIN)],
        RESOLVED: [
            one(PLAIN),
            one(FLOOR),
            *(against for name in PEERS for against in _against(name, absolute)),
        ],
        **{name: [one(TORCH_PLAIN)] for name in PEERS},
    }
    return timed(GROUP, network.name, seconds, comparisons)


def _against(name: str, absolute: float | None) -> list[Against]:
    """Compares absolute times, and times relative to each framework's plain step."""

    def at_their_cost(seconds: Seconds) -> Any:
        return seconds[PLAIN] * seconds[name] / seconds[TORCH_PLAIN]

    return [
        Against(f"{name}, each over its plain step", at_their_cost, target=0.5),
        one(name, target=absolute),
    ]


def torch_steps(network: Network) -> dict[str, Callable[[], Any]]:
    """Training steps in PyTorch, plain and resolved, by name."""
    import torch

    # The number of threads that XLA uses.
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    check_same(network)
    steps_ = {TORCH_PLAIN: _torch_step(network, None, None)}
    for name, (aggregator, chunk_size) in PEERS.items():
        steps_[name] = _torch_step(network, aggregator, chunk_size)
    return steps_


def check_same(network: Network) -> None:
    """Checks that values and gradients are the same in both frameworks.

    Raises:
      ValueError: naming the first that is not.
    """
    import torch

    values, pair = steps.pair_of(network)
    params, terms = translated_terms(network)
    for name, ours, gradient, theirs in zip(
        ("loss", "regularizer"), values, pair, terms()
    ):
        grads = torch.autograd.grad(
            theirs, params, retain_graph=True, allow_unused=True
        )
        norm = float(np.sqrt(sum(float((x**2).sum()) for x in grads if x is not None)))
        found = {
            "value": (float(ours), theirs.item()),
            "gradient": (_norm(gradient), norm),
        }
        for what, (left, right) in found.items():
            if not np.isclose(left, right, rtol=1e-3):
                raise ValueError(
                    f"`network` must be the same in both frameworks, got {left} and "
                    f"{right} for the {what} of the {name}."
                )


def translated_terms(
    network: Network,
) -> tuple[list[Any], Callable[[], tuple[Any, Any]]]:
    """What is trained in PyTorch, and a function that runs the network on the batch.

    The function returns the loss and the regularizer, without strength.
    """
    from torch.nn import functional as F

    from dtnh_jax.studies.benchmarks.torch_networks import tensor, translated

    forward, params = translated(network.params, network.batch_stats)
    inputs, labels = (tensor(network.batch[key]) for key in ("inputs", "labels"))
    teacher = {name: tensor(x) for name, x in network.batch["teacher"].items()}

    def terms():
        logits, maps = forward(inputs)
        distances = [((maps[name] - x) ** 2).sum() for name, x in teacher.items()]
        loss = F.cross_entropy(logits, labels.long())
        return loss, 0.5 / len(inputs) * sum(distances)

    return params, terms


def _torch_step(
    network: Network, aggregator_name: str | None, chunk_size: int | None
) -> Callable[[], Any]:
    """A step of SGD on the loss alone, or on what a rule makes of the two gradients."""
    import torch
    from torchjd import aggregation, autojac

    params, terms = translated_terms(network)
    optimizer = torch.optim.SGD(params, lr=steps.RATE, momentum=steps.DECAY)
    aggregator = getattr(aggregation, aggregator_name)() if aggregator_name else None

    def step():
        optimizer.zero_grad()
        loss, regularizer = terms()
        if aggregator is None:
            loss.backward()
        else:
            both = [loss, steps.STRENGTH * regularizer]
            autojac.backward(both, parallel_chunk_size=chunk_size)
            autojac.jac_to_grad(params, aggregator)
        optimizer.step()

    return step


def _norm(tree: Any) -> float:
    import optax

    return float(optax.tree.norm(tree))
