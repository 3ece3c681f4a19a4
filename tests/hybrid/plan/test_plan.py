"""The planner: shapes as published, operations as PyTorch counts them, what makes it fit, the command."""

import json
from dataclasses import asdict

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from hybrid import HybridConfig, HybridModel, PresetConfigs
from hybrid.bases import KNOWN_BASES
from hybrid.cli import main
from hybrid.info import count, on_meta
from hybrid.plan import guide
from hybrid.plan.cards import CARDS, parse_cards
from hybrid.plan.fit import fit
from hybrid.plan.kept import kept_by_step
from hybrid.plan.memory import memory
from hybrid.plan.run import Run
from hybrid.plan.table import Wishes, as_json, lines, plan
from hybrid.plan.work import cost, from_scratch, speed, work
from hybrid.training.phases import enter
from tests.hybrid.cli.test_cli import refused
from tests.support.pinned import on_record_with
from tests.support.real_training import _TRM, CASES
from tests.support.tiny import FAMILIES, tiny_base, tiny_config
from trm_kernels.recursion.saved_bytes import SAVES
from trm_kernels.runtime.backend import backend, interpreting

ROOT = guide.__file__.rsplit("/hybrid/", 1)[0]
pytestmark = pytest.mark.skipif(interpreting(), reason="counts only, which needs no interpreter")

# parameters in billions, as the models' own pages and papers say
PUBLISHED = {
    "llama-2-7b": 6.74,
    "llama-2-13b": 13.02,
    "llama-2-70b": 68.98,
    "llama-3-8b": 8.03,
    "llama-3-70b": 70.55,
    "qwen3-0.6b": 0.60,
    "qwen3-1.7b": 1.72,
    "qwen3-4b": 4.02,
    "qwen3-8b": 8.19,
    "qwen3-14b": 14.77,
    "qwen3-32b": 32.76,
}


def level_1(card="A100-80GB", cards=1, **changes):
    config = PresetConfigs.llama_2_7b_level1()
    return Run("llama-2-7b", KNOWN_BASES["llama-2-7b"], config, CARDS[card], cards, **changes)


KEEPS_ALL = PresetConfigs.llama_2_7b_level1()
KEEPS_ALL.trm_save = "all"


def _on_the_embeddings():
    config = PresetConfigs.llama_2_7b_level1()
    config.injection_layers = [0, 32]
    return Run("llama-2-7b", KNOWN_BASES["llama-2-7b"], config, CARDS["A100-80GB"])


# Shapes and cards


def test_every_known_base_has_as_many_parameters_as_published():
    assert PUBLISHED.keys() == KNOWN_BASES.keys()
    for name, billions in PUBLISHED.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(KNOWN_BASES[name])
        assert round(count(model) / 1e9, 2) == billions, name


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("8xA100-80GB", (8, "A100-80GB")),
        ("1xRTX4090", (1, "RTX4090")),
        ("2 x a100-40gb", (2, "A100-40GB")),
        ("H200", (1, "H200-141GB")),
        ("4xRTX 4090", (4, "RTX4090")),
    ],
)
def test_cards(text, found):
    cards, card = parse_cards(text)
    assert (cards, card.name) == found


@pytest.mark.parametrize("text", ["8xB999", "", "0xA100", "x", "A100x8"])
def test_no_such_cards(text):
    with pytest.raises(ValueError, match="plan: expected"):
        parse_cards(text)


# What is kept, and what is computed


