"""What one forward is run with, settled once before its first layer: halting, n, positions, masks, cache."""

from collections.abc import Container, Iterable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from hybrid.config import meant_field, trm_fields
from hybrid.config_values import check_steps
from hybrid.error_text import did_you_mean
from hybrid.model.cache import keeps_steps, leave_to_base, make_room
from hybrid.model.cache_name import as_argument
from hybrid.model.halting import Halting, TokenHalting
from hybrid.model.injection import InjectionCall, trm_evaluations
from hybrid.model.masks import Visible, from_entries, tokens_of, visible
from hybrid.serving.paged_keys import PagedKeys
from trm_kernels.ops.attention.rope import Angles, rope_angles
from trm_kernels.recursion.one_launch.choice import preferred_regime
from trm_kernels.recursion.spec import RecursionSpec
from trm_kernels.runtime.backend import current_backend

if TYPE_CHECKING:
    from hybrid.model.hybrid_model import HybridModel


_OF_CONFIG = trm_fields()


def inputs_of(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    inputs = input_ids if inputs_embeds is None else inputs_embeds
    if inputs is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("HybridModel: expected input_ids or inputs_embeds, got both or neither.")
    return inputs


def check_names(names: Iterable[str], of_base: Container[str]) -> None:
    """Refuse what a base takes in a call and nobody reads: a setting of the config, or a slip of ours."""
    for name in names:
        if name in of_base:
            continue
        if name in _OF_CONFIG:
            raise ValueError(
                f"HybridModel: expected {name} in the config (model.config.{name} = ...), got it in "
                "a call, in which nothing reads it."
            )
        if near := _slip_of(name):
            raise ValueError(f"HybridModel: there is no argument {name!r}{did_you_mean(near)}")


@cache
def _nearest(name: str) -> str | None:
    return meant_field(name, ("halting", *_OF_CONFIG), cutoff=0.9)


@torch.compiler.assume_constant_result  # torch.compile cannot trace the search, and need not
def _slip_of(name: str) -> str | None:
    return _nearest(name)


def settle(
    hybrid: "HybridModel",
    inputs: Tensor,
    attention_mask: Tensor | dict[str, Tensor | None] | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    use_cache: bool | None,
    num_recursion_steps: int | None,
    rule: Halting | None,
) -> tuple[InjectionCall | None, dict[str, Any]]:
    """(what the injection points share, None where they are off; mask and cache as the base gets them)"""
    hybrid.training_warnings.look(hybrid, inputs, hybrid.is_injecting)
    if use_cache is None:
        wants_cache = bool(getattr(hybrid.config.get_text_config(), "use_cache", True))
        use_cache = wants_cache and hybrid.takes_cache and not hybrid.training
    if use_cache and past_key_values is None:
        past_key_values = DynamicCache(config=hybrid.llm_model.config)
    call, base_mask = None, attention_mask
    if not hybrid.is_injecting:
        if past_key_values is not None:
            leave_to_base(past_key_values, hybrid.num_base_layers)
    else:
        if isinstance(past_key_values, PagedAttentionCache):
            raise ValueError(
                "HybridModel: got the paged cache of a manager that was made for the language model alone; "
                "init_continuous_batching of the hybrid makes one for both."
            )
        if past_key_values is not None and not isinstance(past_key_values, Cache | PagedKeys):
            raise ValueError(
                f"HybridModel: expected a Cache of transformers, got {type(past_key_values).__name__}."
            )
        spec = _spec(hybrid, num_recursion_steps, past_key_values)
        if past_key_values is not None:
            spec = replace(spec, save="all")  # computed again, keys would be appended again
        if past_key_values is not None and not isinstance(past_key_values, PagedKeys):
            num_layers = num_trm_cache_layers(hybrid, spec, rule)
            make_room(past_key_values, hybrid.num_base_layers, num_layers, halting=rule, spec=spec)
        positions = _positions(inputs, position_ids, past_key_values)
        angles = _angles(hybrid, inputs, positions, spec)
        base_mask, what = masks_of(hybrid, inputs, attention_mask, position_ids, past_key_values)
        call = InjectionCall(
            positions,
            angles,
            what,
            past_key_values,
            spec,
            hybrid.config.injection_strength,
            hybrid.config.trm_input_norm,
            current_backend(),
            rule,
        )
        call.is_token = tokens_of(what, inputs.shape[1], past_key_values, hybrid.num_base_layers)
    of_base = past_key_values.of_base() if isinstance(past_key_values, PagedKeys) else past_key_values
    return call, {"attention_mask": base_mask, "use_cache": use_cache} | as_argument(of_base)


def rule_of(
    hybrid: "HybridModel", halting: Halting | TokenHalting | Literal[False] | None
) -> Halting | TokenHalting | None:
    """The rule of this forward."""
    rule = hybrid.halting if halting is None else halting
    if rule is None or rule is False or not hybrid.is_injecting:
        return None
    if not isinstance(rule, Halting | TokenHalting):
        raise ValueError(f"HybridModel: expected halting to be Halting or TokenHalting, got {rule!r}.")
    if hybrid.training:
        raise ValueError(
            "HybridModel: halting expected a model in eval mode, got one in training: tokens that stop "
            "by themselves are for inference. recursion_sampling='uniform' trains for any n."
        )
    return rule


def _spec(hybrid: "HybridModel", num_recursion_steps: int | None, cache: Cache | None) -> RecursionSpec:
    """How the recursions of this forward run; with a cache, which holds keys of one depth, at the whole."""
    spec, depth = hybrid.config.recursion_spec, hybrid.training_depth
    if depth is not None and hybrid.training and num_recursion_steps is None and cache is None:
        return replace(spec.of_cycles(depth.num_cycles), num_recursion_steps=depth.num_recursion_steps)
    return replace(spec, num_recursion_steps=recursion_steps(hybrid, num_recursion_steps, cache))


def recursion_steps(hybrid: "HybridModel", requested: int | None, cache: Cache | None) -> int:
    """n of this forward. Drawn from a seed and a count alone, so that every rank draws the same.

    Nothing is drawn where a cache is in use: it holds the keys of one n.
    """
    if requested is not None:
        check_steps("HybridModel", "num_recursion_steps", requested)
        return requested
    most = hybrid.config.num_recursion_steps
    if hybrid.config.recursion_sampling == "fixed" or not hybrid.training or cache is not None:
        return most
    return _draw(hybrid)


# a graph would keep the first number that was drawn; what follows is compiled once for each
@torch.compiler.disable(
    reason="HybridModel: under torch.compile(fullgraph=True), recursion_sampling='uniform' expected "
    "num_recursion_steps in the call (draw_recursion_steps gives one), got none."
)
def _draw(hybrid: "HybridModel") -> int:
    return hybrid.draw_recursion_steps()


def num_trm_cache_layers(hybrid: "HybridModel", spec: RecursionSpec, halting: Halting | None = None) -> int:
    each = trm_evaluations(hybrid.config, spec, halting)
    return (each + keeps_steps(halting)) * len(hybrid.config.injection_layers)


def _positions(inputs: Tensor, position_ids: Tensor | None, cache: Cache | None) -> Tensor:
    """[B, T] or [1, T]: the caller's, as generate() gives them, or one after the other."""
    if position_ids is not None:
        return position_ids
    seen = 0 if cache is None else cache.get_seq_length()
    return (torch.arange(inputs.shape[1], device=inputs.device) + seen)[None]


def _angles(hybrid: "HybridModel", inputs: Tensor, positions: Tensor, spec: RecursionSpec) -> Angles | None:
    """RoPE's table for the TRMs, all of which see the same positions.

    None where one launch is preferred, which makes its own. On fallback each injection makes the table.
    """
    width = hybrid.config.trm_hidden_size
    if preferred_regime(spec.regime, inputs, width) != "per_op" and not torch.is_grad_enabled():
        return None
    return rope_angles(positions, width // spec.num_heads, hybrid.config.trm_rope_theta)


def masks_of(
    hybrid: "HybridModel",
    inputs: Tensor,
    mask: Tensor | dict[str, Tensor | None] | None,
    position_ids: Tensor | None,
    cache: Cache | None,
) -> tuple[Any, Visible]:
    """(the base's mask, what the TRMs may look at)"""
    if not isinstance(mask, dict):
        return mask, visible(inputs, mask, cache, hybrid.num_base_layers, position_ids)
    # made beforehand by create_masks_for_generate
    of_trm = from_entries(mask, inputs.shape[1], cache, hybrid.num_base_layers)
    of_base = {name: t for name, t in mask.items() if name not in ("trm", "trm_keys")}
    return of_base.get("base", of_base), of_trm
