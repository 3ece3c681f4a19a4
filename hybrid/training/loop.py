"""The loop: batch -> forward -> loss -> backward -> clip -> optimizer -> log.

It trains whatever requires gradients in any causal language model of transformers; the phase was chosen
before (phases.py). Everything random in a step is a function of (seed, step, rank): the data's order, the
dropout, and a hybrid's number of recursion steps, which is the same on every rank. So a resumed run sees
what an uninterrupted one would have seen.
"""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybrid.config import trm_fields
from hybrid.data.collate import IGNORED
from hybrid.data.stream import TokenStream
from hybrid.data.tokenize import Tokenize
from hybrid.model.hybrid_model import HybridModel
from hybrid.model.labelled_places import LabelledPlaces
from hybrid.model.quantized_base import is_quantized_tensor
from hybrid.training import checkpoints as run_state
from hybrid.training import curve, fingerprints, run_folder, shard, trackers
from hybrid.training.batches import Batch, Share, batches, count, describe_items
from hybrid.training.checkpoint_tensors import trained_parameters
from hybrid.training.checkpoints import Progress
from hybrid.training.evaluate import TextLoss, check_separate, text_loss
from hybrid.training.hidden_states import HiddenStates
from hybrid.training.optimizer import adamw, set_rate
from hybrid.training.processes import on_main, seed_everything, this_process
from hybrid.training.progress import TrainingDisplay
from hybrid.training.settings import TrainSettings
from hybrid.training.stop_signals import StopSignals, end_by

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
_ROUNDING = 1  # beside (seed, step, rank): a separate random stream
_DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


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
    data: Dataset | TokenStream,
    settings: TrainSettings,
    held_out: Mapping[str, Dataset] | None = None,
    resume: bool = False,
    on_step: Callable[[int, float], None] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    keep: Dataset | TokenStream | None = None,
) -> TrainResult:
    """Train `model` in place, on every process that `accelerate launch` started.

    data        a stream of tokens, or map-style: item i is {"input_ids": [T] int64, "labels": [T] int64} and
                more that the model takes, a function of i alone; a label stands beside its own token (the
                model shifts them), -100 is not counted; items of one batch are padded to the longest
    held_out    name -> data of the same kind, whose loss is measured before, between and after
    resume      go on from the last whole checkpoint in settings.output_dir; a run that has ended may be given
                more settings.steps
    on_step     called on the main process after each step with its number, from 1, and its loss
    tokenizer   written into every checkpoint
    keep        like data: what the model shall not forget, settings.keep_ratio of the items of each step. A
                step's loss is the mean over the tokens of data and that over those of keep, weighted by their
                shares of the items, however long these are

    The global random generators (Python's, NumPy's, torch's) are seeded anew in every step.

    On SIGTERM or SIGHUP the step is finished and saved, then the signal ends the process (stop_signals.py).

    Errors: ValueError when nothing requires gradients, when the folder cannot be written to, holds another
    run or is in use by one, when a resumed run differs, or when loss or gradient are no numbers too often:
    steps with such are not taken.
    """
    with run_folder.held(Path(settings.output_dir), this_process()):
        run = _Training(model, data, settings, held_out or {}, tokenizer, keep)
        checkpoint = run.open(resume)
        if settings.report_to:
            trackers.start(run.accelerator, asdict(settings))
        with run.display, StopSignals(this_process()) as signals:
            result = run.go(checkpoint, on_step, signals)
        for tracker in run.accelerator.trackers:
            tracker.finish()
    if run.ended_by:
        end_by(run.ended_by)
    return result


