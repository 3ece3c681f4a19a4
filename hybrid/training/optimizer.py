"""AdamW for the trainable parameters: torch's, or torchao's, which rounds bfloat16 weights stochastically.

A weight of bfloat16 has 8 significant bits: rounded to the nearest, a step smaller than half of the last one
is lost, every time. Rounded up or down with the chance that makes its mean right, such steps count. Moments
are kept in the dtype of their weights, and computed with in float32.
"""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hybrid.extras import installed


def adamw(
    trained: Mapping[str, nn.Parameter],
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    stochastic_rounding: bool = False,
) -> Optimizer:
    """AdamW over `trained`, name -> parameter.

    stochastic_rounding   of bfloat16 weights, by torch's global generator of their device

    Warns of bfloat16 weights that are rounded to the nearest.

    Errors: ValueError when torchao is missing, or when no bfloat16 weight is there to be rounded.
    """
    parameters = list(trained.values())
    halves = [name for name, p in trained.items() if p.dtype == torch.bfloat16]
    if stochastic_rounding:
        installed("torchao", "stochastic rounding")
        if not halves:
            dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
            raise ValueError(
                f"train: expected bfloat16 weights that learn, for stochastic rounding, got {dtypes}."
            )
        from torchao.optim import _AdamW

        return _AdamW(parameters, learning_rate, betas, weight_decay=weight_decay, bf16_stochastic_round=True)
    if halves:
        warnings.warn(
            f"AdamW rounds {len(halves)} bfloat16 tensors ({halves[0]}, ...) to the nearest: steps below "
            "half of their last bit are lost. Stochastic rounding (--stochastic-rounding) keeps them on "
            "average; so does float32, at twice the memory.",
            stacklevel=3,
        )
    return torch.optim.AdamW(
        parameters,
        lr=learning_rate,
        betas=betas,
        weight_decay=weight_decay,
        fused=all(p.device.type in ("cpu", "cuda") for p in parameters),
    )


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Of every parameter."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's, which is compiled and reads it anew in each step
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
