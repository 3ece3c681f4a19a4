"""Products of few rows, the summed axis divided among the warps; and weights asked for ahead of their phase

A tile of 16 rows is too little work to divide its columns among warps: each would read the whole tiles of v
and w from shared memory, several times as much as device memory brings. So each warp gets a part of the
summed axis instead: [BLOCK_K] is [K_PARTS, BLOCK_K / K_PARTS], the product one of K_PARTS products, and their
sum is taken once, behind the loop and in one order. K_PARTS of 1 is the product of the ops beside this.

Between a phase and the next stands a barrier, in which device memory has nothing to do. What a program will
read first behind it is asked for before it, into the second-level cache; nothing waits for it.

Shapes and names as in phases.py.
"""

from trm_kernels.ops.linear_residual import rows_by_weight
from trm_kernels.ops.linear_swiglu import rows_by_two_weights
from trm_kernels.runtime.gemm_common import as_wide_as
from trm_kernels.runtime.optional_triton import tl, triton

LINE = tl.constexpr(128)  # bytes of a line of the cache
LINES = tl.constexpr(32)  # of each row that are asked for: 64 to 128 KB a program


@triton.jit
def parts_of_k(BLOCK_K: tl.constexpr, K_PARTS: tl.constexpr):
    """[K_PARTS, BLOCK_K / K_PARTS]: places along the summed axis, a row for each part."""
    EACH: tl.constexpr = BLOCK_K // K_PARTS
    return tl.arange(0, K_PARTS)[:, None] * EACH + tl.arange(0, EACH)[None, :]


@triton.jit
def weight_in_parts(w_ptr, offs_k, in_k, offs_n, in_n, stride_wn):
    """[K_PARTS, BLOCK_K / K_PARTS, BLOCK_N]: a tile of the transposed weight."""
    w_ptrs = w_ptr + offs_n[None, None, :] * stride_wn + offs_k[:, :, None]
    return tl.load(w_ptrs, mask=in_k[:, :, None] & in_n[None, None, :], other=0.0)


@triton.jit
def rows_in_parts(v_ptr, offs_m, in_m, offs_k, in_k, stride_vm):
    """[K_PARTS, BLOCK_M, BLOCK_K / K_PARTS]: a tile of rows."""
    v_ptrs = v_ptr + offs_m[None, :, None] * stride_vm + offs_k[:, None, :]
    return tl.load(v_ptrs, mask=in_m[None, :, None] & in_k[:, None, :], other=0.0)


@triton.jit
def product(
    v_ptr,  # [M, K]
    w_ptr,  # [N, K]
    offs_m,
    in_m,
    offs_n,
    in_n,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_PARTS: tl.constexpr,
):
    """A tile of v W^T, [BLOCK_M, BLOCK_N] float32."""
    if K_PARTS == 1:
        return rows_by_weight(
            v_ptr, w_ptr, offs_m, in_m, offs_n, in_n, K, K, K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
    else:  # Triton wants the branch
        h = tl.zeros((K_PARTS, BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            offs_k = k + parts_of_k(BLOCK_K, K_PARTS)
            in_k = offs_k < K
            v = rows_in_parts(v_ptr, offs_m, in_m, offs_k, in_k, K)
            w = weight_in_parts(w_ptr, offs_k, in_k, offs_n, in_n, K)
            h = tl.dot(v, as_wide_as(w, v), h, input_precision=PRECISION)
        return tl.sum(h, axis=0)


@triton.jit
def two_products(
    v_ptr,  # [M, K]
    w_ptr,  # [.., K]
    offs_m,
    in_m,
    offs_a,
    offs_b,
    in_n,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_PARTS: tl.constexpr,
):
    """Two tiles of v W^T: the same rows of v by rows a of w, and by rows b."""
    if K_PARTS == 1:
        return rows_by_two_weights(
            v_ptr, w_ptr, offs_m, in_m, offs_a, offs_b, in_n, K, K, K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
    else:
        a = tl.zeros((K_PARTS, BLOCK_M, BLOCK_N), tl.float32)
        b = tl.zeros((K_PARTS, BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            offs_k = k + parts_of_k(BLOCK_K, K_PARTS)
            in_k = offs_k < K
            v = rows_in_parts(v_ptr, offs_m, in_m, offs_k, in_k, K)
            wa = weight_in_parts(w_ptr, offs_k, in_k, offs_a, in_n, K)
            wb = weight_in_parts(w_ptr, offs_k, in_k, offs_b, in_n, K)
            a = tl.dot(v, as_wide_as(wa, v), a, input_precision=PRECISION)
            b = tl.dot(v, as_wide_as(wb, v), b, input_precision=PRECISION)
        return tl.sum(a, axis=0), tl.sum(b, axis=0)


@triton.jit
def _ask_for_rows(w_ptr, rows, in_rows, WIDTH: tl.constexpr):
    """The beginnings of some rows of a weight [.., WIDTH], towards the cache; rows outside ask for row 0."""
    of_line: tl.constexpr = LINE // (w_ptr.dtype.element_ty.primitive_bitwidth // 8)  # elements
    columns = tl.minimum(tl.arange(0, LINES) * of_line, WIDTH - 1)
    rows = tl.where(in_rows, rows, 0).to(tl.int64)
    addresses = (w_ptr + rows[:, None] * WIDTH + columns[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [addresses],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(noinline=True)
def ask_for_weights(
    kind,  # of the phase that is done; the weights are those of the next phase that has any
    qkv_proj_ptr,  # [(H + 2G) K, D]; of the layer that comes next
    o_proj_ptr,  # [D, H K]; of this layer, and those below
    gate_up_proj_ptr,  # [2F, D]
    down_proj_ptr,  # [D, F]
    M,
    D: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # what this program's first tile will read
    J: tl.constexpr = K // 2
    offs = tl.program_id(0) // tl.cdiv(M, BLOCK_M) * BLOCK_N + tl.arange(0, BLOCK_N)
    if kind == 0:
        _ask_for_rows(o_proj_ptr, offs, offs < D, H * K)
    elif kind == 2:
        _ask_for_rows(gate_up_proj_ptr, offs, offs < F, D)
        _ask_for_rows(gate_up_proj_ptr, F + offs, offs < F, D)
    elif kind == 3:
        _ask_for_rows(down_proj_ptr, offs, offs < D, F)
    elif kind == 4:
        column, in_p = offs // J * K + offs % J, offs < (H + 2 * G) * J
        _ask_for_rows(qkv_proj_ptr, column, in_p, D)
        _ask_for_rows(qkv_proj_ptr, column + J, in_p, D)
