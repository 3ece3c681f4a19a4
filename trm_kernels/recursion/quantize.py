"""Weights in 8 bits, for inference: w = scale[:, None] * values, with one float32 scale an output channel.

    int8   values are whole numbers from -127 to 127
    fp8    values are float8_e4m3fn, up to 448; a GPU has the type from sm_89 on

Only the weights are in 8 bits. They are widened where they are read, and the product is multiplied by the
scale: activations, sums and the cache stay as they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trm_kernels.recursion.weights import LayerWeights, map_two_weights, map_weights
from trm_kernels.runtime.launch import arch_of

QUANTIZE = ("int8", "fp8")
_LARGEST = {"int8": 127.0, "fp8": 448.0}


def quantize(w: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Rounds a weight to 8 bits.

    Args:
        w: [out, in], of any floating dtype.
        kind: "int8" or "fp8".

    Returns:
        Values [out, in] in int8 or float8_e4m3fn, and scale [out] float32.

    Raises:
        RuntimeError: For fp8 on a GPU that does not have it.
    """
    arch = arch_of(w)
    if kind == "fp8" and arch.startswith("sm") and int(arch[2:]) < 89:
        raise RuntimeError(
            f"quantize: fp8 (float8_e4m3fn) expected a GPU of sm_89 or newer, got {arch}; 'int8' runs."
        )
    largest = w.detach().float().abs().amax(dim=1)
    scale = torch.where(largest > 0, largest, 1.0) / _LARGEST[kind]
    values = w.detach().float() / scale[:, None]
    return (values.round().to(torch.int8) if kind == "int8" else values.to(torch.float8_e4m3fn)), scale


def quantize_layers(
    layers: Sequence[LayerWeights], kind: str
) -> tuple[list[LayerWeights], list[LayerWeights]]:
    """The values and the scales of the matrices of some layers, by their names; see quantize."""
    values, scales = [], []
    for layer in layers:
        values.append(map_weights(lambda w: quantize(w, kind)[0], layer))
        scales.append(map_weights(lambda w: quantize(w, kind)[1], layer))
    return values, scales


def dequantize_layers(
    layers: Sequence[LayerWeights], scales: Sequence[LayerWeights], dtype: torch.dtype
) -> list[LayerWeights]:
    """The matrices in `dtype`, widened again: scale[:, None] * values."""

    def widen(values: Tensor, scale: Tensor) -> Tensor:
        return (values.float() * scale[:, None]).to(dtype)

    return [map_two_weights(widen, w, s) for w, s in zip(layers, scales, strict=True)]
