"""What several commands do: choose a backend, load a model, read text."""

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging as transformers_logging

from hybrid.cli.block import config_of, given_fields
from hybrid.config import HybridConfig
from hybrid.model.halting import Halting, StepRecord, TokenHalting
from trm_kernels.runtime.backend import backend


@contextmanager
def running(arguments: argparse.Namespace) -> Iterator[None]:
    """On what --backend asks for, where a command has it; warnings are a line each.

    Errors: ValueError where it cannot run.
    """
    transformers_logging.disable_progress_bar()
    try:
        chosen = backend(getattr(arguments, "backend", "auto"))
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    shown = warnings.showwarning
    warnings.showwarning = _show_warning
    try:
        with chosen:
            yield
    finally:
        warnings.showwarning = shown


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer) for inference: on the accelerator if there is one, recursing as was asked for."""
    from hybrid.model.hybrid_model import HybridModel
    from hybrid.saving.loading import load_model
    from hybrid.training.processes import this_process

    halting = _halting(arguments)
    tokenizer = tokenizer_of(arguments.model, arguments)
    dtype, base = arguments.dtype or "auto", arguments.hybrid_base
    model = load_model(arguments.model, dtype, arguments.trust_remote_code, hybrid_base=base)
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


def tokenizer_of(name_or_path: str, arguments: argparse.Namespace) -> Any:
    """The model's tokenizer, with the chat template of --chat-template where there is one."""
    from hybrid.data.chats import read_template
    from hybrid.saving.loading import load_tokenizer

    template = None if arguments.chat_template is None else read_template(arguments.chat_template)
    tokenizer = load_tokenizer(name_or_path, arguments.trust_remote_code, arguments.hybrid_base)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def steps_taken(record: StepRecord, config: HybridConfig) -> str:
    n, fixed = config.num_recursion_steps, config.num_cycles * (config.num_recursion_steps + 1)
    return (
        f"{record.mean_steps:.2f} recursion steps a token of at most {n}, "
        f"{record.mean_evaluations:.2f} evaluations of the block a token and injection point; "
        f"without halting {fixed}"
    )


def block(start: PreTrainedConfig, arguments: argparse.Namespace) -> tuple[HybridConfig, PreTrainedConfig]:
    """(the block's config, its base's config): as the options say, or as a saved hybrid has them."""
    if not isinstance(start, HybridConfig):
        config = config_of(arguments, start)
        config.check_base(start)
        return config, start
    if given := given_fields(arguments):
        option = given[0].replace("_", "-")
        raise ValueError(f"expected no --{option} with a saved hybrid, which has its block already; got one.")
    if start.base_config is None:
        raise ValueError("expected a saved hybrid whose config.json has base_config, got none.")
    return start, start.base_config


def sequence_length(config: PreTrainedConfig, arguments: argparse.Namespace) -> int:
    """--sequence-length, which the model can read."""
    text_config = config.get_text_config(decoder=True)
    longest = getattr(text_config, "max_position_embeddings", None) or arguments.sequence_length
    if arguments.sequence_length > longest:
        raise ValueError(
            f"expected --sequence-length of at most {longest} tokens (the model's max_position_embeddings), "
            f"got {arguments.sequence_length}."
        )
    return arguments.sequence_length


def read_blocks(sources: Any, tokenizer: Any, config: PreTrainedConfig, arguments: argparse.Namespace) -> Any:
    """TokenBlocks or Examples of Sources, whose tokens the model has, no longer than it can read."""
    from hybrid.data.blocks import read_rows

    return read_rows(
        sources,
        tokenizer,
        sequence_length(config, arguments),
        separate=arguments.documents == "separate",
        vocabulary=config.get_text_config(decoder=True).vocab_size,
    )


def sources_of(names: list[str], arguments: argparse.Namespace, text_counts: bool = False) -> Any:
    """Sources; `text_counts` of --known and --keep, which may be plain text beside chats (--loss-on)."""
    from hybrid.data.sources import Sources

    return Sources(names, arguments.field, arguments.loss_on, text_counts)


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


def _show_warning(message: Warning | str, *given: Any, **more: Any) -> None:
    print(f"trm-hybrid: {' '.join(str(message).split())}", file=sys.stderr)
