"""trm-hybrid plan --serve: bytes as caches really have them, requests that just fit, times of a roofline."""

import json

import pytest
import torch

from hybrid.bases import KNOWN_BASES
from hybrid.cli import main
from hybrid.plan.cards import CARDS
from hybrid.plan.memory import CUDA_BYTES
from hybrid.plan.run import Run
from hybrid.plan.serve import serving
from hybrid.presets import PresetConfigs
from tests.support.tiny import LAYERS, tiny_base, tiny_config, tiny_hybrid, tokens
from trm_kernels.modules.layers import default_intermediate_size

COMMAND = ["plan", "--level", "1", "--cards", "1xA100-80GB", "--serve"]


def planned(family: str = "llama", **changes) -> Run:
    return Run(family, tiny_base(family).config, tiny_config(**changes), CARDS["RTX4090"], sequence_length=16)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "phi"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_cycles": 1, "num_recursion_steps": 5}, {"trm_cache": "last"}],
    ids=["cycles", "steps", "last"],
)
def test_a_tokens_bytes_are_those_of_a_cache(family, changes):
    cache = tiny_hybrid(family, **changes)(tokens(1, 16)).past_key_values
    sizes = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    found = serving(planned(family, **changes).but(dtype="float32"))
    assert found.base_token == sum(sizes[:LAYERS]) / 16
    assert found.trm_token == sum(sizes[LAYERS:]) / 16
    assert found.request == sum(sizes)


@pytest.mark.parametrize(("family", "kept"), [("mistral", [4, 4, 4]), ("gemma2", [4, 16, 4])])
def test_a_window_keeps_no_more_than_its_tokens(family, kept):
    found = serving(planned(family))
    assert found.request_base == sum(kept) * found.base_token / LAYERS
    assert found.request - found.request_base == 16 * found.trm_token


def level_1() -> Run:
    return Run("llama-2-7b", KNOWN_BASES["llama-2-7b"], PresetConfigs.llama_2_7b_level1(), CARDS["A100-80GB"])


def test_one_request_more_would_not_fit():
    run, found = level_1(), serving(level_1())
    room = run.card.memory_bytes - CUDA_BYTES - found.base_weights - found.trm_weights
    assert found.requests * found.request <= room < (found.requests + 1) * found.request
    assert found.requests_base > found.requests
    assert [step.requests for step in found.steps] == [1, 4, 16, found.requests]
    none = serving(run.but(card=CARDS["RTX4090"], sequence_length=4096, dtype="float32"))
    assert (none.requests, none.steps) == (0, ())


def test_times_are_traffic_then_products():
    run, found = level_1(), serving(level_1())
    one = found.steps[0]
    embeddings = 32_000 * 4_096 * 2  # looked up, not multiplied
    assert one.seconds_base == (found.base_weights - embeddings + found.request_base) / run.card.bytes_per_s
    assert one.seconds_base < one.seconds < one.seconds_reread
    # many short requests: products take longer than the traffic
    many = serving(run.but(sequence_length=1)).steps[-1]
    parameters = (found.base_weights - embeddings + found.trm_weights) / 2
    layers = 2 * 2 * (4 * 2_048**2 + 3 * 2_048 * default_intermediate_size(2_048))  # of both points
    products = 2 * (parameters + 4 * layers)  # n = 4, and y
    assert many.seconds == pytest.approx(many.requests * products / run.card.flops_per_s, rel=1e-6)


def test_the_command_says_both_halves(capsys):
    assert main(COMMAND) == 0
    out = capsys.readouterr().out
    assert "524,288" in out and "163,840" in out and "requests that fit: 46" in out
    assert main([*COMMAND, "--json", "--num-recursion-steps", "9"]) == 0
    assert json.loads(capsys.readouterr().out)["trm_token"] == 2 * 163_840


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--phase", "2"], "expected no --phase with --serve"),
        (["--tokens", "5"], "expected no --tokens with --serve"),
        (["--quantize-base", "int8"], "expected no --quantize-base with --serve"),
        (["--cards", "2xA100"], "expected one card with --serve"),
        (["--lora-rank", "4"], "expected no --lora-rank with --serve"),
    ],
)
def test_what_is_not_of_serving_is_refused(words, message, capsys):
    assert main([*COMMAND, *words]) == 2
    assert message in capsys.readouterr().err


def test_dtype_is_that_of_keys():
    half, whole = (serving(planned().but(dtype=d)) for d in ("bfloat16", "float32"))
    assert whole.trm_token == 2 * half.trm_token and torch.float32.itemsize == 4
