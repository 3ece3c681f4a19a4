"""torch.autocast: each op in the dtype that autocast.py lists, a hybrid as its base is; gradients included.

All that autocast has to do is to cast what comes in. So an op under it is compared, bit for bit, with the
same op on tensors that were cast by hand.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainingArguments

import trm_kernels as ops
from hybrid import Halting, TokenHalting
from hybrid.model.cache_name import as_argument
from hybrid.training.loop import train
from hybrid.training.phases import enter
from hybrid.training.settings import TrainSettings
from tests.support import tiny_text
from tests.support.tiny import brief_hybrid, tiny_base, tiny_hybrid, tokens
from tests.trm_kernels.ops.test_ops import compiles
from trm_kernels import TRM, backend
from trm_kernels.recursion.weights import InjectionWeights
from trm_kernels.runtime.backend import interpreting

DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
BACKENDS = pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=pytest.mark.kernels)])
NARROW = pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def autocast(dtype=torch.bfloat16):
    return torch.autocast(DEVICE, dtype)


def gradients(outputs, inputs):
    """Of a sum in which every value weighs otherwise."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(
        (t.float() * torch.linspace(-1, 1, t.numel(), device=DEVICE).view(t.shape)).sum() for t in outputs
    )
    return torch.autograd.grad(loss, inputs, allow_unused=True)


def check_cast_by_hand(op, inputs, kept=(), narrow=torch.bfloat16):
    """`op` under autocast is `op` on its inputs in `narrow`, but for those at the places `kept`."""
    inputs = [t.requires_grad_() for t in inputs]
    with autocast(narrow):
        got = op(*inputs)
    cast = [t if i in kept else t.to(narrow) for i, t in enumerate(inputs)]
    want = op(*cast)
    for g, w in zip(*((t if isinstance(t, tuple) else (t,)) for t in (got, want)), strict=True):
        assert g.dtype == w.dtype
        assert torch.equal(g, w)
    for i, (g, w) in enumerate(zip(gradients(got, inputs), gradients(want, inputs), strict=True)):
        assert g.dtype == inputs[i].dtype
        assert torch.equal(g, w), f"gradient of input {i}"


# --- the ops


@BACKENDS
@NARROW
def test_products_and_attention_compute_in_the_autocast_dtype(name, narrow):
    v, gate_up, down, w = rand(5, 16), rand(24, 16, seed=1), rand(16, 12, seed=2), rand(16, 16, seed=3)
    with backend(name):
        check_cast_by_hand(ops.linear_swiglu, [v, gate_up], narrow=narrow)
        check_cast_by_hand(ops.swiglu_mlp, [v, gate_up, down], narrow=narrow)
        check_cast_by_hand(ops.linear_residual, [v, w, rand(5, 16, seed=4)], narrow=narrow)
        qkv = rand(2, 5, 3 * 16, seed=5)
        check_cast_by_hand(lambda t: ops.rope_attention(t, None, 2, causal=True), [qkv], narrow=narrow)
    with backend(name), torch.no_grad():
        q, k = rand(2, 4, 16), rand(2, 2, 7, 16, seed=1)
        with autocast(narrow):
            got = ops.decode_attention(q, k, k)
        assert torch.equal(got, ops.decode_attention(*(t.to(narrow) for t in (q, k, k))))


@BACKENDS
def test_sums_take_the_widest_of_their_inputs(name):
    x, r = rand(5, 16), rand(5, 16, seed=1).bfloat16()
    with backend(name):
        want = ops.add_rms_norm(x, r.float()), ops.norm_add(x, r.float())
        with autocast():
            got = ops.add_rms_norm(x, r), ops.norm_add(x, r)
            assert ops.add_rms_norm(r, r).dtype == torch.bfloat16
        with pytest.raises(ValueError, match="of one dtype"):
            ops.add_rms_norm(x, r)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@BACKENDS
@pytest.mark.parametrize("gate", [(), (rand(1, 16, seed=3), rand(1, seed=4))], ids=["linear", "gated"])
def test_the_blend_keeps_the_dtype_of_the_hidden_state(name, gate):
    h, y, w_out = rand(5, 40), rand(5, 16, seed=1), rand(40, 16, seed=2)
    with backend(name):
        op = lambda h, y, w_out, *gate: ops.injection_blend(h, y, w_out, 0.7, *gate)  # noqa: E731
        check_cast_by_hand(op, [h, y, w_out, *gate], kept=(0,))


@BACKENDS
@NARROW
def test_the_projection_norms_the_hidden_state_before_it_is_narrowed(name, narrow):
    """Values that float16 does not have: cast first, they would be infinite."""
    h, w_in = (rand(5, 40) * 1e5).requires_grad_(), rand(16, 40, seed=1).requires_grad_()
    with backend(name):
        with autocast(narrow):
            got = ops.injection_in(h, w_in)
        assert got.dtype == narrow
        want = ops.injection_in(h, w_in)
        step = torch.finfo(narrow).eps
        torch.testing.assert_close(got.float(), want, rtol=0, atol=4 * step * want.abs().max().item())
        for g, w in zip(gradients(got, (h, w_in)), gradients(want, (h, w_in)), strict=True):
            assert g.dtype == torch.float32
            torch.testing.assert_close(g, w, rtol=0, atol=8 * step * w.abs().max().item())


