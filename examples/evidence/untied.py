"""The control without recursion: as many layers as the recursion evaluates, each with weights of its own."""

import torch
from torch import Tensor, nn

from trm_kernels import add_rms_norm, injection_blend, injection_in, rope_attention, swiglu_mlp
from trm_kernels.modules.layers import TRMLayer
from trm_kernels.ops.attention.rope import Angles
from trm_kernels.recursion.spec import RecursionSpec
from trm_kernels.recursion.weights import InjectionWeights


class UntiedStack(nn.Module):
    """The recursion's schedule with its own layer in each place: z = f_i(z + y + x), n times; y = f(y + z).

    It stands where an injection has its TRM of one layer, and is called as it is; without caches.

    width, heads, intermediate_size   of each layer
    n                                 updates of z: n + 1 layers
    eps, attention                    those of the hybrid's config
    """

    def __init__(
        self, width: int, heads: int, intermediate_size: int, n: int, eps: float, attention: str
    ) -> None:
        super().__init__()
        self.heads, self.eps, self.attention = heads, eps, attention
        self.layers = nn.ModuleList(
            TRMLayer(width, heads, heads, intermediate_size, seq_len=None) for _ in range(n + 1)
        )
        self.y_init = nn.Parameter(torch.randn(width))
        self.z_init = nn.Parameter(torch.randn(width))

    def forward(
        self,
        h: Tensor,
        *,
        injection: InjectionWeights,
        strength: float,
        positions: Tensor,
        angles: Angles,
        mask: Tensor | None,
        key_mask: Tensor | None,
        update_cache: None,
        spec: RecursionSpec,
        norms_x: bool = False,
    ) -> Tensor:
        """h' [B, T, D] of an injection point; the arguments are those of TRM's call."""
        n = spec.num_recursion_steps
        if (update_cache, n) != (None, len(self.layers) - 1):
            raise ValueError(
                f"UntiedStack: expected no cache and n = {len(self.layers) - 1}, got {update_cache} and "
                f"n = {n}."
            )
        w_in, w_out, *gate = injection
        y = self._answer(injection_in(h, w_in, self.eps, norms_x=norms_x), angles, mask, key_mask)
        return injection_blend(h, y, w_out, strength, *gate)

    def _answer(self, x: Tensor, angles: Angles, mask: Tensor | None, key_mask: Tensor | None) -> Tensor:
        """y [B, T, D] of x."""
        y, z = self.y_init.expand_as(x), self.z_init.expand_as(x)
        *steps, last = self.layers
        for layer in steps:
            z = self._layer(layer, z + (y + x), angles, mask, key_mask)
        return self._layer(last, y + z, angles, mask, key_mask)

    def _layer(
        self, layer: nn.Module, v: Tensor, angles: Angles, mask: Tensor | None, key_mask: Tensor | None
    ) -> Tensor:
        mixer, mlp = layer(v.dtype)
        o = rope_attention(
            nn.functional.linear(v, mixer.qkv_proj),
            None,
            self.heads,
            self.heads,
            mask,
            True,
            None,
            None,
            key_mask=key_mask,
            angles=angles,
            implementation=self.attention,
        )
        v = add_rms_norm(v, nn.functional.linear(o, mixer.o_proj), self.eps)
        return add_rms_norm(v, swiglu_mlp(v, mlp.gate_up_proj, mlp.down_proj), self.eps)
