"""trm-hybrid generate."""

import argparse
import sys
from typing import Any

from hybrid.cli.common import load, steps_taken
from hybrid.model.halting import TokenHalting, record_steps
from hybrid.options import flag_of


def run(arguments: argparse.Namespace) -> int:
    from hybrid.data.chats import prompt_of_chat
    from hybrid.data.special_tokens import prompt_tokens
    from hybrid.data.tokenize import beyond

    for name in ("top_k", "top_p", "seed"):
        if arguments.temperature is None and getattr(arguments, name) is not None:
            raise ValueError(f"generate: expected --temperature with {flag_of(name)}, to sample; got none.")
    if arguments.chat_template is not None and not arguments.chat:
        raise ValueError("generate: expected --chat with --chat-template; got none.")
    model, tokenizer = load(arguments)
    prompt = (prompt_of_chat if arguments.chat else prompt_tokens)(arguments.prompt, tokenizer)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if (largest := int(prompt["input_ids"].max())) >= vocabulary:
        raise ValueError(f"generate: {beyond(vocabulary, largest)}")
    inputs = {name: t.to(model.device) for name, t in prompt.items()}
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False}
    if arguments.temperature is not None:
        from hybrid.training.processes import seed_everything

        seed_everything(arguments.seed or 0)
        options |= {"do_sample": True, "temperature": arguments.temperature}
        options |= {
            "top_k": 50 if arguments.top_k is None else arguments.top_k,
            "top_p": 1.0 if arguments.top_p is None else arguments.top_p,
        }
    if isinstance(getattr(model, "halting", None), TokenHalting):
        options["use_cache"] = False
    with record_steps() as record:
        tokens = model.generate(**inputs, **options)[0]
    if arguments.chat:
        tokens = tokens[inputs["input_ids"].shape[1] :]
    print(tokenizer.decode(tokens, skip_special_tokens=True))
    if getattr(model, "halting", None) is not None:
        print(steps_taken(record, model.config), file=sys.stderr)
    return 0