# --- the loop


SIZES = {"num_layers": 2, "intermediate_size": 32, "num_recursion_steps": 2, "num_cycles": 2}


@BACKENDS
@pytest.mark.parametrize(
    "settings",
    [
        {"save": "all"},
        {"attention": "sdpa"},
        {"attention": "reference"},
        {"num_key_value_heads": 1, "grad_cycles": None},
        {"mlp_t": True, "seq_len": 5},
    ],
    ids=str,
)
def test_the_loop_is_that_of_weights_cast_by_hand(name, settings):
    torch.manual_seed(0)
    wide = TRM(32, 2, **SIZES, **settings).to(DEVICE)
    narrow = copy.deepcopy(wide).bfloat16()
    x = rand(1, 5, 32).requires_grad_()
    with backend(name):
        with autocast():
            got = wide(x)
        want = narrow(x.bfloat16())
        assert [t.dtype for t in got] == [torch.bfloat16] * 2
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        of_wide = gradients(got, [x, *wide.parameters()])
        of_narrow = gradients(want, [x, *narrow.parameters()])
    for g, w in zip(of_wide, of_narrow, strict=True):
        assert (g is None) == (w is None)  # the first states, where the first cycle passes no gradient
        if g is not None:
            assert g.dtype == torch.float32
            assert torch.equal(g, w.float())


@BACKENDS
def test_trm_recursion_and_trm_injection_cast_weights_and_states(name):
    torch.manual_seed(0)
    trm = TRM(32, 2, **SIZES, causal=True).to(DEVICE)
    weights, x = [layer(torch.float32) for layer in trm.layers], rand(2, 5, 32)
    cast = [layer(torch.bfloat16) for layer in trm.layers]
    loop = {"num_heads": 2, "num_recursion_steps": 2, "causal": True}
    given = InjectionWeights(rand(32, 40, seed=1), rand(40, 32, seed=2))
    positions, h = torch.arange(5, device=DEVICE)[None], rand(2, 5, 40, seed=3)
    with backend(name), torch.no_grad():
        with autocast():
            got = ops.trm_recursion(x, x, x, weights, **loop)
            blended = ops.trm_injection(h, given, 0.5, x, x, weights, positions=positions, **loop)
            projected = ops.injection_in(h, given.in_proj)
        b = x.bfloat16()
        want = ops.trm_recursion(b, b, b, cast, **loop)
        y, _ = ops.trm_recursion(projected, b, b, cast, **loop)
        by_hand = ops.injection_blend(h, y, given.out_proj.bfloat16(), 0.5)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert blended.dtype == torch.float32
    assert torch.equal(blended, by_hand)


@pytest.mark.kernels
def test_one_launch_under_autocast():
    """The loop runs; an injection, whose hidden state is in another dtype than its weights, says why not."""
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "intermediate_size": 32, "num_recursion_steps": 1, "causal": True}
    wide = TRM(32, 2, regime="per_phase", **sizes).to(DEVICE)
    narrow, x = copy.deepcopy(wide).bfloat16(), rand(1, 5, 32)
    given = InjectionWeights(rand(32, 48, seed=1), rand(48, 32, seed=2))
    with torch.no_grad(), backend("triton"):
        want = narrow(x.bfloat16())
        with autocast():
            assert all(torch.equal(g, w) for g, w in zip(wide(x), want, strict=True))
            with pytest.raises(RuntimeError, match=r"in one dtype, got torch.bfloat16 and torch.float32"):
                wide(rand(1, 5, 48), positions=torch.arange(5, device=DEVICE)[None], injection=given)


# --- a hybrid


# the interpreter is slow, so these are shallow
SHALLOW = {"injection_layers": [0, 2], "trm_num_layers": 1}
HYBRIDS = {
    "linear": {},
    "gated": {"blending_strategy": "gated"},
    "sdpa": {"trm_attention": "sdpa"},
    "all": {"trm_save": "all", "grad_cycles": None},
    "layer": {"trm_save": "layer", "grad_cycles": None},
    "step": {"trm_save": "step", "grad_cycles": None},
    "deep": {"injection_layers": [1, 3], "grad_cycles": None, "deep_supervision": True},
    "bfloat16 weights": {"trm_dtype": "bfloat16"},
}
EACH_HYBRID = pytest.mark.parametrize(
    "changes", [SHALLOW | changes for changes in HYBRIDS.values()], ids=HYBRIDS
)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "gemma2"])
def test_a_fresh_hybrid_is_its_base(family):
    base, hybrid, ids = tiny_base(family), tiny_hybrid(family, awake=False), tokens()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hybrid(ids).logits, base(ids).logits)
        new = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(hybrid.generate(ids, **new), base.generate(ids, **new))


