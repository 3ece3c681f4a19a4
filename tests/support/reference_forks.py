"""What people change in the TRM paper's code: each fork computes or is called a little differently."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from tests.support.reference_trm import Carry, Inner, Layer, Reasoning


class Refactored(Inner):
    """The same in other words: it is served."""

    def forward(self, carry, batch):
        x = self._input_embeddings(batch["inputs"], batch["puzzle_identifiers"])
        cos_sin, state = (self.rotary_emb() if hasattr(self, "rotary_emb") else None), (carry.z_H, carry.z_L)
        for i in range(self.config.H_cycles):
            with torch.set_grad_enabled(i == self.config.H_cycles - 1 and torch.is_grad_enabled()):
                state = self.cycle(x, *state, cos_sin)
        q = self.q_head(state[0][:, 0]).float()
        return Carry(*(t.detach() for t in state)), self.lm_head(state[0])[:, 3:], (q[..., 0], q[..., 1])


@dataclass(frozen=True)
class NamedCarry:
    z_L: torch.Tensor
    z_H: torch.Tensor
    name: str = "carry"


class OwnCarry(Inner):
    """A carry of its own class, with a field that stays: it is served."""

    def empty_carry(self, batch_size):
        shape = (batch_size, self.config.seq_len + self.puzzle_emb_len, self.config.hidden_size)
        return NamedCarry(*torch.empty(2, *shape, dtype=self.dtype))

    def forward(self, carry, batch):
        new, logits, q = super().forward(Carry(carry.z_H, carry.z_L), batch)
        return NamedCarry(new.z_L, new.z_H, carry.name), logits, q


class Counting(Inner):
    """Its calls are counted, and change nothing: it is served."""

    calls = 0

    def forward(self, carry, batch):
        self.calls += 1
        return super().forward(carry, batch)


SERVED = (Refactored, OwnCarry, Counting)


class Scaled(Inner):
    def cycle(self, x, y, z, cos_sin):
        y, z = super().cycle(x, y, z, cos_sin)
        return 0.9 * y, z


class GatedFromZero(Inner):
    """A gate that does nothing yet: only a gradient, or another value, shows it."""

    def __init__(self, c, dtype=torch.float32):
        super().__init__(c, dtype)
        self.alpha = nn.Parameter(torch.zeros(()))

    def cycle(self, x, y, z, cos_sin):
        new_y, new_z = super().cycle(x, y, z, cos_sin)
        return new_y + self.alpha * torch.tanh(y), new_z


class FrozenGateFromZero(GatedFromZero):
    def __init__(self, c, dtype=torch.float32):
        super().__init__(c, dtype)
        self.alpha.requires_grad_(False)


class GateOfTraining(Inner):
    def cycle(self, x, y, z, cos_sin):
        y, z = super().cycle(x, y, z, cos_sin)
        return (y + 0.1 * torch.randn_like(y) if self.training else y), z


class AfterTheFirstCall(Counting):
    def cycle(self, x, y, z, cos_sin):
        y, z = super().cycle(x, y, z, cos_sin)
        return (y if self.calls == 1 else 0.9 * y), z


class ForOtherBatches(Inner):
    def cycle(self, x, y, z, cos_sin):
        y, z = super().cycle(x, y, z, cos_sin)
        return (y if len(y) <= 2 else 0.9 * y), z


class OnlyItsGradient(Inner):
    """The same numbers, with a part of them cut from the graph."""

    def cycle(self, x, y, z, cos_sin):
        return super().cycle(x.detach(), y, z, cos_sin)


class FourValues(Inner):
    def forward(self, carry, batch):
        return *super().forward(carry, batch), carry


class OneQ(Inner):
    def forward(self, carry, batch):
        carry, logits, (q, _) = super().forward(carry, batch)
        return carry, logits, q


class WithStep(Inner):
    def forward(self, carry, batch, step=None):
        return super().forward(carry, batch)


class WithOptions(Inner):
    def forward(self, carry, batch, **options):
        return super().forward(carry, batch)


class OtherNames(Inner):
    def forward(self, state, data):
        return super().forward(state, data)


class WithTimesteps(Inner):
    def forward(self, carry, batch):
        return super().forward(carry, batch | {"inputs": batch["inputs"] + 0 * batch["timestep_idxs"]})


class WithTimestepsIfAny(Inner):
    def forward(self, carry, batch):
        if "timestep_idxs" in batch:
            raise NotImplementedError
        return super().forward(carry, batch)


class WithMaskIfAny(Inner):
    def forward(self, carry, batch):
        batch.get("mask")
        return super().forward(carry, batch)


class EmbedsTimesteps(Inner):
    def _input_embeddings(self, inputs, puzzle_identifiers, timestep_idxs):
        return super()._input_embeddings(inputs, puzzle_identifiers)

    def forward(self, carry, batch):
        raise NotImplementedError


@dataclass
class ThreeLatents:
    z_H: torch.Tensor
    z_L: torch.Tensor
    z_M: torch.Tensor


class MoreLatents(Inner):
    def empty_carry(self, batch_size):
        shape = (batch_size, self.config.seq_len + self.puzzle_emb_len, self.config.hidden_size)
        return ThreeLatents(*torch.empty(3, *shape))

    def forward(self, carry, batch):
        new, logits, q = super().forward(carry, batch)
        return ThreeLatents(new.z_H, new.z_L, torch.tanh(carry.z_M)), logits, q


@dataclass
class ListedLatents:
    z_H: torch.Tensor
    z_L: list = field(default_factory=list)


class ListOfLatents(Inner):
    def empty_carry(self, batch_size):
        shape = (batch_size, self.config.seq_len + self.puzzle_emb_len, self.config.hidden_size)
        return ListedLatents(torch.empty(shape), [torch.empty(shape)] * 2)

    def forward(self, carry, batch):
        new, logits, q = super().forward(Carry(carry.z_H, sum(carry.z_L)), batch)
        return ListedLatents(new.z_H, [new.z_L, new.z_L]), logits, q


@dataclass
class OneLatent:
    z_H: torch.Tensor


class WithoutZL(Inner):
    def empty_carry(self, batch_size):
        return OneLatent(torch.empty(batch_size, 10, 24))

    def forward(self, carry, batch):
        new, logits, q = super().forward(Carry(carry.z_H, torch.zeros_like(carry.z_H)), batch)
        return OneLatent(new.z_H), logits, q


class DictCarry(Inner):
    def empty_carry(self, batch_size):
        return {name: torch.empty(batch_size, 10, 24) for name in ("z_H", "z_L")}

    def forward(self, carry, batch):
        new, logits, q = super().forward(Carry(**carry), batch)
        return {"z_H": new.z_H, "z_L": new.z_L}, logits, q


class Dropout(Inner):
    def forward(self, carry, batch):
        z_H = F.dropout(carry.z_H, 0.1, self.training)
        return super().forward(Carry(z_H, carry.z_L), batch)


class DropsInItsLayers(Inner):
    def __init__(self, c, dtype=torch.float32):
        super().__init__(c, dtype)
        for layer in self.L_level.layers:
            layer.mlp.register_forward_hook(lambda m, _, output: F.dropout(output, 0.1, m.training))


class AllCyclesWithGradient(Inner):
    def forward(self, carry, batch):
        with_gradient = torch.enable_grad

        class Enabled:
            def __enter__(self):
                self.inside = with_gradient()
                self.inside.__enter__()

            def __exit__(self, *error):
                self.inside.__exit__(*error)

        before, torch.no_grad = torch.no_grad, Enabled
        try:
            return super().forward(carry, batch)
        finally:
            torch.no_grad = before


class CarryWithGradient(Inner):
    def forward(self, carry, batch):
        y, z = self.cycle(
            self._input_embeddings(batch["inputs"], batch["puzzle_identifiers"]),
            carry.z_H,
            carry.z_L,
            self.rotary_emb(),
        )
        _, logits, q = super().forward(carry, batch)
        return Carry(y, z), logits, q


class QOfTheMean(Inner):
    def forward(self, carry, batch):
        new, logits, _ = super().forward(carry, batch)
        q = self.q_head(new.z_H.mean(1)).float()
        return new, logits, (q[..., 0], q[..., 1])


class LogitsOfAll(Inner):
    def forward(self, carry, batch):
        new, _, q = super().forward(carry, batch)
        return new, self.lm_head(new.z_H), q


class PreNormLayer(Layer):
    def forward(self, hidden_states, cos_sin):
        v = hidden_states + self.self_attn(F.rms_norm(hidden_states, hidden_states.shape[-1:]), cos_sin)
        return v + self.mlp(F.rms_norm(v, v.shape[-1:]))


class PreNorm(Inner):
    def __init__(self, c, dtype=torch.float32):
        super().__init__(c, dtype)
        self.L_level = Reasoning(PreNormLayer(c, 10) for _ in range(c.L_layers))


class OtherLayers(Inner):
    """Layers of torch, under another name."""

    def __init__(self, c, dtype=torch.float32):
        super().__init__(c, dtype)
        self.L_level = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 2, 32, batch_first=True), 2)


class NoLayers(Inner):
    def __init__(self, c, dtype=torch.float32):
        super().__init__(c, dtype)
        self.L_level = nn.GRU(24, 24)


class OnlyAtTheFirstToken(Inner):
    """A change too small to see in a mean."""

    def forward(self, carry, batch):
        new, logits, q = super().forward(carry, batch)
        return new, torch.cat([1.5 * logits[:, :1], logits[:, 1:]], 1), q


REFUSED = {
    Scaled: "a relative difference of 0.1.* of the carry's z_H in training mode",
    GatedFromZero: "a relative difference of .* of the carry's z_H",
    FrozenGateFromZero: "a relative difference of .* of the carry's z_H",
    GateOfTraining: "a relative difference of .* of the carry's z_H in training mode",
    AfterTheFirstCall: "a relative difference of .* of the carry's z_H in eval mode",
    ForOtherBatches: "a relative difference of 0.1.* of the carry's z_H in eval mode",
    OnlyItsGradient: "gradient of",
    FourValues: "its forward returns 4 and not",
    OneQ: "its forward returns .*'Tensor', 'Tensor'",
    WithStep: r"one of \(carry, batch, step\)",
    WithOptions: r"one of \(carry, batch, options\)",
    OtherNames: r"one of \(state, data\)",
    WithTimesteps: "KeyError .'timestep_idxs'",
    WithTimestepsIfAny: r"asks the batch for \['timestep_idxs'\]",
    WithMaskIfAny: r"asks the batch for \['mask'\]",
    EmbedsTimesteps: "NotImplementedError",
    MoreLatents: "a relative difference of .* of the carry's z_M",
    ListOfLatents: "ListedLatents is no dataclass with tensors z_H and z_L",
    WithoutZL: "OneLatent is no dataclass with tensors z_H and z_L",
    DictCarry: "dict is no dataclass with tensors z_H and z_L",
    Dropout: "a relative difference of .* of the carry's z_H in training mode",
    DropsInItsLayers: "a relative difference of .* of the carry's z_H in training mode",
    AllCyclesWithGradient: "a relative difference of .* of the gradient of",
    CarryWithGradient: "the carry's z_H",
    QOfTheMean: "a relative difference of .* of q of halting",
    LogitsOfAll: r"the logits of \(2, 10, 5\)",
    PreNorm: "a relative difference of",
    OtherLayers: "norm1.bias",
    NoLayers: "0 layers",
    OnlyAtTheFirstToken: "a relative difference of .* of the logits",
}
