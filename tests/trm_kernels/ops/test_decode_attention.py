"""decode_attention: kernels against the reference in float64; which keys count; parts and their merging."""

import pytest
import torch

from trm_kernels.ops.attention.decode_attention import decode_attention, decode_attention_ref
from trm_kernels.runtime import tuning
from trm_kernels.runtime.backend import backend, interpreting
from trm_kernels.runtime.launch import record

DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
compiles = pytest.mark.skipif(interpreting(), reason="the interpreter does not compile")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOOR = {torch.float32: 2e-7, torch.float16: 1e-5, torch.bfloat16: 1e-4}  # summing in another order
if interpreting():  # by the host's BLAS: 3.9e-7 where eager had 1.7e-7, by OpenBLAS on an AMD EPYC
    FLOOR[torch.float32] = 3e-7
# B, H, G, S, K: one key; a part; parts; more than a merge takes at once; more heads than one program takes
SHAPES = ((1, 1, 1, 1, 16), (3, 4, 2, 33, 40), (2, 2, 1, 600, 64), (1, 1, 1, 4500, 16), (1, 20, 1, 70, 128))


def inputs(shape, dtype, seed=0):
    B, H, G, S, K = shape
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(size, generator=g) for size in ((B, H, K), (B, G, S, K), (B, G, S, K)))
    return [t.to(DEVICE, dtype) for t in (q, k, v)]


def visible(kind, B, S):
    if kind == "all":
        return {}
    starts = torch.arange(B, device=DEVICE) * 7 % S
    if kind == "starts and ends":
        return {"starts": starts, "ends": (S - torch.arange(B, device=DEVICE)).int()}
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, S // 2] = True
    return {"key_mask": mask.to(DEVICE)}


def error(got, true):
    return ((got.double() - true).norm() / true.norm()).item()


@pytest.mark.kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kind", ("all", "starts and ends", "pattern"))
def test_as_close_to_the_truth_as_eager(shape, dtype, kind):
    qkv, options = inputs(shape, dtype), visible(kind, shape[0], shape[3])
    true = decode_attention_ref(*(t.double() for t in qkv), **options)
    eager = decode_attention_ref(*qkv, **options)
    with backend("triton"):
        ours, again = decode_attention(*qkv, **options), decode_attention(*qkv, **options)
    assert ours.dtype == dtype and ours.shape == true.shape
    assert torch.equal(ours, again)
    assert error(ours, true) <= 1.1 * error(eager, true) + FLOOR[dtype]


@pytest.mark.kernels
def test_a_row_does_not_depend_on_its_batch():
    qkv = inputs((4, 4, 2, 600, 16), torch.float32)
    with backend("triton"):
        together, alone = decode_attention(*qkv), decode_attention(*(t[2:3] for t in qkv))
    assert torch.equal(together[2:3], alone)


@pytest.mark.kernels
def test_a_part_with_one_key_counts():
    """Whether parts have 64 keys, 128 or up to 1,024: one of the rows ends with a part of one key."""
    q, k, v = inputs((5, 2, 1, 1025, 16), torch.float32)
    options = {"ends": torch.tensor([65, 129, 257, 513, 1025], device=DEVICE)}
    true = decode_attention_ref(q.double(), k.double(), v.double(), **options)
    with backend("triton"):
        ours = decode_attention(q, k, v, **options)
    for row in range(5):
        assert error(ours[row], true[row]) <= 1e-5, row


@pytest.mark.kernels
def test_a_row_that_sees_nothing_is_zero():
    """No key, no key that counts, in one part and in several; no rows at all."""
    with backend("triton"):
        for S in (0, 33, 600):
            q, k, v = inputs((3, 2, 1, S, 16), torch.float32)
            ends = torch.tensor([0, S, min(S, 5)], device=DEVICE)
            o = decode_attention(q, k, v, starts=torch.tensor([0, S, 0], device=DEVICE), ends=ends)
            assert (o[:2] == 0).all() and (o[2] != 0).any() == (S > 0)
        assert decode_attention(q[:0], k[:0], v[:0]).shape == (0, 2, 16)


@pytest.mark.kernels
@pytest.mark.skipif(not interpreting(), reason="reads a sparse file, which a GPU cannot")
@pytest.mark.parametrize("axis", (0, 1, 2))
def test_offsets_beyond_31_bits(axis, tmp_path):
    """Rows, groups or keys 2^30 elements apart: the third starts where 32 bits would turn negative."""
    stride = 2**30
    storage = torch.from_file(
        str(tmp_path / "sparse"), shared=True, size=2 * stride + 16, dtype=torch.float16
    )
    sizes = [1, 1, 1]
    sizes[axis] = 3
    B, G, S = sizes
    q, near, _ = inputs((B, G, G, S, 16), torch.float16)
    far = storage.as_strided(near.shape, (stride, stride, stride, 1)).copy_(near)
    with backend("triton"):
        assert torch.equal(decode_attention(q, far, far), decode_attention(q, near, near))


