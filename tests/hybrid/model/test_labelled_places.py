"""Logits where a label counts: the loss and gradients of all logits, and the head sees no other place."""

import pytest
import torch

from hybrid.model import labelled_places, linear_cross_entropy
from hybrid.model.labelled_places import LabelledPlaces
from tests.support.tiny import FAMILIES, VOCABULARY, awaken, tiny_base, tiny_hybrid, tokens


def rows(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two rows of 9 tokens: one asks after tokens 2 and 7, the other, padded, after token 3 only."""
    labels = torch.full((2, 9), -100)
    labels[0, [0, 3, 8]] = torch.tensor([5, 6, 7])  # the first is predicted by nothing
    labels[1, 4] = 8
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    return {"input_ids": tokens(2, 9, seed), "labels": labels, "attention_mask": mask}


def in_parts(monkeypatch) -> None:
    """However small the vocabulary and few the places."""
    monkeypatch.setattr(labelled_places, "_LARGE", 0)
    monkeypatch.setattr(labelled_places, "_MOST_LOGITS", 0)


def loss_and_gradients(model, inputs):
    torch.manual_seed(0)  # of dropout
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_as_all_logits(model, inputs) -> list[torch.Size]:
    """What the head was given, in the training with labelled places only."""
    loss, gradients = loss_and_gradients(model, inputs)
    places, shapes = LabelledPlaces(model), []
    base = getattr(model, "llm_model", model)
    with places.only(inputs) as asked:
        handle = base.get_output_embeddings().register_forward_pre_hook(
            lambda head, args: shapes.append(args[0].shape)
        )
        loss_there, gradients_there = loss_and_gradients(model, asked)
        handle.remove()
    torch.testing.assert_close(loss_there, loss, rtol=1e-6, atol=1e-6)
    assert gradients_there.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_there[name], gradient, rtol=1e-5, atol=1e-6)
    # and afterwards the model is what it was
    assert model(**inputs, use_cache=False).logits.shape == (2, 9, VOCABULARY)
    torch.testing.assert_close(loss_and_gradients(model, inputs)[0], loss, rtol=0, atol=0)
    return shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_all_logits(family):
    model = tiny_hybrid(family).train().requires_grad_(True)

    assert assert_as_all_logits(model, rows()) == [(1, 4, 32)]


@pytest.mark.parametrize("family", FAMILIES)
def test_in_parts_as_well(family, monkeypatch):
    in_parts(monkeypatch)
    monkeypatch.setattr(linear_cross_entropy, "_AT_ONCE", 2 * VOCABULARY)  # 3 places: two and one
    model = tiny_hybrid(family).train().requires_grad_(True)

    caps_its_logits = family == "gemma2"
    assert assert_as_all_logits(model, rows()) == [(1, 4, 32) if caps_its_logits else (1, 2, 32)]


@pytest.mark.parametrize("parts", [False, True])
def test_every_answer_of_deep_supervision_is_asked_at_these_places(parts, monkeypatch):
    if parts:
        in_parts(monkeypatch)
    model = tiny_hybrid(grad_cycles=None, deep_supervision=True).train().requires_grad_(True)

    assert assert_as_all_logits(model, rows()) == [(2, 2 if parts else 4, 32)]


def test_a_frozen_head_gets_no_gradient(monkeypatch):
    in_parts(monkeypatch)
    model = awaken(tiny_hybrid()).freeze_base().train()

    assert_as_all_logits(model, rows())

    assert model.llm_model.get_output_embeddings().weight.grad is None


def test_a_plain_language_model_whose_every_token_counts():
    model = tiny_base().train()
    inputs = {"input_ids": tokens(2, 9), "labels": tokens(2, 9)}

    assert assert_as_all_logits(model, inputs) == [(1, 17, 32)]


def test_a_head_that_sees_some_tokens_only_is_an_error():
    model = tiny_base().train()

    with (
        LabelledPlaces(model).only(rows()) as asked,
        pytest.raises(ValueError, match=r"all 18 tokens, got one of shape \[2, 1, 32\]"),
    ):
        model(**asked, logits_to_keep=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy_is_cross_entropy_of_linear(dtype, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "_AT_ONCE", 3 * 50)  # of 50 logits each
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype).requires_grad_(True)  # noqa: E731
    h, weight, bias = draw(7, 16), draw(50, 16), draw(50)
    target = torch.randint(50, (7,), generator=generator)

    loss = linear_cross_entropy.linear_cross_entropy(h, weight, bias, target)
    gradients = torch.autograd.grad(3 * loss, (h, weight, bias))

    wide = [t.detach().double().requires_grad_(True) for t in (h, weight, bias)]
    logits = torch.nn.functional.linear(*wide)
    expected = torch.nn.functional.cross_entropy(logits, target)
    # bfloat16 keeps 8 bits of a logit
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 1e-2}
    torch.testing.assert_close(loss.double(), expected, **tolerance)
    for ours, theirs in zip(gradients, torch.autograd.grad(3 * expected, wide), strict=True):
        torch.testing.assert_close(ours.double(), theirs, **tolerance)


def test_logits_that_fit_in_memory_are_made_at_once(monkeypatch):
    made, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda h, *rest: made.append(len(h)) or linear(h, *rest)
    )
    h, weight, target = torch.randn(100, 4), torch.randn(2**10, 4), torch.zeros(100, dtype=torch.int64)

    linear_cross_entropy.linear_cross_entropy(h, weight, None, target)

    assert made == [100]
