"""What a tokenizer makes of a content: its tokens, or what is wrong with it."""

import hashlib
import json
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hybrid.data.chats import Chat, render
from hybrid.data.labelled import LabelledRow, encode
from hybrid.data.sources import LONG, parts_of
from hybrid.data.special_tokens import habit_of


class Tokenize(Dataset):
    """Contents -> their tokens, each [N] int32, as they stand in a document: see `before` and `closing`.

    Of rows with labels, tokens and labels [2, N]. What is wrong with a content comes as text in its place,
    what is wrong with all as text alone: an exception from a worker would bring its whole stack along.

    As a data set its "indices" are lists of contents, so that a DataLoader's workers tokenize.

    before    tokens that a text begins with
    closing   tokens that a text ends with
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, sequence_length: int, vocabulary: int | None = None
    ) -> None:
        self.vocabulary, self.sequence_length = vocabulary, sequence_length
        self._tokenizer, self._habit = tokenizer, habit_of(tokenizer)
        self.before, self.closing = self._habit.before, self._habit.closing(tokenizer.eos_token_id)

    def __getitem__(self, contents: list[Any]) -> list[np.ndarray | str] | str:
        try:
            if contents and isinstance(contents[0], LabelledRow):
                found = encode(contents, self._tokenizer, self._habit, self.sequence_length)
            else:
                found = self._ids([self._text(content) for content in contents])
        except ValueError as error:
            return str(error)
        return [ids if isinstance(ids, str) else self._checked(ids) for ids in found]

    def fingerprint(self) -> str:
        """A checksum of what makes the tokens: vocabulary, rules, chat template."""
        rules = getattr(self._tokenizer, "backend_tokenizer", None)
        what = self._tokenizer.get_vocab() if rules is None else json.loads(rules.to_str())
        for name in ("truncation", "padding"):  # of the last call to it
            what.pop(name, None)
        ends = [self.before, self.closing]
        parts = [type(self._tokenizer).__name__, what, ends, self._tokenizer.chat_template]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _text(self, content: str | Chat) -> str | ValueError:
        if isinstance(content, str):
            return content
        try:
            return render(content, self._tokenizer)
        except ValueError as error:
            return error

    def _ids(self, texts: list[str | ValueError]) -> list[np.ndarray | str]:
        """Short texts at once; long ones part by part, so that memory does not grow with them."""
        short = [text for text in texts if isinstance(text, str) and len(text) <= LONG]
        found = iter(self._call(short))
        return [
            str(text)
            if isinstance(text, ValueError)
            else next(found)
            if len(text) <= LONG
            else np.concatenate([self._call([part])[0] for part in parts_of(text)])
            for text in texts
        ]

    def _call(self, texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        found = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [np.array(ids, dtype=np.int32) for ids in found]

    def _checked(self, ids: np.ndarray) -> np.ndarray | str:
        if self.vocabulary is None or not ids.size or ids.max() < self.vocabulary:
            return ids
        return beyond(self.vocabulary, int(ids.max()))


def beyond(vocabulary: int, token: int) -> str:
    """The error about a token that the model has no embedding for."""
    return f"expected a tokenizer for the model's vocabulary of {vocabulary} tokens, got token {token}."
