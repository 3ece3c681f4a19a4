"""Both OpenAI-compatible servers, on the loopback: a request by the openai client, with the chat template."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hybrid import HybridModel
from tests.support.served import END, NEW_TOKENS, letter_tokenizer, save_served

if find_spec("vllm") is None or find_spec("openai") is None:
    pytest.skip("no vLLM and openai here; `make serving` installs them elsewhere", allow_module_level=True)

MESSAGES = [{"role": "user", "content": "Where is the ball?"}]
# as large as it needs: left alone, the cache takes what memory there is
CONTINUOUS = ["--continuous-batching", "--cb-block-size", "16", "--cb-num-blocks", "32"]
CONTINUOUS += ["--cb-max-batch-tokens", "64"]
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_ENGINE_READY_TIMEOUT_S": "1800",
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def server(command: list[str], port: int, log, limit: float = 900, **environment: str):
    """A server until the block ends; what it says goes into `log`."""
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=out, stderr=subprocess.STDOUT, env=ENVIRONMENT | environment
        )
        try:
            until = time.monotonic() + limit
            while not _is_up(port):
                assert process.poll() is None and time.monotonic() < until, log.read_text()[-4000:]
                time.sleep(1)
            yield
        finally:
            process.terminate()
            process.wait(60)


def _is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return save_served("llama", tmp_path_factory.mktemp("served"))


def expected_text(folder, **arguments) -> str:
    """What generate() answers to MESSAGES."""
    tokenizer = letter_tokenizer()
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt")
    ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
    out = HybridModel.from_pretrained(folder).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=END,
        **arguments,
    )
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(text) == NEW_TOKENS, "a letter a token, and no end"
    return text


def ask(port: int, model: str) -> str:
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300)
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=NEW_TOKENS, temperature=0.0
    )
    return answer.choices[0].message.content


def vllm_serve(folder) -> list[str]:
    """The command `vllm serve`; it asks for the version of a package vllm, which is said in `folder`."""
    try:
        version("vllm")
    except PackageNotFoundError:  # here it is vllm-cpu
        known = folder / f"vllm-{version('vllm-cpu')}.dist-info"
        known.mkdir()
        (known / "METADATA").write_text(f"Name: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
    return [str(Path(sys.executable).with_name("vllm")), "serve"]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("start", ["vllm serve", "python -m"])
def test_vllm_serve(served, tmp_path, start):
    port, n = free_port(), served.more
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model"]
    if start == "vllm serve":
        command = vllm_serve(tmp_path)
    command += [str(served.folder), "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "my-hybrid"]
    command += ["--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "4", "--block-size", "32"]
    command += ["--hf-overrides", f'{{"num_recursion_steps": {n}}}']
    with server(command, port, tmp_path / "log", PYTHONPATH=str(tmp_path)):
        assert ask(port, "my-hybrid") == expected_text(served.folder, num_recursion_steps=n)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("batching", [CONTINUOUS, []], ids=["continuous", "one by one"])
def test_transformers_serve(served, tmp_path, batching):
    port = free_port()
    command = [
        "-m",
        "transformers.cli.transformers",
        "serve",
        str(served.folder),
        "--trust-remote-code",
        *batching,
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with server(command, port, tmp_path / "log"):
        assert ask(port, str(served.folder)) == expected_text(served.folder)
