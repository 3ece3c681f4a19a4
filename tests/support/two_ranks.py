"""A training run on two ranks, for test_shard.py; under torchrun the second one may be told to die.

arguments   folder, where to die ("step", "save", or "told": to be told to end in a step), which time there
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from hybrid.training import loop as train
from hybrid.training import run_folder, shard


def train_on_two(folder, phase=1, checkpointing=False):
    """The rows and settings of test_shard.py, an item in a forward, as far as the folder is not there yet."""
    from tests.hybrid.training.test_shard import hybrid_in, rows, settings

    model = hybrid_in(phase, folder.parent / "base")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    resume = (folder / run_folder.RUN).exists()
    train.train(model, rows(), settings(folder, 1, shard=True), {"new": rows(5)}, resume=resume)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    for name, p in model.base_named_parameters():
        assert p.requires_grad == (phase == 2), name
        assert phase == 2 or p.grad is None, name


def dies(call, where, time):
    times = 0

    def dying(*args, **kwargs):
        nonlocal times
        times += 1
        if times == time and int(os.environ["RANK"]) == 1:
            os.kill(os.getpid(), signal.SIGTERM if where == "told" else signal.SIGKILL)
        return call(*args, **kwargs)

    return dying


def main(folder, where, time):
    if where in ("step", "told"):  # between backward and the optimizer's step
        torch.nn.utils.clip_grad_norm_ = dies(torch.nn.utils.clip_grad_norm_, where, time)
    else:  # "save": between the weights and the moments
        shard.write = dies(shard.write, where, time)
    train_on_two(folder)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
