"""The command: train, resume, generate, eval, info, two processes. Bad input is one line and exit code 2."""

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, LlamaForCausalLM, T5Config

from hybrid import Halting, HybridModel, PresetConfigs, TokenHalting, record_steps
from hybrid.cli import evaluate, main
from hybrid.config import trm_fields
from hybrid.data.blocks import TokenBlocks
from hybrid.model.injection import Injection
from hybrid.training.evaluate import text_loss
from tests.support import ranks
from tests.support.tiny_text import FIELDS, OTHER_TEXT, TEXT, save_base, tiny_base, tiny_hybrid
from trm_kernels.recursion import injection as injection_ops
from trm_kernels.runtime.backend import current_backend

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "new.txt").write_text(TEXT)
    (folder / "known.txt").write_text(OTHER_TEXT)
    return folder


def options(fields):
    """As a user types them: --trm-hidden-size 16, --injection-layers 1 2."""
    for name, value in fields.items():
        yield f"--{'' if value is not False else 'no-'}{name.replace('_', '-')}"
        if isinstance(value, bool):
            continue
        yield from map(str, value if isinstance(value, list) else [value])


def train_command(base, texts, output, *more, steps=6):
    command = ["train", "--base", base, "--data", texts / "new.txt", "--known", texts / "known.txt"]
    command += ["--output", output, "--steps", steps, "--sequence-length", 16, "--batch-size", 2]
    return [str(word) for word in (*command, "--learning-rate", 1e-2, *options(FIELDS), *more)]


