"""Reachability in small directed graphs as text: can a node be reached from the node that is named first?

    a,ad,fh,dc,he,cb,eg     the source a; then edges from a letter to a letter, as they come in
        y  n  y  n  y  n    after every edge: is the node it leads to reached from a by the edges so far?

A graph has 8 nodes and 6 edges: two trees of 3 edges each, which grow in a random order, the source being the
root of one. So answers are balanced, in every text, and at every difficulty, which is the number of edges on
the path from the root of the node's tree: an answer by guess is right half of the time everywhere. A node is
new when an edge leads to it, so a path is the only one and the shortest. About one graph in eight, by a
checksum of its source and its edges in any order, is held out.

The language model is the shell game's, frozen; an arm trains a TRM after its first layer, or LoRA of about as
many parameters. All arms take 400 steps of 32 graphs, the same graphs in the same order, and so differ in CPU
time, of which the table of budgets tells. The task is made easy on purpose. In pilots of one seed nothing was
learned in 400 steps with n = 4 where all questions came after the edges (of graphs of 8 nodes and 10 edges),
and paths of one edge were learned more slowly without commas, and with 8 or 16 graphs a step.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from evidence.shell_game import pretrained_base
from evidence.training import train, trained
from hybrid import HybridConfig, HybridModel
from hybrid.demo.base import LanguageModel
from hybrid.training.evaluate import IGNORED
from hybrid.training.processes import seed_everything

EDGES = 6
NODES = EDGES + 2
_HELD_OUT_ONE_IN = 8
_HELD_OUT_SEED = 1_000_000
_A, _COMMA, _YES, _NO = map(ord, "a,yn")


@dataclass(frozen=True)
class Settings:
    """An arm.

    trains         "recursion" or "LoRA"
    n              recursion steps
    sampling       HybridConfig's recursion_sampling
    rank           LoRA's
    steps, batch_size, learning_rate   of the training; graphs in a step
    base_steps     of the language model's own training, in the shell game
    graphs         held-out graphs to measure on
    """

    trains: str = "recursion"
    n: int = 8
    sampling: str = "fixed"
    rank: int = 24
    steps: int = 400
    batch_size: int = 32
    learning_rate: float = 5e-3
    base_steps: int = 400
    graphs: int = 1024


_ARMS = {
    **{f"n = {n}": Settings(n=n) for n in (1, 4, 8)},
    "n random in 1..8": Settings(sampling="uniform"),
    "LoRA": Settings("LoRA"),
}
ARMS = tuple(_ARMS)


def settings(arm: str, quick: bool) -> dict[str, Any]:
    """All of an arm's settings."""
    return asdict(_settings(arm, quick))


def run(seed: int, arm: str, quick: bool) -> dict[str, Any]:
    """Train one arm and measure it on held-out graphs.

    accuracy         of all answers; by guess it is 0.5
    by_difficulty    by the edges on the path from the root
    trained_parameters, cpu_seconds
    """
    chosen = _settings(arm, quick)
    model = _model(chosen, seed)
    texts = Texts.of(_graphs(chosen.steps * chosen.batch_size, seed, held_out=False))
    cpu_seconds = train(model, _loss(model, chosen, texts), chosen.steps, chosen.learning_rate)
    right, depth = _answers(model, _graphs(chosen.graphs, _HELD_OUT_SEED, held_out=True))
    return {
        "accuracy": right.float().mean().item(),
        "by_difficulty": {
            f"{edges} edges" if edges > 1 else "1 edge": right[depth == edges].float().mean().item()
            for edges in sorted(set(depth.flatten().tolist()))
        },
        "trained_parameters": sum(p.numel() for p in trained(model)),
        "cpu_seconds": cpu_seconds,
    }


# Graphs and texts


class Graphs(NamedTuple):
    """Graphs, their edges in the order of the text. Nodes are 0 to 7.

    source     [count]
    edges      [count, 6, 2], from and to
    reached    [count, 6] bool: whether the edge leads to a node that is reached from the source
    depth      [count, 6] edges on the path to that node from the root of its tree
    """

    source: Tensor
    edges: Tensor
    reached: Tensor
    depth: Tensor


def graphs(count: int, seed: int, held_out: bool) -> Graphs:
    """Graphs to train on, or held out. Some may come twice."""
    generator = torch.Generator().manual_seed(seed)
    kept: list[Graphs] = []
    while sum(len(some.source) for some in kept) < count:
        drawn = _grown(2 * count, generator)
        rows = is_held_out(drawn).eq(held_out)
        kept.append(Graphs(*(t[rows] for t in drawn)))
    return Graphs(*(torch.cat(parts)[:count] for parts in zip(*kept, strict=True)))


