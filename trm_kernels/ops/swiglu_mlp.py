"""swiglu_mlp: o = (silu(g) * u) Wd^T,  g = s v Wg^T,  u = s v Wu^T,  with [Wg | Wu] stacked in one weight

The activation runs in the epilogue of the first product; its gradient in the epilogue of the product
do Wd that carries do back through the second. The activation [M, F] is not kept for backward.

Shapes   v [..., D]; gate_up [2F, D], the gate's F rows first; down [D', F]; row_scale s [...]; o [..., D'].
Dtypes   v and the weights of one dtype, float32, float16 or bfloat16, o has it too; row_scale float32;
         products summed in float32. float64 stays float64 throughout, in the reference only.
Errors   ValueError when shapes, dtypes or devices disagree; RuntimeError for a candidate that cannot run.
Source   "GLU Variants Improve Transformer", Shazeer, 2020, eq. 6; row order as in TRM, arXiv 2510.04871.

Rows whose elements do not lie side by side are copied first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trm_kernels.ops.linear_swiglu import (
    linear_swiglu_bwd,
    linear_swiglu_fwd,
    linear_swiglu_ref,
    swiglu_gradient,
)
from trm_kernels.runtime import tuning
from trm_kernels.runtime.autocast import as_autocast
from trm_kernels.runtime.gemm_common import (
    are_aligned,
    check_devices,
    check_dtypes,
    check_row_scale,
    grid,
    input_precision,
    parts_of_columns,
    rows_of,
    runs_candidate,
    tile_of_program,
    wants_gradient,
    weight_gradient,
)
from trm_kernels.runtime.launch import arch_of, launch, launcher
from trm_kernels.runtime.optional_triton import tl, triton


def swiglu_mlp_ref(v: Tensor, gate_up: Tensor, down: Tensor, row_scale: Tensor | None = None) -> Tensor:
    """The meaning of the op, in eager PyTorch."""
    return F.linear(linear_swiglu_ref(v, gate_up, row_scale), down)


@triton.jit
def _swiglu_gradient_of_columns(
    da,
    gu_ptr,
    row_scale_ptr,
    dgu_ptr,
    a_ptr,
    drow_scale_ptr,
    offs_m,
    offs_n,
    part,
    M,
    N,
    stride_gum,
    stride_dgum,
    stride_am,
    stride_drow_scalem,
):
    """Some columns of dgu and a and, where it is wanted, their part of the row scale's gradient, written."""
    in_m = offs_m < M
    mask = in_m[:, None] & (offs_n < N)[None, :]
    gu_ptrs = gu_ptr + offs_m[:, None] * stride_gum + offs_n[None, :]
    g = tl.load(gu_ptrs, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(gu_ptrs + N, mask=mask, other=0.0).to(tl.float32)
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + offs_m, mask=in_m, other=0.0)[:, None]
        a, dg, du = swiglu_gradient(da, g * row_scale, u * row_scale)
        if drow_scale_ptr is not None:
            drow_scale = tl.sum(dg * g + du * u, axis=1)
            tl.store(drow_scale_ptr + offs_m * stride_drow_scalem + part, drow_scale, mask=in_m)
        dg *= row_scale
        du *= row_scale
    else:
        a, dg, du = swiglu_gradient(da, g, u)

    dgu_ptrs = dgu_ptr + offs_m[:, None] * stride_dgum + offs_n[None, :]
    tl.store(dgu_ptrs, dg.to(dgu_ptr.dtype.element_ty), mask=mask)
    tl.store(dgu_ptrs + N, du.to(dgu_ptr.dtype.element_ty), mask=mask)
    tl.store(a_ptr + offs_m[:, None] * stride_am + offs_n[None, :], a.to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_mlp_bwd_kernel(
    do_ptr,  # [M, K]
    down_ptr,  # [K, N]
    gu_ptr,  # [M, 2N]: the products v Wg^T | v Wu^T, without the row scale
    row_scale_ptr,  # [M] float32, or None
    dgu_ptr,  # [M, 2N], out: the gradient of the products, row scale included
    a_ptr,  # [M, N], out: the activation once more, for the gradient of down
    drow_scale_ptr,  # [M, tiles of N, or their parts] float32, out, or None: its gradient, to be summed
    M,
    N,
    K,
    stride_dom,
    stride_downk,
    stride_gum,
    stride_dgum,
    stride_am,
    stride_drow_scalem,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,  # of the tile's columns in what follows the product: fewer registers at a time
):
    # one program: a tile of da = do Wd, which never leaves it
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    in_m, in_n = offs_m < M, offs_n < N

    do_ptrs = do_ptr + offs_m[:, None] * stride_dom + offs_k[None, :]
    down_ptrs = down_ptr + offs_k[:, None].to(tl.int64) * stride_downk + offs_n[None, :]
    da = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        in_k = offs_k < K - k
        do = tl.load(do_ptrs, mask=in_m[:, None] & in_k[None, :], other=0.0)
        down = tl.load(down_ptrs, mask=in_k[:, None] & in_n[None, :], other=0.0)
        da = tl.dot(do, down, da, input_precision=PRECISION)
        do_ptrs += BLOCK_K
        down_ptrs += BLOCK_K * stride_downk

    if PARTS == 1:
        _swiglu_gradient_of_columns(
            da,
            gu_ptr,
            row_scale_ptr,
            dgu_ptr,
            a_ptr,
            drow_scale_ptr,
            offs_m,
            offs_n,
            tile_n,
            M,
            N,
            stride_gum,
            stride_dgum,
            stride_am,
            stride_drow_scalem,
        )
    else:
        tiles = parts_of_columns(da, PARTS)
        first = (tile_n * BLOCK_N).to(tl.int32)  # of columns: narrow numbers take fewer registers
        offs_p = tl.arange(0, BLOCK_N // PARTS)
        for part in tl.static_range(PARTS):
            _swiglu_gradient_of_columns(
                tiles[part],
                gu_ptr,
                row_scale_ptr,
                dgu_ptr,
                a_ptr,
                drow_scale_ptr,
                offs_m,
                first + part * (BLOCK_N // PARTS) + offs_p,
                tile_n * PARTS + part,
                M,
                N,
                stride_gum,
                stride_dgum,
                stride_am,
                stride_drow_scalem,
            )


@launcher
def swiglu_mlp_bwd(
    do: Tensor,
    down: Tensor,
    gu: Tensor,
    row_scale: Tensor | None,
    candidate: str | None,
    wants_row_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(the gradient of the products [M, 2F], the activation [M, F], that of row_scale or an empty tensor)"""
    wants_row_scale = wants_row_scale and row_scale is not None
    M, K = do.shape
    N = down.shape[1]
    arch = arch_of(do)
    is_aligned = are_aligned(do, down)
    if tuning.choose("swiglu_mlp", arch, do.element_size(), K, is_aligned, candidate) == "mm":
        return linear_swiglu_bwd(torch.mm(do, down), gu, row_scale, True, wants_row_scale)
    gemm = tuning.gemm("swiglu_mlp", arch, do.element_size(), is_aligned, M, wants_row_scale)
    dgu = torch.empty_like(gu)
    a = do.new_empty(M, N)
    tiles = triton.cdiv(N, gemm.BLOCK_N) * gemm.parts
    parts = do.new_empty(M, tiles, dtype=torch.float32) if wants_row_scale else None
    launch(
        _swiglu_mlp_bwd_kernel,
        grid(M, N, gemm),
        do,
        down,
        gu,
        row_scale,
        dgu,
        a,
        parts,
        M,
        N,
        K,
        do.stride(0),
        down.stride(0),
        gu.stride(0),
        dgu.stride(0),
        a.stride(0),
        tiles,
        PRECISION=input_precision(),
        PARTS=gemm.parts,
        **gemm.meta,
    )
    drow_scale = do.new_empty(0, dtype=torch.float32) if parts is None else parts.sum(1)
    return dgu, a, drow_scale


class _SwiGLUMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, gate_up, down, row_scale, save_gu, candidate):
        a, gu = linear_swiglu_fwd(v, gate_up, row_scale, save_gu, candidate)
        ctx.save_for_backward(v, gate_up, down, row_scale, gu if save_gu else None)
        ctx.candidate = candidate
        return torch.mm(a, down.t())

    @staticmethod
    def backward(ctx, do):
        v, gate_up, down, row_scale, gu = ctx.saved_tensors
        if gu is None:
            gu = torch.mm(v, gate_up.t())
        do = rows_of(do)
        needs_v, needs_gate_up, needs_down, needs_scale, *_ = ctx.needs_input_grad
        dgu, a, drow_scale = swiglu_mlp_bwd(do, down, gu, row_scale, ctx.candidate, needs_scale)
        dv = torch.mm(dgu, gate_up) if needs_v else None
        dgate_up = weight_gradient(dgu, v) if needs_gate_up else None
        ddown = weight_gradient(do, a) if needs_down else None
        return dv, dgate_up, ddown, drow_scale if needs_scale else None, None, None


def swiglu_mlp(
    v: Tensor,
    gate_up: Tensor,
    down: Tensor,
    row_scale: Tensor | None = None,
    *,
    recompute: bool = False,
    candidate: str | None = None,
) -> Tensor:
    """(silu(s v Wg^T) * (s v Wu^T)) Wd^T; differentiable.

    Args:
        v: [..., D], float32, float16 or bfloat16 (float64 by the reference).
        gate_up: [2F, D], the gate's F rows first, in v's dtype.
        down: [D', F], in v's dtype.
        row_scale: s, [...] float32, or None for 1.
        recompute: Keep only v for backward, and compute the products [M, 2F] there once more.
        candidate: "fused" for the activation and its gradient inside the products; "mm" for torch.mm and one
            kernel each; None for what the settings table says.

    Returns:
        o, [..., D'], in v's dtype.

    Raises:
        ValueError: When shapes, dtypes or devices disagree.
        RuntimeError: For a candidate that cannot run.
    """
    F2, D = gate_up.shape if gate_up.ndim == 2 else (1, 0)
    if F2 % 2 or v.ndim == 0 or v.shape[-1] != D or down.ndim != 2 or down.shape[1] != F2 // 2:
        got = ", ".join(str(tuple(t.shape)) for t in (v, gate_up, down))
        raise ValueError(f"swiglu_mlp: expected v [..., D], gate_up [2F, D] and down [D', F], got {got}.")
    v, gate_up, down = as_autocast(v, gate_up, down)
    check_dtypes("swiglu_mlp", v=v, gate_up=gate_up, down=down)
    check_devices("swiglu_mlp", v=v, gate_up=gate_up, down=down)
    check_row_scale("swiglu_mlp", row_scale, v)
    if not runs_candidate("swiglu_mlp", candidate, v, gate_up, down):
        return swiglu_mlp_ref(v, gate_up, down, row_scale)
    save_gu = not recompute and wants_gradient(v, gate_up, down, row_scale)
    scale = None if row_scale is None else row_scale.reshape(-1)
    o = _SwiGLUMLP.apply(rows_of(v), rows_of(gate_up), rows_of(down), scale, save_gu, candidate)
    return o.view(*v.shape[:-1], down.shape[0])