@pytest.fixture(scope="module")
def trained(base, texts, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("run")
    assert main(train_command(base, texts, folder, "--save-every", "3")) == 0
    return folder


def refused(capsys, *argv):
    """The one line of a command that cannot be done."""
    assert main([str(word) for word in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("trm-hybrid: ")
    assert error.count("\n") == 1
    return error


# train


def test_train_writes_a_hybrid(trained, base):
    model = AutoModelForCausalLM.from_pretrained(trained / "checkpoint-000006")
    assert isinstance(model, HybridModel)
    assert {name: getattr(model.config, name) for name in FIELDS} == FIELDS
    assert model.config.base_model_name_or_path == str(base)
    assert all(p.abs().sum() > 0 for p in model.trm_parameters())
    AutoTokenizer.from_pretrained(trained / "checkpoint-000006")
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["held_out"].keys() for line in lines if "held_out" in line] == [{"new", "known"}] * 2
    assert (trained / "curve.png").stat().st_size > 5000


def test_train_says_what_came_of_it(base, texts, tmp_path, capsys):
    assert main(train_command(base, texts, tmp_path / "run", "--log-every", "3")) == 0
    out = capsys.readouterr().out
    hybrid = tiny_hybrid()
    trained, total = (
        sum(p.numel() for p in hybrid.trm_parameters()),
        sum(p.numel() for p in hybrid.parameters()),
    )
    assert f"phase 1: trains {trained:,} of {total:,} parameters" in out
    assert re.search(r"step 3/6  loss \d\.\d{4}  [\d,]+ tokens/s  \d+:\d\d left", out)
    for name in ("new", "known"):
        assert re.search(rf"held-out loss, {name} text: \d\.\d{{4}} -> \d\.\d{{4}} nats per token", out)
    assert "checkpoint-000006" in out


def test_a_backend_is_chosen_for_a_command(trained, base, texts, tmp_path, monkeypatch, capsys):
    """On a CPU it is the reference either way, but for SDPA; the log says which and why, once."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen, injection_in = [], injection_ops.injection_in

    def spy(*given, **more):
        chosen.append(current_backend())
        return injection_in(*given, **more)

    monkeypatch.setattr(injection_ops, "injection_in", spy)
    weights = []
    for name, why in (("auto", "reference (auto: no CUDA device)"), ("reference", "reference (asked for)")):
        folder = tmp_path / name
        assert main(train_command(base, texts, folder, "--backend", name, steps=2)) == 0
        assert re.findall("^backend: (.*)$", capsys.readouterr().out, re.MULTILINE) == [why]
        weights.append(load_file(folder / "checkpoint-000002" / "model.safetensors"))
        assert set(chosen) == {name}
        chosen.clear()
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-4, atol=1e-4)  # Adam's steps are 1e-3
    for command in (["generate", "--prompt", "a"], ["eval", "--data", str(texts / "new.txt")]):
        more = ["--sequence-length", "16"] if command[0] == "eval" else ["--max-new-tokens", "2"]
        assert main([*command, *more, "--model", str(trained), "--backend", "reference"]) == 0
        assert set(chosen) == {"reference"}
        chosen.clear()
    assert current_backend() == "auto", "and for this command only"


def test_a_resumed_command_ends_where_a_straight_one_does(trained, base, texts, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(*args):
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("hybrid.training.curve.draw", stop)
        main(train_command(base, texts, tmp_path / "run", "--save-every", "3"))
    assert not (tmp_path / "run" / "checkpoint-000006").exists()
    assert main(train_command(base, texts, tmp_path / "run", "--save-every", "3", "--resume")) == 0
    model, straight = (
        (folder / "checkpoint-000006" / "model.safetensors").read_bytes()
        for folder in (tmp_path / "run", trained)
    )
    assert model == straight


def test_phase_2_goes_on_from_a_saved_hybrid(trained, texts, tmp_path, capsys):
    command = ["train", "--model", trained, "--phase", 2, "--data", texts / "new.txt", "--steps", 4]
    command += ["--output", tmp_path / "run", "--sequence-length", 16, "--gradient-checkpointing"]
    assert main([str(word) for word in command]) == 0
    before = AutoModelForCausalLM.from_pretrained(trained / "checkpoint-000006").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-000004")
    assert after.config.base_model_name_or_path is None
    changed = {name for name, t in after.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == before.keys()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["learning_rate"] == 1e-5

    assert main(["generate", "--model", str(tmp_path / "run"), "--prompt", "1 and"]) == 0


def test_a_half_precision_base_stays_so_in_phase_1(base, texts, tmp_path):
    assert (
        main(train_command(base, texts, tmp_path, "--dtype", "float16", "--trm-num-key-value-heads", "1"))
        == 0
    )
    tensors = AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint-000006", dtype="float16"
    ).named_parameters()
    dtypes = {("trm" in name, p.dtype) for name, p in tensors}
    assert dtypes == {(True, torch.float32), (False, torch.float16)}


def test_a_config_from_a_file_a_preset_or_a_saved_hybrid(base, texts, trained, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(FIELDS))
    saved = trained / "checkpoint-000006" / "config.json"
    counts = []
    for words in (["--config", file], ["--config", saved], list(options(FIELDS))):
        assert main(["info", "--base", str(base), *map(str, words)]) == 0
        counts.append(capsys.readouterr().out)
    assert counts[0] == counts[1] == counts[2]
    assert main(["info", "--base", str(base), "--config", str(file), "--trm_num_layers=2"]) == 0
    assert capsys.readouterr().out != counts[0]


def test_every_field_is_an_option_of_its_own_name_and_type():
    from hybrid.cli.block import config_of
    from hybrid.cli.parser import parse

    base = tiny_base().config
    fields = {
        "injection_layers": [0, 2],
        "trm_hidden_size": 24,
        "trm_num_heads": 4,
        "trm_num_layers": 3,
        "trm_num_key_value_heads": 2,
        "trm_intermediate_size": 40,
        "num_recursion_steps": 5,
        "num_cycles": 3,
        "grad_cycles": 2,
        "deep_supervision": True,
        "injection_strength": 0.5,
        "blending_strategy": "gated",
        "recursion_sampling": "uniform",
        "recursion_seed": 7,
        "trm_rope_theta": 500.0,
        "trm_rms_norm_eps": 1e-4,
        "trm_dtype": "bfloat16",
        "trm_save": "step",
        "trm_attention": "sdpa",
        "trm_regime": "per_op",
        "trm_quantize": "int8",
        "trm_input_norm": False,
        "trm_cache": "all",
        "lora_rank": 4,
    }
    assert fields.keys() == set(trm_fields())
    config = config_of(parse(["info", *options(fields)]), base)
    assert {name: getattr(config, name) for name in fields} == fields
    assert config_of(parse(["info", "--grad-cycles", "none"]), base).grad_cycles is None
    assert config_of(parse(["info", "--trm-cache", "last"]), base).trm_cache == "last"
    preset = config_of(parse(["info", "--preset", "tiny", "--num-recursion-steps", "2"]), base)
    assert preset.to_dict() == PresetConfigs.tiny().to_dict() | {"num_recursion_steps": 2}


def test_rows_with_labels(base, texts, tmp_path, capsys):
    """They are trained on and measured as they are; the share of right answers is among what eval says."""
    rows = [{"text": list(f"{i % 7}abc"), "answers": [None, "a", None, str(i % 7)]} for i in range(90)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = train_command(base, texts, tmp_path / "run", "--data", tmp_path / "rows.jsonl", steps=60)
    del command[command.index("--known") : command.index("--output")]
    kept = ["--keep", str(texts / "known.txt"), "--keep-ratio", "0.25"]
    assert main([*command, "--batch-size", "8", *kept]) == 0
    out = capsys.readouterr().out
    assert f"kept: {texts}/known.txt, 25.0% of each step" in out
    before, after = map(float, re.findall(r"held-out loss, known text: (\S+) -> (\S+) nats", out)[0])
    assert after < before, "the tiny base knows nothing, so that what is kept is learned"
    assert f"rows with labels, at most 16 tokens, from {tmp_path}/rows.jsonl; held out: 5 of new text" in out
    evaluation = ["eval", "--model", tmp_path / "run", "--sequence-length", 16, "--data"]
    assert main([str(word) for word in (*evaluation, tmp_path / "rows.jsonl", texts / "new.txt")]) == 0
    labels, text = capsys.readouterr().out.splitlines()
    found = re.search(
        r"rows.jsonl: loss \S+ nats per token, perplexity \S+, (\S+)% right of 180 labelled tokens in 90 "
        r"rows; (\d+) rows wholly right",
        labels,
    )
    assert found and float(found[1]) > 60
    right = round(float(found[1]) * 1.8)
    assert right - 90 <= int(found[2]) <= right / 2, "two labels a row"
    assert text.endswith("tokens in sequences of 16; 7 more at the end fill none")
    error = refused(capsys, *command, "--sequence-length", 4, "--output", tmp_path / "again")
    assert "rows.jsonl, line 1: expected at most 4 tokens (the sequence length), got 5" in error


def test_two_processes_train_as_one(base, texts, tmp_path):
    """Each with half of the batch: the same data, the same n, the same averaged gradient."""
    # one of a step's four rows is of the kept text, and one process has none of it
    more = ["--log-every", "1", "--num-cycles", "2", "--keep", texts / "known.txt", "--keep-ratio", "0.25"]
    command = train_command(base, texts, tmp_path / "two", *more)

    def run():
        assert main([str(word) for word in command]) == 0

    ended = ranks.run(run)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("step 6/6") == 1  # one of them speaks

    command = train_command(base, texts, tmp_path / "one", *more)
    assert main([*command, "--batch-size", "4"]) == 0
    runs = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        runs.append([[line.get("loss", 0), *line.get("held_out", {}).values()] for line in lines])
    assert [len(numbers) for numbers in runs[0]] == [3, 1, 1, 1, 1, 1, 3], "held out before and after"
    for one, two in zip(*runs, strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    one, two = (
        AutoModelForCausalLM.from_pretrained(tmp_path / run / "checkpoint-000006") for run in ("one", "two")
    )
    for ours, theirs in zip(one.trm_parameters(), two.trm_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


def test_accelerate_launches_it():
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "-m", "hybrid", "info"]
    ended = subprocess.run(
        [*launch, "--preset", "llama_2_7b_level1"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "trained in phase 1" in ended.stdout


def test_engines_of_accelerate_are_refused(base, texts, tmp_path, monkeypatch, capsys):
    """As after `accelerate launch --use_fsdp`, which on a CPU would train copies without a word."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    error = refused(capsys, *train_command(base, texts, tmp_path))
    assert "got FSDP from accelerate's configuration; --shard is FSDP2" in error


# generate, eval, info, demo


def test_generate_continues_a_prompt(trained, base, capsys):
    command = ["generate", "--model", str(trained), "--prompt", "12 and", "--max-new-tokens", "9"]
    assert main(command) == 0
    model = AutoModelForCausalLM.from_pretrained(trained / "checkpoint-000006")
    tokenizer = AutoTokenizer.from_pretrained(base)
    inputs = tokenizer("12 and", return_tensors="pt")
    wanted = model.generate(**inputs, max_new_tokens=9, do_sample=False)[0]
    assert capsys.readouterr().out == tokenizer.decode(wanted, skip_special_tokens=True) + "\n"

    assert main([*command, "--num-recursion-steps", "1"]) == 0
    wanted = model.generate(**inputs, max_new_tokens=9, do_sample=False, num_recursion_steps=1)[0]
    assert capsys.readouterr().out == tokenizer.decode(wanted, skip_special_tokens=True) + "\n"


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--recursion-threshold", "0.3"], Halting(0.3)),
        (
            ["--recursion-threshold", "0.3", "--recursion-patience", "2", "--recursion-watch", "latent"],
            Halting(0.3, patience=2, watch="latent"),
        ),
        (["--recursion-patience", "1"], TokenHalting(1)),
    ],
)
def test_generate_and_eval_stop_early(trained, base, texts, capsys, options, rule):
    assert (
        main(["generate", "--model", str(trained), "--prompt", "12", "--max-new-tokens", "4", *options]) == 0
    )
    told = capsys.readouterr()
    model = AutoModelForCausalLM.from_pretrained(trained / "checkpoint-000006")
    tokenizer = AutoTokenizer.from_pretrained(base)
    inputs = tokenizer("12", return_tensors="pt")
    with record_steps() as record:
        wanted = model.generate(**inputs, max_new_tokens=4, do_sample=False, halting=rule, use_cache=False)[0]
    assert told.out == tokenizer.decode(wanted, skip_special_tokens=True) + "\n"
    n = model.config.num_recursion_steps
    assert re.search(rf"\d\.\d\d recursion steps a token of at most {n}, \d+\.\d\d evaluations", told.err)

    file = str(texts / "known.txt")
    command = ["eval", "--model", str(trained), "--sequence-length", "16", "--data", file, *options]
    assert main(command) == 0
    blocks = TokenBlocks.read([file], tokenizer, 16, separate=True)
    model.halting = rule
    with record_steps() as record:
        loss = text_loss(model, blocks, 8)
    out = capsys.readouterr().out
    assert f"{file}: loss {loss.per_token:.4f} nats" in out
    assert f"{file}: {record.mean_steps:.2f} recursion steps a token of at most {n}" in out


