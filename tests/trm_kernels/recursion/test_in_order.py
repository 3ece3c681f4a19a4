"""Token after token, each attending to what those before it ended with: written out, and in every form."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trm_kernels import TRM, Halting
from trm_kernels.ops.attention.rope import rope_angles, rope_ref
from trm_kernels.ops.attention.rope_attention import rope_attention
from trm_kernels.recursion.inputs import CacheRoom
from trm_kernels.runtime.backend import backend, interpreting

H, G, D, T, L = 4, 2, 32, 5, 2
DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"


def trm(dtype: torch.dtype = torch.float64, **changes) -> TRM:
    torch.manual_seed(0)
    sizes = {"num_key_value_heads": G, "intermediate_size": 48, "num_recursion_steps": 3, "cache": "last"}
    sizes |= {"num_cycles": 2, "grad_cycles": None, "causal": True}
    return TRM(D, H, L, dtype=dtype, device=DEVICE, **(sizes | changes))


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, T, D, dtype=dtype, device=DEVICE)


class Cache:
    """A slab a layer, which grows; or, with room for so many tokens, is written to in place."""

    def __init__(self, capacity: int = 0) -> None:
        self.slabs: dict[int, list[Tensor]] = {}
        self.capacity, self.seen, self.rooms = capacity, 0, 0

    def __call__(self, slab: int, *new: Tensor) -> tuple[Tensor, Tensor]:
        old = self.so_far(slab)
        both = new if old is None else [torch.cat(pair, dim=2) for pair in zip(old, new, strict=True)]
        self.slabs[slab] = list(both)
        return both[0], both[1]

    def so_far(self, slab: int) -> list[Tensor] | None:
        return self.slabs.get(slab)

    def room(self, x: Tensor, heads: int, width: int, slabs: int) -> CacheRoom | None:
        if not self.capacity:
            return None
        self.rooms += 1
        kept = []
        for slab in range(slabs):
            old = self.slabs.get(slab, [x.new_empty(2, heads, 0, width)] * 2)
            more = self.capacity - old[0].shape[2]
            kept.append([F.pad(t, (0, 0, 0, more)) for t in old])
        self.seen, self.kept = self.slabs[0][0].shape[2] if self.slabs else 0, kept
        return CacheRoom([k for k, _ in kept], [v for _, v in kept], [], self.seen)

    def written(self, tokens: int) -> None:
        seen = self.seen + tokens
        self.slabs = {slab: [t[:, :, :seen] for t in pair] for slab, pair in enumerate(self.kept)}


def written_out(model: TRM, x: Tensor, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Token after token, each product by itself."""
    K, ends = D // H, []
    angles = rope_angles(torch.arange(T, device=x.device)[None], K, 10000.0)
    before = [(x.new_zeros(2, 0, G, K),) * 2 for _ in range(L)]

    def rms(v: Tensor) -> Tensor:
        return v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + model.eps)

    def f(v: Tensor, t: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        seen = []
        here = type(angles)(angles.cos[:, t : t + 1], angles.sin[:, t : t + 1])
        for layer, (old_k, old_v) in zip(model.layers, before, strict=True):
            qkv = F.linear(v, layer.self_attn.qkv_proj.weight).view(2, 1, H + 2 * G, K)
            q, k = rope_ref(qkv[:, :, : H + G], here).split((H, G), dim=2)
            seen.append((torch.cat([old_k, k], 1), torch.cat([old_v, qkv[:, :, H + G :]], 1)))
            k, value = (u.repeat_interleave(H // G, dim=2) for u in seen[-1])
            scores = torch.einsum("bthk,bshk->bhts", q, k) / K**0.5
            if key_mask is not None:
                scores = scores.masked_fill(~key_mask[:, None, None, : t + 1], -1e30)
            o = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), value).reshape(2, 1, D)
            v = rms(v + F.linear(o, layer.self_attn.o_proj.weight))
            gate, up = F.linear(v, layer.mlp.gate_up_proj.weight).chunk(2, dim=-1)
            v = rms(v + F.linear(F.silu(gate) * up, layer.mlp.down_proj.weight))
        return v, seen

    for t in range(T):
        x_t = x[:, t : t + 1]
        y, z = model.y_init.expand_as(x_t), model.z_init.expand_as(x_t)
        for _ in range(model.num_cycles):
            for _ in range(model.num_recursion_steps):
                z, _ = f(z + y + x_t, t)
            y, last = f(y + z, t)
        before = last
        ends.append((y, z))
    return torch.cat([y for y, _ in ends], 1), torch.cat([z for _, z in ends], 1)


def gradients(run, model: TRM, x: Tensor) -> list[Tensor]:
    """y, z, and the gradients of x and the weights."""
    x = x.clone().requires_grad_()
    y, z = run(x)
    (y.sin().sum() + z.cos().sum()).backward()
    found = [y.detach(), z.detach(), x.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    return found


@pytest.mark.parametrize("save", ["auto", "layer", "step"])
def test_answers_and_gradients_are_those_of_the_loop_written_out(save):
    model = trm(save=save)
    expected = gradients(partial(written_out, model), model, inputs())
    for found, wanted in zip(gradients(model, model, inputs()), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        other = trm(cache="all")(inputs())[0]
    assert (other - expected[0]).abs().max() > 0.05, "all is something else"


@torch.no_grad()
def test_the_first_token_is_that_of_any_recursion_and_hears_of_no_later_one():
    x = inputs()
    torch.testing.assert_close(trm()(x)[0][:, :1], trm(cache="all")(x)[0][:, :1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(trm()(x[:, :3])[0], trm()(x)[0][:, :3], rtol=1e-6, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("as_mask", [False, True], ids=["key mask", "general mask"])
def test_padding_is_hidden(as_mask):
    x = inputs()
    key_mask = torch.ones(2, T, dtype=torch.bool, device=DEVICE)
    key_mask[1, :2] = False
    given = {"key_mask": key_mask}
    if as_mask:
        causal = torch.ones(T, T, dtype=torch.bool, device=DEVICE).tril()
        given = {"mask": (causal & key_mask[:, None])[:, None]}
    found, wanted = trm()(x, **given)[0], written_out(trm(), x, key_mask)[0]
    torch.testing.assert_close(found[key_mask], wanted[key_mask], rtol=1e-6, atol=1e-7)
    assert (found[1, 2:] - trm()(x)[0][1, 2:]).abs().max() > 0.01, "it would matter"


@torch.no_grad()
@pytest.mark.parametrize("shape", [(), (T,), (1, T), (T, 1), (2, 1, 1, 1), (H, 1, T), (2, 1, T, T)], ids=str)
@pytest.mark.parametrize("is_bool", [True, False], ids=["bool", "floating"])
def test_a_mask_is_broadcast(shape, is_bool):
    g = torch.Generator().manual_seed(0)
    mask = torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE)
    mask = mask > -0.5 if is_bool else mask
    found, wanted = (trm()(inputs(), mask=m)[0] for m in (mask, mask.expand(2, H, T, T)))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_no_tokens_and_no_rows():
    for nothing in (inputs()[:, :0], inputs()[:0]):
        y, z = trm()(nothing)
        assert y.shape == z.shape == nothing.shape


@pytest.mark.skipif(interpreting(), reason="the interpreter does not compile")
@torch.no_grad()
def test_it_is_traced_as_one_graph():
    """A first token and later ones, z and y: each is traced anew, so that there are few of them."""
    torch._dynamo.reset()
    model, x = trm(num_recursion_steps=1), inputs()[:, :3]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], model(x)[0], rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(T,), (2, 1, 2), (1,) * T], ids=["whole", "chunks", "token by token"])
def test_a_cache_gives_the_same_and_does_not_grow_with_n(chunks):
    for n, num_cycles in ((2, 1), (5, 1), (3, 2)):
        model, cache, at, found = trm(num_recursion_steps=n, num_cycles=num_cycles), Cache(), 0, []
        for tokens in chunks:
            positions = torch.arange(at, at + tokens, device=DEVICE)[None]
            y, _ = model(inputs()[:, at : at + tokens], positions=positions, update_cache=cache)
            at += tokens
            found.append(y)
        torch.testing.assert_close(torch.cat(found, 1), model(inputs())[0], rtol=1e-6, atol=1e-7)
        assert sorted(cache.slabs) == list(range(L)) and model.spec.slabs(L) == L
        assert {t.shape[2] for pair in cache.slabs.values() for t in pair} == {T}
    assert trm(cache="all").spec.slabs(L) == trm().evaluations() == 2 * 4 * L


class Server:
    """Attention over a row of two sequences, of 3 and 2 tokens, the whole of it whenever it is asked."""

    def __init__(self) -> None:
        self.positions = torch.tensor([[0, 1, 2, 0, 1]], device=DEVICE)
        sequence = torch.tensor([0, 0, 0, 1, 1], device=DEVICE)
        self.mask = (sequence[:, None] == sequence) & torch.ones(5, 5, device=DEVICE).tril().bool()
        self.row: dict[int, Tensor] = {}
        self.asked: list[tuple[int, list[int]]] = []

    def __call__(self, evaluation: int, qkv: Tensor) -> Tensor:
        raise AssertionError("of_tokens is asked in its place")

    def rounds(self, tokens: int, device: torch.device) -> list[Tensor]:
        assert tokens == 5
        return [torch.tensor(places, device=device) for places in ([0, 3], [1, 4], [2])]

    def of_tokens(self, slab: int, tokens: Tensor, qkv: Tensor) -> Tensor:
        self.asked.append((slab, tokens.tolist()))
        row = self.row.setdefault(slab, qkv.new_zeros(1, 5, qkv.shape[2]))
        row[:, tokens] = qkv
        return rope_attention(row, self.positions, H, G, self.mask)[:, tokens]


@torch.no_grad()
def test_a_row_of_sequences_goes_in_rounds():
    """Each sequence gives what it gives by itself."""
    model, x, server = trm(num_cycles=1, num_recursion_steps=2), inputs()[:1], Server()
    y, z = model(x, attend=server)
    for i, (a, b) in enumerate(((0, 3), (3, 5))):
        alone = model(x[:, a:b])
        for found, wanted in zip((y[:, a:b], z[:, a:b]), alone, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7, msg=f"sequence {i}")
    of_round = [0, 1] * 3  # two layers, three evaluations of each
    assert server.asked == [(slab, p) for p in ([0, 3], [1, 4], [2]) for slab in of_round]


@pytest.mark.kernels
def test_our_kernels_give_what_the_reference_gives():
    model, x = trm(torch.float32, num_recursion_steps=1, num_cycles=1), inputs(torch.float32)[:, :2]
    found = []
    for name in ("reference", "triton"):
        with backend(name):
            found.append(gradients(model, model, x))
            with torch.no_grad():  # without gradient it is launched otherwise
                found[-1] += model(x)
    for of_kernels, wanted in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(of_kernels, wanted, rtol=2e-3, atol=2e-4)


@pytest.mark.kernels
@torch.no_grad()
@pytest.mark.parametrize("regime", ["one_launch", "per_phase"])
def test_decoding_in_one_launch_writes_each_step_over_the_one_before(regime):
    model, x, cache = trm(torch.float32, num_cycles=1, num_recursion_steps=2), inputs(torch.float32), Cache(8)
    whole = model(x)[0]
    model(x[:, :2], update_cache=cache)
    model.regime = regime
    with backend("triton"):
        for t in (2, 3):
            positions = torch.tensor([[t]], device=DEVICE)
            y, _ = model(x[:, t : t + 1], positions=positions, update_cache=cache)
            torch.testing.assert_close(y, whole[:, t : t + 1], rtol=2e-3, atol=2e-4)
    assert cache.rooms == 2 and cache.slabs[1][0].shape[2] == 4
    with (
        backend("triton"),
        pytest.raises(RuntimeError, match="one token at a time, as decoding has it, got 2"),
    ):
        model(x[:, :2])


class Plain:
    """A cache that cannot tell what it has."""

    def __call__(self, evaluation, keys, values):
        return keys, values


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"cache": "first"}, {}, "expected cache to be one of all, last, got 'first'"),
        ({"causal": False}, {}, "cache 'last' expected causal"),
        ({}, {"halting": Halting(0.1)}, "halting expected cache 'all', got 'last'"),
        ({}, {"attend": lambda i, qkv: qkv}, "expected an attend that has rounds, got none"),
        ({}, {"update_cache": Plain()}, r"so_far\(slab\), got Plain"),
    ],
    ids=["misspelt", "not causal", "halting", "attend", "cache"],
)
def test_what_it_cannot_be_combined_with(changes, arguments, message):
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        trm(**changes)(inputs(), **arguments)


def test_a_cycle_by_itself_is_refused():
    with pytest.raises(ValueError, match="each_cycle expected cache 'all'"):
        next(trm().each_cycle(inputs()))
