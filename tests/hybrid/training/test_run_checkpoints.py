"""Checkpoints of a run: every byte is watched, what is damaged is named, a kill at any moment loses none."""

import json
import os
import re
import shutil
import sys

import pytest
import torch
from accelerate import PartialState
from transformers.utils import logging

from hybrid.training import checkpoints as run_state
from hybrid.training import curve, run_folder
from hybrid.training.checkpoint_tensors import trained_parameters
from hybrid.training.loop import train
from hybrid.training.optimizer import adamw
from tests.hybrid.training.test_train import (
    Stopped,
    assert_equal,
    lines_of,
    phase_1,
    settings_for,
    stop_after,
)
from tests.support import forked
from tests.support.tiny_text import Counting, character_tokenizer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 20 steps with the checkpoints of steps 10 and 20, and the model that came out."""
    folder, model = tmp_path_factory.mktemp("runs") / "run", phase_1()
    train(model, Counting(), settings_for(folder), tokenizer=character_tokenizer())
    return folder, model


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


def resume(folder, **changes):
    model = phase_1()
    settings = settings_for(folder, **changes)
    train(model, Counting(), settings, resume=True, tokenizer=character_tokenizer())
    return model


@pytest.mark.parametrize("are_shown", [True, False])
def test_saving_leaves_the_bars_of_transformers_as_they_were(are_shown, tmp_path):
    were_shown = logging.is_progress_bar_enabled()
    show = {True: logging.enable_progress_bar, False: logging.disable_progress_bar}
    try:
        show[are_shown]()
        train(phase_1(), Counting(), settings_for(tmp_path))
        assert logging.is_progress_bar_enabled() == are_shown
    finally:
        show[were_shown]()


def flip_a_bit(path, at=-3):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit_state(checkpoint, **changes):
    path = checkpoint / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def swap(folder, other, name):
    one, two = folder / name, other / name
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


# What is damaged

DAMAGES = {
    "a bit of the weights": (
        lambda c: flip_a_bit(c / "model.safetensors"),
        "model.safetensors is not as it was written",
    ),
    "a bit of the moments": (
        lambda c: flip_a_bit(c / "optimizer.safetensors"),
        "optimizer.safetensors is not as it was written",
    ),
    "a config": (
        lambda c: flip_a_bit(c / "config.json", 5),
        "config.json is not as it was written",
    ),
    "the weights of another step": (
        lambda c: shutil.copy(c.parent / "checkpoint-000010" / "model.safetensors", c),
        "model.safetensors is not as it was written",
    ),
    "weights cut short": (
        lambda c: os.truncate(c / "model.safetensors", 100),
        r"model.safetensors had [\d,]+ bytes and has 100",
    ),
    "no weights": (
        lambda c: (c / "model.safetensors").unlink(),
        "model.safetensors cannot be read",
    ),
    "no state": (lambda c: (c / "state.json").unlink(), "state.json cannot be read"),
    "an edited step": (lambda c: edit_state(c, step=19), "another checksum"),
    "an edited loss": (lambda c: edit_state(c, loss_sum=1.0), "another checksum"),
    "an edited name": (lambda c: edit_state(c, files={}), "another checksum"),
    "a list for a state": (lambda c: (c / "state.json").write_text("[]"), "a JSON object in"),
    "half a state": (lambda c: os.truncate(c / "state.json", 50), "got a damaged one"),
    "a state of nothing": (lambda c: (c / "state.json").write_text("{}"), "what a run writes there"),
    "a state so deep": (
        lambda c: (c / "state.json").write_text("[" * 10**5),
        "nested too deeply|got a damaged one",
    ),
    "another step's checkpoint": (
        lambda c: (shutil.rmtree(c), shutil.copytree(c.parent / "checkpoint-000010", c)),
        "it is of step 10",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(damage, folder, capsys):
    act, says = DAMAGES[damage]
    act(folder / "checkpoint-000020")
    what = json.loads((folder / "run.json").read_text())
    found = run_state.find(folder, what, resume=True)
    assert found.checkpoint == folder / "checkpoint-000010"
    assert len(found.notes) == 1
    assert re.search(f"passed over checkpoint-000020: .*({says})", found.notes[0])
    with pytest.warns(UserWarning, match=f"passed over checkpoint-000020: .*({says})"):
        assert run_state.latest(folder) == folder / "checkpoint-000010"


def test_a_run_goes_on_from_the_one_before_and_the_damaged_one_stays(folder, finished, capsys):
    newest = folder / "checkpoint-000020"
    flip_a_bit(newest / "model.safetensors")
    damaged = (newest / "model.safetensors").read_bytes()
    with pytest.warns(UserWarning, match="it is damaged-checkpoint-000020 now"):
        model = resume(folder)
    assert_equal(model, finished[1])
    assert lines_of(folder) == lines_of(finished[0])
    out = capsys.readouterr().out
    assert "passed over checkpoint-000020: model.safetensors is not as it was written" in out
    assert f"going on from {folder / 'checkpoint-000010'}" in out
    assert (folder / "damaged-checkpoint-000020" / "model.safetensors").read_bytes() == damaged


def test_a_checkpoint_of_another_run_is_passed_over(folder, tmp_path):
    train(phase_1(), Counting(), settings_for(tmp_path / "other", seed=1))
    shutil.rmtree(folder / "checkpoint-000020")
    shutil.copytree(tmp_path / "other" / "checkpoint-000020", folder / "checkpoint-000020")
    _, damaged = run_state.newest(folder, run_folder.read_run(folder)["id"])
    assert damaged == ["checkpoint-000020: it is of another run"]


def test_none_is_whole(folder):
    flip_a_bit(folder / "checkpoint-000020" / "model.safetensors")
    (folder / "checkpoint-000010" / "state.json").unlink()
    says = (
        "expected a whole checkpoint in .*, got none: checkpoint-000020: model.safetensors is not .*; "
        "checkpoint-000010: state.json cannot be read"
    )
    with pytest.raises(ValueError, match=says):
        resume(folder)
    with pytest.raises(ValueError, match=says):
        run_state.latest(folder)


# What is removed, and what is not


def test_a_checkpoint_with_somebodys_file_in_it_stays(folder):
    (folder / "checkpoint-000010" / "evaluation.json").write_text("{}")
    with pytest.warns(
        UserWarning, match="checkpoint-000010 stays, for the run did not write evaluation.json"
    ):
        resume(folder, steps=30)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [
        f"checkpoint-0000{step}" for step in (10, 20, 30)
    ]


def test_somebodys_folder_of_a_checkpoints_name_is_refused(folder):
    other = folder / "checkpoint-000030"
    other.mkdir()
    (other / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="expected only checkpoints of the run in .*, got checkpoint-000030"):
        resume(folder, steps=30)
    assert [path.name for path in other.iterdir()] == ["trainer_state.json"]


def test_what_is_left_over_is_removed_but_not_somebody_elses(folder):
    run = run_folder.read_run(folder)
    (folder / f"{run_folder.saving(run)}000030").mkdir()
    (folder / f"{run_folder.saving(run)}000030" / "model.safetensors").write_text("half")
    (folder / ".saving-0123456789ab-000030").mkdir()
    (folder / ".saving-notes").write_text("mine")
    resume(folder)
    assert sorted(path.name for path in folder.glob(".saving-*")) == [
        ".saving-0123456789ab-000030",
        ".saving-notes",
    ]


# Killed at every file operation


class Watched:
    """Counts a process's file operations below `folder`, and ends it before the one of number `at`."""

    def __init__(self, folder, at=None):
        self.folder, self.at, self.count = str(folder), at, 0

    def install(self):
        sys.addaudithook(self.hear)
        self.fsync = os.fsync
        os.fsync = self.sync

    def hear(self, event, arguments):
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        if event == "open" and isinstance(arguments[2], int):
            changes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if changes and str(arguments[0]).startswith(self.folder):
            self.comes()

    def sync(self, descriptor):
        self.comes(descriptor)
        self.fsync(descriptor)

    def comes(self, descriptor=None):
        self.count += 1
        if self.count == self.at:
            if descriptor is not None and not os.path.isdir(f"/proc/self/fd/{descriptor}"):
                # what was not on the disk yet is lost, half of it
                with open(f"/proc/self/fd/{descriptor}", "r+b") as file:
                    file.truncate(os.fstat(descriptor).st_size // 2)
            os._exit(77)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="tears files by /proc")