@pytest.mark.parametrize("save", SAVES)
def test_a_policy_keeps_what_the_kernels_ops_keep(save):
    """`kept` counts "step" and derives the others; here each is counted."""
    base = LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=3)
    fields = _TRM | {"num_cycles": 2, "grad_cycles": 2, "trm_save": save}
    run = Run("tiny", base, HybridConfig(**fields), CARDS["H200-141GB"], batch_size=3, sequence_length=40)
    model = on_meta(run.config, run.model().llm_model.config, dtype=torch.bfloat16).freeze_base()
    assert asdict(run.kept(save)) == pytest.approx(asdict(kept_by_step(model, 3, 40)), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_planned(family):
    run = Run(family, tiny_base(family).config, tiny_config(), CARDS["RTX4090"], sequence_length=32)
    made = plan(run.but(cards=2, shards=2), Wishes(tokens=1e6))
    assert made.memory.of("saved activations") > 0 and list(lines(made))
    json.dumps(as_json(made))


@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize(
    "name", ["llama", "gpt2, gated, all cycles", "phi, on the embeddings", "llama, deep supervision"]
)
def test_operations_are_those_that_pytorch_counts(name, phase):
    """Products of matrices; attention's are counted by halves here and in full there."""
    base, block, _ = CASES[name]
    run = Run(name, base, HybridConfig(**_TRM | block), CARDS["RTX4090"], phase=phase, sequence_length=32)
    model = HybridModel(llm_model=AutoModelForCausalLM.from_config(base), config=run.config)
    enter(model, phase)
    ids = torch.zeros(1, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, backend("reference"):
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    products = sum(
        flops
        for op, flops in counter.get_flop_counts()["Global"].items()
        if op in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )
    assert work(run).total.products * 32 == pytest.approx(products, rel=0.01)


def test_work_that_is_done_again_is_counted():
    run = level_1()
    plain, again = work(run).total.all, work(run.but(checkpointing=True))
    assert again.total.all - plain == pytest.approx(
        again.parts["TRM, forward"].all + 16 / 32 * (again.parts["base, forward"].all - 2 * 32000 * 4096)
    )


def test_a_measured_card_is_taken_from_its_file(tmp_path):
    run = level_1("H200-141GB")
    assert speed(run, results=tmp_path).source == "roofline"
    w3 = {
        "facts": {"device": "NVIDIA H200", "workload": "W3", "batch": 4, "tokens": 2048},
        "records": {"ours": {"state": "ok", "warm": {"ms": 100.0}}},
    }
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "a-first-look.json").write_text("{}")
    (tmp_path / "h200" / "gpu.json").write_text(json.dumps({"stages": {"W3": w3}}))
    found = speed(run, results=tmp_path)
    parts = work(run).parts
    of_w3 = 4 * 2048 * (parts["TRM, forward"].all + parts["TRM, backward"].all + 2 * 4096 * 2048)
    assert found.source == "measured: h200/gpu.json"
    assert found.utilisation == pytest.approx(of_w3 / (0.1 * 989e12))
    assert speed(level_1(), results=tmp_path).source == "roofline", "an A100 was not measured"
    assert speed(run, 0.4, results=tmp_path).source == "given"
    assert speed(run).source == "roofline", "measurements are read where they are named"
    with pytest.raises(ValueError, match="expected a folder of measurements"):
        speed(run, results=tmp_path / "none")


def test_cost_is_hours_times_price():
    run = level_1(cards=4)
    fast = speed(run, utilisation=0.5)
    of = cost(run, 1e9, fast, dollars_per_hour=2.0)
    seconds = 1e9 * work(run).total.all / (4 * 312e12 * 0.5)
    assert of.days == pytest.approx(seconds / 86400)
    assert of.cloud_dollars == pytest.approx(4 * seconds / 3600 * 2.0)
    assert of.cards_dollars == 4 * 15_000
    scratch = from_scratch(run, fast)
    parameters = 6_977_499_136
    assert scratch.tokens == 20 * parameters
    assert scratch.gpu_hours == pytest.approx(6 * parameters * 20 * parameters / (312e12 * 0.5) / 3600)


# What makes it fit


@pytest.mark.parametrize(
    ("run", "changes"),
    [
        (level_1(), ()),
        (level_1("RTX4090"), ("gradient checkpointing",)),
        (level_1(batch_size=9).but(config=KEEPS_ALL), ("trm_save step",)),
        (level_1("RTX4090", batch_size=4, checkpointing=True), ("batch 2 with accumulation 2",)),
        (level_1(phase=2, dtype="float32"), ("bfloat16 weights with stochastic rounding",)),
        (
            level_1("A100-40GB", phase=2, dtype="float32"),
            ("gradient checkpointing", "lora_rank 16 in place of the base"),
        ),
        (level_1(cards=8, phase=2, dtype="float32"), ("shards: 2",)),
    ],
)
def test_the_smallest_change(run, changes):
    found = fit(run)
    assert found.changes == changes
    assert memory(found.run).fits
    assert memory(run).fits == (not changes)


def test_nothing_makes_it_fit():
    card = CARDS["RTX4090"]
    small = type(card)(**{**card.__dict__, "memory_bytes": 1.5e9})
    assert fit(level_1().but(card=small)).run is None


def test_shards_divide_what_lasts():
    one, four = (memory(level_1(cards=4, shards=n)) for n in (1, 4))
    for kind in ("weights: base", "weights: TRM", "gradients", "optimizer"):
        assert four.rows[kind] == pytest.approx(one.rows[kind] / 4, rel=1e-4)
    assert "workspace: DDP's buckets" in one.rows and "workspace: gathered units" in four.rows


# The command


def test_the_command_says_everything(capsys):
    assert main(["plan", "--level", "1", "--cards", "1xRTX4090", "--gigabytes", "1"]) == 0
    out = capsys.readouterr().out
    for line in (
        f"  {'trained':<38}{239_083_520:>17,}",
        "it does not fit. It fits with: gradient checkpointing",
        "GFLOP for a token, with the changes",
        "(roofline, the least that it can take)",
        "cost of 0.25 G tokens",
        "from scratch: as many parameters, 20 tokens for each, 140 G tokens",
    ):
        assert line in out


def test_json_has_the_same_figures(capsys):
    command = ["plan", "--preset", "llama_2_7b_level1", "--cards", "A100", "--tokens", "1e9", "--price", "3"]
    assert main([*command, "--json", "--trm-save", "step", "--batch-size", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    run = level_1(batch_size=2)
    assert found["fits"] and found["changes"] == []
    assert found["parameters"]["trained"] == 239_083_520
    assert found["run"]["trm_save"] == "step"
    saved = found["saved_activations"]
    assert saved["step"]["plain"] == found["memory"]["bytes"]["saved activations"]
    assert saved == {
        save: {"plain": run.kept(save).everything, "gradient_checkpointing": run.kept(save).checkpointed}
        for save in SAVES
    }
    assert found["cost"]["cloud_dollars"] == pytest.approx(3 * found["cost"]["gpu_hours"])
    assert found["cached_hidden_states_bytes"] == 1e9 * 4096 * 2


def test_hidden_states_on_disk_are_told():
    wishes = Wishes(tokens=1e9)
    told = [line for line in lines(plan(level_1(), wishes)) if "--cache-hidden-states" in line]
    assert [line.split()[4] for line in told] == ["8,192.0"]
    for run in (level_1(cards=8, shards=8, phase=2), _on_the_embeddings()):
        assert not [line for line in lines(plan(run, wishes)) if "--cache-hidden-states" in line]


def test_a_base_may_be_a_folder_and_a_block_a_file(tmp_path, capsys):
    base, _, _ = CASES["llama"]
    base.save_pretrained(tmp_path)
    (tmp_path / "block.json").write_text(json.dumps(_TRM))
    command = ["plan", "--base", str(tmp_path), "--config", str(tmp_path / "block.json"), "--json"]
    assert main([*command, "--cards", "1xRTX4090", "--sequence-length", "64"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["injection_layers"] == _TRM["injection_layers"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cards", "A100"], "expected --base, a saved hybrid as --model, or a --level; got none"),
        (["--level", "1"], "expected --cards, such as 8xA100-80GB; got none"),
        (["--level", "1", "--cards", "9xZ80"], "expected --cards such as 8xA100-80GB"),
        (["--level", "5", "--cards", "A100"], "invalid choice"),
        (["--level", "1", "--preset", "tiny", "--cards", "A100"], "expected one of --level, --preset"),
        (["--level", "1", "--cards", "A100", "--tokens", "-1"], "expected tokens above 0, got -1"),
        (["--level", "1", "--cards", "A100", "--tokens", "1", "--gigabytes", "1"], "got both"),
        (["--level", "1", "--cards", "A100", "--bytes-per-token", "0", "--gigabytes", "1"], "above 0, got 0"),
        (["--level", "1", "--cards", "A100", "--utilisation", "2"], "a utilisation of at most 1, got 2"),
        (["--level", "1", "--cards", "A100", "--batch-size", "0"], "batch_size of at least 1, got 0"),
        (["--level", "1", "--cards", "A100", "--sequence-length", "9999"], "at most 4096 tokens"),
        (["--level", "1", "--cards", "4xA100", "--shard", "3"], "that divides 4 cards, got 3"),
        (["--level", "1", "--cards", "A100", "--lora-rank", "0"], "lora_rank to be a count of at least 1"),
        (["--level", "1", "--cards", "A100", "--phase", "2", "--quantize-base", "int8"], "got int8"),
    ],
)
def test_a_plan_that_cannot_be(words, message, capsys):
    assert message in refused(capsys, "plan", *words)


@on_record_with("transformers")
def test_the_guide_that_is_kept_is_the_guide_as_computed(capsys):
    assert main(["plan", "--guide"]) == 0
    with open(f"{ROOT}/docs/guide-checked.md", encoding="utf-8") as file:
        kept = file.read()
    assert capsys.readouterr().out == kept, "stale: `trm-hybrid plan --guide > docs/guide-checked.md`"


def test_lora_is_asked_for_as_in_training(capsys):
    """What a plan advises, `lora_rank 16`, is `--lora-rank 16` of `plan` and of `train`."""
    words = ["plan", "--level", "1", "--cards", "A100-80GB", "--json"]
    sizes = {}
    for phase in ("1", "2"):
        for rank in ((), ("--lora-rank", "16")):
            assert main([*words, "--phase", phase, *rank]) == 0
            sizes[phase, rank] = json.loads(capsys.readouterr().out)
    for phase in ("1", "2"):
        assert sizes[phase, ()] != sizes[phase, ("--lora-rank", "16")]
    assert "LoRA" in json.dumps(sizes["1", ("--lora-rank", "16")])
