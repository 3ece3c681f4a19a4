"""What the TRM paper's three trainings take of cards: operations, the least hours, memory by save policy.

One optimizer step is one supervision step of a whole batch. With f an evaluation of all layers, its forward
is T (n + 1) f; backward is twice the products of the last n + 1 f, and 2.5 times their attention. Attention
is not causal. A curriculum's operations are the sum over the depths of its steps.

Hours are the roofline's: products and attention at the shares in cards.py, the batch divided among the cards.
Not counted: pointwise passes, the embeddings, the optimiser, communication, loading, evaluation. So they are
the least that it can take. The published hours beside them say how far from that the paper's own code is.

Source   Settings and hours: README and config/ of github.com/SamsungSAILMontreal/TinyRecursiveModels. ARC's
         number of steps is that of its published checkpoint, step_518071; the others' follow from epochs,
         puzzles and batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hybrid.plan.cards import CARDS, Card
from hybrid.plan.work import Flops
from trm_kernels.modules.curriculum import Depth, RecursionCurriculum
from trm_kernels.modules.layers import SwiGLU
from trm_kernels.modules.trm import TRM
from trm_kernels.recursion.saved_bytes import SAVES, saved_bytes

_WIDTH, _HEADS, _PREFIX, _BATCH = 512, 8, 16, 768
_FIRST, _RISES = Depth(2, 1), 0.6  # a curriculum's first depth, and the share of the steps in which it rises
_BYTES_OF_PARAMETER = 20  # weight, gradient, two moments and the average, each in float32
# data sheet of NVIDIA: L40S; the shares are those of the RTX 4090, of the same architecture
_L40S = Card("L40S", 48e9, 362e12, 91.6e12, 0.864e12, 350, 0.90, 0.75, 1.00, 8_000)


@dataclass(frozen=True)
class Puzzle:
    """A training of the paper's code.

    cells, vocabulary   of a puzzle
    mlp_t               whether an MLP over the tokens mixes them, not attention
    depth               n and T
    steps               of the optimiser
    identifiers         puzzles with an embedding of their own; of ARC at most
    published           (hours, an upper bound?, cards, card) by that code's README
    """

    cells: int
    vocabulary: int
    mlp_t: bool
    depth: Depth
    steps: int
    identifiers: int
    published: tuple[float, bool, int, Card]

    @property
    def tokens(self) -> int:
        return self.cells + _PREFIX

    def trm(self) -> TRM:
        """The recursion, without memory."""
        return TRM(
            _WIDTH,
            _HEADS,
            mlp_t=self.mlp_t,
            seq_len=self.tokens if self.mlp_t else None,
            device="meta",
            dtype=torch.bfloat16,
        )


_EPOCHS_OF_1000 = 50_000 * 1000 // _BATCH  # 50,000 epochs of 1,000 puzzles
PUZZLES = {
    "sudoku": Puzzle(81, 11, True, Depth(6, 3), _EPOCHS_OF_1000, 1, (18.0, False, 1, _L40S)),
    "maze": Puzzle(900, 6, False, Depth(4, 3), _EPOCHS_OF_1000, 1, (24.0, True, 4, _L40S)),
    # 400 + 400 + 160 tasks, each with 1,000 augmentations
    "arc": Puzzle(900, 12, False, Depth(4, 3), 518_071, 960 * 1001 + 1, (72.0, False, 4, CARDS["H100-80GB"])),
}


class Hours(NamedTuple):
    """The least that a training takes: operations in all, and hours on the cards."""

    operations: float
    hours: float


@dataclass(frozen=True)
class PuzzlePlan:
    """What a training takes.

    parameters       without the embeddings of the puzzles
    whole, shallow   without and with a curriculum
    published        the paper's hours, and `whole` on the cards that it names
    memory           bytes on a card by save policy; what the others need beside it is in each
    """

    puzzle: Puzzle
    parameters: int
    whole: Hours
    shallow: Hours
    published: Hours
    memory: dict[str, float]


def plan_puzzle(puzzle: Puzzle, cards: int, card: Card) -> PuzzlePlan:
    """What the training takes of so many cards. Errors: ValueError where they cannot divide the batch."""
    if _BATCH % cards:
        raise ValueError(f"plan: expected --cards to divide a batch of {_BATCH} puzzles, got {cards}.")
    head = _WIDTH * puzzle.vocabulary
    parameters = sum(p.numel() for p in puzzle.trm().layers.parameters()) + 2 * head
    whole = {puzzle.depth: puzzle.steps}
    _, _, published_cards, published_card = puzzle.published
    return PuzzlePlan(
        puzzle,
        parameters,
        _hours(puzzle, whole, cards, card),
        _hours(puzzle, depths(puzzle), cards, card),
        _hours(puzzle, whole, published_cards, published_card),
        {save: _memory(puzzle, save, cards, parameters) for save in SAVES},
    )


def depths(puzzle: Puzzle) -> dict[Depth, int]:
    """In how many steps the curriculum has which depth."""
    curriculum = RecursionCurriculum(_FIRST, puzzle.depth, round(_RISES * puzzle.steps))
    found: dict[Depth, int] = {}
    for step in range(puzzle.steps):
        depth = curriculum.at(step)
        found[depth] = found.get(depth, 0) + 1
    return found


def step_flops(puzzle: Puzzle, depth: Depth) -> Flops:
    """Operations of an optimizer step, forward and backward, of all puzzles of the batch."""
    products = attention = 0.0
    for layer in puzzle.trm().layers:
        for part in layer.children():
            # an MLP over the tokens works on each of the channels as others do on each of the tokens
            rows = _WIDTH if puzzle.mlp_t and part is getattr(layer, "mlp_t", None) else puzzle.tokens
            products += 2.0 * rows * sum(p.numel() for p in part.parameters())
        if not isinstance(next(iter(layer.children())), SwiGLU):
            attention += 4.0 * puzzle.tokens**2 * _WIDTH
    n, cycles = depth
    f = Flops(products, attention)
    head = Flops(3 * 2.0 * puzzle.tokens * _WIDTH * puzzle.vocabulary)
    of_puzzle = f.times(cycles * (n + 1)) + f.times(2 * (n + 1), 2.5 * (n + 1)) + head
    return of_puzzle.times(_BATCH)


def _hours(puzzle: Puzzle, steps_at: dict[Depth, int], cards: int, card: Card) -> Hours:
    flops = sum((step_flops(puzzle, depth).times(n) for depth, n in steps_at.items()), start=Flops())
    rate = cards * card.flops_per_s * card.products
    return Hours(flops.all, (flops.products + flops.attention / card.attention) / rate / 3600)


def _memory(puzzle: Puzzle, save: str, cards: int, parameters: int) -> float:
    """Bytes on one card: what f keeps, at the whole depth; weights and the optimiser's; puzzle embeddings."""
    trm = puzzle.trm()
    x = torch.empty(_BATCH // cards, puzzle.tokens, _WIDTH, dtype=torch.bfloat16, device="meta")
    weights = [layer(torch.bfloat16) for layer in trm.layers]
    kept = (puzzle.depth.num_recursion_steps + 1) * saved_bytes(save, x, weights, _HEADS)
    embeddings = 4 * _WIDTH * puzzle.identifiers
    carry = 3 * x.nbytes  # x, y and z
    logits = 8 * (_BATCH // cards) * puzzle.cells * puzzle.vocabulary  # float64, for stable-max
    return float(kept + _BYTES_OF_PARAMETER * parameters + embeddings + carry + logits)


def as_json(made: PuzzlePlan) -> dict[str, Any]:
    """The same figures, unrounded: operations, hours, bytes."""
    return {
        "parameters": made.parameters,
        "steps": made.puzzle.steps,
        "operations": made.whole.operations,
        "hours": made.whole.hours,
        "operations_with_curriculum": made.shallow.operations,
        "hours_with_curriculum": made.shallow.hours,
        "published_hours": made.puzzle.published[0],
        "hours_on_the_published_cards": made.published.hours,
        "memory_bytes": made.memory,
    }


def lines(name: str, made: PuzzlePlan, cards: int, card: Card) -> Iterator[str]:
    """The table."""
    puzzle = made.puzzle
    n, cycles = puzzle.depth
    kind = "an MLP over the tokens" if puzzle.mlp_t else "attention"
    yield f"{name}: {made.parameters / 1e6:.1f} M parameters, {kind}, n = {n}, T = {cycles}"
    yield f"{puzzle.steps:,} steps of {_BATCH} puzzles of {puzzle.tokens} tokens on {cards}x {card.name}"
    yield ""
    yield f"{'':<42}{'operations':>12}{'hours at least':>16}"
    yield f"  {'all steps at n and T':<40}{made.whole.operations:>12.2e}{made.whole.hours:>16.2f}"
    first, rises = "x".join(map(str, _FIRST)), round(_RISES * puzzle.steps)
    text = f"--recursion-curriculum {first}:{rises}"
    yield f"  {text:<40}{made.shallow.operations:>12.2e}{made.shallow.hours:>16.2f}"
    yield f"  fewer by a factor of {made.whole.operations / made.shallow.operations:.2f}"
    yield ""
    hours, is_bound, number, named = puzzle.published
    bound = "less than" if is_bound else "about"
    yield f"published: {bound} {hours:.0f} hours on {number}x {named.name}; this model of it says at least"
    yield f"{made.published.hours:.2f} hours there, {made.published.hours / hours:.0%} of that"
    yield ""
    yield "GB (10^9 bytes) on a card, by what is kept for backward (TRM's save)"
    for save, size in made.memory.items():
        yield f"  {save:<8}{size / 1e9:>8.1f}{'' if size <= card.memory_bytes else '   does not fit'}"
