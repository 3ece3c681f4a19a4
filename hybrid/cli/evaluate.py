"""trm-hybrid eval."""

import argparse

from hybrid.cli.common import load, read_blocks, sources_of, steps_taken
from hybrid.model.halting import record_steps


def run(arguments: argparse.Namespace) -> int:
    from hybrid.data.labelled import Examples
    from hybrid.data.sources import unused_columns
    from hybrid.training.evaluate import task_results, text_loss

    if arguments.data is None and arguments.tasks is None:
        raise ValueError("eval: expected --data or --tasks, got neither.")
    if arguments.chat_template is not None and arguments.data is None:
        raise ValueError("eval: expected --data with --chat-template, which no task uses; got none.")
    model, tokenizer = load(arguments)
    for source in arguments.data or ():
        if names := unused_columns(sources_of([source], arguments), tokenizer):
            print(f"{source}: not used: the columns {', '.join(names)}")
        blocks = read_blocks([source], tokenizer, model.config, arguments)
        with record_steps() as record:
            loss = text_loss(model, blocks, arguments.batch_size)
        what = f"{source}: loss {loss.per_token:.4f} nats per token, perplexity {loss.perplexity:.4g}, "
        if isinstance(blocks, Examples):
            labelled = f"{loss.tokens:,} labelled tokens in {len(blocks):,} rows"
            print(f"{what}{loss.accuracy:.2%} right of {labelled}")
        else:
            print(f"{what}{loss.tokens:,} tokens in sequences of {arguments.sequence_length:,}")
        if getattr(model, "halting", None) is not None:
            print(f"{source}: {steps_taken(record, model.config)}")
    if arguments.tasks:
        for task, measures in task_results(model, tokenizer, arguments.tasks, arguments.batch_size).items():
            for measure, value in measures.items():
                print(f"{task}: {measure} {value}")
    return 0
