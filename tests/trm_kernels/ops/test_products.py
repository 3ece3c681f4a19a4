"""Ops that multiply matrices: which candidate runs, what they refuse, what no row of the cases can say."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from bench.measure.counting import Counting
from tests.trm_kernels.ops.test_ops import (
    DEVICE,
    EACH_PRODUCT,
    check_closeness,
    error,
    inputs_of,
    run,
)
from trm_kernels import (
    injection_blend,
    injection_in,
    linear_residual,
    linear_swiglu,
    rstd_from_squares,
    swiglu_mlp,
)
from trm_kernels.ops import linear_residual as linear_residual_file
from trm_kernels.runtime import tuning
from trm_kernels.runtime.backend import backend, interpreting
from trm_kernels.runtime.gemm_common import add_weight_gradient, are_aligned, tile_of_program
from trm_kernels.runtime.launch import record
from trm_kernels.runtime.optional_triton import tl, triton
from trm_kernels.testing.cases import CASES

BY_NAME = {case.name: case for case in CASES}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


# --- what no row of the cases can say


@pytest.mark.kernels
@EACH_PRODUCT
@pytest.mark.parametrize("rows", [(0,), (3, 0), (), (1,), (1, 1)], ids=str)
def test_no_rows_and_single_rows(case, rows):
    inputs = inputs_of(case, (*rows, 24, 40), torch.float32)
    true = run(case.ref, [t.detach().double().requires_grad_() for t in inputs])
    with backend("triton"):
        ours = run(case.op, inputs)
    for name, want in true.items():
        assert ours[name].shape == want.shape
        torch.testing.assert_close(ours[name].double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.kernels
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["linear_swiglu", "swiglu_mlp", "linear_residual-scaled", "injection_in", "injection_blend-gated"]
)
def test_the_tiles_of_each_arch_compute_the_same(name, dtype, arch, monkeypatch):
    if not interpreting():
        pytest.skip("tiles of another arch may not fit the device at hand")
    for op in ("linear_swiglu", "swiglu_mlp", "linear_residual", "injection_in", "injection_blend"):
        monkeypatch.setattr(f"trm_kernels.ops.{op}.arch_of", lambda t: arch)
    for M in tuning.row_limits(arch, dtype.itemsize):
        with tuning.as_for_rows(M):
            check_closeness(BY_NAME[name], (144, 80, 160), dtype)


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["linear_swiglu", "linear_swiglu-scaled", "swiglu_mlp", "swiglu_mlp-scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_forms_of_a_product_compute_the_same(name, dtype, parts):
    """Gate and up in one product, the epilogue in parts: the same sums in one order, so the same bits.

    The interpreter's products are the host's BLAS. On some CPUs (OpenBLAS's kernels for Haswell, on an EPYC)
    the order of its sums depends on the shape. There the forms are compared to a few roundings of the dtype.
    """
    sizes = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    plain = tuning.GemmLaunch(dtype.itemsize, **sizes)
    other = replace(plain, parts=parts, joins_weights=True)
    inputs = inputs_of(BY_NAME[name], (35, 48, 80), dtype)  # rows that are aligned, in part of a tile
    op, eps = name.partition("-")[0], torch.finfo(dtype).eps
    found = []
    for row in (plain, other):
        with tuning.using(op, row), tuning.using("linear_swiglu", row), backend("triton"):
            found.append(run(BY_NAME[name].op, inputs))
    for what, want in found[0].items():
        if want.ndim > 1:  # of a row's scale the gradient is summed part by part
            if interpreting():
                torch.testing.assert_close(
                    found[1][what], want, rtol=8 * eps, atol=8 * eps * want.std().item()
                )
            else:
                assert torch.equal(found[1][what], want), what
    with tuning.using(op, other), tuning.using("linear_swiglu", other):
        check_closeness(BY_NAME[name], (35, 48, 80), dtype)


BY_DESCRIPTORS = tuning.GemmLaunch(2, 32, 64, 32, num_warps=4, num_stages=2, by_descriptors=True)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M", [0, 1, 70])
@pytest.mark.parametrize("is_scaled", [False, True], ids=["plain", "scaled"])
def test_descriptors_compute_what_pointers_do(is_scaled, M, dtype, monkeypatch):
    """In part of a tile of rows, of columns and of the summed axis: the same sums in one order."""
    if not interpreting() and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("there are no descriptors before sm90")
    g = torch.Generator().manual_seed(0)
    v, w, r = (torch.randn(n, k, generator=g).to(DEVICE, dtype) for n, k in ((M, 80), (144, 80), (M, 144)))
    row_scale = torch.rand(M, generator=g).to(DEVICE) if is_scaled else None
    launched = []
    by_descriptors = linear_residual_file._launch_by_descriptors
    monkeypatch.setattr(
        linear_residual_file, "_launch_by_descriptors", lambda *a: launched.append(by_descriptors(*a))
    )
    found = []
    for row in (replace(BY_DESCRIPTORS, by_descriptors=False), BY_DESCRIPTORS):
        assert not launched
        with tuning.using("linear_residual", row), backend("triton"):
            found.append(linear_residual(v, w, r, row_scale, candidate="fused"))
    assert len(launched) == (M > 0)
    (h, squares), (same_h, same_squares) = found
    assert torch.equal(h, same_h)
    torch.testing.assert_close(squares, same_squares)  # added half by half


@pytest.mark.parametrize(("arch", "width", "says"), [("sm89", 64, "got sm89"), ("sm90", 72, "(72, 1)")])
def test_descriptors_are_refused_where_there_are_none(arch, width, says):
    """On other GPUs, and of rows that begin anywhere: no other settings are taken in silence."""
    v, w = (torch.empty(n, 64, dtype=torch.bfloat16, device="meta") for n in (128, width))
    r = v.new_empty(128, width)
    with record(arch), tuning.using("linear_residual", BY_DESCRIPTORS), pytest.raises(ValueError, match=says):
        linear_residual(v, w, r, candidate="fused")


@pytest.mark.kernels
@pytest.mark.skipif(not interpreting(), reason="reads a sparse file, which a GPU cannot")
@pytest.mark.parametrize("name", ["linear_swiglu", "linear_residual", "injection_in", "injection_blend"])
def test_row_offsets_beyond_31_bits(name, tmp_path):
    """Three rows 2^30 elements apart: the last one starts where a 32-bit offset would turn negative."""
    stride = 2**30
    storage = torch.from_file(
        str(tmp_path / "sparse"), shared=True, size=2 * stride + 32, dtype=torch.float16
    )
    far = storage.as_strided((3, 16), (stride, 1))
    near = inputs_of(BY_NAME[name], (3, 16, 16), torch.float16)
    far.copy_(near[0].detach())
    with backend("triton"), torch.no_grad():
        got, want = (BY_NAME[name].op(first, *near[1:]) for first in (far, near[0]))
    for g, w in zip(*((t,) if isinstance(t, Tensor) else t for t in (got, want)), strict=True):
        assert torch.equal(g, w)


@triton.jit
def _visit_kernel(out_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    tl.store(out_ptr + tile_m * tl.cdiv(N, BLOCK_N) + tile_n, tl.program_id(0))


@pytest.mark.kernels
@pytest.mark.parametrize(("tiles_m", "tiles_n"), [(1, 1), (3, 2), (4, 5), (9, 3), (11, 1)])
def test_every_tile_is_computed_once(tiles_m, tiles_n):
    out = torch.full((tiles_m * tiles_n,), -1, dtype=torch.int32, device=DEVICE)
    _visit_kernel[(out.numel(),)](out, tiles_m * 16 - 3, tiles_n * 8 - 1, BLOCK_M=16, BLOCK_N=8, GROUP_M=4)
    assert sorted(out.tolist()) == list(range(out.numel()))
    if tiles_m >= 4:
        assert out.view(tiles_m, tiles_n)[:4, 0].tolist() == [0, 1, 2, 3], (
            "a group goes down its column first"
        )


@pytest.mark.kernels
@pytest.mark.parametrize("candidate", tuning.CANDIDATES)
def test_a_deferred_norm_is_the_norm(candidate):
    """rms(v W^T + r) into a SwiGLU: un-normalised rows, their rstd, and the chain back through both."""
    v, w, r, gate_up = rand(6, 24), rand(40, 24, seed=1), rand(6, 40, seed=2), rand(32, 40, seed=3)
    inputs = [t.requires_grad_() for t in (v, w, r, gate_up)]

    def deferred(v, w, r, gate_up):
        h, squares = linear_residual(v, w, r, candidate=candidate)
        return linear_swiglu(h, gate_up, rstd_from_squares(squares, 40, 1e-5), candidate=candidate)

    def plain(v, w, r, gate_up):
        return linear_swiglu(F.rms_norm(F.linear(v, w) + r, (40,), eps=1e-5), gate_up)

    with backend("reference"):
        true = run(plain, [t.detach().double().requires_grad_() for t in inputs])
    with backend("triton"):
        ours = run(deferred, inputs)
    for name, want in true.items():
        assert error(ours[name], want) < 1e-6, name


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("candidate", tuning.CANDIDATES)
def test_a_blend_of_nothing_changes_no_bit(candidate, dtype):
    h, y = rand(5, 40).to(dtype), rand(5, 24, seed=1).to(dtype)
    gate = rand(1, 24, seed=2).to(dtype), rand(1, seed=3).to(dtype)
    with backend("triton"):
        assert torch.equal(injection_blend(h, y, h.new_zeros(40, 24), 0.7, *gate, candidate=candidate), h)


@pytest.mark.kernels
@pytest.mark.parametrize("candidate", tuning.CANDIDATES)
def test_a_blend_keeps_the_dtype_of_the_language_model(candidate):
    h, y, w = rand(5, 40).bfloat16(), rand(5, 24, seed=1), rand(40, 24, seed=2)
    inputs = [t.requires_grad_() for t in (h, y, w)]
    with backend("triton"):
        ours = run(lambda *t: injection_blend(*t, 0.7, candidate=candidate), inputs)
    want = run(lambda *t: injection_blend(*t, 0.7), inputs)
    for name in want:
        assert ours[name].dtype == want[name].dtype
        assert error(ours[name], want[name].double()) < (4e-3 if want[name].dtype == torch.bfloat16 else 1e-5)


@pytest.mark.kernels
@EACH_PRODUCT
def test_autocast_means_what_it_means_for_linear(case):
    inputs = inputs_of(case, (5, 24, 40), torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        want = case.ref(*inputs)
        with backend("triton"):
            got = case.op(*inputs)
    for g, w in zip(*((t,) if isinstance(t, Tensor) else t for t in (got, want)), strict=True):
        if not case.name.startswith("linear_residual"):  # its sum is rounded as its product is
            assert g.dtype == w.dtype
        assert error(g, w.double()) < 1e-2


@pytest.mark.kernels
def test_a_gradient_alone_is_what_it_is_among_all():
    for name in ("linear_swiglu", "swiglu_mlp-scaled", "linear_residual-scaled", "injection_in-mm"):
        inputs = inputs_of(BY_NAME[name], (5, 24, 40), torch.float32)
        with backend("triton"):
            everything = run(BY_NAME[name].op, inputs)
            for i in range(len(inputs)):
                some = [t.detach().requires_grad_(i == j) for j, t in enumerate(inputs)]
                got = run(BY_NAME[name].op, some)
                assert torch.equal(got[f"gradient of input {i}"], everything[f"gradient of input {i}"])


# input by input: how many calls of torch.mm and how many kernels a backward for it alone takes
WORK_OF_GRADIENTS = {
    "norm_add": [(0, 1), (0, 0)],  # r's is that of the sum
    "linear_swiglu": [(1, 1), (1, 1)],
    "linear_swiglu-mm": [(1, 1), (1, 1), (0, 1)],
    "swiglu_mlp": [(1, 1), (1, 1), (1, 1)],
    "swiglu_mlp-mm": [(1, 1), (1, 1), (1, 1), (0, 1)],
    "linear_residual": [(1, 2), (1, 2), (0, 2)],
    "linear_residual-mm": [(1, 2), (1, 2), (0, 2), (0, 2)],
    "injection_in": [(1, 1), (1, 1)],
    "injection_blend": [(0, 0), (1, 0), (1, 0)],
    # every gradient but h's goes through that of the gate, which takes a product
    "injection_blend-gated": [(0, 0), (1, 1), (2, 1), (2, 1), (1, 1)],
}


@pytest.mark.parametrize("name", WORK_OF_GRADIENTS)
def test_gradients_nobody_asked_for_are_not_computed(name):
    """A frozen weight, or an input that is no leaf: neither a product nor a kernel is spent on it."""
    pytest.importorskip("triton")
    case, work = BY_NAME[name], []
    inputs = case.inputs((5, 24, 40) if len(case.shapes[0]) == 3 else (5, 40), torch.float32, 0)
    for i in range(len(inputs)):
        some = [t.detach().to("meta").requires_grad_(i == j) for j, t in enumerate(inputs)]
        with record("sm90"):
            out = case.op(*some)
        outs = [out] if isinstance(out, Tensor) else list(out)
        with record("sm90") as launches, Counting() as counted:
            torch.autograd.grad(outs, some[i], [torch.empty_like(t) for t in outs])
        work.append((counted.calls["mm"] + counted.calls["addmm"], len(launches)))
    assert work == WORK_OF_GRADIENTS[name]


# --- which candidate runs


def kernels(op, *inputs: Tensor) -> list[str]:
    """The kernels `op` starts on an H100."""
    with record("sm90") as launches:
        op(*(t.to("meta") for t in inputs))
    return [launch.kernel.fn.__name__ for launch in launches]


@pytest.mark.parametrize(
    ("width", "dtype", "kernel"),
    [
        (512, torch.bfloat16, "_linear_swiglu_fwd_kernel"),
        (2048, torch.bfloat16, "_linear_swiglu_act_kernel"),
        (512, torch.float32, "_linear_swiglu_act_kernel"),
        (97, torch.bfloat16, "_linear_swiglu_act_kernel"),
    ],
    ids=str,
)
def test_the_table_chooses_by_width_dtype_and_alignment(width, dtype, kernel):
    pytest.importorskip("triton")
    v, gate_up = torch.empty(64, width, dtype=dtype), torch.empty(256, width, dtype=dtype)
    assert kernels(linear_swiglu, v, gate_up) == [kernel]
    for candidate, asked in zip(tuning.CANDIDATES, ("fwd", "act"), strict=True):
        got = kernels(lambda v, w, candidate=candidate: linear_swiglu(v, w, candidate=candidate), v, gate_up)
        assert got == [f"_linear_swiglu_{asked}_kernel"]


def test_every_choice_has_its_settings():
    """Whatever the table chooses, for any arch and dtype, there are settings for it."""
    for op, arch, size, width, aligned in product(
        tuning._CHOICES, ("sm80", "sm90", "sm999"), (2, 4), (1, 1024, 1025, 10**6), (False, True)
    ):
        is_narrow = width <= 1024 or op == "injection_blend"
        chosen = tuning.choose(op, arch, size, width, aligned)
        assert chosen == ("fused" if aligned and size == 2 and is_narrow else "mm")
        for asked in tuning.CANDIDATES:
            assert tuning.choose(op, arch, size, width, aligned, asked) == asked
        assert tuning.gemm(op, arch, size, aligned).element_size == size


@pytest.mark.parametrize("arch", ["sm80", "sm89", "sm90"])
def test_few_rows_take_small_tiles(arch):
    """Large tiles would keep few multiprocessors busy."""
    assert tuning.row_limits(arch, 2) == (256, 2048, tuning.ANY_ROWS)
    assert tuning.row_limits(arch, 4) == tuning.row_limits("sm999", 2) == (tuning.ANY_ROWS,)
    for op in tuning._GEMMS:
        rows = [tuning.gemm(op, arch, 2, True, M) for M in (97, 776, 2049)]
        tiles = [row.BLOCK_M * row.BLOCK_N for row in rows]
        assert tiles[0] <= tiles[1] <= tiles[2], op
        if op in ("linear_swiglu", "linear_residual"):
            assert tiles[0] < tiles[2], op
        assert tuning.gemm(op, arch, 2, True, 256) == tuning.gemm(op, arch, 2, True, 1)
        assert tuning.gemm(op, arch, 2, True) == tuning.gemm(op, arch, 2, True, 2049)
        with tuning.as_for_rows(256):
            assert tuning.gemm(op, arch, 2, True, 10**6) == tuning.gemm(op, arch, 2, True, 256)


def test_sums_of_squares_are_as_many_for_few_rows_as_for_many():
    """What torch.compile was told of an unknown number of rows holds for each."""
    w = torch.empty(256, 64, dtype=torch.bfloat16, device="meta")
    for M in (1, 300, 3000):
        v, r = w.new_empty(M, 64), w.new_empty(M, 256)
        with record("sm90"):
            assert linear_residual(v, w, r)[1].shape == (M, 1)


def test_rows_whose_number_is_not_known_take_what_serves_any():
    """A comparison would bind a program that torch.export made for any number of rows to some of them."""
    shapes = ShapeEnv()
    M = FakeTensorMode(shape_env=shapes).from_tensor(torch.empty(97, 16), static_shapes=False).shape[0]
    assert isinstance(M, torch.SymInt)
    assert tuning.gemm("linear_swiglu", "sm90", 2, True, M) == tuning.gemm("linear_swiglu", "sm90", 2, True)
    assert not shapes.guards


def test_rows_that_are_not_aligned_take_small_tiles():
    wide = torch.empty(4, 64, dtype=torch.bfloat16)
    assert are_aligned(wide, wide[:, :32])
    for narrow in (wide[:, :33], wide[:, 8:24][:, 1:], torch.empty(4, 24)):
        assert not are_aligned(wide, narrow)
    assert tuning.gemm("linear_swiglu", "sm90", 2, False) == tuning.gemm("linear_swiglu", "sm12345", 2, True)


@pytest.mark.parametrize(
    ("setting", "value", "precision"),
    [
        ("allow_tf32", False, "ieee"),
        ("allow_tf32", True, "tf32"),
        ("fp32_precision", "none", "ieee"),
        ("fp32_precision", "ieee", "ieee"),
        ("fp32_precision", "tf32", "tf32"),  # allow_tf32 cannot be read from here on
    ],
)
def test_float32_is_true_float32_unless_tf32_is_allowed(setting, value, precision):
    pytest.importorskip("triton")
    v, gate_up = torch.empty(4, 32, device="meta"), torch.empty(64, 32, device="meta")
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        setattr(matmul, setting, value)
        with record("sm90") as launches:
            linear_swiglu(v, gate_up, candidate="fused")
    finally:
        matmul.fp32_precision = before
    assert launches[0].meta["PRECISION"] == precision


def test_weights_gradients_where_there_are_only_shapes():
    """As where launches are recorded or a training is compiled; the addmm of torch 2.11 refuses it."""
    shapes = ((6, 4), torch.float32), ((3, 6), torch.bfloat16), ((3, 4), torch.bfloat16)
    dw, dy, x = (torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes)
    add_weight_gradient(dw, dy, x)
    with pytest.raises(RuntimeError):
        add_weight_gradient(dw, dy, x[:2])


ASKED = [
    lambda candidate: linear_swiglu(torch.zeros(2, 8), torch.zeros(12, 8), candidate=candidate),
    lambda candidate: swiglu_mlp(
        torch.zeros(2, 8), torch.zeros(12, 8), torch.zeros(8, 6), candidate=candidate
    ),
    lambda candidate: linear_residual(
        torch.zeros(2, 8), torch.zeros(6, 8), torch.zeros(2, 6), candidate=candidate
    ),
    lambda candidate: injection_in(torch.zeros(2, 8), torch.zeros(6, 8), candidate=candidate),
    lambda candidate: injection_blend(
        torch.zeros(2, 6), torch.zeros(2, 8), torch.zeros(6, 8), candidate=candidate
    ),
]


@pytest.mark.parametrize("ask", ASKED)
def test_a_candidate_that_cannot_run_is_an_error(ask):
    with backend("reference"):
        ask(None)
        with pytest.raises(RuntimeError, match="the candidate 'fused' was asked for, and it cannot run on"):
            ask("fused")
        with pytest.raises(ValueError, match="expected candidate to be one of fused, mm, got 'cutlass'"):
            ask("cutlass")


# --- what they refuse


def _refusals():
    x, w = torch.zeros(2, 8), torch.zeros(6, 8)
    scale = torch.ones(2)
    one_dtype = "of one dtype, float32, float16, bfloat16 or float64, got"
    return {
        "odd gate_up": (lambda: linear_swiglu(x, torch.zeros(5, 8)), r"linear_swiglu: expected v \[..., D\]"),
        "swiglu widths": (lambda: linear_swiglu(x, torch.zeros(6, 9)), r"got \(2, 8\) and \(6, 9\)"),
        "swiglu dtypes": (lambda: linear_swiglu(x.half(), w), f"v and gate_up {one_dtype} torch.float16"),
        "swiglu devices": (lambda: linear_swiglu(x, w.to("meta")), "on one device, got cpu and meta"),
        "scale's shape": (
            lambda: linear_swiglu(x, w, torch.ones(3)),
            r"linear_swiglu: expected row_scale \(2,\) in torch.float32 on cpu, got \(3,\)",
        ),
        "scale's dtype": (lambda: linear_swiglu(x, w, scale.half()), "got .* torch.float16"),
        "mlp widths": (lambda: swiglu_mlp(x, w, torch.zeros(8, 4)), r"swiglu_mlp: .* \(6, 8\), \(8, 4\)"),
        "mlp dtypes": (
            lambda: swiglu_mlp(x, w, torch.zeros(8, 3).half()),
            f"swiglu_mlp: expected v, gate_up and down {one_dtype}",
        ),
        "residual widths": (
            lambda: linear_residual(x, w, torch.zeros(2, 7)),
            r"linear_residual: expected v \[..., K\], w .*, got \(2, 8\), \(6, 8\), \(2, 7\)",
        ),
        "residual dtypes": (lambda: linear_residual(x, w, x[:, :6].half()), f"v, w and r {one_dtype}"),
        "residual scale": (
            lambda: linear_residual(x, w, torch.zeros(2, 6), torch.ones(2, 1)),
            r"linear_residual: expected row_scale \(2,\)",
        ),
        "no tiles": (lambda: rstd_from_squares(torch.zeros(2, 0), 4), "rstd_from_squares: .* at least one"),
        "no axis": (lambda: rstd_from_squares(torch.tensor(2.0), 4), "rstd_from_squares: .* at least one"),
        "no columns": (lambda: rstd_from_squares(torch.zeros(2, 3), 0), "N of at least 1"),
        "narrow squares": (lambda: rstd_from_squares(x.half(), 4), "float32 or float64, got torch.float16"),
        "in widths": (lambda: injection_in(x, torch.zeros(6, 9)), r"injection_in: expected h \[..., D\]"),
        "in dtypes": (lambda: injection_in(x, w.double()), f"h and w_in {one_dtype}"),
        "blend widths": (lambda: injection_blend(x, x, w), "injection_blend: expected h"),
        "blend rows": (lambda: injection_blend(torch.zeros(3, 6), x, w), r"got \(3, 6\), \(2, 8\) and"),
        "blend's gate": (
            lambda: injection_blend(torch.zeros(2, 6), x, w, 1.0, torch.zeros(1, 8)),
            r"expected gate_weight \[1, 8\] and gate_bias \[1\] or neither, got \(\(1, 8\), None\)",
        ),
        "blend dtypes": (lambda: injection_blend(torch.zeros(2, 6), x.half(), w), f"y and w_out {one_dtype}"),
        "blend of integers": (lambda: injection_blend(x[:, :6].int(), x, w), f"expected h {one_dtype}"),
    }  # fmt: skip


def test_rstd_of_one_row_without_leading_axes():
    got = rstd_from_squares(torch.tensor([9.0, 16.0]), 2, eps=0.5)
    torch.testing.assert_close(got, torch.tensor(13.0).rsqrt())


@pytest.mark.parametrize("name", _refusals())
def test_refuses(name):
    call, says = _refusals()[name]
    with pytest.raises(ValueError, match=says):
        call()
