"""The console script `dtnh`: runs the module of its first argument."""

import importlib
import io
import os
import sys
from collections.abc import Sequence

from dtnh_jax.finetune import shell

# Modules with a function `run(argv) -> status`, by the first argument.
_COMMANDS = {
    "export": "dtnh_jax.finetune.reports.export",
    "predict": "dtnh_jax.finetune.reports.predict",
    "report": "dtnh_jax.finetune.reports.html_report",
    "lm": "dtnh_jax.lm.command",
    "study": "dtnh_jax.studies.trust.command",
}
_DEFAULT = "dtnh_jax.finetune.command"
_STUDIES, _LANGUAGE_MODELS = "dtnh_jax.studies", "dtnh_jax.lm"
_BROKEN_PIPE = 141  # 128 plus the number of SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: the arguments, without the program's name; those of the process by default.

    Returns:
      The exit status. 0: success. 1: the command could not continue, for example
      because the disk is full. 2: arguments, data, weights or packages can not be used.
      75: another process was lost. 128 plus a signal's number: that signal stopped the
      command. Statuses 1, 2 and 75 come after one line on stderr.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Its encoding may lack characters in names of files and classes.
        sys.stdout.reconfigure(errors="backslashreplace")
    if argv and argv[0] in _COMMANDS:
        return run(_COMMANDS[argv[0]], argv[1:])
    return run(_DEFAULT, argv)


def run(module: str, argv: Sequence[str]) -> int:
    """Imports a module, and returns the exit status of its `run(argv)`.

    Reports a missing package in one line. Ends silently when the reader of its output
    is gone, as in `dtnh --help | head`.
    """
    try:
        try:
            return importlib.import_module(module).run(argv)
        finally:
            sys.stdout.flush()  # here, where a broken pipe is caught
    except ModuleNotFoundError as error:
        return shell.refuse(_missing_package(error.name or "", module))
    except KeyboardInterrupt:
        print("Interrupted before any training.", file=sys.stderr)
        return shell.INTERRUPTED
    except BrokenPipeError:
        # Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


def _missing_package(name: str, module: str) -> str:
    if f"{name}.".startswith(f"{_STUDIES}."):
        return (
            "the study and the benchmarks are only in the repository: clone it, and "
            "run pip install -e '.[study]' in it"
        )
    extra = "lm" if module.startswith(_LANGUAGE_MODELS) else "study"
    return f"the package {name} is missing: pip install 'dtnh-jax[{extra}]'"


if __name__ == "__main__":
    sys.exit(main())
