"""trm-hybrid: demo | train | generate | eval | info | plan. Parses, calls, prints.

What a user can mend (ValueError, OSError) is one line on stderr and exit code 2.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from transformers import PreTrainedConfig
from transformers.utils import logging

from hybrid.config import HybridConfig
from hybrid.halting import Halting, StepRecord, TokenHalting, record_steps
from hybrid.options import add_config_options, config_of, given_fields
from hybrid.quantized_base import QUANTIZE_BASE
from trm_kernels.backend import NAMES, backend, describe
from trm_kernels.ops.adaptive_recursion import WATCHED

_DTYPES = ("float32", "bfloat16", "float16")
_HELD_OUT_BLOCKS = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. The exit code: 0, 2 for what a user can mend, 130 when interrupted."""
    try:
        arguments = _parser().parse_args(_with_dashes(sys.argv[1:] if argv is None else argv))
        logging.disable_progress_bar()
        with _backend(arguments):
            return arguments.command(arguments)
    except (ValueError, OSError) as error:
        print(f"trm-hybrid: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "trm-hybrid: interrupted; a training goes on from its last checkpoint with --resume",
            file=sys.stderr,
        )
        return 130


def _backend(arguments: argparse.Namespace) -> backend:
    """What --backend asks for, where a command has it. Errors: ValueError where it cannot run."""
    try:
        return backend(getattr(arguments, "backend", "auto"))
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def _demo(arguments: argparse.Namespace) -> int:
    from hybrid.demo.run import run

    return run(output=arguments.output, seed=arguments.seed, quick=arguments.quick)


def _train(arguments: argparse.Namespace) -> int:
    from hybrid.processes import this_process
    from hybrid.run_folder import held

    with held(Path(arguments.output), this_process()):
        return _train_in_folder(arguments)


