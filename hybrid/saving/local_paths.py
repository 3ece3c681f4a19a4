"""Names that can only be folders, told from names on the hub, so that the hub is not asked for them."""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

# what the hub allows: NAME or OWNER/NAME
_OF_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


def looks_local(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether it can be no name on the hub: /x, ./x, ../x, ~/x, x/, a/b/c, C:\\x, or what is here."""
    name = os.fspath(name_or_path)
    starts = name.startswith(("/", ".", "~"))
    return starts or _OF_HUB.fullmatch(name) is None or os.path.lexists(name)


def is_in_a_folder_here(name: str) -> bool:
    """Whether OWNER/NAME is rather meant to be NAME in the folder OWNER here: there is such a folder, and no
    such model was ever fetched from the hub."""
    owner, _, rest = name.partition("/")
    return bool(rest) and os.path.isdir(owner) and not isinstance(_fetched(name), str)


def _fetched(name: str) -> Any:
    """Where the config of a model of the hub lies in the cache, or None."""
    try:
        return try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None


def check_folder(what: str, name_or_path: str | os.PathLike[str]) -> None:
    """ValueError where `name_or_path` looks local and is no folder, or has no config.json.

    what   is expected there, for the error
    """
    if not looks_local(name_or_path):
        return
    folder = Path(name_or_path)
    if not folder.exists():
        found = "there is no such folder."
    elif not folder.is_dir():
        found = "it is no folder."
    elif not (folder / "config.json").is_file() and not list(folder.glob("*_config.json")):
        found = f"there is no config.json in it{_runs_in(folder)}."
    else:
        return
    raise ValueError(f"expected {what} at {name_or_path}, got none that can be loaded: {found}")


def _runs_in(folder: Path) -> str:
    inside = [path.name for path in folder.glob("*") if (path / "config.json").is_file()]
    newest = max(inside, key=lambda name: (len(name), name), default=None)  # checkpoint-12 after checkpoint-9
    return f"; {newest} in it has one" if newest else ""
