"""What a frozen language model makes of texts up to some of its layers: computed once, as nothing learns."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hybrid.model.injection_points import decoder_layers

_AT_ONCE = 2048  # tokens in one forward


@torch.no_grad()
def hidden_states(base: Any, ids: Tensor, layers: tuple[int, ...], lengths: Tensor) -> dict[int, Tensor]:
    """What comes out of `layers` (1 is the first) of the base, [N, T, D] each, bfloat16; for pads anything.

    ids   [N, T], padded at the right after `lengths` [N] tokens: what stands before a pad does not see it
    """
    found: dict[int, Tensor] = {}
    shape = (*ids.shape, base.config.hidden_size)
    kept = {layer: torch.zeros(shape, dtype=torch.bfloat16) for layer in layers}

    def keep(layer: int, module: nn.Module, args: Any, output: Any) -> None:
        found[layer] = output[0] if isinstance(output, tuple) else output

    modules = decoder_layers(base)
    handles = [modules[layer - 1].register_forward_hook(partial(keep, layer)) for layer in layers]
    try:
        for rows in lengths.argsort().split(max(1, _AT_ONCE // ids.shape[1])):  # those of one length together
            longest = int(lengths[rows].max())
            base.get_decoder()(input_ids=ids[rows, :longest], use_cache=False)
            for layer in layers:
                kept[layer][rows, :longest] = found[layer].to(torch.bfloat16)
    finally:
        for handle in handles:
            handle.remove()
    return kept


@contextmanager
def given(base: Any, layer: int, h: Tensor) -> Iterator[None]:
    """Within the block h [B, T, D] comes out of the base's layers up to `layer`, uncomputed."""
    below = list(decoder_layers(base))[:layer]
    for module in below:
        module.forward = partial(_answer, h)
    try:
        yield
    finally:
        for module in below:
            del module.forward


def _answer(h: Tensor, *_: Any, **__: Any) -> Tensor:
    return h
