"""A character tokenizer, a tiny language model beside it in a folder, and texts to train on."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hybrid import HybridConfig, HybridModel

END = "<end>"
CHARACTERS = [END, *(chr(code) for code in range(32, 127)), "\n"]
TEXT = "".join(f"{i} and one is {i + 1}.\n" for i in range(300))
OTHER_TEXT = "".join(f"the year {1000 + 7 * i} was a long one\n" for i in range(60))

# the fields of a block that trains in milliseconds, as the command line takes them
FIELDS = {
    "injection_layers": [1],
    "trm_hidden_size": 16,
    "trm_num_heads": 2,
    "trm_num_layers": 1,
    "trm_intermediate_size": 24,
    "num_recursion_steps": 3,
    "recursion_sampling": "uniform",
}


def character_tokenizer(with_end: bool = True) -> PreTrainedTokenizerFast:
    """One token a character; token 0 ends a document."""
    vocabulary = {character: i for i, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="?"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": END} if with_end else {}))


def tiny_base(dropout: float = 0.0, **changes: object) -> LlamaForCausalLM:
    """A LLaMA of two layers whose weights are drawn from a fixed seed."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(CHARACTERS),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            attention_dropout=dropout,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=0,
            **changes,
        )
    )


def save_base(folder: Path) -> Path:
    """The tiny language model and its tokenizer in `folder`."""
    tiny_base().save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def tiny_hybrid(base: LlamaForCausalLM | None = None, **changes: object) -> HybridModel:
    """A hybrid whose block is drawn from a fixed seed."""
    base = tiny_base() if base is None else base
    torch.manual_seed(1)
    return HybridModel(llm_model=base, config=HybridConfig(**FIELDS | changes))


class Counting(Dataset):
    """Rows of 12 tokens that count up from a different start in different steps."""

    def __init__(self, items: int = 40, first: int = 0) -> None:
        self.items, self.first = items, first

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (self.first + index + torch.arange(12) * (1 + index % 3)) % len(CHARACTERS)
        return {"input_ids": ids, "labels": ids}
