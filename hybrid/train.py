"""The loop: batch -> forward -> loss -> backward -> clip -> optimizer -> log.

It trains whatever requires gradients in any causal language model of transformers; the phase was chosen
before (phases.py). Everything random in a step is a function of (seed, step, rank): the data's order, the
dropout, and a hybrid's number of recursion steps, which is the same on every rank. So a resumed run sees
what an uninterrupted one would have seen.
"""

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybrid import curve, run_state
from hybrid.config import trm_fields
from hybrid.evaluate import TextLoss, text_loss
from hybrid.model import HybridModel
from hybrid.processes import seed_everything, this_process
from hybrid.progress import TrainingDisplay
from hybrid.run_state import Progress

# these say how a run is watched and kept, not what it computes; they may change when it is resumed
_MAY_CHANGE = ("output_dir", "save_every", "eval_every", "log_every", "keep_checkpoints")
_FINGERPRINT_ITEMS = 64
_DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


@dataclass(frozen=True)
class TrainSettings:
    """How to train. Counts of steps are optimizer steps.

    output_dir            run.json, metrics.jsonl, curve.png and checkpoint-000123/ go here
    steps                 in all
    batch_size            items per step and process
    learning_rate         AdamW's, at its highest
    warmup_steps          the rate rises to it linearly
    weight_decay, betas   AdamW's
    max_grad_norm         gradients are scaled down to this Euclidean norm
    final_rate_fraction   the rate falls along a cosine to this fraction of learning_rate
    seed                  of the data's order and of dropout
    save_every            steps between checkpoints; None: one at the end
    eval_every            steps between held-out losses; None: before and after
    log_every             steps between metrics lines
    keep_checkpoints      the newest so many stay

    Errors: ValueError, with what was expected and what came.
    """

    output_dir: Path | str
    steps: int
    batch_size: int = 8
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    final_rate_fraction: float = 0.1
    seed: int = 0
    save_every: int | None = None
    eval_every: int | None = None
    log_every: int = 10
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "eval_every", "log_every", "keep_checkpoints"):
            count = getattr(self, name)
            if count is None and name in ("save_every", "eval_every"):
                continue
            if not isinstance(count, int) or count < 1:
                raise ValueError(
                    f"TrainSettings: expected {name} to be a count of at least 1, got {count!r}."
                )
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(
                f"TrainSettings: expected warmup_steps in 0..{self.steps} (steps), got {self.warmup_steps!r}."
            )
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"TrainSettings: expected {name} above 0, got {getattr(self, name)!r}.")
        if not 0 <= self.final_rate_fraction <= 1:
            raise ValueError(
                f"TrainSettings: expected final_rate_fraction in 0..1, got {self.final_rate_fraction!r}."
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"TrainSettings: expected seed in 0..2^32-1, got {self.seed!r}.")

    def rate_at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0: a linear rise, then half a cosine."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * (self.final_rate_fraction + (1 - self.final_rate_fraction) * cosine)


@dataclass(frozen=True)
class TrainResult:
    """What came of a run.

    steps               done in all
    held_out_before     loss per token of each held-out set before the first step, nats
    held_out_after      the same after the last
    tokens_per_second   trained on, over all processes, without evaluating and saving; 0 if no step was left
    metrics, curve      metrics.jsonl and curve.png
    checkpoint          the last, with the model as save_pretrained writes it
    """

    steps: int
    held_out_before: dict[str, float]
    held_out_after: dict[str, float]
    tokens_per_second: float
    metrics: Path
    curve: Path
    checkpoint: Path


