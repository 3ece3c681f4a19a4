"""Text for training and evaluating: files, globs or a data-set name in, blocks of tokens out.

A text file is one document, a line of a .jsonl file is one, and so is a row of a data set. Documents are
put in a row, each closed by the tokenizer's EOS where it has one, and cut into blocks of one length.
"""

import glob
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

# a name that ends like this is a file's, and is looked for nowhere else
_FILE = re.compile(r"\.[A-Za-z]{1,5}$|^[./~]")


class TokenBlocks(Dataset):
    """Blocks of T tokens; item i is {"input_ids": [T] int64, "labels": [T] int64}, both the same.

    tokens            [N] int32 or int64; what does not fill a last block is left out
    sequence_length   T, in tokens
    name              what the tokens came from, for errors

    Errors: ValueError when there are fewer tokens than one block needs.
    """

    def __init__(self, tokens: Tensor, sequence_length: int, name: str = "data") -> None:
        if sequence_length < 2:
            raise ValueError(
                f"TokenBlocks: expected sequence_length of at least 2 tokens, got {sequence_length}."
            )
        if len(tokens) < sequence_length:
            raise ValueError(
                f"TokenBlocks: expected at least one sequence of {sequence_length} tokens in {name}, "
                f"got {len(tokens)} tokens."
            )
        self.name = name
        self._blocks = tokens[: len(tokens) // sequence_length * sequence_length].view(-1, sequence_length)

    @classmethod
    def read(
        cls,
        sources: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        field: str = "text",
    ) -> "TokenBlocks":
        """The blocks of everything that `sources` name, in their order; see documents()."""
        name = ", ".join(sources)
        return cls(_tokens(documents(sources, field), tokenizer), sequence_length, name)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = self._blocks[index].long()
        return {"input_ids": block, "labels": block}

    def split(self, held_out: int) -> tuple["TokenBlocks", "TokenBlocks"]:
        """(all blocks but the last `held_out`, the last `held_out`).

        Errors: ValueError when nothing would be left of either.
        """
        if not 1 <= held_out < len(self):
            raise ValueError(
                f"TokenBlocks: expected to hold out 1..{len(self) - 1} of the {len(self)} sequences of "
                f"{self.name}, got {held_out}."
            )
        length = self._blocks.shape[1]
        first, last = self._blocks[:-held_out], self._blocks[-held_out:]
        return (
            TokenBlocks(first.reshape(-1), length, self.name),
            TokenBlocks(last.reshape(-1), length, f"the end of {self.name}"),
        )

    def largest_token(self) -> int:
        """The largest id, to be compared with a model's vocabulary."""
        return int(self._blocks.max())


def documents(sources: Sequence[str], field: str = "text") -> Iterator[str]:
    """The documents of each source in turn; a glob's files come in the order of their names.

    sources   a file, a glob, or NAME[:CONFIG[:SPLIT]] of a data set for datasets.load_dataset (a folder is
              one too); the split is "train" where none is given
    field     of a .jsonl line or a data set's row that holds the text

    Errors: ValueError for a file that is missing, empty or not UTF-8, a line or a row without the field,
    a data set that cannot be loaded.
    """
    for source in sources:
        paths = _files(source)
        if paths is None:
            yield from _rows(source, field)
        for path in paths or ():
            yield from _lines(path, field) if path.suffix == ".jsonl" else [_text(path)]


def _files(source: str) -> list[Path] | None:
    """The files that `source` names; None where it names a data set."""
    if glob.has_magic(source) and not Path(source).exists():
        paths = [Path(name) for name in sorted(glob.glob(source, recursive=True))]
        if paths := [path for path in paths if path.is_file()]:
            return paths
        raise ValueError(f"data: expected files that match {source}, got none.")
    if Path(source).is_file():
        return [Path(source)]
    if Path(source).is_dir() or not _FILE.search(source):
        return None
    raise ValueError(f"data: expected a file {source}, got no such file.")


def _text(path: Path) -> str:
    content = path.read_bytes()
    if not content.strip():
        raise ValueError(f"data: expected text in {path}, got an empty file.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data: expected UTF-8 in {path}, got byte 0x{content[error.start]:02x} at byte {error.start}."
        ) from None


def _lines(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"data: {path}, line {number}: expected a JSON object, got none ({error})."
            ) from None
        yield _field(row, field, f"{path}, line {number}")


def _rows(source: str, field: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"data: {source} is no file here, and data sets need the package datasets: "
            "expected it installed (pip install 'trm-hybrid[data]'), got none."
        ) from None
    name, config, split = (*source.split(":"), "", "")[:3]
    try:
        rows = load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"data: expected a file or a data set, got {source}, which is no file here and cannot be loaded "
            f"as a data set ({reason})."
        ) from error
    for number, row in enumerate(rows):
        yield _field(row, field, f"{source}, row {number}")


def _field(row: object, field: str, where: str) -> str:
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        got = ", ".join(map(str, row)) or "no fields" if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"data: {where}: expected text in the field {field!r}, got {got}.")
    return text


def _tokens(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[N] int32, the documents in a row, each closed by EOS where the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces = [np.empty(0, dtype=np.int32)]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces.append(np.array(ids + end, dtype=np.int32))
    return torch.from_numpy(np.concatenate(pieces))
