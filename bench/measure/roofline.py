"""Floors: the least time of each workload, from operations and bytes, on four cards. No GPU needed.

A kernel of F operations that moves B bytes through device memory takes at least max(F / peak, B / bandwidth).
Two floors follow for a list of kernels:

    ideal    max(sum F / peak, sum B / bandwidth): everything overlaps
    serial   the sum of each kernel's own: one after the other, as they run

Assumed: each kernel reads each input once and writes each output once. Nothing stays in the L2 cache between
kernels. Attention runs at a share of the products' peak. Launches cost nothing. So a floor is a prediction.
In the lists below X is M rows of D bfloat16 numbers, 2 D M bytes, and J the same of F; S tokens a sequence.

Peaks are the data sheets' dense bfloat16 rates and memory bandwidths, times the share that products and
copies are assumed to reach (CARDS). For a measured card its own ceilings replace them (ceilings.py).
"""

from dataclasses import dataclass

from bench.peers.eager import Recursion
from bench.peers.workloads import Workload
from hybrid.plan.cards import CARDS as SHEETS


@dataclass(frozen=True)
class Reached:
    """The rates that a card reaches."""

    flops_per_s: float  # bfloat16 products, dense
    bytes_per_s: float  # read and written
    attention: float = 0.62  # attention forward: the share of the products' rate
    attention_backward: float = 0.5


def _reached(
    sheet: str, of_memory: float, attention: float = 0.62, attention_backward: float = 0.5
) -> Reached:
    """A card of hybrid/plan/cards.py, with the assumed shares of its data sheet's rates."""
    card = SHEETS[sheet]
    return Reached(
        card.flops_per_s * card.products, card.bytes_per_s * of_memory, attention, attention_backward
    )


# the shares are assumed: of memory as copies commonly reach it, of attention after what the papers of
# FlashAttention-2 (Ampere, Ada) and -3 (Hopper) report
CARDS = {
    "rtx4090": _reached("RTX4090", 0.92, 0.85, 0.7),
    "a100": _reached("A100-80GB", 0.9, 0.62, 0.55),
    "h100": _reached("H100-80GB", 0.9),
    "h200": _reached("H200-141GB", 0.9),
}
WAYS = ("eager", "torch.compile", "ours")


@dataclass(frozen=True)
class Kernel:
    """One kernel launch: its operations and bytes."""

    name: str
    flops: float
    bytes: float
    kind: str = "product"  # "attention", "attention_backward", "pointwise"


def floors(kernels: list[Kernel], card: Reached) -> tuple[float, float]:
    """(ideal, serial) in seconds."""
    ideal = max(
        sum(k.flops for k in kernels) / card.flops_per_s, sum(k.bytes for k in kernels) / card.bytes_per_s
    )
    share = {"attention": card.attention, "attention_backward": card.attention_backward}
    serial = sum(
        max(k.flops / (card.flops_per_s * share.get(k.kind, 1.0)), k.bytes / card.bytes_per_s)
        for k in kernels
    )
    return ideal, serial


def _pointwise(name: str, moved: float) -> Kernel:
    return Kernel(name, 0.0, moved, "pointwise")


def layer_forward(n: Recursion, M: int, S: int, way: str, is_kept: bool) -> list[Kernel]:
    """One evaluation of a layer. is_kept: gate and up are written for backward as well (ours)."""
    D, F = n.D, n.F
    X, J = 2.0 * D * M, 2.0 * F * M
    visible = 0.5 if n.causal else 1.0
    attended = 4.0 * S * D * visible * M
    qkv = Kernel("qkv", 6.0 * D * D * M, 4 * X + 6 * D * D)
    o = Kernel("o", 2.0 * D * D * M, 2 * X + 2 * D * D)
    down = Kernel("down", 2.0 * D * F * M, J + X + 2 * D * F)
    if way == "ours":
        # v = rms(h2) + r; residuals in the products' epilogues; gate and up written where backward needs them
        return [
            _pointwise("norm_add", 3 * X),
            qkv,
            Kernel("rope_attention", attended, 4 * X, "attention"),
            Kernel("o + residual", o.flops, o.bytes + X),
            Kernel("gate_up + swiglu", 4.0 * D * F * M, X + J + (2 * J if is_kept else 0) + 4 * D * F),
            Kernel("down + residual", down.flops, down.bytes + X),
        ]
    is_eager = way == "eager"
    # the paper's norm: to float32, square, mean, scale, back, each a pass: 16X. RoPE of q and of k: 26X each
    norm = (
        [_pointwise("add", 3 * X), _pointwise("rms", 16 * X)]
        if is_eager
        else [_pointwise("add + rms", 3 * X)]
    )
    swiglu = (
        [_pointwise("silu", 2 * J), _pointwise("mul", 3 * J)] if is_eager else [_pointwise("swiglu", 3 * J)]
    )
    return [
        qkv,
        _pointwise("rope", 52 * X if is_eager else 4 * X),
        Kernel("attention", attended, 4 * X, "attention"),
        o,
        *norm,
        Kernel("gate_up", 4.0 * D * F * M, X + 2 * J + 4 * D * F),
        *swiglu,
        down,
        *norm,
    ]


