"""Names that can only be folders, told from names on the hub, so that the hub is not asked for them."""

import os
import re
from pathlib import Path

# what the hub allows: NAME or OWNER/NAME
_OF_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


def looks_local(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether it can be no name on the hub: /x, ./x, ../x, ~/x, x/, a/b/c, C:\\x, or what is here."""
    name = os.fspath(name_or_path)
    starts = name.startswith(("/", ".", "~"))
    return starts or _OF_HUB.fullmatch(name) is None or os.path.lexists(name)


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
    inside = [path.name for path in sorted(folder.glob("*")) if (path / "config.json").is_file()]
    return f"; {inside[-1]} in it has one" if inside else ""
