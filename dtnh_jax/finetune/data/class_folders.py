"""Your own photographs, a folder for each class: `--target folder:PATH`."""

import collections
import os
import pathlib
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from dtnh_jax.finetune.data import folder_tree
from dtnh_jax.finetune.data.pictures import UnreadableError, read_picture
from dtnh_jax.finetune.data.survey import left_out, survey
from dtnh_jax.finetune.data.target import Target, published_splits
from dtnh_jax.finetune.directories import expanded
from dtnh_jax.finetune.wording import printable

_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}


class _Found(NamedTuple):
    """A picture that was found."""

    split: str  # "train" if there are no splits
    class_name: str
    path: pathlib.Path


def load_folder(
    path: str | os.PathLike[str], outputs: Sequence[pathlib.Path] = ()
) -> Target:
    """Opens a folder of pictures, in either of two layouts.

    The first layout has a folder for each class, with pictures of any size at any
    depth. The second has folders `train` and `test`, `val` or both, each with a folder
    for every class. Links are followed. Every picture is decoded once to find damaged
    ones. These are left out, and so are files whose suffix is not a picture's, broken
    links, and folders that this command wrote; `Target.notes` counts them. Hidden files
    and folders, whose names begin with a dot, are ignored.

    Args:
      path: path of the folder; `~` is the user's home.
      outputs: folders for results and caches, which are not classes.

    Returns:
      The target. Classes and pictures are sorted by name.

    Raises:
      ValueError: the folder has neither layout, it has fewer than two classes, or a
        class has no picture in one of the splits.
    """
    root = expanded(path)
    if not root.is_dir():
        raise ValueError(f"`folder:{path}` must name a folder, and there is none.")
    tree = folder_tree.Tree(root, tuple(outputs), {})
    try:
        found = _find(tree)
    except OSError as error:
        raise ValueError(
            f"{error.filename} {folder_tree.SHUT}: {error.strerror}."
        ) from error
    paths = [str(picture.path.relative_to(root)) for picture in found]
    seen = survey([picture.path for picture in found], paths)
    good = [found[i] for i in seen.good]
    names = _class_names(root, found, good)
    labels = np.array([names.index(picture.class_name) for picture in good])
    splits, notes = published_splits(
        *(
            np.array([i for i, x in enumerate(good) if x.split == split], int)
            for split in ("train", "validation", "test")
        )
    )

    def read(index: int) -> dict[str, Any]:
        file = good[index].path
        try:
            picture = read_picture(file, seen.white)
        except Exception as error:
            raise UnreadableError(
                f"{file} can not be read any more: {error}"
            ) from error
        return {"image": picture, "label": int(labels[index])}

    others: dict[bool, dict[str, list[str]]] = {False: {}, True: {}}
    for why, left in tree.left.items():
        of_kind = others[why in folder_tree.OF_FOLDERS]
        of_kind[why] = [str(path.relative_to(root)) for path in left]
    return Target(
        name=f"folder:{printable(os.fspath(path))}",
        licence="your own pictures",
        class_names=names,
        examples=grain.MapDataset.range(len(good)).map(read),
        labels=labels,
        splits=splits,
        notes=(
            *seen.notes,
            *left_out(others[False], "files"),
            *left_out(others[True], "folders"),
            *notes,
        ),
        digest=seen.digest,
        white=seen.white,
    )


def _find(tree: folder_tree.Tree) -> list[_Found]:
    """Returns pictures with split and class."""
    root, folders = tree.root, _folders(tree, tree.root)
    is_split = [folder.name.lower() in _SPLITS for folder in folders]
    has_train = any(_SPLITS.get(folder.name.lower()) == "train" for folder in folders)
    if folders and all(is_split) and not has_train:
        raise ValueError(
            f"{root} has {_list(folder.name for folder in folders)}, but no folder "
            "`train`."
        )
    if not has_train:
        return _find_classes(tree, root, folders, "train")
    if not all(is_split):
        others = [folder.name for folder, known in zip(folders, is_split) if not known]
        raise ValueError(
            f"{root} mixes two layouts: beside a folder for training it has "
            f"{_list(others)}. Its folders must all be classes, or be `train`, `val` "
            "and `test`."
        )
    found, seen = [], {}
    for folder in folders:
        split = _SPLITS[folder.name.lower()]
        if split in seen:
            raise ValueError(
                f"{root} has two folders for {split}: {seen[split]}, {folder.name}."
            )
        seen[split] = folder.name
        found += _find_classes(tree, folder, _folders(tree, folder), split)
    return found


def _find_classes(
    tree: folder_tree.Tree,
    folder: pathlib.Path,
    classes: Sequence[pathlib.Path],
    split: str,
) -> list[_Found]:
    """Returns the pictures in the folders of classes, at any depth."""
    if len(classes) < 2:
        raise ValueError(
            f"{folder} must have a folder for each of at least 2 classes, got "
            f"{_list(name.name for name in classes) or 'none'}."
        )
    found = []
    for class_folder in classes:
        # Normalized, because systems encode the same name in different ways.
        name = printable(unicodedata.normalize("NFC", class_folder.name))
        pictures, others = [], collections.Counter()
        seen = folder_tree.above(tree, class_folder)
        for path, why in folder_tree.walk(tree, class_folder, seen):
            if why:
                tree.leave(why, path)
                others[why] += 1
            else:
                pictures.append(_Found(split, name, path))
        if not pictures:
            but = "".join(f", but {n} that {why}" for why, n in others.items())
            raise ValueError(
                f"Class {class_folder} is empty: it holds no picture{but}."
            )
        found += sorted(pictures)
    return found


def _class_names(
    root: pathlib.Path, found: Sequence[_Found], good: Sequence[_Found]
) -> tuple[str, ...]:
    """Returns the names of classes; raises unless each has pictures in every split."""
    names = sorted({picture.class_name for picture in found})
    for split in sorted({picture.split for picture in found}):
        present = {picture.class_name for picture in found if picture.split == split}
        whole = {picture.class_name for picture in good if picture.split == split}
        if missing := [name for name in names if name not in present]:
            raise ValueError(
                f"{root} has no folder for {_list(missing)} in its split for {split}, "
                "but in another: every class must be in each."
            )
        if empty := [name for name in names if name not in whole]:
            raise ValueError(
                f"{root} has no picture that can be read of {_list(empty)} for {split}."
            )
    return tuple(names)


def _folders(tree: folder_tree.Tree, folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders of classes or splits; raises if pictures are beside them."""
    folders, loose, above = [], [], folder_tree.above(tree, folder)
    for path in folder_tree.listed(folder):
        why = folder_tree.what_is_wrong(tree, path)
        if os.path.isdir(path) and not why:
            if folder_tree.key_of(path) in above:
                tree.leave(folder_tree.AGAIN, path)
            elif folder_tree.is_ours_alone(tree, path):
                tree.leave(folder_tree.OURS, path)
            else:
                folders.append(path)
        elif why:
            tree.leave(why, path)
        else:
            loose.append(path.name)
    if loose:
        beside = "beside its folders" if folders else "and no folders"
        raise ValueError(
            f"{folder} has pictures {beside}, such as {loose[0]}: which class are they "
            "of? Put each into the folder of its class."
        )
    return folders


def _list(names: Any) -> str:
    return ", ".join(printable(name) for name in names)
