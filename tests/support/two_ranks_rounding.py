"""What torchrun starts in test_optimizer.py: bfloat16 weights on two processes, copied, then split."""

import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object

from hybrid.training.loop import train
from tests.hybrid.training.test_optimizer import in_bfloat16, settings_of_two
from tests.support.tiny_text import Counting

folder = Path(sys.argv[1])
with torch.compiler.set_stance("force_eager"):
    for name in ("copies", "split"):
        model = in_bfloat16(dropout=0)
        train(model, Counting(), settings_of_two(folder / name, shard=name == "split"), {"new": Counting(5)})
        if name == "copies":
            weights = [torch.cat([p.detach().float().reshape(-1) for p in model.parameters()]).tolist()]
            one, other = gather_object(weights)
            assert one == other, "a copy was rounded another way"
torch.distributed.destroy_process_group()
