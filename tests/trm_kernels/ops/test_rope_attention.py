"""rope_attention: every kernel and every candidate against the reference in float64; what is visible; errors.

Kernels run on a CUDA device, or in the interpreter; the rest runs anywhere.
"""

import itertools
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from trm_kernels.ops.attention import launchers
from trm_kernels.ops.attention import library as library_attention
from trm_kernels.ops.attention.rope import rope, rope_angles, rope_fwd, rope_ref
from trm_kernels.ops.attention.rope_attention import rope_attention
from trm_kernels.runtime import tuning
from trm_kernels.runtime.backend import backend, interpreting
from trm_kernels.runtime.launch import record

DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
compiles = pytest.mark.skipif(interpreting(), reason="the interpreter does not compile")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOOR = {torch.float32: 2e-7, torch.float16: 1e-5, torch.bfloat16: 1e-4}  # summing in another order


@dataclass(frozen=True)
class Problem:
    B: int
    T: int
    H: int
    G: int
    K: int
    causal: bool = False
    padding: str = ""  # of the keys: left, right, or any pattern
    rope_theta: float | None = 10000.0

    def __str__(self) -> str:
        words = ("causal" if self.causal else "", self.padding, "" if self.rope_theta else "no RoPE")
        return "-".join([f"{self.B}x{self.T}x{self.H}x{self.G}x{self.K}", *(word for word in words if word)])

    def qkv(self, dtype: torch.dtype, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        qkv = torch.randn(self.B, self.T, (self.H + 2 * self.G) * self.K, generator=g)
        return qkv.to(DEVICE, dtype).requires_grad_()

    def key_mask(self, S: int | None = None, seed: int = 0) -> Tensor | None:
        """Another number of keys in each row; at least one is left."""
        if not self.padding:
            return None
        S = S or self.T
        keys, padded = torch.arange(S), (torch.arange(self.B) * 3 + S // 3)[:, None]
        if self.padding == "left":
            mask = keys >= padded.clamp(max=S - 1)
        elif self.padding == "right":
            mask = keys < (S - padded).clamp(min=1)
        else:
            mask = torch.rand(self.B, S, generator=torch.Generator().manual_seed(seed)) < 0.6
        return mask.to(DEVICE)

    def attend(self, qkv: Tensor, **options) -> Tensor:
        options = {
            "key_mask": self.key_mask(),
            "causal": self.causal,
            "rope_theta": self.rope_theta,
        } | options
        return rope_attention(qkv, None, self.H, self.G, **options)


# one token; fewer than a block; odd sizes; several blocks of queries and of keys; widths that are padded
PROBLEMS = (
    Problem(2, 1, 1, 1, 16, causal=True),
    Problem(2, 7, 3, 1, 16),
    Problem(2, 33, 2, 2, 40, causal=True, padding="left"),
    Problem(2, 33, 2, 1, 64, padding="right"),
    Problem(1, 97, 2, 2, 32),
    Problem(1, 97, 2, 1, 16, causal=True, padding="any"),
    Problem(1, 129, 1, 1, 64, causal=True),
    Problem(1, 129, 2, 2, 16, padding="left"),
    Problem(1, 70, 3, 1, 128, causal=True),
    Problem(1, 40, 2, 2, 15, causal=True, padding="any", rope_theta=None),
)
EACH = pytest.mark.parametrize("problem", PROBLEMS, ids=str)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def run(attend, inputs: list[Tensor], seed: int = 0) -> list[Tensor]:
    """The output, then the gradient of each input under a random gradient of the output."""
    o = attend(*inputs)
    g = torch.Generator().manual_seed(seed + 1000)
    # rounded, so that the float64 run is given the very same gradient
    do = torch.randn(o.shape, generator=g).bfloat16().to(o.device, o.dtype)
    return [o.detach(), *torch.autograd.grad(o, inputs, do)]


def error(got: Tensor, true: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return ((got.double() - true).norm() / true.norm()).item()


def as_close_as_eager(
    attend, inputs: list[Tensor], seed: int = 0, implementation: str = "triton", floor: float = 0.0
) -> None:
    """attend(*inputs, implementation=...): the rule of design.md, section 7."""
    dtype = inputs[0].dtype
    true = run(
        lambda *t: attend(*t, implementation="reference"),
        [t.detach().double().requires_grad_() for t in inputs],
        seed,
    )
    eager = run(lambda *t: attend(*t, implementation="reference"), inputs, seed)
    ours = run(lambda *t: attend(*t, implementation=implementation), inputs, seed)
    for i, (got, plain, want) in enumerate(zip(ours, eager, true, strict=True)):
        assert got.dtype == dtype and got.shape == want.shape
        mine, theirs = error(got, want), error(plain, want)
        assert mine <= 1.1 * theirs + max(floor, FLOOR[dtype]), (
            f"{i}: error {mine:.2e}, of eager {theirs:.2e}"
        )
        if dtype == torch.float32:
            assert error(got, plain.double()) <= (5e-5 if i else 1e-5)


@pytest.fixture
def one_tile(monkeypatch):
    """The backward of one tile, on whatever device: only its spills keep it from other GPUs."""
    rows = tuning.ATTENTION["rope_attention_bwd_tile"]["sm90"]
    monkeypatch.setitem(tuning.ATTENTION, "rope_attention_bwd_tile", {"any": rows})


@pytest.fixture
def two_kernels(monkeypatch):
    monkeypatch.setitem(tuning.ATTENTION, "rope_attention_bwd_tile", {"any": ()})


# Kernels


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", ["rope_attention_fwd", "rope_attention_bwd_dq", "rope_attention_bwd_dkv"])
@pytest.mark.parametrize("is_wide", [False, True], ids=["64", "128"])
def test_every_tile_of_hopper_attends(kernel, is_wide, two_kernels):
    """In part of a tile and in several, of queries and of keys: the row taken, and those behind it."""
    if not interpreting():
        pytest.skip("tiles of another arch may not fit the device at hand")
    for row in tuning.ATTENTION[kernel]["sm90"]:
        if row.element_size == 2 and is_wide == (row.max_head_width > 64):
            problem = Problem(1, 130, 2, 1, row.max_head_width // 2 * 2, causal=True)
            with tuning.using(kernel, row):
                as_close_as_eager(problem.attend, [problem.qkv(torch.bfloat16, 0)])


@pytest.mark.kernels
@EACH
@EACH_DTYPE
@pytest.mark.parametrize("seed", range(3))
def test_as_close_to_the_truth_as_eager(problem, dtype, seed, two_kernels):
    # where a query sees one key, eager's gradient of q and k is exactly zero, and ours what rounding leaves
    # of the difference of two equal float32 sums
    floor = 1e-6 if problem.T == 1 else 0.0
    as_close_as_eager(problem.attend, [problem.qkv(dtype, seed)], seed, floor=floor)


@pytest.mark.kernels
@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.H == p.G and p.T <= 128 and p.K <= 64], ids=str)
@EACH_DTYPE
def test_one_tile_is_as_close_to_the_truth(problem, dtype, one_tile):
    if dtype == torch.float32:
        pytest.skip("the one-tile backward is for 16 bits")
    as_close_as_eager(problem.attend, [problem.qkv(dtype, 0)])


@pytest.mark.kernels
@pytest.mark.parametrize("padding", ("", "left"))
def test_a_cache_with_gradients(padding, two_kernels):
    """9 queries over 15 keys: the last query is the last key, and the first sees 7."""
    problem = Problem(2, 9, 4, 2, 16, causal=True, padding=padding)
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 2, 6, 16, generator=g).to(DEVICE).requires_grad_() for _ in range(2))

    def attend(qkv, k, v, **options):
        def update(new_k, new_v):
            return torch.cat((k, new_k), dim=2), torch.cat((v, new_v), dim=2)

        options |= {"key_mask": problem.key_mask(15), "update_cache": update}
        return problem.attend(qkv, **options)

    for dtype in (torch.float32, torch.bfloat16):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (problem.qkv(dtype, 0), k, v)]
        as_close_as_eager(attend, inputs)
        as_close_as_eager(attend, inputs, implementation="sdpa")


