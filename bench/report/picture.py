"""What is fused, in one picture: `python -m bench picture` draws docs/fused-recursion.png

It has a column for each launch of one evaluation of a layer. The column lists what eager PyTorch runs
instead: the operators of PAPER in bench/peers/eager.py, counted while it runs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from bench.measure.counting import Counting
from bench.peers.eager import PAPER, Recursion
from trm_kernels.ops.attention.rope import Angles

FILE = Path(__file__).parents[2] / "docs" / "fused-recursion.png"
_OURS, _CUBLAS, _EAGER = "#2b6ca3", "#d08a2e", "#e3e3e3"
_CENTRED: dict[str, Any] = {"ha": "center", "va": "center"}
_TITLE = "The first layer of f: {ours} launches, where eager PyTorch has {eager}"
_LOOP = (
    "All layers, all steps, all cycles, forward and backward: one autograd.Function on buffers made once.\n"
    "repeat num_cycles times:   repeat num_recursion_steps times:  z = f(z + (y + x));   y = f(y + z)"
)


class Column(NamedTuple):
    """One launch of ours, and the names of the operators that it replaces."""

    kernel: str
    formula: str
    is_product: bool  # by cuBLAS
    eager: list[str]


def columns() -> list[Column]:
    """The six launches in their order; the eager operators are found by running them."""
    numbers = Recursion(D=8, H=2, F=8, num_layers=1, num_recursion_steps=1)
    D, F, H = numbers.D, numbers.F, numbers.H
    v = h = torch.zeros(1, 3, D, dtype=torch.bfloat16)
    gu = torch.zeros(1, 3, 2 * F, dtype=torch.bfloat16)
    heads = torch.zeros(1, 3, 3 * H, D // H, dtype=torch.bfloat16)
    angles = Angles(torch.ones(1, 3, 1, D // H), torch.zeros(1, 3, 1, D // H))

    def product(w: Tensor, a: Tensor) -> Callable[[], Any]:
        return lambda: PAPER.linear(a, w)

    def attention() -> None:
        q, k = (t.transpose(1, 2) for t in PAPER.rope(heads[:, :, : 2 * H], angles))
        PAPER.attend(q, k, heads[:, :, 2 * H :].transpose(1, 2), False)

    w_qkv, w_o, w_gate_up, w_down = (torch.zeros(*s) for s in ((3 * D, D), (D, D), (2 * F, D), (D, F)))
    add = [lambda: v + h]
    norm = [lambda: PAPER.rms(h, 1e-5)]
    return [
        Column("norm_add", "v = rms(h2) + r", False, _operators(*norm, *add)),
        Column("torch.mm", "qkv = v Wqkv", True, _operators(product(w_qkv, v))),
        Column("rope_attention", "o = softmax(rot(q) rot(k)) v", False, _operators(attention)),
        Column("linear_residual", "h = o Wo + v,  sums of h^2", False, _operators(product(w_o, v), *add)),
        Column(
            "linear_swiglu",
            "a = silu(n Wg) (n Wu), n=rms(h)",
            False,
            _operators(*norm, product(w_gate_up, v), lambda: PAPER.swiglu(gu)),
        ),
        Column(
            "linear_residual",
            "h2 = a Wd + rms(h)",
            False,
            _operators(product(w_down, v), *add),
        ),
    ]


def _operators(*runs: Callable[[], Any]) -> list[str]:
    with torch.no_grad(), Counting() as counted:
        for run in runs:
            run()
    return [_brief(name) for name, times in counted.computing().items() for _ in range(times)]


def _brief(name: str) -> str:
    return "attention" if "attention" in name else {"_to_copy": "cast"}.get(name, name)


def draw(file: Path = FILE) -> None:
    """Write the picture, a PNG."""
    found = columns()
    most = max(len(column.eager) for column in found)
    figure = Figure(figsize=(13, 1.9 + 0.27 * most))
    FigureCanvasAgg(figure)  # draws without a screen
    axes = figure.add_subplot()
    for i, column in enumerate(found):
        for j, name in enumerate(column.eager):
            axes.text(i + 0.5, 2.6 + j, name, size=8, family="monospace", **_CENTRED)
            axes.add_patch(Rectangle((i + 0.14, 2.15 + j), 0.72, 0.9, color=_EAGER, zorder=0))
        color = _CUBLAS if column.is_product else _OURS
        axes.add_patch(Rectangle((i + 0.03, 0), 0.94, 1.9, color=color, zorder=0))
        axes.text(i + 0.5, 1.25, column.kernel, color="white", weight="bold", size=11, **_CENTRED)
        axes.text(i + 0.5, 0.6, column.formula, color="white", size=7, **_CENTRED)
    total = sum(len(column.eager) for column in found)
    axes.set_title(_TITLE.format(ours=len(found), eager=total), size=13)
    axes.text(3, -0.5, _LOOP, ha="center", va="top", size=10)
    axes.set_xlim(0, 6)
    axes.set_ylim(-2.1, most + 2.4)
    axes.axis("off")
    figure.savefig(file, dpi=110, bbox_inches="tight")
