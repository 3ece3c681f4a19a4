"""A Tiny Recursive Model that learns Sudoku: `python examples/tiny_recursive_models.py --puzzle 4x4`

    puzzle -> x = [learned prefix | cells] -> trm_kernels.TRM, y and z in and out -> y of cells -> digits
                                                                                  -> first y -> done?

One supervision step is one call of the recursion, one loss and one step of the optimiser; y and z, detached,
are where the next one goes on. A row that says it is done, or has had all its steps, makes way for a new
puzzle. The puzzles are those of sudoku.py.

The loss, the optimisers and the average of the weights, with which is tested, are those of trm_recipe.py.

Backend  `backend("auto")`: Triton kernels on CUDA, in bfloat16, and the reference on a CPU, in float32.
Source   "Less is More: Recursive Reasoning with Tiny Networks", arXiv 2510.04871: deep supervision with a
         carry (section 2.3, `refill` and `supervise`), halting with exploration (2.4 and 4.6, `supervise`).
         Other than there: gradients are clipped, and a run may begin shallow (`--recursion-curriculum`).
"""

import argparse
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, cast

import puzzle_folder
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sudoku import sudoku
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.flop_counter import FlopCounterMode
from trm_recipe import AdamATan2, SparseSignSGD, average_of_weights, stablemax_cross_entropy

from trm_kernels import TRM, Depth, RecursionCurriculum

HELD_OUT = 500  # puzzles
_EMBEDDING_RATE = 100  # the puzzle embedding's learning rate, in those of all else
EXPLORATION = 0.1  # share of rows that go on for a drawn number of steps although they say they are done


@dataclass(frozen=True)
class Settings:
    """What may be chosen; the 9x9 values are the paper's, but for the steps."""

    box: tuple[int, int]  # rows and columns of a box, which has as many cells as a grid has rows
    hidden_size: int = 512
    num_heads: int = 8  # without mlp_t
    prefix: int = 16  # tokens in front; they hold the puzzle embedding
    mlp_t: bool = True  # cells are mixed by an MLP over them, the paper's choice for Sudoku, not by attention
    n: int = 6  # updates of z in a cycle
    cycles: int = 3  # updates of y; gradients pass through the last
    supervision_steps: int = 16  # at most, for one puzzle in training
    steps: int = 20_000  # of the optimiser
    batch_size: int = 768
    learning_rate: float = 1e-4
    warmup_steps: int = 2000
    weight_decay: float = 1.0
    ema: float = 0.999  # how much of the average of the weights stays in a step
    recursion_curriculum: str | None = None  # FIRST:STEPS, see RecursionCurriculum.from_text
    puzzles: int = 50_000  # to train on
    givens: tuple[int, int] = (33, 45)  # fewest and most


PUZZLES = {
    "4x4": Settings(
        box=(2, 2),
        hidden_size=64,
        num_heads=4,
        prefix=1,
        n=2,
        cycles=2,
        supervision_steps=4,
        steps=300,
        batch_size=32,
        learning_rate=2e-3,
        warmup_steps=100,
        ema=0.98,
        puzzles=20_000,
        givens=(4, 6),
    ),
    "9x9": Settings(box=(3, 3)),
}


# The model


