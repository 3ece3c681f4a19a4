"""Which process this is, of how many; workers that end with it; and chance that is the same once more."""

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env, set_seed

from hybrid.training.stop_signals import NOTED

T = TypeVar("T")
_LOOKS_EVERY = 1.0  # seconds

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


def on_main(processes: PartialState, call: Callable[[], T]) -> T:
    """What `call` gives on the main process, on all of them; every process asks.

    Errors: a ValueError of `call` on every process, so that none waits for one that has ended.
    """
    if processes.num_processes == 1:
        return call()
    answer: list[Any] = [None, None]
    if processes.is_main_process:
        try:
            answer[0] = call()
        except ValueError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise ValueError(answer[1])
    return answer[0]


def end_with_parent() -> None:
    """In a worker process: end when its parent has ended, however that was; and not before.

    What a terminal (Ctrl-C) or a scheduler sends to all processes of a job is the parent's to answer: it may
    need its workers to finish a step. From the parent itself it ends this process.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    waits = hasattr(signal, "sigtimedwait")
    if waits:
        signal.pthread_sigmask(signal.SIG_BLOCK, NOTED)
    began_under = os.getppid()

    def watch() -> None:
        while parent.is_alive() and os.getppid() == began_under:
            if not waits:
                time.sleep(_LOOKS_EVERY)
            elif (came := signal.sigtimedwait(NOTED, _LOOKS_EVERY)) and came.si_pid == began_under:
                break
        os._exit(0)

    threading.Thread(target=watch, daemon=True, name="end with parent").start()
