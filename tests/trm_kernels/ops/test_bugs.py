"""Planted bugs: every one of these slips is caught by the check that every op passes."""

import importlib.util
import inspect
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trm_kernels.ops.test_ops import check_closeness
from trm_kernels.runtime import tuning
from trm_kernels.runtime.backend import interpreting
from trm_kernels.testing.cases import CASES

ROOT = Path(__file__).parents[3]
BY_NAME = {case.name: case for case in CASES}

# case, file and kernel (or what kernels share), what stands there, what a slip would make of it
BUGS = [
    ("add_rms_norm", "add_rms_norm.fwd", "/ D + eps", "/ D"),
    ("add_rms_norm", "add_rms_norm.bwd", "- y * along_y", "+ y * along_y"),
    ("add_rms_norm-three", "add_rms_norm.fwd", "h += tl.load", "h = 0 * h + tl.load"),
    ("norm_add", "norm_add.fwd", "/ D + eps", "/ D"),
    ("norm_add", "norm_add.bwd", "- y * along_y", "+ y * along_y"),
    ("linear_swiglu", "linear_swiglu.fwd", "N + offs_n,", "0 + offs_n,"),
    ("linear_swiglu", "linear_swiglu.rows_by_two_weights", "offs_k < K - k", "offs_k < K"),
    ("linear_swiglu", "linear_swiglu.fwd", "gu_ptrs + N, u", "gu_ptrs + N, g"),
    ("linear_swiglu-scaled", "linear_swiglu.fwd", "u *= row_scale[:, None]", "pass"),
    ("linear_swiglu-mm", "linear_swiglu.act", "tl.sigmoid(g)", "tl.sigmoid(u)"),
    ("linear_swiglu-mm", "linear_swiglu.bwd", "drow_scale += ", "drow_scale = "),
    ("linear_swiglu", "linear_swiglu.bwd", "swiglu_gradient(da, g, u)", "swiglu_gradient(da, u, g)"),
    ("swiglu_mlp", "swiglu_mlp.bwd", "BLOCK_K * stride_downk", "BLOCK_K"),
    ("swiglu_mlp", "swiglu_mlp._swiglu_gradient_of_columns", "a.to(", "da.to("),
    ("swiglu_mlp-scaled", "swiglu_mlp._swiglu_gradient_of_columns", "dg * g + du * u", "dg * g"),
    ("linear_residual", "linear_residual.fwd", "tl.sum(h * h, axis=1)", "tl.sum(h, axis=1)"),
    ("linear_residual-scaled", "linear_residual.fwd", "r *= tl", "r += tl"),
    ("linear_residual-mm", "linear_residual.add", "squares += ", "squares = "),
    ("linear_residual-scaled", "linear_residual.bwd", "// TILE_N", "// 1"),
    ("linear_residual-mm", "linear_residual.bwd", "2 * h * ", "h * "),
    ("linear_residual", "rstd_from_squares.fwd", "/ N + eps", "/ N"),
    ("linear_residual", "rstd_from_squares.bwd", "-0.5", "0.5"),
    ("injection_in", "injection_in.rows_by_weight_and_squares", "squares += ", "squares = "),
    ("injection_in", "injection_in.fwd", "tile_n == 0", "tile_n == 1"),
    ("injection_in-mm", "injection_in.norm", "/ D + eps", "/ D"),
    ("injection_in-mm", "injection_in.bwd", "dh = rstd * ", "dh = "),
    ("injection_blend", "injection_blend.fwd", "u *= strength", "pass"),
    ("injection_blend-gated", "injection_blend.rows_by_weight_and_score", "ptr + k + offs_k", "ptr + offs_k"),
    ("injection_blend-mm", "injection_blend.add", "scores += ", "scores = "),
    ("injection_blend-mm", "injection_blend.bwd", "gate * (1 - gate)", "gate"),
    ("injection_blend-gated", "injection_blend.bwd", "+ dscore[:, None] * ", "+ 0 * "),
    ("rope", "rope.fwd", "-sin if IS_BACK else sin", "sin"),
    ("rope", "rope.fwd", "offs_m // N % T", "offs_m % T"),
    ("rope", "rope.rotate", "high * cos + low", "high * cos - low"),
    ("rope_attention-padded", "rope_attention.fwd", "o * shrink[:, None]", "o"),
    ("rope_attention-padded", "rope_attention.fwd", "total * shrink", "total"),
    ("rope_attention-padded", "rope_attention.fwd", "_is_seen(seen_ptr, offs_n, S)", "offs_n < S"),
    ("rope_attention-padded", "rope_attention.fwd", "+ BLOCK_M + query_offset", "+ query_offset"),
    ("rope_attention", "rope_attention.fwd", "highest + tl.log2(total)", "tl.log2(total)"),
    ("rope_attention", "rope_attention.bwd_dq", "dp - delta[:, None]", "dp"),
    ("rope_attention", "rope_attention.bwd_dq", "dq_high * to_scores", "dq_high"),
    ("rope_attention-padded", "rope_attention.bwd_dkv", "g * GROUP + i // blocks", "g * GROUP"),
    ("rope_attention-padded", "rope_attention.bwd_dkv", "offs_m[None, :], q", "offs_m[None, :] - 1, q"),
    ("rope_attention-padded", "rope_attention.bwd_dkv", "tl.maximum(0, start_n - query_offset)", "BLOCK_M"),
    ("rope_attention-tile", "rope_attention.bwd_tile", "dp - delta[:, None]", "dp"),
    ("rope_attention-tile", "rope_attention.bwd_tile", "tl.trans(p.to(do.dtype))", "p.to(do.dtype)"),
    ("rope_attention", "kernels._store_rotated_back", "-sin", "sin"),
    ("rope_attention", "kernels._load_rotated", "cos, sin)", "cos, -sin)"),
    ("rope_attention-padded", "kernels._only_visible", "key <= query", "key < query"),
    ("decode_attention", "decode_attention.fwd", "chunk * BLOCK_H", "0"),
    ("decode_attention", "decode_attention.softmax_step", "total * shrink", "total"),
    ("decode_attention", "decode_attention.fwd", "highest + tl.log2(total)", "tl.log2(total)"),
    ("decode_attention-padded", "decode_attention.fwd", "(offs_n >= start) & ", ""),
    ("decode_attention-padded", "decode_attention.fwd", "tl.load(ends_ptr", "1 + tl.load(ends_ptr"),
    ("decode_attention-padded", "decode_attention.fwd", "visible & (tl.load(", "visible | (tl.load("),
    ("decode_attention", "decode_attention.merge_parts", "weight[:, None] * part", "part"),
    ("trm_recursion-one-launch", "one_launch.phases._sum_at_start", "mask=mask & adds_x", "mask=mask"),
    ("trm_recursion-one-launch", "one_launch.phases._store_state", "tl.sum(h * h,", "tl.sum(h,"),
    ("trm_recursion-one-launch", "one_launch.kernel.gate_up_phase", " F + offs_n,\n", " offs_n,\n"),
    ("trm_recursion-one-launch", "one_launch.kernel.down_phase", "* rstd[:, None]", ""),
    ("trm_recursion-decode", "one_launch.kernel.project_phase", "(seen + t) * stride_ks", "t * stride_ks"),
    ("trm_recursion-decode", "one_launch.kernel.project_phase", "head < H + G", "head < H"),
    ("trm_recursion-decode", "one_launch.kernel.attention_phase", "+ offs_r % GROUP", ""),
    ("trm_recursion-decode", "one_launch.kernel.attention_phase", "tl.load(key_mask", "1 + tl.load(key_mask"),
    ("trm_recursion-decode-int8", "one_launch.phases._channel_scale", "+ offs_n", "+ 0 * offs_n"),
    ("trm_injection-decode", "one_launch.kernel.in_phase", "/ N + eps", "/ D + eps"),
    ("trm_injection-decode", "one_launch.kernel.angles_phase", " * frequencies", " + frequencies"),
    ("trm_injection-decode", "one_launch.kernel.blend_phase", "score * rstd", "score"),
    ("trm_injection-decode", "one_launch.kernel.blend_phase", "strength * rstd", "strength"),
]  # fmt: skip