def test_a_run_killed_at_any_file_operation_keeps_a_whole_checkpoint(finished, tmp_path):
    """Each of them, one after the other, while the checkpoint of step 30 is written and that of 10 goes."""
    run, model = run_folder.read_run(finished[0]), phase_1()
    optimizer = adamw(trained_parameters(model), 1e-2, (0.9, 0.95), 0.01)
    run_state.load(finished[0] / "checkpoint-000020", model, optimizer)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.trm_parameters():
            p.add_(1)
    new = {name: p.detach().clone() for name, p in model.named_parameters()}

    def save(folder):
        progress = run_state.Progress(step=30)
        tokenizer = character_tokenizer()
        run_folder.append_metrics(folder, {"step": 30, "loss": 1.0})
        run_state.save(folder, run, progress, model, optimizer, tokenizer, 2, PartialState())
        curve.draw(run_folder.read_metrics(folder), folder / "curve.png")

    def killed(folder, at):
        def act():
            watched = Watched(folder, at)
            watched.install()
            save(folder)
            (tmp_path / "count").write_text(str(watched.count))

        return forked.run(act)

    shutil.copytree(finished[0], tmp_path / "whole")
    assert killed(tmp_path / "whole", None) == 0
    operations = int((tmp_path / "count").read_text())
    assert operations > 25, "the hook hears them"
    steps, fresh = [], phase_1()
    other = adamw(trained_parameters(fresh), 1e-2, (0.9, 0.95), 0.01)
    for at in range(1, operations + 1):
        folder = shutil.copytree(finished[0], tmp_path / str(at))
        assert killed(folder, at) == 77
        checkpoint, damaged = run_state.newest(folder, run["id"])
        assert not damaged, at
        steps.append(run_state.load(checkpoint, fresh, other).step)
        expected = {20: old, 30: new}[steps[-1]]
        assert all(torch.equal(p, expected[name]) for name, p in fresh.named_parameters()), at
        run_folder.begin(folder, run, steps[-1])
        assert not list(folder.glob(".saving-*")), at
        assert all(run_state._fault(path, run["id"]) is None for path in folder.glob("checkpoint-*"))
        shutil.rmtree(folder)
    assert steps == sorted(steps)
    assert {20, 30} == set(steps)