ANSWERING = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>{% endfor %}" + (
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("from_file", [True, False])
def test_generate_answers_a_turn_of_a_chat(from_file, tmp_path, capsys):
    folder, template = save_base(tmp_path / "base"), tmp_path / "a.jinja"
    (template if from_file else folder / "chat_template.jinja").write_text(ANSWERING)
    command = ["generate", "--model", folder, "--prompt", " 1 and", "--chat", "--max-new-tokens", 5]
    command += ["--chat-template", template] * from_file
    assert main([str(word) for word in command]) == 0
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("[user] 1 and<end>[assistant]", return_tensors="pt")["input_ids"]
    said = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert capsys.readouterr().out == tokenizer.decode(said, skip_special_tokens=True) + "\n"


def test_a_chat_that_cannot_be(base, tmp_path, capsys):
    command = ["generate", "--model", base, "--prompt", "1"]
    assert "a chat template for a chat, got one without" in refused(capsys, *command, "--chat")
    template = tmp_path / "a.jinja"
    template.write_text("{{ messages }}")
    assert "expected --chat with --chat-template" in refused(capsys, *command, "--chat-template", template)
    tasks = ["eval", "--model", base, "--tasks", "piqa", "--chat-template", template]
    assert "expected --data, or --tasks and --apply-chat-template" in refused(capsys, *tasks)
    for content, message in (
        (None, "got no text"),
        (b"\xff", "got no text"),
        (b"", "does not read `messages`"),
        (b"{% for m in messages %}", "chat template of Jinja, got one that it refuses"),
        (b"{% if not messages %}{% endif %}", "got nothing for this chat"),
        (b"{{ raise_exception(messages[0].role) }}", "got one it refuses (user)"),
        (b"{{ messages }}{% if add_generation_prompt %}{{ 1 / 0 }}{% endif %}", "got one it refuses (div"),
    ):
        if content is None:
            template.unlink()
        else:
            template.write_bytes(content)
        assert message in refused(capsys, *command, "--chat", "--chat-template", template)


