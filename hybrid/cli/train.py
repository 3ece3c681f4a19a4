"""trm-hybrid train."""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from hybrid.cli.common import block, read_blocks, sequence_length, sources_of, tokenizer_of
from hybrid.config import HybridConfig
from hybrid.data.sources import unused_columns
from hybrid.data.stream import TokenStream
from hybrid.info import count, count_trained
from hybrid.model.hybrid_model import HybridModel
from hybrid.options import given
from hybrid.saving.loading import load_config, load_model, load_on_first
from hybrid.training.batches import LengthCurriculum
from hybrid.training.depth import check_curriculum
from hybrid.training.loop import TrainResult, train
from hybrid.training.phases import PHASES, Phase, enter
from hybrid.training.processes import seed_everything, this_process
from hybrid.training.run_folder import held
from hybrid.training.settings import TrainSettings
from trm_kernels.modules.curriculum import Depth, RecursionCurriculum
from trm_kernels.runtime.backend import describe

_HELD_OUT_BLOCKS = 64


class _Texts(NamedTuple):
    """What is trained on, what is kept, and what is measured."""

    data: TokenStream
    keep: TokenStream | None
    held_out: dict[str, Any]


def run(arguments: argparse.Namespace) -> int:
    with held(Path(arguments.output_dir), this_process()):
        return _run_in_folder(arguments)


def _run_in_folder(arguments: argparse.Namespace) -> int:
    """What can be wrong is found out before a model is loaded, the quickest first."""
    phase = PHASES[arguments.phase]
    settings = _settings(arguments, phase)
    start = load_config(arguments.base, arguments.trust_remote_code)
    config, _ = block(start, arguments)
    if arguments.recursion_curriculum is not None:
        last = Depth(config.num_recursion_steps, config.num_cycles)
        curriculum = RecursionCurriculum.from_text(arguments.recursion_curriculum, last)
        check_curriculum(curriculum, config)
        settings = replace(settings, recursion_curriculum=curriculum)
    tokenizer = tokenizer_of(arguments.base, arguments)

    processes = this_process()
    say: Callable[..., None] = print if processes.is_main_process else _say_nothing
    with processes.main_process_first():  # a data set is fetched once
        texts = _read(arguments, start, tokenizer)
    seed_everything(arguments.seed)
    model = _load(arguments, phase, config, processes)
    say(describe(processes.device))
    say(f"phase {arguments.phase}: trains {count_trained(model):,} of {count(model):,} parameters")
    _say_what_is_read(texts, settings, arguments, tokenizer, say)
    result = train(
        model,
        texts.data,
        settings,
        texts.held_out,
        resume=arguments.resume,
        tokenizer=tokenizer,
        keep=texts.keep,
    )
    _say_what_came(result, say)
    if processes.num_processes > 1:
        processes.destroy_process_group()
    return 0


def _settings(arguments: argparse.Namespace, phase: Phase) -> TrainSettings:
    if arguments.quantize_base is not None:
        if phase.trains_base:
            raise ValueError("expected phase 1 with --quantize-base, for such a base cannot learn, got 2.")
        if arguments.shard:
            raise ValueError("expected --quantize-base or --shard, got both: a quantized base is not split.")
    values = given(arguments, TrainSettings)
    values |= {name: tuple(values[name]) for name in ("betas", "report_to")}
    values["recursion_curriculum"] = None  # it takes the block's n and T, which are read later
    if arguments.learning_rate is None:
        values["learning_rate"] = phase.learning_rate
    if arguments.length_curriculum is not None:
        first, steps = arguments.length_curriculum
        values["length_curriculum"] = LengthCurriculum(first, arguments.sequence_length, steps)
    settings = TrainSettings(**values)
    if (arguments.keep is None) != (arguments.keep_ratio is None):
        raise ValueError("train: expected --keep and --keep-ratio together, got one of them.")
    if phase.trains_base and settings.cache_hidden_states is not None:
        raise ValueError("train: expected phase 1 with --cache-hidden-states, got 2: all learns in it.")
    return settings


def _read(
    arguments: argparse.Namespace, start: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> _Texts:
    stream = partial(
        TokenStream,
        tokenizer=tokenizer,
        sequence_length=sequence_length(start, arguments),
        separate=arguments.documents == "separate",
        workers=arguments.data_workers,
        vocabulary=start.get_text_config(decoder=True).vocab_size,
        seed=arguments.seed,
    )
    held = [_HELD_OUT_BLOCKS if names is None else 0 for names in (arguments.held_out, arguments.known)]
    data = stream(sources_of(arguments.data, arguments), held_out=held[0])
    held_out = {
        "new": data.held_out_rows()
        if arguments.held_out is None
        else read_blocks(sources_of(arguments.held_out, arguments), tokenizer, start, arguments)
    }
    if arguments.known is not None:
        known = sources_of(arguments.known, arguments, text_counts=True)
        held_out["known"] = read_blocks(known, tokenizer, start, arguments)
    keep = None
    if arguments.keep is not None:
        keep = stream(sources_of(arguments.keep, arguments, text_counts=True), held_out=held[1])
        if arguments.known is None:
            held_out["known"] = keep.held_out_rows()
    return _Texts(data, keep, held_out)


def _load(
    arguments: argparse.Namespace, phase: Phase, config: HybridConfig, processes: PartialState
) -> HybridModel:
    learns_in = "bfloat16" if arguments.stochastic_rounding else "float32"
    dtype = arguments.dtype or (learns_in if phase.trains_base else "auto")
    place = {"trust_remote_code": arguments.trust_remote_code, "hybrid_base": arguments.hybrid_base}
    if arguments.shard and processes.num_processes > 1:
        loaded: PreTrainedModel = load_on_first(arguments.base, dtype, **place)
    else:
        loaded = load_model(arguments.base, dtype, quantize_base=arguments.quantize_base, **place)
    model = loaded if isinstance(loaded, HybridModel) else HybridModel(llm_model=loaded, config=config)
    enter(model, arguments.phase)
    if arguments.gradient_checkpointing:
        # the older name, which transformers 5.17 knows and 5.23 calls deprecated
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable.*", category=FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _say_what_is_read(
    texts: _Texts,
    settings: TrainSettings,
    arguments: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    say: Callable[..., None],
) -> None:
    sizes = ", ".join(f"{len(blocks):,} of {name} text" for name, blocks in texts.held_out.items())
    rows = "rows with labels, at most" if texts.data.sources.has_labels else "sequences of"
    say(f"{rows} {arguments.sequence_length:,} tokens, from {texts.data.sources.name}; held out: {sizes}")
    for some in (texts.data, texts.keep):
        if some is not None and (names := unused_columns(some.sources, tokenizer)):
            say(f"not used of {some.sources.name}: the columns {', '.join(names)}")
    if texts.keep is not None:
        say(f"kept: {texts.keep.sources.name}, {settings.keep_ratio:.1%} of each step")


def _say_what_came(result: TrainResult, say: Callable[..., None]) -> None:
    for name, before in result.held_out_before.items():
        say(f"held-out loss, {name} text: {before:.4f} -> {result.held_out_after[name]:.4f} nats per token")
    say(f"model: {result.checkpoint}\nmetrics: {result.metrics}\ncurve: {result.curve}")


def _say_nothing(*_: object) -> None:
    """On every process but the main one."""
