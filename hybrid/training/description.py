"""What a run is: all that a resumed run must have in common with the run that began."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybrid.config import trm_fields
from hybrid.data.stream import TokenStream
from hybrid.data.tokenize import Tokenize
from hybrid.model.hybrid_model import HybridModel
from hybrid.training.batches import count, describe_items
from hybrid.training.checkpoint_tensors import trained_parameters
from hybrid.training.settings import TrainSettings

# these say how a run is watched and kept, not what it computes; they may change when it is resumed
# the last two may as long as a step has as many items as before
_MAY_CHANGE = (
    "output_dir",
    "save_every",
    "eval_every",
    "log_every",
    "keep_checkpoints",
    "max_skipped_steps",
    "cache_hidden_states",
    "report_to",
    "batch_size",
    "accumulate",
    "shard",
)


def describe(
    model: PreTrainedModel,
    settings: TrainSettings,
    data: Dataset | TokenStream,
    keep: Dataset | TokenStream | None,
    held_out: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase | None,
    base: dict[str, Any] | None,
    of_processes: dict[str, Any],
) -> dict[str, Any]:
    """What a resumed run must have in common with the run that began, as JSON gives it again.

    base           fingerprints.of_base, of before the first step
    of_processes   in which precision they compute, and how many items a step has over all of them
    """
    fields = trm_fields() if isinstance(model, HybridModel) else []
    description = {
        **{name: value for name, value in asdict(settings).items() if name not in _MAY_CHANGE},
        **of_processes,
        "config": {name: getattr(model.config, name) for name in fields},
        "quantized": _quantized(model),
        "base": base,
        "tokenizer": tokenizer and Tokenize(tokenizer, 2).fingerprint(),
        **{name: _describe(some) for name, some in (("data", data), ("keep", keep)) if some is not None},
        "held_out": {
            name: describe_items(some) if count(some) else {"items": 0} for name, some in held_out.items()
        },
        "trained": {name: f"{p.dtype} {list(p.shape)}" for name, p in trained_parameters(model).items()},
    }
    return json.loads(json.dumps(description))  # as it will be read again: tuples are lists


def _describe(data: Dataset | TokenStream) -> dict[str, Any]:
    return data.describe() if isinstance(data, TokenStream) else describe_items(data)


def _quantized(model: PreTrainedModel) -> str | None:
    """How the base was."""
    base = model.llm_model if isinstance(model, HybridModel) else model
    how = getattr(base.config, "quantization_config", None)
    return None if how is None else str(how if isinstance(how, dict) else how.to_dict())