def test_a_prompt_of_tokens_that_the_base_has_no_embedding_for(base, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(base)
    known = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "base")  # not resized
    tokenizer.save_pretrained(tmp_path / "base")
    capsys.readouterr()
    said = refused(capsys, "generate", "--model", tmp_path / "base", "--prompt", "12<new>")
    assert f"expected a tokenizer for the model's vocabulary of {known} tokens, got token {known}" in said


def test_sampling_repeats_by_its_seed(base, capsys):
    outs = []
    for seed in ("0", "0", "1"):
        command = ["generate", "--model", str(base), "--prompt", "12", "--temperature", "5", "--seed", seed]
        assert main(command) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]


def test_sampling_is_among_the_likeliest_that_were_asked_for(base, capsys, monkeypatch):
    """At this temperature all tokens are about as likely; one that is left is what greedy search takes."""

    def said(*options):
        assert main(["generate", "--model", str(base), "--prompt", "12", *options]) == 0
        return capsys.readouterr().out

    hot, greedy = ("--temperature", "100"), said()
    assert said(*hot) != greedy
    assert said(*hot, "--top-k", "1") == greedy
    assert said(*hot, "--top-p", "0.000001") == greedy

    asked = []
    generate = LlamaForCausalLM.generate
    monkeypatch.setattr(
        LlamaForCausalLM, "generate", lambda *a, **options: asked.append(options) or generate(*a, **options)
    )
    said(*hot)
    said(*hot, "--top-k", "7", "--top-p", "0.5")
    assert [(how["top_k"], how["top_p"]) for how in asked] == [(50, 1.0), (7, 0.5)]