@pytest.mark.kernels
def test_free_slots_may_hold_anything():
    q, k, v = inputs((2, 2, 2, 300, 16), torch.float32)
    ends = torch.tensor([40, 290], device=DEVICE)
    with backend("triton"):
        want = decode_attention(q, k, v, ends=ends)
        for t in (k, v):
            t[0, :, 40:], t[1, :, 290:] = torch.nan, torch.nan
        assert torch.equal(decode_attention(q, k, v, ends=ends), want)


@pytest.mark.kernels
def test_views_give_what_their_copies_give():
    q, k, v = inputs((2, 4, 2, 33, 16), torch.float32)
    wide = torch.full((2, 33, 2, 40), torch.nan, device=DEVICE)
    wide[..., 3:19], wide[..., 20:36] = k.transpose(1, 2), v.transpose(1, 2)
    apart = wide[..., 3:19].transpose(1, 2), wide[..., 20:36].transpose(1, 2)
    with backend("triton"):
        assert torch.equal(decode_attention(q.mT.contiguous().mT, *apart), decode_attention(q, k, v))


@pytest.mark.kernels
def test_a_gradient_comes_from_the_reference_or_is_an_error():
    qkv = [t.requires_grad_() for t in inputs((1, 2, 1, 9, 16), torch.float32)]
    assert torch.autograd.grad(decode_attention(*qkv).sum(), qkv)[0].shape == (1, 2, 16)
    with backend("triton"), pytest.raises(RuntimeError, match="decode_attention: .*gradient"):
        decode_attention(*qkv)


def test_reference_equals_one_softmax_a_head():
    (q, k, v), S = inputs((2, 4, 2, 9, 8), torch.float32), 9
    q, k, v = q.double(), k.double(), v.double()
    got = decode_attention_ref(q, k, v, starts=torch.tensor([0, 2], device=DEVICE))
    for b, first in ((0, 0), (1, 2)):
        for h in range(4):
            p = (k[b, h // 2, first:S] @ q[b, h] / 8**0.5).softmax(0)
            torch.testing.assert_close(got[b, h], p @ v[b, h // 2, first:S])
    assert torch.autograd.gradcheck(decode_attention_ref, [t.requires_grad_() for t in (q, k, v)])


ZEROS = torch.zeros(2, 4, 8), torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": torch.zeros(2, 3, 8)}, r"H a multiple of G, got \(2, 3, 8\)"),
        ({"q": torch.zeros(2, 4, 1, 8)}, r"q \[B, H, K\] .* got \(2, 4, 1, 8\)"),
        ({"k": torch.zeros(2, 2, 4, 8)}, r"got \(2, 4, 8\), \(2, 2, 4, 8\) and \(2, 2, 3, 8\)"),
        ({"v": ZEROS[2].half()}, "one floating dtype, got torch.float32, torch.float32 and torch.float16"),
        ({"starts": torch.zeros(3).int()}, r"starts \[2\] of int32 or int64, got \(3,\) of torch.int32"),
        ({"ends": torch.zeros(2)}, r"ends \[2\] of int32 or int64, got \(2,\) of torch.float32"),
        ({"key_mask": torch.zeros(2, 4).bool()}, r"key_mask \[2, 3\] of bool, got \(2, 4\)"),
        ({"ends": torch.zeros(2, device="meta").int()}, "on cpu, where q is, got meta"),
        ({name: t[..., :0] for name, t in zip("qkv", ZEROS, strict=True)}, r"got \(2, 4, 0\)"),
        (
            {name: t.int() for name, t in zip("qkv", ZEROS, strict=True)},
            "floating dtype, got torch.int32",
        ),
    ],
)
def test_errors_say_what_was_expected(change, says):
    with pytest.raises(ValueError, match=f"^decode_attention: expected .*{says}"):
        decode_attention(**(dict(zip("qkv", ZEROS, strict=True)) | change))


def launches(arch, S, dtype=torch.bfloat16, H=8, G=2, K=64, padded=True):
    q = torch.empty(4, H, K, dtype=dtype, device="meta")
    k = torch.empty(4, G, S, K, dtype=dtype, device="meta")
    row = torch.empty(4, dtype=torch.int64, device="meta") if padded else None
    mask = torch.empty(4, S, dtype=torch.bool, device="meta") if padded else None
    with record(arch) as kept:
        decode_attention(q, k, k, row, row, mask)
    return kept


def test_the_parts_are_merged_by_a_second_launch():
    keys = tuning.lookup_decode("sm90", 64, 2).keys
    assert len(launches("sm90", keys)) == 1
    assert [call.grid for call in launches("sm90", 2 * keys + 1)] == [(4 * 2 * 3,), (4 * 8,)]
    with pytest.raises(ValueError, match="decode_attention: expected a head width of at most 128, got 256"):
        launches("sm90", 9, K=256)
