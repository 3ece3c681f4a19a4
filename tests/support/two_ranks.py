"""What torchrun starts in test_shard.py: a training run on two processes that may be told to die.

arguments   folder, number of items in a forward, where to die (or "nowhere", or "told": to be told to end in
            a step), the how manieth time there
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from hybrid.training import loop as train
from hybrid.training import run_folder, shard
from tests.hybrid.training.test_shard import hybrid_in, rows, settings

folder, batch_size, where, time = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
phase, checkpointing = int(sys.argv[5]), sys.argv[6] == "checkpointing"
times = 0


def dies(call):
    def dying(*args, **kwargs):
        global times
        times += 1
        if times == time and int(os.environ["RANK"]) == 1:
            os.kill(os.getpid(), signal.SIGTERM if where == "told" else signal.SIGKILL)
        return call(*args, **kwargs)

    return dying


if where in ("step", "told"):  # between backward and the optimizer's step
    torch.nn.utils.clip_grad_norm_ = dies(torch.nn.utils.clip_grad_norm_)
elif where == "save":  # between the weights and the moments
    shard.write = dies(shard.write)

model = hybrid_in(phase, folder.parent / "base")
if checkpointing:
    model.gradient_checkpointing_enable({"use_reentrant": False})
resume = (folder / run_folder.RUN).exists()
train.train(model, rows(), settings(folder, batch_size, shard=True), {"new": rows(5)}, resume=resume)
assert all(isinstance(p, DTensor) for p in model.parameters())
for name, p in model.base_named_parameters():
    assert p.requires_grad == (phase == 2), name
    assert phase == 2 or p.grad is None, name
torch.distributed.destroy_process_group()