def test_eval_measures_each_file(trained, texts, capsys):
    files = [str(texts / "new.txt"), str(texts / "known.txt")]
    command = ["eval", "--model", str(trained), "--sequence-length", "16", "--data", *files]
    assert main(command) == 0
    out = capsys.readouterr().out
    pattern = r"(\S+): loss (\d\.\d+) nats per token, perplexity (\S+), ([\d,]+) tokens in sequences of 16"
    rows = re.findall(pattern, out)
    assert [row[0] for row in rows] == files
    assert f"in sequences of 16; {(len(TEXT) + 1) % 16} more at the end fill none" in out
    for _, loss, perplexity, _ in rows:
        assert float(perplexity) == pytest.approx(torch.tensor(float(loss)).exp().item(), rel=1e-3)
    assert (
        int(rows[0][3].replace(",", "")) == (len(TEXT) + 1) // 16 * 15
    )  # the first of a row is not predicted

    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert float(rows[1][1]) == pytest.approx(metrics[-1]["held_out"]["known"], abs=1e-3)
    assert main([*command, "--num-recursion-steps", "1"]) == 0
    assert capsys.readouterr().out != out


@pytest.fixture
def lm_eval_calls(monkeypatch):
    """What a harness in the place of lm-eval is called with; all its tasks are half right."""
    calls = {}

    def evaluate(model, tasks, apply_chat_template):
        calls.update(tasks=tasks, apply_chat_template=apply_chat_template)
        return {"results": {task: {"alias": task, "acc": 0.5, "sample_len": 6} for task in tasks}}

    harness = types.ModuleType("lm_eval")
    harness.simple_evaluate = evaluate
    models, huggingface = types.ModuleType("lm_eval.models"), types.ModuleType("lm_eval.models.huggingface")
    huggingface.HFLM = lambda **given: calls.update(given)
    for module in (harness, models, huggingface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_eval_runs_tasks_of_lm_eval(trained, lm_eval_calls, capsys):
    assert (
        main(["eval", "--model", str(trained), "--tasks", "piqa", "arc", "--num-recursion-steps", "2"]) == 0
    )
    out, err = capsys.readouterr()
    assert out == "piqa: acc 0.5\narc: acc 0.5\n"
    assert "--apply-chat-template" not in err, "the tokenizer has none"
    assert lm_eval_calls["tasks"] == ["piqa", "arc"] and not lm_eval_calls["apply_chat_template"]
    assert isinstance(lm_eval_calls["pretrained"], HybridModel)
    assert lm_eval_calls["pretrained"].config.num_recursion_steps == 2


def test_tasks_are_asked_with_the_chat_template(trained, lm_eval_calls, tmp_path, capsys):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    words = ["eval", "--model", str(trained), "--tasks", "piqa"]
    assert main([*words, "--apply-chat-template"]) == 2
    assert "expected a tokenizer with a chat template" in capsys.readouterr().err
    assert main([*words, "--apply-chat-template", "--chat-template", str(template)]) == 0
    assert lm_eval_calls["apply_chat_template"]
    assert lm_eval_calls["tokenizer"].chat_template == template.read_text()
    assert main([*words, "--chat-template", str(template)]) == 2
    assert "--tasks and --apply-chat-template" in capsys.readouterr().err
    assert main([*words[:3], "--data", "some.txt", "--apply-chat-template"]) == 2
    assert "expected --tasks with --apply-chat-template" in capsys.readouterr().err


def test_a_template_that_tasks_do_not_use_is_told(trained, lm_eval_calls, monkeypatch, capsys):
    load = evaluate.load

    def with_template(arguments):
        model, tokenizer = load(arguments)
        tokenizer.chat_template = "{{ messages }}"
        return model, tokenizer

    monkeypatch.setattr(evaluate, "load", with_template)
    assert main(["eval", "--model", str(trained), "--tasks", "piqa"]) == 0
    assert "asked without the tokenizer's chat template" in capsys.readouterr().err


def test_a_task_that_lm_eval_does_not_have_is_named(trained, monkeypatch, capsys):
    def evaluate(model, tasks, apply_chat_template):
        raise KeyError(f"Missing task {tasks[0]!r}")

    harness = types.ModuleType("lm_eval")
    harness.simple_evaluate = evaluate
    models, huggingface = types.ModuleType("lm_eval.models"), types.ModuleType("lm_eval.models.huggingface")
    huggingface.HFLM = lambda **given: None
    for module in (harness, models, huggingface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert main(["eval", "--model", str(trained), "--tasks", "piqqa"]) == 2
    assert "expected --tasks that lm-eval has, got 'piqqa'" in capsys.readouterr().err


def counts_of(out):
    rows = re.findall(r"^(\S.*?) {2,}([\d,]+)$", out, flags=re.MULTILINE)
    return {name: int(number.replace(",", "")) for name, number in rows}


def test_info_counts_what_is_there(base, trained, capsys):
    fields = FIELDS | {"injection_layers": [0, 2], "blending_strategy": "gated"}
    assert main(["info", "--base", str(base), *options(fields)]) == 0
    counts = counts_of(capsys.readouterr().out)
    model = tiny_hybrid(**fields)
    points = [m for m in model.modules() if isinstance(m, Injection)]
    block = sum(p.numel() for p in model.trm_parameters())
    everything = sum(p.numel() for p in model.parameters())
    for point, injection in zip((0, 2), points, strict=True):
        of_point = [count for name, count in counts.items() if name.startswith(f"layer {point}: ")]
        assert sum(of_point) == sum(p.numel() for p in injection.parameters())
        assert len(of_point) == 4
        assert counts[f"layer {point}: recursion"] == sum(p.numel() for p in injection.recursion.parameters())
        assert counts[f"layer {point}: in_proj"] == counts[f"layer {point}: out_proj"] == 16 * 32
    assert counts["base"] == everything - block
    assert counts["total"] == counts["trained in phase 2"] == everything
    assert counts["trained in phase 1"] == block

    assert main(["info", "--model", str(trained)]) == 0
    out = capsys.readouterr().out
    assert counts_of(out)["total"] == sum(p.numel() for p in tiny_hybrid().parameters())
    assert counts_of(out)["num_recursion_steps"] == tiny_hybrid().config.num_recursion_steps
    assert re.search(rf"^base {{2,}}{base}$", out, re.MULTILINE)

    assert main(["info", "--base", str(base), *options(FIELDS | {"lora_rank": 2})]) == 0
    counts = counts_of(capsys.readouterr().out)
    assert (
        counts["base"]
        + counts["LoRA of rank 2"]
        + sum(count for name, count in counts.items() if name.startswith("layer "))
        == counts["total"]
    )


def test_info_knows_the_levels_without_a_download(capsys):
    assert main(["info", "--preset", "llama_2_7b_level1"]) == 0
    counts = counts_of(capsys.readouterr().out)
    assert counts["base"] == 6_738_415_616  # as published
    d, inner = 2048, 5632
    block = 2 * (4 * d * d + 3 * d * inner) + 2 * d
    assert counts["trained in phase 1"] == 2 * (block + 2 * 4096 * d)
    assert main(["info", "--preset", "tiny", "--base", "LLaMA-2-13B"]) == 0
    assert counts_of(capsys.readouterr().out)["base"] == 13_015_864_320


def test_demo_is_called_when_it_is_asked_for(monkeypatch):
    calls = []
    module = types.ModuleType("hybrid.demo.run")
    module.run = lambda **given: calls.append(given) or 0
    monkeypatch.setitem(sys.modules, "hybrid.demo", types.ModuleType("hybrid.demo"))
    monkeypatch.setitem(sys.modules, "hybrid.demo.run", module)
    assert main(["demo", "--quick", "--seed", "3"]) == 0
    assert calls == [{"output": Path("demo-output"), "seed": 3, "quick": True}]


def test_version_and_help(capsys):
    for words in (["--version"], ["--help"], ["train", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
    assert "--injection-layers" in capsys.readouterr().out


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"injection_layers": [3]}, "expected injection_layers in 0..2 for a base of 2 layers, got [3]"),
        ({"injection_layers": [1, 1]}, "expected injection_layers sorted, each once, got [1, 1]"),
        ({"injection_layers": [2, 1]}, "expected injection_layers sorted, each once, got [2, 1]"),
        ({"trm_num_heads": 3}, "trm_hidden_size to be a multiple of trm_num_heads, got 16 and 3"),
        (
            {"trm_num_heads": 4, "trm_num_key_value_heads": 3},
            "a multiple of trm_num_key_value_heads, got 4 and 3",
        ),
        ({"num_recursion_steps": 0}, "num_recursion_steps to be a count of at least 1, got 0"),
        ({"trm_num_layers": -1}, "trm_num_layers of at least 1, got -1"),
        ({"blending_strategy": "mixed"}, "blending_strategy to be one of linear, gated, got 'mixed'"),
        ({"num_cycles": "two"}, "argument --num-cycles: invalid int value: 'two'"),
        ({"trm_hiden_size": 16}, "unrecognized arguments: --trm-hiden-size"),
    ],
)
def test_a_block_that_cannot_be(fields, message, base, texts, tmp_path, capsys):
    assert message in refused(capsys, *train_command(base, texts, tmp_path / "run", *options(fields)))
    assert not list(tmp_path.glob("run/checkpoint-*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected text in {file}, got an empty file"),
        (b"ab\xffc", "expected UTF-8 in {file}, got byte 0xff at byte 2"),
        (b"abc", "expected at least two sequences of 16 tokens in {file}, one to hold out, got 0"),
        (b"abcdefghijklmnopqrst", "two sequences of 16 tokens in {file}, one to hold out, got 1"),
    ],
)
def test_data_that_cannot_be_used(content, message, base, texts, tmp_path, capsys):
    file = tmp_path / "data.txt"
    file.write_bytes(content)
    command = train_command(base, texts, tmp_path / "run", "--data", file)
    assert message.format(file=file) in refused(capsys, *command)


