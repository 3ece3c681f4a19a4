"""What the TRM paper trains with, beside the model: loss, optimisers and average of the weights.

    stablemax_cross_entropy   appendix, hyper-parameters: the loss of the cells
    AdamATan2                 its code, of all weights; plain PyTorch, no CUDA extension to build
    SparseSignSGD             of the puzzle embeddings, one row a puzzle, of which a step sees few
    average_of_weights        section 4.7, the exponential moving average with which is tested

Section numbers are of arXiv 2510.04871. The other parts of the recipe, deep supervision with a carry (2.4)
and halting with exploration (2.5 and 4.6), are in puzzles/training.py.

Source   "Less is More: Recursive Reasoning with Tiny Networks", arXiv 2510.04871, and its code,
         github.com/SamsungSAILMontreal/TinyRecursiveModels, commit 1a48ae88215f53bcbaa64fe8e76dc9d053e79a23.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

IGNORED = -100  # a label that is not counted


def log_stablemax(logits: Tensor) -> Tensor:
    """log(s(x) / sum s(x)) over the last axis, float64; s(x) = x + 1 for x >= 0, 1 / (1 - x) below.

    Source: "Grokking at the Edge of Numerical Stability", arXiv 2501.04697.
    """
    x = logits.double()
    # the branch that is not taken must not give a gradient of infinity
    s = torch.where(x < 0, 1 / (1 - x.clamp(max=0)), x + 1)
    return (s / s.sum(-1, keepdim=True)).log()


def stablemax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of rows of cells, [] float64: the mean over rows of the mean over a row's counted cells.

    logits   [B, cells, V]
    labels   [B, cells] int64; -100 is not counted, and a row of nothing else has loss 0
    """
    counted = labels != IGNORED
    given = log_stablemax(logits).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    of_rows = -(given * counted).sum(-1) / counted.sum(-1).clamp(min=1)
    return of_rows.mean()


class AdamATan2(torch.optim.Optimizer):
    """Adam with atan2(m, sqrt(v)) for m / (sqrt(v) + eps): no eps, and no step above pi / 2 of the rate.

        p <- p - lr decay p;   p <- p - lr a atan2(m', b sqrt(v')),  m' and v' without the bias of their start

    a, b   1 in the package that the paper's code began with, adam-atan2; adam-atan2-pytorch has a = 1.27

    Source: "Scaling Exponents Across Parameterizations and Optimizers", arXiv 2407.05872.
    Errors: ValueError for numbers out of their range, and for sparse gradients.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        a: float = 1.0,
        b: float = 1.0,
    ) -> None:
        if not (lr >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas) and a > 0 and b > 0):
            raise ValueError(
                "AdamATan2: expected lr and weight_decay of at least 0, betas in [0, 1), a and b above 0, "
                f"got {lr}, {weight_decay}, {betas}, {a}, {b}."
            )
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "a": a, "b": b})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        gradient = p.grad
        if gradient is None or gradient.is_sparse:
            raise ValueError(
                "AdamATan2: expected dense gradients, got sparse ones; SparseSignSGD takes those."
            )
        state = self.state[p]
        if not state:
            state |= {"step": torch.tensor(0.0), "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
        state["step"] += 1
        (beta1, beta2), done = group["betas"], state["step"].item()
        m = state["m"].lerp_(gradient, 1 - beta1) / (1 - beta1**done)
        v = state["v"].lerp_(gradient.square(), 1 - beta2) / (1 - beta2**done)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * group["a"] * torch.atan2(m, group["b"] * v.sqrt()))


class SparseSignSGD(torch.optim.Optimizer):
    """Sign-SGD with decoupled decay on the rows [N, D] that the batch had; the other rows stay.

        p[i] <- p[i] - lr decay p[i] - lr sign(g[i]),  g[i] summed over the batch's rows of puzzle i

    The gradients are those of `F.embedding(..., sparse=True)`. Adam is nearly this for rows seen seldom.

    Errors: ValueError for numbers below 0, and for dense gradients: rows that were not seen would decay.
    """

    def __init__(self, parameters: Iterable[Any], lr: float = 1e-2, weight_decay: float = 0.1) -> None:
        if lr < 0 or weight_decay < 0:
            raise ValueError(
                f"SparseSignSGD: expected lr and weight_decay of at least 0, got {lr}, {weight_decay}."
            )
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not p.grad.is_sparse:
                    raise ValueError("SparseSignSGD: expected sparse gradients, got dense ones.")
                gradient = p.grad.coalesce()
                (rows,) = gradient.indices()
                kept = p[rows] * (1 - group["lr"] * group["weight_decay"])
                p[rows] = kept - group["lr"] * gradient.values().sign()


def average_of_weights(model: nn.Module, decay: float) -> AveragedModel:
    """A copy that `update_parameters(model)` moves: average <- decay average + (1 - decay) weight.

    It begins with the weights that the model has now.
    """
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    averaged.update_parameters(model)  # the first is taken whole
    return averaged
