"""The recursion: against a loop written here in float64, against finite differences, and its contract."""

import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trm_kernels import TRM, Halting, injection_blend, injection_in, trm_recursion
from trm_kernels.modules.layers import default_intermediate_size
from trm_kernels.runtime.backend import backend


def make(dtype=torch.float64, **changes):
    fields = {
        "hidden_size": 24,
        "num_heads": 6,
        "num_layers": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 20,
        "num_recursion_steps": 3,
        "num_cycles": 2,
        "grad_cycles": None,
    }
    torch.manual_seed(0)
    return TRM(**(fields | changes), dtype=dtype)


# An independent float64 loop: one token, one head, one scalar product at a time; no call into the project


def loop_rms(v, eps):
    return v / math.sqrt(sum(float(a) ** 2 for a in v) / len(v) + eps)


def loop_rope(u, position, theta):
    half = len(u) // 2
    out = u.clone()
    for j in range(half):
        angle = position * theta ** (-2 * j / len(u))
        out[j] = u[j] * math.cos(angle) - u[j + half] * math.sin(angle)
        out[j + half] = u[j + half] * math.cos(angle) + u[j] * math.sin(angle)
    return out


def loop_attention(v, w, heads, groups, causal, theta, keep):
    tokens, width = v.shape
    size = width // heads
    qkv = v @ w["self_attn.qkv_proj.weight"].T
    heads_of = qkv.view(tokens, -1, size)  # [token, head, size]: queries, then keys, then values
    out = torch.zeros_like(v)
    for t in range(tokens):
        for h in range(heads):
            g = h // (heads // groups)
            seen = [s for s in range(tokens) if keep[s] and (s <= t or not causal)]
            place = (lambda u, s: loop_rope(u, s, theta)) if theta else (lambda u, s: u)
            q = place(heads_of[t, h], t)
            scores = [float(q @ place(heads_of[s, heads + g], s)) / math.sqrt(size) for s in seen]
            weights = [math.exp(a - max(scores)) for a in scores]
            for a, s in zip(weights, seen, strict=True):
                out[t, h * size : (h + 1) * size] += a / sum(weights) * heads_of[s, heads + groups + g]
    return out @ w["self_attn.o_proj.weight"].T


def loop_swiglu(v, gate_up, down):
    gate, up = (v @ gate_up.T).chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up) @ down.T


def loop_f(trm, v, keep):
    weights = trm.state_dict()
    for i in range(len(trm.layers)):
        w = {name.removeprefix(f"layers.{i}."): t for name, t in weights.items()}
        if trm.seq_len is not None:
            mixed = loop_swiglu(v.T, w["mlp_t.gate_up_proj.weight"], w["mlp_t.down_proj.weight"])
            v = torch.stack([loop_rms(row, trm.eps) for row in v.T + mixed]).T
        else:
            a = loop_attention(v, w, trm.num_heads, trm.num_key_value_heads, trm.causal, trm.rope_theta, keep)
            v = torch.stack([loop_rms(row, trm.eps) for row in v + a])
        m = loop_swiglu(v, w["mlp.gate_up_proj.weight"], w["mlp.down_proj.weight"])
        v = torch.stack([loop_rms(row, trm.eps) for row in v + m])
    return v