def test_an_error_is_one_line_whatever_is_in_it(base, texts, tmp_path, capsys):
    assert "got no such file" in refused(
        capsys, *train_command(base, texts, tmp_path, "--data", "two\nlines.txt")
    )


def test_a_jsonl_line_without_the_field(base, texts, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    error = refused(capsys, *train_command(base, texts, tmp_path / "run", "--data", tmp_path / "data.jsonl"))
    assert (
        "data.jsonl, line 2: expected text or a chat in the field 'text', got body. Another field: --field"
        in error
    )


def test_an_output_folder_that_cannot_be_written_to(base, texts, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    error = refused(capsys, *train_command("no-such-base", texts, tmp_path / "file" / "run"))
    assert "expected an output folder that can be written to" in error  # before it looks for the base


def test_a_base_that_is_not_there(texts, tmp_path, capsys):
    error = refused(capsys, *train_command(tmp_path / "gone", texts, tmp_path / "run"))
    assert f"expected a model of transformers at {tmp_path / 'gone'}, got none that can be loaded" in error
    assert "there is no such folder" in error


@pytest.mark.parametrize("config", [BertConfig(num_hidden_layers=2), T5Config(num_layers=2)])
def test_a_base_that_is_no_decoder(config, base, texts, tmp_path, capsys):
    save_base(tmp_path / "base")
    config.save_pretrained(tmp_path / "base")
    error = refused(capsys, *train_command(tmp_path / "base", texts, tmp_path / "run"))
    assert "causal" in error


def test_a_damaged_base(texts, tmp_path, capsys):
    folder = save_base(tmp_path / "base")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    error = refused(capsys, *train_command(folder, texts, tmp_path / "run"))
    assert f"expected a causal language model at {folder}, got none that can be loaded" in error


def test_a_resume_of_another_width(trained, base, texts, capsys):
    more = ["--save-every", 3, "--resume", "--trm-hidden-size", 32]
    error = refused(capsys, *train_command(base, texts, trained, *more))
    assert "config.trm_hidden_size 16 as it began, got 32" in error


def test_a_checkpoint_of_another_width(trained, texts, tmp_path, capsys):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in (trained / "checkpoint-000006").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"trm_hidden_size": 32}))
    error = refused(capsys, "generate", "--model", folder, "--prompt", "a")
    assert re.search(r"expected \(32, 32\), got \(16, 32\)", error) or "expected (" in error