class PuzzleModel(nn.Module):
    """Embeddings, a TRM and two heads. Outside the TRM, parameters have the names of the paper's code.

    Tokens are the paper's: 0 pads and never occurs here, 1 is a blank, d + 1 the digit d.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width, side = settings.hidden_size, math.prod(settings.box)
        cells, vocabulary = side * side, side + 2
        self.width, self.prefix = width, settings.prefix
        embedding = torch.randn(vocabulary, width) / math.sqrt(width)
        self.embed_tokens = nn.ParameterDict({"embedding_weight": nn.Parameter(embedding)})
        self.puzzle_emb = nn.ParameterDict(
            {"weights": nn.Parameter(torch.zeros(1, width))}
        )  # one kind: Sudoku
        self.trm = TRM(
            width,
            settings.num_heads,
            num_recursion_steps=settings.n,
            num_cycles=settings.cycles,
            mlp_t=settings.mlp_t,
            seq_len=settings.prefix + cells if settings.mlp_t else None,
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.q_head = nn.Linear(width, 2)  # as in the paper's code; its second output is not used
        nn.init.zeros_(self.q_head.weight)
        nn.init.constant_(self.q_head.bias, -5.0)

    def embed(self, puzzles: Tensor) -> Tensor:
        """x [B, prefix + cells, D]: the puzzle embedding, padded with zeros to the prefix, then the cells."""
        cells = F.embedding(puzzles + 1, self.embed_tokens["embedding_weight"])
        kind = F.pad(self.puzzle_emb["weights"], (0, (self.prefix - 1) * self.width))
        prefix = kind.view(1, self.prefix, self.width).expand(len(puzzles), -1, -1)
        x = math.sqrt(self.width) * torch.cat([prefix, cells], dim=1)
        return x.to(torch.bfloat16 if x.is_cuda else torch.float32)

    def start(self, puzzles: Tensor) -> tuple[Tensor, Tensor]:
        """(y, z) before the first supervision step, each [B, prefix + cells, D]."""
        x = self.embed(puzzles).detach()
        return self.trm.y_init.detach().to(x).expand_as(x), self.trm.z_init.detach().to(x).expand_as(x)

    def forward(
        self, puzzles: Tensor, y: Tensor, z: Tensor, depth: Depth | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(y, z, logits [B, cells, V], q [B]) of a supervision step; q > 0 says that all cells are right."""
        y, z = self.trm(self.embed(puzzles), y, z, **({} if depth is None else depth._asdict()))
        return y.detach(), z.detach(), *self.read(y)

    def read(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [B, cells, V], q [B]) of an answer."""
        return self.lm_head(y[:, self.prefix :].float()), self.q_head(y[:, 0].float())[:, 0]


# Training and evaluation


class Carry(NamedTuple):
    """Where the rows of a batch stand between two supervision steps, each at one of its own."""

    y: Tensor  # [B, prefix + cells, D], as z
    z: Tensor
    puzzles: Tensor  # [B, cells], as solutions
    solutions: Tensor
    steps: Tensor  # [B] that the row has had
    halted: Tensor  # [B] whether it makes way for a new puzzle


def refill(model: PuzzleModel, carry: Carry, puzzles: Tensor, solutions: Tensor) -> Carry:
    """The carry with new puzzles, from their start, in the rows that have halted."""
    halted, row = carry.halted, carry.halted[:, None]
    y, z = model.start(puzzles)
    return Carry(
        torch.where(row[:, None], y, carry.y),
        torch.where(row[:, None], z, carry.z),
        torch.where(row, puzzles, carry.puzzles),
        torch.where(row, solutions, carry.solutions),
        torch.where(halted, 0, carry.steps),
        torch.zeros_like(halted),
    )


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over all cells, for logits [B, cells, V] and labels [B, cells]."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def supervise(
    model: PuzzleModel,
    carry: Carry,
    most_steps: int,
    depth: Depth | None = None,
    cells_loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> tuple[Tensor, Carry]:
    """(loss, carry) of one supervision step: cross entropy of the cells, and of "all of them are right"."""
    y, z, logits, q = model(carry.puzzles, carry.y, carry.z, depth)
    right = (logits.argmax(-1) == carry.solutions + 1).all(-1)
    loss = cells_loss(logits, carry.solutions + 1)
    loss = loss + 0.5 * F.binary_cross_entropy_with_logits(q, right.float())
    steps = carry.steps + 1
    fewest_steps = torch.randint_like(steps, 1, most_steps + 1) * (torch.rand_like(q) < EXPLORATION)
    halted = (steps >= most_steps) | ((q > 0) & (steps >= fewest_steps))
    return loss, carry._replace(y=y, z=z, steps=steps, halted=halted)


class Trained(NamedTuple):
    """What came of a training."""

    losses: list[float]  # of every step
    average: PuzzleModel  # with the average of the weights
    operations: int  # floating-point, of the products of all forwards and backwards


def train(model: PuzzleModel, puzzles: Tensor, solutions: Tensor, settings: Settings) -> Trained:
    """Deep supervision, from a shallow recursion to the whole one if there is a curriculum."""
    embedding = model.puzzle_emb["weights"]
    others = [p for p in model.parameters() if p is not embedding]
    both = _optimizers(embedding, others, settings)
    warmups = [LambdaLR(one, lambda step: min(1.0, (step + 1) / settings.warmup_steps)) for one in both]
    average, counted = average_of_weights(model, settings.ema), Counted()

    def draw() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(puzzles), (settings.batch_size,)).to(puzzles.device)
        return puzzles[rows].long(), solutions[rows].long()

    first = draw()
    halted = torch.ones(settings.batch_size, dtype=torch.bool, device=puzzles.device)
    carry = Carry(*model.start(first[0]), *first, steps=halted.long(), halted=halted)
    losses, began, every = [], time.perf_counter(), max(1, settings.steps // 10)
    for step in range(1, settings.steps + 1):
        depth, carry = depth_at(settings, step - 1), refill(model, carry, *draw())
        with counted.step(depth):
            loss, carry = supervise(model, carry, settings.supervision_steps, depth, stablemax_cross_entropy)
            loss.backward()
        assert embedding.grad is not None
        embedding.grad = embedding.grad.to_sparse(sparse_dim=1)  # its rows are those of the batch: one kind
        nn.utils.clip_grad_norm_(others, 1.0)
        for one, warmup in zip(both, warmups, strict=True):
            one.step()
            one.zero_grad()
            warmup.step()
        average.update_parameters(model)
        losses.append(loss.detach())
        if step % every == 0:
            recent, seconds = torch.stack(losses[-every:]).mean(), time.perf_counter() - began
            at = "x".join(map(str, depth))
            print(f"step {step}/{settings.steps}  {at}  loss {recent:.3f}  {seconds:.0f} s", flush=True)
    averaged = cast("PuzzleModel", average.module)
    return Trained([float(loss) for loss in losses], averaged, counted.operations)


def _optimizers(
    embedding: nn.Parameter, others: list[nn.Parameter], settings: Settings
) -> list[torch.optim.Optimizer]:
    rate, decay = settings.learning_rate, settings.weight_decay
    return [
        SparseSignSGD([embedding], lr=_EMBEDDING_RATE * rate, weight_decay=decay),
        AdamATan2(others, lr=rate, betas=(0.9, 0.95), weight_decay=decay),
    ]


class Counted:
    """Floating-point operations of the products in all steps: a depth is counted once, then known."""

    def __init__(self) -> None:
        self.operations = 0
        self._of_depth: dict[Depth, int] = {}

    @contextmanager
    def step(self, depth: Depth) -> Iterator[None]:
        if depth in self._of_depth:
            yield
        else:
            with FlopCounterMode(display=False) as counter:
                yield
            self._of_depth[depth] = counter.get_total_flops()
        self.operations += self._of_depth[depth]


def depth_at(settings: Settings, step: int) -> Depth:
    """n and T of training step `step`, from 0. Errors: ValueError for a curriculum that cannot be."""
    last, text = Depth(settings.n, settings.cycles), settings.recursion_curriculum
    if text is None:
        return last
    curriculum = RecursionCurriculum.from_text(text, last)
    if curriculum.steps > settings.steps:
        raise ValueError(
            f"expected a curriculum within {settings.steps} steps (--steps), got {curriculum.steps}."
        )
    return curriculum.at(step)


@torch.no_grad()
def evaluate(
    model: PuzzleModel, puzzles: Tensor, solutions: Tensor, supervision_steps: int
) -> list[list[float]]:
    """After each supervision step the shares of whole grids right, of blanks right, of grids said to be."""
    shares, blank = [], puzzles == 0
    for y, _ in model.trm.supervision_steps(model.embed(puzzles), supervision_steps):
        logits, q = model.read(y)
        right = logits.argmax(-1) == solutions + 1
        shares.append([t.float().mean().item() for t in (right.all(-1), right[blank], q > 0)])
    return shares


def show(shares: list[list[float]]) -> None:
    """What `evaluate` found on the held-out puzzles, as a table: after 1, 2, 4, ... supervision steps."""
    shown = [2**i for i in range(len(shares).bit_length())]
    print(f"\n| {'supervision steps at inference':>30} |" + "".join(f" {step:6d} |" for step in shown))
    print(f"| {'-' * 29}: |" + " -----: |" * len(shown))
    for i, name in enumerate(("whole grid right", "blanks right", "says that it is right")):
        print(f"| {name:>30} |" + "".join(f" {shares[step - 1][i]:6.1%} |" for step in shown))


# Weights on disk: safetensors, under the names of the paper's code


def save(model: PuzzleModel, file: Path) -> None:
    """`inner.` and L_level.layers..., H_init, L_init, embed_tokens.embedding_weight, lm_head.weight, ..."""
    theirs = {"trm.layers": "L_level.layers", "trm.y_init": "H_init", "trm.z_init": "L_init"}
    names = {
        name: re.sub("|".join(theirs), lambda ours: theirs[ours[0]], name) for name in model.state_dict()
    }
    beside = file.with_name(f"{file.name}.part")  # renamed when whole: a killed run leaves the old weights
    save_file({f"inner.{names[name]}": tensor for name, tensor in model.state_dict().items()}, beside)
    beside.replace(file)


def load(model: PuzzleModel, file: Path) -> None:
    """Weights of `save`, or of the paper's code in the same sizes, whatever stands before `inner.`.

    Errors: ValueError when a tensor is missing, not known or of another shape.
    """
    tensors = load_file(file)
    left_alone = model.trm.load_reference_state_dict(tensors)
    rest = {re.sub(r"^.*\binner\.", "", name): tensors[name] for name in left_alone}
    ours = {name: tuple(p.shape) for name, p in model.named_parameters() if not name.startswith("trm.")}
    if (got := {name: tuple(tensor.shape) for name, tensor in rest.items()}) != ours:
        raise ValueError(f"{file}: expected beside the recursion {ours}, got {got}.")
    model.load_state_dict(rest, strict=False)


# Command line


def puzzles_of(settings: Settings, seed: int, data: Path | None) -> list[tuple[Tensor, Tensor]]:
    """(puzzles, solutions) to train on and held out: of a folder, or made on the spot."""
    if data is None:
        to_train_on = sudoku(settings.puzzles, settings.box, settings.givens, seed)
        return [to_train_on, sudoku(HELD_OUT, settings.box, settings.givens, seed, held_out=True)]
    to_train_on, test = (
        puzzle_folder.read(data, split, math.prod(settings.box)) for split in ("train", "test")
    )
    chosen = torch.randperm(len(test[0]), generator=torch.Generator().manual_seed(seed))[:HELD_OUT]
    return [to_train_on, (test[0][chosen].long(), test[1][chosen].long())]


def run(
    settings: Settings,
    seed: int,
    checkpoint: Path | None = None,
    saved: Path | None = None,
    data: Path | None = None,
) -> None:
    """Test, train, test the average of the weights, save it. Without steps it tests a checkpoint."""
    began = time.perf_counter()
    depth_at(settings, 0)  # what is wrong with a curriculum is said before puzzles are made
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = PuzzleModel(settings)
    if checkpoint is not None:
        load(model, checkpoint)
    model.to(device)
    to_train_on, held_out = puzzles_of(settings, seed, data)
    for name, (puzzles, solutions) in {"to train on": to_train_on, "held out": held_out}.items():
        print(f"{len(puzzles):,} puzzles {name}, with {len(solutions.unique(dim=0)):,} solutions")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device.type}", flush=True)
    to_train_on, held_out = ((a.to(device), b.to(device)) for a, b in (to_train_on, held_out))
    before, *_ = evaluate(model, *held_out, supervision_steps=1)
    print(f"step 0: {before[0]:.1%} of the held-out grids are right", flush=True)
    before_training = time.process_time()
    trained = train(model, *to_train_on, settings)
    in_training = time.process_time() - before_training
    show(evaluate(trained.average, *held_out, settings.supervision_steps))
    if saved is not None:
        save(trained.average, saved)
    print(f"\ntraining: {trained.operations / 1e9:,.0f} billion operations, {in_training:.0f} s of CPU time")
    print(f"{time.perf_counter() - began:.0f} s, {time.process_time():.0f} s of CPU time")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A Tiny Recursive Model that learns Sudoku.")
    parser.add_argument("--puzzle", choices=PUZZLES, default="4x4")
    for name in ("hidden_size", "n", "cycles", "steps", "batch_size"):
        defaults = ", ".join(
            f"{getattr(settings, name):,} for {puzzle}" for puzzle, settings in PUZZLES.items()
        )
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, metavar="NUMBER", help=f"default {defaults}"
        )
    parser.add_argument("--mlp-t", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--recursion-curriculum",
        metavar="FIRST:STEPS",
        help="begin at n FIRST, or at n and T FIRSTxT, and have all after STEPS steps; default all at once",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, metavar="FILE.safetensors", help="write the weights there")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE.safetensors", help="begin with these weights"
    )
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="puzzles in the paper's layout, see puzzle_folder.py"
    )
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    settings = PUZZLES[given.pop("puzzle")]
    files = {"checkpoint": given.pop("checkpoint", None), "saved": given.pop("save", None)}
    files["data"] = given.pop("data", None)
    seed = given.pop("seed")
    try:
        if given.get("batch_size", 1) < 1 or given.get("steps", 0) < 0:
            raise ValueError("expected --batch-size of at least 1 and --steps of at least 0.")
        run(replace(settings, **given), seed, **files)
    except (ValueError, OSError, SafetensorError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
