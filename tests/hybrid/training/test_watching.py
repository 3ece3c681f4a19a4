"""What is shown of a run is what happened: its speed, the time left, the bar, the curve."""

from types import SimpleNamespace

import pytest

from hybrid.training import checkpoints as run_state
from hybrid.training import curve, run_folder, window
from hybrid.training.loop import train
from tests.hybrid.training.test_train import Stopped, phase_1, settings_for, stop_after
from tests.support.tiny_text import Counting

IN_A_STEP = 36  # tokens: three rows of 12


@pytest.fixture
def clock(monkeypatch):
    """Time that passes in forwards and saves alone: 2 s a step, 50 s a held-out batch, 300 s a save."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(window, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    save = run_state.save

    def slow_save(*arguments):
        clock.now += 300
        save(*arguments)

    monkeypatch.setattr(run_state, "save", slow_save)
    return clock


def timed(clock):
    model = phase_1()

    def pass_time(*_):
        clock.now += 2 if model.training else 50

    model.register_forward_pre_hook(pass_time)
    return model


def test_speed_and_time_left_are_of_training_alone(tmp_path, clock, capsys):
    settings = settings_for(tmp_path, eval_every=2, save_every=5)
    result = train(timed(clock), Counting(), settings, {"new": Counting(4)})
    assert clock.now > 20 * 2 + 11 * 50 + 4 * 300
    assert result.tokens_per_second == IN_A_STEP / 2
    lines = [line for line in run_folder.read_metrics(tmp_path) if "loss" in line]
    assert [line["tokens_per_second"] for line in lines] == [IN_A_STEP / 2] * 5
    shown = [line.split("  ") for line in capsys.readouterr().out.splitlines() if line.endswith(" left")]
    assert [(words[0], *words[2:]) for words in shown] == [
        ("step 4/20", "18 tokens/s", "0:32 left"),
        ("step 8/20", "18 tokens/s", "0:24 left"),
        ("step 12/20", "18 tokens/s", "0:16 left"),
        ("step 16/20", "18 tokens/s", "0:08 left"),
        ("step 20/20", "18 tokens/s", "0:00 left"),
    ]
    assert [words[1] for words in shown] == [f"loss {line['loss']:.4f}" for line in lines]


def test_a_resumed_run_tells_its_own_speed_and_what_is_left_of_all(tmp_path, clock, capsys):
    with pytest.raises(Stopped):
        train(timed(clock), Counting(), settings_for(tmp_path), on_step=stop_after(13))
    capsys.readouterr()
    result = train(timed(clock), Counting(), settings_for(tmp_path), resume=True)
    assert result.tokens_per_second == IN_A_STEP / 2
    lefts = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" left")]
    assert [line.split("  ")[-1] for line in lefts] == ["0:16 left", "0:08 left", "0:00 left"]


def test_the_bar_counts_the_steps_of_all_runs(tmp_path, monkeypatch, capsys):
    def in_a_terminal(*arguments, **options):
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        monkeypatch.setenv("TERM", "xterm")
        with pytest.raises(Stopped):
            train(phase_1(), Counting(), settings_for(tmp_path), *arguments, **options)
        return capsys.readouterr().out

    first = in_a_terminal(on_step=stop_after(13))
    assert "13/20" in first and "14/20" not in first
    assert "loss " in first and " tokens/s" in first
    assert "going on from" not in first
    second = in_a_terminal(on_step=stop_after(15), resume=True)
    assert "15/20" in second and "16/20" not in second
    assert "going on from" in second


METRICS = [
    {"step": 0, "held_out": {"new": 4.5, "known": 3.25}},
    {"step": 4, "loss": 4.0, "learning_rate": 1e-3},
    {"step": 5, "held_out": {"new": 3.0, "known": 3.5}},
    {"step": 8, "loss": 2.5, "held_out": {"new": 2.0, "known": 3.75}},
]


def test_the_curve_has_every_loss_where_it_was_measured(tmp_path, monkeypatch):
    figures = []

    class Figure(curve.Figure):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            figures.append(self)

    monkeypatch.setattr(curve, "Figure", Figure)
    curve.draw(METRICS, tmp_path / "curve.png")
    ((axes,),) = (figure.axes for figure in figures)
    drawn = {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in axes.lines}
    assert drawn == {
        "training": [(4, 4.0), (8, 2.5)],
        "new": [(0, 4.5), (5, 3.0), (8, 2.0)],
        "known": [(0, 3.25), (5, 3.5), (8, 3.75)],
    }
    assert (axes.get_xlabel(), axes.get_title(loc="left")) == ("step", "loss, nats per token")


def test_the_curve_of_a_run_is_that_of_its_metrics(tmp_path):
    settings = settings_for(tmp_path / "run", eval_every=5)
    result = train(phase_1(), Counting(), settings, {"new": Counting(4)})
    curve.draw(run_folder.read_metrics(tmp_path / "run"), tmp_path / "again.png")
    assert result.curve.read_bytes() == (tmp_path / "again.png").read_bytes()
    curve.draw([], tmp_path / "empty.png")
    assert result.curve.read_bytes() != (tmp_path / "empty.png").read_bytes()
