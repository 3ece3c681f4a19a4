"""Items of a data set as one batch: of one length as they are, of several lengths padded on the right."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

IGNORED = -100  # the ignore index of transformers and torch: a label that is not counted


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """{name: [B, T]} of items {name: [T_i]}, T the longest of T_i.

    Where the T_i differ, labels are padded with -100, all else with 0, and "attention_mask" [B, T] int64 says
    what is no padding; an item may bring its own.
    """
    lengths = [len(item["input_ids"]) for item in items]
    if len(set(lengths)) == 1:
        return default_collate(list(items))
    padded = []
    for item, length in zip(items, lengths, strict=True):
        item = {"attention_mask": torch.ones(length, dtype=torch.int64)} | item
        more = max(lengths) - length
        padded.append(
            {name: F.pad(t, (0, more), value=IGNORED if name == "labels" else 0) for name, t in item.items()}
        )
    return default_collate(padded)