def train(
    model: PreTrainedModel,
    data: Dataset,
    settings: TrainSettings,
    held_out: Mapping[str, Dataset] | None = None,
    resume: bool = False,
    on_step: Callable[[int, float], None] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> TrainResult:
    """Train `model` in place, on every process that `accelerate launch` started.

    data        map-style; item i is {"input_ids": [T] int64, "labels": [T] int64}, a function of i alone;
                a label stands beside its own token (the model shifts them), -100 is not counted
    held_out    name -> data of the same kind, whose loss is measured before, between and after
    resume      go on from the last whole checkpoint in settings.output_dir
    on_step     called on the main process after each step with its number, from 1, and its loss
    tokenizer   written into every checkpoint

    The global random generators (Python's, NumPy's, torch's) are seeded anew in every step.

    Errors: ValueError when nothing requires gradients, when the folder cannot be written to or holds
    another run, or when the loss stops being a number.
    """
    run = _Run(model, data, settings, held_out or {}, tokenizer)
    checkpoint = run.open(resume)
    with run.display:
        return run.go(checkpoint, on_step)


class _Run:
    """One call of train(): what its parts share."""

    def __init__(
        self,
        model: PreTrainedModel,
        data: Dataset,
        settings: TrainSettings,
        held_out: Mapping[str, Dataset],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self.model, self.data, self.settings = model, data, settings
        self.held_out, self.tokenizer = held_out, tokenizer
        self.folder = Path(settings.output_dir)
        self.accelerator = _accelerator(model)
        self.optimizer = _optimizer(model, settings)
        self.hybrid = model if isinstance(model, HybridModel) else None

    def open(self, resume: bool) -> Path | None:
        """Settle where to begin; the checkpoint that was loaded, or None at step 0."""
        is_main = self.accelerator.is_main_process
        what = _description(self.model, self.data, self.settings, self.accelerator.num_processes)
        run_state.make_folder(self.folder)
        checkpoint = run_state.find(self.folder, what, resume)
        self.accelerator.wait_for_everyone()  # all have looked: from here on files change

        self.parallel_model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.progress = Progress()
        if checkpoint is not None:
            self.progress = run_state.load(checkpoint, self.model, self.optimizer)
        if is_main:
            run_state.begin(self.folder, what, None if checkpoint is None else self.progress.step)
        self.window = _Window(self.progress, self.accelerator.device)
        self.display = TrainingDisplay(self.settings.steps, self.progress.step, is_main)
        if resume:
            self.display.say(
                f"going on from {checkpoint or f'step 0: no checkpoint in {self.folder} is whole'}"
            )
        return checkpoint

    def go(self, checkpoint: Path | None, on_step: Callable[[int, float], None] | None) -> TrainResult:
        """The steps that are left."""
        settings, window = self.settings, self.window
        before = self._measure(0) if checkpoint is None else self.progress.held_out_before
        after = None
        self.model.train()
        window.clock.start()
        for step, batch in enumerate(self._batches(), start=self.progress.step + 1):
            loss = self._step(step - 1, batch)
            self.display.step()
            if on_step is not None and self.accelerator.is_main_process:
                on_step(step, loss.item())
            if _is_due(step, settings.log_every, settings.steps):
                self._log(step)
            if _is_due(step, settings.eval_every, settings.steps):
                with window.clock.stopped():
                    after = self._measure(step)
            if _is_due(step, settings.save_every, settings.steps):
                with window.clock.stopped():
                    checkpoint = self._save(step, before)
        assert checkpoint is not None  # the last step saved one, or there was no step left
        return TrainResult(
            steps=settings.steps,
            held_out_before=before,
            held_out_after=self._measure(None) if after is None else after,
            tokens_per_second=window.clock.tokens_per_second(),
            metrics=self.folder / run_state.METRICS,
            curve=self.folder / run_state.CURVE,
            checkpoint=checkpoint,
        )

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """This process's batches of the steps that are left."""
        settings = self.settings
        items_per_step = settings.batch_size * self.accelerator.num_processes
        order = _Order(
            _count(self.data),
            settings.seed,
            self.progress.step * items_per_step,
            settings.steps * items_per_step,
        )
        loader = DataLoader(self.data, batch_size=settings.batch_size, sampler=order)
        return self.accelerator.prepare(loader)

    def _step(self, index: int, batch: dict[str, Tensor]) -> Tensor:
        """Step `index`, from 0; its loss as a float32 scalar, the mean over all processes."""
        settings, accelerator = self.settings, self.accelerator
        seed_everything(settings.seed, index, accelerator.process_index)
        steps = {}
        if self.hybrid is not None and self.hybrid.config.recursion_sampling == "uniform":
            steps["num_recursion_steps"] = self.hybrid.draw_recursion_steps(index)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate_at(index)

        loss = self.parallel_model(**batch, use_cache=False, **steps).loss
        accelerator.backward(loss)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        grad_norm = accelerator.clip_grad_norm_(trained, settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

        loss = accelerator.reduce(loss.detach().float(), "mean")
        self.window.add(loss, grad_norm, batch["input_ids"].numel() * accelerator.num_processes)
        return loss

    def _log(self, step: int) -> None:
        loss, grad_norm = self.window.close()
        self._check_finite(step, loss, grad_norm)
        speed = self.window.clock.tokens_per_second()
        self.display.numbers(
            step, loss, speed, self.window.clock.seconds_per_step() * (self.settings.steps - step)
        )
        self._write(
            {
                "step": step,
                "loss": loss,
                "grad_norm": grad_norm,
                "learning_rate": self.settings.rate_at(step - 1),
                "tokens_per_second": round(speed, 1),
            }
        )

    def _measure(self, step: int | None) -> dict[str, float]:
        """Loss per token of every held-out set, shared among the processes; None: not for metrics.jsonl."""
        losses = {name: self._held_out_loss(data) for name, data in self.held_out.items()}
        if losses and step is not None:
            self.display.say(
                f"step {step}: held-out loss "
                + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
                + " nats per token"
            )
            self._write({"step": step, "held_out": losses})
        return losses

    def _held_out_loss(self, data: Dataset) -> float:
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = Subset(data, range(rank, _count(data), processes))
        parts = gather_object([text_loss(self.model, mine, self.settings.batch_size)])
        return sum(parts, start=TextLoss(0.0, 0)).per_token

    def _save(self, step: int, before: dict[str, float]) -> Path:
        loss_sum, grad_norm = self.window.loss_sum.item(), self.window.grad_norm.item()
        self._check_finite(step, loss_sum, grad_norm)
        if self.accelerator.is_main_process:
            progress = Progress(step, loss_sum, grad_norm, self.window.steps, before)
            run_state.save(
                self.folder,
                progress,
                self.model,
                self.optimizer,
                self.tokenizer,
                self.settings.keep_checkpoints,
            )
            curve.draw(run_state.read_metrics(self.folder), self.folder / run_state.CURVE)
        self.accelerator.wait_for_everyone()
        return run_state.checkpoint_of(self.folder, step)

    def _check_finite(self, step: int, loss: float, grad_norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise ValueError(
                f"train: expected a loss and a gradient that are numbers, got {loss} and {grad_norm} by "
                f"step {step}. A learning_rate below {self.settings.learning_rate} may help; "
                "the last checkpoint is from before."
            )

    def _write(self, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            run_state.append_metrics(self.folder, line)


class _Order(Sampler[int]):
    """Which items are trained on: a new shuffle for every pass over the data, cut at `start` and `stop`.

    Item number p of all that all processes see is a function of (seed, p) alone.
    """

    def __init__(self, items: int, seed: int, start: int, stop: int) -> None:
        self.items, self.seed, self.start, self.stop = items, seed, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[int]:
        shuffled, of_pass = None, -1
        for position in range(self.start, self.stop):
            this_pass, place = divmod(position, self.items)
            if shuffled is None or this_pass != of_pass:
                seed = random.Random(f"{self.seed}:{this_pass}").getrandbits(63)
                shuffled = torch.randperm(self.items, generator=torch.Generator().manual_seed(seed))
                of_pass = this_pass
            yield int(shuffled[place])


class _Clock:
    """Seconds of training, without those of evaluating and saving."""

    def __init__(self) -> None:
        self.tokens = self.steps = 0
        self._began = 0.0

    def start(self) -> None:
        self._began = time.perf_counter()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        since = time.perf_counter()
        yield
        self._began += time.perf_counter() - since

    def tokens_per_second(self) -> float:
        return self.tokens / (time.perf_counter() - self._began) if self.tokens else 0.0

    def seconds_per_step(self) -> float:
        return (time.perf_counter() - self._began) / self.steps


class _Window:
    """The steps since the last metrics line; their numbers stay on the device until they are asked for."""

    def __init__(self, progress: Progress, device: torch.device) -> None:
        self.loss_sum = torch.tensor(progress.loss_sum, device=device)
        self.grad_norm = torch.tensor(progress.grad_norm, device=device)
        self.steps = progress.counted
        self.clock = _Clock()

    def add(self, loss: Tensor, grad_norm: Tensor, tokens: int) -> None:
        self.loss_sum += loss
        self.grad_norm = torch.maximum(self.grad_norm, grad_norm.float())  # NaN wins
        self.steps += 1
        self.clock.steps += 1
        self.clock.tokens += tokens

    def close(self) -> tuple[float, float]:
        """(mean loss, largest gradient norm); begins the next window."""
        numbers = self.loss_sum.item() / self.steps, self.grad_norm.item()
        self.loss_sum.zero_()
        self.grad_norm.zero_()
        self.steps = 0
        return numbers


def _accelerator(model: PreTrainedModel) -> Accelerator:
    """Errors: ValueError for ways of training whose checkpoints this loop cannot write."""
    this_process()
    # with cycles that pass no gradient the first states get none, which DDP has to be told
    is_partial = isinstance(model, HybridModel) and model.config.grad_cycles not in (
        None,
        model.config.num_cycles,
    )
    accelerator = Accelerator(
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=is_partial)]
    )
    if accelerator.distributed_type not in _DISTRIBUTED:
        raise ValueError(
            f"train: expected one process or data parallelism, got {accelerator.distributed_type.value} "
            "from accelerate's configuration."
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"train: expected mixed precision no or bf16, got {accelerator.mixed_precision}.")
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"train: expected gradient_accumulation_steps 1, got {accelerator.gradient_accumulation_steps} "
            "from accelerate's configuration."
        )
    return accelerator


def _optimizer(model: PreTrainedModel, settings: TrainSettings) -> torch.optim.Optimizer:
    trained = list(run_state.trained_parameters(model).values())
    if not trained:
        raise ValueError("train: expected a model in which something requires gradients, got none.")
    return torch.optim.AdamW(
        trained,
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=all(p.device.type in ("cpu", "cuda") for p in trained),
    )


def _description(
    model: PreTrainedModel, data: Dataset, settings: TrainSettings, processes: int
) -> dict[str, Any]:
    """What a resumed run must have in common with the run that began."""
    items = _count(data)
    if not items:
        raise ValueError("train: expected data with at least one item, got none.")
    digest = hashlib.sha256()
    for index in range(0, items, max(1, items // _FINGERPRINT_ITEMS)):
        for name, tensor in sorted(data[index].items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
    fields = [*trm_fields(), "base_model_name_or_path"] if isinstance(model, HybridModel) else []
    description = {
        **{name: value for name, value in asdict(settings).items() if name not in _MAY_CHANGE},
        "processes": processes,
        "data": {
            "items": items,
            "tokens": len(data[0]["input_ids"]),
            "sha256 of a sample": digest.hexdigest(),
        },
        "config": {name: getattr(model.config, name) for name in fields},
        "trained": {
            name: f"{p.dtype} {list(p.shape)}" for name, p in run_state.trained_parameters(model).items()
        },
    }
    return json.loads(json.dumps(description))  # as it will be read again: tuples are lists


def _count(data: Dataset) -> int:
    return len(cast(Sized, data))  # torch's Dataset does not promise a length


def _is_due(step: int, every: int | None, last: int) -> bool:
    return step == last or (every is not None and step % every == 0)
