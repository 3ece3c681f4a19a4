"""lm-eval on hybrids: fresh or switched off, a hybrid answers as its base does, to the bit.

    pip install -e '.[eval]';  pytest tests/peers/lm_eval_harness.py

Three kinds of requests, in batches of 1 and 4, without a download: the tokenizer is made here.
"""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import tiny_base, tiny_hybrid

pytest.importorskip("lm_eval", reason="lm-eval is not installed: the extra [eval]")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

PAIRS = [("the cat", " sat"), ("one two three", " four five"), ("a", " b"), ("seven, eight", " nine")]


def letters():
    """A tokenizer of single letters."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 60}
    vocabulary |= {letter: i + 3 for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz .,0123456789")}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def requests(kind, arguments):
    return [Instance(kind, {}, given, i, metadata=("task", i, 1)) for i, given in enumerate(arguments)]


def answers(model, batch):
    lm = HFLM(pretrained=model, tokenizer=letters(), batch_size=batch, device="cpu", max_length=64)
    until = {"until": ["zz"], "max_gen_toks": 6}
    return (
        lm.loglikelihood(requests("loglikelihood", PAIRS)),
        lm.generate_until(requests("generate_until", [(context, until) for context, _ in PAIRS])),
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(a + b,) for a, b in PAIRS])),
    )


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_fresh_or_off_a_hybrid_answers_as_its_base(family, batch):
    want, hybrid = answers(tiny_base(family), batch), tiny_hybrid(family)
    assert answers(tiny_hybrid(family, awake=False), batch) == want
    with hybrid.disable_injection():
        assert answers(hybrid, batch) == want
    assert answers(hybrid, batch) != want


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_batches_of_1_and_4_answer_the_same(family):
    hybrid = tiny_hybrid(family)
    (one, said, _), (four, said_by_four, _) = answers(hybrid, 1), answers(hybrid, 4)
    assert said == said_by_four
    # padding changes the order of sums in float32
    assert max(abs(a[0] - b[0]) for a, b in zip(one, four, strict=True)) < 1e-4
