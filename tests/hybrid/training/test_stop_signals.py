"""Ctrl-C, SIGTERM, SIGHUP in training: the step is finished and saved; workers end with their parent."""

import multiprocessing
import os
import signal
import threading
import time

import psutil
import pytest
from accelerate import PartialState

from hybrid.data.sources import Sources
from hybrid.data.stream import TokenStream
from hybrid.training import checkpoints as run_state
from hybrid.training import run_folder
from hybrid.training.loop import train
from hybrid.training.processes import end_with_parent
from hybrid.training.stop_signals import StopSignals
from tests.hybrid.training.test_train import assert_equal, lines_of, phase_1, settings_for
from tests.support import forked
from tests.support.tiny_text import TEXT, Counting, character_tokenizer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


@pytest.fixture
def ctrl_c():
    """As Python begins; a process that a shell put into the background was born without SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def sends(*numbers, at):
    """Called after step `at`, it sends the process these signals."""

    def on_step(step, loss):
        if step == at:
            for number in numbers:
                os.kill(os.getpid(), number)

    return on_step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_step_is_finished_and_saved(number, tmp_path):
    straight = phase_1()
    train(straight, Counting(), settings_for(tmp_path / "a"), {"new": Counting(5)})

    def act():
        signal.signal(number, signal.SIG_DFL)  # under nohup a process is born without SIGHUP
        settings = settings_for(tmp_path / "b")
        train(phase_1(), Counting(), settings, {"new": Counting(5)}, on_step=sends(number, at=13))

    assert forked.run(act) == -number
    assert run_state.latest(tmp_path / "b").name == "checkpoint-000013"
    assert not list((tmp_path / "b").glob(".saving-*"))
    resumed = phase_1()
    train(resumed, Counting(), settings_for(tmp_path / "b"), {"new": Counting(5)}, resume=True)
    assert_equal(resumed, straight)
    assert lines_of(tmp_path / "b") == lines_of(tmp_path / "a")


def test_ctrl_c_saves_the_step_and_is_an_interrupt(ctrl_c, tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt):
        on_step = sends(signal.SIGINT, at=13)
        train(phase_1(), Counting(), settings_for(tmp_path), on_step=on_step)
    assert run_state.latest(tmp_path).name == "checkpoint-000013"
    assert (
        "SIGINT: the step is finished and saved first; a second one ends the run at once"
        in capfd.readouterr().err
    )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_while_an_ended_run_is_measured_again(ctrl_c, tmp_path):
    class Interrupting(Counting):
        def __getitem__(self, index):
            if index == 0:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(index)

    train(phase_1(), Counting(), settings_for(tmp_path), {"new": Counting(5)})
    with pytest.raises(KeyboardInterrupt):
        train(phase_1(), Counting(), settings_for(tmp_path), {"new": Interrupting(5)}, resume=True)


def test_a_second_ctrl_c_interrupts_at_once(ctrl_c, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        on_step = sends(signal.SIGINT, signal.SIGINT, at=13)
        train(phase_1(), Counting(), settings_for(tmp_path), on_step=on_step)
    assert run_state.latest(tmp_path).name == "checkpoint-000010"
    with run_folder.held(tmp_path, PartialState()):
        pass


def test_a_second_signal_ends_it_at_once(tmp_path):
    def act():
        on_step = sends(signal.SIGTERM, signal.SIGTERM, at=13)
        train(phase_1(), Counting(), settings_for(tmp_path), on_step=on_step)

    assert forked.run(act) == -signal.SIGTERM
    assert run_state.latest(tmp_path).name == "checkpoint-000010"


def test_what_a_launcher_sends_once_more_is_the_same_signal(monkeypatch):
    processes = type("Two", (), {"num_processes": 2, "is_main_process": True})()
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    killed = []
    monkeypatch.setattr(os, "kill", lambda process, number: killed.append(number))
    with StopSignals(processes) as signals:
        signals._note(signal.SIGTERM, None)
        now[0] += 1
        signals._note(signal.SIGTERM, None)
        assert not killed
        now[0] += 10
        signals._note(signal.SIGTERM, None)
    assert killed == [signal.SIGTERM]


def test_handlers_are_put_back_and_a_callers_own_is_called(tmp_path):
    called = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    try:
        mine = signal.getsignal(signal.SIGTERM)
        train(phase_1(), Counting(), settings_for(tmp_path / "a", steps=3))
        assert signal.getsignal(signal.SIGTERM) is mine
        with pytest.raises(SystemExit) as ended:
            on_step = sends(signal.SIGTERM, at=2)
            train(phase_1(), Counting(), settings_for(tmp_path / "b", steps=5), on_step=on_step)
        assert ended.value.code == 128 + signal.SIGTERM
        assert called == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is mine
        assert run_state.latest(tmp_path / "b").name == "checkpoint-000002"
        with pytest.raises(ValueError, match="keep and keep_ratio together"):
            train(phase_1(), Counting(), settings_for(tmp_path / "c"), keep=Counting())
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_is_ignored_stays_ignored():
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(PartialState()) as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.agreed() == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_it_trains_in_another_thread(tmp_path):
    done = []
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(
        target=lambda: done.append(train(phase_1(), Counting(), settings_for(tmp_path, steps=2)))
    )
    thread.start()
    thread.join()
    assert done[0].steps == 2
    assert signal.getsignal(signal.SIGTERM) is before


# Workers


@pytest.fixture
def stream(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)

    def make():
        return TokenStream(Sources([str(tmp_path / "text.txt")]), character_tokenizer(), 16, workers=2)

    return make


def train_until_told(stream, folder, told):
    """A run with workers, in a process of its own that writes their ids to `told` and goes on."""

    def act():
        def on_step(step, loss):
            if step == 3:
                ids = [str(child.pid) for child in psutil.Process().children(recursive=True)]
                told.with_suffix(".part").write_text(" ".join(ids))
                told.with_suffix(".part").rename(told)
            time.sleep(0.05 if step > 3 else 0)

        train(phase_1(), stream(), settings_for(folder, steps=5000, save_every=None), on_step=on_step)

    process = forked.start(act)
    ends = time.monotonic() + 120
    while not told.exists():
        assert time.monotonic() < ends
        time.sleep(0.05)
    workers = [int(word) for word in told.read_text().split()]
    assert len(workers) >= 2
    return process, workers


def all_end(workers):
    ends = time.monotonic() + 60
    while left := [worker for worker in workers if is_running(worker)]:
        if time.monotonic() > ends:
            for worker in left:
                os.kill(worker, signal.SIGKILL)
            pytest.fail(f"{len(left)} workers outlive their parent")
        time.sleep(0.1)


def is_running(process):
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_workers_end_with_a_parent_that_is_killed(stream, tmp_path):
    process, workers = train_until_told(stream, tmp_path / "run", tmp_path / "told")
    os.kill(process, signal.SIGKILL)
    assert forked.wait(process) == -signal.SIGKILL
    all_end(workers)
    with run_folder.held(tmp_path / "run", PartialState()):
        pass


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="told by whom a signal is sent")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_leaves_the_workers_to_the_last_step(number, ctrl_c, stream, tmp_path):
    process, workers = train_until_told(stream, tmp_path / "run", tmp_path / "told")
    for one in (*workers, process):
        os.kill(one, number)
    assert forked.wait(process) == (-number if number == signal.SIGTERM else 1)  # 1: KeyboardInterrupt
    assert run_state.step_of(run_state.latest(tmp_path / "run")) >= 3
    all_end(workers)


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="told by whom a signal is sent")
def test_a_worker_ends_at_once_when_its_parent_says_so():
    """As torch ends the workers of a loader: by itself, in good order, and not by the signal."""
    context = multiprocessing.get_context("fork")
    ready, told = context.Pipe(duplex=False)

    def work():
        end_with_parent()
        told.send("ready")
        time.sleep(60)
        os._exit(7)

    worker = context.Process(target=work)
    worker.start()
    assert ready.recv() == "ready"
    worker.terminate()
    worker.join()
    assert worker.exitcode == 0
