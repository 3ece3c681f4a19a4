"""What test_shard.py does on two ranks: runs in which the first one loads the model, then all of them."""

import os

import transformers.modeling_utils
from accelerate import PartialState

import hybrid.cli.train
from hybrid.cli import main
from hybrid.saving import loading


def load_and_train(folder):
    """In a folder with `base` and `new.txt`; this process is changed for good."""
    from tests.hybrid.cli.test_cli import train_command

    reads, safe_open = [], transformers.modeling_utils.safe_open

    def counted(*args, **kwargs):
        reads.append(args[0])
        return safe_open(*args, **kwargs)

    transformers.modeling_utils.safe_open = counted
    PartialState.destroy_process_group = lambda self: None  # there is another run
    for who in ("first", "all"):
        if who == "all":
            hybrid.cli.train.load_on_first = loading.load_model
        for phase in ("1", "2", "hybrid"):
            reads.clear()
            more = ["--shard", "--log-every", "1", "--phase", "1" if phase == "hybrid" else phase]
            command = train_command(folder / "base", folder, folder / f"{who}-{phase}", *more, steps=3)
            if phase == "hybrid":  # which has its block already
                command = command[: command.index("--injection-layers")] + more
                command[command.index("--base") + 1] = str(folder / f"{who}-2")
            assert main(command) == 0
            assert bool(reads) == (who == "all" or os.environ["RANK"] == "0"), (who, reads)
        if who == "first":  # a finished run: every process has to know it again
            assert main([*command, "--resume"]) == 0
