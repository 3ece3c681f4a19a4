"""The attention of a TRM in vLLM: for every evaluation of a layer one of vLLM's own, with its own pages.

Only vllm_model.py imports this file: it needs vLLM.
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention

from trm_kernels.ops.attention.rope import Angles, rope
from trm_kernels.recursion.in_order import rounds_of

_WIDEST, _STEP = 512, 32  # head widths that are tried where a backend lacks the TRM's own


class TokenRow(NamedTuple):
    """What is known of the tokens of a forward, which are those of all sequences, one after the other."""

    positions: Tensor  # [T]
    angles: Angles  # RoPE's, [1, T, K/2]


class RowAttention:
    """The attention of an injection point in one forward, as trm_recursion takes it.

    paged   of each evaluation of a layer; with trm_cache "last" of each layer
    """

    def __init__(self, paged: nn.ModuleList, row: TokenRow) -> None:
        self.paged, self.row = paged, row
        self._qkv: dict[int, Tensor] = {}  # of a layer, [1, T, (H + 2G) K] of all tokens

    def __call__(self, evaluation: int, qkv: Tensor) -> Tensor:
        attended: Tensor = self.paged[evaluation](qkv, self.row.angles)
        return attended

    def rounds(self, tokens: int, device: torch.device) -> list[Tensor]:
        """The first tokens of all sequences in the row, then the second ones, and so on; their places [N].

        Where positions go on by one, a sequence is taken to go on. Two that happen to follow each other so
        are taken for one: their tokens come in more rounds then, and still each after those before it.
        """
        places = torch.arange(tokens, device=device)
        begins = torch.ones(tokens, dtype=torch.bool, device=device)
        begins[1:] = self.row.positions.diff() != 1
        number = places - torch.where(begins, places, 0).cummax(0).values
        return rounds_of(number)

    def of_tokens(self, layer: int, tokens: Tensor, qkv: Tensor) -> Tensor:
        """Attention of some tokens, [1, N, H K]; vLLM writes and attends for the whole row again.

        What it writes of later tokens, zeros, is seen by no token before them, and is written over.
        """
        if layer not in self._qkv:
            self._qkv[layer] = qkv.new_zeros(1, len(self.row.positions), qkv.shape[2])
        self._qkv[layer][:, tokens] = qkv
        return self(layer, self._qkv[layer])[:, tokens]


class PagedAttention(nn.Module):
    """One evaluation of a TRM layer: its keys and values go into vLLM's cache, and it attends over that.

    Errors: ValueError where vLLM has no attention that is as wide as the TRM's heads, or wider.
    """

    def __init__(
        self, heads: int, key_value_heads: int, width: int, vllm_config: VllmConfig, name: str
    ) -> None:
        super().__init__()
        self.heads, self.key_value_heads, self.width = heads, key_value_heads, width
        cache_config = copy.copy(vllm_config.cache_config)
        cache_config.sliding_window = None  # the language model's; the TRM attends to all tokens
        known = vllm_config.compilation_config.static_forward_context
        for padded in (width, *range(-(-width // _STEP) * _STEP, _WIDEST + 1, _STEP)):
            try:
                attention = Attention(
                    heads, padded, width**-0.5, key_value_heads, cache_config=cache_config, prefix=name
                )
            except ValueError:  # no backend has this width
                known.pop(name, None)
                continue
            if attention.attn_backend.supports_head_size(padded):
                self.attention, self.padded = attention, padded
                return
            known.pop(name)
        raise ValueError(
            f"HybridModel: expected a TRM whose heads vLLM's attention has, got heads of width {width}."
        )

    def forward(self, qkv: Tensor, angles: Angles) -> Tensor:
        """qkv [1, T, (H + 2G) K], as rope_attention takes it -> [1, T, H K]; T tokens of all sequences."""
        H, G, T = self.heads, self.key_value_heads, qkv.shape[1]
        qk, v = qkv.view(1, T, H + 2 * G, self.width).split((H + G, G), dim=2)
        q, k = rope(qk, angles).split((H, G), dim=2)
        more = self.padded - self.width  # zeros: they add nothing to a score
        o = self.attention(*(F.pad(t[0], (0, more)).flatten(1) for t in (q, k, v)))
        return o.view(T, H, self.padded)[..., : self.width].reshape(1, T, H * self.width)
