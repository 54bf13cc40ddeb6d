"""`dtnh predict`: classifies pictures with a fine-tuned network."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from dtnh_jax.finetune import shell
from dtnh_jax.finetune.wording import printable

_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Options:
    """Prints the class and its probability for every picture."""

    run: tyro.conf.Positional[pathlib.Path]
    """A run folder, or a file from `dtnh export`."""
    pictures: tyro.conf.Positional[tuple[pathlib.Path, ...]]
    """Files to classify."""
    method: str | None = None
    """Method of the network. By default the first that resolves conflicts."""
    seed: int = 0
    """Seed of the network."""
    json: bool = False
    """Print JSON, with the probability of every class."""


def run(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit status."""
    options = tyro.cli(Options, prog="dtnh predict", args=list(argv))
    try:
        found, notes = predict(options)
    except ValueError as error:
        return shell.refuse(str(error))
    except OSError as error:  # a picture that was readable before
        return shell.refuse(f"{error}.")
    for note in notes:
        print(f"dtnh: {note}", file=sys.stderr)
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    for line in found:
        share = f"{100 * line['probability']:.1f}%"
        print(f"{printable(line['file'])}: {line['class']} {share}")
    return 0


def predict(options: Options) -> tuple[list[dict[str, Any]], list[str]]:
    """Classifies pictures.

    Returns:
      For each picture that can be read, its `file`, the most likely `class`, its
      `probability`, and the `probabilities` of all classes by name; and sentences on
      the other pictures.

    Raises:
      ValueError: no picture can be read, or there are no such weights.
    """
    # Imported here because `--help` should not wait for Flax.
    import grain
    import jax
    import numpy as np

    from dtnh_jax.finetune.data import loading
    from dtnh_jax.finetune.data.pictures import read_picture
    from dtnh_jax.finetune.data.survey import survey
    from dtnh_jax.finetune.data.target import Target
    from dtnh_jax.finetune.runs import trained

    if not options.pictures:
        raise ValueError("`dtnh predict` needs pictures to classify, got none.")
    path = options.run
    if not path.is_file():
        path, _ = trained.choose(options.run, options.method, options.seed)
    facts, source, variables = trained.load(path)
    seen = survey(options.pictures, [str(x) for x in options.pictures], facts.white)
    files = [options.pictures[i] for i in seen.good]
    if not files:
        raise ValueError(f"Not a picture that can be read: {' '.join(seen.notes)}")
    network = source.module(len(facts.class_names))
    pictures = Target(
        name="the pictures",
        licence="",
        class_names=tuple(facts.class_names),
        examples=grain.MapDataset.range(len(files)).map(
            lambda index: {"image": read_picture(files[index], seen.white)}
        ),
        labels=np.zeros(len(files), int),
    )

    @jax.jit
    def probabilities(images):
        logits: Any = network.apply(variables, source.preprocess(images), train=False)
        return jax.nn.softmax(logits.astype("float32"))

    examples = loading.materialize(pictures, np.arange(len(files)), facts.image_size)
    rows = [
        row
        for batch in loading.evaluation_batches(examples, min(len(files), _AT_ONCE))
        for row in np.asarray(probabilities(batch["image"]))[batch["mask"]].tolist()
    ]
    found = []
    for file, row in zip(files, rows):
        best = int(np.argmax(row))
        found.append(
            {
                "file": str(file),
                "class": facts.class_names[best],
                "probability": row[best],
                "probabilities": dict(zip(facts.class_names, row)),
            }
        )
    return found, list(seen.notes)