def test_a_killed_run_goes_on(finished, tmp_path):
    """In the middle of the second checkpoint; weights and metrics are those of a run that was not killed."""

    def act():
        watched = Watched(tmp_path / "b")

        def on_step(step, loss):
            if step == 20:
                watched.at = 12
                watched.install()

        settings = settings_for(tmp_path / "b")
        train(phase_1(), Counting(), settings, tokenizer=character_tokenizer(), on_step=on_step)

    assert forked.run(act) == 77
    assert list((tmp_path / "b").glob(".saving-*"))
    assert run_state.latest(tmp_path / "b").name == "checkpoint-000010"
    assert_equal(resume(tmp_path / "b"), finished[1])
    assert lines_of(tmp_path / "b") == lines_of(finished[0])
    assert not list((tmp_path / "b").glob(".saving-*"))


# More steps


def test_a_finished_run_can_be_extended(finished, folder, tmp_path, capsys, monkeypatch):
    """From its end on the rate is that of a run of more steps; stopped in between, it ends the same."""
    extended = resume(folder, steps=40)
    assert "extended from 20 to 40 steps: from step 21 on the learning rate" in capsys.readouterr().out
    rates = {line["step"]: line["learning_rate"] for line in lines_of(folder) if "loss" in line}
    first, all_of_it = settings_for(folder), settings_for(folder, steps=40)
    assert rates[20] == first.rate_at(19)
    assert [rates[step] for step in (24, 32, 40)] == [all_of_it.rate_at(step - 1) for step in (24, 32, 40)]

    other = shutil.copytree(finished[0], tmp_path / "other")
    with pytest.raises(Stopped):
        settings = settings_for(other, steps=40)
        arguments = {"resume": True, "tokenizer": character_tokenizer()}
        train(phase_1(), Counting(), settings, on_step=stop_after(33), **arguments)
    assert_equal(resume(other, steps=40), extended)

    # one run whose rate is that of 20 steps, then that of 40
    rate_of_40 = type(first).rate_at
    monkeypatch.setattr(
        type(first), "rate_at", lambda self, step: rate_of_40(first if step < 20 else all_of_it, step)
    )
    straight = phase_1()
    train(straight, Counting(), settings_for(tmp_path / "straight", steps=40))
    assert_equal(straight, extended)


def test_steps_that_a_run_cannot_have(folder, tmp_path):
    with pytest.raises(
        ValueError, match="expected steps 20 as it began, or more, got 15. What a run computes"
    ):
        resume(folder, steps=15)
    with pytest.raises(Stopped):
        train(phase_1(), Counting(), settings_for(tmp_path / "b"), on_step=stop_after(13))
    says = "expected steps 20 as it began, got 40: 10 are done. Resume it with 20; when it has ended"
    with pytest.raises(ValueError, match=says):
        train(phase_1(), Counting(), settings_for(tmp_path / "b", steps=40), resume=True)