@pytest.mark.kernels
@pytest.mark.parametrize("implementation", ("triton", "sdpa"))
@torch.no_grad()
def test_chunks_through_a_cache_equal_the_whole(implementation):
    """Chunks of 5, 1 and 8 tokens; also into a cache with free slots after the newest key."""
    problem = Problem(2, 14, 4, 2, 16, causal=True, padding="left")
    qkv = problem.qkv(torch.float32, 0).detach()
    whole = problem.attend(qkv, implementation="reference")
    grown: list[Tensor] = []
    slots = [torch.full((2, 2, 20, 16), 7.0, device=DEVICE) for _ in range(2)]
    at = 0
    for tokens in (5, 1, 8):
        chunk, positions = qkv[:, at : at + tokens], torch.arange(at, at + tokens, device=DEVICE)[None]

        def grow(*new):
            grown[:] = new if not grown else [torch.cat(pair, dim=2) for pair in zip(grown, new, strict=True)]
            return tuple(grown)

        def fill(*new, at=at, tokens=tokens):
            for slot, t in zip(slots, new, strict=True):
                slot[:, :, at : at + tokens] = t
            return tuple(slots)

        shared = (chunk, positions, problem.H, problem.G)
        options = {"causal": True, "implementation": implementation}
        seen = problem.key_mask()
        got = rope_attention(*shared, **options, update_cache=grow, key_mask=seen[:, : at + tokens])
        torch.testing.assert_close(got, whole[:, at : at + tokens], rtol=1e-5, atol=1e-6)
        free = torch.ones(2, 6, dtype=torch.bool, device=DEVICE)
        got = rope_attention(
            *shared, **options, update_cache=fill, key_mask=torch.cat((seen, free), dim=1), query_offset=at
        )
        torch.testing.assert_close(got, whole[:, at : at + tokens], rtol=1e-5, atol=1e-6)
        at += tokens


