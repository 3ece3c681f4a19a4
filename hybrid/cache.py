"""The TRM's keys and values inside `past_key_values`, as layers after the language model's own.

Layer `base layers + (injection, cycle, step, layer)` of the cache belongs to that evaluation of a TRM
layer. transformers reorders, crops and repeats a cache by looping over its layers, so beam search and
assisted generation carry the TRM along. How many layers there are says with which number of
recursion steps the cache was filled.
"""

from transformers.cache_utils import Cache, DynamicLayer, StaticLayer


def make_room(
    cache: Cache, num_base_layers: int, num_trm_layers: int, max_cache_len: int | None = None
) -> None:
    """Give `cache` as many layers as the base and the TRMs need.

    max_cache_len   tokens of a static layer; None takes the longest that the base's layers have

    Errors: ValueError for a cache that is filled already, with another number of recursion steps, or
    by the base alone.
    """
    have, want = len(cache.layers), num_base_layers + num_trm_layers
    if have == want:
        return
    if have >= num_base_layers and _is_filled(cache):
        raise ValueError(
            "HybridModel: expected an empty cache or one filled with this num_recursion_steps "
            f"({num_trm_layers} TRM layers), got one filled with {have - num_base_layers}."
        )
    del cache.layers[num_base_layers:]
    static = [layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer)]
    cache.layers.extend(DynamicLayer() for _ in range(num_base_layers - len(cache.layers)))
    for _ in range(num_trm_layers):
        cache.layers.append(StaticLayer(max_cache_len or max(static)) if static else DynamicLayer())


def _is_filled(cache: Cache) -> bool:
    return int(cache.get_seq_length()) > 0
