"""A stand-in for the model of the TRM paper's code: its names, its order of evaluation."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn


def config(**changes):
    fields = {
        "H_cycles": 3,
        "L_cycles": 2,
        "L_layers": 2,
        "hidden_size": 24,
        "num_heads": 2,
        "expansion": 4.0,
        "pos_encodings": "rope",
        "mlp_t": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "seq_len": 7,
        "vocab_size": 5,
    }
    return SimpleNamespace(**(fields | changes))


def rms(v, eps):
    return (v.float() * (v.float().square().mean(-1, keepdim=True) + eps).rsqrt()).to(v.dtype)


class Projection(nn.Module):
    def __init__(self, inputs, outputs, bias=False):
        super().__init__()
        # half of what keeps the scale: differences in rounding then do not grow from evaluation to evaluation
        self.weight = nn.Parameter(0.5 * torch.randn(outputs, inputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, v):
        return F.linear(v, self.weight.to(v.dtype), None if self.bias is None else self.bias.to(v.dtype))


class SwiGLU(nn.Module):
    def __init__(self, width, expansion):
        super().__init__()
        inner = math.ceil(round(expansion * width * 2 / 3) / 256) * 256
        self.gate_up_proj, self.down_proj = Projection(width, 2 * inner), Projection(inner, width)

    def forward(self, v):
        gate, up = self.gate_up_proj(v).chunk(2, dim=-1)
        return self.down_proj(gate * torch.sigmoid(gate) * up)


class Attention(nn.Module):
    causal = False

    def __init__(self, width, heads, groups):
        super().__init__()
        self.num_heads, self.num_key_value_heads = heads, groups
        self.qkv_proj = Projection(width, (heads + 2 * groups) * (width // heads))
        self.o_proj = Projection(width, width)

    def forward(self, v, cos_sin):
        sizes = (self.num_heads, self.num_key_value_heads, self.num_key_value_heads)
        q, k, w = self.qkv_proj(v).unflatten(-1, (sum(sizes), -1)).transpose(1, 2).split(sizes, dim=1)
        if cos_sin is not None:
            (cos, sin), half = cos_sin, q.shape[-1] // 2
            q, k = (
                (u * cos + torch.cat([-u[..., half:], u[..., :half]], -1) * sin).to(v.dtype) for u in (q, k)
            )
        k, w = (u.repeat_interleave(sizes[0] // sizes[1], dim=1) for u in (k, w))
        scores = (q @ k.mT).float() / math.sqrt(q.shape[-1])
        return self.o_proj((scores.softmax(-1).to(v.dtype) @ w).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, c, tokens):
        super().__init__()
        self.eps = c.rms_norm_eps
        if c.mlp_t:
            self.mlp_t = SwiGLU(tokens, c.expansion)
        else:
            self.self_attn = Attention(c.hidden_size, c.num_heads, getattr(c, "groups", c.num_heads))
        self.mlp = SwiGLU(c.hidden_size, c.expansion)

    def forward(self, hidden_states, cos_sin):
        v = hidden_states
        if hasattr(self, "mlp_t"):
            v = rms(v.mT + self.mlp_t(v.mT), self.eps).mT
        else:
            v = rms(v + self.self_attn(v, cos_sin), self.eps)
        return rms(v + self.mlp(v), self.eps)


class Reasoning(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden_states, input_injection, cos_sin):
        v = hidden_states + input_injection
        for layer in self.layers:
            v = layer(v, cos_sin)
        return v


class Rotary(nn.Module):
    def __init__(self, width, tokens, theta):
        super().__init__()
        angles = torch.arange(tokens)[:, None] * theta ** (-torch.arange(0, width, 2) / width)
        self.register_buffer("angles", torch.cat([angles, angles], -1), persistent=False)

    def forward(self):
        return self.angles.cos(), self.angles.sin()


@dataclass
class Carry:
    z_H: torch.Tensor
    z_L: torch.Tensor


class Inner(nn.Module):
    puzzle_emb_len = 3

    def __init__(self, c, dtype=torch.float32):
        super().__init__()
        self.config, self.dtype = c, dtype
        tokens = c.seq_len + self.puzzle_emb_len
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.puzzle_emb = nn.Embedding(2, self.puzzle_emb_len * c.hidden_size)
        self.lm_head = Projection(c.hidden_size, c.vocab_size)
        self.q_head = Projection(c.hidden_size, 2, bias=True)
        if c.pos_encodings == "rope":
            self.rotary_emb = Rotary(c.hidden_size // c.num_heads, tokens, c.rope_theta)
        elif c.pos_encodings == "learned":
            self.embed_pos = nn.Parameter(torch.randn(tokens, c.hidden_size))
        self.L_level = Reasoning(Layer(c, tokens) for _ in range(c.L_layers))
        self.register_buffer("H_init", torch.randn(c.hidden_size, dtype=dtype))
        self.register_buffer("L_init", torch.randn(c.hidden_size, dtype=dtype))

    def _input_embeddings(self, inputs, puzzle_identifiers):
        prefix = self.puzzle_emb(puzzle_identifiers).view(len(inputs), self.puzzle_emb_len, -1)
        x = torch.cat([prefix, self.embed_tokens(inputs)], dim=1)
        return (x + self.embed_pos if hasattr(self, "embed_pos") else x).to(self.dtype)

    def start(self, batch):
        shape = (len(batch["inputs"]), self.config.seq_len + self.puzzle_emb_len, -1)
        return Carry(self.H_init.expand(shape), self.L_init.expand(shape))

    def cycle(self, x, y, z, cos_sin):
        for _ in range(self.config.L_cycles):
            z = self.L_level(z, y + x, cos_sin=cos_sin)
        return self.L_level(y, z, cos_sin=cos_sin), z

    def forward(self, carry, batch):
        cos_sin = self.rotary_emb() if hasattr(self, "rotary_emb") else None
        x = self._input_embeddings(batch["inputs"], batch["puzzle_identifiers"])
        y, z = carry.z_H, carry.z_L
        with torch.no_grad():
            for _ in range(self.config.H_cycles - 1):
                y, z = self.cycle(x, y, z, cos_sin)
        y, z = self.cycle(x, y, z, cos_sin)
        q = self.q_head(y[:, 0]).float()
        return (
            Carry(y.detach(), z.detach()),
            self.lm_head(y)[:, self.puzzle_emb_len :],
            (q[..., 0], q[..., 1]),
        )


class Act(nn.Module):
    """What stands around the inner model: its forward starts anew every time here."""

    def __init__(self, c, dtype=torch.float32):
        super().__init__()
        self.inner = Inner(c, dtype)

    def forward(self, batch):
        return self.inner(self.inner.start(batch), batch)