@pytest.mark.kernels
@pytest.mark.parametrize("path", ("one_tile", "two_kernels"))
def test_reruns_are_equal_bit_for_bit(path, request):
    request.getfixturevalue(path)
    problem = Problem(2, 70, 2, 2, 32, causal=True, padding="left")
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [problem.qkv(dtype, 0)]
        attend = lambda qkv: problem.attend(qkv, implementation="triton")  # noqa: E731
        first, second = run(attend, inputs), run(attend, inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.kernels
@pytest.mark.parametrize("implementation", ("triton", "sdpa"))
def test_views_give_what_their_copies_give(implementation):
    problem = Problem(2, 33, 2, 1, 16, causal=True)
    qkv = problem.qkv(torch.float32, 0).detach()
    cut = torch.full((2, 40, 70), torch.nan, device=DEVICE)
    cut[:, 3:36, 5:69] = qkv
    turned = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    batch_last = qkv.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    attend = lambda qkv: problem.attend(qkv, implementation=implementation)  # noqa: E731
    want = run(attend, [qkv.clone().requires_grad_()])
    for view in (cut[:, 3:36, 5:69], turned, batch_last):
        got = run(attend, [view.detach().requires_grad_()])
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b) or (implementation == "sdpa" and error(a, b.double()) < 1e-6)


@pytest.mark.kernels
def test_a_gradient_that_is_an_expanded_view():
    problem = Problem(1, 7, 2, 1, 16)
    qkv = problem.qkv(torch.float32, 0)
    (got,) = torch.autograd.grad(problem.attend(qkv, implementation="triton").sum(), qkv)
    (want,) = torch.autograd.grad(problem.attend(qkv, implementation="reference").sum(), qkv)
    assert error(got, want.double()) < 1e-5


@pytest.mark.kernels
@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16), (2, 5, 0, 16)], ids=str)
def test_rope_of_nothing(shape):
    u = torch.zeros(shape, device=DEVICE, requires_grad=True)
    angles = rope_angles(torch.zeros(1, shape[1], device=DEVICE), 16, 10000.0)
    with backend("triton"):
        y = rope(u, angles)
        assert y.shape == torch.autograd.grad(y.sum(), u)[0].shape == shape


@pytest.mark.kernels
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=str)
def test_no_rows_and_no_tokens(shape):
    qkv = torch.zeros(*shape, 4 * 16, device=DEVICE, requires_grad=True)
    o = rope_attention(qkv, None, 2, 1, causal=True, implementation="triton")
    assert o.shape == (*shape, 32)
    assert torch.autograd.grad(o.sum(), qkv)[0].shape == qkv.shape


