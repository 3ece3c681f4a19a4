"""The texts that every Python carries: English prose, and the sources of its standard library."""

import os
import random
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hybrid.data.blocks import TokenBlocks
from hybrid.demo.base import encode

_SPLIT_SEED = 0  # fixed: which files are held out does not depend on the run's seed
_HELD_OUT_ONE_IN = 5  # files


def english_prose(row: int) -> tuple[TokenBlocks, TokenBlocks]:
    """(to train on, held out) in rows of `row` tokens: the texts of help(); held out is the last tenth."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(
            "demo: expected pydoc_data.topics, the texts of Python's own help(), got a Python without it."
        ) from error
    tokens = encode("\n".join(topics[name] for name in sorted(topics)))
    cut = len(tokens) * 9 // 10
    return TokenBlocks(tokens[:cut], row, "pydoc_data.topics"), TokenBlocks(
        tokens[cut:], row, "its last tenth"
    )


def python_sources(
    tokenizer: PreTrainedTokenizerBase, row: int, train_rows: int, held_out_rows: int
) -> tuple[TokenBlocks, TokenBlocks]:
    """(to train on, held out) in rows of `row` tokens: the standard library; held out are other files.

    train_rows, held_out_rows   about how many rows are wanted: so many files are read
    """
    to_train_on, held_out = split_sources(train_rows * row, held_out_rows * row)
    return TokenBlocks.read(to_train_on, tokenizer, row), TokenBlocks.read(held_out, tokenizer, row)


def split_sources(train_bytes: int, held_out_bytes: int) -> tuple[list[str], list[str]]:
    """(files to train on, files held out), of each the first that have so many bytes together."""
    folder = Path(os.__file__).parent
    files = sorted(path for path in folder.glob("*.py") if path.stat().st_size)
    if len(files) < _HELD_OUT_ONE_IN:
        raise ValueError(
            f"demo: expected the standard library's sources in {folder}, got {len(files)} .py files there."
        )
    random.Random(_SPLIT_SEED).shuffle(files)
    cut = len(files) // _HELD_OUT_ONE_IN
    return _first(files[cut:], train_bytes), _first(files[:cut], held_out_bytes)


def _first(files: list[Path], size: int) -> list[str]:
    chosen: list[str] = []
    for file in files:
        if size <= 0:
            break
        chosen.append(str(file))
        size -= file.stat().st_size
    return chosen
