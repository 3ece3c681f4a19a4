"""The phases of a recursion in one launch: what stands between two grid barriers, a device function each

    start       z and y as they came, into the state
    project     q, k, v = rotate(s (v Wqkv^T)): q into a buffer, k and v into the cache, where they stay
    attention   o = softmax(q k^T / sqrt(K)) v, over all keys so far
    mix         h = v + o Wo^T                                  as ops/linear_residual.py
    gate_up     a = silu(s (h Wg^T)) * (s (h Wu^T))             as ops/linear_swiglu.py
    down        h2 = rms(h) + a Wd^T                            as ops/linear_residual.py
    end         y and z: the norm of the state

As in the ops beside it rows stay un-normalised, and with them go the sums of squares of their tiles: s is
the rstd that follows from these. The first layer of an f starts from a sum, z + y (+ x), which is formed
where it is read. A weight in 8 bits is widened as it is read, and the product scaled by one number an output
channel.

The programs of the grid share out the tiles of a phase: program i takes tiles i, i + programs, ... What a
tile computes does not depend on how many programs there are.

`noinline`: each phase is compiled by itself. Inlined into one kernel they take all registers and spill.

Rows are [M, D] with M = B T. The states lie in one tensor h [4, M, D], squares [4, M, TILES] likewise.
"""

from trm_kernels.ops.attention.decode_attention import merge_parts, softmax_step
from trm_kernels.ops.attention.rope import rotate
from trm_kernels.ops.linear_swiglu import rstd_of_tiles
from trm_kernels.recursion.one_launch.products import parts_of_k, product, two_products, weight_in_parts
from trm_kernels.runtime.gemm_common import as_wide_as
from trm_kernels.runtime.optional_triton import tl, triton

# which of the states: z and y; h of a layer, after its attention; h2 of a layer that is not the last of its f
STATE_Z, STATE_Y, STATE_MIXED, STATE_PASSING = (tl.constexpr(i) for i in range(4))
STATES = 4
STATE_X = tl.constexpr(4)  # no state, but its sums of squares lie among theirs, where it is normed


@triton.jit
def of_state(ptr, state, M, WIDTH: tl.constexpr):
    """Where a state's [M, WIDTH] begins, in int64: all of them together may pass 2^31 elements."""
    return ptr + tl.cast(M, tl.int64) * WIDTH * state


@triton.jit
def rstd_of(
    squares_ptr, state, M, offs_m, in_m, eps, D: tl.constexpr, TILES: tl.constexpr, BLOCK_T: tl.constexpr
):
    return rstd_of_tiles(of_state(squares_ptr, state, M, TILES), TILES, offs_m, in_m, D, eps, TILES, BLOCK_T)