@pytest.mark.kernels
@pytest.mark.skipif(not interpreting(), reason="reads a sparse file, which a GPU cannot")
@pytest.mark.parametrize("path", ("one_tile", "two_kernels"))
@pytest.mark.parametrize("tokens", (1, 3))
def test_row_offsets_beyond_31_bits(tokens, path, tmp_path, request):
    """Rows or tokens 2^30 elements apart: the third starts where a 32-bit offset would turn negative."""
    request.getfixturevalue(path)
    stride = 2**30
    storage = torch.from_file(
        str(tmp_path / "sparse"), shared=True, size=2 * stride + 48, dtype=torch.float16
    )
    problem = Problem(3 // tokens, tokens, 1, 1, 16)
    near = problem.qkv(torch.float16, 0)
    far = storage.as_strided(near.shape, (stride, stride, 1)).copy_(near.detach()).requires_grad_()
    attend = lambda qkv: problem.attend(qkv, implementation="triton")  # noqa: E731
    for got, want in zip(run(attend, [far]), run(attend, [near]), strict=True):
        assert torch.equal(got, want)
    heads, angles = (
        (t.unflatten(-1, (3, 16)).detach() for t in (far, near)),
        rope_angles(torch.arange(tokens)[None], 16, 10000.0),
    )
    with backend("triton"):
        got, want = (rope(t, angles) for t in heads)
    assert torch.equal(got, want)


@pytest.mark.kernels
def test_positions_of_each_row_and_a_table_made_beforehand():
    problem = Problem(3, 9, 2, 1, 16, causal=True)
    g = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 5000, (3, 9), generator=g).to(DEVICE)
    angles = rope_angles(positions, 16, 10000.0)
    qkv = problem.qkv(torch.float32, 0)
    as_close_as_eager(
        lambda qkv, **options: rope_attention(qkv, positions, 2, 1, causal=True, **options), [qkv]
    )
    for name in ("triton", "sdpa", "reference"):
        options = {"causal": True, "implementation": name}
        made_here = rope_attention(qkv, positions, 2, 1, **options)
        assert torch.equal(rope_attention(qkv, None, 2, 1, angles=angles, **options), made_here)


@pytest.mark.kernels
def test_tf32_is_used_where_pytorch_may(monkeypatch):
    asked = []
    monkeypatch.setattr(launchers, "launch", lambda kernel, *args, **meta: asked.append(meta["PRECISION"]))
    qkv = Problem(1, 3, 1, 1, 16).qkv(torch.float32, 0).detach()
    before = torch.get_float32_matmul_precision()
    try:
        for name in ("highest", "high"):
            torch.set_float32_matmul_precision(name)
            rope_attention(qkv, None, 1, implementation="triton")
    finally:
        torch.set_float32_matmul_precision(before)
    assert asked == ["ieee", "tf32"]


@pytest.mark.kernels
def test_custom_ops_keep_their_promises():
    """Schema and fake agree with what the launchers do."""
    problem = Problem(2, 5, 2, 1, 16, padding="left")
    heads = problem.qkv(torch.float32, 0).detach().unflatten(-1, (4, 16))
    q, k, v = heads.split((2, 1, 1), dim=2)
    cos, sin = rope_angles(torch.arange(5, device=DEVICE)[None], 16, 10000.0)
    seen = problem.key_mask().view(torch.uint8)
    o, lse = launchers.rope_attention_fwd(q, k, v, cos, sin, seen, True, 0)
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(launchers.rope_attention_fwd, (q, k, v, cos, sin, seen, True, 0), **checks)
    torch.library.opcheck(launchers.rope_attention_fwd, (q, k, v, None, None, None, False, 0), **checks)
    torch.library.opcheck(rope_fwd, (q, cos, sin, True), **checks)
    for is_fused in (True, False):
        given = (o, q, k, v, o, lse, cos, sin, seen, True, 0, is_fused)
        torch.library.opcheck(launchers.rope_attention_bwd, given, **checks)