def _train_in_folder(arguments: argparse.Namespace) -> int:
    from hybrid.batches import LengthCurriculum
    from hybrid.data import TokenStream, unused_columns
    from hybrid.info import count, count_trained
    from hybrid.loading import load_config, load_model, load_on_first, load_tokenizer
    from hybrid.model import HybridModel
    from hybrid.phases import PHASES, enter
    from hybrid.processes import seed_everything, this_process
    from hybrid.train import TrainSettings, train

    # what can be wrong is found out before a model is loaded, the quickest first
    phase = PHASES[arguments.phase]
    if arguments.quantize_base is not None:
        if phase.trains_base:
            raise ValueError("expected phase 1 with --quantize-base, for such a base cannot learn, got 2.")
        if arguments.shard:
            raise ValueError("expected --quantize-base or --shard, got both: a quantized base is not split.")
    first_length, growing = arguments.length_curriculum or (0, 0)
    settings = TrainSettings(
        output_dir=arguments.output,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        accumulate=arguments.accumulate,
        learning_rate=phase.learning_rate if arguments.learning_rate is None else arguments.learning_rate,
        warmup_steps=arguments.warmup_steps,
        seed=arguments.seed,
        save_every=arguments.save_every,
        eval_every=arguments.eval_every,
        log_every=arguments.log_every,
        keep_checkpoints=arguments.keep_checkpoints,
        shard=arguments.shard,
        mixed_precision=arguments.mixed_precision,
        max_skipped_steps=arguments.max_skipped_steps,
        length_curriculum=LengthCurriculum(first_length, arguments.sequence_length, growing)
        if arguments.length_curriculum
        else None,
        stochastic_rounding=arguments.stochastic_rounding,
        keep_ratio=arguments.keep_ratio,
        keep_target=arguments.keep_target,
        cache_hidden_states=arguments.cache_hidden_states,
        report_to=tuple(arguments.report_to),
        cache_dtype=arguments.cache_dtype,
    )
    if (arguments.keep is None) != (arguments.keep_ratio is None):
        raise ValueError("train: expected --keep and --keep-ratio together, got one of them.")
    if phase.trains_base and settings.cache_hidden_states is not None:
        raise ValueError("train: expected phase 1 with --cache-hidden-states, got 2: all learns in it.")
    start = load_config(arguments.base, arguments.trust_remote_code)
    config, _ = _block(start, arguments)
    tokenizer = load_tokenizer(arguments.base, arguments.trust_remote_code)

    processes = this_process()
    say: Callable[..., None] = print if processes.is_main_process else _say_nothing
    with processes.main_process_first():  # a data set is fetched once
        stream = partial(
            TokenStream,
            tokenizer=tokenizer,
            sequence_length=_sequence_length(start, arguments),
            separate=arguments.documents == "separate",
            workers=arguments.data_workers,
            vocabulary=start.get_text_config(decoder=True).vocab_size,
            seed=arguments.seed,
        )
        held = [_HELD_OUT_BLOCKS if given is None else 0 for given in (arguments.held_out, arguments.known)]
        data = stream(_sources(arguments.data, arguments), held_out=held[0])
        held_out = {
            "new": data.held_out_rows()
            if arguments.held_out is None
            else _read_blocks(arguments.held_out, tokenizer, start, arguments)
        }
        if arguments.known is not None:
            held_out["known"] = _read_blocks(arguments.known, tokenizer, start, arguments)
        keep = None
        if arguments.keep is not None:
            keep = stream(_sources(arguments.keep, arguments), held_out=held[1])
            if arguments.known is None:
                held_out["known"] = keep.held_out_rows()

    seed_everything(arguments.seed)
    learns_in = "bfloat16" if arguments.stochastic_rounding else "float32"
    dtype = arguments.dtype or (learns_in if phase.trains_base else "auto")
    if arguments.shard and processes.num_processes > 1:
        loaded = load_on_first(arguments.base, dtype, arguments.trust_remote_code)
    else:
        loaded = load_model(arguments.base, dtype, arguments.trust_remote_code, arguments.quantize_base)
    model = loaded if isinstance(loaded, HybridModel) else HybridModel(llm_model=loaded, config=config)
    enter(model, arguments.phase)
    if arguments.gradient_checkpointing:
        # the older name, which transformers 5.17 knows and 5.23 calls deprecated
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable.*", category=FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})

    say(describe(processes.device))
    say(f"phase {arguments.phase}: trains {count_trained(model):,} of {count(model):,} parameters")
    sizes = ", ".join(f"{len(blocks):,} of {name} text" for name, blocks in held_out.items())
    rows = "rows with labels, at most" if data.sources.has_labels else "sequences of"
    say(f"{rows} {arguments.sequence_length:,} tokens, from {data.sources.name}; held out: {sizes}")
    for some in (data, keep):
        if some is not None and (names := unused_columns(some.sources, tokenizer)):
            say(f"not used of {some.sources.name}: the columns {', '.join(names)}")
    if keep is not None:
        say(f"kept: {keep.sources.name}, {settings.keep_ratio:.1%} of each step")
    result = train(model, data, settings, held_out, resume=arguments.resume, tokenizer=tokenizer, keep=keep)
    for name, before in result.held_out_before.items():
        say(f"held-out loss, {name} text: {before:.4f} -> {result.held_out_after[name]:.4f} nats per token")
    say(f"model: {result.checkpoint}\nmetrics: {result.metrics}\ncurve: {result.curve}")
    if processes.num_processes > 1:
        processes.destroy_process_group()
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from hybrid.special_tokens import prompt_tokens

    model, tokenizer = _load(arguments)
    inputs = {name: t.to(model.device) for name, t in prompt_tokens(arguments.prompt, tokenizer).items()}
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False}
    if arguments.temperature is not None:
        from hybrid.processes import seed_everything

        seed_everything(arguments.seed)
        options |= {"do_sample": True, "temperature": arguments.temperature}
        options |= {"top_k": arguments.top_k, "top_p": arguments.top_p}
    if isinstance(getattr(model, "halting", None), TokenHalting):
        options["use_cache"] = False
    with record_steps() as record:
        print(tokenizer.decode(model.generate(**inputs, **options)[0], skip_special_tokens=True))
    if getattr(model, "halting", None) is not None:
        print(_steps_taken(record, model.config), file=sys.stderr)
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from hybrid.data import unused_columns
    from hybrid.evaluate import task_results, text_loss
    from hybrid.labelled import Examples

    if arguments.data is None and arguments.tasks is None:
        raise ValueError("eval: expected --data or --tasks, got neither.")
    model, tokenizer = _load(arguments)
    for source in arguments.data or ():
        if names := unused_columns(_sources([source], arguments), tokenizer):
            print(f"{source}: not used: the columns {', '.join(names)}")
        blocks = _read_blocks([source], tokenizer, model.config, arguments)
        with record_steps() as record:
            loss = text_loss(model, blocks, arguments.batch_size)
        what = f"{source}: loss {loss.per_token:.4f} nats per token, perplexity {loss.perplexity:.4g}, "
        if isinstance(blocks, Examples):
            print(f"{what}{loss.accuracy:.2%} right of {loss.tokens:,} labels in {len(blocks):,} rows")
        else:
            print(f"{what}{loss.tokens:,} tokens in sequences of {arguments.sequence_length:,}")
        if getattr(model, "halting", None) is not None:
            print(f"{source}: {_steps_taken(record, model.config)}")
    if arguments.tasks:
        for task, measures in task_results(model, tokenizer, arguments.tasks, arguments.batch_size).items():
            for measure, value in measures.items():
                print(f"{task}: {measure} {value}")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from hybrid.bases import KNOWN_BASES, PRESET_BASES
    from hybrid.info import count, count_trained, on_meta, parts, saved_by_token
    from hybrid.loading import load_config
    from hybrid.phases import enter
    from trm_kernels.ops.saved_bytes import SAVES

    name = arguments.base or PRESET_BASES.get(arguments.preset)
    if name is None:
        raise ValueError(
            "info: expected --base, a saved hybrid as --model, or the --preset of a level; got none."
        )
    start = KNOWN_BASES.get(name.lower()) or load_config(name, arguments.trust_remote_code)
    config, base = _block(start, arguments)
    model = on_meta(config, base, arguments.trust_remote_code)

    rows = [(part.name, part.parameters) for part in parts(model)]
    rows.append(("total", count(model)))
    for phase in (1, 2):
        enter(model, phase)
        rows.append((f"trained in phase {phase}", count_trained(model)))
    points = ", ".join(map(str, config.injection_layers))
    print(f"parameters of {name} with a TRM of width {config.trm_hidden_size} after layers {points}")
    for row, parameters in rows:
        print(f"{row:<24}{parameters:>20,}")
    print("bytes that the TRMs keep of a token for backward, in bfloat16, by trm_save")
    for save in SAVES:
        print(f"{save:<24}{saved_by_token(model, save):>20,}")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    import json

    from hybrid.plan.guide import guide
    from hybrid.plan.table import as_json, lines, plan

    if arguments.guide:
        print(guide())
        return 0
    made = plan(*_planned(arguments))
    print(json.dumps(as_json(made), indent=1) if arguments.json else "\n".join(lines(made)))
    return 0


