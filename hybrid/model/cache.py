"""The TRM's keys and values inside `past_key_values`, as layers after the language model's own.

Layer `base layers + (injection, cycle, step, layer)` of the cache belongs to that evaluation of a TRM
layer. transformers reorders, crops and repeats a cache by looping over its layers, so beam search and
assisted generation carry the TRM along. How many layers there are says with which number of
recursion steps the cache was filled.

Where tokens stop early (trm_kernels/recursion/adaptive.py) there are layers for every step up to the last
that is allowed, in which those that stopped have their last keys again. Where the answer is watched, it has
layers in each step. Where later tokens wait for earlier ones, one layer more a TRM keeps the numbers of
steps, as keys [B, 1, S, num_cycles].

Decoding appends one token to each of these layers at every step. StaticLayer writes it in place; GrowingLayer
does so too, where transformers' DynamicLayer copies all tokens before it. What is copied is the new token
alone, once: from where RoPE and the projection left its key and its value. A recursion in one launch copies
nothing: it is given the tensors themselves, with room for its tokens, and writes where they stay.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer

from trm_kernels.recursion.adaptive import Halting
from trm_kernels.recursion.inputs import CacheRoom
from trm_kernels.recursion.spec import RecursionSpec


class GrowingLayer(DynamicLayer):
    """A DynamicLayer whose keys and values are the beginning of larger tensors, where new tokens are written.

    There is room for the tokens of the first update, so that a prefill alone takes no more than before; it
    doubles whenever it is full. What replaces `keys` (a reordered batch, another device) is found out at the
    next update, which makes new room. Two things are concatenated as in DynamicLayer: keys or values that
    require gradients, which autograd keeps and nobody may write to, and a traced graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self._room: list[Tensor] = []  # [B, G, capacity, K] of keys and of values
        self._shown: list[Tensor] = []  # keys and values, as we left them

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All keys and values [B, G, S, K], after the new ones [B, G, T, K] were added."""
        new, seen, tokens = [key_states, value_states], self.get_seq_length(), key_states.shape[2]
        room = self.room_for(tokens, new)
        if room is None:
            self._room, self._shown = [], []
            return super().update(key_states, value_states, *args, **kwargs)
        _write(room, seen, new)
        self.written(tokens)
        return self._shown[0], self._shown[1]

    def room_for(self, tokens: int, like: list[Tensor]) -> list[Tensor] | None:
        """The tensors [B, G, capacity, K] of keys and of values, with room for so many tokens more.

        like   keys and values of this kind, with any number of tokens

        None where they cannot be written to: for gradients, in a traced graph, or for tokens of another kind.
        """
        old, seen = self._old(), self.get_seq_length()
        wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in like + old)
        if torch.compiler.is_compiling() or wants_gradient or (old and not _are_alike(like, old)):
            return None
        if not self.is_initialized:
            self.lazy_initialization(like[0], like[1])
        if not (self._is_as_we_left_it() and self._has_room(seen + tokens)):
            self._room, self._shown = [], []  # what may be freed is freed first
            capacity = max(seen + tokens, 2 * seen)
            self._room = [t.new_empty(*t.shape[:2], capacity, t.shape[3]) for t in like]
            if old:
                _write(self._room, 0, old)
        return self._room

    def written(self, tokens: int) -> None:
        """So many were written into the room, after those that were there."""
        self._show(self.get_seq_length() + tokens)

    def crop(self, tokens_to_remove: int) -> None:
        is_ours = self._is_as_we_left_it()
        super().crop(tokens_to_remove)
        if is_ours:
            self._show(self.get_seq_length())

    def offload(self) -> None:
        super().offload()
        self._free_what_was_replaced()

    def reset(self) -> None:
        super().reset()
        self._free_what_was_replaced()

    def _old(self) -> list[Tensor]:
        """Keys and values so far; none of the placeholders that lazy_initialization makes."""
        return [t for t in (self.keys, self.values) if t is not None and t.ndim == 4]

    def _is_as_we_left_it(self) -> bool:
        return bool(self._shown) and self.keys is self._shown[0] and self.values is self._shown[1]

    def _has_room(self, tokens: int) -> bool:
        is_read_only = self._room[0].is_inference() and not torch.is_inference_mode_enabled()
        return self._room[0].shape[2] >= tokens and not is_read_only

    def _show(self, tokens: int) -> None:
        self._shown = [t[:, :, :tokens] for t in self._room]
        self.keys, self.values = self._shown

    def _free_what_was_replaced(self) -> None:
        if not self._is_as_we_left_it():
            self._room, self._shown = [], []


def _are_alike(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether they differ in their number of tokens at most."""
    return all(
        (a.dtype, a.device, a.shape[:2], a.shape[3:]) == (b.dtype, b.device, b.shape[:2], b.shape[3:])
        for a, b in zip(some, others, strict=True)
    )


