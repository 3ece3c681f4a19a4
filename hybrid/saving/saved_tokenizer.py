"""The tokenizer of a hybrid's language model, beside the hybrid's own files."""

import os
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer

# one of these is in every folder that a tokenizer was saved in, by whatever version
_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Whether a tokenizer's files are in `folder`."""
    return any((Path(folder) / name).is_file() for name in _FILES)


def copy_tokenizer(places: Iterable[tuple[Path, str | None]], target: Path) -> bool:
    """Write the first tokenizer that can be had into `target`; False where there is none.

    places   folders, each with the GGUF file in it or None
    """
    for folder, gguf in places:
        if gguf is None and not has_tokenizer(folder):
            continue
        where = {} if gguf is None else {"gguf_file": gguf}
        try:
            AutoTokenizer.from_pretrained(folder, **where).save_pretrained(target)
        except Exception:  # whatever is wrong with it, the model can be saved
            continue
        return True
    return False
