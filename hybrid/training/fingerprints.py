"""What tells a base from another, wherever it lies; and in what two descriptions differ."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from hybrid.model.hybrid_model import HybridModel
from hybrid.saving.base_checksum import tensor_sums

# of a base's config: where it came from, how it is kept and called, but not what it computes
_NOT_OF_A_BASE = ("_name_or_path", "transformers_version", "architectures", "dtype", "use_cache")


def of_base(model: PreTrainedModel) -> dict[str, Any]:
    """The language model's class, config, dtypes, and a checksum of its weights as they are; JSON.

    Ask before the model is split among processes or trained.
    """
    base = model.llm_model if isinstance(model, HybridModel) else model
    named = model.base_named_parameters() if isinstance(model, HybridModel) else model.named_parameters()
    parameters = list(named)
    config = {name: value for name, value in base.config.to_dict().items() if name not in _NOT_OF_A_BASE}
    sums = tensor_sums(parameters)
    found = {
        "class": type(base).__name__,
        "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for _, p in parameters})),
        "config": config,
        "weights": hashlib.sha256(repr(sorted(sums.items())).encode()).hexdigest(),
    }
    return json.loads(json.dumps(found, default=str))


def first_difference(then: dict[str, Any], now: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """(name, value then, value now) of the first thing in which two trees differ, or None.

    A name inside of others is written with points between; a value that is missing is "none".
    """
    before, after = dict(_flat(then)), dict(_flat(now))
    for name in {**before, **after}:
        if before.get(name) != after.get(name):
            return name, before.get(name, "none"), after.get(name, "none")
    return None


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
