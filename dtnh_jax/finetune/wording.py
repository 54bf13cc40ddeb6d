"""Formats text by users, such as names of files and classes."""

import re
import unicodedata
from collections.abc import Sequence

_NOT_SHOWN = {"Cc", "Cs", "Zl", "Zp"}  # controls, surrogates, line separators
_BYTES = 0xDC00  # Python's offset for bytes of a name that are not UTF-8
_NAMED = 3


def printable(text: str) -> str:
    r"""Returns text on one line, without characters that can not be encoded.

    Example:
      >>> print(printable("caf\udce9\n"))
      caf\xe9\n
    """
    return "".join(
        _escaped(letter) if unicodedata.category(letter) in _NOT_SHOWN else letter
        for letter in text
    )


def _escaped(letter: str) -> str:
    code = ord(letter) - _BYTES
    if 0 <= code < 256:
        return f"\\x{code:02x}"
    return letter.encode("unicode_escape").decode()


def some(names: Sequence[str]) -> str:
    """Returns the first of many names, and the number of the others.

    Example:
      >>> some(["a", "b", "c", "d"])
      'a, b, c and 1 more'
    """
    shown = ", ".join(printable(name) for name in names[:_NAMED])
    return shown + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def markdown(text: str) -> str:
    r"""Returns text with Markdown's special characters escaped.

    Example:
      >>> print(markdown("$0_to_$10"))
      \$0\_to\_\$10
    """
    return re.sub(r"([\\`*_\[\]<>#|$~&])", r"\\\1", printable(text))
