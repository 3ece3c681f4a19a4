"""All phases of a recursion as one kernel, and the two ways to launch it.

Phase 0 is the start, phases 1 to 5 E belong to the E evaluations of a layer, five each, and phase 5 E + 1 is
the end. Given a language model's hidden state, the start makes x of it, and the end gives it back with the
recursion's answer blended in; else x is given, and the end gives back y and z.

One cooperative launch runs all of them, with a grid barrier between one and the next. Or each has a launch of
its own, of the same kernel: the end of a launch is a barrier, too.
"""

from trm_kernels.recursion.one_launch.addresses import of_list
from trm_kernels.recursion.one_launch.grid_barrier import grid_barrier
from trm_kernels.recursion.one_launch.injection_phases import angles_phase, blend_phase, in_phase
from trm_kernels.recursion.one_launch.phases import (
    STATE_PASSING,
    STATE_Y,
    STATE_Z,
    attention_phase,
    down_phase,
    end_phase,
    gate_up_phase,
    mix_phase,
    project_phase,
    start_phase,
)
from trm_kernels.recursion.one_launch.products import ask_for_weights
from trm_kernels.runtime.optional_triton import tl, triton

PHASES_OF_AN_EVALUATION = 5


def count_phases(evaluations: int) -> int:
    """Phases of a whole recursion; one barrier less stands between them."""
    return PHASES_OF_AN_EVALUATION * evaluations + 2


# what changes from call to call, or from launch to launch, and is worth no kernel of its own
_CHANGING = ["S", "seen", "MASKED", "from_phase", "to_phase"]


