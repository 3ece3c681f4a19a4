"""patch_reference_trm: a model of the paper's code computes the same with it, and is restored."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.support.reference_forks import REFUSED, SERVED, Counting, GatedFromZero
from tests.support.reference_trm import Act, config
from trm_kernels import patch_reference_trm
from trm_kernels.modules import reference_trm

VARIANTS = [
    pytest.param({}, id="classic"),
    pytest.param({"mlp_t": True, "pos_encodings": "none"}, id="mlp_t"),
    pytest.param({"pos_encodings": "learned"}, id="learned-positions"),
    pytest.param({"groups": 1, "rope_theta": 50.0, "rms_norm_eps": 0.1}, id="groups-theta-eps"),
    pytest.param({"H_cycles": 1, "L_cycles": 3, "L_layers": 1}, id="one-cycle"),
]


def make(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return Act(config(**changes), dtype)


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        "inputs": torch.randint(5, (2, 7), generator=generator),
        "puzzle_identifiers": torch.tensor([1, 0]),
    }


def run(model):
    """Outputs of two supervision steps, one carried on from the other, and the second's gradients."""
    model.zero_grad()
    first, *_ = model(batch())
    carry, logits, q = model.inner(first, batch())
    (logits.square().sum() + q[0].sum() - 2 * q[1].sum()).backward()
    assert not carry.z_H.requires_grad and not carry.z_L.requires_grad and type(carry) is type(first)
    outputs = [first.z_H, first.z_L, carry.z_H, carry.z_L, logits.detach(), *(t.detach() for t in q)]
    return outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("changes", VARIANTS)
def test_patched_equals_unpatched_and_undo_restores(changes):
    model = make(**changes)
    before, state = run(model), {name: t.clone() for name, t in model.state_dict().items()}
    parameters, calls = dict(model.named_parameters()), []
    model.inner.L_level.register_forward_hook(lambda *_: calls.append(1))

    patch = patch_reference_trm(model)
    calls.clear()
    outputs, gradients = run(model)
    assert not calls, "L_level holds the weights and is not run"
    for got, want in zip(outputs, before[0], strict=True):
        assert got.dtype == want.dtype and relative(got, want) <= 1e-5
    assert gradients.keys() == before[1].keys() == parameters.keys()
    for name, want in before[1].items():
        assert relative(gradients[name], want) <= 5e-5, name
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert model.state_dict().keys() == state.keys()

    patch.undo()
    patch.undo()
    outputs, gradients = run(model)
    assert calls and "forward" not in vars(model.inner)
    assert all(map(torch.equal, outputs, before[0]))
    assert all(torch.equal(gradients[name], want) for name, want in before[1].items())


def test_it_patches_inside_of_a_block_with_another_default_device():
    """The paper's pretrain.py makes its model in `with torch.device("cuda")`."""
    model = make()
    with torch.device("meta"):
        patch = patch_reference_trm(model)
    assert "forward" in vars(patch.inner)


def test_a_with_block_restores_after_an_error():
    model = make()
    with pytest.raises(KeyError), patch_reference_trm(model):
        assert "forward" in vars(model.inner)
        model({"inputs": batch()["inputs"]})
    assert "forward" not in vars(model.inner)


def test_weights_are_read_at_every_call_and_cycles_too():
    model = make()
    with torch.no_grad(), patch_reference_trm(model):
        before = model(batch())[1]
        model.inner.L_level.layers[0].mlp.down_proj.weight.mul_(2)
        model.inner.config.H_cycles = 4
        after = model(batch())[1]
    assert relative(after, before) > 1e-2
    assert relative(after, model(batch())[1].detach()) <= 1e-5


def test_a_deep_copy_runs_on_its_own_weights():
    model = make()
    patch_reference_trm(model)
    copied = copy.deepcopy(model)
    want = model(batch())[1]
    nn.init.zeros_(model.inner.L_level.layers[0].mlp.down_proj.weight)
    assert torch.equal(copied(batch())[1], want)
    assert not torch.equal(model(batch())[1], want)


def test_it_computes_in_the_dtype_of_the_model():
    model = make(torch.bfloat16)
    with torch.no_grad():
        want = model(batch())
        with patch_reference_trm(model):
            got = model(batch())
    assert got[0].z_H.dtype == got[1].dtype == torch.bfloat16 and got[2][0].dtype == torch.float32
    assert (
        relative(got[1].float(), want[1].float()) < 0.05
    )  # 18 evaluations of a layer, each rounded to bfloat16


@pytest.mark.parametrize("fork", SERVED)
def test_a_fork_that_computes_the_same_is_served(fork):
    model = make()
    model.inner.__class__ = fork
    carry = model.inner.empty_carry(2) if hasattr(model.inner, "empty_carry") else model.inner.start(batch())
    carry = replace(carry, z_H=torch.full((2, 10, 24), 0.5), z_L=-torch.ones(2, 10, 24))
    with torch.no_grad():
        want = model.inner(carry, batch())
        with patch_reference_trm(model):
            got = model.inner(carry, batch())
    assert type(got[0]) is type(want[0]) and relative(got[0].z_L, want[0].z_L) <= 1e-5
    assert relative(got[1], want[1]) <= 1e-5 and relative(got[2][1], want[2][1]) <= 1e-5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("fork", "message"), REFUSED.items(), ids=lambda f: getattr(f, "__name__", ""))
