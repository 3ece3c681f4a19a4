"""A tiny LLaMA as a GGUF file, and a package of Python's index that has it."""

import json
import subprocess
import zipfile
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# the names of llama.cpp's tensors
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "model.layers": "blk",
}


def rotated_as_llama_cpp(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbours where transformers rotates halves: rows of Q and K in its order."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def words_and_merges(tokenizer: PreTrainedTokenizerFast) -> tuple[list[str], list[str]]:
    """(its tokens in their order, its merges), as a GGUF file has them."""
    vocabulary = tokenizer.get_vocab()
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return sorted(vocabulary, key=vocabulary.get), [" ".join(pair) for pair in merges]


def write_gguf(
    model: LlamaForCausalLM, path: Path, words: list[str], merges: list[str], special: int
) -> Path:
    """`words` are the tokens, the first `special` of them for control; 0 ends a text.

    A file of one control token has it for all purposes.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(merges)
    writer.add_token_types([3] * special + [1] * (len(words) - special))
    writer.add_bos_token_id(min(1, special - 1))
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(min(2, special - 1))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = rotated_as_llama_cpp(tensor, config.num_attention_heads)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pip_that_gets(monkeypatch, files: dict[str, Path]) -> list[str]:
    """pip's words; instead of the network there is a package of `files`."""
    said: list[str] = []

    def run(command, **_):
        said.extend(map(str, command))
        if files:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "some-1.0-py3-none-any.whl", "w") as wheel:
                for name, path in files.items():
                    wheel.write(path, name)
        return subprocess.CompletedProcess(command, 0 if files else 1, "", "no such package")

    monkeypatch.setattr(subprocess, "run", run)
    return said