def _write(room: list[Tensor], start: int, new: list[Tensor]) -> None:
    for r, t in zip(room, new, strict=True):
        r[:, :, start : start + t.shape[2]] = t


class InjectionCache:
    """The layers of a cache that belong to one injection point, in the form that trm_recursion takes.

    first_layer   of the cache, evaluation 0's
    num_keys      so many of a static layer's slots are handed back; None: all
    steps_layer   of the cache, where the numbers of steps are kept; None: nowhere
    """

    def __init__(
        self, cache: Cache, first_layer: int, num_keys: int | None, steps_layer: int | None = None
    ) -> None:
        self.cache, self.first_layer, self.num_keys = cache, first_layer, num_keys
        self.steps_layer = steps_layer
        self._layers: list[Any] = []  # those that there was room in

    def __call__(self, evaluation: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.cache.update(keys, values, self.first_layer + evaluation)
        return (k, v) if self.num_keys is None else (k[:, :, : self.num_keys], v[:, :, : self.num_keys])

    def so_far(self, slab: int) -> tuple[Tensor, Tensor] | None:
        """The keys and values of all tokens before; None where there are none."""
        layer: Any = self.cache.layers[self.first_layer + slab]
        return (layer.keys, layer.values) if layer.get_seq_length() else None

    def steps_before(self, device: torch.device) -> Tensor | None:
        """[num_cycles, B, S] float32, 0 in empty slots; None where none are kept, or none yet."""
        layer: Any = None if self.steps_layer is None else self.cache.layers[self.steps_layer]
        if layer is None or not layer.get_seq_length():
            return None
        return layer.keys[:, 0].movedim(-1, 0).to(device)

    def keep_steps(self, steps: Tensor) -> None:
        """steps [num_cycles, B, T] of the new tokens."""
        if self.steps_layer is not None:
            kept = steps.movedim(0, -1)[:, None].float()
            self.cache.update(kept, kept, self.steps_layer)

    def room(
        self, x: Tensor, num_key_value_heads: int, head_width: int, evaluations: int
    ) -> CacheRoom | None:
        """Where the keys and values of x's tokens go; None where a layer cannot be written to."""
        layers: list[Any] = self.cache.layers[self.first_layer : self.first_layer + evaluations]
        if len(layers) < evaluations or len({type(layer) for layer in layers}) > 1 or self.cache.offloading:
            return None
        B, T = x.shape[:2]
        empty = x.new_empty(B, num_key_value_heads, 0, head_width)
        rooms = [_room_in(layer, T, empty) for layer in layers]
        if any(room is None for room in rooms):
            return None
        self._layers = layers
        keys, values = ([room[i] for room in rooms if room] for i in range(2))
        if isinstance(layers[0], GrowingLayer):
            return CacheRoom(keys, values, [], layers[0].get_seq_length())
        return CacheRoom(keys, values, [layer.cumulative_length for layer in layers], 0)

    def written(self, tokens: int) -> None:
        """So many were written into the room; of a static layer the length counts them already."""
        for layer in self._layers:
            if isinstance(layer, GrowingLayer):
                layer.written(tokens)


def _room_in(layer: Any, tokens: int, empty: Tensor) -> list[Tensor] | None:
    if isinstance(layer, GrowingLayer):
        return layer.room_for(tokens, [empty, empty])
    if type(layer) is not StaticLayer:
        return None
    if not layer.is_initialized:
        layer.lazy_initialization(empty, empty)
    room: list[Any] = [layer.keys, layer.values]
    return room if _are_alike([empty, empty], room) else None


def keeps_steps(halting: Halting | None) -> bool:
    """Whether a cache has one layer more a TRM, for the numbers of steps."""
    return halting is not None and halting.in_order


def make_room(
    cache: Cache,
    num_base_layers: int,
    num_trm_layers: int,
    max_cache_len: int | None = None,
    halting: Halting | None = None,
    spec: RecursionSpec | None = None,
) -> None:
    """Give `cache` as many layers as the base and the TRMs need.

    max_cache_len   tokens of a static layer; None takes the longest that the base's layers have
    halting         when tokens stop; the cache is marked with it
    spec            how the TRMs run; where they keep as many layers for any n, the cache is marked with n

    Errors: ValueError for a cache that is filled already, with another number of recursion steps, under
    another rule of halting, or by the base alone.
    """
    steps = None if spec is None or spec.cache == "all" else spec.num_recursion_steps
    _refuse_last(cache, steps)
    have, want, filled_under = len(cache.layers), num_base_layers + num_trm_layers, _halting_of(cache)
    if have == want and filled_under == halting:
        _refuse_gaps(cache, num_base_layers)
        return
    if have >= num_base_layers and _is_filled(cache):
        if filled_under != halting:
            raise ValueError(
                f"HybridModel: expected an empty cache or one filled under halting {halting}, "
                f"got one filled under {filled_under}."
            )
        if have == num_base_layers:
            raise ValueError(
                "HybridModel: expected an empty cache or one filled with this num_recursion_steps "
                f"({num_trm_layers} TRM layers), got one filled with 0, by the language model alone (a "
                "prompt's cache, disable_injection(), or PEFT's prefix tuning): the TRMs have no keys of its "
                "tokens. It can be used with disable_injection()."
            )
        filled = have - num_base_layers
        raise ValueError(
            "HybridModel: expected an empty cache or one filled with this num_recursion_steps "
            f"({num_trm_layers} TRM layers{_steps_of(num_trm_layers, num_trm_layers, spec, halting)}), "
            f"got one filled with {filled}{_steps_of(filled, num_trm_layers, spec, halting)}."
        )
    del cache.layers[num_base_layers:]
    static = [layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer)]
    cache.layers.extend(DynamicLayer() for _ in range(num_base_layers - len(cache.layers)))
    for _ in range(num_trm_layers):
        cache.layers.append(StaticLayer(max_cache_len or max(static)) if static else GrowingLayer())
    cache.trm_halting = halting  # type: ignore[attr-defined]  # our marks
    cache.trm_steps = steps  # type: ignore[attr-defined]


