"""Triton's interpreter, where it computes something else than a GPU would, and what mends it in tests.

Each trap is a small kernel with an answer known beforehand. `mend` runs it, and only where the answer is
wrong puts the mend in, so a Triton without the trap is left as it is. What was found stands in `FOUND`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@dataclass(frozen=True)
class Trap:
    name: str
    is_right: Callable[[], bool]
    mend: Callable[[], None]


# --- loop bounds known only at run time: numpy 2.4 and later refuse int() of an array that is not 0-d


@triton.jit
def _loop_kernel(out_ptr, K, BLOCK_K: tl.constexpr):
    n = 0
    for _ in range(0, K, BLOCK_K):
        n += 1
    tl.store(out_ptr, n)


def _loop_is_right() -> bool:
    out = torch.zeros(1, dtype=torch.int32)
    try:
        _loop_kernel[(1,)](out, 10, BLOCK_K=3)
    except Exception as error:  # the interpreter wraps what went wrong in an error of its own
        assert "scalar" in f"{error} {error.__cause__}", error
        return False
    return out.item() == 4


def _mend_loop() -> None:
    patch = interpreter._patch_lang_tensor

    def patch_and_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_index


# --- float32 to bfloat16: the low bits are cut off instead of rounded, and subnormals come out wrong


@triton.jit
def _round_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offs_n = tl.arange(0, N)
    tl.store(out_ptr + offs_n, tl.load(x_ptr + offs_n).to(tl.bfloat16))


def _rounding_is_right() -> bool:
    unit = 2.0**-7  # between 1 and 2 bfloat16 has steps of 2^-7: below, on and above the middle of a step
    x = torch.tensor(
        [1 + 0.4 * unit, 1 + 0.5 * unit, 1 + 1.5 * unit, 1 + 0.6 * unit, -1.999, 3.4e38, 1e-40, 0]
    )
    out = torch.zeros(8, dtype=torch.bfloat16)
    _round_kernel[(1,)](x, out, N=8)
    return torch.equal(out, x.bfloat16())


def _to_bfloat16(data: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16, ties to even."""
    rounded = torch.from_numpy(np.array(data, dtype=np.float32)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16)


def _to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _mend_rounding() -> None:
    convert = interpreter._convert_float

    def convert_float(data, source, target, mode):
        if source == tl.float32 and target == tl.bfloat16 and mode != ir.ROUNDING_MODE.RTZ:
            return _to_bfloat16(data).reshape(data.shape)
        return convert(data, source, target, mode)

    interpreter._convert_float = convert_float


# --- arithmetic on bfloat16: done on the bit patterns, which the interpreter keeps as uint16


@triton.jit
def _arithmetic_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offs_n = tl.arange(0, N)
    x = tl.load(x_ptr + offs_n)
    tl.store(out_ptr + offs_n, tl.where(x > 0, x * x + x, -x))


def _arithmetic_is_right() -> bool:
    x = torch.tensor([-3.0, -0.5, 0.0, 0.25, 1.0, 2.0, 5.0, 8.0])  # every result fits bfloat16
    out = torch.zeros(8)
    _arithmetic_kernel[(1,)](x.bfloat16(), out, N=8)
    return torch.equal(out, torch.where(x > 0, x * x + x, -x))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + offs, tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs)))


def _dot_is_right() -> bool:
    a, b = (
        torch.randint(-4, 5, (16, 16), generator=torch.Generator().manual_seed(s)).float() for s in (0, 1)
    )
    out = torch.zeros(16, 16)
    _dot_kernel[(1,)](a.bfloat16(), b.bfloat16(), out, N=16)
    return torch.equal(out, a @ b)