@pytest.mark.kernels
def test_custom_op_of_one_tile_keeps_its_promises(one_tile):
    q = torch.randn(2, 5, 2, 16, device=DEVICE).half()
    o, lse = launchers.rope_attention_fwd(q, q, q, None, None, None, True, 0)
    for is_fused in (True, False):
        given = (o, q, q, q, lse, None, None, None, True, 0, is_fused)
        torch.library.opcheck(
            launchers.rope_attention_bwd_tile, given, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.kernels
def test_a_second_derivative_is_an_error_not_a_wrong_number():
    qkv = Problem(1, 5, 1, 1, 16).qkv(torch.float32, 0)
    o = rope_attention(qkv, None, 1, implementation="triton")
    (dqkv,) = torch.autograd.grad(o.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dqkv.sum().backward()


# What is visible, whoever computes

IMPLEMENTATIONS = [
    "reference",
    "sdpa",
    pytest.param("triton", marks=pytest.mark.kernels),
]
EACH_IMPLEMENTATION = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@EACH_IMPLEMENTATION
def test_a_query_that_sees_nothing_is_zero_and_passes_no_gradient(implementation):
    """Left padding under a causal mask: the padded queries; and a row that is padding throughout."""
    key_mask = torch.tensor([[False, False, True, True, True], [False] * 5], device=DEVICE)
    qkv = Problem(2, 5, 2, 1, 16).qkv(torch.float32, 0)
    o = rope_attention(qkv, None, 2, 1, causal=True, key_mask=key_mask, implementation=implementation)
    assert (o[0, :2] == 0).all() and (o[1] == 0).all() and (o[0, 2:] != 0).all()
    (dqkv,) = torch.autograd.grad(o.sum(), qkv)
    assert (dqkv[0, :2] == 0).all() and (dqkv[1] == 0).all() and dqkv.isfinite().all()


@EACH_IMPLEMENTATION
def test_left_padding_equals_no_padding(implementation):
    qkv = Problem(1, 9, 2, 1, 16).qkv(torch.float32, 0).detach()
    padded = torch.cat((torch.full((1, 4, 64), 50.0, device=DEVICE), qkv), dim=1)
    options = {"causal": True, "implementation": implementation}
    positions = torch.tensor([[0, 0, 0, 0, *range(9)]], device=DEVICE)
    got = rope_attention(
        padded, positions, 2, 1, key_mask=torch.arange(13, device=DEVICE)[None] >= 4, **options
    )
    want = rope_attention(qkv, None, 2, 1, **options)
    torch.testing.assert_close(got[:, 4:], want, rtol=1e-5, atol=1e-6)


@EACH_IMPLEMENTATION
def test_no_later_token_changes_an_earlier_one(implementation):
    problem = Problem(1, 70, 2, 1, 16, causal=True)
    qkv = problem.qkv(torch.float32, 0).detach()
    other = torch.cat((qkv[:, :40], -3 * qkv[:, 40:]), dim=1)
    got, want = (problem.attend(t, implementation=implementation)[:, :40] for t in (other, qkv))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@EACH
def test_sdpa_is_as_close_to_the_truth_as_eager(problem, dtype):
    as_close_as_eager(problem.attend, [problem.qkv(dtype, 0)], implementation="sdpa")


@pytest.mark.parametrize("kind", ("bool", "additive", "of each head"))
def test_general_masks(kind):
    problem = Problem(2, 9, 4, 2, 16)
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 4 if kind == "of each head" else 1, 9, 9, generator=g).to(DEVICE) < 0.6
    if kind == "additive":
        mask = torch.randn(mask.shape, generator=g).to(DEVICE).masked_fill(~mask, -1e4)
    as_close_as_eager(
        lambda qkv, **options: problem.attend(qkv, mask=mask, **options),
        [problem.qkv(torch.float32, 0)],
        implementation="sdpa",
    )


@pytest.mark.parametrize("implementation", ("auto", "sdpa", "reference"))
@pytest.mark.parametrize("shape", [(), (9,), (1, 9), (9, 1), (2, 1, 1, 9), (4, 9, 9)], ids=str)
def test_a_mask_is_broadcast(shape, implementation):
    problem = Problem(2, 9, 4, 2, 16)
    qkv = problem.qkv(torch.float32, 0).detach()
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.3
    masks = (mask, mask.expand(2, 4, 9, 9))
    got, want = (problem.attend(qkv, mask=m, implementation=implementation) for m in masks)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ("auto", "sdpa", "reference"))
@pytest.mark.parametrize("sizes", [(0, 5), (2, 0)], ids=str)
def test_nothing_to_attend(sizes, implementation):
    problem = Problem(*sizes, 4, 2, 16, causal=True)
    assert problem.attend(problem.qkv(torch.float32, 0), implementation=implementation).shape == (*sizes, 64)


@pytest.mark.skipif(DEVICE != "cpu" or interpreting(), reason="of what a CPU attends by")
def test_auto_on_a_cpu_has_forward_derivatives_and_is_mapped_over_positions():
    problem = Problem(1, 5, 4, 2, 16, causal=True)
    qkv, other = (problem.qkv(torch.float32, seed).detach() for seed in (0, 1))
    got, want = (
        torch.func.jvp(partial(problem.attend, implementation=name), (qkv,), (other,))[1]
        for name in ("auto", "reference")
    )
    torch.testing.assert_close(got, want)

    def at(positions: Tensor) -> Tensor:
        return rope_attention(qkv, positions[None], 4, 2, causal=True)

    positions = torch.stack((torch.arange(5), 3 * torch.arange(5)))
    torch.testing.assert_close(torch.vmap(at)(positions), torch.stack([at(p) for p in positions]))


