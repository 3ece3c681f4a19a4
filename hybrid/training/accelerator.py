"""accelerate's Accelerator for a run; a way of training whose checkpoints cannot be written is refused."""

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from transformers import PreTrainedModel

from hybrid.model.hybrid_model import HybridModel
from hybrid.training.processes import this_process
from hybrid.training.settings import TrainSettings

_DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def accelerator_of(model: PreTrainedModel, settings: TrainSettings) -> Accelerator:
    """Errors: ValueError for ways of training whose checkpoints this loop cannot write."""
    this_process()
    # with cycles that pass no gradient the first states get none, which DDP has to be told
    is_partial = isinstance(model, HybridModel) and model.config.grad_cycles not in (
        None,
        model.config.num_cycles,
    )
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        log_with=list(settings.report_to) or None,
        project_dir=settings.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=is_partial)],
    )
    if accelerator.distributed_type not in _DISTRIBUTED:
        raise ValueError(
            f"train: expected one process or data parallelism, got {accelerator.distributed_type.value} "
            "from accelerate's configuration; --shard is FSDP2."
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"train: expected mixed precision no or bf16, got {accelerator.mixed_precision}.")
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"train: expected gradient_accumulation_steps 1, got {accelerator.gradient_accumulation_steps} "
            "from accelerate's configuration; --accumulate says it here."
        )
    if settings.shard and not torch.distributed.is_initialized():
        raise ValueError(
            "train: expected processes to split the model among (torchrun, accelerate launch), got one."
        )
    return accelerator
