"""A tokenizer to which the words of the shell games are one token each, and a tiny LLaMA that knows them."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hybrid.demo.real.game import WORDS


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as the real base's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,  # at most
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([WORDS.text(i, False).prompt + " A B C" for i in range(200)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def word_base(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(
        vocab_size=len(word_tokenizer()),
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
        **sizes,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)
