"""What tells the content of files from another, wherever they lie."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WHOLE_BYTES = 2**30  # files of more than this together are compared by blocks
_BLOCK = 2**16
_FEWEST_BLOCKS = 4  # of each file


def of_files(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The content of each file, as far as it is compared; JSON.

    Up to WHOLE_BYTES together they are compared whole. Beyond that it is their sizes, and of so many bytes
    blocks that lie evenly in them, the first and the last included.
    """
    sizes = [path.stat().st_size for path in paths]
    total = sum(sizes)
    if total <= WHOLE_BYTES:
        return [
            {"bytes": size, "sha256": _digest(path, None)} for path, size in zip(paths, sizes, strict=True)
        ]
    found: list[dict[str, Any]] = []
    for path, size in zip(paths, sizes, strict=True):
        blocks = max(_FEWEST_BLOCKS, WHOLE_BYTES // _BLOCK * size // total)
        found.append({"bytes": size, f"sha256 of {blocks} blocks": _digest(path, blocks)})
    return found


def _digest(path: Path, blocks: int | None) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if blocks is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        last = max(0, path.stat().st_size - _BLOCK)
        for number in range(blocks):
            file.seek(last * number // (blocks - 1))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()
