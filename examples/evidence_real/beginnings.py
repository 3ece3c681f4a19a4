"""A batch of texts in which each beginning that several share is computed once, and padding is not computed.

In a causal model a token's hidden states depend on the tokens up to it alone. So the texts of a batch are the
paths of a tree of tokens, and what is computed is one row of that tree's tokens: queries, keys and values are
gathered along the paths for the attention, and all else is token by token. The mathematics is that of the
padded batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from hybrid.demo.real.training import Model

_NAME = "along_paths"


@dataclass(frozen=True)
class Tree:
    """The distinct beginnings of a batch of texts.

    ids        [P] int64: the last token of each beginning
    positions  [P] int64: its place in the text
    nodes      [B, T] int64: the beginning that ends at this token; any where a text is padded
    last       [P, 2] int64: (b, t) of one text and place where the beginning ends
    """

    ids: Tensor
    positions: Tensor
    nodes: Tensor
    last: Tensor


def tree_of(ids: Tensor, lengths: Tensor) -> Tree:
    """The tree of texts [B, T] int64 with so many tokens each, [B] int64."""
    nodes = torch.zeros_like(ids)
    found: dict[tuple[int, int], int] = {}
    last: list[tuple[int, int]] = []
    for b, (row, length) in enumerate(zip(ids.tolist(), lengths.tolist(), strict=True)):
        node = -1
        for t, token in enumerate(row[:length]):
            node = found.setdefault((node, token), len(found))
            if node == len(last):
                last.append((b, t))
            nodes[b, t] = node
    places = torch.tensor(last)
    return Tree(ids[places[:, 0], places[:, 1]], places[:, 1], nodes, places)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention along the paths of module.tree; [1, H, P, d] -> [1, P, H, d]."""
    tree = cast(Tree, module.tree)
    (b, t), groups = tree.nodes.shape, query.shape[1] // key.shape[1]

    def along(x: Tensor) -> Tensor:  # [1, H, P, d] -> [B, H, T, d]
        return x[0].transpose(0, 1)[tree.nodes.flatten()].view(b, t, x.shape[1], -1).transpose(1, 2)

    q, k, v = along(query), along(key), along(value)
    q = q.reshape(b, -1, groups * t, q.shape[-1])
    scores = (q @ k.transpose(2, 3)).view(b, -1, groups, t, t) * scaling
    later = torch.ones(t, t, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
    out = (weights.view(b, -1, groups * t, t) @ v).view(b, query.shape[1], t, -1)
    return out[tree.last[:, 0], :, tree.last[:, 1]][None], None


class SharedBeginnings(Model):
    """A Model, all of whose layers are computed, that is trained on each beginning of a batch once.

    No text may end with token 0, by which texts are padded, and no layer be checkpointed.
    """

    def __init__(self, whole: Any, base: Any, trained_in: torch.dtype) -> None:
        super().__init__(whole, base, layer=0, trained_in=trained_in)
        AttentionInterface.register(_NAME, _attention)

    def last_states(self, ids: Tensor, h: Tensor | None, n: int | None = None) -> tuple[Tensor, Tensor]:
        if not self.whole.training:
            return super().last_states(ids, h, n)
        lengths = ids.shape[1] - (ids.flip(1) != 0).int().argmax(1)  # a text is padded with zeros
        tree = tree_of(ids, lengths)
        with self._along(tree):
            before, after = self._called(tree.ids[None], position_ids=tree.positions[None])
        return before[0][tree.nodes], after[0][tree.nodes]

    @contextmanager
    def _along(self, tree: Tree) -> Iterator[None]:
        layers, usual = self.base.model.layers, self.base.config._attn_implementation
        for layer in layers:
            layer.self_attn.tree = tree
        self.base.set_attn_implementation(_NAME)
        try:
            yield
        finally:
            self.base.set_attn_implementation(usual)
