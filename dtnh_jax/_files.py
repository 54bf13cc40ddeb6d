"""Atomic writes of files that survive a crash or a power failure."""

import contextlib
import os
import pathlib


def replace(path: str | os.PathLike[str], content: str | bytes) -> None:
    r"""Writes a file atomically: readers get the complete old or new file.

    The content and the name are on disk when this returns. So after a power failure, a
    file that is written later does not exist without this one.

    Args:
      path: path of the file, in a folder that exists. The content is first written to a
        file beside it that ends in `.partial`; two processes may write the same file.
        Links are followed; devices, such as `/dev/stdout`, are written directly.
      content: bytes, or text, which is written as UTF-8. Surrogates, as in file names
        that are not UTF-8, are written as `\udce9`.

    Raises:
      OSError: the file can not be written, for example because the disk is full; the
        old file is unchanged.
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
    """Makes a folder and its missing parents."""
    path = pathlib.Path(path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def sync(path: str | os.PathLike[str]) -> None:
    """Syncs a file, or the names in a folder, to disk.

    Raises:
      OSError: a file can not be written. Folders are synced if the system can.
    """
    path = pathlib.Path(path)
    is_folder = path.is_dir()
    with contextlib.ExitStack() as stack:
        if is_folder:  # Windows can not open folders; some file systems can not sync
            stack.enter_context(contextlib.suppress(OSError))
        reads = is_folder or os.name == "posix"
        descriptor = os.open(path, os.O_RDONLY if reads else os.O_RDWR)
        stack.callback(os.close, descriptor)
        os.fsync(descriptor)
