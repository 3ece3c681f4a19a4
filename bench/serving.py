"""Tokens a second of a hybrid and of its base on a CPU: by generate, generate_batch and vLLM, in one run.

    .venv-serving/bin/python -m bench.serving       # `make serving` makes that environment

The weights are random: six layers of SmolLM2-135M's, and its TRM of the README. All requests are as long.
The first run of each is not timed. vLLM comes last: its first model changes transformers' classes.
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LlamaConfig

from hybrid import HybridConfig, HybridModel

PROMPT, NEW, AT_ONCE = 16, 16, (1, 4, 16)
SHAPE: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
}
TRM: dict[str, Any] = {
    "injection_layers": [6],
    "trm_hidden_size": 64,
    "trm_num_heads": 4,
    "trm_num_layers": 1,
}

Answer = Callable[[list[list[int]]], Any]  # takes prompts, answers each with NEW tokens


def save(folder: Path) -> dict[str, Path]:
    """A base and a hybrid of it, in folders."""
    torch.manual_seed(0)
    base, at = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)), folder / "base"
    base.save_pretrained(at)
    base = AutoModelForCausalLM.from_pretrained(at)
    HybridModel(llm_model=base, config=HybridConfig(**TRM, num_recursion_steps=4)).save_pretrained(
        folder / "hybrid"
    )
    return {"base": at, "hybrid": folder / "hybrid"}


@contextmanager
def by_generate(folder: Path) -> Iterator[Answer]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def answer(prompts: list[list[int]]) -> Any:
        ids = torch.tensor(prompts)
        settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    yield answer


@contextmanager
def by_generate_batch(folder: Path) -> Iterator[Answer]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    pages = ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=256)
    settings = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=NEW)

    def answer(prompts: list[list[int]]) -> Any:
        return model.generate_batch(
            prompts, generation_config=settings, continuous_batching_config=pages, persistent_manager=True
        )

    yield answer
    model.destroy_cached_continuous_batching_manager()


@contextmanager
def by_vllm(folder: Path) -> Iterator[Answer]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=max(AT_ONCE),
        block_size=32,
        enable_prefix_caching=False,
    )
    settings = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, detokenize=False)

    def answer(prompts: list[list[int]]) -> Any:
        return llm.generate([{"prompt_token_ids": p} for p in prompts], settings, use_tqdm=False)

    yield answer
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


WAYS = {"generate": by_generate, "generate_batch": by_generate_batch, "vLLM": by_vllm}


def tokens_per_second(answer: Answer, requests: int, times: int) -> list[float]:
    """Of all requests together, `times` times; prompts differ from time to time."""
    found = []
    for i in range(times + 1):
        generator = torch.Generator().manual_seed(i)
        prompts = torch.randint(1, SHAPE["vocab_size"], (requests, PROMPT), generator=generator).tolist()
        start = time.perf_counter()
        answer(prompts)
        found.append(requests * NEW / (time.perf_counter() - start))
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--times", type=int, default=3, help="runs of each, after one that is not timed")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    print(f"{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}")
    print(f"load average at the start {psutil.getloadavg()[0]:.1f} on {psutil.cpu_count()} cores")
    print(f"{'':<16}{'':<8}" + "".join(f"{f'{count} requests':>22}" for count in AT_ONCE))
    with tempfile.TemporaryDirectory() as folder:
        models = save(Path(folder))
        for way, start in WAYS.items():
            for name, at in models.items():
                with start(at) as answer:
                    found = [tokens_per_second(answer, count, arguments.times) for count in AT_ONCE]
                cells = (f"{sorted(f)[len(f) // 2]:.1f} ({min(f):.1f} to {max(f):.1f})" for f in found)
                print(f"{way:<16}{name:<8}" + "".join(f"{cell:>22}" for cell in cells), flush=True)
    print(f"load average at the end {psutil.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
