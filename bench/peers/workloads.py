"""The workloads W1 to W6: each is a problem that any peer can solve.

    W1   TRM Sudoku, the recursion of a training step          d 512, 8 heads, 2 layers, S 97, n 6, T 3
    W2   TRM ARC, the same                                     S 916, n 4, T 3
    W3   level 1's injections in a phase-1 training step       LLaMA-2-7B's width 4096, d 2048, S 2048, n 4
    W4   level 1's injections, decoding one token              context 2048
    W5   the injection's blend alone                           8192 tokens, 4096 to 2048 wide
    W6   one puzzle: W1's recursion, forward only

All in bfloat16, with weights kept in float32 where they are trained. A problem holds the tensors and what has
to be computed. A peer (solvers.py) computes it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bench.peers.eager import Cache, Recursion
from trm_kernels.ops.attention.rope import Angles, rope_angles
from trm_kernels.recursion.weights import AttentionWeights, LayerWeights, SwiGLUWeights

CARDS = ("rtx4090", "a100", "h100", "h200")
# as nvidia-smi names them, by a part of the name
_NAMES = {"4090": "rtx4090", "A100": "a100", "H100": "h100", "H200": "h200"}

ROPE_THETA = 10000.0

# solves a problem once: what comes out, then the gradients
Step = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Solver:
    """What a peer implements: the three computations of a hybrid beside its base."""

    recursion: Callable[..., tuple[Tensor, Tensor]]  # (x, y, z, weights, angles, numbers, caches)
    project_in: Callable[[Tensor, Tensor, float], Tensor]  # (h, w_in, eps)
    blend: Callable[[Tensor, Tensor, Tensor], Tensor]  # (h, y, w_out)
    # all three at once, where a peer has that: (h, block, positions, numbers, caches)
    inject: Callable[..., Tensor] | None = None
    is_graphed: bool = False  # its whole step is replayed as a CUDA graph
    marks_steps: bool = False  # tells torch.compile's own CUDA graphs where a step begins


def known_card(device_name: str) -> str | None:
    """The card of this name; None for another, and for a CPU."""
    return next((card for part, card in _NAMES.items() if part in device_name), None)


def card_of(device_name: str) -> str:
    """The card whose batch sizes are used: the named one, else the smallest."""
    return known_card(device_name) or CARDS[0]


@dataclass(frozen=True)
class Block:
    """One recursion: its weights, its initial state and, in an injection, the projections around it."""

    weights: list[LayerWeights]
    y_init: Tensor  # [D]
    z_init: Tensor
    w_in: Tensor | None = None  # [d, D]
    w_out: Tensor | None = None  # [D, d]

    def tensors(self) -> list[Tensor]:
        """The tensors that have gradients."""
        flat = [t for w in self.weights for part in w for t in part]
        around = (self.w_in, self.w_out, self.y_init)
        return [*flat, *(t for t in around if t is not None and t.requires_grad)]


@dataclass(frozen=True)
class Problem:
    """The tensors of a workload, and what is computed from them.

    h        [B, T, D], the input: the recursion's x or, with injections, the hidden state
    blocks   one a recursion, one after the other
    positions, angles   of the tokens [1, T], and RoPE's table of them
    caches   by block, where a token is decoded
    dout     the gradient of the output; None without backward
    """

    numbers: Recursion
    h: Tensor
    blocks: list[Block]
    positions: Tensor
    angles: Angles
    caches: list[list[Cache]] | None = None
    dout: Tensor | None = None
    only_blend: bool = False

    def step(self, solver: Solver) -> Step:
        """One solution: with backward, gradients of h and of every matrix."""

        def forward() -> Tensor:
            out = self.h
            for i, block in enumerate(self.blocks):
                out = self._block(solver, out, block, None if self.caches is None else self.caches[i])
            return out

        def run() -> list[Tensor]:
            if self.dout is None:
                with torch.no_grad():
                    return [forward()]
            out = forward()
            wanted = [self.h, *(t for block in self.blocks for t in block.tensors())]
            return [out, *torch.autograd.grad(out, wanted, self.dout)]

        return run

    def _block(self, solver: Solver, h: Tensor, block: Block, caches: list[Cache] | None) -> Tensor:
        if self.only_blend:
            return solver.blend(h, block.y_init, block.w_out)  # type: ignore[arg-type]
        if solver.inject is not None and block.w_in is not None:
            return solver.inject(h, block, self.positions, self.numbers, caches)
        x = h if block.w_in is None else solver.project_in(h, block.w_in, self.numbers.eps)
        y, z = (t.to(x.dtype).expand_as(x).contiguous() for t in (block.y_init, block.z_init))
        y, _ = solver.recursion(x, y, z, block.weights, self.angles, self.numbers, caches)
        return y if block.w_out is None else solver.blend(h, y, block.w_out)

    def cast(self, dtype: torch.dtype, rows: int, keep_weights: bool = False) -> "Problem":
        """The same problem for the first rows of the batch, in another dtype: for a check."""

        def to(t: Tensor) -> Tensor:
            return t.detach().to(t.dtype if keep_weights else dtype).requires_grad_(t.requires_grad)

        def first(t: Tensor) -> Tensor:
            return t.detach()[:rows].to(dtype, copy=True).requires_grad_(t.requires_grad)

        def block(b: Block) -> Block:
            weights = [
                LayerWeights(AttentionWeights(*map(to, w.mixer)), SwiGLUWeights(*map(to, w.mlp)))
                for w in b.weights
            ]
            y_init = first(b.y_init) if self.only_blend else to(b.y_init)
            outer = (None if t is None else to(t) for t in (b.w_in, b.w_out))
            return Block(weights, y_init, to(b.z_init), *outer)

        caches = self.caches
        if caches is not None:
            caches = [[(first(k), first(v)) for k, v in of_block] for of_block in caches]
        return replace(
            self,
            h=first(self.h),
            blocks=[block(b) for b in self.blocks],
            caches=caches,
            dout=None if self.dout is None else first(self.dout),
        )


# How problems are made


class _Random:
    """Random tensors of one seed on one device; never zeros, which can run faster."""

    def __init__(self, device: str) -> None:
        self.device = device
        # on "meta" there are no numbers to draw
        self.generator = None if device == "meta" else torch.Generator(device=device).manual_seed(0)

    def __call__(self, *shape: int, size: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        t = torch.randn(shape, generator=self.generator, device=self.device) * size
        return t.to(dtype)


def _weights(numbers: Recursion, random: _Random, trained: bool) -> list[LayerWeights]:
    D, F = numbers.D, numbers.F
    dtype = torch.float32 if trained else torch.bfloat16

    def matrix(n_out: int, n_in: int) -> Tensor:
        return random(n_out, n_in, size=n_in**-0.5, dtype=dtype).requires_grad_(trained)

    return [
        LayerWeights(
            AttentionWeights(matrix(3 * D, D), matrix(D, D)), SwiGLUWeights(matrix(2 * F, D), matrix(D, F))
        )
        for _ in range(numbers.num_layers)
    ]


def _puzzle(numbers: Recursion, tokens: int, trained: bool, batch: int, device: str) -> Problem:
    """The recursion of TRM's own model."""
    random = _Random(device)
    block = Block(_weights(numbers, random, trained), random(numbers.D), random(numbers.D))
    h = random(batch, tokens, numbers.D).requires_grad_(trained)
    positions = torch.arange(tokens, device=device)[None]
    angles = rope_angles(positions, numbers.D // numbers.H, ROPE_THETA)
    return Problem(numbers, h, [block], positions, angles, dout=random(*h.shape) if trained else None)


def _injections(
    numbers: Recursion, width: int, points: int, tokens: int, context: int, batch: int, device: str
) -> Problem:
    """What a hybrid computes beside its base: in training, or for one token after `context` - 1 others."""
    random, d, K = _Random(device), numbers.D, numbers.D // numbers.H
    trained = context == 0
    dtype = torch.float32 if trained else torch.bfloat16
    blocks = []
    for _ in range(points):
        w_in, w_out = (
            random(n_out, n_in, size=n_in**-0.5, dtype=dtype).requires_grad_(trained)
            for n_out, n_in in ((d, width), (width, d))
        )
        blocks.append(Block(_weights(numbers, random, trained), random(d), random(d), w_in, w_out))
    h = random(batch, tokens, width).requires_grad_(trained)
    first = max(context - 1, 0)
    positions = first + torch.arange(tokens, device=device)[None]
    angles = rope_angles(positions, K, ROPE_THETA)
    if trained:
        return Problem(numbers, h, blocks, positions, angles, dout=random(*h.shape))
    slab = batch, numbers.H, context, K
    caches = [[(random(*slab), random(*slab)) for _ in range(numbers.evaluations)] for _ in range(points)]
    return Problem(numbers, h, blocks, positions, angles, caches)


def _blend(tokens: int, width: int, d: int, batch: int, device: str) -> Problem:
    """h + y W_out^T: one matrix, and the hidden state in and out."""
    random = _Random(device)
    h, y = (random(batch, tokens, n).requires_grad_() for n in (width, d))
    w_out = random(width, d, size=d**-0.5).requires_grad_()
    nothing = random(1)
    block = Block([], y, nothing, w_out=w_out)
    numbers, angles = Recursion(d, 1, d, 0, 0), Angles(nothing, nothing)
    return Problem(numbers, h, [block], nothing, angles, dout=random(*h.shape), only_blend=True)


@dataclass(frozen=True)
class Workload:
    """A problem, the batch that fits each card, and how it is timed."""

    name: str
    title: str
    make: Callable[[int, str], Problem]  # (batch, device)
    make_tiny: Callable[[int, str], Problem]  # for a run without a GPU: the same code, small
    batch: Mapping[str, int]  # by card
    has_backward: bool = True
    flushed: bool = False  # timed with cold caches as well
    numbers: Recursion | None = None
    tokens: int = 0
    points: int = 0  # injections
    width: int = 0  # of the language model


SUDOKU = Recursion(D=512, H=8, F=1536, num_layers=2, num_recursion_steps=6, num_cycles=3)
ARC = SUDOKU._replace(num_recursion_steps=4)
LEVEL_1 = Recursion(D=2048, H=16, F=5632, num_layers=2, num_recursion_steps=4, causal=True)
_TINY = Recursion(D=32, H=2, F=48, num_layers=2, num_recursion_steps=2, num_cycles=2)
_TINY_LEVEL_1 = _TINY._replace(num_cycles=1, causal=True)


def _batches(rtx4090: int, a100: int, h100: int, h200: int) -> dict[str, int]:
    return dict(zip(CARDS, (rtx4090, a100, h100, h200), strict=True))


# Batches: what eager, which keeps most, fits in 24, 80, 80 and 141 GB. W1 eager at batch 768 keeps
# 768 x 97 tokens x 14 evaluations x 24.6 kB = 26 GB (bench/results/static/saved.json).
WORKLOADS = (
    Workload(
        "W1",
        "TRM Sudoku, training: forward and backward of the recursion",
        partial(_puzzle, SUDOKU, 97, True),
        partial(_puzzle, _TINY, 5, True),
        _batches(384, 768, 768, 768),
        numbers=SUDOKU,
        tokens=97,
    ),
    Workload(
        "W2",
        "TRM ARC, training: forward and backward of the recursion",
        partial(_puzzle, ARC, 916, True),
        partial(_puzzle, _TINY, 7, True),
        _batches(48, 192, 192, 192),
        numbers=ARC,
        tokens=916,
    ),
    Workload(
        "W3",
        "level 1 on LLaMA-2-7B, phase-1 training: both injections, forward and backward",
        partial(_injections, LEVEL_1, 4096, 2, 2048, 0),
        partial(_injections, _TINY_LEVEL_1, 48, 2, 6, 0),
        _batches(1, 4, 4, 4),
        numbers=LEVEL_1,
        tokens=2048,
        points=2,
        width=4096,
    ),
    *(
        Workload(
            f"W4-{batch}",
            f"level 1 on LLaMA-2-7B, decoding after 2047 tokens: both injections, batch {batch}",
            partial(_injections, LEVEL_1, 4096, 2, 1, 2048),
            partial(_injections, _TINY_LEVEL_1, 48, 2, 1, 9),
            _batches(*(batch,) * 4),
            has_backward=False,
            flushed=True,
            numbers=LEVEL_1,
            tokens=1,
            points=2,
            width=4096,
        )
        for batch in (1, 16)
    ),
    Workload(
        "W5",
        "the blend h + y W_out^T, 8192 tokens: forward and backward",
        partial(_blend, 2048, 4096, 2048),
        partial(_blend, 5, 48, 32),
        _batches(4, 4, 4, 4),
        flushed=True,
        tokens=2048,
        points=1,
        width=4096,
    ),
    *(
        Workload(
            f"W6-{batch}",
            f"W1's recursion on {'one puzzle' if batch == 1 else f'{batch} puzzles'}, forward only",
            partial(_puzzle, SUDOKU, 97, False),
            partial(_puzzle, _TINY, 5, False),
            _batches(*(batch,) * 4),
            has_backward=False,
            flushed=True,
            numbers=SUDOKU,
            tokens=97,
        )
        for batch in (1, 8)
    ),
)
