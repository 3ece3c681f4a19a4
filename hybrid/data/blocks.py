"""TokenBlocks: all rows of a text, held in memory, to evaluate on or to train on again and again."""

from collections.abc import Sequence

from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hybrid.data.labelled import Examples
from hybrid.data.packing import Row, check_length, examples, joined, pack
from hybrid.data.piece_tokens import tokens_of
from hybrid.data.sources import Sources
from hybrid.data.tokenize import Tokenize


class TokenBlocks(Dataset):
    """Blocks of T tokens; item i is {"input_ids", "labels"} and, where it has positions, {"position_ids"}.

    tokens            [N] int32 or int64; `left_out` of them, at the end, do not fill a last block
    sequence_length   T, in tokens
    name              what the tokens came from, for errors
    positions         [N], of each token in its document; None: one document

    Errors: ValueError when there are fewer tokens than one block needs.
    """

    def __init__(
        self, tokens: Tensor, sequence_length: int, name: str = "data", positions: Tensor | None = None
    ) -> None:
        check_length(sequence_length)
        if len(tokens) < sequence_length:
            raise ValueError(
                f"TokenBlocks: expected at least one sequence of {sequence_length} tokens in {name}, "
                f"got {len(tokens)} tokens. Ask for a shorter one (--sequence-length)."
            )
        self.name = name
        cut = len(tokens) // sequence_length * sequence_length
        self.left_out = len(tokens) - cut
        self._blocks = tokens[:cut].view(-1, sequence_length)
        self._positions = None if positions is None else positions[:cut].view(-1, sequence_length)

    @classmethod
    def read(
        cls,
        sources: Sources | Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        field: str = "text",
        separate: bool = False,
        vocabulary: int | None = None,
    ) -> "TokenBlocks":
        """The blocks of everything that `sources` name, in their order; see sources.py.

        field        where `sources` are names: which one of a row holds the text
        separate     documents do not look at each other
        vocabulary   tokens that the model has; None is not checked
        """
        check_length(sequence_length)
        reader = sources if isinstance(sources, Sources) else Sources(sources, field)
        tokenize = Tokenize(tokenizer, sequence_length, vocabulary)
        if reader.has_labels:
            raise ValueError(f"TokenBlocks: expected text, got rows with labels in {reader.name}.")
        rows = list(pack(tokens_of(reader, tokenize), sequence_length, keep_rest=True))
        tokens, positions = ([getattr(row, name) for row, _ in rows] for name in ("tokens", "positions"))
        return cls(joined(tokens), sequence_length, reader.name, joined(positions) if separate else None)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self._blocks[index]
        positions = tokens if self._positions is None else self._positions[index]
        return Row(tokens.numpy(), positions.numpy(), index).item(separate=self._positions is not None)

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

        def part(name: str, blocks: slice) -> TokenBlocks:
            positions = None if self._positions is None else self._positions[blocks].reshape(-1)
            return TokenBlocks(self._blocks[blocks].reshape(-1), length, name, positions)

        return part(self.name, slice(-held_out)), part(f"the end of {self.name}", slice(-held_out, None))

    def largest_token(self) -> int:
        """The largest id, to be compared with a model's vocabulary."""
        return int(self._blocks.max())


def read_rows(
    sources: Sources | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    separate: bool = False,
    vocabulary: int | None = None,
) -> TokenBlocks | Examples:
    """Everything that `sources` name: text as TokenBlocks.read has it, or rows that bring their own labels.

    vocabulary   tokens that the model has; None is not checked

    Errors: ValueError as in sources.py and labelled.py, for text that fills no block.
    """
    reader = sources if isinstance(sources, Sources) else Sources(sources)
    if not reader.has_labels:
        return TokenBlocks.read(reader, tokenizer, sequence_length, separate=separate, vocabulary=vocabulary)
    tokenize = Tokenize(tokenizer, sequence_length, vocabulary)
    rows = [row for row, _ in examples(tokens_of(reader, tokenize), sequence_length)]
    return Examples(rows, reader.name)
