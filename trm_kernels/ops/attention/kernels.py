"""The kernels of rope_attention: forward, and backward in two passes or in one tile.

Shapes and source: rope_attention.py. In all of them a program has one head, or one group, of one sequence.
"""

from trm_kernels.ops.attention.rope import rotate
from trm_kernels.runtime.optional_triton import tl, triton

# What the kernels share: loads that rotate, stores that rotate back, and which keys a query may attend to. A
# block of rows is given by their numbers `offs_r` and by which of them exist.


@triton.jit
def _load_halves(u_ptr, stride_u, offs_r, in_r, K: tl.constexpr, BLOCK_J: tl.constexpr):
    """Rows of u as two halves, each [rows, BLOCK_J]."""
    J: tl.constexpr = (K + 1) // 2
    offs_j = tl.arange(0, BLOCK_J)[None, :]
    u_ptr += offs_r.to(tl.int64)[:, None] * stride_u + offs_j
    low = tl.load(u_ptr, mask=in_r[:, None] & (offs_j < J), other=0.0)
    high = tl.load(u_ptr + J, mask=in_r[:, None] & (offs_j < K - J), other=0.0)
    return low, high


@triton.jit
def _load_angles(cos_ptr, sin_ptr, offs_r, in_r, J: tl.constexpr, BLOCK_J: tl.constexpr):
    offs_j = tl.arange(0, BLOCK_J)[None, :]
    offs, mask = offs_r[:, None] * J + offs_j, in_r[:, None] & (offs_j < J)
    return tl.load(cos_ptr + offs, mask=mask, other=0.0), tl.load(sin_ptr + offs, mask=mask, other=0.0)


