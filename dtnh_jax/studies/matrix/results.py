"""All that the report of a folder is made of."""

import pathlib
from typing import Any

from dtnh_jax.studies.matrix import harm, records
from dtnh_jax.studies.matrix.comparison import compare
from dtnh_jax.studies.matrix.summary import Split, summarize

COMPARED = ("dtnh", "never-hurt")  # with the plain sum, as the paper does


def gather(folder: pathlib.Path, split: Split) -> dict[str, Any]:
    """Returns what `results.json` holds, from the records of a folder alone.

    Raises:
      ValueError: the records are missing or damaged.
    """
    found = records.read(folder / "cells.jsonl")
    steps = folder / "harm.jsonl"
    return {
        **summarize(found, split),
        "comparison": compare(found, COMPARED, split),
        "harm": harm.summarize(records.read(steps)) if steps.exists() else [],
    }