def _grown(count: int, generator: torch.Generator) -> Graphs:
    """Two trees, 3 edges each, grown edge by edge: from the deepest node of a tree, or from any other."""
    row = torch.arange(count)
    tree = torch.zeros(count, NODES, dtype=torch.int64)  # the source's is 0
    tree[:, 1] = 1
    depth = torch.zeros_like(tree)
    parent = torch.zeros(count, EDGES, dtype=torch.int64)
    grows = (torch.rand(count, EDGES, generator=generator).argsort(1) < EDGES // 2).long()
    for edge in range(EDGES):
        node = 2 + edge
        mine = tree[:, :node] == grows[:, edge, None]
        is_deepest = depth[:, :node] == torch.where(mine, depth[:, :node], -1).amax(1, keepdim=True)
        weight = mine * torch.where(is_deepest, 1.0, 0.5)
        parent[:, edge] = torch.multinomial(weight, 1, generator=generator)[:, 0]
        tree[:, node] = grows[:, edge]
        depth[:, node] = depth[row, parent[:, edge]] + 1
    name = torch.rand(count, NODES, generator=generator).argsort(1)
    edges = torch.stack((name.gather(1, parent), name[:, 2:]), -1)
    return Graphs(name[:, 0], edges, tree[:, 2:] == 0, depth[:, 2:])


def is_held_out(some: Graphs) -> Tensor:
    """[count] whether a graph is kept from training: by a checksum of its source and the set of its edges."""
    weights = torch.randint(1 << 20, (NODES, NODES), generator=torch.Generator().manual_seed(0))
    checksum = weights[some.edges[..., 0], some.edges[..., 1]].sum(-1) + weights.diagonal()[some.source]
    return checksum % 1009 % _HELD_OUT_ONE_IN == 0


class Texts(NamedTuple):
    """What a model reads and what it is asked, [count, 2 + 3 * 6] each.

    input_ids    the source, the edges with a comma before each, and the last answer
    labels       beside the token after an edge, whether its node is reached: a model shifts labels by one
    """

    input_ids: Tensor
    labels: Tensor

    @classmethod
    def of(cls, some: Graphs) -> "Texts":
        count = len(some.source)
        answers = torch.where(some.reached, _YES, _NO)
        commas = torch.full((count, EDGES, 1), _COMMA)
        parts = (_A + some.source[:, None], torch.cat((commas, _A + some.edges), -1).flatten(1))
        input_ids = torch.cat((*parts, answers[:, -1:]), 1)
        labels = torch.full_like(input_ids, IGNORED)
        labels[:, 4::3] = answers
        return cls(input_ids, labels)


@lru_cache(maxsize=2)
def _graphs(count: int, seed: int, held_out: bool) -> Graphs:
    return graphs(count, seed, held_out)


# Models


def _settings(arm: str, quick: bool) -> Settings:
    return replace(_ARMS[arm], steps=max(1, _ARMS[arm].steps // 10)) if quick else _ARMS[arm]


def _model(chosen: Settings, seed: int) -> LanguageModel:
    """The base, what requires gradients within it being what the arm trains."""
    base = copy.deepcopy(pretrained_base(chosen.base_steps)).requires_grad_(False)
    seed_everything(seed)
    if chosen.trains == "LoRA":
        adapters = LoraConfig(r=chosen.rank, lora_alpha=2 * chosen.rank, target_modules="all-linear")
        return get_peft_model(base, adapters)
    config = HybridConfig(
        injection_layers=[1],
        trm_input_norm=False,  # as when these runs were published
        trm_hidden_size=64,
        trm_num_heads=4,
        trm_num_layers=1,
        trm_intermediate_size=168,
        num_recursion_steps=chosen.n,
        recursion_sampling=chosen.sampling,
        recursion_seed=seed,
    )
    return HybridModel(llm_model=base, config=config).freeze_base()


def _loss(model: LanguageModel, chosen: Settings, texts: Texts) -> Callable[[int], Tensor]:
    """The loss of a step: the mean over its answers."""

    def loss_of(step: int) -> Tensor:
        rows = slice(step * chosen.batch_size, (step + 1) * chosen.batch_size)
        n = {"num_recursion_steps": model.draw_recursion_steps(step)} if chosen.sampling == "uniform" else {}
        batch = {"input_ids": texts.input_ids[rows], "labels": texts.labels[rows]}
        loss: Tensor = model(**batch, **n, use_cache=False).loss
        return loss

    return loss_of


@torch.no_grad()
def _answers(model: LanguageModel, some: Graphs) -> tuple[Tensor, Tensor]:
    """(whether an answer is right, its depth), [count, 6] each; an answer is the likeliest of all tokens."""
    texts = Texts.of(some)
    said = model.eval()(input_ids=texts.input_ids, use_cache=False).logits[:, 3:-1:3].argmax(-1)
    return said == texts.labels[:, 4::3], some.depth
