"""The console script `dtnh`: hands over to what its first word names."""

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
_WITHOUT_A_WORD = "dtnh_jax.finetune.command"
_STUDIES, _LANGUAGE_MODELS = "dtnh_jax.studies", "dtnh_jax.lm"
_BROKEN_PIPE = 141  # 128 and the number of the signal that it is elsewhere


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: the arguments, without the program's name; those of the process by default.

    Returns:
      The exit status: 0; 1 where it could not go on, such as with a full disk; 2 for
      arguments, data, weights or packages that can not be used; 75 where another
      process was lost; each after one line on stderr; 128 and the signal's number where
      one stopped it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files and classes may be text that it has no letters for.
        sys.stdout.reconfigure(errors="backslashreplace")
    if argv and argv[0] in _COMMANDS:
        return run(_COMMANDS[argv[0]], argv[1:])
    return run(_WITHOUT_A_WORD, argv)


def run(module: str, argv: Sequence[str]) -> int:
    """Imports a module, and returns the exit status of its `run(argv)`.

    What is missing is said in one line, and output that nobody reads, as of
    `dtnh --help | head`, ends the command without a word.
    """
    try:
        try:
            return importlib.import_module(module).run(argv)
        finally:
            sys.stdout.flush()  # here, where a broken pipe is caught
    except ModuleNotFoundError as error:
        return shell.refuse(_what_is_missing(error.name or "", module))
    except KeyboardInterrupt:
        print("Interrupted, before any training.", file=sys.stderr)
        return shell.INTERRUPTED
    except BrokenPipeError:
        # Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


def _what_is_missing(name: str, module: str) -> str:
    if f"{name}.".startswith(f"{_STUDIES}."):
        return (
            "the study and the benchmarks are in the repository only: clone it, "
            "and in there pip install -e '.[study]'"
        )
    extra = "lm" if module.startswith(_LANGUAGE_MODELS) else "study"
    return f"the package {name} is missing: pip install 'dtnh-jax[{extra}]'"


if __name__ == "__main__":
    sys.exit(main())
