"""The TRM's keys and values inside the paged cache of transformers' continuous batching.

That cache has layers of one size, the language model's heads times their width. An evaluation of a TRM layer
takes as many of them as its keys fill, the last one padded. They are full-attention layers after the language
model's own, so paging, prefix sharing and forks are transformers'. All sequences of a forward come as one row
of tokens: a mask says which token may attend to which.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from trm_kernels.recursion.in_order import rounds_of

FULL, SLIDING = "full_attention", "sliding_attention"
_INDICES = ("read_index", "write_index", "cu_seq_lens_k", "max_length_k")  # where its tokens lie


class PagedKeys:
    """The paged cache of one forward, as the injection points fill it.

    arguments   what continuous batching gives the forward: the cache, and where its tokens lie in it
    base        the language model's text config
    """

    def __init__(self, arguments: dict[str, Any], base: PreTrainedConfig) -> None:
        self._where = {name: arguments[name] for name in _INDICES}
        self._cache = arguments["cache"]
        self._ends = arguments.get("cu_seq_lens_q")
        self._first_layer = base.num_hidden_layers
        self._heads, self._width = key_value_size(base)

    def of_base(self) -> PagedAttentionCache:
        """The same cache, as the language model is to get it."""
        return _CacheOfForward(self._cache, self._where)

    def of_injection(self, index: int, evaluations: int) -> "PagedInjectionKeys":
        """Those of injection point `index`, which has so many evaluations of a TRM layer."""
        return PagedInjectionKeys(self, index * evaluations)

    def update(self, evaluation: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values [1, G, T, K] of one evaluation, counted over all injection points.

        Returns those of all tokens of the sequences in this forward, [1, G, S, K].
        """
        G, K = keys.shape[1], keys.shape[3]
        room = self._heads * self._width
        count = cache_layers(G * K, room)
        flat = [F.pad(t[0].transpose(0, 1).flatten(1), (0, count * room - G * K)) for t in (keys, values)]
        kept: list[tuple[Tensor, Tensor]] = []
        for i in range(count):
            k, v = (
                t[:, i * room : (i + 1) * room].unflatten(1, (self._heads, self._width)).transpose(0, 1)[None]
                for t in flat
            )
            layer = self._first_layer + evaluation * count + i
            # the cache writes into the dictionary
            kept.append(self._cache.update(k, v, layer, dict(self._where)))
        all_keys, all_values = (
            torch.cat([t[0].transpose(0, 1).flatten(1) for t in parts], 1)[:, : G * K]
            .unflatten(1, (G, K))
            .transpose(0, 1)[None]
            for parts in zip(*kept, strict=True)
        )
        return all_keys, all_values

    def rounds(self, tokens: int, device: torch.device) -> list[Tensor]:
        """The first tokens of all sequences in the row, then the second ones, and so on; their places [N]."""
        assert self._ends is not None
        ends, places = self._ends.to(device).long(), torch.arange(tokens, device=device)
        starts = ends[torch.searchsorted(ends[1:].contiguous(), places, right=True)]
        number = places - starts  # of the token in its sequence
        return rounds_of(number)


