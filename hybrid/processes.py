"""Which process this is, of how many; and chance that is the same whenever it is asked for again."""

import os
import random

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, set_seed

_ENGINES = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


def this_process() -> PartialState:
    """This process among those that a launcher started; without an accelerator they talk over gloo.

    Errors: ValueError when there are others and no way to talk to them, or when accelerate is to run them by
    an engine of its own: on a CPU it would leave that out without a word.
    """
    for engine in _ENGINES:
        if parse_flag_from_env(f"ACCELERATE_USE_{engine}"):
            raise ValueError(
                f"expected one process or data parallelism, got {engine} from accelerate's configuration; "
                "--shard is FSDP2."
            )
    wants_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=wants_cpu)
    started = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != started:
        raise ValueError(
            f"expected {started} processes (WORLD_SIZE) that know each other, got {state.num_processes}."
        )
    return state


def seed_everything(*numbers: int) -> None:
    """Seed the global generators of Python, NumPy and torch by a few numbers together."""
    set_seed(random.Random(":".join(map(str, numbers))).getrandbits(32))