class _Training:
    """One call of train(): what its parts share."""

    def __init__(
        self,
        model: PreTrainedModel,
        data: Dataset | TokenStream,
        settings: TrainSettings,
        held_out: Mapping[str, Dataset],
        tokenizer: PreTrainedTokenizerBase | None,
        keep: Dataset | TokenStream | None,
    ) -> None:
        if (keep is None) != (settings.keep_ratio is None):
            raise ValueError("train: expected keep and keep_ratio together, got one of them.")
        self.model, self.data, self.settings, self.keep = model, data, settings, keep
        self.held_out, self.tokenizer = held_out, tokenizer
        self.folder = Path(settings.output_dir)
        self.accelerator = _accelerator(model, settings)
        self.hidden_states = self._hidden_states()
        # as it came, before it is split or learns
        self.base = fingerprints.of_base(model) if self.accelerator.is_main_process else None
        self.is_sharded = settings.shard
        quantized = [name for name, p in model.named_parameters() if is_quantized_tensor(p)]
        if self.is_sharded and quantized:
            raise ValueError(
                f"train: expected a base that is not quantized, to be split among processes (shard), "
                f"got {quantized[0]} in few bits. Each process can have a copy of it instead."
            )
        # copies of what is frozen are equal already, and these cannot be sent
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, quantized)
        if self.is_sharded:
            bf16 = self.accelerator.mixed_precision == "bf16"
            device = self.accelerator.device.type
            mesh = init_device_mesh(device, (self.accelerator.num_processes,))
            shard.shard(model, mesh, torch.bfloat16 if bf16 else None)
        self.optimizer = _optimizer(model, settings)
        self.share = Share(
            self.accelerator.process_index,
            self.accelerator.num_processes,
            settings.batch_size,
            settings.accumulate,
        )
        self.data_share, self.keep_share = _split(self.share, settings)
        self.hybrid = model if isinstance(model, HybridModel) else None
        if self.hybrid is None and settings.keep_target == "base":
            raise ValueError(f"train: keep_target='base' expected a HybridModel, got {type(model).__name__}.")
        self.ended_by = 0  # a signal

    def open(self, resume: bool) -> Path | None:
        """Settle where to begin; the checkpoint that was loaded, or None at step 0."""
        is_main = self.accelerator.is_main_process
        found = on_main(this_process(), lambda: run_state.find(self.folder, self._description(), resume))
        self.run, checkpoint = found.run, found.checkpoint

        self.parallel_model: Any = self.model
        if not self.is_sharded:
            self.parallel_model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.progress = Progress()
        if checkpoint is not None:
            self.progress = run_state.load(checkpoint, self.model, self.optimizer)
        if any(isinstance(data, TokenStream) and data.separate for data in (self.data, self.keep)):
            check_separate(self.model)
        self.place, self.keep_place = self.progress.place, self.progress.keep_place
        self.window = _Window(self.progress, self.accelerator.device)
        self.display = TrainingDisplay(self.settings.steps, self.progress.step, is_main)
        for note in found.notes:
            self.display.say(note)
        if resume:
            self.display.say(
                f"going on from {checkpoint or f'step 0: there is no checkpoint in {self.folder}'}"
            )
        for cache in self.hidden_states:
            cache.open(this_process(), self.display.say)
        self.labelled_places = LabelledPlaces(self.model)
        if is_main:
            run_folder.begin(self.folder, self.run, None if checkpoint is None else self.progress.step)
        return checkpoint

    def _description(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run that began; asked of the main process."""
        model, settings = self.model, self.settings
        fields = trm_fields() if isinstance(model, HybridModel) else []
        description = {
            **{name: value for name, value in asdict(settings).items() if name not in _MAY_CHANGE},
            "mixed_precision": self.accelerator.mixed_precision,
            "items_per_step": self.share.items_per_step,
            "config": {name: getattr(model.config, name) for name in fields},
            "quantized": _quantized(model),
            "base": self.base,
            "tokenizer": self.tokenizer and Tokenize(self.tokenizer, 2).fingerprint(),
            **{
                name: _describe(some)
                for name, some in (("data", self.data), ("keep", self.keep))
                if some is not None
            },
            "held_out": {
                name: describe_items(some) if count(some) else {"items": 0}
                for name, some in self.held_out.items()
            },
            "trained": {name: f"{p.dtype} {list(p.shape)}" for name, p in trained_parameters(model).items()},
        }
        return json.loads(json.dumps(description))  # as it will be read again: tuples are lists

    def go(
        self, checkpoint: Path | None, on_step: Callable[[int, float], None] | None, signals: StopSignals
    ) -> TrainResult:
        """The steps that are left, or those until a signal."""
        settings, window = self.settings, self.window
        before = self.progress.held_out_before
        if checkpoint is None:
            before = self._measure(0)
            self._write(0, {"held_out": before} if before else {})
        after = None
        self.model.train()
        window.clock.start()
        left = range(self.progress.step, settings.steps)
        feed = batches(
            self.data, settings.seed, self.data_share, left, self.place, settings.length_curriculum
        )
        kept: Iterator[tuple[list[Batch], dict[str, Any] | None]] = repeat(([], None))
        if self.keep is not None and self.keep_share is not None:
            kept = batches(self.keep, settings.seed, self.keep_share, left, self.keep_place)
        for step, (of_data, of_keep) in enumerate(zip(feed, kept, strict=False), start=left.start + 1):
            loss = self._step(step - 1, of_data[0], of_keep[0])
            self.place, self.keep_place = of_data[1], of_keep[1]
            self.display.step()
            if on_step is not None and self.accelerator.is_main_process:
                on_step(step, loss.item())
            line = self._log(step) if _is_due(step, settings.log_every, settings.steps) else {}
            if _is_due(step, settings.eval_every, settings.steps):
                with window.clock.stopped():
                    after = self._measure(step)
                line |= {"held_out": after} if after else {}
            self._write(step, line)
            came = signals.agreed()
            if came or _is_due(step, settings.save_every, settings.steps):
                with window.clock.stopped():
                    checkpoint = self._save(step, before)
                came = came or signals.agreed()
            if came:
                self._stop(step, came)
                break
        assert checkpoint is not None  # the last step saved one, or there was no step left
        if after is None:
            after = {} if self.ended_by else self._measure(None)
        return TrainResult(
            steps=settings.steps,
            held_out_before=before,
            held_out_after=after,
            tokens_per_second=window.clock.tokens_per_second(),
            metrics=self.folder / run_folder.METRICS,
            curve=self.folder / run_folder.CURVE,
            checkpoint=checkpoint,
        )

    def _stop(self, step: int, number: int) -> None:
        self.ended_by = number
        name = signal.Signals(number).name
        self.display.say(f"{name} after step {step}, which is saved: the run can be resumed from it")

    def _step(self, index: int, batches: list[Batch], kept: list[Batch]) -> Tensor:
        """Step `index`, from 0; its loss as a float32 scalar, the mean over the tokens of all processes.

        kept   batches of what is not to be forgotten, whose mean weighs keep_ratio of it
        """
        settings, accelerator = self.settings, self.accelerator
        seed_everything(settings.seed, index, accelerator.process_index)
        steps = {}
        if self.hybrid is not None and self.hybrid.config.recursion_sampling == "uniform":
            steps["num_recursion_steps"] = self.hybrid.draw_recursion_steps(index)
        set_rate(self.optimizer, settings.rate_at(index))

        given = [
            {name: t.to(accelerator.device) for name, t in batch.inputs.items()} for batch in batches + kept
        ]
        weights = self._weights(given[: len(batches)])
        if self.keep_share is not None:
            of_keep = self.keep_share.items_per_step / self.share.items_per_step
            weights = [weight * (1 - of_keep) for weight in weights]
            weights += [weight * of_keep for weight in self._weights(given[len(batches) :])]
        lower_layers = [self._lower_layers(batch, is_kept=False) for batch in batches]
        lower_layers += [self._lower_layers(batch, is_kept=True) for batch in kept]
        still = range(len(batches), len(given)) if settings.keep_target == "base" else ()
        loss = torch.zeros((), device=accelerator.device)
        for number, inputs in enumerate(given):
            with self._gradients_meet(number == len(given) - 1), lower_layers[number]:
                loss_of = self._stillness if number in still else self._loss
                part = loss_of(inputs, steps) * weights[number]
                accelerator.backward(part)
            loss += part.detach()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        grad_norm = shard.whole(torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm))
        loss = accelerator.reduce(loss, "mean")
        # both are the same on every process, so that all of them take the step or none does
        if is_good := math.isfinite(loss.item()) and math.isfinite(grad_norm.item()):
            if settings.stochastic_rounding:
                # parts of a split model are rounded apart, copies of a whole one stay equal
                rank = accelerator.process_index if self.is_sharded else 0
                seed_everything(settings.seed, index, rank, _ROUNDING)
            self.optimizer.step()
        self.optimizer.zero_grad()

        tokens = sum(inputs["input_ids"].numel() for inputs in given)
        self.window.add(loss, grad_norm, tokens * accelerator.num_processes, is_good)
        if not is_good:
            self._skipped(index + 1, loss.item(), grad_norm.item())
        return loss

    def _loss(self, inputs: dict[str, Tensor], steps: dict[str, int]) -> Tensor:
        with self.labelled_places.only(inputs) as asked:
            loss: Tensor = self.parallel_model(**asked, use_cache=False, **steps).loss
        return loss

    def _stillness(self, inputs: dict[str, Tensor], steps: dict[str, int]) -> Tensor:
        """How much the injections add to the tokens of `inputs`, in the mean over points and tokens."""
        assert self.hybrid is not None
        inputs = {name: t for name, t in inputs.items() if name != "labels"}
        with self.hybrid.recording_what_is_added() as added:
            self.parallel_model(**inputs, use_cache=False, logits_to_keep=1, **steps)
        is_token = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).to(added[0].device)
        of_tokens = [(t * is_token.to(t.device)).sum() / is_token.sum().to(t.device) for t in added]
        return torch.stack([t.to(added[0].device) for t in of_tokens]).mean()

    def _weights(self, batches: list[dict[str, Tensor]]) -> list[Tensor]:
        """Each batch's share of the tokens that are predicted in those of all processes."""
        # a model shifts the labels by one: the first of a row is predicted by nothing
        predicted = [(batch["labels"][:, 1:] != IGNORED).sum() for batch in batches]
        none = torch.zeros((), dtype=torch.int64, device=self.accelerator.device)
        # gradients are averaged over the processes, so that each token weighs the same
        all_predicted = self.accelerator.reduce(sum(predicted, none), "sum") / self.accelerator.num_processes
        return [tokens / all_predicted for tokens in predicted]

    def _skipped(self, step: int, loss: float, grad_norm: float) -> None:
        """Say that a step was not taken; ValueError after too many in a row."""
        in_row, most = self.window.skipped_in_row, self.settings.max_skipped_steps
        self.display.say(
            f"step {step}: skipped, its loss is {loss}, its gradient's norm {grad_norm} ({in_row} in a row)"
        )
        if in_row >= most:
            raise ValueError(
                f"train: expected a loss and a gradient that are numbers, got {loss} and {grad_norm} in step "
                f"{step}, the last of {in_row} in a row. {self._last_good()}"
            )

    def _last_good(self) -> str:
        checkpoint, _ = run_state.newest(self.folder, self.run["id"])
        rate = f"A learning_rate below {self.settings.learning_rate} may help."
        return (
            f"The last good checkpoint is {checkpoint or 'none: the run is younger than its first'}. {rate}"
        )

    def _gradients_meet(self, together: bool) -> AbstractContextManager[Any]:
        """Whether this backward averages the gradients over the processes, or only adds to this one's."""
        if self.is_sharded:
            self.parallel_model.set_requires_gradient_sync(together)
            return nullcontext()
        return nullcontext() if together else self.accelerator.no_sync(self.parallel_model)

    def _hidden_states(self) -> list[HiddenStates]:
        """Caches for the data and for what is kept; none where none is asked for."""
        settings = self.settings
        if settings.cache_hidden_states is None:
            return []
        if settings.length_curriculum is not None:
            raise ValueError(
                "train: expected cache_hidden_states or a length_curriculum, got both: the hidden states of "
                "whole rows are kept."
            )
        folder, precision = Path(settings.cache_hidden_states), self.accelerator.mixed_precision
        dtype = None if settings.cache_dtype is None else getattr(torch, settings.cache_dtype)
        caches = [HiddenStates(folder, self.model, self.data, precision, dtype)]
        if self.keep is not None:
            caches.append(HiddenStates(folder / "keep", self.model, self.keep, precision, dtype))
        return caches

    def _lower_layers(self, batch: Batch, is_kept: bool) -> AbstractContextManager[Any]:
        """Whether this forward and backward compute the layers below the first injection point."""
        return self.hidden_states[is_kept].around(batch) if self.hidden_states else nullcontext()

    def _log(self, step: int) -> dict[str, Any]:
        """Show the numbers of the steps since the last time; what metrics.jsonl gets of them."""
        window = self.window
        numbers = {} if not window.steps else {"loss": window.loss(), "grad_norm": window.grad_norm.item()}
        if window.skipped:
            numbers["skipped"] = window.skipped
        window.close()
        speed = self.window.clock.tokens_per_second()
        self.display.numbers(
            step,
            numbers.get("loss", math.nan),
            speed,
            self.window.clock.seconds_per_step() * (self.settings.steps - step),
        )
        return {
            **numbers,
            "learning_rate": self.settings.rate_at(step - 1),
            "tokens_per_second": round(speed, 1),
        }

    def _measure(self, step: int | None) -> dict[str, float]:
        """Loss per token of every held-out set, shared among the processes; None: without showing it."""
        losses = {name: self._held_out_loss(data) for name, data in self.held_out.items()}
        if losses and step is not None:
            self.display.say(
                f"step {step}: held-out loss "
                + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
                + " nats per token"
            )
        return losses

    def _held_out_loss(self, data: Dataset) -> float:
        mine = _PartOfRank(data, self.accelerator.process_index, self.accelerator.num_processes)
        parts = gather_object([text_loss(self.model, mine, self.settings.batch_size)])
        return sum(parts, start=TextLoss(0.0, 0)).per_token

    def _save(self, step: int, before: dict[str, float]) -> Path:
        self._check_weights(step)
        try:
            run_state.save(
                self.folder,
                self.run,
                self.window.progress(step, before, self.place, self.keep_place),
                self.model,
                self.optimizer,
                self.tokenizer,
                self.settings.keep_checkpoints,
                this_process(),
            )
        except (SafetensorError, OSError) as error:
            last, _ = run_state.newest(self.folder, self.run["id"])
            raise ValueError(
                f"train: expected to write the checkpoint of step {step} into {self.folder}, got: {error}. "
                + (f"The run can be resumed from {last}." if last else "There is none before it.")
            ) from error
        if self.accelerator.is_main_process:
            curve.draw(run_folder.read_metrics(self.folder), self.folder / run_folder.CURVE)
        self.accelerator.wait_for_everyone()
        return run_state.checkpoint_of(self.folder, step)

    def _check_weights(self, step: int) -> None:
        """A checkpoint of weights that are no numbers would push the good ones out."""
        broken = [
            name
            for name, p in trained_parameters(self.model).items()
            if not shard.local(p.detach()).isfinite().all()
        ]
        if broken := gather_object(broken):
            raise ValueError(
                f"train: expected weights that are numbers after step {step}, got others in {broken[0]}. "
                + self._last_good()
            )

    def _write(self, step: int, numbers: dict[str, Any]) -> None:
        """One line of metrics.jsonl for a step, where there is something to say of it."""
        if not numbers:
            return
        if self.accelerator.is_main_process:
            run_folder.append_metrics(self.folder, {"step": step, **numbers})
        if self.settings.report_to:
            trackers.report(self.accelerator, {"step": step, **numbers})


class _PartOfRank(Dataset):
    """One process's part of `data`; all parts are of one length, as all have to call a split model equally.

    What is missing to that is an item of which no token counts.
    """

    def __init__(self, data: Dataset, rank: int, processes: int) -> None:
        self.data, self.rank, self.processes = data, rank, processes

    def __len__(self) -> int:
        return -(-count(self.data) // self.processes)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number = index * self.processes + self.rank
        if number < count(self.data):
            return self.data[number]
        filler = self.data[0]
        return filler | {"labels": torch.full_like(filler["labels"], IGNORED)}


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
        self.skipped = progress.skipped
        self.skipped_in_row = progress.skipped_in_row
        self.clock = _Clock()

    def add(self, loss: Tensor, grad_norm: Tensor, tokens: int, is_good: bool) -> None:
        """A step that was taken, or was not: such a one has no numbers."""
        if is_good:
            self.loss_sum += loss
            self.grad_norm = torch.maximum(self.grad_norm, grad_norm.float())
            self.steps += 1
            self.skipped_in_row = 0
        else:
            self.skipped += 1
            self.skipped_in_row += 1
        self.clock.steps += 1
        self.clock.tokens += tokens

    def loss(self) -> float:
        """The mean of the steps that were taken."""
        return self.loss_sum.item() / self.steps

    def close(self) -> None:
        """Begin the next window."""
        self.loss_sum.zero_()
        self.grad_norm.zero_()
        self.steps = self.skipped = 0

    def progress(
        self,
        step: int,
        before: dict[str, float],
        place: dict[str, Any] | None,
        keep_place: dict[str, Any] | None,
    ) -> Progress:
        return Progress(
            step=step,
            loss_sum=self.loss_sum.item(),
            grad_norm=self.grad_norm.item(),
            counted=self.steps,
            skipped=self.skipped,
            skipped_in_row=self.skipped_in_row,
            held_out_before=before,
            place=place,
            keep_place=keep_place,
        )


def _accelerator(model: PreTrainedModel, settings: TrainSettings) -> Accelerator:
    """Errors: ValueError for ways of training whose checkpoints this loop cannot write."""
    this_process()
    # with cycles that pass no gradient the first states get none, which DDP has to be told
    is_partial = isinstance(model, HybridModel) and model.config.grad_cycles not in (
        None,
        model.config.num_cycles,
    )
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        log_with=list(settings.report_to) or None,
        project_dir=settings.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=is_partial)],
    )
    if accelerator.distributed_type not in _DISTRIBUTED:
        raise ValueError(
            f"train: expected one process or data parallelism, got {accelerator.distributed_type.value} "
            "from accelerate's configuration; --shard is FSDP2."
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"train: expected mixed precision no or bf16, got {accelerator.mixed_precision}.")
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"train: expected gradient_accumulation_steps 1, got {accelerator.gradient_accumulation_steps} "
            "from accelerate's configuration; --accumulate says it here."
        )
    if settings.shard and not torch.distributed.is_initialized():
        raise ValueError(
            "train: expected processes to split the model among (torchrun, accelerate launch), got one."
        )
    return accelerator