def test_a_saved_hybrid_has_its_block(trained, texts, tmp_path, capsys):
    error = refused(capsys, *train_command(trained, texts, tmp_path / "run"))
    assert "expected no --injection-layers with a saved hybrid" in error


def test_a_text_longer_than_the_base_can_read(base, texts, tmp_path, capsys):
    error = refused(capsys, *train_command(base, texts, tmp_path / "run", "--sequence-length", 129))
    assert "expected --sequence-length of at most 128 tokens" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "expected steps to be a count of at least 1, got 0"),
        (["--batch-size", "-2"], "expected batch_size to be a count of at least 1, got -2"),
        (["--learning-rate", "-1"], "expected learning_rate above 0, got -1"),
        (["--weight-decay", "-1"], "TrainSettings: expected weight_decay from 0 on, got -1"),
        (["--betas", "0.9", "1"], "expected betas of at least 0 and below 1, got"),
        (["--phase", "3"], "argument --phase: invalid choice: 3"),
        (["--resume"], "expected a run to resume in"),
        (["--backend", "cuda"], "argument --backend: invalid choice: 'cuda'"),
        (["--held-out", "gone.txt"], "expected a file gone.txt, got no such file"),
        (["--keep", "gone.txt"], "expected --keep and --keep-ratio together, got one"),
        (["--length-curriculum", "8"], "expected FIRST:STEPS, two whole numbers such as 8:500, got '8'"),
        (
            ["--length-curriculum", "17:3"],
            "expected a first length in 2..16 tokens and at least 1 step, got 17",
        ),
        (["--recursion-curriculum", "1"], "expected FIRST:STEPS, such as 2:500 (n)"),
        (["--recursion-curriculum", "9:3"], "expected a first n and T of at most"),
        (
            ["--recursion-curriculum", "1:2"],
            "a recursion_curriculum or recursion_sampling='uniform', got both",
        ),
        (
            ["--recursion-curriculum", "1:7", "--recursion-sampling", "fixed"],
            "expected a recursion_curriculum within 6 steps (steps), got 7",
        ),
    ],
)
def test_a_training_that_cannot_be(words, message, base, texts, tmp_path, capsys):
    assert message in refused(capsys, *train_command(base, texts, tmp_path / "run", *words))


