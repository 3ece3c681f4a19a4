"""The texts that every Python carries: English prose, and the sources of its standard library."""

import os
import random
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hybrid.data import TokenBlocks
from hybrid.demo.base import encode

_SPLIT_SEED = 0  # fixed: which files are held out does not depend on the run's seed
_TRAINING_BYTES = 800_000
_HELD_OUT_BYTES = 60_000


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


def python_sources(tokenizer: PreTrainedTokenizerBase, row: int) -> tuple[TokenBlocks, TokenBlocks]:
    """(to train on, held out) in rows of `row` tokens: the standard library; held out are other files."""
    to_train_on, held_out = split_sources()
    return TokenBlocks.read(to_train_on, tokenizer, row), TokenBlocks.read(held_out, tokenizer, row)


def split_sources() -> tuple[list[str], list[str]]:
    """(files to train on, files held out): of all files the first so many, enough for the demonstration."""
    files = sorted(path for path in Path(os.__file__).parent.glob("*.py") if path.stat().st_size)
    random.Random(_SPLIT_SEED).shuffle(files)
    cut = len(files) // 5
    return _first(files[cut:], _TRAINING_BYTES), _first(files[:cut], _HELD_OUT_BYTES)


def _first(files: list[Path], size: int) -> list[str]:
    """The first files that have `size` bytes together."""
    chosen: list[str] = []
    for file in files:
        if size <= 0:
            break
        chosen.append(str(file))
        size -= file.stat().st_size
    return chosen
