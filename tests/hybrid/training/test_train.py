"""Training: phases, the loop, resuming it bit for bit, and what a killed run leaves behind."""

import json
from dataclasses import replace

import pytest
import torch
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hybrid.training import checkpoint_tensors
from hybrid.training import checkpoints as run_state
from hybrid.training.evaluate import text_loss
from hybrid.training.loop import train
from hybrid.training.phases import PHASES, enter
from hybrid.training.settings import TrainSettings
from tests.support.tiny_text import Counting, tiny_base, tiny_hybrid


class Stopped(Exception):
    """Raised by a test in the middle of a run."""


def settings_for(folder, **changes):
    few = {"steps": 20, "batch_size": 3, "learning_rate": 1e-2, "log_every": 4, "save_every": 10}
    return TrainSettings(folder, **few | changes)


def phase_1():
    model = tiny_hybrid(tiny_base(dropout=0.2))
    enter(model, 1)
    return model


def phase_2():
    model = tiny_hybrid(tiny_base(dropout=0.2))
    enter(model, 2)
    return model


def plain_base():
    return tiny_base(dropout=0.2)


def stop_after(step):
    def on_step(done, loss):
        if done == step:
            raise Stopped

    return on_step


def without_speed(metrics):
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in metrics]


def lines_of(folder):
    return without_speed(json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())


