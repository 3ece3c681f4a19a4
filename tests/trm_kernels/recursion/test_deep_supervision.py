"""A loss after each cycle or supervision step, against loops that take one loss at a time."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hybrid.model.injection import Injection
from hybrid.training.loop import train
from tests.hybrid.training.test_train import Stopped, assert_equal, enter, lines_of, settings_for, stop_after
from tests.support import tiny, tiny_text
from trm_kernels import TRM
from trm_kernels.recursion.spec import RecursionSpec
from trm_kernels.runtime.backend import backend, interpreting

CYCLES = 3


def hybrid_of(family="llama", cycles=CYCLES, **changes):
    fields = {"num_cycles": cycles, "grad_cycles": None, "deep_supervision": True}
    hybrid = tiny.tiny_hybrid(family, **fields | changes).double().eval()
    hybrid.training = True  # but not its parts: no dropout
    return hybrid


def padded(rows=3):
    """Ids, labels of which some do not count, a mask with padding on the right; no row is like another."""
    ids = tiny.tokens(rows, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def in_float64(logits, labels, *_, **__):
    """The language model's loss, which it takes in float32."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def one_at_a_time(hybrid, given):
    """(the mean loss, the last logits) by forwards without deep supervision, each with fewer cycles."""
    config = hybrid.config
    last = next(m for m in hybrid.modules() if isinstance(m, Injection) and m.is_last)
    passing = config.num_cycles if config.grad_cycles is None else config.grad_cycles
    config.deep_supervision, losses = False, []

    def with_fewer_cycles(injection, given):
        cycle = len(losses) + 1
        fewer = {"num_cycles": config.num_cycles - passing + cycle, "grad_cycles": cycle}
        return tuple(replace(x, **fewer) if isinstance(x, RecursionSpec) else x for x in given)

    handle = last.register_forward_pre_hook(with_fewer_cycles)
    for _ in range(passing):
        logits = hybrid(**given).logits
        losses.append(in_float64(logits, given["labels"]))
    handle.remove()
    config.deep_supervision = True
    return torch.stack(losses).mean(), logits


def gradients(hybrid, loss):
    hybrid.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in hybrid.named_parameters() if p.grad is not None}


def assert_same(hybrid, given):
    want, logits = one_at_a_time(hybrid, given)
    wanted = gradients(hybrid, want)
    hybrid.llm_model.loss_function = in_float64
    output = hybrid(**given)
    got = gradients(hybrid, output.loss)
    assert output.logits.shape == logits.shape
    torch.testing.assert_close(output.logits, logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(output.loss, want, rtol=1e-10, atol=0)
    assert got.keys() == wanted.keys()
    for name, of in wanted.items():
        # not closer: the language models take their norms and softmax in float32
        assert (got[name] - of).norm() <= 1e-6 * of.norm() + 1e-10, name


# In a hybrid


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "opt", "falcon"])
def test_the_loss_is_the_mean_over_the_cycles(family):
    """Two layers above the last point, which read masks and positions; another point below it."""
    assert_same(hybrid_of(family, injection_layers=[0, 1], blending_strategy="gated"), padded())


@pytest.mark.parametrize("points", [[0], [1], [3], [1, 2, 3]])
def test_wherever_the_last_point_is(points):
    given = padded() | {"position_ids": torch.arange(9).repeat(3, 1) + torch.arange(3)[:, None]}
    assert_same(hybrid_of(injection_layers=points), given)


@pytest.mark.parametrize("changes", [{"grad_cycles": 2}, {"trm_num_layers": 1, "num_recursion_steps": 3}])
def test_only_cycles_that_pass_gradients_count(changes):
    assert_same(hybrid_of(injection_layers=[1], cycles=4, **changes), padded())


def test_with_gradient_checkpointing():
    hybrid, given = hybrid_of(injection_layers=[1]).freeze_base().train(), padded()
    want = hybrid(**given).loss
    wanted = gradients(hybrid, want)
    hybrid.gradient_checkpointing_enable({"use_reentrant": False})
    got = gradients(hybrid, hybrid(**given).loss)
    for name, of in wanted.items():
        torch.testing.assert_close(got[name], of, rtol=1e-9, atol=1e-12)


def test_one_cycle_is_as_without_bit_for_bit():
    given = padded()
    found = []
    for deep in (False, True):
        hybrid = tiny.tiny_hybrid(num_cycles=1, deep_supervision=deep).train()
        output = hybrid(**given)
        found.append((output.loss, output.logits, gradients(hybrid, output.loss)))
    (loss, logits, of), (other_loss, other_logits, other_of) = found
    assert torch.equal(loss, other_loss)
    assert torch.equal(logits, other_logits)
    assert all(torch.equal(of[name], other_of[name]) for name in of | other_of)