def loop_recursion(trm, x, y, z, n, keep):
    for _ in range(trm.num_cycles):
        for _ in range(n):
            z = loop_f(trm, z + y + x, keep)
        y = loop_f(trm, y + z, keep)
    return y, z


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="classic"),
        pytest.param({"causal": True}, id="causal"),
        pytest.param({"rope_theta": None}, id="no-rope"),
        pytest.param({"rope_theta": 100.0, "eps": 0.1}, id="theta-and-eps"),
        pytest.param({"mlp_t": True, "seq_len": 5}, id="mlp_t"),
        pytest.param({"num_key_value_heads": None, "num_layers": 1, "num_cycles": 1}, id="no-gqa"),
    ],
)
@torch.no_grad()
def test_equals_an_independent_loop(changes):
    trm = make(**changes)
    x, y, z = torch.randn(3, 2, 5, 24, dtype=torch.float64)
    got = trm(x, y, z, num_recursion_steps=2)
    for b in range(2):
        want = loop_recursion(trm, x[b], y[b], z[b], 2, [True] * 5)
        for ours, theirs in zip(got, want, strict=True):
            # RoPE's angles are float32 in the model (design: float32), so not 1e-12
            torch.testing.assert_close(ours[b], theirs, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_starts_from_the_learned_vectors_and_masks_padding():
    trm = make(causal=True)
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    keep = torch.tensor([False, False, True, True, True])
    mask = torch.ones(5, 5, dtype=torch.bool).tril() & keep
    y, z = trm(x, mask=mask[None, None])
    # the loop over the kept tokens alone: RoPE is relative, so where they start does not matter
    want = loop_recursion(trm, x[0, 2:], trm.y_init.expand(3, -1), trm.z_init.expand(3, -1), 3, [True] * 3)
    torch.testing.assert_close(y[0, 2:], want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z[0, 2:], want[1], rtol=1e-5, atol=1e-6)


def test_gradients_equal_finite_differences():
    trm = make(hidden_size=8, num_heads=2, num_key_value_heads=1, intermediate_size=6, causal=True)
    x, y, z = (torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    names, weights = zip(*trm.named_parameters(), strict=True)

    def run(x, y, z, *weights):
        return torch.func.functional_call(trm, dict(zip(names, weights, strict=True)), (x, y, z))

    # angles are float32, and so are the cosines' rounding steps; differences of 1e-6 do not see them
    assert torch.autograd.gradcheck(run, (x, y, z, *weights), fast_mode=True)

    def initial(*weights):
        return torch.func.functional_call(trm, dict(zip(names, weights, strict=True)), (x.detach(),))

    assert torch.autograd.gradcheck(initial, weights, fast_mode=True)


@pytest.mark.parametrize("gated", [False, True])
def test_injection_ops_equal_their_formulas_and_finite_differences(gated):
    torch.manual_seed(0)
    h, y = torch.randn(2, 3, 10, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    w_in, w_out = torch.randn(4, 10, dtype=torch.float64), torch.randn(10, 4, dtype=torch.float64)
    gate = (torch.randn(1, 4, dtype=torch.float64), torch.randn(1, dtype=torch.float64)) if gated else ()
    size = torch.sqrt((h * h).mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(injection_in(h, w_in), (h / size) @ w_in.T)
    share = 1 / (1 + torch.exp(-(y @ gate[0].T + gate[1]))) if gated else 1.0
    torch.testing.assert_close(injection_blend(h, y, w_out, 0.7, *gate), h + 0.7 * share * (y @ w_out.T))
    inputs = [t.requires_grad_() for t in (h, y, w_out, *gate)]
    assert torch.autograd.gradcheck(lambda h, y, w, *g: injection_blend(h, y, w, 0.7, *g), inputs)
    assert torch.autograd.gradcheck(injection_in, (h, w_in.requires_grad_()))


def test_only_the_last_grad_cycles_pass_gradients():
    """Three cycles with gradient through the last equal two without any, then one with all."""
    x = torch.randn(1, 4, 24, dtype=torch.float64)

    def gradients(trm, *state):
        y, z = trm(x, *state)
        (y.square().sum() + z.sum()).backward()
        return [p.grad for p in trm.layers.parameters()]

    two, one = make(num_cycles=2), make(num_cycles=1)
    with torch.no_grad():
        y, z = two(x)
    got = gradients(make(num_cycles=3, grad_cycles=1))
    for a, b in zip(got, gradients(one, y, z), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    everything = gradients(make(num_cycles=3, grad_cycles=None))
    assert not torch.allclose(got[0], everything[0])
    some = gradients(make(num_cycles=3, grad_cycles=2))
    assert not torch.allclose(some[0], everything[0]) and not torch.allclose(some[0], got[0])


def test_carried_state_goes_on():
    """Two calls of one cycle are one call of two: `y` and `z` carry everything."""
    x = torch.randn(1, 4, 24, dtype=torch.float64)
    once = make(num_cycles=2)(x)
    again = make(num_cycles=1)(x, *make(num_cycles=1)(x))
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


class DtypesSeen(TorchDispatchMode):
    """The dtypes in which PyTorch was asked for norms' roots and for softmaxes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket in (torch.ops.aten.rsqrt, torch.ops.aten._softmax, torch.ops.aten.sigmoid):
            self.seen.add((op.overloadpacket.__name__, args[0].dtype))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_norms_and_softmax_are_float32(dtype):
    trm, wide = make(torch.float32), torch.float32
    with backend("reference"), DtypesSeen() as dtypes:  # in the open, where SDPA is one op
        y, z = trm(injection_in(torch.randn(1, 4, 10, dtype=dtype), torch.randn(24, 10, dtype=dtype)))
        gate = (torch.randn(1, 24, dtype=dtype), torch.randn(1, dtype=dtype))
        h = injection_blend(
            torch.randn(1, 4, 10, dtype=dtype), y, torch.randn(10, 24, dtype=dtype), 1.0, *gate
        )
    assert dtypes.seen == {("rsqrt", wide), ("_softmax", wide), ("sigmoid", wide)}
    assert y.dtype == z.dtype == h.dtype == dtype


def test_rows_whose_squares_overflow_float16():
    x = torch.randn(1, 4, 24) * 600
    h = injection_in(x.half(), torch.eye(24).half())
    torch.testing.assert_close(h.float(), injection_in(x, torch.eye(24)), rtol=2e-3, atol=1e-4)


def test_weights_stay_float32_while_it_computes_in_bfloat16():
    trm = make(torch.float32)
    y, _ = trm(torch.randn(1, 4, 24, dtype=torch.bfloat16))
    y.float().sum().backward()
    assert {p.dtype for p in trm.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in trm.parameters()} == {torch.float32}


def test_names_are_the_papers():
    names = set(make(num_layers=1).state_dict())
    assert names == {
        "layers.0.self_attn.qkv_proj.weight",
        "layers.0.self_attn.o_proj.weight",
        "layers.0.mlp.gate_up_proj.weight",
        "layers.0.mlp.down_proj.weight",
        "y_init",
        "z_init",
    }
    assert "layers.0.mlp_t.gate_up_proj.weight" in make(mlp_t=True, seq_len=5).state_dict()
    # TRM's own sizes: d 512 has an inner width of 1536; 97 tokens have 512
    assert (default_intermediate_size(512), default_intermediate_size(97)) == (1536, 512)


@pytest.mark.parametrize("prefix", ["", "inner.", "model.inner.", "_orig_mod.model.inner."])
def test_loads_the_papers_state_dict(prefix):
    source, target = make(torch.float32), make(torch.float32)
    with torch.no_grad():
        for p in source.parameters():
            p.add_(1.0)
    renamed = {"y_init": "H_init", "z_init": "L_init"}
    theirs = {prefix + renamed.get(n, f"L_level.{n}"): t for n, t in source.state_dict().items()}
    heads = [prefix + name for name in ("embed_tokens.embedding_weight", "lm_head.weight", "q_head.bias")]
    left_alone = target.load_reference_state_dict(theirs | {name: torch.zeros(3) for name in heads})
    assert left_alone == sorted(heads)
    for (name, a), b in zip(source.state_dict().items(), target.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_reference_state_dict_that_does_not_fit_changes_nothing():
    trm = make(torch.float32)
    theirs = {f"L_level.{n}": t + 1 for n, t in trm.state_dict().items() if n.startswith("layers")}
    before = {n: t.clone() for n, t in trm.state_dict().items()}
    with pytest.raises(ValueError, match=r"y_init: expected \(24,\), got no such tensor|z_init: expected"):
        trm.load_reference_state_dict(theirs)
    theirs |= {"H_init": torch.zeros(24), "L_init": torch.zeros(25)}
    with pytest.raises(ValueError, match=r"z_init: expected \(24,\), got \(25,\)"):
        trm.load_reference_state_dict(theirs)
    assert all(torch.equal(t, before[n]) for n, t in trm.state_dict().items())


def test_a_cache_of_every_evaluation_equals_full_recomputation():
    trm = make(causal=True)
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    whole, _ = trm(x)
    slabs = {}

    def update(evaluation, k, v):
        old = slabs.get(evaluation)
        slabs[evaluation] = (
            (k, v) if old is None else tuple(torch.cat(p, dim=2) for p in zip(old, (k, v), strict=True))
        )
        return slabs[evaluation]

    parts = [
        trm(x[:, a:b], positions=torch.arange(a, b)[None], update_cache=update)[0]
        for a, b in ((0, 3), (3, 4), (4, 6))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-6, atol=1e-7)
    assert len(slabs) == trm.evaluations() == 2 * (3 + 1) * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 25}, "hidden_size to be a multiple of num_heads, got 25 and 6"),
        ({"num_key_value_heads": 4}, "num_heads to be a multiple of num_key_value_heads, got 6 and 4"),
        ({"num_layers": 0}, "num_layers of at least 1, got 0"),
        ({"hidden_size": 18}, "even head width, got 3"),
        ({"mlp_t": True}, "mlp_t and seq_len together"),
        ({"mlp_t": True, "seq_len": 5, "causal": True}, "without causal"),
        ({"mlp_t": True, "seq_len": 0}, "seq_len of at least 1 or None, got 0"),
        ({"intermediate_size": 0}, "intermediate_size of at least 1 or None, got 0"),
        ({"rope_theta": 0}, "rope_theta above 0 and finite or None, got 0"),
        ({"eps": -1.0}, "eps of at least 0 and finite, got -1.0"),
        ({"eps": "1e-5"}, "eps of at least 0 and finite, got '1e-5'"),
        ({"intermediate_size": 20.0}, r"intermediate_size of at least 1 or None, got 20\.0"),
        ({"eps": math.nan}, "eps of at least 0 and finite, got nan"),
    ],
)
def test_sizes_that_cannot_be_combined(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_calls_that_do_not_fit():
    trm, x = make(torch.float32), torch.randn(1, 4, 24)
    with pytest.raises(ValueError, match=r"expected x \[B, T, 24\], got \(4, 24\)"):
        trm(x[0])
    with pytest.raises(ValueError, match="one shape"):
        trm(x, x[:, :2], x)
    with pytest.raises(ValueError, match=r"num_recursion_steps and num_cycles of at least 1, got 0 and 2"):
        trm(x, num_recursion_steps=0)
    with pytest.raises(ValueError, match=r"5 tokens \(seq_len, mlp_t\), got 4"):
        make(torch.float32, mlp_t=True, seq_len=5)(x)
    with pytest.raises(ValueError, match=r"grad_cycles in 1\.\.1"):
        make(torch.float32, num_cycles=1, grad_cycles=2)(x)
    with pytest.raises(ValueError, match="at least one layer"):
        trm_recursion(x, x, x, [], num_heads=1, num_recursion_steps=1)
    for wrong, got in ((x.numpy(), "ndarray"), (x.bool(), "torch.bool"), (x.long(), "torch.int64")):
        with pytest.raises(ValueError, match=rf"expected x, a floating tensor \[B, T, 24\], got {got}"):
            trm(wrong)
    with pytest.raises(ValueError, match="expected y, a tensor like x or None, got int"):
        trm(x, 2, 1)
    for call in (trm, partial(trm.requires_grad_(False), halting=Halting(0.1))):
        with pytest.raises(ValueError, match="x's dtype or a narrower one, got torch.float64 and"):
            call(x, x.double(), x)
    for count in (2.0, "2"):
        with pytest.raises(ValueError, match=f"num_cycles of at least 1, got {count} and 2"):
            trm(x, num_recursion_steps=count)
    with pytest.raises(ValueError, match="supervision_steps expected steps of at least 1, got 0"):
        next(trm.supervision_steps(x, 0))
    with pytest.raises(ValueError, match="this TRM's own, which load_state_dict loads"):
        trm.load_reference_state_dict(trm.state_dict())


@torch.no_grad()
def test_a_state_of_autocast_goes_into_a_call_without():
    trm, x = make(torch.float32), torch.randn(1, 4, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y, z = trm(x)
    assert y.dtype == z.dtype == torch.bfloat16
    for more in ({}, {"halting": Halting(0.0)}):
        for got, want in zip(trm(x, y, z, **more), trm(x, y.float(), z.float(), **more), strict=True):
            assert got.dtype == torch.float32 and torch.equal(got, want)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.ones(1, 6, 4, 5), r"a mask of 4 keys or 1, got \(1, 6, 4, 5\)"),
        (torch.ones(1, 6, 3, 4), r"broadcast to \[2, 6, 4, S\], bool or floating, got \(1, 6, 3, 4\)"),
        (torch.ones(3, 1, 1, 4), r"broadcast to \[2, 6, 4, S\]"),
        (torch.ones(1, 1, 1, 1, 4), r"broadcast to \[2, 6, 4, S\]"),
        (torch.ones(4, 4).long(), "got .* of torch.int64"),
    ],
)
def test_masks_that_do_not_fit(given, message):
    with pytest.raises(ValueError, match=message):
        make(torch.float32)(torch.randn(2, 4, 24), mask=given)


def test_what_nothing_reads_is_refused():
    """A mix over all tokens hides none of them, and without halting no token waits."""
    x, mixes = torch.randn(1, 4, 24), make(torch.float32, mlp_t=True, seq_len=4)
    for name, given in (
        ("positions", torch.arange(4)[None]),
        ("mask", torch.ones(4, 4, dtype=torch.bool)),
        ("key_mask", torch.ones(1, 4, dtype=torch.bool)),
        ("update_cache", lambda evaluation, k, v: (k, v)),
    ):
        with pytest.raises(ValueError, match=f"layers with attention for {name}, got mlp_t alone"):
            mixes(x, **{name: given})
    with pytest.raises(ValueError, match="layers with attention for key_mask, got mlp_t alone"):
        list(mixes.each_cycle(x, key_mask=torch.ones(1, 4, dtype=torch.bool)))
    with pytest.raises(ValueError, match="expected halting with is_token, report_steps, got none"):
        make(torch.float32)(x, is_token=torch.ones(1, 4, dtype=torch.bool), report_steps=print)
