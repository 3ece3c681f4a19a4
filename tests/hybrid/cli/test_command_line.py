"""The options: made from dataclasses, named once, explained; typos; points by depth; what is imported."""

import dataclasses
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from hybrid import HybridConfig, HybridModel
from hybrid.cli import main
from hybrid.cli.block import config_of
from hybrid.cli.options import PRESETS, BackendOptions, BlockOptions, InferenceOptions, TrainOptions
from hybrid.cli.parser import COMMANDS, parse, parser_of
from hybrid.config import trm_fields
from hybrid.data.rows import LOSS_ON
from hybrid.model.quantized_base import QUANTIZE_BASE
from hybrid.training.settings import TrainSettings
from tests.hybrid.cli.test_cli import base, options, refused, texts, train_command, trained  # noqa: F401  fixtures
from tests.support import fresh
from tests.support.tiny_text import FIELDS, save_base
from trm_kernels.recursion.adaptive import WATCHED
from trm_kernels.runtime.backend import NAMES

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "transformers", "numpy", "datasets", "torchao", "accelerate", "matplotlib", "rich")


def python(*words, check=True):
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=check
    )


# One source of truth


def test_the_block_has_the_fields_of_hybrid_config():
    parameters = inspect.signature(HybridConfig.__init__).parameters
    fields = {field.name: field for field in dataclasses.fields(BlockOptions)}
    assert list(fields) == trm_fields()
    for name, field in fields.items():
        assert field.default == parameters[name].default
        assert field.type == parameters[name].annotation


def test_choices_are_those_of_the_code():
    def choices(options, name):
        kind = next(field.type for field in dataclasses.fields(options) if field.name == name)
        return set(re.findall(r"'(\w+)'", str(kind)))

    from hybrid.presets import PRESETS as made

    assert choices(BackendOptions, "backend") == set(NAMES)
    assert choices(InferenceOptions, "recursion_watch") == set(WATCHED)
    assert choices(TrainOptions, "quantize_base") == set(QUANTIZE_BASE)
    assert choices(COMMANDS["train"].takes[2], "loss_on") == set(LOSS_ON)
    assert list(PRESETS) == sorted(made)


def test_every_setting_of_a_training_is_an_option():
    given = parse(["train", "--base", "b", "--data", "d", "--output", "o", "--steps", "9"])
    for field in dataclasses.fields(TrainSettings):
        wanted = {"output_dir": Path("o"), "steps": 9, "learning_rate": None}.get(field.name, field.default)
        assert getattr(given, field.name) == wanted


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_default_and_an_example_that_works(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    example = COMMANDS[command].example
    assert f"\nexample: {example}\n" in capsys.readouterr().out
    program, *words = shlex.split(example)
    assert (program, parse(words).module) == ("trm-hybrid", COMMANDS[command].module)
    for action in parser_of(command)._actions:
        shown = re.findall(r"\(default: (.+)\)$", action.help)
        assert action.dest == "help" or (not shown if action.required else shown and shown != ["None"])


def test_without_docstrings():
    assert "--trm-hidden-size" in python("-OO", "-m", "hybrid", "info", "--help").stdout


def test_plan_and_train_call_the_same_the_same():
    given = {
        name: set(vars(parse(words)))
        for name, words in (
            ("plan", ["plan"]),
            ("train", ["train", "--base", "b", "--data", "d", "--output", "o", "--steps", "9"]),
        )
    }
    assert {"accumulate", "shard", "quantize_base", "dtype", "batch_size", "phase"} <= given["plan"] & given[
        "train"
    ]


def test_old_names_are_taken_and_said(capsys):
    old = parse(["plan", "--accumulation=3", "--shards", "4"])
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "trm-hybrid: --accumulation is called --accumulate now",
        "trm-hybrid: --shards is called --shard now",
    ]
    assert vars(old) == vars(parse(["plan", "--accumulate", "3", "--shard", "4"]))
    for words in (["--dtype", "int8"], ["--dtype=int8"]):
        for command in ("plan", "train"):
            assert "--dtype int8 is called --quantize-base int8" in refused(capsys, command, *words)


def test_all_cards_are_shards(capsys):
    plans = []
    for words in (["--shard"], ["--shard", "4"]):
        assert (
            main(["plan", "--preset", "tiny", "--base", "llama-2-7b", "--cards", "4xA100", *words, "--json"])
            == 0
        )
        plans.append(capsys.readouterr().out)
    assert plans[0] == plans[1]
    assert json.loads(plans[0])


