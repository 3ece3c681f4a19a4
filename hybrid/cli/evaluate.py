"""trm-hybrid eval."""

import argparse
import sys

from hybrid.cli.common import load, read_blocks, sources_of, steps_taken
from hybrid.model.halting import record_steps


def run(arguments: argparse.Namespace) -> int:
    from hybrid.data.labelled import Examples
    from hybrid.data.sources import unused_columns
    from hybrid.training.evaluate import task_results, text_loss

    if arguments.data is None and arguments.tasks is None:
        raise ValueError("eval: expected --data or --tasks, got neither.")
    if arguments.apply_chat_template and arguments.tasks is None:
        raise ValueError(
            "eval: expected --tasks with --apply-chat-template, got none; --data renders its chats anyway."
        )
    if arguments.chat_template is not None and arguments.data is None and not arguments.apply_chat_template:
        raise ValueError(
            "eval: expected --data, or --tasks and --apply-chat-template, with --chat-template, got neither."
        )
    model, tokenizer = load(arguments)
    for source in arguments.data or ():
        sources = sources_of([source], arguments)
        if names := unused_columns(sources, tokenizer):
            print(f"{source}: not used: the columns {', '.join(names)}")
        blocks = read_blocks(sources, tokenizer, model.config, arguments)
        with record_steps() as record:
            loss = text_loss(model, blocks, arguments.batch_size)
        what = f"{source}: loss {loss.per_token:.4f} nats per token, perplexity {loss.perplexity:.4g}, "
        if isinstance(blocks, Examples):
            labelled = f"{loss.tokens:,} labelled tokens in {len(blocks):,} rows"
            print(f"{what}{loss.accuracy:.2%} right of {labelled}; {loss.rows:,} rows wholly right")
        else:
            rest = f"; {blocks.left_out:,} more at the end fill none" if blocks.left_out else ""
            print(f"{what}{loss.tokens:,} tokens in sequences of {arguments.sequence_length:,}{rest}")
        if getattr(model, "halting", None) is not None:
            print(f"{source}: {steps_taken(record, model.config)}")
    if arguments.tasks:
        with_template = arguments.apply_chat_template
        if tokenizer.chat_template and not with_template:
            told = "the tasks are asked without the tokenizer's chat template; --apply-chat-template uses it"
            print(f"eval: {told}", file=sys.stderr)
        found = task_results(model, tokenizer, arguments.tasks, arguments.batch_size, with_template)
        for task, measures in found.items():
            for measure, value in measures.items():
                print(f"{task}: {measure} {value}")
    return 0