@EACH_HYBRID
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step(changes, base_dtype):
    """Gradients near those in float32, the same with checkpointing, in the parameters' dtype."""
    hybrid, ids = tiny_hybrid(**changes).to(base_dtype).freeze_base().train(), tokens()
    for p in hybrid.trm_parameters():
        p.data = p.data.to(torch.float32 if "trm_dtype" not in changes else torch.bfloat16)

    def grads(context):
        hybrid.zero_grad()
        with context:
            loss = hybrid(ids, labels=ids).loss
        loss.backward()
        given = [p.grad.flatten().float() for p in hybrid.trm_parameters() if p.grad is not None]
        return torch.cat(given), loss.item()

    got, loss = grads(torch.autocast("cpu", torch.bfloat16))
    assert got.isfinite().all()
    if base_dtype == torch.float32:
        want, loss_of_float32 = grads(nullcontext())
        assert abs(loss - loss_of_float32) < 0.05 * loss_of_float32
        assert torch.cosine_similarity(got, want, dim=0) > 0.95
    hybrid.gradient_checkpointing_enable()
    again, _ = grads(torch.autocast("cpu", torch.bfloat16))
    torch.testing.assert_close(again, got, rtol=1e-5, atol=1e-6)


@EACH_HYBRID
@torch.no_grad()
def test_with_a_cache_as_without(changes):
    hybrid, ids = tiny_hybrid(**changes), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        whole = hybrid(ids, use_cache=False).logits
        cache, parts = None, []
        for part in ids.split((4, 1, 3, 1), dim=1):
            output = hybrid(part, **as_argument(cache), use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    # bfloat16 sums in another order: a few of its steps
    torch.testing.assert_close(torch.cat(parts, dim=1).float(), whole.float(), rtol=0, atol=0.1)


@torch.no_grad()
def test_halting():
    hybrid, ids = tiny_hybrid(injection_layers=[0, 2], trm_num_layers=1, num_recursion_steps=4), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        n = hybrid(ids, num_recursion_steps=4).logits
        never = hybrid(ids, halting=Halting(0.0)).logits
        torch.testing.assert_close(never.float(), n.float(), rtol=0, atol=0.1)
        assert hybrid(ids, halting=TokenHalting(2), use_cache=False).logits.isfinite().all()
        hybrid.generate(ids, max_new_tokens=3, halting=Halting(0.2))


@torch.no_grad()
def test_quantized_matrices():
    hybrid, ids = tiny_hybrid(trm_quantize="int8"), tokens()
    want = hybrid(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(hybrid(ids).logits.float(), want, rtol=0, atol=0.2)


@compiles
def test_in_one_compiled_graph():
    hybrid, ids = brief_hybrid(injection_layers=[1]).freeze_base().train(), tokens()

    def loss_of(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids, labels=ids).loss

    want = loss_of(hybrid)
    got = loss_of(torch.compile(hybrid, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(got, want, rtol=1e-2, atol=0)
    got.backward()


# --- the tools that switch it on


@pytest.fixture(autouse=True)
def _no_precision_of_another_test():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trained(tmp_path, model, **arguments):
    """The loss of the first step under Trainer."""
    ids = tokens(4, 12)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments |= {"max_steps": 2, "report_to": [], "save_strategy": "no", "use_cpu": True, "logging_steps": 1}
    trainer = Trainer(model, TrainingArguments(tmp_path, disable_tqdm=True, **arguments), train_dataset=rows)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trainer_in_bf16(tmp_path, checkpointing, base_dtype):
    arguments = {"bf16": True, "gradient_checkpointing": checkpointing}
    hybrid = tiny_hybrid(awake=False).to(base_dtype).freeze_base()
    before = copy.deepcopy(hybrid)
    got = trained(tmp_path, hybrid, **arguments)
    want = trained(tmp_path, tiny_base().to(base_dtype), **arguments)
    assert got == pytest.approx(want, rel=1e-3)
    changed = [n for n, p in hybrid.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert changed and all("trm" in name for name in changed)


def test_accelerator():
    hybrid, ids = tiny_hybrid().freeze_base().train(), tokens()
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(hybrid)
    accelerator.backward(model(ids, labels=ids).loss)
    for name, p in hybrid.named_parameters():
        assert (p.grad is not None) == (".trm" in name and "_init" not in name), name


@pytest.mark.parametrize("phase", [1, 2])
def test_our_own_loop(tmp_path, phase):
    """`--mixed-precision bf16` on float32 weights: they learn, and stay float32."""
    results = {}
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)  # it has one precision a process
        model = tiny_text.tiny_hybrid(tiny_text.tiny_base(dropout=0.0))
        enter(model, phase)
        settings = TrainSettings(
            tmp_path / precision, steps=20, batch_size=4, learning_rate=1e-2, mixed_precision=precision
        )
        data = tiny_text.Counting(64, 12)
        results[precision] = train(model, data, settings, held_out={"counting": data})
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    after = {name: result.held_out_after["counting"] for name, result in results.items()}
    assert after["bf16"] < 0.98 * results["bf16"].held_out_before["counting"]
    assert after["bf16"] == pytest.approx(after["no"], rel=0.05)
    assert after["bf16"] != after["no"]
