"""What each token may attend to, in the form that the TRM's kernels understand.

The ordinary cases (causal, padded or not, with any cache) need no mask [B, 1, T, S]: the kernels apply the
causal mask themselves. Padding is a `[B, S]` key mask.

    tokens          cache      the TRM is given
    any             none       which tokens are no padding, or nothing
    any             dynamic    the same of all tokens so far; the last query is the last key
    several         static     the same, and that it looks at the filled slots only
    one             static     which slots are filled and no padding: no number leaves the device, and every
                               step of a compiled decoding has the same shapes

What is general stays a general mask: one that the caller made, packed sequences, and several tokens into a
filled static cache while a graph is traced, where how far it is filled is not known.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, StaticLayer
from transformers.masking_utils import create_causal_mask
from transformers.utils import is_tracing

# "sdpa" is transformers' name for a boolean mask
_BOOLEAN_MASK = PreTrainedConfig()
_BOOLEAN_MASK._attn_implementation = "sdpa"


class Visible(NamedTuple):
    """What a TRM may look at: `mask`, which says it all, or the past, as far as `key_mask` is True.

    mask       general, see trm_kernels/ops/attention/rope_attention.py
    key_mask   [B, S] bool
    num_keys   so many of the cache's slots are keys; None: all that it hands back
    """

    mask: Tensor | None = None
    key_mask: Tensor | None = None
    num_keys: int | None = None

    def to(self, device: torch.device) -> "Visible":
        mask, key_mask = (None if t is None else t.to(device) for t in (self.mask, self.key_mask))
        return Visible(mask, key_mask, self.num_keys)


def visible(
    inputs: Tensor, mask: Tensor | None, cache: Cache | None, trm_layer: int, position_ids: Tensor | None
) -> Visible:
    """What the tokens of one forward may look at.

    inputs         [B, T, ...]: sizes and device
    mask           the caller's: [B, tokens so far], or a general one
    trm_layer      the cache's first layer of a TRM
    position_ids   the caller's; None where nobody gave any, so that nothing can be packed
    """
    B, T = inputs.shape[:2]
    layer = _static_layer(cache, trm_layer)
    seen = 0 if cache is None else cache.get_seq_length(trm_layer)  # a tensor in a filled static layer
    is_unknown = T > 1 and isinstance(seen, Tensor) and is_tracing(seen)
    if (mask is not None and mask.ndim != 2) or is_unknown or _is_packed(mask, cache, position_ids):
        return Visible(mask=_general(inputs, mask, cache, trm_layer, position_ids))
    if layer is not None and T == 1:
        slots = torch.arange(layer.max_cache_len, device=inputs.device)
        filled = slots <= (seen.to(inputs.device) if isinstance(seen, Tensor) else seen)
        keys = torch.ones_like(filled)[None].expand(B, -1) if mask is None else mask
        return Visible(key_mask=filled & _of_keys(keys, inputs, len(slots)))
    num_keys = T + (int(seen) if isinstance(seen, Tensor) else seen)  # int: waits for the device
    key_mask = None if mask is None else _of_keys(mask, inputs, num_keys)
    if key_mask is not None and not is_tracing(key_mask) and key_mask.all():
        key_mask = None
    return Visible(key_mask=key_mask, num_keys=None if layer is None else num_keys)


def tokens_of(what: Visible, tokens: int, cache: Cache | None, trm_layer: int) -> Tensor | None:
    """[B, T] bool, False for padding among the tokens of this forward; None where nothing says so."""
    if what.key_mask is None or (tokens == 1 and _static_layer(cache, trm_layer) is not None):
        return None
    return what.key_mask[:, -tokens:]


def as_entries(what: Visible, inputs: Tensor) -> dict[str, Tensor | None]:
    """`what` among the masks that generate() makes before a forward: tensors only, so sizes carry numbers."""
    (B, T), key_mask = inputs.shape[:2], what.key_mask
    if key_mask is None and what.num_keys is not None and what.num_keys != T:
        key_mask = torch.ones(B, what.num_keys, dtype=torch.bool, device=inputs.device)
    return {"trm": what.mask, "trm_keys": key_mask}


def from_entries(
    masks: dict[str, Tensor | None], tokens: int, cache: Cache | None, trm_layer: int
) -> Visible:
    """What `as_entries` was given; of masks that transformers made, the one for full attention."""
    mask, key_mask = masks["trm"] if "trm" in masks else masks["full_attention"], masks.get("trm_keys")
    if mask is not None or tokens == 1 or _static_layer(cache, trm_layer) is None:
        return Visible(mask, key_mask)
    return Visible(None, key_mask, tokens if key_mask is None else key_mask.shape[1])


def _static_layer(cache: Cache | None, trm_layer: int) -> StaticLayer | None:
    layer = cache.layers[trm_layer] if cache is not None and len(cache.layers) > trm_layer else None
    return layer if isinstance(layer, StaticLayer) else None


def _of_keys(mask: Tensor, inputs: Tensor, num_keys: int) -> Tensor:
    """[B, num_keys] bool; a key that the mask does not reach is hidden, as in transformers."""
    mask = mask.to(inputs.device, torch.bool)
    if mask.shape[1] < num_keys:
        return F.pad(mask, (0, num_keys - mask.shape[1]))
    return mask[:, :num_keys].contiguous()


def _is_packed(mask: Tensor | None, cache: Cache | None, position_ids: Tensor | None) -> bool:
    """Whether a row holds several sequences, as transformers sees it: positions that do not go on by one."""
    if position_ids is None or mask is not None or cache is not None:
        return False
    return is_tracing(position_ids) or bool((position_ids.diff(dim=-1) != 1).any())


def _general(
    inputs: Tensor, mask: Tensor | None, cache: Cache | None, trm_layer: int, position_ids: Tensor | None
) -> Tensor:
    """[B, 1, T, S] bool, True = may look at; a mask that has this many axes as it came."""
    sizes = inputs.new_empty((*inputs.shape[:2], 0), dtype=torch.float32)  # all that the mask is made from
    return create_causal_mask(  # type: ignore[return-value]  # "sdpa" makes no BlockMask
        _BOOLEAN_MASK, sizes, mask, cache, position_ids, layer_idx=trm_layer, allow_is_causal_skip=False
    )