def test_a_fork_that_computes_something_else_is_refused_and_left_alone(fork, message, training):
    torch.manual_seed(0)
    model = nn.ModuleDict({"inner": fork(config())}).train(training)
    with pytest.raises(ValueError, match=f"patch_reference_trm: expected .* got .*{message}"):
        patch_reference_trm(model)
    assert "forward" not in vars(model["inner"]) and model["inner"].training is training


def test_the_trial_is_no_call_that_counts():
    model = make()
    model.inner.__class__ = Counting
    model.inner(model.inner.start(batch()), batch())
    known = dict(vars(model.inner))
    patch_reference_trm(model).undo()
    assert model.inner.calls == 1 and vars(model.inner) == known


def test_a_model_in_distributed_data_parallel(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(make(H_cycles=1, L_cycles=1, L_layers=1))
        gradients = []
        for patched in (False, True):
            if patched:
                patch_reference_trm(model)
            model.zero_grad()
            _, logits, q = model(batch())
            (logits.square().sum() + q[0].sum() - 2 * q[1].sum()).backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    finally:
        torch.distributed.destroy_process_group()
    for got, want in zip(*reversed(gradients), strict=True):
        assert relative(got, want) <= 5e-5


def test_what_differs_in_half_precision_is_found_as_well():
    model = nn.ModuleDict({"inner": GatedFromZero(config(), torch.bfloat16)})
    with pytest.raises(ValueError, match="a relative difference of"):
        patch_reference_trm(model)
    assert model["inner"].dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_trial_leaves_everything_as_it_was(training, dtype, around):
    model = make(dtype).train(training)
    model.inner.q_head.eval()
    model.inner.lm_head.weight.grad = torch.ones(5, 24)
    model.inner.q_head.weight.requires_grad_(False)
    model.inner.register_buffer("calls", torch.zeros(1))
    counting = model.inner.embed_tokens.register_forward_hook(lambda *_: model.inner.calls.add_(1) and None)
    state, tensors = torch.get_rng_state(), {name: t.clone() for name, t in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with around():
        patch_reference_trm(model)
    counting.remove()
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [module.training for module in model.modules()] and model.inner.dtype == dtype
    assert all(torch.equal(t, tensors[name]) for name, t in model.state_dict().items())
    assert torch.equal(model.inner.lm_head.weight.grad, torch.ones(5, 24))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "inner.lm_head.weight")
    assert not model.inner.q_head.weight.requires_grad and model.inner.lm_head.weight.requires_grad


@pytest.mark.parametrize("compiled", ["around", "in place", "inner"])
def test_a_compiled_model_runs_the_patched_forward(compiled):
    torch._dynamo.reset()
    model = make(H_cycles=1, L_cycles=1, L_layers=1)
    with torch.no_grad():
        want, runs = model(batch())[1], model
        if compiled == "around":
            runs = torch.compile(model, backend="eager")
        else:
            (model if compiled == "in place" else model.inner).compile(backend="eager")
        runs(batch())
        calls = []
        patch_reference_trm(runs)
        model.inner.L_level.register_forward_hook(lambda *_: calls.append(1))
        got = runs(batch())[1]
    assert relative(got, want) <= 1e-5 and not calls


def biased(inner):
    inner.L_level.layers[1].mlp.down_proj.bias = nn.Parameter(torch.zeros(24))


def with_relu(inner):
    inner.L_level.layers[1].mlp.forward = lambda v: torch.relu(v)


def of_two_kinds(inner):
    inner.L_level.layers[1].mlp_t = nn.Identity()


def unknown_numbers(inner):
    nn.init.constant_(inner.L_level.layers[0].mlp.down_proj.weight, float("nan"))


def hierarchical(inner):
    inner.H_level = inner.L_level


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (biased, r"layers with the parameters \[.*, got \[.*'mlp.down_proj.bias'"),
        (
            with_relu,
            "the forward of Inner to compute what the patched one does, got a relative difference of",
        ),
        (of_two_kinds, "all have self_attn or all have mlp_t, got 2 layers, not so"),
        (unknown_numbers, "got a relative difference of nan"),
        (hierarchical, r"L_level alone \(TRM\), got H_level too \(HRM\)"),
        (lambda inner: delattr(inner, "q_head"), "got one without q_head"),
        (lambda inner: delattr(inner.config, "L_cycles"), "got one without config.L_cycles"),
        (lambda inner: setattr(inner.L_level, "layers", nn.ModuleList()), "got 0 layers"),
        (lambda inner: setattr(inner.config, "rms_norm_eps", 0.5), "got a relative difference of"),
        (lambda inner: setattr(inner.config, "rope_theta", 3.0), "got a relative difference of"),
        (patch_reference_trm, "got one patched before"),
    ],
)
def test_what_it_does_not_serve_is_refused_and_left_alone(change, message):
    model = make()
    change(model.inner)
    forward = vars(model.inner).get("forward")
    with pytest.raises(ValueError, match=message):
        patch_reference_trm(model)
    assert vars(model.inner).get("forward") is forward


def test_models_without_one_or_with_two():
    with pytest.raises(ValueError, match=r"expected one module with L_level .* in Linear, got 0"):
        patch_reference_trm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="in ModuleList, got 2"):
        patch_reference_trm(nn.ModuleList([make(), make()]))
    assert reference_trm._find(nn.ModuleList([make()])).puzzle_emb_len == 3
