"""Folders that are searched for pictures: links, strangers, and what is our own."""

import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

# Those of phones, .heic, are no format of PIL, and said to be unreadable.
_SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
}
# Why files, and folders, are left out, as `survey.left_out` says it.
STRANGE, LOST = "are no pictures", "are links to nothing"
SHUT, AGAIN = "can not be opened", "are links to folders that are read already"
OURS = "hold results or caches"
OF_FOLDERS = (SHUT, AGAIN, OURS)


class Tree(NamedTuple):
    """A folder that is searched, and what is found out on the way."""

    root: pathlib.Path
    outputs: tuple[pathlib.Path, ...]  # folders that are no classes
    left: dict[str, list[pathlib.Path]]  # by reason

    def leave(self, why: str, path: pathlib.Path) -> None:
        """Leaves a file or a folder out."""
        self.left.setdefault(why, []).append(path)


def walk(
    tree: Tree, folder: pathlib.Path, seen: set[tuple[int, int]]
) -> Iterator[tuple[pathlib.Path, str]]:
    """Yields files at any depth with why they are left out, "" for pictures.

    Args:
      tree: that is searched.
      folder: where to begin.
      seen: folders that are not to be read again, the folder itself among them.
    """
    try:
        paths = listed(folder)
    except OSError:
        yield folder, SHUT
        return
    for path in paths:
        why = what_is_wrong(tree, path)
        if why or not os.path.isdir(path):
            yield path, why
        elif (key := key_of(path)) in seen:
            yield path, AGAIN
        else:
            seen.add(key)
            yield from walk(tree, path, seen)


def what_is_wrong(tree: Tree, path: pathlib.Path) -> str:
    """Returns why a file or a folder is left out, or "" if it is not."""
    if os.path.isdir(path):
        return OURS if _is_output(tree, path) else ""
    if not os.path.exists(path):
        return LOST
    is_picture = os.path.isfile(path) and path.suffix.lower() in _SUFFIXES
    return "" if is_picture else STRANGE


def _is_output(tree: Tree, folder: pathlib.Path) -> bool:
    """Whether a folder holds a run, what was exported, or something that is cached."""
    if any(os.path.exists(x) and os.path.samefile(x, folder) for x in tree.outputs):
        return True

    def has(*names: str) -> bool:
        return all(os.path.isfile(folder / name) for name in names)

    return (
        has("machine.json")  # a run, which has it from its first moment
        or has("config.json", "cells.jsonl")
        or has("model.safetensors", "README.md")
        or has("CACHEDIR.TAG")
    )


def is_ours_alone(tree: Tree, folder: pathlib.Path) -> bool:
    """Whether a folder, such as `runs`, has folders of ours in it and no pictures."""
    has_ours = False
    for _, why in walk(tree, folder, above(tree, folder)):
        if not why:
            return False
        has_ours |= why == OURS
    return has_ours


def above(tree: Tree, folder: pathlib.Path) -> set[tuple[int, int]]:
    """Keys of the folders that a folder within the tree is in, and of itself."""
    real, within = tree.root.resolve(), [folder, *folder.parents]
    within = within[: within.index(tree.root)]
    return {key_of(x) for x in (*within, real, *real.parents)}


def key_of(folder: pathlib.Path) -> tuple[int, int]:
    """What a folder has, by whatever name."""
    found = folder.stat()
    return found.st_dev, found.st_ino


def listed(folder: pathlib.Path) -> list[pathlib.Path]:
    """What a folder holds that is not hidden, in the order of names."""
    return sorted(path for path in folder.iterdir() if path.name[0] != ".")