# Typos


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["info", "--trm-hidden-siz", "16"],
            "unrecognized arguments: --trm-hidden-siz; did you mean '--trm-hidden-size'?",
        ),
        (["train", "--dat", "x"], "unrecognized arguments: --dat; did you mean '--data'?"),
        (["train", "--data", "x", "--step=5"], "unrecognized arguments: --step; did you mean '--steps'?"),
        (["eval", "--modell", "x"], "unrecognized arguments: --modell; did you mean '--model'?"),
        (
            ["generate", "--model", "x", "--prompt", "a", "--zzz"],
            "unrecognized arguments: --zzz. See trm-hybrid generate",
        ),
        (["train", "--lr", "1"], "unrecognized arguments: --lr. See trm-hybrid train --help"),
        (["--versoin"], "unrecognized arguments: --versoin; did you mean '--version'? See trm-hybrid --help"),
        (["trian"], "invalid choice: 'trian'; did you mean 'train'?"),
        (["train"], "the following arguments are required: --base/--model, --data, --output, --steps"),
        (
            ["generate", "--model", "x", "--prompt", "a", "--top-k", "3"],
            "expected --temperature with --top-k",
        ),
        (["generate", "--model", "x", "--prompt", "a", "--seed", "3"], "expected --temperature with --seed"),
        (
            ["plan", "--dtype", "float32", "--quantize-base", "int8", "--level", "1", "--cards", "1xA100"],
            "got both",
        ),
    ],
)
def test_a_typo_is_said_as_the_typo(words, message, capsys):
    assert message in refused(capsys, *words)


# Points relative to depth


@pytest.mark.parametrize(
    ("words", "points"),
    [
        ([], "1, 2"),
        (["--injection-layers", "middle", "last"], "1, 2"),
        (["--injection-layers", "0.5", "1.0"], "1, 2"),
        (["--injection-layers", "0", "1"], "0, 1"),
        (["--injection-layers", "0.0", "last"], "0, 2"),
    ],
)
def test_points_relative_to_depth(words, points, base, capsys):  # noqa: F811
    size = ["--trm-hidden-size", "16", "--trm-num-heads", "2"]
    assert main(["info", "--base", str(base), *size, *words]) == 0
    assert f"with a TRM of width 16 after layers {points}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("1.5", "expected --injection-layers in 0..2, shares in 0.0..1.0, middle or last, got 1.5"),
        ("-0.5", "shares in 0.0..1.0, middle or last, got -0.5"),
        ("-1", "expected injection_layers to be counts from 0, got [-1]"),
        ("3", "expected injection_layers in 0..2 for a base of 2 layers, got [3]"),
        ("TOP", "argument --injection-layers: expected K such as 16, 0.5, middle or last, got 'TOP'"),
        ("nan", "shares in 0.0..1.0, middle or last, got nan"),
    ],
)
def test_points_that_there_are_not(point, message, base, capsys):  # noqa: F811
    assert message in refused(capsys, "info", "--base", base, "--injection-layers", point)


def test_the_default_points_are_middle_and_last():
    for depth, points in ((1, [1]), (2, [1, 2]), (3, [2, 3]), (7, [4, 7]), (32, [16, 32])):
        for words in ([], ["--injection-layers", "middle", "last"]):
            if depth > 1 or not words:
                given = parse(["info", "--base", "b", *words])
                assert config_of(given, LlamaConfig(num_hidden_layers=depth)).injection_layers == points


def test_points_in_a_file(base, tmp_path, capsys):  # noqa: F811
    fields = {"trm_hidden_size": 16, "trm_num_heads": 2, "injection_layers": ["last"]}
    (tmp_path / "c.json").write_text(json.dumps(fields), encoding="utf-8-sig")
    assert main(["info", "--base", str(base), "--config", str(tmp_path / "c.json")]) == 0
    assert "after layers 2\n" in capsys.readouterr().out
    (tmp_path / "c.json").write_text(json.dumps(fields | {"injection_layers": ["first"]}))
    assert "expected --injection-layers in 0..2, shares in 0.0..1.0, middle or last, got first" in refused(
        capsys, "info", "--base", base, "--config", tmp_path / "c.json"
    )
    (tmp_path / "c.json").write_text("[" * 100_000)
    assert "expected a JSON object with fields" in refused(
        capsys, "info", "--base", base, "--config", tmp_path / "c.json"
    )