@pytest.mark.kernels
@pytest.mark.skipif(not interpreting(), reason="arithmetic: the interpreter shows it")
@pytest.mark.parametrize(("name", "place", "right", "wrong"), BUGS, ids=[f"{b[1]}-{b[3]}" for b in BUGS])
def test_a_planted_bug_is_caught(name, place, right, wrong, monkeypatch, tmp_path):
    file, part = place.rsplit(".", 1)
    path = "attention/launchers" if file == "rope_attention" else file.replace(".", "/")
    (found,) = (ROOT / "trm_kernels").rglob(f"{path}.py")
    op_file = importlib.import_module(".".join(found.relative_to(ROOT).with_suffix("").parts))
    kernel = next(k for k in (part, f"_{file}_{part}_kernel", f"{file}_{part}_kernel") if hasattr(op_file, k))
    function = getattr(op_file, kernel).fn
    source, home = inspect.getsource(function), sys.modules[function.__module__]
    assert right in source
    names = [name for name in vars(home) if not name.startswith("__")]
    # a kernel of its own, in the surroundings of the right one
    path = tmp_path / "bug.py"
    path.write_text(f"from {home.__name__} import {', '.join(names)}\n\n\n{source.replace(right, wrong)}")
    spec = importlib.util.spec_from_file_location("bug", path)
    bug = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bug)
    monkeypatch.setattr(op_file, kernel, getattr(bug, kernel))

    tile = "rope_attention_bwd_tile"
    rows = () if part != "bwd_tile" else tuning.ATTENTION[tile]["sm90"]
    # what one tile does is for 16 bits on an H100, by its registers, which the interpreter does not count
    monkeypatch.setitem(tuning.ATTENTION, tile, {"any": tuple(replace(row, element_size=4) for row in rows)})
    case = BY_NAME[name]
    with pytest.raises(AssertionError):
        for shape in case.shapes:
            check_closeness(case, shape, torch.float32)