def assert_equal(model, other):
    """Bit for bit, and every parameter is looked at."""
    ours, others = dict(model.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == others.keys()
    assert not [name for name in ours if not torch.equal(ours[name], others[name])]


# Phases


def test_phase_1_trains_the_block_alone():
    model = tiny_hybrid()
    assert enter(model, 1).learning_rate == 1e-4
    assert {p for p in model.parameters() if p.requires_grad} == set(model.trm_parameters())


def test_phase_2_trains_everything_also_after_phase_1():
    model = tiny_hybrid()
    enter(model, 1)
    assert enter(model, 2).learning_rate == 1e-5
    assert all(p.requires_grad for p in model.parameters())


def test_only_what_trains_leaves_float16():
    model = tiny_hybrid(tiny_base().half(), trm_dtype="float16")
    with pytest.warns(UserWarning, match="float16 tensors .* brought to float32"):
        enter(model, 1)
    assert {p.dtype for p in model.trm_parameters()} == {torch.float32}
    assert {p.dtype for _, p in model.base_named_parameters()} == {torch.float16}
    with pytest.warns(UserWarning, match="brought to float32"):
        enter(model, 2)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_there_are_two_phases():
    with pytest.raises(ValueError, match="expected a phase of 1, 2, got 3"):
        enter(tiny_hybrid(), 3)
    assert [phase.trains_base for phase in PHASES.values()] == [False, True]


# The loop


def test_a_run_learns_and_leaves_the_base_alone(tmp_path):
    model, new, known = phase_1(), Counting(10, first=50), Counting(10)
    base = {name: p.clone() for name, p in model.base_named_parameters()}
    result = train(model, Counting(), settings_for(tmp_path, steps=60), {"new": new, "known": known})

    assert all(torch.equal(p, base[name]) for name, p in model.base_named_parameters())
    assert result.steps == 60
    assert result.tokens_per_second > 0
    assert result.held_out_before.keys() == result.held_out_after.keys() == {"new", "known"}
    assert result.held_out_after["known"] < result.held_out_before["known"] - 0.3
    with torch.no_grad():
        assert result.held_out_after["new"] == pytest.approx(text_loss(model, new, 5).per_token, rel=1e-5)
    assert result.checkpoint == tmp_path / "checkpoint-000060"
    assert result.curve.read_bytes().startswith(b"\x89PNG")


def test_what_metrics_hold(tmp_path):
    settings = settings_for(tmp_path, steps=10, log_every=4, eval_every=5, warmup_steps=4)
    losses = []
    result = train(
        phase_1(), Counting(), settings, {"new": Counting(5)}, on_step=lambda _, loss: losses.append(loss)
    )
    lines = [json.loads(line) for line in result.metrics.read_text().splitlines()]

    assert [line["step"] for line in lines if "loss" in line] == [4, 8, 10]
    assert [line["step"] for line in lines if "held_out" in line] == [0, 5, 10]
    logged = [line for line in lines if "loss" in line]
    assert [line["loss"] for line in logged] == pytest.approx(
        [sum(losses[:4]) / 4, sum(losses[4:8]) / 4, sum(losses[8:]) / 2], rel=1e-6
    )
    assert [line["learning_rate"] for line in logged] == [settings.rate_at(step) for step in (3, 7, 9)]
    assert all(line["grad_norm"] > 0 and line["tokens_per_second"] > 0 for line in logged)


def test_the_rate_rises_and_falls():
    for steps, rising in ((4, 0), (100, 20), (1500, 300), (9000, 300)):
        settings = TrainSettings("unused", steps=steps, learning_rate=2.0)
        rates = [settings.rate_at(step) for step in range(rising + 1)]
        assert rates == pytest.approx([*(2.0 * (k + 1) / rising for k in range(rising)), 2.0])
    settings = TrainSettings("unused", steps=100, learning_rate=2.0, warmup_steps=10, final_rate_fraction=0.1)
    assert [settings.rate_at(step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert settings.rate_at(10) == 2.0
    assert settings.rate_at(55) == pytest.approx(1.1)  # half way down
    assert settings.rate_at(100) == pytest.approx(0.2)


def test_a_constant_rate_falls_in_the_last_fifth_only():
    sizes = {"steps": 110, "learning_rate": 2.0, "warmup_steps": 10, "final_rate_fraction": 0.1}
    settings = TrainSettings("unused", schedule="constant-then-decay", **sizes)
    assert [settings.rate_at(step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert {settings.rate_at(step) for step in range(10, 91)} == {2.0}, "a fifth of 100 steps is left"
    assert settings.rate_at(91) < 2.0
    assert settings.rate_at(100) == pytest.approx(1.1)  # half way down
    assert settings.rate_at(110) == pytest.approx(0.2)


def test_a_resumed_run_has_the_same_schedule(tmp_path):
    """Stopped where the rate is constant, it goes on to where it falls; with another schedule it does not."""
    same = {"schedule": "constant-then-decay", "warmup_steps": 2, "log_every": 1}
    straight = phase_1()
    train(straight, Counting(), settings_for(tmp_path / "a", **same))
    rates = [line["learning_rate"] for line in lines_of(tmp_path / "a") if "loss" in line]
    assert rates[2] == rates[13] > rates[18] > rates[19]

    with pytest.raises(Stopped):
        train(phase_1(), Counting(), settings_for(tmp_path / "b", **same), on_step=stop_after(13))
    with pytest.raises(ValueError, match="expected schedule constant-then-decay as it began, got cosine"):
        train(
            phase_1(), Counting(), settings_for(tmp_path / "b", **same | {"schedule": "cosine"}), resume=True
        )
    resumed = phase_1()
    train(resumed, Counting(), settings_for(tmp_path / "b", **same), resume=True)
    assert_equal(resumed, straight)
    assert lines_of(tmp_path / "b") == lines_of(tmp_path / "a")


def test_every_item_comes_once_a_pass(tmp_path):
    seen = []

    class Watched(Counting):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    data = Watched(12)
    train(phase_1(), data, settings_for(tmp_path, steps=8, save_every=None))
    seen = seen[-24:]  # before them: what tells whether the data is the same
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    assert seen[:12] != seen[12:]


def test_labels_of_minus_100_are_not_counted():
    class Half(Counting):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return item | {"labels": torch.where(torch.arange(12) < 6 + index, item["labels"], -100)}

    model, data = tiny_base(), Half(5)
    nats = tokens = 0
    with torch.no_grad():
        for item in (data[i] for i in range(5)):
            chances = model(item["input_ids"][None]).logits[0].double().log_softmax(-1)
            for t in range(1, 12):
                if item["labels"][t] >= 0:
                    nats -= chances[t - 1, item["labels"][t]].item()
                    tokens += 1
    loss = text_loss(model, data, batch_size=2)
    assert loss.tokens == tokens
    assert loss.per_token == pytest.approx(nats / tokens, rel=1e-5)
    assert loss.perplexity == pytest.approx(torch.tensor(nats / tokens).exp().item(), rel=1e-4)


def test_a_float16_base_trains_a_float32_block(tmp_path):
    model = tiny_hybrid(tiny_base().half())
    enter(model, 1)
    result = train(model, Counting(), settings_for(tmp_path, steps=30), {"new": Counting(5)})
    assert {p.dtype for p in model.trm_parameters()} == {torch.float32}
    assert result.held_out_after["new"] < result.held_out_before["new"] - 0.1


# Resuming


@pytest.mark.parametrize("make", [phase_1, phase_2, plain_base])
def test_a_resumed_run_equals_one_that_was_never_stopped(make, tmp_path):
    held_out = {"new": Counting(7, first=30)}
    straight = make()
    result = train(straight, Counting(), settings_for(tmp_path / "a", eval_every=6), held_out)

    settings = settings_for(tmp_path / "b", eval_every=6)
    with pytest.raises(Stopped):
        train(make(), Counting(), settings, held_out, on_step=stop_after(13))
    resumed = make()
    again = train(resumed, Counting(), settings, held_out, resume=True)

    assert_equal(resumed, straight)
    assert lines_of(tmp_path / "b") == lines_of(tmp_path / "a")
    assert again.held_out_before == result.held_out_before
    assert again.held_out_after == result.held_out_after


def test_a_run_stopped_before_its_first_checkpoint_begins_again(tmp_path, capsys):
    straight = phase_1()
    train(straight, Counting(), settings_for(tmp_path / "a"))
    with pytest.raises(Stopped):
        train(phase_1(), Counting(), settings_for(tmp_path / "b"), on_step=stop_after(5))
    resumed = phase_1()
    train(resumed, Counting(), settings_for(tmp_path / "b"), resume=True)
    assert "going on from step 0" in capsys.readouterr().out
    assert_equal(resumed, straight)
    assert lines_of(tmp_path / "b") == lines_of(tmp_path / "a")


def test_a_full_disk_ends_a_run_that_can_be_resumed(tmp_path, monkeypatch):
    def full(tensors, file):
        if file.parent.name.endswith("000020"):
            raise SafetensorError("I/O error: No space left on device")
        save_file(tensors, file)

    monkeypatch.setattr(checkpoint_tensors, "save_file", full)
    says = r"checkpoint of step 20 .* No space left .* from \S+/checkpoint-000010"
    with pytest.raises(ValueError, match=says):
        train(phase_1(), Counting(), settings_for(tmp_path))
    monkeypatch.undo()
    train(phase_1(), Counting(), settings_for(tmp_path), resume=True)
    assert run_state.latest(tmp_path).name == "checkpoint-000020"


def test_a_finished_run_can_be_resumed(tmp_path):
    held_out = {"new": Counting(7)}
    result = train(phase_1(), Counting(), settings_for(tmp_path), held_out)
    model = phase_1()
    again = train(model, Counting(), settings_for(tmp_path), held_out, resume=True)
    assert again == replace(result, tokens_per_second=0.0)
    assert len(lines_of(tmp_path)) == 6  # before, and five of training; what came after stands in the last


@pytest.mark.parametrize(
    ("make", "data", "changes", "message"),
    [
        (lambda: _in_phase_1(trm_hidden_size=32), Counting(), {}, r"config.trm_hidden_size 16 .* got 32"),
        (lambda: _in_phase_1(num_recursion_steps=4), Counting(), {}, r"num_recursion_steps 3 .* got 4"),
        (lambda: phase_2(), Counting(), {}, r"trained\.\S*embed_tokens.weight none .* got torch.float32"),
        (lambda: phase_1(), Counting(), {"batch_size": 4}, r"items_per_step 3 .* got 4"),
        (lambda: phase_1(), Counting(), {"learning_rate": 1e-3}, r"learning_rate 0.01 .* got 0.001"),
        (lambda: phase_1(), Counting(), {"seed": 1}, r"seed 0 .* got 1"),
        (lambda: phase_1(), Counting(41), {}, r"data.items 40 .* got 41"),
        (lambda: phase_1(), Counting(first=1), {}, r"data.sha256 of a sample \w+ as it began, got"),
    ],
)
def test_a_run_is_not_resumed_as_another(make, data, changes, message, tmp_path):
    train(phase_1(), Counting(), settings_for(tmp_path, steps=10))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        train(make(), data, settings_for(tmp_path, **{"steps": 10} | changes), resume=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def _in_phase_1(**changes):
    model = tiny_hybrid(**changes)
    enter(model, 1)
    return model


def test_how_a_run_is_watched_may_change(tmp_path):
    """It is watched as it is told to be from then on, and what it computes stays the same."""
    straight, resumed = phase_1(), phase_1()
    train(straight, Counting(), settings_for(tmp_path / "a"))
    with pytest.raises(Stopped):
        train(phase_1(), Counting(), settings_for(tmp_path / "b"), on_step=stop_after(13))
    changes = {"save_every": 5, "log_every": 1, "eval_every": 2, "keep_checkpoints": 1}
    train(resumed, Counting(), settings_for(tmp_path / "b", **changes), resume=True)
    assert_equal(resumed, straight)
    lines = lines_of(tmp_path / "b")
    assert [line["step"] for line in lines if "loss" in line] == [4, 8, *range(11, 21)]
    assert [path.name for path in (tmp_path / "b").glob("checkpoint-*")] == ["checkpoint-000020"]


def test_there_must_be_a_run_to_resume(tmp_path):
    with pytest.raises(ValueError, match=r"expected a run to resume in .*, got no run.json there"):
        train(phase_1(), Counting(), settings_for(tmp_path), resume=True)


def test_a_new_run_does_not_touch_an_old_one(tmp_path):
    train(phase_1(), Counting(), settings_for(tmp_path))
    message = (
        "expected an output folder without a run, got .*, where an earlier run has saved checkpoint-000020"
        ".* with --resume behind it"
    )
    with pytest.raises(ValueError, match=message):
        train(phase_1(), Counting(), settings_for(tmp_path))
    assert run_state.latest(tmp_path) == tmp_path / "checkpoint-000020"


# Checkpoints


def test_a_checkpoint_is_the_model_as_it_is_saved(tmp_path):
    base = tmp_path / "base"
    tiny_base().save_pretrained(base)
    for phase, folder in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        model = tiny_hybrid(AutoModelForCausalLM.from_pretrained(base))
        enter(model, phase)
        result = train(model, Counting(), settings_for(folder))
        loaded = AutoModelForCausalLM.from_pretrained(result.checkpoint)
        assert_equal(loaded, model)
        assert (loaded.config.base_model_name_or_path is None) == (phase == 2)
        assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".pth")]


def test_the_newest_checkpoints_stay(tmp_path):
    train(phase_1(), Counting(), settings_for(tmp_path, save_every=3, keep_checkpoints=3))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-000015",
        "checkpoint-000018",
        "checkpoint-000020",
    ]


def test_a_line_of_metrics_that_was_cut_short_is_written_again(tmp_path):
    straight = phase_1()
    train(straight, Counting(), settings_for(tmp_path / "a"))
    with pytest.raises(Stopped):
        train(phase_1(), Counting(), settings_for(tmp_path / "b"), on_step=stop_after(13))
    with open(tmp_path / "b" / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "lo')
    train(phase_1(), Counting(), settings_for(tmp_path / "b"), resume=True)
    assert lines_of(tmp_path / "b") == lines_of(tmp_path / "a")


# Refusals


class Broken(Counting):
    """Data with which the model of phase_1 gives NaN in chosen items."""

    bad: frozenset[int] = frozenset()

    def __getitem__(self, index):
        item = super().__getitem__(index)
        if index not in self.bad:
            return item
        return item | {"labels": torch.full_like(item["labels"], -100)}  # a mean over no token


def test_a_step_without_a_number_is_not_taken(tmp_path, capsys):
    """It is counted and told, and everything goes on as if its gradient had never been."""
    data, straight = Broken(20), Counting(20)
    data.bad = frozenset({3})
    settings = settings_for(tmp_path / "a", batch_size=1, steps=40, log_every=8)
    model, losses = phase_1(), {}
    train(model, data, settings, on_step=losses.__setitem__)
    bad = [step for step, loss in losses.items() if loss != loss]
    assert len(bad) == 2, "once a pass"
    assert all(p.isfinite().all() for p in model.parameters())
    lines = lines_of(tmp_path / "a")
    assert [line["step"] for line in lines if "skipped" in line] == [-(-step // 8) * 8 for step in bad]
    for line in lines:
        mine = [losses[step] for step in range(line["step"] - 7, line["step"] + 1) if step not in bad]
        assert line["loss"] == pytest.approx(sum(mine) / len(mine), rel=1e-6)
    assert f"step {bad[0]}: skipped, its loss is nan" in capsys.readouterr().out

    before = {}
    train(phase_1(), straight, replace(settings, output_dir=tmp_path / "b"), on_step=before.__setitem__)
    assert [losses[k] for k in range(1, bad[0])] == [before[k] for k in range(1, bad[0])]
    resumed = phase_1()
    with pytest.raises(Stopped):
        train(phase_1(), data, replace(settings, output_dir=tmp_path / "c"), on_step=stop_after(bad[0] + 11))
    train(resumed, data, replace(settings, output_dir=tmp_path / "c"), resume=True)
    assert_equal(resumed, model)
    assert lines_of(tmp_path / "c") == lines


def test_too_many_in_a_row_end_the_run(tmp_path):
    model = phase_1()
    with pytest.raises(ValueError, match="in step 10, the last of 3 in a row. The last good .*-000005.") as e:
        train(
            model,
            Counting(),
            settings_for(tmp_path, save_every=5, log_every=4, max_skipped_steps=3),
            on_step=lambda step, _: step == 7 and next(model.trm_parameters()).data.fill_(float("nan")),
        )
    assert "expected a loss and a gradient that are numbers, got nan" in str(e.value)
    assert run_state.latest(tmp_path).name == "checkpoint-000005"
    with pytest.raises(ValueError, match="The last good checkpoint is none"):
        train(model, Counting(), settings_for(tmp_path / "b"))


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    model = phase_1()
    with pytest.raises(ValueError, match="expected weights that are numbers after step 10, got others in"):
        train(
            model,
            Counting(),
            settings_for(tmp_path, save_every=5),
            on_step=lambda step, _: step == 9 and next(model.trm_parameters()).data.fill_(float("nan")),
        )
    assert run_state.latest(tmp_path).name == "checkpoint-000005"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "expected steps to be a count of at least 1, got 0"),
        ({"batch_size": -1}, "expected batch_size to be a count of at least 1, got -1"),
        ({"save_every": 0}, "expected save_every to be a count of at least 1, got 0"),
        ({"warmup_steps": 21}, r"expected warmup_steps in 0..20 \(steps\), got 21"),
        ({"learning_rate": 0.0}, "expected learning_rate above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "expected learning_rate above 0, got nan"),
        ({"schedule": "linear"}, "expected schedule to be one of cosine, constant-then-decay, got 'linear'"),
        ({"final_rate_fraction": 1.5}, "expected final_rate_fraction in 0..1, got 1.5"),
        ({"seed": -1}, "expected seed in 0..2\\^32-1, got -1"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        settings_for("unused", **changes)


def test_something_must_be_there_to_train(tmp_path):
    with pytest.raises(ValueError, match="something requires gradients, got none"):
        train(tiny_base().requires_grad_(False), Counting(), settings_for(tmp_path))
    with pytest.raises(ValueError, match="at least one item, got none"):
        train(phase_1(), Counting(0), settings_for(tmp_path))


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"an output folder that can be written to, got .*file/run \(Not a dir"
    ):
        train(phase_1(), Counting(), settings_for(tmp_path / "file" / "run"))


class Tracked(GeneralTracker):
    """A tracker that keeps what it is told."""

    name, requires_logging_directory = "tracked", False
    config: dict = {}  # noqa: RUF012
    lines: list = []  # noqa: RUF012
    is_finished = False

    def __init__(self, run_name, **kwargs):
        super().__init__()
        type(self).lines = []

    @property
    def tracker(self):
        return None

    def store_init_configuration(self, values):
        type(self).config = values

    def log(self, values, step=None, **kwargs):
        type(self).lines.append((step, values))

    def finish(self):
        type(self).is_finished = True


def test_metrics_go_to_accelerates_trackers_too(tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tracked", Tracked)
    settings = settings_for(tmp_path / "run", report_to=("tracked",), log_every=2)
    result = train(phase_1(), Counting(), settings, {"new": Counting(4, 5)})
    written = run_state.read_metrics(tmp_path / "run")
    assert [step for step, _ in Tracked.lines] == [line["step"] for line in written]
    for (_, told), line in zip(Tracked.lines, written, strict=True):
        want = {k: v for k, v in line.items() if k not in ("step", "held_out")}
        want |= {f"held_out/{k}": v for k, v in line.get("held_out", {}).items()}
        assert told == {k: v for k, v in want.items() if isinstance(v, int | float)}
    assert Tracked.config["learning_rate"] == settings.learning_rate and Tracked.is_finished
    assert result.steps == settings.steps
    with pytest.raises(ValueError, match="report_to: expected trackers whose packages are installed"):
        settings_for(tmp_path / "other", report_to=("nowhere",))


def test_metrics_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is no dependency; pip install tensorboard")
    train(phase_1(), Counting(), settings_for(tmp_path / "run", report_to=("tensorboard",)))
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