def _planned(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(the run, what is asked about it)"""
    from hybrid.bases import KNOWN_BASES, LEVELS, PRESET_BASES
    from hybrid.loading import load_config
    from hybrid.plan.cards import parse_cards
    from hybrid.plan.run import Run
    from hybrid.plan.table import Wishes, text_tokens

    if arguments.level is not None:
        if arguments.preset or arguments.config:
            raise ValueError("plan: expected one of --level, --preset and --config, got two.")
        arguments.preset = LEVELS[arguments.level]
    name = arguments.base or PRESET_BASES.get(arguments.preset)
    if name is None:
        raise ValueError("plan: expected --base, a saved hybrid as --model, or a --level; got none.")
    if arguments.cards is None:
        raise ValueError("plan: expected --cards, such as 8xA100-80GB; got none.")
    number, card = parse_cards(arguments.cards)
    start = KNOWN_BASES.get(name.lower()) or load_config(name, arguments.trust_remote_code)
    config, base = _block(start, arguments)
    lora, config.lora_rank = config.lora_rank, None  # counted as adapters of a plan's own
    learns = arguments.phase == 2 and lora is None
    run = Run(
        base_name=name,
        base=base,
        config=config,
        card=card,
        cards=number,
        phase=arguments.phase,
        sequence_length=arguments.sequence_length,
        batch_size=arguments.batch_size,
        accumulation=arguments.accumulation,
        shards=arguments.shards,
        dtype=arguments.dtype or ("float32" if learns else "bfloat16"),
        lora=lora,
        checkpointing=arguments.gradient_checkpointing,
        trust_remote_code=arguments.trust_remote_code,
    )
    tokens = arguments.tokens
    if arguments.gigabytes is not None:
        if tokens is not None:
            raise ValueError("plan: expected --tokens or --gigabytes, got both.")
        tokens = text_tokens(arguments.gigabytes, arguments.bytes_per_token)
    return run, Wishes(tokens, arguments.utilisation, arguments.price, arguments.card_price)


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer) for inference: on the accelerator if there is one, recursing as was asked for."""
    from hybrid.loading import load_model, load_tokenizer
    from hybrid.model import HybridModel
    from hybrid.processes import this_process

    halting = _halting(arguments)
    tokenizer = load_tokenizer(arguments.model, arguments.trust_remote_code)
    model = load_model(arguments.model, arguments.dtype or "auto", arguments.trust_remote_code)
    n = arguments.num_recursion_steps
    if n is not None:
        if not isinstance(model, HybridModel):
            raise ValueError(f"expected a hybrid for --num-recursion-steps, got {type(model).__name__}.")
        if n < 1:
            raise ValueError(f"expected --num-recursion-steps of at least 1, got {n}.")
        model.config.num_recursion_steps = n
    if halting is not None:
        if not isinstance(model, HybridModel):
            raise ValueError(f"expected a hybrid for --recursion-*, got {type(model).__name__}.")
        model.halting = halting
    return model.to(this_process().device).eval(), tokenizer


def _halting(arguments: argparse.Namespace) -> Halting | TokenHalting | None:
    """The rule that --recursion-* make; None for none of them."""
    threshold, patience = arguments.recursion_threshold, arguments.recursion_patience
    if threshold is not None:
        return Halting(
            threshold, 1 if patience is None else patience, watch=arguments.recursion_watch or "answer"
        )
    if arguments.recursion_watch is not None:
        raise ValueError("expected --recursion-threshold with --recursion-watch, got none.")
    return None if patience is None else TokenHalting(patience)


def _steps_taken(record: StepRecord, config: HybridConfig) -> str:
    n, fixed = config.num_recursion_steps, config.num_cycles * (config.num_recursion_steps + 1)
    return (
        f"{record.mean_steps:.2f} recursion steps a token of at most {n}, "
        f"{record.mean_evaluations:.2f} evaluations of the block a token and injection point; fixed: {fixed}"
    )


def _block(start: PreTrainedConfig, arguments: argparse.Namespace) -> tuple[HybridConfig, PreTrainedConfig]:
    """(the block's config, its base's config): as the options say, or as a saved hybrid has them."""
    if not isinstance(start, HybridConfig):
        config = config_of(arguments)
        config.check_base(start)
        return config, start
    if given := given_fields(arguments):
        option = given[0].replace("_", "-")
        raise ValueError(f"expected no --{option} with a saved hybrid, which has its block already; got one.")
    if start.base_config is None:
        raise ValueError("expected a saved hybrid whose config.json has base_config, got none.")
    return start, start.base_config


def _sequence_length(config: PreTrainedConfig, arguments: argparse.Namespace) -> int:
    """--sequence-length, which the model can read."""
    text_config = config.get_text_config(decoder=True)
    longest = getattr(text_config, "max_position_embeddings", None) or arguments.sequence_length
    if arguments.sequence_length > longest:
        raise ValueError(
            f"expected --sequence-length of at most {longest} tokens (the model's max_position_embeddings), "
            f"got {arguments.sequence_length}."
        )
    return arguments.sequence_length


def _read_blocks(
    sources: list[str], tokenizer: Any, config: PreTrainedConfig, arguments: argparse.Namespace
) -> Any:
    """TokenBlocks or Examples whose tokens the model has, no longer than it can read."""
    from hybrid.data import read_rows

    return read_rows(
        _sources(sources, arguments),
        tokenizer,
        _sequence_length(config, arguments),
        separate=arguments.documents == "separate",
        vocabulary=config.get_text_config(decoder=True).vocab_size,
    )


def _sources(names: list[str], arguments: argparse.Namespace) -> Any:
    from hybrid.sources import Sources

    return Sources(names, arguments.field, arguments.loss_on)


def _say_nothing(*_: object) -> None:
    """On every process but the main one."""


# The options


class _Parser(argparse.ArgumentParser):
    """Complains in one line, like everything else here."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="trm-hybrid", description="A recursive block inside a frozen language model.")
    parser.add_argument("--version", action="version", version=f"trm-hybrid {_version()}")
    commands = parser.add_subparsers(required=True, metavar="demo | train | generate | eval | info | plan")

    demo = commands.add_parser("demo", help="train one from nothing in minutes, on any machine")
    demo.set_defaults(command=_demo)
    demo.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the report")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--quick", action="store_true", help="a few steps of everything; learns nothing")
    # it trains on a GPU where there is one, and measures on the CPU, where Triton cannot run
    _add_backend_option(demo, [name for name in NAMES if name != "triton"])

    train = commands.add_parser("train", help="train a TRM inside a language model, or both")
    train.set_defaults(command=_train)
    train.add_argument(
        "--base",
        "--model",
        required=True,
        help="a language model or a saved hybrid: name on the hub, or folder",
    )
    train.add_argument(
        "--data",
        nargs="+",
        required=True,
        help="text, .jsonl or .parquet files, globs, or NAME[:CONFIG[:SPLIT]] of a data set; any size. Rows "
        "may bring labels: input_ids and labels, prompt and completion, or text in parts and answers",
    )
    train.add_argument(
        "--held-out",
        nargs="+",
        help="the same, for the loss on new text; default: every twentieth sequence of --data, "
        f"at most {_HELD_OUT_BLOCKS}, which are not trained on",
    )
    train.add_argument("--known", nargs="+", help="the same, of a text the base knows: how much is forgotten")
    train.add_argument(
        "--keep",
        nargs="+",
        help="the same, of a text like those the base was trained on, mixed into every step so that it "
        "is not forgotten; some of it is held out for the loss on known text if --known names none",
    )
    train.add_argument(
        "--keep-ratio", type=float, metavar="R", help="share of a step's sequences that --keep has"
    )
    train.add_argument(
        "--keep-target",
        choices=("labels", "base"),
        default="labels",
        help="what is learned of --keep: its text, or that the hybrid is its base there; default: labels",
    )
    train.add_argument("--output", required=True, help="folder of the run")
    train.add_argument(
        "--resume", action="store_true", help="go on from the last whole checkpoint in --output"
    )
    train.add_argument(
        "--phase", type=int, choices=(1, 2), default=1, help="1: the TRM learns; 2: everything does"
    )
    train.add_argument("--steps", type=int, required=True, help="optimizer steps")
    train.add_argument("--batch-size", type=int, default=8, help="sequences in one forward of a process")
    train.add_argument("--accumulate", type=int, default=1, help="forwards of a process in a step")
    train.add_argument("--learning-rate", type=float, help="default: 1e-4 in phase 1, 1e-5 in phase 2")
    train.add_argument("--warmup-steps", type=int, default=0, help="steps until the rate is reached")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--save-every", type=int, help="steps between checkpoints; default: one at the end")
    train.add_argument("--keep-checkpoints", type=int, default=2, help="so many of the newest stay")
    train.add_argument(
        "--eval-every", type=int, help="steps between held-out losses; default: before and after"
    )
    train.add_argument("--log-every", type=int, default=10, help="steps between lines of metrics.jsonl")
    train.add_argument("--shard", action="store_true", help="split the model among the processes (FSDP2)")
    train.add_argument(
        "--mixed-precision", choices=("no", "bf16"), help="compute in bfloat16 what is kept in float32"
    )
    train.add_argument(
        "--max-skipped-steps",
        type=int,
        default=5,
        help="so many in a row whose loss or gradient is no number end the run",
    )
    train.add_argument(
        "--length-curriculum",
        type=_first_and_steps,
        metavar="FIRST:STEPS",
        help="short first: sequences are cut to FIRST tokens in the first step, to ever more within STEPS "
        "steps, then not at all; a row that has no label so early is left for later",
    )
    train.add_argument(
        "--stochastic-rounding",
        action="store_true",
        help="keep what trains in phase 2 in bfloat16; small steps count on average (torchao)",
    )
    train.add_argument(
        "--quantize-base",
        choices=QUANTIZE_BASE,
        help="keep the frozen base in 8 bits (torchao) or 4 (bitsandbytes)",
    )
    train.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    train.add_argument(
        "--report-to",
        nargs="+",
        default=[],
        metavar="NAME",
        help="tensorboard (files in --output), wandb, ...: accelerate's trackers get the metrics as well",
    )
    train.add_argument(
        "--cache-hidden-states",
        metavar="FOLDER",
        help="phase 1: keep what comes out of the layers below the first injection point there, and read it "
        "from the second pass over the data on",
    )
    train.add_argument(
        "--cache-dtype",
        choices=("float32", "bfloat16"),
        help="what --cache-hidden-states keeps; default: the base's",
    )
    train.add_argument("--data-workers", type=int, default=0, help="processes that tokenize; default: none")
    _add_backend_option(train)
    _add_data_options(train)
    _add_model_options(train)
    add_config_options(train)

    generate = commands.add_parser("generate", help="continue a prompt")
    generate.set_defaults(command=_generate)
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=int, default=64)
    generate.add_argument(
        "--temperature", type=float, help="sample at this temperature; default: the likeliest token"
    )
    generate.add_argument("--top-k", type=int, default=50, help="when sampling")
    generate.add_argument("--top-p", type=float, default=1.0, help="when sampling")
    generate.add_argument("--seed", type=int, default=0, help="when sampling")
    _add_inference_options(generate)

    evaluate = commands.add_parser("eval", help="perplexity on text, or tasks of lm-eval")
    evaluate.set_defaults(command=_eval)
    evaluate.add_argument("--data", nargs="+", help="as in train; each is measured by itself")
    evaluate.add_argument("--tasks", nargs="+", help="of lm-eval, where it is installed")
    evaluate.add_argument("--batch-size", type=int, default=8, help="sequences in one forward")
    _add_data_options(evaluate)
    _add_inference_options(evaluate)

    info = commands.add_parser(
        "info", help="parameter counts by part, without loading or downloading weights"
    )
    info.set_defaults(command=_info)
    info.add_argument(
        "--base",
        "--model",
        help="as in train, or a known shape: llama-2-7b, llama-3-8b, qwen3-8b, ... (hybrid/bases.py); "
        "default: the preset's",
    )
    info.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add_config_options(info)

    plan = commands.add_parser(
        "plan", help="memory, time and money of a training, before anything is loaded or rented"
    )
    plan.set_defaults(command=_plan)
    plan.add_argument("--guide", action="store_true", help="the training guide's claims, each checked")
    plan.add_argument("--json", action="store_true", help="figures for programs")
    plan.add_argument("--level", type=int, choices=(1, 2, 3, 4), help="of the guide; stands for its --preset")
    plan.add_argument("--base", "--model", help="as in info; only a config is read")
    plan.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    plan.add_argument("--cards", help="such as 8xA100-80GB or 1xRTX4090")
    plan.add_argument("--phase", type=int, choices=(1, 2), default=1, help="1: the TRM learns; 2: everything")
    plan.add_argument("--sequence-length", type=int, default=2048, help="tokens")
    plan.add_argument("--batch-size", type=int, default=1, help="sequences in one forward on one card")
    plan.add_argument("--accumulation", type=int, default=1, help="forwards before an optimizer step")
    plan.add_argument("--shards", type=int, default=1, help="cards that divide weights and moments (FSDP2)")
    plan.add_argument(
        "--dtype",
        choices=(*_DTYPES, "int8"),
        help="of the base; default: bfloat16, or float32 where it learns",
    )
    plan.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    plan.add_argument("--tokens", type=float, help="to train on, such as 5e9")
    plan.add_argument("--gigabytes", type=float, help="of text, in place of --tokens")
    plan.add_argument("--bytes-per-token", type=float, default=4.0, help="of that text; English has about 4")
    plan.add_argument("--utilisation", type=float, help="of the peak; default: measured or by the roofline")
    plan.add_argument("--price", type=float, help="dollars per GPU-hour; default: hybrid/plan/cards.py")
    plan.add_argument("--card-price", type=float, help="dollars per card; default: hybrid/plan/cards.py")
    add_config_options(plan)
    return parser


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sequence-length", type=int, default=1024, help="tokens; the most that a row with labels may have"
    )
    parser.add_argument(
        "--field", default="text", help="of .jsonl lines and rows: a text, or a chat's messages"
    )
    parser.add_argument(
        "--loss-on",
        choices=("all", "completions"),
        default="all",
        help="completions: of chats only what the assistant says, by the template's {%% generation %%} marks",
    )
    parser.add_argument(
        "--documents",
        choices=("separate", "joined"),
        default="separate",
        help="whether documents in one sequence look at each other; default: separate",
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="of the base; default: its files', in phase 2 float32 (--stochastic-rounding: bfloat16)",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _add_backend_option(parser: argparse.ArgumentParser, names: Sequence[str] = NAMES) -> None:
    parser.add_argument(
        "--backend",
        choices=names,
        default="auto",
        help="what runs the recursive block: Triton kernels or, as reference, eager PyTorch; "
        "default: auto, Triton on a CUDA device",
    )


def _add_inference_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="a saved hybrid or a run's folder; any causal language model"
    )
    parser.add_argument("--num-recursion-steps", type=int, help="default: as trained")
    parser.add_argument(
        "--recursion-threshold",
        type=float,
        metavar="X",
        help="a token stops earlier, when its answer changes by no more than this share; try 0.2",
    )
    parser.add_argument(
        "--recursion-patience",
        type=int,
        metavar="K",
        help="so many steps in a row without a change; alone: in which the likeliest next token stays",
    )
    parser.add_argument(
        "--recursion-watch",
        choices=WATCHED,
        help="whose change: the answer's (default), or the latent state's, for half the work",
    )
    _add_backend_option(parser)
    _add_model_options(parser)


def _first_and_steps(text: str) -> tuple[int, int]:
    first, _, steps = text.partition(":")
    try:
        return int(first), int(steps)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected FIRST:STEPS, two whole numbers such as 8:500, got {text!r}"
        ) from None


def _with_dashes(argv: Sequence[str]) -> list[str]:
    """--injection_layers is --injection-layers."""
    names = [(argument, *argument.partition("=")) for argument in argv]
    return [
        name.replace("_", "-") + equals + value if argument.startswith("--") else argument
        for argument, name, equals, value in names
    ]


def _version() -> str:
    try:
        return metadata.version("trm-hybrid")
    except metadata.PackageNotFoundError:
        return "(not installed)"
