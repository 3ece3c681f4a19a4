"""vLLM answers with a hybrid what generate() answers; runs where vLLM is installed, by `make serving`."""

import json
import os
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.served import KINDS, NEW_TOKENS, Served, prompts, save_served
from tests.support.tiny import tiny_config

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here; `make serving` installs it elsewhere", allow_module_level=True)

for name, value in {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model in this process
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}.items():
    os.environ.setdefault(name, value)

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402

from hybrid.serving import vllm_model  # noqa: E402

# four blocks of a prompt in a forward: longer ones come in chunks
SETTINGS = {
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 16,
    "block_size": 32,
    "max_num_batched_tokens": 64,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
}


@pytest.fixture(autouse=True)
def _ordinary_memory():
    """vLLM's own code is not ours to check for memory that it does not write."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def all_served(tmp_path_factory) -> dict[str, Served]:
    """Made before vLLM's first model: it changes transformers' classes, which then run under vLLM alone."""
    return {kind: save_served(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(params=KINDS)
def served(request, all_served) -> Served:
    return all_served[request.param]


class Engine:
    """vLLM with one model, until the block ends."""

    def __init__(self, folder, **settings):
        self.llm = LLM(model=str(folder), **(SETTINGS | settings))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()

    def answers(self, some) -> tuple[list[list[int]], list[int]]:
        """(tokens, of how many of its tokens a prompt's keys were there already)"""
        sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
        out = self.llm.generate([{"prompt_token_ids": p} for p in some], sampling, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in out], [o.num_cached_tokens for o in out]


@pytest.mark.timeout(1200)
def test_answers_are_those_of_generate(served):
    """Batched and in chunks; from the prefix cache; one by one. The base and another n answer otherwise."""
    assert served.hybrid != served.base and served.hybrid != served.more_steps
    with Engine(served.folder) as engine:
        found, cached = engine.answers(prompts())
        assert found == served.hybrid
        found, cached = engine.answers(prompts())
        assert found == served.hybrid
        if "mistral" not in str(served.folder):
            assert max(cached) >= 64, "the second time the first blocks are there"
        assert [engine.answers([p])[0][0] for p in prompts()[:3]] == served.hybrid[:3]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("served", ["llama", "gated"], indirect=True)
def test_n_is_fixed_when_the_server_starts(served):
    with Engine(served.folder, hf_overrides={"num_recursion_steps": served.more}) as engine:
        assert engine.answers(prompts())[0] == served.more_steps


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("served", ["llama", "gated"], indirect=True)
def test_two_processes_share_out_the_language_model(served):
    """Tensor parallel: each has half of the base's heads, and the whole TRM."""
    with Engine(served.folder, tensor_parallel_size=2, distributed_executor_backend="mp") as engine:
        assert engine.answers(prompts())[0] == served.hybrid


@pytest.mark.timeout(1200)
def test_the_base_comes_at_its_revision(all_served, tmp_path):
    """From the hub's cache, where the newest commit has other weights."""
    served, right, newest = all_served["llama"], "a" * 40, "b" * 40
    repository = tmp_path / "models--tiny--base"
    for commit in (right, newest):
        shutil.copytree(served.base_folder, repository / "snapshots" / commit)
    file = repository / "snapshots" / newest / "model.safetensors"
    save_file({name: t * 0.5 for name, t in load_file(file).items()}, file, {"format": "pt"})
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(newest)
    folder = shutil.copytree(served.folder, tmp_path / "hybrid")
    config = json.loads((folder / "config.json").read_text())
    config |= {"base_model_name_or_path": "tiny/base", "base_revision": right}
    (folder / "config.json").write_text(json.dumps(config))
    with Engine(folder, download_dir=str(tmp_path)) as engine:
        assert engine.answers(prompts())[0] == served.hybrid


def settings_of(**changes):
    """vLLM's settings, as far as they are asked for what cannot be served; `changes` by their last names."""
    known = {
        "parallel_config": {"tensor_parallel_size": 1, "pipeline_parallel_size": 1},
        "model_config": {"enforce_eager": True, "quantization": None},
        "load_config": {"load_format": "auto"},
    }
    made = {
        name: SimpleNamespace(**{k: changes.pop(k, v) for k, v in fields.items()})
        for name, fields in known.items()
    }
    return SimpleNamespace(**made, **({"lora_config": None, "speculative_config": None} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline-parallel-size 1"),
        ({"enforce_eager": False}, "enforce-eager: a recursion is not part of vLLM's CUDA graphs"),
        ({"quantization": "fp8"}, "no --quantization"),
        ({"lora_config": object()}, "no --enable-lora"),
        ({"speculative_config": object()}, "no speculative decoding"),
        ({"load_format": "tensorizer"}, "load-format auto or safetensors"),
    ],
)
def test_settings_that_were_not_shown_are_refused(changes, message):
    vllm_model._refuse(settings_of(), tiny_config())
    with pytest.raises(ValueError, match=message):
        vllm_model._refuse(settings_of(**changes), tiny_config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 4}, "a hybrid without lora_rank"),
        ({"trm_quantize": "int8"}, "trm_quantize None"),
        ({"trm_regime": "one_launch"}, "trm_regime auto or per_op"),
        ({"base_gguf_file": "base.gguf", "base_model_name_or_path": "a"}, "not GGUF"),
    ],
)
def test_hybrids_that_were_not_shown_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        vllm_model._refuse(settings_of(), tiny_config(**changes))
