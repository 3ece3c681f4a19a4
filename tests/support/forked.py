"""A function in a process of its own, forked so that nothing is imported again, and how that ended."""

import os
import sys
import traceback
import warnings
from collections.abc import Callable

import torch


def start(act: Callable[[], object]) -> int:
    """The id of a process that runs `act` and exits: 0, or 1 with the stack on stderr."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # threads beside it are idle
        process = os.fork()
    if process:
        return process
    code = 1
    try:
        torch.set_num_threads(1)
        act()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process: int) -> int:
    """Its exit code; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run(act: Callable[[], object]) -> int:
    return wait(start(act))
