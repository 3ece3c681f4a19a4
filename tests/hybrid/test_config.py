"""HybridConfig and its presets: what is refused, what is kept, what the levels count."""

import re

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from hybrid import HybridConfig, HybridModel, PresetConfigs
from hybrid.cli import main
from hybrid.config import trm_fields
from hybrid.config_values import count_parameters
from hybrid.model.injection import Injection
from tests.support.tiny import tiny_base, tiny_config, tiny_hybrid


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"injection_layers": [2, 1]}, r"injection_layers sorted, each once, got \[2, 1\]"),
        ({"injection_layers": [1, 1]}, r"injection_layers sorted, each once, got \[1, 1\]"),
        ({"injection_layers": [-1]}, r"injection_layers to be counts from 0, got \[-1\]"),
        ({"injection_layers": [1.5]}, r"injection_layers to be counts from 0, got \[1.5\]"),
        ({"trm_hidden_size": 25}, "trm_hidden_size to be a multiple of trm_num_heads, got 25 and 3"),
        ({"trm_num_heads": 8}, r"even head width, got 3"),
        (
            {"trm_num_heads": 6, "trm_num_key_value_heads": 4},
            "trm_num_heads to be a multiple of trm_num_key_value_heads, got 6 and 4",
        ),
        ({"trm_num_heads": 0}, "trm_num_heads of at least 1, got 0"),
        ({"trm_hidden_size": -24}, "trm_hidden_size of at least 1, got -24"),
        ({"trm_num_layers": 0}, "trm_num_layers of at least 1, got 0"),
        ({"trm_num_key_value_heads": 0}, "trm_num_key_value_heads of at least 1, got 0"),
        ({"trm_hidden_size": "64"}, "trm_hidden_size to be a count, got '64'"),
        ({"trm_intermediate_size": 0}, "trm_intermediate_size to be a count of at least 1, got 0"),
        ({"num_recursion_steps": 0}, "num_recursion_steps to be a count of at least 1, got 0"),
        ({"num_recursion_steps": -3}, "num_recursion_steps to be a count of at least 1, got -3"),
        ({"num_cycles": 0}, "num_cycles to be a count of at least 1, got 0"),
        ({"grad_cycles": 3}, r"grad_cycles in 1..2 \(num_cycles\) or None, got 3"),
        ({"blending_strategy": "mean"}, "blending_strategy to be one of linear, gated, got 'mean'"),
        ({"recursion_sampling": "normal"}, "recursion_sampling to be one of fixed, uniform, got 'normal'"),
        ({"trm_dtype": "int8"}, "trm_dtype to be one of float32, bfloat16, float16, got 'int8'"),
        ({"trm_save": "steps"}, "trm_save to be one of auto, all, layer, step, got 'steps'"),
        ({"trm_attention": "sdpaa"}, "trm_attention to be one of auto, triton, sdpa, .*, got 'sdpaa'"),
        ({"injection_strength": "1"}, "injection_strength to be a number, got '1'"),
        ({"injection_layers": 5}, "injection_layers to be a list, got 5"),
        ({"injection_layers": "12"}, "injection_layers to be a list, got '12'"),
        ({"injection_layers": [[1], [2]]}, r"injection_layers to be counts from 0, got \[\[1\], \[2\]\]"),
        ({"injection_layers": [True]}, r"injection_layers to be counts from 0, got \[True\]"),
        ({"injection_strength": float("nan")}, "injection_strength to be a finite number, got nan"),
        ({"injection_strength": float("inf")}, "injection_strength to be a finite number, got inf"),
        (
            {"injection_strength": 10**400},
            r"injection_strength to be a finite number, got a number of about 2\^",
        ),
        ({"injection_strength": [1.0]}, r"injection_strength to be a number, got \[1.0\]"),
        ({"trm_rms_norm_eps": 0}, "trm_rms_norm_eps to be a finite number above 0, got 0"),
        ({"trm_rms_norm_eps": float("nan")}, "trm_rms_norm_eps to be a finite number above 0, got nan"),
        ({"trm_rope_theta": -1.0}, "trm_rope_theta to be a finite number above 0, got -1.0"),
        ({"trm_rope_theta": float("inf")}, "trm_rope_theta to be a finite number above 0, got inf"),
        ({"num_recursion_steps": 10**6}, "num_recursion_steps of at most 4096, got 1000000"),
        (
            {"num_recursion_steps": 10**30},
            r"num_recursion_steps of at most 4096, got a number of about 2\^100",
        ),
        ({"num_recursion_steps": 2.0}, "num_recursion_steps to be a count of at least 1, got 2.0"),
        ({"num_cycles": 4097}, "num_cycles of at most 4096, got 4097"),
        ({"trm_hidden_size": 3 * 10**9}, r"a TRM of at most 1e\+12 parameters, got sizes that make"),
        ({"trm_num_layers": 10**12}, r"a TRM of at most 1e\+12 parameters, got sizes that make"),
        ({"trm_intermediate_size": 10**15}, r"a TRM of at most 1e\+12 parameters, got sizes that make"),
        ({"trm_save": ["all"]}, r"trm_save to be one of auto, all, layer, step, got \['all'\]"),
        ({"base_config": []}, r"base_config to be a config of transformers or its dictionary, got \[\]"),
        ({"base_config": {}}, "base_config to name its model_type, got None"),
        (
            {"base_config": {"model_type": "no-such"}},
            "base_config to be a no-such config, got one that it refuses",
        ),
        (
            {"base_config": {"model_type": "llama", "hidden_size": "wide"}},
            "base_config to be a llama config, got one that it refuses: .*hidden_size",
        ),
        (
            {"base_config": {"model_type": "trm_hybrid"}},
            "base_config to be a language model's, got a hybrid's",
        ),
        ({"base_config": HybridConfig()}, "base_config to be a language model's, got a hybrid's"),
        ({"base_model_name_or_path": ["a"]}, r"to be a name, a path or None, got \['a'\]"),
        ({"num_recursions_steps": 3}, "no field 'num_recursions_steps'; did you mean 'num_recursion_steps'"),
        ({"trm_frobnicate": 3}, "no field 'trm_frobnicate'. In a saved config it is of a later version"),
        ({"base_conifg": {}}, "no field 'base_conifg'; did you mean 'base_config'"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": 1e-5}, "no field 'eps'; did you mean 'trm_rms_norm_eps'"),
        ({"L_cycles": 3}, "no field 'L_cycles'; did you mean 'num_recursion_steps'"),
        ({"mlp_t": True}, "expected no mlp_t, which is a setting of TRM"),
        ({"causal": False}, "expected no causal, which is a setting of TRM"),
    ],
)
def test_a_name_that_is_no_bases_is_refused_when_the_base_is_there(changes, message):
    config = tiny_config(**changes)  # some base may have it
    with pytest.raises(ValueError, match=message):
        HybridModel(llm_model=tiny_base(), config=config)
    with pytest.raises(ValueError, match=message):
        tiny_hybrid().config.update(changes)


