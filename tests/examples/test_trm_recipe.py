"""The TRM paper's recipe: its arithmetic, written once more in NumPy's float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trm_recipe import (
    AdamATan2,
    SparseSignSGD,
    average_of_weights,
    log_stablemax,
    stablemax_cross_entropy,
)


def numpy_log_stablemax(x):
    s = np.array([v + 1 if v >= 0 else 1 / (1 - v) for v in x])
    return np.log(s / s.sum())


def test_stablemax_is_its_formula_in_float64_and_counts_rows_alike():
    torch.manual_seed(0)
    logits = 5 * torch.randn(3, 4, 6)
    labels = torch.randint(6, (3, 4))
    labels[0, 1:] = -100
    labels[2] = -100
    of_rows = []
    for row, wanted in zip(logits.double().numpy(), labels.numpy(), strict=True):
        of_cells = [-numpy_log_stablemax(cell)[i] for cell, i in zip(row, wanted, strict=True) if i != -100]
        of_rows.append(sum(of_cells) / max(1, len(of_cells)))
    loss = stablemax_cross_entropy(logits, labels)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(sum(of_rows) / 3, rel=1e-12)
    assert sum(of_rows) / 3 != pytest.approx(F.cross_entropy(logits[:2].flatten(0, 1), labels[:2].flatten()))


def test_stablemax_has_a_gradient_everywhere():
    x = torch.tensor([[-1e30, -1.0, 0.0, 1.0, 2.0, 1e30]], dtype=torch.float64, requires_grad=True)
    log_stablemax(x)[0, 2].backward()
    assert x.grad.isfinite().all()
    at = torch.tensor([[0.3, -0.7, 2.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_stablemax, at)


def test_adam_atan2_takes_the_steps_of_its_formula():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(7, dtype=torch.float64))
    still = nn.Parameter(torch.ones(2))
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.3, "a": 1.27, "b": 0.5}
    optimizer = AdamATan2([p, still], **settings)
    w, m, v = p.detach().numpy().copy(), np.zeros(7), np.zeros(7)
    for step in range(1, 5):
        g = torch.randn(7, dtype=torch.float64)
        g[0] = 0.0  # where nothing ever came, nothing moves but by the decay
        p.grad = g
        optimizer.step()
        g = g.numpy()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        w = w * (1 - 0.1 * 0.3)
        angle = [math.atan2(a / (1 - 0.8**step), 0.5 * math.sqrt(b / (1 - 0.9**step))) for a, b in zip(m, v)]  # noqa: B905
        w = w - 0.1 * 1.27 * np.array(angle)
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-12)
    assert torch.equal(still, torch.ones(2)) and not optimizer.state[still]


def test_adam_atan2_does_not_care_for_the_scale_of_gradients_and_goes_on_from_its_state():
    def three_steps(scale, reload):
        torch.manual_seed(0)
        p = nn.Parameter(torch.ones(5))
        optimizer = AdamATan2([p], lr=0.1)
        for step in range(3):
            if reload and step == 2:
                state, optimizer = optimizer.state_dict(), AdamATan2([p], lr=0.5)
                optimizer.load_state_dict(state)
            p.grad = scale * torch.randn(5)
            optimizer.step()
        return p.detach()

    once = three_steps(1.0, reload=False)
    torch.testing.assert_close(three_steps(2.0**-60, reload=False), once)
    assert torch.equal(three_steps(1.0, reload=True), once)


def test_sign_sgd_moves_the_rows_of_the_batch_alone():
    torch.manual_seed(0)
    weights = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    before = weights.detach().numpy().copy()
    rows, upstream = torch.tensor([3, 1, 3]), torch.randn(3, 3, dtype=torch.float64)
    F.embedding(rows, weights, sparse=True).backward(upstream)
    SparseSignSGD([weights], lr=0.2, weight_decay=0.1).step()
    g = upstream.numpy()
    expected = before.copy()
    expected[3] = before[3] * (1 - 0.02) - 0.2 * np.sign(g[0] + g[2])  # the same puzzle twice is one row
    expected[1] = before[1] * (1 - 0.02) - 0.2 * np.sign(g[1])
    np.testing.assert_allclose(weights.detach().numpy(), expected, rtol=1e-12)


def test_what_an_optimizer_cannot_take_is_an_error():
    p = nn.Parameter(torch.ones(2, 2))
    for wrong in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"a": 0.0}, {"b": 0.0}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match="AdamATan2: expected"):
            AdamATan2([p], **wrong)
    with pytest.raises(ValueError, match="SparseSignSGD: expected lr"):
        SparseSignSGD([p], lr=-1.0)
    p.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match="SparseSignSGD: expected sparse gradients, got dense ones"):
        SparseSignSGD([p]).step()
    p.grad = p.grad.to_sparse()
    with pytest.raises(ValueError, match="AdamATan2: expected dense gradients"):
        AdamATan2([p]).step()
    assert torch.equal(p, torch.ones(2, 2))


def test_the_average_begins_with_the_weights_and_follows_them():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 8.0)
    average = average_of_weights(model, decay=0.75)
    assert average.module.weight.item() == 8.0
    expected = 8.0
    for weight in (0.0, 4.0):
        nn.init.constant_(model.weight, weight)
        average.update_parameters(model)
        expected = 0.75 * expected + 0.25 * weight
        assert average.module.weight.item() == expected
    assert model.weight.item() == 4.0