def test_one_backend_of_sdpa():
    """On the CPU there is flash; the others are for CUDA, and say so."""
    problem = Problem(1, 9, 2, 2, 16, causal=True)
    qkv = problem.qkv(torch.float32 if DEVICE == "cpu" else torch.bfloat16, 0)
    as_close_as_eager(problem.attend, [qkv], implementation="sdpa_flash")
    for name in ("sdpa_cudnn", "sdpa_efficient"):
        with pytest.raises(RuntimeError, match=f"'{name}' expects CUDA tensors, got cpu tensors"):
            problem.attend(qkv.detach().cpu(), implementation=name)


FLASH_ATTN = '''
import torch
def flash_attn_func(q, k, v, causal, deterministic):
    """As documented: [B, tokens, heads, K]; the causal mask ends at the last query and the last key."""
    assert deterministic and q.is_contiguous() is not None
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    T, S = q.shape[2], k.shape[2]
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T) if causal else None
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return o.transpose(1, 2){extra}
'''


@pytest.mark.parametrize(("module", "extra"), [("flash_attn", ""), ("flash_attn_interface", ", None")])
def test_flash_attn_where_it_is_installed(module, extra, tmp_path, monkeypatch):
    """A stand-in with the signature of flash-attn 2 or 3, on the CPU."""
    (tmp_path / f"{module}.py").write_text(FLASH_ATTN.replace("{extra}", extra))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(library_attention, "check_available", lambda *_: None)
    problem = Problem(2, 9, 4, 2, 16, causal=True)
    qkv = problem.qkv(torch.bfloat16, 0).detach().cpu()
    want = problem.attend(qkv, implementation="sdpa", key_mask=None)
    got = problem.attend(qkv, implementation="flash_attn", key_mask=None)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-2)
    k, v = (torch.randn(2, 2, 5, 16).bfloat16() for _ in range(2))
    options = {"update_cache": lambda *new: tuple(torch.cat(p, dim=2) for p in zip((k, v), new, strict=True))}
    got, want = (problem.attend(qkv, implementation=name, **options) for name in ("flash_attn", "sdpa"))
    torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-2)
    with pytest.raises(ValueError, match="'flash_attn' takes no mask but causal"):
        padded = torch.ones(2, 9, dtype=torch.bool)
        problem.attend(qkv, implementation="flash_attn", key_mask=padded)
    with pytest.raises(ValueError, match="'flash_attn' expects float16 or bfloat16, got torch.float32"):
        problem.attend(qkv.float(), implementation="flash_attn")