@triton.jit
def _rstds_at_start(
    squares_ptr,
    M,
    offs_m,
    in_m,
    eps,
    NORMS_X: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """By what rows of z, y and x are multiplied in _sum_at_start; of an x that is not normed, 1."""
    rstd_z = rstd_of(squares_ptr, STATE_Z, M, offs_m, in_m, eps, D, TILES, BLOCK_T)
    rstd_y = rstd_of(squares_ptr, STATE_Y, M, offs_m, in_m, eps, D, TILES, BLOCK_T)
    rstd_x = tl.full(rstd_z.shape, 1.0, tl.float32)
    if NORMS_X:
        rstd_x = rstd_of(squares_ptr, STATE_X, M, offs_m, in_m, eps, D, TILES, BLOCK_T)
    return rstd_z, rstd_y, rstd_x


@triton.jit
def _sum_at_start(h_ptr, x_ptr, offs, mask, M, rstd_z, rstd_y, rstd_x, adds_x, D: tl.constexpr):
    """A tile of what an f starts from: rms(z) + rms(y), and x where z is to be updated; float32.

    The rstds in the shape of the tile, 1 along D.
    """
    z = tl.load(of_state(h_ptr, STATE_Z, M, D) + offs, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(of_state(h_ptr, STATE_Y, M, D) + offs, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offs, mask=mask & adds_x, other=0.0).to(tl.float32)
    return z * rstd_z + y * rstd_y + x * rstd_x


@triton.jit
def _start_by_two_weights(
    h_ptr,
    squares_ptr,
    x_ptr,
    w_ptr,  # [.., D]
    offs_m,
    in_m,
    offs_a,
    offs_b,
    in_n,
    M,
    eps,
    adds_x,
    NORMS_X: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_PARTS: tl.constexpr,
):
    """two_products of what an f starts from, which is formed as it is read."""
    rstd_z, rstd_y, rstd_x = _rstds_at_start(squares_ptr, M, offs_m, in_m, eps, NORMS_X, D, TILES, BLOCK_T)
    if K_PARTS == 1:
        rstd_z, rstd_y, rstd_x = rstd_z[:, None], rstd_y[:, None], rstd_x[:, None]
        a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        b = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            in_k = offs_k < D
            offs, mask = offs_m[:, None] * D + offs_k[None, :], in_m[:, None] & in_k[None, :]
            v = _sum_at_start(h_ptr, x_ptr, offs, mask, M, rstd_z, rstd_y, rstd_x, adds_x, D)
            v = v.to(x_ptr.dtype.element_ty)
            in_w = in_k[:, None] & in_n[None, :]
            wa = tl.load(w_ptr + offs_a[None, :] * D + offs_k[:, None], mask=in_w, other=0.0)
            wb = tl.load(w_ptr + offs_b[None, :] * D + offs_k[:, None], mask=in_w, other=0.0)
            a = tl.dot(v, as_wide_as(wa, v), a, input_precision=PRECISION)
            b = tl.dot(v, as_wide_as(wb, v), b, input_precision=PRECISION)
        return a, b
    else:  # Triton wants the branch
        rstd_z, rstd_y, rstd_x = rstd_z[None, :, None], rstd_y[None, :, None], rstd_x[None, :, None]
        a = tl.zeros((K_PARTS, BLOCK_M, BLOCK_N), tl.float32)
        b = tl.zeros((K_PARTS, BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            offs_k = k + parts_of_k(BLOCK_K, K_PARTS)
            in_k = offs_k < D
            offs = offs_m[None, :, None] * D + offs_k[:, None, :]
            mask = in_m[None, :, None] & in_k[:, None, :]
            v = _sum_at_start(h_ptr, x_ptr, offs, mask, M, rstd_z, rstd_y, rstd_x, adds_x, D)
            v = v.to(x_ptr.dtype.element_ty)
            wa = weight_in_parts(w_ptr, offs_k, in_k, offs_a, in_n, D)
            wb = weight_in_parts(w_ptr, offs_k, in_k, offs_b, in_n, D)
            a = tl.dot(v, as_wide_as(wa, v), a, input_precision=PRECISION)
            b = tl.dot(v, as_wide_as(wb, v), b, input_precision=PRECISION)
        return tl.sum(a, axis=0), tl.sum(b, axis=0)


@triton.jit
def _channel_scale(scale_ptr, offs_n, in_n):
    """[1, BLOCK_N]: by what a product with a weight in 8 bits is multiplied; 1 for any other weight."""
    scale = tl.full((1, 1), 1.0, tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + offs_n, mask=in_n, other=0.0)[None, :]
    return scale


@triton.jit
def _store_state(
    h,
    h_ptr,
    squares_ptr,
    state,
    M,
    tile_n,
    offs,
    offs_m,
    in_m,
    mask,
    D: tl.constexpr,
    TILES: tl.constexpr,
):
    """A tile of un-normalised rows, and of each row the sum of squares within the tile."""
    h = h.to(h_ptr.dtype.element_ty)
    tl.store(of_state(h_ptr, state, M, D) + offs, h, mask=mask)
    h = h.to(tl.float32)  # as rounded: the norm is that of the rows that are stored
    squares_ptr = of_state(squares_ptr, state, M, TILES)
    tl.store(squares_ptr + offs_m * TILES + tile_n, tl.sum(h * h, axis=1), mask=in_m)


@triton.jit(noinline=True)
def start_phase(
    z_ptr,  # [M, D]
    y_ptr,  # [M, D]
    h_ptr,  # [4, M, D], out: z and y
    squares_ptr,  # [5, M, TILES] float32, out: of an rstd of 1, for z and y are normed as they come
    count_ptr,  # [COUNTS] int32, out: zeros
    M,
    COUNTS,
    stride_zm,
    stride_ym,
    eps,
    D: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    offs_d, offs_t = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
    for row in range(program, 2 * M, programs):
        state, m = row // M, (row % M).to(tl.int64)  # z, then y
        if state == STATE_Z:
            u = tl.load(z_ptr + m * stride_zm + offs_d, mask=offs_d < D, other=0.0)
        else:
            u = tl.load(y_ptr + m * stride_ym + offs_d, mask=offs_d < D, other=0.0)
        tl.store(h_ptr + tl.cast(row, tl.int64) * D + offs_d, u.to(h_ptr.dtype.element_ty), mask=offs_d < D)
        squares = tl.where(offs_t == 0, D * (1.0 - eps), 0.0)
        tl.store(squares_ptr + tl.cast(row, tl.int64) * TILES + offs_t, squares, mask=offs_t < TILES)
    for i in range(program, COUNTS, programs):
        tl.store(count_ptr + i, 0)


@triton.jit(noinline=True)
def project_phase(
    h_ptr,
    squares_ptr,
    x_ptr,  # [M, D]
    w_ptr,  # [(H + 2G) K, D]
    scale_ptr,  # [(H + 2G) K] float32, or None
    cos_ptr,  # [B or 1, T, J] float32, J = K/2, or None
    sin_ptr,
    q_ptr,  # [M, H K], out
    k_ptr,  # [B, G, S, K], out: from `seen` on
    v_ptr,
    M,
    T,
    S,
    seen,
    stride_ab,
    stride_kb,
    stride_kg,
    stride_ks,
    eps,
    is_first,  # of its f's layers
    adds_x,
    NORMS_X: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_PARTS: tl.constexpr,
):
    # one tile: BLOCK_N pairs of columns that RoPE rotates together, of whichever heads
    J: tl.constexpr = K // 2
    PAIRS: tl.constexpr = (H + 2 * G) * J
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(PAIRS, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        offs_m = (tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        offs_p = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
        in_m, in_p = offs_m < M, offs_p < PAIRS
        head, j = offs_p // J, offs_p % J
        column = head * K + j  # of the pair's first; the other is J further
        if is_first:
            low, high = _start_by_two_weights(
                h_ptr,
                squares_ptr,
                x_ptr,
                w_ptr,
                offs_m,
                in_m,
                column,
                column + J,
                in_p,
                M,
                eps,
                adds_x,
                NORMS_X,
                D,
                TILES,
                BLOCK_T,
                PRECISION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                K_PARTS,
            )
        else:
            low, high = two_products(
                of_state(h_ptr, STATE_PASSING, M, D),
                w_ptr,
                offs_m,
                in_m,
                column,
                column + J,
                in_p,
                D,
                PRECISION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                K_PARTS,
            )
            rstd = rstd_of(squares_ptr, STATE_PASSING, M, offs_m, in_m, eps, D, TILES, BLOCK_T)
            low *= rstd[:, None]
            high *= rstd[:, None]
        low *= _channel_scale(scale_ptr, column, in_p)
        high *= _channel_scale(scale_ptr, column + J, in_p)

        b, t = offs_m // T, offs_m % T
        if cos_ptr is not None:
            offs = (b * stride_ab + t * J)[:, None] + j[None, :]
            rotates = in_m[:, None] & (in_p & (head < H + G))[None, :]  # values are not rotated
            cos = tl.load(cos_ptr + offs, mask=rotates, other=1.0)
            sin = tl.load(sin_ptr + offs, mask=rotates, other=0.0)
            low, high = rotate(low, high, cos, sin)
        low, high = low.to(q_ptr.dtype.element_ty), high.to(q_ptr.dtype.element_ty)

        q_ptrs = q_ptr + offs_m[:, None] * (H * K) + column[None, :]
        is_q = in_m[:, None] & (head < H)[None, :]
        tl.store(q_ptrs, low, mask=is_q)
        tl.store(q_ptrs + J, high, mask=is_q)
        slot = (b * stride_kb + (seen + t) * stride_ks)[:, None]
        has_slot = (in_m & (seen + t < S))[:, None]  # a token that the cache has no room for is lost
        k_ptrs = k_ptr + slot + ((head - H) * stride_kg + j)[None, :]
        is_k = has_slot & ((head >= H) & (head < H + G))[None, :]
        tl.store(k_ptrs, low, mask=is_k)
        tl.store(k_ptrs + J, high, mask=is_k)
        v_ptrs = v_ptr + slot + ((head - H - G) * stride_kg + j)[None, :]
        is_v = has_slot & (in_p & (head >= H + G))[None, :]
        tl.store(v_ptrs, low, mask=is_v)
        tl.store(v_ptrs + J, high, mask=is_v)


@triton.jit(noinline=True)
def attention_phase(
    q_ptr,  # [M, H, K], rotated
    k_ptr,  # [B, G, S, K], rotated
    v_ptr,  # [B, G, S, K]
    key_mask_ptr,  # [B, MASKED] uint8, or None
    o_ptr,  # [M, H, K], out
    parts_ptr,  # [M, H, parts, K] float32, out where there is more than one part
    lse_ptr,  # [M, H, parts] float32, out likewise
    count_ptr,  # [B G tiles] int32, zero before and after: parts that are done
    B,
    T,
    S,
    seen,  # keys before the first query
    MASKED,  # keys that the mask reaches; those beyond are hidden
    keys_per_part,
    stride_kb,
    stride_kg,
    stride_ks,
    scale,  # log2(e) / sqrt(K)
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WIDTH: tl.constexpr,  # K, rounded up to a power of two
):
    # one task: BLOCK_Q queries that share keys (the tokens and heads of a group), over one part of the keys
    GROUP: tl.constexpr = H // G
    rows, end = GROUP * T, tl.minimum(seen + T, S)
    tiles, parts = tl.cdiv(rows, BLOCK_Q), tl.cdiv(end, keys_per_part)
    offs_k = tl.arange(0, WIDTH)[None, :]
    for task in range(tl.program_id(0), B * G * tiles * parts, tl.num_programs(0)):
        part, tile = task % parts, task // parts % tiles
        g, b = (task // parts // tiles % G).to(tl.int64), (task // parts // tiles // G).to(tl.int64)
        offs_r = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        in_r, t = offs_r < rows, offs_r // GROUP
        query = (b * T + t) * H + g * GROUP + offs_r % GROUP  # among all tokens' heads
        is_query = in_r[:, None] & (offs_k < K)
        q = tl.load(q_ptr + query[:, None] * K + offs_k, mask=is_query, other=0.0)

        end_s = tl.minimum((part + 1) * keys_per_part, end)
        if IS_CAUSAL:
            end_s = tl.minimum(end_s, seen + (tl.minimum((tile + 1) * BLOCK_Q, rows) - 1) // GROUP + 1)
        highest = tl.full((BLOCK_Q,), -1e30, tl.float32)  # finite, so that -inf - highest is no NaN
        total = tl.zeros((BLOCK_Q,), tl.float32)
        o = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
        for start_s in range(part * keys_per_part, end_s, BLOCK_S):
            offs_s = start_s + tl.arange(0, BLOCK_S)
            in_s = offs_s < end_s
            offs = b * stride_kb + g * stride_kg + offs_s.to(tl.int64)[:, None] * stride_ks + offs_k
            mask = in_s[:, None] & (offs_k < K)
            k = tl.load(k_ptr + offs, mask=mask, other=0.0)
            v = tl.load(v_ptr + offs, mask=mask, other=0.0)
            if key_mask_ptr is not None:
                in_s = in_s & (offs_s < MASKED)
                in_s = in_s & (tl.load(key_mask_ptr + b * MASKED + offs_s, mask=in_s, other=0) != 0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            visible = in_s[None, :]
            if IS_CAUSAL:
                visible = visible & (offs_s[None, :] <= seen + t[:, None])
            scores = tl.where(visible, scores, float("-inf"))
            o, total, highest = softmax_step(o, total, highest, scores, v, PRECISION)
        sees = total > 0.0
        o = o / tl.where(sees, total, 1.0)[:, None]  # a query that may attend to nothing: o = 0
        if parts == 1:
            tl.store(o_ptr + query[:, None] * K + offs_k, o.to(o_ptr.dtype.element_ty), mask=is_query)
        else:
            row = query * parts + part
            lse = tl.where(sees, highest + tl.log2(total), float("-inf"))
            tl.store(parts_ptr + row[:, None] * K + offs_k, o, mask=is_query)
            tl.store(lse_ptr + row, lse, mask=in_r)
            # the program that finishes a tile's last part merges all parts, in their order
            tl.debug_barrier()
            of_tile = count_ptr + task // parts
            done = tl.atomic_add(of_tile, 1, sem="acq_rel", scope="gpu")
            if done == parts - 1:
                tl.store(of_tile, 0)
                for r in range(tile * BLOCK_Q, tl.minimum((tile + 1) * BLOCK_Q, rows)):
                    m = (b * T + r // GROUP) * H + g * GROUP + r % GROUP
                    merge_parts(parts_ptr, lse_ptr, o_ptr, m, parts, K, 16, WIDTH)


@triton.jit(noinline=True)
def mix_phase(
    o_ptr,  # [M, H K]
    w_ptr,  # [D, H K]
    scale_ptr,  # [D] float32, or None
    x_ptr,
    h_ptr,
    squares_ptr,
    M,
    eps,
    is_first,
    adds_x,
    NORMS_X: tl.constexpr,
    D: tl.constexpr,
    HK: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_PARTS: tl.constexpr,
):
    # one tile of h: the product, and what the layer started from
    tiles_m = tl.cdiv(M, BLOCK_M)
    for tile in range(tl.program_id(0), tiles_m * TILES, tl.num_programs(0)):
        tile_n = tile // tiles_m
        offs_m = (tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        in_m, in_n = offs_m < M, offs_n < D
        h = product(
            o_ptr, w_ptr, offs_m, in_m, offs_n, in_n, HK, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, K_PARTS
        )
        h *= _channel_scale(scale_ptr, offs_n, in_n)
        offs, mask = offs_m[:, None] * D + offs_n[None, :], in_m[:, None] & in_n[None, :]
        if is_first:
            z, y, x = _rstds_at_start(squares_ptr, M, offs_m, in_m, eps, NORMS_X, D, TILES, BLOCK_T)
            h += _sum_at_start(h_ptr, x_ptr, offs, mask, M, z[:, None], y[:, None], x[:, None], adds_x, D)
        else:
            rstd = rstd_of(squares_ptr, STATE_PASSING, M, offs_m, in_m, eps, D, TILES, BLOCK_T)
            v = tl.load(of_state(h_ptr, STATE_PASSING, M, D) + offs, mask=mask, other=0.0)
            h += v.to(tl.float32) * rstd[:, None]
        _store_state(h, h_ptr, squares_ptr, STATE_MIXED, M, tile_n, offs, offs_m, in_m, mask, D, TILES)


@triton.jit(noinline=True)
def gate_up_phase(
    h_ptr,
    squares_ptr,
    w_ptr,  # [2F, D], the gate's F rows first
    scale_ptr,  # [2F] float32, or None
    a_ptr,  # [M, F], out
    M,
    eps,
    D: tl.constexpr,
    F: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_PARTS: tl.constexpr,
):
    # one tile of g and the same tile of u
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(F, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        offs_m = (tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        offs_n = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
        in_m, in_n = offs_m < M, offs_n < F
        g, u = two_products(
            of_state(h_ptr, STATE_MIXED, M, D),
            w_ptr,
            offs_m,
            in_m,
            offs_n,
            F + offs_n,
            in_n,
            D,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            K_PARTS,
        )
        rstd = rstd_of(squares_ptr, STATE_MIXED, M, offs_m, in_m, eps, D, TILES, BLOCK_T)
        g *= rstd[:, None] * _channel_scale(scale_ptr, offs_n, in_n)
        u *= rstd[:, None] * _channel_scale(scale_ptr, F + offs_n, in_n)
        a = g * tl.sigmoid(g) * u
        mask = in_m[:, None] & in_n[None, :]
        tl.store(a_ptr + offs_m[:, None] * F + offs_n[None, :], a.to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit(noinline=True)
def down_phase(
    a_ptr,  # [M, F]
    w_ptr,  # [D, F]
    scale_ptr,  # [D] float32, or None
    h_ptr,
    squares_ptr,
    M,
    eps,
    state,  # where h2 goes: z, y, or on to the next layer
    D: tl.constexpr,
    F: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_PARTS: tl.constexpr,
):
    # one tile of h2
    tiles_m = tl.cdiv(M, BLOCK_M)
    for tile in range(tl.program_id(0), tiles_m * TILES, tl.num_programs(0)):
        tile_n = tile // tiles_m
        offs_m = (tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        in_m, in_n = offs_m < M, offs_n < D
        h2 = product(
            a_ptr, w_ptr, offs_m, in_m, offs_n, in_n, F, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, K_PARTS
        )
        h2 *= _channel_scale(scale_ptr, offs_n, in_n)
        offs, mask = offs_m[:, None] * D + offs_n[None, :], in_m[:, None] & in_n[None, :]
        rstd = rstd_of(squares_ptr, STATE_MIXED, M, offs_m, in_m, eps, D, TILES, BLOCK_T)
        h = tl.load(of_state(h_ptr, STATE_MIXED, M, D) + offs, mask=mask, other=0.0)
        h2 += h.to(tl.float32) * rstd[:, None]
        _store_state(h2, h_ptr, squares_ptr, state, M, tile_n, offs, offs_m, in_m, mask, D, TILES)


@triton.jit(noinline=True)
def end_phase(
    h_ptr,
    squares_ptr,
    z_end_ptr,  # [M, D], out
    y_end_ptr,  # [M, D], out
    M,
    eps,
    D: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # one row of z or y
    offs_d, offs_t = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
    for row in range(tl.program_id(0), 2 * M, tl.num_programs(0)):
        squares = tl.load(
            squares_ptr + tl.cast(row, tl.int64) * TILES + offs_t, mask=offs_t < TILES, other=0.0
        )
        rstd = tl.rsqrt(tl.sum(squares, axis=0) / D + eps)
        h = tl.load(h_ptr + tl.cast(row, tl.int64) * D + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
        u = (h * rstd).to(h_ptr.dtype.element_ty)
        m = (row % M).to(tl.int64)
        if row // M == STATE_Z:
            tl.store(z_end_ptr + m * D + offs_d, u, mask=offs_d < D)
        else:
            tl.store(y_end_ptr + m * D + offs_d, u, mask=offs_d < D)
