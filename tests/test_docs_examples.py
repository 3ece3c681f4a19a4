"""The Python of README and docs/ runs as it stands, on tiny language models in folders of the names used."""

import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig

from tests.support.docs_pages import PAGES, name_of, python_blocks
from tests.support.tiny import awaken
from tests.support.tiny_text import character_tokenizer, save_base, tiny_hybrid

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAGES_ARE_OLD = "page_size" not in inspect.signature(ContinuousBatchingConfig).parameters
WITH_PYTHON = [page for page in PAGES if python_blocks(page)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory of a page: a tiny base under the small model's name, a hybrid, no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_base(tmp_path / NAME)
    return tmp_path


def run(page):
    """The blocks of a page, one after another, with one set of names; the names that there are then."""
    names = {"__name__": "__main__"}
    for block in python_blocks(page):
        if block.not_run is None:
            code = "\n" * (block.line - 1) + block.code  # so that an error shows the page's line
            exec(compile(code, str(page), "exec"), names)
    return names


def test_the_readmes_example_trains_saves_loads_and_generates(folder, capsys):
    names = run(PAGES[0])
    model = names["model"]
    assert (folder / "my-hybrid/model.safetensors").exists()
    assert not (folder / "my-hybrid/model.safetensors").stat().st_size > 10 * 2**20
    out = [p for name, p in model.named_parameters() if "trm" in name and "out_proj" in name]
    assert out and all(p.abs().max() > 0 for p in out), "W_out starts at zero: training has to move it"
    assert names["tokenizer"].decode(names["answer"][0], skip_special_tokens=True) in capsys.readouterr().out
    with torch.no_grad(), model.disable_injection():
        off = model(**names["inputs"]).logits
    base = AutoModelForCausalLM.from_pretrained(NAME)
    assert torch.equal(off, base(**names["inputs"]).logits)


@pytest.mark.parametrize("page", [page for page in WITH_PYTHON[1:] if page.stem != "serving"], ids=name_of)
def test_the_pages_examples_run(page, folder):
    run(page)


@pytest.mark.skipif(PAGES_ARE_OLD, reason="this transformers' paged cache takes no keys but the model's own")
def test_the_example_of_serving_runs(folder):
    (serving,) = [page for page in WITH_PYTHON if page.stem == "serving"]
    hybrid = awaken(tiny_hybrid(AutoModelForCausalLM.from_pretrained(NAME)))
    hybrid.save_pretrained("my-hybrid")
    character_tokenizer().save_pretrained("my-hybrid")
    names = run(serving)
    assert 1 <= names["record"].mean_steps <= 3
    assert names["model"].halting is not None


def test_a_block_that_is_not_run_says_why():
    reasons = [block.not_run for page in WITH_PYTHON for block in python_blocks(page) if block.not_run]
    assert all(len(reason) > 20 for reason in reasons)
    blocks = [block for page in WITH_PYTHON for block in python_blocks(page)]
    assert len(blocks) - len(reasons) >= 8, "most blocks run"
