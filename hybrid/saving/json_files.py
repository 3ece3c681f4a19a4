"""JSON objects from files that anybody may have written."""

import json
from pathlib import Path
from typing import Any


def read_object(path: Path, who: str) -> dict[str, Any]:
    """The JSON object in `path`.

    who   reads it, for errors

    Errors: ValueError, naming the file, when it holds anything else; OSError when it cannot be read.
    """
    content = path.read_bytes()
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{who}: expected a whole {path}, got a damaged one ({reason}).") from None
    if not isinstance(found, dict):
        raise ValueError(f"{who}: expected a JSON object in {path}, got {_kind(found)}.")
    return found


def _kind(found: Any) -> str:
    return f"a list of {len(found)}" if isinstance(found, list) else f"{found!r:.40}"
