"""TorchJD's rules on the same ResNet-50, batch, losses and card, in PyTorch."""

# pyright: reportMissingImports=false
import gc
import importlib.metadata
import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from dtnh_jax.studies.accelerator import torch_resnet
from dtnh_jax.studies.accelerator.programs import first_line
from dtnh_jax.studies.accelerator.rows import Results, Row, ratios
from dtnh_jax.studies.accelerator.timing import Clock, Runner, interleaved

GROUP = "PyTorch, ResNet-50"
PLAIN, SUM = "plain", "distillation, sum"
_PACKAGES = ("torch", "torchjd", "qpsolvers", "quadprog")
_STRENGTH = 1e-4
# TorchJD takes both gradients at once, by `torch.vmap`; "in turn" is its
# `parallel_chunk_size=1`.
_RULES: dict[str, tuple[str, int | None]] = {
    "TorchJD PCGrad": ("PCGrad", None),
    "TorchJD PCGrad, in turn": ("PCGrad", 1),
    "TorchJD UPGrad": ("UPGrad", None),
    "TorchJD UPGrad, in turn": ("UPGrad", 1),
}
_NAMES = (PLAIN, SUM, *_RULES)
# How products of single precision are computed, and what is cast.
_PRECISIONS = {
    "float32": "TensorFloat-32 in convolutions and products, as JAX does by default",
    "bfloat16": "autocast: single-precision parameters and gradients",
}


class Setting(NamedTuple):
    """Sizes of the network and its batch."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    classes: int = 1000
    batch: int = 128
    pixels: int = 160


_TINY = Setting((1, 1), 4, 3, 2, 32)


def run(folder: pathlib.Path, *, seconds: float, tiny: bool = False) -> Results:
    """Times all steps in both precisions, within a time limit."""
    clock = Clock(seconds)
    results = Results(folder, {}, name="torch")
    results.plan(Row(GROUP, name, dtype) for dtype in _PRECISIONS for name in _NAMES)
    if importlib.util.find_spec("torch") is None:
        for row in results.rows.values():
            results.skip(row, "torch is not installed")
        return results
    import torch

    # What is JAX's default on such cards.
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    results.about |= {"device": name, **_versions(), **_PRECISIONS}
    setting = _TINY if tiny else Setting()
    for number, dtype in enumerate(_PRECISIONS):
        share = (clock.left() - 3) / (len(_PRECISIONS) - number)
        _measure(results, dtype, setting, device, Clock(share))
        gc.collect()
    results.about["took seconds"] = round(clock.passed(), 1)
    results.write()
    return results


def _versions() -> dict[str, str]:
    found = [name for name in _PACKAGES if importlib.util.find_spec(name)]
    return {name: importlib.metadata.version(name) for name in found}


def _measure(
    results: Results, dtype: str, setting: Setting, device: str, clock: Clock
) -> None:
    """Tries each step once, and times those that work in turn."""
    import torch

    def wait(report: Any = None) -> None:
        del report
        if device == "cuda":
            torch.cuda.synchronize()

    steps = {}
    for name in _NAMES:
        row = results.row(GROUP, name, dtype)
        if clock.left() < 0.3 * clock.seconds:
            results.skip(row, f"{clock.left():.0f} s left before its first step")
            continue
        try:
            step = _step(name, dtype, setting, device)
            step()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            loss = float(step())
            wait()
        except Exception as error:  # not installed, or not able to
            results.skip(row, f"{type(error).__name__}: {first_line(error)}")
            continue
        steps[name] = step
        row.more["loss"] = loss
        if device == "cuda":
            row.memory = {"peak": torch.cuda.max_memory_allocated()}
    runners = {name: Runner(step) for name, step in steps.items()}
    seconds = 0.8 * max(clock.left(), 0.0)
    timed = interleaved(runners, seconds, wait=wait, shortest_block=0.1)
    for name, taken in timed.items():
        row = results.row(GROUP, name, dtype)
        row.timed(taken)
        for other in (PLAIN, SUM):
            if other in timed and name not in (PLAIN, other):
                row.against[other] = ratios(taken, timed[other])
    results.write()


def _step(name: str, dtype: str, setting: Setting, device: str) -> Callable[[], Any]:
    """A step of SGD, whose gradients are taken as a row's name says."""
    import torch
    from torch.nn import functional

    torch.manual_seed(0)
    network, forward = torch_resnet.network(
        setting.blocks, setting.width, setting.classes
    )
    network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
    shape = (setting.batch, 3, setting.pixels, setting.pixels)
    images = torch.randn(shape, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(setting.classes, (setting.batch,), device=device)
    cast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
    with torch.no_grad(), cast:
        _, maps = forward(images)
    teacher = [torch.randn_like(each) for each in maps]

    def terms():
        with cast:
            logits, maps = forward(images)
        loss = functional.cross_entropy(logits.float(), labels)
        far = [(x.float() - y.float()).square().sum() for x, y in zip(maps, teacher)]
        return loss, 0.5 / setting.batch * sum(far)

    take = _taking(name, list(network.parameters()))

    def step():
        optimizer.zero_grad()
        loss, penalty = terms()
        take(loss, _STRENGTH * penalty)
        optimizer.step()
        return loss.detach()

    return step


def _taking(name: str, params: list[Any]) -> Callable[[Any, Any], None]:
    """Returns what sets the gradients of parameters from both terms."""
    if name == PLAIN:
        return lambda loss, penalty: loss.backward()
    if name == SUM:
        return lambda loss, penalty: (loss + penalty).backward()
    from torchjd import aggregation, autojac

    rule, chunk = _RULES[name]
    aggregator = getattr(aggregation, rule)()

    def take(loss, penalty):
        autojac.backward([loss, penalty], parallel_chunk_size=chunk)
        autojac.jac_to_grad(params, aggregator)

    return take
