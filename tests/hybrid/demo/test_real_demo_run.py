"""`trm-hybrid demo --base smollm2` from beginning to end, with a tiny GGUF file in a package."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybrid import HybridModel
from hybrid.cli import main
from hybrid.demo.real import base as real_base
from hybrid.demo.real import report
from tests.support.tiny_gguf import pip_that_gets, words_and_merges, write_gguf
from tests.support.tiny_words import word_base, word_tokenizer

pytest.importorskip("gguf", reason="the extra trm-hybrid[gguf] is not installed")
pytest.importorskip("peft", reason="peft is not installed")


@pytest.fixture
def package(monkeypatch, tmp_path):
    """Instead of the real one; pip's words."""
    words, merges = words_and_merges(word_tokenizer())
    path = write_gguf(word_base(), tmp_path / "tiny.gguf", words, merges, special=1)
    return pip_that_gets(monkeypatch, {"llm/tiny.gguf": path})


def test_the_whole_demonstration(package, tmp_path, capfd):
    out = tmp_path / "out"
    assert main(["demo", "--base", "smollm2", "--quick", "--seed", "3", "--output", str(out)]) == 0

    said, beside = capfd.readouterr()  # of the processes that learn, too
    assert not re.findall("torchao|Enum subclass|gemm_4bit|is_gradient_checkpointing", beside)
    assert package[-1] == real_base.PACKAGE and "--no-deps" in package
    page = (out / report.REPORT).read_text()
    assert page in said and "A quick run" in page and "seed 3" in page
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("|")}
    assert {"frozen base", "hybrid", "LoRA", "right answers of the hybrid"} <= set(rows)
    assert page.count("- equal:") == 2 and "NOT EQUAL" not in page
    assert page.count("right: ") == 8, "two games for each of four questions"
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(out / "base").model.embed_tokens.weight,
        word_base().model.embed_tokens.weight,
    )
    hybrid = AutoModelForCausalLM.from_pretrained(out / "hybrid")
    assert isinstance(hybrid, HybridModel)
    assert hybrid.llm_model.model.layers[1].trm.out_proj.weight.abs().max() > 0, "it has learned"


def test_a_folder_of_another_base_is_refused(package, tmp_path, capsys):
    (tmp_path / "out" / "base").mkdir(parents=True)
    assert main(["demo", "--base", "smollm2", "--quick", "--output", str(tmp_path / "out")]) == 2
    assert "expected in" in (said := capsys.readouterr().err) and "got something else" in said
