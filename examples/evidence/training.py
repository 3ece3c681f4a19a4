"""The loop of every arm: a loss, AdamW, a cosine; what a step costs."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hybrid.training.settings import TrainSettings

_COUNTED = 20  # steps, spread over the training: a step may draw how much it computes


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require gradients."""
    return [p for p in model.parameters() if p.requires_grad]


def train(model: nn.Module, loss_of: Callable[[int], Tensor], steps: int, learning_rate: float) -> float:
    """CPU seconds of `steps` optimizer steps on what requires gradients, as `trm-hybrid train` takes them.

    loss_of   the loss of a step, counted from 0
    """
    parameters = trained(model)
    settings = TrainSettings("", steps, learning_rate=learning_rate, warmup_steps=min(50, steps // 4))
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    model.train()
    began = time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate_at(step)
        optimizer.zero_grad()
        loss_of(step).backward()
        nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
    return time.process_time() - began


def count_flops(loss_of: Callable[[int], Tensor], steps: int) -> float:
    """Floating-point operations of the products in a step, forward and backward: the mean of a few steps."""
    counted = range(0, steps, max(1, steps // _COUNTED))
    with FlopCounterMode(display=False) as counter:
        for step in counted:
            loss_of(step).backward()
    return counter.get_total_flops() / len(counted)
