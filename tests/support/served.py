"""Tiny hybrids in folders, as servers load them, and what `generate` answers with them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from hybrid import HybridConfig, HybridModel
from tests.support.tiny import awaken

NEW_TOKENS, END = 12, 1
CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] "
# heads 32 wide: the narrowest that vLLM's attention on a CPU has
_SIZES = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": END,
    "pad_token_id": END,
}
_WINDOW = {"head_dim": 32, "sliding_window": 32}
_TRM = {
    "injection_layers": [1, 3],
    "trm_hidden_size": 64,
    "trm_num_heads": 2,
    "trm_num_layers": 2,
    "trm_intermediate_size": 64,
    "num_recursion_steps": 2,
}
_GATED = _TRM | {
    "injection_layers": [0, 2],
    "trm_num_heads": 4,  # heads 16 wide: padded
    "trm_num_key_value_heads": 2,
    "trm_num_layers": 1,
    "num_cycles": 2,
    "blending_strategy": "gated",
    "trm_input_norm": True,
}
_LAST = _GATED | {"trm_cache": "last"}
# name -> (the base's config, the hybrid's fields, whether both are in one folder)
KINDS: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "llama": (LlamaConfig(**_SIZES), _TRM, False),
    "gated": (LlamaConfig(**_SIZES), _GATED, True),
    "last": (LlamaConfig(**_SIZES), _LAST, False),
    "qwen3": (Qwen3Config(**_SIZES, head_dim=32, tie_word_embeddings=True), _TRM, False),
    "mistral": (MistralConfig(**_SIZES, **_WINDOW), _TRM, False),
    "gemma2": (Gemma2Config(**_SIZES, **_WINDOW, query_pre_attn_scalar=32), _TRM, False),
}


@dataclass
class Served:
    """Where a hybrid was saved, and its greedy answers to `prompts()`, [prompts][NEW_TOKENS] each."""

    folder: Path
    base_folder: Path
    hybrid: list[list[int]]
    more_steps: list[list[int]]  # with 3 steps more
    base: list[list[int]]

    @property
    def more(self) -> int:
        """n of `more_steps`."""
        return json.loads((self.folder / "config.json").read_text())["num_recursion_steps"] + 3


def prompts() -> list[list[int]]:
    """Eleven, of 1 to 128 tokens; the last three begin with the same 100."""
    generator = torch.Generator().manual_seed(1)

    def some(count: int) -> list[int]:
        return torch.randint(2, 258, (count,), generator=generator).tolist()

    found = [some(count) for count in (5, 40, 17, 90, 1, 64, 33, 128)]
    alike = some(100)
    return [*found, *(alike + some(count) for count in (3, 9, 20))]


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every letter of 256, so that any tokens are a text; and a chat template."""
    letters = [*map(chr, range(32, 127)), "\n"]
    letters += [chr(0x100 + i) for i in range(256 - len(letters))]
    vocabulary = {"<s>": 0, "</s>": END} | {letter: i + 2 for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = CHAT
    return fast


@torch.no_grad()
def save_served(kind: str, folder: Path) -> Served:
    """Make the hybrid, save it with its base and a tokenizer, and ask it."""
    base_config, fields, in_one = KINDS[kind]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(base_config).eval()
    for name, parameter in base.named_parameters():
        if parameter.ndim == 2 and "norm" not in name:  # else a random model says one token again and again
            parameter.normal_(0, 0.12)
    base_folder, hybrid_folder = folder / f"{kind}-base", folder / f"{kind}-hybrid"
    base.save_pretrained(base_folder)
    base = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    hybrid = awaken(HybridModel(llm_model=base, config=HybridConfig(**fields)).eval(), size=0.15)
    hybrid.save_pretrained(hybrid_folder, save_base=in_one)
    for place in (base_folder, hybrid_folder):
        letter_tokenizer().save_pretrained(place)
    hybrid = HybridModel.from_pretrained(hybrid_folder).eval()
    found = [answers(hybrid), answers(hybrid, num_recursion_steps=hybrid.config.num_recursion_steps + 3)]
    with hybrid.disable_injection():
        found.append(answers(hybrid))
    return Served(hybrid_folder, base_folder, *found)


def answers(hybrid: HybridModel, **arguments: Any) -> list[list[int]]:
    """Greedy, of each of `prompts()` by itself."""
    found = []
    for prompt in prompts():
        out = greedy(hybrid, prompt, max_new_tokens=NEW_TOKENS, pad_token_id=END, **arguments)
        found.append(out[0, len(prompt) :].tolist())
    return found


def greedy(hybrid: HybridModel, prompt: list[int], **arguments: Any) -> Any:
    """What generate answers to a prompt, to the last token, whatever ends a text."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    return hybrid.generate(ids, attention_mask=mask, do_sample=False, eos_token_id=None, **arguments)