def test_no_injection_layer_is_refused_with_a_base():
    with pytest.raises(ValueError, match="at least one injection layer"):
        HybridConfig().check_base(tiny_base().config)


def test_a_config_survives_its_file(tmp_path):
    config = tiny_config(
        recursion_sampling="uniform",
        grad_cycles=None,
        trm_dtype=torch.bfloat16,
        trm_save="layer",
        trm_attention="sdpa",
        base_config=tiny_base().config,
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, HybridConfig)
    for name in trm_fields():
        assert getattr(again, name) == getattr(config, name), name
    assert isinstance(again.base_config, LlamaConfig)
    assert again.get_text_config() is again.base_config
    assert again.vocab_size == config.base_config.vocab_size, "what it lacks is the base's"
    with pytest.raises(AttributeError):
        _ = again.no_such_field


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "got list"),
        ('"x"', "got str"),
        ("3", "got int"),
        ('{"num_cycles": ', "got none"),
        ("[" * 100_000, "nested too deeply"),
        ('{"injection_layers": 5}', "injection_layers to be a list, got 5"),
    ],
)
def test_a_file_that_is_no_config_is_one_error(text, reason, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=reason) as error:
        HybridConfig.from_pretrained(tmp_path)
    assert "list, got 5" in reason or str(file) in str(error.value)
    assert main(["info", "--base", "llama-2-7b", "--config", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(reason, line)


def test_trms_that_no_memory_holds_are_refused_before_any_is_asked_for():
    base, config = tiny_base(), tiny_config(trm_intermediate_size=10**9)
    with pytest.raises(
        ValueError, match=r"expected TRMs that fit into the .* GiB of cpu, got [\d,]+ parameters"
    ):
        HybridModel(llm_model=base, config=config)
    assert not hasattr(base.model.layers[0], "trm")


def test_counted_parameters_are_the_ones_that_are_made():
    config = tiny_config()
    one = Injection(config, 32, 3, 0, torch.device("meta")).recursion
    sizes = [getattr(config, f"trm_{name}") for name in ("num_heads", "num_key_value_heads", "num_layers")]
    count = count_parameters(config.trm_hidden_size, *sizes, config.trm_intermediate_size)
    assert count == sum(p.numel() for p in one.parameters())


LEVELS = [
    # preset, base width and layers, TRM parameters (counted by hand from the shapes below)
    (PresetConfigs.llama_2_7b_level1, 4096, 32, 239_083_520),
    (PresetConfigs.llama_2_13b_level2, 5120, 40, None),
    (PresetConfigs.llama_2_70b_enterprise, 8192, 80, None),
    (PresetConfigs.research_experimental, 8192, 80, None),
]


@pytest.mark.parametrize(("preset", "width", "layers", "total"), LEVELS, ids=[p[0].__name__ for p in LEVELS])
def test_levels_count_what_their_shapes_say(preset, width, layers, total):
    config = preset()
    base = LlamaConfig(hidden_size=width, num_hidden_layers=layers)
    config.check_base(base)
    one = Injection(config, width, layers, 0, torch.device("meta"))
    d = config.trm_hidden_size
    inner = -(-round(8 / 3 * d) // 256) * 256
    by_hand = 2 * width * d + config.trm_num_layers * (4 * d * d + 3 * d * inner) + 2 * d
    assert sum(p.numel() for p in one.parameters()) == by_hand
    if total is not None:
        assert by_hand * len(config.injection_layers) == total


def test_the_guides_claims_of_size():
    """Levels 2 to 4 can be true and are; level 1's 1-2 B cannot, with the guide's own numbers."""
    billions = []
    for preset, width, layers, _ in LEVELS:
        config = preset()
        one = Injection(config, width, layers, 0, torch.device("meta"))
        billions.append(sum(p.numel() for p in one.parameters()) * len(config.injection_layers) / 1e9)
    one, two, three, four = billions
    assert one < 1.0
    assert 3.0 <= two <= 5.0
    assert 15.0 <= three <= 20.0
    assert four >= 50.0
