"""The demonstration's language model: a LLaMA of 106 k parameters whose tokens are ASCII characters."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LanguageModel = Any  # LlamaForCausalLM or HybridModel; mypy cannot follow their generate()

VOCABULARY = 128  # ASCII
END = 0  # the token that ends a text and fills a row


def encode(text: str) -> Tensor:
    """[T] int64, as the tokenizer does it: a character's token is its ASCII code, others are `?`."""
    return torch.tensor(list(text.encode("ascii", "replace")), dtype=torch.int64)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: a vocabulary of the 128 ASCII characters and no merges."""
    characters = {chr(code): code for code in range(VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocab=characters, merges=[], unk_token="?"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=chr(END), pad_token=chr(END), clean_up_tokenization_spaces=False
    )


def make_base() -> LlamaForCausalLM:
    """The language model, untrained: width 64, two layers. Its weights come from torch's global generator."""
    width = 64
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=168,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            initializer_range=width**-0.5 / 2,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=END,
        )
    )