# What is imported


@pytest.mark.parametrize(
    "code",
    [
        "import hybrid",
        "import hybrid.cli; hybrid.cli.main(['--version'])",
        "import hybrid.cli; hybrid.cli.main(['--help'])",
        "import hybrid.cli; hybrid.cli.main(['train', '--help'])",
        "import hybrid.cli; hybrid.cli.main(['train', '--dat'])",
    ],
)
def test_nothing_heavy_before_a_command_runs(code):
    seen = f"print([m for m in {HEAVY} if m in sys.modules])"
    ask = f"import atexit, sys; atexit.register(lambda: {seen}); {code}"
    assert python("-c", ask, check=False).stdout.splitlines()[-1] == "[]"


def test_a_command_says_nothing_but_its_own(tmp_path):
    """Packages log while they are imported: torchao two libraries that it cannot load, and more."""
    typed = ["train", "--base", tmp_path / "none", "--data", "x", "--steps", "1", "--output", tmp_path]
    said = python("-m", "hybrid", *typed, check=False).stderr.splitlines()
    assert len(said) == 1 and "there is no such folder" in said[0]


def test_the_kernels_need_no_compiler_to_be_imported():
    code = "import sys, trm_kernels; from trm_kernels import TRM; print([m for m in {} if m in sys.modules])"
    assert python("-c", code.format(("torch._dynamo", "transformers", "torchao"))).stdout == "[]\n"


def test_hybrid_brings_no_more_than_transformers_and_itself():
    """torch's compiler, torchao and the like come from transformers' own model class, or not at all."""
    code = (
        "import sys; from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel;"
        "theirs = {m.split('.')[0] for m in sys.modules} | set(sys.modules); from hybrid import HybridModel;"
        "print(sorted({m.split('.')[0] for m in sys.modules} - theirs),"
        "'hybrid.training.loop' in sys.modules)"
    )
    assert python("-c", code).stdout == "['hybrid', 'trm_kernels'] False\n"


@pytest.mark.parametrize(
    "code",
    [
        "import hybrid; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import hybrid",
        "import hybrid, transformers.modeling_utils; from transformers import AutoModelForCausalLM",
        "from hybrid import HybridModel; from transformers import AutoModelForCausalLM",
        "import hybrid.cli; from transformers import AutoModelForCausalLM",
        "import hybrid.config; from transformers import AutoModelForCausalLM",
        # only asks whether it is there
        "import hybrid, importlib.util as u; u.find_spec('transformers');"
        "from transformers import AutoModelForCausalLM",
        "from hybrid.data.stream import TokenBlocks; from transformers import AutoModelForCausalLM",
    ],
)
def test_the_auto_classes_know_a_hybrid_in_any_order(code, trained):  # noqa: F811
    load = (
        f"print(type(AutoModelForCausalLM.from_pretrained({str(trained / 'checkpoint-000006')!r})).__name__)"
    )
    assert fresh.python(f"{code}; {load}") == "HybridModel\n"


@pytest.mark.parametrize(
    "code",
    [
        "import hybrid; from transformers import Trainer",
        "from transformers import Trainer; import hybrid",
        "import hybrid.training.trainer_callback",
    ],
)
def test_every_trainer_keeps_draws_in_any_order(code):
    ask = "from transformers.trainer import DEFAULT_CALLBACKS; print([c.__name__ for c in DEFAULT_CALLBACKS])"
    assert fresh.python(f"{code}; {ask}") == "['DefaultFlowCallback', 'KeepDraws']\n"


def test_a_module_that_needs_transformers_runs_as_a_program():
    """Python asks its loader for the code, and the watch for transformers has put one before that."""
    run = "runpy.run_module('hybrid.gguf_base', run_name='__main__')"
    code = f"import runpy, sys; sys.argv = ['', '--help']; {run}"
    assert "--package" in fresh.python(f"import hybrid\ntry:\n    {code}\nexcept SystemExit:\n    pass")


