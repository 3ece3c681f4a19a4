"""A function on two ranks: forked, so that nothing is imported again, and otherwise as torchrun starts them.

The process that forks must never have been one of several ranks itself: torch remembers which part it had.
That torchrun itself starts a run, and ends both of its processes, is shown by
test_shard.py::test_a_signal_to_one_process_ends_both_after_the_same_step.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState

from tests.support import forked

COUNT = 2


def run(act: Callable[[], object]) -> CompletedProcess[str]:
    """How `act` ended on both: the first exit code that is not 0, and what they wrote.

    A rank that fails takes the other one with it, which would wait for it.
    """
    with TemporaryDirectory() as name, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        out, err = Path(name, "out"), Path(name, "err")
        processes = [forked.start(lambda rank=rank: _as(rank, port, act, out, err)) for rank in range(COUNT)]
        code = _wait(processes)
        return CompletedProcess([], code, out.read_text(), err.read_text())


def _as(rank: int, port: int, act: Callable[[], object], *written: Path) -> None:
    for number, path in enumerate(written, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": COUNT, "LOCAL_WORLD_SIZE": COUNT}
    os.environ |= {key: str(value) for key, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    AcceleratorState._reset_state()  # of what this process was before it was a rank
    PartialState._reset_state()
    try:
        act()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _wait(processes: list[int]) -> int:
    code, left = 0, list(processes)
    while left:
        for process in left:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                left.remove(process)
                code = code or os.waitstatus_to_exitcode(status)
                break
        else:
            time.sleep(0.02)
        if code:
            for process in left:
                os.kill(process, signal.SIGKILL)
    return code
