"""What an injection point adds to a recursion in one launch: work at its start, and another end

    angles      RoPE's cosines and sines of every token           as ops/attention/rope.py
    in          x = rms(h) W_in^T, its norm left to the reader  as ops/injection_in.py
    blend       h' = h + strength * gate * (rms(y) W_out^T)       as ops/injection_blend.py

The first two belong to the start: nothing in it waits for anything else in it. The third is the end, in place
of y and z. Rules and names as in phases.py; there h stands for the state of the recursion, so the language
model's h is called hidden here, [M, N].
"""

from trm_kernels.ops.attention.rope import cos_and_sin
from trm_kernels.ops.injection_blend import rows_by_weight_and_score
from trm_kernels.ops.injection_in import rows_by_weight_and_squares
from trm_kernels.recursion.one_launch.phases import STATE_X, STATE_Y, of_state, rstd_of
from trm_kernels.runtime.optional_triton import tl, triton


@triton.jit(noinline=True)
def angles_phase(
    positions_ptr,  # [P, T] whole numbers, P being B or 1
    frequencies_ptr,  # [J] float32
    cos_ptr,  # [P, T, J] float32, out
    sin_ptr,
    TOKENS,  # P T
    J: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    # one token
    offs_j = tl.arange(0, BLOCK_J)
    frequencies = tl.load(frequencies_ptr + offs_j, mask=offs_j < J, other=0.0)
    for token in range(tl.program_id(0), TOKENS, tl.num_programs(0)):
        cos, sin = cos_and_sin(tl.load(positions_ptr + token).to(tl.float32) * frequencies)
        offs = tl.cast(token, tl.int64) * J + offs_j
        tl.store(cos_ptr + offs, cos, mask=offs_j < J)
        tl.store(sin_ptr + offs, sin, mask=offs_j < J)


@triton.jit(noinline=True)
def in_phase(
    hidden_ptr,  # [M, N]
    w_ptr,  # [D, N]
    x_ptr,  # [M, D], out
    squares_ptr,  # [5, M, TILES] float32, out: of x, where it is to be normed
    M,
    eps,
    NORMS_X: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    TILES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # one tile of x
    tiles_m = tl.cdiv(M, BLOCK_M)
    for tile in range(tl.program_id(0), tiles_m * tl.cdiv(D, BLOCK_N), tl.num_programs(0)):
        offs_m = (tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        offs_n = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
        in_m, in_n = offs_m < M, offs_n < D
        x, squares = rows_by_weight_and_squares(
            hidden_ptr, w_ptr, offs_m, in_m, offs_n, in_n, N, N, N, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
        x *= tl.rsqrt(squares / N + eps)[:, None]
        mask = in_m[:, None] & in_n[None, :]
        x = x.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + offs_m[:, None] * D + offs_n[None, :], x, mask=mask)
        if NORMS_X:
            x = x.to(tl.float32)  # as rounded, like every state
            of_x = of_state(squares_ptr, STATE_X, M, TILES)
            tl.store(of_x + offs_m * TILES + tile // tiles_m, tl.sum(x * x, axis=1), mask=in_m)


@triton.jit(noinline=True)
def blend_phase(
    h_ptr,
    squares_ptr,
    hidden_ptr,  # [M, N]
    w_ptr,  # [N, D]
    gate_weight_ptr,  # [D], or None
    gate_bias_ptr,  # [1], or None
    blended_ptr,  # [M, N], out
    M,
    eps,
    strength,
    D: tl.constexpr,
    N: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # one tile of h'; y comes un-normalised, so its product and its score are scaled by its rstd
    tiles_m = tl.cdiv(M, BLOCK_M)
    for tile in range(tl.program_id(0), tiles_m * tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        offs_m = (tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        offs_n = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
        in_m, in_n = offs_m < M, offs_n < N
        u, score = rows_by_weight_and_score(
            of_state(h_ptr, STATE_Y, M, D),
            w_ptr,
            gate_weight_ptr,
            offs_m,
            in_m,
            offs_n,
            in_n,
            D,
            D,
            D,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        rstd = rstd_of(squares_ptr, STATE_Y, M, offs_m, in_m, eps, D, TILES, BLOCK_T)
        share = strength * rstd
        if gate_weight_ptr is not None:
            share *= tl.sigmoid(score * rstd + tl.load(gate_bias_ptr).to(tl.float32))
        offs, mask = offs_m[:, None] * N + offs_n[None, :], in_m[:, None] & in_n[None, :]
        hidden = tl.load(hidden_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        blended = hidden + u * share[:, None]
        tl.store(blended_ptr + offs, blended.to(blended_ptr.dtype.element_ty), mask=mask)
