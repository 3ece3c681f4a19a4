"""A whole injection on the kernels: one region, what it keeps for backward, one compiled graph."""

import pytest
import torch

from bench.measure.counting import Counting, nbytes, storages_kept
from hybrid.info import saved_by_injection
from hybrid.model.injection import Injection
from hybrid.model.masks import Visible
from tests.support.tiny import WIDTH, tiny_config, tiny_hybrid, tokens
from trm_kernels.ops.attention.rope import Angles
from trm_kernels.runtime.backend import backend, interpreting
from trm_kernels.runtime.launch import record

DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
# the interpreter is slow, so these recurse little
BRIEF = {"num_cycles": 2, "num_recursion_steps": 1, "trm_num_layers": 2, "injection_layers": [1]}


@pytest.mark.parametrize("blending_strategy", ["linear", "gated"])
def test_an_injection_is_three_ops_and_nothing_between(blending_strategy):
    """Forward and backward are calls of ours; PyTorch itself only looks and allocates."""
    config = tiny_config(blending_strategy=blending_strategy, trm_dtype="bfloat16", grad_cycles=None)
    meta = torch.device("meta")
    injection = Injection(config, WIDTH, first_cache_layer=0, index=0, device=meta)
    h = torch.empty(2, 9, WIDTH, dtype=torch.bfloat16, device=meta, requires_grad=True)
    where = torch.empty(1, 9, dtype=torch.long, device=meta)
    angles = Angles(*(torch.empty(1, 9, 4, device=meta) for _ in range(2)))
    with record("sm90"), Counting() as forward:
        out = injection(h, where, angles, Visible(), config.recursion_spec, 1.0, "auto")
    ours = {"injection_in_fwd": 1, "trm_recursion_fwd": 1, "injection_blend_fwd": 1}
    assert forward.computing() == ours
    with record("sm90"), Counting() as back:
        torch.autograd.grad(out, [h, *injection.parameters()], torch.empty_like(out))
    # beside ours: products, weights' gradients rounded, sums over all rows (y_init, z_init, the gate's bias),
    # and autograd's own sum of what reaches h past the block and through it
    beside = {name for name in back.computing() if not name.endswith("_bwd")}
    assert beside == {"mm", "_to_copy", "sum", "add"} and back.calls["add"] == 1


def hybrid_for_training(**changes):
    return tiny_hybrid(**(BRIEF | changes)).freeze_base().train().to(DEVICE)


def kept_by_step(hybrid, ids):
    """Bytes that autograd holds between a step's forward and its backward."""
    own = (*hybrid.parameters(), *hybrid.buffers())
    return nbytes(storages_kept(lambda: hybrid(ids, labels=ids, use_cache=False).loss, own))


def base_part(hybrid, ids):
    """Bytes that the base alone keeps, its gradients starting where the injection would be."""

    def start(layer, args, kwargs):
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs

    point = hybrid.llm_model.model.layers[1].register_forward_pre_hook(start, with_kwargs=True)
    with hybrid.disable_injection():
        kept = kept_by_step(hybrid, ids)
    point.remove()
    return kept


@pytest.mark.kernels
@pytest.mark.parametrize(("grad_cycles", "norms_x"), [(1, False), (2, False), (1, True)])
def test_a_phase_1_step_keeps_what_the_base_and_the_trm_were_said_to_keep(grad_cycles, norms_x, capsys):
    hybrid = hybrid_for_training(grad_cycles=grad_cycles, trm_input_norm=norms_x)
    ids = tokens(length=5).to(DEVICE)
    (injection,) = (m for m in hybrid.modules() if isinstance(m, Injection))
    h = torch.empty(*ids.shape, WIDTH, device="meta")
    base = base_part(hybrid, ids)
    table = 2 * 4 * ids.shape[1] * (24 // 3 // 2)  # RoPE's, float32
    for save in ("all", "layer", "step"):
        hybrid.config.trm_save = save
        with backend("triton"):
            kept = kept_by_step(hybrid, ids)
        trm = saved_by_injection(injection, h, save, num_recursion_steps=1)
        with capsys.disabled():
            predicted = f"base {base:,} + TRM {trm:,} + RoPE's table {table:,} bytes predicted"
            print(f"\ntrm_save {save}, {grad_cycles} of 2 cycles: {predicted}, {kept:,} kept")
        assert kept == base + trm + table


@pytest.mark.kernels
def test_a_training_step_on_the_kernels_compiles_in_one_graph():
    torch._dynamo.reset()
    hybrid, ids = hybrid_for_training(trm_num_layers=1), tokens(length=5).to(DEVICE)
    compiled = torch.compile(hybrid, backend="inductor" if DEVICE == "cuda" else "aot_eager", fullgraph=True)
    gradients = {}
    for name, model in (("triton", compiled), ("reference", hybrid)):
        with backend(name):
            model(ids, labels=ids, use_cache=False).loss.backward()
        gradients[name] = [p.grad.clone() for p in hybrid.trm_parameters() if p.grad is not None]
        hybrid.zero_grad()
    for ours, want in zip(gradients["triton"], gradients["reference"], strict=True):
        assert (ours - want).norm() <= 5e-5 * want.norm()