def _steps_of(layers: int, num_trm_layers: int, spec: RecursionSpec | None, halting: Halting | None) -> str:
    """The recursion steps that fill so many layers, ", n = 3": those of `spec` fill `num_trm_layers`."""
    if spec is None or halting is not None or layers * (spec.num_recursion_steps + 1) % num_trm_layers:
        return ""
    return f", n = {layers * (spec.num_recursion_steps + 1) // num_trm_layers - 1}"


def _refuse_last(cache: Cache, steps: int | None) -> None:
    """Errors: ValueError for a cache that cannot keep the last keys alone, or was filled with another n."""
    if steps is not None and any(isinstance(layer, StaticLayer) for layer in cache.layers):
        raise ValueError(
            "HybridModel: trm_cache 'last' expected a cache that grows, got a static one: where only the "
            "device knows how many tokens there are, a step cannot add its own keys to them."
        )
    filled_with = getattr(cache, "trm_steps", steps)
    if filled_with != steps and _is_filled(cache):
        raise ValueError(
            "HybridModel: expected an empty cache or one filled with this num_recursion_steps and trm_cache, "
            f"got one filled with {filled_with or 'the keys of each step'}, for {steps or 'all of them'}."
        )


def leave_to_base(cache: Cache, num_base_layers: int) -> None:
    """Go on with `cache` without the TRMs: theirs are taken out, for they would have a gap from here on.

    So a forward with the TRMs finds a cache that the base alone has filled, and refuses it.
    """
    if hasattr(cache, "trm_halting"):
        del cache.layers[num_base_layers:]


def _refuse_gaps(cache: Cache, num_base_layers: int) -> None:
    """Errors: ValueError where the base has seen tokens, by itself, that the TRMs have not."""
    of_trm: Any = cache.layers[num_base_layers]
    seen = [cache.get_seq_length(), of_trm.get_seq_length()]
    # a static layer's is on its device, which a decoding step does not wait for
    if all(isinstance(count, int) for count in seen) and seen[0] != seen[1]:
        raise ValueError(
            f"HybridModel: expected a cache that base and TRM have filled together, got one with {seen[0]} "
            f"tokens of the base and {seen[1]} of the TRM."
        )


def _halting_of(cache: Cache) -> Halting | None:
    return getattr(cache, "trm_halting", None)


def counts_tokens(config: PreTrainedConfig) -> bool:
    """Whether a cache of this language model knows how many tokens it has; one of states alone does not."""
    try:
        DynamicCache(config=config).get_seq_length()
    except ValueError:
        return False
    return True


def _is_filled(cache: Cache) -> bool:
    try:
        return int(cache.get_seq_length()) > 0
    except ValueError as error:  # transformers', of a cache that has states alone
        raise ValueError(
            "HybridModel: expected a base whose cache counts its tokens, as attention layers do, got one of "
            "states alone (a state space model's): pass use_cache=False, to a call and to generate()."
        ) from error
