"""The commands: the study, the checks, and the comparison with PyTorch."""

import argparse
import os
import pathlib
import sys
import threading
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the process's exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dtnh_jax.studies.accelerator", description=__doc__
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=("study", "check", "torch"),
        default="study",
        help="times of everything (the default), comparisons with an oracle, or "
        "TorchJD's times",
    )
    parser.add_argument("--seconds", type=float, default=330.0, help="time limit")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("runs/accelerator"),
        help="folder for results",
    )
    parser.add_argument(
        "--rest",
        action="store_true",
        help="begin with what a run that is cut off leaves",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("float32", "bfloat16"),
        default=["float32", "bfloat16"],
        help="types of parameters and gradients",
    )
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, as a trial")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="how many programs are compiled at once",
    )
    options = parser.parse_args(arguments)
    # Imports of a command can take seconds, or fail.
    if options.command == "check":
        from dtnh_jax.studies.accelerator import check

        return check.run(tiny=options.tiny, workers=options.workers)
    if options.command == "torch":
        from dtnh_jax.studies.accelerator import torch_steps

        results = torch_steps.run(
            options.output, seconds=options.seconds, tiny=options.tiny
        )
    else:
        from dtnh_jax.studies.accelerator import study

        if not (options.tiny or study.has_accelerator()):
            parser.error("there is no accelerator; `--tiny` tries the study without")
        scale = study.TINY if options.tiny else study.Scale()
        results = study.run(
            options.output,
            seconds=options.seconds,
            workers=options.workers,
            scale=scale,
            dtypes=options.dtypes,
            rest=options.rest,
        )
    print(results.brief(), flush=True)
    return 0


if __name__ == "__main__":
    status = main()
    if any(thread.daemon for thread in threading.enumerate()):
        # Do not wait for compilations that are still running.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
