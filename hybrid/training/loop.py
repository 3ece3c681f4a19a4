"""The loop: batch -> one step (one_step.py) -> log -> evaluate -> save.

It trains whatever requires gradients in any causal language model of transformers; the phase was chosen
before (phases.py). Everything random in a step is a function of (seed, step, rank): the data's order, the
dropout, and a hybrid's number of recursion steps, which is the same on every rank. So a resumed run sees
what an uninterrupted one would have seen.
"""

import math
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybrid.data.stream import TokenStream
from hybrid.model.hybrid_model import HybridModel
from hybrid.model.quantized_base import is_quantized_tensor
from hybrid.training import checkpoints as run_state
from hybrid.training import curve, fingerprints, run_folder, shard, trackers
from hybrid.training.accelerator import accelerator_of
from hybrid.training.batches import Batch, Share, batches, shares_of
from hybrid.training.checkpoint_tensors import trained_parameters
from hybrid.training.checkpoints import Progress
from hybrid.training.depth import check_model, full_depth_afterwards
from hybrid.training.description import describe
from hybrid.training.evaluate import check_separate, text_loss_of_all
from hybrid.training.hidden_states import caches_of
from hybrid.training.one_step import OneStep
from hybrid.training.optimizer import adamw
from hybrid.training.processes import on_main, this_process
from hybrid.training.progress import TrainingDisplay
from hybrid.training.settings import TrainSettings
from hybrid.training.stop_signals import StopSignals, end_by
from hybrid.training.window import Window


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

    On SIGINT (Ctrl-C), SIGTERM or SIGHUP the step is finished and saved, then the signal ends the process
    (stop_signals.py).

    Errors: ValueError when nothing requires gradients, when the folder cannot be written to, holds another
    run or is in use by one, when a resumed run differs, or when loss or gradient are no numbers too often:
    steps with such are not taken.
    """
    with run_folder.held(Path(settings.output_dir), this_process()):
        run = _Training(model, data, settings, held_out or {}, tokenizer, keep)
        checkpoint = run.open(resume)
        if settings.report_to:
            trackers.start(run.accelerator, asdict(settings))
        with run.display, StopSignals(this_process()) as signals, full_depth_afterwards(model):
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
        self.accelerator = accelerator_of(model, settings)
        precision = self.accelerator.mixed_precision
        self.hidden_states = caches_of(model, data, keep, settings, precision)
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
            device = self.accelerator.device.type
            mesh = init_device_mesh(device, (self.accelerator.num_processes,))
            shard.shard(model, mesh, torch.bfloat16 if precision == "bf16" else None)
        self.optimizer = _optimizer(model, settings)
        self.share = Share(
            self.accelerator.process_index,
            self.accelerator.num_processes,
            settings.batch_size,
            settings.accumulate,
        )
        self.data_share, self.keep_share = shares_of(self.share, settings.keep_ratio, settings.shard)
        if not isinstance(model, HybridModel) and settings.keep_target == "base":
            raise ValueError(f"train: keep_target='base' expected a HybridModel, got {type(model).__name__}.")
        check_model(settings.recursion_curriculum, model)
        self.ended_by = 0  # a signal

    def open(self, resume: bool) -> Path | None:
        """Settle where to begin; the checkpoint that was loaded, or None at step 0."""
        is_main = self.accelerator.is_main_process
        found = on_main(this_process(), lambda: run_state.find(self.folder, self._describe(), resume))
        self.run, checkpoint = found.run, found.checkpoint

        parallel_model: Any = self.model
        if not self.is_sharded:
            parallel_model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.progress = Progress()
        if checkpoint is not None:
            self.progress = run_state.load(checkpoint, self.model, self.optimizer)
        if any(isinstance(data, TokenStream) and data.separate for data in (self.data, self.keep)):
            check_separate(self.model)
        self.place, self.keep_place = self.progress.place, self.progress.keep_place
        self.window = Window(self.progress, self.accelerator.device)
        self.display = TrainingDisplay(self.settings.steps, self.progress.step, is_main)
        for note in found.notes:
            self.display.say(note)
        if resume:
            self.display.say(
                f"going on from {checkpoint or f'step 0: there is no checkpoint in {self.folder}'}"
            )
        for cache in self.hidden_states:
            cache.open(this_process(), self.display.say)
        self.one_step = OneStep(
            self.model,
            parallel_model,
            self.optimizer,
            self.accelerator,
            self.settings,
            self.share,
            self.keep_share,
            self.hidden_states,
        )
        if is_main:
            run_folder.begin(self.folder, self.run, None if checkpoint is None else self.progress.step)
        return checkpoint

    def _describe(self) -> dict[str, Any]:
        of_processes = {
            "mixed_precision": self.accelerator.mixed_precision,
            "items_per_step": self.share.items_per_step,
        }
        texts = self.data, self.keep, self.held_out, self.tokenizer
        return describe(self.model, self.settings, *texts, self.base, of_processes)

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
            taken = self.one_step.take(step - 1, of_data[0], of_keep[0])
            window.add(taken.loss, taken.grad_norm, taken.tokens, taken.is_good)
            if not taken.is_good:
                self._skipped(step, taken.loss.item(), taken.grad_norm.item())
            self.place, self.keep_place = of_data[1], of_keep[1]
            self.display.step()
            if on_step is not None and self.accelerator.is_main_process:
                on_step(step, taken.loss.item())
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
            self.ended_by = self.ended_by or signals.agreed()
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
        losses = {
            name: text_loss_of_all(self.model, data, self.settings.batch_size).per_token
            for name, data in self.held_out.items()
        }
        if losses and step is not None:
            self.display.say(
                f"step {step}: held-out loss "
                + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
                + " nats per token"
            )
        return losses

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


def _optimizer(model: PreTrainedModel, settings: TrainSettings) -> torch.optim.Optimizer:
    trained = trained_parameters(model)
    if not trained:
        raise ValueError("train: expected a model in which something requires gradients, got none.")
    rates = settings.learning_rate, settings.betas, settings.weight_decay
    return adamw(trained, *rates, stochastic_rounding=settings.stochastic_rounding)


def _is_due(step: int, every: int | None, last: int) -> bool:
    return step == last or (every is not None and step % every == 0)
