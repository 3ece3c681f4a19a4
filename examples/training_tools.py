"""A hybrid trained for a few steps by each of the tools that docs/training-tools.md shows.

    torchrun --nproc_per_node 2 examples/training_tools.py --tool ddp --base PATH --out FOLDER
    accelerate launch --config_file examples/configs/two_processes.yaml examples/training_tools.py ...

Rows are random tokens: this shows that a tool runs, not that something is learnt. Every tool takes the same
rows in the same steps, so they print the same losses, whatever the number of processes.
"""

import argparse
import os

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hybrid import HybridConfig, HybridModel
from hybrid.model.injection_points import decoder_layers

ROWS_IN_STEP = 4


class RandomRows(Dataset):
    """Rows of 12 tokens, each from its own seed."""

    def __init__(self, steps: int, vocabulary: int) -> None:
        self.rows, self.vocabulary = steps * ROWS_IN_STEP, vocabulary

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.randint(0, self.vocabulary, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": row, "labels": row}


def make_hybrid(base: str) -> HybridModel:
    """One TRM in the middle; the same weights in every process."""
    torch.manual_seed(0)
    config = HybridConfig(
        injection_layers=[1],
        trm_hidden_size=16,
        trm_num_heads=2,
        trm_num_layers=1,
        trm_intermediate_size=24,
        num_recursion_steps=3,
        recursion_sampling="uniform",
    )
    return HybridModel(llm_model=AutoModelForCausalLM.from_pretrained(base), config=config).freeze_base()


def with_trainer(base: str, rows: Dataset, arguments: argparse.Namespace) -> list[float]:
    """DDP where there are more processes; DeepSpeed with --deepspeed."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    training = TrainingArguments(
        arguments.out,
        max_steps=arguments.steps,
        per_device_train_batch_size=ROWS_IN_STEP // processes,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        deepspeed=arguments.deepspeed,
    )
    trainer = Trainer(make_hybrid(base), training, train_dataset=rows)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def with_accelerate(base: str, rows: Dataset, arguments: argparse.Namespace) -> list[float]:
    accelerator = Accelerator(cpu=True)
    model = make_hybrid(base)
    optimizer = torch.optim.AdamW(model.trm_parameters(), lr=1e-2, weight_decay=0.0)
    loader = DataLoader(rows, batch_size=ROWS_IN_STEP // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    accelerator.unwrap_model(model).save_pretrained(
        arguments.out, is_main_process=accelerator.is_main_process
    )
    return losses


def with_ddp(base: str, rows: Dataset, arguments: argparse.Namespace) -> list[float]:
    dist.init_process_group("gloo")
    model = DistributedDataParallel(make_hybrid(base))
    losses = _loop(model, model.module.trm_parameters(), rows)
    model.module.save_pretrained(arguments.out, is_main_process=dist.get_rank() == 0)
    return losses


def with_fsdp2(base: str, rows: Dataset, arguments: argparse.Namespace) -> list[float]:
    """A unit a decoder layer, its TRM inside, and the rest; saved from the first process."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = make_hybrid(base)
    for layer in decoder_layers(model.llm_model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = _loop(model, model.trm_parameters(), rows)
    state = {name: t.full_tensor() for name, t in model.state_dict().items() if "trm" in name}
    model.save_pretrained(
        arguments.out, is_main_process=dist.get_rank() == 0, state_dict=state, save_base=False
    )
    return losses


def _loop(model: torch.nn.Module, parameters: object, rows: Dataset) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)  # type: ignore[arg-type]
    loader = DataLoader(
        rows,
        batch_size=ROWS_IN_STEP // dist.get_world_size(),
        sampler=DistributedSampler(rows, shuffle=False),  # type: ignore[arg-type]
    )
    model.train()
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(float(mean))
    return losses


TOOLS = {"trainer": with_trainer, "accelerate": with_accelerate, "ddp": with_ddp, "fsdp2": with_fsdp2}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tool", choices=TOOLS, required=True)
    parser.add_argument("--base", required=True, help="folder or hub name of a small language model")
    parser.add_argument("--out", required=True, help="folder for what is trained")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--deepspeed", help="DeepSpeed's config, for the tool `trainer`")
    arguments = parser.parse_args()
    vocabulary = 90
    losses = TOOLS[arguments.tool](arguments.base, RandomRows(arguments.steps, vocabulary), arguments)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print("losses", *(f"{loss:.4f}" for loss in losses), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
