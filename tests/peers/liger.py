"""Liger's own tests of its kernels, on our ops: in Triton's interpreter, at small shapes.

    make liger

The test functions, their reference modules and tolerances are Liger's, out of its source distribution. Where
they name a module of Liger's, they get one of those below, around one of our ops; no kernel of Liger's runs.
What these ops do not compute is left out: docs/peers-tests.md says what that is.
"""

import sys

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from hybrid.model import linear_cross_entropy as loss_of_some_rows
from tests.peers.sources import package, source
from trm_kernels.ops.add_rms_norm import add_rms_norm
from trm_kernels.ops.attention.rope import Angles, rope
from trm_kernels.ops.swiglu_mlp import swiglu_mlp
from trm_kernels.runtime.backend import backend, interpreting

if not interpreting():
    pytest.skip("these tests are for Triton's interpreter: `make liger`", allow_module_level=True)
LIGER = source("liger_kernel", "0.8.5")
sys.path.insert(0, str(LIGER / "src"))
package("test", LIGER / "test")  # by this name its files import one another
from test.transformers import test_fused_linear_cross_entropy as of_loss  # noqa: E402
from test.transformers import test_rms_norm as of_rms_norm  # noqa: E402
from test.transformers import test_rope as of_rope  # noqa: E402
from test.transformers import test_swiglu as of_swiglu  # noqa: E402

torch.use_deterministic_algorithms(False)  # test_rms_norm turns it on for the whole process


@pytest.fixture(autouse=True)
def kernels():
    """Triton, or an error: never the reference in its place."""
    with backend("triton"):
        yield


def theirs(test, names):
    """The values that Liger's `test` is parametrised with under `names`."""
    lists = [mark.args[1] for mark in test.pytestmark if mark.args[:1] == (names,)]
    assert len(lists) == 1, f"{test.__name__} is not parametrised with {names!r} once"
    return [getattr(one, "values", one) for one in lists[0]]


def tolerances(test):
    return pytest.mark.parametrize("tolerance", theirs(test, "dtype, atol, rtol"), ids=str)


class RMSNorm(nn.Module):
    """As LigerRMSNorm; x goes in as the sum of its halves, and the gain, which the op has not, follows it."""

    def __init__(self, hidden_size, elementwise_affine, **_):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size)) if elementwise_affine else None

    def forward(self, x):
        y = add_rms_norm(x / 2, x / 2, eps=1e-6)
        return y if self.weight is None else self.weight * y


# a gain in Gemma's way is in float32, before the rounding: not to be had from outside of the op
NORMS = [("llama", True), ("llama", False), ("gemma", False), ("none", False)]


@tolerances(of_rms_norm.test_correctness)
@pytest.mark.parametrize(("casting_mode", "affine"), NORMS)
@pytest.mark.parametrize(("batch", "tokens", "width"), [(2, 2, 8), (9, 7, 41), (5, 12, 123), (2, 3, 512)])
def test_add_rms_norm(monkeypatch, batch, tokens, width, casting_mode, affine, tolerance):
    monkeypatch.setattr(of_rms_norm, "LigerRMSNorm", RMSNorm)
    references = theirs(of_rms_norm.test_correctness, "reference, offset, casting_mode")
    (reference,) = (one for one in references if one[2] == casting_mode)
    of_rms_norm.test_correctness(batch, tokens, width, *tolerance, *reference, False, affine)


class SwiGLUMLP(LlamaMLP):
    """As LigerSwiGLUMLP."""

    def forward(self, x):
        gate_up = torch.cat((self.gate_proj.weight, self.up_proj.weight))
        return swiglu_mlp(x, gate_up, self.down_proj.weight)


@tolerances(of_swiglu.test_correctness_llamamlp)
@pytest.mark.parametrize("shape", [(2, 9, 32, 48), (3, 7, 41, 61), (6, 42, 123, 431)], ids=str)
def test_swiglu_mlp(monkeypatch, shape, tolerance):
    monkeypatch.setattr(of_swiglu, "LigerSwiGLUMLP", SwiGLUMLP)
    monkeypatch.setattr(of_swiglu, "LLAMA_CONFIG", LlamaConfig(hidden_size=32, intermediate_size=32))
    of_swiglu.test_correctness_llamamlp(*shape, *tolerance)


def rotary_pos_emb(q, k, cos, sin):
    """As liger_rotary_pos_emb: heads before tokens, and each cosine twice."""
    angles = Angles(*(t.float().chunk(2, dim=-1)[0] for t in (cos, sin)))
    return tuple(rope(u.transpose(1, 2), angles).transpose(1, 2) for u in (q, k))


@tolerances(of_rope.test_correctness)
@pytest.mark.parametrize("a_table_each", theirs(of_rope.test_correctness, "expand_position_ids"))
@pytest.mark.parametrize(
    "shape", [(1, 2, 2, 2, 8), (2, 12, 4, 4, 16), (2, 12, 8, 2, 16), (3, 23, 7, 5, 92)], ids=str
)
def test_rope(monkeypatch, shape, a_table_each, tolerance):
    monkeypatch.setattr(of_rope, "liger_rotary_pos_emb", rotary_pos_emb)
    dtype, atol, rtol = tolerance
    of_rope.test_correctness(*shape, dtype, a_table_each, atol, rtol)


class LinearCrossEntropyLoss:
    """As LigerFusedLinearCrossEntropyLoss; rows to ignore are left out before the op, as training does."""

    def __init__(self, **settings):
        self.ignored = settings["ignore_index"]

    def __call__(self, weight, x, target, bias):
        kept = target != self.ignored
        return loss_of_some_rows.linear_cross_entropy(x[kept], weight, bias, target[kept])


MEANS = [
    one[1:]
    for one in theirs(of_loss.test_correctness, "reduction, scalar, dtype, atol, rtol")
    if one[0] == "mean"
]
LOSSES = [of_loss.test_correctness, of_loss.test_correctness_with_forward_only]


@pytest.mark.parametrize("mean", MEANS, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows_at_once", [1000, 50])
@pytest.mark.parametrize("test", LOSSES, ids=lambda test: test.__name__)
def test_linear_cross_entropy(monkeypatch, test, rows_at_once, has_bias, mean):
    B, T, H, V = 4, 47, 31, 123
    monkeypatch.setattr(of_loss, "LigerFusedLinearCrossEntropyLoss", LinearCrossEntropyLoss)
    monkeypatch.setattr(loss_of_some_rows, "_AT_ONCE", rows_at_once * V)
    scalar, dtype, atol, rtol = mean
    test(
        *(B, T, H, V),
        scalar=scalar,
        dtype=dtype,
        bias=has_bias,
        has_ce_weight=False,
        lse_square_scale=0,
        label_smoothing=0,
        ignore_index=-100,
        reduction="mean",
        softcap=None,
        return_z_loss=False,
        accum_dtype=None,
        atol=atol,
        rtol=rtol,
    )
