"""Sources of texts.

fortunes-de        German sayings and jokes, of Debian's package of that name
python-docs        English prose: the language reference that comes with Python
text:PATH          a file of text, or a folder of .txt and .md files
text:FILE.jsonl    lines {"prompt": ..., "completion": ...}, or {"text": ...}
"""

import json
import pathlib
import platform
from collections.abc import Iterator
from typing import NamedTuple

FAMILY = "text:"
_FORTUNES = pathlib.Path("/usr/share/games/fortunes/de")
_NOT_PROSE = ("asciiart",)
_SUFFIXES = (".txt", ".md")
_LEAST_LETTERS = 1000  # of a part that a file is cut into


class TextError(ValueError):
    """Texts are missing, empty or unreadable."""


class Text(NamedTuple):
    """A text, or an answer to a prompt."""

    text: str  # the learned text
    prompt: str | None = None  # text before it, which is not learned
    where: str = ""  # for errors


class Source(NamedTuple):
    """Texts of one kind."""

    name: str
    licence: str
    texts: list[Text]


def open_source(name: str) -> Source:
    """Reads all texts of a source.

    Raises:
      TextError: the texts are missing or empty.
    """
    if name in SOURCES:
        source = SOURCES[name]()
    elif name.startswith(FAMILY) and name != FAMILY:
        source = _own(name, pathlib.Path(name.removeprefix(FAMILY)).expanduser())
    else:
        known = ", ".join((*SOURCES, f"{FAMILY}PATH"))
        raise TextError(f"a source of text must be one of {known}, got {name!r}.")
    texts = [text for text in source.texts if text.text.strip()]
    if not texts:
        raise TextError(f"{name} must hold some text, got none.")
    return source._replace(texts=texts)


def _fortunes() -> Source:
    paths = [p for p in sorted(_FORTUNES.glob("*.u8")) if p.stem not in _NOT_PROSE]
    if not paths:
        raise TextError(
            f"fortunes-de is missing in {_FORTUNES}: apt-get install fortunes-de, or "
            f"give `--target {FAMILY}PATH`."
        )
    found = [
        Text(saying.strip("\n"))
        for path in paths
        for saying in path.read_text(encoding="utf-8").split("\n%\n")
    ]
    licence = "GPL-2 or later (Debian's fortunes-de); mostly free quotations"
    return Source("fortunes-de", licence, found)


def _python_docs() -> Source:
    from pydoc_data.topics import topics

    version = platform.python_version()
    found = [Text(text.strip("\n")) for _, text in sorted(topics.items())]
    return Source(f"python-docs ({version})", "PSF-2.0", found)


SOURCES = {"fortunes-de": _fortunes, "python-docs": _python_docs}


def _own(name: str, path: pathlib.Path) -> Source:
    try:
        if path.is_dir():
            files = [p for p in sorted(path.rglob("*")) if p.suffix in _SUFFIXES]
            texts = [text for file in files for text in _parts(file)]
        elif path.suffix == ".jsonl":
            texts = list(_lines(path))
        else:
            texts = list(_parts(path))
    except UnicodeDecodeError as error:
        raise TextError(f"{path} must be text in UTF-8: {error}.") from error
    except OSError as error:
        raise TextError(f"{path} can not be read: {error.strerror}.") from error
    return Source(name, "your own", texts)


def _parts(path: pathlib.Path) -> Iterator[Text]:
    """Splits a file between paragraphs, into parts of at least a thousand letters."""
    part: list[str] = []
    for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
        part.append(paragraph)
        if sum(map(len, part)) >= _LEAST_LETTERS:
            yield Text("\n\n".join(part).strip("\n"))
            part = []
    yield Text("\n\n".join(part).strip("\n"))


def _lines(path: pathlib.Path) -> Iterator[Text]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            found = json.loads(line)
        except ValueError as error:
            raise TextError(f"{where} must be JSON: {error}.") from error
        keys = set(found) if isinstance(found, dict) else set()
        if {"prompt", "completion"} <= keys:
            prompt, text = found["prompt"], found["completion"]
        elif "text" in keys:
            prompt, text = None, found["text"]
        else:
            raise TextError(
                f'{where} must have "prompt" and "completion", or "text", got '
                f"{', '.join(sorted(keys)) or 'neither'}."
            )
        if not isinstance(text, str) or not isinstance(prompt, str | None):
            raise TextError(f"{where} must hold strings.")
        if not text.strip():
            raise TextError(f"{where} must have something to learn, got no text.")
        yield Text(text, prompt, where)
