"""All programs of an interpreted launch at once: a forked process each, over memory that they share.

Triton's interpreter runs one program after the other, so a program that waits for the next would wait
forever. Here each has a process of its own; atomics are those of the processor, and random pauses around
them and before each load and store let the programs meet in ever other ways. It checks what a barrier
orders. What a GPU's caches may show or hide beyond that, it cannot.
"""

import inspect
import multiprocessing
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from trm_kernels.recursion.one_launch import launchers
from trm_kernels.recursion.one_launch.addresses import distances
from trm_kernels.runtime import tuning


class Hang(AssertionError):
    """Programs were still running at the time limit; they were killed."""


def run_at_once(
    kernel: Any, programs: int, *args: Any, pause: float = 0.0, limit: float = 60.0, **meta: Any
) -> None:
    """kernel[(programs,)](*args, **meta), all programs at once; the tensors have to lie in shared memory.

    pause   seconds: a program waits up to so long at each atomic, and now and then elsewhere
    limit   seconds, after which those that still run are killed

    Errors: Hang; RuntimeError when a program failed.
    """
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_run_one, args=(kernel, i, programs, pause, args, meta))
        for i in range(programs)
    ]
    for child in children:
        child.start()
    end = time.monotonic() + limit
    for child in children:
        child.join(max(0.0, end - time.monotonic()))
    late = [i for i, child in enumerate(children) if child.is_alive()]
    for child in children:
        child.kill()
        child.join()
    if late:
        raise Hang(f"programs {late} of {programs} were still running after {limit} seconds")
    if failed := [i for i, child in enumerate(children) if child.exitcode]:
        raise RuntimeError(f"programs {failed} of {programs} failed")


def _run_one(kernel: Any, i: int, programs: int, pause: float, args: Any, meta: Any) -> None:
    torch.set_num_threads(1)
    _pause_at_memory(random.Random(i), pause)
    executor = GridExecutor(kernel.fn, kernel.arg_names, (programs,), [])
    known = inspect.getfullargspec(executor.fn).args
    bound = inspect.getcallargs(executor.fn, *args, **{k: v for k, v in meta.items() if k in known})
    for name, value in bound.items():
        if name not in executor.constexprs:
            bound[name] = interpreter._implicit_cvt(value)
    interpreter._patch_lang(executor.fn)
    interpreter.interpreter_builder.set_grid_dim(programs, 1, 1)
    interpreter.interpreter_builder.set_grid_idx(i, 0, 0)
    executor.fn(**bound)


def _pause_at_memory(random: random.Random, pause: float) -> None:
    def slowly(name: str, share: float) -> None:
        at_once = getattr(InterpreterBuilder, name)

        def later(self: Any, *args: Any) -> Any:
            time.sleep(random.random() * pause if random.random() < share else 0.0)
            return at_once(self, *args)

        setattr(InterpreterBuilder, name, later)

    slowly("create_atomic_rmw", 1.0)
    slowly("create_masked_load", 0.02)
    slowly("create_masked_store", 0.02)


@contextmanager
def launches_at_once(**how: Any) -> Iterator[None]:
    """Within the block a recursion in one launch runs its programs at once; `how`: see run_at_once."""

    def in_shared_memory(lists: Sequence[Sequence[Tensor]]) -> Tensor:
        _share(
            t for tensors in lists for t in tensors
        )  # which moves them, so before anybody asks where they are
        return distances(lists)

    def launch_at_once(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        _share(t for t in args if isinstance(t, Tensor))
        run_at_once(kernel, grid[0], *args, **how, **meta)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launchers, "distances", in_shared_memory)
        patch.setattr(launchers, "launch", launch_at_once)
        patch.setitem(tuning.MULTIPROCESSORS, "any", 100)
        yield


def _share(tensors: Iterable[Tensor]) -> None:
    for t in tensors:
        t.untyped_storage().share_memory_()
