"""Files that outlast a crash: whole or not at all, and on disk before one goes on."""

import contextlib
import os
import pathlib


def replace(path: str | os.PathLike[str], content: str | bytes) -> None:
    r"""Writes a file so that readers see the old one or the new one, whole.

    It is on disk when this returns, its name included. So what is written afterwards,
    and says that this file is there, does not outlast it when the power goes.

    Args:
      path: of the file, in a folder that exists. Beside it, one that ends in
        `.partial` is written first; two processes may write the same file. Links are
        followed, and devices, such as `/dev/stdout`, are written as they are.
      content: bytes, or text, which is written as UTF-8. What no encoding has, as in
        names of files that are not UTF-8, is written as `\udce9`.

    Raises:
      OSError: the disk is full, or the like; the old file is as it was.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    path = pathlib.Path(os.path.realpath(path))
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def make_folder(path: str | os.PathLike[str]) -> None:
    """Makes a folder, and those that it is in, unless they are there."""
    path = pathlib.Path(path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def sync(path: str | os.PathLike[str]) -> None:
    """Returns once a file, or the names in a folder, are on disk.

    Raises:
      OSError: a file can not be written. Folders are synced where the system can.
    """
    path = pathlib.Path(path)
    is_folder = path.is_dir()
    with contextlib.ExitStack() as stack:
        if is_folder:  # Windows opens none, and some file systems sync none
            stack.enter_context(contextlib.suppress(OSError))
        reads = is_folder or os.name == "posix"
        descriptor = os.open(path, os.O_RDONLY if reads else os.O_RDWR)
        stack.callback(os.close, descriptor)
        os.fsync(descriptor)
