"""A folder with the files of a save, replaced by those of another: whenever cut, it is one or the other.

    1. all new files are written into .saving-*, onto the disk, and named in a list beside them
    2. .saving-* is renamed to .saved-*
    3. .saved-*/config.json is renamed to config.json: from here on the folder is the new save
    4. the other files follow, weights of the former save go, .saved-* goes

A .saved-* that has no config.json any more was cut in step 4: its files come before those beside it.
`as_saved` shows the folder so, without writing to it; the next save goes on with step 4. What was cut before
step 3 is nothing, and removed by the next save when its process has ended.
"""

import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hybrid.saving.files import SAVING, beside, has_ended, sync_folder, sync_tree

_SAVED = ".saved-"
_CONFIG = "config.json"
_NAMES = "names-of-this-save.json"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def replace(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` put files, config.json among them, into the folder it is given; make them `folder`'s."""
    folder.mkdir(parents=True, exist_ok=True)
    _clear_up(folder)
    saving = beside(folder / f"save-{secrets.token_hex(4)}")
    saving.mkdir()
    ready = saving.with_name(saving.name.replace(SAVING, _SAVED, 1))
    try:
        write(saving)
        names = sorted(path.name for path in saving.iterdir())
        (saving / _NAMES).write_text(json.dumps(names), encoding="utf-8")
        sync_tree(saving)
        os.rename(saving, ready)
        sync_folder(folder)
        os.replace(ready / _CONFIG, folder / _CONFIG)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(saving, ignore_errors=True)
        if (ready / _CONFIG).exists():
            shutil.rmtree(ready, ignore_errors=True)
        raise
    _finish(folder, ready)


@contextmanager
def as_saved(path: str | os.PathLike[str]) -> Iterator[str]:
    """Within the block: a folder with all files of the last save at `path`; `path` itself where it is whole.

    What is no folder is a name on the hub, and stays as it is.
    """
    folder = Path(path)
    cut = _cut(folder)
    if cut is None:
        yield os.fspath(path)
        return
    names = _names(cut)
    with tempfile.TemporaryDirectory() as place:
        for file in folder.iterdir():
            is_former = _WEIGHTS.fullmatch(file.name) and file.name not in names
            if file.is_file() and not is_former and not (cut / file.name).exists():
                os.symlink(file.absolute(), Path(place) / file.name)
        for name in names:
            if (cut / name).exists():
                os.symlink((cut / name).absolute(), Path(place) / name)
        yield place


def _cut(folder: Path) -> Path | None:
    """What was left of a save that was cut while its files followed its config."""
    cuts = [path for path in folder.glob(f"{_SAVED}*") if _is_cut(path)] if folder.is_dir() else []
    return max(cuts, default=None, key=lambda path: path.stat().st_mtime)


def _is_cut(ready: Path) -> bool:
    return (ready / _NAMES).is_file() and not (ready / _CONFIG).exists()


def _names(ready: Path) -> list[str]:
    try:
        found = json.loads((ready / _NAMES).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError(
            f"expected the list of a save's files in {ready / _NAMES}, got something else. Without the "
            f"folder {ready.name} that save is gone, and others can be made."
        )
    return [name for name in found if name != _CONFIG and Path(name).name == name]


def _clear_up(folder: Path) -> None:
    """Finish the save before, and remove what those left that came to nothing."""
    if cut := _cut(folder):
        _finish(folder, cut)
    for left in (*folder.glob(f"{SAVING}*-save-*"), *folder.glob(f"{_SAVED}*")):
        if _is_cut(left) or has_ended(left.name.replace(_SAVED, SAVING, 1)):
            shutil.rmtree(left, ignore_errors=True)


def _finish(folder: Path, ready: Path) -> None:
    names = _names(ready)
    for name in names:
        if (ready / name).exists():
            os.replace(ready / name, folder / name)
    for path in folder.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path.name not in names:
            path.unlink()
    (ready / _NAMES).unlink()
    ready.rmdir()
    sync_folder(folder)