def test_without_gradient_or_training_the_last_answer_is_the_only_one():
    given, hybrid = padded(), hybrid_of()
    hybrid.config.deep_supervision = False
    want = hybrid.eval()(**given)
    hybrid.config.deep_supervision = True
    assert torch.equal(hybrid(**given).loss, want.loss)
    hybrid.training = True
    unlabelled = {name: t for name, t in given.items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(hybrid(**unlabelled).logits, want.logits)
    with hybrid.disable_injection():
        assert hybrid(**given).logits.shape == hybrid(**unlabelled).logits.shape == want.logits.shape
    output = hybrid(**given, output_hidden_states=True)
    assert {len(h) for h in output.hidden_states} == {3}
    some = hybrid(**given, output_hidden_states=[1]).hidden_states
    wanted = hybrid.eval()(**given, output_hidden_states=[1]).hidden_states
    for h, w in zip(some, wanted, strict=True):  # None where it was not asked for
        assert h is w is None or torch.equal(h, w)


def test_a_trainers_count_of_items_is_kept():
    """Trainer divides the summed loss by the number of labels in all batches of a step."""
    given, hybrid = padded(), hybrid_of()
    tokens = (given["labels"][:, 1:] != -100).sum()
    loss = hybrid(**given, num_items_in_batch=tokens).loss
    torch.testing.assert_close(loss, hybrid(**given).loss, rtol=1e-10, atol=0)


def test_what_cannot_be_combined():
    with pytest.raises(ValueError, match=r"deep_supervision expected grad_cycles in 2..3 .* got 1"):
        tiny.tiny_config(num_cycles=3, grad_cycles=1, deep_supervision=True)
    with pytest.raises(ValueError, match="expected deep_supervision to be True or False, got 'yes'"):
        tiny.tiny_config(deep_supervision="yes")
    unlabelled = {name: t for name, t in padded().items() if name != "labels"}
    for deep in (hybrid_of(), hybrid_of(num_cycles=3, grad_cycles=2)):
        with pytest.raises(ValueError, match="deep_supervision expected .* labels in each training forward"):
            deep(**unlabelled)
    with pytest.raises(ValueError, match="deep_supervision expected no cache in training, got one"):
        hybrid_of()(**padded(), use_cache=True)
    with pytest.raises(ValueError, match="expected what BloomBlock is given .* after the last layer"):
        hybrid_of("bloom", injection_layers=[1])(**padded())
    assert_same(hybrid_of("bloom", injection_layers=[LAST]), padded())


LAST = tiny.LAYERS


def test_a_run_resumes_exactly(tmp_path):
    def phase_1():
        fields = {"num_cycles": 2, "grad_cycles": None, "deep_supervision": True}
        model = tiny_text.tiny_hybrid(tiny_text.tiny_base(dropout=0.2), **fields)
        enter(model, 1)
        return model

    straight, resumed, data = phase_1(), phase_1(), tiny_text.Counting()
    train(straight, data, settings_for(tmp_path / "a"))
    with pytest.raises(Stopped):
        train(phase_1(), data, settings_for(tmp_path / "b"), on_step=stop_after(13))
    train(resumed, data, settings_for(tmp_path / "b"), resume=True)
    assert_equal(resumed, straight)
    assert lines_of(tmp_path / "b") == lines_of(tmp_path / "a")


# The module


def trm_of(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    fields = {"num_recursion_steps": 2, "num_cycles": 4, "grad_cycles": 3, "intermediate_size": 32}
    return TRM(16, 2, **fields | changes).to(dtype)


def test_each_cycle_is_a_cycle_of_the_call():
    """With its gradient; those before pass none."""
    trm, x = trm_of(), torch.randn(2, 5, 16, dtype=torch.float64)
    w = torch.randn(3, 2, 5, 16, dtype=torch.float64)
    answers = list(trm.each_cycle(x))
    assert len(answers) == 3
    assert torch.equal(answers[-1][0], trm(x)[0])
    got = gradients(trm, sum((y * w[i]).sum() for i, (y, _) in enumerate(answers)))
    parts = []
    for i in range(3):
        trm.num_cycles, trm.grad_cycles = 2 + i, 1 + i
        y, z = trm(x)
        torch.testing.assert_close(answers[i], (y, z), rtol=0, atol=0)
        parts.append(gradients(trm, (y * w[i]).sum()))
    for name, of in got.items():
        torch.testing.assert_close(of, sum(part[name] for part in parts), rtol=1e-9, atol=1e-12)


@pytest.mark.kernels
@pytest.mark.skipif(not interpreting(), reason="the kernels run here only in Triton's interpreter")
def test_each_cycle_on_the_kernels():
    small = {"num_layers": 1, "num_recursion_steps": 1, "num_cycles": 3, "grad_cycles": 2}
    trm, x = trm_of(torch.float32, **small), torch.randn(1, 3, 16)
    weights = [1.0, -2.0]

    def run(model, x):
        loss = sum(
            a * (y * y.roll(1, -1)).sum() for a, (y, _) in zip(weights, model.each_cycle(x), strict=True)
        )
        return gradients(model, loss)

    exact = run(trm_of(**small), x.double())
    with backend("triton"):
        got = run(trm, x)
    for name, of in exact.items():
        assert (got[name] - of).norm() <= 5e-5 * of.norm(), name


def test_supervision_steps_carry_y_and_z_without_their_gradient():
    trm, x = trm_of(), torch.randn(2, 5, 16, dtype=torch.float64)
    embedding = torch.nn.Parameter(x.clone())
    y = z = None
    want = []
    for _ in range(3):
        y, z = trm(embedding * 2, y, z)
        want.append((y.detach(), gradients(trm, y.pow(3).sum()), embedding.grad.clone()))
        embedding.grad = None
        y, z = y.detach(), z.detach()
    steps = trm.supervision_steps(lambda: embedding * 2, 3)
    for (y, _), (wanted, of, of_x) in zip(steps, want, strict=True):
        assert torch.equal(y, wanted)
        got = gradients(trm, y.pow(3).sum())
        assert all(torch.equal(got[name], of[name]) for name in of | got)
        assert torch.equal(embedding.grad, of_x)
        embedding.grad = None
    losses = [y.pow(3).sum() for y, _ in trm.supervision_steps(2 * x, 3)]
    got = gradients(trm, sum(losses))
    for name, of in got.items():
        torch.testing.assert_close(of, sum(part[name] for _, part, _ in want if name in part))
