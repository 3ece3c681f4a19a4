"""A layer of a TRM as modules: the matrices of its attention or `mlp_t`, and of its MLP."""

from typing import Any

import torch
from torch import Tensor, nn

from trm_kernels.recursion.weights import AttentionWeights, LayerWeights, SwiGLUWeights

# TRM's own code pads the inner width of an MLP to a multiple of this
_INNER_MULTIPLE = 256


def default_intermediate_size(width: int) -> int:
    """The MLP's inner width: 8/3 of the width it works on, rounded up to a multiple of 256."""
    return -(-round(8 / 3 * width) // _INNER_MULTIPLE) * _INNER_MULTIPLE


class Matrix(nn.Module):
    """One weight [out, in]. Calling it gives the weight: that is where offloading and sharding hooks act.

    It is no nn.Linear because the kernels need the matrix itself: a library that swaps the forward of
    an nn.Linear (LoRA, quantisation) would be bypassed without a word. Here it cannot find one.
    """

    def __init__(self, out_features: int, in_features: int, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal, with a standard deviation that keeps the scale of a normalised input."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self) -> Tensor:
        """The weight, [out, in]."""
        return self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class Attention(nn.Module):
    """The attention's two matrices; the queries', keys' and values' projections are stacked in that order."""

    def __init__(self, width: int, heads: int, key_value_heads: int, **factory: Any) -> None:
        super().__init__()
        self.qkv_proj = Matrix((heads + 2 * key_value_heads) * (width // heads), width, **factory)
        self.o_proj = Matrix(width, width, **factory)

    def forward(self, dtype: torch.dtype) -> AttentionWeights:
        """Both matrices in `dtype`; differentiable."""
        return AttentionWeights(self.qkv_proj().to(dtype), self.o_proj().to(dtype))


class SwiGLU(nn.Module):
    """The MLP's two matrices; the gate's rows come before the up-projection's."""

    def __init__(self, width: int, intermediate_size: int, **factory: Any) -> None:
        super().__init__()
        self.gate_up_proj = Matrix(2 * intermediate_size, width, **factory)
        self.down_proj = Matrix(width, intermediate_size, **factory)

    def forward(self, dtype: torch.dtype) -> SwiGLUWeights:
        """Both matrices in `dtype`; differentiable."""
        return SwiGLUWeights(self.gate_up_proj().to(dtype), self.down_proj().to(dtype))


class TRMLayer(nn.Module):
    """The weights of one layer: `self_attn` or, over a fixed number of tokens, `mlp_t`; and `mlp`."""

    def __init__(
        self,
        width: int,
        heads: int,
        key_value_heads: int,
        intermediate_size: int,
        seq_len: int | None,
        **factory: Any,
    ) -> None:
        super().__init__()
        if seq_len is None:
            self.self_attn = Attention(width, heads, key_value_heads, **factory)
        else:
            self.mlp_t = SwiGLU(seq_len, default_intermediate_size(seq_len), **factory)
        self.mlp = SwiGLU(width, intermediate_size, **factory)

    def forward(self, dtype: torch.dtype) -> LayerWeights:
        """The layer's matrices in `dtype`; differentiable."""
        mixer = self.mlp_t if hasattr(self, "mlp_t") else self.self_attn
        return LayerWeights(mixer(dtype), self.mlp(dtype))