@triton.jit
def _load_rotated(u_ptr, stride_u, cos_ptr, sin_ptr, offs_r, in_r, K: tl.constexpr, BLOCK_J: tl.constexpr):
    """As _load_halves, with RoPE applied where there are angles."""
    low, high = _load_halves(u_ptr, stride_u, offs_r, in_r, K, BLOCK_J)
    if cos_ptr is not None:
        cos, sin = _load_angles(cos_ptr, sin_ptr, offs_r, in_r, K // 2, BLOCK_J)
        rotated_low, rotated_high = rotate(low.to(tl.float32), high.to(tl.float32), cos, sin)
        low, high = rotated_low.to(low.dtype), rotated_high.to(high.dtype)
    return low, high


@triton.jit
def _store_rotated_back(
    du_ptr, stride_du, low, high, cos_ptr, sin_ptr, offs_r, in_r, K: tl.constexpr, BLOCK_J: tl.constexpr
):
    """The gradient of u from that of its rotated halves, both float32."""
    J: tl.constexpr = (K + 1) // 2
    offs_j = tl.arange(0, BLOCK_J)[None, :]
    if cos_ptr is not None:
        cos, sin = _load_angles(cos_ptr, sin_ptr, offs_r, in_r, J, BLOCK_J)
        low, high = rotate(low, high, cos, -sin)
    du_ptr += offs_r.to(tl.int64)[:, None] * stride_du + offs_j
    tl.store(du_ptr, low.to(du_ptr.dtype.element_ty), mask=in_r[:, None] & (offs_j < J))
    tl.store(du_ptr + J, high.to(du_ptr.dtype.element_ty), mask=in_r[:, None] & (offs_j < K - J))


@triton.jit
def _load_rows(u_ptr, stride_u, offs_r, in_r, K: tl.constexpr, WIDTH: tl.constexpr):
    """Whole rows of u, [rows, WIDTH]."""
    offs_k = tl.arange(0, WIDTH)[None, :]
    u_ptr += offs_r.to(tl.int64)[:, None] * stride_u + offs_k
    return tl.load(u_ptr, mask=in_r[:, None] & (offs_k < K), other=0.0)


@triton.jit
def _store_rows(u_ptr, stride_u, u, offs_r, in_r, K: tl.constexpr, WIDTH: tl.constexpr):
    offs_k = tl.arange(0, WIDTH)[None, :]
    u_ptr += offs_r.to(tl.int64)[:, None] * stride_u + offs_k
    tl.store(u_ptr, u.to(u_ptr.dtype.element_ty), mask=in_r[:, None] & (offs_k < K))


@triton.jit
def _is_seen(seen_ptr, offs_n, S):
    """Which of these keys exist and are not padding."""
    seen = offs_n < S
    if seen_ptr is not None:
        seen = seen & (tl.load(seen_ptr + offs_n, mask=seen, other=0) != 0)
    return seen


@triton.jit
def _only_visible(scores, seen, key, query, query_offset, IS_CAUSAL: tl.constexpr):
    """The scores, -inf where a query may not attend; seen, key and query shaped to broadcast."""
    visible = seen
    if IS_CAUSAL:
        visible = visible & (key <= query + query_offset)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def rope_attention_fwd_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, S, G, K]
    v_ptr,  # [B, S, G, K]
    cos_ptr,  # [B or 1, T, J] float32, or None: q and k are taken as they are
    sin_ptr,
    seen_ptr,  # [B, S] uint8, 0 for keys that no query attends to, or None
    o_ptr,  # [B, T, H, K], out
    lse_ptr,  # [B, H, T] float32, out: log2(sum(exp2(scores))), inf where nothing is visible
    T,
    S,
    H,
    query_offset,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kg,
    stride_vb,
    stride_vs,
    stride_vg,
    stride_ab,
    stride_ob,
    stride_ot,
    scale,  # log2(e) / sqrt(K): exp2 is what the hardware has
    K: tl.constexpr,
    GROUP: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    WIDTH: tl.constexpr,  # K, rounded up to a power of two
):
    # one program: BLOCK_M queries of one head, over all keys they may attend to
    num_m = tl.cdiv(T, BLOCK_M)
    start_m = tl.program_id(0) % num_m * BLOCK_M
    h = (tl.program_id(0) // num_m % H).to(tl.int64)
    b = (tl.program_id(0) // num_m // H).to(tl.int64)
    g = h // GROUP
    offs_m = start_m + tl.arange(0, BLOCK_M)
    in_m = offs_m < T

    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + g * stride_kg
    v_ptr += b * stride_vb + g * stride_vg
    if cos_ptr is not None:
        cos_ptr += b * stride_ab
        sin_ptr += b * stride_ab
    if seen_ptr is not None:
        seen_ptr += b * S

    q_low, q_high = _load_rotated(q_ptr, stride_qt, cos_ptr, sin_ptr, offs_m, in_m, K, BLOCK_J)
    highest = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite, so that -inf - highest is no NaN
    total = tl.zeros((BLOCK_M,), tl.float32)
    o = tl.zeros((BLOCK_M, WIDTH), tl.float32)

    end_n = S
    if IS_CAUSAL:
        end_n = tl.minimum(S, start_m + BLOCK_M + query_offset)
    for start_n in range(0, end_n, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        in_n, seen = offs_n < S, _is_seen(seen_ptr, offs_n, S)
        k_low, k_high = _load_rotated(k_ptr, stride_ks, cos_ptr, sin_ptr, offs_n, in_n, K, BLOCK_J)
        scores = tl.dot(q_low, tl.trans(k_low), input_precision=PRECISION)
        scores = tl.dot(q_high, tl.trans(k_high), scores, input_precision=PRECISION) * scale
        scores = _only_visible(
            scores, seen[None, :], offs_n[None, :], offs_m[:, None], query_offset, IS_CAUSAL
        )

        higher = tl.maximum(highest, tl.max(scores, axis=1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)  # what was summed so far, counted from the new highest
        total = total * shrink + tl.sum(p, axis=1)
        v = _load_rows(v_ptr, stride_vs, offs_n, in_n, K, WIDTH)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision=PRECISION)
        highest = higher

    sees = total > 0.0
    o = o / tl.where(sees, total, 1.0)[:, None]  # a query that may attend to nothing: o = 0
    o_ptr += b * stride_ob + h * K
    _store_rows(o_ptr, stride_ot, o, offs_m, in_m, K, WIDTH)
    lse = tl.where(sees, highest + tl.log2(total), float("inf"))
    tl.store(lse_ptr + (b * H + h) * T + offs_m, lse, mask=in_m)


@triton.jit
def rope_attention_bwd_dq_kernel(
    do_ptr,  # [B, T, H, K]
    q_ptr,  # [B, T, H, K], rotated
    k_ptr,  # [B, S, G, K], rotated
    v_ptr,  # [B, S, G, K]
    cos_ptr,  # [B or 1, T, J] float32, or None
    sin_ptr,
    seen_ptr,  # [B, S] uint8, or None
    o_ptr,  # [B, T, H, K]
    lse_ptr,  # [B, H, T] float32
    dq_ptr,  # [B, T, H, K], out
    delta_ptr,  # [B, H, T] float32, out: sum(do * o), for the kernel of dk and dv
    T,
    S,
    H,
    query_offset,
    stride_dob,
    stride_dot,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kg,
    stride_vb,
    stride_vs,
    stride_vg,
    stride_ab,
    stride_ob,
    stride_ot,
    stride_dqb,
    stride_dqt,
    stride_dqh,
    scale,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    WIDTH: tl.constexpr,  # K, rounded up to a power of two
):
    # one program: BLOCK_M queries of one head;  dq = sum over keys of ds k,  ds = p (do v^T - delta)
    num_m = tl.cdiv(T, BLOCK_M)
    start_m = tl.program_id(0) % num_m * BLOCK_M
    h = (tl.program_id(0) // num_m % H).to(tl.int64)
    b = (tl.program_id(0) // num_m // H).to(tl.int64)
    g = h // GROUP
    offs_m = start_m + tl.arange(0, BLOCK_M)
    in_m = offs_m < T

    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + g * stride_kg
    v_ptr += b * stride_vb + g * stride_vg
    do_ptr += b * stride_dob + h * K
    o_ptr += b * stride_ob + h * K
    row_ptr = (b * H + h) * T + offs_m
    if cos_ptr is not None:
        cos_ptr += b * stride_ab
        sin_ptr += b * stride_ab
    if seen_ptr is not None:
        seen_ptr += b * S

    do = _load_rows(do_ptr, stride_dot, offs_m, in_m, K, WIDTH)
    o = _load_rows(o_ptr, stride_ot, offs_m, in_m, K, WIDTH)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)  # off by what o lost when it was rounded
    off_by = tl.zeros((BLOCK_M,), tl.float32)

    q_low, q_high = _load_halves(q_ptr, stride_qt, offs_m, in_m, K, BLOCK_J)
    lse = tl.load(lse_ptr + row_ptr, mask=in_m, other=float("inf"))
    dq_low = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
    dq_high = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)

    end_n = S
    if IS_CAUSAL:
        end_n = tl.minimum(S, start_m + BLOCK_M + query_offset)
    for start_n in range(0, end_n, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        in_n, seen = offs_n < S, _is_seen(seen_ptr, offs_n, S)
        k_low, k_high = _load_halves(k_ptr, stride_ks, offs_n, in_n, K, BLOCK_J)
        scores = tl.dot(q_low, tl.trans(k_low), input_precision=PRECISION)
        scores = tl.dot(q_high, tl.trans(k_high), scores, input_precision=PRECISION) * scale
        scores = _only_visible(
            scores, seen[None, :], offs_n[None, :], offs_m[:, None], query_offset, IS_CAUSAL
        )
        p = tl.exp2(scores - lse[:, None])
        v = _load_rows(v_ptr, stride_vs, offs_n, in_n, K, WIDTH)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        off_by += tl.sum(ds, axis=1)  # each row of p sums to one, and of ds to zero, if delta is right
        ds = ds.to(k_low.dtype)
        dq_low = tl.dot(ds, k_low, dq_low, input_precision=PRECISION)
        dq_high = tl.dot(ds, k_high, dq_high, input_precision=PRECISION)

    tl.store(delta_ptr + row_ptr, delta + off_by, mask=in_m)
    LN_2: tl.constexpr = 0.6931471805599453
    to_scores = scale * LN_2  # 1 / sqrt(K)
    dq_ptr += b * stride_dqb + h * stride_dqh
    _store_rotated_back(
        dq_ptr,
        stride_dqt,
        dq_low * to_scores,
        dq_high * to_scores,
        cos_ptr,
        sin_ptr,
        offs_m,
        in_m,
        K,
        BLOCK_J,
    )


@triton.jit
def rope_attention_bwd_dkv_kernel(
    do_ptr,  # [B, T, H, K]
    q_ptr,  # [B, T, H, K], rotated
    k_ptr,  # [B, S, G, K], rotated
    v_ptr,  # [B, S, G, K]
    cos_ptr,  # [B or 1, T, J] float32, or None
    sin_ptr,
    seen_ptr,  # [B, S] uint8, or None
    lse_ptr,  # [B, H, T] float32
    delta_ptr,  # [B, H, T] float32
    dk_ptr,  # [B, S, G, K], out
    dv_ptr,  # [B, S, G, K], out
    T,
    S,
    H,
    query_offset,
    stride_dob,
    stride_dot,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kg,
    stride_vb,
    stride_vs,
    stride_vg,
    stride_ab,
    stride_dkb,
    stride_dks,
    stride_dkg,
    stride_dvb,
    stride_dvs,
    stride_dvg,
    scale,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    WIDTH: tl.constexpr,  # K, rounded up to a power of two
):
    # one program: BLOCK_N keys of one group, over its heads and all queries that may attend to them;
    # dv = sum of p^T do,  dk = sum of ds^T q: always in the same order, so always to the same bit
    num_n = tl.cdiv(S, BLOCK_N)
    G = H // GROUP
    start_n = tl.program_id(0) % num_n * BLOCK_N
    g = (tl.program_id(0) // num_n % G).to(tl.int64)
    b = (tl.program_id(0) // num_n // G).to(tl.int64)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    in_n = offs_n < S

    k_ptr += b * stride_kb + g * stride_kg
    v_ptr += b * stride_vb + g * stride_vg
    if cos_ptr is not None:
        cos_ptr += b * stride_ab
        sin_ptr += b * stride_ab
    if seen_ptr is not None:
        seen_ptr += b * S

    seen = _is_seen(seen_ptr, offs_n, S)
    k_low, k_high = _load_halves(k_ptr, stride_ks, offs_n, in_n, K, BLOCK_J)
    v = _load_rows(v_ptr, stride_vs, offs_n, in_n, K, WIDTH)
    dk_low = tl.zeros((BLOCK_N, BLOCK_J), tl.float32)
    dk_high = tl.zeros((BLOCK_N, BLOCK_J), tl.float32)
    dv = tl.zeros((BLOCK_N, WIDTH), tl.float32)

    first = 0
    if IS_CAUSAL:  # the first block with a query that may attend to the first of these keys
        first = tl.maximum(0, start_n - query_offset) // BLOCK_M
    blocks = tl.cdiv(T, BLOCK_M) - first
    for i in range(0, GROUP * blocks):  # one loop for heads and blocks: two, nested, spill
        h = g * GROUP + i // blocks
        start_m = (first + i % blocks) * BLOCK_M
        offs_m = start_m + tl.arange(0, BLOCK_M)
        in_m = offs_m < T
        q_low, q_high = _load_halves(
            q_ptr + b * stride_qb + h * stride_qh, stride_qt, offs_m, in_m, K, BLOCK_J
        )
        row_ptr = (b * H + h) * T + offs_m
        lse = tl.load(lse_ptr + row_ptr, mask=in_m, other=float("inf"))
        delta = tl.load(delta_ptr + row_ptr, mask=in_m, other=0.0)

        scores = tl.dot(k_low, tl.trans(q_low), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        scores = tl.dot(k_high, tl.trans(q_high), scores, input_precision=PRECISION) * scale
        scores = _only_visible(
            scores, seen[:, None], offs_n[:, None], offs_m[None, :], query_offset, IS_CAUSAL
        )
        p = tl.exp2(scores - lse[None, :])
        do = _load_rows(do_ptr + b * stride_dob + h * K, stride_dot, offs_m, in_m, K, WIDTH)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = (p * (dp - delta[None, :])).to(q_low.dtype)
        dk_low = tl.dot(ds, q_low, dk_low, input_precision=PRECISION)
        dk_high = tl.dot(ds, q_high, dk_high, input_precision=PRECISION)

    LN_2: tl.constexpr = 0.6931471805599453
    to_scores = scale * LN_2
    dk_ptr += b * stride_dkb + g * stride_dkg
    dv_ptr += b * stride_dvb + g * stride_dvg
    _store_rotated_back(
        dk_ptr,
        stride_dks,
        dk_low * to_scores,
        dk_high * to_scores,
        cos_ptr,
        sin_ptr,
        offs_n,
        in_n,
        K,
        BLOCK_J,
    )
    _store_rows(dv_ptr, stride_dvs, dv, offs_n, in_n, K, WIDTH)


@triton.jit
def rope_attention_bwd_tile_kernel(
    do_ptr,  # [B, T, H, K]
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, S, H, K]
    v_ptr,  # [B, S, H, K]
    cos_ptr,  # [B or 1, T, J] float32, or None
    sin_ptr,
    seen_ptr,  # [B, S] uint8, or None
    lse_ptr,  # [B, H, T] float32
    dq_ptr,  # [B, T, H, K], out
    dk_ptr,  # [B, S, H, K], out
    dv_ptr,  # [B, S, H, K], out
    T,
    S,
    H,
    query_offset,
    stride_dob,
    stride_dot,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kg,
    stride_vb,
    stride_vs,
    stride_vg,
    stride_ab,
    stride_dqb,
    stride_dqt,
    stride_dqh,
    stride_dkb,
    stride_dks,
    stride_dkg,
    stride_dvb,
    stride_dvs,
    stride_dvg,
    scale,
    K: tl.constexpr,
    GROUP: tl.constexpr,  # 1: a group of several heads takes the two kernels above
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    WIDTH: tl.constexpr,  # K, rounded up to a power of two
):
    # one program: all queries and keys of one head in one tile; everything is read once, scores made once
    b, h = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    in_m, in_n = offs_m < T, offs_n < S
    if cos_ptr is not None:
        cos_ptr += b * stride_ab
        sin_ptr += b * stride_ab
    if seen_ptr is not None:
        seen_ptr += b * S

    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kg
    q_low, q_high = _load_rotated(q_ptr, stride_qt, cos_ptr, sin_ptr, offs_m, in_m, K, BLOCK_J)
    k_low, k_high = _load_rotated(k_ptr, stride_ks, cos_ptr, sin_ptr, offs_n, in_n, K, BLOCK_J)
    seen = _is_seen(seen_ptr, offs_n, S)
    lse = tl.load(lse_ptr + (b * H + h) * T + offs_m, mask=in_m, other=float("inf"))
    scores = tl.dot(q_low, tl.trans(k_low), input_precision=PRECISION)
    scores = tl.dot(q_high, tl.trans(k_high), scores, input_precision=PRECISION) * scale
    scores = _only_visible(scores, seen[None, :], offs_n[None, :], offs_m[:, None], query_offset, IS_CAUSAL)
    p = tl.exp2(scores - lse[:, None])

    do = _load_rows(do_ptr + b * stride_dob + h * K, stride_dot, offs_m, in_m, K, WIDTH)
    dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
    dv_ptr += b * stride_dvb + h * stride_dvg
    _store_rows(dv_ptr, stride_dvs, dv, offs_n, in_n, K, WIDTH)

    v = _load_rows(v_ptr + b * stride_vb + h * stride_vg, stride_vs, offs_n, in_n, K, WIDTH)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    delta = tl.sum(p * dp, axis=1)  # the row is whole, so o is not needed
    LN_2: tl.constexpr = 0.6931471805599453
    ds = (p * (dp - delta[:, None]) * (scale * LN_2)).to(q_low.dtype)

    dq_low = tl.dot(ds, k_low, input_precision=PRECISION)
    dq_high = tl.dot(ds, k_high, input_precision=PRECISION)
    dq_ptr += b * stride_dqb + h * stride_dqh
    _store_rotated_back(dq_ptr, stride_dqt, dq_low, dq_high, cos_ptr, sin_ptr, offs_m, in_m, K, BLOCK_J)

    dk_low = tl.dot(tl.trans(ds), q_low, input_precision=PRECISION)
    dk_high = tl.dot(tl.trans(ds), q_high, input_precision=PRECISION)
    dk_ptr += b * stride_dkb + h * stride_dkg
    _store_rotated_back(dk_ptr, stride_dks, dk_low, dk_high, cos_ptr, sin_ptr, offs_n, in_n, K, BLOCK_J)
