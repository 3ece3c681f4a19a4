"""trm-hybrid plan."""

import argparse
import json
from dataclasses import fields
from typing import Any

from hybrid.cli.block import given_fields
from hybrid.cli.common import block

_OF_PUZZLE = ("json", "trm", "cards")
_OF_SERVING = ("json", "serve", "level", "cards", "sequence_length", "dtype")


def run(arguments: argparse.Namespace) -> int:
    from hybrid.plan.guide import guide
    from hybrid.plan.table import as_json, lines, plan

    if arguments.guide:
        print(guide())
        return 0
    if arguments.trm is not None:
        return _puzzle(arguments)
    if arguments.serve:
        return _serve(arguments)
    made = plan(*_planned(arguments))
    print(json.dumps(as_json(made), indent=1) if arguments.json else "\n".join(lines(made)))
    return 0


def _puzzle(arguments: argparse.Namespace) -> int:
    from hybrid.cli.options import BaseOptions, PlanOptions
    from hybrid.options import flag_of
    from hybrid.plan import puzzle
    from hybrid.plan.cards import parse_cards

    others = [f for f in (*fields(PlanOptions), *fields(BaseOptions)) if f.name not in _OF_PUZZLE]
    of_block = given_fields(arguments)
    if given := [f.name for f in others if getattr(arguments, f.name) != f.default] + of_block:
        raise ValueError(f"plan: expected no {flag_of(given[0])} with --trm, whose sizes are the paper's.")
    if arguments.cards is None:
        raise ValueError("plan: expected --cards, such as 1xH100-80GB; got none.")
    number, card = parse_cards(arguments.cards)
    made = puzzle.plan_puzzle(puzzle.PUZZLES[arguments.trm], number, card)
    text = puzzle.lines(arguments.trm, made, number, card)
    print(json.dumps(puzzle.as_json(made), indent=1) if arguments.json else "\n".join(text))
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    from hybrid.cli.options import PlanOptions
    from hybrid.options import flag_of
    from hybrid.plan import serve

    of_training = [f for f in fields(PlanOptions) if f.name not in _OF_SERVING]
    given = [f.name for f in of_training if getattr(arguments, f.name) != f.default]
    if given:
        raise ValueError(
            f"plan: expected no {flag_of(given[0])} with --serve, which plans no training; got one."
        )
    run, _ = _planned(arguments)
    if run.cards != 1:
        raise ValueError(f"plan: expected one card with --serve, a TRM is not split; got {run.cards}.")
    if run.lora is not None:
        raise ValueError("plan: expected no --lora-rank with --serve, got one.")
    found = serve.serving(run)
    print(
        json.dumps(serve.as_json(found), indent=1) if arguments.json else "\n".join(serve.lines(run, found))
    )
    return 0


def _planned(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(the run, what is asked about it)"""
    from hybrid.bases import KNOWN_BASES, LEVELS, PRESET_BASES
    from hybrid.plan.cards import parse_cards
    from hybrid.plan.run import Run
    from hybrid.plan.table import Wishes, text_tokens
    from hybrid.saving.loading import load_config

    if arguments.level is not None:
        if arguments.preset or arguments.config:
            raise ValueError("plan: expected one of --level, --preset and --config, got two.")
        arguments.preset = LEVELS[arguments.level]
    name = arguments.base or PRESET_BASES.get(arguments.preset)
    if name is None:
        raise ValueError("plan: expected --base, a saved hybrid as --model, or a --level; got none.")
    if arguments.cards is None:
        raise ValueError("plan: expected --cards, such as 8xA100-80GB; got none.")
    if arguments.dtype and arguments.quantize_base:
        raise ValueError("plan: expected --dtype or --quantize-base, got both.")
    number, card = parse_cards(arguments.cards)
    start = KNOWN_BASES.get(name.lower()) or load_config(name, arguments.trust_remote_code)
    config, base = block(start, arguments)
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
        accumulation=arguments.accumulate,
        shards=arguments.shard or number,
        dtype=arguments.quantize_base or arguments.dtype or ("float32" if learns else "bfloat16"),
        lora=lora,
        checkpointing=arguments.gradient_checkpointing,
        trust_remote_code=arguments.trust_remote_code,
    )
    tokens = arguments.tokens
    if arguments.gigabytes is not None:
        if tokens is not None:
            raise ValueError("plan: expected --tokens or --gigabytes, got both.")
        tokens = text_tokens(arguments.gigabytes, arguments.bytes_per_token)
    return run, Wishes(
        tokens, arguments.utilisation, arguments.price, arguments.card_price, arguments.results
    )