def _widens(compute: Callable) -> Callable:
    """`compute` on float32 copies of its bfloat16 operands, rounded back where all operands were bfloat16."""

    def compute_wide(self, *args):
        handles = [a for a in args if isinstance(a, TensorHandle)]
        narrow = [h for h in handles if h.dtype.scalar == tl.bfloat16]
        if not narrow:
            return compute(self, *args)
        wide = [
            TensorHandle(_to_float32(a.data), tl.float32) if any(a is h for h in narrow) else a for a in args
        ]
        out = compute(self, *wide)
        stays = out.data.dtype == bool or any(h.dtype.scalar in (tl.float32, tl.float64) for h in handles)
        return out if stays else TensorHandle(_to_bfloat16(out.data), tl.bfloat16)

    return compute_wide


def _mend_arithmetic() -> None:
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_rsqrt", "create_erf"):
        setattr(InterpreterBuilder, name, _widens(getattr(InterpreterBuilder, name)))


def _mend_dot() -> None:
    InterpreterBuilder.create_dot = _widens(InterpreterBuilder.create_dot)


# --- whole numbers to bfloat16: they become the bit patterns


@triton.jit
def _whole_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offs_n = tl.arange(0, N)
    tl.store(out_ptr + offs_n, tl.load(x_ptr + offs_n).to(tl.bfloat16))


def _whole_numbers_are_right() -> bool:
    x = torch.tensor([-127, -1, 0, 1, 2, 3, 100, 127], dtype=torch.int8)
    out = torch.zeros(8, dtype=torch.bfloat16)
    _whole_kernel[(1,)](x, out, N=8)
    return torch.equal(out, x.bfloat16())


def _mend_whole_numbers() -> None:
    def widens(convert: Callable) -> Callable:
        def convert_wide(self, source, kind):
            if kind.scalar != tl.bfloat16:
                return convert(self, source, kind)
            return TensorHandle(_to_bfloat16(source.data), tl.bfloat16)

        return convert_wide

    for name in ("create_si_to_fp", "create_ui_to_fp"):
        setattr(InterpreterBuilder, name, widens(getattr(InterpreterBuilder, name)))


# --- sums of bfloat16: as arithmetic, the bit patterns are added up


@triton.jit
def _sum_kernel(x_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, N)), axis=0))


def _sum_is_right() -> bool:
    x = torch.arange(-3.0, 13.0)
    out = torch.zeros(1)
    _sum_kernel[(1,)](x.bfloat16(), out, N=16)
    return out.item() == x.sum().item()


def _mend_sum() -> None:
    def as_type(t, dtype, convert):
        kind = tl.block_type(dtype, list(t.shape)) if t.type.is_block() else dtype
        return tl.core.tensor(TensorHandle(convert(t.handle.data), dtype), kind)

    def widens(apply):
        def apply_wide(self, tensors):
            narrow = [t.dtype == tl.bfloat16 for t in tensors]
            if not any(narrow):
                return apply(self, tensors)
            wide = [
                as_type(t, tl.float32, _to_float32) if n else t for t, n in zip(tensors, narrow, strict=True)
            ]
            outs = apply(self, tuple(wide))
            outs = list(outs) if isinstance(outs, (list, tuple)) else [outs]
            return [as_type(t, tl.bfloat16, _to_bfloat16) if t.dtype == tl.float32 else t for t in outs]

        return apply_wide

    for kind in (interpreter.ReduceOps, interpreter.ScanOps):
        kind.apply_impl = widens(kind.apply_impl)


TRAPS = (
    Trap("loop bounds", _loop_is_right, _mend_loop),
    Trap("rounding to bfloat16", _rounding_is_right, _mend_rounding),
    Trap("bfloat16 arithmetic", _arithmetic_is_right, _mend_arithmetic),
    Trap("bfloat16 dot", _dot_is_right, _mend_dot),
    Trap("whole numbers to bfloat16", _whole_numbers_are_right, _mend_whole_numbers),
    Trap("bfloat16 sum", _sum_is_right, _mend_sum),
)
FOUND: list[str] = []  # the traps this Triton has


def mend() -> None:
    """Find the traps and mend them, once a process."""
    for trap in TRAPS:
        if not trap.is_right():
            FOUND.append(trap.name)
            trap.mend()