@triton.jit(do_not_specialize=_CHANGING)
def one_launch_kernel(
    hidden_ptr,  # [M, N], or None; and what belongs to it, as in injection_phases.py
    w_in_ptr,  # [D, N]
    w_out_ptr,  # [N, D]
    gate_weight_ptr,  # [D], or None
    gate_bias_ptr,  # [1], or None
    positions_ptr,  # [P, T], or None: P is B or 1
    frequencies_ptr,  # [K/2] float32
    x_ptr,  # [M, D], out where there is a hidden state
    y_ptr,  # [M, D]
    z_ptr,  # [M, D]
    # of each list of tensors the first, see addresses.py: the layers' weights and their scales, or None
    qkv_proj_ptr,  # [(H + 2G) K, D]
    o_proj_ptr,  # [D, H K]
    gate_up_proj_ptr,  # [2F, D]
    down_proj_ptr,  # [D, F]
    qkv_scale_ptr,  # [(H + 2G) K] float32
    o_scale_ptr,  # [D] float32
    gate_up_scale_ptr,  # [2F] float32
    down_scale_ptr,  # [D] float32
    cos_ptr,  # [B or 1, T, K/2] float32, or None; out where there are positions
    sin_ptr,
    key_mask_ptr,  # [B, MASKED] uint8, or None
    distances_ptr,  # int64: of the tensors of a list from its first
    k_ptr,  # [B, G, S, K], in and out: the evaluations' keys, and their values below
    v_ptr,
    length_ptr,  # [] int64, in and out, or None: the evaluations' tokens before this call
    y_end_ptr,  # [M, D], out where there is no hidden state
    z_end_ptr,  # [M, D], out likewise
    blended_ptr,  # [M, N], out where there is one
    h_ptr,  # [4, M, D], and what follows: room to work in
    squares_ptr,  # [5, M, TILES] float32
    q_ptr,  # [M, H K]
    o_ptr,  # [M, H K]
    a_ptr,  # [M, F]
    parts_ptr,  # [M, H, parts, K] float32
    lse_ptr,  # [M, H, parts] float32
    count_ptr,  # [COUNTS] int32
    counter_ptr,  # int32, see grid_barrier.py
    M,
    B,
    T,
    E,
    S,
    COUNTS,
    TOKENS,  # P T
    seen,  # tokens before this call, where no length says so
    MASKED,
    keys_per_part,
    num_recursion_steps,
    from_phase,
    to_phase,  # exclusive
    stride_ym,
    stride_zm,
    stride_ab,
    stride_kb,
    stride_kg,
    stride_ks,
    scale,
    eps,
    strength,
    L: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    TILES: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    NORMS_X: tl.constexpr,  # of an injection only
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_PARTS: tl.constexpr,  # of the summed axis, see products.py
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D, rounded up to a power of two; so are the next three, of TILES, K/2 and K
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    WIDTH: tl.constexpr,
    ASKS_AHEAD: tl.constexpr,  # for the next phase's weights
):
    for phase in range(from_phase, to_phase):
        evaluation, kind = (phase + 4) // 5 - 1, (phase + 4) % 5
        layer, f = evaluation % L, evaluation // L
        is_first, updates_z = layer == 0, f % (num_recursion_steps + 1) < num_recursion_steps
        of_call = 8 * L + evaluation  # where the table speaks of this evaluation's keys
        if length_ptr is not None:  # noqa: SIM102  known when it is compiled, unlike the phase
            if (phase > 0) & (phase <= 5 * E):
                seen = tl.load(of_list(length_ptr, distances_ptr, of_call + 2 * E)).to(tl.int32)

        if phase == 0:
            start_phase(
                z_ptr,
                y_ptr,
                h_ptr,
                squares_ptr,
                count_ptr,
                M,
                COUNTS,
                stride_zm,
                stride_ym,
                eps,
                D,
                TILES,
                BLOCK_D,
                BLOCK_T,
            )
            if positions_ptr is not None:
                angles_phase(positions_ptr, frequencies_ptr, cos_ptr, sin_ptr, TOKENS, K // 2, BLOCK_J)
            if hidden_ptr is not None:
                in_phase(
                    hidden_ptr,
                    w_in_ptr,
                    x_ptr,
                    squares_ptr,
                    M,
                    eps,
                    NORMS_X,
                    D,
                    N,
                    TILES,
                    PRECISION,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                )
        elif phase > 5 * E:
            if hidden_ptr is None:
                end_phase(h_ptr, squares_ptr, z_end_ptr, y_end_ptr, M, eps, D, TILES, BLOCK_D, BLOCK_T)
            else:
                blend_phase(
                    h_ptr,
                    squares_ptr,
                    hidden_ptr,
                    w_out_ptr,
                    gate_weight_ptr,
                    gate_bias_ptr,
                    blended_ptr,
                    M,
                    eps,
                    strength,
                    D,
                    N,
                    TILES,
                    BLOCK_T,
                    PRECISION,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                )
            if length_ptr is not None:
                for e in range(tl.program_id(0), E, tl.num_programs(0)):
                    of_evaluation = of_list(length_ptr, distances_ptr, 8 * L + 2 * E + e)
                    tl.store(of_evaluation, tl.load(of_evaluation) + T)
        elif kind == 0:
            project_phase(
                h_ptr,
                squares_ptr,
                x_ptr,
                of_list(qkv_proj_ptr, distances_ptr, layer),
                of_list(qkv_scale_ptr, distances_ptr, 4 * L + layer),
                cos_ptr,
                sin_ptr,
                q_ptr,
                of_list(k_ptr, distances_ptr, of_call),
                of_list(v_ptr, distances_ptr, of_call + E),
                M,
                T,
                S,
                seen,
                stride_ab,
                stride_kb,
                stride_kg,
                stride_ks,
                eps,
                is_first,
                updates_z,
                NORMS_X,
                D,
                H,
                G,
                K,
                TILES,
                BLOCK_T,
                PRECISION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                K_PARTS,
            )
        elif kind == 1:
            attention_phase(
                q_ptr,
                of_list(k_ptr, distances_ptr, of_call),
                of_list(v_ptr, distances_ptr, of_call + E),
                key_mask_ptr,
                o_ptr,
                parts_ptr,
                lse_ptr,
                count_ptr,
                B,
                T,
                S,
                seen,
                MASKED,
                keys_per_part,
                stride_kb,
                stride_kg,
                stride_ks,
                scale,
                H,
                G,
                K,
                IS_CAUSAL,
                PRECISION,
                BLOCK_Q,
                BLOCK_S,
                WIDTH,
            )
        elif kind == 2:
            mix_phase(
                o_ptr,
                of_list(o_proj_ptr, distances_ptr, L + layer),
                of_list(o_scale_ptr, distances_ptr, 5 * L + layer),
                x_ptr,
                h_ptr,
                squares_ptr,
                M,
                eps,
                is_first,
                updates_z,
                NORMS_X,
                D,
                H * K,
                TILES,
                BLOCK_T,
                PRECISION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                K_PARTS,
            )
        elif kind == 3:
            gate_up_phase(
                h_ptr,
                squares_ptr,
                of_list(gate_up_proj_ptr, distances_ptr, 2 * L + layer),
                of_list(gate_up_scale_ptr, distances_ptr, 6 * L + layer),
                a_ptr,
                M,
                eps,
                D,
                F,
                TILES,
                BLOCK_T,
                PRECISION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                K_PARTS,
            )
        else:
            state = tl.where(layer < L - 1, STATE_PASSING, tl.where(updates_z, STATE_Z, STATE_Y))
            down_phase(
                a_ptr,
                of_list(down_proj_ptr, distances_ptr, 3 * L + layer),
                of_list(down_scale_ptr, distances_ptr, 7 * L + layer),
                h_ptr,
                squares_ptr,
                M,
                eps,
                state,
                D,
                F,
                TILES,
                BLOCK_T,
                PRECISION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                K_PARTS,
            )
        if phase + 1 < to_phase:
            if ASKS_AHEAD:
                next_layer = (phase + 4) // 5 % L
                ask_for_weights(
                    kind,
                    of_list(qkv_proj_ptr, distances_ptr, next_layer),
                    of_list(o_proj_ptr, distances_ptr, L + layer),
                    of_list(gate_up_proj_ptr, distances_ptr, 2 * L + layer),
                    of_list(down_proj_ptr, distances_ptr, 3 * L + layer),
                    M,
                    D,
                    H,
                    G,
                    K,
                    F,
                    BLOCK_M,
                    BLOCK_N,
                )
            grid_barrier(counter_ptr)
