"""Which values a field of HybridConfig may have: one function a kind, each with one clear error."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from trm_kernels.modules.layers import default_intermediate_size

# A step is at least one layer deep, and no language model has as many layers. More is a slip of the hand, and
# would ask for a cache and a graph of as many parts.
MAX_STEPS = 4096
# Of one TRM. The largest language models that are published have as many; memory for more cannot be had.
MAX_PARAMETERS = 10**12


def is_int(value: Any) -> bool:
    """Whether it is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_steps(who: str, name: str, count: Any) -> None:
    """A count of what is done again and again. Errors: ValueError."""
    if not (is_int(count) and count >= 1):
        raise ValueError(f"{who}: expected {name} to be a count of at least 1, got {count!r}.")
    if count > MAX_STEPS:
        raise ValueError(f"{who}: expected {name} of at most {MAX_STEPS}, got {short(count)}.")


def check_number(name: str, value: Any, is_positive: bool) -> None:
    """A finite number, above zero where `is_positive`. Errors: ValueError."""
    what = "a finite number above 0" if is_positive else "a finite number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"HybridConfig: expected {name} to be a number, got {short(value)}.")
    if not _is_finite(value) or (is_positive and value <= 0):
        raise ValueError(f"HybridConfig: expected {name} to be {what}, got {short(value)}.")


def check_layers(layers: Any) -> list[int]:
    """The injection points as a list. Errors: ValueError."""
    if layers is None:
        return []
    if not isinstance(layers, list | tuple | range):
        raise ValueError(f"HybridConfig: expected injection_layers to be a list, got {short(layers)}.")
    layers = list(layers)
    if not all(is_int(k) and k >= 0 for k in layers):
        raise ValueError(f"HybridConfig: expected injection_layers to be counts from 0, got {short(layers)}.")
    if sorted(set(layers)) != layers:
        raise ValueError(f"HybridConfig: expected injection_layers sorted, each once, got {short(layers)}.")
    return layers


def count_parameters(
    width: int, heads: int, key_value_heads: int, layers: int, intermediate_size: int | None
) -> int:
    """Parameters of a TRM, its projections to the language model left out."""
    inner = intermediate_size or default_intermediate_size(width)
    attention = width * width + (heads + 2 * key_value_heads) * (width // heads) * width
    return layers * (attention + 3 * width * inner) + 2 * width


def check_size(parameters: int) -> None:
    """Refuse what no memory holds, before any is asked for. Errors: ValueError."""
    if parameters > MAX_PARAMETERS:
        raise ValueError(
            f"HybridConfig: expected a TRM of at most {MAX_PARAMETERS:.0e} parameters, got sizes that make "
            f"{short(parameters)} (trm_hidden_size, trm_num_layers, trm_intermediate_size)."
        )


def check_base_config(base_config: Any, hybrid_type: str) -> PreTrainedConfig | None:
    """The language model's config, made of its dictionary where it came as one. Errors: ValueError."""
    if isinstance(base_config, dict):
        if not isinstance(base_config.get("model_type"), str):
            raise ValueError(
                "HybridConfig: expected base_config to name its model_type, "
                f"got {short(base_config.get('model_type'))}."
            )
        if base_config["model_type"] != hybrid_type:
            try:
                base_config = AutoConfig.for_model(**base_config)
            except Exception as error:  # each family has its own kinds
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"HybridConfig: expected base_config to be a {base_config['model_type']} config, "
                    f"got one that it refuses: {reason[:200]}"
                ) from error
    if base_config is None:
        return None
    if isinstance(base_config, dict) or getattr(type(base_config), "model_type", None) == hybrid_type:
        raise ValueError("HybridConfig: expected base_config to be a language model's, got a hybrid's.")
    if not isinstance(base_config, PreTrainedConfig):
        raise ValueError(
            "HybridConfig: expected base_config to be a config of transformers or its dictionary, "
            f"got {short(base_config)}."
        )
    return base_config


def read_json_object(path: str | Path, what: str) -> dict[str, Any]:
    """The object in a JSON file. Errors: ValueError that names the file."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path}: expected a JSON object with {what}, got none ({reason}).") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: expected a JSON object with {what}, got {type(found).__name__}.")
    return dict(found)


def short(value: Any) -> str:
    """A value as an error shows it: a long one cut, also a number of more digits than Python prints."""
    if is_int(value) and abs(value) >= 10**18:
        return f"a number of about 2^{value.bit_length()}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number above all floats
        return False