def test_a_recursion_begins_shallow(base, texts, tmp_path):
    more = ["--recursion-curriculum", "1x1:4", "--recursion-sampling", "fixed", "--num-cycles", "2"]
    with record_steps() as record:
        assert main(train_command(base, texts, tmp_path / "run", *more)) == 0
    seen = [int(one.evaluations[0, 0]) for one in record.forwards]
    # T (n + 1) at (1, 1), (1, 1), (2, 1), (2, 1), (3, 2), (3, 2); before and after, held-out texts at (3, 2)
    steps = [2, 2, 3, 3, 8, 8]
    assert any(seen[i : i + 6] == steps for i in range(len(seen))) and seen[0] == seen[-1] == 8


def test_triton_where_it_cannot_run(trained, base, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    why = "backend: 'triton' cannot run here: PyTorch finds no CUDA device"
    assert why in refused(capsys, *train_command(base, texts, tmp_path / "run", "--backend", "triton"))
    assert why in refused(capsys, "generate", "--model", trained, "--prompt", "a", "--backend", "triton")
    assert why in refused(capsys, "eval", "--model", trained, "--data", "x", "--backend", "triton")
    assert "invalid choice: 'triton'" in refused(capsys, "demo", "--backend", "triton")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required"),
        (["fly"], "invalid choice: 'fly'"),
        (["eval", "--model", "MODEL"], "expected --data or --tasks, got neither"),
        (
            ["generate", "--model", "MODEL", "--prompt", ""],
            "expected --prompt of at least one token, got none",
        ),
        (
            ["generate", "--model", "MODEL", "--prompt", "a", "--num-recursion-steps", "0"],
            "of at least 1, got 0",
        ),
        (["generate", "--model", "BASE", "--prompt", "a", "--num-recursion-steps", "2"], "expected a hybrid"),
        (["eval", "--model", "BASE", "--data", "x", "--recursion-threshold", "0.1"], "expected a hybrid"),
        (["eval", "--model", "MODEL", "--data", "x", "--recursion-threshold", "-1"], "of at least 0, got -1"),
        (["eval", "--model", "MODEL", "--data", "x", "--recursion-patience", "0"], "of at least 1, got 0"),
        (
            ["eval", "--model", "MODEL", "--data", "x", "--recursion-watch", "latent"],
            "expected --recursion-threshold with --recursion-watch",
        ),
        (["info"], "expected --base, a saved hybrid as --model, or the --preset of a level"),
        (["info", "--preset", "tiny", "--config", "x.json"], "not allowed with argument"),
        (["info", "--base", "BASE", "--config", "gone.json"], "gone.json"),
    ],
)
def test_a_command_that_cannot_be(argv, message, base, trained, capsys):
    places = {"MODEL": trained, "BASE": base}
    assert message in refused(capsys, *(places.get(word, word) for word in argv))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a JSON object with fields of HybridConfig, got none"),
        ("[1]", "expected a JSON object with fields of HybridConfig, got list"),
        ('{"trm_hiden_size": 64}', "got 'trm_hiden_size'; did you mean 'trm_hidden_size'?"),
        ('{"width": 3}', "got 'width'"),
    ],
)
def test_a_config_file_that_cannot_be(content, message, base, tmp_path, capsys):
    (tmp_path / "config.json").write_text(content)
    assert message in refused(capsys, "info", "--base", base, "--config", tmp_path / "config.json")


def test_tasks_need_a_package(trained, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    error = refused(capsys, "eval", "--model", trained, "--tasks", "piqa")
    assert "pip install 'trm-hybrid[eval]'" in error