def _optimizer(model: PreTrainedModel, settings: TrainSettings) -> torch.optim.Optimizer:
    trained = trained_parameters(model)
    if not trained:
        raise ValueError("train: expected a model in which something requires gradients, got none.")
    rates = settings.learning_rate, settings.betas, settings.weight_decay
    return adamw(trained, *rates, stochastic_rounding=settings.stochastic_rounding)


def _split(share: Share, settings: TrainSettings) -> tuple[Share, Share | None]:
    """A step's items: (of the data, of what is kept)."""
    if settings.keep_ratio is None:
        return share, None
    both = share.split(settings.keep_ratio)
    if settings.shard and any(part.items_per_step % share.processes for part in both):
        raise ValueError(
            "train: expected keep_ratio to give every process as many items, as all have to call a split "
            f"model equally, got {both[1].items_per_step} of {share.items_per_step} items for "
            f"{share.processes} processes."
        )
    return both


def _describe(data: Dataset | TokenStream) -> dict[str, Any]:
    return data.describe() if isinstance(data, TokenStream) else describe_items(data)


def _quantized(model: PreTrainedModel) -> str | None:
    """How the base was."""
    base = model.llm_model if isinstance(model, HybridModel) else model
    how = getattr(base.config, "quantization_config", None)
    return None if how is None else str(how if isinstance(how, dict) else how.to_dict())


def _is_due(step: int, every: int | None, last: int) -> bool:
    return step == last or (every is not None and step % every == 0)
