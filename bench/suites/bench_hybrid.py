"""A hybrid next to its base, on the CPU, small: a forward, a training step, a token. `pytest bench`.

The base is a random LLaMA of width 256 with 4 layers; the hybrid adds one injection of width 128, 2 layers,
n 4, on the reference backend. The two are one model: the base is the hybrid with its injection switched off.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hybrid import HybridConfig, HybridModel

_IDS = torch.arange(2 * 64).view(2, 64) % 500


def _hybrid() -> HybridModel:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
        )
    )
    config = HybridConfig(
        injection_layers=[2],
        trm_hidden_size=128,
        trm_num_heads=4,
        num_recursion_steps=4,
        trm_input_norm=False,  # as when its figures were counted
    )
    return HybridModel(llm_model=base, config=config)


def _forward(model: HybridModel) -> None:
    with torch.no_grad():
        model(_IDS, use_cache=False)


def _training_step(model: HybridModel) -> None:
    model(_IDS, labels=_IDS, use_cache=False).loss.backward()
    model.zero_grad()


def _sixteen_tokens(model: HybridModel) -> None:
    model.generate(_IDS[:, :8], max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0)  # type: ignore[misc]


TASKS: dict[str, Callable[[HybridModel], None]] = {
    "forward, 2 x 64 tokens": _forward,
    "training step of all weights, 2 x 64 tokens": _training_step,
    "16 tokens generated": _sixteen_tokens,
}


@pytest.mark.parametrize("peer", ("base", "hybrid"))
@pytest.mark.parametrize("task", TASKS)
def bench_hybrid(benchmark: Any, task: str, peer: str) -> None:
    model = _hybrid()
    benchmark.group = task
    benchmark.extra_info.update(device="CPU", torch=torch.__version__)
    with model.disable_injection() if peer == "base" else nullcontext():
        benchmark.pedantic(TASKS[task], args=(model,), rounds=5, warmup_rounds=1)
