"""`dtnh export`: writes a fine-tuned network with its model card."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import tyro

from dtnh_jax.finetune import files, shell
from dtnh_jax.finetune.wording import markdown

_WEIGHTS, _CARD = "model.safetensors", "README.md"


@dataclasses.dataclass(frozen=True)
class Options:
    """Writes the fine-tuned weights of a run, and a model card beside them."""

    run: tyro.conf.Positional[pathlib.Path]
    """Folder of a complete run."""
    method: str | None = None
    """Method of the network. By default the first that resolves conflicts."""
    seed: int = 0
    """Seed of the network."""
    names: Literal["linen", "torch"] = "linen"
    """Names and layout of tensors: linen's or PyTorch's."""
    output: pathlib.Path | None = None
    """Folder to write to. By default `export` in the run folder."""


def run(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit status."""
    options = tyro.cli(Options, prog="dtnh export", args=list(argv))
    try:
        folder = export(options)
    except ValueError as error:
        return shell.refuse(str(error))
    except OSError as error:
        return shell.refuse(f"{options.output or options.run}: {error.strerror}.")
    for name in (_WEIGHTS, _CARD):
        print(folder / name)
    return 0


def export(options: Options) -> pathlib.Path:
    """Writes weights and card.

    Returns:
      The folder of both.

    Raises:
      ValueError: the run is not complete, has no such weights, or the network has no
        names in PyTorch.
    """
    # Imported here because `--help` should not wait for Flax.
    from dtnh_jax.finetune.runs import trained
    from dtnh_jax.finetune.weights.checkpoint_sources import ARCHITECTURES
    from dtnh_jax.finetune.weights.tensor_names import torch_tensors

    path, method = trained.choose(options.run, options.method, options.seed)
    results = options.run / "results.json"
    if not results.exists():
        raise ValueError(f"{options.run} is not complete: it has no results.json.")
    found = trained.load(path)
    output = options.output or options.run / "export"
    if options.names == "torch":
        architecture = found.facts.source.partition(":")[0]
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"`--names` must be linen for {found.facts.source}, which has no names "
                "in PyTorch, got torch."
            )
        name_of = ARCHITECTURES[architecture].torch_name
        tensors = torch_tensors(found.variables, name_of)
        trained.write_tensors(output / _WEIGHTS, tensors, found.facts)
    else:
        trained.write(output / _WEIGHTS, found.variables, found.facts)
    card = model_card(_results(results), method, options.seed)
    files.write(output / _CARD, card)
    return output


def _results(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): run the command of that run again."
        ) from error


def model_card(results: dict[str, Any], method: str, seed: int) -> str:
    """Returns the model card in Markdown.

    Args:
      results: content of `results.json`.
      method: method of the training.
      seed: seed of the training.
    """
    from dtnh_jax.finetune.methods import METHODS

    config, numbers = results["config"], results["methods"][method]
    classes = results["class_names"]
    known = METHODS[method]
    cell = next(
        x for x in results["cells"] if (x["method"], x["seed"]) == (method, seed)
    )
    source, target = results["source"], results["target"]
    names = {kind: markdown(results[kind]["name"]) for kind in ("source", "target")}
    tested = f"{config['test_per_class']} pictures of each class"
    lines = [
        f"- **Task:** {names['target']}, {len(classes)} classes: "
        f"{', '.join(map(markdown, classes))}",
        f"- **Data:** {config['train_per_class']} pictures of each class for training, "
        f"{tested} for the test. Licence: {target['licence']}",
        f"- **Pretrained network:** {names['source']}. Licence: {source['licence']}",
        f"- **Method:** {method}: {_sentence(known)}",
    ]
    if known.regularizer:
        strength = results["strengths"][known.regularizer]
        lines.append(f"- **Strength of the regularizer:** {strength:g}")
    lines += [
        f"- **Training:** {results['steps']} steps of {config['batch_size']} pictures "
        f"of {config['image_size']} by {config['image_size']} pixels with "
        f"{config['optimizer']}, seed {seed}",
        f"- **Test accuracy of these weights:** {_percent(cell['accuracy'])}, balanced "
        f"{_percent(cell['balanced_accuracy'])}, on {tested}",
        f"- **Test accuracy of the method:** {_interval(numbers['accuracy'], config)}",
    ]
    for difference in results["differences"]:
        if (difference["method"], difference["minus"]) == (method, known.baseline):
            gain = _interval(difference["accuracy"], config, signed=True)
            lines.append(f"- **Against {known.baseline}, seed by seed:** {gain}")
    if "conflict" in numbers:
        lines.append(
            f"- **Gradients in conflict:** {_percent(numbers['conflict'])} of the "
            f"training, mean cosine {numbers['cosine']:+.3f}"
        )
    return f"""---
library_name: flax
pipeline_tag: image-classification
tags: [transfer-learning, dtnh]
---

# {names["source"]}, fine-tuned on {names["target"]}

{chr(10).join(lines)}

`{_WEIGHTS}` holds the parameters and batch statistics, and in its metadata the classes
and the size of pictures. `dtnh predict {_WEIGHTS} PICTURE...` classifies pictures. The
measured accuracy holds only for pictures like those of the test.

Made with dtnh_jax; the method is that of Wan et al., 2019,
https://arxiv.org/abs/1911.07489
"""


def _sentence(method: Any) -> str:
    """Returns a description of a method."""
    if not method.is_pretrained:
        return "trained from random weights"
    if method.regularizer is None:
        return "fine-tuned without a regularizer"
    how = {
        "sum": "whose gradient is added to that of the loss",
        "dtnh": "whose gradient is projected where it conflicts with that of the loss",
        "never_hurt": "bounded by a trust that cross-validation chose",
    }
    return f"fine-tuned with the regularizer {method.regularizer}, {how[method.rule]}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _interval(
    numbers: dict[str, float | None], config: dict[str, Any], signed: bool = False
) -> str:
    """Formats a mean over seeds, with its interval if there are several."""
    sign = "+" if signed else ""
    mean, low, high = (numbers[key] for key in ("mean", "low", "high"))
    assert mean is not None
    unit = " points" if signed else "%"
    text = f"{100 * mean:{sign}.1f}{unit}"
    if low is None or high is None:
        return f"{text}, of one seed, without an interval"
    return (
        f"{text}, mean of {config['seeds']} seeds, 95% interval "
        f"{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"
    )