@compiles
@pytest.mark.parametrize("implementation", ("auto", "sdpa"))
def test_candidates_pass_through_torch_compile(implementation):
    problem = Problem(2, 9, 4, 2, 16, causal=True, padding="left")

    def attend(qkv):
        return problem.attend(qkv, implementation=implementation)

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    inputs = [problem.qkv(torch.float32, 0)]
    for got, want in zip(run(compiled, inputs), run(attend, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# Which implementation, and how many kernels


def launches(arch: str, problem: Problem, with_gradient: bool = False, **options) -> list[str]:
    width = (problem.H + 2 * problem.G) * problem.K
    qkv = torch.empty(problem.B, problem.T, width, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with record(arch) as kept:
        o = rope_attention(qkv, None, problem.H, problem.G, causal=problem.causal, **options)
        if with_gradient:
            torch.autograd.grad(o, qkv, torch.empty_like(o))
    return [call.kernel.fn.__name__.strip("_").removesuffix("_kernel") for call in kept]


FWD, DQ, DKV, TILE = (f"rope_attention_{part}" for part in ("fwd", "bwd_dq", "bwd_dkv", "bwd_tile"))
PUZZLE, LONG = Problem(8, 97, 8, 8, 64), Problem(2, 916, 8, 8, 64)
WIDE = Problem(1, 2048, 16, 16, 128, causal=True)


@pytest.mark.parametrize(
    ("arch", "problem", "expected"),
    [
        ("sm90", PUZZLE, [FWD, TILE]),
        ("sm90", replace(PUZZLE, G=4), [FWD, "rope_fwd", DQ, DKV]),
        ("sm80", PUZZLE, [FWD, "rope_fwd", DQ, DKV]),
        ("sm80", LONG, [FWD, "rope_fwd", DQ, DKV]),
        ("sm90", LONG, ["rope_fwd", "rope_fwd"]),  # SDPA between them
        ("sm89", WIDE, ["rope_fwd", "rope_fwd"]),
    ],
    ids=str,
)
def test_auto_goes_by_the_table(arch, problem, expected):
    assert launches(arch, problem, with_gradient=True) == expected
    mask = torch.empty(1, 1, problem.T, problem.T, dtype=torch.bool, device="meta")
    assert launches(arch, problem, mask=mask) == ["rope_fwd"]


def test_auto_on_the_cpu_is_sdpa_where_that_is_right_and_no_kernel_in_float64():
    """SDPA errs on a CPU under a floating mask of the least number; backend("reference") is the reference."""
    problem = Problem(1, 5, 2, 1, 16)
    qkv = problem.qkv(torch.float32, 0).detach().cpu()
    visible = torch.ones(5, 5, dtype=torch.bool).tril()
    for mask, expected in ((None, "sdpa"), (visible, "sdpa"), (visible.float().log(), "reference")):
        by_name = {
            name: problem.attend(qkv, mask=mask, implementation=name) for name in ("reference", "sdpa")
        }
        assert not torch.equal(*by_name.values()), "nothing would be shown"
        assert torch.equal(problem.attend(qkv, mask=mask), by_name[expected])
        with backend("reference"):
            assert torch.equal(problem.attend(qkv, mask=mask), by_name["reference"])
    with record("sm90") as kept:
        rope_attention(qkv.double().to("meta"), None, 2, 1)
    assert not kept


@pytest.mark.parametrize("name", ("sdpa", "triton"))
def test_what_was_asked_for_is_had(name):
    kernels = launches("sm90", PUZZLE, implementation=name)
    assert kernels == (["rope_fwd"] if name == "sdpa" else [FWD])
    assert launches("sm90", LONG, implementation="reference") == []


def test_decoding_takes_the_kernel_for_one_query():
    S = 2048
    new = torch.empty(1, 4, S, 64, dtype=torch.bfloat16, device="meta")
    problem = Problem(1, 1, 8, 4, 64, causal=True)
    with torch.no_grad():
        kernels = launches("sm90", problem, update_cache=lambda k, v: (new, new))
    assert kernels == ["rope_fwd", "decode_attention_fwd", "decode_attention_merge"]


@compiles
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_triton_without_a_device_says_why():
    with pytest.raises(RuntimeError, match="rope_attention: Triton cannot run here: PyTorch finds no CUDA"):
        rope_attention(torch.zeros(1, 2, 48), None, 1, implementation="triton")


QKV = torch.zeros(2, 3, 64)
SEEN = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("qkv", "options", "kind", "says"),
    [
        (QKV[0], {}, ValueError, r"expected floating qkv \[B, T, \(H \+ 2G\) K\] .* got \(3, 64\)"),
        (QKV.int(), {}, ValueError, "expected floating qkv .* of torch.int32"),
        (QKV[..., :60], {}, ValueError, "RoPE expected an even head width K, got 15"),
        (QKV, {"key_mask": SEEN[:, :2]}, ValueError, r"key_mask \[2, 3\], one entry a key, got \(2, 2\)"),
        (QKV, {"key_mask": SEEN[:1]}, ValueError, r"key_mask \[2, S\] of bool, got \(1, 3\) of torch.bool"),
        (QKV, {"key_mask": SEEN.float()}, ValueError, "of bool, got .* torch.float32"),
        (QKV, {"key_mask": SEEN, "mask": SEEN}, ValueError, "expected mask or key_mask, got both"),
        (QKV, {"key_mask": SEEN.to("meta")}, ValueError, "expected all tensors on cpu, .* got meta"),
        (QKV, {"positions": SEEN.int().to("meta")}, ValueError, "expected all tensors on cpu, .* got meta"),
        (QKV[..., :0], {}, ValueError, r"and K > 0, got \(2, 3, 0\)"),
        (QKV, {"implementation": "fast"}, ValueError, "one of auto, triton, sdpa, .* reference, got 'fast'"),
        (QKV, {"implementation": "triton", "mask": SEEN[:1]}, ValueError, r"got a mask \(1, 3\); 'sdpa' and"),
        (QKV, {"implementation": "sdpa_flash", "key_mask": SEEN}, ValueError, "takes no mask but causal"),
        (QKV, {"implementation": "flash_attn"}, RuntimeError, "needs the package flash-attn"),
        (QKV, {"implementation": "sdpa_cudnn"}, RuntimeError, "expects CUDA tensors, got cpu"),
        (QKV, {"angles": rope_angles(torch.zeros(1, 2), 16, 1e4)}, ValueError, r"angles \[2 or 1, 3, K/2\]"),
        (QKV, {"positions": torch.zeros(1, 2)}, ValueError, r"angles \[2 or 1, 3, K/2\]"),
    ],
)
def test_errors_say_what_was_expected(qkv, options, kind, says):
    if options.get("implementation") == "flash_attn" and library_attention._flash_attn_module():
        pytest.skip("flash-attn is installed")
    options = {"positions": None} | options
    with pytest.raises(kind, match=f"^rope_attention: .*{says}"):
        rope_attention(qkv, num_heads=2, num_key_value_heads=1, **options)


def test_a_head_without_settings_is_named():
    wide = replace(PUZZLE, K=256)
    assert launches("sm90", wide) == ["rope_fwd"]
    with pytest.raises(ValueError, match="rope_attention_fwd: expected a head width of at most 128, got 256"):
        launches("sm90", wide, implementation="triton")


@pytest.mark.kernels
def test_float64_has_no_kernel():
    qkv = torch.zeros(1, 2, 48, dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match="rope_attention: .* no Triton kernel for float64"):
        rope_attention(qkv, None, 1, implementation="triton")
    with backend("triton"), pytest.raises(RuntimeError, match="no Triton kernel for float64"):
        rope_attention(qkv, None, 1)


# RoPE by itself


def test_rope_is_a_rotation_of_complex_numbers():
    g = torch.Generator().manual_seed(0)
    u, positions = torch.randn(2, 5, 3, 8, generator=g).double(), torch.randint(0, 99, (2, 5), generator=g)
    turn = torch.polar(torch.tensor(1.0).double(), torch.tensor(0.0).double())
    for b, t, n, j in itertools.product(range(2), range(5), range(3), range(4)):
        angle = positions[b, t].double() * 10000.0 ** (-2 * j / 8)
        turn = torch.polar(torch.ones_like(angle), angle)
        want = torch.complex(u[b, t, n, j], u[b, t, n, j + 4]) * turn
        got = rope_ref(u, rope_angles(positions, 8, 10000.0))[b, t, n]
        torch.testing.assert_close(torch.complex(got[j], got[j + 4]), want, rtol=1e-4, atol=1e-4)


@pytest.mark.kernels
@EACH_DTYPE
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 7, 3, 16), (1, 33, 5, 40), (2, 3, 2, 200)], ids=str)
def test_rope_equals_its_reference(shape, dtype):
    B, T, _, K = shape
    g = torch.Generator().manual_seed(0)
    u = torch.randn(shape, generator=g).to(DEVICE, dtype)
    positions = torch.randint(0, 5000, (B, T), generator=g).to(DEVICE)
    for where in (positions, positions[:1]):
        angles = rope_angles(where, K, 10000.0)
        for view in (u, u.transpose(1, 2).contiguous().transpose(1, 2), u.mT.contiguous().mT):
            view = view.detach().requires_grad_()
            want = run(lambda u, angles=angles: rope_ref(u, angles), [view])
            with backend("triton"):
                got = run(lambda u, angles=angles: rope(u, angles), [view])
            for a, b in zip(got, want, strict=True):
                # one rounding of a fused multiply-add, or of a half-way case, apart
                torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_rope_refuses():
    angles = rope_angles(torch.zeros(1, 3), 4, 1e4)
    with pytest.raises(ValueError, match=r"rope: expected floating u \[B, T, N, K\], got \(2, 3\)"):
        rope(torch.zeros(2, 3), angles)
    with pytest.raises(ValueError, match=r"rope: expected floating u .* of torch.int32"):
        rope(torch.zeros(2, 3, 1, 4).int(), angles)
    with pytest.raises(ValueError, match="rope: expected angles on meta, where u is, got cpu"):
        rope(torch.zeros(2, 3, 1, 4, device="meta"), angles)
    wide = torch.zeros(2, 3, 1, 1024, device="meta")
    with record("sm90"), pytest.raises(ValueError, match="rope: expected a last axis of at most 512"):
        rope(wide, rope_angles(torch.zeros(1, 3, device="meta"), 1024, 1e4))
    with pytest.raises(ValueError, match=r"rope: expected float32 angles \[2 or 1, 3, K/2\]"):
        rope(torch.zeros(2, 3, 1, 4), rope_angles(torch.zeros(1, 4), 4, 1e4))
