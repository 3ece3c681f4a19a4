"""Files that exist completely or not at all: written to a temporary path, flushed, atomically renamed."""

import hashlib
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

SAVING = ".saving-"


def replace_file(path: Path, content: bytes, is_awaited: bool = True) -> None:
    """Write to a temporary path, then atomically rename: a reader sees the old file or the new one, whole.

    Also where several processes write into the folder.

    is_awaited   when this returns it is on the disk; False for what can be computed again: a machine that
                 loses its power may then lose the file
    """
    written = beside(path)
    with open(written, "wb") as file:
        file.write(content)
        if is_awaited:
            file.flush()
            os.fsync(file.fileno())
    os.replace(written, path)
    if is_awaited:
        sync_folder(path.parent)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Within the block: a folder to fill, which becomes `folder` at its end; an error leaves neither."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    written = beside(folder)
    written.mkdir()
    try:
        yield written
        sync_tree(written)
        os.rename(written, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def beside(path: Path) -> Path:
    """Where this process writes what will be `path`."""
    return path.with_name(f"{SAVING}{platform.node()}-{os.getpid()}-{path.name}")


def remove_left_over(folder: Path, names: str) -> None:
    """Remove what processes of this machine that have ended were writing in `folder`.

    names   of the files that it would have been, as a regular expression
    """
    left = re.compile(rf"{re.escape(SAVING)}.*-\d+-(?:{names})")
    for path in folder.glob(f"{SAVING}*"):
        if left.fullmatch(path.name) and has_ended(path.name):
            path.unlink(missing_ok=True)


def has_ended(name: str) -> bool:
    """Whether a name that `beside` gave is of a process of this machine that has ended."""
    found = re.match(rf"{re.escape(f'{SAVING}{platform.node()}-')}(\d+)-", name)
    return found is not None and not psutil.pid_exists(int(found[1]))


def sync_folder(folder: Path) -> None:
    """The names in `folder` are on the disk when this returns."""
    _sync(folder)


def sync_tree(folder: Path) -> None:
    """All that is in `folder` is on the disk when this returns."""
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def sha256(path: Path) -> str:
    """Of the whole file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