class _CacheOfForward(PagedAttentionCache):
    """The paged cache in one forward of a language model that treats it as any cache, as GPT-NeoX and OPT do.

    where   of the forward's tokens; a model that hands on what it is told of them says so with each update
    """

    def __init__(self, paged: PagedAttentionCache, where: dict[str, Any]) -> None:
        vars(self).update(vars(paged))  # it is the same memory
        self._where = where

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        kwargs = dict(self._where) if kwargs is None else kwargs
        return super().update(key_states, value_states, layer_idx, kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: a row of many sequences, whose tokens bring their positions."""
        return 0


class PagedInjectionKeys:
    """The keys and values of one injection point, in the form that trm_recursion takes."""

    def __init__(self, keys: PagedKeys, first_evaluation: int) -> None:
        self._keys, self._first = keys, first_evaluation
        self._row: dict[int, tuple[Tensor, Tensor]] = {}  # of a slab, keys and values of the whole row
        self._tokens = 0

    def rounds(self, tokens: int, device: torch.device) -> list[Tensor]:
        """Which tokens of the row go together where each reads what those before it ended with."""
        self._tokens = tokens
        return self._keys.rounds(tokens, device)

    def write(self, slab: int, tokens: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write those of some tokens of the row over what is kept of them; all there are, [1, G, S, K]."""
        if slab not in self._row:
            size = (*keys.shape[:2], self._tokens, keys.shape[3])
            self._row[slab] = keys.new_zeros(size), values.new_zeros(size)
        for kept, new in zip(self._row[slab], (keys, values), strict=True):
            kept[:, :, tokens] = new
        return self._keys.update(self._first + slab, *self._row[slab])

    def __call__(self, evaluation: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self._keys.update(self._first + evaluation, keys, values)


def key_value_size(base: PreTrainedConfig) -> tuple[int, int]:
    """(heads, width) of the language model's keys: the size of a layer of the cache."""
    heads = getattr(base, "num_key_value_heads", None) or base.num_attention_heads
    width = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
    return heads, width


def cache_layers(size: int, room: int) -> int:
    """Layers of the cache that one evaluation takes, whose keys of a token are `size` numbers."""
    return -(-size // room)


def attention_types(base: PreTrainedConfig) -> list[str]:
    """Of each of the language model's layers, as continuous batching reads them from a config."""
    types = getattr(base, "layer_types", None)
    if types is not None:
        return list(types)
    return [FULL if getattr(base, "sliding_window", None) is None else SLIDING] * base.num_hidden_layers


def with_room(base: PreTrainedConfig, evaluations: int, size: int) -> PreTrainedConfig:
    """The language model's config as the cache is to see it: with layers for the TRMs at the end.

    evaluations   of TRM layers, over all injection points
    size          numbers in one token's keys of one evaluation
    """
    heads, width = key_value_size(base)
    more = evaluations * cache_layers(size, heads * width)
    config = copy.deepcopy(base)
    # set as they are: a config checks its fields, and would compare one with the other before both are set
    fields = {"num_hidden_layers": base.num_hidden_layers + more}
    fields["layer_types"] = attention_types(base) + [FULL] * more
    for name, value in fields.items():
        object.__setattr__(config, config.attribute_map.get(name, name), value)
    return config


def masks(base: PreTrainedConfig, mask: Any, arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The masks of one forward: "base", as it would come without a TRM, and "trm", [1, 1, T, S].

    mask   as continuous batching makes it for the cache with the TRMs' layers: one, or one of each attention
           type; None for flash attention, which reads the sequences' lengths
    """
    of_trm = mask[FULL] if isinstance(mask, dict) else mask
    if isinstance(mask, dict) and len(kinds := set(attention_types(base))) == 1:
        mask = mask[kinds.pop()]
    if of_trm is None:
        of_trm = mask_of_lengths(arguments["cu_seq_lens_q"], arguments["cu_seq_lens_k"][FULL])
    return {"base": mask, "trm": of_trm if of_trm.dtype == torch.bool else of_trm.to(dtype)}


def mask_of_lengths(ends_of_queries: Tensor, ends_of_keys: Tensor) -> Tensor:
    """[1, 1, T, S] bool of sequences one after the other, in each of which the last query is the last key.

    ends_of_queries, ends_of_keys   [sequences + 1], from 0: their cumulative lengths
    """
    ends = (ends_of_queries.long(), ends_of_keys.long())
    tokens = [torch.arange(int(end[-1]), device=end.device) for end in ends]
    rows = [torch.searchsorted(end[1:], t, right=True) for end, t in zip(ends, tokens, strict=True)]
    to_go = [end[1:][row] - t for end, row, t in zip(ends, rows, tokens, strict=True)]
    is_same = rows[0][:, None] == rows[1]
    return (is_same & (to_go[1] >= to_go[0][:, None]))[None, None]
