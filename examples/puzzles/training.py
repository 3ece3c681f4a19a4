"""Deep supervision with a carry, step by step; and its whole state on disk, from which a run goes on exactly

One supervision step is one call of the recursion, one loss and one step of the optimiser; y and z, detached,
are where the next one goes on. A row that says it is done, or has had all its steps, makes way for a new
puzzle.

Source   "Less is More: Recursive Reasoning with Tiny Networks", arXiv 2510.04871, and its code. Other than
         there: gradients are clipped, and a run may begin shallow (`recursion_curriculum`).
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from trm_recipe import IGNORED, AdamATan2, SparseSignSGD, average_of_weights, stablemax_cross_entropy

from puzzles.model import PuzzleModel
from puzzles.settings import Settings, depth_at
from trm_kernels import Depth

EXPLORATION = 0.1  # share of rows that go on for a drawn number of steps although they say they are done


class Batch(NamedTuple):
    """Puzzles as the model takes them."""

    inputs: Tensor  # [B, cells] int64 tokens
    labels: Tensor  # [B, cells] int64 tokens; -100 is not counted
    kinds: Tensor  # [B] int64 rows of the puzzle embedding

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in self))


class Carry(NamedTuple):
    """Where the rows of a batch stand between two supervision steps, each at one of its own."""

    y: Tensor  # [B, prefix + cells, D], as z
    z: Tensor
    batch: Batch
    steps: Tensor  # [B] that the row has had
    halted: Tensor  # [B] whether it makes way for a new puzzle


def first_carry(model: PuzzleModel, batch: Batch) -> Carry:
    """Before the first step: all rows make way."""
    steps = torch.zeros_like(batch.kinds)
    return Carry(*model.start(batch.inputs), batch, steps, torch.ones_like(steps, dtype=torch.bool))


def refill(model: PuzzleModel, carry: Carry, new: Batch) -> Carry:
    """The carry with new puzzles, from their start, in the rows that have halted."""
    halted, row = carry.halted, carry.halted[:, None]
    y, z = model.start(new.inputs)
    batch = Batch(
        torch.where(row, new.inputs, carry.batch.inputs),
        torch.where(row, new.labels, carry.batch.labels),
        torch.where(halted, new.kinds, carry.batch.kinds),
    )
    return Carry(
        torch.where(row[:, None], y, carry.y),
        torch.where(row[:, None], z, carry.z),
        batch,
        torch.where(halted, 0, carry.steps),
        torch.zeros_like(halted),
    )


def all_right(logits: Tensor, labels: Tensor) -> Tensor:
    """[B] whether every counted cell is right."""
    return ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(-1)


def supervise(
    model: PuzzleModel,
    carry: Carry,
    most_steps: int,
    depth: Depth | None = None,
    cells_loss: Callable[[Tensor, Tensor], Tensor] = stablemax_cross_entropy,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Carry]:
    """(loss, carry) of one supervision step: the loss of the cells, and of "all of them are right"."""
    batch = carry.batch
    y, z, logits, q = model(model.embed(batch.inputs, batch.kinds), carry.y, carry.z, depth)
    right = all_right(logits, batch.labels)
    loss = cells_loss(logits, batch.labels)
    loss = loss + 0.5 * F.binary_cross_entropy_with_logits(q, right.float())
    steps, rows = carry.steps + 1, len(q)
    drawn = torch.randint(1, most_steps + 1, (rows,), generator=generator)
    explores = torch.rand(rows, generator=generator) < EXPLORATION
    fewest_steps = (drawn * explores).to(steps.device)
    halted = (steps >= most_steps) | ((q > 0) & (steps >= fewest_steps))
    return loss, carry._replace(y=y, z=z, steps=steps, halted=halted)


class Counted:
    """Floating-point operations of the products in all steps: a depth is counted once, then known.

    A step that is counted may differ in its last bits: a run that goes on must know what was counted.
    """

    def __init__(self) -> None:
        self.operations = 0
        self.of_depth: dict[Depth, int] = {}

    @contextmanager
    def step(self, depth: Depth) -> Iterator[None]:
        if depth in self.of_depth:
            yield
        else:
            with FlopCounterMode(display=False) as counter:
                yield
            self.of_depth[depth] = counter.get_total_flops()
        self.operations += self.of_depth[depth]


class Training:
    """A model on its way: `advance` takes one step. `generator` None draws from torch's own."""

    def __init__(self, model: PuzzleModel, settings: Settings, batch: Batch) -> None:
        """`batch` says shapes and device alone."""
        embedding = model.puzzle_emb["weights"]
        self.model, self.settings, self.step, self.counted = model, settings, 0, Counted()
        self.others = [p for p in model.parameters() if p is not embedding]
        decay = settings.weight_decay
        self.signs = SparseSignSGD([embedding], lr=settings.embedding_rate, weight_decay=decay)
        self.adam = AdamATan2(self.others, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=decay)
        self._average = average_of_weights(model, settings.ema)
        if not settings.average_embeddings:
            self.average.puzzle_emb = model.puzzle_emb
        self.carry = first_carry(model, batch)
        self.losses: list[Tensor] = []  # of every step, each [] and detached

    @property
    def average(self) -> PuzzleModel:
        """The model with the average of the weights."""
        return cast("PuzzleModel", self._average.module)

    def advance(self, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        """The loss [] of one step, detached. Rows that make way take those of `batch`."""
        settings, depth = self.settings, depth_at(self.settings, self.step)
        self.carry = refill(self.model, self.carry, batch)
        with self.counted.step(depth):
            loss, self.carry = supervise(
                self.model, self.carry, settings.supervision_steps, depth, generator=generator
            )
            loss.backward()
        nn.utils.clip_grad_norm_(self.others, 1.0)
        warmup = min(1.0, (self.step + 1) / max(1, settings.warmup_steps))
        rates = (settings.embedding_rate, settings.learning_rate)
        for one, rate in zip((self.signs, self.adam), rates, strict=True):
            one.param_groups[0]["lr"] = warmup * rate
            one.step()
            one.zero_grad()
        self._average.update_parameters(self.model)
        self.step += 1
        self.losses.append(loss.detach())
        return self.losses[-1]

    def _state(self) -> dict[str, Tensor]:
        """Every tensor that a step reads: weights, their average, the optimiser's moments, the carry."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        tensors["averaged"] = self._average.n_averaged
        tensors["losses"] = torch.tensor([float(loss) for loss in self.losses], dtype=torch.float64)
        for i, p in enumerate(self.others):
            tensors |= {f"adam.{i}.{name}": tensor for name, tensor in self.adam.state[p].items()}
        y, z, batch, steps, halted = self.carry
        tensors |= {"y": y, "z": z, "steps": steps, "halted": halted}
        return tensors | batch._asdict()

    def save(self, file: Path) -> None:
        """Written beside and renamed: a killed run leaves the state before."""
        beside = file.with_name(f"{file.name}.part")
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in self._state().items()}
        counted = [[*depth, operations] for depth, operations in self.counted.of_depth.items()]
        numbers = {"step": self.step, "operations": self.counted.operations, "counted": counted}
        save_file(tensors, beside, metadata={name: json.dumps(value) for name, value in numbers.items()})
        beside.replace(file)

    def load(self, file: Path) -> None:
        """To where `save` was, for the same settings; what is drawn is the caller's.

        Errors: ValueError for a file that is no such state.
        """
        with safe_open(file, "pt") as opened:
            written = opened.metadata() or {}
        device = self.carry.y.device
        tensors = {name: tensor.to(device) for name, tensor in load_file(file).items()}
        try:
            self._take(tensors, {name: json.loads(text) for name, text in written.items()})
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            said = " ".join(str(error).split())  # PyTorch has a line for each missing tensor
            raise ValueError(f"{file}: expected the state of this run, got {said:.200}.") from error

    def _take(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        def of(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }

        self.model.load_state_dict(of("model."))
        self.average.load_state_dict(of("average."))
        self._average.n_averaged.copy_(tensors["averaged"])
        for i, p in enumerate(self.others):
            if moments := of(f"adam.{i}."):
                self.adam.state[p] = moments
        batch = Batch(tensors["inputs"], tensors["labels"], tensors["kinds"])
        self.carry = Carry(tensors["y"], tensors["z"], batch, tensors["steps"], tensors["halted"])
        self.losses = list(tensors["losses"])
        self.step, self.counted.operations = numbers["step"], numbers["operations"]
        self.counted.of_depth = {Depth(n, cycles): count for n, cycles, count in numbers["counted"]}
