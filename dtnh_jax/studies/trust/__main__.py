"""`python -m dtnh_jax.studies.trust`: trains the cells that are not done."""

import argparse
import itertools
import json
import os
import pathlib
import sys
import time

from dtnh_jax.studies.trust import cells
from dtnh_jax.studies.trust.catalogue import LEARNING_RATES, PAIRS, REGULARIZERS


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--data-dir", type=pathlib.Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--final", action="store_true")
    parser.add_argument("--optimizers", default=",".join(LEARNING_RATES))
    parser.add_argument("--seeds", type=int, default=10)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    first = 100 if given.final else 0
    seeds = tuple(range(first, first + given.seeds))
    for name, optimizer, regularizer in itertools.product(
        PAIRS, given.optimizers.split(","), [None, *REGULARIZERS]
    ):
        cell = cells.Cell(name, optimizer, regularizer)
        path = given.folder / cell.file
        if PAIRS[name].is_final != given.final or given.only not in name:
            continue
        if path.exists():
            continue
        start = time.monotonic()
        found = cells.run(cell, seeds, given.data_dir)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        os.replace(partial, path)
        print(f"{cell.file} {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