def layer_backward(n: Recursion, M: int, S: int, way: str) -> list[Kernel]:
    """One evaluation of a layer: gradients of its input and of its four matrices."""
    D, F = n.D, n.F
    X, J = 2.0 * D * M, 2.0 * F * M
    attended = 2.5 * 4.0 * S * D * (0.5 if n.causal else 1.0) * M  # five products for forward's two
    is_eager, is_ours = way == "eager", way == "ours"
    dw = 4.0 * (4 * D * D + 3 * D * F)  # float32 sums of the matrices' gradients
    norm = _pointwise("norm backward", (22 if is_eager else 3) * X)
    swiglu = [] if is_ours else [_pointwise("swiglu backward", (13 if is_eager else 5) * J)]
    rope = [] if is_ours else [_pointwise("rope backward", (40 if is_eager else 4) * X)]
    return [
        norm,
        # ours: d(swiglu) in the epilogue, which reads gate and up and writes their gradients and a
        Kernel("down, input", 2.0 * D * F * M, X + (5 * J if is_ours else J)),
        Kernel("down, matrix", 2.0 * D * F * M, X + J),
        *swiglu,
        Kernel("gate_up, input", 4.0 * D * F * M, 2 * J + X),
        Kernel("gate_up, matrix", 4.0 * D * F * M, 2 * J + X),
        norm,
        Kernel("o, input", 2.0 * D * D * M, 2 * X),
        Kernel("o, matrix", 2.0 * D * D * M, 2 * X),
        Kernel("attention backward", attended, 10 * X, "attention_backward"),
        *rope,
        Kernel("qkv, input", 6.0 * D * D * M, 4 * X),
        Kernel("qkv, matrix", 6.0 * D * D * M, 4 * X),
        _pointwise("residuals", (3 if is_eager else 1) * X),
        _pointwise("sums of the matrices' gradients", 2 * dw),
    ]


def recursion(n: Recursion, M: int, S: int, way: str, with_backward: bool) -> list[Kernel]:
    """All cycles; the last one with gradients where there is a backward."""
    calls = n.num_recursion_steps + 1
    X = 2.0 * n.D * M
    start = [_pointwise("z + (y + x)", (6 if way == "eager" else 4) * X)] if way != "ours" else []

    def cycle(is_kept: bool) -> list[Kernel]:
        return calls * (start + n.num_layers * layer_forward(n, M, S, way, is_kept))

    kernels = (n.num_cycles - 1) * cycle(False) + cycle(with_backward)
    if with_backward:
        kernels += calls * (n.num_layers * layer_backward(n, M, S, way) + [_pointwise("dz + dy + dx", 3 * X)])
    return kernels


def blend(M: int, D: int, d: int, way: str, with_backward: bool) -> list[Kernel]:
    """h + y W_out^T, D the language model's width. Backward: two products; dh is dout itself."""
    product = 2.0 * D * d * M
    H, Y, W = 2.0 * D * M, 2.0 * d * M, 2.0 * D * d
    kernels = [Kernel("w_out + h", product, Y + 2 * H + W)]
    if way != "ours":
        kernels = [Kernel("w_out", product, Y + H + W), _pointwise("+ h", 3 * H)]
    if with_backward:
        kernels += [Kernel("dy", product, H + Y + W), Kernel("dw_out", product, H + Y + W)]
    return kernels


def project_in(M: int, D: int, d: int, way: str, with_backward: bool) -> list[Kernel]:
    """rms(h) W_in^T."""
    product = 2.0 * D * d * M
    H, Y, W = 2.0 * D * M, 2.0 * d * M, 2.0 * D * d
    kernels = [_pointwise("rms", (16 if way == "eager" else 2) * H), Kernel("w_in", product, H + Y + W)]
    if way == "ours":
        kernels = [Kernel("rms + w_in", product, H + Y + W)]
    if with_backward:
        kernels += [
            Kernel("dh", product, H + Y + W),
            Kernel("dw_in", product, H + Y + W),
            _pointwise("rms backward", (22 if way == "eager" else 4) * H),
        ]
    return kernels


def decode(n: Recursion, batch: int, context: int, way: str) -> list[Kernel]:
    """One token: every matrix is read at every evaluation, and the keys and values of all tokens."""
    M, W = batch, 2.0 * (4 * n.D * n.D + 3 * n.D * n.F)
    cache = 2.0 * 2 * n.D * context * batch
    # no launch is free here, so the products count as one: it is the bytes that take the time
    evaluation = [
        Kernel("products", W * M, W),
        Kernel("attention", 4.0 * context * n.D * M, cache, "attention"),
    ]
    return n.evaluations * evaluation


def kernels_of(workload: Workload, batch: int, way: str) -> list[Kernel]:
    """The kernels that `way` starts for a workload, as listed above."""
    M, S, n = batch * workload.tokens, workload.tokens, workload.numbers
    if n is None:  # W5
        return blend(M, workload.width, 2048, way, with_backward=True)
    if not workload.points:
        return recursion(n, M, S, way, with_backward=workload.has_backward)
    trained = workload.has_backward
    inner = recursion(n, M, S, way, True) if trained else decode(n, batch, 2048, way)
    around = project_in(M, workload.width, n.D, way, trained) + blend(M, workload.width, n.D, way, trained)
    return workload.points * (inner + around)


def floor_ms(workload: Workload, batch: int, way: str, card: Reached) -> tuple[float, float]:
    """(ideal, serial) in milliseconds."""
    ideal, serial = floors(kernels_of(workload, batch, way), card)
    return 1e3 * ideal, 1e3 * serial
