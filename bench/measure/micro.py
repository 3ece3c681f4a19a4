"""Microbenchmarks that decide designs: one small question each, answered on the device.

launches     the cost of starting a kernel: from PyTorch, from Triton, as a node of a CUDA graph
barrier      the cost of a barrier across the grid of one cooperative launch, by the size of the grid: alone,
             and behind stores that it has to make visible. It decides whether a whole recursion should be
             one launch
products     our products with epilogues against torch.mm with one kernel beside it, and torch.mm alone
attention    our attention against SDPA's backends at 97, 916 and 2048 tokens
accumulate   a weight's gradient summed in float32 by addmm(out_dtype=float32), against bfloat16
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.measure.store import Store
from bench.measure.timing import Run, Timer, captured, spread
from trm_kernels.ops.attention.rope_attention import rope_attention
from trm_kernels.ops.linear_residual import linear_residual
from trm_kernels.ops.linear_swiglu import linear_swiglu
from trm_kernels.runtime.backend import backend
from trm_kernels.runtime.launch import launch
from trm_kernels.runtime.optional_triton import tl, triton

Row = dict[str, Any]

_LAUNCHES = 200  # in one timed run
_BARRIERS = 500
_STORED = 2048  # float32 numbers that each program stores before a barrier: a tile of 32 x 64


@triton.jit
def _nothing_kernel(x_ptr):  # type: ignore[no-untyped-def]  # Triton, not Python
    # one program: reads and writes one number
    tl.store(x_ptr, tl.load(x_ptr))


@triton.jit
def _barriers_kernel(counter_ptr, out_ptr, rounds, stores, STORED: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton, not Python
    # every program arrives, and waits until all have; the counter is zero before the launch and only grows
    programs = tl.num_programs(0)
    offs = tl.program_id(0) * STORED + tl.arange(0, STORED)
    for i in range(rounds):
        tl.store(out_ptr + offs, i, mask=offs < stores)
        seen = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") + 1
        while seen < (i + 1) * programs:
            seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")


class Bench:
    """A device, its timer, and whether the sizes are real or those of a dry run."""

    def __init__(self, device: str, is_tiny: bool) -> None:
        self.device, self.is_tiny = device, is_tiny
        self.timer = Timer(device)
        self.generator = torch.Generator(device=device).manual_seed(0)

    def random(self, *shape: int, size: float = 1.0) -> Tensor:
        t = torch.randn(shape, generator=self.generator, device=self.device) * size
        return t.bfloat16()

    def rows(self, what: str, runs: Mapping[str, Run]) -> list[Row]:
        """The interleaved times of each way. A way that raises is listed with its error."""
        rows: list[Row] = []
        able = {}
        for name, run in runs.items():
            try:
                run()
                self.timer.wait()
                able[name] = run
            except Exception as error:
                rows.append({"what": what, "way": name, "why": f"{type(error).__name__}: {error}"[:200]})
        if able:
            most = 3 if self.is_tiny else 50
            for name, times in self.timer.interleaved(able, 0.05 if self.is_tiny else 0.5, most).items():
                rows.append({"what": what, "way": name, **spread(times)})
        return rows


def launches(bench: Bench) -> list[Row]:
    """Milliseconds of 200 consecutive launches."""
    x = bench.random(16)

    def from_pytorch() -> None:
        for _ in range(_LAUNCHES):
            x.neg_()

    def from_triton() -> None:
        for _ in range(_LAUNCHES):
            launch(_nothing_kernel, (1,), x)

    runs: dict[str, Run] = {"PyTorch": from_pytorch, "Triton": from_triton}
    for name, run in list(runs.items()):
        try:
            runs[f"{name}, CUDA graph"] = captured(run)
        except Exception as error:
            runs[f"{name}, CUDA graph"] = partial(_raise, error)
    return bench.rows(f"{_LAUNCHES} launches", runs)


def _raise(error: Exception) -> None:
    raise error


def barrier(bench: Bench) -> list[Row]:
    """Milliseconds of one launch without and with 500 barriers, by the number of programs."""
    counter = torch.zeros(1, dtype=torch.int32, device=bench.device)
    behind = f"{_BARRIERS} barriers, each behind {4 * _STORED >> 10} KB of stores a program"
    full = torch.cuda.get_device_properties(0).multi_processor_count if bench.device == "cuda" else 1
    rows = []
    for programs in sorted({1, 16, 64, full}) if bench.device == "cuda" else (1,):
        out = torch.zeros(programs * _STORED, device=bench.device)

        def run(rounds: int, stores: int = 0, programs: int = programs, out: Tensor = out) -> None:
            counter.zero_()
            options = {"STORED": _STORED, "num_warps": 8, "launch_cooperative_grid": True}
            launch(_barriers_kernel, (programs,), counter, out, rounds, stores, **options)

        runs = {"none": partial(run, 0), f"{_BARRIERS} barriers": partial(run, _BARRIERS)}
        runs[behind] = partial(run, _BARRIERS, programs * _STORED)
        rows += bench.rows(f"{programs} programs", runs)
        if "why" not in rows[-1] and int(counter) not in (0, programs * _BARRIERS):
            rows.append({"what": f"{programs} programs", "way": "counter", "why": f"ended at {int(counter)}"})
    return rows


def products(bench: Bench) -> list[Row]:
    """Forward, at W1's and W3's shapes: rows, summed axis, columns."""
    rows = []
    sizes = {"W1": (768 * 97, 512, 1536), "W3": (8192, 2048, 5632)}
    for name, (M, D, F) in {"tiny": (16, 16, 16)}.items() if bench.is_tiny else sizes.items():
        v, w = bench.random(M, D), bench.random(2 * F, D, size=D**-0.5)
        runs: dict[str, Run] = {
            f"candidate {candidate}": partial(_in_triton, linear_swiglu, v, w, candidate=candidate)
            for candidate in ("fused", "mm")
        }
        rows += bench.rows(
            f"{name} gate-up + SwiGLU", {**runs, "torch.mm alone": partial(torch.mm, v, w.t())}
        )
        for what, K in (("o + residual", D), ("down + residual", F)):
            a, w, r = bench.random(M, K), bench.random(D, K, size=K**-0.5), bench.random(M, D)
            runs = {
                f"candidate {candidate}": partial(_in_triton, linear_residual, a, w, r, candidate=candidate)
                for candidate in ("fused", "mm")
            }
            rows += bench.rows(f"{name} {what}", {**runs, "torch.mm alone": partial(torch.mm, a, w.t())})
    return rows


def _in_triton(op: Callable[..., Any], *tensors: Tensor, **options: Any) -> Any:
    with backend("triton"), torch.no_grad():
        return op(*tensors, **options)


def attention(bench: Bench) -> list[Row]:
    """With RoPE, from the fused projection; forward, and forward with backward."""
    rows = []
    ways = ("triton", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "flash_attn")
    sizes = {
        "S 97": (768, 97, 8, 64, False),
        "S 916": (96, 916, 8, 64, False),
        "S 2048": (4, 2048, 16, 128, True),
    }
    for name, (B, S, H, K, causal) in (
        {"tiny": (1, 4, 2, 8, True)}.items() if bench.is_tiny else sizes.items()
    ):
        qkv = bench.random(B, S, 3 * H * K).requires_grad_()
        do = bench.random(B, S, H * K)
        attend = partial(rope_attention, qkv, None, H, causal=causal)
        for what, run in (("forward", _forward), ("forward, backward", partial(_both, qkv, do))):
            of = {way: partial(run, partial(attend, implementation=way)) for way in ways}
            rows += bench.rows(f"{name} {what}", of)
    return rows


def _forward(attend: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        attend()


def _both(qkv: Tensor, do: Tensor, attend: Callable[[], Tensor]) -> None:
    torch.autograd.grad(attend(), qkv, do)


def accumulate(bench: Bench) -> list[Row]:
    """dW of W1's gate and up projections: dy^T x added to an existing sum."""
    M, N, K = (16, 16, 16) if bench.is_tiny else (768 * 97, 3072, 512)
    dy, x = bench.random(M, N), bench.random(M, K)
    wide, narrow = (torch.zeros(N, K, dtype=d, device=bench.device) for d in (torch.float32, torch.bfloat16))
    runs: dict[str, Run] = {
        "float32, addmm(out_dtype=)": lambda: torch.addmm(wide, dy.t(), x, out_dtype=torch.float32, out=wide),
        "float32, mm and add": lambda: wide.add_(torch.mm(dy.t(), x)),
        "bfloat16, addmm": lambda: narrow.addmm_(dy.t(), x),
    }
    return bench.rows(f"dW {N} x {K} over {M} rows", runs)


QUESTIONS: dict[str, Callable[[Bench], list[Row]]] = {
    "launches": launches,
    "products": products,
    "attention": attention,
    "accumulate": accumulate,
    "barrier": barrier,  # last: the only one that could hang
}


def run(store: Store, device: str, is_tiny: bool) -> None:
    """Answer every question that `store` has no answer to."""
    for name, question in QUESTIONS.items():
        if store.is_done(name):
            continue
        store.start(name)
        try:
            store.finish(name, state="ok", rows=question(Bench(device, is_tiny)))
        except Exception as error:
            store.finish(name, state="failed", why=f"{type(error).__name__}: {error}"[:300])