@pytest.mark.parametrize(
    "first", ["hybrid.config", "hybrid.model.hybrid_model", "hybrid.data.sources", "hybrid.training.loop"]
)
def test_no_module_is_run_twice(first):
    code = (
        f"import importlib, sys; module = importlib.import_module({first!r});"
        "import hybrid.model.hybrid_model, hybrid.config;"
        f"print(module is sys.modules[{first!r}], module.__spec__.origin is not None,"
        "hybrid.model.hybrid_model.HybridConfig is hybrid.config.HybridConfig is hybrid.HybridConfig)"
    )
    assert fresh.python(code).split() == ["True", "True", "True"]


def test_a_command_says_nothing_of_other_packages(trained, texts):  # noqa: F811
    command = [
        "-m",
        "hybrid",
        "eval",
        "--model",
        trained,
        "--sequence-length",
        16,
        "--data",
        texts / "new.txt",
    ]
    assert python(*command).stderr == ""


# Data


def test_columns_that_are_not_used_are_named_once(base, texts, tmp_path, capsys):  # noqa: F811
    rows = [{"text": f"{i} and one is {i + 1}", "id": i, "source": "x"} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = train_command(base, texts, tmp_path / "run", "--data", tmp_path / "a.jsonl", steps=2)
    assert main(command) == 0
    assert capsys.readouterr().out.count(f"not used of {tmp_path}/a.jsonl: the columns id, source\n") == 1


def test_loss_on_completions(tmp_path, texts, capsys):  # noqa: F811
    from tests.hybrid.data.test_chats import CHAT, CHATML, MARKED

    folder = save_base(tmp_path / "base")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(60)))
    command = ["train", "--base", folder, "--data", tmp_path / "a.jsonl", "--steps", 2, "--batch-size", 2]
    command += ["--sequence-length", 32, "--loss-on", "completions", *options(FIELDS)]
    for template, code in ((MARKED, 0), (CHATML, 2)):
        (folder / "chat_template.jinja").write_text(template)
        assert main([str(word) for word in (*command, "--output", tmp_path / f"run{code}")]) == code
    assert (
        "a.jsonl, line 1: expected a chat template that marks what the assistant says"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("target", ["labels", "base"])
def test_what_is_kept_beside_chats_may_be_plain_text(target, tmp_path, texts, capsys):  # noqa: F811
    from tests.hybrid.data.test_chats import CHAT, MARKED

    folder = save_base(tmp_path / "base")
    (folder / "chat_template.jinja").write_text(MARKED)
    for name in ("a.jsonl", "kept.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(60)))
    command = ["train", "--base", folder, "--data", tmp_path / "a.jsonl", "--steps", 2, "--batch-size", 4]
    command += ["--sequence-length", 32, "--loss-on", "completions", *options(FIELDS)]
    for name, known in ((texts / "known.txt", "sequences of 32"), (tmp_path / "kept.jsonl", "rows")):
        kept = ["--keep", name, "--keep-ratio", 0.25, "--keep-target", target, "--known", name]
        run = tmp_path / f"{Path(name).stem}"
        assert main([str(word) for word in (*command, *kept, "--output", run)]) == 0
        out = capsys.readouterr().out
        assert f"kept: {name}, 25.0% of each step" in out
        loss = re.findall(r"held-out loss, known text: \S+ -> (\S+) nats", out)[0]
        more = ["--loss-on", "completions"] * (known == "rows")
        evaluation = ["eval", "--model", run, "--data", name, "--sequence-length", 32, *more]
        assert main([str(word) for word in evaluation]) == 0
        out = capsys.readouterr().out
        assert f"loss {loss} nats" in out and known in out
    both = [texts / "known.txt", tmp_path / "kept.jsonl"]
    for names in (both, both[::-1]):
        error = refused(capsys, *command, "--keep", *names, "--keep-ratio", 0.25, "--output", tmp_path / "c")
        assert re.search("expected (labels|text), as in the first row of .*, got (text|labels)", error)
    error = refused(capsys, *command, "--output", tmp_path / "b", "--held-out", texts / "known.txt")
    assert "known.txt: expected chats for a loss on completions (--loss-on), got a text." in error


def test_the_base_of_a_hybrid_that_moved(trained, base, texts, tmp_path, capsys):  # noqa: F811
    model = shutil.copytree(trained / "checkpoint-000006", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/not/here"}))
    for path in model.glob("token*"):
        path.unlink()  # then it is the base's that is read
    for command in (
        ["generate", "--prompt", "1 and", "--max-new-tokens", 4],
        ["eval", "--data", texts / "new.txt", "--sequence-length", 16],
    ):
        moved = [str(word) for word in (*command, "--model", model)]
        assert "/not/here" in refused(capsys, *moved)
        assert main([*moved, "--hybrid-base", str(base)]) == 0
        out = capsys.readouterr().out
        assert main([str(word) for word in (*command, "--model", trained)]) == 0
        assert capsys.readouterr().out == out
    command = ["train", "--base", model, "--data", texts / "new.txt", "--sequence-length", 16, "--steps", 1]
    output = ["--output", tmp_path / "run"]
    assert main([str(word) for word in (*command, *output, "--hybrid-base", base)]) == 0
    saved = json.loads((tmp_path / "run" / "checkpoint-000001" / "config.json").read_text())
    assert saved["base_model_name_or_path"] == str(base)
    capsys.readouterr()
    with pytest.raises(
        ValueError, match="base_model_name_or_path= says where to, on a command line --hybrid"
    ):
        HybridModel.from_pretrained(model)
    assert HybridModel.from_pretrained(model, base_model_name_or_path=str(base)).llm_model is not None


def test_a_base_elsewhere_of_what_has_none(trained, base, tmp_path, capsys):  # noqa: F811
    command = ["generate", "--prompt", "1 and", "--hybrid-base", base, "--model"]
    assert "for --hybrid-base, got a LlamaConfig at" in refused(capsys, *command, base)
    nowhere = ["generate", "--prompt", "1 and", "--model", trained, "--hybrid-base", ""]
    assert "for --hybrid-base, got an empty one" in refused(capsys, *nowhere)
    whole = tmp_path / "whole"
    HybridModel.from_pretrained(trained / "checkpoint-000006").save_pretrained(whole, save_base=True)
    shutil.copy(base / "tokenizer.json", whole)
    shutil.copy(base / "tokenizer_config.json", whole)
    assert "for --hybrid-base, got the whole of one at" in refused(capsys, *command, whole)


def test_a_source_without_a_name(base, texts, tmp_path, capsys):  # noqa: F811
    """As a variable of the shell that is not set."""
    for option in ("--data", "--known"):
        error = refused(capsys, *train_command(base, texts, tmp_path / "run", option, ""))
        assert "data: expected names of files or data sets, got an empty one." in error


def test_a_chat_template_from_a_file_is_saved_with_the_tokenizer(base, tmp_path, capsys):  # noqa: F811
    from tests.hybrid.data.test_chats import CHAT, MARKED

    template, run = tmp_path / "marked.jinja", tmp_path / "run"
    template.write_text(MARKED)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(60)))
    command = ["train", "--base", base, "--data", tmp_path / "a.jsonl", "--steps", 2, "--batch-size", 2]
    command += ["--sequence-length", 32, "--loss-on", "completions", *options(FIELDS), "--output", run]
    command = [str(word) for word in command]
    assert main([*command, "--chat-template", str(template)]) == 0
    assert (run / "checkpoint-000002" / "chat_template.jinja").read_text() == MARKED
    assert not (base / "chat_template.jinja").exists()
    assert main(["generate", "--model", str(run), "--prompt", "hi", "--chat", "--max-new-tokens", "2"]) == 0
    template.write_text(MARKED.replace("{% endgeneration %}", "{% endgeneration %} "))
    capsys.readouterr()
    assert main([*command, "--chat-template", str(template), "--resume"]) == 2
    assert "expected tokenizer" in capsys.readouterr().err


def test_an_empty_shard_is_one_line(base, texts, tmp_path, capsys):  # noqa: F811
    datasets = pytest.importorskip("datasets", reason="parquet needs the package datasets")
    texts_of = {"a": [], "b": [f"{i} and one is {i + 1}" for i in range(60)]}
    for name, some in texts_of.items():
        features = datasets.Features({"text": datasets.Value("string")})
        datasets.Dataset.from_dict({"text": some}, features).to_parquet(tmp_path / f"{name}.parquet")
    command = train_command(base, texts, tmp_path / "run", "--data", tmp_path / "*.parquet", steps=2)
    assert main(command) == 0
    assert capsys.readouterr().err.count("a.parquet has no rows and is passed over") == 1
