"""The fused recursion: against a loop in float64, under every policy, its launches, its bytes, its buffers.

What only counts (launches, bytes) runs on "meta" tensors, which hold no numbers: nobody can wait for one.
"""

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.measure.counting import Counting, nbytes, storages_kept
from tests.trm_kernels.ops.test_ops import error, rms
from trm_kernels import TRM, trm_recursion
from trm_kernels.ops.attention import flash
from trm_kernels.recursion.fused_layer import Setting
from trm_kernels.recursion.fused_recursion import recursion_forward
from trm_kernels.recursion.saved_bytes import SAVES, saved_bytes
from trm_kernels.recursion.spec import RecursionSpec
from trm_kernels.recursion.weights import map_weights
from trm_kernels.runtime import tuning
from trm_kernels.runtime.backend import backend, interpreting
from trm_kernels.runtime.gemm_common import add_weight_gradient
from trm_kernels.runtime.launch import record

DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
without_interpreter = pytest.mark.skipif(interpreting(), reason="counts only, which needs no interpreter")


# A loop of its own: matrices in float64, no call into the project


def plain_rms(v: Tensor) -> Tensor:
    return v / (v.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def plain_swiglu(v: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    g, u = (v @ gate_up.T).chunk(2, dim=-1)
    return (g / (1 + (-g).exp()) * u) @ down.T


def plain_turn(u: Tensor) -> Tensor:
    """RoPE on [B, T, heads, K], by complex numbers."""
    T, K = u.shape[1], u.shape[3]
    speed = 10000.0 ** (-torch.arange(0, K, 2, device=u.device, dtype=torch.float64) / K)
    # the model's angles are float32
    angle = (torch.arange(T, device=u.device)[:, None] * speed.float()).double()
    turned = torch.complex(*u.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def plain_attention(v: Tensor, qkv: Tensor, o: Tensor, H: int, G: int, visible: Tensor) -> Tensor:
    B, T, D = v.shape
    q, k, value = (v @ qkv.T).view(B, T, H + 2 * G, D // H).split((H, G, G), dim=2)
    q, k = plain_turn(q), plain_turn(k)
    k, value = (t.repeat_interleave(H // G, dim=2) for t in (k, value))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(D // H)
    p = scores.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num()
    return torch.einsum("bhts,bshk->bthk", p, value).reshape(B, T, D) @ o.T


def plain_recursion(trm: TRM, x, y, z, weights, key_mask=None):
    """(y, z); weights are those of trm, four a layer, in its order."""
    T = x.shape[1]
    visible = torch.ones(T, T, dtype=torch.bool, device=x.device)
    visible = visible.tril() if trm.causal else visible
    visible = visible if key_mask is None else visible & key_mask[:, None, None, :]

    def f(v):
        for i in range(len(trm.layers)):
            first, second, gate_up, down = weights[4 * i : 4 * i + 4]
            if trm.seq_len is not None:
                v = v.transpose(1, 2)
                v = plain_rms(v + plain_swiglu(v, first, second)).transpose(1, 2)
            else:
                heads = trm.num_heads, trm.num_key_value_heads
                v = plain_rms(v + plain_attention(v, first, second, *heads, visible))
            v = plain_rms(v + plain_swiglu(v, gate_up, down))
        return v

    with_gradient = trm.num_cycles if trm.grad_cycles is None else trm.grad_cycles
    for cycle in range(trm.num_cycles):
        with torch.set_grad_enabled(cycle >= trm.num_cycles - with_gradient):
            for _ in range(trm.num_recursion_steps):
                z = f(z + y + x)
            y = f(y + z)
    return y, z


def make(dtype=torch.float32, **changes) -> TRM:
    fields = {
        "hidden_size": 64,
        "num_heads": 2,
        "num_layers": 2,
        "intermediate_size": 40,
        "num_recursion_steps": 2,
        "num_cycles": 2,
    }
    torch.manual_seed(0)
    return TRM(**(fields | changes)).to(DEVICE, dtype)


def matrices(trm: TRM) -> list[Tensor]:
    return [p for name, p in trm.named_parameters() if "init" not in name]


def run(trm: TRM, tensors, name="triton", save="all", **call) -> dict[str, Tensor]:
    """Outputs and gradients of x, y, z and every matrix; those that get none are left out."""
    x, y, z, *grads = tensors
    inputs = [t.detach().to(x.dtype).requires_grad_() for t in (x, y, z)]
    trm.save = save
    with backend(name):
        out = trm(*inputs, **call)
        found = torch.autograd.grad(out, [*inputs, *matrices(trm)], grads, allow_unused=True)
    return named(trm, out, found)


def run_plain(trm: TRM, tensors, key_mask=None) -> dict[str, Tensor]:
    """The same by the loop above, in float64."""
    x, y, z, *grads = (t.double() for t in tensors)
    inputs = [t.detach().requires_grad_() for t in (x, y, z)]
    weights = [w.detach().double().requires_grad_() for w in matrices(trm)]
    out = plain_recursion(trm, *inputs, weights, key_mask)
    return named(trm, out, torch.autograd.grad(out, [*inputs, *weights], grads, allow_unused=True))


def named(trm, out, grads):
    of = ["x", "y", "z", *(name for name, _ in trm.named_parameters() if "init" not in name)]
    found = {f"gradient of {name}": t for name, t in zip(of, grads, strict=True) if t is not None}
    return {"y": out[0].detach(), "z": out[1].detach()} | found


def tensors(B, T, D, dtype=torch.float32, seed=0):
    """x, y, z and the gradients of y and z."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, D, generator=g).to(DEVICE, dtype) for _ in range(5)]


def check_float32(trm: TRM, given, key_mask=None, saves=SAVES) -> None:
    key_mask = None if key_mask is None else key_mask.to(DEVICE)
    call = {} if key_mask is None else {"key_mask": key_mask}
    true = run_plain(trm, given, key_mask)
    first, *others = (run(trm, given, save=save, **call) for save in saves)
    for name, want in true.items():
        assert error(first[name], want) <= (5e-5 if "gradient" in name else 1e-5), name
        assert all(torch.equal(first[name], other[name]) for other in others), name
    assert all(found.keys() == true.keys() for found in (first, *others))


PAD = torch.tensor([[False] * 3 + [True] * 4, [True] * 5 + [False] * 2])


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("changes", "key_mask"),
    [
        pytest.param({}, None, id="one-cycle-with-gradient"),
        pytest.param({"grad_cycles": None, "num_recursion_steps": 1}, None, id="all-cycles"),
        pytest.param(
            {"causal": True, "num_heads": 4, "num_key_value_heads": 2, "num_recursion_steps": 1},
            PAD,
            id="causal-groups-padding",
        ),
        pytest.param({"num_cycles": 3, "grad_cycles": 2, "num_layers": 1}, PAD, id="two-of-three-cycles"),
        pytest.param({"mlp_t": True, "seq_len": 7, "grad_cycles": None, "num_cycles": 1}, None, id="mlp_t"),
        pytest.param({"num_layers": 3, "num_recursion_steps": 1, "num_cycles": 1}, None, id="three-layers"),
    ],
)
def test_float32_equals_a_loop_and_the_policies_equal_each_other(changes, key_mask):
    """Of two sequences where they differ, by padding, and where the mixer transposes them; else of one."""
    trm = make(**changes)
    check_float32(trm, tensors(1 if key_mask is None and not trm.seq_len else 2, 7, 64), key_mask)


@pytest.mark.kernels
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("D", "T"), [(64, 13), (64, 97), (128, 13), (128, 97)])
def test_float32_at_full_depth(D, T):
    """42 evaluations of a layer.

    With fresh weights the loop amplifies a rounding: eager's own errors are up to 1.2e-5 and 1.2e-4 then.
    With weights of 0.7 their size they are 5e-7 and 1.3e-6, and the limits mean something.
    """
    trm = make(hidden_size=D, intermediate_size=2 * D, num_recursion_steps=6, num_cycles=3)
    with torch.no_grad():
        for weight in matrices(trm):
            weight *= 0.7
    check_float32(trm, tensors(1, T, D))


@pytest.mark.kernels
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("save", SAVES)
def test_bfloat16_at_full_depth(save):
    trm = make(torch.bfloat16, num_recursion_steps=6, num_cycles=3, grad_cycles=None)
    check_bfloat16(trm, (1, 13, 64), save, seeds=4)


@pytest.mark.kernels
@pytest.mark.parametrize("save", ["step"])
def test_bfloat16_as_close_to_the_truth_as_eager(save):
    check_bfloat16(make(torch.bfloat16, causal=True, num_cycles=1), (1, 7, 64), save, seeds=6)


def check_bfloat16(trm, shape, save, seeds):
    mine, theirs = {}, {}
    for seed in range(seeds):
        given = tensors(*shape, torch.bfloat16, seed)
        true, ours, eager = run_plain(trm, given), run(trm, given, save=save), run(trm, given, "reference")
        for name, want in true.items():
            mine.setdefault(name, []).append(error(ours[name], want))
            theirs.setdefault(name, []).append(error(eager[name], want))
    for name in mine:
        assert rms(mine[name]) <= 1.1 * rms(theirs[name]) + 1e-4, name


@pytest.mark.kernels
def test_gradients_of_one_output_and_of_the_initial_vectors():
    """What a hybrid asks for: the gradient of y alone, from vectors that every token starts with."""
    trm = make(num_cycles=1, num_recursion_steps=1)
    x, *_, dy, _ = tensors(2, 3, 64)

    def gradients(name):
        with backend(name):
            y, _ = trm(x)
            return torch.autograd.grad(y, [trm.y_init, trm.z_init, *matrices(trm)], dy)

    for ours, want in zip(gradients("triton"), gradients("reference"), strict=True):
        assert error(ours, want.double()) <= 5e-5


@pytest.mark.kernels
def test_padding_changes_nothing():
    trm = make(causal=True)
    x, y, z, *_ = tensors(1, 4, 64)
    before = torch.randn(1, 3, 64, device=DEVICE)
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3]], device=DEVICE)
    key_mask = torch.tensor([[False] * 3 + [True] * 4], device=DEVICE)
    with backend("triton"):
        want = trm(x, y, z)
        padded = (torch.cat((before, t), dim=1) for t in (x, y, z))
        got = trm(*padded, positions=positions, key_mask=key_mask)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours[:, 3:], theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.kernels
@torch.no_grad()
def test_with_a_cache_as_without():
    """A prompt and a token more, keys and values kept between them, equal one call over both."""
    trm = make(causal=True, num_heads=4, num_key_value_heads=2)
    x, *_ = tensors(2, 6, 64)
    kept = {}

    def update(evaluation, k, v):
        if evaluation in kept:
            k, v = (torch.cat(pair, dim=2) for pair in zip(kept[evaluation], (k, v), strict=True))
        kept[evaluation] = k, v
        return k, v

    with backend("triton"), watch_fused() as ran:
        prompt = trm(x[:, :5], update_cache=update)
        token = trm(x[:, 5:], positions=torch.tensor([[5]], device=DEVICE), update_cache=update)
    assert ran == ["fused", "fused"]
    want = trm(x)
    for i in range(2):
        got = torch.cat((prompt[i], token[i]), dim=1)
        torch.testing.assert_close(got, want[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("save", ["layer", "step"])
def test_what_is_computed_again_is_not_cached_again(save):
    """A cache that appends would hold every key twice after backward."""
    trm = make(causal=True, save=save)
    x, *_ = tensors(1, 3, 64)
    counts = []

    def update(evaluation, k, v):
        counts.append(evaluation)
        return k, v

    with pytest.raises(ValueError, match=f"expected save 'auto' or 'all' with update_cache .*got '{save}'"):
        trm(x, update_cache=update)
    assert not counts
    with torch.no_grad():
        trm(x, update_cache=update)
    trm.save = "all"
    before = len(counts)
    trm(x, update_cache=update)[0].sum().backward()
    assert len(counts) == 2 * before


@contextmanager
def watch_fused():
    """Names the way each call of trm_recursion takes."""
    from trm_kernels.recursion import recursion

    ran = []
    ways = {
        "fused_recursion": "fused",
        "fused_recursion_with_cache": "fused",
        "trm_recursion_ref": "op by op",
    }
    with pytest.MonkeyPatch.context() as patch:
        for function, way in ways.items():

            def watched(*args, original=recursion.__dict__[function], way=way):
                ran.append(way)
                return original(*args)

            patch.setattr(recursion, function, watched)
        yield ran


@without_interpreter
def test_gradients_of_frozen_weights_are_not_computed():
    """One product a use of a weight is spent on its gradient, and none on that of a frozen one."""
    pytest.importorskip("triton")
    products = {}
    for is_frozen in (False, True):
        trm = make(num_cycles=1).to("meta").requires_grad_(not is_frozen)
        x = torch.empty(2, 3, 64, device="meta", requires_grad=True)
        with record("sm90"):
            y, _ = trm(x)
            with Counting(inside_ours=True) as counted:
                (dx,) = torch.autograd.grad(y, x, torch.empty_like(y), retain_graph=True)
        assert dx.shape == x.shape
        products[is_frozen] = counted.calls["addmm_"]
    evaluations = 3  # of 2 layers with 4 matrices
    assert products == {False: evaluations * 2 * 4, True: 0}


@pytest.mark.kernels
@torch.no_grad()
def test_which_way_is_taken():
    trm, wide = make(num_cycles=1), make(num_cycles=1, num_heads=1, hidden_size=144)
    x, wide_x = torch.randn(1, 3, 64, device=DEVICE), torch.randn(1, 3, 144, device=DEVICE)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool, device=DEVICE)
    with backend("triton"), watch_fused() as ran:
        trm(x)
    with backend("reference"), watch_fused() as ran_reference:
        trm(x)
    assert (ran, ran_reference) == (["fused"], ["op by op"])
    with backend("triton"), pytest.raises(ValueError, match=r"expected causal, key_mask and query_offset"):
        trm(x, mask=mask)
    with backend("triton"), pytest.raises(ValueError, match="head width of at most 128, got 144"):
        wide(wide_x)


@pytest.mark.kernels
def test_goes_through_export():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.trm = make(num_cycles=1, num_recursion_steps=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.trm(x)[0]

    module = Module()
    x = torch.randn(2, 3, 64, device=DEVICE)
    with backend("triton"), torch.no_grad():
        exported = torch.export.export(module, (x,))
        assert "trm_kernels.trm_recursion_fwd" in str(exported.graph)
        assert torch.equal(exported.module()(x), module(x))


@pytest.mark.kernels
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_can_be_captured_in_a_cuda_graph():
    trm, (x, *_) = make(torch.bfloat16), tensors(2, 13, 64, torch.bfloat16)
    x.requires_grad_()

    def step():
        trm.zero_grad(set_to_none=False)
        y, _ = trm(x)
        y.float().square().sum().backward()
        return y

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    graph.replay()
    captured = [y.clone(), *(w.grad.clone() for w in matrices(trm))]
    for ours, want in zip(captured, [step(), *(w.grad for w in matrices(trm))], strict=True):
        assert torch.equal(ours, want)


# Counted


def rows_on_meta(D=512, F=1536, H=8, G=None, L=2, B=3, T=97, dtype=torch.bfloat16):
    trm = TRM(D, H, L, num_key_value_heads=G, intermediate_size=F, device="meta", dtype=dtype)
    weights = [layer(dtype) for layer in trm.layers]
    x = torch.empty(B * T, D, device="meta", dtype=dtype)
    angles = torch.empty(1, T, D // H // 2, device="meta")
    spec = RecursionSpec(H, G or H, num_recursion_steps=1, save="step")
    setting = Setting(B, T, spec, angles, angles, None)
    return trm, weights, x, setting


def count_forward(n, cycles, candidate=None, grad_cycles=0):
    _, weights, x, setting = rows_on_meta()
    asked = {"num_recursion_steps": n, "num_cycles": cycles, "grad_cycles": grad_cycles}
    setting = setting._replace(spec=replace(setting.spec, candidate=candidate, **asked))
    with record("sm90") as launches, Counting() as counted, torch.no_grad():
        recursion_forward(x, x, x, weights, setting)
    return len(launches), counted


@without_interpreter
@pytest.mark.parametrize(("candidate", "most"), [("fused", 6), ("mm", 9)])
def test_launches_of_an_evaluation(candidate, most):
    """Kernels of ours and products of PyTorch: fused, six; with plain products three more."""
    per_step = []
    for n in (1, 2):
        launches, counted = count_forward(n, 1, candidate)
        per_step.append(launches + counted.calls["mm"])
    assert per_step[1] - per_step[0] == 2 * most  # a step more is two evaluations more
    # the rest of a cycle: y, y + x, and y and z in the end; of y one evaluation less in its place
    assert per_step[0] == 2 * 2 * most + 3


@without_interpreter
def test_nothing_but_our_kernels_and_products_touches_the_rows():
    _, counted = count_forward(2, 2, "fused", grad_cycles=1)
    assert set(counted.computing()) == {"mm"}


@without_interpreter
def test_cycles_without_gradient_share_one_set_of_buffers():
    few, many = count_forward(1, 1)[1], count_forward(5, 3)[1]
    assert few.bytes == many.bytes > 0


def bytes_kept(trm, n, save, device, dtype):
    """(in dtype, in float32) of what autograd holds after a forward, besides the parameters."""
    trm.save = save
    x = torch.empty(3, 97, trm.hidden_size, device=device, dtype=dtype).normal_().requires_grad_()
    kept = storages_kept(lambda: trm(x, num_recursion_steps=n), own=(x, *trm.parameters()))
    return nbytes(t for t in kept if t.dtype == dtype), nbytes(t for t in kept if t.dtype != dtype)


@without_interpreter
@pytest.mark.parametrize(
    ("save", "rows", "statistics"), [("all", 12288, 4 * 9), ("layer", 1024, 0), ("step", 512, 0)]
)
def test_bytes_kept_for_a_token_and_evaluation(save, rows, statistics):
    """6X + 2J, X and X / L, with X = 2 d and J = 2 F bytes, at d 512, F 1536 and 2 layers."""
    trm, weights, x, _ = rows_on_meta()
    with record("sm90"):
        one, two = (bytes_kept(trm, n, save, "meta", torch.bfloat16) for n in (1, 2))
    evaluations = 3 * 97 * 2
    assert (two[0] - one[0]) / evaluations == rows
    assert (two[1] - one[1]) / evaluations == statistics
    predicted = saved_bytes(save, x.view(3, 97, -1), weights, trm.num_heads)
    assert predicted == two[0] - one[0] + two[1] - one[1]


@without_interpreter
def test_bytes_that_eager_keeps():
    """The reference's own count, for the table in the README: at least what kernels save by fusing."""
    trm = make(torch.bfloat16, hidden_size=64, intermediate_size=192).cpu()
    kept = [sum(bytes_kept(trm, n, "all", "cpu", torch.bfloat16)) for n in (1, 2)]
    _, weights, x, _ = rows_on_meta(D=64, F=192, H=4)
    assert kept[1] - kept[0] > 1.8 * saved_bytes("all", x.view(3, 97, -1), weights, 4)


@without_interpreter
@pytest.mark.parametrize("save", ["layer", "step"])
def test_the_reference_honours_the_policies(save):
    """By computing again what the policy does not keep: the same gradients, fewer bytes."""
    trm = make().cpu()
    given = [t.cpu() for t in tensors(2, 7, 64)]
    want, got = run(trm, given, "reference"), run(trm, given, "reference", save=save)
    assert all(torch.equal(got[name], want[name]) for name in want)
    less, more = (sum(bytes_kept(trm, 2, policy, "cpu", torch.float32)) for policy in (save, "all"))
    assert less < more / 4


@without_interpreter
def test_auto_keeps_all_where_it_fits(monkeypatch):
    from trm_kernels.recursion import saved_bytes as file

    _, weights, rows, _ = rows_on_meta()
    x = rows.view(3, 97, -1)
    wanted = 7 * saved_bytes("all", x, weights, 8)

    class OnCuda:  # what is read of x
        device, shape, element_size = torch.device("cuda:0"), x.shape, x.element_size

    monkeypatch.setattr(file, "_free_bytes", lambda index: 4 * wanted)
    assert file.choose_save("auto", OnCuda, weights, 8, 7) == "all"
    monkeypatch.setattr(file, "_free_bytes", lambda index: 4 * wanted - 4)
    assert file.choose_save("auto", OnCuda, weights, 8, 7) == "step"
    assert file.choose_save("layer", OnCuda, weights, 8, 7) == "layer"


def test_a_weights_gradient_is_summed_in_float32():
    g = torch.Generator().manual_seed(0)
    dw, true = torch.zeros(8, 8, device=DEVICE), torch.zeros(8, 8, dtype=torch.float64, device=DEVICE)
    for _ in range(100):
        dy, x = (torch.randn(5, 8, generator=g).bfloat16().to(DEVICE) for _ in range(2))
        add_weight_gradient(dw, dy, x)
        true += dy.double().t() @ x.double()
    assert error(dw, true) < 1e-6


def test_weights_of_layers_may_differ_in_shape():
    """Layers of one shape share their buffers; others have their own."""
    trm, other = make(num_layers=1), make(num_layers=1, intermediate_size=24)
    weights = [layer(torch.float32) for layer in (*trm.layers, *other.layers)]
    if interpreting() or torch.cuda.is_available():
        x, y, z, *_ = tensors(1, 3, 64)
        call = {"num_heads": 4, "num_recursion_steps": 1}
        with backend("triton"):
            got = trm_recursion(x, y, z, weights, **call)
        with backend("reference"):
            want = trm_recursion(x, y, z, [map_weights(lambda t: t, w) for w in weights], **call)
        for ours, theirs in zip(got, want, strict=True):
            assert error(ours, theirs.double()) <= 1e-5
    else:
        pytest.skip("needs a CUDA device or TRITON_INTERPRET=1")


ROWS = torch.zeros(2, 3, 64)


@pytest.mark.parametrize(
    ("call", "raises", "says"),
    [
        ({"save": "some"}, ValueError, "expected save to be auto, all, layer, step, got 'some'"),
        ({"candidate": "fused"}, RuntimeError, "the candidate 'fused' was asked for"),
    ],
)
def test_refuses(call, raises, says):
    weights = [layer(torch.float32) for layer in make().cpu().layers]
    with backend("reference"), pytest.raises(raises, match=f"^trm_recursion: .*{says}"):
        trm_recursion(ROWS, ROWS, ROWS, weights, num_heads=4, num_recursion_steps=1, **call)


@pytest.mark.kernels
def test_refuses_a_key_mask_of_another_size():
    x = ROWS.to(DEVICE)
    with backend("triton"), pytest.raises(ValueError, match=r"key_mask \(2, 3\) of bool, got \(2, 4\)"):
        make()(x, key_mask=torch.ones(2, 4, dtype=torch.bool, device=DEVICE))


# --- PyTorch's flash attention inside the loop, where the settings table has a library attend


@pytest.fixture
def flash_attends(monkeypatch):
    """The table takes a library at every length; what was asked of flash, forward and backward."""
    monkeypatch.setattr(tuning, "attention_implementation", lambda *sizes: "sdpa")
    asked = []

    def watch(name):
        plain = getattr(flash, name)
        monkeypatch.setattr(flash, name, lambda *args: (asked.append(name), plain(*args))[1])

    watch("flash_forward")
    watch("flash_backward")
    return asked


@pytest.mark.kernels
@pytest.mark.skipif(DEVICE == "cuda", reason="flash has no float32 on a GPU; the next test has bfloat16")
@pytest.mark.parametrize("causal", [False, True])
def test_flash_inside_the_loop_equals_a_loop_under_every_policy(flash_attends, causal):
    check_float32(make(causal=causal, num_recursion_steps=1, num_cycles=1), tensors(2, 7, 64))
    # two layers twice, three policies; "layer" and "step" compute four attentions again
    assert flash_attends.count("flash_forward") == 3 * 4 + 2 * 4
    assert flash_attends.count("flash_backward") == 3 * 4


@pytest.mark.kernels
def test_flash_in_bfloat16_is_as_close_to_the_truth_as_eager(flash_attends):
    check_bfloat16(make(torch.bfloat16, causal=True, num_cycles=1), (2, 7, 64), "all", seeds=6)
    assert flash_attends


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("changes", "key_mask"),
    [({"num_heads": 4, "num_key_value_heads": 2}, None), ({}, PAD), ({"attention": "triton"}, None)],
)
def test_our_kernels_attend_where_flash_cannot_or_was_not_asked(flash_attends, changes, key_mask):
    trm = make(num_recursion_steps=1, num_cycles=1, **changes)
    check_float32(trm, tensors(2, 7, 64), key_mask, saves=("all", "step"))  # step attends again
    assert not flash_attends


@without_interpreter
@pytest.mark.parametrize(("T", "takes"), [(128, False), (129, True)])
def test_the_table_says_from_which_length_flash_attends(T, takes):
    trm = make(torch.bfloat16, num_recursion_steps=1, num_cycles=1).to("meta")
    x = torch.empty(2, T, trm.hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with record("sm90") as launches, Counting(inside_ours=True) as counted:
        torch.autograd.grad(trm(x)[0].sum(), x)
    names = {launch.kernel.fn.__name__ for launch in launches}
    assert ("rope_attention_fwd_kernel" in names) is not takes
    for name in ("", "_backward"):
        assert (counted.calls[f"_scaled_dot_product_flash_attention{name}"] == 4) is takes
