"""The attention of a TRM in vLLM: for every evaluation of a layer one of vLLM's own, with its own pages.

Only vllm_model.py imports this file: it needs vLLM.
"""

import copy

import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention

from trm_kernels.ops.attention.rope import Angles, rope

_WIDEST, _STEP = 512, 32  # head widths that are tried where a backend lacks the TRM's own


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
